"""Long jobs in segments, so that what is finished outlives whatever ends a run.

The picture is written as files of a minute, each closed before the next is begun, into a hidden work folder beside the
output; when all are there they are joined with the sound, without encoding them again. The folder is named after the
job, so that the same inputs, weights and settings find it, and resume after its last segment. A manifest lists the
finished segments with their hashes; what does not agree with it is made again. A file is locked in the folder while a
process works there, also against the cleaning of other runs; the lock ends with the process. The segments of another
job with the same output stay, until somebody removes them or they have not been resumed for 30 days.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from imageio_ffmpeg import get_ffmpeg_exe

from latentsync import FPS, __version__
from latentsync.errors import UserError
from latentsync.media import VideoInfo, VideoWriter, check_output, join_segments, probe_audio
from latentsync.media.watchdog import OnWait
from latentsync.paths import PARTIAL, is_own_file, is_own_folder
from latentsync.settings import CRF

SEGMENT_FRAMES = 1500  # one minute: what has to be painted again at most
STALE_DAYS = 1.0  # a half-written file that has not grown for so long belongs to no process
ABANDONED_DAYS = 30.0  # a job that nobody has resumed for so long is given up
DAY = 24 * 3600.0  # seconds
LOCK, MANIFEST = "lock", "manifest.json"
MANIFEST_BYTES = 4 << 20  # at most; a segment takes 200


@dataclass(frozen=True)
class Segment:
    """A finished segment, as the manifest has it."""

    frames: int
    bytes: int
    sha256: str  # of the file
    counts: dict[str, int]  # whatever is counted over the frames of the job, at the end of this segment

    @classmethod
    def from_json(cls, entry: object) -> "Segment | None":
        """The segment of an entry of the manifest; None for anything else."""
        if not isinstance(entry, dict) or entry.keys() != cls.__annotations__.keys():
            return None
        counts = entry["counts"]
        numbers = [entry["frames"], entry["bytes"], *(counts.values() if isinstance(counts, dict) else [None])]
        if not all(type(number) is int and number >= 0 for number in numbers) or type(entry["sha256"]) is not str:
            return None
        return cls(**entry)


@dataclass(frozen=True)
class Unfinished:
    """What an interrupted job has kept."""

    folder: Path
    frames: int  # of its finished segments
    bytes: int  # that they take on the disk

    def describe(self) -> str:
        return (
            f"{clock(self.frames)} of another job with this output, which was interrupted, are kept in '{self.folder}' "
            f"({megabytes(self.bytes)}); they are removed when nobody resumes it for {ABANDONED_DAYS:.0f} days"
        )


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
    """Remove what ended runs have left beside the output: half-written files, and jobs that nobody resumes any more or
    that have finished nothing.

    Nothing of a process that lives or of another user, nothing behind a link, and not the work folder `own`.
    """
    for path in output.absolute().parent.glob(f"{PARTIAL}*"):
        with suppress(OSError):  # others may be cleaning here, too
            age = (time.time() - os.lstat(path).st_mtime) / DAY
            if is_own_file(path):
                if age > STALE_DAYS:
                    path.unlink()
            elif path != own and is_own_folder(path):
                empty = path.name.startswith(_prefix(output)) and not read_manifest(path)
                if empty or age > ABANDONED_DAYS:
                    _remove_unless_locked(path)


def unfinished(output: Path) -> Iterator[Unfinished]:
    """What interrupted jobs with an output of this name have kept beside it."""
    for path in sorted(output.absolute().parent.glob(f"{_prefix(output)}*")):
        with suppress(OSError):
            if is_own_folder(path) and (segments := read_manifest(path)):
                frames, size = (sum(getattr(each, name) for each in segments) for name in ("frames", "bytes"))
                yield Unfinished(path, frames, size)


def discard(output: Path) -> None:
    """Remove what interrupted jobs with an output of this name have kept, but nothing of a process that lives."""
    for path in output.absolute().parent.glob(f"{_prefix(output)}*"):
        with suppress(OSError):
            if is_own_folder(path):
                _remove_unless_locked(path)


def read_manifest(folder: Path) -> list[Segment]:
    """The segments that a work folder lists, up to the first entry that is damaged."""
    path = folder / MANIFEST
    try:
        if not is_own_file(path) or path.stat().st_size > MANIFEST_BYTES:
            return []
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    segments = []
    for entry in listed if isinstance(listed, list) else ():
        if (segment := Segment.from_json(entry)) is None:
            break
        segments.append(segment)
    return segments


def _remove_unless_locked(folder: Path) -> None:
    _remove_link(folder / LOCK)
    lock = FileLock(folder / LOCK, timeout=0)
    with suppress(Timeout):
        lock.acquire()
        _remove(folder, lock)


def _remove(folder: Path, lock: FileLock) -> None:
    """Remove a work folder whose lock is held. A link that has taken its place is left alone."""
    shutil.rmtree(folder, ignore_errors=True)  # which follows no link
    lock.release()
    with suppress(OSError):  # on Windows the lock's file could not be removed before
        if is_own_folder(folder):
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()


def _remove_link(path: Path) -> None:
    """Remove a link in a work folder, where only files are, and not what it leads to."""
    if path.is_symlink():
        path.unlink()


class SegmentWriter:
    """A `VideoWriter` that keeps finished segments when its block does not end well, and resumes after them.

    folder: of `work_folder`; total: frames of the job; counts: whatever is counted over the frames that are given to
    `write`, kept with every segment and found again; say(line) is called with where it resumes, and with what is kept;
    copy_audio, on_wait: as in `VideoWriter`. Raises UserError where the file cannot be written, where another process
    works on the same job, and where the folder is a link or belongs to another user.
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
        self._finished: list[Segment] = []
        self._segment: VideoWriter | None = None

    def __enter__(self) -> "SegmentWriter":
        with self._in_words():
            self._make_folder()
            _remove_link(self._folder / LOCK)
            try:
                self._lock.acquire()
            except Timeout:
                raise UserError(
                    f"{self.path} is being written by another run that was asked for the same; wait for it, or choose "
                    "another output."
                ) from None
        self._finished = self._read()
        if self._finished:
            self.frames = sum(segment.frames for segment in self._finished)
            self._counts.update(self._finished[-1].counts)
            self._say(f"going on from {clock(self.frames)} of {clock(self._total)}")
        kept = {LOCK, MANIFEST, *(self._name(number).name for number in range(len(self._finished)))}
        for path in self._folder.iterdir():
            if path.name not in kept:
                with suppress(OSError):  # Windows: of a process that is just ending
                    path.unlink()
        return self

    def _make_folder(self) -> None:
        try:
            os.mkdir(self._folder, 0o700)
        except FileExistsError:
            if not is_own_folder(self._folder):
                raise UserError(
                    f"'{self._folder}', where the finished parts of {self.path} would be kept, is a link or belongs to "
                    "another user; remove it, or choose another output."
                ) from None
            os.chmod(self._folder, 0o700)

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

    def _read(self) -> list[Segment]:
        """The segments that are whole, up to the first that is not: its file is as the manifest says, to the bit."""
        segments, frames = read_manifest(self._folder), 0
        for number, segment in enumerate(segments):
            path, frames = self._name(number), frames + segment.frames
            complete = segment.frames == self._segment_frames or frames == self._total  # only the last one is shorter
            counted = segment.counts.keys() == self._counts.keys() and max(segment.counts.values(), default=0) <= frames
            if not complete or not counted or frames > self._total or not is_own_file(path):
                return segments[:number]
            if path.stat().st_size != segment.bytes or _hash(path) != segment.sha256:
                return segments[:number]
        return segments

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
        size, digest = segment.path.stat().st_size, _hash(segment.path)
        self._finished.append(Segment(segment.frames, size, digest, dict(self._counts)))
        written = self._folder / f"{PARTIAL}{MANIFEST}"
        written.write_text(json.dumps([asdict(each) for each in self._finished]), encoding="utf-8")
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
                    files = [(self._name(number), segment.frames) for number, segment in enumerate(self._finished)]
                    self.remarks = join_segments(
                        files, self.path, self._info, self._audio,
                        cut=self.cut, copy_audio=self._copy_audio, on_wait=self._on_wait,
                    )  # fmt: skip
                done = True
            elif self._segment is not None:
                self._segment.__exit__(kind, error, trace)
        finally:
            kept = self.keep and not done and sum(segment.frames for segment in self._finished)
            if kept:
                self._lock.release()
                size = sum(segment.bytes for segment in self._finished)
                self._say(
                    f"{clock(kept)} of {clock(self._total)} are kept in '{self._folder}' ({megabytes(size)}): the same "
                    "command goes on from there"
                )
            else:
                _remove(self._folder, self._lock)


def _settle(path: Path) -> None:
    """Have a file on the disk, not only in the machine's memory, before it is relied on."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def megabytes(size: int) -> str:
    """A number of bytes in words."""
    return f"{max(size / 1e6, 0.1):.1f} MB" if size < 1e7 else f"{size / 1e6:.0f} MB"


def clock(frames: int) -> str:
    """A number of frames as minutes and seconds."""
    return f"{frames // (60 * FPS)}:{frames // FPS % 60:02}"
