"""Frames and sound into files: `VideoWriter`, `join_segments`."""

import os
import re
import subprocess
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

import numpy as np

from latentsync import FPS
from latentsync.errors import UserError
from latentsync.media.colour import SCALE_MATRIX, TO_YUV, scale_matrix, scale_range
from latentsync.media.info import AudioInfo, VideoInfo
from latentsync.media.probe import probe_audio
from latentsync.media.process import ended_by_signal, file_url, input_arguments, read_log, run_ffmpeg

CRF = 16  # x264 quality that the eye cannot tell from the source
PRESET = "veryfast"  # x264 speed: at this CRF slower ones only save bytes
COMMENT = "Synthetic media: the mouth in this video was generated to match the sound (LatentSync)."
ENCODER_THREADS = min(16, os.cpu_count() or 1)
SUFFIXES = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
COPIED_AUDIO = {  # codecs that go into the container as they are
    "mp4": {"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac"},
    "mov": {"aac", "mp3", "ac3", "eac3", "alac",
            "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be", "pcm_s32le", "pcm_f32le"},
    "matroska": {"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac", "vorbis", "dts", "mp2", "truehd",
                 "wavpack", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le"},
}  # fmt: skip
LOSSLESS_AUDIO = {"flac", "alac", "wavpack", "tta", "ape", "tak", "shorten", "truehd", "mlp", "als",
                  "wmalossless"}  # fmt: skip
AAC_BITRATE = "256k"
PARTIAL = ".latentsync-"  # begins the name of everything that is not finished


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
        self._run = run_ffmpeg([*self._arguments, file_url(self._partial)], stdin=subprocess.PIPE)
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
            *("-loglevel", "error", "-nostats", "-y", *input_arguments(whole), "-t", f"{self.frames / FPS:.3f}"),
            *("-map", "0", "-c", "copy", "-map_metadata", "0"),
            *(*_wrapping(container), file_url(self._partial)),
        ]
        try:
            with run_ffmpeg(arguments) as (process, self._log):
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
        *("-loglevel", "error", "-nostats", "-y"),
        *("-format_whitelist", "concat,mov,matroska", "-protocol_whitelist", "file"),
        *("-f", "concat", "-i", file_url(listed)),
        *(*sound_in, "-map", "0:v:0", "-c:v", "copy", *sound_out, "-map_metadata", "-1", "-map_chapters", "-1"),
        *("-metadata", f"comment={COMMENT}", *(("-t", f"{shown:.3f}") if cut else ())),
        *(*_wrapping(container), file_url(partial)),
    ]
    try:
        with run_ffmpeg(arguments) as (process, log):
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
        return ended_by_signal(process, f"wrote {path}")
    lines = read_log(log).strip().splitlines() or ["ffmpeg stopped without a message"]
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
    begins = ["-itsoffset", f"{-audio.start:.6f}", *input_arguments(audio.path)]
    return begins, ["-map", f"1:{audio.select}", *_audio_codec(audio, container)]


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
