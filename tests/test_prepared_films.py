"""The films of the page's jobs: what one job has found is where the next one starts, for whom and for how long."""

import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from clips import make_sound
from conftest import portrait, save_video
from test_prepared import forbid
from test_resume import X264

from latentsync.errors import UserError
from latentsync.prepared.film import MANIFEST, FilmChanged, PreparedFilm, faces_file, latents_file
from latentsync.prepared.recording import Recorder
from optim.serving import prepared_films
from optim.serving.job import CANCELLED, DONE, FAILED, Job, OtherVoice, Request
from optim.serving.options import parse_options
from optim.serving.prepared_films import KNOWN, PreparedFilms
from optim.serving.store import JobStore
from optim.serving.worker import Worker

ME, OTHER = "m" * 24, "o" * 24
ROOM = 10**9
pytestmark = pytest.mark.usefixtures("one_thread", "home")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sounds")
    lengths = {"one": 0.7, "two": 0.62, "longer": 0.9, "again and again": 1.5}
    return {name: make_sound(folder / f"{name}.wav", seconds=seconds) for name, seconds in lengths.items()}


@pytest.fixture
def start(start_worker):
    def start_one(prepared_bytes: int = ROOM, **options) -> Worker:
        return start_worker(prepared_bytes=prepared_bytes, **options)

    return start_one


def run(worker: Worker, video: Path, sound: Path, visitor: str = ME, **settings) -> Job:
    job = worker.submit(Request(video, sound, **{"steps": 1} | settings), visitor)
    assert worker.wait(job, 120) and job.state == DONE, job.error
    return job


def entries(job: Job) -> list[Path]:
    return sorted((job.folder / "prepared").glob("*"))


def known(job: Job) -> bool:
    return KNOWN in job.messages


def all_entries(worker: Worker) -> set[str]:
    """By the numbers of their manifests, which jobs share."""
    return {str(os.stat(path).st_ino) for path in worker.folder.glob(f"*/prepared/*/{MANIFEST}")}


# ---- the same result


def test_the_next_voice_starts_from_what_the_first_job_found_and_gives_the_same_to_the_bit(
    start, talking, sounds, monkeypatch
):
    plain = start(0, folder="plain")
    expected = {
        (name, level): run(plain, talking, sounds[name], level=level).output.read_bytes()
        for name, level in (("one", "conservative"), ("two", "conservative"), ("two", "aggressive"))
    }
    worker = start()
    first = run(worker, talking, sounds["one"], level="conservative")
    assert not known(first) and not first.view(None)["faces_known"] and len(entries(first)) == 1
    assert first.output.read_bytes() == expected["one", "conservative"]
    forbid(monkeypatch)
    for level in ("conservative", "aggressive"):
        job = run(worker, talking, sounds["two"], level=level)
        assert known(job) and job.view(None)["messages"].count(KNOWN) == 1
        assert job.view(None)["faces_known"]
        assert job.output.read_bytes() == expected["two", level]
    again = worker.again(first.id, ME, seed=5)
    assert worker.wait(again, 120) and again.state == DONE and known(again)
    assert len(all_entries(worker)) == 1, "all share one"


def test_so_it_does_after_the_server_was_started_again(start, talking, sounds, tmp_path, monkeypatch):
    before = start()
    first = run(before, talking, sounds["one"])
    before.close()
    half = entries(first)[0].parent / ".latentsync-0123456789ab"
    shutil.copytree(entries(first)[0], half)
    monkeypatch.setattr("optim.serving.records._is_running", lambda _: False)
    after = start()
    assert not half.exists(), "what the end of a server leaves half written goes"
    forbid(monkeypatch)
    assert known(run(after, talking, sounds["two"]))


def test_a_longer_voice_is_recorded_for_all_jobs_of_the_film(start, talking, sounds):
    worker = start()
    first, longer = run(worker, talking, sounds["one"]), run(worker, talking, sounds["again and again"])
    assert not known(longer), "the first job saw too little of the film"
    assert len(all_entries(worker)) == 1 and len(entries(first)) == 1
    worker.remove(longer.id, ME)
    third = run(worker, talking, sounds["longer"])
    assert known(third), "what the longer one found is the first one's, too"


@pytest.mark.parametrize("changes", [{"face": "left"}, {"fps": "25"}, {"video_track": 1}])
def test_only_what_a_film_depends_on_tells_entries_apart(start, talking, sounds, changes):
    worker = start()
    run(worker, talking, sounds["one"])
    assert known(run(worker, talking, sounds["one"], **changes)) == ("face" not in changes)


