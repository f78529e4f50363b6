"""Describe video and sound files by decoding them: `probe_video`, `probe_audio`."""

import json
import math
import os
import re
import secrets
import subprocess
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from latentsync import FPS
from latentsync.errors import UserError
from latentsync.media.colour import is_rgb
from latentsync.media.info import OPACITY_DECODERS, AudioInfo, Track, VideoInfo, is_transparent
from latentsync.media.process import (
    MAX_PIXELS,
    PROBE_LIMITS,
    SCAN_LIMITS,
    TOO_LARGE,
    check_exit,
    check_input,
    filter_arguments,
    input_arguments,
    output_lines,
    read_log,
    run_ffmpeg,
    too_large_error,
    unreadable_error,
    wait_with_timeout,
    with_timeout,
)
from latentsync.media.signatures import is_iso_picture, lacks_end
from latentsync.media.tracks import choose_track, list_tracks
from latentsync.media.unchanged import while_unchanged
from latentsync.rates import nominal_rate

ANIMATIONS = {"gif", "apng", "webp_anim", "jpegxl_anim"}  # demuxers of pictures that may move
STILL_PIXELS = 4096 * 2304  # of the frame made from a picture: a phone's pictures have more than players take as video
ASPECTS = Fraction(1, 4), Fraction(4)  # of a pixel: others are considered errors
MAX_HOURS = 6.0  # of sound, which is held in memory: 1.4 GB; a false timestamp can mean years of silence


@while_unchanged
def probe_video(path: str | os.PathLike, track: int | None = None) -> VideoInfo:
    """Properties of a video (or a still picture, which is a video of one frame), after decoding its first frame.

    track: number of a video track, from 1; None: the first one with the default flag, else the first. Cover art is no
    track. All timestamps are read, so that duration and frame count are right even if the header is wrong. Raises
    UserError for files that cannot be used.
    """
    path = Path(path)
    check_input(path, "video")
    contents = list_tracks(path, "video")
    if not contents.video:
        if not contents.audio:
            raise unreadable_error(path, "", "video")
        raise UserError(f"{path} holds no picture, only sound; give a video file.")
    chosen = choose_track(contents.video, track, path, "video")
    still = contents.demuxer.endswith("_pipe") or contents.demuxer == "image2"
    timing: _Timing | None = None
    select = str(chosen.index)
    if not still and is_iso_picture(path):
        # Each item of such a file is a picture; a sequence, which has an index of samples, is a video.
        candidates = contents.video if track is None else (chosen,)
        timings = {candidate: _read_timing(path, str(candidate.index)) for candidate in candidates}
        chosen = max(timings, key=lambda candidate: (timings[candidate].packets > 1, candidate == chosen))
        timing, select = timings[chosen], str(chosen.index)
        still = timing.packets < 2
        if still and contents.grouped and track is None:
            select = _tile_group(path) or select
    frame = _first_frame(path, select)
    if not still:
        timing = timing or _read_timing(path, select)
        if lacks_end(path):
            raise UserError(
                f"{path} is cut off, as after an unfinished download: its end is missing; get a complete copy."
            )
        still = timing.packets < 2 and contents.demuxer in ANIMATIONS
    width, height = _square_pixel_size(frame.width, frame.height, frame.aspect)
    pixel_format = _format_with_opacity(path, select, chosen.codec) or frame.pixel_format
    if still or timing is None:
        duration, fps, rate = 1 / FPS, float(FPS), Fraction(FPS)
        width, height = _reduced_size(width, height)
    else:
        duration, rate = timing.duration, timing.rate
        fps = timing.packets / duration if timing.packets > 1 and duration > 0 else float(FPS)
    depth = re.search(r"(?:p0?|gray|x2(?:rgb|bgr))(9|1[0246])(?:le|be)?$|(48|64)(?:le|be)$", pixel_format)
    return VideoInfo(
        path=path,
        width=width,
        height=height,
        fps=fps,
        duration=duration,
        color_range="pc" if pixel_format.startswith("yuvj") else frame.tags[0],
        color_matrix="gbr" if is_rgb(pixel_format) else frame.tags[1],
        color_primaries=frame.tags[2],
        color_transfer=frame.tags[3],
        pixel_format=pixel_format,
        bit_depth=8 if not depth else 16 if depth[2] else int(depth[1]),
        codec=chosen.codec,
        container=contents.demuxer,
        still=still,
        stored_width=frame.width,
        stored_height=frame.height,
        pixel_aspect=frame.aspect,
        scaled=(width, height) != (frame.width, frame.height),
        interlaced=frame.interlaced,
        start_pts=frame.pts,
        time_base=frame.time_base or (timing.time_base if timing else Fraction(1, FPS)),
        select=select,
        track=chosen.number,
        tracks=() if still else contents.video,
        nominal_rate=rate,
    )


@dataclass(frozen=True)
class _Frame:
    """Properties of a decoded frame, turned upright, from ffmpeg's showinfo filter."""

    pts: int  # in units of time_base
    time_base: Fraction | None  # seconds
    width: int
    height: int
    aspect: Fraction  # of a pixel, width over height; 1 if the file gives no plausible one
    interlaced: bool
    pixel_format: str
    tags: tuple[str, ...]  # range, matrix, primaries, transfer; "unknown" if not in the file


