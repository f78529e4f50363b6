"""Visitors' files: uploads until jobs take them, and results while they are served.

Each upload and each result lies in a subfolder with a secret name, in one folder of this server. An upload that is
aborted or refused leaves nothing. An unused one is removed after a while, and a job's files are removed with the job.
"""

import asyncio
import errno
import json
import logging
import os
import secrets
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import anyio
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header

from optim.serving.guard import Refusal
from optim.serving.multipart import MultipartForm, Progress, too_large

log = logging.getLogger(__name__)

PREFIX = "latentsync-page-"  # of a server's folder in the system's temporary folder
OWNER = "server.json"  # in that folder: the server's process
UPLOADS, RESULTS = "uploads", "results"  # subfolders
IDLE_SECONDS = 60.0  # without a byte, after which an upload is refused
MIN_RATE, GRACE_SECONDS = 4096, 60.0  # average bytes per second of an upload, required after the grace period
SPARE_BYTES = 512 * 2**20  # that uploads leave free on the disk
FORM_BYTES = 64 * 2**10  # at most, of the multipart form around a file
WRITE_BYTES = 2**20  # collected before they are written


@dataclass(frozen=True)
class Limits:
    """Limits of the uploads of all visitors together."""

    max_file: int | None = None  # bytes of a file
    at_once: int = 32  # uploads in progress
    at_once_from: int = 16  # of them, from one address
    max_stored: int | None = None  # bytes of uploads that no job has used yet
    unused_seconds: float = 24 * 3600.0  # after which an unused upload is removed


class Uploads:
    """The uploads and results of a server in `folder`; by default Gradio's, which GRADIO_TEMP_DIR names."""

    def __init__(self, folder: Path | None = None, limits: Limits = Limits()):
        self._folder, self.limits = folder, limits
        self._lock = threading.Lock()
        self._uses: dict[Path, set[str]] = {}  # keys of the jobs that use the upload in a folder
        self._in_progress: dict[Path, tuple[str, int]] = {}  # address and expected bytes, by folder

    @property
    def folder(self) -> Path:
        return Path(os.path.realpath(self._folder or os.environ["GRADIO_TEMP_DIR"]))

    # ---- receiving

    async def receive(
        self,
        content_type: str | None,
        content_length: int | None,
        chunks: AsyncIterator[bytes],
        address: str = "",
        progress: Progress | None = None,
    ) -> list[Path]:
        """Store the files of a multipart body; returns their paths.

        content_length: None if unknown; chunks: the body, raises if the sender disconnects; address: the sender's.
        Raises Refusal.
        """
        kind, options = parse_options_header(content_type or "")
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise Refusal(400, "An upload is a form with files (multipart/form-data): this is none.")
        place = self.folder / UPLOADS / secrets.token_urlsafe(18)
        try:
            self._admit(place, address, content_length)
            place.mkdir(parents=True, mode=0o700)
            form = MultipartForm(place, boundary, self.limits.max_file, progress)
            try:
                await self._store(form, aiter(chunks))
                return form.finish()
            finally:
                form.close()
        except BaseException as error:
            shutil.rmtree(place, ignore_errors=True)
            if isinstance(error, asyncio.TimeoutError):  # checked first: an OSError since Python 3.11
                raise Refusal(408, "The upload stood still for too long: send it again.") from None
            if isinstance(error, OSError):
                raise _storage_refusal(error) from error
            if isinstance(error, MultipartParseError):
                raise Refusal(400, "The upload cannot be understood: send it again.") from None
            raise
        finally:
            with self._lock:
                self._in_progress.pop(place, None)

    async def _store(self, form: "MultipartForm", chunks: AsyncIterator[bytes]) -> None:
        """Parse a body and write its files. Raises TimeoutError for a slow sender, and OSError."""
        began, total = time.monotonic(), 0
        while True:
            try:
                chunk = await asyncio.wait_for(anext(chunks), IDLE_SECONDS)
            except StopAsyncIteration:
                break
            total += len(chunk)
            seconds = time.monotonic() - began - GRACE_SECONDS
            if seconds > 0 and total < seconds * MIN_RATE:
                raise asyncio.TimeoutError
            form.parse(chunk)
            if form.pending_bytes >= WRITE_BYTES:
                await anyio.to_thread.run_sync(form.write)
                self._check_space(0)
        await anyio.to_thread.run_sync(form.write)

    def _admit(self, place: Path, address: str, content_length: int | None) -> None:
        """Refuse an upload before its first byte if there is no room for it, else register it as in progress."""
        limits = self.limits
        if content_length is not None and limits.max_file is not None and content_length > limits.max_file + FORM_BYTES:
            raise too_large(limits.max_file)  # the page sends one file per request
        self.sweep()
        with self._lock:
            from_address = sum(other == address for other, _ in self._in_progress.values())
            if len(self._in_progress) >= limits.at_once or from_address >= limits.at_once_from:
                raise Refusal(503, "Too many files are being sent to this server now: try again in a minute.")
            expected = sum(size for _, size in self._in_progress.values())
            size = content_length if content_length is not None else limits.max_file or 0
            if limits.max_stored is not None and expected + size + self._unused_bytes() > limits.max_stored:
                raise Refusal(507, "This server holds as many files as it takes: try again in an hour.")
            self._check_space(expected + size)
            self._in_progress[place] = address, size

    def _check_space(self, size: int) -> None:
        """Raise OSError (ENOSPC) if `size` more bytes would leave less than SPARE_BYTES on the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.folder).free - size < SPARE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _unused_bytes(self) -> int:
        """Bytes of the uploads, without those in progress and those that are hard links to a job's input."""
        places = (place for place in self._places() if place not in self._in_progress)
        return sum(status.st_size for place in places for status in _files(place) if status.st_nlink == 1)

    # ---- files

    def holds(self, path: str | os.PathLike) -> bool:
        """Whether a path, which may come from a visitor, is a file in this folder that may be used and served."""
        text = os.fspath(path)
        if not text or text.startswith(("//", "\\\\", "/\\", "\\/")) or "\0" in text or not os.path.isabs(text):
            return False  # the first ones name network shares
        try:
            real = Path(os.path.realpath(text))
            return real.is_relative_to(self.folder) and real.name != OWNER and real.is_file()
        except (OSError, ValueError):
            return False

    def use(self, path: Path, key: str) -> None:
        """Record that the job with this key uses an upload, which is then removed with its last job."""
        uploads = self.folder / UPLOADS
        if path.is_relative_to(uploads):  # unlike Gradio's copy of the example, which everybody uses
            with self._lock:
                self._uses.setdefault(uploads / path.relative_to(uploads).parts[0], set()).add(key)

    def offer(self, path: Path, key: str) -> Path:
        """Link a job's result into this folder, to be served until `forget` removes it. Raises OSError."""
        place = self.folder / RESULTS / key
        for folder in (place.parent, place):
            folder.mkdir(mode=0o700, exist_ok=True)
        target = place / path.name
        if not target.is_file() or not os.path.samestat(target.stat(), path.stat()):
            target.unlink(missing_ok=True)
            link_or_copy(path, target)
        return target

    def forget(self, exists: Callable[[str], bool]) -> None:
        """Remove the results and uploads of jobs that are gone. exists: whether there is a job with a key."""
        for place in _folders(self.folder / RESULTS):
            if not exists(place.name):
                shutil.rmtree(place, ignore_errors=True)
        with self._lock:
            gone = [place for place, keys in self._uses.items() if not any(exists(key) for key in keys)]
            for place in gone:
                shutil.rmtree(place, ignore_errors=True)
                del self._uses[place]

    def sweep(self) -> None:
        """Remove old uploads that no job uses, and those of which a job has its own copy."""
        for place in self._places():
            with suppress(OSError):  # another thread has removed it
                if place in self._in_progress or time.time() - place.stat().st_mtime < self.limits.unused_seconds:
                    continue
                if place not in self._uses or all(status.st_nlink == 1 for status in _files(place)):
                    shutil.rmtree(place, ignore_errors=True)

    def _places(self) -> list[Path]:
        return _folders(self.folder / UPLOADS)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where its file system has no links. Raises OSError."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        try:
            shutil.copyfile(source, target)
        except OSError:
            target.unlink(missing_ok=True)
            raise


