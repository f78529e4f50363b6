"""Films of two people who get into one another's way, each dubbed with a voice of their own: does each mouth keep it?

The people are cut out of real clips and walk before a wall, so it is known where everybody is and who covers whom.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from latentsync import FPS
from latentsync.checkpoints.load import Models
from latentsync.evaluation.clips import Clip
from latentsync.evaluation.conversations import SIDE_HEIGHT, SIDE_WIDTH, write_film, write_sound
from latentsync.evaluation.measures import SAMPLES, correlation_in_step
from latentsync.faces import Face
from latentsync.landmarks import face_reader, mouth_opening
from latentsync.media import probe_video, read_frames
from latentsync.pipeline import lipsync
from latentsync.settings import Settings
from latentsync.training.sound import back_and_forth

FRAMES = 6 * FPS
WIDTH = 760  # pixels of the room; of it a person takes SIDE_WIDTH
WAY = WIDTH - SIDE_WIDTH
HEAD = 0.62, 0.72  # half axes of a head with its hair, in widths and heights of the face
HEAD_RISE = 0.12  # of the face's height, from its middle to the head's
SHOULDERS = 1.3  # half of their width, in widths of the face
EDGE = 1.5  # pixels, of the blur of a cut-out person's edge
WHOLE = 0.01  # share of a face's box that may be covered or outside for the face to count as seen whole
NEAR = 0.5  # face sizes that a face is found from where it is
CROP = 2.2  # side of the square that is read, in face sizes
# Where the person in front and the one behind stand at a time of 0 to 1: shares of WAY, from the left.
Place = Callable[[float], float]
SCENES: Mapping[str, tuple[Place, Place]] = {
    "cross": (lambda time: time, lambda time: 1 - time),
    "apart": (lambda time: 0.0, lambda time: 1.0),
    "one half covered": (lambda time: 0.7 - max(0.15, 1.4 * abs(time - 0.5)), lambda time: 0.7),
    "one leaves": (lambda time: 0.0, lambda time: 1 + max(0.0, 1.8 * time - 0.9)),
}


@dataclass(frozen=True, eq=False)
class Actor:
    """A person cut out of a clip.

    frames: uint8 (n, SIDE_HEIGHT, SIDE_WIDTH, 3); alpha: float32 (SIDE_HEIGHT, SIDE_WIDTH, 1), 1 where the person is;
    box: x, y, width and height of the face; opening: of the mouth, (n,).
    """

    name: str
    frames: np.ndarray
    alpha: np.ndarray
    box: tuple[float, float, float, float]
    opening: np.ndarray


@dataclass(frozen=True, eq=False)
class Voice:
    """Sound (n · SAMPLES,) at 16 kHz, and how far the mouth of its speaker opens in every frame (n,)."""

    wav: np.ndarray
    opening: np.ndarray


@dataclass(frozen=True)
class CrossingMeasures:
    """How the mouth of one person of a film moves, over the frames that show the whole face.

    own, other, old: correlation of its opening at lag 0 with the true mouth of its voice, of the other person's voice,
    and of the film; found: of `whole` frames, those in which a face is found there.
    """

    scene: str
    film: str
    whose: str
    own: float
    other: float
    old: float
    found: int
    whole: int


def cut_out(clip: Clip) -> Actor:
    """Cut a person out of a clip, played forward and backward for as long as a film lasts."""
    numbers = back_and_forth(np.arange(FRAMES), len(clip.track.frames))
    frames = np.stack([cv2.resize(clip.track.frames[i], (SIDE_WIDTH, SIDE_HEIGHT)) for i in numbers])
    x, y, width, height = box = face_box(clip)
    alpha = np.zeros((SIDE_HEIGHT, SIDE_WIDTH), np.float32)
    middle = round(x + width / 2), round(y + height * (0.5 - HEAD_RISE))
    cv2.ellipse(alpha, middle, (round(HEAD[0] * width), round(HEAD[1] * height)), 0, 0, 360, 1, -1)
    chin, reach = round(y + 0.9 * height), round(SHOULDERS * width)
    cv2.ellipse(alpha, (middle[0], SIDE_HEIGHT), (reach, SIDE_HEIGHT - chin), 0, 0, 360, 1, -1)
    alpha = cv2.GaussianBlur(alpha, (0, 0), EDGE)[..., None]
    return Actor(clip.speaker, frames, alpha, box, clip.track.opening[numbers])


def face_box(clip: Clip) -> tuple[float, float, float, float]:
    """x, y, width and height of the face in the middle of its movements, in a picture SIDE_WIDTH × SIDE_HEIGHT."""
    faces: list[Face] = [face for face in clip.track.faces if face is not None]
    height, width = clip.track.frames.shape[1:3]
    x0, y0, x1, y1 = np.median([face.box for face in faces], 0) * ([SIDE_WIDTH / width, SIDE_HEIGHT / height] * 2)
    return float(x0), float(y0), float(x1 - x0), float(y1 - y0)


def speak(clips: Sequence[Clip]) -> Voice:
    """A voice that says the sentences of clips, as long as a film."""
    lengths = [min(len(clip.track.opening), len(clip.wav) // SAMPLES) for clip in clips]
    wav = np.concatenate([clip.wav[: n * SAMPLES] for clip, n in zip(clips, lengths, strict=True)])
    opening = np.concatenate([clip.track.opening[:n] for clip, n in zip(clips, lengths, strict=True)])
    missing = max(0, FRAMES - len(opening))
    wav = np.pad(wav, (0, missing * SAMPLES))[: FRAMES * SAMPLES]
    return Voice(wav, np.pad(opening, (0, missing), mode="edge")[:FRAMES])


def least_alike(voice: Voice, other: Voice) -> Voice:
    """The other voice, so late that the true mouths of both have as little in common as can be."""
    shift = min(range(FRAMES), key=lambda late: abs(correlation_in_step(voice.opening, np.roll(other.opening, late))))
    return Voice(np.roll(other.wav, shift * SAMPLES), np.roll(other.opening, shift))


def draw(people: Sequence[Actor], scene: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A film of two people, the first in front.

    Returns its frames uint8 (FRAMES, SIDE_HEIGHT, WIDTH, 3), the left edges of both people's pictures (2, FRAMES), and
    whether their faces are seen whole, bool (2, FRAMES).
    """
    wall = np.median(np.concatenate([person.frames[0][:8].reshape(-1, 3) for person in people]), 0)
    times = np.linspace(0, 1, FRAMES)
    lefts = np.array([[round(WAY * place(time)) for time in times] for place in SCENES[scene]])
    film = np.empty((FRAMES, SIDE_HEIGHT, WIDTH, 3), np.uint8)
    whole = np.zeros((2, FRAMES), bool)
    for number in range(FRAMES):
        # Wide enough for people who have left the room.
        room = np.tile(wall.astype(np.float32), (SIDE_HEIGHT, WIDTH + SIDE_WIDTH, 1))
        hidden = np.zeros(room.shape[:2], np.float32)
        hidden[:, WIDTH:] = 1
        for index in 1, 0:
            person, left = people[index], lefts[index, number]
            part = room[:, left : left + SIDE_WIDTH]
            part += person.alpha * (person.frames[number] - part)
        for index in 0, 1:
            person, left = people[index], lefts[index, number]
            x, y, width, height = (round(value) for value in person.box)
            whole[index, number] = hidden[y : y + height, left + x : left + x + width].mean() <= WHOLE
            part = hidden[:, left : left + SIDE_WIDTH]
            np.maximum(part, person.alpha[..., 0], out=part)
        film[number] = room[:, :WIDTH].round().astype(np.uint8)
    return film, lefts, whole


