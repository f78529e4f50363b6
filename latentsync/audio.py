"""From a waveform to the audio tokens of every video frame.

Audio is processed in segments of 30 s, so that memory use does not grow with its length.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import cache

import numpy as np
import torch
from torch import Tensor

from latentsync import FPS, SAMPLE_RATE
from latentsync.silence import BLOCK, DIGITAL_SILENCE, amplify, block_levels, silence_pauses
from latentsync.whisper import AudioEncoder

N_FFT = 400  # samples, 25 ms
HOP_LENGTH = 160  # samples, 10 ms a mel frame
SEGMENT_FRAMES = 3000  # mel frames, 30 s: the input of Whisper's encoder
SEGMENT_SAMPLES = SEGMENT_FRAMES * HOP_LENGTH
ROWS_PER_SECOND = 50  # feature rows: two mel frames each
MEL_FLOOR = 1e-10  # power
MEL_RANGE = 8.0  # decades below the loudest point of the clip that are kept
PADDING = -4.0  # decades of power; normalised, it is the 0.0 that segments are padded with
HALF = Fraction(1, 2)
ROWS_BEFORE, ROWS_AFTER = 4, 6  # a video frame's tokens are rows c − 4 … c + 5
LEVEL_STEP, LEVEL_REACH = 25, 75  # blocks of 20 ms: a gain every 0.5 s, from the levels up to 1.5 s to either side
SPEECH_PERCENTILE, PAUSE_PERCENTILE = 95, 10  # of these levels: those of speech, and of the pauses in it
# dB between pauses and speech: noise and hum have at most the first, speech that is raised in full at least the second.
NOISE_RANGE, SPEECH_RANGE = 8.0, 14.0
QUIETEST_SPEECH = -80.0  # dB relative to full scale; quieter sound is not raised


@cache
def mel_filters(n_mels: int) -> Tensor:
    """Slaney's mel filter bank (n_mels, N_FFT // 2 + 1), float32, each filter of unit area, as Whisper's."""

    def to_mel(hz: np.ndarray) -> np.ndarray:
        return np.where(hz < 1000, hz * 3 / 200, 15 + np.log(np.maximum(hz, 1000) / 1000) * 27 / np.log(6.4))

    def to_hz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    bins = np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    top = float(to_mel(np.array(SAMPLE_RATE / 2)))
    edges = to_hz(np.linspace(0, top, n_mels + 2))
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return torch.from_numpy(filters.astype(np.float32))


def log_powers(wav: Tensor, n_mels: int) -> Iterator[Tensor]:
    """Yield log10 of the mel powers by segment; wav (samples,) → (n_mels, ≤ SEGMENT_FRAMES) each."""
    window = torch.hann_window(N_FFT, device=wav.device)
    filters = mel_filters(n_mels).to(wav.device)
    half = N_FFT // 2
    frames = len(wav) // HOP_LENGTH  # the last STFT frame is dropped
    # Only the ends are padded by reflection; segments overlap their true neighbours.
    head = wav[1 : half + 1].flip(0)
    tail = wav[-half - 1 : -1].flip(0)
    for first in range(0, frames, SEGMENT_FRAMES):
        count = min(SEGMENT_FRAMES, frames - first)
        start = first * HOP_LENGTH - half
        stop = start + (count - 1) * HOP_LENGTH + N_FFT
        piece = [wav[max(start, 0) : stop]]
        if start < 0:
            piece.insert(0, head)
        if stop > len(wav):
            piece.append(tail[: stop - len(wav)])
        spectrum = torch.stft(torch.cat(piece), N_FFT, HOP_LENGTH, window=window, center=False, return_complex=True)
        power = spectrum.abs() ** 2
        yield (filters @ power).clamp(min=MEL_FLOOR).log10()


def mel_segments(wav: Tensor, n_mels: int = 80, mel_range: float = MEL_RANGE) -> Iterator[Tensor]:
    """Yield Whisper's log-mel in segments of 30 s, clamped relative to the loudest point of the whole clip.

    wav: (samples,) float32 in [−1, 1] at 16 kHz; mel_range: decades kept. An encoder trained with fewer decades than
    Whisper's has never seen values below the padding either, so these are clamped too. Yields (n_mels, ≤ 3000), about
    −1 to 1.
    """
    if len(wav) < N_FFT:
        wav = torch.nn.functional.pad(wav, (0, N_FFT - len(wav)))
    # Two passes: the maximum of the clip is needed for the first segment.
    loudest = max(float(part.max()) for part in log_powers(wav, n_mels))
    floor = loudest - mel_range if mel_range >= MEL_RANGE else max(loudest - mel_range, PADDING)
    for part in log_powers(wav, n_mels):
        yield (part.clamp(min=floor) + 4) / 4


def speech_gains(wav: Tensor, level: float) -> np.ndarray:
    """Gains in decibels, one every LEVEL_STEP blocks, that raise speech quieter than `level` to it; 0 elsewhere.

    wav: (samples,) at 16 kHz; level: dB relative to full scale, of the louder blocks (SPEECH_PERCENTILE). Noise and
    hum are not raised; unlike speech they have no pauses.
    """
    levels = block_levels(wav)
    count = len(levels)
    gains = np.zeros(-(-count // LEVEL_STEP))
    for i, block in enumerate(range(0, count, LEVEL_STEP)):
        nearby = levels[max(block - LEVEL_REACH, 0) : block + LEVEL_REACH]
        nearby = nearby[nearby > DIGITAL_SILENCE]
        if len(nearby) == 0:
            continue
        speech, pause = np.percentile(nearby, [SPEECH_PERCENTILE, PAUSE_PERCENTILE])
        if speech > QUIETEST_SPEECH:
            share = np.clip((speech - pause - NOISE_RANGE) / (SPEECH_RANGE - NOISE_RANGE), 0, 1)
            gains[i] = share * max(level - speech, 0)
    return gains


def raise_quiet_speech(wav: Tensor, level: float) -> Tensor:
    """Apply `speech_gains` to `wav` (samples,). Returns `wav` itself if there is nothing to raise."""
    gains = speech_gains(wav, level)
    if not gains.any():
        return wav
    gain_samples = np.arange(len(gains)) * LEVEL_STEP * BLOCK
    return amplify(wav, lambda samples: 10 ** (np.interp(samples, gain_samples, gains) / 20))


@torch.inference_mode()
def feature_segments(encoder: AudioEncoder, wav: Tensor, mel_range: float = MEL_RANGE) -> Iterator[Tensor]:
    """Yield Whisper features, 50 rows a second, in segments of 30 s: (rows, layers, width) each.

    A segment of n mel frames gives n // 2 rows; short ones are padded with 0.0 in the normalised mel.
    """
    weight = encoder.conv1.weight
    for mel in mel_segments(wav, encoder.dims.n_mels, mel_range):
        padded = torch.nn.functional.pad(mel, (0, SEGMENT_FRAMES - mel.shape[1]))
        features = encoder(padded[None].to(weight.device, weight.dtype))[0]
        yield features[: mel.shape[1] // 2]


def frame_count(samples: int, rate: Fraction = Fraction(FPS)) -> int:
    """Number of video frames, `rate` a second, that cover `samples` of audio at 16 kHz."""
    return math.ceil(samples * rate / SAMPLE_RATE)


def audio_chunks(
    encoder: AudioEncoder,
    wav: Tensor,
    frames: int,
    mel_range: float = MEL_RANGE,
    speech_level: float | None = None,
    silence_gate: bool = False,
    rate: Fraction = Fraction(FPS),
) -> Iterator[Tensor]:
    """Yield the audio tokens of video frames 0 … frames − 1, `rate` of them a second.

    wav: (samples,) float32 at 16 kHz; speech_level: dB relative to full scale, to which quieter speech is raised for an
    encoder that was trained without quieter speech, None: it is not raised; silence_gate: whether pauses are silenced
    (`silence.silence_pauses`). Yields (10 · layers, width) on the host, row-major (row, layer): rows c − 4 … c + 5
    around the row c that is nearest to the frame's time, each clamped to the clip.
    """
    if speech_level is not None:
        wav = raise_quiet_speech(wav, speech_level)
    if silence_gate:
        wav = silence_pauses(wav)
    total = max(len(wav), N_FFT) // HOP_LENGTH // 2  # every segment but the last has an even number of frames
    # Copied by segment: a copy per frame would wait for the device every time.
    segments = (features.cpu() for features in feature_segments(encoder, wav, mel_range))
    buffer, first = next(segments), 0  # rows first … first + len(buffer) − 1
    for i in range(frames):
        centre = math.floor(i * ROWS_PER_SECOND / rate + HALF)
        rows = [min(max(r, 0), total - 1) for r in range(centre - ROWS_BEFORE, centre + ROWS_AFTER)]
        while rows[-1] >= first + len(buffer):
            done = max(rows[0] - first, 0)
            buffer, first = torch.cat([buffer[done:], next(segments)]), first + done
        yield buffer[[r - first for r in rows]].flatten(0, 1)


def on_side_stream(items: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The items, which lie on the host, made in a CUDA stream of their own where the device is a GPU.

    In a thread of its own, waiting for an item is then not waiting for the denoising.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    while True:
        with torch.cuda.stream(stream):  # None: no change
            item = next(items, None)
        if item is None:
            return
        yield item
