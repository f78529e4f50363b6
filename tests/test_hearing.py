"""What the model hears of a sound is what a listener hears: of its channels, and however quiet it is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from clips import ffmpeg

from latentsync.audio import audio_chunks, raise_quiet_speech, speech_gains
from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import load_audio_encoder
from latentsync.media import read_audio
from latentsync.media.mixing import mix_down

RATE = 16_000


def voice(seconds: float = 3.0, seed: int = 0, pitch: float = 120.0) -> np.ndarray:
    """Something like speech: harmonics of a wandering pitch, syllables, pauses between words; peak 0.5, −20 dB."""
    random = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.1 * np.sin(2 * np.pi * 0.7 * t))) / RATE
    harmonics = sum(np.sin(k * phase + random.uniform(0, 6)) / k for k in range(1, 25))
    syllables = np.clip(np.sin(2 * np.pi * 2 * t + seed), 0, None) * (np.sin(2 * np.pi * 0.6 * t + seed) > -0.5)
    sound = harmonics * syllables
    return (0.5 * sound / np.abs(sound).max()).astype(np.float32)


def noise(samples: int, decibels: float, seed: int = 9) -> np.ndarray:
    return (np.random.default_rng(seed).normal(0, 10 ** (decibels / 20), samples)).astype(np.float32)


def level(wav: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(wav.astype(np.float64) ** 2)))


def write(path: Path, *channels: np.ndarray, layout: str = "") -> Path:
    """A float WAV of these channels."""
    raw = path.with_suffix(".raw")
    raw.write_bytes(np.stack(channels, 1).astype(np.float32).tobytes())
    places = ("-channel_layout", layout) if layout else ()
    ffmpeg("-f", "f32le", "-ar", RATE, "-ac", len(channels), *places, "-i", raw, "-c:a", "pcm_f32le", path)
    return path


def likeness(heard: np.ndarray, wanted: np.ndarray) -> float:
    """Absolute correlation: turned upside down a voice sounds the same."""
    return float(abs(np.corrcoef(heard, wanted)[0, 1]))


VOICE = voice()
SILENCE = np.zeros_like(VOICE)
LATE = np.concatenate([np.zeros(67, np.float32), VOICE[:-67]])  # half a period of its pitch
ONE_VOICE = {
    "one channel inverted": (VOICE, -VOICE),
    "one channel inverted and quieter": (VOICE, -0.5 * VOICE),
    "one channel inverted, with noise": (VOICE, noise(len(VOICE), -50) - VOICE),
    "only the left channel": (VOICE, SILENCE),
    "only the right channel": (SILENCE, VOICE),
    "noise in the other channel": (VOICE, noise(len(VOICE), -40)),
    "noise before the voice in the other channel": (noise(len(VOICE), -45), VOICE),
}


@pytest.mark.parametrize("name", ONE_VOICE)
def test_a_voice_is_heard_at_its_level_though_the_channels_cancel_or_only_one_speaks(tmp_path, name):
    heard = read_audio(write(tmp_path / "a.wav", *ONE_VOICE[name]))
    assert likeness(heard, VOICE) > 0.99
    assert level(heard) == pytest.approx(level(VOICE), abs=0.5)


def test_a_voice_that_one_channel_has_later_is_heard_clean(tmp_path):
    """The sum lacks the pitch itself, which half a period of delay turns around."""
    pitch = np.sin(2 * np.pi * 120 * np.arange(len(VOICE)) / RATE).astype(np.float32) * 0.3
    heard = read_audio(write(tmp_path / "a.wav", pitch, np.roll(pitch, 67)))
    assert level(heard) == pytest.approx(level(pitch), abs=0.5)
    heard = read_audio(write(tmp_path / "b.wav", VOICE, LATE))
    assert level(heard) > level(VOICE) - 4


def test_both_speakers_of_a_dialogue_are_heard_each_from_their_side(tmp_path):
    first, second = voice(6.0), voice(6.0, seed=1, pitch=210)
    turn = len(first) // 2
    first[turn:], second[:turn] = 0, 0
    heard = read_audio(write(tmp_path / "a.wav", first, second))
    for own, here in ((first, slice(0, turn - 8000)), (second, slice(turn + 8000, None))):
        assert likeness(heard[here], own[here]) > 0.99
        assert level(heard[here]) == pytest.approx(level(own[here]), abs=0.5)
    assert likeness(heard, first + second) > 0.98


@pytest.mark.parametrize("places", [[2], [4], [5], [0]])  # centre, left and right surround, front left
def test_a_voice_in_one_channel_of_surround_sound_is_heard(tmp_path, places):
    """Its level is that of ffmpeg's stereo, in which a voice from one side is not halved once more."""
    channels = [VOICE if place in places else SILENCE for place in range(6)]
    path = write(tmp_path / "a.wav", *channels, layout="5.1")
    heard = read_audio(path)
    pair = ffmpeg("-i", path, "-af", "aresample=ochl=stereo:osf=flt:rematrix_maxval=1", "-f", "f32le", "-")
    stereo = np.frombuffer(pair, np.float32).reshape(-1, 2)
    assert likeness(heard, VOICE) > 0.99
    assert level(heard) == pytest.approx(level(stereo[:, np.abs(stereo).sum(0).argmax()]), abs=0.5)


