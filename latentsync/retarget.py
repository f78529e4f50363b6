"""Show the mouth shapes of generated faces with the film's own pixels.

A small model knows how a mouth moves, but not what this person looks like. So only the mouth's shape over time is read
off its faces. For every frame another one of the same film is looked up, whose mouth is nearly so; its lips and chin
are warped the rest of the way and laid into a soft hull around the mouth. All else stays the source's frame, to the bit.

    source frames, followed → MouthBank.collect → mouths of the film, some seconds ahead
    painted shots → retarget → shots whose frames show their new mouths

Lengths without a unit are in distances between the outer eye corners ("head units"), in a head frame whose origin lies
between the eyes and whose y axis points down the face.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

from latentsync.alignment import crop_size

OUTER_LIPS = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291, 375, 321, 405, 314, 17, 84, 181, 91, 146)
INNER_LIPS = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308, 324, 318, 402, 317, 14, 87, 178, 88, 95)
LIPS = OUTER_LIPS + INNER_LIPS  # 478-point mesh; both from corner to corner along the upper lip, and back
OUTER, INNER = slice(0, 20), slice(20, 40)  # of LIPS
UPPER = np.array([*range(0, 11), *range(20, 31)])  # of LIPS, with the corners
LOWER = np.array([*range(11, 20), *range(31, 40)])
LEFT, RIGHT = 0, 10  # corners in OUTER
GAPS = ((25, 35), (24, 36), (26, 34))  # of LIPS: inner points above one another, the middle and beside it
# Skin around the mouth that keeps its place: under the nose, cheeks, chin.
RING = (2, 97, 326, 98, 327, 203, 423, 206, 426, 216, 436, 212, 432, 214, 434, 210, 430, 211, 431, 208, 428, 199, 175)
CHIN = RING.index(199)
# The head frame: eye corners, bridge and tip of the nose, where they lie in a face seen from the front.
HEAD = (33, 133, 362, 263, 168, 6, 197, 195, 5, 4)
HEAD_PLACES = np.array([
    (-0.5, 0), (-0.193, 0.024), (0.193, 0.024), (0.5, 0), (0, -0.027),
    (0, 0.063), (0, 0.142), (0, 0.212), (0, 0.288), (0, 0.381),
])  # fmt: skip
NOSE_TIP = 4

CHUNK = 250  # frames: the bank of frames 0 to 249 holds mouths of all of these, and so on
BANK_BYTES = 96 * 2**20  # of pixels in one bank
BANK_MOUTHS = 250  # in one bank, at most
PATCH_MARGIN = 0.22  # around the points of a mouth whose pixels are kept

FACE_SIDE = 256  # generated faces are read at this resolution's size of crop
BLOCK = 16  # frames whose mouths are chosen together
LOOKAHEAD = 12  # frames after a block that its choice takes into account
RUN_UP = 16  # frames before it
CONTEXT = RUN_UP + 2 * BLOCK  # frames before the first one wanted that must be painted, too, for the same result

USUAL_WIDTH = 0.555  # of a generated mouth, whoever it is of
WIDTH_RANGE = (0.85, 1.12)  # of the person's usual width
STEADY = 4.0  # frames: deviation of the Gaussian over which a mouth's place and usual width are averaged
LEAST_GAP = 0.004  # between lips that are closed
UPPER_SHARE = 0.25  # of a change of the opening that the upper lip does

HULL_INSIDE, HULL_OUTSIDE = 0.01, 0.085  # from the hull of lips and chin: where the patch begins to fade, and ends
FADE_FRAMES = 3  # of a cross-fade after a jump between mouths
# The inside of a mouth is generated where it must open to more than STRETCH times what was filmed, and MISSING_FROM.
STRETCH, MISSING_FROM, MISSING_RANGE = 2.2, 0.015, 0.03
LIP_EDGE = 0.012  # width of the soft edge between lips and what is between them
LIP_GAIN = (0.5, 1.1)  # of the generated inside's colours, so that its lips would have the person's
SHADOW, SHADOW_WIDTH = 0.5, 0.05  # of the lips on a generated inside: how dark it is at its edge, how far it reaches

# What a mouth costs to choose: a squared difference of one in each of these units.
OPENING_UNIT = 0.35  # of the logarithm
OPENING_ZERO = 0.03  # that is added to openings, as small ones all look closed
WIDTH_UNIT, POSE_UNIT, LIGHT_UNIT = 0.08, 0.06, 20.0
JUMP_COST, STAY_COST = 0.7, 0.03


class PaintedShot(Protocol):
    """What `retarget` needs of a shot on its way through the pipeline.

    frame: uint8 (H, W, 3), changed in place; landmarks: (478, 2), pixels of the frame, None without a usable face;
    generated: uint8 (R, R, 3), the aligned face with its new mouth, None where it was not painted; position: the
    frame's number; first: nothing to continue from; opacity: 0 to 1.
    """

    frame: np.ndarray
    landmarks: np.ndarray | None
    generated: np.ndarray | None
    position: int
    first: bool
    opacity: float


def head_similarity(landmarks: np.ndarray) -> np.ndarray:
    """The similarity (2, 3) that takes a mesh (478, 2) from its picture's pixels to head units."""
    source, target = landmarks[list(HEAD)], HEAD_PLACES
    source_mean, target_mean = source.mean(0), target.mean(0)
    a, b = (source - source_mean) @ (1, 1j), (target - target_mean) @ (1, 1j)
    turn = (a.conj() @ b) / max((a.conj() @ a).real, 1e-12)
    linear = np.array([[turn.real, -turn.imag], [turn.imag, turn.real]])
    return np.hstack([linear, (target_mean - linear @ source_mean)[:, None]])


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (n, 2) taken through an affine matrix (2, 3)."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def opening(lips: np.ndarray) -> np.ndarray:
    """Mean gap between the inner lips (…, 40, 2)."""
    return np.mean([np.linalg.norm(lips[..., b, :] - lips[..., a, :], axis=-1) for a, b in GAPS], axis=0)


