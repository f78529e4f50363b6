"""Paths of files to write: checking that no other file is harmed, and writing them whole or not at all."""

import hashlib
import os
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from latentsync.errors import UserError

PARTIAL = ".latentsync-"  # prefix of the names of unfinished files and folders


def check_writable(path: str | os.PathLike, inputs: Iterable[str | os.PathLike] = (), what: str = "The output") -> Path:
    """Raise UserError, before long work begins, unless a file can be written to `path` without harm to another.

    inputs: files that the same run reads or writes; `path` must be none of them, whatever links lead to it. It must be
    a regular file, which will be replaced, or not exist: a pipe or a device would block, or swallow the result.
    what: subject of the error message, such as "The report".
    """
    path = Path(path)
    try:
        _check(path, inputs, what)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in a name
        raise _not_writable(path, what, error) from error
    return path


def _check(path: Path, inputs: Iterable[str | os.PathLike], what: str) -> None:
    folders = {path.absolute().parent, Path(os.path.realpath(path)).parent}  # of a link, and of its target
    existing = status(path)
    if existing is not None and stat.S_ISDIR(existing.st_mode):
        raise UserError(f"{what} '{path}' is a folder; give the name of a file to write.")
    if not all(folder.is_dir() for folder in folders):
        raise UserError(f"The folder of '{path}' does not exist; create it, or give another name.")
    if existing is not None and not stat.S_ISREG(existing.st_mode):
        raise UserError(f"{what} '{path}' is a pipe or a device, and no file; give the name of a file to write.")
    for other in inputs:
        if same_file(path, other):
            raise UserError(
                f"{what} '{path}' is an input or another output of this run, '{other}', and would be overwritten; "
                "choose another name."
            )
    if existing is not None:
        # Non-blocking, in case a pipe has taken the name meanwhile.
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_NONBLOCK", 0)))
    for folder in folders:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=PARTIAL):
            pass


def status(path: str | os.PathLike) -> os.stat_result | None:
    """Like os.stat, but None where there is no such file. Raises OSError where that cannot be determined."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def same_file(one: str | os.PathLike, other: str | os.PathLike) -> bool:
    """Whether two paths lead to the same file, by whatever links, or would if it existed. Raises OSError."""
    first, second = status(one), status(other)
    if first is not None and second is not None:
        return os.path.samestat(first, second)
    return os.path.normcase(os.path.realpath(one)) == os.path.normcase(os.path.realpath(other))


@contextmanager
def replacing(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Yield a new name to write to; when the block ends without an exception, that file replaces `path`.

    The name has the ending of `path` and lies in `folder` (None: beside `path`). Whatever happens, `path` is either
    unchanged or whole, and nothing else is left. Raises OSError.
    """
    partial = (folder or path.parent) / f"{PARTIAL}{uuid.uuid4().hex[:12]}{path.suffix}"
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def write_bytes(path: Path, data: bytes, what: str = "The output") -> None:
    """Write a file, whole or not at all; it replaces a regular file, or has a new name.

    A symbolic link stays one, and its target is replaced; other hard links of that file keep the earlier content.
    Raises UserError.
    """
    target = Path(os.path.realpath(path))
    try:
        existing = status(target)
        if existing is not None and not stat.S_ISREG(existing.st_mode):
            raise UserError(f"{what} '{path}' is no regular file any more; choose another name for it.")
        with replacing(target) as partial:
            with open(partial, "xb") as file:
                file.write(data)
            if existing is not None:
                shutil.copymode(target, partial)
    except OSError as error:
        raise _not_writable(path, what, error) from error


def write_text(path: Path, text: str, what: str = "The output") -> None:
    """`write_bytes` for text, in UTF-8."""
    write_bytes(path, text.encode(), what)


def is_own_folder(path: Path) -> bool:
    """Whether a path is a folder, not a link to one, and belongs to this user. Raises FileNotFoundError."""
    info = os.lstat(path)
    if not stat.S_ISDIR(info.st_mode):
        return False
    if sys.platform == "win32":
        return not info.st_file_attributes & stat.FILE_ATTRIBUTE_REPARSE_POINT  # no junction
    return info.st_uid == os.geteuid()


def is_own_file(path: Path) -> bool:
    """Whether a path is a regular file, not a link to one, and belongs to this user."""
    try:
        info = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(info.st_mode) and (sys.platform == "win32" or info.st_uid == os.geteuid())


def _not_writable(path: str | os.PathLike, what: str, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{what} '{path}' cannot be written ({reason}); choose another name for it.")


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder that holds no others. Raises OSError."""
    return sum(path.stat().st_size for path in folder.iterdir())


def hash_files(paths: Iterable[str | os.PathLike], on_wait: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of the contents of files, one after the other; on_wait: called between blocks.

    Raises OSError with the file's name.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    on_wait()
        except OSError as error:
            error.filename = error.filename or path
            raise
    return digest.hexdigest()
