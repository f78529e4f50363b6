"""Mouths as they were filmed, and the choice among them: the cheapest path through a film's mouths."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import cv2
import numpy as np

from latentsync import FPS
from latentsync.retarget.geometry import (
    HEAD,
    LIPS,
    NOSE_TIP,
    head_similarity,
    lip_anchor,
    lip_opening,
    lip_width,
    pixels_per_unit,
    transform,
)

PATCH_MARGIN = 0.22  # head units around the points of a mouth: the pixels that are stored

# Columns of `mouth_features`.
OPENING, WIDTH, TURN, NOD, LIGHT, DETAIL = range(6)

# A mouth costs 1 for each unit, squared, by which it differs from the target.
OPENING_UNIT = 0.35  # of the logarithm
OPENING_OFFSET = 0.03  # added to openings before the logarithm, as small ones all look closed
WIDTH_UNIT, POSE_UNIT, LIGHT_UNIT = 0.08, 0.06, 20.0
DETAIL_UNIT = 0.25  # of the logarithm
# To use the same mouth again. Not in films of more than 25 a second: neighbours are so alike there that two of them
# would be shown in turn, and the mouth would tremble.
STAY_COST = 0.03
# Those of jumps are for films of 25 a second: at other rates there are as many jumps a second.
JUMP_COST = 0.7  # to leave the film's order
LEAP_WEIGHT, MAX_LEAP = 0.5, 4.0  # further cost of a jump per squared difference of the two mouths, up to MAX_LEAP


@dataclass(frozen=True, eq=False)
class Mouth:
    """One frame's mouth, as it was filmed.

    position: number of the frame; pixels: uint8 (h, w, 3); points: `mouth_points` in these pixels; lips: (40, 2), head
    units from their anchor; features: (6,), see `mouth_features`.
    """

    position: int
    pixels: np.ndarray
    points: np.ndarray
    lips: np.ndarray
    features: np.ndarray


class Patch(NamedTuple):
    """Part of a frame: pixels uint8 (h, w, 3), and x, y of its first pixel."""

    pixels: np.ndarray
    corner: tuple[int, int]


def mouth_box(points: np.ndarray, frame_shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The part of a frame (H, W, …) with a mouth and the skin around it: x0, y0, x1, y1, the last two exclusive."""
    margin = PATCH_MARGIN * pixels_per_unit(head_similarity(points))
    mouth = points[: HEAD.start]
    limits = np.array((frame_shape[1], frame_shape[0]))
    x0, y0 = np.clip(np.floor(mouth.min(0) - margin), 0, limits - 1).astype(int).tolist()
    x1, y1 = np.clip(np.ceil(mouth.max(0) + margin) + 1, (x0 + 1, y0 + 1), limits).astype(int).tolist()
    return x0, y0, x1, y1


def cut_patch(frame: np.ndarray, points: np.ndarray) -> Patch | None:
    """Cut a mouth out of a frame uint8 (H, W, 3) with `mouth_points`; None where it is not wholly in the picture."""
    x0, y0, x1, y1 = mouth_box(points, frame.shape)
    mouth = points[: HEAD.start]
    if (mouth < (x0, y0)).any() or (mouth > (x1 - 1, y1 - 1)).any():
        return None
    return Patch(frame[y0:y1, x0:x1].copy(), (x0, y0))


def measure_mouth(patch: Patch, points: np.ndarray, position: int) -> Mouth:
    """The mouth in a patch of frame `position`; points: `mouth_points` in the frame."""
    lips = transform(head_similarity(points), points[LIPS])
    points_in_patch = points - np.array(patch.corner, np.float32)
    features = mouth_features(points, patch.pixels)
    return Mouth(position, patch.pixels, points_in_patch, lips - lip_anchor(lips), features)


def mouth_features(points: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Features (6,) by which a mouth is chosen: OPENING, WIDTH, TURN and NOD of the head, LIGHT and DETAIL.

    LIGHT is the mean of the green channel. DETAIL is the mean absolute Laplacian, in grey levels: a frame with motion
    is blurred, and its mouth should be, too.
    """
    head = head_similarity(points)
    lips, (turn, nod) = transform(head, points[LIPS]), transform(head, points[[NOSE_TIP]])[0]
    green = np.ascontiguousarray(pixels[..., 1])
    detail = np.abs(cv2.Laplacian(green, cv2.CV_16S)).mean()
    return np.array([lip_opening(lips), lip_width(lips), turn, nod, green.mean(), detail])


def scale_features(features: np.ndarray) -> np.ndarray:
    """Features (n, 6) in units of cost."""
    scaled = features / (1, WIDTH_UNIT, POSE_UNIT, POSE_UNIT, LIGHT_UNIT, 1)
    scaled[:, OPENING] = np.log(features[:, OPENING] + OPENING_OFFSET) / OPENING_UNIT
    scaled[:, DETAIL] = np.log(features[:, DETAIL] + 1) / DETAIL_UNIT
    return scaled


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances (n, m) between the rows of a (n, k) and b (m, k)."""
    return ((a[:, None] - b[None]) ** 2).sum(-1)


def most_alike(mouths: Sequence[Mouth]) -> tuple[int, int]:
    """Indices of the two mouths that differ least."""
    scaled = scale_features(np.stack([mouth.features for mouth in mouths]))
    distances = squared_distances(scaled, scaled)
    np.fill_diagonal(distances, np.inf)
    first, second = np.unravel_index(distances.argmin(), distances.shape)
    return int(first), int(second)


def choose_mouths(mouths: Sequence[Mouth], targets: np.ndarray, rate: Fraction = Fraction(FPS)) -> np.ndarray:
    """The cheapest path through the mouths for n frames with target features (n, 6): their indices (n,).

    A step to the next frame of the film or to the previous one is free; a jump costs more, the less alike the two
    mouths are.
    """
    scaled = scale_features(np.stack([mouth.features for mouth in mouths]))
    costs = squared_distances(scale_features(targets), scaled)
    step = float(rate / FPS) * (JUMP_COST + LEAP_WEIGHT * np.minimum(squared_distances(scaled, scaled), MAX_LEAP))
    positions = np.array([mouth.position for mouth in mouths])
    step[np.abs(positions[:, None] - positions[None]) == 1] = 0
    np.fill_diagonal(step, STAY_COST if rate <= FPS else 0.0)
    best = costs[0]
    predecessors = []
    for cost in costs[1:]:
        total = best[:, None] + step
        predecessors.append(total.argmin(0))
        best = total.min(0) + cost
    path = [int(best.argmin())]
    for predecessor in reversed(predecessors):
        path.append(int(predecessor[path[-1]]))
    return np.array(path[::-1])
