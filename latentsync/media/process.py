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
from contextlib import contextmanager
from pathlib import Path

from imageio_ffmpeg import get_ffmpeg_exe

from latentsync.errors import UserError
from latentsync.media.signatures import is_playlist, picture_demuxer

PIPE_BYTES = 1 << 20  # size asked for the pipes (Linux allows a user 1 MiB; its default is 64 KiB)
MOST_STREAMS = 256  # of a file
MOST_BYTES = 1 << 30  # in one piece of ffmpeg's memory, for an index or a picture
MOST_PIXELS = 8192 * 8192  # of a picture; 8K video has half
STALL_SECONDS = 15.0  # without anything from ffmpeg, while it looks at a file
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


@contextmanager
def run_ffmpeg(arguments: list[str], *, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.DEVNULL):
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


def ended_by_signal(process: subprocess.Popen, work: str) -> UserError:
    """For an ffmpeg that a signal ended, at some work in words."""
    name = signal.Signals(-process.returncode).name
    return UserError(
        f"ffmpeg was ended from outside ({name}) while it {work}; if memory is short, close other programs, and start "
        "again."
    )


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


def input_header(path: Path, text: str, kind: str) -> str:
    """ffmpeg's description of the input in its messages; UserError where it could not open the file."""
    match = re.search(
        r"^Input #0, (?!tty).*?(?=^Stream mapping:|^Output #|\Z)", text, re.MULTILINE | re.DOTALL
    )
    if match:
        return match[0]
    if is_playlist(path):
        raise UserError(f"{path} is a playlist that names other files; give a {kind} file itself.")
    with open(path, "rb") as file:
        box = file.read(8)[4:]
    # ffmpeg goes by the ending .mp4 even where the content is something else.
    if "moov atom not found" in text and box in {b"ftyp", b"mdat", b"moov", b"wide", b"free", b"skip"}:
        raise UserError(
            f"{path} is cut off: its index is missing, as after an unfinished download or recording; "
            "get a complete copy."
        )
    if "max pixel count" in text:
        raise UserError(too_many_pixels(path))
    formats = "MP4, MOV, MKV or WebM" if kind == "video" else "WAV, MP3, M4A or FLAC"
    raise UserError(f"{path} is not a {kind} that ffmpeg can read; give a {kind} file such as {formats}.")


def too_many_pixels(path: Path) -> str:
    return f"The picture in {path} has more than {MOST_PIXELS / 1e6:.0f} million pixels; give a smaller one."


def with_watchdog(
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
