"""Notice what covers a mouth (a hand, a cup, a microphone) by how the skin around it changes."""

from fractions import Fraction

import cv2
import numpy as np

from latentsync import FPS
from latentsync.rates import scale_frames
from latentsync.retarget.geometry import head_similarity

SIDE = 16  # pixels of the thumbnail of the skin around a mouth
AREA = (-0.5, 0.5, 0.45, 1.45)  # of the thumbnail: left, right, top, bottom in head units
MOUTH_AREA = (-0.38, 0.38, 0.62, 1.1)  # part of it that moves in speech and is ignored
COVERED = 0.35  # mean difference from the usual thumbnail, as a share of its brightness
# Frames are those of a film of 25 a second.
UPDATE_RATE = 0.05  # weight of the newest thumbnail in the usual one
MIN_FRAMES = 10  # frames of a shot before a mouth can count as covered
MAX_COVERED = 50  # frames: what stays longer belongs to the face


class OcclusionDetector:
    """Compares the skin around a mouth with how it usually looks in the shot."""

    def __init__(self, rate: Fraction = Fraction(FPS)) -> None:
        self.update_rate = UPDATE_RATE * float(FPS / rate)
        self.min_frames, self.max_covered = scale_frames(MIN_FRAMES, rate), scale_frames(MAX_COVERED, rate)
        self.usual: np.ndarray | None = None
        self.frames = self.covered = 0  # frames of the shot; consecutive covered ones

    def is_covered(self, frame: np.ndarray, points: np.ndarray, first: bool) -> bool:
        """Whether something covers the mouth in a frame uint8 (H, W, 3); first: the frame begins a shot."""
        skin = skin_thumbnail(frame, points)
        if first or self.covered >= self.max_covered:
            self.usual, self.frames, self.covered = None, 0, 0
        if self.usual is None:
            self.usual = skin
        difference = float(np.abs(skin - self.usual).mean())
        self.frames += 1
        if self.frames > self.min_frames and difference > COVERED:
            self.covered += 1
            return True
        self.covered = 0
        self.usual += self.update_rate * (skin - self.usual)
        return False


def skin_thumbnail(frame: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The skin around a mouth, upright and normalised by its brightness: float32 (pixels, 3)."""
    left, right, top, bottom = AREA
    fine = 4 * SIDE
    scale = np.array([[fine / (right - left), 0], [0, fine / (bottom - top)]])
    head = head_similarity(points)
    matrix = np.hstack([scale @ head[:, :2], (scale @ (head[:, 2] - (left, top)))[:, None]])
    upright = cv2.warpAffine(frame, matrix, (fine, fine), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    small = cv2.resize(upright, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    y, x = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE
    x, y = left + x * (right - left), top + y * (bottom - top)
    moving = (x > MOUTH_AREA[0]) & (x < MOUTH_AREA[1]) & (y > MOUTH_AREA[2]) & (y < MOUTH_AREA[3])
    skin = small[~moving]
    return skin / max(float(skin.mean()), 1.0)
