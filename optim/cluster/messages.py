"""What travels between the driver and its workers: windows to paint, and the pixels that came out.

Both are a few large arrays, which Ray passes through shared memory on one machine without copying them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from latentsync.compositing import paste_rectangle
from latentsync.painting import Group
from latentsync.windows import EMPTY, AlignedFrame, Window


@dataclass(frozen=True)
class PaintTask:
    """The windows of one group.

    windows: the number of frames and of context frames of each; the n frames of all windows, one after the other, have
    tokens (n, 50, d) float32, source, lends, crops (n, R, R, 3) uint8, matrices (n, 2, 3), opacities. regions: uint8,
    the parts of the m new frames that pasting may change, flat, one after the other; shape: of those frames. A model
    with a face of its own needs neither crops nor regions, which are then empty.
    """

    windows: list[tuple[int, int]]
    tokens: np.ndarray
    sources: list[int | None]
    lends: list[bool]
    crops: np.ndarray
    matrices: np.ndarray
    opacities: list[float]
    regions: np.ndarray
    shape: tuple[int, ...]

    @property
    def new_frames(self) -> int:
        return sum(frames - context for frames, context in self.windows)


@dataclass(frozen=True)
class PaintedGroup:
    """The new frames of a `PaintTask`, painted.

    pixels: uint8, the regions as in the task; faces: uint8 (k, R, R, 3), of the frames that lend theirs, or, of a model
    with a face of its own, of all m: then pixels is empty. recomputed: which frames were painted in a wider dtype.
    messages: what the user should know, such as that memory ran short.
    """

    pixels: np.ndarray
    faces: np.ndarray
    recomputed: list[bool]
    messages: list[str]


def pack(group: Group, resolution: int, own_face: bool) -> PaintTask | None:
    """The task of painting a group's windows; None where it has none. own_face: the model paints a face of its own."""
    windows = [part for part in group if isinstance(part, Window)]
    if not windows:
        return None
    frames = [frame for window in windows for frame in window.frames]
    regions = [] if own_face else [region.ravel() for region in _regions(group, resolution)]
    return PaintTask(
        windows=[(len(window.frames), window.context) for window in windows],
        tokens=torch.stack([frame.tokens for frame in frames]).numpy(),
        sources=[frame.source for frame in frames],
        lends=[frame.lends for frame in frames],
        crops=EMPTY if own_face else np.stack([frame.crop for frame in frames]),
        matrices=np.stack([frame.matrix for frame in frames]),
        opacities=[frame.opacity for frame in frames],
        regions=np.concatenate(regions) if regions else EMPTY,
        shape=frames[0].frame.shape,
    )


def unpack(task: PaintTask, resolution: int) -> list[Window]:
    """The windows of a task. Their new frames hold the pixels of their regions, and nothing elsewhere."""
    tokens = torch.from_numpy(task.tokens.copy())  # Ray's arrays are read-only
    own_face = not len(task.crops)
    offset, number, windows = 0, 0, []
    for length, context in task.windows:
        frames = []
        for index in range(number, number + length):
            frame = AlignedFrame(
                EMPTY,
                tokens[index],
                EMPTY if own_face else task.crops[index],
                task.matrices[index],
                task.opacities[index],
                task.sources[index],
                lends=task.lends[index],
            )
            if index >= number + context and not own_face:
                x0, y0, x1, y1 = paste_rectangle(frame.matrix, resolution, task.shape)
                frame.frame = np.empty(task.shape, np.uint8)  # takes only the memory that is written to
                region = frame.frame[y0:y1, x0:x1]
                region[...] = task.regions[offset : offset + region.size].reshape(region.shape)
                offset += region.size
            frames.append(frame)
        windows.append(Window(frames, context))
        number += length
    return windows


def pack_result(windows: list[Window], resolution: int, own_face: bool, messages: list[str]) -> PaintedGroup:
    """The pixels of painted windows."""
    frames = [frame for window in windows for frame in window.new]
    generated = [frame.generated for frame in frames if frame.generated is not None]
    faces = np.stack(generated) if generated else EMPTY
    regions = [] if own_face else [region.ravel() for region in _regions(list(windows), resolution)]
    pixels = np.concatenate(regions) if regions else EMPTY
    return PaintedGroup(pixels, faces, [frame.recomputed for frame in frames], messages)


def unpack_result(painted: PaintedGroup, group: Group, resolution: int, own_face: bool) -> None:
    """Put painted pixels into the frames of their group, in place."""
    frames = [frame for part in group if isinstance(part, Window) for frame in part.new]
    for frame, recomputed in zip(frames, painted.recomputed, strict=True):
        frame.recomputed = recomputed
    for frame, face in zip((frame for frame in frames if own_face or frame.lends), painted.faces, strict=True):
        frame.generated = face.copy()
    if own_face:
        return
    offset = 0
    for region in _regions(group, resolution):
        region[...] = painted.pixels[offset : offset + region.size].reshape(region.shape)
        offset += region.size


def _regions(group: Group, resolution: int) -> Iterator[np.ndarray]:
    """The parts of a group's new frames that pasting may change, as views."""
    for part in group:
        for frame in part.new if isinstance(part, Window) else ():
            x0, y0, x1, y1 = paste_rectangle(frame.matrix, resolution, frame.frame.shape)
            yield frame.frame[y0:y1, x0:x1]
