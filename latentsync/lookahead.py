"""Frames in order, in the next of which the place where a face probably is has already been searched."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice

import numpy as np

from latentsync.landmarks import Box, Detection, LandmarkerPool

Region = tuple[int, int, int]  # centre x, y and side of a square


@dataclass
class Upcoming:
    """A frame that has been read ahead, and the region that a worker searches in it."""

    frame: np.ndarray
    region: Region | None = None
    search: Future[list[Detection]] | None = None


class LookaheadFrames:
    """Frames, in order; the workers of the pool search the next ones in `region` meanwhile."""

    def __init__(self, frames: Iterable[np.ndarray], pool: LandmarkerPool):
        self.region: Region | None = None  # where the face of the next frames probably is
        self._frames = iter(frames)
        self._pool = pool
        self._upcoming: deque[Upcoming] = deque()
        self._current: Upcoming | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            for frame in islice(self._frames, max(self._pool.workers, 1) - len(self._upcoming)):
                self._upcoming.append(Upcoming(frame))
            for upcoming in self._upcoming:
                self._search(upcoming)
            if not self._upcoming:
                return
            self._current = self._upcoming.popleft()
            yield self._current.frame

    def _search(self, upcoming: Upcoming) -> None:
        """Search the region that is now the likely one."""
        if upcoming.region == self.region:
            return
        if upcoming.search is not None:
            upcoming.search.cancel()
        upcoming.region, upcoming.search = self.region, None
        if self.region is not None:
            upcoming.search = self._pool.submit(upcoming.frame, region_box(self.region))

    def detect(self, region: Region) -> list[Detection]:
        """The faces in a region of the frame that came last, from the worker's search if that was the region."""
        current = self._current
        if current is None:
            raise RuntimeError("no frame has been read")
        if current.search is not None and current.region == region:
            return current.search.result()
        return self._pool.detect(current.frame, region_box(region))


def region_box(region: Region) -> Box:
    x, y, side = region
    x0, y0 = x - side // 2, y - side // 2
    return x0, y0, x0 + side, y0 + side
