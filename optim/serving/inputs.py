"""The input files of jobs: stored once in the jobs' folders, however many jobs share them, and counted."""

import errno
import filecmp
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from latentsync.errors import UserError
from optim.serving.job import Job, Request

log = logging.getLogger(__name__)

PREPARED = "prepared"  # in a job's folder, see `prepared_films`


def store_inputs(request: Request, names: Sequence[str], folder: Path, jobs: Iterable[Job]) -> Request:
    """Store the files of a request in a new folder, mode 700; returns the request with their paths there.

    Each becomes a hard link: to the same content of one of `jobs`, or else to the request's own file; a copy only on
    another file system. So the request's files must not be changed in place afterwards, but their own names may be
    removed at any time. names: the user's names of `request.files`. Raises UserError if they cannot be stored.
    """
    stored = [path for job in jobs for path in job.request.files]
    sources = request.files
    stems = ["video", "voice", *(f"voice-{number}" for number, _ in enumerate(request.others, 2)), "sound"]
    targets = [folder / f"{stem}{_safe_suffix(name)}" for stem, name in zip(stems, names, strict=False)]
    try:
        folder.mkdir(parents=True, mode=0o700)
        for source, target in zip(sources, targets, strict=True):
            store_file(source, target, stored)
    except OSError as error:
        for path, name in zip(sources, names, strict=True):
            if not path.is_file():
                raise UserError(f"The file '{name}' is not on this server any more: give it again.") from None
        log.warning("A job's files cannot be kept: %s", error)
        raise UserError(
            f"Your files cannot be kept with the results of this server ({disk_problem(error)}): remove jobs that you "
            "do not need, or let who serves the page look at the folder that --outputs names."
        ) from None
    return request.with_files(targets)


def store_file(source: Path, target: Path, stored: Iterable[Path]) -> None:
    """Make `target` a link to an equal file among `stored`, or to `source`, or a copy of it. Raises OSError."""
    source = Path(os.path.realpath(source))
    for path in (*_equal_files(source, stored), source):
        try:
            return os.link(path, target)
        except FileNotFoundError:
            if path == source:
                raise
        except OSError:  # another file system, one without hard links, or too many of them
            continue
    shutil.copyfile(source, target)


def _equal_files(source: Path, stored: Iterable[Path]) -> Iterator[Path]:
    """The stored files with the content of `source`. Contents are only read if the sizes are the same."""
    status, compared = os.stat(source), set()
    for path in stored:
        try:
            other = os.stat(path)
            if other.st_size != status.st_size or (other.st_dev, other.st_ino) in compared:
                continue
            compared.add((other.st_dev, other.st_ino))
            if os.path.samestat(other, status) or filecmp.cmp(source, path, shallow=False):
                yield path
        except OSError:  # of a job that was just removed
            continue


def stored_bytes(folders: Iterable[Path]) -> int:
    """Bytes that folders of jobs take on the disk; a file that several of them share counts once.

    Prepared films have a limit of their own.
    """
    sizes = {}
    for top in folders:
        for folder, folders_within, names in os.walk(top):
            folders_within[:] = [name for name in folders_within if name != PREPARED]
            for name in names:
                try:
                    status = os.lstat(os.path.join(folder, name))
                except OSError:
                    continue
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def disk_problem(error: OSError) -> str:
    """Why a file could not be written, without its path: visitors should not learn the folders of a server."""
    return "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else os.strerror(error.errno or errno.EIO)


def with_user_names(error: UserError, names: Mapping[Path, str]) -> str:
    """An error's sentence with the user's names of files in place of their paths."""
    text = str(error)
    for path, name in names.items():
        for written in (f"'{path}'", str(path)):
            text = text.replace(written, f"'{name}'")
    return text


def _safe_suffix(name: str) -> str:
    """The suffix of a user's file name, if it is one that can do no harm."""
    suffix = Path(name).suffix.lower()
    return suffix if suffix[1:].isalnum() and suffix.isascii() and len(suffix) <= 6 else ""
