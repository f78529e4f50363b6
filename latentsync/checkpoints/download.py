"""Fetching released files from the Hugging Face hub: continued where it stopped, cancellable, checked by hash.

huggingface_hub handles addresses, tokens, proxies, HF_ENDPOINT and HF_HUB_OFFLINE. Its own download function is not
used: since version 1.18 it throws away what an interrupted download had fetched.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import WeakFileLock, build_hf_headers, hf_raise_for_status

from latentsync.checkpoints.releases import RELEASES, Part, folder_of, gigabytes, released_as
from latentsync.errors import UserError
from latentsync.paths import replacing

if issubclass(HTTPError, OSError):  # before huggingface_hub 1.0, which went from requests to httpx
    from requests import RequestException

    ConnectionFailure: type[Exception] = RequestException
else:
    ConnectionFailure = HTTPError

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being done

CHUNK = 1 << 20  # bytes between two checks for cancellation
PAUSES = (0.5, 1, 2, 4, 8)  # seconds to wait after consecutive failures that brought no byte; then it gives up
POLL_SECONDS = 0.1  # between two reports of progress
DISK_MARGIN = 200_000_000  # bytes to leave free on the disk


class Cancelled(UserError):
    """The user asked to stop. What was fetched is kept."""


def no_progress(done: int, total: int, what: str) -> None:
    pass


def check_cancel(cancel: Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise Cancelled("Stopped; what was fetched is kept, and the next download continues from there.")


@contextmanager
def folder_lock(folder: Path, progress: Progress, cancel: Event | None) -> Iterator[None]:
    """Keep other processes from fetching into the folder; waits for one that does."""
    while True:
        check_cancel(cancel)
        try:
            lock = WeakFileLock(folder / ".lock", timeout=2 * POLL_SECONDS)
            lock.__enter__()
            break
        except TimeoutError:
            progress(0, 0, "waiting for another process that fetches this model")
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def check_space(folder: Path, needed: int) -> None:
    """Raise UserError unless the disk of the folder has `needed` bytes, and DISK_MARGIN more, free."""
    free = shutil.disk_usage(folder).free
    if free < needed + DISK_MARGIN:
        raise UserError(
            f"The disk of '{folder}' has {gigabytes(free)} free, but {gigabytes(needed + DISK_MARGIN)} are needed: "
            "make room, or set LATENTSYNC_HOME to a folder on another disk."
        )


def partial_path(path: Path, part: Part) -> Path:
    """Where an unfinished download of a part is kept; named after its hash, so that it never continues another."""
    return path.with_name(f"{path.name}.{part.sha256[:12]}.incomplete")


def find_local(part: Part, folders: Iterable[Path] = ()) -> Path | None:
    """Find a file of the part's name and size on this machine: in one of the folders, or in the Hugging Face cache.

    Files of a folder may be laid out as in that of a released model, or as the reference and its wrappers have them.
    """
    names = (part.place, f"{part.repository}/{part.file}", f"{part.repository.split('/')[1]}/{part.file}")
    roots = [root for folder in folders for root in (folder, folder / "checkpoints")]
    candidates = [root / name for root in roots for name in names]
    for revision in (part.revision, None):
        cached = try_to_load_from_cache(part.repository, part.file, revision=revision)
        if isinstance(cached, str):
            candidates.append(Path(cached))
    return next((path for path in candidates if path.is_file() and path.stat().st_size == part.size), None)


def link_or_copy(source: Path, path: Path) -> None:
    """Put a file of this machine at `path`: as a hard link where the disk allows it, else as a copy."""
    with replacing(path) as partial:
        try:
            os.link(source.resolve(), partial)
        except OSError:
            check_space(path.parent, source.stat().st_size)
            shutil.copyfile(source, partial)


def sha256_of(path: Path, what: str, progress: Progress = no_progress, cancel: Event | None = None) -> str:
    """Hash of a file, in hexadecimal digits; what: the text passed to `progress`."""
    digest, total, done = hashlib.sha256(), path.stat().st_size, 0
    buffer = bytearray(8 * CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            check_cancel(cancel)
            digest.update(view[:count])
            done += count
            progress(done, total, what)
    return digest.hexdigest()


@dataclass
class _Transfer:
    """State shared by the downloading thread and the one that waits for it."""

    stop: Event = field(default_factory=Event)
    done: int = 0  # bytes of this part that are on the disk
    waiting: bool = False  # for the connection to come back
    error: BaseException | None = None  # that ended the thread


def download(parts: list[tuple[Part, Path]], progress: Progress = no_progress, cancel: Event | None = None) -> None:
    """Fetch parts to their paths, one after the other, each continued from what an earlier call has fetched.

    progress is called in this thread, with bytes of all the parts. Raises UserError, and Cancelled within a second
    of `cancel` being set, whatever the connection does.
    """
    total = sum(part.size for part, _ in parts)
    before = 0
    for part, path in parts:
        path.parent.mkdir(parents=True, exist_ok=True)
        transfer = _Transfer()
        arguments = part, partial_path(path, part), transfer
        thread = Thread(target=_download_thread, args=arguments, name="download", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(POLL_SECONDS)
                check_cancel(cancel)
                what = "waiting for the connection" if transfer.waiting else part.file
                progress(before + transfer.done, total, what)
        finally:
            transfer.stop.set()
            thread.join(1)  # a chunk that is being written is written to its end
        if transfer.error is not None:
            raise transfer.error
        before += part.size


def _download_thread(part: Part, partial: Path, transfer: _Transfer) -> None:
    try:
        _download_part(part, partial, transfer)
    except BaseException as error:  # raised again in the thread that waits
        transfer.error = error


def _download_part(part: Part, partial: Path, transfer: _Transfer) -> None:
    """Download the rest of a part into `partial`, which may hold its beginning; retries while that makes progress."""
    url = hf_hub_url(part.repository, part.file, revision=part.revision)
    failures, checked = 0, False
    while not transfer.stop.is_set():
        begin = transfer.done = partial.stat().st_size if partial.exists() else 0
        if begin == part.size:
            return
        try:
            if not checked:
                _check_metadata(part, url)
                checked = True
            _receive(part, url, partial, transfer)
            if transfer.done == part.size:
                return
            reason = "the response ends too early"
        except OfflineModeIsEnabled as error:
            raise UserError(
                f"'{part.file}' of {part.repository} is not on this machine, and HF_HUB_OFFLINE forbids to fetch it: "
                "unset that variable, or put the file there by hand (see docs/models.md)."
            ) from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status < 500 and status not in (408, 429):
                raise UserError(_refusal(part, error, status)) from error
            reason = f"the server answers with error {status}"
        except ConnectionFailure as error:
            reason = f"the connection fails ({str(error) or type(error).__name__})"
        except OSError as error:
            raise UserError(
                f"'{partial}' cannot be written ({error.strerror or error}): make room on that disk, or set "
                "LATENTSYNC_HOME to another folder; what was fetched is kept."
            ) from error
        failures = 0 if transfer.done > begin else failures + 1
        if failures > len(PAUSES):
            raise UserError(
                f"'{part.file}' of {part.repository} cannot be fetched from {constants.ENDPOINT}: {reason}; what was "
                "fetched is kept, so try again later, and it continues from there."
            )
        transfer.waiting = True
        transfer.stop.wait(PAUSES[max(failures - 1, 0)])
        transfer.waiting = False


def _check_metadata(part: Part, url: str) -> None:
    """Compare size and hash of what the URL leads to, before gigabytes of something else are fetched."""
    remote = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    other_hash = remote.etag and len(remote.etag) == len(part.sha256) and remote.etag != part.sha256
    if other_hash or (remote.size is not None and remote.size != part.size):
        raise UserError(
            f"What {constants.ENDPOINT} has as '{part.file}' of {part.repository} is another file than the released "
            "one, so it was not fetched: unset HF_ENDPOINT, or name another mirror in it."
        )


def _receive(part: Part, url: str, partial: Path, transfer: _Transfer) -> None:
    """One request, from where the file ends; returns when the response ends."""
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if transfer.done:
        headers["Range"] = f"bytes={transfer.done}-"
    with _open_stream(url, headers) as (response, chunks):
        hf_raise_for_status(response)
        same_begin = response.headers.get("Content-Range", "").startswith(f"bytes {transfer.done}-")
        continues = response.status_code == 206 and same_begin
        if not continues:  # a server that does not support ranges sends everything
            transfer.done = 0
        with partial.open("ab" if continues else "wb") as file:
            for chunk in chunks:
                if transfer.stop.is_set():
                    return
                if transfer.done + len(chunk) > part.size:
                    raise UserError(f"{constants.ENDPOINT} sends more than '{part.file}' has; fetch it again.")
                file.write(chunk)
                transfer.done += len(chunk)


@contextmanager
def _open_stream(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """Send a GET request; gives the response, whose body is not read yet, and its body in chunks.

    The response is one of httpx, and one of requests before huggingface_hub 1.0, which transformers before 5 needs.
    """
    session: Any = get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if ConnectionFailure is HTTPError:
        with session.stream("GET", url, headers=headers, timeout=timeout) as response:
            yield response, response.iter_bytes(CHUNK)
    else:
        with session.get(url, headers=headers, timeout=timeout, stream=True) as response:
            yield response, response.iter_content(CHUNK)


def _refusal(part: Part, error: HfHubHTTPError, status: int) -> str:
    what = f"'{part.file}' of {part.repository}"
    if status == 403 or isinstance(error, GatedRepoError):
        return f"The hub does not let you have {what}: accept its terms on https://huggingface.co/{part.repository}."
    if status == 401 or isinstance(error, RepositoryNotFoundError):
        return (
            f"The hub does not let you have {what} (error {status}): check the token in HF_TOKEN or of "
            "`hf auth login`, or unset it."
        )
    if status == 404:
        return f"{constants.ENDPOINT} has no {what}: unset HF_ENDPOINT, or update this program."
    return f"{constants.ENDPOINT} refuses {what} with error {status}: try again later."


def fetch(
    name: str,
    progress: Progress = no_progress,
    cancel: Event | None = None,
    sources: Iterable[Path] = (),
    spare: int = 0,
    parts: Sequence[Part] | None = None,
) -> None:
    """Bring parts of a released model (None: all) into its folder, each checked by its hash.

    sources: folders, besides those of the other releases and the Hugging Face cache, where a part may already be.
    spare: bytes that must be free on the disk afterwards. The caller holds the `folder_lock`. A file that the user put
    there is never overwritten. Raises UserError.
    """
    folder = folder_of(name)
    folders = [*sources, *(folder_of(other) for other in RELEASES if other != name)]
    missing = []
    for part in RELEASES[name].parts if parts is None else parts:
        path = folder / part.place
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if not is_released(part, path, progress, cancel):
                raise UserError(not_released_message(part, path))
        elif local := find_local(part, folders):
            link_or_copy(local, path)
            if not is_released(part, path, progress, cancel):
                path.unlink()
                missing.append((part, path))
        else:
            missing.append((part, path))
    to_fetch = sum(part.size for part, _ in missing)
    for part, path in missing:
        with suppress(FileNotFoundError):
            to_fetch -= partial_path(path, part).stat().st_size
    check_space(folder, to_fetch + spare)
    download(missing, progress, cancel)
    for part, path in missing:
        partial = partial_path(path, part)
        if not is_released(part, partial, progress, cancel):
            partial.unlink()
            raise UserError(
                f"What was fetched as '{part.file}' of {part.repository} does not have its hash and was removed: fetch "
                "it again, and check the disk if that repeats."
            )
        os.replace(partial, path)


def is_released(part: Part, path: Path, progress: Progress = no_progress, cancel: Event | None = None) -> bool:
    """Whether the file at `path` is the released `part`, by its size and hash."""
    return (
        path.stat().st_size == part.size and sha256_of(path, f"checking {part.file}", progress, cancel) == part.sha256
    )


def not_released_message(part: Part, path: Path) -> str:
    """The message for a file that has the place of a part and is not it."""
    other = released_as(size=path.stat().st_size) if part.place == "latentsync_unet.pt" else None
    what = f"is that of {other}" if other and RELEASES[other].unet != part else "is damaged, or of another version"
    return f"'{path}' is not the released '{part.file}' of {part.repository}; it {what}: move it away and fetch again."


def save_model_cards(name: str, folder: Path) -> None:
    """Save the model cards of a release, which state the licences, beside its files; without them if that fails."""
    for repository, revision in {part.repository: part.revision for part in RELEASES[name].parts}.items():
        path = folder / "licences" / f"{repository.replace('/', '--')}.md"
        if path.exists():
            continue
        with suppress(ConnectionFailure, OSError):
            url = hf_hub_url(repository, "README.md", revision=revision)
            response = get_session().get(url, headers=build_hf_headers(), timeout=constants.HF_HUB_ETAG_TIMEOUT)
            hf_raise_for_status(response)
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as partial:
                partial.write_bytes(response.content)