def _first_frame(path: Path, select: str, decoder: str | None = None) -> _Frame:
    """Decode one frame. decoder: one to use instead of ffmpeg's default. Raises UserError if that fails."""
    # The filter gets a random name, so that no text in a file can imitate its output.
    name = f"showinfo@{secrets.token_hex(16)}"
    arguments = [
        *("-loglevel", "info", "-nostats", "-threads", "1", *((f"-c:{select}", decoder) if decoder else ())),
        *(*input_arguments(path), *filter_arguments(select, name), "-frames:v", "1", "-f", "null", "-"),
    ]
    with run_ffmpeg(arguments, limits=PROBE_LIMITS) as (process, log):
        wait_with_timeout(process, path)
        messages = read_log(log)
    lines = [line.partition("] ")[2] for line in messages.splitlines() if line.startswith(f"[{name} @ ")]
    info = "\n".join(lines)
    frame = re.search(
        r"^n: *0 pts: *(\S+) .*?\bfmt:(\w+) .*?\bsar:(\d+)/(\d+) s:(\d+)x(\d+) i:(\w)", info, re.MULTILINE
    )
    if not frame:
        if TOO_LARGE.search(messages):
            raise too_large_error(path)
        check_exit(process, messages, path)
        raise UserError(f"{path} is cut off or damaged, no picture can be decoded; get a complete copy.")
    width, height = int(frame[5]), int(frame[6])
    if width * height > MAX_PIXELS:
        raise too_large_error(path)
    aspect = Fraction(int(frame[3]), int(frame[4]) or 1)
    base = re.search(r"^config in time_base: (\d+)/([1-9]\d*)", info, re.MULTILINE)
    color = re.search(r"color_range:(\S+) color_space:(\S+) color_primaries:(\S+) color_trc:(\S+)", info)
    tags = color.groups() if color else ["unknown"] * 4
    return _Frame(
        pts=int(frame[1]) if re.fullmatch(r"-?\d+", frame[1]) else 0,
        time_base=Fraction(int(base[1]), int(base[2])) if base else None,
        width=width,
        height=height,
        aspect=aspect if ASPECTS[0] <= aspect <= ASPECTS[1] else Fraction(1),
        interlaced=frame[7] in "TB",
        pixel_format=frame[2],
        tags=tuple("unknown" if tag in {"reserved", "unspecified", "nil", "(null)"} else tag for tag in tags),
    )


def _format_with_opacity(path: Path, select: str, codec: str) -> str | None:
    """Pixel format of the first frame from the codec's decoder that keeps opacity; None if the video is opaque."""
    if codec not in OPACITY_DECODERS:
        return None
    try:
        pixel_format = _first_frame(path, select, OPACITY_DECODERS[codec]).pixel_format
    except UserError:
        return None
    return pixel_format if is_transparent(pixel_format) else None


@dataclass(frozen=True)
class _Timing:
    """Number and times of a stream's packets."""

    packets: int
    duration: float  # seconds from the first timestamp to the end of the last
    time_base: Fraction  # seconds
    rate: Fraction  # nominal, frames a second


def _read_timing(path: Path, select: str) -> _Timing:
    """Read the timestamps of all packets of a stream, without decoding them."""
    arguments = [
        *("-loglevel", "error", "-nostats", *input_arguments(path)),
        *("-map", f"0:{select}", "-c", "copy", "-f", "framecrc", "pipe:1"),
    ]
    times = array("q")  # of 8 bytes: 10 MB for six hours at 60 a second
    end, time_base = 0, Fraction(1, FPS)
    with run_ffmpeg(arguments, stdout=subprocess.PIPE, limits=SCAN_LIMITS) as (process, log):
        for stream_base, dts, pts, length, _ in with_timeout(process, _packets(process), path):
            time_base = stream_base
            pts = pts if abs(pts) < 1 << 62 else dts
            if pts >= 0 and abs(pts) < 1 << 62:
                times.append(pts)
                end = max(end, pts + length)
        check_exit(process, read_log(log), path)
    duration = float((end - min(times)) * time_base) if times else 0.0
    return _Timing(len(times), duration, time_base, nominal_rate(np.array(times, np.int64), time_base))


def _tile_group(path: Path) -> str | None:
    """ffmpeg's specifier of the group of tiles that forms the main picture of the file, if it has tiles."""
    with tempfile.TemporaryDirectory(prefix="latentsync-probe-") as folder:
        graph = Path(folder) / "graph.json"
        arguments = [
            *("-loglevel", "error", "-nostats", "-threads", "1"),
            *("-print_graphs_file", str(graph), "-print_graphs_format", "json", *input_arguments(path)),
            *("-an", "-sn", "-dn", "-frames:v", "1", "-f", "null", "-"),  # ffmpeg chooses the main picture
        ]
        with run_ffmpeg(arguments, limits=PROBE_LIMITS) as (process, log):
            wait_with_timeout(process, path)
            check_exit(process, read_log(log), path)
        try:
            graphs = json.loads(graph.read_bytes().decode("utf-8", "replace"))["graphs"]
        except (OSError, ValueError, KeyError):
            return None
    match = re.search(r"\[0:(g:\d+)\]$", graphs[0]["description"]) if graphs else None
    return match[1] if match else None


