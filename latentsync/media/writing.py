"""Frames and sound into files: `VideoWriter`, `join_segments`."""

import os
import re
import subprocess
import uuid
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from latentsync import FPS
from latentsync.errors import UserError
from latentsync.machine import usable_cores
from latentsync.media.colour import SCALE_MATRIX, TO_YUV, scale_matrix, scale_range
from latentsync.media.extras import collect_extras, ending_at
from latentsync.media.info import AudioInfo, VideoInfo
from latentsync.media.probe import probe_audio
from latentsync.media.process import killed_error, file_url, input_arguments, read_log, run_ffmpeg
from latentsync.media.sound import SUFFIXES, sound_options
from latentsync.media.watchdog import OnWait, Watchdog
from latentsync.paths import PARTIAL, check_writable
from latentsync.settings import CRF

PRESET = "veryfast"  # x264 speed: at this CRF slower ones only save bytes
COMMENT = "Synthetic media: the mouth in this video was generated to match the sound (LatentSync)."
ENCODER_THREADS = min(16, usable_cores())


def check_output(path: str | os.PathLike, inputs: tuple[str | os.PathLike, ...] = ()) -> Path:
    """Raise UserError unless a video can be written to `path` without harm to an input."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} does not end in {', '.join(SUFFIXES)}; give the output one of these endings.")
    return check_writable(path, inputs)


class VideoWriter:
    """Write frames and the given sound to an MP4, MOV or MKV file at 25 fps; use it in a `with` block.

    H.264, 8-bit yuv420p, with the matrix, range and colour tags of `info`, or those of BT.709 where it is HDR. An odd
    side grows by one repeated line. MP4 and MOV get AAC sound, MKV and copy_audio keep the sound bit for bit, see
    `sound_options`; its first sample is at the time of the first frame. With the sound go the title, chapters and
    subtitles of the video, see `collect_extras`. The file says in its metadata that it is synthetic (COMMENT). It
    appears under its name when the block ends well; when it does not, nothing is left of it. audio_track: as in
    `probe_audio`. on_wait: called several times a second while the block's beginning or end waits for ffmpeg; what it
    raises ends the block. Raises UserError where the file cannot be written, or ffmpeg stands still.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        info: VideoInfo,
        audio: str | os.PathLike | None = None,
        crf: float = CRF,
        *,
        copy_audio: bool = False,
        on_wait: OnWait | None = None,
        audio_track: int | None = None,
    ):
        self.path = check_output(path, (info.path,) if audio is None else (info.path, audio))
        self.info = info
        self.frames = 0  # written so far
        self.cut = False  # the sound is to end with the frames, where these are fewer than it lasts
        self.remarks: tuple[str, ...] = ()  # sentences for the user on what could not be taken over from the video
        self.on_wait = on_wait
        self._audio = None if audio is None else probe_audio(audio, audio_track)
        self._copy_audio = copy_audio
        self._partial = _partial(self.path.absolute().parent, self.path)
        self._picture = self._encoding(crf)
        self._stack = ExitStack()

    def _encoding(self, crf: float) -> tuple[list[str], list[str]]:
        """ffmpeg's options for the picture, as its first input and in its output."""
        info = self.info
        width, height = info.width + info.width % 2, info.height + info.height % 2
        matrix, range_ = scale_matrix(info), scale_range(info)
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
        before = ["-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", f"{width}x{height}"]
        return [*before, "-framerate", str(FPS), "-i", "pipe:0"], [
            *("-vf", graph, "-c:v", "libx264", "-preset", PRESET, "-crf", str(crf), "-pix_fmt", "yuv420p"),
            *("-threads:v", str(ENCODER_THREADS)),
        ]

    def __enter__(self) -> "VideoWriter":
        self._stack.callback(_remove, self._partial)
        try:
            sound, along = ([], []), ([], ["-map_metadata", "-1", "-map_chapters", "-1"])
            if self._audio is not None:
                sound = sound_options(self._audio, self._partial, self._copy_audio, self.on_wait)
                extras = collect_extras(self.info, self._audio, self._audio.duration, self._partial, self.on_wait)
                extras = self._stack.enter_context(extras)
                along, self.remarks = extras.options(2), extras.remarks
            arguments = [
                *("-loglevel", "error", "-nostats", "-y", *self._picture[0], *sound[0], *along[0]),
                *("-map", "0:v:0", *sound[1], *along[1], *self._picture[1], "-metadata", f"comment={COMMENT}"),
                *(*_wrapping(self.path), file_url(self._partial)),
            ]
            self._process, self._log = self._stack.enter_context(run_ffmpeg(arguments, stdin=subprocess.PIPE))
            self._watchdog = self._stack.enter_context(Watchdog(self._process))
        except BaseException as error:
            self._stack.close()
            if isinstance(error, OSError):
                raise UserError(
                    f"{self.path} could not be written ({error.strerror}); free some space or choose another name."
                ) from error
            raise
        return self

    def write(self, frame: np.ndarray) -> None:
        """Append one (height, width, 3) uint8 RGB frame."""
        height, width = self.info.height, self.info.width
        if frame.shape != (height, width, 3) or frame.dtype != np.uint8:
            raise ValueError(f"expected ({height}, {width}, 3) uint8, got {frame.shape} {frame.dtype}")
        if height % 2 or width % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        try:
            self._watchdog.write(memoryview(np.ascontiguousarray(frame)).cast("B"))
        except OSError as error:
            self._process.wait()
            raise self._failure() from error
        self.frames += 1

    def abort(self) -> None:
        """End ffmpeg at once, from any thread: a `write` that waits for it raises UserError."""
        self._process.kill()

    def _failure(self) -> UserError:
        return _not_written(self.path, self._partial, self._process, self._log, self._watchdog)

    def _cut_sound(self) -> None:
        """Let the finished file end with its last frame, to a packet of the sound."""
        whole = self._partial.with_stem(f"{self._partial.stem}-whole")
        os.replace(self._partial, whole)
        arguments = [
            *("-loglevel", "error", "-nostats", "-y", *input_arguments(whole), "-t", f"{self.frames / FPS:.3f}"),
            *("-map", "0:v", "-map", "0:a?", "-map", "0:s?", "-c", "copy", "-map_metadata", "0"),
            *("-bsf:s", ending_at(self.frames / FPS)),
            *(*_wrapping(self.path), file_url(self._partial)),
        ]
        try:
            with run_ffmpeg(arguments) as (process, log), Watchdog(process) as watchdog:
                if watchdog.wait(self.on_wait) != 0:
                    raise _not_written(self.path, self._partial, process, log, watchdog)
        finally:
            whole.unlink(missing_ok=True)

    def __exit__(self, kind, error, trace) -> None:
        with self._stack:  # closes it, even if the user presses Ctrl-C once more
            if kind is None:
                self._process.stdin.close()
                if self._watchdog.wait(self.on_wait) != 0:
                    raise self._failure()
                if self.cut:
                    self._cut_sound()
                _move(self._partial, self.path)


