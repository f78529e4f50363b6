"""Long jobs in segments, so that what is finished outlives whatever ends a run.

The picture is written as files of a minute, each closed before the next is begun, into a hidden work folder beside the
output; when all are there they are joined with the sound, without encoding them again. The folder is named after the
job, so that the same inputs, weights and settings find it, and go on after its last segment. A file is locked in it
while a process is at it, also against the cleaning of other runs; the lock ends with the process.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from imageio_ffmpeg import get_ffmpeg_exe

from latentsync import FPS, __version__
from latentsync.errors import UserError
from latentsync.media import CRF, PARTIAL, VideoInfo, VideoWriter, check_output, join_segments, probe_audio
from latentsync.media.watchdog import OnWait

SEGMENT_FRAMES = 1500  # one minute: what has to be painted again at most
STALE_DAYS = 1.0  # a half-written file that has not grown for so long belongs to no process
ABANDONED_DAYS = 30.0  # a job that nobody has gone on with for so long is given up
DAY = 24 * 3600.0  # seconds
LOCK, MANIFEST = "lock", "manifest.json"


def work_folder(output: Path, files: Iterable[str | os.PathLike], asked: object) -> Path:
    """Where a job keeps its segments, beside its output.

    Its name follows from that of the output, from the files (place, size and time of the last change), and from what
    else is asked for, ready for JSON. It is another one with another version of this program or of ffmpeg.
    """
    known = []
    for path in (*files, get_ffmpeg_exe()):
        status = os.stat(path)
        known.append([os.path.realpath(path), status.st_size, status.st_mtime_ns])
    key = _digest(json.dumps([__version__, known, asked], sort_keys=True), 16)
    return output.absolute().parent / f"{_prefix(output)}{key}"


def _prefix(output: Path) -> str:
    """Begins the names of the work folders of all jobs with an output of this name."""
    return f"{PARTIAL}{_digest(os.path.normcase(output.name), 8)}-"


def _digest(text: str, length: int) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:length]


def clean(output: Path, own: Path | None = None) -> None:
    """Remove what ended runs have left beside the output: half-written files, jobs with the same output, and jobs that
    nobody goes on with. Nothing of a process that lives, and not the work folder `own`."""
    for path in output.absolute().parent.glob(f"{PARTIAL}*"):
        with suppress(OSError):  # others may be cleaning here, too
            age = (time.time() - path.stat().st_mtime) / DAY
            if not path.is_dir():
                if age > STALE_DAYS:
                    path.unlink()
            elif path != own and (path.name.startswith(_prefix(output)) or age > ABANDONED_DAYS):
                lock = FileLock(path / LOCK, timeout=0)
                with suppress(Timeout):
                    lock.acquire()
                    _remove(path, lock)


def _remove(folder: Path, lock: FileLock) -> None:
    """Remove a work folder whose lock is held."""
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()
    with suppress(OSError):  # on Windows the lock's file could not be removed before
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


class SegmentWriter:
    """A `VideoWriter` that keeps finished segments when its block does not end well, and goes on after them.

    folder: of `work_folder`; total: frames of the job; counts: whatever is counted over the frames that are given to
    `write`, kept with every segment and found again; say: is told in a line where it goes on, and what is kept;
    copy_audio, on_wait: as in `VideoWriter`.
    Raises UserError where the file cannot be written, and where another process is at the same job.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        info: VideoInfo,
        audio: str | os.PathLike,
        crf: float = CRF,
        *,
        folder: Path,
        total: int,
        segment_frames: int = SEGMENT_FRAMES,
        counts: dict[str, int],
        say: Callable[[str], None],
        copy_audio: bool = False,
        on_wait: OnWait | None = None,
        audio_track: int | None = None,
    ):
        self.path = check_output(path, (info.path, audio))
        self.frames = 0  # written so far, by earlier runs too
        self.cut = False  # as in `VideoWriter`
        self.keep = True  # what is finished, when the block does not end well
        self.remarks: tuple[str, ...] = ()  # as in `VideoWriter`, when the block has ended
        self._info, self._audio, self._crf = info, probe_audio(audio, audio_track), crf
        self._folder, self._total, self._segment_frames = folder, total, segment_frames
        self._counts, self._say = counts, say
        self._copy_audio, self._on_wait = copy_audio, on_wait
        self._lock = FileLock(folder / LOCK, timeout=0)
        self._finished: list[dict] = []  # of every segment: frames, bytes, and the counts at its end
        self._segment: VideoWriter | None = None

    def __enter__(self) -> "SegmentWriter":
        with self._in_words():
            self._folder.mkdir(exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout:
                raise UserError(
                    f"{self.path} is being written by another run that was asked for the same; wait for it, or choose "
                    "another output."
                ) from None
        self._finished = self._read()
        if self._finished:
            self.frames = sum(segment["frames"] for segment in self._finished)
            self._counts.update(self._finished[-1]["counts"])
            self._say(f"going on from {clock(self.frames)} of {clock(self._total)}")
        kept = {LOCK, MANIFEST, *(self._name(number).name for number in range(len(self._finished)))}
        for path in self._folder.iterdir():
            if path.name not in kept:
                with suppress(OSError):  # Windows: of a process that is just ending
                    path.unlink()
        return self

    def _name(self, number: int) -> Path:
        return self._folder / f"{number:05}{self.path.suffix}"

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """Speak of the output, not of its segments, where something cannot be written."""
        try:
            yield
        except UserError as error:
            name = self._name(len(self._finished))
            raise UserError(str(error).replace(str(name), str(self.path))) from error
        except OSError as error:
            raise UserError(
                f"{self.path} could not be written ({error.strerror}); free some space or choose another name."
            ) from error

    def _read(self) -> list[dict]:
        """The segments that are whole, up to the first that is not."""
        try:
            listed = json.loads((self._folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        for number, segment in enumerate(listed):
            path = self._name(number)
            if not path.is_file() or path.stat().st_size != segment["bytes"]:
                return listed[:number]
        return listed

    def write(self, frame: np.ndarray) -> None:
        """Append one (height, width, 3) uint8 RGB frame."""
        with self._in_words():
            if self._segment is None:
                name = self._name(len(self._finished))
                self._segment = VideoWriter(name, self._info, crf=self._crf).__enter__()
            self._segment.write(frame)
            self.frames += 1
            if self._segment.frames == self._segment_frames:
                self._finish_segment()

    def abort(self) -> None:
        """End ffmpeg at once, from any thread, see `VideoWriter.abort`."""
        if (segment := self._segment) is not None:
            segment.abort()

    def _finish_segment(self) -> None:
        segment = self._segment
        try:
            segment.__exit__(None, None, None)
        finally:
            self._segment = None
        _settle(segment.path)
        self._finished.append(
            {"frames": segment.frames, "bytes": segment.path.stat().st_size, "counts": dict(self._counts)}
        )
        written = self._folder / f"{PARTIAL}{MANIFEST}"
        written.write_text(json.dumps(self._finished), encoding="utf-8")
        _settle(written)
        os.replace(written, self._folder / MANIFEST)

    def __exit__(self, kind, error, trace) -> None:
        done = False
        try:
            if kind is None:
                with self._in_words():
                    if self._segment is not None:
                        self._segment.on_wait = self._on_wait
                        self._finish_segment()
                    files = [(self._name(number), segment["frames"]) for number, segment in enumerate(self._finished)]
                    self.remarks = join_segments(
                        files, self.path, self._info, self._audio,
                        cut=self.cut, copy_audio=self._copy_audio, on_wait=self._on_wait,
                    )  # fmt: skip
                done = True
            elif self._segment is not None:
                self._segment.__exit__(kind, error, trace)
        finally:
            kept = self.keep and not done and sum(segment["frames"] for segment in self._finished)
            if kept:
                self._lock.release()
                self._say(f"{clock(kept)} of {clock(self._total)} are kept: the same command goes on from there")
            else:
                _remove(self._folder, self._lock)


def _settle(path: Path) -> None:
    """Have a file on the disk, not only in the machine's memory, before it is relied on."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def clock(frames: int) -> str:
    """A number of frames as minutes and seconds."""
    return f"{frames // (60 * FPS)}:{frames // FPS % 60:02}"
