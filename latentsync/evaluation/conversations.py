"""Films of conversations, made of real clips of one person each: who speaks when is known."""

import math
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import imageio_ffmpeg
import numpy as np

from latentsync import FPS
from latentsync.errors import UserError
from latentsync.evaluation.measures import SAMPLES, loudness
from latentsync.media import probe_video, read_audio, read_frames
from latentsync.training.sound import back_and_forth

# What those who do not speak show: frames of the clip's own pauses, forward and backward; the same with every BURST
# seconds of LIVELY_PERIOD moving the mouth as in speech; their own speech all the time, unheard.
LISTENERS = ("still", "lively", "mouthing")
LIVELY_PERIOD, BURST = 50, 13  # frames
SIDE_WIDTH, SIDE_HEIGHT = 360, 288  # pixels of each person's part of the picture (GRID)
LEAD, TAIL = 3, 6  # frames before and after its sound that a clip moves its mouth
MIN_REST = 5  # frames of a pause that can stand for a listener
LOUD_SHARE = 0.4  # of the range from the pauses to speech, in dB
GAPS = (5, 20)  # frames between two turns, in which nobody speaks
LONG_GAP = 60  # frames in which nobody speaks, once in every film
SWAY = 6.0, 3.0, 0.02  # of lively and mouthing people: pixels, degrees and share of the size, either way


@dataclass(frozen=True, eq=False)
class Sentence:
    """A clip of one person: frames uint8 (n, SIDE_HEIGHT, SIDE_WIDTH, 3), wav (samples,) at 16 kHz, the frames
    first … last − 1 that are heard, and the numbers of those of its longer pause."""

    frames: np.ndarray
    wav: np.ndarray
    first: int
    last: int
    rest: np.ndarray


@dataclass(frozen=True, eq=False)
class Script:
    """A film before it is drawn.

    shown: for every person from the left, what is shown of which sentence: (sentence, numbers of its frames), end to
    end; wav (n · SAMPLES,); speaker (n,): the person who speaks, −1 where nobody does.
    """

    shown: list[list[tuple[Sentence, np.ndarray]]]
    wav: np.ndarray
    speaker: np.ndarray


def read_sentence(path: Path) -> Sentence:
    """Read a clip of one sentence with pauses around it. Raises UserError if it has none."""
    frames = [cv2.resize(frame, (SIDE_WIDTH, SIDE_HEIGHT)) for frame in read_frames(probe_video(path))]
    wav = read_audio(path)[: len(frames) * SAMPLES]
    wav = np.pad(wav, (0, len(frames) * SAMPLES - len(wav)))
    loud = np.flatnonzero(is_loud(loudness(wav)))
    first, last = int(loud[0]), int(loud[-1]) + 1
    rest = max(np.arange(first - LEAD), np.arange(last + TAIL, len(frames)), key=len)
    if len(rest) < MIN_REST:
        raise UserError(f"'{path}' has no pause before or after its sentence: take a clip with one.")
    return Sentence(np.stack(frames), wav, first, last, rest)


def is_loud(level: np.ndarray) -> np.ndarray:
    """Where a clean recording speaks, bool (n,), from its `loudness`."""
    low, high = np.percentile(level, [10, 95])
    loud = (level > low + LOUD_SHARE * (high - low)).astype(np.uint8)[:, None]
    return cv2.morphologyEx(loud, cv2.MORPH_OPEN, np.ones((3, 1), np.uint8))[:, 0] > 0