def join_segments(
    segments: list[tuple[Path, int]],
    path: Path,
    info: VideoInfo,
    audio: AudioInfo,
    *,
    cut: bool = False,
    copy_audio: bool = False,
    on_wait: OnWait | None = None,
) -> tuple[str, ...]:
    """Write `path` from segments of its picture and the sound, as `VideoWriter` does from frames; returns its remarks.

    segments: (file, frames), all in one folder; the picture is copied, not encoded again. cut: the sound is to end with
    the picture. What is not finished lies in that folder, too. Raises UserError where the file cannot be written.
    """
    folder = segments[0][0].parent
    listed, partial = folder / "segments.txt", _partial(folder, path)
    # Each begins where the frames before it end, whatever its own file says.
    listed.write_text("".join(f"file {file.name}\nduration {frames / FPS:.3f}\n" for file, frames in segments))
    shown = sum(frames for _, frames in segments) / FPS
    try:
        sound = sound_options(audio, partial, copy_audio, on_wait)
        with collect_extras(info, audio, min(shown, audio.duration), partial, on_wait) as extras:
            along = extras.options(2)
            arguments = [
                *("-loglevel", "error", "-nostats", "-y"),
                *("-format_whitelist", "concat,mov,matroska", "-protocol_whitelist", "file"),
                *("-f", "concat", "-i", file_url(listed), *sound[0], *along[0]),
                *("-map", "0:v:0", "-c:v", "copy", *sound[1], *along[1], "-metadata", f"comment={COMMENT}"),
                *(*(("-t", f"{shown:.3f}") if cut else ()), *_wrapping(path), file_url(partial)),
            ]
            with run_ffmpeg(arguments) as (process, log), Watchdog(process) as watchdog:
                if watchdog.wait(on_wait) != 0:
                    raise _not_written(path, partial, process, log, watchdog)
            _move(partial, path)
        return extras.remarks
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    with suppress(OSError):  # it may not be there, or its folder be gone
        path.unlink()


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


def _not_written(path: Path, partial: Path, process: subprocess.Popen, log, watchdog: Watchdog) -> UserError:
    """Why ffmpeg, which has ended, did not write `path`, of which `partial` was to become."""
    if watchdog.stalled is not None:
        return UserError(
            f"{path} could not be written, as ffmpeg has stood still for {watchdog.stalled:g} seconds: see whether its "
            "disk answers, and start again."
        )
    if not partial.parent.is_dir():
        return _removed(partial.parent, path)
    if process.returncode < 0:
        return killed_error(process, f"wrote {path}")
    return UserError(f"{path} could not be written ({failure(log)}); free some space or choose another name.")


def failure(log) -> str:
    """Why an ffmpeg that wrote a file ended, in the words of its log."""
    lines = read_log(log).strip().splitlines() or ["ffmpeg stopped without a message"]
    line = next((line for line in lines if re.search("No space left|File too large", line)), lines[-1])
    return re.sub(r"^\[[^]]* @ 0x\w+\] ", "", line)


def _wrapping(path: Path) -> list[str]:
    """ffmpeg's output options for the container."""
    container = SUFFIXES[path.suffix.lower()]
    return [*(() if container == "matroska" else ("-movflags", "+faststart")), "-f", container]
