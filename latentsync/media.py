"""Media in and out, through pipes to the ffmpeg that imageio-ffmpeg carries.

Pictures come as 8-bit RGB frames on a constant grid of 25 a second, whatever the file holds, and go back to
the YCbCr matrix and range they came from; high dynamic range (HDR) becomes standard range. Sound comes as 16 kHz mono
for the model; the file that is written gets the given sound itself. Nothing here holds more than a few dozen frames.
"""

import itertools
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import zlib
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe

from latentsync import FPS, SAMPLE_RATE
from latentsync.errors import UserError

CRF = 16  # x264 quality that the eye cannot tell from the source
PRESET = "veryfast"  # x264 speed: at this CRF slower ones only save bytes
COMMENT = "Synthetic media: the mouth in this video was generated to match the sound (LatentSync)."

DECODER_THREADS = min(4, os.cpu_count() or 1)  # every thread holds frames of its own
ENCODER_THREADS = min(16, os.cpu_count() or 1)
PIPE_BYTES = 1 << 20  # size asked for the pipes (Linux allows a user 1 MiB; its default is 64 KiB)
SEGMENT_FRAMES = 32  # frames held at a time while playing backwards ...
SEGMENT_BYTES = 256 << 20  # ... and their bytes at most
SEEK_SECONDS = 1.0  # seek this much before the wanted frame: covers reordered and leading pictures
MOST_PIXELS = 8192 * 8192  # of a picture; 8K video has half
STILL_PIXELS = 4096 * 2304  # of a picture as it is shown: a telephone's has more than players show as a video
MOST_STREAMS = 256  # of a file
MOST_BYTES = 1 << 30  # in one piece of ffmpeg's memory, for an index or a picture
MOST_HOURS = 6.0  # of sound, which is held whole: 1.4 GB; a false timestamp can ask for years of silence
STALL_SECONDS = 15.0  # without anything from ffmpeg, while it looks at a file
# Without a frame from ffmpeg, for every second of video that it decodes to get there. 100 Mbit/s from a disk of
# 0.2 MB/s would just take that.
FRAME_SECONDS = 60.0
SEEKABLE = {"mov", "matroska", "webm"}  # demuxers whose index leads to a whole picture at or before a time

# One point of chroma for a 2x2 block on the way in, and their mean on the way out, return the chroma that the
# file had (measured 51 dB on a test card, 36 dB with bicubic both ways).
TO_RGB = "neighbor+accurate_rnd+full_chroma_int"
TO_YUV = "area+accurate_rnd"
RESCALE = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
SCALE_MATRIX = {  # tag of the file -> name that the scale filter takes
    "bt709": "bt709", "fcc": "fcc", "bt470bg": "bt470", "smpte170m": "smpte170m",
    "smpte240m": "smpte240m", "bt2020nc": "bt2020", "bt2020c": "bt2020",
}  # fmt: skip
HDR_TRANSFERS = {"smpte2084", "arib-std-b67"}  # PQ (HDR10, Dolby Vision 8.1) and HLG (Dolby Vision 8.4)
REFERENCE_WHITE = 203  # cd/m² of HDR that are the white of standard range (ITU-R BT.2408)
KNEE = 0.5  # of linear light, white being 1: darker colours stay as they are, brighter ones are pressed together
HDR_REMARK = "The video is of high dynamic range (HDR); the result is of standard range (SDR)."