def converse(people: Sequence[Sequence[Sentence]], turns: int, listeners: str, seed: int) -> Script:
    """A film of people side by side who speak in turn, and of a while in which nobody does.

    people: the sentences of each; listeners: one of LISTENERS.
    """
    rng = np.random.default_rng(seed)
    count = len(people)
    shown: list[list[tuple[Sentence, np.ndarray]]] = [[] for _ in people]
    heard: list[np.ndarray] = []
    speaker: list[np.ndarray] = []
    long_gap = int(rng.integers(1, turns))
    for turn in range(turns):
        who = turn % count
        gap = LONG_GAP if turn == long_gap else int(rng.integers(*GAPS))
        sentence = people[who][turn // count % len(people[who])]
        first, last = max(sentence.first - LEAD, 0), min(sentence.last + TAIL, len(sentence.frames))
        length = gap + last - first
        for person, sentences in enumerate(people):
            if person == who:
                resting = sentence.rest[back_and_forth(np.arange(gap), len(sentence.rest))]
                clip, numbers = sentence, np.concatenate([resting, np.arange(first, last)])
            else:
                clip = sentences[(turn + 1) // count % len(sentences)]
                numbers = listening(clip, length, listeners, rng)
            shown[person].append((clip, numbers))
        floor = 10 ** (np.percentile(loudness(sentence.wav), 10) / 20)  # of the recording: its gaps are no true silence
        sound = (floor * rng.standard_normal(length * SAMPLES)).astype(np.float32)
        sound[gap * SAMPLES :] = sentence.wav[first * SAMPLES : last * SAMPLES]
        heard.append(sound)
        truth = np.full(length, -1)
        truth[gap + sentence.first - first : gap + sentence.last - first] = who
        speaker.append(truth)
    return Script(shown, np.concatenate(heard), np.concatenate(speaker))


def draw(script: Script, moving: bool, seed: int) -> np.ndarray:
    """The frames of a film, uint8 (n, SIDE_HEIGHT, people · SIDE_WIDTH, 3); moving: heads sway."""
    rng = np.random.default_rng(seed)
    parts = [np.concatenate([clip.frames[numbers] for clip, numbers in shown]) for shown in script.shown]
    return np.concatenate([sway(part, rng) for part in parts] if moving else parts, axis=2)


def listening(clip: Sentence, length: int, listeners: str, rng: np.random.Generator) -> np.ndarray:
    """Numbers of the clip's frames that show its person without being heard, (length,)."""
    steps = np.arange(length) + int(rng.integers(1000))
    resting = clip.rest[back_and_forth(steps, len(clip.rest))]
    moving = clip.first + back_and_forth(steps, clip.last - clip.first)
    if listeners == "still":
        return resting
    if listeners == "mouthing":
        return moving
    return np.where(steps % LIVELY_PERIOD < BURST, moving, resting)


def sway(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The frames (n, h, w, 3), shifted, turned and scaled slowly, as a head moves."""
    n, height, width = frames.shape[:3]
    time = np.arange(n) / FPS
    phases = rng.random((4, 2, 1))
    waves = np.sin(2 * math.pi * (np.array([[0.23], [0.61]]) * time + phases)).mean(1)  # slow, and as nodding
    shift, angle, scale = SWAY
    out = np.empty_like(frames)
    for i, frame in enumerate(frames):
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle * waves[2][i], 1 + scale * (1 + waves[3][i]))
        matrix[:, 2] += shift * waves[0][i], shift * waves[1][i]
        out[i] = cv2.warpAffine(frame, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)
    return out


def write_film(path: Path, frames: np.ndarray, wav: np.ndarray) -> None:
    """Write frames uint8 (n, h, w, 3), FPS a second, and sound (samples,) at 16 kHz as an MP4."""
    with TemporaryDirectory(prefix="latentsync-") as folder:
        sound = Path(folder) / "sound.wav"
        write_sound(sound, wav)
        size = frames.shape[2], frames.shape[1]
        writer = imageio_ffmpeg.write_frames(str(path), size, fps=FPS, audio_path=str(sound), macro_block_size=1)
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()


def write_sound(path: Path, wav: np.ndarray) -> None:
    """Write sound (samples,) at 16 kHz as a WAV file."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLES * FPS, 0, "NONE", ""))
        file.writeframes((np.clip(wav, -1, 1) * 32767).astype("<i2").tobytes())


def add_noise(wav: np.ndarray, kind: str, ratio: float, seed: int) -> np.ndarray:
    """Speech with noise, `ratio` dB below the speech's mean power while it is loud; kind: "noise" (pink), "music"."""
    rng = np.random.default_rng(seed)
    time = np.arange(len(wav)) / (SAMPLES * FPS)
    if kind == "noise":
        spectrum = np.fft.rfft(rng.standard_normal(len(wav)))
        other = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 20)), len(wav))
    else:
        # A chord of three notes with overtones every half second, struck and fading, and a beat.
        other = np.zeros(len(wav))
        beat = time % 0.5
        chords = rng.choice([0, 3, 5, 7, 8, 10], (int(time[-1] / 0.5) + 1, 3))
        for voice in range(3):
            pitch = 220 * 2 ** ((chords[(time / 0.5).astype(int), voice] + 4 * voice) / 12)
            phase = 2 * math.pi * np.cumsum(pitch) / (SAMPLES * FPS)
            other += sum(np.sin(k * phase) / k for k in (1, 2, 3, 4)) * np.exp(-3 * beat)
        other += 2 * rng.standard_normal(len(wav)) * np.exp(-40 * beat)
    level = loudness(wav)
    loud = np.repeat(is_loud(level), SAMPLES)
    power = np.mean(wav[: len(loud)][loud].astype(np.float64) ** 2)
    other *= math.sqrt(power / np.mean(other**2) * 10 ** (-ratio / 10))
    return (wav + other).astype(np.float32)
