"""Mouths of a film, collected ahead of the frames that they are shown in, and the choice among them."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import cv2
import numpy as np

from latentsync.faces import Face
from latentsync.prefetch import POLL_SECONDS, close
from latentsync.retarget.geometry import (
    HEAD,
    LIPS,
    NOSE_TIP,
    anchor,
    apply,
    head_similarity,
    mouth_points,
    opening,
    pixels_per_unit,
    width,
)

CHUNK = 250  # frames: those of one chunk share a bank, which holds mouths up to the chunk's end
BANK_BYTES = 96 * 2**20  # of pixels in one bank; two are held at most
BANK_MOUTHS = 250  # in one bank, at most
PATCH_MARGIN = 0.22  # around the points of a mouth, whose pixels are kept
MOST_TURNED = 0.2  # of the tip of the nose aside the eyes' middle: no mouth is taken from a face turned further

# What a mouth costs to choose: one for each unit, squared, that it differs by from the wanted one.
OPENING_UNIT = 0.35  # of the logarithm
OPENING_ZERO = 0.03  # added to openings, as small ones all look closed
WIDTH_UNIT, POSE_UNIT, LIGHT_UNIT, DETAIL_UNIT = 0.08, 0.06, 20.0, 0.25  # of the detail's logarithm
JUMP_COST, LEAP_SHARE, LEAP_MOST, STAY_COST = 0.7, 0.5, 4.0, 0.03

# A look: small picture of the skin around the mouth, by which something before it is noticed.
LOOK_SIDE = 16  # pixels
LOOK_AREA = (-0.5, 0.5, 0.45, 1.45)  # left, right, top, bottom in head units
LOOK_MOUTH = (-0.38, 0.38, 0.62, 1.1)  # the same, of what moves in it and is left out
COVERED = 0.35  # mean difference of a look from the usual one, as a share of its brightness
LOOK_MEMORY = 0.05  # share of the newest look in the usual one
LEAST_LOOKS = 10  # frames of a scene before anything is told
LONG_COVERED = 50  # frames: what stays that long belongs to the face
COVER_FADE = 4  # frames in which the opacity falls before something covers the mouth, and rises after it


@dataclass(frozen=True, eq=False)
class Mouth:
    """One frame's mouth, as it was filmed.

    position: of the frame; pixels: uint8 (h, w, 3); points: `mouth_points` in them; lips: (40, 2), head units from
    their anchor; features: of `features`.
    """

    position: int
    pixels: np.ndarray
    points: np.ndarray
    lips: np.ndarray
    features: np.ndarray


def mouth_box(points: np.ndarray, frame_shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The part of a frame (H, W, …) with a mouth and the skin around it: x0, y0, x1, y1, the last two exclusive."""
    margin = PATCH_MARGIN * pixels_per_unit(head_similarity(points))
    around = points[: HEAD.start]
    limits = np.array((frame_shape[1], frame_shape[0]))
    x0, y0 = np.clip(np.floor(around.min(0) - margin), 0, limits - 1).astype(int).tolist()
    x1, y1 = np.clip(np.ceil(around.max(0) + margin) + 1, (x0 + 1, y0 + 1), limits).astype(int).tolist()
    return x0, y0, x1, y1


def cut_mouth(frame: np.ndarray, points: np.ndarray, position: int) -> Mouth | None:
    """The mouth of a frame uint8 (H, W, 3) with its `mouth_points`; None where it is not wholly in the picture."""
    x0, y0, x1, y1 = mouth_box(points, frame.shape)
    around = points[: HEAD.start]
    if (around < (x0, y0)).any() or (around > (x1 - 1, y1 - 1)).any():
        return None
    pixels = frame[y0:y1, x0:x1].copy()
    lips = apply(head_similarity(points), points[LIPS])
    return Mouth(position, pixels, points - np.float32((x0, y0)), lips - anchor(lips), features(points, pixels))


