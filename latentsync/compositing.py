"""Paste the generated face back into its frame.

All of it runs on the device of the tensors, without synchronising with it: matrices and opacities are host numbers, and
the width of the soft edge stays a tensor.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from latentsync.alignment import crop_size, frame_rectangle

EDGE_SHARE = 20  # width of the soft edge: square root of the face's area over this (LatentSync)
MATCHED_AREAS = 32  # along the side of a crop, whose mean colours `match_colours` compares in a film
ALL_VISIBLE = 0.999  # mean of the mask over an area that is visible, with room for rounding
SMALL_FACE = 256  # pixels of the frame; for smaller faces the closed form of the edge is coarse and a kernel is cheap


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


def paste_rectangle(matrix: np.ndarray, resolution: int, frame_shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The part of a frame that `paste_face` may change: x0 <= x1, y0 <= y1, as of `alignment.frame_rectangle`."""
    x0, y0, x1, y1 = frame_rectangle(matrix, resolution, frame_shape, margin=2)
    return x0, y0, max(x0, x1), max(y0, y1)


def paste_face(
    region: torch.Tensor,
    face: torch.Tensor,
    matrix: np.ndarray,
    rectangle: tuple[int, int, int, int],
    frame_shape: tuple[int, ...],
    opacity: float = 1.0,
) -> None:
    """Blend a face crop into its part of the frame, with a soft edge. Changes `region` in place.

    region: (y1 - y0, x1 - x0, 3) uint8 RGB, the pixels in `rectangle` of a frame of `frame_shape` (H, W, ...);
    face: (3, R, R) float in [-1, 1], on the same device; matrix: (2, 3), of `alignment.estimate_matrix`;
    rectangle: of `paste_rectangle`, not empty; opacity: 0 (no change) to 1.
    Only the pixels that the face covers are changed.
    """
    if opacity <= 0:
        return
    x0, y0, x1, y1 = rectangle
    width, height = crop_size(face.shape[-1])
    u, v = _crop_coordinates(matrix, rectangle, region.device)

    face = F.interpolate(
        face[None].float() * 0.5 + 0.5, (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    grid = torch.stack([u * (2 / (width - 1)) - 1, v * (2 / (height - 1)) - 1], dim=-1)
    pasted = F.grid_sample(face, grid[None], padding_mode="border", align_corners=True)[0]
    pasted = pasted.clamp_(0, 1) * 255

    at_border = x0 == 0 or y0 == 0 or x1 == frame_shape[1] or y1 == frame_shape[0]
    small = (x1 - x0) * (y1 - y0) < SMALL_FACE**2
    soft_edge = _soft_edge_by_kernel if at_border or small else _soft_edge
    soft = soft_edge(u, v, matrix, width, height) * opacity
    region = region.permute(2, 0, 1)
    # Truncated as in the reference. `lerp`, since a·(1 − s) + b·s may fall just short of a whole number.
    region.copy_(torch.lerp(region.float(), pasted, soft).to(torch.uint8))


def _crop_coordinates(
    matrix: np.ndarray, rectangle: tuple[int, int, int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates in the warped face of the frame's pixels in a rectangle: u and v, each (y1 - y0, x1 - x0)."""
    x0, y0, x1, y1 = rectangle
    matrix = np.asarray(matrix, np.float64)
    u0, v0 = matrix[:, :2] @ (x0, y0) + matrix[:, 2]  # in double, for frames of any size
    x = torch.arange(x1 - x0, dtype=torch.float32, device=device)
    y = torch.arange(y1 - y0, dtype=torch.float32, device=device)[:, None]
    u = float(matrix[0, 0]) * x + (float(matrix[0, 1]) * y + float(u0))
    v = float(matrix[1, 0]) * x + (float(matrix[1, 1]) * y + float(v0))
    return u, v


# The soft edge. The reference warps an all-ones face into the frame, erodes it (minima over squares of the frame) and
# blurs it, with kernels as wide as the edge. Here the minima are computed in closed form: the face's coordinates are
# linear in x and y, so their extremes over a square lie at its corners.


def _edge(u: torch.Tensor, v: torch.Tensor, matrix: np.ndarray, width: int, height: int) -> torch.Tensor:
    """Width of the soft edge in pixels of the frame, from the area of the face inside it: a 0-d tensor."""
    area = _eroded(u, v, matrix, width, height, 0).sum()
    return (area.sqrt().floor() / EDGE_SHARE).floor()


def _eroded(
    u: torch.Tensor, v: torch.Tensor, matrix: np.ndarray, width: int, height: int, edge: torch.Tensor | int
) -> torch.Tensor:
    """The warped ones after the reference's two erosions, by a 2 x 2 square and one of side 2 * `edge`: (h, w).

    Together they cover -edge - 1 to edge - 1 pixels along x and y (0 for edge 0), inside the rectangle.
    """
    rows, columns = (torch.arange(n, dtype=torch.float32, device=u.device) for n in u.shape)
    inside = 1.0
    for coordinate, (slope_x, slope_y), length in ((u, matrix[0, :2], width), (v, matrix[1, :2], height)):
        low_x, high_x = _extremes(columns, float(slope_x), edge)
        low_y, high_y = _extremes(rows, float(slope_y), edge)
        first_row, first_column = coordinate[0], coordinate[:, :1] - coordinate[0, 0]
        low = (first_row + low_x) + (first_column + low_y[:, None])
        high = (first_row + high_x) + (first_column + high_y[:, None])
        inside = inside * torch.minimum(low + 1, length - high).clamp_(0, 1)  # bilinear samples of ones
    return inside


def _extremes(index: torch.Tensor, slope: float, edge: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimal and maximal change of a coordinate over the erosion window at every index of a row: (n,) each."""
    backward = ((index - edge - 1).clamp(min=0) - index) * slope
    forward = ((index + edge - 1).clamp(max=len(index) - 1) - index).clamp(min=0) * slope
    return torch.minimum(backward, forward), torch.maximum(backward, forward)


def _soft_edge(u: torch.Tensor, v: torch.Tensor, matrix: np.ndarray, width: int, height: int) -> torch.Tensor:
    """Opacity mask of a large face that lies wholly in the picture: (h, w), 0 to 1, 0 outside the face.

    u, v: (h, w), the rectangle's coordinates in the warped face of `width` x `height`.
    A closed form without a kernel: a rectangle eroded by a square is a smaller rectangle, and a blurred rectangle is a
    product of differences of normal distribution functions.
    """
    cos, sin = float(matrix[0, 0]), float(matrix[1, 0])  # times the scale
    scale, spread = math.hypot(cos, sin), abs(cos) + abs(sin)
    edge = _edge(u, v, matrix, width, height)
    sigma = _sigma(edge) * scale
    tail = torch.special.ndtr(-(edge + 0.5) * scale / sigma)  # the reference's kernel ends there
    inset = edge * spread
    soft = 1.0
    for coordinate, row, length in ((u, matrix[0], width), (v, matrix[1], height)):
        shift = float(row[0] + row[1])  # one pixel of the frame in x and in y
        rise, fall = (
            ((torch.special.ndtr((coordinate - side - shift) / sigma) - tail) / (1 - 2 * tail)).clamp(0, 1)
            for side in (inset - 0.5, length - 0.5 - inset)
        )
        soft = soft * (rise - fall)
    return soft


def _soft_edge_by_kernel(u: torch.Tensor, v: torch.Tensor, matrix: np.ndarray, width: int, height: int) -> torch.Tensor:
    """`_soft_edge` for any face; pixels beyond the picture's border take no part in erosion and blur."""
    edge = _edge(u, v, matrix, width, height)
    eroded = _eroded(u, v, matrix, width, height, edge)
    rows, columns = (_blur_matrix(n, edge, u.device) for n in eroded.shape)
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
