"""Real clips with sound, followed and aligned: what is measured against."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentsync import FPS
from latentsync.alignment import crop_face, crop_size, estimate_matrix
from latentsync.corpus import HELD_OUT_EVERY, HELD_OUT_SPEAKERS, LIPS, is_held_out, list_clips
from latentsync.errors import UserError
from latentsync.faces import Face, track_faces
from latentsync.landmarks import mouth_opening
from latentsync.media import probe_video, read_audio, read_frames

SIDE = 256  # pixels of the crops that are measured, whatever the model's resolution
MOST_FRAMES = 10 * FPS  # of a clip; all are held
TRACKS = 10  # among which the true one is to be found


@dataclass(frozen=True, eq=False)
class Seen:
    """Frames and the face in each, and what the measures need of them.

    frames: uint8 (n, H, W, 3); faces: n; crops: uint8 (n, SIDE, SIDE, 3); lips: (n, 40, 2), pixels of the crop;
    opening: (n,), see `faces.mouth_opening`. NaN and grey where there is no face.
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
    seen: Seen
    wav: np.ndarray  # (samples,) float32 at 16 kHz


def alignments(faces: list[Face | None]) -> list[np.ndarray | None]:
    """The matrix (2, 3) of every face at SIDE pixels, as the pipeline aligns it."""
    out, bias = [], None
    for face in faces:
        matrix, bias = (
            (None, None) if face is None else estimate_matrix(face.points, SIDE, None if face.first else bias)
        )
        out.append(matrix)
    return out


def look(frames: np.ndarray, like: list[Face | None] | None = None) -> Seen:
    """Find the face in frames (n, H, W, 3); like: faces to align by, else its own.

    A result is aligned like its source, so that both are compared pixel by pixel.
    """
    faces = [face for _, face in track_faces(iter(frames))]
    to_square = SIDE / np.array(crop_size(SIDE))
    shift = (to_square - 1) / 2  # pixel centres are at whole numbers
    crops, lips = [], []
    for frame, face, matrix in zip(frames, faces, alignments(like or faces), strict=False):
        crops.append(np.full((SIDE, SIDE, 3), 127, np.uint8) if matrix is None else crop_face(frame, matrix, SIDE))
        points = np.full((len(LIPS), 2), np.nan)
        if face is not None and matrix is not None:
            points = (face.landmarks[list(LIPS)] @ matrix[:, :2].T + matrix[:, 2]) * to_square + shift
        lips.append(points)
    opening = [np.nan if face is None else mouth_opening(face.landmarks) for face in faces]
    return Seen(frames, faces, np.stack(crops), np.stack(lips), np.array(opening))


def read_clip(speaker: str, path: Path) -> Clip:
    """Raises UserError where the file has no picture, sound or face."""
    wav = read_audio(path)
    seen = look(np.stack(list(read_frames(probe_video(path), count=MOST_FRAMES))))
    if np.isfinite(seen.opening).sum() < FPS // 2:
        raise UserError(f"'{path}' shows no face for half a second: take a clip in which one is seen from the front.")
    return Clip(speaker, path.stem, seen, wav)


def held_out(folder: Path, speakers: list[str] | None) -> dict[str, list[Path]]:
    """The clips of FOLDER/SPEAKER/CLIP.mp4 that training holds out.

    Counted as `latentsync.training prepare` counts them where it skips none. Raises UserError where there are none.
    """
    files: dict[str, list[Path]] = {}
    for speaker, path in list_clips(folder):
        files.setdefault(speaker, []).append(path)
    if unknown := sorted(set(speakers or ()) - set(files)):
        raise UserError(f"'{folder}' has no clips of {', '.join(unknown)}: give names of its folders.")
    found = {
        speaker: [path for i, path in enumerate(paths) if is_held_out(speaker, i, len(paths))]
        for speaker, paths in files.items()
        if not speakers or speaker in speakers
    }
    found = {speaker: paths for speaker, paths in found.items() if paths}
    if sum(map(len, found.values())) < 2:
        raise UserError(
            f"'{folder}' has no two clips that training holds out: add some of {', '.join(HELD_OUT_SPEAKERS)}, or more "
            f"than {HELD_OUT_EVERY} of one person."
        )
    return found
