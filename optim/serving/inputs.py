"""The inputs of jobs: stored once in the jobs' folders, however many jobs have the same, and counted."""

import errno
import filecmp
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from latentsync.errors import UserError
from optim.serving.job import Job, Request

log = logging.getLogger(__name__)


def store_inputs(request: Request, names: tuple[str, str], folder: Path, jobs: Iterable[Job]) -> tuple[Path, Path]:
    """Give the video and the sound of a request names in a new folder, mode 700, which then owns them.

    Each is one more hard link of the same content that one of `jobs` has stored, or else of the request's own file, and
    a copy only on another file system. So the request's files must not be changed in place afterwards; their own names
    may be removed at any time. names: what the user calls them. Raises UserError where they cannot be stored.
    """
    stored = [path for job in jobs for path in (job.request.video, job.request.audio)]
    sources = request.video, request.audio
    try:
        folder.mkdir(parents=True, mode=0o700)
        targets = folder / f"video{_suffix(names[0])}", folder / f"voice{_suffix(names[1])}"
        for source, target in zip(sources, targets, strict=True):
            store(source, target, stored)
    except OSError as error:
        for path, name in zip(sources, names, strict=True):
            if not path.is_file():
                raise UserError(f"The file '{name}' is not on this server any more: give it again.") from None
        log.error(f"A job's files cannot be kept: {error}")
        raise UserError(
            f"Your files cannot be kept with the results of this server ({unwritten(error)}): remove jobs that you do "
            "not need, or let who serves the page look at the folder that --outputs names."
        ) from None
    return targets


def store(source: Path, target: Path, stored: Iterable[Path]) -> None:
    """Let `target` be a file with the content of `source`: that of an equal one among `stored`, if there is one.

    Raises OSError.
    """
    source = Path(os.path.realpath(source))
    for path in (*_equal(source, stored), source):
        try:
            return os.link(path, target)
        except FileNotFoundError:
            if path == source:
                raise
        except OSError:  # another file system, one without hard links, or too many of them
            continue
    shutil.copyfile(source, target)


def _equal(source: Path, stored: Iterable[Path]) -> Iterable[Path]:
    """Those of the stored files that have the content of `source`. Contents are read where the sizes are the same."""
    known, compared = os.stat(source), set()
    for path in stored:
        try:
            found = os.stat(path)
            if found.st_size != known.st_size or (found.st_dev, found.st_ino) in compared:
                continue
            compared.add((found.st_dev, found.st_ino))
            if os.path.samestat(found, known) or filecmp.cmp(source, path, shallow=False):
                yield path
        except OSError:  # of a job that was just removed
            continue


def stored_bytes(folders: Iterable[Path]) -> int:
    """Bytes that folders of jobs take on the disk; a file that several of them share counts once."""
    files = {}
    for top in folders:
        for folder, _, names in os.walk(top):
            for name in names:
                try:
                    found = os.lstat(os.path.join(folder, name))
                except OSError:
                    continue
                files[found.st_dev, found.st_ino] = found.st_size
    return sum(files.values())


def unwritten(error: OSError) -> str:
    """Why something could not be written, without where: not every visitor is to know the folders of a server."""
    return "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else os.strerror(error.errno or errno.EIO)


def _suffix(name: str) -> str:
    """The ending of a user's file name, if it is one that can do no harm."""
    suffix = Path(name).suffix.lower()
    return suffix if suffix[1:].isalnum() and suffix.isascii() and len(suffix) <= 6 else ""


def with_user_names(error: UserError, names: dict[Path, str]) -> str:
    """An error's sentence with the user's names of files in place of the server's paths."""
    text = str(error)
    for path, name in names.items():
        for mention in (f"'{path}'", str(path)):
            text = text.replace(mention, f"'{name}'")
    return text
