"""Synthesised voices that say the sentences of a prepared GRID set, in step with its mouths.

From a few people's voices the audio encoder learns those voices, and not speech. GRID's file names spell their
sentences, so synthesisers can say them. Dynamic time warping aligns each reading with the recording, which gives
another voice for the same frames. Needs `espeak-ng` or `flite` on the PATH.
"""

import io
import logging
import shutil
import subprocess
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.fft import dct
from scipy.ndimage import gaussian_filter1d
from tqdm import tqdm

from latentsync import SAMPLE_RATE
from latentsync.audio import log_powers
from latentsync.corpus import MEL_BASE, MEL_PER_FRAME, MEL_STEP, N_MELS, clip_table
from latentsync.errors import UserError

log = logging.getLogger(__name__)

WORDS = (  # of GRID's six-letter names, in order (Cooke et al. 2006)
    {"b": "bin", "l": "lay", "p": "place", "s": "set"},
    {"b": "blue", "g": "green", "r": "red", "w": "white"},
    {"a": "at", "b": "by", "i": "in", "w": "with"},
    {letter: letter.upper() for letter in "abcdefghijklmnopqrstuvwxyz"},
    dict(zip("z123456789", "zero one two three four five six seven eight nine".split(), strict=True)),
    {"a": "again", "n": "now", "p": "please", "s": "soon"},
)
ACCENTS = ("en-gb", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029")  # espeak-ng's
VARIANTS = tuple(f"+m{i}" for i in range(1, 8)) + tuple(f"+f{i}" for i in range(1, 6))
FLITE_VOICES = ("slt", "rms", "awb", "kal16")
FLITE_SHARE = 0.4  # of the readings, if both are installed
CEPSTRA = 13  # coefficients
LN10 = float(np.log(10))
FADE = 6  # frames of 10 ms, smoothed around the beginning and end of speech
MAX_PAUSE = 25  # frames of 10 ms within a sentence
SPEECH_THRESHOLD = 0.5  # of the way from the quietest to the loudest, in decades
PATH_SMOOTHING = 2.0  # frames of 10 ms: sigma; the raw warping path stands still and jumps

Synthesiser = Callable[[str, np.random.Generator], bytes]


def sentence(name: str) -> str:
    """The sentence of a clip's name: 'bgiq6p' → 'bin green in Q six please'. Raises UserError for other names."""
    try:
        return " ".join(words[letter] for words, letter in zip(WORDS, name, strict=True))
    except (KeyError, ValueError):
        raise UserError(f"The clip '{name}' is not named as GRID names its sentences, as bgiq6p.") from None


def synthesisers() -> list[Synthesiser]:
    """The installed ones of espeak-ng and flite: text → WAV file in a random voice. Raises UserError if none is."""

    def espeak(text: str, rng: np.random.Generator) -> bytes:
        voice = rng.choice(ACCENTS) + rng.choice(VARIANTS)
        speed, pitch = str(rng.integers(110, 180)), str(rng.integers(25, 75))
        command = ["espeak-ng", "--stdout", "-v", voice, "-s", speed, "-p", pitch, text]
        return subprocess.run(command, capture_output=True, check=True).stdout

    def flite(text: str, rng: np.random.Generator) -> bytes:
        stretch = f"duration_stretch={rng.uniform(0.8, 1.3):.2f}"
        command = ["flite", "-voice", rng.choice(FLITE_VOICES), "--setf", stretch, "-t", text, "-o", "/dev/stdout"]
        return subprocess.run(command, capture_output=True, check=True).stdout

    programs: dict[str, Synthesiser] = {"espeak-ng": espeak, "flite": flite}
    installed = [run for name, run in programs.items() if shutil.which(name)]
    if not installed:
        raise UserError("Neither espeak-ng nor flite is installed; install one of them to make more voices.")
    return installed


def read_wav(data: bytes) -> np.ndarray:
    """Decode a mono 16-bit WAV file, whose header may have a wrong length, to float32 at 16 kHz."""
    with wave.open(io.BytesIO(data)) as file:
        rate = file.getframerate()
        samples = np.frombuffer(data[44:], "<i2").astype(np.float32) / 32768
    count = round(len(samples) * SAMPLE_RATE / rate)
    return np.interp(np.arange(count) * rate / SAMPLE_RATE, np.arange(len(samples)), samples).astype(np.float32)


def speech_part(power: np.ndarray) -> slice:
    """From the first to the last frame of speech, without clicks before and after it; power (t, 80) log10."""
    loudness = gaussian_filter1d(power.max(1), 3)
    low, high = np.percentile(loudness, (5, 95))
    loud = np.flatnonzero(loudness > low + SPEECH_THRESHOLD * (high - low))
    runs = np.split(loud, np.flatnonzero(np.diff(loud) > MAX_PAUSE) + 1)
    longest = max(runs, key=len)
    return slice(longest[0], longest[-1] + 1)


def features(power: np.ndarray) -> np.ndarray:
    """Features of speech independent of the voice: power (t, 80) log10 → cepstra and their deltas (t, 26)."""
    power = np.maximum(power, power.max() - 5)
    cepstra = dct(power, axis=1, norm="ortho")[:, :CEPSTRA]
    cepstra = (cepstra - cepstra.mean(0)) / (cepstra.std(0) + 1e-6)
    return np.hstack([cepstra, np.gradient(gaussian_filter1d(cepstra, 2, axis=0), axis=0) * 4])


def warping_path(target: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Dynamic time warping: the position in `other` (n, k) of each row of `target` (n, k), (n,) float, rising.

    Both begin and end together, and neither is ever more than twice as fast (Sakoe and Chiba 1978, P = 1, symmetric).
    """
    n = len(target)
    cost = np.full((n + 2, n + 2), np.inf)  # two rows and columns before the first
    cost[2:, 2:] = np.sqrt(np.maximum((target**2).sum(1)[:, None] + (other**2).sum(1) - 2 * target @ other.T, 0))
    total = np.full((n + 2, n + 2), np.inf)
    total[2, 2] = cost[2, 2]
    step = np.zeros((n + 2, n + 2), np.int8)
    for i in range(3, n + 2):
        now, before = cost[i, 2:], cost[i - 1, 2:]
        options = np.stack(
            [
                total[i - 1, 1:-1] + 2 * now,
                total[i - 2, 1:-1] + 2 * before + now,
                total[i - 1, :-2] + 2 * cost[i, 1:-1] + now,
            ]
        )
        step[i, 2:] = options.argmin(0)
        total[i, 2:] = options.min(0)
    i = j = n + 1
    rows, columns = [i], [j]
    while i > 2:
        di, dj = ((1, 1), (2, 1), (1, 2))[step[i, j]]
        i, j = i - di, j - dj
        rows.append(i)
        columns.append(j)
    path = np.interp(np.arange(2, n + 2), rows[::-1], columns[::-1]) - 2
    return gaussian_filter1d(path, PATH_SMOOTHING, mode="nearest")


def resample(power: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Interpolate rows of power (t, 80) at positions (n,) between 0 and t − 1."""
    low = positions.astype(int).clip(0, len(power) - 2)
    share = (positions - low)[:, None]
    return power[low] * (1 - share) + power[low + 1] * share


def align_voice(mel: np.ndarray, wav: np.ndarray) -> np.ndarray:
    """Align `wav` (samples,), a reading of the clip's words, with the clip's mel (t, 80) uint8 → (t, 80) uint8."""
    own = mel * MEL_STEP + MEL_BASE
    wav = np.pad(wav, SAMPLE_RATE // 4)
    other = torch.cat(list(log_powers(torch.from_numpy(wav), N_MELS)), dim=1).T.numpy()
    other = other + (own.max() - other.max())
    quiet = np.percentile(own, 10, axis=0)  # the noise of the clip's room
    own_part, other_part = speech_part(own), speech_part(np.maximum(other, quiet))
    count = own_part.stop - own_part.start
    stretched = resample(other[other_part], np.linspace(0, other_part.stop - other_part.start - 1, count))
    path = warping_path(features(own[own_part]), features(np.maximum(stretched, quiet)))
    out = own.copy()
    out[own_part] = np.logaddexp(resample(stretched, path) * LN10, quiet * LN10) / LN10
    if own_part.start > FADE and own_part.stop + FADE < len(own):
        for edge in (own_part.start, own_part.stop):
            out[edge - 2 : edge + 2] = gaussian_filter1d(out[edge - FADE : edge + FADE], 1, axis=0)[FADE - 2 : FADE + 2]
    return np.clip(np.round((out - MEL_BASE) / MEL_STEP), 0, 255).astype(np.uint8)


def add_voices(folder: Path, count: int) -> None:
    """Write `voices.npz` into a prepared folder: mel (count, 4n, 80), `count` other voices for every clip."""
    table = clip_table(folder)
    lengths = table["lengths"] * MEL_PER_FRAME
    ends = np.cumsum(lengths)
    speakers = synthesisers()
    rng = np.random.default_rng(0)
    mel = table["mel"]
    out = np.empty((count, *mel.shape), np.uint8)
    for name, length, end in zip(tqdm(table["names"], unit="clip"), lengths, ends, strict=True):
        try:
            text = sentence(str(name))
        except UserError as error:
            log.warning("%s It keeps its own voice only.", error)
            out[:, end - length : end] = mel[end - length : end]
            continue
        for k in range(count):
            speak = speakers[-1 if rng.random() < FLITE_SHARE else 0]
            out[k, end - length : end] = align_voice(mel[end - length : end], read_wav(speak(text, rng)))
    np.savez_compressed(folder / "voices.npz", mel=out)