ORDINARY = {
    "a voice in the middle of wide music": (VOICE + noise(len(VOICE), -35), VOICE + noise(len(VOICE), -35, seed=8)),
    "nothing in common": (noise(len(VOICE), -20), noise(len(VOICE), -20, seed=8)),
    "a voice a little to the left": (VOICE, 0.6 * VOICE),
    "a channel that is late by an eighth of a millisecond": (VOICE, np.roll(VOICE, 2)),
    "silence": (SILENCE, SILENCE),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_stereo_is_mixed_as_ffmpeg_mixes_it_to_the_bit(tmp_path, name):
    path = write(tmp_path / "a.wav", *ORDINARY[name])
    mix = ffmpeg("-i", path, "-af", "aresample=ochl=mono:osf=flt:rematrix_maxval=1", "-f", "f32le", "-")
    assert np.array_equal(read_audio(path), np.clip(np.frombuffer(mix, np.float32), -1, 1))


def turning() -> np.ndarray:
    """(n, 3) of a tone whose right channel slowly turns into its opposite, and falls silent in the end."""
    t = np.arange(6 * RATE) / RATE
    tone = 0.5 * np.sin(2 * np.pi * 220 * t)
    right = tone * np.interp(t, [1, 2, 4, 5], [1, -1, -1, 0])
    return np.stack([tone, right, (tone + right) / 2], 1).astype(np.float32)


def test_the_mix_changes_without_a_click_and_keeps_the_level():
    samples = turning()
    heard = np.concatenate(list(mix_down([samples], RATE)))
    step = 0.5 * 2 * np.pi * 220 / RATE  # the tone's steepest
    assert np.abs(np.diff(heard)).max() < 1.02 * step
    assert np.abs(np.diff(heard, n=2)).max() < 1.1 * step * 2 * np.pi * 220 / RATE
    assert level(heard[2 * RATE :]) == pytest.approx(level(samples[:, 0]), abs=0.1)


@pytest.mark.parametrize("length", [1, 321, 48_000])
def test_the_mix_does_not_depend_on_where_the_sound_is_cut_into_chunks(length, monkeypatch):
    monkeypatch.setattr("latentsync.media.mixing.PIECE_BLOCKS", 40)
    samples = turning()[: 3 * RATE + 5] if length > 1 else turning()[RATE : RATE + 9_000]
    whole = np.concatenate(list(mix_down([samples], RATE)))
    chunks = (samples[i : i + length] for i in range(0, len(samples), length))
    assert np.array_equal(np.concatenate(list(mix_down(chunks, RATE))), whole)


@pytest.mark.parametrize("samples", [0, 1, 5, 320, 321])
def test_a_sound_of_a_few_samples_is_mixed(samples):
    heard = list(mix_down([np.full((samples, 3), (1, 0, 0.5), np.float32)], RATE))
    assert [len(piece) for piece in heard] == ([samples] if samples else [])
    assert all((piece == 1).all() for piece in heard)


LEVEL = -20.0
ROOT = Path(__file__).parent.parent


def quieter(wav: np.ndarray, decibels: float) -> torch.Tensor:
    return torch.from_numpy((wav * 10 ** (decibels / 20)).astype(np.float32))


def loud_level(wav: torch.Tensor | np.ndarray) -> float:
    """dB of the 95th percentile of 20 ms blocks, as `speech_gains` has it."""
    blocks = np.asarray(wav, np.float64)[: len(wav) // 320 * 320].reshape(-1, 320)
    return float(10 * np.log10(np.percentile((blocks**2).mean(1), 95) + 1e-20))


@pytest.mark.parametrize("decibels", [-12, -20, -28, -36, -48])
def test_quiet_speech_is_raised_to_the_level_that_the_encoder_has_learnt(decibels):
    raised = raise_quiet_speech(quieter(VOICE, decibels), LEVEL)
    assert loud_level(raised) == pytest.approx(LEVEL, abs=1.5)
    assert likeness(raised.numpy(), VOICE) > 0.98


@pytest.mark.parametrize("decibels", [0, -3, 6])
def test_speech_that_is_loud_enough_is_heard_to_the_bit(decibels):
    wav = quieter(VOICE, decibels)
    assert raise_quiet_speech(wav, LEVEL) is wav


def test_the_examples_speech_is_heard_to_the_bit():
    wav = torch.from_numpy(read_audio(ROOT / "assets" / "example" / "speech.wav"))
    assert raise_quiet_speech(wav, LEVEL) is wav


def hum(samples: int, decibels: float) -> np.ndarray:
    t = np.arange(samples) / RATE
    wave = sum(np.sin(2 * np.pi * 50 * k * t) / k for k in range(1, 9))
    return wave / np.sqrt(np.mean(wave**2)) * 10 ** (decibels / 20)


def room(samples: int, decibels: float) -> np.ndarray:
    """Noise as of a ventilation: little above 300 Hz."""
    wave = np.convolve(noise(samples + 200, 0), np.exp(-np.arange(201) / 30), "valid")
    return wave / wave.std() * 10 ** (decibels / 20)


PAUSE = np.zeros(2 * RATE)
NOT_SPEECH = {
    **{f"noise at {level} dB": noise(5 * RATE, level) for level in (-60, -50, -40)},
    **{f"hum at {level} dB": hum(5 * RATE, level) for level in (-60, -40)},
    **{f"ventilation at {level} dB": room(5 * RATE, level) for level in (-60, -40)},
    "noise between stretches of digital silence": np.concatenate([PAUSE, noise(3 * RATE, -50), PAUSE]),
    "digital silence": np.zeros(3 * RATE),
    "the last bit of 16": np.random.default_rng(0).integers(-1, 2, 3 * RATE) / 32768,
    "a knock in noise": noise(5 * RATE, -60) + 0.05 * np.exp(-np.maximum(np.arange(5 * RATE) - 40_000, 0) / 200.0)
    * (np.arange(5 * RATE) >= 40_000) * noise(5 * RATE, 0, seed=3),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_SPEECH)
def test_what_is_no_speech_is_not_raised(name):
    wav = torch.from_numpy(NOT_SPEECH[name].astype(np.float32))
    assert raise_quiet_speech(wav, LEVEL) is wav


def test_noise_in_a_long_pause_is_not_raised_with_the_quiet_speech_around_it():
    parts = [VOICE * 0.03, np.zeros(8 * RATE), VOICE * 0.03]
    wav = torch.from_numpy((np.concatenate(parts) + noise(14 * RATE, -70)).astype(np.float32))
    raised = raise_quiet_speech(wav, LEVEL)
    pause = slice(5 * RATE, 9 * RATE)
    assert torch.equal(raised[pause], wav[pause])
    assert min(loud_level(raised[: 2 * RATE]), loud_level(raised[-2 * RATE :])) > LEVEL - 3


def test_speech_that_becomes_quieter_is_raised_where_it_is_quiet_and_without_a_step():
    long = np.tile(VOICE, 4)
    fall = 10 ** (np.linspace(0, -40, len(long)) / 20)
    raised = raise_quiet_speech(torch.from_numpy((long * fall).astype(np.float32)), LEVEL).numpy()
    assert np.array_equal(raised[: 2 * RATE], (long * fall).astype(np.float32)[: 2 * RATE])
    assert loud_level(raised[-3 * RATE :]) > LEVEL - 5 > loud_level((long * fall)[-3 * RATE :]) + 10
    gains = speech_gains(torch.from_numpy((long * fall).astype(np.float32)), LEVEL)
    assert np.abs(np.diff(gains)).max() < 10


def test_the_gain_changes_without_a_step(monkeypatch):
    """Also where the sound is worked through in segments."""
    monkeypatch.setattr("latentsync.audio.SEGMENT_SAMPLES", 4800)
    monkeypatch.setattr("latentsync.audio.speech_gains", lambda *_: np.array([0.0, 20.0, 0.0, 10.0]))
    raised = raise_quiet_speech(torch.full((4 * 8000,), 0.01), LEVEL)
    assert raised.diff().abs().max() < 1e-4
    assert raised[[0, 8000, 16000, 24000, 31999]].tolist() == pytest.approx([0.01, 0.1, 0.01, 0.0316, 0.0316], rel=1e-2)


@pytest.mark.parametrize("samples", [0, 1, 319, 320, 5000])
def test_a_quiet_sound_of_a_few_samples_is_left_alone(samples):
    wav = torch.full((samples,), 1e-3)
    assert raise_quiet_speech(wav, LEVEL) is wav


def test_only_a_model_that_asks_for_it_hears_quiet_speech_raised(checkpoint):
    """The released models' numbers stay; the demo model hears quiet speech as it hears loud speech."""
    plain, demo = (resolve_model(name, torch.device("cpu")) for name in (str(checkpoint), "demo"))
    assert plain.speech_level is None and demo.speech_level == LEVEL
    encoder = load_audio_encoder(demo.whisper)
    heard = {
        (decibels, level): torch.stack(list(audio_chunks(encoder, quieter(VOICE, decibels), 50, demo.mel_range, level)))
        for decibels in (0, -28)
        for level in (None, demo.speech_level)
    }
    assert torch.equal(heard[0, None], heard[0, LEVEL])

    def difference(level: float | None) -> float:
        return float((heard[-28, level] - heard[0, level]).norm() / heard[0, level].norm())

    assert difference(LEVEL) < 0.5 * difference(None)
