"""Run the ffmpeg that comes with imageio-ffmpeg: start and end, limits, time-outs, messages."""

import io
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from imageio_ffmpeg import get_ffmpeg_exe

from latentsync.errors import UserError
from latentsync.media.signatures import is_playlist, lacks_index, picture_demuxer

if sys.platform == "linux":
    import fcntl
    import resource

T = TypeVar("T")

PIPE_BYTES = 1 << 20  # requested size of the pipes (Linux allows a user 1 MiB; its default is 64 KiB)
MAX_STREAMS = 256  # of a file
MAX_BYTES = 1 << 30  # of one allocation in ffmpeg, for an index or a picture
MAX_PIXELS = 8192 * 8192  # of a frame; 8K video has half
STALL_SECONDS = 15.0  # without output from ffmpeg while it probes a file
PROBE_MEMORY = 3 << 29  # bytes; the first frame of 10-bit 8K HEVC on one thread takes 0.7 GB
READ_MEMORY_PER_PIXEL = 128  # bytes in addition; 10-bit 8K HEVC on four threads, on to RGB, takes 3.5 GB in all
PROBE_CPU_SECONDS = 20
TOO_LARGE = re.compile(r"Picture size \d+x\d+ (exceeds|is invalid)")  # ffmpeg's message for more than MAX_PIXELS
MAX_LOG_BYTES = 1 << 28
MAX_FILES = 256  # open at the same time
# The demuxers that may open a user's file: the formats of phones, cameras, recorders, broadcasters, voice services and
# editors. Each reads only the file itself. Excluded are demuxers that open other files, with which an uploaded file
# could read files of the server (hls, dash, concat, imf, sdp, vobsub, mlv, image2 with its patterns, ...), devices,
# formats of games, and pictures that are programs (svg).
CONTAINERS = (
    "mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "asf_o", "mxf", "gxf", "ogg", "nut", "rm", "dv", "ivf",
    "wtv", "dhav", "yuv4mpegpipe",
)  # fmt: skip
RAW_VIDEO = (
    "h264", "hevc", "vvc", "av1", "obu", "m4v", "mpegvideo", "h263", "vc1", "dnxhd", "dirac", "mjpeg", "gif", "apng",
    "webp_anim", "jpegxl_anim",
)  # fmt: skip
SOUND = (
    "wav", "w64", "aiff", "caf", "au", "voc", "iff", "nistsphere", "mp3", "aac", "loas", "flac", "amr", "amrnb",
    "amrwb", "ac3", "eac3", "dts", "dtshd", "truehd", "mlp", "ape", "tta", "tak", "wv", "shn", "mpc", "mpc8", "dsf",
    "oma", "dss", "qcp", "g722", "gsm",
)  # fmt: skip
PICTURES = tuple(
    f"{name}_pipe" for name in (
        "png", "jpeg", "jpegls", "jpegxl", "webp", "bmp", "tiff", "gif", "j2k", "qoi", "psd", "dpx", "exr", "hdr",
        "sgi", "pam", "pbm", "pgm", "ppm", "pcx",
    )
)  # fmt: skip
DEMUXERS = CONTAINERS + RAW_VIDEO + SOUND + PICTURES


@dataclass(frozen=True)
class Limits:
    """Resource limits of an ffmpeg process; set on Linux only, elsewhere ffmpeg's own limits must do."""

    memory: int | None = None  # bytes of data, without the program's code
    cpu_seconds: int | None = None
    written: int | None = None  # bytes of any file that it writes, its log included


PROBE_LIMITS = Limits(PROBE_MEMORY, PROBE_CPU_SECONDS, MAX_LOG_BYTES)
SCAN_LIMITS = Limits(PROBE_MEMORY, None, MAX_LOG_BYTES)  # for reading a whole file, however long it is


def read_limits(width: int, height: int) -> Limits:
    """Limits for decoding frames of a size in pixels."""
    return Limits(PROBE_MEMORY + READ_MEMORY_PER_PIXEL * width * height, None, MAX_LOG_BYTES)


