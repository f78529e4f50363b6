"""What jobs have found of their films, faces and latents, kept for the next job with the same film: `PreparedFilms`.

An entry is a folder of `latentsync.prepared`, in the folder of each job that wrote or read it: `prepared/<name>`, whose
name follows from all that it depends on. Jobs share its files as hard links, so that it goes with the last of them, and
none reads what is removed with another.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from latentsync.choice import SPEAKING
from latentsync.errors import UserError
from latentsync.media import probe_video
from latentsync.paths import PARTIAL, folder_bytes
from optim.serving.inputs import PREPARED
from optim.serving.job import RUNNING, Job
from optim.serving.limits import check_option
from optim.serving.store import JobStore

if TYPE_CHECKING:  # torch takes seconds to load
    from latentsync.checkpoints.load import Models
    from latentsync.prepared.film import FilmKey, PreparedFilm
    from latentsync.prepared.recording import Recorder
    from latentsync.settings import Report, Settings

log = logging.getLogger(__name__)

Film: TypeAlias = "PreparedFilm | Recorder"
KNOWN = "The faces of this film were known from an earlier job."
SPARE_BYTES = 2 * 2**30  # that entries leave free on the disk


@dataclass
class Entry:
    """A prepared film on the disk, with the folders of all jobs that share it."""

    used: float  # when a job last wrote or read it
    bytes: int
    folders: list[Path] = field(default_factory=list)
    read: bool = False  # by a job that runs


class PreparedFilms:
    """The prepared films of a server's jobs. Any thread may use them.

    max_bytes: of all entries; those that were not used for longest go first, but none that a running job reads. 0: none
    is kept. shared: a visitor's jobs start only from what this visitor's own jobs have found: else the time that a job
    takes would tell who else has given the film. Raises UserError for a size out of range.

    Nothing that goes wrong with an entry ends a job: it is thrown away, and the job goes on without it.
    """

    def __init__(self, store: JobStore, max_bytes: int, shared: bool):
        check_option("The size of the prepared films", max_bytes, 0, whole=True)
        self._store, self._max_bytes, self._shared = store, max_bytes, shared
        self._lock = threading.Lock()  # over the names of entries and what is reserved
        self._reserved: dict[str, int] = {}  # bytes of what is being written, by job

    def run(
        self,
        job: Job,
        models: "Models",
        settings: "Settings",
        run: "Callable[[Film | None], Report]",
        encodes: bool,
        on_wait: Callable[[], None],
    ) -> "tuple[Report, bool]":
        """Run a job with what is known of its film, or let the run record it; returns whether the film was known.

        run: with a prepared film, a recorder or neither, see `lipsync`; encodes: whether this process encodes faces;
        on_wait: called several times a second before the run; what it raises ends the call, as does what `run` raises.
        """
        from latentsync.prepared.film import FilmChanged, film_key

        request = job.request
        if not self._max_bytes or request.others or request.face == SPEAKING:
            return run(None), False
        before = _status(request.video)
        try:
            info = probe_video(request.video, request.video_track).at_choice(request.fps)
            key = film_key(info, settings, models, on_wait)
        except (OSError, UserError):  # the run says what is wrong with the film; not all models have files
            return run(None), False
        if film := self._find(job, key, on_wait):
            try:
                report = run(film)
                return report, film.covers(report.frames)
            except FilmChanged as error:
                log.warning("A prepared film is thrown away: %s", error)
                self._throw_away(film.folder)
                return run(None), False
        with ExitStack() as stack:
            frames = min(job.frames, info.n_frames)
            recorder = self._recorder(job, key if encodes else replace(key, latents=()), key, frames, stack)
            report = run(recorder)
            if recorder and not report.ended_early and _status(request.video) == before:
                self._keep(job, recorder)
        self.trim()
        return report, False

    def trim(self) -> None:
        """Remove entries until all take no more than they may."""
        self._make_room(0)

    # ---- reading

    def _find(self, job: Job, key: "FilmKey", on_wait: Callable[[], None]) -> "PreparedFilm | None":
        """What is known of a job's film, in the job's own folder now; None where it is not enough for the job."""
        from latentsync.prepared.film import MANIFEST, PreparedFilm

        own, tried = _entry_of(job, key), set()
        for other in (job, *reversed(self._visible_jobs(job))):
            entry = _entry_of(other, key)
            with self._lock:
                try:
                    status = os.stat(entry / MANIFEST)
                except OSError:  # there is none
                    continue
                if (status.st_dev, status.st_ino) in tried:
                    continue
                tried.add((status.st_dev, status.st_ino))
                if other is not job and not _share(entry, own, move=other.state != RUNNING):
                    continue
            try:
                film = PreparedFilm(own, key, on_wait)
                if film.covers(job.frames):
                    os.utime(own / MANIFEST)
                    return film
            except (OSError, UserError) as error:
                log.warning("A prepared film is thrown away: %s", error)
                if other.state != RUNNING:
                    self._throw_away(entry)
            self._throw_away(own)
        return None

    def _visible_jobs(self, job: Job) -> list[Job]:
        """The jobs whose entries a job may use, the oldest first."""
        return [other for other in self._store.all() if not self._shared or other.owner == job.owner]

    # ---- writing

    def _recorder(
        self, job: Job, recorded: "FilmKey", key: "FilmKey", frames: int, stack: ExitStack
    ) -> "Recorder | None":
        """A recorder for a job, open until `stack` is closed; None where there is no room for so many frames.

        recorded: the key of what will be written.
        """
        from latentsync.prepared.film import expected_bytes
        from latentsync.prepared.recording import Recorder

        folder, size = _entry_of(job, key), expected_bytes(recorded, frames)
        if not self._make_room(size, job):
            return None
        stack.callback(self._free, job)
        try:
            folder.parent.mkdir(mode=0o700, exist_ok=True)
            return stack.enter_context(Recorder(folder, key))
        except (OSError, UserError) as error:
            log.warning("What a job finds of its film is not kept: %s", error)
            return None

    def _keep(self, job: Job, recorder: "Recorder") -> None:
        """Finish what a job has recorded, also in place of what other jobs have of fewer frames."""
        try:
            recorder.finish()
            size = folder_bytes(recorder.folder)
        except (OSError, UserError) as error:
            log.warning("What a job has found of its film is not kept: %s", error)
            return
        for other in self._visible_jobs(job):
            shorter = other.folder / PREPARED / recorder.folder.name
            with self._lock, suppress(OSError):  # most have none
                if other is not job and other.state != RUNNING and folder_bytes(shorter) < size:
                    shutil.rmtree(shorter, ignore_errors=True)
                    _share(recorder.folder, shorter, move=False)

    # ---- room

    def _make_room(self, size: int, job: Job | None = None) -> bool:
        """Remove entries until there is room for `size` bytes more, and reserve it for a job; whether there is.

        None is removed for what would not fit anyway, nor where the disk is full for other reasons.
        """
        with self._lock:
            if job is not None and (size > self._max_bytes or _free_bytes(job.folder) < size + SPARE_BYTES):
                return False
            entries = self._entries()
            total = size + sum(self._reserved.values()) + sum(entry.bytes for entry in entries)
            for entry in sorted(entries, key=lambda entry: entry.used):
                if total > self._max_bytes and not entry.read:
                    for folder in entry.folders:
                        shutil.rmtree(folder, ignore_errors=True)
                    total -= entry.bytes
            if job is not None and total <= self._max_bytes:
                self._reserved[job.id] = size
            return total <= self._max_bytes

    def _entries(self) -> list[Entry]:
        """The entries of all jobs; what several jobs share is one."""
        from latentsync.prepared.film import MANIFEST

        entries: dict[tuple[int, int], Entry] = {}
        for job in self._store.all():
            for folder in _folders(job.folder / PREPARED):
                try:
                    status = os.stat(folder / MANIFEST)
                    size = folder_bytes(folder)
                except OSError:  # one that is removed with its job at this moment, or a damaged one
                    shutil.rmtree(folder, ignore_errors=True)
                    continue
                entry = entries.setdefault((status.st_dev, status.st_ino), Entry(status.st_mtime, size))
                entry.folders.append(folder)
                entry.read |= job.state == RUNNING
        return list(entries.values())

    def _free(self, job: Job) -> None:
        """What was reserved for a job is written, or will not be."""
        with self._lock:
            del self._reserved[job.id]

    def _throw_away(self, entry: Path) -> None:
        with self._lock:
            shutil.rmtree(entry, ignore_errors=True)


def _entry_of(job: Job, key: "FilmKey") -> Path:
    """Where a job has the prepared film of a key; other keys have other names."""
    contents = json.dumps(asdict(key), sort_keys=True)
    return job.folder / PREPARED / hashlib.sha256(contents.encode()).hexdigest()[:16]


def _folders(folder: Path) -> Iterator[Path]:
    """The entries in a folder, without unfinished ones."""
    try:
        yield from [path for path in folder.iterdir() if not path.name.startswith(PARTIAL)]
    except OSError:  # most jobs have none
        return


def _share(entry: Path, target: Path, move: bool) -> bool:
    """Let `target` have the files of an entry, too; returns whether it has.

    move: take the entry away instead where the file system has no hard links.
    """
    partial = target.parent / f"{PARTIAL}{uuid.uuid4().hex[:12]}"
    try:
        target.parent.mkdir(mode=0o700, exist_ok=True)
        partial.mkdir(mode=0o700)
        for path in entry.iterdir():
            os.link(path, partial / path.name)
        os.rename(partial, target)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not move:
            return False
        try:
            os.rename(entry, target)
        except OSError:  # it is gone, or lies on another file system
            return False
    return True


def _status(path: Path) -> tuple[int, int] | None:
    """What changes with a file's content, usually; None where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0
