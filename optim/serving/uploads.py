"""Files of visitors on their way: uploads until they are jobs, and results while they are given away.

Both lie in one folder of this server alone, in a subfolder of their own each that nobody can guess. An upload that is
aborted, or for which there is no room, leaves nothing. One that was never used goes after a while, and all that belongs
to a job goes with it.
"""

import asyncio
import errno
import json
import os
import secrets
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import anyio
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

PREFIX = "latentsync-page-"  # of a server's folder in the folder for temporary files
OWNER = "server.json"  # in it: whose it is
UPLOADS, RESULTS = "uploads", "results"
IDLE_SECONDS = 60.0  # without a byte, until an upload is given up
SLOWEST, GRACE_SECONDS = 4096, 60.0  # bytes a second that an upload must have come by on average, after the grace
SPARE_BYTES = 512 * 2**20  # of the disk that uploads leave free
MAX_FILES = 4  # of one request
WRITE_BYTES = 2**20
NAME_BYTES = 200  # of a file's name; systems take 255


class Refused(Exception):
    """An upload that is not taken: a status and one sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What visitors may send; all of them together."""

    max_file: int | None = None  # bytes of one
    at_once: int = 32  # uploads
    at_once_from: int = 16  # of them, from one address
    max_stored: int | None = None  # bytes of uploads that no job has used yet
    unused_seconds: float = 24 * 3600.0  # that an upload stays without being used by a job


