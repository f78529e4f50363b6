"""Files that are written: where their sound lies and what plays it, what they take over from the video, and that
whoever waits for an encoder which stands still can end it."""

from pathlib import Path

import numpy as np
import pytest
from clips import ffmpeg, make_video

from latentsync.media import probe_video, read_audio, read_frames_looped
from latentsync.media.writing import VideoWriter

CONTAINERS = [".mp4", ".m4v", ".mov", ".mkv"]
MOST = 0.010  # seconds between a sound and the mouth that says it
RATE = 16_000


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return probe_video(make_video(tmp_path_factory.mktemp("picture") / "picture.mp4", seconds=0.4))


def write(path: Path, info, sound: Path, seconds: float = 1, **options) -> Path:
    with VideoWriter(path, info, audio=sound, **options) as writer:
        for _, frame in read_frames_looped(info, round(25 * seconds)):
            writer.write(frame)
    return path


def beeps(seconds: float = 1.003, rate: int = 44100) -> str:
    """A source of sound that lasts so long, with a beep of 0.1 s after 0.2 s, and one 0.2 s before its end."""
    late = seconds - 0.2
    return f"aevalsrc='0.8*sin(2000*2*PI*t)*(between(t,0.2,0.3)+gte(t,{late})*lt(t,{late}+0.1))':s={rate}:d={seconds}"


def piece(path: Path, *options: object, **source) -> Path:
    ffmpeg("-f", "lavfi", "-i", beeps(**source), *options, path)
    return path


def onsets(samples: np.ndarray) -> np.ndarray:
    """Seconds at which beeps begin in sound at RATE."""
    loud = np.flatnonzero(np.abs(samples) > 0.3)
    return loud[np.diff(loud, prepend=-RATE) > RATE // 20] / RATE


def heard(path: Path, by_time: bool) -> np.ndarray:
    """The sound of a file as a player has it that goes by the timestamps, or by the samples alone."""
    resample = f"aresample={RATE}:async=1:first_pts=0" if by_time else f"aresample={RATE}"
    return np.frombuffer(ffmpeg("-i", path, "-map", "0:a:0", "-af", resample, "-ac", 1, "-f", "f32le", "-"), np.float32)


def joined(folder: Path, suffix: str, *options: object, **source) -> Path:
    """A sound file of four others, one behind the other."""
    one = piece(folder / f"one{suffix}", *options, **source).read_bytes()
    path = folder / f"joined{suffix}"
    path.write_bytes(4 * one)
    return path


def chained(folder: Path, *options: object, **source) -> Path:
    """An Ogg file of four streams, each with a number of its own, as radio stations and telephones join them."""
    path = folder / "chained.ogg"
    with open(path, "wb") as file:
        for number in range(4):
            numbered = ("-serial_offset", number, "-f", "ogg")
            file.write(piece(folder / f"{number}.ogg", *options, *numbered, **source).read_bytes())
    return path


def with_gap(folder: Path, suffix: str, seconds: float, *options: object) -> Path:
    """Sound whose packets lie later from its middle on, as where a recorder has lost some."""
    whole, path = piece(folder / f"whole{suffix}", *options), folder / f"gap{suffix}"
    later = f"setts=ts='if(gt(TS*TB,0.5),TS+{seconds}/TB,TS)'"
    ffmpeg("-i", whole, "-c", "copy", "-bsf:a", later, path)
    return path


def odd_wav(folder: Path) -> Path:
    """A WAV file with chunks of odd length before and behind its samples."""
    data = piece(folder / "plain.wav").read_bytes()
    head, samples = data[12:36], data[data.index(b"data") :]
    odd = b"odd " + (5).to_bytes(4, "little") + b"12345\0"
    body = b"WAVE" + odd + head + odd + samples + odd
    path = folder / "odd.wav"
    path.write_bytes(b"RIFF" + len(body).to_bytes(4, "little") + body)
    return path


def cut_m4a(folder: Path) -> Path:
    """An M4A that says in its edit list that it begins in the middle of a packet."""
    path = folder / "cut.m4a"
    ffmpeg("-ss", 0.1, "-i", piece(folder / "whole.m4a"), "-c", "copy", path)
    return path


SOUNDS = {
    "chained Vorbis": lambda folder: chained(folder, "-c:a", "libvorbis"),
    "chained Opus": lambda folder: chained(folder, "-c:a", "libopus", rate=48000),
    "chained FLAC": lambda folder: chained(folder, "-c:a", "flac"),
    "joined MP3": lambda folder: joined(folder, ".mp3"),
    "joined MP3 of 22 kHz": lambda folder: joined(folder, ".mp3", rate=22050),
    "joined AAC": lambda folder: joined(folder, ".aac"),
    "joined AC-3": lambda folder: joined(folder, ".ac3", rate=48000),
    "MP3 behind a gap of 0.3 s": lambda folder: with_gap(folder, ".mka", 0.3, "-c:a", "mp3"),
    "AAC behind a gap of 0.5 s": lambda folder: with_gap(folder, ".m4a", 0.5),
    "AAC behind a gap of 0.03 s": lambda folder: with_gap(folder, ".mka", 0.03, "-c:a", "aac"),
    "WAV with odd chunks": odd_wav,
    "M4A cut without encoding": cut_m4a,
    "HE-AAC rates": lambda folder: piece(folder / "a.m4a", rate=22050),
    "96 kHz": lambda folder: piece(folder / "a.wav", rate=96000),
    "8 kHz": lambda folder: piece(folder / "a.wav", rate=8000),
    "37.8 kHz": lambda folder: piece(folder / "a.wav", rate=37800),
}


@pytest.mark.parametrize("copy_audio", [False, True], ids=["", "copied"])
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("kind", SOUNDS)
def test_sound_lies_where_the_mouth_that_says_it_does(tmp_path, picture, kind, suffix, copy_audio):
    """At its start, at its joints and at its end; to a player that goes by timestamps, and to one that does not."""
    sound = SOUNDS[kind](tmp_path)
    said = onsets(read_audio(sound))
    assert len(said) == (8 if "joined" in kind or "chained" in kind else 2)
    out = write(tmp_path / f"out{suffix}", picture, sound, seconds=5, copy_audio=copy_audio)
    for by_time in (True, False):
        times = onsets(heard(out, by_time))
        print(np.round(1000 * (times - said), 1))
        assert len(times) == len(said) and np.abs(times - said).max() < MOST
