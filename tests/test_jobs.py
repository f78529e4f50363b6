"""The queue and the thread that works on it."""

import errno
import json
import os
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import make_sound, make_video
from small_release import NAME

from latentsync import STAGES, pipeline, store
from latentsync.checkpoints import resolve
from latentsync.errors import UserError
from latentsync.media import COMMENT, probe_video, read_audio, read_frames, read_frames_looped
from latentsync.pipeline import Settings
from latentsync.sampling import DeepCache
from optim.serving import jobs, preview
from optim.serving.job import CANCELLED, DONE, FAILED, Request, kept
from optim.serving.jobs import Worker, interruptible, run_alone
from optim.serving.speeds import Speeds

ME, OTHER = "m" * 24, "o" * 24
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    before = os.environ.get("LATENTSYNC_HOME")
    os.environ["LATENTSYNC_HOME"] = str(tmp_path_factory.mktemp("home"))
    yield
    if before is None:
        del os.environ["LATENTSYNC_HOME"]
    else:
        os.environ["LATENTSYNC_HOME"] = before


@pytest.fixture(scope="module")
def worker(tmp_path_factory, checkpoint, home):
    worker = Worker(tmp_path_factory.mktemp("outputs"), model=str(checkpoint), device="cpu")
    worker.start()
    assert worker.ready.wait(60) and worker.machine, worker.problem
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def long_voice(tmp_path_factory):
    return make_sound(tmp_path_factory.mktemp("voice") / "long.wav", seconds=30)


def ended(worker, job):
    assert worker.wait(job, 120), job
    return job


def compared(job):
    return job.comparison.state not in ("waiting", "running")


def json_of(value):
    return tuple(value) if isinstance(value, tuple) else json.loads(json.dumps(value))


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_job_is_done_and_told(worker, talking, voice):
    job = ended(worker, worker.submit(Request(talking, voice, steps=2), ME, ("mine & yours.mp4", "v.wav")))
    assert job.state == DONE, job.error
    assert job.output.name == "mine___yours-synced.mp4" and probe_video(job.output).n_frames == 20
    view = worker.view(job)
    assert view["report"]["frames"] == 20 and set(view["files"]) == {"original", "result"}
    assert view["timeline"]["stages"].keys() == set(STAGES)
    assert sorted(os.listdir(job.folder)) == sorted(["job.json", job.output.name, "video.mp4", "voice.wav"])
    line, details = worker.describe(job.request, 10)
    assert re.search(r"conservative: 2 steps, model tiny \(64 px\); about \d+ s for this clip\.", line)
    line, details = worker.describe(replace(job.request, level="aggressive", steps=20), None)
    assert "aggressive: 12 steps, two of three reuse earlier work, model" in line
    assert "DeepCache every 3 steps" in details


def test_who_asks_for_no_lip_strength_gets_the_model_s_own(checkpoint, tmp_path):
    model = replace(resolve(str(checkpoint), CPU), guidance_scale=2.25)
    request = Request(tmp_path, tmp_path)
    assert jobs.make_plan(request, model, CPU).settings.guidance_scale == 2.25
    assert jobs.make_plan(replace(request, guidance=1.0), model, CPU).settings.guidance_scale == 1.0


def test_the_curves_are_given_point_by_point(worker):
    until(lambda: len(worker.live()["time"]) >= 3)
    times, since = [], 0.0
    for _ in range(5):
        worker._seen_at = 0  # ask the monitor anew
        live = worker.live(since)
        assert all(len(values) == len(live["time"]) for values in live["curves"].values())
        times += live["time"]
        since = times[-1]
        time.sleep(0.4)
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    assert len(gaps) >= 2 and min(gaps) > 0.01, "in order, and each once"


