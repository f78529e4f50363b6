"""The people of a film: those that were asked for, `find_people`, and all of them, `everyone_in`."""

import threading
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from latentsync.choice import SAME_FACE, FacePoint, parse_face
from latentsync.errors import UserError
from latentsync.following import APART, LOOK_MEMORY, MAX_CHANGE, NEAR, Person, without_parts
from latentsync.landmarks import Detection, LandmarkerPool, open_pool, tiles
from latentsync.looks import ALIKE, look_difference, look_of
from latentsync.media import VideoInfo, read_frames
from latentsync.rates import scale_frames
from latentsync.settings import Settings

MAX_DISTANCE = 1.0  # face sizes from the point to the middle of the face that is meant
SIGHT_INTERVAL = 12  # frames at 25 a second between two in which all faces are looked for
MAX_PEOPLE = 4  # of a film; following each costs as much as following one
MAX_MISSED = 3  # looks in a row without a person who, in the same place, may then look somewhat different
MIN_SIGHTINGS = 2  # of a person, in a film that has so many; others are passers-by, or no faces


def find_people(info: VideoInfo, settings: Settings, cancel: threading.Event | None = None) -> list[Person]:
    """Those of `Settings.face` and `Settings.other_faces`, in this order.

    info: at the rate of the run. A point's frame is decoded and the face there looked at. Raises UserError where it
    shows none, or where two points are on one face.
    """
    choices = [parse_face(face) for face in (settings.face, *settings.other_faces)]
    several = len(choices) > 1
    if several and len(set(choices)) < len(choices):
        raise UserError(SAME_FACE)
    people, found = [], list[tuple[float, Detection]]()
    for choice in choices:
        if not isinstance(choice, FacePoint):
            people.append(Person(choice, recognised=several))
            continue
        frame = _frame_at(info, choice, cancel)
        faces = _faces_in(frame)
        face = _nearest(faces, choice)
        if face is None:
            raise UserError(
                f"'{info.path}' shows no face near {choice.x:g},{choice.y:g} at {choice.seconds:g} s; its pictures are "
                f"{info.width} × {info.height}."
            )
        if any(seconds == choice.seconds and face.distance(other) < 0.5 for seconds, other in found):
            raise UserError("Two of the points lie on the same face: give each voice a face of its own.")
        found.append((choice.seconds, face))
        people.append(Person(look=look_of(frame, face.landmarks), recognised=True))
        for other in faces:
            if other.usable and face.distance(other) > APART:
                people[-1].add_passer(look_of(frame, other.landmarks))
    return people


def unsaid_voices(settings: Settings, people: Iterable[Person]) -> list[str]:
    """Remarks on those of `find_people` whom no frame of a finished run has shown."""
    return [
        f"No frame shows the face '{face}' so that it can be used: its voice is heard, but nobody says it."
        for face, person in zip((settings.face, *settings.other_faces), people, strict=True)
        if not person.seen
    ]


def _frame_at(info: VideoInfo, point: FacePoint, cancel: threading.Event | None) -> np.ndarray:
    number = 0 if info.still else round(point.seconds * info.rate)
    if not info.still and number >= info.n_frames:
        raise UserError(f"'{info.path}' has no picture at {point.seconds:g} s: it ends after {info.duration:.2f} s.")
    with closing(read_frames(info, number, 1, cancel)) as frames:
        frame = next(frames, None)
    if frame is None:
        raise UserError(f"'{info.path}' has no picture at {point.seconds:g} s that can be decoded.")
    return frame


def face_at(frame: np.ndarray, point: FacePoint) -> Detection | None:
    """The face of a frame uint8 RGB (H, W, 3) whose middle is the nearest to a point; None if none is near."""
    return _nearest(_faces_in(frame), point)


def _faces_in(frame: np.ndarray) -> list[Detection]:
    """The faces in all tiles of a frame, some of them more than once."""
    with open_pool(1) as pool:
        return [face for boxes, _ in tiles(frame, thorough=True) for face in pool.detect_all(frame, boxes)]


def _nearest(faces: list[Detection], point: FacePoint) -> Detection | None:
    def distance(face: Detection) -> float:
        return float(np.linalg.norm(face.centre - (point.x, point.y))) / face.size

    return min((face for face in faces if distance(face) < MAX_DISTANCE), key=distance, default=None)


@dataclass
class Sighted:
    """A person of a film where first and last seen.

    first: the face in the frame in which it was usable first; number: of that frame; last: the face when last usable;
    missed: looks at the film since then; sightings: looks in which it was usable.
    """

    look: np.ndarray
    first: Detection
    number: int
    last: Detection
    missed: int = 0
    sightings: int = 1


def everyone_in(frames: Iterable[np.ndarray], rate: Fraction) -> list[Sighted]:
    """The people whose faces can be used in a film, at most the MAX_PEOPLE who are seen most often.

    frames: uint8 RGB (H, W, 3), `rate` a second; one in SIGHT_INTERVAL is looked at. In the order in which they are
    first seen, then from the left. Someone in another light may be counted as a second person.
    """
    step, looks = scale_frames(SIGHT_INTERVAL, rate), 0
    sighted: list[Sighted] = []
    with open_pool(1) as pool:
        for number, frame in enumerate(frames):
            if number % step == 0:
                looks += 1
                _recognise(sighted, frame, number, _usable_faces(pool, frame))
    often = [person for person in sighted if person.sightings >= min(MIN_SIGHTINGS, looks)]
    most = sorted(often, key=lambda person: -person.sightings)[:MAX_PEOPLE]
    return sorted(most, key=lambda person: (person.number, person.first.centre[0]))


def _usable_faces(pool: LandmarkerPool, frame: np.ndarray) -> list[Detection]:
    """The usable faces in a frame, each once: those that show in its largest tiles, or in the first that show any."""
    faces: list[Detection] = []
    found: list[Detection] = []
    for level, (boxes, _) in enumerate(tiles(frame, thorough=True)):
        detected = pool.detect_all(frame, boxes)
        found += detected
        for face in without_parts(detected, found):
            if face.usable and all(min(face.distance(one), one.distance(face)) > NEAR for one in faces):
                faces.append(face)
        if faces and level:
            break
    return faces


def _recognise(sighted: list[Sighted], frame: np.ndarray, number: int, faces: list[Detection]) -> None:
    """Pair the faces of a frame with the people who were seen before, the likest first; the others are new."""
    looks = [look_of(frame, face.landmarks) for face in faces]
    prices: list[tuple[float, int, int]] = []
    for i, person in enumerate(sighted):
        for k, face in enumerate(faces):
            unlike = look_difference(person.look, looks[k]) / ALIKE
            stayed = person.missed <= MAX_MISSED and person.last.distance(face) < NEAR
            if unlike < (MAX_CHANGE if stayed else 1.0):
                prices.append((unlike - stayed, i, k))
    paired: dict[int, int] = {}  # number of a person by that of the face
    for _, i, k in sorted(prices):
        if k not in paired and i not in paired.values():
            paired[k] = i
    for i, person in enumerate(sighted):
        if i not in paired.values():
            person.missed += 1
    for k, (face, look) in enumerate(zip(faces, looks, strict=True)):
        if k not in paired:
            sighted.append(Sighted(look, face, number, face))
            continue
        person = sighted[paired[k]]
        person.last, person.missed, person.sightings = face, 0, person.sightings + 1
        mixed = (1 - LOOK_MEMORY) * person.look + LOOK_MEMORY * look
        person.look = np.where(np.isfinite(mixed), mixed, np.where(np.isfinite(person.look), person.look, look))
