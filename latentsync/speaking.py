"""Who speaks when in a film: mouths that move as its own sound says.

The judge of sync (`evaluation.judge`) embeds 0.2 s of every mouth and of the sound; a mouth that speaks is near to the
sound that is heard with it, and less near to the sound of some frames before and after. That and how fast the mouth
moves, over about a second, are the odds that a person speaks. The likeliest sequence of turns follows from them.

Everything here is on a grid of FPS frames a second, whatever the film's rate is.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

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
from latentsync.retarget import mouth_points
from latentsync.retarget.geometry import LIPS, head_similarity, transform
from latentsync.silence import BLOCK, block_levels, speech_blocks

BATCH = 64  # windows that the judge embeds together
LAGS = np.arange(-9, 10)  # frames between mouth and sound that are compared
IN_STEP = 1  # frames that a film's sound may be early or late
SMOOTHING = 10.0  # frames: deviation of the window, of about a second, over which evidence is averaged
MAX_ODDS = 4.0  # logarithm: no evidence counts for more
FRAME_WEIGHT = 0.1  # of a frame's evidence, which the frames around it share
PAUSE_PRICE = 0.25  # of a frame without speech within a turn: pauses up to 0.6 s belong to it
TURN_PRICE = 2.0  # of a turn's beginning, and of its end
SOUND_CHUNK = 3000  # frames of sound that are embedded at a time


@dataclass
class MouthTrack:
    """What a person's mouth does: for every frame an embedding (DIMENSIONS,) of the SPAN frames around it, and how fast
    the lips move, in head units a frame. NaN where there is no face."""

    embeddings: list[np.ndarray] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)


class MouthReader:
    """Reads the mouth of one person, frame by frame; `finish` gives its track."""

    def __init__(self, judge: Judge):
        self._judge = judge
        self._track = MouthTrack()
        self._bias: np.ndarray | None = None
        self._lips: np.ndarray | None = None  # of the frame before
        self._window: deque[np.ndarray | None] = deque([None] * (SPAN // 2), SPAN)
        self._batch: list[np.ndarray | None] = []

    def add(self, frame: np.ndarray, face: Face | None) -> None:
        """Take the next frame, uint8 RGB (H, W, 3)."""
        if face is None:
            self._bias = self._lips = None
            self._append(None)
            self._track.speeds.append(np.nan)
            return
        matrix, self._bias = estimate_matrix(face.points, RESOLUTION, None if face.first else self._bias)
        self._append(mouth_patches(crop_face(frame, matrix, RESOLUTION)[None])[0])
        points = mouth_points(face.landmarks)
        lips = transform(head_similarity(points), points[LIPS])
        before = lips if self._lips is None or face.first else self._lips
        self._track.speeds.append(float(np.sqrt(((lips - before) ** 2).sum(1).mean())))
        self._lips = lips

    def finish(self) -> MouthTrack:
        for _ in range(SPAN // 2):
            self._append(None)
        self._embed()
        return self._track

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
        self._track.embeddings += list(rows)
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


def evidence(track: MouthTrack, sounds: np.ndarray) -> np.ndarray:
    """How much a person's mouth speaks the sound: (n, 3), NaN without a face.

    The similarity of mouth and sound in step, how far it is above the median over LAGS, and the logarithm of the lips'
    speed, averaged over the frames around.
    """
    mouths = np.stack(track.embeddings).astype(np.float32)
    n = len(mouths)
    lagged = np.full((len(LAGS), n), np.nan, np.float32)
    for row, lag in zip(lagged, LAGS.tolist(), strict=True):
        inside = np.arange(max(lag, 0), n + min(lag, 0))  # a mouth that is late by `lag` has the sound from before
        row[inside] = (mouths[inside] * sounds[inside - lag]).sum(1)
    lagged = smooth(lagged)
    in_step = lagged[np.abs(LAGS) <= IN_STEP].max(0)
    speed = np.log(smooth(np.array(track.speeds)) + 1e-3)
    return np.stack([in_step, in_step - np.median(lagged, axis=0), speed], axis=1)


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
        whole = blocks[: frames * per_frame]
        whole = np.pad(whole, (0, -len(whole) % per_frame)).reshape(-1, per_frame).any(1)
        speech[: len(whole)] = whole
    return speech


def on_grid(followed: Iterable[tuple[np.ndarray, tuple[Face | None, ...]]], rate: float) -> Iterator[tuple[np.ndarray, tuple[Face | None, ...]]]:
    """The frames nearest to those of FPS a second, out of a film of `rate`."""
    index = 0
    for number, item in enumerate(followed):
        while round(index * rate / FPS) == number:
            yield item
            index += 1


def decide(odds: np.ndarray, speech: np.ndarray) -> np.ndarray:
    """Who speaks in every frame: the number of a person, or −1 for nobody, (n,), by the likeliest sequence of turns.

    odds: (people, n), the logarithms of the odds that each speaks, NaN without a face; speech: (n,), whether the film's
    sound has speech. Nobody speaks where all odds are against it: the voice may be that of somebody outside the picture.
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
