"""The stage of the pipeline: shots with generated faces in, the same shots with new mouths in their frames out."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

from latentsync.alignment import crop_size
from latentsync.retarget.bank import Mouth, MouthBank, choose_mouths, features, mouth_box
from latentsync.retarget.drawing import GeneratedMouth, Layer, missing_inside, show_mouth
from latentsync.retarget.geometry import (
    LIPS,
    anchor,
    apply,
    head_similarity,
    mouth_points,
    opening,
    pixels_per_unit,
    reshape_lips,
    width,
)

READ_AT = 256  # generated faces are read at this resolution's size
BLOCK = 16  # frames whose mouths are chosen together
LOOKAHEAD = 12  # frames after a block that its choice takes into account
RUN_UP = 16  # frames before it
HELD_FRAMES = BLOCK + LOOKAHEAD  # frames that wait in this stage
CONTEXT = RUN_UP + 2 * BLOCK  # frames before the first one that is wanted, whose faces are needed for the same result

USUAL_WIDTH = 0.555  # of a mouth that the model paints
WIDTH_RANGE = (0.85, 1.12)  # of the person's own usual width
SIZE_RANGE = (0.6, 1.0)  # of an opening, as the person's mouth is narrower than the model's; wide ones only smile
STEADY = 4.0  # frames: deviation of the Gaussian over which a mouth's place and usual width are averaged
FADE_FRAMES = 3  # of a cross-fade after a jump from one mouth to another


class PaintedShot(Protocol):
    """What this stage needs of a shot.

    frame: uint8 (H, W, 3), changed in place; points: `mouth_points` of its face, None without a usable one; generated:
    uint8 (R, R, 3), an aligned face with the mouth that is wanted, None where none was painted; position: the number
    of the frame; scene: of the stretch between two cuts; opacity: 0 to 1.
    """

    frame: np.ndarray
    points: np.ndarray | None
    generated: np.ndarray | None
    position: int
    scene: int
    opacity: float


@dataclass(eq=False)
class _Entry:
    """A shot of the current run and what was measured of it; the shot is dropped when it has been passed on."""

    shot: PaintedShot | None
    head: np.ndarray  # (2, 3)
    anchor: np.ndarray  # (2,)
    features: np.ndarray  # of its own mouth
    generated: GeneratedMouth | None
    wanted: np.ndarray | None  # opening and width of the generated mouth


@dataclass(frozen=True, eq=False)
class _Shown:
    """What the last frame showed: a mouth for `age` frames, which replaces another one."""

    mouth: Mouth
    age: int
    replaced: Mouth | None


def retarget(
    shots: Iterable[PaintedShot], bank: MouthBank, read_face: Callable[[np.ndarray], np.ndarray | None]
) -> Iterator[PaintedShot]:
    """Show the mouth of every generated face in its shot's frame, and pass the shots on in order.

    read_face: the mesh (478, 2) of the face in a picture, or None. Up to HELD_FRAMES shots wait. A shot whose face was
    not painted stays as it is.
    """
    run: list[_Entry] = []  # entries before `start` only lend context
    start = 0
    shown: _Shown | None = None
    scene: int | None = None

    def finish(count: int) -> Iterator[PaintedShot]:
        nonlocal start, shown
        shown = _show_block(run, start, count, bank, shown)
        for entry in run[start : start + count]:
            shot, entry.shot, entry.generated = entry.shot, None, None
            yield shot
        start += count
        spare = max(start - max(RUN_UP, LOOKAHEAD), 0)
        del run[:spare]
        start -= spare

    def finish_run() -> Iterator[PaintedShot]:
        nonlocal start, shown
        while start < len(run):
            yield from finish(min(BLOCK, len(run) - start))
        run.clear()
        start, shown = 0, None

    for shot in shots:
        if shot.points is None or shot.scene != scene:
            yield from finish_run()
            scene = shot.scene
        if shot.points is None:
            yield shot
            continue
        run.append(_measure(shot, read_face))
        if len(run) - start >= HELD_FRAMES:
            yield from finish(BLOCK)
    yield from finish_run()


def _measure(shot: PaintedShot, read_face: Callable[[np.ndarray], np.ndarray | None]) -> _Entry:
    head = head_similarity(shot.points)
    x0, y0, x1, y1 = mouth_box(shot.points, shot.frame.shape)
    generated = wanted = None
    if shot.generated is not None:
        face = cv2.resize(shot.generated, crop_size(READ_AT), interpolation=cv2.INTER_CUBIC)
        landmarks = read_face(face)
        if landmarks is not None:
            points = mouth_points(landmarks)
            lips = apply(head_similarity(points), points[LIPS])
            generated, wanted = GeneratedMouth(face, points[LIPS]), np.array([opening(lips), width(lips)])
    lips = apply(head, shot.points[LIPS])
    return _Entry(shot, head, anchor(lips), features(shot.points, shot.frame[y0:y1, x0:x1]), generated, wanted)


def _show_block(run: list[_Entry], start: int, count: int, bank: MouthBank, shown: _Shown | None) -> _Shown | None:
    """Choose and show the mouths of `count` entries from `start` on; returns what the last one shows.

    The choice takes RUN_UP entries before and LOOKAHEAD after them into account, and nothing else.
    """
    end = start + count
    first, last = max(start - RUN_UP, 0), min(end + LOOKAHEAD, len(run))
    if all(entry.wanted is None for entry in run[first:last]):
        return None
    mouths = bank.mouths_for(run[end - 1].shot.position)
    if not mouths:
        return None
    wanted = _wanted_features(run, first, last)
    path = choose_mouths(mouths, wanted)
    anchors = np.stack([entry.anchor for entry in run])
    for index in range(start, end):
        entry, mouth = run[index], mouths[path[index - first]]
        shown = _next_shown(shown, mouth)
        if entry.generated is None:
            continue
        layers = []
        share = (shown.age + 1) / (FADE_FRAMES + 1) if shown.replaced else 1.0
        target_opening, target_width = wanted[index - first, :2]
        to_frame = cv2.invertAffineTransform(entry.head)
        for one, part in ((mouth, share), (shown.replaced, 1 - share)):
            if one is not None:
                lips = steady(anchors, index) + reshape_lips(one.lips, target_opening, target_width)
                missing = missing_inside(one.features[0], target_opening)
                layers.append(Layer(one, apply(to_frame, lips), part, missing))
        shot = entry.shot
        show_mouth(shot.frame, shot.points, pixels_per_unit(entry.head), layers, entry.generated, shot.opacity)
    return shown


def _next_shown(shown: _Shown | None, mouth: Mouth) -> _Shown:
    """What a frame shows after another: the next mouth of the film, or a new one that is faded in."""
    if shown is None:
        return _Shown(mouth, FADE_FRAMES, None)
    if abs(shown.mouth.position - mouth.position) > 1:
        return _Shown(mouth, 0, shown.mouth)
    age = shown.age + 1
    return _Shown(mouth, age, shown.replaced if age < FADE_FRAMES else None)


def _wanted_features(run: list[_Entry], first: int, last: int) -> np.ndarray:
    """The features (last - first, 6) of the mouths to be chosen: opening and width of the generated ones, smoothed over
    three frames, head, light and detail as they are."""
    known = [i for i in range(first, last) if run[i].wanted is not None]
    shapes = np.stack([run[i].wanted for i in known])
    shapes = np.stack([np.interp(np.arange(first, last), known, column) for column in shapes.T], axis=1)
    padded = np.pad(shapes, ((1, 1), (0, 0)), "edge")
    shapes = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    own = np.stack([entry.features for entry in run])
    wanted = own[first:last].copy()
    usual = np.array([steady(own[:, 1], index) for index in range(first, last)])
    wanted[:, 0] = shapes[:, 0] * np.clip(usual / USUAL_WIDTH, *SIZE_RANGE)
    wanted[:, 1] = usual * np.clip(shapes[:, 1] / USUAL_WIDTH, *WIDTH_RANGE)
    return wanted


def steady(values: np.ndarray, index: int) -> np.ndarray:
    """The Gaussian mean of values (n, …) around an index."""
    share = np.exp(-0.5 * ((np.arange(len(values)) - index) / STEADY) ** 2)
    return np.tensordot(share / share.sum(), values, 1)
