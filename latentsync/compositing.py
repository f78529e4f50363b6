"""Put the generated face back into its frame.

Everything here is torch on whatever device the tensors are on, without synchronising with it: matrices and
opacities are host numbers, and the width of the soft edge stays a tensor.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from latentsync.alignment import crop_size, frame_rectangle

EDGE_SHARE = 20  # the soft edge is the face's root area over this wide (LatentSync)
SMALL_FACE = 256  # pixels of the frame; below, the closed form of the edge is coarse and a kernel is cheap


def merge_faces(generated: torch.Tensor, crops: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The generated face where the mask hides it, the camera's where it does not.

    generated: (n, 3, R, R) float in [-1, 1]; crops: (n, R, R, 3) uint8, of `alignment.crop_face`;
    mask: (R, R) float, `alignment.fixed_mask`. All on one device. Returns (n, 3, R, R) in [-1, 1] and the
    dtype of `generated`.
    """
    mask = mask.to(generated.dtype)
    original = crops.permute(0, 3, 1, 2).to(generated.dtype) / 127.5 - 1
    return generated + (original - generated) * mask


def match_colours(generated: torch.Tensor, crops: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Give generated faces the colours that the camera saw, for autoencoders that do not return every tone.

    What the mask shows is there twice, generated and as it was: the affine colour transform from the one to the
    other (least squares, one a face) is applied to the whole face. Arguments as in `merge_faces`; returns
    (n, 3, R, R) in the dtype of `generated`.
    """
    original = crops.permute(0, 3, 1, 2).float() / 127.5 - 1
    ones = torch.ones_like(original[:, :1])
    colours = torch.cat([generated.float(), ones], dim=1).flatten(2)  # (n, 4, pixels)
    weighted = colours * mask.float().flatten()
    # A hundredth of a grey level of ridge keeps a flat picture solvable.
    square = weighted @ colours.transpose(1, 2) + 1e-4 * mask.sum() * torch.eye(4, device=mask.device)
    # Without `solve`'s look at the outcome, which would wait for the device.
    transform, _ = torch.linalg.solve_ex(square, weighted @ original.flatten(2).transpose(1, 2))  # (n, 4, 3)
    return (transform.transpose(1, 2) @ colours).unflatten(2, generated.shape[2:]).to(generated.dtype)


def paste_face(frame: torch.Tensor, face: torch.Tensor, matrix: np.ndarray, opacity: float = 1.0) -> None:
    """Blend a face crop into the frame it came from, with a soft edge. Changes `frame` in place.

    frame: (H, W, 3) uint8 RGB; face: (3, R, R) float in [-1, 1], on the same device;
    matrix: (2, 3), of `alignment.estimate_matrix`; opacity: 0 (no change) to 1.
    Only the rectangle around the face is touched, and in it only what the face covers.
    """
    x0, y0, x1, y1 = rectangle = pasted_rectangle(matrix, face.shape[-1], frame.shape)
    if x0 < x1 and y0 < y1:
        paste_into_rectangle(frame[y0:y1, x0:x1], face, matrix, rectangle, frame.shape, opacity)


def pasted_rectangle(matrix: np.ndarray, resolution: int, frame_shape: tuple[int, ...]) -> tuple:
    """The part of a frame that a face may change: x0 <= x1, y0 <= y1, as of `alignment.frame_rectangle`."""
    x0, y0, x1, y1 = frame_rectangle(matrix, resolution, frame_shape, margin=2)
    return x0, y0, max(x0, x1), max(y0, y1)


def paste_into_rectangle(
    region: torch.Tensor,
    face: torch.Tensor,
    matrix: np.ndarray,
    rectangle: tuple[int, int, int, int],
    frame_shape: tuple[int, ...],
    opacity: float = 1.0,
) -> None:
    """`paste_face` where only the face's part of the frame is at hand. Changes `region` in place.

    region: (y1 - y0, x1 - x0, 3) uint8 RGB, what the frame of `frame_shape` (H, W, ...) shows in `rectangle`,
    its `pasted_rectangle`, which is not empty.
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
    # Truncated as in the reference. The sum of two shares would fall short of whole numbers here and there.
    region.copy_(torch.lerp(region.float(), pasted, soft).to(torch.uint8))


def _crop_coordinates(
    matrix: np.ndarray, rectangle: tuple[int, int, int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the frame's pixels of a rectangle lie in the warped face: u and v, each (y1 - y0, x1 - x0)."""
    x0, y0, x1, y1 = rectangle
    matrix = np.asarray(matrix, np.float64)
    at_u, at_v = matrix[:, :2] @ (x0, y0) + matrix[:, 2]  # in double, for frames of any size
    x = torch.arange(x1 - x0, dtype=torch.float32, device=device)
    y = torch.arange(y1 - y0, dtype=torch.float32, device=device)[:, None]
    u = float(matrix[0, 0]) * x + (float(matrix[0, 1]) * y + float(at_u))
    v = float(matrix[1, 0]) * x + (float(matrix[1, 1]) * y + float(at_v))
    return u, v


# The soft edge. The reference warps an all-ones face into the frame, takes minima over squares of the frame
# and blurs, with kernels as wide as the edge. Here the minima are arithmetic: where the face's coordinates
# are linear in x and y, their extremes over a square lie at its corners.


def _edge(u: torch.Tensor, v: torch.Tensor, matrix: np.ndarray, width: int, height: int) -> torch.Tensor:
    """Width of the soft edge in pixels of the frame, from the area of the face inside it: a 0-d tensor."""
    area = _eroded(u, v, matrix, width, height, 0).sum()
    return (area.sqrt().floor() / EDGE_SHARE).floor()


def _eroded(
    u: torch.Tensor, v: torch.Tensor, matrix: np.ndarray, width: int, height: int, edge: torch.Tensor | int
) -> torch.Tensor:
    """The warped ones after the reference's minima, over a 2 x 2 square and one of 2 * `edge`: (h, w).

    Together they look from -edge - 1 to edge - 1 pixels along x and y (0 for edge 0), inside the rectangle.
    """
    rows, columns = (torch.arange(n, dtype=torch.float32, device=u.device) for n in u.shape)
    inside = 1.0
    for at, (along_x, along_y), length in ((u, matrix[0, :2], width), (v, matrix[1, :2], height)):
        low_x, high_x = _extremes(columns, float(along_x), edge)
        low_y, high_y = _extremes(rows, float(along_y), edge)
        low = (at[0] + low_x) + (at[:, :1] - at[0, 0] + low_y[:, None])
        high = (at[0] + high_x) + (at[:, :1] - at[0, 0] + high_y[:, None])
        inside = inside * torch.minimum(low + 1, length - high).clamp_(0, 1)  # bilinear samples of ones
    return inside


def _extremes(index: torch.Tensor, slope: float, edge: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest change of a coordinate over the window at every index of a row: (n,) each."""
    back = ((index - edge - 1).clamp(min=0) - index) * slope
    forth = ((index + edge - 1).clamp(max=len(index) - 1) - index).clamp(min=0) * slope
    return torch.minimum(back, forth), torch.maximum(back, forth)


def _soft_edge(u: torch.Tensor, v: torch.Tensor, matrix: np.ndarray, width: int, height: int) -> torch.Tensor:
    """How much of a large face wholly in the picture shows: (h, w), 0 to 1, 0 outside the face.

    u, v: (h, w), the rectangle's coordinates in the warped face of `width` x `height`.
    Without a kernel: a rectangle eroded by a square is a smaller rectangle, and blurred it is a product of
    differences of normal distribution functions.
    """
    cos, sin = float(matrix[0, 0]), float(matrix[1, 0])  # times the scale
    scale, spread = math.hypot(cos, sin), abs(cos) + abs(sin)
    edge = _edge(u, v, matrix, width, height)
    sigma = _sigma(edge) * scale
    tail = torch.special.ndtr(-(edge + 0.5) * scale / sigma)  # the reference's kernel ends there
    inset = edge * spread
    soft = 1.0
    for at, row, length in ((u, matrix[0], width), (v, matrix[1], height)):
        shift = float(row[0] + row[1])  # one pixel of the frame in x and in y
        rise, fall = (
            ((torch.special.ndtr((at - side - shift) / sigma) - tail) / (1 - 2 * tail)).clamp(0, 1)
            for side in (inset - 0.5, length - 0.5 - inset)
        )
        soft = soft * (rise - fall)
    return soft


def _soft_edge_by_kernel(u: torch.Tensor, v: torch.Tensor, matrix: np.ndarray, width: int, height: int) -> torch.Tensor:
    """`_soft_edge` for any face: at the picture's border, what lies beyond neither erodes nor blurs it."""
    edge = _edge(u, v, matrix, width, height)
    eroded = _eroded(u, v, matrix, width, height, edge)
    rows, columns = (_blur_matrix(n, edge, u.device) for n in eroded.shape)
    return rows @ eroded @ columns.T


def _blur_matrix(n: int, edge: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The reference's Gaussian over a row of n pixels that is reflected at its ends: (n, n)."""
    distance = torch.arange(2 * n - 1, dtype=torch.float32, device=device)
    half = torch.exp(-0.5 * (distance / _sigma(edge)) ** 2) * (distance <= edge)
    half = half / (2 * half.sum() - half[0])
    weights = torch.cat([half[1:n].flip(0), half[:n]]).unfold(0, n, 1).flip(0)  # [i, j]: half[|i - j|]
    mirrored = half.unfold(0, n, 1)  # [i, j]: half[i + j]
    weights[:, 1:] += mirrored[:, 1:]
    weights[:, :-1] += mirrored.flip(0, 1)[:, :-1]
    return weights


def _sigma(edge: torch.Tensor) -> torch.Tensor:
    """Of the Gaussian whose window is 2 * edge + 1 wide, in pixels of the frame (OpenCV's default)."""
    return 0.3 * (edge - 1) + 0.8