def width(lips: np.ndarray) -> np.ndarray:
    """Distance between the mouth's corners, of lips (…, 40, 2)."""
    return np.linalg.norm(lips[..., RIGHT, :] - lips[..., LEFT, :], axis=-1)


def lip_anchor(lips: np.ndarray) -> np.ndarray:
    """The point (2,) by which a mouth is placed, of lips (40, 2): middle of the corners and of the upper lip's edge."""
    return (lips[LEFT] + lips[RIGHT]) / 4 + lips[5] / 2


@dataclass(frozen=True, eq=False)
class Mouth:
    """One frame's mouth, as it was filmed.

    position: of the frame; pixels: uint8 (h, w, 3); points: (LIPS and RING, 2), pixels of it; lips: (40, 2), head units
    from their anchor; features: opening, width, turn, nod (head units), light (grey levels).
    """

    position: int
    pixels: np.ndarray
    points: np.ndarray
    lips: np.ndarray
    features: np.ndarray


def cut_mouth(frame: np.ndarray, landmarks: np.ndarray, position: int) -> Mouth | None:
    """The mouth of a frame uint8 (H, W, 3) with landmarks (478, 2); None where it is not wholly in the picture."""
    head = head_similarity(landmarks)
    points = landmarks[list(LIPS + RING)]
    margin = PATCH_MARGIN / np.sqrt(abs(np.linalg.det(head[:, :2])))
    (x0, y0), (x1, y1) = np.floor(points.min(0) - margin).astype(int), np.ceil(points.max(0) + margin).astype(int) + 1
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, frame.shape[1]), min(y1, frame.shape[0])
    if (points < (x0, y0)).any() or (points > (x1 - 1, y1 - 1)).any():
        return None
    pixels = frame[y0:y1, x0:x1].copy()
    lips = apply(head, landmarks[list(LIPS)])
    turn, nod = apply(head, landmarks[[NOSE_TIP]])[0]
    features = np.array([opening(lips), width(lips), turn, nod, pixels[..., 1].mean()])
    return Mouth(position, pixels, (points - (x0, y0)).astype(np.float32), lips - lip_anchor(lips), features)


