"""How often it is found who speaks, on films of conversations: by the judge of sync, and by simpler signals."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from latentsync import FPS
from latentsync.evaluation.conversations import LISTENERS, SIDE_WIDTH, Sentence, add_noise, converse, draw, write_film
from latentsync.evaluation.judge import Judge
from latentsync.evaluation.measures import loudness
from latentsync.faces import track_people
from latentsync.following import Person
from latentsync.media import probe_video, read_frames
from latentsync.people import everyone_in
from latentsync.retarget import mouth_points
from latentsync.retarget.geometry import LIPS, head_similarity, lip_opening, transform
from latentsync.speaking import MouthReader, decide, embed_sound, smooth, speech_frames, speech_odds
from latentsync.turns import film_sound

SOUNDS: Mapping[str, tuple[str, float] | None] = {  # kind of noise, and dB from it to the speech
    "clean": None,
    "noise, 10 dB": ("noise", 10.0),
    "music, 10 dB": ("music", 10.0),
}
OUTSIDE = "a voice from outside"  # the film with the sound of another one: nobody in it speaks
COLLAR = 5  # frames to either side of the beginning or end of speech that may be counted to either
# Middles and widths of the signals that are compared with the judge, as MIN_CONTRAST and CONTRAST_PER_ODDS.
SPEED, SPEED_PER_ODDS = -4.75, 0.15  # logarithm of head units a frame
CORRELATION, CORRELATION_PER_ODDS = 0.2, 0.1
SIGNALS = ("judge of sync", "speed of the lips", "opening with loudness")


@dataclass(frozen=True)
class Score:
    """Shares of the frames of a film: right with and without COLLAR, and in which the wrong person is painted."""

    film: str
    listeners: str
    people: int
    sound: str
    signal: str
    right: float
    strict: float
    wrong: float


@dataclass(frozen=True, eq=False)
class Watched:
    """A film of which everybody was followed. mouths, speeds, openings: of each person; places: columns of the film."""

    mouths: list[np.ndarray]
    speeds: np.ndarray
    openings: np.ndarray
    places: np.ndarray
    wav: np.ndarray


def watch(path: Path, judge: Judge) -> Watched:
    """Find and follow everybody, as `turns.find_turns` does. Raises UserError."""
    info = probe_video(path)
    sighted = everyone_in(read_frames(info), info.rate)
    people = [Person(look=person.look, recognised=True) for person in sighted]
    readers = [MouthReader(judge) for _ in people]
    lips: list[list[np.ndarray]] = [[] for _ in people]
    for frame, faces in track_people(read_frames(info), people, rate=Fraction(FPS)):
        for reader, mouth, face in zip(readers, lips, faces, strict=True):
            reader.add(frame, face)
            points = np.full((73, 2), np.nan) if face is None else mouth_points(face.landmarks)
            mouth.append(points[LIPS] if face is None else transform(head_similarity(points), points[LIPS]))
    shapes = np.array(lips)
    speeds = np.linalg.norm(np.diff(shapes, axis=1, prepend=shapes[:, :1]), axis=3).mean(2)
    openings = np.array([[lip_opening(shape) for shape in mouth] for mouth in lips])
    places = np.array([int(person.first.centre[0] // SIDE_WIDTH) for person in sighted])
    return Watched([reader.finish() for reader in readers], speeds, openings, places, film_sound(info))


def correlation_with(openings: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Correlations of mouth openings (people, n) with the loudness (n,) in a window around each frame; the best of
    three lags."""

    def at(sound: np.ndarray) -> np.ndarray:
        mean, sound_mean = smooth(openings), smooth(sound)
        spread = np.maximum(smooth(openings**2) - mean**2, 1e-5) * np.maximum(smooth(sound**2) - sound_mean**2, 1.0)
        return (smooth(openings * sound) - mean * sound_mean) / np.sqrt(spread)

    return np.max([at(np.roll(level, lag)) for lag in (-2, 0, 2)], axis=0)


