"""The people of a film that were asked for: `find_people`."""

import threading
from collections.abc import Iterable
from contextlib import closing

import numpy as np

from latentsync.choice import SAME_FACE, FacePoint, parse_face
from latentsync.errors import UserError
from latentsync.following import Person
from latentsync.landmarks import Detection, open_pool, tiles
from latentsync.looks import look_of
from latentsync.media import VideoInfo, read_frames
from latentsync.settings import Settings

MAX_DISTANCE = 1.0  # face sizes from the point to the middle of the face that is meant


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
        face = face_at(frame, choice)
        if face is None:
            raise UserError(
                f"'{info.path}' shows no face near {choice.x:g},{choice.y:g} at {choice.seconds:g} s; its pictures are "
                f"{info.width} × {info.height}."
            )
        if any(seconds == choice.seconds and face.distance(other) < 0.5 for seconds, other in found):
            raise UserError("Two of the points lie on the same face: give each voice a face of its own.")
        found.append((choice.seconds, face))
        people.append(Person(look=look_of(frame, face.landmarks), recognised=True))
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
    faces: list[Detection] = []
    with open_pool(1) as pool:
        for boxes, _ in tiles(frame, thorough=True):
            faces += pool.detect_all(frame, boxes)

    def distance(face: Detection) -> float:
        return float(np.linalg.norm(face.centre - (point.x, point.y))) / face.size

    return min((face for face in faces if distance(face) < MAX_DISTANCE), key=distance, default=None)
