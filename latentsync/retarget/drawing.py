"""Composite filmed mouths into another frame: warp the lips, match the light, blend into a soft hull."""

from dataclasses import dataclass

import cv2
import numpy as np

from latentsync.retarget.geometry import CHIN, LIPS, LOWER_LIP, OUTER, RING, UPPER_LIP, fixed_point
from latentsync.retarget.inside import draw_inside
from latentsync.retarget.mouths import Mouth
from latentsync.retarget.warping import MouthGrid, sample, thin_plate_map

HULL_INSIDE, HULL_OUTSIDE = 0.01, 0.085  # distances from the hull of lips and chin at which the patch fades out
RING_WIDTH = 0.1  # beyond the soft hull: pixels that light is matched with
RING_SHARE = 0.6  # a pixel with less of the patch than this counts as ring
MAX_LIGHT_CHANGE = 60.0  # grey levels
SHARPEN_SIGMA, MAX_SHARPEN = 1.0, 1.0  # of the unsharp mask: pixels, amount
RING_BLURS = ((0.06, 1.0), (0.25, 0.02))  # deviations in head units and weights: near the ring, and farther inside

LIP_EDGE = 0.012  # width of the soft edges of the lips
# The inside of a mouth is drawn anew where the target opening exceeds MAX_STRETCH times the filmed one: none at
# MISSING_FROM more, all of it at MISSING_FROM + MISSING_RANGE.
MAX_STRETCH, MISSING_FROM, MISSING_RANGE = 1.8, 0.015, 0.03


@dataclass(frozen=True, eq=False)
class Layer:
    """A mouth to be drawn with its lips at (40, 2), in pixels of the frame, and its weight in the result.

    missing: share of its inside that must be drawn, 0 to 1.
    """

    mouth: Mouth
    lips: np.ndarray
    weight: float
    missing: float


def missing_inside(filmed_opening: float, target_opening: float) -> float:
    """Share of a mouth's inside, 0 to 1, that must be drawn to show a filmed opening as another one."""
    excess = target_opening - MAX_STRETCH * filmed_opening
    return float(np.clip((excess - MISSING_FROM) / MISSING_RANGE, 0, 1))


def draw_mouths(
    frame: np.ndarray,
    points: np.ndarray,
    scale: float,
    layers: list[Layer],
    opacity: float = 1.0,
) -> None:
    """Composite mouths into a frame uint8 (H, W, 3), in place; beyond HULL_OUTSIDE of lips and chin it is unchanged.

    points: `mouth_points` of the frame; scale: pixels per head unit; opacity: 0 (no change) to 1.
    """
    hull_points = np.vstack([points[OUTER], points[[CHIN]], *(layer.lips[OUTER] for layer in layers)])
    margin = (HULL_OUTSIDE + RING_WIDTH) * scale
    low, high = np.floor(hull_points.min(0) - margin).astype(int), np.ceil(hull_points.max(0) + margin).astype(int) + 1
    (x0, y0), (x1, y1) = np.maximum(low, 0), np.minimum(high, (frame.shape[1], frame.shape[0]))
    if min(x1 - x0, y1 - y0) < 4 or opacity <= 0:
        return
    region, corner = frame[y0:y1, x0:x1], np.array((x0, y0))
    hull = soft_hull(hull_points - corner, region.shape[:2], scale)
    patch = np.zeros(region.shape, np.float32)
    for layer in layers:
        drawn = draw_layer(layer, layer.lips - corner, points[RING] - corner, region.shape[:2], scale)
        patch += layer.weight * match_light(drawn, region, hull, scale)
    alpha = (hull * opacity)[..., None]
    blended = np.clip(np.rint(region + (patch - region) * alpha), 0, 255)
    np.copyto(region, blended.astype(np.uint8), where=alpha > 0)


def draw_layer(layer: Layer, lips: np.ndarray, ring: np.ndarray, shape: tuple[int, int], scale: float) -> np.ndarray:
    """Draw a filmed mouth with its lips (40, 2) and the skin around them (RING, 2) at new places: float32 (h, w, 3).

    Upper lip, lower lip and the inside are warped separately: one warp of them all would tear or fold where lips part
    or meet.
    """
    mouth = layer.mouth
    upper, lower = (
        sample(
            mouth.pixels,
            thin_plate_map(
                np.vstack([lips[lip], ring]), np.vstack([mouth.points[lip], mouth.points[RING]]), shape, scale
            ),
        )
        for lip in (UPPER_LIP, LOWER_LIP)
    )
    grid = MouthGrid(lips, shape)
    edge = max(LIP_EDGE * scale, 1.0)
    patch = upper + (lower - upper) * grid.lower_mask(edge)[..., None]
    inside = sample(mouth.pixels, grid.inside_map(mouth.points[LIPS]))
    if layer.missing > 0:
        made = draw_inside(grid, mouth.pixels, mouth.points, scale)
        inside += (made - inside) * layer.missing
    return patch + (inside - patch) * grid.inside_mask(edge)[..., None]


def soft_hull(points: np.ndarray, shape: tuple[int, int], scale: float) -> np.ndarray:
    """Opacity of a patch: float32 (h, w), 1 inside the hull of points (n, 2), 0 from HULL_OUTSIDE on."""
    outside = np.ones(shape, np.uint8)
    cv2.fillConvexPoly(outside, fixed_point(cv2.convexHull(points.astype(np.float32))), 0, shift=4)
    distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_5) / scale
    share = np.clip((HULL_OUTSIDE - distance) / (HULL_OUTSIDE - HULL_INSIDE), 0, 1)
    return (share * share * (3 - 2 * share)).astype(np.float32)


def match_light(patch: np.ndarray, region: np.ndarray, hull: np.ndarray, scale: float) -> np.ndarray:
    """Give a patch float32 (h, w, 3) the light, colours and sharpness of a region uint8 around the hull.

    The difference of the two in the ring is spread inwards, smoothly, and added.
    """
    ring = hull < RING_SHARE
    patch = sharpen(patch, mean_detail(region, ring) / max(mean_detail(patch, ring), 1e-3))
    shrink = max(1, int(scale / 30))
    size = (max(1, patch.shape[1] // shrink), max(1, patch.shape[0] // shrink))
    weight = ring.astype(np.float32)[..., None]
    difference = np.clip(region - patch, -MAX_LIGHT_CHANGE, MAX_LIGHT_CHANGE) * weight
    small = cv2.resize(np.dstack([difference, weight]), size, interpolation=cv2.INTER_AREA)
    spread = np.zeros_like(small)
    for sigma, share in RING_BLURS:
        blurred = cv2.GaussianBlur(small, (0, 0), sigma * scale / shrink, borderType=cv2.BORDER_REPLICATE)
        spread += share * blurred
    change = spread[..., :3] / np.maximum(spread[..., 3:], 1e-6)
    return patch + cv2.resize(change, patch.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def mean_detail(pixels: np.ndarray, mask: np.ndarray) -> float:
    """Mean absolute Laplacian of the green channel of pixels (h, w, 3), in grey levels; mask: bool (h, w)."""
    green = np.ascontiguousarray(pixels[..., 1], np.float32)
    return float(np.abs(cv2.Laplacian(green, cv2.CV_32F))[mask].mean()) if mask.any() else 0.0


def sharpen(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Raise the detail of pixels float32 (h, w, 3) by about a factor, if it is over 1: resampling softens."""
    amount = min(factor - 1, MAX_SHARPEN)
    if amount <= 0:
        return pixels
    return pixels + amount * (pixels - cv2.GaussianBlur(pixels, (0, 0), SHARPEN_SIGMA))
