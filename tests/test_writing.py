"""Files that are written: where their sound lies and what plays it, what they take over from the video, and that
whoever waits for an encoder which stands still can end it."""

import os
import re
import socket
import struct
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from clips import ffmpeg, make_sound, make_video
from imageio_ffmpeg import get_ffmpeg_exe

from latentsync.errors import UserError
from latentsync.media import VideoWriter, probe_audio, probe_video, read_audio, read_frames_looped
from latentsync.media.metadata import parse_metadata
from latentsync.media.segments import SegmentWriter

MOST_LEAD = 48  # samples, 1 ms
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
    "AAC of 22 kHz": lambda folder: piece(folder / "a.m4a", rate=22050),
    "96 kHz": lambda folder: piece(folder / "a.wav", rate=96000),
    "8 kHz": lambda folder: piece(folder / "a.wav", rate=8000),
    "37.8 kHz": lambda folder: piece(folder / "a.wav", rate=37800),
}


@pytest.mark.parametrize("suffix, copy_audio", [(".mp4", False), (".mov", True), (".mkv", False)])
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


ENCODED = {
    "a.wav": (),
    "mono.wav": ("-ac", 1),
    "surround.wav": ("-ac", 6),
    "eight.wav": ("-ac", 8),
    "a.mp3": (),
    "a.flac": (),
    "a.ac3": (),
    "a.ogg": ("-c:a", "libvorbis"),
    "a.opus": ("-c:a", "libopus"),
    "deep.wav": ("-c:a", "pcm_s24le", "-ar", 96000),
}


@pytest.mark.parametrize("suffix, name", [*((".mp4", name) for name in ENCODED), (".m4v", "a.wav"), (".mov", "a.wav")])
def test_sound_for_the_players_of_telephones_is_aac(tmp_path, picture, name, suffix):
    sound = piece(tmp_path / name, "-ac", 2, *ENCODED[name], rate=48000)
    info = probe_audio(write(tmp_path / f"out{suffix}", picture, sound))
    assert (info.codec, info.channels, info.sample_rate) == ("aac", probe_audio(sound).channels, 48000)
    assert profile(info.path) == "LC"


def profile(path: Path) -> str:
    """ffmpeg's name of the kind of AAC in a file."""
    messages = subprocess.run([get_ffmpeg_exe(), "-hide_banner", "-i", path], capture_output=True, text=True).stderr
    return re.search(r": Audio: aac \(([\w-]+)\)", messages)[1]


@pytest.mark.parametrize("channels, bits", [(1, 128_000), (2, 256_000), (6, 768_000)])
def test_aac_has_bits_enough_for_its_channels(tmp_path, picture, channels, bits):
    noise = "|".join(["0.3*random(0)-0.15"] * channels)
    sound = make_sound(tmp_path / "noise.wav", source=f"aevalsrc={noise}:s=48000", seconds=3)
    out = write(tmp_path / "out.mp4", picture, sound, seconds=3)
    size = len(ffmpeg("-i", out, "-map", "0:a", "-c", "copy", "-f", "data", "-"))
    assert 0.8 * bits < 8 * size / 3 < 1.1 * bits


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("source", ["a.m4a", "a.aac", "a.mka"])
def test_aac_is_copied_to_the_bit(tmp_path, picture, source, suffix):
    sound = piece(tmp_path / source, "-c:a", "aac")
    out = write(tmp_path / f"out{suffix}", picture, sound, seconds=2)
    before, after = (ffmpeg("-i", path, "-map", "0:a", "-f", "f32le", "-") for path in (sound, out))
    # A few samples of those that a decoder leaves out remain where a container counts in milliseconds.
    assert any(before[:160_000] == after[4 * lead :][:160_000] for lead in range(MOST_LEAD))
    assert abs(len(before) - len(after)) < 4 * 1024  # a packet