class Uploads:
    """The uploads and results of a server, in `folder`; by default Gradio's, which GRADIO_TEMP_DIR names."""

    def __init__(self, folder: Path | None = None, limits: Limits = Limits()):
        self._folder, self.limits = folder, limits
        self._lock = threading.Lock()
        self._uses: dict[Path, set[str]] = {}  # keys of the jobs that have used an upload
        self._coming: dict[Path, tuple[str, int]] = {}  # uploads in flight, by folder: the address, and bytes expected

    @property
    def folder(self) -> Path:
        return Path(os.path.realpath(self._folder or os.environ["GRADIO_TEMP_DIR"]))

    # ---- coming in

    async def receive(
        self,
        content_type: str | None,
        declared: int | None,
        chunks: AsyncIterator[bytes],
        address: str = "",
        progress: Callable[[str, bytes], None] | None = None,
    ) -> list[Path]:
        """Store the files of a multipart body; returns their paths.

        declared: bytes of the body, None where that is not known; chunks: the body, raises where its sender goes away;
        progress: called with a file's name and the bytes that have come. Raises Refused.
        """
        kind, options = parse_options_header(content_type or "")
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise Refused(400, "An upload is a form with files (multipart/form-data): this is none.")
        place = self.folder / UPLOADS / secrets.token_urlsafe(18)
        try:
            self._admit(place, address, declared)
            place.mkdir(parents=True, mode=0o700)
            files = _Files(place, boundary, self.limits.max_file, progress)
            try:
                began, total = time.monotonic(), 0
                chunks = aiter(chunks)
                while True:
                    try:
                        chunk = await asyncio.wait_for(anext(chunks), IDLE_SECONDS)
                    except StopAsyncIteration:
                        break
                    total += len(chunk)
                    seconds = time.monotonic() - began - GRACE_SECONDS
                    if seconds > 0 and total < seconds * SLOWEST:
                        raise asyncio.TimeoutError
                    if files.take(chunk):
                        await anyio.to_thread.run_sync(files.write)
                        self._check_space(0)
                await anyio.to_thread.run_sync(files.write)
                return files.finish()
            finally:
                files.close()
        except BaseException as error:
            shutil.rmtree(place, ignore_errors=True)
            if isinstance(error, asyncio.TimeoutError):  # an OSError in newer versions of Python
                raise Refused(408, "The upload stood still for too long: send it again.") from None
            if isinstance(error, OSError):
                raise _unwritten(error) from error
            if isinstance(error, MultipartParseError):
                raise Refused(400, "The upload cannot be understood: send it again.") from None
            raise
        finally:
            with self._lock:
                self._coming.pop(place, None)

    def _admit(self, place: Path, address: str, declared: int | None) -> None:
        """Refuse an upload before its first byte where there is no room for it."""
        limits = self.limits
        if declared is not None and limits.max_file is not None and declared > limits.max_file + 65536:
            raise _too_large(limits.max_file)  # one file, as the page sends them, and a form around it
        self.sweep()
        with self._lock:
            from_there = sum(each == address for each, _ in self._coming.values())
            if len(self._coming) >= limits.at_once or from_there >= limits.at_once_from:
                raise Refused(503, "Too many files are being sent to this server now: try again in a minute.")
            coming = sum(size for _, size in self._coming.values())
            size = declared if declared is not None else limits.max_file or 0
            if limits.max_stored is not None and coming + size + self._stored() > limits.max_stored:
                raise Refused(507, "This server holds as many files as it takes: try again in an hour.")
            self._check_space(coming + size)
            self._coming[place] = address, size

    def _check_space(self, size: int) -> None:
        """Refuse what would fill the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.folder).free - size < SPARE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _stored(self) -> int:
        """Bytes of the uploads that take room of their own, as those do not that are a job's input, too."""
        return sum(
            about.st_size for place in self._places() if place not in self._coming for about in _files(place)
            if about.st_nlink == 1
        )  # fmt: skip

    # ---- what is there

    def holds(self, path: str | os.PathLike) -> bool:
        """Whether a path is a file of this folder that may be used and served. A path may come from a visitor."""
        text = os.fspath(path)
        if not text or text.startswith(("//", "\\\\", "/\\", "\\/")) or "\0" in text or not os.path.isabs(text):
            return False  # an address, of another machine too
        try:
            real = Path(os.path.realpath(text))
            return real.is_relative_to(self.folder) and real.name != OWNER and real.is_file()
        except (OSError, ValueError):
            return False

    def use(self, path: Path, key: str) -> None:
        """Remember that a job has used an upload: it stays as long as the job, and goes with it."""
        uploads = self.folder / UPLOADS
        if path.is_relative_to(uploads):  # not Gradio's copy of the example, which is everybody's
            with self._lock:
                self._uses.setdefault(uploads / path.relative_to(uploads).parts[0], set()).add(key)

    def offer(self, path: Path, key: str) -> Path:
        """A name of a job's result in this folder, to be served until the job is gone. Raises OSError."""
        place = self.folder / RESULTS / key
        for each in (place.parent, place):
            each.mkdir(mode=0o700, exist_ok=True)
        target = place / path.name
        if not target.is_file() or not os.path.samestat(target.stat(), path.stat()):
            target.unlink(missing_ok=True)
            link_or_copy(path, target)
        return target

    def forget(self, exists: Callable[[str], bool]) -> None:
        """Remove what belonged to jobs that are gone. exists: whether there is a job of that key."""
        for place in _folders(self.folder / RESULTS):
            if not exists(place.name):
                shutil.rmtree(place, ignore_errors=True)
        with self._lock:
            gone = [place for place, keys in self._uses.items() if not any(exists(key) for key in keys)]
            for place in gone:
                shutil.rmtree(place, ignore_errors=True)
                del self._uses[place]

    def sweep(self) -> None:
        """Remove uploads that no job has used within their time, and those of which a job has a copy of its own."""
        for place in self._places():
            with suppress(OSError):  # another thread's sweep was faster
                if place in self._coming or time.time() - place.stat().st_mtime < self.limits.unused_seconds:
                    continue
                if place not in self._uses or all(about.st_nlink == 1 for about in _files(place)):
                    shutil.rmtree(place, ignore_errors=True)

    def _places(self) -> list[Path]:
        return _folders(self.folder / UPLOADS)