@while_unchanged
def probe_audio(path: str | os.PathLike, track: int | None = None, max_seconds: float | None = None) -> AudioInfo:
    """Properties of a sound track of a sound or video file, after decoding all of it.

    track: its number, from 1; None: the first one with the default flag, else the first. max_seconds: longer sound is
    refused without decoding the rest. Raises UserError for files that cannot be used, and for sound without samples.
    """
    path = Path(path)
    check_input(path, "sound")
    tracks, chosen = find_sound(path, track)
    name = f"ashowinfo@{secrets.token_hex(16)}"
    # Limits also how far ffmpeg decodes ahead of the loop below.
    limit = () if max_seconds is None else ("-t", f"{max(0.0, max_seconds) + 1:.3f}")
    arguments = [
        *("-loglevel", "info", "-nostats", *limit, *input_arguments(path)),
        *("-map", f"0:{chosen.index}", "-af", "aresample=async=1", "-c:a", "pcm_s16le", "-f", "framecrc", "pipe:1"),
        *("-map", f"0:{chosen.index}", "-af", name, "-frames:a", "1", "-f", "null", "-"),
    ]
    samples, size, rate = 0, 0, 0
    start: int | None = None
    with run_ffmpeg(arguments, stdout=subprocess.PIPE, limits=SCAN_LIMITS) as (process, log):
        for time_base, _, pts, length, packet_bytes in with_timeout(process, _packets(process), path):
            rate = time_base.denominator
            start = pts if start is None else start
            samples += length
            size += packet_bytes
            check_sound_length(path, samples / rate, max_seconds)
        messages = read_log(log)
    check_exit(process, messages if not samples else "", path)
    if not samples or not rate or start is None:
        raise no_samples_error(path)
    sample_format = re.search(rf"^\[{name} @ [^\]]*\] n:0 .*?\bfmt:(\w+)", messages, re.MULTILINE)
    return AudioInfo(
        path=path,
        codec=chosen.codec,
        sample_rate=rate,
        channels=max(1, round(size / samples / 2)),
        sample_format=sample_format[1] if sample_format else "fltp",
        duration=samples / rate,
        start=start / rate,
        select=str(chosen.index),
        track=chosen.number,
        tracks=tracks,
    )


def find_sound(path: Path, track: int | None) -> tuple[tuple[Track, ...], Track]:
    """All sound tracks of a file, and the one that `track` selects, see `probe_audio`. Raises UserError."""
    tracks = list_tracks(path, "sound").audio
    if not tracks:
        raise UserError(f"{path} holds no sound; give a file with a voice in it.")
    return tracks, choose_track(tracks, track, path, "sound")


def _packets(process: subprocess.Popen[bytes]) -> Iterator[tuple[Fraction, int, int, int, int]]:
    """Time base, dts, pts, duration and bytes of each packet that ffmpeg's framecrc output lists."""
    time_base = Fraction(1, FPS)
    for line in output_lines(process):
        if line.startswith(b"#tb 0:"):
            time_base = Fraction(line.split()[2].decode())
        fields = line.split(b",")
        if not line.startswith(b"#") and len(fields) >= 5:
            dts, pts, duration, size = map(int, fields[1:5])
            yield time_base, dts, pts, duration, size


def _square_pixel_size(width: int, height: int, aspect: Fraction) -> tuple[int, int]:
    """Size with square pixels: one side grows, so that no detail is lost."""
    if aspect > 1:
        wide = 2 * round(width * aspect / 2)
        return (wide, height) if wide - width > 2 else (width, height)
    tall = 2 * round(height / aspect / 2)
    return (width, tall) if tall - height > 2 else (width, height)


def _reduced_size(width: int, height: int) -> tuple[int, int]:
    """Size of a picture, reduced to at most STILL_PIXELS."""
    scale = min(1.0, math.sqrt(STILL_PIXELS / (width * height)))
    return (width, height) if scale == 1 else (2 * int(width * scale / 2), 2 * int(height * scale / 2))


def no_samples_error(path: Path) -> UserError:
    return UserError(f"The sound in {path} has no samples, it is of zero length or damaged; give another recording.")


def check_sound_length(path: Path, seconds: float, max_seconds: float | None = None) -> None:
    """Raise UserError for sound longer than MAX_HOURS or max_seconds."""
    if max_seconds is not None and seconds > max_seconds:
        raise UserError(f"The sound in {path} lasts more than {max_seconds:g} s; cut it into shorter pieces.")
    if seconds > MAX_HOURS * 3600:
        raise UserError(
            f"The sound in {path} lasts more than {MAX_HOURS:g} hours, or its timestamps are wrong; give a shorter one."
        )