class MouthBank:
    """Mouths of a film, collected some seconds ahead of the frames that they are shown in.

    Frame p takes mouths of the frames before the end of its chunk of CHUNK frames; what is held is bounded by
    BANK_BYTES and BANK_MOUTHS, and of what is over the most alike go. All of it follows from the source's frames alone,
    so that it is the same whoever is faster, and when a run is resumed.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._banks: dict[int, tuple[Mouth, ...]] = {}
        self._last: int | None = None  # the number of the last chunk
        self._error: BaseException | None = None

    def collect(self, tracked: Iterable[tuple[np.ndarray, np.ndarray | None]]) -> Iterator[np.ndarray | None]:
        """Take mouths from frames with landmarks (None: no usable face), in order, and pass the landmarks on."""
        mouths: list[Mouth] = []
        position = -1
        try:
            for position, (frame, landmarks) in enumerate(tracked):
                mouth = None if landmarks is None else cut_mouth(frame, landmarks, position)
                if mouth is not None:
                    mouths.append(mouth)
                    limit_mouths(mouths)
                if (position + 1) % CHUNK == 0:
                    self._publish(position // CHUNK, mouths)
                yield landmarks
            self._publish(position // CHUNK, mouths, last=True)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
            raise

    def _publish(self, chunk: int, mouths: list[Mouth], last: bool = False) -> None:
        with self._changed:
            self._banks[max(chunk, 0)] = tuple(mouths)
            self._last = max(chunk, 0) if last else None
            self._changed.notify_all()

    def mouths_for(self, position: int) -> tuple[Mouth, ...]:
        """The bank of a frame, as soon as it is there; frames beyond the film's last have the last one.

        Positions must not go back by a chunk: earlier banks are let go. Raises RuntimeError if collecting has ended
        before.
        """
        chunk = position // CHUNK
        with self._changed:
            self._changed.wait_for(lambda: chunk in self._banks or self._last is not None or self._error is not None)
            if self._last is not None:
                chunk = min(chunk, self._last)
            if chunk not in self._banks:
                raise RuntimeError("The film's mouths are not collected to this frame.") from self._error
            for earlier in [each for each in self._banks if each < chunk]:
                del self._banks[earlier]
            return self._banks[chunk]


def limit_mouths(mouths: list[Mouth]) -> None:
    """Take mouths out until BANK_MOUTHS and BANK_BYTES are kept: of the two most alike the later one."""
    while len(mouths) > BANK_MOUTHS or (len(mouths) > 2 and sum(m.pixels.nbytes for m in mouths) > BANK_BYTES):
        places = feature_places(np.stack([m.features for m in mouths]))
        distance = ((places[:, None] - places[None]) ** 2).sum(-1)
        np.fill_diagonal(distance, np.inf)
        del mouths[max(np.unravel_index(distance.argmin(), distance.shape))]


def feature_places(features: np.ndarray) -> np.ndarray:
    """Features (n, 5) in the units of their cost."""
    scaled = features / (1, WIDTH_UNIT, POSE_UNIT, POSE_UNIT, LIGHT_UNIT)
    scaled[:, 0] = np.log(features[:, 0] + OPENING_ZERO) / OPENING_UNIT
    return scaled


def choose_mouths(mouths: tuple[Mouth, ...], wanted: np.ndarray) -> np.ndarray:
    """The cheapest path through the mouths: one index for each of n wanted features (n, 5)."""
    places = feature_places(np.stack([m.features for m in mouths]))
    costs = ((feature_places(wanted)[:, None] - places[None]) ** 2).sum(-1)  # (n, mouths)
    step = ((places[:, None] - places[None]) ** 2).sum(-1)
    step = JUMP_COST + 0.5 * np.minimum(step, 4)
    order = np.array([m.position for m in mouths])
    step[np.abs(order[:, None] - order[None]) == 1] = 0
    np.fill_diagonal(step, STAY_COST)
    best, back = costs[0], []
    for cost in costs[1:]:
        total = best[:, None] + step
        back.append(total.argmin(0))
        best = total.min(0) + cost
    path = [int(best.argmin())]
    for last in reversed(back):
        path.append(int(last[path[-1]]))
    return np.array(path[::-1])


def shape_lips(lips: np.ndarray, wanted_opening: float, wanted_width: float) -> np.ndarray:
    """Lips (40, 2) in head units around their anchor, brought to another opening and width."""
    out = lips.copy()
    middle = (lips[LEFT, 0] + lips[RIGHT, 0]) / 2
    half = max(width(lips) / 2, 1e-3)
    across = np.clip((lips[:, 0] - middle) / half, -1, 1)
    inner_half = max(np.linalg.norm(lips[INNER][RIGHT] - lips[INNER][LEFT]) / 2, 1e-3)
    across[INNER] = np.clip((lips[INNER, 0] - middle) / inner_half, -1, 1)
    profile = (1 - across**2) ** 0.75
    profile /= np.mean([profile[a] for pair in GAPS for a in pair])
    change = max(wanted_opening, LEAST_GAP) - opening(lips)
    out[UPPER, 1] -= UPPER_SHARE * change * profile[UPPER]
    out[LOWER, 1] += (1 - UPPER_SHARE) * change * profile[LOWER]
    # The lips never cross.
    for above, below in zip(range(21, 30), range(39, 30, -1), strict=True):
        overlap = LEAST_GAP / 2 - (out[below, 1] - out[above, 1])
        if overlap > 0:
            out[above, 1] -= overlap / 2
            out[below, 1] += overlap / 2
    out[:, 0] = middle + (out[:, 0] - middle) * (wanted_width / (2 * half))
    return out


def thin_plate_map(points: np.ndarray, values: np.ndarray, shape: tuple[int, int], scale: float) -> np.ndarray:
    """The thin-plate spline that takes points (n, 2) to values (n, 2), at every pixel: float32 (h, w, 2).

    shape: h, w; scale: pixels a head unit. It gives way a little where points contradict one another.
    """
    n = len(points)
    centre = points.mean(0)
    at = (points - centre) / scale
    system = np.zeros((n + 3, n + 3))
    system[:n, :n] = _kernel(at, at) + 1e-4 * np.eye(n)
    system[:n, n] = system[n, :n] = 1
    system[:n, n + 1 :] = at
    system[n + 1 :, :n] = at.T
    moved = np.zeros((n + 3, 2))
    moved[:n] = values - points
    weights = np.linalg.solve(system, moved)
    step = max(1, round(scale / 60))
    rows, columns = np.arange(0, shape[0] + step, step), np.arange(0, shape[1] + step, step)
    grid = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2).astype(float)
    there = (grid - centre) / scale
    change = _kernel(there, at) @ weights[:n] + weights[n] + there @ weights[n + 1 :]
    change = change.reshape(len(rows), len(columns), 2).astype(np.float32)
    # Back to every pixel: pixel x lies at x / step of the grid.
    matrix = np.array([[1 / step, 0, 0], [0, 1 / step, 0]])
    change = cv2.warpAffine(
        change, matrix, (shape[1], shape[0]), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
    )
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    return change + np.stack([x, y], axis=-1)


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = ((a[:, None] - b[None]) ** 2).sum(-1)
    return squared * np.log(np.maximum(squared, 1e-12))


def soft_hull(points: np.ndarray, shape: tuple[int, int], scale: float) -> np.ndarray:
    """How much of the patch shows: float32 (h, w), 1 inside the hull of points (n, 2), 0 from HULL_OUTSIDE on."""
    hull = cv2.convexHull(points.astype(np.float32))
    inside = np.ones(shape, np.uint8)
    cv2.fillConvexPoly(inside, np.round(hull * 16).astype(np.int32), 0, shift=4)
    away = cv2.distanceTransform(inside, cv2.DIST_L2, 5) / scale
    share = np.clip((HULL_OUTSIDE - away) / (HULL_OUTSIDE - HULL_INSIDE), 0, 1)
    return (share * share * (3 - 2 * share)).astype(np.float32)


def match_ring(patch: np.ndarray, region: np.ndarray, hull: np.ndarray, scale: float) -> np.ndarray:
    """Give a patch float32 (h, w, 3) the light and colour that the region has around the hull.

    What the two differ by in the ring is spread smoothly inwards and added.
    """
    shrink = max(1, int(scale / 30))
    size = (max(1, patch.shape[1] // shrink), max(1, patch.shape[0] // shrink))
    weight = ((hull < 0.6).astype(np.float32))
    difference = np.clip(region - patch, -60, 60) * weight[..., None]
    small = cv2.resize(np.dstack([difference, weight]), size, interpolation=cv2.INTER_AREA)
    total = np.zeros_like(small)
    for sigma, share in ((0.06, 1.0), (0.25, 0.02)):
        total += share * cv2.GaussianBlur(small, (0, 0), sigma * scale / shrink, borderType=cv2.BORDER_REPLICATE)
    spread = total[..., :3] / np.maximum(total[..., 3:], 1e-6)
    return patch + cv2.resize(spread, (patch.shape[1], patch.shape[0]), interpolation=cv2.INTER_LINEAR)


@dataclass(frozen=True, eq=False)
class GeneratedMouth:
    """A generated face's mouth: face uint8 (h, w, 3), lips (40, 2) pixels of it."""

    face: np.ndarray
    lips: np.ndarray


