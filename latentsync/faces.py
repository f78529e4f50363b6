"""Find the speaker's face and follow it through a clip.

Landmarks come from MediaPipe's Face Landmarker (478 points, image mode), always from a crop around the last
face: the cost does not grow with the frame, and the points tremble a tenth as much as from the whole frame.
Its video mode is not used: it smooths with a lag and cannot follow a moving crop. The smoothing here looks
ahead instead, so it has no lag.

The searched crop stays put until the face has moved far, so the next frames are searched where this one was, by several
landmarkers side by side, before it is known whether that is right; where it was not, they are searched again. The
result is the same, however many there are. Where there is no face they share the tiles in which one is searched.

Coordinates are (x, y) in pixels of the frame with pixel centres at whole numbers.
"""

import os
import queue
import re
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from latentsync.errors import UserError
from latentsync.machine import usable_cores

if TYPE_CHECKING:  # MediaPipe takes a second to load
    import mediapipe
    from mediapipe.tasks.python.vision import FaceLandmarker

MODEL_FILE = Path(__file__).parent.parent / "assets" / "face_landmarker.task"

# The three points that align a face are means of these mesh points (LatentSync): left-of-image brow,
# right-of-image brow, nose.
ALIGNMENT_POINTS = (
    (70, 63, 105, 66, 107),
    (336, 296, 334, 293, 300),
    (168, 197, 5, 4, 75, 97, 2, 326, 305),
)
UPPER_LIP, LOWER_LIP = 13, 14  # inner edges
MOUTH_EDGE = (61, 291, 0, 17)  # corners, top and bottom of the outer lips
EYE_CORNERS = (33, 263)  # outer

MAX_FACES = 8  # in one picture
CORES_PER_LANDMARKER, MOST_LANDMARKERS = 4, 4  # one uses several cores itself
REGION = 2.0  # side of the searched crop around a known face, in face sizes
REGION_PIXELS = 384  # the crop is shrunk to this; the landmark network itself sees 256
REGION_SLACK = 0.12  # the crop stays put until the face has moved or grown by this share of its side
TILES = (1.0, 0.5, 0.25)  # sides of the crops searched for small faces, in short sides of the frame
TILE_STEP = 0.67  # of a tile; the detector needs faces of a tenth of its picture, so overlaps hold those
TILE_PIXELS = 256
SEARCH_INTERVAL = 5  # frames between two searches in tiles for a lost face; as many wait for it
SEARCH_WAITS = (5, 5, 10, 25)  # the same for new faces: after a change of the picture, and after 1, 2, more in vain
MIN_TILE = 32  # pixels; nothing is looked for in less
NEAR = 0.5  # face sizes that a face may move from one frame to the next
DRIFT = 0.1  # face sizes more for every frame in which it was not seen
PATIENCE = 25  # frames to wait for a face that is lost or not usable before another one may take its place
THUMBNAIL = 8  # blocks along a side, and pixels along a side of a block, to tell cuts by
CUT_CORRELATION = 0.5  # of grey values before and after; less is a different picture
CUT_ALIKE = 0.25  # share of the blocks that are the same picture still; with less, a new shot begins
CHANGED = 2  # blocks that are another picture from one frame to the next: something has come in, or moves fast
FLAT = 2.0  # grey levels of deviation; a block with less says nothing
CUT_CHANGE = 2.5  # grey levels by which the picture changes at a cut, at least, apart from its brightness and contrast
CUT_RATIO = 3.5  # times the change between other frames near it: motion lasts, a cut does not
CUT_RETURN = 0.5  # of the change at a cut; a picture that comes back nearer than that was hidden by a flash
CUT_UNLIKE = 0.3  # share of the blocks with texture before and after that differ: another picture, not a flash
CUT_REACH = 5  # frames to either side that a cut is told from motion and flashes by
REMEMBERED = 32  # thumbnails: those of the frames that wait, and CUT_REACH on both sides of them
MIN_FACING = 0.5  # cosine of the angle between the face and the camera: 60 degrees
FADE = 5  # frames in which the opacity rises after a gap and falls before one
SMOOTHING = 4  # frames that are looked at to either side
SMOOTHING_SIGMA = 2.0  # frames
STILL = 0.005  # face sizes: points that differ by much more are motion, not tremble, and are kept
STILL_PIXELS = 0.4  # the same for small faces
JUMP = 0.3  # face sizes from one frame to the next: no smoothing across