def test_another_film_is_not_known(start, talking, sounds, tmp_path):
    worker = start()
    run(worker, talking, sounds["one"])
    mirrored = [np.ascontiguousarray(portrait(t)[:, ::-1]) for t in range(24)]
    other = save_video(tmp_path / "other.mp4", mirrored, *X264)
    assert not known(run(worker, other, sounds["one"])) and len(all_entries(worker)) == 2


def test_several_faces_and_speakers_record_nothing(tmp_path, talking, sounds):
    prepared, calls = PreparedFilms(JobStore(tmp_path, 5), ROOM, shared=False), []
    for request in (
        Request(talking, sounds["one"], face="left", others=(OtherVoice("right", sounds["two"]),)),
        Request(talking, sounds["one"], face="speaking"),
    ):
        job = Job(request, "owner", tmp_path, ("a", "b"), (192, 192), 0.7)
        assert prepared.run(job, None, None, lambda film: calls.append(film) or "report", True, print) == (
            "report",
            False,
        )
    assert calls == [None, None]


# ---- for whom


def test_on_a_shared_page_nobody_starts_from_what_another_one_gave(start, talking, sounds):
    worker = start(shared=True)
    run(worker, talking, sounds["one"])
    other = run(worker, talking, sounds["one"], OTHER)
    assert not known(other) and len(all_entries(worker)) == 2
    assert known(run(worker, talking, sounds["two"])) and known(run(worker, talking, sounds["two"], OTHER))


def test_on_one_s_own_page_every_browser_does(start, talking, sounds):
    worker = start()
    run(worker, talking, sounds["one"])
    assert known(run(worker, talking, sounds["one"], OTHER))


@pytest.mark.parametrize(
    ("arguments", "shared", "size"),
    [
        ([], False, 4 * 10**9),
        (["--prepared-cache", "0"], False, 0),
        (["--prepared-cache", "0.5", "--share", "--no-auth"], True, 5 * 10**8),
        (["--server-name", "0.0.0.0"], True, 4 * 10**9),  # noqa: S104
        (["--auth", "anna:a long password"], True, 4 * 10**9),
    ],
)
def test_a_page_of_strangers_or_of_several_people_is_shared(tmp_path, arguments, shared, size):
    from optim.serving.setup import make_worker

    prepared = make_worker(parse_options(arguments, tmp_path)).prepared
    assert (prepared._shared, prepared._max_bytes) == (shared, size)


# ---- for how long


def test_what_was_found_goes_with_the_last_job_that_used_it(start, talking, sounds):
    worker = start()
    first, second = run(worker, talking, sounds["one"]), run(worker, talking, sounds["two"])
    worker.remove(first.id, ME)
    third = run(worker, talking, sounds["two"])
    assert known(third), "the second job has it, too"
    worker.store.remove_old(-1)  # as when --keep-hours have passed
    assert list(worker.folder.glob("*")) == [] and not second.folder.exists()
    assert not known(run(worker, talking, sounds["one"]))


def test_a_job_that_is_cancelled_or_fails_keeps_nothing_of_its_own(start, talking, sounds, monkeypatch):
    worker = start()
    job = worker.submit(Request(talking, sounds["again and again"]), ME)
    while not job.partial_frames:
        time.sleep(0.01)
    worker.cancel(job.id, ME)
    assert worker.wait(job, 60) and job.state == CANCELLED and entries(job) == []
    monkeypatch.setattr(Recorder, "follow", lambda *_: (_ for _ in ()).throw(UserError("No.")))
    failed = worker.submit(Request(talking, sounds["one"], steps=1), ME)
    assert worker.wait(failed, 60) and failed.state == FAILED and entries(failed) == []
    assert worker.prepared._reserved == {}


def entry_of(worker: Worker, talking: Path, sounds, face: str) -> Job:
    return run(worker, talking, sounds["one"], face=face)


def test_those_that_were_not_used_for_longest_go_first(start, talking, sounds):
    worker = start()
    left, right, centre = (entry_of(worker, talking, sounds, face) for face in ("left", "right", "centre"))
    for age, job in ((300, left), (200, right), (100, centre)):
        then = time.time() - age
        os.utime(entries(job)[0] / MANIFEST, (then, then))
    assert known(entry_of(worker, talking, sounds, "left")), "and this is a use"
    size = sum(path.stat().st_size for path in entries(left)[0].iterdir())
    worker.prepared._max_bytes = 2 * size + size // 2
    worker.prepared.trim()
    assert entries(right) == [] and entries(left) and entries(centre)
    worker.prepared._max_bytes = size + size // 2
    worker.prepared.trim()
    assert entries(centre) == [] and entries(left)