def missing_inside(filmed: float, wanted: float) -> float:
    """How much of a mouth's inside must be generated, 0 to 1, where a filmed opening is shown as a wanted one."""
    return float(np.clip((wanted - STRETCH * filmed - MISSING_FROM) / MISSING_RANGE, 0, 1))


class MouthGrid:
    """The pixels of a patch (h, w) in the axes of a mouth with lips (40, 2): along its corners, and down.

    along (h, w) and down (h, w); upper, lower (h, w): how far down the inner lips are there.
    """

    def __init__(self, lips: np.ndarray, shape: tuple[int, int]):
        self.axes = mouth_axes(lips)
        y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
        self.along = self.axes[0, 0] * x + self.axes[0, 1] * y
        self.down = self.axes[1, 0] * x + self.axes[1, 1] * y
        self.contours = inner_contours(lips, self.axes)
        upper, lower = self.contours
        self.upper = np.interp(self.along, upper[:, 0], upper[:, 1]).astype(np.float32)
        self.lower = np.interp(self.along, lower[:, 0], lower[:, 1]).astype(np.float32)

    def below(self, edge: float) -> np.ndarray:
        """How much each pixel belongs to the lower lip, (h, w) from 0 to 1, with an edge so many pixels wide."""
        return np.clip((self.down - (self.upper + self.lower) / 2) / edge + 0.5, 0, 1)

    def inside(self, edge: float) -> np.ndarray:
        """How much each pixel lies between the lips, (h, w) from 0 to 1."""
        left, right = self.contours[0][[0, -1], 0]
        gap = np.minimum(self.down - self.upper, self.lower - self.down)
        gap = np.minimum(gap, np.minimum(self.along - left, right - self.along))
        return np.clip(gap / edge + 0.5, 0, 1) * np.clip((self.lower - self.upper) / edge, 0, 1)

    def places_inside(self, lips: np.ndarray) -> np.ndarray:
        """Where in a picture with these lips the pixels between the lips are filmed: float32 (h, w, 2).

        Teeth hang from above: where there is more than is wanted, the lower lip hides the rest.
        """
        axes = mouth_axes(lips)
        upper, lower = inner_contours(lips, axes)
        own = self.contours[0][:, 0]
        share = np.interp(self.along, own, np.linspace(0, 1, len(own)))
        position = np.linspace(0, 1, len(upper))
        along = np.interp(share, position, upper[:, 0])
        top = np.interp(along, upper[:, 0], upper[:, 1])
        bottom = np.interp(along, lower[:, 0], lower[:, 1])
        size = np.ptp(upper[:, 0]) / max(np.ptp(own), 1e-3)  # of the other picture, over this one
        stretch = np.minimum((bottom - top) / np.maximum(self.lower - self.upper, 1e-3), size)
        down = top + (self.down - self.upper) * stretch
        x = axes[0, 0] * along + axes[1, 0] * down
        y = axes[0, 1] * along + axes[1, 1] * down
        return np.stack([x, y], axis=-1).astype(np.float32)