def test_a_running_job_is_cancelled_within_a_second(worker, talking, long_voice):
    job = worker.submit(Request(talking, long_voice), ME)
    until(lambda: job.part > 0)
    began = time.monotonic()
    worker.cancel(job.id, ME)
    ended(worker, job)
    assert time.monotonic() - began < 1
    assert job.state == CANCELLED and job.output is None
    assert sorted(os.listdir(job.folder)) == ["job.json", "video.mp4", "voice.wav"]


def test_a_long_job_that_is_cancelled_leaves_no_segments(worker, talking, long_voice, monkeypatch):
    lipsync = pipeline.lipsync
    monkeypatch.setattr(pipeline, "lipsync", lambda *args, **options: lipsync(*args, **{"segment_frames": 5} | options))
    job = worker.submit(Request(talking, long_voice, steps=1), ME)
    until(lambda: job.progress.get("writing", 0) > 20)
    worker.cancel(job.id, ME)
    ended(worker, job)
    assert job.state == CANCELLED and sorted(os.listdir(job.folder)) == ["job.json", "video.mp4", "voice.wav"]


def test_what_is_finished_can_be_kept(worker, talking, long_voice):
    job = worker.submit(Request(talking, long_voice, steps=4), ME)
    until(lambda: job.progress.get("writing", 0) > 20 and job.picture)
    worker.cancel(job.id, ME, keep=True)
    ended(worker, job)
    assert job.state == CANCELLED and 20 < probe_video(job.output).n_frames == job.report["frames"] < 750


@pytest.mark.parametrize("keep, words", [(False, "cancelling"), (True, "stopping; what is finished is kept")])
def test_the_first_word_on_how_a_job_ends_holds_and_is_seen(worker, talking, long_voice, monkeypatch, keep, words):
    hold, held, go_on = (threading.Event() for _ in range(3))
    merge = pipeline.merge_faces

    def slow(*args):
        if hold.is_set():
            held.set()
            go_on.wait(60)
        return merge(*args)

    monkeypatch.setattr(pipeline, "merge_faces", slow)
    job = worker.submit(Request(talking, long_voice, steps=1), ME)
    until(lambda: job.progress.get("writing", 0) > 5)
    hold.set()
    assert held.wait(60) and not worker.view(job)["ending"]
    for choice in (keep, not keep):
        worker.cancel(job.id, ME, choice)
        seen = worker.view(job)
        assert (seen["state"], seen["doing"], seen["ending"]) == ("running", words, True)
    go_on.set()
    ended(worker, job)
    assert job.state == CANCELLED and bool(job.output) is keep and not worker.view(job)["ending"]


def test_a_pass_is_ended_in_its_middle(worker, talking, voice):
    ended(worker, worker.submit(Request(talking, voice, steps=1), ME))
    models, asked = worker._models, []

    def check():
        asked.append(None)
        if len(asked) == 20:
            raise KeyError

    x = torch.zeros(1, 3, 64, 64)
    with pytest.raises(KeyError), interruptible(models, check):
        models.vae.encode(x)
    models.vae.encode(x)
    assert len(asked) == 20


def test_a_waiting_job_is_cancelled_at_once_and_the_others_move_up(worker, talking, voice, long_voice):
    first, *rest = (worker.submit(Request(talking, v, steps=2), ME) for v in (long_voice, voice, voice))
    until(lambda: first.state == "running")
    assert [worker.place(job) for job in (first, *rest)] == [None, 1, 2] and worker.load() == (1, 2)
    worker.cancel(rest[0].id, ME)
    assert rest[0].state == CANCELLED and worker.place(rest[1]) == 1
    worker.cancel(first.id, ME)
    assert ended(worker, rest[1]).state == DONE


def test_others_do_not_find_a_job(worker, talking, voice):
    job = ended(worker, worker.submit(Request(talking, voice, steps=1), ME))
    assert job in worker.jobs_of(ME) and worker.jobs_of(OTHER) == []
    for act in (worker.find, worker.cancel, worker.again, worker.remove):
        with pytest.raises(UserError, match="no job"):
            act(job.id, OTHER)
    worker.remove(job.id, ME)
    assert not job.folder.exists() and worker.by_key(job.key) is None


