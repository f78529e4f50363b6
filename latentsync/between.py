"""Frames between two painted ones, for films of many frames a second of which every second one is painted.

between = FramesBetween(models.face is not None, models.resolution, device)
finished = between.put_back(paint_groups(group_windows(split_windows(between.leave_out(frames)), …), painter))
"""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain

import cv2
import numpy as np
import torch

from latentsync.alignment import fixed_mask
from latentsync.compositing import merge_faces, paste_faces, paste_rectangle
from latentsync.windows import AlignedFrame

FLOW_SIDE = 256  # pixels of the faces in which motion is looked for


class FramesBetween:
    """Leaves every second frame of a run of faces out of what is painted, and puts it back with a face of its own.

    That face lies midway between the two painted ones beside it; at the end of a run it is the one before. It is
    pasted with the frame's own matrix and opacity over the frame's own crop, so nothing else of the frame changes.
    Painted faces are wanted as `AlignedFrame.generated`, see `AlignedFrame.lends`.

    own_face: the model paints a face of its own, which is handed on instead of being pasted; resolution: of the model;
    device: that pastes, in a CUDA stream of its own, so that no denoising is waited for.
    """

    def __init__(self, own_face: bool, resolution: int, device: torch.device):
        self._own_face = own_face
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._mask = torch.from_numpy(fixed_mask(resolution).copy()).to(device)
        self._left_out: deque[tuple[AlignedFrame, AlignedFrame]] = deque()  # the painted frame before, and the frame

    def leave_out(self, frames: Iterable[AlignedFrame]) -> Iterator[AlignedFrame]:
        """The frames to paint, and those without a face: a run begins with a painted frame, as `split_windows` cuts
        it.
        """
        painted: AlignedFrame | None = None  # the frame before, if it is painted
        for frame in frames:
            if painted is not None and continues(painted, frame):
                self._left_out.append((painted, frame))
                painted = None
                continue
            painted = None if frame.crop is None else frame
            if painted is not None:
                painted.lends = True
            yield frame

    def put_back(self, frames: Iterable[AlignedFrame]) -> Iterator[AlignedFrame]:
        """All frames in order; frames: what `leave_out` has yielded, painted."""
        before: AlignedFrame | None = None
        for frame in chain(frames, [None]):
            # Only now has `leave_out` surely read what follows the frame before.
            if self._left_out and self._left_out[0][0] is before:
                before, between = self._left_out.popleft()
                self._compose(between, before, frame if frame is not None and continues(between, frame) else None)
                yield between
            if frame is not None:
                yield frame
            before = frame

    def _compose(self, frame: AlignedFrame, before: AlignedFrame, after: AlignedFrame | None) -> None:
        """Give a frame its face; none where an earlier run has finished those beside it."""
        faces = [each.generated for each in (before, after) if each is not None and each.generated is not None]
        if not faces:
            return
        face = midway_face(*faces) if len(faces) == 2 else faces[0]
        if self._own_face:
            frame.generated = face
        else:
            with torch.cuda.stream(self._stream):  # None: no change
                show_face(frame, face, self._mask)


@torch.inference_mode()
def show_face(frame: AlignedFrame, face: np.ndarray, mask: torch.Tensor) -> None:
    """Lay a face uint8 (R, R, 3) over a frame's own crop, and paste that; mask: `fixed_mask`, on the device to use."""
    generated = torch.from_numpy(face).to(mask.device).permute(2, 0, 1)[None].float() / 127.5 - 1
    merged = merge_faces(generated, torch.from_numpy(frame.crop[None]).to(mask.device), mask)
    x0, y0, x1, y1 = rectangle = paste_rectangle(frame.matrix, len(mask), frame.frame.shape)
    pixels = frame.frame[y0:y1, x0:x1]
    if pixels.size:
        region = torch.from_numpy(pixels).to(mask.device)[None]
        paste_faces(region, merged, [frame.matrix], [rectangle], frame.frame.shape, [frame.opacity])
        pixels[...] = region[0].cpu().numpy()


def continues(before: AlignedFrame, after: AlignedFrame) -> bool:
    """Whether two frames, one after the other in a film, are of one run of faces."""
    return before.crop is not None and after.crop is not None and before.shot == after.shot


def mean_face(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The mean of two faces, uint8 (R, R, 3)."""
    return cv2.addWeighted(before, 0.5, after, 0.5, 0)


def midway_face(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The mean of two faces uint8 (R, R, 3), each moved half the way to the other: dense optical flow (DIS).

    A mean alone shows two edges where lips have moved by more than the width of an edge.
    """
    side = before.shape[0]
    greys = [
        cv2.resize(cv2.cvtColor(face, cv2.COLOR_RGB2GRAY), (FLOW_SIDE, FLOW_SIDE), interpolation=cv2.INTER_AREA)
        for face in (before, after)
    ]
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    place = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).astype(np.float32)
    moved = []
    for face, pair in (before, greys), (after, greys[::-1]):
        small = search.calc(*pair, None)  # type: ignore[call-overload]  # its types do not know that flow may be None
        flow = cv2.resize(small, (side, side)) * (side / FLOW_SIDE)
        # What lies here midway has come from about half the flow before here.
        moved.append(cv2.remap(face, place - 0.5 * flow, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))
    return mean_face(*moved)
