"""Faces between two painted ones."""

import cv2
import numpy as np

FLOW_SIDE = 256  # pixels of the faces in which motion is looked for


def mean_face(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The mean of two faces, uint8 (R, R, 3)."""
    return cv2.addWeighted(before, 0.5, after, 0.5, 0)


def midway_face(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The mean of two faces uint8 (R, R, 3), each moved half the way to the other: dense optical flow (DIS).

    A mean alone shows two edges where lips have moved by more than the width of an edge.
    """
    side = before.shape[0]
    greys = [
        cv2.resize(cv2.cvtColor(face, cv2.COLOR_RGB2GRAY), (FLOW_SIDE, FLOW_SIDE), interpolation=cv2.INTER_AREA)
        for face in (before, after)
    ]
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    place = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).astype(np.float32)
    moved = []
    for face, pair in (before, greys), (after, greys[::-1]):
        flow = cv2.resize(search.calc(*pair, None), (side, side)) * (side / FLOW_SIDE)
        # What lies here midway has come from about half the flow before here.
        moved.append(cv2.remap(face, place - 0.5 * flow, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))
    return mean_face(*moved)