def mouth_axes(lips: np.ndarray) -> np.ndarray:
    """Unit vectors (2, 2) along the mouth's corners and down, of lips (40, 2)."""
    x, y = (lips[RIGHT] - lips[LEFT]) / max(np.linalg.norm(lips[RIGHT] - lips[LEFT]), 1e-6)
    return np.array([[x, y], [-y, x]])


def inner_contours(lips: np.ndarray, axes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inner edges of the upper and of the lower lip, (11, 2) each, along and down, from corner to corner."""
    inner = lips[INNER] @ axes.T
    upper, lower = inner[:11], inner[[0, *range(19, 10, -1), 10]]
    for edge in (upper, lower):
        edge[:, 0] = np.maximum.accumulate(edge[:, 0] + np.arange(11) * 1e-4)
    lower[:, 1] = np.maximum(lower[:, 1], np.interp(lower[:, 0], upper[:, 0], upper[:, 1]))
    return upper, lower


def lip_colour(pixels: np.ndarray, lips: np.ndarray) -> np.ndarray:
    """Mean colour (3,) of the lips (40, 2) in a picture (h, w, 3)."""
    mask = np.zeros(pixels.shape[:2], np.uint8)
    cv2.fillPoly(mask, [np.round(lips[OUTER] * 16).astype(np.int32)], 1, shift=4)
    cv2.fillPoly(mask, [np.round(lips[INNER] * 16).astype(np.int32)], 0, shift=4)
    return pixels[mask > 0].mean(0) if mask.any() else np.full(3, 128.0)


def draw_mouth(
    mouth: Mouth, lips: np.ndarray, ring: np.ndarray, shape: tuple[int, int], scale: float,
    generated: GeneratedMouth, missing: float,
) -> np.ndarray:  # fmt: skip
    """A filmed mouth with its lips (40, 2) and the skin around them (RING, 2) at other places: float32 (h, w, 3).

    Upper lip, lower lip and what is between them are three layers, each warped smoothly. missing: see
    `missing_inside`.
    """
    filmed_lips, filmed_ring = mouth.points[: len(LIPS)], mouth.points[len(LIPS) :]
    corners = [LEFT, RIGHT, 20 + LEFT, 20 + RIGHT]
    layers = []
    for which in (UPPER, np.array([*LOWER, *corners])):
        places = thin_plate_map(
            np.vstack([lips[which], ring]), np.vstack([filmed_lips[which], filmed_ring]), shape, scale
        )
        layers.append(sample(mouth.pixels, places))
    grid = MouthGrid(lips, shape)
    edge = max(LIP_EDGE * scale, 1.0)
    below = grid.below(edge)[..., None]
    patch = layers[0] + (layers[1] - layers[0]) * below
    between = sample(mouth.pixels, grid.places_inside(filmed_lips))
    if missing > 0:
        gain = lip_colour(mouth.pixels, filmed_lips) / np.maximum(lip_colour(generated.face, generated.lips), 1)
        made = sample(generated.face, grid.places_inside(generated.lips)) * np.clip(gain, *LIP_GAIN)
        made *= SHADOW + (1 - SHADOW) * grid.inside(SHADOW_WIDTH * scale)[..., None]
        between += (made - between) * missing
    return patch + (between - patch) * grid.inside(edge)[..., None]


def sample(pixels: np.ndarray, places: np.ndarray) -> np.ndarray:
    """A picture at places (h, w, 2): float32 (h, w, 3)."""
    shown = cv2.remap(pixels, places, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return shown.astype(np.float32)


def show_mouth(
    frame: np.ndarray,
    points: np.ndarray,
    scale: float,
    wanted_lips: list[np.ndarray],
    mouths: list[Mouth],
    shares: list[float],
    insides: list[float],
    generated: GeneratedMouth,
    opacity: float = 1.0,
) -> None:
    """Lay mouths into a frame uint8 (H, W, 3), in place.

    points: (LIPS and RING, 2), pixels of the frame, where its own are; scale: pixels a head unit; wanted_lips:
    (40, 2) for each of the mouths, pixels of the frame; shares: of the mouths, together 1.
    """
    ring = points[len(LIPS) :]
    covered = np.vstack([points[OUTER], ring[[CHIN]], *(lips[OUTER] for lips in wanted_lips)])
    margin = (HULL_OUTSIDE + 0.1) * scale
    x0, y0 = np.maximum(np.floor(covered.min(0) - margin).astype(int), 0)
    x1, y1 = np.minimum(np.ceil(covered.max(0) + margin).astype(int) + 1, (frame.shape[1], frame.shape[0]))
    if x1 - x0 < 4 or y1 - y0 < 4:
        return
    region = frame[y0:y1, x0:x1]
    shape = region.shape[:2]
    hull = soft_hull(covered - (x0, y0), shape, scale)
    patch = np.zeros((*shape, 3), np.float32)
    for mouth, lips, share, inside in zip(mouths, wanted_lips, shares, insides, strict=True):
        shown = draw_mouth(mouth, lips - (x0, y0), ring - (x0, y0), shape, scale, generated, inside)
        patch += share * match_ring(shown, region, hull, scale)
    blend = (hull * opacity)[..., None]
    mixed = region + (patch - region) * blend
    np.copyto(region, np.clip(np.rint(mixed), 0, 255).astype(np.uint8), where=blend > 0)


@dataclass(eq=False)
class _Waiting:
    """A shot whose mouth is to be chosen, and what is known of it."""

    shot: PaintedShot | None  # None once it has been handed on
    head: np.ndarray  # (2, 3)
    lips: np.ndarray  # (40, 2), head units
    features: np.ndarray  # of its own mouth
    read: np.ndarray | None  # opening and width of the generated mouth
    generated: GeneratedMouth | None


def steady(values: np.ndarray, index: int) -> np.ndarray:
    """The Gaussian mean of values (n, …) around an index, as far as there are any."""
    share = np.exp(-0.5 * ((np.arange(len(values)) - index) / STEADY) ** 2)
    return np.tensordot(share / share.sum(), values, 1)


def retarget(
    shots: Iterable[PaintedShot],
    bank: MouthBank,
    read_landmarks: Callable[[np.ndarray], np.ndarray | None],
    light: Callable[[np.ndarray, np.ndarray], float] | None = None,
) -> Iterator[PaintedShot]:
    """Show every shot's generated mouth with the film's own pixels, in place, and pass the shots on in order.

    read_landmarks: the mesh (478, 2) of a generated face, None where none is found. Up to BLOCK + LOOKAHEAD shots wait.
    """
    run: deque[_Waiting] = deque()
    start = 0  # of the block to come, in `run`
    before: tuple[Mouth, int] | None = None  # the last frame's mouth, and for how many frames it has been shown alone

    def finish(count: int) -> Iterator[PaintedShot]:
        """Show the mouths of `count` shots from `start` on."""
        nonlocal start, before
        known = list(run)
        chosen, before = _show_block(known, start, count, bank, before)
        for waiting in known[start : start + count]:
            shot, waiting.shot = waiting.shot, None
            yield shot
        start += count
        while start > max(RUN_UP, LOOKAHEAD):
            run.popleft()
            start -= 1

    for shot in shots:
        if shot.landmarks is None or shot.first:
            while start < len(run):
                yield from finish(min(BLOCK, len(run) - start))
            run.clear()
            start, before = 0, None
        if shot.landmarks is None:
            yield shot
            continue
        run.append(_measure(shot, read_landmarks))
        if len(run) - start >= BLOCK + LOOKAHEAD:
            yield from finish(BLOCK)
    while start < len(run):
        yield from finish(min(BLOCK, len(run) - start))


def _measure(shot: PaintedShot, read_landmarks: Callable[[np.ndarray], np.ndarray | None]) -> _Waiting:
    head = head_similarity(shot.landmarks)
    lips = apply(head, shot.landmarks[list(LIPS)])
    mouth = cut_mouth(shot.frame, shot.landmarks, shot.position)
    turn, nod = apply(head, shot.landmarks[[NOSE_TIP]])[0]
    light = 128.0 if mouth is None else mouth.features[4]
    features = np.array([opening(lips), width(lips), turn, nod, light])
    read = generated = None
    if shot.generated is not None:
        face = unsquash(shot.generated)
        landmarks = read_landmarks(face)
        if landmarks is not None:
            seen = apply(head_similarity(landmarks), landmarks[list(LIPS)])
            read = np.array([opening(seen), width(seen)])
            generated = GeneratedMouth(face, landmarks[list(LIPS)])
    return _Waiting(shot, head, lips, features, read, generated)


def unsquash(face: np.ndarray) -> np.ndarray:
    """An aligned square face, uint8 (R, R, 3), in its true proportions and large enough for the landmarker."""
    return cv2.resize(face, crop_size(FACE_SIDE), interpolation=cv2.INTER_CUBIC)


def _show_block(known, start, count, bank, before):
    end = start + count
    mouths = bank.mouths_for(known[end - 1].shot.position)
    first, last = max(start - RUN_UP, 0), min(end + LOOKAHEAD, len(known))
    reads = [w.read for w in known[first:last]]
    if not mouths or known[start].read is None and all(r is None for r in reads):
        return None, None
    reads = _fill(reads)
    smooth = np.pad(reads, ((1, 1), (0, 0)), "edge")
    smooth = (smooth[:-2] + 2 * smooth[1:-1] + smooth[2:]) / 4
    own = np.stack([w.features for w in known])
    anchors = np.stack([lip_anchor(w.lips) for w in known])
    usual = np.array([steady(own[:, 1], i) for i in range(first, last)])
    wanted = own[first:last].copy()
    wanted[:, 0] = smooth[:, 0]
    wanted[:, 1] = usual * np.clip(smooth[:, 1] / USUAL_WIDTH, *WIDTH_RANGE)
    path = choose_mouths(mouths, wanted)
    for index in range(start, end):
        waiting, features = known[index], wanted[index - first]
        mouth = mouths[path[index - first]]
        if before is not None and before[0] is not mouth and abs(before[0].position - mouth.position) > 1:
            fading, age = before[0], 0
        elif before is not None:
            fading, age = before[2] if len(before) > 2 else None, before[1] + 1
        else:
            fading, age = None, FADE_FRAMES
        if age >= FADE_FRAMES:
            fading = None
        anchor = steady(anchors, index)
        shot = waiting.shot
        inverse = cv2.invertAffineTransform(waiting.head)
        scale = 1 / np.sqrt(abs(np.linalg.det(waiting.head[:, :2])))
        shown = [mouth] if fading is None else [mouth, fading]
        share = (age + 1) / (FADE_FRAMES + 1)
        shares = [1.0] if fading is None else [share, 1 - share]
        lips = [apply(inverse, anchor + shape_lips(m.lips, features[0], features[1])) for m in shown]
        if waiting.generated is not None:
            insides = [missing_inside(m.features[0], features[0]) for m in shown]
            show_mouth(shot.frame, shot.landmarks[list(LIPS + RING)], scale, lips, shown, shares, insides, waiting.generated, shot.opacity)
        before = (mouth, age, fading)
    return path, before


def _fill(reads):
    known = [i for i, r in enumerate(reads) if r is not None]
    values = np.stack([reads[i] for i in known])
    return np.stack([np.interp(np.arange(len(reads)), known, values[:, k]) for k in range(values.shape[1])], axis=1)
