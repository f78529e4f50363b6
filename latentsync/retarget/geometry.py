"""Points of a mouth and of the head around it, and lips reshaped to another opening and width."""

import numpy as np

# Indices into the 478-point mesh, from corner to corner along the upper lip, and back along the lower one.
OUTER_LIPS = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291, 375, 321, 405, 314, 17, 84, 181, 91, 146)
INNER_LIPS = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308, 324, 318, 402, 317, 14, 87, 178, 88, 95)
# Skin around the mouth: under the nose, cheeks, chin.
RING_POINTS = (
    *(2, 97, 326, 98, 327, 203, 423, 206, 426, 216, 436, 212),
    *(432, 214, 434, 210, 430, 211, 431, 208, 428, 199, 175),
)
# Eye corners, bridge and tip of the nose, and their coordinates in a head seen from the front.
HEAD_POINTS = (33, 133, 362, 263, 168, 6, 197, 195, 5, 4)
HEAD_TEMPLATE = np.array(
    [
        *[(-0.5, 0), (-0.193, 0.024), (0.193, 0.024), (0.5, 0), (0, -0.027)],
        *[(0, 0.063), (0, 0.142), (0, 0.212), (0, 0.288), (0, 0.381)],
    ]
)

MESH_INDICES = np.array([*OUTER_LIPS, *INNER_LIPS, *RING_POINTS, *HEAD_POINTS])  # of `mouth_points`

# Slices and indices of `mouth_points`.
OUTER, INNER, LIPS = slice(0, 20), slice(20, 40), slice(0, 40)
RING = slice(40, 40 + len(RING_POINTS))
HEAD = slice(RING.stop, RING.stop + len(HEAD_POINTS))
CHIN, NOSE_TIP = RING.start + RING_POINTS.index(199), HEAD.stop - 1
LEFT, TOP, RIGHT = 0, 5, 10  # of OUTER: corners, middle of the upper lip
UPPER_LIP = np.array([*range(0, 11), *range(20, 31)])  # with the corners
LOWER_LIP = np.array([*range(10, 20), 0, *range(30, 40), 20])  # with the corners
GAPS = ((25, 35), (24, 36), (26, 34))  # pairs of opposite inner points: in the middle and next to it

MIN_GAP = 0.004  # between closed lips
UPPER_SHARE = 0.25  # share of a change of the opening by which the upper lip moves
PROFILE_POWER = 1.0  # how a change of the opening falls off from the middle of the lips to their corners


def mouth_points(landmarks: np.ndarray) -> np.ndarray:
    """Select LIPS, RING and HEAD from a mesh (478, 2): (73, 2) float32."""
    return landmarks[MESH_INDICES].astype(np.float32)


def head_similarity(points: np.ndarray) -> np.ndarray:
    """The similarity transform (2, 3), float64, from the pixels of `mouth_points` to head units."""
    source, target = points[HEAD].astype(float), HEAD_TEMPLATE
    source_mean, target_mean = source.mean(0), target.mean(0)
    a, b = (source - source_mean) @ (1, 1j), (target - target_mean) @ (1, 1j)
    turn = (a.conj() @ b) / max((a.conj() @ a).real, 1e-12)
    linear = np.array([[turn.real, -turn.imag], [turn.imag, turn.real]])
    return np.hstack([linear, (target_mean - linear @ source_mean)[:, None]])


def transform(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply an affine matrix (2, 3) to points (n, 2)."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def pixels_per_unit(head: np.ndarray) -> float:
    """Pixels per head unit of a `head_similarity`."""
    return float(1 / np.sqrt(abs(np.linalg.det(head[:, :2]))))


def lip_opening(lips: np.ndarray) -> float:
    """Mean gap between the inner lips (40, 2), in their unit."""
    return float(np.mean([np.linalg.norm(lips[below] - lips[above]) for above, below in GAPS]))


def lip_width(lips: np.ndarray) -> float:
    """Distance between the corners of lips (40, 2), in their unit."""
    return float(np.linalg.norm(lips[RIGHT] - lips[LEFT]))


def lip_anchor(lips: np.ndarray) -> np.ndarray:
    """The point (2,) by which lips (40, 2) are placed: between their corners and the upper lip's edge."""
    return (lips[LEFT] + lips[RIGHT]) / 4 + lips[TOP] / 2


def reshape_lips(lips: np.ndarray, target_opening: float, target_width: float) -> np.ndarray:
    """Lips (40, 2) of an upright head, in head units, with another opening and width."""
    middle = (lips[LEFT, 0] + lips[RIGHT, 0]) / 2
    across = np.empty(len(lips))  # -1 to 1, from corner to corner
    for part in (OUTER, INNER):
        half = max(np.ptp(lips[part][[LEFT, RIGHT], 0]) / 2, 1e-3)
        across[part] = np.clip((lips[part, 0] - middle) / half, -1, 1)
    profile = (1 - across**2) ** PROFILE_POWER
    profile /= np.mean([profile[point] for pair in GAPS for point in pair])
    change = max(target_opening, MIN_GAP) - lip_opening(lips)
    out = lips.copy()
    out[1:10, 1] -= UPPER_SHARE * change * profile[1:10]
    out[21:30, 1] -= UPPER_SHARE * change * profile[21:30]
    out[11:20, 1] += (1 - UPPER_SHARE) * change * profile[11:20]
    out[31:40, 1] += (1 - UPPER_SHARE) * change * profile[31:40]
    overlap = np.maximum(MIN_GAP / 2 - (out[39:30:-1, 1] - out[21:30, 1]), 0)  # lips never cross
    out[21:30, 1] -= overlap / 2
    out[39:30:-1, 1] += overlap / 2
    out[:, 0] = middle + (out[:, 0] - middle) * (target_width / max(lip_width(lips), 1e-3))
    return out


def mouth_axes(lips: np.ndarray) -> np.ndarray:
    """Unit vectors (2, 2): from corner to corner of lips (40, 2), and down."""
    x, y = (lips[RIGHT] - lips[LEFT]) / max(lip_width(lips), 1e-6)
    return np.array([[x, y], [-y, x]])


def inner_contours(lips: np.ndarray, axes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inner edges of upper and lower lip, (11, 2) each, from corner to corner in the mouth's axes."""
    inner = lips[INNER] @ axes.T
    upper, lower = inner[:11], inner[[0, *range(19, 10, -1), 10]]
    for edge in (upper, lower):  # np.interp needs increasing coordinates
        edge[:, 0] = np.maximum.accumulate(edge[:, 0]) + np.arange(11) * 1e-4
    lower[:, 1] = np.maximum(lower[:, 1], np.interp(lower[:, 0], upper[:, 0], upper[:, 1]))
    return upper, lower


def fixed_point(points: np.ndarray) -> np.ndarray:
    """Points in sixteenths of a pixel, for OpenCV's drawing functions with shift=4."""
    return np.round(points * 16).astype(np.int32)
