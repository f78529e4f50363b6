"""The silence gate: sound between the words becomes true silence, so that noise, hum and breath move no mouth."""

from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Tensor

from latentsync import SAMPLE_RATE

BLOCK = SAMPLE_RATE // 50  # samples per level measurement, 20 ms
DIGITAL_SILENCE = -100.0  # dB relative to full scale, below the resolution of 16 bits: nothing was recorded
NO_THRESHOLD = -1000.0  # dB: all sound counts as speech
STEP = 25  # blocks: a threshold every 0.5 s
NOISE_REACH, SPEECH_REACH = 150, 1500  # blocks to either side, 3 s and 30 s, whose levels make a threshold
SPEECH_PERCENTILE, NOISE_PERCENTILE = 95, 10  # of these levels
MIN_RANGE = 8.0  # dB from noise to speech; with less the two cannot be told apart, and nothing is silenced
NOISE_SHARE, MIN_MARGIN, MAX_MARGIN = 0.35, 5.0, 12.0  # the threshold lies a share of the range, in dB, above the noise
SPEECH_RANGE = 30.0  # dB below speech: quieter sound is none
SMOOTHING = 3  # blocks
HANGOVER = 6  # blocks before and after speech that stay, 120 ms: soft onsets and endings
MIN_SPEECH, MIN_PAUSE = 5, 13  # blocks, odd: shorter sounds are clicks, shorter pauses belong to the words


def block_levels(wav: Tensor) -> np.ndarray:
    """Levels of the whole blocks of `wav` (samples,): float64 (blocks,), dB relative to full scale, at least −200."""
    count = len(wav) // BLOCK
    parts = wav[: count * BLOCK].split(1000 * BLOCK)
    power = [part.unflatten(0, (-1, BLOCK)).double().square().mean(1).cpu().numpy() for part in parts]
    return 10 * np.log10(np.maximum(np.concatenate(power), 1e-20))


def speech_blocks(levels: np.ndarray) -> np.ndarray:
    """Which blocks hold speech: bool (blocks,), from their levels in dB.

    Speech is what stands out of the noise around it. Where nothing does, every block counts as speech.
    """
    kernel = np.ones((SMOOTHING, 1)) / SMOOTHING  # of the power: rumble goes up and down within 20 ms
    levels = 10 * np.log10(
        cv2.filter2D(10 ** (levels[:, None] / 10), -1, kernel, borderType=cv2.BORDER_REPLICATE)[:, 0]
    )
    steps = np.arange(0, len(levels), STEP)
    thresholds = np.array([threshold(levels, block) for block in steps.tolist()])
    loud = (levels > np.interp(np.arange(len(levels)), steps, thresholds))[:, None].astype(np.uint8)
    loud = cv2.morphologyEx(loud, cv2.MORPH_OPEN, np.ones((MIN_SPEECH, 1), np.uint8))
    speech = cv2.dilate(loud, np.ones((2 * HANGOVER + 1, 1), np.uint8))
    speech = cv2.copyMakeBorder(speech, MIN_PAUSE, MIN_PAUSE, 0, 0, cv2.BORDER_CONSTANT, value=0)
    speech = cv2.morphologyEx(speech, cv2.MORPH_CLOSE, np.ones((MIN_PAUSE, 1), np.uint8))
    return speech[MIN_PAUSE:-MIN_PAUSE, 0] > 0


def threshold(levels: np.ndarray, block: int) -> float:
    """The level in dB above which sound around a block is speech.

    NO_THRESHOLD where speech and noise cannot be told apart.
    """

    def percentile(reach: int, percent: float) -> float:
        nearby = levels[max(block - reach, 0) : block + reach]
        nearby = nearby[nearby > DIGITAL_SILENCE]
        return float(np.percentile(nearby, percent)) if len(nearby) else DIGITAL_SILENCE

    noise, speech = percentile(NOISE_REACH, NOISE_PERCENTILE), percentile(SPEECH_REACH, SPEECH_PERCENTILE)
    if speech - noise < MIN_RANGE:
        return NO_THRESHOLD
    margin = float(np.clip(NOISE_SHARE * (speech - noise), MIN_MARGIN, MAX_MARGIN))
    return max(noise + margin, speech - SPEECH_RANGE)


def silence_pauses(wav: Tensor) -> Tensor:
    """Silence what lies between the words of sound (samples,) at 16 kHz, faded over 20 ms.

    Returns `wav` itself if there is no pause.
    """
    if len(wav) < BLOCK:
        return wav
    speech = speech_blocks(block_levels(wav))
    if speech.all():
        return wav
    centres = (np.arange(len(speech)) + 0.5) * BLOCK
    return amplify(wav, lambda samples: np.interp(samples, centres, speech))


def amplify(wav: Tensor, factors: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """A copy of sound (samples,), multiplied by the factors (n,) of its samples' numbers (n,), part by part."""
    amplified = wav.clone()
    for start in range(0, len(wav), 1000 * BLOCK):
        part = amplified[start : start + 1000 * BLOCK]
        part *= torch.from_numpy(factors(np.arange(start, start + len(part)))).to(part)
    return amplified
