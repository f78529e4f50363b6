"""Films of people dubbed with real clips' voices: what each person keeps, and whether the mouth follows the voice."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from latentsync.alignment import crop_size
from latentsync.checkpoints.load import Models
from latentsync.evaluation.appearance import HULL_POINTS, compare_appearance
from latentsync.evaluation.clips import MAX_FRAMES, SIDE, Clip, FaceTrack, alignment_matrices, track_clip
from latentsync.evaluation.dubbing import dub
from latentsync.evaluation.measures import correlation, correlation_in_step, peak
from latentsync.media import probe_video, read_frames
from latentsync.settings import Settings

# Field of PersonMeasures, heading, format
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
    ("flicker_levels", "flicker, grey levels", "{:.1f}"),
)


@dataclass(frozen=True)
class PersonMeasures:
    """Measures of one dubbed film; see `compare_appearance` for outside to flicker_levels.

    correlation, lag: of the mouth's opening with that of the voice's own clip; old: with that of the source.
    """

    person: str
    voice: str
    outside: float
    detail: float
    colour: float
    seam: float
    flicker: float
    flicker_levels: float
    correlation: float
    lag: int | None
    old: float


def hull_points(track: FaceTrack, aligned_as: FaceTrack) -> np.ndarray:
    """HULL_POINTS of every face in the crops, (n, k, 2), aligned as in another clip; NaN where there is no face."""
    to_square = SIDE / np.array(crop_size(SIDE))
    points = np.full((len(track.faces), len(HULL_POINTS), 2), np.nan)
    for row, face, matrix in zip(points, track.faces, alignment_matrices(aligned_as.faces), strict=False):
        if face is not None and matrix is not None:
            row[:] = (face.landmarks[list(HULL_POINTS)] @ matrix[:, :2].T + matrix[:, 2] + 0.5) * to_square - 0.5
    return points


def measure_people(
    films: list[Path], voices: list[Clip], models: Models, settings: Settings
) -> Iterator[tuple[PersonMeasures, np.ndarray, np.ndarray]]:
    """Dub each film with one of the voices, in turn: its measures, and the faces (n, SIDE, SIDE, 3) before, after."""
    for i, film in enumerate(films):
        voice = voices[i % len(voices)]
        source = track_clip(np.stack(list(read_frames(probe_video(film), count=MAX_FRAMES))))
        frames = dub(Clip(film.stem, film.stem, source, voice.wav), voice.wav, models, settings)
        n = len(frames)
        result = track_clip(frames, source.faces[:n])
        source_points, result_points = hull_points(source, source)[:n], hull_points(result, source)
        appearance = compare_appearance(result.crops, source.crops[:n], source_points, result_points)
        best, lag = peak(correlation(result.opening, voice.track.opening))
        old = correlation_in_step(result.opening, source.opening[:n])
        yield (
            PersonMeasures(film.stem, voice.name, correlation=best, lag=lag, old=old, **appearance),
            source.crops[:n],
            result.crops,
        )


def people_table(people: list[PersonMeasures]) -> str:
    """A row for every person, and one of means, in Markdown."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def row(values: dict[str, object]) -> str:
        return line(["–" if (value := values[key]) is None else form.format(value) for key, _, form in COLUMNS])

    means: dict[str, object] = {"person": "mean", "voice": "", "lag": None}
    for name in [field.name for field in fields(PersonMeasures) if field.name not in means]:
        values = np.array([getattr(person, name) for person in people], float)
        finite = values[np.isfinite(values)]
        means[name] = float(finite.mean()) if len(finite) else None
    headings = [heading for _, heading, _ in COLUMNS]
    rows = [row(vars(person)) for person in people]
    return "\n".join([line(headings), line(["---"] * len(COLUMNS)), *rows, row(means)])
