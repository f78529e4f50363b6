"""The bank of a film's mouths, collected ahead of the frames in which they are shown."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from latentsync.faces import Face
from latentsync.prefetch import POLL_SECONDS, close
from latentsync.retarget.geometry import mouth_points
from latentsync.retarget.mouths import TURN, Mouth, cut_mouth, most_alike
from latentsync.retarget.occlusion import OcclusionDetector

CHUNK = 250  # frames that share a bank; it holds mouths up to the chunk's end
MAX_BYTES = 96 * 2**20  # of pixels in one bank; at most two banks are held
MAX_MOUTHS = 250  # in one bank
MAX_TURN = 0.2  # head units from the nose's tip to the middle of the face; a head turned further lends no mouth
COVER_FADE = 4  # frames in which the opacity falls before something covers the mouth, and rises after it


class MouthBank:
    """Mouths of a film, up to CHUNK frames ahead of where they are shown.

    The frames of a chunk use mouths of all frames before the chunk's end, at most MAX_BYTES and MAX_MOUTHS. The bank
    follows from the film alone, so it does not depend on the speed of the threads, and a resumed run has the same.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._banks: dict[int, tuple[Mouth, ...]] = {}  # by chunk
        self._last: int | None = None  # chunk
        self._error: BaseException | None = None

    def collect(self, tracked: Iterable[tuple[np.ndarray, Face | None]]) -> Iterator[Face | None]:
        """Take mouths from the frames of a film, in order, and yield the faces.

        Covered mouths are not taken; the opacity of the faces falls to 0 around them.
        """
        mouths: list[Mouth] = []
        occlusion = OcclusionDetector()
        waiting: deque[tuple[Face | None, bool]] = deque()  # faces, and whether their mouths are covered
        since_cover = COVER_FADE  # faces yielded since a covered one
        position = -1

        def next_face() -> Face | None:
            nonlocal since_cover
            face, covered = waiting[0]
            until_cover = next((i for i, (_, later) in enumerate(waiting) if later), COVER_FADE)
            since_cover = 0 if covered else since_cover + 1
            waiting.popleft()
            share = min(until_cover, since_cover, COVER_FADE) / COVER_FADE
            return face if face is None or share == 1 else replace(face, opacity=face.opacity * share)

        try:
            for position, (frame, face) in enumerate(tracked):
                covered = False
                if face is not None:
                    points = mouth_points(face.landmarks)
                    covered = occlusion.is_covered(frame, points, face.first)
                    mouth = None if covered else cut_mouth(frame, points, position)
                    if mouth is not None and abs(mouth.features[TURN]) < MAX_TURN:
                        mouths.append(mouth)
                        limit_mouths(mouths)
                if (position + 1) % CHUNK == 0:
                    self._publish(position // CHUNK, mouths, last=False)
                waiting.append((face, covered))
                if len(waiting) > COVER_FADE:
                    yield next_face()
            self._publish(max(position, 0) // CHUNK, mouths, last=True)
            while waiting:
                yield next_face()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
            raise
        finally:
            close(tracked)

    def _publish(self, chunk: int, mouths: list[Mouth], last: bool) -> None:
        with self._changed:
            self._banks[chunk] = tuple(mouths)
            self._last = chunk if last else None
            self._changed.notify_all()

    def mouths_for(self, position: int) -> tuple[Mouth, ...]:
        """Wait for the bank of a frame; frames beyond the film's end use its last bank.

        Earlier banks are dropped: positions must not go back by a chunk. Raises what ended `collect` early.
        """
        chunk = position // CHUNK
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


def limit_mouths(mouths: list[Mouth]) -> None:
    """Drop mouths until MAX_MOUTHS and MAX_BYTES hold: of the two most alike the later one."""
    size = sum(mouth.pixels.nbytes for mouth in mouths)
    while len(mouths) > MAX_MOUTHS or (len(mouths) > 1 and size > MAX_BYTES):
        size -= mouths.pop(max(most_alike(mouths))).pixels.nbytes
