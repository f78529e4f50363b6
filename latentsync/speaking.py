"""Who speaks when in a film: mouths that move as its own sound says.

The judge of sync (`evaluation.judge`) embeds 0.2 s of every mouth and of the sound; a mouth that speaks is near to the
sound that is heard with it, and less near to the sound of some frames before and after. How much less, over about a
second, gives the odds that a person speaks, and the likeliest sequence of turns follows from these.

Everything here is on a grid of FPS frames a second, whatever the film's rate is.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

import cv2
import numpy as np
import torch
from torch import Tensor

from latentsync import FPS, SAMPLE_RATE
from latentsync.alignment import crop_face, estimate_matrix
from latentsync.audio import N_FFT, log_powers
from latentsync.corpus import MEL_PER_FRAME, N_MELS, RESOLUTION
from latentsync.evaluation.judge import DIMENSIONS, JITTER, SPAN, Judge, mouth_patches, relative_mel
from latentsync.faces import Face
from latentsync.silence import BLOCK, block_levels, speech_blocks

BATCH = 64  # windows that the judge embeds together
LAGS = np.arange(-9, 10)  # frames between mouth and sound that are compared
IN_STEP = 1  # frames that a film's sound may be early or late
SMOOTHING = 10.0  # frames: deviation of the window, of about a second, over which evidence is averaged
# Similarities are in step by 0.13 above the median of a person who speaks and by 0.01 of one who does not, or says
# something else (deviations 0.10 and 0.02, on real clips); less than MIN_CONTRAST speaks against a person.
MIN_CONTRAST, CONTRAST_PER_ODDS = 0.04, 0.012
MAX_ODDS = 4.0  # logarithm: no evidence counts for more
FRAME_WEIGHT = 0.1  # of a frame's evidence, which the frames around it share
PAUSE_PRICE = 0.3  # of a frame without speech within a turn: short pauses belong to it
TURN_PRICE = 1.0  # of a turn's beginning, and of its end
SOUND_CHUNK = 3000  # frames of sound that are embedded at a time


class MouthReader:
    """Embeds the mouth of one person, frame by frame: `add` every frame of the grid, then `finish`."""

    def __init__(self, judge: Judge):
        self._judge = judge
        self._bias: np.ndarray | None = None
        self._window: deque[np.ndarray | None] = deque([None] * (SPAN // 2), SPAN)
        self._batch: list[np.ndarray | None] = []
        self._embedded: list[np.ndarray] = []

    def add(self, frame: np.ndarray, face: Face | None) -> None:
        """Take the next frame, uint8 RGB (H, W, 3)."""
        if face is None:
            self._bias = None
            self._append(None)
            return
        matrix, self._bias = estimate_matrix(face.points, RESOLUTION, None if face.first else self._bias)
        self._append(mouth_patches(crop_face(frame, matrix, RESOLUTION)[None])[0])

    def finish(self) -> np.ndarray:
        """Embeddings of the SPAN frames around every frame: float16 (n, DIMENSIONS), NaN where a face is missing."""
        for _ in range(SPAN // 2):
            self._append(None)
        self._embed()
        return np.concatenate(self._embedded)

    def _append(self, patch: np.ndarray | None) -> None:
        self._window.append(patch)
        if len(self._window) == SPAN:
            whole = [mouth for mouth in self._window if mouth is not None]
            self._batch.append(np.stack(whole) if len(whole) == SPAN else None)
        if len(self._batch) == BATCH:
            self._embed()

    def _embed(self) -> None:
        rows = np.full((len(self._batch), DIMENSIONS), np.nan, np.float16)
        whole = [i for i, patches in enumerate(self._batch) if patches is not None]
        if whole:
            patches = torch.from_numpy(np.stack([self._batch[i] for i in whole]))  # type: ignore[misc]
            patches = patches[:, :, JITTER:-JITTER, JITTER:-JITTER].float() / 255
            with torch.inference_mode():
                rows[whole] = self._judge.embed_mouths(patches).numpy()
        self._embedded.append(rows)
        self._batch = []


@torch.inference_mode()
def embed_sound(judge: Judge, wav: np.ndarray, frames: int) -> np.ndarray:
    """The sound (samples,) around every frame, float32 (frames, DIMENSIONS); it is silent after its end."""
    samples = max(frames * SAMPLE_RATE // FPS, N_FFT)
    sound = torch.zeros(samples)
    sound[: len(wav)] = torch.from_numpy(wav[:samples])
    mel = relative_mel(torch.cat(list(log_powers(sound, N_MELS)), dim=1).T)
    before = SPAN // 2 * MEL_PER_FRAME
    mel = torch.nn.functional.pad(mel, (0, 0, before, before + SPAN * MEL_PER_FRAME), value=-1.0)
    parts: list[Tensor] = []
    for first in range(0, frames, SOUND_CHUNK):
        starts = torch.arange(first, min(first + SOUND_CHUNK, frames)) * MEL_PER_FRAME
        parts.append(judge.embed_sounds(mel[starts[:, None] + torch.arange(SPAN * MEL_PER_FRAME)]))
    return torch.cat(parts).numpy()


def speech_odds(mouths: np.ndarray, sounds: np.ndarray) -> np.ndarray:
    """Logarithms of the odds that a person speaks in each frame, (n,), NaN without a face.

    mouths, sounds: (n, DIMENSIONS), of one person and of the film's sound. They follow from how far the similarity in
    step is above the median over LAGS, on the average over the frames around.
    """
    n = len(mouths)
    lagged = np.full((len(LAGS), n), np.nan)
    for row, lag in zip(lagged, LAGS.tolist(), strict=True):
        inside = np.arange(max(lag, 0), n + min(lag, 0))  # a mouth that is late by `lag` has the sound from before
        row[inside] = np.einsum("nd,nd->n", mouths[inside].astype(np.float32), sounds[inside - lag])
    lagged = smooth(lagged)
    return (lagged[np.abs(LAGS) <= IN_STEP].max(0) - np.median(lagged, axis=0) - MIN_CONTRAST) / CONTRAST_PER_ODDS


def smooth(values: np.ndarray) -> np.ndarray:
    """Averages over frames, the last axis, that leave out NaN; NaN where all is."""
    known = np.isfinite(values)
    weights, sums = (
        cv2.GaussianBlur(np.atleast_2d(part), (0, 1), SMOOTHING, sigmaY=0.1, borderType=cv2.BORDER_CONSTANT)
        for part in (known.astype(np.float64), np.where(known, values, 0).astype(np.float64))
    )
    weights, sums = weights.reshape(values.shape), sums.reshape(values.shape)
    return np.where(weights > 1e-3, sums / np.maximum(weights, 1e-3), np.nan)


def speech_frames(wav: np.ndarray, frames: int) -> np.ndarray:
    """In which frames the sound (samples,) has speech, bool (frames,), see `silence.speech_blocks`."""
    speech = np.zeros(frames, bool)
    if len(wav) >= BLOCK:
        blocks = speech_blocks(block_levels(torch.from_numpy(wav)))
        per_frame = SAMPLE_RATE // FPS // BLOCK
        blocks = blocks[: frames * per_frame]
        blocks = np.pad(blocks, (0, -len(blocks) % per_frame))
        speech[: len(blocks) // per_frame] = blocks.reshape(-1, per_frame).max(1)
    return speech


def on_grid(
    followed: Iterable[tuple[np.ndarray, tuple[Face | None, ...]]], rate: Fraction
) -> Iterator[tuple[np.ndarray, tuple[Face | None, ...]]]:
    """The frames and faces of a film of `rate` frames a second that are the nearest to those of the grid."""
    index = 0
    for number, (frame, faces) in enumerate(followed):
        while round(index * rate / FPS) == number:
            yield frame, faces
            index += 1


def who_speaks(judge: Judge, mouths: Sequence[np.ndarray], wav: np.ndarray) -> np.ndarray:
    """The number of the person who speaks in every frame, −1 where nobody does: (n,).

    mouths: of each person, see `MouthReader.finish`; wav: (samples,) at 16 kHz, the film's sound.
    """
    frames = len(mouths[0])
    sounds = embed_sound(judge, wav, frames)
    odds = np.stack([speech_odds(embeddings, sounds) for embeddings in mouths])
    return decide(odds, speech_frames(wav, frames))


def decide(odds: np.ndarray, speech: np.ndarray) -> np.ndarray:
    """Who speaks in every frame: the number of a person, or −1 for nobody, (n,), by the likeliest sequence of turns.

    odds: (people, n), the logarithms of the odds that each speaks, NaN without a face; speech: (n,), whether the film's
    sound has speech. Nobody speaks where all odds are against it: the voice may come from outside the picture.
    """
    people, n = odds.shape
    prices = np.zeros((n, people + 1))
    bounded = np.clip(np.nan_to_num(odds, nan=-MAX_ODDS), -MAX_ODDS, MAX_ODDS)
    prices[:, 1:] = np.where(speech, -bounded * FRAME_WEIGHT, PAUSE_PRICE).T
    best = np.zeros(people + 1)
    came_from = np.empty((n, people + 1), np.uint8)
    for row, price in zip(came_from, prices, strict=True):
        cheapest = int(best.argmin())
        stays = best <= best[cheapest] + TURN_PRICE
        row[:] = np.where(stays, np.arange(people + 1), cheapest)
        best = np.where(stays, best, best[cheapest] + TURN_PRICE) + price
        best -= best.min()
    speaker = np.empty(n, np.int64)
    state = int(best.argmin())
    for index in range(n - 1, -1, -1):
        speaker[index] = state - 1
        state = int(came_from[index, state])
    return speaker
