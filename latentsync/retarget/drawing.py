"""Lay a filmed mouth into another frame: warp its lips, match its light, blend it into a soft hull."""

from dataclasses import dataclass

import cv2
import numpy as np

from latentsync.retarget.bank import Mouth
from latentsync.retarget.geometry import (
    CHIN,
    INNER,
    LIPS,
    LOWER_LIP,
    OUTER,
    RING,
    UPPER_LIP,
    inner_contours,
    mouth_axes,
)

HULL_INSIDE, HULL_OUTSIDE = 0.01, 0.085  # beyond the hull of lips and chin: where the patch begins to fade, and ends
RING_WIDTH = 0.1  # beyond the soft hull, of what its light is matched with
RING_FROM = 0.6  # share of the patch in the blend under which a pixel counts as ring
RING_MOST = 60.0  # grey levels that the light of two frames may differ by
SHARPEN_SIGMA, SHARPEN_MOST = 1.0, 1.0  # pixels; of what a blur of that takes, so much is added at most
RING_BLURS = ((0.06, 1.0), (0.25, 0.02))  # deviations in head units, and weights: near the ring, and farther inside
GRID_STEPS = 60  # a head unit, in which warps are worked out
STIFFNESS = 1e-4  # how much a warp gives way where points contradict one another

LIP_EDGE = 0.012  # width of the soft edges of the lips
# The inside of a mouth is generated where it must open to more than STRETCH times what was filmed, and MISSING_FROM.
STRETCH, MISSING_FROM, MISSING_RANGE = 2.2, 0.015, 0.03
LIP_GAIN = (0.5, 1.1)  # least and most of what gives generated lips the colour of the filmed ones
SHADOW, SHADOW_WIDTH = 0.5, 0.05  # of the lips on a generated inside: brightness at its edge, and reach


@dataclass(frozen=True, eq=False)
class GeneratedMouth:
    """A generated face uint8 (h, w, 3), and its lips (40, 2) in pixels of it."""

    face: np.ndarray
    lips: np.ndarray


@dataclass(frozen=True, eq=False)
class Layer:
    """A mouth to be laid into a frame: where its lips (40, 2) come to lie in pixels, and its share of the result.

    missing: how much of its inside must be generated, 0 to 1.
    """

    mouth: Mouth
    lips: np.ndarray
    share: float
    missing: float


def missing_inside(filmed: float, wanted: float) -> float:
    """How much of a mouth's inside must be generated, 0 to 1, where a filmed opening is shown as a wanted one."""
    return float(np.clip((wanted - STRETCH * filmed - MISSING_FROM) / MISSING_RANGE, 0, 1))


