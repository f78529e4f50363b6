"""Find faces and follow them from frame to frame: a `FaceFollower` for each person.

The region that is searched stays in place until the face has moved far, so the landmarkers of the other threads can
search it in the next frames before it is known whether the face stays in it; where it does not, the frames are searched
again. The result is the same for any number of landmarkers. Where there is no face they share the tiles in which one is
searched.

A person who was chosen by a point, or one of several, is known by the looks: after a cut or a gap nobody else takes the
place. The only person of a film is not: there the face that `which` names is followed in every shot.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import inf

import numpy as np

from latentsync import FPS
from latentsync.landmarks import Detection, LandmarkerPool, tiles
from latentsync.lookahead import LookaheadFrames, Region, region_box
from latentsync.looks import ALIKE, look_difference, look_of
from latentsync.rates import scale_frames
from latentsync.shots import CutDetector

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
JUMP = 0.3  # face sizes from one frame to the next: no smoothing across
LOOK_MEMORY = 0.05  # weight of the newest frame in a person's look
MAX_CHANGE = 2.0  # in units of ALIKE: of the followed face from one frame to the next, as by a flash
SOMEBODY_ELSE = 0.3, 0.5  # a face so unlike the person, in units of ALIKE, that has at most this share to another one
MAX_PASSERS = 4  # people beside the followed ones whose looks are kept
APART = 1.5  # face sizes between two faces that do not show in each other's looks


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


@dataclass
class Person:
    """Who is followed.

    which: one of `choice.FACES`, the face to take where several are detected and the look does not decide; look: see
    `looks.look_of`, None until it has been seen; recognised: nobody else takes this person's place, see the module;
    seen: whether any frame has shown a usable face of theirs; passers: looks of people beside them whom nobody follows.
    """

    which: str = "largest"
    look: np.ndarray | None = None
    recognised: bool = False
    seen: bool = False
    passers: list[np.ndarray] = field(default_factory=list)

    def add_passer(self, look: np.ndarray) -> None:
        """Keep the look of somebody else, unless it is known."""
        if all(look_difference(look, known) > ALIKE / 2 for known in self.passers):
            self.passers = [*self.passers, look][-MAX_PASSERS:]

    def forget(self) -> None:
        """Forget the looks, if another person may take the place."""
        if not self.recognised:
            self.look, self.passers = None, []


class FaceFollower:
    """Finds the face to follow, and follows it from frame to frame within each shot.

    Frames without a face wait up to SEARCH_INTERVAL frames: a face that the next search finds was often there before,
    and is followed back to them. A face that is not usable is followed too, as it may turn to the camera, but after
    a second its frames wait and are searched as if they had none.
    """

    def __init__(
        self,
        frames: LookaheadFrames,
        pool: LandmarkerPool,
        person: Person,
        cuts: CutDetector,
        timing: Timing,
        index: int = 0,
    ):
        self.frames = frames
        self.pool = pool
        self.person = person
        self.cuts = cuts  # every frame is added to it when it is read
        self.timing = timing
        self.index = index  # of the person's region among those of `frames`
        self.others: Sequence[FaceFollower] = ()  # of the other people of the film
        self.waiting: deque[Slot] = deque()
        self.recent: dict[int, Detection | None] = {}  # by the frame's number, as long as another's frames may wait
        self.shot = -1
        self.start_shot()

    def start_shot(self) -> None:
        self.shot += 1
        self.person.forget()
        self.face: Detection | None = None  # the followed one when it was last detected
        self.region: Region | None = None  # where that was
        self.missing = 0  # frames since then
        self.not_usable = self.timing.patience  # frames since it was usable; at first there is none to wait for
        self.schedule = SearchSchedule(self.timing.search_waits)
        self.detected: list[Detection] = []  # faces of the newest frame, some of them more than once

    def add(self, number: int, frame: np.ndarray) -> list[Slot]:
        """Take the newest frame; returns the slots that are settled by then: all frames, in order."""
        slot = Slot(frame, number, self.shot)
        self.find_face(slot)
        self.waiting.append(slot)
        self.recent[number] = slot.detection
        self.recent.pop(number - SEARCH_INTERVAL - 1, None)
        if slot.detection is not None and self.not_usable <= self.timing.patience:
            self.follow_back()
            return self.settle()
        return [self.waiting.popleft()] if len(self.waiting) > SEARCH_INTERVAL else []

    def settle(self) -> list[Slot]:
        """The slots that wait, which then wait no longer."""
        settled = list(self.waiting)
        self.waiting.clear()
        return settled

    def find_face(self, slot: Slot) -> None:
        """Detect the followed face in the newest frame, or another one to follow."""
        self.detected = []
        if self.face is not None and self.missing == 0:
            self.region = region_around(self.face, self.region)
            self.detected = self.frames.detect(self.index, self.region)
            slot.detection = nearest(self.own(slot.frame, self.detected), self.face)
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
            self.person.forget()
        if slot.usable:
            self.person.seen = True
            self.not_usable, self.schedule = 0, SearchSchedule(self.timing.search_waits)
            self.remember(slot)
        # The next frame is searched there, unless its face is farther from here than this one's was.
        self.frames.regions[self.index] = self.region if slot.detection is not None else None

    def remember(self, slot: Slot) -> None:
        """Learn the look of the followed person from a frame in which nobody else is near, else those of the others."""
        face = slot.usable
        if face is None:
            return
        if any(other.face is not None and face.distance(other.face) < APART for other in self.others):
            return
        beside = [one for one in self.detected if one.usable and min(face.distance(one), one.distance(face)) > NEAR]
        for one in beside:
            self.person.add_passer(look_of(slot.frame, one.landmarks))
        if beside:
            return
        look, known = look_of(slot.frame, face.landmarks), self.person.look
        if known is not None:
            mixed = (1 - LOOK_MEMORY) * known + LOOK_MEMORY * look
            look = np.where(np.isfinite(known), np.where(np.isfinite(look), mixed, known), look)
        self.person.look = look

    def unlikeness(self, look: np.ndarray) -> float:
        """How far a look is from the person's, in units of ALIKE; 1 where that is not known."""
        return 1.0 if self.person.look is None else look_difference(self.person.look, look) / ALIKE

    def own(self, frame: np.ndarray, faces: list[Detection]) -> list[Detection]:
        """Those faces of a frame that may be this person's: nobody else of the film is nearer or more like them."""
        others = [(other, other.face, NEAR + other.missing * self.timing.drift) for other in self.others]
        return self._own_among(others, frame, faces, self.face)

    def _own_among(
        self,
        others: "Sequence[tuple[FaceFollower, Detection | None, float]]",
        frame: np.ndarray,
        faces: list[Detection],
        last: Detection | None,
    ) -> list[Detection]:
        """See `own`. others: the other people, where each was seen, and how far away they may be by now; last: the
        person's face in the neighbouring frame."""
        if not self.person.recognised and not self.person.passers:
            return faces
        return [face for face in faces if self._is_own(face, look_of(frame, face.landmarks), last, others)]

    def is_passer(self, look: np.ndarray, continued: bool) -> bool:
        """Whether a look is rather that of somebody who was seen beside this person; continued: not after a gap.

        Of people who look alike it is nobody's: which of them is nearer to it says nothing.
        """
        known, (least, share) = self.person.look, SOMEBODY_ELSE if continued else (0.0, 1.0)
        unlike = self.unlikeness(look)
        if known is None or unlike < least:
            return False
        unlike_known = [passer for passer in self.person.passers if look_difference(passer, known) > ALIKE / 2]
        return any(look_difference(passer, look) / ALIKE < share * unlike for passer in unlike_known)

    def _is_own(
        self,
        face: Detection,
        look: np.ndarray,
        last: Detection | None,
        others: "Sequence[tuple[FaceFollower, Detection | None, float]]",
    ) -> bool:
        if self.is_passer(look, last is not None):
            return False
        if not self.person.recognised:
            return True
        price = self.unlikeness(look)
        if self.person.look is not None and price > (1.0 if last is None else MAX_CHANGE):
            return False
        if last is not None:
            price += last.distance(face) / NEAR
        for other, seen, reach in others:
            if seen is None:
                if last is None and other.person.look is not None and other.unlikeness(look) < price:
                    return False
            elif resembles(face, seen, reach) and (
                last is None or other.unlikeness(look) + seen.distance(face) / NEAR < price
            ):
                return False
        return True

    def search_new(self, frame: np.ndarray, thorough: bool) -> Iterator[Detection]:
        """The usable faces of the frame, the likeliest first, then the others.

        `thorough` also searches tiles of the frame, larger ones first, for faces that are small in it. To rank by size
        it does so only when more faces are asked for, since a smaller tile shows no larger face.
        """
        rest: list[Detection] = []
        for boxes, _ in tiles(frame, thorough):
            found = self.pool.detect_all(frame, boxes)
            self.detected += found
            faces = without_parts(found, self.detected)
            if self.person.which == "largest" and not self.person.recognised:
                yield from ranked([face for face in faces if face.usable], self.person.which, frame.shape[1])
                faces = [face for face in faces if not face.usable]
            rest += faces
        yield from self.likeliest(frame, rest)

    def likeliest(self, frame: np.ndarray, faces: list[Detection]) -> list[Detection]:
        """The faces that may be this person's, usable ones first, then the likest, or by `which` while none is known.

        A person on the left or right is not taken for one on the other side while the other people are not found.
        """
        width, which = frame.shape[1], self.person.which
        own = ranked(self.own(frame, faces), which, width)
        if not self.person.recognised:
            return own
        if self.person.look is not None:
            return sorted(own, key=lambda face: (not face.usable, self.unlikeness(look_of(frame, face.landmarks))))
        seen_alone = all(face.distance(one) <= NEAR for one in own[:1] for face in faces)
        if seen_alone and any(other.face is None for other in self.others) and which in ("left", "right"):
            own = [face for face in own if (face.centre[0] < width / 2) == (which == "left")]
        return own

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
            faces = self.own(frame, faces)
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
            confirmed = nearest(self.own(frame, self.pool.detect(frame, region_box(region))), candidate)
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
            detected = self.pool.detect(slot.frame, region_box(region_around(face)))
            others = [(other, other.recent.get(slot.number), NEAR) for other in self.others]
            face = nearest(self._own_among(others, slot.frame, detected, face), face)
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


def without_parts(faces: list[Detection], found: list[Detection]) -> list[Detection]:
    """Those that are no part of a larger one of `found`: in a small tile an eye or a mouth may be taken for a face."""
    return [face for face in faces if not any(one.size > 2 * face.size and one.distance(face) < NEAR for one in found)]


def nearest(faces: list[Detection], last: Detection) -> Detection | None:
    """The face that was `last` in the frame before, if it is still near there."""
    return min((face for face in faces if resembles(face, last, NEAR)), key=last.distance, default=None)


def resembles(face: Detection, last: Detection, reach: float) -> bool:
    """Whether `face` lies within `reach` sizes of `last` and is of about its size."""
    return last.distance(face) < reach and 0.5 < face.size / last.size < 2


def ranked(faces: list[Detection], which: str, width: int) -> list[Detection]:
    """Faces in a picture of that width, usable ones first, then by `which`, one of `choice.FACES`."""
    ranks = {
        "largest": lambda face: -face.size,
        "left": lambda face: face.centre[0],
        "right": lambda face: -face.centre[0],
        "centre": lambda face: abs(face.centre[0] - width / 2),
    }
    return sorted(faces, key=lambda face: (not face.usable, ranks[which](face)))
