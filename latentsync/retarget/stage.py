"""The pipeline stage: frames with generated faces in, the same frames with new mouths out."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, Protocol, TypeVar

import cv2
import numpy as np

from latentsync import FPS
from latentsync.alignment import crop_size
from latentsync.rates import scale_frames
from latentsync.retarget.bank import MouthBank
from latentsync.retarget.drawing import Layer, draw_mouths, missing_inside
from latentsync.retarget.geometry import (
    LIPS,
    head_similarity,
    lip_anchor,
    lip_opening,
    lip_width,
    mouth_points,
    pixels_per_unit,
    reshape_lips,
    transform,
)
from latentsync.retarget.mouths import OPENING, WIDTH, Mouth, choose_mouths, mouth_box, mouth_features

READ_RESOLUTION = 256  # generated faces are resized to it before their landmarks are read
# At 25 frames a second, see `Horizon`.
BLOCK = 16  # frames whose mouths are chosen together
LOOKAHEAD = 12  # frames after a block that its choice takes into account
LOOKBACK = 16  # frames before it

USUAL_WIDTH = 0.555  # of a mouth that the model paints
MIN_WIDTH, MAX_WIDTH = 0.85, 1.0  # of the usual width: lips round, but the corners of wider ones stick out of the patch
MIN_SIZE, MAX_SIZE = 0.6, 1.0  # of an opening, as the person's mouth may be narrower than the model's
SMOOTHING_SIGMA = 4.0  # frames at 25 a second, for a mouth's place and usual width

ReadFace = Callable[[np.ndarray], np.ndarray | None]  # the mesh (478, 2) of the face in a picture, or None


class RetargetFrame(Protocol):
    """A frame as this stage needs it.

    frame: uint8 (H, W, 3), changed in place; points: `mouth_points` of its face, None without a usable one; generated:
    uint8 (R, R, 3), an aligned face with the target mouth, None where none was painted; position: the frame's number;
    shot: number of the stretch between two cuts; opacity: 0 to 1.
    """

    frame: np.ndarray
    points: np.ndarray | None
    generated: np.ndarray | None
    position: int
    shot: int
    opacity: float


Frame = TypeVar("Frame", bound=RetargetFrame)


@dataclass(frozen=True, eq=False)
class Horizon:
    """How far a choice of mouths looks, in frames of a film: always the same time."""

    rate: Fraction  # frames a second
    block: int  # see BLOCK and so on
    lookahead: int
    lookback: int
    sigma: float  # see SMOOTHING_SIGMA
    fade: int  # frames in which a jump shows both mouths
    kernel: np.ndarray  # that smooths generated shapes

    @classmethod
    def at(cls, rate: Fraction) -> "Horizon":
        block, lookahead, lookback = (scale_frames(frames, rate) for frames in (BLOCK, LOOKAHEAD, LOOKBACK))
        sigma, fade = SMOOTHING_SIGMA * float(rate / FPS), scale_frames(1, rate)
        return cls(rate, block, lookahead, lookback, sigma, fade, shape_kernel(rate))

    @property
    def held(self) -> int:
        """Frames that wait in this stage."""
        return self.block + self.lookahead


def held_frames(rate: Fraction) -> int:
    """Frames that wait in this stage, of a film of `rate` frames a second."""
    return Horizon.at(rate).held


def context_frames(rate: Fraction) -> int:
    """Frames before the first new one whose faces a resumed run needs for the same result."""
    horizon = Horizon.at(rate)
    return horizon.lookback + 2 * horizon.block


def shape_kernel(rate: Fraction) -> np.ndarray:
    """Weights, an odd number, that smooth shapes over time: ¼, ½, ¼ up to 30 a second.

    The binomial ones of the same width in time at higher rates: their variance is a quarter of their order.
    """
    order = 2 * scale_frames(1, rate * rate / FPS)
    weights = np.ones(1)
    for _ in range(order):
        weights = np.convolve(weights, (0.5, 0.5))
    return weights


@dataclass(frozen=True, eq=False)
class _Measured:
    """Measurements of a frame."""

    points: np.ndarray  # (73, 2)
    head: np.ndarray  # (2, 3)
    anchor: np.ndarray  # (2,)
    features: np.ndarray  # (6,) of the mouth in the source
    target: np.ndarray | None  # (2,) opening and width of the generated mouth, where there is one


def retarget(
    frames: Iterable[Frame], bank: MouthBank, read_face: ReadFace, rate: Fraction = Fraction(FPS)
) -> Iterator[Frame]:
    """Draw the mouth of every generated face into its frame, and yield the frames, `rate` a second, in order.

    Up to `held_frames` wait. A frame whose face was not painted stays as it is.
    """
    horizon = Horizon.at(rate)
    run: _Run[Frame] = _Run(bank, horizon)
    shot: int | None = None
    for frame in frames:
        if frame.points is None or frame.shot != shot:
            yield from run.finish()
            run, shot = _Run(bank, horizon), frame.shot
        if frame.points is None:
            yield frame
            continue
        run.append(frame, _measure(frame, frame.points, read_face))
        if len(run.waiting) >= horizon.held:
            yield from run.draw(horizon.block)
    yield from run.finish()


def _measure(frame: RetargetFrame, points: np.ndarray, read_face: ReadFace) -> _Measured:
    head = head_similarity(points)
    x0, y0, x1, y1 = mouth_box(points, frame.frame.shape)
    features = mouth_features(points, frame.frame[y0:y1, x0:x1])
    target = None
    if frame.generated is not None:
        face = cv2.resize(frame.generated, crop_size(READ_RESOLUTION), interpolation=cv2.INTER_CUBIC)
        landmarks = read_face(face)
        if landmarks is not None:
            painted = mouth_points(landmarks)
            lips = transform(head_similarity(painted), painted[LIPS])
            target = np.array([lip_opening(lips), lip_width(lips)])
    return _Measured(points, head, lip_anchor(transform(head, points[LIPS])), features, target)


class _Run(Generic[Frame]):
    """Consecutive frames with a face, without a cut."""

    def __init__(self, bank: MouthBank, horizon: Horizon):
        self.bank, self.horizon = bank, horizon
        self.waiting: deque[Frame] = deque()
        self.measured: list[_Measured] = []  # of the waiting frames, after those of frames that lend context
        self.last_mouth: Mouth | None = None  # chosen for the frame before
        self.fading: tuple[Mouth, int] | None = None  # a mouth that is left by a jump, and for how many frames yet

    def append(self, frame: Frame, measured: _Measured) -> None:
        self.waiting.append(frame)
        self.measured.append(measured)

    def finish(self) -> Iterator[Frame]:
        while self.waiting:
            yield from self.draw(min(self.horizon.block, len(self.waiting)))

    def draw(self, count: int) -> Iterator[Frame]:
        """Draw the mouths of the next `count` frames, and yield these."""
        self._draw_mouths(count)
        for _ in range(count):
            yield self.waiting.popleft()
        start = len(self.measured) - len(self.waiting)
        del self.measured[: max(start - self.horizon.lookback, 0)]

    def _draw_mouths(self, count: int) -> None:
        """Choose and draw the mouths of the next `count` frames.

        The choice takes the frames of the horizon before and after them into account, and nothing else.
        """
        horizon, start = self.horizon, len(self.measured) - len(self.waiting)
        first = max(start - horizon.lookback, 0)
        last = min(start + count + horizon.lookahead, len(self.measured))
        mouths: tuple[Mouth, ...] = ()
        if any(measured.target is not None for measured in self.measured[first:last]):
            mouths = self.bank.mouths_for(self.waiting[count - 1].position)
        if not mouths:
            self.last_mouth = self.fading = None
            return
        targets = _target_features(self.measured, first, last, horizon)
        path = choose_mouths(mouths, targets, horizon.rate)
        anchors = np.stack([measured.anchor for measured in self.measured])
        for index, frame in zip(range(start, start + count), self.waiting, strict=False):
            mouth = mouths[path[index - first]]
            blend = self.blend(mouth)
            anchor = gaussian_mean(anchors, index, horizon.sigma)
            _draw_frame(frame, self.measured[index], blend, anchor, targets[index - first])

    def blend(self, mouth: Mouth) -> list[tuple[Mouth, float]]:
        """Mouths to draw for the next frame, and their weights; mouth: the one that was chosen.

        A jump in the film is softened by frames of both mouths, one at 25 a second; more would blur.
        """
        if self.last_mouth is not None and abs(self.last_mouth.position - mouth.position) > 1:
            self.fading = self.last_mouth, self.horizon.fade
        self.last_mouth = mouth
        if self.fading is None:
            return [(mouth, 1.0)]
        last, left = self.fading
        self.fading = (last, left - 1) if left > 1 else None
        weight = left / (self.horizon.fade + 1)
        return [(last, weight), (mouth, 1 - weight)]


def _draw_frame(
    frame: RetargetFrame,
    measured: _Measured,
    blend: list[tuple[Mouth, float]],
    anchor: np.ndarray,
    target: np.ndarray,
) -> None:
    """Draw a blend of mouths into a frame, with their anchor at (2,) in head units and target features (6,)."""
    if measured.target is None:
        return
    to_frame = cv2.invertAffineTransform(measured.head)
    layers = []
    for mouth, weight in blend:
        lips = anchor + reshape_lips(mouth.lips, target[OPENING], target[WIDTH])
        missing = missing_inside(mouth.features[OPENING], target[OPENING])
        layers.append(Layer(mouth, transform(to_frame, lips), weight, missing))
    scale = pixels_per_unit(measured.head)
    draw_mouths(frame.frame, measured.points, scale, layers, frame.opacity)


def _target_features(frames: list[_Measured], first: int, last: int, horizon: Horizon) -> np.ndarray:
    """Features (last - first, 6) of the mouths to be chosen for a range of frames.

    Opening and width are the generated mouth's, smoothed; pose, light and detail the frame's own.
    """
    painted = {i: target for i in range(first, last) if (target := frames[i].target) is not None}
    columns = np.stack(list(painted.values())).T
    shapes = np.stack([np.interp(np.arange(first, last), list(painted), column) for column in columns], axis=1)
    reach = len(horizon.kernel) // 2
    padded = np.pad(shapes, ((reach, reach), (0, 0)), "edge")
    parts = [weight * padded[i : i + len(shapes)] for i, weight in enumerate(horizon.kernel)]
    shapes = np.sum(parts, axis=0)
    features = np.stack([measured.features for measured in frames])
    usual_width = np.array([gaussian_mean(features[:, WIDTH], index, horizon.sigma) for index in range(first, last)])
    targets = features[first:last].copy()
    targets[:, OPENING] = shapes[:, 0] * np.clip(usual_width / USUAL_WIDTH, MIN_SIZE, MAX_SIZE)
    targets[:, WIDTH] = usual_width * np.clip(shapes[:, 1] / USUAL_WIDTH, MIN_WIDTH, MAX_WIDTH)
    return targets


def gaussian_mean(values: np.ndarray, index: int, sigma: float = SMOOTHING_SIGMA) -> np.ndarray:
    """Mean of values (n, …), weighted by a Gaussian around an index."""
    weights = np.exp(-0.5 * ((np.arange(len(values)) - index) / sigma) ** 2)
    return np.tensordot(weights / weights.sum(), values, 1)
