"""Uploads: what is stored, what is refused, and that nothing is left of what was given up."""

import asyncio
import errno
import json
import os
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from starlette.requests import ClientDisconnect

from optim.serving import uploads as module
from optim.serving.guard import Refusal
from optim.serving.multipart import file_name
from optim.serving.uploads import OWNER, PREFIX, Limits, Uploads, make_folder, remove_orphans

BOUNDARY = "a-boundary"
KIND = f"multipart/form-data; boundary={BOUNDARY}"


def form(*files: tuple[str, bytes], end: bool = True) -> bytes:
    parts = [
        b'--%s\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n'
        % (BOUNDARY.encode(), name.encode(), data)
        for name, data in files
    ]
    return b"".join(parts) + (b"--%s--\r\n" % BOUNDARY.encode() if end else b"")


async def chunks(body: bytes, size: int = 1000, then: Exception | None = None) -> AsyncIterator[bytes]:
    for i in range(0, len(body), size):
        yield body[i : i + size]
    if then:
        raise then


def send(uploads: Uploads, body: bytes, declared: int | None = None, then: Exception | None = None) -> list[Path]:
    return asyncio.run(uploads.receive(KIND, declared, chunks(body, then=then), "an address"))


def left(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_files_are_stored_under_their_names_in_folders_that_nobody_guesses(tmp_path):
    uploads, data = Uploads(tmp_path), os.urandom(3_000_000)
    first, second = send(uploads, form(("my video.mp4", data), ("my video.mp4", b"other")))
    assert first.read_bytes() == data and second.read_bytes() == b"other"
    assert first.name == second.name == "my video.mp4"
    assert len(first.parent.name) >= 22 and first.parent.stat().st_mode & 0o777 == 0o700
    again = send(uploads, form(("my video.mp4", data)))[0]
    assert again != first, "the same file of another visitor is another's"


@pytest.mark.parametrize(
    "name, stored",
    [("../../etc/passwd", "passwd"), ("C:\\x\\face.mp4", "face.mp4"), ("..", "file"), ("", "file"), (".", "file"),
     ("a\0b\nc.mp4", "a_b_c.mp4"), ("…ü 日本.mp4", "…ü 日本.mp4"), ("x" * 400 + ".mp4", "x" * 196 + ".mp4"),
     ("日" * 300, "日" * 66), ("a:b|c?.wav", "a_b_c_.wav"), ("\u202egpj.mp4", "_gpj.mp4")],
)  # fmt: skip
def test_a_name_is_one_that_every_system_takes(name, stored):
    assert file_name(name) == stored


def test_what_is_aborted_or_damaged_leaves_nothing(tmp_path):
    uploads, body = Uploads(tmp_path), form(("a.mp4", os.urandom(5_000_000)))
    with pytest.raises(ClientDisconnect):
        send(uploads, body[:3_000_000], then=ClientDisconnect())
    with pytest.raises(Refusal, match="did not come to its end"):
        send(uploads, body[:3_000_000])
    with pytest.raises(Refusal, match="cannot be understood"):
        send(uploads, b"nonsense" * 100)
    with pytest.raises(Refusal, match="holds no file"):
        send(uploads, form())
    with pytest.raises(Refusal, match="more than 4 files"):
        send(uploads, form(*[("a.mp4", b"x")] * 5))
    with pytest.raises(Refusal, match="a form with files"):
        asyncio.run(uploads.receive("text/plain", None, chunks(b"x")))
    assert not left(tmp_path) and not uploads._in_progress


def test_a_cancelled_upload_leaves_nothing(tmp_path):
    uploads = Uploads(tmp_path)

    async def scenario() -> None:
        stopped = asyncio.Event()

        async def endless() -> AsyncIterator[bytes]:
            yield form(("a.mp4", b"x" * 3_000_000), end=False)
            stopped.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(uploads.receive(KIND, None, endless()))
        await stopped.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert not left(tmp_path) and not uploads._in_progress


def test_a_full_disk_is_said_and_later_uploads_succeed(tmp_path, monkeypatch):
    uploads, body = Uploads(tmp_path), form(("a.mp4", os.urandom(3_000_000)))
    usage = module.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=module.SPARE_BYTES + 1_000_000))
        with pytest.raises(Refusal, match="too full") as caught:  # before its first byte
            send(uploads, body, declared=len(body))
        assert caught.value.status == 507

    def full(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.MultipartForm, "write", full)
        with pytest.raises(Refusal, match="too full") as caught:
            send(uploads, body)
        assert caught.value.status == 507 and str(tmp_path) not in str(caught.value)
    assert not left(tmp_path)
    assert send(uploads, body)[0].is_file()


