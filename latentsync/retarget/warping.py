"""Warps of pictures by corresponding points, and the inside of a mouth between two lips."""

import cv2
import numpy as np

from latentsync.retarget.geometry import inner_contours, mouth_axes

GRID_STEPS = 60  # per head unit: the resolution at which warps are computed
STIFFNESS = 1e-4  # how much a warp yields where points contradict one another


def sample(pixels: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    """Sample a picture uint8 at coordinates (h, w, 2): float32 (h, w, 3)."""
    return cv2.remap(pixels, coordinates, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE).astype(np.float32)


def thin_plate_map(points: np.ndarray, values: np.ndarray, shape: tuple[int, int], scale: float) -> np.ndarray:
    """Evaluate the thin-plate spline from points (n, 2) to values (n, 2) at every pixel: float32 (h, w, 2).

    scale: pixels per head unit. The spline is evaluated on a grid of GRID_STEPS per head unit and interpolated.
    """
    n, centre = len(points), points.mean(0)
    knots = (points - centre) / scale
    system = np.zeros((n + 3, n + 3))
    system[:n, :n] = _kernel(knots, knots) + STIFFNESS * np.eye(n)
    system[:n, n] = system[n, :n] = 1
    system[:n, n + 1 :], system[n + 1 :, :n] = knots, knots.T
    weights = np.linalg.solve(system, np.vstack([values - points, np.zeros((3, 2))]))
    step = max(1, round(scale / GRID_STEPS))
    rows, columns = (np.arange(0, length + step, step) for length in shape)
    grid = (np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2) - centre) / scale
    change = _kernel(grid, knots) @ weights[:n] + weights[n] + grid @ weights[n + 1 :]
    change = change.reshape(len(rows), len(columns), 2).astype(np.float32)
    to_grid = np.array([[1 / step, 0, 0], [0, 1 / step, 0]])
    change = cv2.warpAffine(change, to_grid, shape[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    return change + np.stack([x, y], axis=-1)


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = ((a[:, None] - b[None]) ** 2).sum(-1)
    return squared * np.log(np.maximum(squared, 1e-12))


class MouthGrid:
    """The pixels (h, w) of a patch in the axes of a mouth with lips (40, 2): `along` its corners, and `down`.

    upper, lower: (h, w), `down` of the lips' inner edges.
    """

    def __init__(self, lips: np.ndarray, shape: tuple[int, int]):
        axes = mouth_axes(lips)
        y, x = np.mgrid[: shape[0], : shape[1]]
        self.along, self.down = (axis[0] * x + axis[1] * y for axis in axes)
        self.contours = inner_contours(lips, axes)
        self.upper, self.lower = (np.interp(self.along, *edge.T) for edge in self.contours)

    def lower_mask(self, edge: float) -> np.ndarray:
        """Mask of the lower lip and what is below it, float32 (h, w), 0 to 1, with a border `edge` pixels wide."""
        return np.clip((self.down - (self.upper + self.lower) / 2) / edge + 0.5, 0, 1).astype(np.float32)

    def inside_mask(self, edge: float) -> np.ndarray:
        """Mask of what lies between the lips, float32 (h, w), 0 to 1, with a border `edge` pixels wide."""
        left, right = self.contours[0][[0, -1], 0]
        down, along = self.down, self.along
        depth = np.minimum.reduce([down - self.upper, self.lower - down, along - left, right - along])
        gap = self.lower - self.upper
        return (np.clip(depth / edge + 0.5, 0, 1) * np.clip(gap / edge, 0, 1)).astype(np.float32)

    def inside_map(self, lips: np.ndarray) -> np.ndarray:
        """Coordinates in a picture with lips (40, 2) of what the patch shows between its lips: float32 (h, w, 2).

        Teeth hang from above: where the picture's mouth is open further than the patch's, the lower lip hides the rest.
        """
        axes = mouth_axes(lips)
        upper, lower = inner_contours(lips, axes)
        here = self.contours[0][:, 0]
        along = np.interp(self.along, here, upper[:, 0])
        top, bottom = (np.interp(along, *edge.T) for edge in (upper, lower))
        size = np.ptp(upper[:, 0]) / max(np.ptp(here), 1e-3)  # pixels of the picture per pixel of the patch
        stretch = np.minimum((bottom - top) / np.maximum(self.lower - self.upper, 1e-3), size)
        down = top + (self.down - self.upper) * stretch
        return np.stack([axes[0, i] * along + axes[1, i] * down for i in (0, 1)], axis=-1).astype(np.float32)
