"""Write video files: `VideoWriter` from frames, `join_segments` from segments that were encoded before."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from latentsync.errors import UserError
from latentsync.machine import usable_cores
from latentsync.media.colour import SCALE_MATRIX, TO_YUV, scale_matrix, scale_range
from latentsync.media.extras import collect_extras, ending_at
from latentsync.media.info import AudioInfo, VideoInfo
from latentsync.media.probe import probe_audio
from latentsync.media.process import file_url, input_arguments, killed_error, open_pipe, read_log, run_ffmpeg
from latentsync.media.sound import SUFFIXES, sound_options
from latentsync.media.watchdog import OnWait, Watchdog
from latentsync.paths import check_writable, replacing
from latentsync.settings import CRF

PRESET = "veryfast"  # x264 speed: at this CRF slower ones only save bytes
COMMENT = "Synthetic media: the mouth in this video was generated to match the sound (LatentSync)."
ENCODER_THREADS = min(16, usable_cores())
# Without a thread of its own that looks ahead: with it the same frames give one of two files, by chance.
X264_PARAMETERS = "sync-lookahead=0"


def check_output(path: str | os.PathLike, inputs: tuple[str | os.PathLike, ...] = ()) -> Path:
    """Raise UserError unless a video can be written to `path` without harm to an input."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} does not end in {', '.join(SUFFIXES)}; give the output one of these endings.")
    return check_writable(path, inputs)


class VideoWriter:
    """Write frames and sound to an MP4, MOV or MKV file at `info.rate`; use it in a `with` block.

    H.264, 8-bit yuv420p, with the matrix, range and colour tags of `info`, or those of BT.709 if it is HDR. An odd side
    grows by one repeated line. MP4 and MOV get AAC sound, MKV and copy_audio keep the sound bit for bit, see
    `sound_options`; its first sample is at the time of the first frame. Title, chapters and subtitles of the video are
    taken over, see `collect_extras`. The file's metadata say that it is synthetic (COMMENT). It appears under its name
    when the block ends without an exception; otherwise nothing is left of it. audio_track: as in `probe_audio`.
    on_wait: called several times a second while the start or end of the block waits for ffmpeg; an exception of it ends
    the block. Raises UserError if the file cannot be written, or ffmpeg stalls.
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
        self.cut = False  # end the sound with the frames, if these are fewer than it lasts
        self.remarks: tuple[str, ...] = ()  # sentences for the user about what was left out of the result
        self.on_wait = on_wait
        self._audio = None if audio is None else probe_audio(audio, audio_track)
        self._copy_audio = copy_audio
        self._picture_options = self._encoding(crf)
        self._stack = ExitStack()

    def _encoding(self, crf: float) -> tuple[list[str], list[str]]:
        """ffmpeg's options for the first input, the picture, and for the output."""
        info = self.info
        width, height = info.width + info.width % 2, info.height + info.height % 2
        matrix, range_ = scale_matrix(info), scale_range(info)
        tags = [info.color_matrix, info.color_primaries, info.color_transfer]
        if info.color_matrix == "gbr" or info.hdr:
            tags = ["bt709"] * 3
        elif info.color_matrix not in SCALE_MATRIX:
            tags[0] = "unknown"  # players make the same assumption as the reader did
        elif info.color_matrix == "bt2020c":
            tags[0] = "bt2020nc"
        # A range that the source does not tag stays without a tag.
        untagged = info.color_range == "unknown" and info.color_matrix != "gbr" and not info.hdr
        range_tag = "unknown" if untagged else range_
        graph = (
            f"scale=out_color_matrix={matrix}:out_range={range_}:flags={TO_YUV},format=yuv420p,setsar=1,"
            f"setparams=range={range_tag}:colorspace={tags[0]}:color_primaries={tags[1]}:color_trc={tags[2]}"
        )
        for_input = [
            *("-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", f"{width}x{height}"),
            *("-framerate", str(info.rate), "-i", "pipe:0"),
        ]
        for_output = [
            *("-vf", graph, "-c:v", "libx264", "-preset", PRESET, "-crf", str(crf), "-pix_fmt", "yuv420p"),
            *("-threads:v", str(ENCODER_THREADS), "-x264-params", X264_PARAMETERS),
        ]
        return for_input, for_output

    def __enter__(self) -> "VideoWriter":
        try:
            self._partial = self._stack.enter_context(_replacing_output(self.path))
            sound_input: list[str] = []
            sound_output: list[str] = []
            extra_inputs: list[str] = []
            extra_output = ["-map_metadata", "-1", "-map_chapters", "-1"]
            if self._audio is not None:
                sound_input, sound_output = sound_options(self._audio, self._partial, self._copy_audio, self.on_wait)
                extras = self._stack.enter_context(
                    collect_extras(self.info, self._audio, self._audio.duration, self._partial, self.on_wait)
                )
                extra_inputs, extra_output = extras.options(inputs=2)
                self.remarks = extras.remarks
            picture_input, picture_output = self._picture_options
            arguments = [
                *("-loglevel", "error", "-nostats", "-y", *picture_input, *sound_input, *extra_inputs),
                *("-map", "0:v:0", *sound_output, *extra_output, *picture_output, "-metadata", f"comment={COMMENT}"),
                *(*_container_options(self.path), file_url(self._partial)),
            ]
            self._process, self._log = self._stack.enter_context(run_ffmpeg(arguments, stdin=subprocess.PIPE))
            self._watchdog = self._stack.enter_context(Watchdog(self._process))
        except BaseException as error:
            self._stack.__exit__(type(error), error, error.__traceback__)
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
            self._watchdog.write(np.ascontiguousarray(frame).data.cast("B"))
        except OSError as error:
            self._process.wait()
            raise _write_error(self.path, self._partial.parent, self._process, self._log, self._watchdog) from error
        self.frames += 1

    def abort(self) -> None:
        """Kill ffmpeg, from any thread: a `write` that waits for it raises UserError."""
        self._process.kill()

    def _finish(self) -> None:
        """Wait until the partial file is complete."""
        open_pipe(self._process.stdin).close()
        if self._watchdog.wait(self.on_wait) != 0:
            raise _write_error(self.path, self._partial.parent, self._process, self._log, self._watchdog)
        if self.cut:
            self._cut_sound()

    def _cut_sound(self) -> None:
        """Let the partial file end with its last frame, to a packet of the sound."""
        seconds = float(self.frames / self.info.rate)
        with replacing(self._partial) as cut:
            arguments = [
                *("-loglevel", "error", "-nostats", "-y", *input_arguments(self._partial)),
                *("-t", f"{seconds:.6f}"),
                *("-map", "0:v", "-map", "0:a?", "-map", "0:s?", "-c", "copy", "-map_metadata", "0"),
                *("-bsf:s", ending_at(seconds)),
                *(*_container_options(self.path), file_url(cut)),
            ]
            _run_writer(arguments, self.path, cut.parent, self.on_wait)

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:  # closed even if the user presses Ctrl-C meanwhile
            self._finish()


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
    """Write `path` from segments of its picture and the sound, like a `VideoWriter` from frames; returns its remarks.

    segments: (file, frames), all in one folder, which also gets the unfinished output; their picture is copied. cut:
    end the sound with the picture. Raises UserError if the file cannot be written.
    """
    folder = segments[0][0].parent
    segment_list = folder / "segments.txt"
    # Each segment begins where the frames before it end, whatever its file says.
    lengths = [f"file {file.name}\nduration {float(frames / info.rate):.6f}\n" for file, frames in segments]
    segment_list.write_text("".join(lengths))
    seconds = float(sum(frames for _, frames in segments) / info.rate)
    with _replacing_output(path, folder) as partial:
        sound_input, sound_output = sound_options(audio, partial, copy_audio, on_wait)
        with collect_extras(info, audio, min(seconds, audio.duration), partial, on_wait) as extras:
            extra_inputs, extra_output = extras.options(inputs=2)
            arguments = [
                *("-loglevel", "error", "-nostats", "-y"),
                *("-format_whitelist", "concat,mov,matroska", "-protocol_whitelist", "file"),
                *("-f", "concat", "-i", file_url(segment_list), *sound_input, *extra_inputs),
                *("-map", "0:v:0", "-c:v", "copy", *sound_output, *extra_output, "-metadata", f"comment={COMMENT}"),
                *(*(("-t", f"{seconds:.6f}") if cut else ()), *_container_options(path), file_url(partial)),
            ]
            _run_writer(arguments, path, folder, on_wait)
    return extras.remarks


