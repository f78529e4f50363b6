"""The silence gate: what it silences, and what it must leave alone."""

import numpy as np
import pytest
import torch

from latentsync import SAMPLE_RATE
from latentsync.__main__ import make_parser
from latentsync.audio import audio_chunks
from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import load_models
from latentsync.silence import BLOCK, HANGOVER, silence_pauses

WORDS = ((1.0, 1.6), (1.7, 2.4), (3.4, 4.1), (5.2, 5.9))  # seconds; the gap of 0.1 s is within a sentence
SECONDS = 7
HELD = HANGOVER * BLOCK / SAMPLE_RATE + 0.04  # seconds that may stay beside a word


def db(level: float) -> float:
    return 10 ** (level / 20)


def speech(level: float = -20.0) -> np.ndarray:
    """Syllables of a buzzing voice, 5 a second, with silence between the words."""
    t = np.arange(SECONDS * SAMPLE_RATE) / SAMPLE_RATE
    voice = sum(np.sin(2 * np.pi * 120 * k * t) / k for k in range(1, 20)) * (1 + 0.6 * np.sin(2 * np.pi * 5 * t))
    mask = np.zeros(len(t))
    for start, stop in WORDS:
        mask[int(start * SAMPLE_RATE) : int(stop * SAMPLE_RATE)] = 1
    voice = voice * mask
    return voice / np.sqrt(np.mean(voice[mask > 0] ** 2)) * db(level)


def noise(kind: str, level: float) -> np.ndarray:
    n = SECONDS * SAMPLE_RATE
    t = np.arange(n) / SAMPLE_RATE
    white = np.random.default_rng(0).normal(size=n)
    if kind == "hum":
        sound = np.sin(2 * np.pi * 50 * t) + 0.5 * np.sin(2 * np.pi * 150 * t)
    elif kind == "room":  # falls by 3 dB an octave
        sound = np.fft.irfft(np.fft.rfft(white) / np.sqrt(np.maximum(np.arange(n // 2 + 1), 1)), n)
    else:
        sound = white
    return sound / np.sqrt(np.mean(sound**2)) * db(level)


def gated(sound: np.ndarray) -> np.ndarray:
    return silence_pauses(torch.from_numpy(sound.astype(np.float32))).numpy()


def part(sound: np.ndarray, start: float, stop: float) -> np.ndarray:
    return sound[int(start * SAMPLE_RATE) : int(stop * SAMPLE_RATE)]


@pytest.mark.parametrize("kind", ["white", "hum", "room"])
@pytest.mark.parametrize("voice, level", [(-20, -35), (-20, -50), (-20, -70), (-45, -60)])
def test_pauses_become_silent_and_words_stay_as_they_are(kind, voice, level):
    sound = (speech(voice) + noise(kind, level)).astype(np.float32)
    out = gated(sound)
    for start, stop in WORDS:
        assert np.array_equal(part(out, start, stop), part(sound, start, stop))
    for start, stop in ((0, WORDS[0][0]), (2.4, 3.4), (4.1, 5.2), (5.9, SECONDS)):
        assert not part(out, start + HELD, stop - HELD).any()


def test_a_gap_within_a_sentence_stays():
    sound = (speech() + noise("white", -50)).astype(np.float32)
    assert np.array_equal(part(gated(sound), 1.0, 2.4), part(sound, 1.0, 2.4))


@pytest.mark.parametrize("kind", ["white", "hum", "room"])
def test_sound_without_anything_that_stands_out_is_left_alone(kind):
    sound = torch.from_numpy(noise(kind, -20).astype(np.float32))
    assert silence_pauses(sound) is sound


def test_a_click_in_a_pause_is_no_word():
    sound = speech() + noise("white", -55)
    at = int(4.7 * SAMPLE_RATE)
    sound[at : at + 200] += 0.5
    assert not part(gated(sound), 4.1 + HELD, 5.2 - HELD).any()


def test_a_second_speaker_who_is_quieter_is_heard():
    sound = speech(-20)
    sound[int(3 * SAMPLE_RATE) : int(4.5 * SAMPLE_RATE)] *= db(-20)
    sound = (sound + noise("white", -65)).astype(np.float32)
    assert np.array_equal(part(gated(sound), 3.4, 4.1), part(sound, 3.4, 4.1))


@pytest.mark.parametrize("samples", [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 5])
def test_sound_of_any_length_keeps_its_length(samples):
    assert len(silence_pauses(torch.zeros(samples))) == samples


def test_the_tokens_of_a_pause_are_nearer_to_those_of_true_silence(checkpoint):
    cpu = torch.device("cpu")
    models = load_models(resolve_model(str(checkpoint), cpu), cpu, torch.float32)
    voice, sound = (torch.from_numpy(x.astype(np.float32)) for x in (speech(), speech() + noise("hum", -45)))
    frames = 25 * SECONDS

    def tokens(wav, gate):
        return torch.stack(list(audio_chunks(models.audio_encoder, wav, frames, silence_gate=gate)))

    silent, noisy, after = tokens(voice, False), tokens(sound, False), tokens(sound, True)
    pause = slice(int(4.5 * 25), int(4.8 * 25))
    far, near = ((tokens[pause] - silent[pause]).abs().mean() for tokens in (noisy, after))
    assert near < far / 2
    assert torch.equal(tokens(voice, False), silent)


def test_the_gate_can_be_switched_off():
    def chosen(*options):
        return make_parser().parse_args(["a.mp4", "b.wav", "-o", "c.mp4", *options]).silence_gate

    assert chosen() == "on" and chosen("--silence-gate", "off") == "off"
