"""A voice that is laid into a longer film: which frames say it, and how the others pass by them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from threading import Event

import numpy as np
import torch

from latentsync import SAMPLE_RATE
from latentsync.audio import frame_count
from latentsync.faces import Face
from latentsync.following import FADE
from latentsync.media import VideoInfo, read_frames
from latentsync.rates import scale_frames
from latentsync.windows import AlignedFrame


@dataclass(frozen=True)
class Placement:
    """Where a voice lies in a result, in frames.

    first: with which it begins; count: that say it; total: of the result; samples: of the voice at 16 kHz that are
    used; remark: a sentence for the user, if these are not all.
    """

    first: int
    count: int
    total: int
    samples: int
    remark: str | None = None


def place_voice(info: VideoInfo, samples: int, at: float | None) -> Placement:
    """Where a voice of so many samples at 16 kHz lies in the result of a film.

    at: seconds of the film at which it begins, at the nearest frame; where it runs past the film's end, it is cut
    there. None: the result lasts as long as the voice. Raises UserError where the film ends before.
    """
    count = frame_count(samples, info.rate)
    if at is None:
        return Placement(0, count, count, samples)
    first = info.frame_at(at)
    if first + count <= info.n_frames:
        return Placement(first, count, info.n_frames, samples)
    count = info.n_frames - first
    used = int(count * SAMPLE_RATE / info.rate)
    remark = (
        f"The voice runs past the end of the film and was cut there: {used / SAMPLE_RATE:.2f} of its "
        f"{samples / SAMPLE_RATE:.2f} s are used."
    )
    # At once for less than a frame, which nobody misses.
    return Placement(first, count, info.n_frames, used, remark if samples - used > SAMPLE_RATE / info.rate else None)


def whole_film(info: VideoInfo, total: int, cancel: Event | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """`total` frames of a film, numbered, once; where decoding gives fewer, the last one is repeated."""
    number = -1
    for number, frame in enumerate(read_frames(info, count=total, cancel=cancel)):
        yield number, frame
    for missing in range(number + 1, total):
        if cancel is not None and cancel.is_set():
            return
        for frame in read_frames(info, start=number, count=1, cancel=cancel):
            yield missing, frame


def pass_by(frames: Iterable[tuple[int, np.ndarray]]) -> Iterator[AlignedFrame]:
    """Frames outside of the voice, in which no face is looked for."""
    for number, frame in frames:
        yield AlignedFrame(frame, torch.empty(0), position=number, outside=True)


def fade_ends(
    tracked: Iterable[tuple[np.ndarray, Face | None]], placement: Placement, rate: Fraction
) -> Iterator[tuple[np.ndarray, Face | None]]:
    """Let the painted mouth come and go softly where the film's own one is seen before and after the voice."""
    fade = scale_frames(FADE, rate)
    after = placement.total - placement.first - placement.count
    for number, (frame, face) in enumerate(tracked):
        share = min(
            (number + 1) / (fade + 1) if placement.first else 1.0,
            (placement.count - number) / (fade + 1) if after else 1.0,
        )
        yield frame, face if face is None or share >= 1 else replace(face, opacity=face.opacity * share)
