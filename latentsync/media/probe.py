"""Describe video and sound files by decoding them: `probe_video`, `probe_audio`."""

import math
import os
import re
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from latentsync import FPS
from latentsync.errors import UserError
from latentsync.media.colour import is_rgb
from latentsync.media.info import OPACITY_DECODERS, AudioInfo, VideoInfo, is_transparent
from latentsync.media.process import (
    check_input,
    input_arguments,
    input_header,
    read_log,
    run_ffmpeg,
    too_many_pixels,
    with_watchdog,
)

STILL_PIXELS = 4096 * 2304  # of a picture as it is shown: a telephone's has more than players show as a video
ASPECTS = Fraction(1, 4), Fraction(4)  # of a pixel: others are taken for errors
MOST_HOURS = 6.0  # of sound, which is held whole: 1.4 GB; a false timestamp can ask for years of silence


def probe_video(path: str | os.PathLike) -> VideoInfo:
    """Describe a video (or a still picture, which is a video of one frame) after decoding its first frame.

    All timestamps are read, so duration and frame count hold for files whose header lies. The first picture
    stream counts that is not cover art. Raises UserError for what cannot be used.
    """
    path = Path(path)
    check_input(path, "video")
    # The graph sees frames after ffmpeg has turned them as the rotation flag asks.
    arguments = [
        *("-nostats", "-threads", "1", *input_arguments(path)),
        *("-map", "0:V:0", "-vf", "showinfo", "-frames:v", "1", "-f", "null", "-"),
        *("-map", "0:V:0", "-c", "copy", "-f", "framecrc", "pipe:1"),
    ]
    first, end, packets, time_base = None, None, 0, Fraction(1, FPS)
    with run_ffmpeg(arguments, stdout=subprocess.PIPE) as (process, log):
        for stream_base, dts, pts, length, _ in with_watchdog(process, _packets(process), path):
            time_base = stream_base
            pts = pts if abs(pts) < 1 << 62 else dts
            if pts >= 0 and abs(pts) < 1 << 62:
                packets += 1
                first = pts if first is None else min(first, pts)
                end = pts + length if end is None else max(end, pts + length)
        text = read_log(log)
    header = input_header(path, text, "video")
    video = re.search(r"^  Stream #0:\d+(?!.*\(attached pic\)).*?: Video: (\w+)", header, re.MULTILINE)
    if not video:
        raise UserError(f"{path} holds no picture, only sound; give a video file.")
    frame = re.search(r"\bpts: *(\S+) .*?\bfmt:(\w+) .*?\bsar:(\d+)/(\d+) s:(\d+)x(\d+) i:(\w)", text)
    if not frame:
        if "max pixel count" in text:
            raise UserError(too_many_pixels(path))
        raise UserError(f"{path} is cut off or damaged, no picture can be decoded; get a complete copy.")
    if re.search(r": partial file$", text, re.MULTILINE):  # the index of an MP4 or MOV points past the file's end
        raise UserError(
            f"{path} is cut off, as after an unfinished download: its end is missing; get a complete copy."
        )
    shown_base = re.search(r"config in time_base: (\d+/\d+)", text)
    start_pts = int(frame[1]) if re.fullmatch(r"-?\d+", frame[1]) else 0
    width, height = int(frame[5]), int(frame[6])
    aspect = Fraction(int(frame[3]), int(frame[4]) or 1)
    aspect = aspect if ASPECTS[0] <= aspect <= ASPECTS[1] else Fraction(1)
    shown_width, shown_height = _square(width, height, aspect)
    pixel_format = _format_with_opacity(path, video[1]) or frame[2]

    color = re.search(r"color_range:(\S+) color_space:(\S+) color_primaries:(\S+) color_trc:(\S+)", text)
    tags = [tag if tag not in {"reserved", "unspecified", "nil", "(null)"} else "unknown"
            for tag in (color.groups() if color else ["unknown"] * 4)]  # fmt: skip
    header_duration = _clock(re.search(r"^  Duration: (\d+):(\d+):([\d.]+)", header, re.MULTILINE))
    duration = float((end - first) * time_base) if packets else header_duration
    # Leaps in the timestamps (joined recordings) make nonsense of their span: the header knows better.
    if header_duration and duration > 2 * header_duration + 1:
        duration = header_duration
    container = re.match(r"Input #0, (.*?), from", header)[1]
    if still := container == "image2" or container.endswith("_pipe"):
        duration = 1 / FPS
        shown_width, shown_height = _shrunk(shown_width, shown_height)
    rate = re.search(r"([\d.]+) fps", header[video.start() :].partition("\n")[0])
    fps = packets / duration if packets > 1 and duration > 0 else float(rate[1]) if rate else float(FPS)
    depth = re.search(r"(?:p0?|gray|x2(?:rgb|bgr))(9|1[0246])(?:le|be)?$|(48|64)(?:le|be)$", pixel_format)
    return VideoInfo(
        path=path,
        width=shown_width,
        height=shown_height,
        fps=fps,
        duration=duration,
        n_frames=max(1, int(duration * FPS + 0.5)),
        color_range="pc" if pixel_format.startswith("yuvj") else tags[0],
        color_matrix="gbr" if is_rgb(pixel_format) else tags[1],
        color_primaries=tags[2],
        color_transfer=tags[3],
        pixel_format=pixel_format,
        bit_depth=8 if not depth else 16 if depth[2] else int(depth[1]),
        codec=video[1],
        container=container,
        still=still,
        stored_width=width,
        stored_height=height,
        pixel_aspect=aspect,
        scaled=(shown_width, shown_height) != (width, height),
        interlaced=frame[7] in "TB",
        start_pts=start_pts,
        time_base=Fraction(shown_base[1]) if shown_base else time_base,
    )


