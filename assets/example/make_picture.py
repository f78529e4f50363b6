"""The README's picture: frames of a video, the same frames of its result, and the sound below.

    python assets/example/make_picture.py VIDEO RESULT PICTURE.png
"""

import sys
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from latentsync.media import SAMPLE_RATE, probe_video, read_audio, read_frames_looped  # noqa: E402

COLUMNS = 8
CELL = 160  # pixels
WAVE_HEIGHT = 60  # pixels
INK, PAPER = (90, 60, 30), 255


def strip(path: str, wanted: list[int], count: int) -> np.ndarray:
    """The wanted frames of `count`, side by side; of each the middle square."""
    cells = []
    for index, (_, frame) in enumerate(islice(read_frames_looped(probe_video(path), count), max(wanted) + 1)):
        if index in wanted:
            side = min(frame.shape[:2])
            y, x = ((length - side) // 2 for length in frame.shape[:2])
            cells.append(cv2.resize(frame[y : y + side, x : x + side], (CELL, CELL), interpolation=cv2.INTER_AREA))
    return np.hstack(cells)


def waveform(wav: np.ndarray) -> np.ndarray:
    """The sound's lowest and highest sample in every column of pixels."""
    picture = np.full((WAVE_HEIGHT, COLUMNS * CELL, 3), PAPER, np.uint8)
    for x, part in enumerate(np.array_split(wav / max(np.abs(wav).max(), 1e-6), COLUMNS * CELL)):
        low, high = ((1 - value) / 2 * (WAVE_HEIGHT - 1) for value in (part.max(), part.min()))
        picture[round(low) : round(high) + 1, x] = INK
    return picture


def main(video: str, result: str, picture: str) -> None:
    wav = read_audio(result)
    count = len(wav) * 25 // SAMPLE_RATE
    wanted = [(2 * i + 1) * count // (2 * COLUMNS) for i in range(COLUMNS)]
    rows = [strip(video, wanted, count), strip(result, wanted, count), waveform(wav)]
    cv2.imwrite(picture, np.vstack(rows)[:, :, ::-1])


if __name__ == "__main__":
    main(*sys.argv[1:])
