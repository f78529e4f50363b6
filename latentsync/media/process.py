"""Run the ffmpeg that imageio-ffmpeg carries: its start and end, its limits, its messages."""

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

from imageio_ffmpeg import get_ffmpeg_exe

from latentsync.errors import UserError
from latentsync.media.signatures import is_playlist, lacks_index, picture_demuxer

if sys.platform == "linux":
    import resource

PIPE_BYTES = 1 << 20  # size asked for the pipes (Linux allows a user 1 MiB; its default is 64 KiB)
MOST_STREAMS = 256  # of a file
MOST_BYTES = 1 << 30  # in one piece of ffmpeg's memory, for an index or a picture
MOST_PIXELS = 8192 * 8192  # of a picture; 8K video has half
STALL_SECONDS = 15.0  # without anything from ffmpeg, while it looks at a file
PROBE_MEMORY = 3 << 29  # bytes; the first frame of 10-bit 8K HEVC on one thread takes 0.7 GB
READ_MEMORY_PER_PIXEL = 128  # bytes, beyond that; 10-bit 8K HEVC on four threads, on to RGB, takes 3.5 GB in all
PROBE_CPU_SECONDS = 20
TOO_LARGE = re.compile(r"Picture size \d+x\d+ (exceeds|is invalid)")  # what ffmpeg says of more than MOST_PIXELS
MOST_LOG_BYTES = 1 << 28
MOST_FILES = 256
# The demuxers that may open a user's file: what phones, cameras, recorders, broadcasters, voice services and editors
# write. Each reads only the file itself. Absent are those that open other files, which whoever sends one could use to
# read what is not theirs (hls, dash, concat, imf, sdp, vobsub, mlv, image2 with its patterns, ...), devices, games'
# formats, and pictures that are programs (svg).
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
    """What the system lets a run of ffmpeg take: on Linux only, elsewhere nothing but ffmpeg's own limits holds it."""

    memory: int | None = None  # bytes of its own, without the program's code
    cpu_seconds: int | None = None
    written: int | None = None  # bytes of a file, its messages included


PROBE_LIMITS = Limits(PROBE_MEMORY, PROBE_CPU_SECONDS, MOST_LOG_BYTES)
SCAN_LIMITS = Limits(PROBE_MEMORY, None, MOST_LOG_BYTES)  # of a whole file, however long it is


def read_limits(width: int, height: int) -> Limits:
    """Limits of decoding frames of a size in pixels."""
    return Limits(PROBE_MEMORY + READ_MEMORY_PER_PIXEL * width * height, None, MOST_LOG_BYTES)