@pytest.mark.parametrize("suffix, codec", [(".mkv", "pcm_f32le"), (".mp4", "flac"), (".mov", "pcm_f32le")])
def test_kept_sound_is_the_same_to_the_bit_where_the_container_holds_it(tmp_path, picture, suffix, codec):
    sound = make_sound(tmp_path / "a.wav", "-c:a", "pcm_f32le", source="anoisesrc=r=48000:a=0.5", seconds=1)
    out = write(tmp_path / f"out{suffix}", picture, sound, copy_audio=True)
    assert probe_audio(out).codec == codec
    before, after = (np.frombuffer(ffmpeg("-i", p, "-map", "0:a", "-f", "f32le", "-"), "f4") for p in (sound, out))
    assert np.abs(before - after).max() <= (0 if codec == "pcm_f32le" else 2**-23)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("name", ["a.wav", "a.m4a"])
def test_a_result_that_ends_early_keeps_sound_and_mouth_together(tmp_path, picture, name, suffix):
    sound = piece(tmp_path / name, seconds=3)
    out = tmp_path / f"out{suffix}"
    with VideoWriter(out, picture, audio=sound) as writer:
        for _, frame in read_frames_looped(picture, 30):
            writer.write(frame)
        writer.cut = True
    assert probe_video(out).n_frames == 30 and probe_audio(out).duration == pytest.approx(1.2, abs=0.05)
    for by_time in (True, False):
        assert np.abs(onsets(heard(out, by_time)) - onsets(read_audio(sound))[:1]).max() < MOST


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_only_a_regular_file_can_be_written_over(tmp_path, picture):
    os.mkfifo(tmp_path / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.mp4"))
        (tmp_path / "device.mp4").symlink_to("/dev/null")
        for name in ("pipe", "socket", "device"):
            with pytest.raises(UserError, match=f"{name}.mp4' is a pipe or a device"):
                VideoWriter(tmp_path / f"{name}.mp4", picture)
    os.link(picture.path, tmp_path / "same.mp4")
    with pytest.raises(UserError, match="same.mp4' is an input"):
        VideoWriter(tmp_path / "same.mp4", picture)


# ---- what is taken over from the video

SECRET = {
    "location": "+48.1372+011.5756/", "com.apple.quicktime.location.ISO6709": "+48.1372+011.5756/",
    "make": "Fairphone", "model": "FP5", "com.android.version": "Android 14.2", "creation_time": "2024-05-06T07:08:09Z",
    "comment": "from my flat", "encoder": "SecretCam 1.0", "artist": "Jane Doe", "album": "Our flat",
    "description": "filmed at home", "synopsis": "home", "date": "2024-05-06",
}  # fmt: skip
SUBTITLES = [(0.2, 0.6, "first"), (0.8, 1.4, "second"), (1.7, 5.0, "third")]
CHAPTERS = [(0, 0.5, "One; two = [three] # \\ four"), (0.5, 1.5, "Two"), (1.5, 3, "Three")]


def clock(seconds: float) -> str:
    return f"00:00:{seconds:06.3f}".replace(".", ",")


def film(path: Path, *options: object, title: str = "A film", sound: str = "sine", codec: str | None = None) -> Path:
    """Three seconds with a title, chapters and two tracks of subtitles, and with what is nobody's business."""
    text = path.with_suffix(".srt")
    text.write_text(
        "".join(f"{i}\n{clock(a)} --> {clock(b)}\n{words}\n\n" for i, (a, b, words) in enumerate(SUBTITLES, 1))
    )
    chapters = path.with_suffix(".txt")
    escaped = [(start, end, re.sub(r"([=;#\\])", r"\\\1", words)) for start, end, words in CHAPTERS]
    chapters.write_text(
        ";FFMETADATA1\n" + "".join(
            f"[CHAPTER]\nTIMEBASE=1/1000\nSTART={1000 * a:.0f}\nEND={1000 * b:.0f}\ntitle={words}\n"
            for a, b, words in escaped
        )
    )  # fmt: skip
    tags = [option for key, value in SECRET.items() for option in ("-metadata", f"{key}={value}")]
    ffmpeg(
        *("-f", "lavfi", "-i", "testsrc2=s=160x120:r=25:d=3", "-f", "lavfi", "-i", f"{sound}=d=3"),
        *("-i", text, "-i", text, "-i", chapters, "-map", 0, "-map", 1, "-map", 2, "-map", 3, "-map_chapters", 4),
        *("-metadata", f"title={title}", *tags, "-metadata:s:a:0", "language=nld"),
        *("-metadata:s:s:0", "language=deu", "-metadata:s:s:1", "language=fra", "-metadata:s:s:1", "title=Pour tous"),
        *("-metadata:s:v:0", "handler_name=FP5 camera", "-movflags", "use_metadata_tags", "-disposition:s:1", "forced"),
        *("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p"),
        *("-c:a", "aac", "-c:s", codec or ("mov_text" if path.suffix in {".mp4", ".mov"} else "srt"), *options, path),
    )
    return path


def said(path: Path) -> str:
    """What ffmpeg writes of a file's metadata."""
    return ffmpeg("-i", path, "-map", 0, "-c", "copy", "-f", "ffmetadata", "-").decode()


def shown(path: Path, track: int = 0) -> list[tuple[float, float, str]]:
    """Times in seconds, on the file's own clock, and words of a track of subtitles."""
    text = ffmpeg("-copyts", "-i", path, "-map", f"0:s:{track}", "-f", "srt", "-").decode()
    found = re.findall(r"([\d:,]+) --> ([\d:,]+)\n(?:<[^>]*>)*(\w+)", text)
    return [(in_seconds(begin), in_seconds(end), words) for begin, end, words in found]


def in_seconds(time: str) -> float:
    hours, minutes, seconds = time.replace(",", ".").split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def chapters(path: Path) -> list[tuple[float, float, str]]:
    parsed = parse_metadata(said(path)).chapters
    return [(*(float(int(c[key]) * Fraction(c["timebase"])) for key in ("start", "end")), c["title"]) for c in parsed]


def duration(path: Path) -> float:
    messages = subprocess.run([get_ffmpeg_exe(), "-hide_banner", "-i", path], capture_output=True, text=True).stderr
    return in_seconds(re.search(r"  Duration: ([\d:.]+)", messages)[1])


def as_pieces(output: Path, info, sound: Path, seconds: float) -> Path:
    folder = output.with_name("work")
    with SegmentWriter(
        output,
        info,
        sound,
        30,
        folder=folder,
        total=round(25 * seconds),
        segment_frames=20,
        counts={},
        on_message=print,
    ) as writer:
        for _, frame in read_frames_looped(info, round(25 * seconds)):
            writer.write(frame)
    return output


@pytest.mark.parametrize("make", [write, as_pieces])
@pytest.mark.parametrize("source", ["film.mkv", "film.mp4"])
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_title_chapters_and_subtitles_go_along_and_nothing_else(tmp_path, source, suffix, make):
    video = film(tmp_path / source)
    sound = piece(tmp_path / "voice.mka", "-c:a", "flac", "-metadata:s:a:0", "language=swe", seconds=2.2)
    out = make(tmp_path / f"out{suffix}", probe_video(video), sound, seconds=2.2)
    text = said(out)
    assert "title=A film\n" in text and "Synthetic media" in text
    languages = [stream.get("language") for stream in parse_metadata(text).streams]
    assert languages[1:4] == (["sve", "ger", "fra"] if suffix == ".mov" else ["swe", "deu", "fra"])
    data = out.read_bytes()
    for secret in [*SECRET.values(), "FP5 camera"]:
        assert secret.encode() not in data, secret
    for track in (0, 1):
        found = shown(out, track)
        assert [words for *_, words in found] == ["first", "second", "third"]
        wanted = [(0.2, 0.6), (0.8, 1.4), (1.7, 2.2)]  # the last one ends with the picture
        assert np.abs(np.array([times for *times, _ in found]) - wanted).max() < 0.002
    found = chapters(out)
    assert [words for *_, words in found] == [words for *_, words in CHAPTERS]
    assert np.abs(np.array([times for *times, _ in found]) - [(0, 0.5), (0.5, 1.5), (1.5, 2.2)]).max() < 0.002
    assert duration(out) == pytest.approx(2.2, abs=0.05)
    assert sorted(os.listdir(tmp_path)) == sorted(
        [source, f"{Path(source).stem}.srt", f"{Path(source).stem}.txt", "voice.mka", out.name]
    )


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_video_that_plays_backward_is_subtitled_the_first_time(tmp_path, suffix):
    info = probe_video(film(tmp_path / "film.mkv"))
    sound = piece(tmp_path / "voice.wav", seconds=7)
    out = write(tmp_path / f"out{suffix}", info, sound, seconds=7)
    assert [words for *_, words in shown(out)] == ["first", "second", "third"]
    assert shown(out)[-1][1] == pytest.approx(3, abs=0.002) and chapters(out)[-1][1] == pytest.approx(3, abs=0.002)
    assert duration(out) == pytest.approx(7, abs=0.05)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("source", ["late.mkv", "late.mp4"])
def test_subtitles_follow_a_picture_that_begins_late(tmp_path, suffix, source):
    """What was shown before the first picture is gone, and what was shown at it is shown from its beginning on."""
    whole, video = film(tmp_path / f"film{Path(source).suffix}"), tmp_path / source
    ffmpeg(
        *("-i", whole, "-itsoffset", 1, "-i", whole, "-map", "1:v", "-map", "0:a", "-map", "0:s", "-c", "copy"),
        *("-map_chapters", 0, video),
    )
    info = probe_video(video)
    begins = float(info.start_pts * info.time_base)
    assert begins == pytest.approx(1, abs=0.1)
    sound = piece(tmp_path / "voice.wav", seconds=2)
    out = write(tmp_path / f"out{suffix}", info, sound, seconds=2)
    assert abs(first_time(out, "v:0")) < 1e-6 and abs(first_time(out, "a:0", "pcm_s16le")) < 0.002
    assert [words for *_, words in shown(out)] == ["second", "third"]
    wanted = [(0, 1.4 - begins), (1.7 - begins, 2)]
    assert np.abs(np.array([times for *times, _ in shown(out)]) - wanted).max() < 0.002
    assert chapters(out)[0][:2] == pytest.approx((0, 1.5 - begins), abs=0.002)


def packet_times(path: Path, stream: str, codec: str = "copy") -> list[float]:
    """Times of a stream's packets, in seconds on the file's own clock."""
    base, times = Fraction(1), []
    text = ffmpeg("-copyts", "-i", path, "-map", f"0:{stream}", "-c", codec, "-f", "framecrc", "-").decode()
    for line in text.splitlines():
        if line.startswith("#tb 0:"):
            base = Fraction(line.split()[2])
        elif not line.startswith("#"):
            times.append(float(int(line.split(",")[2]) * base))
    return times


def first_time(path: Path, stream: str, codec: str = "copy") -> float:
    return min(packet_times(path, stream, codec))


def pictures_of_words(times: list[float]) -> bytes:
    """Subtitles as on a Blu-ray, which are pictures: a grey square from each time on, for 0.3 s."""
    lines = (bytes((0, 0x80 | 16, 1)) + b"\0\0") * 16
    window = struct.pack(">BBHHHH", 1, 0, 8, 8, 16, 16)
    palette = bytes((0, 0, 1, 180, 128, 128, 255))
    drawn = struct.pack(">HBB", 0, 0, 0xC0) + (len(lines) + 4).to_bytes(3, "big") + struct.pack(">HH", 16, 16) + lines

    def segment(time: float, kind: int, payload: bytes) -> bytes:
        return b"PG" + struct.pack(">IIBH", round(90000 * time), 0, kind, len(payload)) + payload

    def composition(number: int, objects: int) -> bytes:
        where = struct.pack(">HBBHH", 0, 0, 0, 8, 8) * objects
        return struct.pack(">HHBHBBBB", 160, 120, 0x10, number, 0x80 * objects, 0, 0, objects) + where

    data = b""
    for number, time in enumerate(times):
        data += segment(time, 0x16, composition(2 * number, 1)) + segment(time, 0x17, window)
        data += segment(time, 0x14, palette) + segment(time, 0x15, drawn) + segment(time, 0x80, b"")
        for kind, payload in (0x16, composition(2 * number + 1, 0)), (0x17, window), (0x80, b""):
            data += segment(time + 0.3, kind, payload)
    return data


def test_subtitles_that_are_pictures_go_into_matroska_and_are_missed_elsewhere(tmp_path):
    (tmp_path / "a.sup").write_bytes(pictures_of_words([0.5, 1.2]))
    video = tmp_path / "film.mkv"
    ffmpeg(
        *("-i", film(tmp_path / "text.mkv"), "-copyts", "-f", "sup", "-i", tmp_path / "a.sup"),
        *("-map", "0:v", "-map", 1, "-map", "0:s:0", "-c", "copy", video),
    )
    info, sound = probe_video(video), piece(tmp_path / "voice.wav", seconds=2)
    for suffix, tracks in (".mkv", 2), (".mp4", 1):
        out = tmp_path / f"out{suffix}"
        with VideoWriter(out, info, sound) as writer:
            for _, frame in read_frames_looped(info, 50):
                writer.write(frame)
        assert shown(out, tracks - 1)[0][:2] == pytest.approx((0.2, 0.6), abs=0.002)
        if suffix == ".mkv":
            assert not writer.remarks
            assert packet_times(out, "s:0") == pytest.approx([0.5, 0.8, 1.2, 1.5], abs=0.002)
        else:
            assert re.search("that are pictures.*were left out.*ends in .mkv", writer.remarks[0])
    assert abs(first_time(tmp_path / "out.mkv", "v:0")) < 1e-6


def test_the_subtitles_of_a_broadcast_are_those_of_the_program_that_is_shown(tmp_path):
    (tmp_path / "a.sup").write_bytes(pictures_of_words([0.2, 1.2]))
    video = tmp_path / "two.ts"
    test_card = ("-f", "lavfi", "-i", "testsrc2=s=160x120:r=25:d=2")
    ffmpeg(
        *(*test_card, *test_card, "-f", "sup", "-i", tmp_path / "a.sup", "-map", 0, "-map", 1, "-map", 2, "-map", 2),
        *("-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:s", "dvbsub"),
        *("-metadata:s:s:0", "language=deu", "-metadata:s:s:1", "language=fra"),
        *("-program", "title=A:st=0:st=3", "-program", "title=B:st=1:st=2", video),
    )
    sound = piece(tmp_path / "voice.wav", seconds=1.5)
    for track, language in (1, "fra"), (2, "deu"):
        out = write(tmp_path / f"{track}.mkv", probe_video(video, track), sound, seconds=1.5)
        assert [s["language"] for s in parse_metadata(said(out)).streams if "language" in s] == [language]


BROKEN = b"1\n00:00:00,100 --> 00:00:00,600\n\xe9\xe8\xff\xfe caf\xe9\n\n"


def test_broken_subtitles_do_not_cost_the_result(tmp_path):
    (tmp_path / "broken.srt").write_bytes(BROKEN)
    video = tmp_path / "film.mkv"
    ffmpeg(
        *("-f", "lavfi", "-i", "testsrc2=s=160x120:r=25:d=1", "-i", tmp_path / "broken.srt", "-map", 0, "-map", 1),
        *("-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:s", "copy", "-metadata", "title=Kept", video),
    )
    info, sound = probe_video(video), piece(tmp_path / "voice.wav")
    with VideoWriter(tmp_path / "out.mp4", info, sound) as writer:
        for _, frame in read_frames_looped(info, 25):
            writer.write(frame)
    assert "damaged" in writer.remarks[0] and "title=Kept" in said(tmp_path / "out.mp4")
    assert probe_video(tmp_path / "out.mp4").n_frames == 25
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".latentsync")]


@pytest.mark.parametrize(
    "title, kept",
    [
        ("-y -i /etc/passwd", "-y -i /etc/passwd"),
        ("two\nlines\x1b[31m\u202e", "two lines [31m"),
        ("[CHAPTER]\nSTART=0", "[CHAPTER] START=0"),
        ("x" * 5000, "x" * 199 + "…"),
        ("  \n ", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_title_is_a_title_whatever_it_says(tmp_path, title, kept, suffix):
    info = probe_video(film(tmp_path / "film.mkv", title=title))
    sound = piece(tmp_path / "voice.wav")
    out = write(tmp_path / f"out{suffix}", info, sound)
    assert parse_metadata(said(out)).file.get("title") == kept
    assert len(chapters(out)) == 2
