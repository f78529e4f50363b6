"""The inside of a mouth that a film never shows open: teeth, cavity and tongue, in the film's own colours."""

import cv2
import numpy as np

from latentsync.retarget.geometry import INNER, OUTER, RING, fixed_point
from latentsync.retarget.warping import MouthGrid

# Lengths are head units: the distance between the outer corners of the eyes, about 9 cm.
# From the midline to the outer edges of both incisors, the canine and the first premolar, as seen from the front.
TEETH_EDGES = (0.094, 0.162, 0.235, 0.31)
TEETH_SHOWN = 0.05  # of the upper teeth, below the lip, in the middle; further out the row rises
ROW_RISE = 0.35  # of the same, per squared distance in half mouths
TEETH_SHARE = 0.45  # of the opening that teeth may fill
ROUNDING = 0.008  # of each tooth's corners
SOFT_EDGE = 0.018  # of the teeth
GAP_WIDTH, GAP_SHADE = 0.018, 0.12  # between two teeth: its width, and how much darker it is
MIN_EDGE = 2.4  # pixels: soft edges and gaps are no narrower, as a camera's are not
ARCH_SHADE = 0.75  # how much darker teeth at the mouth's corners are
TONGUE_DEPTH, TONGUE_WIDTH = 0.075, 0.17  # below the upper lip where the tongue begins to show; half its width

TEETH_COLOUR, CAVITY_COLOUR, TONGUE_COLOUR = 1.05, 0.3, 0.66  # shares: of half-grey skin, and of the lips
SHADOW, SHADOW_WIDTH = 0.55, 0.06  # the lips' shadow on the inside: brightness at its edge, and reach


def draw_inside(grid: MouthGrid, pixels: np.ndarray, points: np.ndarray, scale: float) -> np.ndarray:
    """Draw what lies between the lips of a mouth: float32 (h, w, 3).

    Colours are taken from the skin and the lips of a picture uint8 (h, w, 3) with `mouth_points` (73, 2); scale: pixels
    per head unit.
    """
    left, right = grid.contours[0][[0, -1], 0]
    across = (grid.along - (left + right) / 2) / scale  # from the midline
    reach = np.clip(np.abs(across) * 2 * scale / max(right - left, 1e-3), 0, 1)  # 0 in the middle, 1 at the corners
    depth = (grid.down - grid.upper) / scale
    opening = np.maximum(grid.lower - grid.upper, 0) / scale
    skin, lips = skin_colour(pixels, points), lip_colour(pixels, points)

    tongue = ramp(depth, TONGUE_DEPTH, 0.05) * ramp(TONGUE_WIDTH - np.abs(across), 0, 0.08)
    inside = lips * (CAVITY_COLOUR + (TONGUE_COLOUR - CAVITY_COLOUR) * tongue[..., None])

    edges, border, gap = np.array(TEETH_EDGES), max(SOFT_EDGE, MIN_EDGE / scale), max(GAP_WIDTH, MIN_EDGE / scale)
    to_gap = np.abs(np.abs(across)[..., None] - np.array([0, *edges])).min(-1)
    length = np.minimum(TEETH_SHOWN, TEETH_SHARE * opening.max(initial=0)) * (1 - ROW_RISE * reach**2)
    length = length - ROUNDING * np.clip(1 - to_gap / max(2 * ROUNDING, border), 0, 1) ** 2
    teeth = ramp(length - depth, 0, border) * ramp(edges[-1] - np.abs(across), 0, border)
    shade = (1 - GAP_SHADE * np.clip(1 - to_gap / gap, 0, 1)) * (1 - ARCH_SHADE * reach**2)
    colour = TEETH_COLOUR * (skin + skin.mean()) / 2
    inside += (colour * shade[..., None] - inside) * teeth[..., None]

    shadow = SHADOW + (1 - SHADOW) * grid.inside_mask(SHADOW_WIDTH * scale)
    return (inside * shadow[..., None]).astype(np.float32)


def ramp(values: np.ndarray, middle: float, width: float) -> np.ndarray:
    """0 below, 1 above a middle, with a border `width` wide."""
    return np.clip((values - middle) / width + 0.5, 0, 1)


def skin_colour(pixels: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Median colour (3,) of the skin at the points RING of a picture uint8 (h, w, 3)."""
    columns, rows = np.clip(np.rint(points[RING]), 0, np.array(pixels.shape[1::-1]) - 1).astype(int).T
    return np.median(pixels[rows, columns], axis=0)


def lip_colour(pixels: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Mean colour (3,) of the lips in a picture uint8 (h, w, 3); points begin with LIPS, in its pixels."""
    mask = np.zeros(pixels.shape[:2], np.uint8)
    for part, value in (OUTER, 1), (INNER, 0):
        cv2.fillPoly(mask, [fixed_point(points[part])], value, shift=4)
    return pixels[mask > 0].mean(0) if mask.any() else np.full(3, 128.0)