def probe_audio(path: str | os.PathLike) -> AudioInfo:
    """Describe the first sound stream of a sound or video file after decoding all of it.

    Raises UserError for what cannot be used, and where there are no samples.
    """
    path = Path(path)
    check_input(path, "sound")
    arguments = [
        *("-nostats", *input_arguments(path), "-map", "0:a:0", "-af", "aresample=async=1"),
        *("-c:a", "pcm_s16le", "-f", "framecrc", "pipe:1"),
    ]
    samples, size, rate, start = 0, 0, 0, None
    with run_ffmpeg(arguments, stdout=subprocess.PIPE) as (process, log):
        for time_base, _, pts, length, packet_bytes in with_watchdog(process, _packets(process), path):
            rate = time_base.denominator
            start = pts if start is None else start
            samples += length
            size += packet_bytes
            check_sound_length(path, samples / rate)
        text = read_log(log)
    header = input_header(path, text, "sound")
    audio = re.search(r"^  Stream #0:\d+.*?: Audio: (\w+)(?:.*? Hz, [^,\n]+, (\w+))?", header, re.MULTILINE)
    if not audio:
        raise UserError(f"{path} holds no sound; give a file with a voice in it.")
    if not samples or not rate:
        raise UserError(no_samples(path))
    return AudioInfo(
        path=path,
        codec=audio[1],
        sample_rate=rate,
        channels=max(1, round(size / samples / 2)),
        sample_format=audio[2] or "fltp",
        duration=samples / rate,
        start=start / rate,
    )


def _packets(process: subprocess.Popen) -> Iterator[tuple[Fraction, int, int, int, int]]:
    """What ffmpeg's framecrc output says of each packet: time base, dts, pts, duration, bytes."""
    time_base = Fraction(1, FPS)
    with open(process.stdout.fileno(), "rb", closefd=False) as lines:
        for line in lines:
            if line.startswith(b"#tb 0:"):
                time_base = Fraction(line.split()[2].decode())
            fields = line.split(b",")
            if not line.startswith(b"#") and len(fields) >= 5:
                yield time_base, *map(int, fields[1:5])


def has_audio(header: str) -> bool:
    return bool(re.search(r"^  Stream #0:\d+.*?: Audio: ", header, re.MULTILINE))


def _clock(match: re.Match | None) -> float:
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else 0.0


def _format_with_opacity(path: Path, codec: str) -> str | None:
    """Pixel format of the first frame as the codec's decoder for transparent video gives it; None if it is opaque."""
    if codec not in OPACITY_DECODERS:
        return None
    arguments = [
        *("-nostats", "-threads", "1", "-c:V:0", OPACITY_DECODERS[codec], *input_arguments(path)),
        *("-map", "0:V:0", "-vf", "showinfo", "-frames:v", "1", "-f", "null", "-"),
    ]
    with run_ffmpeg(arguments, stdout=subprocess.PIPE) as (process, log):
        for _ in with_watchdog(process, iter(process.stdout.readline, b""), path):
            pass
        frame = re.search(r"^\[Parsed_showinfo_0 @ \w+\] n: *0 .*? fmt:(\w+) ", read_log(log), re.MULTILINE)
    return frame[1] if frame and is_transparent(frame[1]) else None


def _square(width: int, height: int, aspect: Fraction) -> tuple[int, int]:
    """Size with square pixels: one side grows, so that no detail is lost and no face is squeezed."""
    if aspect > 1:
        wide = 2 * round(width * aspect / 2)
        return (wide, height) if wide - width > 2 else (width, height)
    tall = 2 * round(height / aspect / 2)
    return (width, tall) if tall - height > 2 else (width, height)


def _shrunk(width: int, height: int) -> tuple[int, int]:
    """Size of a picture with no more than STILL_PIXELS."""
    share = min(1.0, math.sqrt(STILL_PIXELS / (width * height)))
    return (width, height) if share == 1 else (2 * int(width * share / 2), 2 * int(height * share / 2))


def no_samples(path: Path) -> str:
    return f"The sound in {path} has no samples, it is of zero length or damaged; give another recording."


def check_sound_length(path: Path, seconds: float) -> None:
    """Raise UserError where the sound lasts more than MOST_HOURS."""
    if seconds > MOST_HOURS * 3600:
        raise UserError(
            f"The sound in {path} lasts more than {MOST_HOURS:g} hours, or its timestamps are wrong; give a "
            "shorter one."
        )