@contextmanager
def run_ffmpeg(
    arguments: list[str],
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    limits: Limits | None = None,
):
    """Run ffmpeg for the length of a `with` block; yields (process, log file). It never outlives the block.

    The messages go to a file, which cannot fill up and stop ffmpeg as a pipe would. limits: what it may take; none for
    an encoder, whose memory follows from the size of our own frames, and whose sound has been decoded within limits.
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
        _limit(process, limits or Limits())
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


def _limit(process: subprocess.Popen, limits: Limits) -> None:
    """Have the system limit a process that has just been started, before it has looked at its input.

    Code between fork and exec (preexec_fn) would not be safe in a program of several threads.
    """
    if sys.platform != "linux":
        return
    values = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: MOST_FILES,
        resource.RLIMIT_DATA: limits.memory,
        resource.RLIMIT_CPU: limits.cpu_seconds,
        resource.RLIMIT_FSIZE: limits.written,
    }
    for limit, value in values.items():
        if value is not None:
            # At the second of the two a process is killed without a word of why.
            hard = value + 1 if limit == resource.RLIMIT_CPU else value
            # It may have ended already, or a lower limit may hold for all of us.
            with suppress(OSError, ValueError):
                resource.prlimit(process.pid, limit, (value, hard))


def _widen(pipe) -> None:
    if sys.platform == "linux":
        import fcntl

        try:
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            pass  # the user's share of pipe memory is used up: slower, not wrong


def ended_by_signal(process: subprocess.Popen, work: str) -> UserError:
    """For an ffmpeg that a signal ended, at some work in words."""
    name = signal.Signals(-process.returncode).name
    return UserError(
        f"ffmpeg was ended from outside ({name}) while it {work}; if memory is short, close other programs, and start "
        "again."
    )


def check_ended(process: subprocess.Popen, messages: str, path: Path) -> None:
    """Raise UserError where an ffmpeg that read a file, and has ended, was at its limits or was killed.

    messages: those of its log, at -loglevel error, where it prints nothing of what the file says of itself.
    """
    if process.returncode < 0 and -process.returncode in {signal.SIGXCPU, signal.SIGXFSZ}:
        raise UserError(f"{path} takes more processor time than a file of its kind should; give another file.")
    no_buffer = "get_buffer() failed" in messages and not TOO_LARGE.search(messages)
    if no_buffer or "Cannot allocate memory" in messages or "Resource temporarily unavailable" in messages:
        raise UserError(f"{path} takes more memory than a file of its kind should; give another or a smaller one.")
    if process.returncode < 0:
        raise ended_by_signal(process, f"read {path}")


def read_log(log) -> str:
    log.seek(0)
    return log.read().decode("utf-8", "replace")


def input_arguments(path: Path) -> list[str]:
    """Arguments that make ffmpeg read exactly this local file and no other, whatever its name and content are."""
    demuxers, forced = DEMUXERS, ()
    if demuxer := picture_demuxer(path):
        forced = ("-f", demuxer)
    elif path.suffix.lower() == ".tga":  # has no first bytes to know it by
        demuxers, forced = ("image2",), ("-f", "image2", "-pattern_type", "none")
    return [
        *(*forced, "-format_whitelist", ",".join(demuxers), "-protocol_whitelist", "file"),
        *("-max_pixels", str(MOST_PIXELS), "-max_streams", str(MOST_STREAMS), "-i", file_url(path)),
    ]


def filter_arguments(select: str, graph: str) -> list[str]:
    """Output options that send a stream, or the picture of a group of tiles, of the first input through a filter graph.

    select: as in `VideoInfo`.
    """
    if select.startswith("g:"):
        return ["-filter_complex", f"[0:{select}]{graph}[out]", "-map", "[out]"]
    return ["-map", f"0:{select}", "-vf", graph]


def file_url(path: Path) -> str:
    return f"file:{os.path.abspath(path)}"


def check_input(path: Path, kind: str) -> None:
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


def unreadable(path: Path, messages: str, kind: str) -> str:
    """Why ffmpeg could not open a file, by the file itself; kind: "video" or "sound"."""
    if is_playlist(path):
        return f"{path} is a playlist that names other files; give a {kind} file itself."
    if lacks_index(path):
        return (
            f"{path} is cut off: its index is missing, as after an unfinished download or recording; "
            "get a complete copy."
        )
    if TOO_LARGE.search(messages):
        return too_many_pixels(path)
    formats = "MP4, MOV, MKV or WebM" if kind == "video" else "WAV, MP3, M4A or FLAC"
    return f"{path} is not a {kind} that ffmpeg can read; give a {kind} file such as {formats}."


def too_many_pixels(path: Path) -> str:
    return f"The picture in {path} has more than {MOST_PIXELS / 1e6:.0f} million pixels; give a smaller one."


def with_watchdog(
    process: subprocess.Popen,
    items: Iterator,
    path: Path,
    first: float | None = None,
    later: float | None = None,
    cancel: threading.Event | None = None,
) -> Iterator:
    """The items that come from ffmpeg, as long as each comes in time; then it is ended, and UserError raised.

    first, later: seconds that the first item and each of the others may take, STALL_SECONDS unless given; the end may
    take as long as an item. What is done with an item takes no time of ffmpeg's. cancel: ends ffmpeg when it is set,
    within a second, and so the items.
    """
    later = STALL_SECONDS if later is None else later
    limit, due, ended, stalled = first or later, math.inf, threading.Event(), None

    def watch() -> None:
        nonlocal stalled
        while not ended.wait(min(later / 20, 1.0)):
            if cancel is not None and cancel.is_set():
                return process.kill()
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
