"""Find the speaker's face and follow it through a clip.

A followed face is detected in a crop around its last place, the region: the cost does not grow with the frame, and the
landmarks jitter a tenth as much as when detected in the whole frame. They are smoothed over frames to both sides, so
without lag.

The region stays in place until the face has moved far, so the landmarkers of the other threads can search it in the
next frames before it is known whether the face stays in it; where it does not, the frames are searched again. The
result is the same for any number of landmarkers. Where there is no face they share the tiles in which one is searched.

Coordinates are (x, y) in pixels of the frame with pixel centres at whole numbers.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import inf

import numpy as np

from latentsync import FPS
from latentsync.landmarks import Detection, LandmarkerPool, open_pool, tiles
from latentsync.lookahead import LookaheadFrames, Region, region_box
from latentsync.rates import scale_frames
from latentsync.shots import REACH, CutDetector

# Frames are those of a film of 25 a second; where they mean time, there are more of them at a higher rate.
REGION = 2.0  # side of the region around a face, in face sizes
REGION_SLACK = 0.12  # the region stays in place until the face has moved or grown by this share of its side
SEARCH_INTERVAL = 5  # frames between two searches of the tiles for a lost face; as many frames wait for it
SEARCH_WAITS = (5, 5, 10, 25)  # the same for new faces: after a change of the picture, and after 1, 2, more failures
NEAR = 0.5  # face sizes that a face may move from one frame to the next
DRIFT = 0.1  # face sizes more for every frame in which it was not detected
PATIENCE = 25  # frames to wait for a face that is lost or not usable before another one may take its place
CHANGED_BLOCKS = 2  # of the picture from one frame to the next: something has come in, or moves fast
FADE = 5  # frames in which the opacity rises after a gap and falls before one
SMOOTHING = 4  # frames to either side that points are smoothed over
SMOOTHING_SIGMA = 2.0  # frames
JITTER = 0.005  # face sizes; points that differ by much more are motion and are not smoothed
JITTER_PIXELS = 0.4  # the same for small faces
JUMP = 0.3  # face sizes from one frame to the next: no smoothing across

RELEASED = np.empty(0, np.uint8)  # in place of a frame that has been yielded


@dataclass(frozen=True)
class Timing:
    """The constants above that mean time, in frames of a film."""

    patience: int
    search_waits: tuple[int, ...]
    drift: float  # face sizes a frame
    fade: int
    smoothing: int
    smoothing_sigma: float

    @classmethod
    def at(cls, rate: Fraction) -> "Timing":
        """Those of a film of `rate` frames a second."""
        return cls(
            patience=scale_frames(PATIENCE, rate),
            search_waits=tuple(scale_frames(wait, rate) for wait in SEARCH_WAITS),
            drift=DRIFT * float(FPS / rate),
            fade=scale_frames(FADE, rate),
            smoothing=scale_frames(SMOOTHING, rate),
            smoothing_sigma=SMOOTHING_SIGMA * float(rate / FPS),
        )


@dataclass(frozen=True)
class Face:
    """The followed face in one frame.

    points: (3, 2) float64, the alignment points, smoothed over time.
    landmarks: (478, 2) float64, the mesh as detected, not smoothed.
    box: x0, y0, x1, y1 around the mesh.
    opacity: over 0 to 1; it fades before and after frames without a usable face.
    first: nothing to continue from: start of the clip or of a shot, or after a gap or a jump.
    shot: number of the stretch between two cuts that the frame lies in, rising from 0.
    """

    points: np.ndarray
    landmarks: np.ndarray
    box: tuple[float, float, float, float]
    opacity: float
    first: bool
    shot: int = 0


@dataclass
class Slot:
    """One frame on its way through the tracker; `frame` is RELEASED once it has been yielded."""

    frame: np.ndarray
    number: int
    shot: int
    detection: Detection | None = None

    @property
    def usable(self) -> Detection | None:
        """The detection if it is usable."""
        return self.detection if self.detection is not None and self.detection.usable else None

    def continues(self, other: "Slot") -> bool:
        """Whether the faces in this slot and in its neighbour `other` are one motion."""
        face, neighbour = self.usable, other.usable
        if face is None or neighbour is None or self.shot != other.shot:
            return False
        return face.distance(neighbour) < JUMP


def track_faces(
    frames: Iterable[np.ndarray],
    landmarkers: int | None = None,
    which: str = "largest",
    rate: Fraction = Fraction(FPS),
) -> Iterator[tuple[np.ndarray, Face | None]]:
    """Follow one face, the largest when it first appears, and yield every frame with it.

    frames: uint8 RGB (H, W, 3), all of one size, `rate` a second. Half a second of them is held at most, and one more
    per landmarker of another thread. landmarkers: how many of them work; by default as many as the processor's cores
    allow. which: one of `settings.FACES`, the face to follow if several are detected when it first appears; sides are
    the picture's. The face is None if none is usable: not found, turned more than 60 degrees away, or with the mouth
    outside the picture. Usable faces are preferred. Another face does not take over until the followed one has been
    gone or not usable for a second, or the shot has changed. If there has been none for a while, one that is small in
    the picture and comes into it slowly may be found up to a second late. Raises UserError if the landmarker's model
    file is missing.
    """
    timing = Timing.at(rate)
    reach = max(timing.fade, timing.smoothing)
    line: deque[Slot] = deque()  # up to `reach` slots before the current one, and `reach` after it
    current = 0
    with open_pool(landmarkers) as pool:
        cuts = CutDetector(scale_frames(REACH, rate))
        follower = FaceFollower(frames, pool, which, cuts, timing)
        for slot in split_at_cuts(follower.follow(), cuts):
            line.append(slot)
            if len(line) - current > reach:
                yield finish_slot(line, current, timing)
                if current == reach:
                    line.popleft()
                else:
                    current += 1
    for index in range(current, len(line)):
        yield finish_slot(line, index, timing)


def lookahead_frames(rate: Fraction) -> int:
    """Frames after one on which its face depends at most, in a film of `rate` frames a second.

    A face waits until the next search may have found it, or its shot is settled, and is then smoothed and faded by the
    faces after it.
    """
    timing = Timing.at(rate)
    return max(timing.fade, timing.smoothing) + max(SEARCH_INTERVAL, scale_frames(REACH, rate))


# ---- following


class FaceFollower:
    """Finds the face to follow, and follows it from frame to frame within each shot.

    Frames without a face wait up to SEARCH_INTERVAL frames: a face that the next search finds was often there before,
    and is followed back to them. A face that is not usable is followed too, as it may turn to the camera, but after
    a second its frames wait and are searched as if they had none.
    """

    def __init__(
        self, frames: Iterable[np.ndarray], pool: LandmarkerPool, which: str, cuts: CutDetector, timing: Timing
    ):
        self.frames = LookaheadFrames(frames, pool)
        self.pool = pool
        self.which = which
        self.cuts = cuts  # every frame is added to it when it is read
        self.timing = timing
        self.waiting: deque[Slot] = deque()
        self.shot = -1
        self.start_shot()

    def start_shot(self) -> None:
        self.shot += 1
        self.face: Detection | None = None  # the followed one when it was last detected
        self.region: Region | None = None  # where that was
        self.missing = 0  # frames since then
        self.not_usable = self.timing.patience  # frames since it was usable; at first there is none to wait for
        self.schedule = SearchSchedule(self.timing.search_waits)

    def follow(self) -> Iterator[list[Slot]]:
        """For each frame that is read, yield the slots that are settled by then: all frames, in order."""
        for number, frame in enumerate(self.frames):
            self.cuts.add(frame)
            if self.cuts.is_clear_cut():
                self.start_shot()
            slot = Slot(frame, number, self.shot)
            self.find_face(slot)
            self.waiting.append(slot)
            if slot.detection is not None and self.not_usable <= self.timing.patience:
                self.follow_back()
                settled = list(self.waiting)
                self.waiting.clear()
                yield settled
            else:
                yield [self.waiting.popleft()] if len(self.waiting) > SEARCH_INTERVAL else []
        yield list(self.waiting)

    def find_face(self, slot: Slot) -> None:
        """Detect the followed face in the newest frame, or another one to follow."""
        if self.face is not None and self.missing == 0:
            self.region = region_around(self.face, self.region)
            slot.detection = nearest(self.frames.detect(self.region), self.face)
        self.missing = self.missing + 1 if slot.detection is None else 0
        self.not_usable = 0 if slot.usable else self.not_usable + 1
        candidates: Iterable[Detection] = ()
        if self.not_usable > self.timing.patience:
            changed = self.missing == 1 or self.cuts.changed_blocks() >= CHANGED_BLOCKS
            candidates = self.search_new(slot.frame, self.schedule.is_due(changed))
        elif slot.detection is None and self.face is not None:
            candidates = self.search_lost(slot.frame, self.face)
        slot.detection = self.confirm(slot.frame, candidates, slot.detection)
        if slot.detection is not None:
            self.face, self.missing = slot.detection, 0
        elif self.not_usable > self.timing.patience:
            self.face = None
        if slot.usable:
            self.not_usable, self.schedule = 0, SearchSchedule(self.timing.search_waits)
        # The next frame is searched there, unless its face is farther from here than this one's was.
        self.frames.region = self.region if slot.detection is not None else None

    def search_new(self, frame: np.ndarray, thorough: bool) -> Iterator[Detection]:
        """The usable faces of the frame, ranked by `which`, then the others.

        `thorough` also searches tiles of the frame, larger ones first, for faces that are small in it. To rank by size
        it does so only when more faces are asked for, since a smaller tile shows no larger face.
        """
        rest: list[Detection] = []
        for boxes, _ in tiles(frame, thorough):
            faces = self.pool.detect_all(frame, boxes)
            if self.which == "largest":
                yield from ranked([face for face in faces if face.usable], self.which, frame.shape[1])
                faces = [face for face in faces if not face.usable]
            rest += faces
        yield from ranked(rest, self.which, frame.shape[1])

    def search_lost(self, frame: np.ndarray, lost: Detection) -> list[Detection]:
        """The lost face, usable or not, if found: the largest of about its size not too far from its place.

        Every SEARCH_INTERVAL frames also the tiles that can hold it are searched. Tiles smaller than it was cannot;
        should it be half as large now, it fills a quarter of a tile of the size before, and is detected there.
        """
        reach = NEAR + self.missing * self.timing.drift
        for boxes, side in tiles(frame, self.missing % SEARCH_INTERVAL == 1, lost.size):
            limit = side / 2 + (reach + 0.5) * lost.size
            boxes = [box for box in boxes if np.abs(np.add(box[:2], side / 2) - lost.centre).max() < limit]
            faces = self.pool.detect_all(frame, boxes)
            faces = [face for face in faces if resembles(face, lost, reach)]
            if faces:
                return [max(faces, key=lambda face: face.size)]
        return []

    def confirm(
        self, frame: np.ndarray, candidates: Iterable[Detection], detection: Detection | None
    ) -> Detection | None:
        """The first usable candidate, else `detection`, else the first candidate; sets `region` to where it is.

        Every candidate is detected again in a region of its own: its points do not depend on how it was found, and
        what only looked like a face, or like a usable one, in a shrunk picture hides no other.
        """
        for candidate in candidates:
            if detection is not None and not candidate.usable:  # nor are those that follow
                break
            region = region_around(candidate)
            confirmed = nearest(self.pool.detect(frame, region_box(region)), candidate)
            if confirmed is not None and (confirmed.usable or detection is None):
                detection, self.region = confirmed, region
            if confirmed is not None and confirmed.usable:
                break
        return detection

    def follow_back(self) -> None:
        """Detect the face of the last waiting slot in those before it, as long as it is found."""
        face = self.waiting[-1].detection
        for slot in list(self.waiting)[-2::-1]:
            if face is None or slot.shot != self.shot:
                return
            face = nearest(self.pool.detect(slot.frame, region_box(region_around(face))), face)
            slot.detection = face or slot.detection


@dataclass
class SearchSchedule:
    """When to search for a new face in tiles: at once, and after longer waits if that fails."""

    waits: tuple[int, ...]
    failures: int = 0
    since: float = inf  # frames since the last search

    def is_due(self, changed: bool) -> bool:
        """To be called once per frame. changed: there may be a face where none was, so waits are short again."""
        if changed:
            self.failures = 0
        due = self.since >= self.waits[min(self.failures, len(self.waits) - 1)]
        self.failures, self.since = (self.failures + 1, 1) if due else (self.failures, self.since + 1)
        return due


def region_around(face: Detection, last: Region | None = None) -> Region:
    """The square to search for `face`: `last` if that still fits."""
    side = REGION * face.size
    if last is not None:
        moved = np.abs(face.centre - last[:2]).max() / last[2]
        if moved < REGION_SLACK and abs(side / last[2] - 1) < REGION_SLACK:
            return last
    return round(face.centre[0]), round(face.centre[1]), max(round(side), 2)


def nearest(faces: list[Detection], last: Detection) -> Detection | None:
    """The face that was `last` in the frame before, if it is still near there."""
    return min((face for face in faces if resembles(face, last, NEAR)), key=last.distance, default=None)


def resembles(face: Detection, last: Detection, reach: float) -> bool:
    """Whether `face` lies within `reach` sizes of `last` and is of about its size."""
    return last.distance(face) < reach and 0.5 < face.size / last.size < 2


def ranked(faces: list[Detection], which: str, width: int) -> list[Detection]:
    """Faces in a picture of that width, usable ones first, then by `which`, one of `settings.FACES`."""
    ranks = {
        "largest": lambda face: -face.size,
        "left": lambda face: face.centre[0],
        "right": lambda face: -face.centre[0],
        "centre": lambda face: abs(face.centre[0] - width / 2),
    }
    return sorted(faces, key=lambda face: (not face.usable, ranks[which](face)))


def split_at_cuts(batches: Iterable[list[Slot]], cuts: CutDetector) -> Iterator[Slot]:
    """Add the cuts between two usable faces that are recognised only later, and renumber the shots.

    batches: of `FaceFollower.follow`. A slot is held back until the reach of `cuts` has been read after it. Slots that
    waited in the follower are not held any longer, so both together hold no more frames than either.
    """
    held: deque[Slot] = deque()
    previous: tuple[int, bool] | None = None  # shot and usability of the slot before, as numbered by the follower
    added = 0

    def renumber(slot: Slot) -> Slot:
        nonlocal previous, added
        usable = slot.usable is not None
        added += usable and previous == (slot.shot, True) and cuts.is_cut(slot.number)
        previous = slot.shot, usable
        slot.shot += added
        return slot

    for batch in batches:
        held += batch
        while held and held[0].number + cuts.reach <= cuts.last:
            yield renumber(held.popleft())
    while held:
        yield renumber(held.popleft())


# ---- smoothing


def finish_slot(line: deque[Slot], index: int, timing: Timing) -> tuple[np.ndarray, Face | None]:
    """The frame at `index` and its face, smoothed and faded by its neighbours."""
    slot = line[index]
    frame, slot.frame = slot.frame, RELEASED
    face = slot.usable
    if face is None:
        return frame, None
    (x0, y0), (x1, y1) = face.low, face.high
    return frame, Face(
        points=smoothed_points(line, index, face, timing),
        landmarks=face.landmarks,
        box=(float(x0), float(y0), float(x1), float(y1)),
        opacity=opacity_at(line, index, timing.fade),
        first=index == 0 or not slot.continues(line[index - 1]),
        shot=slot.shot,
    )


def opacity_at(line: deque[Slot], index: int, fade: int) -> float:
    """1, or less near a frame of the same shot without a usable face; a cut needs no fade."""
    opacity = 1.0
    for step in (-1, 1):
        for distance in range(1, fade + 1):
            other = index + step * distance
            if not 0 <= other < len(line) or line[other].shot != line[index].shot:
                break
            if not line[other].usable:
                opacity = min(opacity, distance / (fade + 1))
                break
    return opacity


def smoothed_points(line: deque[Slot], index: int, face: Detection, timing: Timing) -> np.ndarray:
    """The alignment points of the face at `index`, (3, 2), without jitter.

    Fits a straight line in time to the points of the neighbours, weighted by their distance in time and in their
    deviation from the face's own straight motion. So there is no lag, and where the motion turns the points stay.
    """
    neighbours = {0: face.points}
    for step in (-1, 1):
        for distance in range(1, timing.smoothing + 1):
            other = index + step * distance
            if not 0 <= other < len(line) or not line[other].continues(line[other - step]):
                break
            if (neighbour := line[other].usable) is not None:
                neighbours[step * distance] = neighbour.points
    time = np.array(list(neighbours), np.float64)
    points = np.stack(list(neighbours.values()))
    time_weights = np.exp(-0.5 * (time / timing.smoothing_sigma) ** 2)
    velocity = np.tensordot(line_weights(time_weights, time)[1], points, 1)
    deviation = np.sqrt(((points - points[0] - time[:, None, None] * velocity) ** 2).mean((1, 2)))
    jitter = max(JITTER * face.size, JITTER_PIXELS)
    weights = time_weights * np.exp(-0.5 * (deviation / jitter) ** 2)
    return np.tensordot(line_weights(weights, time)[0], points, 1)


def line_weights(weights: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients of values (n,) in the weighted least-squares line through them: of its value at time 0, and of
    its slope."""
    weights = weights / weights.sum()
    mean = weights @ time
    slope = weights * (time - mean) / max(weights @ (time - mean) ** 2, 1e-6)
    return weights - mean * slope, slope
