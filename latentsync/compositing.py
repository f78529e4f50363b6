"""Paste the generated face back into its frame.

All of it runs on the device of the tensors, without synchronising with it: matrices and opacities are host numbers, and
the width of the soft edge stays a tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from latentsync.alignment import crop_size, frame_rectangle

EDGE_SHARE = 20  # width of the soft edge: square root of the face's area over this (LatentSync)
MATCHED_AREAS = 32  # along the side of a crop, whose mean colours `match_colours` compares in a film
ALL_VISIBLE = 0.999  # mean of the mask over an area that is visible, with room for rounding
PASTED_TOGETHER = 3 * 2**22  # numbers of their regions: about 15 float32 values a pixel at a time, 0.25 GB
SMALL_FACE = 256  # pixels of the frame; for smaller faces the closed form of the edge is coarse and a kernel is cheap

Rectangle = tuple[int, int, int, int]  # x0, y0, x1, y1, the last two exclusive


def merge_faces(generated: torch.Tensor, crops: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The generated face where the mask is 0, the original where it is 1.

    generated: (n, 3, R, R) float in [-1, 1]; crops: (n, R, R, 3) uint8, of `alignment.crop_face`;
    mask: (R, R) float, `alignment.fixed_mask`. All on one device. Returns (n, 3, R, R) in [-1, 1] and the
    dtype of `generated`.
    """
    mask = mask.to(generated.dtype)
    original = crops.permute(0, 3, 1, 2).to(generated.dtype) / 127.5 - 1
    return generated + (original - generated) * mask


def match_colours(
    generated: torch.Tensor, crops: torch.Tensor, mask: torch.Tensor, areas: int | None = None
) -> torch.Tensor:
    """Match the colours of generated faces to the originals, for autoencoders that do not reproduce every tone.

    The visible part of the mask exists twice, generated and original. The affine colour transform from the one to the
    other (least squares, one per face) is applied to the whole face. Arguments as in `merge_faces`; returns
    (n, 3, R, R) in the dtype of `generated`.
    areas: compare means of areas, as many along a side, in place of single pixels. The noise of a film is in the
    original alone, and pixel by pixel it passes for colour.
    """
    pixels, original, weights = generated.float(), crops.permute(0, 3, 1, 2).float() / 127.5 - 1, mask.float()
    compared = pixels
    if areas and (side := crops.shape[1] // areas) > 1:
        compared, original = F.avg_pool2d(pixels, side), F.avg_pool2d(original, side)
        weights = (F.avg_pool2d(weights[None], side)[0] > ALL_VISIBLE).float()
    colours, weights = _with_ones(compared), weights.flatten()
    weighted = colours * weights
    # A ridge of a hundredth of a grey level keeps a flat picture solvable.
    square = weighted @ colours.transpose(1, 2) + 1e-4 * weights.sum() * torch.eye(4, device=mask.device)
    # `solve` would check its result on the host, which waits for the device.
    transform, _ = torch.linalg.solve_ex(square, weighted @ original.flatten(2).transpose(1, 2))  # (n, 4, 3)
    return (transform.transpose(1, 2) @ _with_ones(pixels)).unflatten(2, generated.shape[2:]).to(generated.dtype)


def _with_ones(pixels: torch.Tensor) -> torch.Tensor:
    """Colours and a constant, for an affine transform: (n, 3, h, w) → (n, 4, h·w)."""
    return torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1).flatten(2)


def paste_rectangle(matrix: np.ndarray, resolution: int, frame_shape: tuple[int, ...]) -> Rectangle:
    """The part of a frame that `paste_faces` may change: x0 <= x1, y0 <= y1, as of `alignment.frame_rectangle`."""
    x0, y0, x1, y1 = frame_rectangle(matrix, resolution, frame_shape, margin=2)
    return x0, y0, max(x0, x1), max(y0, y1)


def paste_faces(
    regions: torch.Tensor,
    faces: torch.Tensor,
    matrices: Sequence[np.ndarray],
    rectangles: Sequence[Rectangle],
    frame_shape: tuple[int, ...],
    opacities: Sequence[float],
) -> None:
    """Blend face crops into their parts of frames, with a soft edge. Changes `regions` in place.

    regions: (n, h, w, 3) uint8 RGB, the top left of each the pixels in a rectangle of a frame of `frame_shape` (H, W,
    ...); faces: (n, 3, R, R) float in [-1, 1], on the same device; matrices: (2, 3) each, of
    `alignment.estimate_matrix`; rectangles: of `paste_rectangle`; opacities: 0 (no change) to 1.
    Only the pixels that the faces cover are changed.
    """
    height, width = frame_shape[:2]
    first = 0
    while first < len(faces):
        last, kernel = first + 1, _needs_kernel(rectangles[first], width, height)
        # On a GPU together, as a face alone is hundreds of kernels that take no time; on a processor alone, so that a
        # face does not depend on those beside it.
        most = PASTED_TOGETHER // max(regions[0].numel(), 1) if regions.is_cuda and not kernel else 1
        while last < min(first + most, len(faces)) and not _needs_kernel(rectangles[last], width, height):
            last += 1
        part = slice(first, last)
        x0, y0, x1, y1 = rectangles[first]
        used = regions[part] if last - first > 1 else regions[part, : y1 - y0, : x1 - x0]
        if used.numel() and max(opacities[part]) > 0:
            _paste(used, faces[part], matrices[part], rectangles[part], opacities[part], kernel)
        first = last