def show_mouth(
    frame: np.ndarray,
    points: np.ndarray,
    scale: float,
    layers: list[Layer],
    generated: GeneratedMouth,
    opacity: float = 1.0,
) -> None:
    """Lay mouths into a frame uint8 (H, W, 3), in place; beyond HULL_OUTSIDE of lips and chin it stays as it is.

    points: its own `mouth_points`; scale: pixels a head unit; opacity: 0 (no change) to 1.
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
        drawn = draw_mouth(layer, layer.lips - corner, points[RING] - corner, region.shape[:2], scale, generated)
        patch += layer.share * match_ring(drawn, region, hull, scale)
    blend = (hull * opacity)[..., None]
    mixed = np.clip(np.rint(region + (patch - region) * blend), 0, 255)
    np.copyto(region, mixed.astype(np.uint8), where=blend > 0)


def draw_mouth(
    layer: Layer, lips: np.ndarray, ring: np.ndarray, shape: tuple[int, int], scale: float, generated: GeneratedMouth
) -> np.ndarray:
    """A filmed mouth with its lips (40, 2) and the skin around them (RING, 2) at new places: float32 (h, w, 3).

    Upper lip, lower lip and what lies between them are warped each for itself: a warp of them all would tear or fold
    where lips part or meet.
    """
    mouth = layer.mouth
    upper, lower = (
        sample(
            mouth.pixels,
            warp_map(np.vstack([lips[lip], ring]), np.vstack([mouth.points[lip], mouth.points[RING]]), shape, scale),
        )
        for lip in (UPPER_LIP, LOWER_LIP)
    )
    grid = MouthGrid(lips, shape)
    edge = max(LIP_EDGE * scale, 1.0)
    patch = upper + (lower - upper) * grid.below(edge)[..., None]
    inside = sample(mouth.pixels, grid.places_inside(mouth.points[LIPS]))
    if layer.missing > 0:
        gain = lip_colour(mouth.pixels, mouth.points) / np.maximum(lip_colour(generated.face, generated.lips), 1)
        made = sample(generated.face, grid.places_inside(generated.lips)) * np.clip(gain, *LIP_GAIN)
        made *= SHADOW + (1 - SHADOW) * grid.inside(SHADOW_WIDTH * scale)[..., None]
        inside += (made - inside) * layer.missing
    return patch + (inside - patch) * grid.inside(edge)[..., None]


class MouthGrid:
    """The pixels (h, w) of a patch in the axes of a mouth with lips (40, 2): along its corners, and down.

    upper, lower: (h, w), how far down the inner edges of the lips are.
    """

    def __init__(self, lips: np.ndarray, shape: tuple[int, int]):
        axes = mouth_axes(lips)
        y, x = np.mgrid[: shape[0], : shape[1]]
        self.along, self.down = (axis[0] * x + axis[1] * y for axis in axes)
        self.contours = inner_contours(lips, axes)
        self.upper, self.lower = (np.interp(self.along, *edge.T) for edge in self.contours)

    def below(self, edge: float) -> np.ndarray:
        """How much each pixel belongs to the lower lip, float32 (h, w), 0 to 1, with a border `edge` pixels wide."""
        return np.clip((self.down - (self.upper + self.lower) / 2) / edge + 0.5, 0, 1).astype(np.float32)

    def inside(self, edge: float) -> np.ndarray:
        """How much each pixel lies between the lips, float32 (h, w), 0 to 1, with a border `edge` pixels wide."""
        left, right = self.contours[0][[0, -1], 0]
        down, along = self.down, self.along
        depth = np.minimum.reduce([down - self.upper, self.lower - down, along - left, right - along])
        gap = self.lower - self.upper
        return (np.clip(depth / edge + 0.5, 0, 1) * np.clip(gap / edge, 0, 1)).astype(np.float32)

    def places_inside(self, lips: np.ndarray) -> np.ndarray:
        """Where a picture with lips (40, 2) shows what is to be seen between the lips: float32 (h, w, 2).

        Teeth hang from above: where the picture has more than is wanted, the lower lip hides the rest of it.
        """
        axes = mouth_axes(lips)
        upper, lower = inner_contours(lips, axes)
        own = self.contours[0][:, 0]
        along = np.interp(self.along, own, upper[:, 0])
        top, bottom = (np.interp(along, *edge.T) for edge in (upper, lower))
        size = np.ptp(upper[:, 0]) / max(np.ptp(own), 1e-3)  # pixels of the picture for one of the patch
        stretch = np.minimum((bottom - top) / np.maximum(self.lower - self.upper, 1e-3), size)
        down = top + (self.down - self.upper) * stretch
        return np.stack([axes[0, i] * along + axes[1, i] * down for i in (0, 1)], axis=-1).astype(np.float32)


def lip_colour(pixels: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Mean colour (3,) of the lips in a picture uint8 (h, w, 3); points begin with LIPS, in pixels of it."""
    mask = np.zeros(pixels.shape[:2], np.uint8)
    for part, value in (OUTER, 1), (INNER, 0):
        cv2.fillPoly(mask, [fixed_point(points[part])], value, shift=4)
    return pixels[mask > 0].mean(0) if mask.any() else np.full(3, 128.0)


def fixed_point(points: np.ndarray) -> np.ndarray:
    """Points in sixteenths of a pixel, as OpenCV's drawing takes them with shift=4."""
    return np.round(points * 16).astype(np.int32)


def sample(pixels: np.ndarray, places: np.ndarray) -> np.ndarray:
    """A picture uint8 at places (h, w, 2): float32 (h, w, 3)."""
    return cv2.remap(pixels, places, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE).astype(np.float32)