def _storage_refusal(error: OSError) -> Refusal:
    log.error("An upload cannot be stored: %s", error)
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return Refusal(507, "The server's disk is too full for this file: ask whoever runs the server to make room.")
    return Refusal(500, "The server cannot store files now: ask whoever runs it to look at its console.")


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, without links; none if it cannot be read."""
    try:
        return [path for path in folder.iterdir() if not path.is_symlink() and path.is_dir()]
    except OSError:
        return []


def _files(folder: Path) -> list[os.stat_result]:
    """The status of each regular file below a folder."""
    statuses = []
    for path in folder.rglob("*"):
        with suppress(OSError):  # removed meanwhile
            statuses.append(path.lstat())
    return [status for status in statuses if stat.S_ISREG(status.st_mode)]


# ---- the folder of a server


def make_folder() -> Path:
    """Make a new temporary folder, mode 700, for this server's uploads, and record the server's process in it."""
    import psutil

    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    owner = {"pid": os.getpid(), "began": psutil.Process().create_time()}
    (folder / OWNER).write_text(json.dumps(owner), encoding="utf-8")
    return folder


def remove_orphans(within: Path | None = None) -> list[Path]:
    """Remove the folders of servers that no longer run; returns them. Links and other users' folders stay."""
    within = Path(tempfile.gettempdir()) if within is None else within
    removed = []
    for folder in within.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another server removes it too
            status = folder.lstat()
            is_ours = not hasattr(os, "getuid") or status.st_uid == os.getuid()
            if stat.S_ISDIR(status.st_mode) and is_ours and not _is_running(folder, status.st_mtime):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
    return removed


def _is_running(folder: Path, modified: float) -> bool:
    """Whether the server of a folder still runs: a process with its pid that began at its time.

    A folder without an owner, of a server that is starting or of an older version, counts as in use for a day.
    """
    import psutil

    path = folder / OWNER
    if path.is_symlink() or not path.is_file():
        return time.time() - modified < 24 * 3600
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return abs(psutil.Process(owner["pid"]).create_time() - owner["began"]) < 1
    except psutil.AccessDenied:
        return True
    except (psutil.Error, ValueError, TypeError, KeyError, OverflowError):
        return False
