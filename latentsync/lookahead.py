"""Frames in order, in the next of which the places where faces probably are have already been searched."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from latentsync.landmarks import Box, Detection, LandmarkerPool

Region = tuple[int, int, int]  # centre x, y and side of a square


@dataclass
class Search:
    """A region of a frame that a worker searches."""

    region: Region
    result: Future[list[Detection]] | None


@dataclass
class Upcoming:
    """A frame that has been read ahead, and what is searched in it, by person."""

    frame: np.ndarray
    searches: dict[int, Search] = field(default_factory=dict)


class LookaheadFrames:
    """Frames, in order; the workers of the pool search the next ones in `regions` meanwhile."""

    def __init__(self, frames: Iterable[np.ndarray], pool: LandmarkerPool, people: int = 1):
        self.regions: list[Region | None] = [None] * people  # where the faces of the next frames probably are
        self._frames = iter(frames)
        self._pool = pool
        self._upcoming: deque[Upcoming] = deque()
        self._current: Upcoming | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            for frame in islice(self._frames, max(self._pool.workers, 1) - len(self._upcoming)):
                self._upcoming.append(Upcoming(frame))
            for upcoming in self._upcoming:
                for index, region in enumerate(self.regions):
                    self._search(upcoming, index, region)
            if not self._upcoming:
                return
            self._current = self._upcoming.popleft()
            yield self._current.frame

    def _search(self, upcoming: Upcoming, index: int, region: Region | None) -> None:
        """Search the region that is now the likely one."""
        search = upcoming.searches.get(index)
        if search is not None and search.region == region:
            return
        if search is not None and search.result is not None:
            search.result.cancel()
        upcoming.searches.pop(index, None)
        if region is not None:
            upcoming.searches[index] = Search(region, self._pool.submit(upcoming.frame, region_box(region)))

    def detect(self, index: int, region: Region) -> list[Detection]:
        """The faces in a region of the frame that came last, from the worker's search if that was the region."""
        current = self._current
        if current is None:
            raise RuntimeError("no frame has been read")
        search = current.searches.get(index)
        if search is not None and search.region == region and search.result is not None:
            return search.result.result()
        return self._pool.detect(current.frame, region_box(region))


def region_box(region: Region) -> Box:
    x, y, side = region
    x0, y0 = x - side // 2, y - side // 2
    return x0, y0, x0 + side, y0 + side