def features(points: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """What a mouth is chosen by, (6,): opening, width, turn and nod of the head; brightness and detail of its pixels.

    Detail is the mean size of the Laplacian, in grey levels: a frame that moved is blurred, and so should its mouth be.
    """
    head = head_similarity(points)
    lips, (turn, nod) = apply(head, points[LIPS]), apply(head, points[[NOSE_TIP]])[0]
    green = np.ascontiguousarray(pixels[..., 1])
    detail = np.abs(cv2.Laplacian(green, cv2.CV_16S)).mean()
    return np.array([opening(lips), width(lips), turn, nod, green.mean(), detail])


class MouthBank:
    """Mouths of a film, up to CHUNK frames ahead of where they are shown.

    The frames of a chunk take mouths of all frames before the chunk's end; what is held is bounded by BANK_BYTES and
    BANK_MOUTHS, and of what is over the most alike go. All of it follows from the film alone, so that it is the same
    whichever thread is faster, and when a run is resumed.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._banks: dict[int, tuple[Mouth, ...]] = {}
        self._last: int | None = None  # chunk
        self._error: BaseException | None = None

    def collect(self, tracked: Iterable[tuple[np.ndarray, Face | None]]) -> Iterator[Face | None]:
        """Take mouths from the frames of a film, in order, and pass their faces on.

        Where something seems to be before a mouth, it is not taken, and the opacity of the faces falls to 0.
        """
        mouths: list[Mouth] = []
        looks = UsualLook()
        waiting: deque[tuple[Face | None, bool]] = deque()  # faces, and whether something covers them
        since = COVER_FADE  # faces passed on since a covered one
        position = -1

        def faded() -> Face | None:
            nonlocal since
            face, covered = waiting[0]
            ahead = next((i for i, (_, other) in enumerate(waiting) if other), COVER_FADE)
            since = 0 if covered else since + 1
            waiting.popleft()
            share = min(ahead, since, COVER_FADE) / COVER_FADE
            return face if face is None or share == 1 else replace(face, opacity=face.opacity * share)

        try:
            for position, (frame, face) in enumerate(tracked):
                covered = False
                if face is not None:
                    points = mouth_points(face.landmarks)
                    covered = looks.is_covered(frame, points, face.first)
                    mouth = None if covered else cut_mouth(frame, points, position)
                    if mouth is not None and abs(mouth.features[2]) < MOST_TURNED:
                        mouths.append(mouth)
                        limit_mouths(mouths)
                if (position + 1) % CHUNK == 0:
                    self._publish(position // CHUNK, mouths, last=False)
                waiting.append((face, covered))
                if len(waiting) > COVER_FADE:
                    yield faded()
            self._publish(max(position, 0) // CHUNK, mouths, last=True)
            while waiting:
                yield faded()
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
        """The bank of a frame, as soon as it is collected; frames beyond the film's end have its last one.

        Positions do not go back by a chunk: earlier banks are dropped. Raises what ended the collecting early.
        """
        chunk = position // CHUNK
        with self._changed:
            while chunk not in self._banks and self._last is None and self._error is None:
                self._changed.wait(POLL_SECONDS)
            if self._last is not None:
                chunk = min(chunk, self._last)
            if chunk not in self._banks:
                raise self._error or RuntimeError("the film's mouths are collected in order")
            for earlier in [each for each in self._banks if each < chunk]:
                del self._banks[earlier]
            return self._banks[chunk]


def limit_mouths(mouths: list[Mouth]) -> None:
    """Drop mouths until BANK_MOUTHS and BANK_BYTES are kept: of the two most alike the later one."""
    size = sum(mouth.pixels.nbytes for mouth in mouths)
    while len(mouths) > BANK_MOUTHS or (len(mouths) > 1 and size > BANK_BYTES):
        places = feature_places(np.stack([mouth.features for mouth in mouths]))
        distance = squared_distances(places, places)
        np.fill_diagonal(distance, np.inf)
        dropped = mouths.pop(max(np.unravel_index(distance.argmin(), distance.shape)))
        size -= dropped.pixels.nbytes


class UsualLook:
    """How the skin around a mouth usually looks, to notice what covers it."""

    def __init__(self) -> None:
        self.usual: np.ndarray | None = None
        self.seen = self.covered = 0  # frames of the scene; covered ones in a row

    def is_covered(self, frame: np.ndarray, points: np.ndarray, first: bool) -> bool:
        """Whether something is before the mouth of a frame uint8 (H, W, 3); first: it begins a scene."""
        look = look_around(frame, points)
        if first or self.covered >= LONG_COVERED:
            self.usual, self.seen, self.covered = None, 0, 0
        if self.usual is None:
            self.usual = look
        difference = float(np.abs(look - self.usual).mean())
        self.seen += 1
        if self.seen > LEAST_LOOKS and difference > COVERED:
            self.covered += 1
            return True
        self.covered = 0
        self.usual += LOOK_MEMORY * (look - self.usual)
        return False


def look_around(frame: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The skin around a mouth, upright and apart from its brightness: float32 (pixels, 3)."""
    left, right, top, bottom = LOOK_AREA
    fine = 4 * LOOK_SIDE
    scale = np.array([[fine / (right - left), 0], [0, fine / (bottom - top)]])
    head = head_similarity(points)
    matrix = np.hstack([scale @ head[:, :2], (scale @ (head[:, 2] - (left, top)))[:, None]])
    upright = cv2.warpAffine(frame, matrix, (fine, fine), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    small = cv2.resize(upright, (LOOK_SIDE, LOOK_SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    y, x = (np.mgrid[:LOOK_SIDE, :LOOK_SIDE] + 0.5) / LOOK_SIDE
    x, y = left + x * (right - left), top + y * (bottom - top)
    still = ~((x > LOOK_MOUTH[0]) & (x < LOOK_MOUTH[1]) & (y > LOOK_MOUTH[2]) & (y < LOOK_MOUTH[3]))
    skin = small[still]
    return skin / max(float(skin.mean()), 1.0)


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Between the rows of a (n, k) and of b (m, k): (n, m)."""
    return ((a[:, None] - b[None]) ** 2).sum(-1)


def feature_places(found: np.ndarray) -> np.ndarray:
    """Features (n, 6) in the units of their cost."""
    places = found / (1, WIDTH_UNIT, POSE_UNIT, POSE_UNIT, LIGHT_UNIT, 1)
    places[:, 0] = np.log(found[:, 0] + OPENING_ZERO) / OPENING_UNIT
    places[:, 5] = np.log(found[:, 5] + 1) / DETAIL_UNIT
    return places


def choose_mouths(mouths: tuple[Mouth, ...], wanted: np.ndarray) -> np.ndarray:
    """The cheapest path through the mouths for n frames with wanted features (n, 6): their indices (n,).

    Going on to the next frame of the film, or to the one before, is free; jumps cost the more the less alike two
    mouths are.
    """
    places = feature_places(np.stack([mouth.features for mouth in mouths]))
    costs = squared_distances(feature_places(wanted), places)
    step = JUMP_COST + LEAP_SHARE * np.minimum(squared_distances(places, places), LEAP_MOST)
    positions = np.array([mouth.position for mouth in mouths])
    step[np.abs(positions[:, None] - positions[None]) == 1] = 0
    np.fill_diagonal(step, STAY_COST)
    best, came_from = costs[0], []
    for cost in costs[1:]:
        total = best[:, None] + step
        came_from.append(total.argmin(0))
        best = total.min(0) + cost
    path = [int(best.argmin())]
    for before in reversed(came_from):
        path.append(int(before[path[-1]]))
    return np.array(path[::-1])