def test_a_file_is_bounded_by_what_it_declares_and_by_what_comes(tmp_path):
    uploads = Uploads(tmp_path, Limits(max_file=1_000_000))
    assert send(uploads, form(("a.mp4", b"x" * 1_000_000)))
    for declared in (None, 100, 2_000_000):
        with pytest.raises(Refusal, match="larger than 1 MB, which is the maximum allowed size") as caught:
            send(uploads, form(("a.mp4", b"x" * 1_000_001)), declared)
        assert caught.value.status == 413
    assert len(left(tmp_path)) == 1


def test_uploads_at_once_and_bytes_that_wait_are_bounded(tmp_path):
    uploads = Uploads(tmp_path, Limits(1_000_000, at_once=3, at_once_from=2, max_stored=2_500_000))

    async def scenario() -> None:
        going, held = asyncio.Event(), []

        async def slow() -> AsyncIterator[bytes]:
            yield form(("a.mp4", b"x" * 100), end=False)
            held.append(1)
            await going.wait()
            yield b"--%s--\r\n" % BOUNDARY.encode()

        def start(address: str) -> asyncio.Task:
            return asyncio.create_task(uploads.receive(KIND, 400, slow(), address))

        tasks = [start("one"), start("one"), start("two")]
        while len(held) < 3:
            await asyncio.sleep(0)
        for address in ("one", "two", "three"):
            with pytest.raises(Refusal, match="Too many files"):
                await start(address)
        going.set()
        assert all([(await task)[0].is_file() for task in tasks])

    asyncio.run(scenario())
    send(uploads, form(("a.mp4", b"x" * 1_000_000)), 1_000_100)
    used = send(uploads, form(("a.mp4", b"x" * 1_000_000)), 1_000_100)[0]
    with pytest.raises(Refusal, match="as many files as it takes") as caught:
        send(uploads, form(("a.mp4", b"x" * 1_000_000)), 1_000_100)
    assert caught.value.status == 507
    os.link(used, tmp_path / "of a job")  # it takes no room of its own any more
    assert send(uploads, form(("a.mp4", b"x" * 1_000_000)), 1_000_100)


def test_an_upload_that_stands_still_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.05)

    async def stalled() -> AsyncIterator[bytes]:
        yield form(("a.mp4", b"x"), end=False)
        await asyncio.Event().wait()

    with pytest.raises(Refusal, match="stood still") as caught:
        asyncio.run(Uploads(tmp_path).receive(KIND, None, stalled()))
    assert caught.value.status == 408 and not left(tmp_path)


def test_an_upload_that_trickles_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GRACE_SECONDS", -1000.0)
    with pytest.raises(Refusal, match="stood still"):
        send(Uploads(tmp_path), form(("a.mp4", b"x" * 5000)))
    assert not left(tmp_path)


def test_only_files_of_the_folder_are_held(tmp_path):
    uploads = Uploads(tmp_path / "mine")
    mine = send(uploads, form(("a.mp4", b"x")))[0]
    (tmp_path / "other.mp4").touch()
    (uploads.folder / OWNER).touch()
    os.symlink(tmp_path / "other.mp4", mine.with_name("link.mp4"))
    assert uploads.holds(str(mine)) and uploads.holds(str(mine.parent / ".." / mine.parent.name / mine.name))
    for path in (
        tmp_path / "other.mp4", mine.with_name("link.mp4"), mine.parent, uploads.folder / OWNER, "http://127.0.0.1/x",
        f"/{mine}", f"\\\\host{mine}", "", "a\0b", f"{mine}\0", mine.name, f"file://{mine}", "/" + "x" * 5000,
    ):  # fmt: skip
        assert not uploads.holds(str(path)), path