def test_a_failing_job_gets_a_sentence_and_the_next_one_runs(worker, talking, voice, tmp_path, monkeypatch, capfd):
    faceless = make_video(tmp_path / "no face.mp4", seconds=0.4)
    job = ended(worker, worker.submit(Request(faceless, voice, steps=1), ME))
    assert job.state == FAILED and "'no face.mp4' shows no face" in job.error and job.remedy["focus"] == "video"

    def broken(*_, **__):
        raise ZeroDivisionError("by a test")

    with monkeypatch.context() as patch:
        patch.setattr("latentsync.pipeline.lipsync", broken)
        job = ended(worker, worker.submit(Request(talking, voice, steps=1), ME))
    assert job.state == FAILED and "ZeroDivisionError" in job.error and "by a test" in capfd.readouterr().err
    assert ended(worker, worker.again(job.id, ME, level="balanced")).state == DONE


def test_a_job_that_finds_no_memory_says_what_to_try(worker, talking, voice, monkeypatch):
    def starved(*_, **__):
        raise torch.OutOfMemoryError

    def model(name, resolution):
        return {"name": name, "present": resolution is not None, "resolution": resolution}

    def run(**settings):
        with monkeypatch.context() as patch:
            patch.setattr("latentsync.pipeline.lipsync", starved)
            job = ended(worker, worker.submit(Request(talking, voice, **settings), ME))
        assert job.state == FAILED and "is not enough" in job.error and worker._models is None
        return job

    # No level is offered: a run gives up all that levels can before it fails. Nor is the model that it had.
    assert run(level="0.5").remedy is None
    present = {"large": 512, "middle": 256, "tiny": 64, "small": 32, "least": 16, "absent": None}
    smaller = replace(worker.machine, models=tuple(model(*each) for each in present.items()))
    monkeypatch.setattr(worker, "machine", smaller)
    for asked in ("auto", worker.machine.chosen):
        job = run(model=asked)
        assert job.remedy == {"label": "Run again with small", "settings": {"model": "small"}}
    assert jobs.out_of_memory(smaller, replace(worker._ran, resolution=512))[1]["settings"] == {"model": "middle"}
    assert ended(worker, worker.again(job.id, ME, steps=1)).state == DONE


def test_a_gpu_that_has_failed_for_good_ends_its_jobs_with_a_sentence(worker, talking, voice, monkeypatch, capfd):
    def fault(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "empty_cache", fault)  # as every call after such an error
        patch.setattr("latentsync.pipeline.lipsync", fault)
        for _ in range(2):
            job = worker.submit(Request(talking, voice, steps=1), ME)
            until(lambda job=job: job.state == FAILED, 20)
            assert job.ended and job.error == jobs.GPU_FAILED and "start the server again" in job.error
            assert json.loads((job.folder / "job.json").read_text())["state"] == FAILED
    assert ended(worker, worker.again(job.id, ME)).state == DONE
    assert "illegal memory access" in capfd.readouterr().err


def test_a_gpu_that_fails_while_nothing_runs_does_not_end_the_worker(checkpoint, talking, voice, tmp_path, home):
    worker = Worker(tmp_path, model=str(checkpoint), device="cpu", idle_seconds=0.5)
    worker.start()
    ended(worker, worker.submit(Request(talking, voice, steps=1), ME))
    unload, tried = worker._unload, []

    def fault():
        unload()
        tried.append(None)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    worker._unload = fault
    until(lambda: tried, 10)
    worker._unload = unload
    assert ended(worker, worker.submit(Request(talking, voice, steps=1), ME)).state == DONE
    worker.close()