def warp_map(points: np.ndarray, values: np.ndarray, shape: tuple[int, int], scale: float) -> np.ndarray:
    """The thin-plate spline that takes points (n, 2) to values (n, 2), at every pixel: float32 (h, w, 2).

    scale: pixels a head unit. It is worked out on a grid of GRID_STEPS a head unit.
    """
    n, centre = len(points), points.mean(0)
    at = (points - centre) / scale
    system = np.zeros((n + 3, n + 3))
    system[:n, :n] = _thin_plate(at, at) + STIFFNESS * np.eye(n)
    system[:n, n] = system[n, :n] = 1
    system[:n, n + 1 :], system[n + 1 :, :n] = at, at.T
    weights = np.linalg.solve(system, np.vstack([values - points, np.zeros((3, 2))]))
    step = max(1, round(scale / GRID_STEPS))
    rows, columns = (np.arange(0, length + step, step) for length in shape)
    grid = (np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2) - centre) / scale
    change = _thin_plate(grid, at) @ weights[:n] + weights[n] + grid @ weights[n + 1 :]
    change = change.reshape(len(rows), len(columns), 2).astype(np.float32)
    to_grid = np.array([[1 / step, 0, 0], [0, 1 / step, 0]])
    change = cv2.warpAffine(change, to_grid, shape[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    return change + np.stack([x, y], axis=-1)


def _thin_plate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = ((a[:, None] - b[None]) ** 2).sum(-1)
    return squared * np.log(np.maximum(squared, 1e-12))


def soft_hull(points: np.ndarray, shape: tuple[int, int], scale: float) -> np.ndarray:
    """How much of a patch shows: float32 (h, w), 1 inside the hull of points (n, 2), 0 from HULL_OUTSIDE on."""
    beyond = np.ones(shape, np.uint8)
    cv2.fillConvexPoly(beyond, fixed_point(cv2.convexHull(points.astype(np.float32))), 0, shift=4)
    away = cv2.distanceTransform(beyond, cv2.DIST_L2, cv2.DIST_MASK_5) / scale
    share = np.clip((HULL_OUTSIDE - away) / (HULL_OUTSIDE - HULL_INSIDE), 0, 1)
    return (share * share * (3 - 2 * share)).astype(np.float32)


def match_ring(patch: np.ndarray, region: np.ndarray, hull: np.ndarray, scale: float) -> np.ndarray:
    """Give a patch float32 (h, w, 3) the light, the colours and the sharpness that a region uint8 has around the hull.

    What the two differ by in the ring is spread inwards, smoothly, and added.
    """
    ring = hull < RING_FROM
    patch = sharpen(patch, detail(region, ring) / max(detail(patch, ring), 1e-3))
    shrink = max(1, int(scale / 30))
    size = (max(1, patch.shape[1] // shrink), max(1, patch.shape[0] // shrink))
    weight = ring.astype(np.float32)[..., None]
    difference = np.clip(region - patch, -RING_MOST, RING_MOST) * weight
    small = cv2.resize(np.dstack([difference, weight]), size, interpolation=cv2.INTER_AREA)
    spread = sum(
        share * cv2.GaussianBlur(small, (0, 0), sigma * scale / shrink, borderType=cv2.BORDER_REPLICATE)
        for sigma, share in RING_BLURS
    )
    spread = spread[..., :3] / np.maximum(spread[..., 3:], 1e-6)
    return patch + cv2.resize(spread, patch.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def detail(pixels: np.ndarray, where: np.ndarray) -> float:
    """Mean size of the Laplacian of the green of pixels (h, w, 3), in grey levels; where: bool (h, w)."""
    green = np.ascontiguousarray(pixels[..., 1], np.float32)
    return float(np.abs(cv2.Laplacian(green, cv2.CV_32F))[where].mean()) if where.any() else 0.0


def sharpen(pixels: np.ndarray, wanted: float) -> np.ndarray:
    """Pixels float32 (h, w, 3) with about `wanted` times their detail, if that is more: resampling softens."""
    amount = min(wanted - 1, SHARPEN_MOST)
    if amount <= 0:
        return pixels
    return pixels + amount * (pixels - cv2.GaussianBlur(pixels, (0, 0), SHARPEN_SIGMA))
