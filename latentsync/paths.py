"""Paths of files that are to be written: whether that harms another file, and writing them whole or not at all."""

import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from latentsync.errors import UserError

PARTIAL = ".latentsync-"  # begins the name of everything that is not finished


def check_writable(path: str | os.PathLike, inputs: Iterable[str | os.PathLike] = (), what: str = "The output") -> Path:
    """Raise UserError, before long work begins, unless a file can be written to `path` without harm to another.

    inputs: files that the same run reads or writes; `path` must be none of them, whatever links lead to it. Only a
    regular file, which is to be replaced, or a new name will do: a pipe or a device would block, or swallow the result.
    what: subject of the sentences, as "The report".
    """
    path = Path(path)
    try:
        _check(path, inputs, what)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in a name
        raise _not_writable(path, what, error) from error
    return path


def _check(path: Path, inputs: Iterable[str | os.PathLike], what: str) -> None:
    folders = {path.absolute().parent, Path(os.path.realpath(path)).parent}  # of a link, and of what it leads to
    known = status(path)
    if known is not None and stat.S_ISDIR(known.st_mode):
        raise UserError(f"{what} '{path}' is a folder; give the name of a file to write.")
    if not all(folder.is_dir() for folder in folders):
        raise UserError(f"The folder of '{path}' does not exist; create it, or give another name.")
    if known is not None and not stat.S_ISREG(known.st_mode):
        raise UserError(f"{what} '{path}' is a pipe or a device, and no file; give the name of a file to write.")
    for other in inputs:
        if same_file(path, other):
            raise UserError(
                f"{what} '{path}' is an input or another output of this run, '{other}', and would be overwritten; "
                "choose another name."
            )
    if known is not None:
        # Not blocking, in case something else has taken the name meanwhile.
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_NONBLOCK", 0)))
    for folder in folders:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=PARTIAL):
            pass


def status(path: str | os.PathLike) -> os.stat_result | None:
    """The status of what a path leads to; None where there is nothing. Raises OSError where that is not known."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def same_file(one: str | os.PathLike, other: str | os.PathLike) -> bool:
    """Whether two paths lead to the same file, by whatever links, or would if it were there. Raises OSError."""
    found = status(one), status(other)
    if None not in found:
        return os.path.samestat(*found)
    return os.path.normcase(os.path.realpath(one)) == os.path.normcase(os.path.realpath(other))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new name beside `path` for the block to write to, which takes the place of `path` when the block ends well.

    Whatever happens, `path` is either as it was or whole, and nothing else is left. Raises OSError.
    """
    partial = path.with_name(f"{PARTIAL}{uuid.uuid4().hex[:12]}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def write_bytes(path: Path, data: bytes, what: str = "The output") -> None:
    """Write a file, whole or not at all, in the place of a regular file or under a new name.

    A symbolic link still leads to it then; other hard links of an earlier file keep the earlier content. Raises
    UserError.
    """
    target = Path(os.path.realpath(path))
    try:
        known = status(target)
        if known is not None and not stat.S_ISREG(known.st_mode):
            raise UserError(f"{what} '{path}' is no regular file any more; choose another name for it.")
        with replacing(target) as partial:
            with open(partial, "xb") as file:
                file.write(data)
            if known is not None:
                shutil.copymode(target, partial)
    except OSError as error:
        raise _not_writable(path, what, error) from error


def write_text(path: Path, text: str, what: str = "The output") -> None:
    """`write_bytes` for text, in UTF-8."""
    write_bytes(path, text.encode(), what)


def is_own_folder(path: Path) -> bool:
    """Whether a path is itself a folder, no link to one, and belongs to this user. Raises FileNotFoundError."""
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        return False
    if hasattr(stat, "FILE_ATTRIBUTE_REPARSE_POINT") and hasattr(found, "st_file_attributes"):  # Windows: a junction
        return not found.st_file_attributes & stat.FILE_ATTRIBUTE_REPARSE_POINT
    return found.st_uid == os.geteuid()


def is_own_file(path: Path) -> bool:
    """Whether a path is itself a regular file, no link to one, and belongs to this user."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and (not hasattr(os, "geteuid") or found.st_uid == os.geteuid())


def _not_writable(path: str | os.PathLike, what: str, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{what} '{path}' cannot be written ({reason}); choose another name for it.")