@contextmanager
def run_ffmpeg(
    arguments: list[str],
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    limits: Limits | None = None,
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Run ffmpeg during a `with` block; yields (process, log file). The process never outlives the block.

    The messages go to a file, since a pipe could fill up and block ffmpeg. limits: None for an encoder, whose memory
    follows from the size of our frames, and whose sound has been decoded within limits before.
    """
    command = [get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-max_alloc", str(MAX_BYTES), *arguments]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=log,
            bufsize=0,
            start_new_session=True,  # this program handles Ctrl-C, not ffmpeg
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),  # which Windows has
        )
        _limit(process, limits or Limits())
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                _enlarge_pipe(pipe)
        try:
            yield process, log
        finally:
            if process.poll() is None:
                process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            process.wait()


def _limit(process: subprocess.Popen, limits: Limits) -> None:
    """Limit the resources of a process that was just started and has not read its input yet.

    preexec_fn would not be safe in a program with several threads.
    """
    if sys.platform != "linux":
        return
    values = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: MAX_FILES,
        resource.RLIMIT_DATA: limits.memory,
        resource.RLIMIT_CPU: limits.cpu_seconds,
        resource.RLIMIT_FSIZE: limits.written,
    }
    for limit, value in values.items():
        if value is not None:
            # At the hard limit of processor time a process gets SIGKILL, which would not tell the reason.
            hard = value + 1 if limit == resource.RLIMIT_CPU else value
            # The process may have ended already, or this program may have a lower limit itself.
            with suppress(OSError, ValueError):
                resource.prlimit(process.pid, limit, (value, hard))


def _enlarge_pipe(pipe: IO[bytes]) -> None:
    if sys.platform == "linux":
        with suppress(OSError):  # the user's share of pipe memory is used up: slower, not wrong
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def killed_error(process: subprocess.Popen, work: str) -> UserError:
    """The error for an ffmpeg that was killed by a signal; work: what it did, as "read a.mp4"."""
    name = signal.Signals(-process.returncode).name
    return UserError(
        f"ffmpeg was ended from outside ({name}) while it {work}; if memory is short, close other programs, and start "
        "again."
    )


def check_exit(process: subprocess.Popen, messages: str, path: Path) -> None:
    """Raise UserError if an ffmpeg that read `path`, and has ended, exceeded its limits or was killed.

    messages: its log at -loglevel error, which contains no metadata of the file.
    """
    if process.returncode < 0 and -process.returncode in {signal.SIGXCPU, signal.SIGXFSZ}:
        raise UserError(f"{path} takes more processor time than a file of its kind should; give another file.")
    no_buffer = "get_buffer() failed" in messages and not TOO_LARGE.search(messages)
    if no_buffer or "Cannot allocate memory" in messages or "Resource temporarily unavailable" in messages:
        raise UserError(f"{path} takes more memory than a file of its kind should; give another or a smaller one.")
    if process.returncode < 0:
        raise killed_error(process, f"read {path}")


def read_log(log: IO[bytes]) -> str:
    """All messages so far in a log file of `run_ffmpeg`."""
    log.seek(0)
    return log.read().decode("utf-8", "replace")


def input_arguments(path: Path) -> list[str]:
    """Arguments that make ffmpeg read exactly this local file and no other, whatever its name and content are."""
    demuxers: tuple[str, ...] = DEMUXERS
    force_demuxer: list[str] = []
    if demuxer := picture_demuxer(path):
        force_demuxer = ["-f", demuxer]
    elif path.suffix.lower() == ".tga":  # a format without a signature
        demuxers, force_demuxer = ("image2",), ["-f", "image2", "-pattern_type", "none"]
    return [
        *(*force_demuxer, "-format_whitelist", ",".join(demuxers), "-protocol_whitelist", "file"),
        *("-max_pixels", str(MAX_PIXELS), "-max_streams", str(MAX_STREAMS), "-i", file_url(path)),
    ]


def filter_arguments(select: str, graph: str) -> list[str]:
    """Output options that filter a stream of the first input; select: as in `VideoInfo`, also a group of tiles."""
    if select.startswith("g:"):
        return ["-filter_complex", f"[0:{select}]{graph}[out]", "-map", "[out]"]
    return ["-map", f"0:{select}", "-vf", graph]


def file_url(path: Path) -> str:
    """The file's name for ffmpeg, which takes no part of it for a protocol or an option."""
    return f"file:{os.path.abspath(path)}"


def check_input(path: Path, kind: str) -> None:
    """Raise UserError unless `path` is a file that can be read and is not empty; kind: "video" or "sound"."""
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
    except OSError as error:  # of path.exists(), too
        raise UserError(f"{path} cannot be read ({error.strerror}); check its name and its permissions.") from error


def unreadable_error(path: Path, messages: str, kind: str) -> UserError:
    """The error for a file that ffmpeg cannot open; messages: ffmpeg's; kind: "video" or "sound"."""
    if is_playlist(path):
        return UserError(f"{path} is a playlist that names other files; give a {kind} file itself.")
    if lacks_index(path):
        return UserError(
            f"{path} is cut off: its index is missing, as after an unfinished download or recording; "
            "get a complete copy."
        )
    if TOO_LARGE.search(messages):
        return too_large_error(path)
    formats = "MP4, MOV, MKV or WebM" if kind == "video" else "WAV, MP3, M4A or FLAC"
    return UserError(f"{path} is not a {kind} that ffmpeg can read; give a {kind} file such as {formats}.")


def too_large_error(path: Path) -> UserError:
    return UserError(f"The picture in {path} has more than {MAX_PIXELS / 1e6:.0f} million pixels; give a smaller one.")


def open_pipe(pipe: IO[bytes] | None) -> io.FileIO:
    """A pipe of an ffmpeg that was started with it, by its type: unbuffered."""
    if not isinstance(pipe, io.FileIO):
        raise ValueError("ffmpeg was started without this pipe")
    return pipe


def output_lines(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """The lines that ffmpeg writes to its stdout, a pipe."""
    with open(open_pipe(process.stdout).fileno(), "rb", closefd=False) as lines:
        yield from lines


def with_timeout(
    process: subprocess.Popen[bytes],
    items: Iterator[T],
    path: Path,
    first: float | None = None,
    later: float | None = None,
    cancel: threading.Event | None = None,
) -> Iterator[T]:
    """Yield what ffmpeg delivers; kill it and raise UserError when it takes too long.

    first, later: seconds that the first item and each later one may take, STALL_SECONDS unless given; the end of the
    process may take as long as an item. The consumer's time does not count. cancel: when it is set, ffmpeg is killed
    within a second, which ends the items.
    """
    later = STALL_SECONDS if later is None else later
    limit, deadline = first or later, math.inf
    ended = threading.Event()
    exceeded: float | None = None  # the limit, in seconds, for which ffmpeg was killed

    def watch() -> None:
        nonlocal exceeded
        while not ended.wait(min(later / 20, 1.0)):
            if cancel is not None and cancel.is_set():
                return process.kill()
            if time.monotonic() > deadline:
                exceeded = limit
                return process.kill()

    watcher = threading.Thread(target=watch, name="ffmpeg time-out", daemon=True)
    watcher.start()
    try:
        deadline = time.monotonic() + limit
        for item in items:
            deadline = math.inf
            yield item
            limit = later
            deadline = time.monotonic() + limit
        process.wait()
    finally:
        ended.set()
        watcher.join()
    if exceeded is not None:
        raise UserError(
            f"{path} is damaged or its disk does not answer, ffmpeg gets nothing out of it in {exceeded:g} seconds; "
            "copy it to another disk, or give another file."
        )


def wait_with_timeout(process: subprocess.Popen[bytes], path: Path) -> None:
    """Wait for the end of an ffmpeg without output; kill it and raise UserError when it takes too long."""
    for _ in with_timeout(process, iter(()), path):
        pass
