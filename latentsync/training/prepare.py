"""Turn talking-head clips into one compact training set: aligned crops, lip landmarks, mel spectra.

The result is a folder of two files: `crops.mp4`, all clips end to end, each frame the aligned face with a margin for
geometric augmentation, and `clips.npz` with the rest.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import torch
from tqdm import tqdm

from latentsync import FPS, SAMPLE_RATE
from latentsync.alignment import crop_size, estimate_matrix
from latentsync.audio import log_powers
from latentsync.corpus import LIPS, MARGIN, MEL_BASE, MEL_PER_FRAME, MEL_STEP, N_MELS, RESOLUTION, SIDE
from latentsync.errors import UserError
from latentsync.faces import track_faces
from latentsync.media import probe_video, read_audio, read_frames

log = logging.getLogger(__name__)

SUPERSAMPLE = 2  # crops are rendered at this multiple of their size and shrunk


@dataclass(frozen=True)
class AlignedClip:
    """frames uint8 (n, SIDE, SIDE, 3); lips float32 (n, 40, 2), pixels of the inner crop; mel uint8 (4n, 80)."""

    frames: np.ndarray
    lips: np.ndarray
    mel: np.ndarray


def canvas_matrix(matrix: np.ndarray) -> np.ndarray:
    """The matrix (2, 3) from the frame to the crop with its margin, for that of `alignment` to the warped face."""
    width, height = crop_size(RESOLUTION)
    scale = np.array([RESOLUTION / width, RESOLUTION / height])
    out = np.asarray(matrix, np.float64) * scale[:, None]
    out[:, 2] += (scale - 1) / 2 + MARGIN  # pixel centres at whole numbers
    return out


def align_clip(path: Path) -> AlignedClip | None:
    """The longest run of frames with a face; None if it is shorter than a second, or the sound is."""
    info = probe_video(path)
    wav = torch.from_numpy(read_audio(path))
    frames: list[np.ndarray] = []
    lips: list[np.ndarray] = []
    runs = [0]  # number of frames with a face up to and including each frame
    bias = None
    for frame, face in track_faces(read_frames(info)):
        if face is None or face.opacity < 1:
            bias = None
            runs.append(0)
            frames.append(np.empty(0))
            lips.append(np.empty(0))
            continue
        matrix, bias = estimate_matrix(face.points, RESOLUTION, None if face.first else bias)
        to_canvas = canvas_matrix(matrix)
        fine = to_canvas * SUPERSAMPLE
        fine[:, 2] += (SUPERSAMPLE - 1) / 2
        big = cv2.warpAffine(frame, fine, (SIDE * SUPERSAMPLE,) * 2, borderMode=cv2.BORDER_REPLICATE)
        frames.append(cv2.resize(big, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
        points = face.landmarks[list(LIPS)]
        lips.append(points @ to_canvas[:, :2].T + to_canvas[:, 2] - MARGIN)
        runs.append(runs[-1] + 1)
    length = max(runs)
    end = runs.index(length)
    if length < FPS or len(wav) < SAMPLE_RATE:
        return None
    start = end - length
    mel = torch.cat(list(log_powers(wav, N_MELS)), dim=1).T.numpy()
    mel = np.clip(np.round((mel - MEL_BASE) / MEL_STEP), 0, 255).astype(np.uint8)
    mel = mel[start * MEL_PER_FRAME : end * MEL_PER_FRAME]
    length = min(length, len(mel) // MEL_PER_FRAME)
    return AlignedClip(
        np.stack(frames[start : start + length]),
        np.stack(lips[start : start + length]).astype(np.float32),
        mel[: length * MEL_PER_FRAME],
    )


def prepare(clips: Iterable[tuple[str, Path]], folder: Path, crf: int) -> None:
    """Write `crops.mp4` and `clips.npz` of (speaker, file) pairs into `folder`.

    crf: x264's quality of the crops, 0 to 51.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names, speakers, lengths, lips, mels = [], [], [], [], []
    writer = imageio_ffmpeg.write_frames(
        str(folder / "crops.mp4"),
        (SIDE, SIDE),
        fps=FPS,
        codec="libx264",
        macro_block_size=1,
        output_params=["-crf", str(crf), "-preset", "slow", "-g", "250"],
    )
    writer.send(None)
    try:
        for speaker, path in tqdm(list(clips), desc="aligning", unit="clip"):
            try:
                clip = align_clip(path)
            except UserError as error:
                log.warning("%s", error)
                continue
            if clip is None:
                continue
            for frame in clip.frames:
                writer.send(np.ascontiguousarray(frame))
            names.append(path.stem)
            speakers.append(speaker)
            lengths.append(len(clip.frames))
            lips.append(clip.lips)
            mels.append(clip.mel)
    finally:
        writer.close()
    if not names:
        raise UserError(f"None of the clips shows a talking face; nothing was written to '{folder}'.")
    np.savez_compressed(
        folder / "clips.npz",
        names=np.array(names),
        speakers=np.array(speakers),
        lengths=np.array(lengths),
        lips=np.concatenate(lips).astype(np.float16),
        mel=np.concatenate(mels),
    )
