"""From followed faces to the windows that the network sees: aligned crops, cut into runs of 16 frames."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from latentsync.alignment import crop_face, estimate_matrix
from latentsync.faces import Face
from latentsync.retarget import mouth_points
from latentsync.settings import WINDOW

EMPTY = np.empty(0, np.uint8)


@dataclass
class AlignedFrame:
    """One frame on its way through the pipeline.

    frame: uint8 (H, W, 3), changed in place when its face is pasted; tokens: audio (50, d);
    crop: uint8 (R, R, 3), None without a usable face; matrix (2, 3) and opacity: how it is pasted back;
    source: the frame's number in a video that is played more than once, else None; recomputed: painted in a wider
    dtype; shot: `Face.shot`, the number of the stretch between two cuts that the frame lies in; position: the frame's
    number; points: `mouth_points` of the face; generated: uint8 (R, R, 3), the face as it was painted,
    if that is the model's own or the frame lends it; outside: the frame lies outside of the voice, and no face was
    looked for, or nobody speaks in it; number: of the frame in the film, also where the film is played again; lends:
    the face of the next frame is composed of this one's, see `between`.
    """

    frame: np.ndarray
    tokens: Tensor
    # Every frame of a window has the two; one without a face, which is in no window, has None.
    crop: np.ndarray = None  # type: ignore[assignment]
    matrix: np.ndarray = None  # type: ignore[assignment]
    opacity: float = 0.0
    source: int | None = None
    recomputed: bool = False
    shot: int = 0
    position: int = 0
    points: np.ndarray | None = None
    generated: np.ndarray | None = None
    outside: bool = False
    number: int = 0
    lends: bool = False


@dataclass(frozen=True)
class Window:
    """Consecutive frames with a face; the first `context` of them have been painted before and only lend context."""

    frames: list[AlignedFrame]
    context: int = 0

    @property
    def new(self) -> list[AlignedFrame]:
        return self.frames[self.context :]


def until_repeated(
    frames: Iterator[tuple[int, np.ndarray]], repeated: list[tuple[int, np.ndarray]]
) -> Iterator[np.ndarray]:
    """The frames until their video is played again; the first frame of that goes into `repeated`.

    frames: numbered as in the video.
    """
    for position, (number, frame) in enumerate(frames):
        if number < position:
            repeated.append((number, frame))
            return
        yield frame


def align_frames(
    tracked: Iterable[tuple[np.ndarray, Face | None]],
    tokens: Iterator[Tensor],
    resolution: int,
    max_crops: int | None = None,
    repeated: Iterable[tuple[int, np.ndarray]] = (),
) -> Iterator[AlignedFrame]:
    """Cut out the face of every frame; tokens: the audio of each frame, in step.

    repeated: numbered frames that follow, of a video that is played again: their faces are those of the first time, and
    the crops of the first `max_crops` frames, too. None: nothing is stored for them.
    """
    first_time: list[AlignedFrame] = []  # without their pixels and tokens
    bias = None
    count = 0
    for frame, face in tracked:
        aligned = AlignedFrame(frame, next(tokens), position=count, number=count)
        count += 1
        if face is None:
            bias = None
        else:
            aligned.matrix, bias = estimate_matrix(face.points, resolution, None if face.first else bias)
            aligned.crop = crop_face(frame, aligned.matrix, resolution)
            aligned.opacity, aligned.shot = face.opacity, face.shot
            aligned.points = mouth_points(face.landmarks)
        if max_crops is not None:
            has_room = len(first_time) < max_crops
            aligned.source = len(first_time) if has_room else None
            stored = replace(aligned, frame=EMPTY, tokens=torch.empty(0))
            first_time.append(stored if has_room else replace(stored, crop=None))  # type: ignore[arg-type]
        yield aligned
    for position, (number, frame) in enumerate(repeated, count):
        aligned = replace(first_time[number], frame=frame, tokens=next(tokens), position=position)
        if aligned.matrix is not None and aligned.crop is None:
            aligned.crop = crop_face(frame, aligned.matrix, resolution)
        yield aligned


def split_windows(frames: Iterable[AlignedFrame]) -> Iterator[Window | AlignedFrame]:
    """Cut runs of frames with a face into windows; frames without one come through between them, in order.

    A run ends at a frame without a face and at a cut. Its last window is slid back so that it is full: norms and
    temporal attention see every frame of a window, so a padded one would change the real frames, and one that held
    two shots would mix their colours. A run shorter than a window is one at its true length.
    """
    previous: list[AlignedFrame] = []  # the run's last window, for context
    waiting: list[AlignedFrame] = []

    def end_run() -> Iterator[Window]:
        if waiting:
            context = previous[len(previous) - (WINDOW - len(waiting)) :] if previous else []
            yield Window(context + waiting, len(context))

    for aligned in frames:
        if aligned.crop is None:
            yield from end_run()
            previous, waiting = [], []
            yield aligned
            continue
        if (waiting or previous) and (waiting or previous)[-1].shot != aligned.shot:
            yield from end_run()
            previous, waiting = [], []
        waiting.append(aligned)
        if len(waiting) == WINDOW:
            yield Window(waiting)
            previous, waiting = waiting, []
    yield from end_run()


def group_windows(
    parts: Iterable[Window | AlignedFrame], windows_per_group: int
) -> Iterator[list[Window | AlignedFrame]]:
    """Group windows and single frames, in order, up to that many windows and not many more frames than they hold."""
    group: list[Window | AlignedFrame] = []
    windows = frames = 0
    for part in parts:
        group.append(part)
        windows += isinstance(part, Window)
        frames += len(part.frames) if isinstance(part, Window) else 1
        if windows == windows_per_group or frames >= windows_per_group * WINDOW:
            yield group
            group, windows, frames = [], 0, 0
    if group:
        yield group