@dataclass(frozen=True)
class Face:
    """The followed face in one frame.

    points: (3, 2) float64, the alignment points, smoothed over time.
    landmarks: (478, 2) float64, the mesh as it was seen, not smoothed.
    box: x0, y0, x1, y1 around the mesh.
    opacity: over 0 to 1; it fades before and after frames without a usable face.
    first: nothing to continue from: start of the clip, of a scene, or after a gap or a jump.
    scene: the number of the stretch between two cuts that the frame lies in, rising from 0.
    """

    points: np.ndarray
    landmarks: np.ndarray
    box: tuple[float, float, float, float]
    opacity: float
    first: bool
    scene: int = 0


@dataclass(frozen=True)
class _Sighting:
    """A face as the landmarker saw it: mesh (478, 2), and whether a mouth can be painted on it."""

    landmarks: np.ndarray
    usable: bool

    @property
    def low(self) -> np.ndarray:
        return self.landmarks.min(0)

    @property
    def high(self) -> np.ndarray:
        return self.landmarks.max(0)

    @property
    def centre(self) -> np.ndarray:
        return (self.low + self.high) / 2

    @property
    def size(self) -> float:
        return float((self.high - self.low).max())

    @property
    def points(self) -> np.ndarray:
        return np.stack([self.landmarks[list(which)].mean(0) for which in ALIGNMENT_POINTS])

    def distance(self, other: "_Sighting") -> float:
        """How far `other` is from here, in sizes of this face."""
        return float(np.linalg.norm(other.centre - self.centre)) / self.size


@dataclass
class _Pictures:
    """Thumbnails of the last frames, and how much each frame's picture differs from the one before it."""

    last: int = -1  # the number of the newest frame
    thumbnails: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    changes: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def add(self, thumbnail: np.ndarray) -> np.ndarray:
        """Add the next frame's thumbnail and return the one before it (its own for the first frame)."""
        before = self.thumbnails[-1] if self.thumbnails else thumbnail
        self.last += 1
        self.thumbnails.append(thumbnail)
        self.changes.append(_change(before, thumbnail))
        return before

    def is_cut(self, number: int) -> bool:
        """Whether a scene begins with this frame, judged by up to CUT_REACH frames to either side.

        Unlike `_is_cut` it also finds cuts between pictures that are much alike, as those of one camera are. A cut
        changes the picture once: motion goes on, and after a flash the picture from before it returns. Where it is
        clearly another picture it may return, too, and another cut may be near, but not in the very next frame.
        """
        at = number - self.last + len(self.changes) - 1
        first = max(at - CUT_REACH, 0)
        pictures, changes = (list(islice(all_, first, at + CUT_REACH + 1)) for all_ in (self.thumbnails, self.changes))
        change, at = changes.pop(at - first), at - first
        if change < CUT_CHANGE:
            return False
        beside, further = changes[max(at - 1, 0) : at + 1], sorted(changes[: max(at - 1, 0)] + changes[at + 1 :])
        old, new = pictures[:at], pictures[at:]
        spread = np.stack([old[-1].std(1), new[0].std(1)])
        unlike = (spread.min(0) > FLAT) & (_correlate(old[-1], new[0]) <= CUT_CORRELATION)
        if unlike.sum() > CUT_UNLIKE * (spread.max(0) > FLAT).sum():
            return change > CUT_RATIO * max(beside + further[:-1], default=0.0)
        returned = [_change(old[-1], later) for later in new[1:]] + [_change(earlier, new[0]) for earlier in old[:-1]]
        return change > CUT_RATIO * max(changes, default=0.0) and change < min(returned, default=np.inf) / CUT_RETURN