SUFFIXES = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
COPIED_AUDIO = {  # codecs that go into the container as they are
    "mp4": {"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac"},
    "mov": {"aac", "mp3", "ac3", "eac3", "alac",
            "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be", "pcm_s32le", "pcm_f32le"},
    "matroska": {"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac", "vorbis", "dts", "mp2", "truehd",
                 "wavpack", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le"},
}  # fmt: skip
# Demuxers of files that only name other files: whoever sends one could have us read what is not theirs to read.
PLAYLISTS = {"applehttp", "avisynth", "concat", "dash", "hls", "imf", "rtsp", "sdp", "vapoursynth"}
LOSSLESS_AUDIO = {"flac", "alac", "wavpack", "tta", "ape", "tak", "shorten", "truehd", "mlp", "als",
                  "wmalossless"}  # fmt: skip
AAC_BITRATE = "256k"
PARTIAL = ".latentsync-"  # begins the name of everything that is not finished


@dataclass(frozen=True)
class VideoInfo:
    """What `probe_video` found. Sizes are those of the frames that `read_frames` yields."""

    path: Path
    width: int  # as displayed: rotated, square pixels
    height: int
    fps: float  # mean rate of the file
    duration: float  # seconds of picture
    n_frames: int  # expected on the 25 fps grid; decoding decides
    color_range: str  # "tv" (limited) or "pc" (full), "unknown" where the file does not say
    color_matrix: str  # ffmpeg's names, "gbr" for RGB files, "unknown" where the file does not say
    color_primaries: str
    color_transfer: str
    pixel_format: str  # ffmpeg's name
    bit_depth: int
    codec: str
    container: str  # ffmpeg's demuxer names, comma separated
    still: bool  # a picture, not a video
    scaled: bool  # the file's pixels are not square, or too many for a picture, and are rescaled
    start_pts: int  # timestamp of the first frame in units of time_base, after ffmpeg's shift to zero
    time_base: Fraction  # seconds

    @property
    def hdr(self) -> bool:
        """Whether the file is of high dynamic range. Its frames are not: they are BT.709."""
        return self.color_transfer in HDR_TRANSFERS

    @property
    def transparent(self) -> bool:
        """Whether the file's pixels have an opacity. Its frames have none: they lie on white."""
        return bool(re.match(r"rgba|bgra|argb|abgr|gbrap|yuva|ya\d|pal8", self.pixel_format))

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences for the user on what the result has otherwise than the file."""
        shrunk = f"So large a picture is made smaller: the result has {self.width} × {self.height} pixels."
        found = (self.hdr, HDR_REMARK), (self.still and self.scaled, shrunk)
        return tuple(remark for so, remark in found if so)


@dataclass(frozen=True)
class AudioInfo:
    """What `probe_audio` found about the first sound stream of a file."""

    path: Path
    codec: str
    sample_rate: int
    channels: int
    sample_format: str  # ffmpeg's name of what the decoder gives: "s16", "fltp", ...
    duration: float  # seconds, counted in decoded samples
    start: float  # seconds from the start of the file to the first sample


@contextmanager
def _ffmpeg(arguments: list[str], *, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.DEVNULL):
    """Run ffmpeg for the length of a `with` block; yields (process, log file). It never outlives the block.

    The messages go to a file, which cannot fill up and stop ffmpeg as a pipe would.
    """
    options = {"creationflags": subprocess.CREATE_NO_WINDOW} if sys.platform == "win32" else {}
    command = [get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-max_alloc", str(MOST_BYTES), *arguments]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=log,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is ours to handle, not ffmpeg's
            **options,
        )
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                _widen(pipe)
        try:
            yield process, log
        finally:
            if process.poll() is None:
                process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            process.wait()


def _widen(pipe) -> None:
    if sys.platform == "linux":
        import fcntl

        try:
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            pass  # the user's share of pipe memory is used up: slower, not wrong


def _ended(process: subprocess.Popen, work: str) -> UserError:
    """For an ffmpeg that a signal ended, at some work in words."""
    name = signal.Signals(-process.returncode).name
    return UserError(
        f"ffmpeg was ended from outside ({name}) while it {work}; if memory is short, close other programs, and start "
        "again."
    )


def _text(log) -> str:
    log.seek(0)
    return log.read().decode("utf-8", "replace")


def _input(path: Path) -> list[str]:
    """Arguments that make ffmpeg read exactly this local file, whatever characters its name holds."""
    pattern = ["-f", "image2", "-pattern_type", "none"]
    is_picture = path.suffix.lower() in {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
    pattern = pattern if is_picture and "%" in path.name else []
    # Only local files: a playlist given as a video must not fetch from the network.
    limits = ["-max_pixels", str(MOST_PIXELS), "-max_streams", str(MOST_STREAMS)]
    return [*pattern, *limits, "-protocol_whitelist", "file", "-i", _url(path)]


def _url(path: Path) -> str:
    return f"file:{os.path.abspath(path)}"


def _check_input(path: Path, kind: str) -> None:
    try:
        if not path.exists():
            raise UserError(f"There is no file {path}; check the name of the {kind}.")
        if path.is_dir():
            raise UserError(f"{path} is a folder; give a {kind} file.")
        if not path.is_file():
            raise UserError(f"{path} is not a regular file; give a {kind} file.")
        with open(path, "rb") as file:
            if not file.read(1):
                raise UserError(f"{path} is empty; give a {kind} file with something in it.")
    except OSError as error:  # looking whether it is there may fail as well
        raise UserError(f"{path} cannot be read ({error.strerror}); check its name and its permissions.") from error


def _header(path: Path, text: str, kind: str) -> str:
    """ffmpeg's description of the input in its messages; UserError where it could not open the file."""
    match = re.search(
        r"^Input #0, (?!tty).*?(?=^Stream mapping:|^Output #|\Z)", text, re.MULTILINE | re.DOTALL
    )
    if match:
        if PLAYLISTS & set(re.match(r"Input #0, (.*?), from", match[0])[1].split(",")):
            raise UserError(f"{path} is a playlist that names other files; give a {kind} file itself.")
        return match[0]
    with open(path, "rb") as file:
        box = file.read(8)[4:]
    # ffmpeg goes by the ending .mp4 even where the content is something else.
    if "moov atom not found" in text and box in {b"ftyp", b"mdat", b"moov", b"wide", b"free", b"skip"}:
        raise UserError(
            f"{path} is cut off: its index is missing, as after an unfinished download or recording; "
            "get a complete copy."
        )
    if "max pixel count" in text:
        raise UserError(_too_large(path))
    formats = "MP4, MOV, MKV or WebM" if kind == "video" else "WAV, MP3, M4A or FLAC"
    raise UserError(f"{path} is not a {kind} that ffmpeg can read; give a {kind} file such as {formats}.")


def _lively(
    process: subprocess.Popen, items: Iterator, path: Path, first: float | None = None, later: float | None = None
) -> Iterator:
    """The items that come from ffmpeg, as long as each comes in time; then it is ended, and UserError raised.

    first, later: seconds that the first item and each of the others may take, STALL_SECONDS unless given; the end may
    take as long as an item. What is done with an item takes no time of ffmpeg's.
    """
    later = STALL_SECONDS if later is None else later
    limit, due, ended, stalled = first or later, math.inf, threading.Event(), None

    def watch() -> None:
        nonlocal stalled
        while not ended.wait(min(later / 20, 1.0)):
            if time.monotonic() > due:
                stalled = limit
                return process.kill()

    watcher = threading.Thread(target=watch, name="stalled ffmpeg", daemon=True)
    watcher.start()
    try:
        due = time.monotonic() + limit
        for item in items:
            due = math.inf
            yield item
            limit = later
            due = time.monotonic() + limit
        process.wait()
    finally:
        ended.set()
        watcher.join()
    if stalled is not None:
        raise UserError(
            f"{path} is damaged or its disk does not answer, ffmpeg gets nothing out of it in {stalled:g} seconds; "
            "copy it to another disk, or give another file."
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


def probe_video(path: str | os.PathLike) -> VideoInfo:
    """Describe a video (or a still picture, which is a video of one frame) after decoding its first frame.

    All timestamps are read, so duration and frame count hold for files whose header lies. The first picture
    stream counts that is not cover art. Raises UserError for what cannot be used.
    """
    path = Path(path)
    _check_input(path, "video")
    # The graph sees frames after ffmpeg has turned them as the rotation flag asks.
    arguments = [
        *("-nostats", "-threads", "1", *_input(path)),
        *("-map", "0:V:0", "-vf", "showinfo", "-frames:v", "1", "-f", "null", "-"),
        *("-map", "0:V:0", "-c", "copy", "-f", "framecrc", "pipe:1"),
    ]
    first, end, packets, time_base = None, None, 0, Fraction(1, FPS)
    with _ffmpeg(arguments, stdout=subprocess.PIPE) as (process, log):
        for stream_base, dts, pts, length, _ in _lively(process, _packets(process), path):
            time_base = stream_base
            pts = pts if abs(pts) < 1 << 62 else dts
            if pts >= 0 and abs(pts) < 1 << 62:
                packets += 1
                first = pts if first is None else min(first, pts)
                end = pts + length if end is None else max(end, pts + length)
        text = _text(log)
    header = _header(path, text, "video")
    video = re.search(r"^  Stream #0:\d+(?!.*\(attached pic\)).*?: Video: (\w+)", header, re.MULTILINE)
    if not video:
        raise UserError(f"{path} holds no picture, only sound; give a video file.")
    frame = re.search(r"\bpts: *(\S+) .*?\bfmt:(\w+) .*?\bsar:(\d+)/(\d+) s:(\d+)x(\d+)", text)
    if not frame:
        if "max pixel count" in text:
            raise UserError(_too_large(path))
        raise UserError(f"{path} is cut off or damaged, no picture can be decoded; get a complete copy.")
    if re.search(r": partial file$", text, re.MULTILINE):  # the index of an MP4 or MOV points past the file's end
        raise UserError(
            f"{path} is cut off, as after an unfinished download: its end is missing; get a complete copy."
        )
    shown_base = re.search(r"config in time_base: (\d+/\d+)", text)
    start_pts = int(frame[1]) if re.fullmatch(r"-?\d+", frame[1]) else 0
    width, height = int(frame[5]), int(frame[6])
    shown_width, shown_height = _square(width, height, int(frame[3]), int(frame[4]))

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
    depth = re.search(r"(?:p0?|gray|x2(?:rgb|bgr))(9|1[0246])(?:le|be)?$|(48|64)(?:le|be)$", frame[2])
    return VideoInfo(
        path=path,
        width=shown_width,
        height=shown_height,
        fps=fps,
        duration=duration,
        n_frames=max(1, int(duration * FPS + 0.5)),
        color_range="pc" if frame[2].startswith("yuvj") else tags[0],
        color_matrix="gbr" if _is_rgb(frame[2]) else tags[1],
        color_primaries=tags[2],
        color_transfer=tags[3],
        pixel_format=frame[2],
        bit_depth=8 if not depth else 16 if depth[2] else int(depth[1]),
        codec=video[1],
        container=container,
        still=still,
        scaled=(shown_width, shown_height) != (width, height),
        start_pts=start_pts,
        time_base=Fraction(shown_base[1]) if shown_base else time_base,
    )


def _too_large(path: Path) -> str:
    return f"The picture in {path} has more than {MOST_PIXELS / 1e6:.0f} million pixels; give a smaller one."


def _has_audio(header: str) -> bool:
    return bool(re.search(r"^  Stream #0:\d+.*?: Audio: ", header, re.MULTILINE))


def _clock(match: re.Match | None) -> float:
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else 0.0


def _square(width: int, height: int, sar_num: int, sar_den: int) -> tuple[int, int]:
    """Size with square pixels: one side grows, so that no detail is lost and no face is squeezed."""
    if not sar_num or not sar_den or not 1 / 4 <= sar_num / sar_den <= 4:
        return width, height
    if sar_num > sar_den:
        wide = 2 * round(width * sar_num / sar_den / 2)
        return (wide, height) if wide - width > 2 else (width, height)
    tall = 2 * round(height * sar_den / sar_num / 2)
    return (width, tall) if tall - height > 2 else (width, height)


def _shrunk(width: int, height: int) -> tuple[int, int]:
    """Size of a picture with no more than STILL_PIXELS."""
    share = min(1.0, math.sqrt(STILL_PIXELS / (width * height)))
    return (width, height) if share == 1 else (2 * int(width * share / 2), 2 * int(height * share / 2))


def _is_rgb(pixel_format: str) -> bool:
    """Whether the pixels carry no YCbCr matrix: RGB, palette or grey."""
    return bool(re.match(r"rgb|bgr|gbr|argb|abgr|0rgb|0bgr|x2rgb|x2bgr|pal8|gray|ya\d|mono", pixel_format))


def _matrix(info: VideoInfo) -> str:
    """The scale filter's name of the matrix that belongs to the file; untagged ones as players guess."""
    if info.color_matrix == "gbr" or info.hdr:
        return "bt709"
    long_side, short_side = max(info.width, info.height), min(info.width, info.height)
    guess = "bt709" if long_side >= 1280 or short_side > 576 else "smpte170m"
    return SCALE_MATRIX.get(info.color_matrix, guess)


def _range(info: VideoInfo) -> str:
    return "pc" if info.color_range == "pc" and info.color_matrix != "gbr" and not info.hdr else "tv"


def read_frames(info: VideoInfo, start: int = 0, count: int | None = None) -> Iterator[np.ndarray]:
    """Yield frames start, start + 1, ... of the 25 fps grid: (height, width, 3) uint8 RGB, the caller's own.

    Every frame of the grid is the nearest one of the file. Frame i is the same whatever `start` is. 10-bit values
    are rounded to 8 bits. HDR becomes BT.709: up to KNEE colours are those of a standard range master, above it
    lights are pressed together. A damaged file yields what can be decoded; UserError where that is nothing, or where
    ffmpeg takes FRAME_SECONDS for a frame. Closing the iterator ends ffmpeg.
    """
    margin = max(SEEK_SECONDS, 16 / info.fps) if SEEKABLE & set(info.container.split(",")) else None
    frames = _decode(info, start, count, margin)
    first = next(frames, None)
    if first is None:
        if start == 0 and count != 0:
            raise UserError(f"{info.path} is damaged, no picture can be decoded; get a complete copy.")
        return
    with closing(frames):
        yield first
        del first
        yield from frames


def _decode(info: VideoInfo, start: int, count: int | None, margin: float | None) -> Iterator[np.ndarray]:
    """Decode, seeking to `margin` seconds before frame `start`; None decodes from the beginning."""
    if count == 0:
        return
    seek, skipped = [], start / FPS
    if margin is not None:
        seconds = float(info.start_pts * info.time_base) + start / FPS - margin
        if seconds > margin:  # else reading from the beginning costs no more
            # Timestamps stay those of the whole file, and frames before the wanted one are kept for the fps
            # filter, so that it chooses as it would have done from the beginning.
            seek = ["-copyts", "-start_at_zero", "-noaccurate_seek", "-ss", f"{seconds:.6f}"]
            skipped = margin
    end = "" if count is None else f":end_pts={start + count}"
    size = f"w={info.width}:h={info.height}"
    color = f"in_color_matrix={_matrix(info)}:in_range={_range(info)}"
    convert = [size, f"flags={RESCALE if info.scaled else TO_RGB}"]
    convert += [] if info.color_matrix == "gbr" or info.hdr else [color]
    graph = [
        f"setpts=PTS-({info.start_pts})",
        f"fps={FPS}",
        f"trim=start_pts={start}{end}",
        *(_to_standard_range(info) if info.hdr else ()),
        f"scale={':'.join(convert)}",
        "format=rgba" if info.transparent else "format=rgb24",
    ]
    arguments = [
        *("-loglevel", "error", "-nostats", "-filter_threads", str(DECODER_THREADS)),
        *(*seek, "-threads", str(DECODER_THREADS), *_input(info.path)),
        *("-map", "0:V:0", "-vf", ",".join(graph), "-fps_mode", "passthrough", "-f", "rawvideo", "pipe:1"),
    ]
    with _ffmpeg(arguments, stdout=subprocess.PIPE) as (process, log):
        frames = _filled(process.stdout, (info.height, info.width, 4 if info.transparent else 3))
        frames = map(_on_white, frames) if info.transparent else frames
        yield from _lively(process, frames, info.path, FRAME_SECONDS * (1 + skipped), FRAME_SECONDS)
        if process.returncode < 0:
            raise _ended(process, f"read {info.path}")
        if "No such filter" in _text(log):
            raise UserError(
                f"{info.path} is of high dynamic range (HDR), and the ffmpeg {get_ffmpeg_exe()} was built without "
                "what turns it into standard range (zscale): convert the video to SDR first."
            )


def _to_standard_range(info: VideoInfo) -> list[str]:
    """Filters from PQ or HLG to BT.709 RGB, through linear light with white at 1."""
    # Where the file is silent, as HDR10 and HLG have it.
    matrix = info.color_matrix if info.color_matrix in SCALE_MATRIX or info.color_matrix == "gbr" else "bt2020nc"
    primaries = "bt2020" if info.color_primaries == "unknown" else info.color_primaries
    range_ = "pc" if info.color_range == "pc" or matrix == "gbr" else "tv"
    return [
        f"setparams=range={range_}:colorspace={matrix}:color_primaries={primaries}:color_trc={info.color_transfer}",
        f"zscale=t=linear:npl={REFERENCE_WHITE}",
        "format=gbrpf32le",
        "zscale=p=bt709",
        f"tonemap=mobius:param={KNEE}:desat=0",
        "zscale=t=bt709:m=gbr:r=full",
        "format=gbrp",
    ]


def _on_white(frame: np.ndarray) -> np.ndarray:
    """(h, w, 4) uint8 with opacity → (h, w, 3) uint8: what lies under full transparency is not meant to be seen."""
    colours, opacity = frame[..., :3].astype(np.uint16), frame[..., 3:]
    return ((colours * opacity + 255 * (255 - opacity.astype(np.uint16)) + 127) // 255).astype(np.uint8)


def _filled(pipe, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """New uint8 arrays, as long as the pipe fills them."""
    frame = np.empty(shape, np.uint8)
    while _fill(pipe, frame):
        yield frame
        frame = np.empty(shape, np.uint8)


def _fill(pipe, frame: np.ndarray) -> bool:
    view = memoryview(frame).cast("B")
    filled = 0
    while filled < len(view):
        n = pipe.readinto(view[filled:])
        if not n:
            return False
        filled += n
    return True


def read_frames_looped(info: VideoInfo, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield `count` pairs (source index, frame), forward, backward and so on: 0..n-1, n-1..0, 0..n-1, ...

    The frames are those of `read_frames`, each the caller's own; n is how many really decode. Backward passes
    decode short segments, found by seeking, so that no more than 32 frames (256 MiB) are held. The first pass
    keeps a checksum of every frame and a segment that does not match is decoded again from further back.
    """
    if count <= 0:
        return
    limit = min(SEGMENT_FRAMES, max(8, SEGMENT_BYTES // (info.width * info.height * 3)))
    sums, kept = array("L"), []  # kept: a whole short clip or still picture, else nothing
    with closing(read_frames(info)) as frames:
        for i, frame in enumerate(frames):
            sums.append(_checksum(frame))
            if i < limit and info.n_frames <= limit:
                kept.append(frame.copy())
            elif i == limit:
                kept.clear()
            yield i, frame
            if i + 1 == count:
                return
    n = len(sums)
    margin = max(SEEK_SECONDS, 16 / info.fps)
    margins: list[float | None] = [margin, 10 * margin, None]
    left = count - n
    for direction in itertools.cycle((-1, 1)):
        if kept:
            passed = ((i, kept[i].copy()) for i in range(n)[::direction])
        elif direction > 0:
            passed = _forward(info, n)
        else:
            passed = _backward(info, sums, limit, margins)
        with closing(passed):
            yield from itertools.islice(passed, left)
        left -= n
        if left <= 0:
            return


def _forward(info: VideoInfo, n: int) -> Iterator[tuple[int, np.ndarray]]:
    with closing(_decode(info, 0, n, None)) as frames:
        yield from enumerate(frames)


def _backward(
    info: VideoInfo, sums: array, limit: int, margins: list[float | None]
) -> Iterator[tuple[int, np.ndarray]]:
    """Frames n-1 ... 0 by segments. `margins` loses the seek distances that have failed."""
    for end in range(len(sums), 0, -limit):
        start = max(0, end - limit)
        while True:
            segment = list(_decode(info, start, end - start, margins[0]))
            if margins[0] is None or array("L", map(_checksum, segment)) == sums[start:end]:
                break
            margins.pop(0)
        if len(segment) != end - start:
            raise UserError(f"{info.path} changed while it was being read; start again.")
        for i in range(end - 1, start - 1, -1):
            yield i, segment.pop()


def _checksum(frame: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(frame[::8]))


def probe_audio(path: str | os.PathLike) -> AudioInfo:
    """Describe the first sound stream of a sound or video file after decoding all of it.

    Raises UserError for what cannot be used, and where there are no samples.
    """
    path = Path(path)
    _check_input(path, "sound")
    arguments = [
        *("-nostats", *_input(path), "-map", "0:a:0", "-af", "aresample=async=1"),
        *("-c:a", "pcm_s16le", "-f", "framecrc", "pipe:1"),
    ]
    samples, size, rate, start = 0, 0, 0, None
    with _ffmpeg(arguments, stdout=subprocess.PIPE) as (process, log):
        for time_base, _, pts, length, packet_bytes in _lively(process, _packets(process), path):
            rate = time_base.denominator
            start = pts if start is None else start
            samples += length
            size += packet_bytes
            if samples > MOST_HOURS * 3600 * rate:
                raise UserError(_too_long(path))
        text = _text(log)
    header = _header(path, text, "sound")
    audio = re.search(r"^  Stream #0:\d+.*?: Audio: (\w+)(?:.*? Hz, [^,\n]+, (\w+))?", header, re.MULTILINE)
    if not audio:
        raise UserError(f"{path} holds no sound; give a file with a voice in it.")
    if not samples or not rate:
        raise UserError(_no_samples(path))
    return AudioInfo(
        path=path,
        codec=audio[1],
        sample_rate=rate,
        channels=max(1, round(size / samples / 2)),
        sample_format=audio[2] or "fltp",
        duration=samples / rate,
        start=start / rate,
    )


def _no_samples(path: Path) -> str:
    return f"The sound in {path} has no samples, it is of zero length or damaged; give another recording."


def _too_long(path: Path) -> str:
    return f"The sound in {path} lasts more than {MOST_HOURS:g} hours, or its timestamps are wrong; give a shorter one."


def read_audio(path: str | os.PathLike, rate: int = SAMPLE_RATE) -> np.ndarray:
    """All of a file's first sound stream: (samples,) float32 mono in [-1, 1] at `rate` Hz.

    The first sample of the file is the first of the array; gaps in its timestamps are silence. Channels are
    mixed as ffmpeg does. Raises UserError for what cannot be used.
    """
    path = Path(path)
    _check_input(path, "sound")
    # rematrix_maxval: weights that add up to 1 at most, as for 16-bit output; else two equal channels clip.
    resample = f"aresample={rate}:async=1:ochl=mono:osf=flt:rematrix_maxval=1"
    arguments = [
        *("-nostats", *_input(path), "-map", "0:a:0", "-af", resample),
        *("-c:a", "pcm_f32le", "-f", "f32le", "pipe:1"),
    ]
    data = bytearray()
    with _ffmpeg(arguments, stdout=subprocess.PIPE) as (process, log):
        for chunk in _lively(process, iter(lambda: process.stdout.read(PIPE_BYTES), b""), path):
            data += chunk
            if len(data) > MOST_HOURS * 3600 * rate * 4:
                raise UserError(_too_long(path))
        text = _text(log)
    if not data:
        if not _has_audio(_header(path, text, "sound")):
            raise UserError(f"{path} holds no sound; give a file with a voice in it.")
        raise UserError(_no_samples(path))
    samples = np.frombuffer(data, np.float32, count=len(data) // 4)
    # One that is not a number, as a float WAV may hold, would spoil all that the audio encoder hears with it.
    return np.clip(np.nan_to_num(samples, copy=False), -1, 1, out=samples)


def check_output(path: str | os.PathLike, inputs: tuple[str | os.PathLike, ...] = ()) -> Path:
    """Raise UserError unless a video can be written to `path` without touching one of the inputs."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{path} does not end in {', '.join(SUFFIXES)}; give the output one of these endings."
        )
    folder = path.absolute().parent
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; give the name of a file to write.")
        if not folder.is_dir():
            raise UserError(f"The folder {folder} does not exist; create it or choose another output.")
        for source in inputs:
            if path.exists() and os.path.exists(source) and os.path.samefile(path, source):
                raise UserError(f"{path} is an input and would be overwritten; choose another output.")
        with tempfile.NamedTemporaryFile(dir=folder, prefix=PARTIAL):
            pass
        if path.exists():
            open(path, "ab").close()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another output.") from error
    return path


class VideoWriter:
    """Write frames and the given sound to an MP4, MOV or MKV file at 25 fps; use it in a `with` block.

    H.264, 8-bit yuv420p, with the matrix, range and colour tags of `info`, or those of BT.709 where it is HDR. An odd
    side grows by one repeated line. Sound that the container takes is copied as it is, lossless sound is stored
    losslessly, and the rest becomes AAC at 256 kbit/s; its first sample is at the time of the first frame. The file
    says in its metadata that it is synthetic (COMMENT). It appears under its name when the block ends well; when it
    does not, nothing is left of it. Raises UserError where the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        info: VideoInfo,
        audio: str | os.PathLike | None = None,
        crf: float = CRF,
    ):
        self.path = check_output(path, (info.path,) if audio is None else (info.path, audio))
        self.info = info
        self.frames = 0  # written so far
        self.cut = False  # the sound is to end with the frames, where these are fewer than it lasts
        self._arguments = self._encoding(None if audio is None else probe_audio(audio), crf)
        self._partial = _partial(self.path.absolute().parent, self.path)

    def _encoding(self, audio: AudioInfo | None, crf: float) -> list[str]:
        info, container = self.info, SUFFIXES[self.path.suffix.lower()]
        width, height = info.width + info.width % 2, info.height + info.height % 2
        matrix, range_ = _matrix(info), _range(info)
        tags = [info.color_matrix, info.color_primaries, info.color_transfer]
        if info.color_matrix == "gbr" or info.hdr:
            tags = ["bt709"] * 3
        elif info.color_matrix not in SCALE_MATRIX:
            tags[0] = "unknown"  # the reader made the same guess as players will
        elif info.color_matrix == "bt2020c":
            tags[0] = "bt2020nc"
        # A file that says nothing of its range stays silent about it.
        silent = info.color_range == "unknown" and info.color_matrix != "gbr" and not info.hdr
        range_tag = "unknown" if silent else range_
        graph = (
            f"scale=out_color_matrix={matrix}:out_range={range_}:flags={TO_YUV},format=yuv420p,setsar=1,"
            f"setparams=range={range_tag}:colorspace={tags[0]}:color_primaries={tags[1]}:color_trc={tags[2]}"
        )
        sound_in, sound_out = _sound(audio, container)
        return [
            *("-loglevel", "error", "-nostats", "-y", "-f", "rawvideo", "-pixel_format", "rgb24"),
            *("-video_size", f"{width}x{height}", "-framerate", str(FPS), "-i", "pipe:0", *sound_in),
            *("-map", "0:v:0", *sound_out, "-map_metadata", "-1", "-map_chapters", "-1"),
            *("-vf", graph, "-c:v", "libx264", "-preset", PRESET, "-crf", str(crf), "-pix_fmt", "yuv420p"),
            *("-threads:v", str(ENCODER_THREADS), "-metadata", f"comment={COMMENT}"),
            *_wrapping(container),
        ]

    def __enter__(self) -> "VideoWriter":
        self._run = _ffmpeg([*self._arguments, _url(self._partial)], stdin=subprocess.PIPE)
        self._process, self._log = self._run.__enter__()
        return self

    def write(self, frame: np.ndarray) -> None:
        """Append one (height, width, 3) uint8 RGB frame."""
        height, width = self.info.height, self.info.width
        if frame.shape != (height, width, 3) or frame.dtype != np.uint8:
            raise ValueError(f"expected ({height}, {width}, 3) uint8, got {frame.shape} {frame.dtype}")
        if height % 2 or width % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        view = memoryview(np.ascontiguousarray(frame)).cast("B")
        try:
            while view:
                view = view[self._process.stdin.write(view) :]
        except OSError as error:
            self._process.wait()
            raise self._failure() from error
        self.frames += 1

    def _failure(self) -> UserError:
        return _not_written(self.path, self._partial, self._process, self._log)

    def _cut_sound(self) -> None:
        """Let the finished file end with its last frame, to a packet of the sound."""
        whole = self._partial.with_stem(f"{self._partial.stem}-whole")
        os.replace(self._partial, whole)
        container = SUFFIXES[self.path.suffix.lower()]
        arguments = [
            *("-loglevel", "error", "-nostats", "-y", *_input(whole), "-t", f"{self.frames / FPS:.3f}"),
            *("-map", "0", "-c", "copy", "-map_metadata", "0"),
            *(*_wrapping(container), _url(self._partial)),
        ]
        try:
            with _ffmpeg(arguments) as (process, self._log):
                if process.wait() != 0:
                    raise self._failure()
        finally:
            whole.unlink(missing_ok=True)

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._process.stdin.close()
                if self._process.wait() != 0:
                    raise self._failure()
                if self.cut:
                    self._cut_sound()
                _move(self._partial, self.path)
        finally:
            try:
                self._run.__exit__(None, None, None)
            finally:  # even if the user presses Ctrl-C once more
                with suppress(OSError):  # the folder may be gone
                    self._partial.unlink()


def join_segments(segments: list[tuple[Path, int]], path: Path, audio: AudioInfo, cut: bool = False) -> None:
    """Write `path` from segments of its picture and the sound, as `VideoWriter` does from frames.

    segments: (file, frames), all in one folder; the picture is copied, not encoded again. cut: the sound is to end with
    the picture. What is not finished lies in that folder, too. Raises UserError where the file cannot be written.
    """
    folder, container = segments[0][0].parent, SUFFIXES[path.suffix.lower()]
    listed, partial = folder / "segments.txt", _partial(folder, path)
    # Each begins where the frames before it end, whatever its own file says.
    listed.write_text("".join(f"file {file.name}\nduration {frames / FPS:.3f}\n" for file, frames in segments))
    sound_in, sound_out = _sound(audio, container)
    shown = sum(frames for _, frames in segments) / FPS
    arguments = [
        *("-loglevel", "error", "-nostats", "-y", "-protocol_whitelist", "file", "-f", "concat", "-i", _url(listed)),
        *(*sound_in, "-map", "0:v:0", "-c:v", "copy", *sound_out, "-map_metadata", "-1", "-map_chapters", "-1"),
        *("-metadata", f"comment={COMMENT}", *(("-t", f"{shown:.3f}") if cut else ())),
        *(*_wrapping(container), _url(partial)),
    ]
    try:
        with _ffmpeg(arguments) as (process, log):
            if process.wait() != 0:
                raise _not_written(path, partial, process, log)
        _move(partial, path)
    finally:
        with suppress(OSError):  # the folder may be gone
            partial.unlink()


def _partial(folder: Path, path: Path) -> Path:
    """A name in the folder for what is to become `path`."""
    return folder / f"{PARTIAL}{uuid.uuid4().hex[:12]}{path.suffix}"


def _move(partial: Path, path: Path) -> None:
    """Give a finished file its name."""
    try:
        os.replace(partial, path)
    except OSError as failed:
        if not partial.parent.is_dir():
            raise _removed(partial.parent, path) from failed
        # Windows: another program has the old file open
        raise UserError(f"{path} cannot be replaced ({failed.strerror}); close it or rename the output.") from failed


def _removed(folder: Path, path: Path) -> UserError:
    return UserError(f"The folder {folder} was removed while {path.name} was written to it; start again.")


def _not_written(path: Path, partial: Path, process: subprocess.Popen, log) -> UserError:
    """Why ffmpeg, which has ended, did not write `path`, of which `partial` was to become."""
    if not partial.parent.is_dir():
        return _removed(partial.parent, path)
    if process.returncode < 0:
        return _ended(process, f"wrote {path}")
    lines = _text(log).strip().splitlines() or ["ffmpeg stopped without a message"]
    said = next((line for line in lines if re.search("No space left|File too large", line)), lines[-1])
    said = re.sub(r"^\[[^]]* @ 0x\w+\] ", "", said)
    return UserError(f"{path} could not be written ({said}); free some space or choose another name.")


def _wrapping(container: str) -> list[str]:
    """ffmpeg's output options for the container."""
    return [*(() if container == "matroska" else ("-movflags", "+faststart")), "-f", container]


def _sound(audio: AudioInfo | None, container: str) -> tuple[list[str], list[str]]:
    """ffmpeg's options for the sound, as its second input and in its output."""
    if audio is None:
        return [], []
    # A stream that begins later than its file is moved to the first frame, as read_audio has it.
    begins = ["-itsoffset", f"{-audio.start:.6f}", *_input(audio.path)]
    return begins, ["-map", "1:a:0", *_audio_codec(audio, container)]


def _audio_codec(audio: AudioInfo, container: str) -> list[str]:
    """ffmpeg's output options for the sound: copied, else lossless if it was, else AAC."""
    if audio.codec in COPIED_AUDIO[container]:
        return ["-c:a", "copy"]
    fill = ["-af", "aresample=async=1"]  # gaps become silence, as in read_audio
    if audio.channels <= 8 and (audio.codec.startswith("pcm_") or audio.codec in LOSSLESS_AUDIO):
        codec, planar = ("alac", "p") if container == "mov" else ("flac", "")
        deep = audio.sample_format.rstrip("p") not in {"u8", "s16"}
        if audio.duration * audio.sample_rate < 16:  # the least that FLAC can write
            fill[1] += ",asetnsamples=16"
        return [*fill, "-c:a", codec, "-sample_fmt", f"{'s32' if deep else 's16'}{planar}"]
    return [*fill, *(("-ac", "2") if audio.channels > 8 else ()), "-c:a", "aac", "-b:a", AAC_BITRATE]
