"""From three landmarks to the aligned square face crop, and the fixed mask on it.

Coordinates are (x, y) in pixels with pixel centres at whole numbers. R is the side of the face crop (the model's
resolution); every size below scales with it.
"""

from functools import lru_cache

import cv2
import numpy as np

TEMPLATE_POINTS = ((17.0, 20.0), (58.0, 20.0), (37.5, 40.0))  # brow, brow, nose; 75 x 100 face (LatentSync)
TEMPLATE_SCALE = 2.8  # pixels of the 256 crop per template unit (LatentSync)
CROP_WIDTH, CROP_HEIGHT = 210, 280  # pixels of the warped face before it is squared, at R = 256 (LatentSync)
BIAS_MOMENTUM = 0.2  # weight of the previous frames' nose bias (LatentSync)
OUTSIDE_GREY = 127  # value of pixels outside the picture (LatentSync)

MASK_SIDE = 256  # native resolution of the fixed mask (LatentSync)
# Pixels of the mask to be generated, as inclusive column ranges. Rows 95 to 127: the two cheeks. From row 128 down, the
# jaw: one range per row, by its first and last columns. The mask is not quite symmetric; keep it so.
MASK_CHEEK_ROWS = (95, 127)
MASK_CHEEKS = ((9, 77), (178, 246))
MASK_JAW_TOP = 128
# fmt: off
MASK_JAW_FIRST = (
    9, 9, 9, 9, 9, 9, 9, 9, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 11, 11, 11, 11, 11,
    11, 11, 11, 11, 11, 11, 11, 11, 11, 12, 12, 12, 12, 12, 12, 12, 13, 13, 14, 14, 15, 15, 16, 16, 17,
    18, 18, 19, 19, 20, 21, 21, 22, 22, 23, 24, 25, 26, 26, 27, 28, 29, 30, 31, 32, 33, 34, 34, 35, 36,
    37, 38, 39, 40, 42, 43, 44, 45, 47, 48, 49, 51, 52, 54, 56, 57, 59, 60, 62, 64, 66, 68, 70, 72, 74,
    76, 78, 80, 82, 85, 87, 90, 93, 95, 99, 104, 108, 131,
)
MASK_JAW_LAST = (
    247, 247, 247, 247, 247, 247, 247, 246, 246, 246, 246, 246, 246, 246, 246, 246, 246, 246, 246, 246,
    246, 245, 245, 245, 245, 245, 245, 245, 245, 245, 245, 245, 245, 245, 245, 244, 244, 244, 244, 244,
    244, 244, 243, 243, 242, 242, 241, 241, 240, 240, 239, 238, 238, 237, 236, 236, 235, 234, 234, 233,
    232, 232, 231, 230, 230, 229, 228, 228, 227, 226, 225, 224, 223, 223, 222, 221, 220, 219, 218, 217,
    216, 215, 214, 213, 212, 211, 210, 208, 207, 206, 204, 203, 202, 200, 199, 197, 196, 194, 192, 191,
    189, 187, 185, 183, 180, 178, 175, 173, 171, 168, 166, 164, 160, 156, 152,
)
# fmt: on


def crop_size(resolution: int) -> tuple[int, int]:
    """Width and height in pixels of the warped face, before it is resized to a square of side `resolution`."""
    return round(CROP_WIDTH * resolution / 256), round(CROP_HEIGHT * resolution / 256)


def template(resolution: int) -> np.ndarray:
    """Positions of the three alignment points in the warped face: (3, 2) float64, pixels."""
    return np.array(TEMPLATE_POINTS) * (TEMPLATE_SCALE * resolution / 256)


