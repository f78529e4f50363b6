"""Films of people dubbed with real clips' voices: what each person keeps, and whether the mouth follows the voice."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from latentsync.alignment import crop_size
from latentsync.checkpoints.load import Models
from latentsync.evaluation.appearance import HULL_POINTS, keeps
from latentsync.evaluation.clips import MOST_FRAMES, SIDE, Clip, Seen, alignments, look
from latentsync.evaluation.dubbing import dub
from latentsync.evaluation.measures import LAGS, correlation, peak
from latentsync.media import probe_video, read_frames
from latentsync.settings import Settings

# key, heading, format
COLUMNS = (
    ("person", "person", "{}"),
    ("voice", "voice", "{}"),
    ("outside", "beside the mouth, dB", "{:.0f}"),
    ("detail", "detail", "{:.2f}"),
    ("colour", "ΔE", "{:.1f}"),
    ("correlation", "with the sound", "{:.2f}"),
    ("lag", "at frames", "{:+d}"),
    ("old", "with the old mouth", "{:.2f}"),
    ("seam", "seam", "{:.2f}"),
    ("flicker", "flicker", "{:.2f}"),
)


def hull_points(seen: Seen, like: Seen) -> np.ndarray:
    """HULL_POINTS of every face in the crops, (n, k, 2), aligned as those of `like`; NaN where there is no face."""
    to_square = SIDE / np.array(crop_size(SIDE))
    points = np.full((len(seen.faces), len(HULL_POINTS), 2), np.nan)
    for row, face, matrix in zip(points, seen.faces, alignments(like.faces), strict=False):
        if face is not None and matrix is not None:
            row[:] = (face.landmarks[list(HULL_POINTS)] @ matrix[:, :2].T + matrix[:, 2] + 0.5) * to_square - 0.5
    return points


def measure_people(
    films: list[Path], voices: list[Clip], models: Models, settings: Settings
) -> Iterator[tuple[dict, np.ndarray, np.ndarray]]:
    """Dub each film with one of the voices, in turn: its measures, and the faces (n, SIDE, SIDE, 3) before, after."""
    for i, film in enumerate(films):
        voice = voices[i % len(voices)]
        source = look(np.stack(list(read_frames(probe_video(film), count=MOST_FRAMES))))
        frames = dub(Clip(film.stem, film.stem, source, voice.wav), voice.wav, models, settings)
        n = len(frames)
        result = look(frames, source.faces[:n])
        in_step = correlation(result.opening, voice.seen.opening)
        found = {"person": film.stem, "voice": voice.name}
        found |= keeps(result.crops, source.crops[:n], hull_points(source, source)[:n], hull_points(result, source))
        found["correlation"], found["lag"] = peak(in_step)
        found["old"] = float(correlation(result.opening, source.opening[:n])[list(LAGS).index(0)])
        yield found, source.crops[:n], result.crops


def people_table(found: list[dict]) -> str:
    """A row for every person, and one of means, in Markdown."""
    mean = {"person": "mean", "voice": ""}
    for key, _, _ in COLUMNS[2:]:
        values = [float(each[key]) for each in found if each[key] is not None and np.isfinite(each[key])]
        mean[key] = None if key == "lag" or not values else float(np.mean(values))
    rows = [[heading for _, heading, _ in COLUMNS], ["---"] * len(COLUMNS)]
    for each in (*found, mean):
        rows.append(["–" if each[key] is None else form.format(each[key]) for key, _, form in COLUMNS])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