def test_an_upload_goes_with_the_last_job_that_used_it(tmp_path):
    uploads = Uploads(tmp_path)
    mine, other = (send(uploads, form(("a.mp4", b"x")))[0] for _ in range(2))
    for key in ("first", "second"):
        os.link(mine, tmp_path / key)  # as a worker that takes it into its own folder
        uploads.use(mine, key)
    jobs = {"first", "second"}
    uploads.forget(jobs.__contains__)
    assert mine.is_file()
    jobs.remove("first")
    uploads.forget(jobs.__contains__)
    assert mine.is_file()
    jobs.clear()
    uploads.forget(jobs.__contains__)
    assert not mine.exists() and not mine.parent.exists() and other.is_file()
    assert (tmp_path / "first").is_file(), "what the worker has is its own"


def test_a_result_is_offered_without_a_copy_and_goes_with_its_job(tmp_path):
    uploads, made = Uploads(tmp_path / "page"), tmp_path / "face-synced.mp4"
    uploads.folder.mkdir()
    made.write_bytes(b"x")
    key = secrets.token_urlsafe(24)
    offered = uploads.offer(made, key)
    assert offered.samefile(made) and uploads.holds(str(offered)) and uploads.offer(made, key) == offered
    made.unlink()
    made.write_bytes(b"new")
    assert uploads.offer(made, key).read_bytes() == b"new"
    uploads.forget(lambda each: each != key)
    assert not offered.exists() and made.is_file()


def test_uploads_that_nobody_used_go_after_their_time(tmp_path):
    uploads = Uploads(tmp_path, Limits(unused_seconds=100))
    young, old, used, copied = (send(uploads, form(("a.mp4", b"x")))[0] for _ in range(4))
    os.link(used, tmp_path / "of a job")
    for path in (used, copied):
        uploads.use(path, "key")
    for path in (old, used, copied):
        os.utime(path.parent, (time.time() - 200,) * 2)
    uploads.sweep()
    assert young.is_file() and used.is_file() and not old.exists()
    assert not copied.exists(), "the job has a copy of its own"


# ---- folders of servers


def test_folders_of_servers_that_are_gone_are_removed_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    mine = make_folder()
    assert mine.parent == tmp_path and mine.stat().st_mode & 0o777 == 0o700

    def folder(name: str, owner: object = None) -> Path:
        place = tmp_path / f"{PREFIX}{name}"
        place.mkdir()
        (place / "video.mp4").touch()
        if owner is not None:
            (place / OWNER).write_text(owner if isinstance(owner, str) else json.dumps(owner))
        return place

    owner = json.loads((mine / OWNER).read_text())
    gone = [
        folder("gone", {"pid": 2**22 + 1, "began": 1.0}), folder("reused", owner | {"began": owner["began"] - 500}),
        folder("damaged", "{"), folder("odd", []), folder("odder", {"pid": "x", "began": None}),
        folder("huge", {"pid": 10**30, "began": 1.0}), folder("negative", {"pid": -1, "began": 1.0}),
    ]  # fmt: skip
    new, old = folder("without an owner yet"), folder("of an older version")
    os.utime(old, (1, 1))
    target = tmp_path / "somebody's"
    target.mkdir()
    (target / "kept").touch()
    link = tmp_path / f"{PREFIX}link"
    link.symlink_to(target, target_is_directory=True)
    gone.append(old)
    inside = gone[0] / "inner"
    inside.symlink_to(target, target_is_directory=True)
    assert sorted(remove_orphans(tmp_path)) == sorted(gone)
    assert not any(place.exists() for place in gone)
    assert mine.is_dir() and new.is_dir() and link.is_symlink() and (target / "kept").is_file()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files on this system")
def test_folders_of_other_users_are_left_alone(tmp_path, monkeypatch):
    place = tmp_path / f"{PREFIX}theirs"
    place.mkdir()
    os.utime(place, (1, 1))
    monkeypatch.setattr(os, "getuid", lambda: place.stat().st_uid + 1)
    assert remove_orphans(tmp_path) == [] and place.is_dir()
