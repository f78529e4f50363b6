"""Pictures for the eye: contact sheets of faces, and a strip of frames over the waveform."""

from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from latentsync import FPS, SAMPLE_RATE
from latentsync.errors import UserError
from latentsync.media import probe_video, read_audio, read_frames_looped
from latentsync.paths import write_bytes

COLUMNS = 8
CELL = 160  # pixels
TITLE_HEIGHT, WAVE_HEIGHT = 24, 60  # pixels
INK, PAPER = (90, 60, 30), 255


def spread(count: int) -> list[int]:
    """The middle frames of COLUMNS equal parts of `count` frames."""
    return [(2 * i + 1) * count // (2 * COLUMNS) for i in range(COLUMNS)]


def square(frame: np.ndarray) -> np.ndarray:
    """The middle square of a frame (H, W, 3), CELL pixels wide."""
    side = min(frame.shape[:2])
    y, x = ((length - side) // 2 for length in frame.shape[:2])
    return cv2.resize(frame[y : y + side, x : x + side], (CELL, CELL), interpolation=cv2.INTER_AREA)


def title(text: str) -> np.ndarray:
    """A line of text, as wide as a row."""
    line = np.full((TITLE_HEIGHT, COLUMNS * CELL, 3), PAPER, np.uint8)
    cv2.putText(line, text, (6, TITLE_HEIGHT - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.5, INK, 1, cv2.LINE_AA)
    return line


def contact_sheet(text: str, rows: tuple[np.ndarray, ...]) -> np.ndarray:
    """A titled block with a row of pictures per row of faces (n, R, R, 3), at the same COLUMNS moments."""
    columns = spread(min(map(len, rows)))
    return np.vstack([title(text), *(np.hstack([square(row[i]) for i in columns]) for row in rows)])


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Write RGB as PNG. Raises UserError if that is not possible."""
    if path.suffix.lower() != ".png":
        raise UserError(f"'{path}' does not end in .png: give the picture this ending.")
    write_bytes(path, cv2.imencode(".png", picture[:, :, ::-1])[1].tobytes(), "The picture")


def waveform(wav: np.ndarray) -> np.ndarray:
    """The waveform: the lowest and highest sample in every column of pixels."""
    picture = np.full((WAVE_HEIGHT, COLUMNS * CELL, 3), PAPER, np.uint8)
    for x, part in enumerate(np.array_split(wav / max(np.abs(wav).max(initial=0), 1e-6), COLUMNS * CELL)):
        low, high = ((1 - value) / 2 * (WAVE_HEIGHT - 1) for value in (part.max(initial=-1), part.min(initial=1)))
        picture[round(min(low, high)) : round(max(low, high)) + 1, x] = INK
    return picture


def strip(video: Path, audio: Path, result: Path) -> np.ndarray:
    """Frames of a video, those of its result, and the waveform below, RGB; a shorter video runs back and forth."""
    wav = read_audio(audio)
    count = max(len(wav) * FPS // SAMPLE_RATE, 1)
    columns = spread(count)
    rows = []
    for path in (video, result):
        frames = islice(read_frames_looped(probe_video(path), count), columns[-1] + 1)
        rows.append(np.hstack([square(frame) for i, (_, frame) in enumerate(frames) for _ in range(columns.count(i))]))
    return np.vstack([*rows, waveform(wav)])