@dataclass
class _Slot:
    """One frame on its way through the tracker; the frame is let go when it has left."""

    frame: np.ndarray | None
    number: int
    scene: int
    sighting: _Sighting | None = None

    @property
    def usable(self) -> bool:
        return self.sighting is not None and self.sighting.usable

    def continues(self, other: "_Slot") -> bool:
        """Whether this slot's face and that of the neighbour `other` are one motion."""
        return (
            self.usable and other.usable and self.scene == other.scene and self.sighting.distance(other.sighting) < JUMP
        )


def mouth_opening(landmarks: np.ndarray) -> float:
    """Gap between the inner lips over the distance of the outer eye corners, of (478, 2) landmarks."""
    gap = np.linalg.norm(landmarks[UPPER_LIP] - landmarks[LOWER_LIP])
    return float(gap / np.linalg.norm(landmarks[EYE_CORNERS[0]] - landmarks[EYE_CORNERS[1]]))


def track_faces(
    frames: Iterable[np.ndarray], landmarkers: int | None = None, which: str = "largest"
) -> Iterator[tuple[np.ndarray, Face | None]]:
    """Follow one face, the largest when it first appears, and yield every frame with it.

    frames: uint8 RGB (H, W, 3), all of one size. At most 12 are held at a time, and one more for every landmarker
    that works ahead. landmarkers: how many of them work; by default as the processor's cores allow. which: one of
    `settings.FACES`, the face to follow where several are seen when it first appears; sides are the picture's.
    The face is None where none is usable: not found, turned more than 60 degrees away, or with the mouth
    outside the picture. Usable faces are taken before others. Another face does not take over until the followed one
    has been gone or not usable for a second, or the shot has changed. Where there has been none for a while, one that
    is small in the picture and comes into it slowly may be found up to a second late.
    Raises UserError if the landmarker's model file is missing.
    """
    reach = max(FADE, SMOOTHING)
    line: deque[_Slot] = deque()  # up to `reach` slots behind the current one, and `reach` ahead
    current = 0
    if landmarkers is None:
        landmarkers = min(max(usable_cores() // CORES_PER_LANDMARKER, 1), MOST_LANDMARKERS)
    with ExitStack() as open_now:
        landmarker = open_now.enter_context(_landmarker())
        others = [open_now.enter_context(_landmarker()) for _ in range(landmarkers if landmarkers > 1 else 0)]
        searched = open_now.enter_context(closing(_SearchedAhead(frames, landmarker, others)))
        pictures = _Pictures()
        for slot in _split_at_cuts(_follow(searched, landmarker, which, pictures), pictures):
            line.append(slot)
            if len(line) - current > reach:
                yield _finish(line, current)
                if current == reach:
                    line.popleft()
                else:
                    current += 1
    for index in range(current, len(line)):
        yield _finish(line, index)


def _finish(line: deque[_Slot], index: int) -> tuple[np.ndarray, Face | None]:
    """The frame at `index` and its face, smoothed and faded by its neighbours."""
    slot = line[index]
    frame, slot.frame = slot.frame, None
    if not slot.usable:
        return frame, None
    (x0, y0), (x1, y1) = slot.sighting.low, slot.sighting.high
    return frame, Face(
        points=_smoothed_points(line, index),
        landmarks=slot.sighting.landmarks,
        box=(float(x0), float(y0), float(x1), float(y1)),
        opacity=_opacity(line, index),
        first=index == 0 or not slot.continues(line[index - 1]),
        scene=slot.scene,
    )


def _opacity(line: deque[_Slot], index: int) -> float:
    """1, or less near a frame of the same scene that has no usable face. A cut needs no fade."""
    opacity = 1.0
    for step in (-1, 1):
        for distance in range(1, FADE + 1):
            other = index + step * distance
            if not 0 <= other < len(line) or line[other].scene != line[index].scene:
                break
            if not line[other].usable:
                opacity = min(opacity, distance / (FADE + 1))
                break
    return opacity


def _smoothed_points(line: deque[_Slot], index: int) -> np.ndarray:
    """The alignment points at `index`, (3, 2), with the tremble taken out of them.

    A straight line in time is fitted to the neighbours; those count little that lie further off in time, or
    off the face's own straight motion. So there is no lag, and where the motion turns the points stay.
    """
    neighbours = {0: line[index].sighting.points}
    for step in (-1, 1):
        for distance in range(1, SMOOTHING + 1):
            other = index + step * distance
            if not 0 <= other < len(line) or not line[other].continues(line[other - step]):
                break
            neighbours[step * distance] = line[other].sighting.points
    time = np.array(list(neighbours), np.float64)
    points = np.stack(list(neighbours.values()))
    near = np.exp(-0.5 * (time / SMOOTHING_SIGMA) ** 2)
    velocity = np.tensordot(_line_shares(near, time)[1], points, 1)
    off = np.sqrt(((points - points[0] - time[:, None, None] * velocity) ** 2).mean((1, 2)))
    still = max(STILL * line[index].sighting.size, STILL_PIXELS)
    return np.tensordot(_line_shares(near * np.exp(-0.5 * (off / still) ** 2), time)[0], points, 1)


def _line_shares(weight: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every value's share in the weighted line through them: in its height at time 0, and in its slope."""
    weight = weight / weight.sum()
    mean = weight @ time
    slope = weight * (time - mean) / max(weight @ (time - mean) ** 2, 1e-6)
    return weight - mean * slope, slope


class _SearchedAhead:
    """Frames, in order; each of the `landmarkers` searches one of the next in `region` meanwhile, or some tiles.

    `own` is that of the caller's thread, which does what none of them has done.
    """

    def __init__(self, frames: Iterable[np.ndarray], own: "FaceLandmarker", landmarkers: list["FaceLandmarker"]):
        self.region: tuple[int, int, int] | None = None  # where to look in the frames to come, None: nowhere
        self._frames = iter(frames)
        self._own = own
        self._count = len(landmarkers)
        self._free: queue.SimpleQueue[FaceLandmarker] = queue.SimpleQueue()
        for landmarker in landmarkers:
            self._free.put(landmarker)
        self._pool = ThreadPoolExecutor(self._count, "faces") if landmarkers else None
        self._next: deque[tuple[np.ndarray, tuple[int, int, int] | None, Future | None]] = deque()
        self._current: tuple[tuple[int, int, int] | None, Future | None] = (None, None)

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            for frame in islice(self._frames, max(self._count, 1) - len(self._next)):
                self._next.append((frame, None, None))
            self._next = deque(self._search(*each) for each in self._next)
            if not self._next:
                return
            frame, *self._current = self._next.popleft()
            yield frame

    def _search(
        self, frame: np.ndarray, region: tuple[int, int, int] | None, search: Future | None
    ) -> tuple[np.ndarray, tuple[int, int, int] | None, Future | None]:
        """The frame with a search in the region that is now the likely one."""
        if region == self.region or self._pool is None:
            return frame, region, search
        if search is not None:
            search.cancel()
        wanted = self.region
        return frame, wanted, None if wanted is None else self._pool.submit(self._with_free, _detect_in, frame, wanted)

    def _with_free(self, detect: Callable[..., list[_Sighting]], *where: object) -> list[_Sighting]:
        landmarker = self._free.get()
        try:
            return detect(landmarker, *where)
        finally:
            self._free.put(landmarker)

    def seen(self, region: tuple[int, int, int]) -> list[_Sighting] | None:
        """What the frame that came last shows in the region, if that was searched ahead."""
        searched, search = self._current
        return search.result() if search is not None and searched == region else None

    def in_squares(self, frame: np.ndarray, corners: list[tuple[int, int]], side: int) -> list[_Sighting]:
        """The faces in squares of a frame with these top left corners, in their order."""
        squares = [(frame, x, y, x + side, y + side, TILE_PIXELS) for x, y in corners]
        if self._pool is None or len(squares) == 1:
            return [s for square in squares for s in _detect(self._own, *square)]
        shared = [self._pool.submit(self._with_free, _detect, *square) for square in squares]
        return [s for search in shared for s in search.result()]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@dataclass
class _Rounds:
    """Thorough searches for a new face: the first is due at once, the next ones after longer waits if in vain."""

    vain: int = 0
    since: int = SEARCH_WAITS[0]  # frames since the last one

    def is_due(self, news: bool) -> bool:
        """Asked once for every frame. news: there may be a face where none was, so the waits begin anew."""
        if news:
            self.vain = 0
        due = self.since >= SEARCH_WAITS[min(self.vain, len(SEARCH_WAITS) - 1)]
        self.vain, self.since = (self.vain + 1, 1) if due else (self.vain, self.since + 1)
        return due


def _split_at_cuts(slots: Iterable[list[_Slot]], pictures: _Pictures) -> Iterator[_Slot]:
    """Number the scenes anew, with the cuts between two sightings of a face that `_follow` did not need to know of.

    slots: what `_follow` yields. A slot is held back until CUT_REACH frames more have been read. Those that waited in
    `_follow` are not, so that together they hold no more than either does.
    """
    held: deque[_Slot] = deque()
    previous: tuple[int, bool] | None = None  # scene and usability of the slot before, as `_follow` has them
    added = 0

    def numbered() -> _Slot:
        nonlocal previous, added
        slot = held.popleft()
        added += slot.usable and previous == (slot.scene, True) and pictures.is_cut(slot.number)
        previous = slot.scene, slot.usable
        slot.scene += added
        return slot

    for settled in slots:
        held += settled
        while held and held[0].number + CUT_REACH <= pictures.last:
            yield numbered()
    while held:
        yield numbered()


def _follow(
    frames: _SearchedAhead, landmarker: "FaceLandmarker", which: str, pictures: _Pictures
) -> Iterator[list[_Slot]]:
    """Every frame with the sighting of the followed face: for each that is read, those that are settled by then.

    Frames without a face wait up to SEARCH_INTERVAL frames: a face that the next search finds was often
    there before, and is followed back to them. A face that is not usable is followed too, as it may turn to the
    camera, but when PATIENCE has ended, its frames wait and are searched as if they had none. The thumbnail of every
    frame is added to `pictures` when the frame is read.
    """
    waiting: deque[_Slot] = deque()
    followed: _Sighting | None = None  # as last seen
    region = None
    scene = missing = 0
    unusable = PATIENCE  # frames since the followed face was usable; at first there is none to wait for
    rounds = _Rounds()
    for number, frame in enumerate(frames):
        thumbnail = _thumbnail(frame)
        before = pictures.add(thumbnail)
        if _is_cut(before, thumbnail):
            scene, missing, unusable, followed, region = scene + 1, 0, PATIENCE, None, None
            rounds = _Rounds()
        slot = _Slot(frame, number, scene)
        if followed is not None and missing == 0:
            region = _region(followed, region)
            seen = frames.seen(region)
            seen = _detect_in(landmarker, frame, region) if seen is None else seen
            slot.sighting = _nearest(seen, followed)
        missing = missing + 1 if slot.sighting is None else 0
        unusable = 0 if slot.usable else unusable + 1
        candidates: Iterable[_Sighting] = ()
        if unusable > PATIENCE:
            news = missing == 1 or _unlike(before, thumbnail).sum() >= CHANGED
            candidates = _search(frames, frame, rounds.is_due(news), which)
        elif slot.sighting is None:
            thorough = missing % SEARCH_INTERVAL == 1
            candidates = _search_lost(frames, frame, followed, NEAR + missing * DRIFT, thorough)
        slot.sighting, region = _better(landmarker, frame, candidates, slot.sighting, region)
        # Where the next frame is looked for if its face is no further from here than this one was.
        frames.region = region if slot.sighting is not None else None
        if slot.sighting is not None:
            followed, missing = slot.sighting, 0
        elif unusable > PATIENCE:
            followed = None
        if slot.usable:
            unusable, rounds = 0, _Rounds()
        if slot.sighting is not None and unusable <= PATIENCE:
            _follow_back(landmarker, waiting, slot)
            yield [*waiting, slot]
            waiting.clear()
        else:
            waiting.append(slot)
            yield [waiting.popleft()] if len(waiting) > SEARCH_INTERVAL else []
    yield [*waiting]


def _better(
    landmarker: "FaceLandmarker",
    frame: np.ndarray,
    candidates: Iterable[_Sighting],
    seen: _Sighting | None,
    region: tuple[int, int, int] | None,
) -> tuple[_Sighting | None, tuple[int, int, int] | None]:
    """The first usable candidate, else what has been `seen`, else the first candidate; and the region that shows it.

    Every one is seen again in a region of its own: its points do not depend on how it was found, and what only looked
    like a face, or like a usable one, in a picture made small hides no other.
    """
    for found in candidates:
        if seen is not None and not found.usable:  # nor are those that follow
            break
        around = _region(found, None)
        again = _nearest(_detect_in(landmarker, frame, around), found)
        if again is not None and (again.usable or seen is None):
            seen, region = again, around
        if again is not None and again.usable:
            break
    return seen, region


def _follow_back(landmarker: "FaceLandmarker", waiting: deque[_Slot], found: _Slot) -> None:
    """Fill in the frames just before `found` that show the same face."""
    for slot in reversed(waiting):
        if slot.scene != found.scene:
            return
        seen = _detect_in(landmarker, slot.frame, _region(found.sighting, None))
        sighting = _nearest(seen, found.sighting)
        if sighting is None:
            return
        slot.sighting = sighting
        found = slot


def _thumbnail(frame: np.ndarray) -> np.ndarray:
    """The frame's grey values in blocks: (THUMBNAIL**2, THUMBNAIL**2) float32, one block a row."""
    step = max(1, min(frame.shape[:2]) // 256)
    side = THUMBNAIL * THUMBNAIL
    small = cv2.resize(frame[::step, ::step, 1], (side, side), interpolation=cv2.INTER_AREA)
    small = small.astype(np.float32)
    return small.reshape(THUMBNAIL, THUMBNAIL, THUMBNAIL, THUMBNAIL).swapaxes(1, 2).reshape(side, side)


def _is_cut(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether another scene surely begins between two thumbnails: neither the whole nor most of the blocks correlate.

    Brightness and contrast do not matter, so that a flash is no cut; nor is a person who steps in, who
    leaves the other blocks as they were.
    """
    if _correlate(before.reshape(1, -1), after.reshape(1, -1))[0] > CUT_CORRELATION:
        return False
    unlike = _unlike(before, after)
    return len(unlike) > 0 and bool(unlike.mean() > 1 - CUT_ALIKE)


def _change(before: np.ndarray, after: np.ndarray) -> float:
    """Mean difference of two thumbnails in grey levels, apart from brightness and, up to a factor of 4, contrast."""
    before, after = before - before.mean(), after - after.mean()
    gain = np.clip((before * after).mean() / max((before**2).mean(), FLAT**2), 0.25, 4)
    return float(np.abs(after - gain * before).mean())


def _unlike(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Which blocks of two thumbnails are another picture, bool; of those that show something."""
    textured = np.maximum(before.std(1), after.std(1)) > FLAT
    return _correlate(before, after)[textured] <= CUT_CORRELATION


def _correlate(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The correlation of every two rows, about 0 where one of them is flat."""
    before, after = (blocks - blocks.mean(1, keepdims=True) for blocks in (before, after))
    spread = np.maximum(before.std(1), FLAT) * np.maximum(after.std(1), FLAT)
    return (before * after).mean(1) / spread


def _region(face: _Sighting, last: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """The square to look for `face` in: centre x, y and side. The last one where that still fits."""
    side = REGION * face.size
    if last is not None:
        moved = np.abs(face.centre - last[:2]).max() / last[2]
        if moved < REGION_SLACK and abs(side / last[2] - 1) < REGION_SLACK:
            return last
    return round(face.centre[0]), round(face.centre[1]), max(round(side), 2)


def _detect_in(landmarker: "FaceLandmarker", frame: np.ndarray, region: tuple[int, int, int]) -> list[_Sighting]:
    """The faces in a region of the frame: centre x, y and side."""
    x, y, side = region
    x0, y0 = x - side // 2, y - side // 2
    return _detect(landmarker, frame, x0, y0, x0 + side, y0 + side, REGION_PIXELS)


def _nearest(seen: list[_Sighting], face: _Sighting) -> _Sighting | None:
    """`face` among those seen, if it is still near where it was."""
    return min((s for s in seen if _resembles(s, face, NEAR)), key=face.distance, default=None)


def _resembles(seen: _Sighting, face: _Sighting, reach: float) -> bool:
    return face.distance(seen) < reach and 0.5 < seen.size / face.size < 2


def _search(frames: _SearchedAhead, frame: np.ndarray, thorough: bool, which: str) -> Iterator[_Sighting]:
    """The faces of the frame that look usable, as `which` ranks them, then the others.

    `thorough` also searches crops of the frame, larger ones first, for faces that are small in it; of the largest,
    only when it is asked for more, as a smaller crop shows no larger one.
    """
    rest: list[_Sighting] = []
    for corners, side in _crops(frame, thorough):
        seen = frames.in_squares(frame, corners, side)
        if which == "largest":
            yield from _ranked([s for s in seen if s.usable], which, frame.shape[1])
            seen = [s for s in seen if not s.usable]
        rest += seen
    yield from _ranked(rest, which, frame.shape[1])


def _search_lost(
    frames: _SearchedAhead, frame: np.ndarray, lost: _Sighting, reach: float, thorough: bool
) -> list[_Sighting]:
    """The lost face, usable or not, if it is seen: the largest of about its size within `reach` sizes of its place.

    `thorough` also searches the tiles that can hold it. Those smaller than it was cannot; should it be half as large
    now, it fills a quarter of a tile of the size before, and is seen there.
    """
    for corners, side in _crops(frame, thorough, lost.size):
        far = side / 2 + (reach + 0.5) * lost.size
        near = [corner for corner in corners if np.abs(np.add(corner, side / 2) - lost.centre).max() < far]
        seen = frames.in_squares(frame, near, side)
        seen = [s for s in seen if _resembles(s, lost, reach)]
        if seen:
            return [max(seen, key=lambda s: s.size)]
    return []


def _ranked(seen: list[_Sighting], which: str, width: int) -> list[_Sighting]:
    """Faces in a picture of that width, usable ones first, and then as `which` asks for."""
    ranks = {
        "largest": lambda s: -s.size,
        "left": lambda s: s.centre[0],
        "right": lambda s: -s.centre[0],
        "centre": lambda s: abs(s.centre[0] - width / 2),
    }
    return sorted(seen, key=lambda s: (not s.usable, ranks[which](s)))


def _crops(
    frame: np.ndarray, thorough: bool, smallest: float = MIN_TILE
) -> Iterator[tuple[list[tuple[int, int]], int]]:
    """The top left corners (x, y), and the side, of the squares to search: the whole, then ever smaller tiles."""
    height, width = frame.shape[:2]
    yield [(0, 0)], max(width, height)
    for share in TILES if thorough else ():
        side = round(min(width, height) * share)
        if side < max(smallest, MIN_TILE):
            return
        yield [(x, y) for y in _starts(height, side) for x in _starts(width, side)], side


def _starts(length: int, side: int) -> list[int]:
    """Where overlapping crops of `side` begin that cover `length`."""
    count = 1 + max(0, int(np.ceil((length - side) / (side * TILE_STEP))))
    return [round(i * (length - side) / max(count - 1, 1)) for i in range(count)]


def _detect(
    landmarker: "FaceLandmarker", frame: np.ndarray, x0: int, y0: int, x1: int, y1: int, pixels: int
) -> list[_Sighting]:
    """The faces in a rectangle of the frame, which is clipped to it and shrunk to `pixels` first."""
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, frame.shape[1]), min(y1, frame.shape[0])
    width, height = x1 - x0, y1 - y0
    if min(width, height) < MIN_TILE:
        return []
    crop = frame[y0:y1, x0:x1]
    if max(width, height) > pixels:
        scale = pixels / max(width, height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        crop = cv2.resize(crop, size, interpolation=cv2.INTER_AREA)
    result = landmarker.detect(_as_image(crop))
    seen = []
    for mesh, pose in zip(result.face_landmarks, result.facial_transformation_matrixes, strict=True):
        # The landmarker's 0 to 1 runs over the pixels' edges.
        landmarks = np.array([(point.x, point.y) for point in mesh]) * (width, height) + (x0 - 0.5, y0 - 0.5)
        mouth = landmarks[list(MOUTH_EDGE)]
        inside = (mouth >= 0).all() and (mouth <= (frame.shape[1] - 1, frame.shape[0] - 1)).all()
        seen.append(_Sighting(landmarks, usable=bool(inside and pose[2, 2] > MIN_FACING)))
    return seen


def _as_image(pixels: np.ndarray) -> "mediapipe.Image":
    import mediapipe

    return mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(pixels))


@contextmanager
def _landmarker() -> Iterator["FaceLandmarker"]:
    """MediaPipe's landmarker, open for as long as the context."""
    try:
        model = MODEL_FILE.read_bytes()  # read here: MediaPipe does not open every path that Python does
    except OSError:
        raise UserError(f"Cannot read the face model {MODEL_FILE}: restore it from the repository.") from None
    from mediapipe.tasks.python import BaseOptions
    from mediapipe.tasks.python.vision import FaceLandmarker, FaceLandmarkerOptions

    options = FaceLandmarkerOptions(
        base_options=BaseOptions(model_asset_buffer=model),
        num_faces=MAX_FACES,
        output_facial_transformation_matrixes=True,
    )
    with _without_chatter():
        landmarker = FaceLandmarker.create_from_options(options)
        blank = np.zeros((64, 64, 3), np.uint8)
        landmarker.detect(_as_image(blank))
    try:
        yield landmarker
    finally:
        landmarker.close()


@contextmanager
def face_reader() -> Iterator[Callable[[np.ndarray], np.ndarray | None]]:
    """A function that gives the mesh (478, 2) of the face that fills a picture, uint8 RGB (H, W, 3), or None.

    Raises UserError if the landmarker's model file is missing.
    """
    with _landmarker() as landmarker:

        def read(picture: np.ndarray) -> np.ndarray | None:
            sightings = _detect(landmarker, picture, 0, 0, picture.shape[1], picture.shape[0], REGION_PIXELS)
            return max(sightings, key=lambda sighting: sighting.size).landmarks if sightings else None

        yield read


CHATTER = re.compile(rb"[IW]\d{4} \d\d:\d\d|INFO: Created TensorFlow|WARNING: (All log|Logging before)")
_stderr_lock = threading.Lock()


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Keeps the notes that MediaPipe writes straight to stderr when it starts, and nothing else, out of it.

    No environment variable or option of it does.
    """
    with _stderr_lock, tempfile.TemporaryFile() as caught:
        try:
            stderr = os.dup(2)
        except OSError:  # a windowed program without a console
            yield
            return
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            caught.seek(0)
            rest = b"".join(line for line in caught if not CHATTER.match(line))
            with suppress(OSError):
                os.write(stderr, rest)
            os.close(stderr)