def estimate_matrix(
    points: np.ndarray, resolution: int, bias: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate the similarity transform from a frame's landmarks to the template.

    points: (3, 2), pixels of the frame: left-of-image brow, right-of-image brow, nose; not rounded.
    bias: the one returned for the previous frame; None on the first frame and after a gap or a cut.
    Returns the matrix (2, 3) float32, frame to warped face (see `crop_size`), and the bias (2,) float32.
    """
    # Float32 and this order of operations are the reference's.
    source, target = np.asarray(points, np.float32), template(resolution).astype(np.float32)
    source_centre, target_centre = source.mean(0), target.mean(0)
    source, target = source - source_centre, target - target_centre
    source_spread, target_spread = source.std(ddof=1), target.std(ddof=1)
    source, target = source / source_spread, target / target_spread

    left, _, right = np.linalg.svd(source.T @ target)
    if np.linalg.det(left @ right) < 0:  # a mirrored face: a rotation, never a reflection
        left[:, -1] *= -1
    linear = (target_spread / source_spread) * (left @ right).T

    new_bias = target[2] - source[2]
    bias = new_bias if bias is None else BIAS_MOMENTUM * bias + (1 - BIAS_MOMENTUM) * new_bias
    bias = bias.astype(np.float32)
    translation = target_centre - linear @ source_centre + bias
    return np.concatenate([linear, translation[:, None]], axis=1).astype(np.float32), bias


def frame_rectangle(
    matrix: np.ndarray, resolution: int, frame_shape: tuple[int, ...], margin: int
) -> tuple[int, int, int, int]:
    """Bounding box of the warped face in the frame, grown by `margin` pixels and clipped: x0, y0, x1, y1.

    Whole pixels, x1 and y1 exclusive, inside the frame of `frame_shape` (H, W, ...); empty (x0 >= x1 or y0 >= y1) if
    the face lies outside.
    """
    width, height = crop_size(resolution)
    inverse = invert(matrix)
    corners = np.array([[0, 0, 1], [width - 1, 0, 1], [0, height - 1, 1], [width - 1, height - 1, 1]])
    xy = corners @ inverse.T
    low, high = np.floor(xy.min(0)).astype(int) - margin, np.ceil(xy.max(0)).astype(int) + margin + 1
    (x0, y0), (x1, y1) = np.maximum(low, 0), np.minimum(high, (frame_shape[1], frame_shape[0]))
    return int(x0), int(y0), int(x1), int(y1)


def invert(matrix: np.ndarray) -> np.ndarray:
    """Invert a (2, 3) affine matrix; returns (2, 3) float64."""
    linear = np.linalg.inv(np.asarray(matrix[:, :2], np.float64))
    return np.concatenate([linear, -linear @ np.asarray(matrix[:, 2:], np.float64)], axis=1)


def crop_face(frame: np.ndarray, matrix: np.ndarray, resolution: int) -> np.ndarray:
    """Crop the aligned face, uint8 RGB (R, R, 3), from a frame uint8 RGB (H, W, 3) with its `estimate_matrix`."""
    size = crop_size(resolution)
    x0, y0, x1, y1 = frame_rectangle(matrix, resolution, frame.shape, margin=2)
    if x0 >= x1 or y0 >= y1:
        return np.full((resolution, resolution, 3), OUTSIDE_GREY, np.uint8)
    local = np.asarray(matrix, np.float64).copy()
    local[:, 2] += local[:, :2] @ (x0, y0)
    # In float, since OpenCV's 8-bit warp rounds and the reference truncates.
    warped = cv2.warpAffine(
        frame[y0:y1, x0:x1].astype(np.float32),
        local,
        size,
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(OUTSIDE_GREY,) * 3,
    )
    return cv2.resize(warped.astype(np.uint8), (resolution, resolution), interpolation=cv2.INTER_LANCZOS4)


@lru_cache
def fixed_mask(resolution: int) -> np.ndarray:
    """LatentSync's fixed mask: float32 (R, R), 0 = to be generated, 1 = visible. Read-only.

    At other resolutions than 256 its edge has values between 0 and 1.
    """
    grey = np.full((MASK_SIDE, MASK_SIDE), 255, np.uint8)
    for first, last in MASK_CHEEKS:
        grey[MASK_CHEEK_ROWS[0] : MASK_CHEEK_ROWS[1] + 1, first : last + 1] = 0
    for row, (first, last) in enumerate(zip(MASK_JAW_FIRST, MASK_JAW_LAST, strict=True), MASK_JAW_TOP):
        grey[row, first : last + 1] = 0
    if resolution != MASK_SIDE:
        # Lanczos as in the reference. Downscaling with it would alias, and the reference never does.
        kernel = cv2.INTER_LANCZOS4 if resolution > MASK_SIDE else cv2.INTER_AREA
        grey = cv2.resize(grey, (resolution, resolution), interpolation=kernel)
    mask = grey.astype(np.float32) / 255
    mask.flags.writeable = False
    return mask