@contextmanager
def _replacing_output(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """`replacing`, but raises UserError if the finished file cannot be renamed."""
    finished = False
    try:
        with replacing(path, folder) as partial:
            yield partial
            finished = True
    except OSError as error:
        if not finished:
            raise
        if not partial.parent.is_dir():
            raise _folder_removed_error(partial.parent, path) from error
        # On Windows, another program has the old file open.
        raise UserError(f"{path} cannot be replaced ({error.strerror}); close it or rename the output.") from error


def _run_writer(arguments: list[str], path: Path, folder: Path, on_wait: OnWait | None) -> None:
    """Run an ffmpeg that writes what is to become `path` into `folder`. Raises UserError."""
    with run_ffmpeg(arguments) as (process, log), Watchdog(process) as watchdog:
        if watchdog.wait(on_wait) != 0:
            raise _write_error(path, folder, process, log, watchdog)


def _folder_removed_error(folder: Path, path: Path) -> UserError:
    return UserError(f"The folder {folder} was removed while {path.name} was written to it; start again.")


def _write_error(
    path: Path, folder: Path, process: subprocess.Popen[bytes], log: IO[bytes], watchdog: Watchdog
) -> UserError:
    """The error for an ffmpeg that has ended without finishing what was to become `path`, in `folder`."""
    if watchdog.stalled is not None:
        return UserError(
            f"{path} could not be written, as ffmpeg has stood still for {watchdog.stalled:g} seconds: see whether its "
            "disk answers, and start again."
        )
    if not folder.is_dir():
        return _folder_removed_error(folder, path)
    if process.returncode < 0:
        return killed_error(process, f"wrote {path}")
    return UserError(f"{path} could not be written ({ffmpeg_error(log)}); free some space or choose another name.")


def ffmpeg_error(log: IO[bytes]) -> str:
    """ffmpeg's own message about why writing failed, from its log."""
    lines = read_log(log).strip().splitlines() or ["ffmpeg stopped without a message"]
    line = next((line for line in lines if re.search("No space left|File too large", line)), lines[-1])
    return re.sub(r"^\[[^]]* @ 0x\w+\] ", "", line)


def _container_options(path: Path) -> list[str]:
    """ffmpeg's output options for the container."""
    container = SUFFIXES[path.suffix.lower()]
    return [*(() if container == "matroska" else ("-movflags", "+faststart")), "-f", container]