class _Files:
    """The parser's side of a multipart body: files into a folder, bounded in number and bytes. Fields are ignored."""

    def __init__(
        self, place: Path, boundary: bytes, max_file: int | None, progress: Callable[[str, bytes], None] | None
    ):
        self._place, self._max_file, self._progress = place, max_file, progress
        self._header, self._value, self._disposition = b"", b"", b""
        self._file: IO[bytes] | None = None
        self._size = 0
        self._pending: list[tuple[IO[bytes], bytes]] = []
        self._pending_bytes = 0
        self._closing: list[IO[bytes]] = []
        self._ended = False
        self.paths: list[Path] = []
        names = "on_part_begin", "on_part_data", "on_part_end", "on_header_field", "on_header_value", "on_header_end"
        names += "on_headers_finished", "on_end"
        self._parser = MultipartParser(boundary, {name: getattr(self, name) for name in names})

    def take(self, chunk: bytes) -> bool:
        """Parse bytes; whether enough has come together to be written."""
        self._parser.write(chunk)
        return self._pending_bytes >= WRITE_BYTES

    def write(self) -> None:
        """Write what has come. Raises OSError."""
        for file, data in self._pending:
            file.write(data)
        self._pending.clear()
        self._pending_bytes = 0
        for file in self._closing:
            file.close()
        self._closing.clear()

    def finish(self) -> list[Path]:
        """The files, if the body was whole."""
        self._parser.finalize()
        if not self._ended:
            raise Refused(400, "The upload did not come to its end: send it again.")
        if not self.paths:
            raise Refused(400, "The upload holds no file: choose one.")
        return self.paths

    def close(self) -> None:
        for file in {self._file, *self._closing} - {None}:
            with suppress(OSError):
                file.close()

    # ---- called by the parser

    def on_part_begin(self) -> None:
        self._disposition, self._file, self._size = b"", None, 0

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"filename" not in options:
            return
        if len(self.paths) >= MAX_FILES:
            raise Refused(400, f"The upload holds more than {MAX_FILES} files: send them one by one.")
        name = file_name(options[b"filename"].decode("utf-8", "replace"))
        place = self._place if not self.paths else self._place / str(len(self.paths))
        place.mkdir(exist_ok=True, mode=0o700)
        self._file = open(place / name, "xb")  # closed in `write` or `close`
        self.paths.append(place / name)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is None:
            return
        part = data[start:end]
        self._size += len(part)
        if self._max_file is not None and self._size > self._max_file:
            raise _too_large(self._max_file)
        self._pending.append((self._file, part))
        self._pending_bytes += len(part)
        if self._progress:
            self._progress(self.paths[-1].name, part)

    def on_part_end(self) -> None:
        if self._file is not None:
            self._closing.append(self._file)
            self._file = None

    def on_end(self) -> None:
        self._ended = True


def file_name(name: str) -> str:
    """A visitor's name of a file as one that every system takes: its last part, without letters that mean something."""
    name = name.replace("\\", "/").split("/")[-1]
    name = "".join(c if c.isprintable() and c not in '<>:"/\\|?*\ufffd' else "_" for c in name).strip(" .")
    stem, dot, ending = name.rpartition(".")
    if dot and len(ending) <= 10:
        while len(f"{stem}.{ending}".encode()) > NAME_BYTES:
            stem = stem[:-1]
        name = f"{stem}.{ending}"
    while len(name.encode()) > NAME_BYTES:
        name = name[:-1]
    return name or "file"


def link_or_copy(source: Path, target: Path) -> Path:
    """A second name of a file, or a copy where its file system has none. Raises OSError."""
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
    return target


def _too_large(limit: int) -> Refused:
    return Refused(413, f"The file is larger than {limit / 1e6:.4g} MB, which is the maximum allowed size here.")


def _unwritten(error: OSError) -> Refused:
    print(f"An upload cannot be stored: {error}", file=sys.stderr, flush=True)
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return Refused(507, "The server's disk is too full for this file: let who serves the page make room.")
    return Refused(500, "The server cannot store files now: let who serves the page look at its console.")


def _folders(place: Path) -> list[Path]:
    try:
        return [each for each in place.iterdir() if not each.is_symlink() and each.is_dir()]
    except OSError:
        return []


def _files(place: Path) -> list[os.stat_result]:
    found = []
    for file in place.rglob("*"):
        with suppress(OSError):
            found.append(file.lstat())
    return [about for about in found if stat.S_ISREG(about.st_mode)]


# ---- the folder of a server


def make_folder() -> Path:
    """A new folder for this server's uploads, mode 700, which says whose it is."""
    import psutil

    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    about = {"pid": os.getpid(), "began": psutil.Process().create_time()}
    (folder / OWNER).write_text(json.dumps(about), encoding="utf-8")
    return folder


def remove_orphans(within: Path | None = None) -> list[Path]:
    """Remove the folders of servers that are gone; returns which. Links, and folders of other users, are left alone."""
    within = Path(tempfile.gettempdir()) if within is None else within
    removed = []
    for folder in within.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another server removes it, too
            about = folder.lstat()
            own = not hasattr(os, "getuid") or about.st_uid == os.getuid()
            if stat.S_ISDIR(about.st_mode) and own and not _runs(folder, about.st_mtime):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
    return removed


def _runs(folder: Path, changed: float) -> bool:
    """Whether the server of a folder is there: a process of that number that began at that moment."""
    import psutil

    about = folder / OWNER
    if about.is_symlink() or not about.is_file():
        return time.time() - changed < 24 * 3600  # of an older version; of a server that starts just now
    try:
        owner = json.loads(about.read_text(encoding="utf-8"))
        return abs(psutil.Process(owner["pid"]).create_time() - owner["began"]) < 1
    except psutil.AccessDenied:
        return True
    except (psutil.Error, ValueError, TypeError, KeyError, OverflowError):
        return False
