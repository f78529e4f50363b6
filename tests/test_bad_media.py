"""Damaged and malicious files: a result or one sentence, in bounded time and memory.

A seeded generator changes a few real clips; the ordinary run tries MUTANTS of the files, `-m full_size` all of them.
"""

import random
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
from clips import ffmpeg, make_sound, make_video

from latentsync.errors import UserError
from latentsync.media import probe, probe_audio, probe_video, process, read_audio, read_frames, reading, tracks

MUTANTS, ALL_MUTANTS = 40, 320
SECONDS = 20  # for each of probing and reading
MEMORY = 1.5 * 2**30  # bytes, of any ffmpeg
CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf", b"udta")
H264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-g", 5)


@pytest.fixture(autouse=True)
def nothing_is_known_yet():
    """What another test has found out about the same files."""
    for look in (probe.probe_video, probe.probe_audio, tracks.list_tracks):
        look.forget()


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Path]:
    """Small files of real codecs, each in a container of its own."""
    folder = tmp_path_factory.mktemp("clips")
    some = {"seconds": 0.6, "sound": "sine"}
    make_video(folder / "a.mp4", *H264, "-c:a", "aac", **some)
    make_video(folder / "b.mkv", *H264, "-c:a", "libopus", **some)
    make_video(folder / "c.webm", "-c:v", "libvpx-vp9", "-cpu-used", 8, "-c:a", "libvorbis", **some)
    make_video(folder / "d.mov", "-c:v", "mjpeg", "-c:a", "pcm_s16le", **some)
    make_video(folder / "e.avi", "-c:v", "mpeg4", "-c:a", "mp3", **some)
    make_video(folder / "f.ts", *H264, "-c:a", "aac", **some)
    for name in ("g.wav", "h.mp3", "i.flac", "j.ogg"):
        make_sound(folder / name, seconds=0.6)
    for name in ("k.png", "l.jpg", "m.webp"):
        ffmpeg("-f", "lavfi", "-i", "testsrc2=s=160x120", "-frames:v", 1, "-update", 1, folder / name)
    return sorted(folder.iterdir())


def boxes(data: bytes, start: int = 0, end: int | None = None) -> list[tuple[int, int, bytes]]:
    """Offset, size and kind of the boxes of an MP4 or MOV file, those inside others too."""
    found, end = [], len(data) if end is None else end
    while start + 8 <= end:
        size, kind = int.from_bytes(data[start : start + 4], "big"), bytes(data[start + 4 : start + 8])
        if size < 8 or start + size > end:
            break
        found.append((start, size, kind))
        if kind in CONTAINERS:
            found += boxes(data, start + 8, start + size)
        start += size
    return found


