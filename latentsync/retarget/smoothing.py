"""Remove the tremble of the landmarks over time without lag, and without slowing down a mouth that speaks."""

from collections.abc import Mapping

import numpy as np

from latentsync.retarget.geometry import HEAD, LIPS, RING, head_similarity, pixels_per_unit

REACH = 4  # frames at 25 a second that are used on either side
SIGMA = 2.0  # frames at 25 a second
# Deviations from straight motion that are noise, in head units, and the least in pixels. Lips move fast in earnest.
LIPS_TREMBLE, HEAD_TREMBLE, MIN_TREMBLE_PIXELS = 0.004, 0.007, 0.4


def smooth_points(neighbours: Mapping[int, np.ndarray], sigma: float = SIGMA) -> np.ndarray:
    """The `mouth_points` (73, 2) of frame 0, from those of the frames around it; sigma: frames.

    Lips, ring and head are smoothed separately. A straight line in time is fitted to each; frames that deviate from the
    line by more than tremble count little, so fast motion stays as it is.
    """
    times = np.array(list(neighbours), float)
    points = np.stack(list(neighbours.values())).astype(float)
    here = neighbours[0].astype(float)
    scale = pixels_per_unit(head_similarity(here))
    near = np.exp(-0.5 * (times / sigma) ** 2)
    smoothed = here.copy()
    for part, tremble in (LIPS, LIPS_TREMBLE), (RING, HEAD_TREMBLE), (HEAD, HEAD_TREMBLE):
        _, velocity = fit_line(times, points[:, part], near)
        deviation = points[:, part] - here[part] - times[:, None, None] * velocity
        rms = np.sqrt((deviation**2).mean((1, 2)))
        noise = max(tremble * scale, MIN_TREMBLE_PIXELS)
        smoothed[part], _ = fit_line(times, points[:, part], near * np.exp(-0.5 * (rms / noise) ** 2))
    return smoothed.astype(np.float32)


def fit_line(times: np.ndarray, values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit values (n, …) at times (n,) by a weighted straight line: its value at time 0 and its slope, (…) each."""
    root = np.sqrt(weights)
    solution = np.linalg.pinv(root[:, None] * np.stack([np.ones_like(times), times], axis=1)) * root
    at_zero, slope = np.tensordot(solution, values, 1)
    return at_zero, slope