def test_what_a_running_job_reads_stays(start, talking, sounds, monkeypatch):
    worker = start()
    first = run(worker, talking, sounds["one"])
    reading, go_on = threading.Event(), threading.Event()
    follow = PreparedFilm.follow

    def slowly(self, *arguments):
        reading.set()
        assert go_on.wait(60)
        yield from follow(self, *arguments)

    monkeypatch.setattr(PreparedFilm, "follow", slowly)
    job = worker.submit(Request(talking, sounds["two"], steps=1), ME)
    assert reading.wait(60)
    worker.prepared._max_bytes = 1
    worker.prepared.trim()
    assert entries(first) and entries(job)
    worker.remove(first.id, ME)
    go_on.set()
    assert worker.wait(job, 60) and job.state == DONE and known(job), job.error
    worker.prepared.trim()
    assert entries(job) == []


@pytest.mark.parametrize("reason", ["limit", "disk"])
def test_what_does_not_fit_is_neither_written_nor_room_made_for_it(start, talking, sounds, monkeypatch, reason):
    worker = start()
    first = run(worker, talking, sounds["one"])
    size = sum(path.stat().st_size for path in entries(first)[0].iterdir())
    if reason == "limit":
        worker.prepared._max_bytes = size - 6000  # a header or two less than what was written
        monkeypatch.setattr(worker.prepared, "trim", lambda: None)
    else:
        monkeypatch.setattr(prepared_films, "_free_bytes", lambda _: prepared_films.SPARE_BYTES)
    monkeypatch.setattr(Recorder, "__enter__", lambda *_: pytest.fail("it would not fit"))
    job = run(worker, talking, sounds["one"], face="left")
    assert entries(job) == [] and entries(first)


def test_a_server_that_may_keep_none_removes_those_of_an_earlier_one(start, talking, sounds, monkeypatch):
    before = start()
    first = run(before, talking, sounds["one"])
    before.close()
    monkeypatch.setattr("optim.serving.records._is_running", lambda _: False)
    after = start(0)
    assert entries(first) == []
    job = run(after, talking, sounds["one"])
    assert entries(job) == [] and not known(job)


def test_prepared_films_do_not_count_as_a_visitor_s_files(start, talking, sounds):
    from optim.serving.inputs import stored_bytes

    job = run(start(), talking, sounds["one"])
    files = sum(path.stat().st_size for path in job.folder.iterdir() if path.is_file())
    assert entries(job) and stored_bytes([job.folder]) == files


# ---- nothing that goes wrong with it ends a job


def damage(entry: Path, name: str) -> None:
    path = next(entry.glob(name))
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", [MANIFEST, faces_file(0), latents_file(0)])
def test_a_damaged_entry_is_thrown_away_and_made_anew(start, talking, sounds, name):
    worker = start()
    first = run(worker, talking, sounds["one"])
    expected = first.output.read_bytes()
    damage(entries(first)[0], name)
    job = run(worker, talking, sounds["one"])
    assert not known(job) and job.output.read_bytes() == expected and entries(first) == []
    assert known(run(worker, talking, sounds["one"]))


def test_one_that_is_damaged_while_it_is_read_costs_the_job_nothing_but_time(start, talking, sounds, monkeypatch):
    worker = start()
    first = run(worker, talking, sounds["one"])

    def changed(self):
        yield from ()
        raise FilmChanged("It has changed.")

    monkeypatch.setattr(PreparedFilm, "faces", changed)
    job = run(worker, talking, sounds["one"])
    assert not known(job) and entries(job) == [] and job.output.read_bytes() == first.output.read_bytes()


def test_a_full_disk_costs_what_was_found_and_not_the_result(start, talking, sounds, monkeypatch):
    worker = start()
    write = Path.write_bytes

    def full(self, data):
        if "prepared" in self.parts:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert entries(run(worker, talking, sounds["one"])) == []


def test_a_film_that_changes_meanwhile_is_not_kept(start, talking, sounds, monkeypatch):
    worker = start()
    states = iter([(1, 1), (1, 2)])
    monkeypatch.setattr(prepared_films, "_status", lambda _: next(states))
    assert entries(run(worker, talking, sounds["one"])) == []


def test_without_hard_links_the_newest_job_has_it(start, talking, sounds, monkeypatch):
    worker = start()
    first = run(worker, talking, sounds["one"])

    def refuse(*_, **__):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    second = run(worker, talking, sounds["one"])
    assert known(second) and entries(first) == [] and len(entries(second)) == 1


def test_an_entry_under_the_name_of_another_one_is_not_believed(start, talking, sounds):
    worker = start()
    first, left = run(worker, talking, sounds["one"]), run(worker, talking, sounds["one"], face="left")
    named = entries(first)[0]
    shutil.rmtree(named)
    os.rename(entries(left)[0], named)
    assert not known(run(worker, talking, sounds["two"])) and not named.exists()