def odds_by_signal(film: Watched, wav: np.ndarray, judge: Judge) -> dict[str, np.ndarray]:
    """`speech_odds` of every person (people, n), and what stands for them by each of the other SIGNALS."""
    n = film.speeds.shape[1]
    sounds = embed_sound(judge, wav, n)
    level = loudness(np.pad(wav, (0, max(n * 640 - len(wav), 0))))[:n]
    return {
        SIGNALS[0]: np.stack([speech_odds(mouth, sounds) for mouth in film.mouths]),
        SIGNALS[1]: (np.log(smooth(film.speeds) + 1e-3) - SPEED) / SPEED_PER_ODDS,
        SIGNALS[2]: (correlation_with(film.openings, level) - CORRELATION) / CORRELATION_PER_ODDS,
    }


def compare(found: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """Shares of frames (n,) that are right beyond COLLAR of a change of the truth, right, and of the wrong person."""
    changes = np.flatnonzero(np.diff(truth)) + 1
    far = np.abs(np.arange(len(truth))[:, None] - changes - 0.5).min(1, initial=np.inf) > COLLAR
    right = found == truth
    return float(right[far].mean()), float(right.mean()), float(((found >= 0) & ~right & (truth >= 0)).mean())


def measure_speaking(
    clips: Mapping[str, Sequence[Sentence]], films: Mapping[int, int], judge: Judge, report: Callable[[str], None]
) -> Iterator[Score]:
    """Make films of people and find who speaks in them.

    clips: sentences of every person; films: how many for each of LISTENERS, by the number of people in them.
    """
    names = sorted(clips)
    rng = np.random.default_rng(0)
    other = np.concatenate([clips[name][0].wav for name in names])
    with TemporaryDirectory(prefix="latentsync-") as folder:
        for listeners in LISTENERS:
            for count, number in ((count, i) for count, many in films.items() for i in range(many)):
                who = [str(name) for name in rng.choice(names, count, replace=False)]
                seed = int(rng.integers(2**31))
                script = converse([clips[name] for name in who], 2 * count, listeners, seed)
                path = Path(folder) / "film.mp4"
                write_film(path, draw(script, listeners != "still", seed), script.wav)
                film = watch(path, judge)
                name = f"{'+'.join(who)} {listeners} {number}"
                yield from score_film(name, listeners, script.speaker, film, judge, np.roll(other, seed))
                report(name)


def score_film(
    name: str, listeners: str, speaker: np.ndarray, film: Watched, judge: Judge, outside: np.ndarray
) -> Iterator[Score]:
    """The scores of one film with each of SOUNDS, and with a voice from outside, by each of SIGNALS."""
    n = min(len(speaker), film.speeds.shape[1])
    people = int(speaker.max()) + 1
    sounds = {
        sound: film.wav if noise is None else add_noise(film.wav, *noise, seed=people)
        for sound, noise in SOUNDS.items()
    }
    for sound, wav in (sounds | {OUTSIDE: np.resize(outside, len(film.wav))}).items():
        truth = np.full(n, -1) if sound == OUTSIDE else speaker[:n]
        speech = speech_frames(wav, film.speeds.shape[1])
        for signal, odds in odds_by_signal(film, wav, judge).items():
            found = decide(odds, speech)[:n]
            found = np.where(found >= 0, film.places[found], -1)
            yield Score(name, listeners, people, sound, signal, *compare(found, truth))


def speaking_table(scores: Sequence[Score]) -> str:
    """A row for each kind of film and each sound, a column for each signal, in Markdown.

    Its numbers are in %: right, and in brackets right without a collar, and painted though another one speaks.
    """
    lines = [
        "| people who do not speak | sound | films | " + " | ".join(SIGNALS) + " |",
        "|---" * (3 + len(SIGNALS)) + "|",
    ]
    for listeners in LISTENERS:
        for sound in (*SOUNDS, OUTSIDE):
            chosen = [score for score in scores if (score.listeners, score.sound) == (listeners, sound)]
            if not chosen:
                continue
            cells = []
            for signal in SIGNALS:
                rows = [score for score in chosen if score.signal == signal]
                right, strict, wrong = (
                    100 * float(np.mean([getattr(row, measure) for row in rows]))
                    for measure in ("right", "strict", "wrong")
                )
                cells.append(f"{right:.1f} ({strict:.1f}; {wrong:.1f})")
            films = len(chosen) // len(SIGNALS)
            lines.append(f"| {listeners} | {sound} | {films} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
