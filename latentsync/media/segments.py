"""Write long jobs in segments, so that finished work outlives whatever ends a run.

The picture is written as files of SEGMENT_FRAMES, each closed before the next is begun, into a hidden work folder
beside the output; when all are there they are joined with the sound, without encoding them again. The folder's name
follows from the job, so that a run with the same inputs, weights and settings finds it and resumes after its last
segment. A manifest lists the finished segments with their hashes; a segment that does not match is made again. While a
process works in the folder it locks a file there, also against the cleaning of other runs; the lock ends with the
process. The segments of other jobs with the same output stay until somebody removes them or they have not been resumed
for 30 days.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from imageio_ffmpeg import get_ffmpeg_exe

from latentsync import __version__
from latentsync.errors import UserError
from latentsync.media import VideoInfo, VideoWriter, check_output, join_segments, probe_audio
from latentsync.media.watchdog import OnWait
from latentsync.paths import PARTIAL, hash_files, is_own_file, is_own_folder, replacing
from latentsync.rates import parse_rate
from latentsync.settings import CRF

SEGMENT_FRAMES = 1500  # the most that is lost: one minute at 25 a second
STALE_DAYS = 1.0  # a partial file that has not grown for this long belongs to no process
ABANDONED_DAYS = 30.0  # after which a job that nobody resumes is removed
DAY = 24 * 3600.0  # seconds
LOCK, MANIFEST = "lock", "manifest.json"
MAX_MANIFEST_BYTES = 4 << 20  # an entry takes 200


@dataclass(frozen=True)
class Segment:
    """An entry of the manifest: a finished segment."""

    frames: int
    bytes: int
    sha256: str  # of the file
    counts: dict[str, int]  # of the job, at the end of this segment; see `SegmentWriter`
    rate: str = "25"  # frames a second, a fraction

    @classmethod
    def from_json(cls, entry: object) -> "Segment | None":
        """Parse an entry of the manifest; None if it is no valid one."""
        if not isinstance(entry, dict):
            return None
        entry = {"rate": cls.rate} | entry
        if entry.keys() != cls.__annotations__.keys():
            return None
        counts = entry["counts"]
        numbers = [entry["frames"], entry["bytes"], *(counts.values() if isinstance(counts, dict) else [None])]
        if not all(type(number) is int and number >= 0 for number in numbers) or type(entry["sha256"]) is not str:
            return None
        if parse_rate(entry["rate"]) is None:
            return None
        return cls(**entry)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Unfinished:
    """The finished segments of an interrupted job."""

    folder: Path
    frames: int  # of its finished segments
    bytes: int  # on the disk
    rate: Fraction  # frames a second

    def describe(self) -> str:
        return (
            f"{clock(self.frames, self.rate)} of another job with this output, which was interrupted, are kept in "
            f"'{self.folder}' ({megabytes(self.bytes)}); they are removed when nobody resumes it for "
            f"{ABANDONED_DAYS:.0f} days"
        )


def work_folder(output: Path, files: Iterable[str | os.PathLike], settings: object) -> Path:
    """The folder of a job's segments, beside its output.

    Its name depends on the name of the output, on the input files (path, size and time of modification), on the
    settings, which JSON must be able to hold, and on the versions of this program and of ffmpeg.
    """
    inputs = []
    for path in (*files, get_ffmpeg_exe()):
        status = os.stat(path)
        inputs.append([os.path.realpath(path), status.st_size, status.st_mtime_ns])
    key = _digest(json.dumps([__version__, inputs, settings], sort_keys=True), 16)
    return output.absolute().parent / f"{_prefix(output)}{key}"


def _prefix(output: Path) -> str:
    """Prefix of the work folders of all jobs with an output of this name."""
    return f"{PARTIAL}{_digest(os.path.normcase(output.name), 8)}-"


def _digest(text: str, length: int) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:length]


def clean(output: Path, keep: Path | None = None) -> None:
    """Remove leftovers of ended runs beside the output: partial files, and jobs that are abandoned or have no segments.

    Files of running processes and of other users stay, and so do links and the work folder `keep`.
    """
    for path in output.absolute().parent.glob(f"{PARTIAL}*"):
        with suppress(OSError):  # another process may be cleaning here, too
            age = (time.time() - os.lstat(path).st_mtime) / DAY
            if is_own_file(path):
                if age > STALE_DAYS:
                    path.unlink()
            elif path != keep and is_own_folder(path):
                empty = path.name.startswith(_prefix(output)) and not read_manifest(path)
                if empty or age > ABANDONED_DAYS:
                    _remove_unless_locked(path)


def unfinished(output: Path) -> Iterator[Unfinished]:
    """The interrupted jobs with an output of this name, in the same folder."""
    for path in sorted(output.absolute().parent.glob(f"{_prefix(output)}*")):
        with suppress(OSError):
            if is_own_folder(path) and (segments := read_manifest(path)):
                frames, size = (sum(getattr(segment, name) for segment in segments) for name in ("frames", "bytes"))
                yield Unfinished(path, frames, size, Fraction(segments[0].rate))


def discard(output: Path) -> None:
    """Remove the segments of interrupted jobs with an output of this name, but not those of running processes."""
    for path in output.absolute().parent.glob(f"{_prefix(output)}*"):
        with suppress(OSError):
            if is_own_folder(path):
                _remove_unless_locked(path)


def read_manifest(folder: Path) -> list[Segment]:
    """The segments in a work folder's manifest, up to the first entry that is damaged."""
    path = folder / MANIFEST
    try:
        if not is_own_file(path) or path.stat().st_size > MAX_MANIFEST_BYTES:
            return []
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    segments = []
    for entry in entries if isinstance(entries, list) else ():
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
    """Remove a work folder whose lock is held, unless it has been replaced by a link."""
    shutil.rmtree(folder, ignore_errors=True)  # does not follow links
    lock.release()
    with suppress(OSError):  # on Windows the lock file cannot be removed while it is locked
        if is_own_folder(folder):
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()


