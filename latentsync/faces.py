"""Find the faces of speakers and follow them through a clip.

A followed face is detected in a crop around its last place, the region: the cost does not grow with the frame, and the
landmarks jitter a tenth as much as when detected in the whole frame. They are smoothed over frames to both sides, so
without lag. `following` has how a face is found and followed from frame to frame.

Coordinates are (x, y) in pixels of the frame with pixel centres at whole numbers.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import tee
from operator import itemgetter

import numpy as np

from latentsync import FPS
from latentsync.errors import UserError
from latentsync.following import SEARCH_INTERVAL, FaceFollower, Person, Slot, Timing
from latentsync.landmarks import Detection, LandmarkerPool, open_pool
from latentsync.lookahead import LookaheadFrames
from latentsync.rates import scale_frames
from latentsync.shots import REACH, CutDetector

JITTER = 0.005  # face sizes; points that differ by much more are motion and are not smoothed
JITTER_PIXELS = 0.4  # the same for small faces

RELEASED = np.empty(0, np.uint8)  # in place of a frame that has been yielded


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


def track_faces(
    frames: Iterable[np.ndarray],
    landmarkers: int | None = None,
    which: str = "largest",
    rate: Fraction = Fraction(FPS),
) -> Iterator[tuple[np.ndarray, Face | None]]:
    """Follow one face, the largest when it first appears, and yield every frame with it.

    frames: uint8 RGB (H, W, 3), all of one size, `rate` a second. Half a second of them is held at most, and one more
    per landmarker of another thread. landmarkers: how many of them work; by default as many as the processor's cores
    allow. which: one of `choice.FACES`, the face to follow if several are detected when it first appears; sides are
    the picture's. The face is None if none is usable: not found, turned more than 60 degrees away, or with the mouth
    outside the picture. Usable faces are preferred. Another face does not take over until the followed one has been
    gone or not usable for a second, or the shot has changed. If there has been none for a while, one that is small in
    the picture and comes into it slowly may be found up to a second late. Raises UserError if the landmarker's model
    file is missing.
    """
    return track_person(frames, Person(which), landmarkers, rate)


def track_person(
    frames: Iterable[np.ndarray],
    person: Person,
    landmarkers: int | None = None,
    rate: Fraction = Fraction(FPS),
) -> Iterator[tuple[np.ndarray, Face | None]]:
    """Follow one person; see `track_people`."""
    for frame, (face,) in track_people(frames, [person], landmarkers, rate):
        yield frame, face


def track_people(
    frames: Iterable[np.ndarray],
    people: Sequence[Person],
    landmarkers: int | None = None,
    rate: Fraction = Fraction(FPS),
) -> Iterator[tuple[np.ndarray, tuple[Face | None, ...]]]:
    """Follow several people, and yield every frame with the faces of all, in their order; see `track_faces`.

    No face is two people's. What is learnt of their looks is kept in `people`.
    """
    timing = Timing.at(rate)
    cuts = CutDetector(scale_frames(REACH, rate))
    with open_pool(landmarkers) as pool:
        batches = tee(_follow(frames, people, pool, cuts, timing), len(people))
        tracks = [
            _smooth(split_at_cuts(map(itemgetter(index), batch), cuts), timing) for index, batch in enumerate(batches)
        ]
        for faces in zip(*tracks, strict=True):
            yield faces[0][0], tuple(face for _, face in faces)


def _follow(
    frames: Iterable[np.ndarray], people: Sequence[Person], pool: LandmarkerPool, cuts: CutDetector, timing: Timing
) -> Iterator[list[list[Slot]]]:
    """For each frame that is read, yield the slots of each person that are settled by then: all frames, in order."""
    upcoming = LookaheadFrames(frames, pool, len(people))
    followers = [FaceFollower(upcoming, pool, person, cuts, timing, index) for index, person in enumerate(people)]
    for follower in followers:
        follower.others = [other for other in followers if other is not follower]
    for number, frame in enumerate(upcoming):
        cuts.add(frame)
        if cuts.is_clear_cut():
            for follower in followers:
                follower.start_shot()
        yield [follower.add(number, frame) for follower in followers]
    yield [follower.settle() for follower in followers]


def _smooth(slots: Iterable[Slot], timing: Timing) -> Iterator[tuple[np.ndarray, Face | None]]:
    """Every frame and its face, smoothed and faded by its neighbours."""
    reach = max(timing.fade, timing.smoothing)
    line: deque[Slot] = deque()  # up to `reach` slots before the current one, and `reach` after it
    current = 0
    for slot in slots:
        line.append(slot)
        if len(line) - current > reach:
            yield finish_slot(line, current, timing)
            if current == reach:
                line.popleft()
            else:
                current += 1
    for index in range(current, len(line)):
        yield finish_slot(line, index, timing)


def no_face_error(video: object) -> UserError:
    """The error for a video in which no face could be followed."""
    return UserError(
        f"'{video}' shows no face that can be used: use a video in which the speaker's face is seen from the front, "
        "with the whole mouth in the picture."
    )


def lookahead_frames(rate: Fraction) -> int:
    """Frames after one on which its face depends at most, in a film of `rate` frames a second.

    A face waits until the next search may have found it, or its shot is settled, and is then smoothed and faded by the
    faces after it.
    """
    timing = Timing.at(rate)
    return max(timing.fade, timing.smoothing) + max(SEARCH_INTERVAL, scale_frames(REACH, rate))


def split_at_cuts(batches: Iterable[list[Slot]], cuts: CutDetector) -> Iterator[Slot]:
    """Add the cuts between two usable faces that are recognised only later, and renumber the shots.

    batches: of `_follow`, for one person. A slot is held back until the reach of `cuts` has been read after it. Slots
    that waited in the follower are not held any longer, so both together hold no more frames than either.
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
