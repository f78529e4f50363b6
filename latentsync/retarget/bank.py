"""The bank of a film's mouths, collected ahead of the frames in which they are shown."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from latentsync import FPS
from latentsync.faces import Face
from latentsync.prefetch import POLL_SECONDS, close
from latentsync.rates import scale_frames
from latentsync.retarget.geometry import MESH_INDICES, mouth_points
from latentsync.retarget.mouths import TURN, Mouth, Patch, cut_patch, measure_mouth, most_alike
from latentsync.retarget.occlusion import OcclusionDetector
from latentsync.retarget.smoothing import REACH, SIGMA, smooth_points

# Frames are those of a film of 25 a second.
CHUNK = 250  # frames that share a bank; it holds mouths up to the chunk's end
MAX_BYTES = 96 * 2**20  # of pixels in one bank; at most two banks are held
MAX_MOUTHS = 250  # in one bank
MAX_TURN = 0.2  # head units from the nose's tip to the middle of the face; a head turned further lends no mouth
COVER_FADE = 4  # frames in which the opacity falls before something covers the mouth, and rises after it


@dataclass(frozen=True, eq=False)
class _Tracked:
    """A frame's face, its `mouth_points` as they were detected, and its mouth, None where it cannot be used."""

    face: Face | None
    points: np.ndarray | None = None
    patch: Patch | None = None
    covered: bool = False

    @property
    def first(self) -> bool:
        """Whether the face does not continue that of the frame before."""
        return self.face is None or self.face.first


class MouthBank:
    """Mouths of a film of `rate` frames a second, up to `chunk` frames, ten seconds, ahead of where they are shown.

    The frames of a chunk use mouths of all frames before the chunk's end, at most MAX_BYTES and MAX_MOUTHS, which are
    also those of ten seconds. The bank follows from the film alone, so it does not depend on the speed of the threads,
    and a resumed run has the same.
    """

    def __init__(self, rate: Fraction = Fraction(FPS)) -> None:
        self.chunk = scale_frames(CHUNK, rate)
        self._rate = rate
        self._cover_fade, self._reach = scale_frames(COVER_FADE, rate), scale_frames(REACH, rate)
        self._changed = threading.Condition()
        self._banks: dict[int, tuple[Mouth, ...]] = {}  # by chunk
        self._last: int | None = None  # chunk
        self._error: BaseException | None = None

    def collect(self, film: Iterable[tuple[np.ndarray, Face | None]]) -> Iterator[Face | None]:
        """Take mouths from the frames of a film, in order, and yield the faces, a few frames later.

        The faces' landmarks around mouth and head are smoothed over time. Covered mouths are not taken; the opacity of
        the faces falls to 0 around them.
        """
        mouths: list[Mouth] = []
        occlusion, sigma = OcclusionDetector(self._rate), SIGMA * float(self._rate / FPS)
        delay = max(self._cover_fade, self._reach)  # frames that must follow before a face can be passed on
        window: deque[_Tracked] = deque(maxlen=2 * delay + 1)
        position = -1  # of the last face that was yielded

        def finish(index: int) -> Face | None:
            """Take the mouth of window[index], and return its face."""
            nonlocal position
            position += 1
            tracked = window[index]
            face = tracked.face
            if face is not None and tracked.points is not None:
                points = smooth_points(_neighbours(window, index, tracked.points, self._reach), sigma)
                landmarks = face.landmarks.copy()
                landmarks[MESH_INDICES] = points
                face = replace(
                    face, landmarks=landmarks, opacity=face.opacity * _opacity(window, index, self._cover_fade)
                )
                if tracked.patch is not None:
                    mouth = measure_mouth(tracked.patch, points, position)
                    if abs(mouth.features[TURN]) < MAX_TURN:
                        mouths.append(mouth)
                        limit_mouths(mouths, self._rate)
            if (position + 1) % self.chunk == 0:
                self._publish(position // self.chunk, mouths, last=False)
            return face

        try:
            for frame, face in film:
                window.append(_track(frame, face, occlusion))
                if len(window) > delay:
                    yield finish(len(window) - 1 - delay)
            for index in range(max(len(window) - delay, 0), len(window)):
                yield finish(index)
            self._publish(max(position, 0) // self.chunk, mouths, last=True)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
            raise
        finally:
            close(film)

    def _publish(self, chunk: int, mouths: list[Mouth], last: bool) -> None:
        with self._changed:
            self._banks[chunk] = tuple(mouths)
            self._last = chunk if last else None
            self._changed.notify_all()

    def mouths_for(self, position: int) -> tuple[Mouth, ...]:
        """Wait for the bank of a frame; frames beyond the film's end use its last bank.

        Earlier banks are dropped: positions must not go back by a chunk. Raises what ended `collect` early.
        """
        chunk = position // self.chunk
        with self._changed:
            while chunk not in self._banks and self._last is None and self._error is None:
                self._changed.wait(POLL_SECONDS)
            if self._last is not None:
                chunk = min(chunk, self._last)
            if chunk not in self._banks:
                raise self._error or RuntimeError("the film's mouths are collected in order")
            for earlier in [key for key in self._banks if key < chunk]:
                del self._banks[earlier]
            return self._banks[chunk]


def _track(frame: np.ndarray, face: Face | None, occlusion: OcclusionDetector) -> _Tracked:
    if face is None:
        return _Tracked(None)
    points = mouth_points(face.landmarks)
    covered = occlusion.is_covered(frame, points, face.first)
    return _Tracked(face, points, None if covered else cut_patch(frame, points), covered)


def _neighbours(window: Sequence[_Tracked], index: int, points: np.ndarray, reach: int) -> dict[int, np.ndarray]:
    """Points of the frame at `index` and of those that continue it, by their distance in frames."""
    neighbours = {0: points}
    for step in (-1, 1):
        for distance in range(1, reach + 1):
            other = index + step * distance
            if not 0 <= other < len(window) or window[max(other, other - step)].first:
                break
            neighbour = window[other].points
            if neighbour is None:
                break
            neighbours[step * distance] = neighbour
    return neighbours


def _opacity(window: Sequence[_Tracked], index: int, fade: int) -> float:
    """0 where the mouth at `index` is covered, rising to 1 at `fade` frames from the next covered one."""
    distances = [abs(other - index) for other, tracked in enumerate(window) if tracked.covered]
    return min([*distances, fade]) / fade


def limit_mouths(mouths: list[Mouth], rate: Fraction = Fraction(FPS)) -> None:
    """Drop mouths of a film of `rate` frames a second until MAX_MOUTHS and MAX_BYTES hold: of the two most alike the
    later one.
    """
    most, size = scale_frames(MAX_MOUTHS, rate), sum(mouth.pixels.nbytes for mouth in mouths)
    while len(mouths) > most or (len(mouths) > 1 and size > MAX_BYTES):
        size -= mouths.pop(max(most_alike(mouths))).pixels.nbytes