def flip(data: bytearray, chance: random.Random, _) -> bytearray:
    for _ in range(chance.choice((1, 5, 50, 500))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return data


def flip_header(data: bytearray, chance: random.Random, _) -> bytearray:
    for _ in range(chance.choice((1, 3, 10))):
        data[chance.randrange(min(len(data), 200))] = chance.choice((0, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    return data


def truncate(data: bytearray, chance: random.Random, _) -> bytearray:
    return data[: chance.choice((1, 4, 16, 100, chance.randrange(1, len(data))))]


def swap_header(data: bytearray, chance: random.Random, others: list[bytes]) -> bytearray:
    length = chance.choice((8, 64, 512, 2048))
    return bytearray(chance.choice(others)[:length]) + data[length:]


def repeat_or_drop(data: bytearray, chance: random.Random, _) -> bytearray:
    start, length = chance.randrange(len(data)), chance.choice((1, 100, 2000))
    part = data[start : start + length]
    return data[:start] + part * chance.choice((0, 2, 50)) + data[start + length :]


def change_box(data: bytearray, chance: random.Random, _) -> bytearray:
    found = boxes(data)
    if not found:
        return flip_header(data, chance, _)
    start = chance.choice(found)[0]
    data[start : start + 4] = struct.pack(">I", chance.choice((0, 1, 7, 8, 0x7FFFFFFF, 0xFFFFFFFF)))
    return data


def absurd_numbers(data: bytearray, chance: random.Random, _) -> bytearray:
    """Whole boxes of durations, sizes, counts or offsets, or the sizes of a picture, without a limit."""
    if data[1:4] == b"PNG":
        data[16:24] = struct.pack(">II", *chance.choice(((60_000, 60_000), (2**31 - 1, 1), (0, 5), (1, 2**31 - 1))))
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        return data
    found = [box for box in boxes(data) if box[2] in (b"mvhd", b"tkhd", b"mdhd", b"stts", b"stsz", b"stco", b"stsd")]
    if not found:
        return flip_header(data, chance, _)
    start, size, kind = chance.choice(found)
    if kind == b"stsd" and (at := data.find(b"avc1", start)) > 0:
        data[at + 28 : at + 32] = struct.pack(">HH", 65535, 65535)
        return data
    for at in range(start + 12, start + size - 3, 4):
        if chance.random() < 0.5:
            data[at : at + 4] = struct.pack(">I", chance.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF)))
    return data


def many_streams(data: bytearray, chance: random.Random, _) -> bytearray:
    found = {kind: (start, size) for start, size, kind in boxes(data)}
    if b"trak" not in found:
        return repeat_or_drop(data, chance, _)
    (moov, length), (trak, size) = found[b"moov"], found[b"trak"]
    count = chance.choice((50, 900, 5000))
    data[trak:trak] = data[trak : trak + size] * count
    data[moov : moov + 4] = struct.pack(">I", length + size * count)
    return data


MUTATIONS: tuple[Callable[[bytearray, random.Random, list[bytes]], bytearray], ...] = (
    flip, flip_header, truncate, swap_header, repeat_or_drop, change_box, absurd_numbers, many_streams,
)  # fmt: skip


def mutants(clips: list[Path], count: int, folder: Path) -> list[Path]:
    """The first `count` files of the series; it is the same at every call, for the same clips."""
    originals, found = [clip.read_bytes() for clip in clips], []
    for i in range(count):
        chance, mutate = random.Random(i), MUTATIONS[i % len(MUTATIONS)]
        source = chance.randrange(len(clips))
        if mutate in (change_box, absurd_numbers, many_streams) and chance.random() < 0.8:
            kinds = (".mp4", ".mov", ".png") if mutate is absurd_numbers else (".mp4", ".mov")
            source = clips.index(chance.choice([clip for clip in clips if clip.suffix in kinds]))
        data = mutate(bytearray(originals[source]), chance, originals)
        found.append(folder / f"{i:03}-{mutate.__name__}{clips[source].suffix}")
        found[-1].write_bytes(data)
    return found


def used(path: Path) -> str:
    """Probe and read a file in every way; what was wrong, besides a UserError of one sentence."""
    problems = []

    def attempt(name: str, act: Callable) -> object:
        began = time.monotonic()
        try:
            return act()
        except UserError as error:
            if "\n" in str(error) or not str(error).endswith(".") or path.name not in str(error):
                problems.append(f"{name}: no sentence: {error}")
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
        finally:
            if time.monotonic() - began > SECONDS:
                problems.append(f"{name}: {time.monotonic() - began:.0f} s")

    if info := attempt("probe video", lambda: probe_video(path)):
        attempt("read video", lambda: sum(1 for _ in islice(read_frames(info), 50)))
    if attempt("probe sound", lambda: probe_audio(path)):
        attempt("read sound", lambda: len(read_audio(path)))
    return f"{path.name}: {'; '.join(problems)}" if problems else ""


def use_all(paths: list[Path]) -> None:
    import resource

    def most() -> int:
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024

    before = most()  # of other tests' processes, which may have been larger
    with ThreadPoolExecutor(2) as pool:
        problems = [line for line in pool.map(used, paths) if line]
    assert not problems, "\n".join(problems)
    assert most() < max(MEMORY, before + 1)


def test_damaged_files_give_a_result_or_a_sentence(clips, tmp_path):
    use_all(mutants(clips, MUTANTS, tmp_path))


@pytest.mark.full_size
def test_all_damaged_files_give_a_result_or_a_sentence(clips, tmp_path):
    use_all(mutants(clips, ALL_MUTANTS, tmp_path))


def make_bomb(path: Path, kind: str) -> None:
    """A small file of a picture that is 9000 pixels wide and high, or 65535."""
    if kind in {"png", "mjpeg"}:
        gray = "-pix_fmt", "gray", "-c:v", kind, "-f", "image2"
        ffmpeg("-f", "lavfi", "-i", "color=s=9000x9000", "-frames:v", 1, *gray, path)
        return
    if kind == "gif":  # of whose canvas one pixel is painted
        head = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(3) + b"\xff" * 3
        path.write_bytes(head + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0\x3b")
        return
    ffmpeg("-f", "lavfi", "-i", "color=s=64x64", "-frames:v", 1, "-update", 1, path)
    data = bytearray(path.read_bytes())
    at = data.index(b"\x9d\x01\x2a") + 3  # the size in the first frame of VP8
    data[at : at + 4] = struct.pack("<HH", 9000, 9000)
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["bomb.png", "bomb.webp", "bomb.gif", "photo"])
def test_a_picture_that_unpacks_to_gigabytes_is_refused(tmp_path, name):
    bomb = tmp_path / name
    make_bomb(bomb, bomb.suffix[1:] or "mjpeg")
    assert bomb.stat().st_size < 2_000_000
    with pytest.raises(UserError, match=f"{name} has more than 67 million pixels"):
        probe_video(bomb)


def test_drawings_are_programs_and_refused(tmp_path):
    """A few kB of SVG took gigabytes, and minutes."""
    uses = "".join(f'<g id="g{i}">' + f'<use href="#g{i - 1}"/>' * 10 + "</g>" for i in range(1, 9))
    path = tmp_path / "drawing.svg"
    path.write_text(
        '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="8000" height="8000">'
        f'<defs><g id="g0"><circle r="9"/></g>{uses}</defs><use href="#g8"/></svg>'
    )
    for name in ("drawing.svg", "drawing.png", "drawing"):
        with pytest.raises(UserError, match=f"{name} is not a video that ffmpeg can read"):
            probe_video(path.rename(tmp_path / name) if name != path.name else path)
        path = tmp_path / name


@pytest.mark.parametrize("name", ["a.flac", "a.wav", "a.mka"])
def test_sound_that_is_too_long_is_refused_without_decoding_all_of_it(tmp_path, monkeypatch, name):
    path = make_sound(tmp_path / name, "-c:a", "flac" if name != "a.wav" else "adpcm_ima_wav",
                      source="anullsrc=r=8000", seconds=1800)  # fmt: skip
    packets, decoded = probe._packets, []

    def counted(process):
        for packet in packets(process):
            decoded.append(packet[3] / 8000)
            yield packet

    monkeypatch.setattr(probe, "_packets", counted)
    with pytest.raises(UserError, match=f"The sound in .*{name} lasts more than 60 s; cut it into shorter pieces"):
        probe_audio(path, max_seconds=60)
    assert 60 < sum(decoded) < 62
    decoded.clear()
    monkeypatch.setattr(probe, "check_sound_length", lambda *_: None)
    probe_audio(path, max_seconds=60)
    assert sum(decoded) == pytest.approx(61, abs=1), "ffmpeg itself ends there"


def test_sound_of_just_the_length_is_taken(tmp_path):
    path = make_sound(tmp_path / "a.wav", seconds=2)
    assert probe_audio(path, max_seconds=2).duration == 2
    for limit in (1.999, 0, -1):
        with pytest.raises(UserError, match="lasts more than"):
            probe_audio(path, max_seconds=limit)


needs_limits = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process that runs")


def limits_of(process) -> dict[str, str]:
    lines = Path(f"/proc/{process.pid}/limits").read_text().splitlines()
    return {line[:26].strip(): line[26:47].strip() for line in lines}


@needs_limits
def test_the_system_holds_ffmpeg_to_its_limits():
    waiting = ["-f", "rawvideo", "-video_size", "16x16", "-i", "pipe:0", "-f", "null", "-"]
    limits = process.Limits(memory=1 << 30, cpu_seconds=7, written=1 << 20)
    with process.run_ffmpeg(waiting, stdin=subprocess.PIPE, limits=limits) as (running, _):
        held = limits_of(running)
    assert (held["Max data size"], held["Max cpu time"], held["Max file size"]) == (str(1 << 30), "7", str(1 << 20))
    assert (held["Max core file size"], held["Max open files"]) == ("0", str(process.MAX_FILES))
    with process.run_ffmpeg(waiting, stdin=subprocess.PIPE) as (running, _):
        assert limits_of(running)["Max data size"] == "unlimited", "an encoder of our own frames"


@needs_limits
def test_every_look_at_a_file_is_limited(clips, monkeypatch):
    seen, limit = [], process._limit
    monkeypatch.setattr(process, "_limit", lambda running, limits: (seen.append(limits), limit(running, limits)))
    probe_audio(clips[0])
    read_audio(clips[0])
    list(read_frames(probe_video(clips[0])))
    assert len(seen) > 1 and all(limits.memory and limits.written for limits in seen)


@needs_limits
def test_a_file_that_takes_too_much_memory_is_a_sentence(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    ffmpeg("-f", "lavfi", "-i", "color=s=6000x6000", "-frames:v", 1, "-pix_fmt", "gray", path)
    video = make_video(tmp_path / "a.mp4", *H264, size="1920x1080", seconds=0.4)
    info = probe_video(video)
    little = process.Limits(memory=50 << 20)
    monkeypatch.setattr(probe, "PROBE_LIMITS", little)
    with pytest.raises(UserError, match="large.png takes more memory than a file of its kind should"):
        probe_video(path)
    monkeypatch.setattr(reading, "read_limits", lambda *_: little)
    with pytest.raises(UserError, match="a.mp4 takes more memory than a file of its kind should"):
        list(read_frames(info))


@needs_limits
def test_a_file_that_takes_too_much_time_of_the_processor_is_a_sentence(clips, tmp_path, monkeypatch):
    busy = tmp_path / "ffmpeg"
    busy.write_text("#!/bin/sh\nwhile :; do :; done\n")
    busy.chmod(0o755)
    monkeypatch.setattr(process, "get_ffmpeg_exe", lambda: str(busy))
    monkeypatch.setattr(tracks, "PROBE_LIMITS", process.Limits(cpu_seconds=1))
    monkeypatch.setattr(process, "STALL_SECONDS", 300)
    with pytest.raises(UserError, match="a.mp4 takes more processor time than a file of its kind should"):
        probe_video(clips[0])


def test_thousands_of_streams_are_not_set_up(tmp_path):
    data = bytearray(make_video(tmp_path / "a.mp4", *H264, seconds=0.2).read_bytes())
    found = {kind: (start, size) for start, size, kind in boxes(data)}
    (moov, length), (trak, size) = found[b"moov"], found[b"trak"]
    data[trak:trak] = data[trak : trak + size] * process.MAX_STREAMS
    data[moov : moov + 4] = struct.pack(">I", length + size * process.MAX_STREAMS)
    path = tmp_path / "many.mp4"
    path.write_bytes(data)
    with pytest.raises(UserError, match="many.mp4"):
        probe_video(path)


@pytest.mark.parametrize("use", [probe_audio, read_audio])
def test_silence_without_end_is_refused(tmp_path, monkeypatch, use):
    """A timestamp an hour ahead makes an hour of silence, to which a file of 10 kB has no right."""
    monkeypatch.setattr(probe, "MAX_HOURS", 0.01)
    gap = make_sound(tmp_path / "gap.mkv", "-c:a", "aac", "-bsf:a", "setts=ts='TS+gt(N,5)*16000*3600'", seconds=1)
    with pytest.raises(UserError, match="lasts more than 0.01 hours"):
        use(gap)


@pytest.mark.parametrize("use", [probe_video, probe_audio, read_audio])
def test_an_ffmpeg_that_gives_nothing_is_ended(clips, tmp_path, monkeypatch, use):
    idle = tmp_path / "ffmpeg"
    idle.write_text("#!/bin/sh\nexec sleep 60\n")
    idle.chmod(0o755)
    monkeypatch.setattr(process, "get_ffmpeg_exe", lambda: str(idle))
    monkeypatch.setattr(process, "STALL_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(UserError, match="a.mp4 is damaged .*, ffmpeg gets nothing out of it in 0.2 seconds"):
        use(clips[0])
    assert time.monotonic() - began < 10
