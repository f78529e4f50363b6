"""The released models on this machine: list, get, verify and remove them."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from latentsync.checkpoints.convert import convert
from latentsync.checkpoints.download import (
    Progress,
    check_space,
    fetch,
    folder_lock,
    is_released,
    no_progress,
    not_released_message,
    partial_path,
    save_model_cards,
    sha256_of,
)
from latentsync.checkpoints.find import SOURCE_HASH, UNET_NAMES, find_released, release_of
from latentsync.checkpoints.releases import RELEASES, folder_of, notice
from latentsync.checkpoints.tensors import unet_reader
from latentsync.errors import UserError
from latentsync.paths import PARTIAL, replacing

SUMS = "SHA256SUMS"  # of the converted U-Net, in the format of sha256sum
LICENCE = "LICENCES.txt"


@dataclass(frozen=True)
class Stored:
    """What this machine has of a released model."""

    name: str
    resolution: int  # pixels
    where: Path | None  # the folder of its U-Net; None where the model is not complete
    converted: bool  # starts fast
    pickle: int  # bytes of the original U-Net, which the converted one replaces
    size: int  # bytes of all its files here
    to_fetch: int  # bytes still to be fetched
    folder: Path  # where it is, or would be, kept


def stored(name: str) -> Stored:
    """What this machine has of a released model, without reading the files."""
    release, folder = RELEASES[name], folder_of(name)
    checkpoint = None
    with suppress(UserError):  # its parts are not all there
        checkpoint = find_released(name)
    converted = folder / UNET_NAMES[0]
    pickle = folder / release.unet.place
    to_fetch = 0
    for part in release.parts:
        path = folder / part.place
        if checkpoint is None and not path.is_file():
            partial = partial_path(path, part)
            to_fetch += part.size - (partial.stat().st_size if partial.is_file() else 0)
    return Stored(
        name=name,
        resolution=release.resolution,
        where=checkpoint.unet.parent if checkpoint else None,
        converted=converted.is_file(),
        pickle=pickle.stat().st_size if converted.is_file() and pickle.is_file() else 0,
        size=sum(path.stat().st_size for path in _files(name) if path.is_file()),
        to_fetch=to_fetch,
        folder=folder,
    )


def get(
    name: str,
    progress: Progress = no_progress,
    cancel: Event | None = None,
    sources: Iterable[Path] = (),
    keep_pickle: bool = True,
) -> Path:
    """Fetch what is missing of a released model, check it, and convert its U-Net; returns its folder.

    Files in the Hugging Face cache, in the folder of another release or in one of `sources` are taken from there.
    progress is called often, in this thread, with bytes done, bytes in all (0: not known) and what is being done;
    `cancel`, set by another thread, ends it within a second. Raises UserError, and its subclass Cancelled; a later
    call continues where this one stopped.
    """
    release, folder = RELEASES[name], folder_of(name)
    target, pickle = folder / UNET_NAMES[0], folder / release.unet.place
    sources = [Path(source).expanduser() for source in sources]
    for source in sources:
        if not source.is_dir():
            raise UserError(f"The folder '{source}' to take files from does not exist; check its name.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder, progress, cancel):
            for path in _unfinished(folder):
                path.unlink()
            if release_of(target) != name:
                if target.exists():
                    raise UserError(f"'{target}' was not made from the released {name}: move it away and fetch again.")
                size = release.unet.size // 2
                fetch(name, progress, cancel, sources, spare=size)
                check_space(folder, size)
                read, metadata = unet_reader(pickle), {"format": "pt", SOURCE_HASH: release.unet.sha256}
                digest = convert(read, target, metadata, progress, cancel)
                _write_text(folder / SUMS, f"{digest}  {target.name}\n")
            else:
                fetch(name, progress, cancel, parts=release.parts[:-1])
            _write_text(folder / LICENCE, notice(name) + "\n")
            save_model_cards(name, folder)
            if not keep_pickle:
                pickle.unlink(missing_ok=True)
            for part in release.parts:  # what was fetched of a file that was then found on this machine
                partial_path(folder / part.place, part).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"'{error.filename or folder}' cannot be written ({error.strerror or error}): make room on that disk, or "
            "set LATENTSYNC_HOME to another folder."
        ) from error
    return folder


def verify(name: str, progress: Progress = no_progress, cancel: Event | None = None) -> list[str]:
    """Compare the hashes of all files of a released model; returns a sentence for each that is missing or damaged."""
    release, folder = RELEASES[name], folder_of(name)
    converted = folder / UNET_NAMES[0]
    problems = []
    for part in release.parts:
        path = folder / part.place
        if path.is_file():
            if not is_released(part, path, progress, cancel):
                problems.append(not_released_message(part, path))
        elif part is not release.unet or not converted.is_file():
            problems.append(f"'{path}' is missing: run `python -m latentsync.checkpoints get {name}`.")
    if converted.is_file():
        digest = ""
        with suppress(OSError, IndexError, ValueError):  # ValueError: not UTF-8
            digest = (folder / SUMS).read_text(encoding="utf-8").split()[0]
        if sha256_of(converted, f"checking {converted.name}", progress, cancel) != digest:
            problems.append(
                f"'{converted}' is not as it was converted: remove it, and run `python -m latentsync.checkpoints get "
                f"{name}`."
            )
    return problems


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _unfinished(folder: Path) -> list[Path]:
    """Files left by a process that was killed while it copied or converted."""
    return [*folder.rglob(f"{PARTIAL}*")]


def _files(name: str) -> list[Path]:
    """All files that `get` may have put into the folder of a model."""
    folder, files = folder_of(name), []
    for part in RELEASES[name].parts:
        files += [folder / part.place, partial_path(folder / part.place, part)]
    files += [folder / UNET_NAMES[0], folder / SUMS, folder / LICENCE, *folder.glob("licences/*.md")]
    return [*files, *_unfinished(folder), folder / ".lock"]


def remove(name: str, pickle_only: bool = False) -> int:
    """Remove a released model from its folder, or only the original U-Net of a converted one; returns bytes removed.

    Files of other names stay, and so does what lies in the Hugging Face cache. Raises UserError.
    """
    release, folder = RELEASES[name], folder_of(name)
    if pickle_only and release_of(folder / UNET_NAMES[0]) != name:
        raise UserError(f"'{folder / release.unet.place}' is needed: it has not been converted yet.")
    paths = [folder / release.unet.place] if pickle_only else _files(name)
    removed = 0
    try:
        for path in paths:
            if path.is_file():
                removed += path.stat().st_size
                path.unlink()
    except OSError as error:
        raise UserError(
            f"'{path}' cannot be removed ({error.strerror or error}): close what uses it, or check its rights."
        ) from error
    if not pickle_only:
        for inner in ("licences", "whisper", "vae", ""):
            with suppress(OSError):
                (folder / inner).rmdir()
    return removed