def _remove_link(path: Path) -> None:
    """Remove a link in a work folder, which should hold only files, but not its target."""
    if path.is_symlink():
        path.unlink()


class SegmentWriter:
    """A `VideoWriter` that keeps finished segments when its block ends with an exception, and resumes after them.

    folder: from `work_folder`; total: frames of the job; counts: numbers that the caller counts up with the frames that
    it writes; they are saved with every segment and restored when the job is resumed. on_message(line): called with
    where the job resumes, and with what is kept of it. copy_audio, on_wait: as in `VideoWriter`. Raises UserError if
    the file cannot be written, if another process works on the same job, or if the folder is a link or another user's.
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
        on_message: Callable[[str], None],
        copy_audio: bool = False,
        on_wait: OnWait | None = None,
        audio_track: int | None = None,
    ):
        self.path = check_output(path, (info.path, audio))
        self.frames = 0  # written so far, also by earlier runs
        self.cut = False  # as in `VideoWriter`
        self.keep = True  # the finished segments, when the block ends with an exception
        self.remarks: tuple[str, ...] = ()  # as in `VideoWriter`, after the block
        self._info, self._audio, self._crf = info, probe_audio(audio, audio_track), crf
        self._folder, self._total, self._segment_frames = folder, total, segment_frames
        self._counts, self._on_message = counts, on_message
        self._copy_audio, self._on_wait = copy_audio, on_wait
        self._lock = FileLock(folder / LOCK, timeout=0)
        self._finished: list[Segment] = []
        self._segment: VideoWriter | None = None

    def __enter__(self) -> "SegmentWriter":
        with self._output_errors():
            self._make_folder()
            _remove_link(self._folder / LOCK)
            try:
                self._lock.acquire()
            except Timeout:
                raise UserError(
                    f"{self.path} is being written by another run that was asked for the same; wait for it, or choose "
                    "another output."
                ) from None
        self._finished = self._verified_segments()
        if self._finished:
            self.frames = sum(segment.frames for segment in self._finished)
            self._counts.update(self._finished[-1].counts)
            self._on_message(f"resuming at {self._clock(self.frames)} of {self._clock(self._total)}")
        needed = {LOCK, MANIFEST, *(self._segment_path(number).name for number in range(len(self._finished)))}
        for path in self._folder.iterdir():
            if path.name not in needed:
                with suppress(OSError):  # on Windows, a process that is just ending may have it open
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

    def _clock(self, frames: int) -> str:
        return clock(frames, self._info.rate)

    def _segment_path(self, number: int) -> Path:
        return self._folder / f"{number:05}{self.path.suffix}"

    @contextmanager
    def _output_errors(self) -> Iterator[None]:
        """Let errors of writing name the output instead of its segments."""
        try:
            yield
        except UserError as error:
            segment = self._segment_path(len(self._finished))
            raise UserError(str(error).replace(str(segment), str(self.path))) from error
        except OSError as error:
            raise UserError(
                f"{self.path} could not be written ({error.strerror}); free some space or choose another name."
            ) from error

    def _verified_segments(self) -> list[Segment]:
        """The finished segments, up to the first whose file does not match the manifest bit for bit."""
        segments, frames = read_manifest(self._folder), 0
        for number, segment in enumerate(segments):
            path, frames = self._segment_path(number), frames + segment.frames
            same_rate = Fraction(segment.rate) == self._info.rate
            complete = segment.frames == self._segment_frames or frames == self._total  # only the last one is shorter
            has_counts = segment.counts.keys() == self._counts.keys()
            plausible = max(segment.counts.values(), default=0) <= frames <= self._total
            if not same_rate or not complete or not has_counts or not plausible or not is_own_file(path):
                return segments[:number]
            if path.stat().st_size != segment.bytes or hash_files([path]) != segment.sha256:
                return segments[:number]
        return segments

    def write(self, frame: np.ndarray) -> None:
        """Append one (height, width, 3) uint8 RGB frame."""
        with self._output_errors():
            if self._segment is None:
                path = self._segment_path(len(self._finished))
                self._segment = VideoWriter(path, self._info, crf=self._crf).__enter__()
            self._segment.write(frame)
            self.frames += 1
            if self._segment.frames == self._segment_frames:
                self._finish_segment(self._segment)

    def abort(self) -> None:
        """Kill ffmpeg, from any thread; see `VideoWriter.abort`."""
        if (segment := self._segment) is not None:
            segment.abort()

    def _finish_segment(self, segment: VideoWriter) -> None:
        try:
            segment.__exit__(None, None, None)
        finally:
            self._segment = None
        _flush_to_disk(segment.path)
        size, digest = segment.path.stat().st_size, hash_files([segment.path])
        self._finished.append(Segment(segment.frames, size, digest, dict(self._counts), str(self._info.rate)))
        with replacing(self._folder / MANIFEST) as manifest:
            manifest.write_text(json.dumps([asdict(entry) for entry in self._finished]), encoding="utf-8")
            _flush_to_disk(manifest)

    def __exit__(self, kind, error, trace) -> None:
        done = False
        try:
            if kind is None:
                with self._output_errors():
                    if self._segment is not None:
                        self._segment.on_wait = self._on_wait
                        self._finish_segment(self._segment)
                    files = [(self._segment_path(number), entry.frames) for number, entry in enumerate(self._finished)]
                    self.remarks = join_segments(
                        files,
                        self.path,
                        self._info,
                        self._audio,
                        cut=self.cut,
                        copy_audio=self._copy_audio,
                        on_wait=self._on_wait,
                    )
                done = True
            elif self._segment is not None:
                self._segment.__exit__(kind, error, trace)
        finally:
            frames = sum(segment.frames for segment in self._finished)
            if self.keep and not done and frames:
                self._lock.release()
                size = megabytes(sum(segment.bytes for segment in self._finished))
                self._on_message(
                    f"{self._clock(frames)} of {self._clock(self._total)} are kept in '{self._folder}' ({size}): the "
                    "same command resumes there"
                )
            else:
                _remove(self._folder, self._lock)


def _flush_to_disk(path: Path) -> None:
    """Wait until a file is on the disk, not only in the page cache."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def megabytes(size: int) -> str:
    """A number of bytes as text."""
    return f"{max(size / 1e6, 0.1):.1f} MB" if size < 1e7 else f"{size / 1e6:.0f} MB"


def clock(frames: int, rate: Fraction) -> str:
    """A number of frames at a rate as minutes and seconds."""
    seconds = int(frames / rate)
    return f"{seconds // 60}:{seconds % 60:02}"