def _needs_kernel(rectangle: Rectangle, width: int, height: int) -> bool:
    """Whether the soft edge of a face in a frame of that size is that of `_soft_edge_by_kernel`."""
    x0, y0, x1, y1 = rectangle
    at_border = x0 == 0 or y0 == 0 or x1 == width or y1 == height
    return at_border or (x1 - x0) * (y1 - y0) < SMALL_FACE**2


def _paste(
    regions: torch.Tensor,
    faces: torch.Tensor,
    matrices: Sequence[np.ndarray],
    rectangles: Sequence[Rectangle],
    opacities: Sequence[float],
    by_kernel: bool,
) -> None:
    """Paste faces that have the same kind of edge; by_kernel: one face, whose region is its whole rectangle."""
    width, height = crop_size(faces.shape[-1])
    warp = Warp.of(matrices, rectangles, regions.device)
    u, v = warp.coordinates(*regions.shape[1:3])

    pictures = F.interpolate(
        faces.float() * 0.5 + 0.5, (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    grid = torch.stack([u * (2 / (width - 1)) - 1, v * (2 / (height - 1)) - 1], dim=-1)
    pasted = F.grid_sample(pictures, grid, padding_mode="border", align_corners=True)
    pasted = pasted.clamp_(0, 1) * 255

    soft = (_soft_edge_by_kernel if by_kernel else _soft_edge)(u, v, warp, width, height)
    soft = soft * _to_device(np.array(opacities), regions.device)[:, None, None]
    regions = regions.permute(0, 3, 1, 2)
    # Truncated as in the reference. `lerp`, since a·(1 − s) + b·s may fall just short of a whole number.
    regions.copy_(torch.lerp(regions.float(), pasted, soft[:, None]).to(torch.uint8))


@dataclass(frozen=True)
class Warp:
    """From pixels of n rectangles to coordinates in the warped faces: u = u_x · x + u_y · y + u_0, and so v.

    Each (n,) float32, on the device; scale: of the warp, spread: |cos| + |sin| times it.
    """

    u_x: torch.Tensor
    u_y: torch.Tensor
    u_0: torch.Tensor
    v_x: torch.Tensor
    v_y: torch.Tensor
    v_0: torch.Tensor
    scale: torch.Tensor
    spread: torch.Tensor

    @classmethod
    def of(cls, matrices: Sequence[np.ndarray], rectangles: Sequence[Rectangle], device: torch.device) -> "Warp":
        """The warp of matrices, counted from the top left of their rectangles; in double until here, for any frame."""
        rows = np.array(matrices, np.float64)
        origin = np.array([rectangle[:2] for rectangle in rectangles])
        rows[:, :, 2] += (rows[:, :, :2] @ origin[:, :, None])[:, :, 0]
        cos, sin = rows[:, 0, 0], rows[:, 1, 0]  # times the scale
        numbers = np.column_stack([rows.reshape(-1, 6), np.hypot(cos, sin), np.abs(cos) + np.abs(sin)])
        return cls(*_to_device(numbers, device).unbind(1))

    def coordinates(self, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """u and v of the pixels of such rectangles, each (n, height, width)."""
        x = torch.arange(width, dtype=torch.float32, device=self.u_x.device)
        y = torch.arange(height, dtype=torch.float32, device=self.u_x.device)[:, None]
        rows = ((self.u_x, self.u_y, self.u_0), (self.v_x, self.v_y, self.v_0))
        u, v = (a[:, None, None] * x + (b[:, None, None] * y + c[:, None, None]) for a, b, c in rows)
        return u, v


def _to_device(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """Numbers of the host as float32 on the device, without waiting for it."""
    values = torch.from_numpy(numbers.astype(np.float32))
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


# The soft edge. The reference warps an all-ones face into the frame, erodes it (minima over squares of the frame) and
# blurs it, with kernels as wide as the edge. Here the minima are computed in closed form: the face's coordinates are
# linear in x and y, so their extremes over a square lie at its corners.


def _edge(u: torch.Tensor, v: torch.Tensor, warp: Warp, width: int, height: int) -> torch.Tensor:
    """Width of the soft edges in pixels of the frame, from the areas of the faces inside it: (n,)."""
    area = _eroded(u, v, warp, width, height, torch.zeros_like(warp.scale)).sum((1, 2))
    return (area.sqrt().floor() / EDGE_SHARE).floor()


def _eroded(u: torch.Tensor, v: torch.Tensor, warp: Warp, width: int, height: int, edge: torch.Tensor) -> torch.Tensor:
    """The warped ones after the reference's two erosions, by a 2 x 2 square and one of side 2 * `edge`: (n, h, w).

    Together they cover -edge - 1 to edge - 1 pixels along x and y (0 for edge 0), inside the rectangle. edge: (n,).
    """
    rows, columns = (torch.arange(n, dtype=torch.float32, device=u.device) for n in u.shape[1:])
    inside: torch.Tensor | float = 1.0
    for coordinate, slope_x, slope_y, length in ((u, warp.u_x, warp.u_y, width), (v, warp.v_x, warp.v_y, height)):
        low_x, high_x = _extremes(columns, slope_x, edge)
        low_y, high_y = _extremes(rows, slope_y, edge)
        first_row, first_column = coordinate[:, 0], coordinate[:, :, 0] - coordinate[:, :1, 0]
        low = (first_row + low_x)[:, None] + (first_column + low_y)[:, :, None]
        high = (first_row + high_x)[:, None] + (first_column + high_y)[:, :, None]
        inside = inside * torch.minimum(low + 1, length - high).clamp_(0, 1)  # bilinear samples of ones
    return inside


def _extremes(index: torch.Tensor, slope: torch.Tensor, edge: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimal and maximal change of a coordinate over the erosion window at every index of a row: (n, length) each."""
    slope, edge = slope[:, None], edge[:, None]
    backward = ((index - edge - 1).clamp(min=0) - index) * slope
    forward = ((index + edge - 1).clamp(max=len(index) - 1) - index).clamp(min=0) * slope
    return torch.minimum(backward, forward), torch.maximum(backward, forward)


def _soft_edge(u: torch.Tensor, v: torch.Tensor, warp: Warp, width: int, height: int) -> torch.Tensor:
    """Opacity masks of large faces that lie wholly in the picture: (n, h, w), 0 to 1, 0 outside the face.

    u, v: (n, h, w), the rectangles' coordinates in the warped faces of `width` x `height`, and maybe more beyond them.
    A closed form without a kernel: a rectangle eroded by a square is a smaller rectangle, and a blurred rectangle is a
    product of differences of normal distribution functions.
    """
    edge = _edge(u, v, warp, width, height)
    sigma = _sigma(edge) * warp.scale
    tail = torch.special.ndtr(-(edge + 0.5) * warp.scale / sigma)  # the reference's kernel ends there
    inset = edge * warp.spread
    inset, sigma, tail = (each[:, None, None] for each in (inset, sigma, tail))
    soft: torch.Tensor | float = 1.0
    for coordinate, shift, length in ((u, warp.u_x + warp.u_y, width), (v, warp.v_x + warp.v_y, height)):
        shift = shift[:, None, None]  # one pixel of the frame in x and in y
        rise, fall = (
            ((torch.special.ndtr((coordinate - side - shift) / sigma) - tail) / (1 - 2 * tail)).clamp(0, 1)
            for side in (inset - 0.5, length - 0.5 - inset)
        )
        soft = soft * (rise - fall)
    return soft


def _soft_edge_by_kernel(u: torch.Tensor, v: torch.Tensor, warp: Warp, width: int, height: int) -> torch.Tensor:
    """`_soft_edge` for one face of any kind; pixels beyond the picture's border take no part in erosion and blur."""
    edge = _edge(u, v, warp, width, height)
    eroded = _eroded(u, v, warp, width, height, edge)
    rows, columns = (_blur_matrix(n, edge[0], u.device) for n in eroded.shape[1:])
    return rows @ eroded @ columns.T


def _blur_matrix(n: int, edge: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The reference's Gaussian blur of a row of n pixels, reflected at its ends, as a matrix (n, n)."""
    distance = torch.arange(2 * n - 1, dtype=torch.float32, device=device)
    half = torch.exp(-0.5 * (distance / _sigma(edge)) ** 2) * (distance <= edge)
    half = half / (2 * half.sum() - half[0])
    weights = torch.cat([half[1:n].flip(0), half[:n]]).unfold(0, n, 1).flip(0)  # [i, j]: half[|i - j|]
    mirrored = half.unfold(0, n, 1)  # [i, j]: half[i + j]
    weights[:, 1:] += mirrored[:, 1:]
    weights[:, :-1] += mirrored.flip(0, 1)[:, :-1]
    return weights


def _sigma(edge: torch.Tensor) -> torch.Tensor:
    """Sigma of a Gaussian whose window is 2 * edge + 1 wide, in pixels of the frame (OpenCV's default)."""
    return 0.3 * (edge - 1) + 0.8