def test_original_and_result_go_side_by_side_once(worker, talking, tmp_path):
    voice = make_sound(tmp_path / "voice.wav", seconds=1.3)  # longer than the video, which goes backward then
    job = ended(worker, worker.submit(Request(talking, voice, steps=1), ME))
    with pytest.raises(UserError, match="no job"):
        worker.compare(job.id, OTHER)
    worker.compare(job.id, ME)
    until(lambda: compared(job))
    assert job.comparison.state == DONE, job.comparison.error
    first, made = job.comparison, probe_video(job.compared)
    result, original = probe_video(job.output), probe_video(job.request.video)
    assert (made.width, made.height, made.n_frames) == (2 * result.width, result.height, 33)
    halves = np.stack(list(read_frames(made)))
    shown = np.stack([frame for _, frame in read_frames_looped(original, 33)])
    painted = np.stack(list(read_frames(result)))
    for half, whole in ((halves[:, :, : result.width], shown), (halves[:, :, result.width :], painted)):
        for n, frame in enumerate(half):  # each is as near to that of its own time as to any
            apart = [np.square(frame.astype(float) - other).mean() for other in whole]
            assert apart[n] < min(1.2 * min(apart), 30)
    heard, wanted = read_audio(job.compared), read_audio(job.output)
    assert abs(len(heard) - len(wanted)) < 700 and np.corrcoef(heard[:20000], wanted[:20000])[0, 1] > 0.99
    assert COMMENT.encode() in job.compared.read_bytes()
    assert worker.view(job)["files"]["compared"].endswith("/talking-side-by-side.mp4")
    assert worker.compare(job.id, ME).comparison is first, "what is there is not made again"
    assert not list(job.folder.glob("*partial*"))


def test_a_comparison_can_be_ended_and_says_what_went_wrong(worker, talking, voice, monkeypatch):
    import moviepy

    waiting = Worker(worker.folder / "other").submit(Request(talking, voice), ME)
    worker._jobs[waiting.id] = waiting
    with pytest.raises(UserError, match="no result yet"):
        worker.compare(waiting.id, ME)
    worker._forget(waiting)
    job = ended(worker, worker.submit(Request(talking, voice, steps=1), ME))
    before = sorted(os.listdir(job.folder))
    with worker._comparing:  # another's is being made
        worker.compare(job.id, ME)
        time.sleep(0.1)
        assert job.comparison.view()["state"] == "waiting" and worker.compare(job.id, ME).comparison.total == 0
        worker.cancel(job.id, ME)
        until(lambda: compared(job))
    assert job.comparison.state == CANCELLED and job.state == DONE and sorted(os.listdir(job.folder)) == before

    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(moviepy.VideoClip, "write_videofile", full)
        worker.compare(job.id, ME)
        until(lambda: compared(job))
    assert "No space left on device" in job.comparison.error and sorted(os.listdir(job.folder)) == before
    worker.compare(job.id, ME)
    worker.remove(job.id, ME)  # in the middle of it
    until(lambda: compared(job) and not job.folder.exists())


