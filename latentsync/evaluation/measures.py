"""The measures: functions from numpy arrays to numbers.

Faces are aligned crops, uint8 RGB (n, R, R, 3); hidden is bool (R, R), the part of the mask that is generated. Curves
are values per frame at 25 fps, (n,), NaN where unknown.
"""

import math

import cv2
import numpy as np

from latentsync import FPS, SAMPLE_RATE

SSIM_SIGMA, SSIM_SIDE = 1.5, 11  # of its Gaussian window, pixels (Wang et al. 2004)
SSIM_C1, SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
SAMPLES = SAMPLE_RATE // FPS  # of sound per frame
LOUDNESS_RANGE = 60.0  # dB below the loudest frame; quieter frames count as that
LAGS = np.arange(-5, 6)  # frames
IN_STEP = 1  # frames that a track may be off and still be the nearest
PAUSE = 25.0  # dB below the loudest frame: no speech
FLICKER_SIDE = 64  # pixels a crop is shrunk to, which keeps pulsing patches and removes the camera's grain
BORDER = 0.01  # of the crop's side: width of the mask's border to either side
MIN_OVERLAP = 10  # frames with a face in both of two curves to compare them


def psnr(ours: np.ndarray, theirs: np.ndarray, hidden: np.ndarray) -> float:
    """dB over the hidden pixels of all faces."""
    error = np.mean((ours[:, hidden].astype(np.float32) - theirs[:, hidden].astype(np.float32)) ** 2)
    return math.inf if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(ours: np.ndarray, theirs: np.ndarray, hidden: np.ndarray) -> float:
    """Mean structural similarity of the grey values over the hidden pixels of all faces."""

    def blurred(picture: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(picture, (SSIM_SIDE, SSIM_SIDE), SSIM_SIGMA)

    values = []
    for pair in zip(ours, theirs, strict=True):
        x, y = (cv2.cvtColor(face, cv2.COLOR_RGB2GRAY).astype(np.float64) for face in pair)
        mx, my = blurred(x), blurred(y)
        vx, vy, both = blurred(x * x) - mx * mx, blurred(y * y) - my * my, blurred(x * y) - mx * my
        similarity = (2 * mx * my + SSIM_C1) * (2 * both + SSIM_C2)
        similarity /= (mx * mx + my * my + SSIM_C1) * (vx + vy + SSIM_C2)
        values.append(similarity[hidden].mean())
    return float(np.mean(values))


def landmark_distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """LMD (Chen et al. 2018): mean distance of corresponding points (n, points, 2), in their unit."""
    return float(np.nanmean(np.linalg.norm(ours - theirs, axis=-1)))


def loudness(wav: np.ndarray) -> np.ndarray:
    """dB of every whole frame of sound (samples,) at 16 kHz, at most LOUDNESS_RANGE below the loudest."""
    power = (wav[: len(wav) // SAMPLES * SAMPLES].reshape(-1, SAMPLES).astype(np.float64) ** 2).mean(1)
    level = 10 * np.log10(np.maximum(power, 1e-10))
    return np.maximum(level, level.max(initial=-100.0) - LOUDNESS_RANGE)


def correlation(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Pearson's correlation of two curves at every lag of LAGS, positive if ours is late.

    NaN if one of them is constant or they share too few frames.
    """
    n = min(len(ours), len(theirs))
    correlations = np.full(len(LAGS), np.nan)
    for i, lag in enumerate(LAGS.tolist()):
        x, y = ours[max(lag, 0) : n + min(lag, 0)], theirs[max(-lag, 0) : n - max(lag, 0)]
        both = np.isfinite(x) & np.isfinite(y)
        if both.sum() >= MIN_OVERLAP:
            x, y = x[both] - x[both].mean(), y[both] - y[both].mean()
            size = np.linalg.norm(x) * np.linalg.norm(y)
            correlations[i] = x @ y / size if size > 1e-9 else np.nan
    return correlations


def correlation_in_step(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The correlation of two curves at lag 0."""
    return float(correlation(ours, theirs)[LAGS == 0][0])


def peak(curve: np.ndarray) -> tuple[float, int | None]:
    """The highest of the correlations at LAGS, and its lag; NaN and None if all are NaN."""
    if not np.isfinite(curve).any():
        return math.nan, None
    best = int(np.nanargmax(curve))
    return float(curve[best]), int(LAGS[best])


def is_nearest(ours: np.ndarray, tracks: list[np.ndarray]) -> bool:
    """Whether the first of the `tracks` has the highest correlation with ours, up to IN_STEP frames off."""
    near = np.abs(LAGS) <= IN_STEP
    scores = [np.nan_to_num(correlation(ours, track)[near], nan=-1.0).max() for track in tracks]
    return scores[0] > max(scores[1:], default=-1.0)


def pauses(level: np.ndarray) -> np.ndarray:
    """Frames of a `loudness` without speech in them and in the two frames to either side: bool (n,)."""
    quiet = np.pad(level < level.max() - PAUSE, 2, constant_values=True)
    return np.asarray(np.lib.stride_tricks.sliding_window_view(quiet, 5).all(1))


def flicker(faces: np.ndarray, hidden: np.ndarray) -> float:
    """Mean second difference over time of the hidden part, in grey levels: steady motion has little."""
    size = (FLICKER_SIDE, FLICKER_SIDE)
    small = np.stack([cv2.resize(face, size, interpolation=cv2.INTER_AREA) for face in faces]).astype(np.float32)
    inside = cv2.resize(hidden.astype(np.uint8), size, interpolation=cv2.INTER_AREA) > 0
    return float(np.abs(np.diff(small[:, inside], n=2, axis=0)).mean())


def detail(faces: np.ndarray, hidden: np.ndarray) -> float:
    """Mean absolute Laplacian of the hidden part, in grey levels; blur reduces it."""
    grey = (cv2.cvtColor(face, cv2.COLOR_RGB2GRAY) for face in faces)
    return float(np.mean([np.abs(cv2.Laplacian(face, cv2.CV_32F, ksize=3)[hidden]).mean() for face in grey]))


def border_energy(faces: np.ndarray, hidden: np.ndarray) -> float:
    """Mean squared gradient across the mask's border, in squared grey levels a pixel."""
    width = BORDER * hidden.shape[0]
    soft = cv2.GaussianBlur(hidden.astype(np.float32), (0, 0), width)
    normal = np.stack(np.gradient(soft))
    steep = np.linalg.norm(normal, axis=0)
    near = steep > 0.5 * steep.max()
    y, x = normal[:, near] / steep[near]
    total = 0.0
    for face in faces:
        down, right = np.gradient(cv2.cvtColor(face, cv2.COLOR_RGB2GRAY).astype(np.float32))
        total += np.mean((down[near] * y + right[near] * x) ** 2)
    return float(total / len(faces))