def read_openings(path: Path, people: Sequence[Actor], lefts: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """How far the mouths of a result open, (2, FRAMES), by the places where the people are; NaN where none is found."""
    openings = np.full(whole.shape, np.nan)
    with face_reader() as read:
        for number, frame in enumerate(read_frames(probe_video(path), count=FRAMES)):
            for index in np.flatnonzero(whole[:, number]).tolist():
                x, y, width, height = people[index].box
                size, middle = max(width, height), np.array([lefts[index, number] + x + width / 2, y + height / 2])
                x0, y0 = np.maximum(np.round(middle - CROP / 2 * size).astype(int), 0)
                x1, y1 = np.round(middle + CROP / 2 * size).astype(int)
                points = read(np.ascontiguousarray(frame[y0:y1, x0:x1]))
                if points is not None:
                    found = (points.min(0) + points.max(0)) / 2 + (x0, y0)
                    if np.linalg.norm(found - middle) < NEAR * size:
                        openings[index, number] = mouth_opening(points)
    return openings


def measure_crossing(
    pairs: Sequence[tuple[Clip, Clip]], voices: tuple[Voice, Voice], folder: Path, models: Models, settings: Settings
) -> Iterator[CrossingMeasures]:
    """Draw every pair of people in all SCENES, dub both, and measure each; the films and results stay in `folder`."""
    spoken = [folder / "voice-1.wav", folder / "voice-2.wav"]
    for path, voice in zip(spoken, voices, strict=True):
        write_sound(path, voice.wav)
    both = replace(settings, face="left", other_faces=("right",))
    for pair in pairs:
        people = [cut_out(clip) for clip in pair]
        for scene in SCENES:
            name = f"{people[0].name} and {people[1].name}"
            film = folder / f"{scene}, {name}.mp4".replace(" ", "-").replace(",", "")
            frames, lefts, whole = draw(people, scene)
            write_film(film, frames, voices[0].wav)
            result = film.with_name(f"{film.stem}-synced.mp4")
            lipsync(film, spoken[0], result, models, both, other_voices=spoken[1:])
            openings = read_openings(result, people, lefts, whole)
            for index, whose in enumerate(("in front", "behind")):
                curves = voices[index].opening, voices[1 - index].opening, people[index].opening
                own, other, old = (correlation_in_step(openings[index], curve) for curve in curves)
                found = int(np.isfinite(openings[index]).sum())
                yield CrossingMeasures(scene, name, whose, own, other, old, found, int(whole[index].sum()))


def crossing_table(measures: Sequence[CrossingMeasures]) -> str:
    """A row for both people of every scene, in Markdown: means over the films, and the lowest and the highest."""
    lines = [
        "| films | whose mouth | with its own voice | with the other's | with the old words | found, of frames with "
        "the whole face |",
        "|---|---|---|---|---|---|",
    ]
    for scene in SCENES:
        for whose in "in front", "behind":
            rows = [each for each in measures if (each.scene, each.whose) == (scene, whose)]
            if rows:
                cells = []
                for name in "own", "other", "old":
                    values = np.array([getattr(row, name) for row in rows])
                    cells.append(f"{np.nanmean(values):.2f} ({np.nanmin(values):.2f} to {np.nanmax(values):.2f})")
                found = f"{sum(row.found for row in rows)} of {sum(row.whole for row in rows)}"
                lines.append(f"| {len(rows)}, {scene} | {whose} | {' | '.join(cells)} | {found} |")
    return "\n".join(lines)
