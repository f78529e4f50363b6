"""Real clips with sound, their faces tracked and aligned: the ground truth of the measures."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from latentsync import FPS
from latentsync.alignment import OUTSIDE_GREY, crop_face, crop_size, estimate_matrix
from latentsync.corpus import HELD_OUT_EVERY, HELD_OUT_SPEAKERS, LIPS, is_held_out, list_clips
from latentsync.errors import UserError
from latentsync.faces import Face, track_faces
from latentsync.landmarks import mouth_opening
from latentsync.media import probe_video, read_audio, read_frames

SIDE = 256  # pixels of the crops that are measured, whatever the model's resolution
MAX_FRAMES = 10 * FPS  # of a clip; all are held in memory
MAX_TRACKS = 10  # mouth openings to identify the true one among


@dataclass(frozen=True, eq=False)
class FaceTrack:
    """Frames with the face in each, and the inputs of the measures.

    frames: uint8 (n, H, W, 3); faces: n; crops: uint8 (n, SIDE, SIDE, 3); lips: (n, 40, 2), pixels of the crop;
    opening: (n,), see `landmarks.mouth_opening`. NaN and grey where there is no face.
    """

    frames: np.ndarray
    faces: list[Face | None]
    crops: np.ndarray
    lips: np.ndarray
    opening: np.ndarray


@dataclass(frozen=True, eq=False)
class Clip:
    speaker: str
    name: str
    track: FaceTrack
    wav: np.ndarray  # (samples,) float32 at 16 kHz


def alignment_matrices(faces: list[Face | None]) -> list[np.ndarray | None]:
    """The matrix (2, 3) of every face at SIDE pixels, as in the pipeline."""
    matrices: list[np.ndarray | None] = []
    bias = matrix = None
    for face in faces:
        if face is None:
            matrix = bias = None
        else:
            matrix, bias = estimate_matrix(face.points, SIDE, None if face.first else bias)
        matrices.append(matrix)
    return matrices


def track_clip(frames: np.ndarray, align_as: list[Face | None] | None = None, rate: int = FPS) -> FaceTrack:
    """Track the face in frames (n, H, W, 3), `rate` a second; align_as: faces to align by, by default its own.

    A result is aligned by the faces of its source, so that both are compared pixel by pixel.
    """
    faces = [face for _, face in track_faces(iter(frames), rate=Fraction(rate))]
    scale = SIDE / np.array(crop_size(SIDE))
    shift = (scale - 1) / 2  # pixel centres are at whole numbers
    crops, lips = [], []
    for frame, face, matrix in zip(frames, faces, alignment_matrices(align_as or faces), strict=False):
        points = np.full((len(LIPS), 2), np.nan)
        if matrix is None:
            crop = np.full((SIDE, SIDE, 3), OUTSIDE_GREY, np.uint8)
        else:
            crop = crop_face(frame, matrix, SIDE)
            if face is not None:
                points = (face.landmarks[list(LIPS)] @ matrix[:, :2].T + matrix[:, 2]) * scale + shift
        crops.append(crop)
        lips.append(points)
    opening = [np.nan if face is None else mouth_opening(face.landmarks) for face in faces]
    return FaceTrack(frames, faces, np.stack(crops), np.stack(lips), np.array(opening))


def read_clip(speaker: str, path: Path) -> Clip:
    """Read and track a clip. Raises UserError if the file has no video, sound or face."""
    wav = read_audio(path)
    track = track_clip(np.stack(list(read_frames(probe_video(path), count=MAX_FRAMES))))
    if np.isfinite(track.opening).sum() < FPS // 2:
        raise UserError(f"'{path}' shows no face for half a second: take a clip in which one is seen from the front.")
    return Clip(speaker, path.stem, track, wav)


def held_out_clips(folder: Path, speakers: list[str] | None, every: bool = False) -> dict[str, list[Path]]:
    """The clips of FOLDER/SPEAKER/CLIP.mp4 that training holds out, by speaker; every: all clips of the folder.

    Numbered as by `latentsync.training prepare` if it skips none. Raises UserError if there are fewer than two.
    """
    files: dict[str, list[Path]] = {}
    for speaker, path in list_clips(folder):
        files.setdefault(speaker, []).append(path)
    if unknown := sorted(set(speakers or ()) - set(files)):
        raise UserError(f"'{folder}' has no clips of {', '.join(unknown)}: give names of its folders.")
    held_out = {
        speaker: [path for i, path in enumerate(paths) if every or is_held_out(speaker, i, len(paths))]
        for speaker, paths in files.items()
        if not speakers or speaker in speakers
    }
    held_out = {speaker: paths for speaker, paths in held_out.items() if paths}
    if sum(map(len, held_out.values())) < 2:
        raise UserError(
            f"'{folder}' has no two clips that training holds out: add some of {', '.join(HELD_OUT_SPEAKERS)}, or more "
            f"than {HELD_OUT_EVERY} of one person."
        )
    return held_out