def test_a_new_server_finds_the_jobs_of_one_that_is_gone(worker, talking, voice, tmp_path, monkeypatch):
    done = ended(worker, worker.submit(Request(talking, voice, steps=1), ME, ("mine.mp4", "v.wav")))
    assert list(kept(worker.folder)) == [], "their own server still runs"
    before = Worker(tmp_path)  # not started: what is put in waits
    shutil.copytree(done.folder, tmp_path / done.folder.name)
    waiting, half = before.submit(Request(talking, voice, steps=1), ME), before.submit(Request(talking, voice), ME)
    half.request.audio.unlink()
    for name in ("first.mp4", ".latentsync-0123.mp4", "talking-side-by-side.partial.mp4"):
        (waiting.folder / name).touch()
    text = (waiting.folder / "job.json").read_text()
    assert ME not in text and '"waiting"' in text
    for name, words in (("a", "{"), ("b", "{}"), ("c", '{"server": {"pid": 1, "began": 0}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.json").write_text(words)
    monkeypatch.setattr("optim.serving.job._still_runs", lambda _: False)
    after = Worker(tmp_path, model=worker.model, device="cpu")
    after.start()
    again, found = after.jobs_of(ME)
    assert (found.state, found.id, found.names) == (DONE, done.id, ("mine.mp4", "v.wav")) and found.output.is_file()
    assert found.key != done.key and after.by_key(found.key) is found and after.jobs_of(OTHER) == []
    then, now = worker.view(done), after.view(found)
    assert {k: v for k, v in now.items() if k != "files"} == {k: json_of(v) for k, v in then.items() if k != "files"}
    assert (again.state, again.id) == (FAILED, waiting.id) and "ended before this job did" in again.error
    assert sorted(os.listdir(again.folder)) == ["job.json", "video.mp4", "voice.wav"]
    assert not half.folder.exists() and all((tmp_path / name).is_dir() for name in "abc")
    assert ended(after, after.again(again.id, ME)).state == DONE
    after.close()


def test_a_job_that_the_end_of_its_server_ended_can_be_run_again(
    checkpoint, talking, long_voice, tmp_path, home, monkeypatch
):
    worker = Worker(tmp_path, model=str(checkpoint), device="cpu")
    worker.start()
    job = worker.submit(Request(talking, long_voice, steps=4), ME)
    until(lambda: job.part > 0)
    worker.close()
    monkeypatch.setattr("optim.serving.job._still_runs", lambda _: False)
    (found,) = kept(tmp_path)
    assert (found.id, found.state) == (job.id, FAILED) and "run it again" in found.error
    assert sorted(os.listdir(found.folder)) == ["job.json", "video.mp4", "voice.wav"]


@pytest.mark.parametrize("which", ["video", "audio"])
def test_files_that_cannot_be_used_are_refused_by_the_user_s_name_for_them(worker, talking, voice, tmp_path, which):
    (tmp_path / "x1").write_text("this is neither\n" * 50)
    files = {"video": talking, "audio": voice} | {which: tmp_path / "x1"}
    before = set(worker.folder.iterdir())
    with pytest.raises(UserError, match="'my file.mp4' is not a"):
        worker.submit(Request(**files), ME, ("my file.mp4", "my file.mp4"))
    assert set(worker.folder.iterdir()) == before


def test_a_full_disk_is_said_and_leaves_nothing(talking, voice, tmp_path, monkeypatch, capfd):
    worker = Worker(tmp_path / "outputs")  # not started: what is put in waits
    copyfile = shutil.copyfile

    def full(source, target, **options):
        if Path(target).stem == "voice":
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return copyfile(source, target, **options)

    kept = worker.submit(Request(talking, voice), ME)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        for submit in (lambda: worker.submit(Request(talking, voice), ME), lambda: worker.again(kept.id, ME)):
            with pytest.raises(UserError, match="the disk is full.*: remove jobs") as caught:
                submit()
            assert str(tmp_path) not in str(caught.value) and str(tmp_path) in capfd.readouterr().err
    assert os.listdir(worker.folder) == [kept.folder.name]
    kept.request.audio.unlink()
    with pytest.raises(UserError, match="'voice.wav' is not on this server any more: give it again"):
        worker.again(kept.id, ME)
    shutil.rmtree(worker.folder)
    worker.folder.touch()  # where no folder can be
    with pytest.raises(UserError, match="cannot be kept"):
        worker.submit(Request(talking, voice), ME)


def test_limits_are_said(talking, long_voice, voice, tmp_path):
    worker = Worker(tmp_path, queue_size=1, max_seconds=20)  # not started: what is put in waits
    with pytest.raises(UserError, match="lasts 30 s, and this server takes 20 s"):
        worker.submit(Request(talking, long_voice), ME)
    worker.submit(Request(talking, voice), ME)
    with pytest.raises(UserError, match="queue is full"):
        worker.submit(Request(talking, voice), ME)


def test_the_model_stays_between_jobs_and_is_let_go_after_a_while(checkpoint, talking, voice, tmp_path, home):
    worker = Worker(tmp_path, model=str(checkpoint), device="cpu", idle_seconds=1.0, keep_hours=0.0003)
    worker.start()
    ended(worker, worker.submit(Request(talking, voice, steps=1), ME))
    models = worker._models
    assert ended(worker, worker.submit(Request(talking, voice, steps=1, level="1"), ME)).state == DONE
    assert worker._models is models is not None
    until(lambda: worker._models is None, 10)
    until(lambda: os.listdir(tmp_path) == [], 10)  # old results go, too
    assert worker.jobs_of(ME) == []
    worker.close()
    assert "jobs" not in [thread.name for thread in threading.enumerate() if thread is worker._thread]


def test_a_worker_that_lets_the_model_go_at_once_does_not_spin_and_sweeps_while_it_is_busy(
    checkpoint, talking, voice, tmp_path, home, monkeypatch
):
    worker, rounds = Worker(tmp_path, model=str(checkpoint), device="cpu", idle_seconds=0, keep_hours=1e-9), []
    sweep = worker._sweep
    monkeypatch.setattr(worker, "_sweep", lambda: rounds.append(len(worker._waiting)) or sweep())
    worker.start()
    assert worker.ready.wait(60)
    time.sleep(2.5)
    assert 1 <= len(rounds) <= 4
    jobs_ = [worker.submit(Request(talking, voice, steps=1), ME) for _ in range(3)]
    until(lambda: not jobs_[0].folder.exists())
    assert jobs_[2].state != DONE, "the first is swept while others wait or run"
    worker.close()


def test_the_list_has_all_jobs_that_have_not_ended(talking, voice, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "KEPT_JOBS", 1)
    worker = Worker(tmp_path)
    first, *others, last = (worker.submit(Request(talking, voice), ME) for _ in range(5))
    for job in others:
        worker.cancel(job.id, ME)
    assert worker.jobs_of(ME) == [last, others[-1], first]


def test_the_jobs_are_changed_under_the_lock_and_what_is_shown_is_not_changed(worker, talking, voice, tmp_path):
    job = ended(worker, worker.submit(Request(talking, voice, steps=1), ME))
    shown, before = job.timeline, json.dumps(job.timeline)
    worker._keep_timeline(job)
    assert job.timeline is not shown and json.dumps(shown) == before
    with worker._lock:  # somebody counts them
        removing = threading.Thread(target=worker.remove, args=(job.id, ME))
        removing.start()
        removing.join(0.3)
        assert job.id in worker._jobs
    removing.join()
    assert job.id not in worker._jobs
    other = Worker(tmp_path)
    early = other.submit(Request(talking, voice), ME)  # the page may be used before its worker starts
    other._thread = threading.Thread()
    with other._lock:
        starting = threading.Thread(target=other.start)
        starting.start()
        starting.join(0.3)
        assert starting.is_alive()
    starting.join()
    assert list(other._jobs.values()) == [early]


def test_results_that_cannot_be_read_are_said(tmp_path):
    (tmp_path / "outputs").mkdir()
    worker = Worker(tmp_path / "outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "kept", lambda folder: os.scandir(folder / "secret"))
        with pytest.raises(UserError, match="outputs' cannot be read .*--outputs"):
            worker.start()


@pytest.mark.parametrize("stuck", [False, True])
def test_a_preview_that_cannot_keep_up_holds_no_run_up(monkeypatch, tmp_path, stuck):
    go_on, shown = threading.Event(), []

    def write_fragments(*_):
        while True:
            frame = yield
            if shown:  # the first is taken at once, so that it is known that it begins
                go_on.wait(60)
            if frame is not None:
                shown.append(int(frame[0, 0, 0]))

    monkeypatch.setattr(preview, "write_fragments", write_fragments)
    monkeypatch.setattr(preview, "STUCK_SECONDS", 0.5)
    job = jobs.Job(Request(Path("video"), Path("voice")), "me", tmp_path, ("a", "b"), (16, 16), 9.0)
    taking = preview.Preview(job)
    began = time.monotonic()
    for number in range(200):
        taking(np.full((16, 16, 3), number, np.uint8))
    if not stuck:
        go_on.set()
        until(lambda: taking._given.empty())
        taking(np.full((16, 16, 3), 200, np.uint8))
    taking.close()
    assert time.monotonic() - began < 5
    if not stuck:
        assert len(shown) == 201 and shown[:10] == list(range(10)) and shown[-1] == 200, "the sound stays in step"
    go_on.set()
    taking._thread.join(10)
    assert not taking._thread.is_alive()


def test_speeds_are_remembered_and_scaled_by_the_work(tmp_path):
    speeds = Speeds(tmp_path / "deep" / "speeds.json")
    full, half = Settings(steps=20), Settings(steps=10)
    assert speeds.estimate("demo, here", full, 100) is None
    speeds.record("demo, here", full, 50, 100.0)
    again = Speeds(tmp_path / "deep" / "speeds.json")
    assert again.estimate("demo, here", full, 100) == (200.0, True)
    assert again.estimate("demo, here", half, 100) == (100.0, False)
    assert again.estimate("demo, there", full, 100) is None
    cached = Settings(steps=20, cache=DeepCache(2, 0))
    assert Speeds.work(half) < Speeds.work(cached) < Speeds.work(full)
    (tmp_path / "broken").write_text("[")
    assert Speeds(tmp_path / "broken").estimate("demo, here", full, 1) is None


def test_a_gpu_that_is_lent_runs_the_job_in_one_call(checkpoint, talking, voice, tmp_path, home):
    calls = []

    def lent(request: Request, output: Path, model: str):
        calls.append(model)
        return run_alone(request, output, model)

    worker = Worker(tmp_path, model=str(checkpoint), lent=lent)
    worker.start()
    job = ended(worker, worker.submit(Request(talking, voice, steps=1), ME))
    assert job.state == DONE, job.error
    assert calls == [str(checkpoint)] and probe_video(job.output).n_frames == 20
    worker.close()


def test_where_a_gpu_is_lent_the_best_model_that_is_here_runs(hub, talking, voice, tmp_path, monkeypatch):
    calls = []
    worker = Worker(tmp_path, lent=lambda request, output, model: calls.append(model) or {"ended_early": False})
    worker.start()
    assert worker.ready.wait(60) and worker.machine.chosen == "demo", worker.problem
    store.get(NAME)
    worker.look_for_models()
    assert worker.machine.chosen == NAME
    monkeypatch.setattr("optim.accelerate.windows_for", lambda _: 4)
    line, details = worker.describe(Request(talking, voice), 10)
    assert f"model {NAME} (64 px), on a GPU lent for each job." in line and details == "conservative: 20 steps."
    assert ended(worker, worker.submit(Request(talking, voice), ME)).state == DONE and calls == [NAME]
    assert "demo" in worker.describe(Request(talking, voice, model="demo"), 10)[0]
    worker.close()


def test_a_job_on_a_gpu_that_is_lent_does_not_claim_to_be_cancelled(checkpoint, talking, voice, tmp_path, home):
    go_on = threading.Event()
    worker = Worker(tmp_path, model=str(checkpoint), lent=lambda *_: go_on.wait(60) and {"ended_early": False})
    worker.start()
    job = worker.submit(Request(talking, voice, steps=1), ME)
    until(lambda: job.state == "running")
    with pytest.raises(UserError, match="wait until it is done"):
        worker.cancel(job.id, ME)
    assert not worker.view(job)["ending"]
    go_on.set()
    assert ended(worker, job).state == DONE
    worker.close()
