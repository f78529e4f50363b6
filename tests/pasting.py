"""A face crop pasted into a whole frame, as the pipeline pastes it into the part that it has on the device."""

import numpy as np
import torch

from latentsync.compositing import paste_faces, paste_rectangle


def paste(frame: torch.Tensor, face: torch.Tensor, matrix: np.ndarray, opacity: float = 1.0) -> None:
    """Paste a face (3, R, R) in [-1, 1] into a frame (H, W, 3) uint8, in place."""
    x0, y0, x1, y1 = rectangle = paste_rectangle(matrix, face.shape[-1], frame.shape)
    if x0 < x1 and y0 < y1:
        paste_faces(frame[None, y0:y1, x0:x1], face[None], [matrix], [rectangle], frame.shape, [opacity])
