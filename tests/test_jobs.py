"""The queue and the thread that works on it."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import ffmpeg, make_sound, make_video
from small_release import NAME

from latentsync import STAGES, painting, pipeline
from latentsync.checkpoints import store
from latentsync.checkpoints.find import resolve_model
from latentsync.errors import UserError
from latentsync.media import COMMENT, VideoWriter, probe_video, read_audio, read_frames, read_frames_looped, segments
from latentsync.settings import DeepCache, Settings
from optim.monitor import History
from optim.serving import comparison, execution, inputs, preview
from optim.serving.job import CANCELLED, DONE, FAILED, Job, Request
from optim.serving.limits import VisitorLimits
from optim.serving.records import load_jobs
from optim.serving.run import interruptible, make_plan, out_of_memory, run_alone
from optim.serving.speeds import Speeds
from optim.serving.worker import Worker

ME, OTHER = "m" * 24, "o" * 24
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


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


def wake(worker):
    """Let the threads of a worker look whether there is something to do."""
    with worker.store.changed:
        worker.store.changed.notify_all()


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_finished_job_has_its_result_and_its_report(worker, talking, voice):
    job = ended(worker, worker.submit(Request(talking, voice, steps=2), ME, ("mine & yours.mp4", "v.wav")))
    assert job.state == DONE, job.error
    assert job.output.name == "mine___yours-synced.mp4" and probe_video(job.output).n_frames == 20
    view = job.view(worker.store.place(job))
    assert view["report"]["frames"] == 20 and set(view["files"]) == {"original", "result"}
    assert view["timeline"]["stages"].keys() == set(STAGES)
    assert sorted(os.listdir(job.folder)) == sorted(["job.json", job.output.name, "video.mp4", "voice.wav"])
    line, details, _ = worker.describe(job.request, 10)
    assert re.search(r"conservative: 2 steps, model tiny \(64 px\); (about )?\d[\d a-z]* for this clip\.", line)
    line, details, _ = worker.describe(replace(job.request, level="aggressive", steps=20), None)
    assert "aggressive: 12 steps, two of three reuse earlier work, model" in line
    assert "DeepCache every 3 steps" in details


def test_guidance_defaults_to_the_model_s_own(checkpoint, tmp_path):
    model = replace(resolve_model(str(checkpoint), CPU), guidance_scale=2.25)
    request = Request(tmp_path, tmp_path)
    assert make_plan(request, model, CPU).settings.guidance_scale == 2.25
    assert make_plan(replace(request, guidance=1.0), model, CPU).settings.guidance_scale == 1.0


def test_each_sample_of_the_curves_is_sent_once(worker):
    def sampled() -> list[float]:
        return worker.monitor.snapshot().time.round(2).tolist()

    times, since = [], 0.0
    for _ in range(3):
        until(lambda: sampled() and sampled()[-1] > since)  # noqa: B023
        worker._history = None  # ask the monitor anew
        live = worker.live(since)
        assert live["time"] and all(len(values) == len(live["time"]) for values in live["curves"].values())
        times += live["time"]
        since = times[-1]
    first = sampled().index(times[0])
    assert times == sampled()[first : first + len(times)], "in order, and each once"


def test_waiting_jobs_change_places_with_their_owner_s_others_only(talking, voice, tmp_path):
    worker = Worker(tmp_path)
    first, foreign, second, third = (
        worker.submit(Request(talking, voice), visitor) for visitor in (ME, "another visitor", ME, ME)
    )
    worker.store.move(third, earlier=True)
    worker.store.move(third, earlier=True)
    worker.store.move(first, earlier=False)
    worker.store.move(third, earlier=True)  # it is the first already
    assert list(worker.store.waiting) == [third, foreign, second, first]
    after = Worker(tmp_path)
    for place in tmp_path.iterdir():  # as if this process had ended
        record = json.loads((place / "job.json").read_text())
        (place / "job.json").write_text(json.dumps(record | {"server": {"pid": 2**22 + 1, "began": 0}}))
    after.store.load()
    assert [job.id for job in after.store.waiting] == [job.id for job in (third, foreign, second, first)]
    worker.remove(second.id, ME)
    assert list(worker.store.waiting) == [third, foreign, first] and not second.folder.exists()
    worker.store.take_next()
    with pytest.raises(UserError, match="does not wait any more"):
        worker.store.move(third, earlier=True)
    with pytest.raises(UserError, match="not ended yet"):
        worker.remove(third.id, ME)


def test_a_running_job_is_cancelled_at_once(worker, talking, long_voice):
    job = worker.submit(Request(talking, long_voice), ME)
    until(lambda: job.partial_frames > 0)
    worker.cancel(job.id, ME)
    painted = job.progress["mouths"]
    ended(worker, job)
    assert job.progress["mouths"] <= painted + 1, "a call of the pipeline may have been under way"
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


def test_a_cancelled_job_can_keep_its_finished_frames(worker, talking, long_voice):
    job = worker.submit(Request(talking, long_voice, steps=4), ME)
    until(lambda: job.progress.get("writing", 0) > 20 and job.picture is not None)
    worker.cancel(job.id, ME, keep=True)
    ended(worker, job)
    assert job.state == CANCELLED and 20 < probe_video(job.output).n_frames == job.report["frames"] < 750


@pytest.mark.parametrize("keep, words", [(False, "cancelling"), (True, "stopping; what is finished is kept")])
def test_the_first_cancel_decides_what_is_kept_and_is_visible(worker, talking, long_voice, monkeypatch, keep, words):
    hold, held, go_on = (threading.Event() for _ in range(3))
    merge = painting.merge_faces

    def slow(*args):
        if hold.is_set():
            held.set()
            go_on.wait(60)
        return merge(*args)

    monkeypatch.setattr(painting, "merge_faces", slow)
    job = worker.submit(Request(talking, long_voice, steps=1), ME)
    until(lambda: job.progress.get("writing", 0) > 5)
    hold.set()
    assert held.wait(60) and not job.view(worker.store.place(job))["ending"]
    for choice in (keep, not keep):
        worker.cancel(job.id, ME, choice)
        seen = job.view(worker.store.place(job))
        assert (seen["state"], seen["doing"], seen["ending"]) == ("running", words, True)
    go_on.set()
    ended(worker, job)
    assert job.state == CANCELLED and bool(job.output) is keep and not job.view(worker.store.place(job))["ending"]


def test_a_pass_on_a_processor_is_interrupted_in_its_middle(worker, talking, voice):
    ended(worker, worker.submit(Request(talking, voice, steps=1), ME))
    models, asked = worker.runner.models, []

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
    assert [worker.store.place(job) for job in (first, *rest)] == [None, 1, 2] and worker.store.load_counts() == (1, 2)
    worker.cancel(rest[0].id, ME)
    assert rest[0].state == CANCELLED and worker.store.place(rest[1]) == 1
    worker.cancel(first.id, ME)
    assert ended(worker, rest[1]).state == DONE


def test_others_do_not_find_a_job(worker, talking, voice):
    job = ended(worker, worker.submit(Request(talking, voice, steps=1), ME))
    assert job in worker.store.jobs_of(ME) and worker.store.jobs_of(OTHER) == []
    for act in (worker.store.find, worker.cancel, worker.again, worker.remove):
        with pytest.raises(UserError, match="no job"):
            act(job.id, OTHER)
    worker.remove(job.id, ME)
    assert not job.folder.exists() and worker.store.by_key(job.key) is None


def test_a_failed_job_says_why_and_the_next_one_runs(worker, talking, voice, tmp_path, monkeypatch, caplog):
    faceless = make_video(tmp_path / "no face.mp4", seconds=0.4)
    job = ended(worker, worker.submit(Request(faceless, voice, steps=1), ME))
    assert job.state == FAILED and "'no face.mp4' shows no face" in job.error and job.remedy["focus"] == "video"

    def broken(*_, **__):
        raise ZeroDivisionError("by a test")

    with monkeypatch.context() as patch:
        patch.setattr("latentsync.pipeline.lipsync", broken)
        job = ended(worker, worker.submit(Request(talking, voice, steps=1), ME))
    assert job.state == FAILED and "ZeroDivisionError" in job.error and "by a test" in caplog.text
    assert ended(worker, worker.again(job.id, ME, level="balanced")).state == DONE


def test_a_job_out_of_memory_suggests_a_remedy(worker, talking, voice, monkeypatch):
    def starved(*_, **__):
        raise torch.OutOfMemoryError

    def model(name, resolution):
        return {"name": name, "present": resolution is not None, "resolution": resolution}

    def run(**settings):
        with monkeypatch.context() as patch:
            patch.setattr("latentsync.pipeline.lipsync", starved)
            job = ended(worker, worker.submit(Request(talking, voice, **settings), ME))
        assert job.state == FAILED and "is not enough" in job.error and worker.runner.models is None
        return job

    # No level is offered: a run gives up all that levels can before it fails. Nor is the model that it had.
    assert run(level="0.5").remedy is None
    present = {"large": 512, "middle": 256, "tiny": 64, "small": 32, "least": 16, "absent": None}
    smaller = replace(worker.machine, models=tuple(model(*each) for each in present.items()))
    monkeypatch.setattr(worker, "machine", smaller)
    for asked in ("auto", worker.machine.chosen):
        job = run(model=asked)
        assert job.remedy == {"label": "Run again with small", "settings": {"model": "small"}}
    large = replace(worker._find_checkpoint(job.request), resolution=512)
    assert out_of_memory(smaller, large)[1]["settings"] == {"model": "middle"}
    assert ended(worker, worker.again(job.id, ME, steps=1)).state == DONE


def test_jobs_on_a_gpu_that_has_failed_say_so(worker, talking, voice, monkeypatch, caplog):
    def fault(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "empty_cache", fault)  # as every call after such an error
        patch.setattr("latentsync.pipeline.lipsync", fault)
        for _ in range(2):
            job = worker.submit(Request(talking, voice, steps=1), ME)
            until(lambda job=job: job.state == FAILED)
            assert job.ended and job.error == execution.GPU_FAILED and "start the server again" in job.error
            assert json.loads((job.folder / "job.json").read_text())["state"] == FAILED
    assert ended(worker, worker.again(job.id, ME)).state == DONE
    assert "illegal memory access" in caplog.text


def test_a_gpu_that_fails_while_nothing_runs_does_not_end_the_worker(checkpoint, talking, voice, tmp_path, home):
    worker = Worker(tmp_path, model=str(checkpoint), device="cpu", idle_seconds=0.5)
    worker.start()
    ended(worker, worker.submit(Request(talking, voice, steps=1), ME))
    unload, tried = worker.runner.unload, []

    def fault():
        unload()
        tried.append(None)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    worker.runner.unload = fault
    until(lambda: tried)
    worker.runner.unload = unload
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
    assert job.view(worker.store.place(job))["files"]["compared"].endswith("/talking-side-by-side.mp4")
    assert worker.compare(job.id, ME).comparison is first, "what is there is not made again"
    assert not list(job.folder.glob("*partial*"))


def test_a_comparison_can_be_cancelled_and_says_why_it_failed(worker, talking, voice):
    waiting = Worker(worker.folder / "other").submit(Request(talking, voice), ME)
    worker.store.jobs[waiting.id] = waiting
    with pytest.raises(UserError, match="no result yet"):
        worker.compare(waiting.id, ME)
    worker.store.remove(waiting)
    job = ended(worker, worker.submit(Request(talking, voice, steps=1), ME))
    before = sorted(os.listdir(job.folder))
    with comparison._one_at_a_time:  # another's is being made
        worker.compare(job.id, ME)
        time.sleep(0.1)
        assert job.comparison.view()["state"] == "waiting" and worker.compare(job.id, ME).comparison.total == 0
        worker.cancel(job.id, ME)
        until(lambda: compared(job))
    assert job.comparison.state == CANCELLED and job.state == DONE and sorted(os.listdir(job.folder)) == before

    job.compared.with_suffix(".partial.mp4").symlink_to("/dev/full")
    worker.compare(job.id, ME)
    until(lambda: compared(job))
    assert "No space left on device" in job.comparison.error and sorted(os.listdir(job.folder)) == before
    worker.compare(job.id, ME)
    worker.remove(job.id, ME)  # in the middle of it
    until(lambda: compared(job) and not job.folder.exists())


def test_a_new_server_finds_the_jobs_of_one_that_is_gone(worker, talking, voice, tmp_path, monkeypatch):
    done = ended(worker, worker.submit(Request(talking, voice, steps=1), ME, ("mine.mp4", "v.wav")))
    assert list(load_jobs(worker.folder)) == [], "their own server still runs"
    before = Worker(tmp_path)  # not started: jobs wait
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
    monkeypatch.setattr("optim.serving.records._is_running", lambda _: False)
    after = Worker(tmp_path, model=worker.model, device="cpu")
    after.start()
    again, found = after.store.jobs_of(ME)
    assert (found.state, found.id, found.names) == (DONE, done.id, ("mine.mp4", "v.wav")) and found.output.is_file()
    assert found.key != done.key and after.store.by_key(found.key) is found and after.store.jobs_of(OTHER) == []
    then, now = done.view(worker.store.place(done)), found.view(after.store.place(found))
    assert {k: v for k, v in now.items() if k != "files"} == {k: json_of(v) for k, v in then.items() if k != "files"}
    assert again.id == waiting.id and ended(after, again).state == DONE, "it waited, and waited again"
    assert sorted(os.listdir(again.folder)) == sorted(["job.json", again.output.name, "video.mp4", "voice.wav"])
    assert not half.folder.exists() and all((tmp_path / name).is_dir() for name in "abc")
    after.close()


def test_a_request_chooses_among_the_tracks_of_its_files(worker, talking, voice, tmp_path):
    sounds, videos = tmp_path / "sounds.mka", tmp_path / "videos.mkv"
    short = make_sound(tmp_path / "short.wav", seconds=0.4)
    ffmpeg("-i", voice, "-i", short, "-map", "0:a", "-map", "1:a", "-c", "copy", sounds)
    small = make_video(tmp_path / "small.mp4", size="64x48", seconds=0.4)
    ffmpeg("-i", talking, "-i", small, "-map", "0:v", "-map", "1:v", "-c", "copy", videos)
    job = ended(worker, worker.submit(Request(talking, sounds, steps=1, audio_track=2), ME))
    assert job.state == DONE and (job.frames, job.report["frames"], probe_video(job.output).n_frames) == (10, 10, 10)
    waiting = Worker(tmp_path / "outputs")  # not started
    assert waiting.submit(Request(talking, sounds), ME).frames == 20
    job = waiting.submit(Request(videos, sounds, video_track=2, audio_track=1), ME)
    assert (job.size, job.frames) == ((64, 48), 20)
    again = waiting.again(job.id, ME, video_track=1, audio_track=2)
    assert again.size == (probe_video(talking).width, probe_video(talking).height) and again.frames == 10
    with pytest.raises(UserError, match="'mine.mka' .*3"):
        waiting.submit(Request(talking, sounds, audio_track=3), ME, ("a.mp4", "mine.mka"))


@pytest.mark.parametrize("track", [0, -1, 1.0, True, "1"])
@pytest.mark.parametrize("name", ["video_track", "audio_track"])
def test_a_track_is_a_whole_number_from_1(talking, voice, name, track):
    with pytest.raises(UserError, match="track cannot be .*: give a whole number of at least 1"):
        Request(talking, voice, **{name: track})


@pytest.mark.parametrize("which", ["video", "audio"])
def test_files_that_cannot_be_used_are_refused_by_the_user_s_name_for_them(worker, talking, voice, tmp_path, which):
    (tmp_path / "x1").write_text("this is neither\n" * 50)
    files = {"video": talking, "audio": voice} | {which: tmp_path / "x1"}
    before = set(worker.folder.iterdir())
    with pytest.raises(UserError, match="'my file.mp4' is not a"):
        worker.submit(Request(**files), ME, ("my file.mp4", "my file.mp4"))
    assert set(worker.folder.iterdir()) == before


def test_a_full_disk_is_reported_and_leaves_nothing(talking, voice, tmp_path, monkeypatch, caplog):
    worker = Worker(tmp_path / "outputs")  # not started: jobs wait
    store_file = inputs.store_file

    def full(source, target, stored):
        if Path(target).stem == "voice":
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return store_file(source, target, stored)

    kept = worker.submit(Request(talking, voice), ME)
    with monkeypatch.context() as patch:
        patch.setattr(inputs, "store_file", full)
        for submit in (lambda: worker.submit(Request(talking, voice), ME), lambda: worker.again(kept.id, ME)):
            with pytest.raises(UserError, match="the disk is full.*: remove jobs") as caught:
                submit()
            assert str(tmp_path) not in str(caught.value) and str(tmp_path) in caplog.text
    assert os.listdir(worker.folder) == [kept.folder.name]
    kept.request.audio.unlink()
    with pytest.raises(UserError, match="'voice.wav' is not on this server any more: give it again"):
        worker.again(kept.id, ME)
    shutil.rmtree(worker.folder)
    worker.folder.touch()  # where no folder can be
    with pytest.raises(UserError, match="cannot be kept"):
        worker.submit(Request(talking, voice), ME)


def test_inputs_are_stored_once_and_belong_to_their_jobs(talking, voice, tmp_path):
    upload = Path(shutil.copy(talking, tmp_path / "upload.mp4"))
    sent_again = Path(shutil.copy(talking, tmp_path / "upload too.mp4"))
    same_size = tmp_path / "other.mp4"
    content = bytearray(talking.read_bytes())
    content[-1] ^= 1  # in its last box, which nothing needs
    same_size.write_bytes(content)
    worker = Worker(tmp_path / "outputs")
    first = worker.submit(Request(upload, voice), ME)
    others = [worker.submit(Request(upload, voice), ME), worker.submit(Request(sent_again, voice), OTHER)]
    others.append(worker.again(first.id, ME, steps=4))
    other = worker.submit(Request(same_size, voice), ME)
    for upload_ in (upload, sent_again, same_size):
        upload_.unlink()  # their names are not needed any more
    for job in others:
        assert job.request.video.samefile(first.request.video) and job.request.audio.samefile(first.request.audio)
    assert other.request.video.read_bytes() == content and first.request.video.read_bytes() == talking.read_bytes()
    folders = [job.folder for job in (first, *others, other)]
    records = sum((folder / "job.json").stat().st_size for folder in folders)
    assert inputs.stored_bytes(folders) == records + 2 * len(content) + voice.stat().st_size
    for job in (first, *others[:2]):
        worker.cancel(job.id, OTHER if job is others[1] else ME)
        worker.remove(job.id, OTHER if job is others[1] else ME)
    assert others[2].request.video.read_bytes() == talking.read_bytes()


def test_where_there_are_no_hard_links_inputs_are_copied(talking, voice, tmp_path, monkeypatch):
    def another_file_system(*_, **__):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", another_file_system)
    job = Worker(tmp_path / "outputs").submit(Request(talking, voice), ME)
    assert not job.request.video.samefile(talking) and job.request.video.read_bytes() == talking.read_bytes()


def test_the_length_of_sound_and_queue_is_limited(talking, long_voice, voice, tmp_path):
    worker = Worker(tmp_path, queue_size=1, max_seconds=20)  # not started: jobs wait
    with pytest.raises(UserError, match="sound in 'long.wav' lasts more than 20 s; cut it"):
        worker.submit(Request(talking, long_voice), ME)
    worker.submit(Request(talking, voice), ME)
    with pytest.raises(UserError, match="queue is full"):
        worker.submit(Request(talking, voice), ME)


def test_a_visitor_has_limits_that_others_do_not_feel(talking, voice, tmp_path):
    request, size = Request(talking, voice), talking.stat().st_size + voice.stat().st_size
    worker = Worker(tmp_path / "a", limits=VisitorLimits(unfinished_jobs=2, jobs=3))
    first, second = (worker.submit(request, ME) for _ in range(2))
    with pytest.raises(UserError, match="You have 2 jobs that wait or run, .* 2 of a visitor: wait until"):
        worker.submit(request, ME)
    worker.submit(request, OTHER)
    worker.cancel(first.id, ME), worker.cancel(second.id, ME)
    worker.cancel(worker.submit(request, ME).id, ME)
    for submit in (lambda: worker.submit(request, ME), lambda: worker.again(first.id, ME)):
        with pytest.raises(UserError, match="You have 3 jobs here, .* keeps 3 of a visitor: remove those"):
            submit()
    worker.remove(first.id, ME)
    assert worker.submit(request, ME)
    worker = Worker(tmp_path / "b", limits=VisitorLimits(stored_bytes=size + 20_000))
    for _ in range(3):  # they share their inputs
        worker.submit(request, ME)
    louder = make_sound(tmp_path / "louder.wav", seconds=3)
    before = sorted(os.listdir(tmp_path / "b"))
    with pytest.raises(UserError, match=r"Your files here take [\d.e-]+ GB, .* of a visitor: remove jobs"):
        worker.submit(Request(talking, louder), ME)
    assert sorted(os.listdir(tmp_path / "b")) == before
    worker.submit(request, OTHER)
    worker = Worker(tmp_path / "c", limits=VisitorLimits(total_bytes=size))
    with pytest.raises(UserError, match="The jobs of this server take"):  # with what is written of it
        worker.submit(request, ME), worker.submit(request, OTHER)


@pytest.mark.parametrize(
    "options",
    [{"queue_size": -3}, {"queue_size": 0}, {"queue_size": 2.5}, {"queue_size": True}, {"max_seconds": float("nan")},
     {"max_seconds": 0}, {"max_seconds": "60"}, {"keep_hours": -1}, {"keep_hours": float("inf")},
     {"idle_seconds": float("nan")}, {"idle_seconds": -1}, {"idle_seconds": None}],
)  # fmt: skip
def test_options_out_of_range_are_refused(tmp_path, options):
    with pytest.raises(UserError, match=r"^The .* cannot be .*: give a (whole )?number of at least .*\.$"):
        Worker(tmp_path, **options)


@pytest.mark.parametrize(
    "limits", [{"jobs": 0}, {"unfinished_jobs": -1}, {"stored_bytes": float("nan")}, {"total_bytes": 1e9}]
)
def test_limits_out_of_range_are_refused(limits):
    with pytest.raises(UserError, match="The limit .* give a whole number of at least 1"):
        VisitorLimits(**limits)


# ---- jobs that resume


@pytest.fixture
def short_segments(monkeypatch):
    """Segments of five frames in place of a minute's."""
    lipsync = pipeline.lipsync
    monkeypatch.setattr(pipeline, "lipsync", lambda *args, **options: lipsync(*args, segment_frames=5, **options))


@pytest.fixture
def next_server(tmp_path, checkpoint, home, monkeypatch):
    """Starts a server on the outputs of those before it, which this process has been, too."""
    monkeypatch.setattr("optim.serving.records._is_running", lambda _: False)
    started = []

    def start():
        started.append(Worker(tmp_path / "outputs", model=str(checkpoint), device="cpu"))
        started[-1].start()
        return started[-1]

    yield start
    for worker in started:
        worker.close()


def states(folder: Path) -> list[str]:
    return [json.loads((path / "job.json").read_text())["state"] for path in sorted(folder.iterdir())]


def test_the_next_server_resumes_jobs_in_their_order(talking, long_voice, voice, next_server, short_segments):
    before = next_server()
    job = before.submit(Request(talking, long_voice, steps=1), ME, ("long.mp4", "v.wav"))
    waiting = [before.submit(Request(talking, voice, steps=steps), ME) for steps in (3, 2, 1)]
    until(lambda: job.progress.get("writing", 0) > 12)
    before.close()
    assert job.state == "waiting" and sorted(states(before.folder)) == ["waiting"] * 4
    assert len(list(job.folder.glob(".latentsync-*/0000*.mp4"))) >= 2
    after = next_server()
    found = {each.id: each for each in after.store.jobs_of(ME)}
    again = found[job.id]
    assert [after.store.place(found[each.id]) for each in waiting] == [1, 2, 3]
    until(lambda: again.progress.get("writing", 0) > again.resumed_from + 5)
    assert again.resumed_from >= 10 and again.resumed_from % 5 == 0 and again.starts == 1
    assert f"Resumed after 0:0{again.resumed_from // 25} of 0:30." in again.view(after.store.place(again))["messages"]
    assert again.playable == 0 and not again.first.exists(), "the first seconds were shown before"
    rate = again.frames_per_second()
    assert rate is None or rate < 750, "what an earlier run has done says nothing of the speed"
    after.cancel(again.id, ME, keep=True)
    assert ended(after, again).report["resumed_from"] == again.resumed_from
    assert probe_video(again.output).n_frames == again.report["frames"] > again.resumed_from
    ends = [ended(after, found[each.id]) for each in waiting]
    assert [each.state for each in ends] == [DONE] * 3
    assert [each.started for each in ends] == sorted(each.started for each in ends)
    assert not list(again.folder.glob(".latentsync-*"))


# A server that ends itself in the middle of a job.
KILLED = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from killing import kill_at, write_in_segments
from optim.serving.job import Request
from optim.serving.worker import Worker

outputs, model, video, voice, frames = *map(Path, sys.argv[1:5]), int(sys.argv[5])
write_in_segments(5)
kill_at(frames)
worker = Worker(outputs, model=str(model), device="cpu")
worker.start()
if str(video) != ".":
    for steps in (2, 1):
        worker.submit(Request(video, voice, steps=steps), "m" * 24)
time.sleep(300)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_a_job_resumes_after_its_server_was_killed_unless_it_may_be_the_cause(
    talking, voice, checkpoint, tmp_path, next_server, short_segments
):
    def serve_until_killed(*arguments):
        command = [sys.executable, "-c", KILLED, tmp_path / "outputs", checkpoint, *arguments]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "OMP_NUM_THREADS": "1",
        }
        ended = subprocess.run([*map(str, command)], env=environment, capture_output=True, timeout=300)
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()

    serve_until_killed(talking, voice, 8)  # in the second segment
    assert sorted(states(tmp_path / "outputs")) == ["running", "waiting"]
    serve_until_killed(".", ".", 8)  # in the third: a segment more, so the first start does not count
    serve_until_killed(".", ".", 3)  # in the third again
    record = tmp_path / "record.json"
    [running] = [path for path in (tmp_path / "outputs").iterdir() if "running" in (path / "job.json").read_text()]
    shutil.copy(running / "job.json", record)
    assert json.loads(record.read_text())["starts"] == 2
    worker = next_server()
    failed, done = sorted(worker.store.jobs_of(ME), key=lambda job: -job.request.steps)
    assert failed.state == FAILED and "both times" in failed.error and "run it again" in failed.error
    assert ended(worker, done).state == DONE
    # What is finished is not lost: who wants it tries once more.
    assert worker.again(failed.id, ME) is failed and failed.error is None
    assert ended(worker, failed).state == DONE and failed.report["resumed_from"] == 10
    assert probe_video(failed.output).n_frames == 20


def test_a_failed_job_resumes_if_nothing_is_changed_and_is_a_new_one_otherwise(
    worker, talking, long_voice, voice, short_segments, monkeypatch
):
    write, written = VideoWriter.write, []

    def broken(*args):
        written.append(None)
        if len(written) == 18:
            raise ZeroDivisionError("by a test")
        write(*args)

    def failing(request):
        written.clear()
        with monkeypatch.context() as patch:
            patch.setattr(VideoWriter, "write", broken)
            job = ended(worker, worker.submit(request, ME))
        assert job.state == FAILED and "ZeroDivisionError" in job.error
        return job

    sound = make_sound(long_voice.with_name("one.wav"), seconds=1)
    job = failing(Request(talking, sound, steps=1))
    other = worker.again(job.id, ME, seed=5)
    assert other is not job and other.request.seed == 5 and ended(worker, other).report["resumed_from"] == 0
    assert worker.again(job.id, ME) is job
    assert ended(worker, job).state == DONE and job.report["resumed_from"] == 15 and job.report["frames"] == 25
    assert worker.again(job.id, ME) is not job, "what is done is done again"
    with pytest.raises(UserError, match="no setting 'cost' to change: give some of level, model"):
        worker.again(job.id, ME, cost=3)


def test_cancelling_a_job_that_waits_to_resume_removes_its_segments(talking, voice, tmp_path, monkeypatch):
    monkeypatch.setattr("optim.serving.records._is_running", lambda _: False)
    job = Worker(tmp_path / "outputs").submit(Request(talking, voice), ME)
    work = segments.work_folder(job.planned_output, [], "its request")
    work.mkdir()
    (work / "00000.mp4").touch()
    listed = {"frames": 5, "bytes": 0, "sha256": "", "counts": {}}
    (work / segments.MANIFEST).write_text(json.dumps([listed]))
    worker = Worker(tmp_path / "outputs")
    worker._thread = threading.Thread()  # nothing is run
    worker.start()
    assert [found.frames_at_start for found in worker.store.jobs_of(ME)] == [5] and work.exists()
    worker.cancel(job.id, ME)
    assert sorted(os.listdir(job.folder)) == ["job.json", "video.mp4", "voice.wav"]


def test_invalid_records_are_left_alone_and_old_ones_load(talking, voice, tmp_path, monkeypatch):
    monkeypatch.setattr("optim.serving.records._is_running", lambda _: False)
    job = Worker(tmp_path / "outputs").submit(Request(talking, voice), ME)
    path, about = job.folder / "job.json", json.loads((job.folder / "job.json").read_text())
    spoilt = [about | {name: value} for name, value in (
        ("created", float("nan")), ("created", "now"), ("names", [1, 2]), ("size", [1]), ("messages", None),
        ("progress", []), ("error", 5), ("settings", None), ("settings", {"what": 1}), ("video", None),
        ("starts", "2"), ("seconds", float("inf")), ("settings", about["settings"] | {"audio_track": 0}),
    )]  # fmt: skip
    texts = [*map(json.dumps, spoilt), "", "[" * 100_000, "null", "[]", json.dumps(about)[:-30], "\udcff"]
    for text in texts:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        assert list(load_jobs(tmp_path / "outputs")) == [], text[:300]
        assert job.request.video.is_file()
    del (
        about["queued"],
        about["starts"],
        about["frames_at_start"],
        about["remarks"],
        about["gpus"],
    )  # of earlier versions
    del about["settings"]["video_track"], about["settings"]["audio_track"]
    path.write_text(json.dumps(about))
    if os.name != "nt":
        (tmp_path / "outputs" / "link").symlink_to(job.folder, target_is_directory=True)
    assert [found.id for found in load_jobs(tmp_path / "outputs")] == [job.id]


# ---- what must not take the others with it


def test_one_snapshot_of_the_curves_serves_all_visitors(tmp_path):
    class Watching:
        def __init__(self):
            self.taken, self.look = 0, threading.Event()

        def snapshot(self, _):
            self.taken += 1
            self.look.wait(60)
            return empty

    empty = History(*[np.zeros(0)] * 3, 1, (), ())
    worker, shown = Worker(tmp_path), []
    worker.monitor = Watching()
    threads = [threading.Thread(target=lambda: shown.append(worker.live())) for _ in range(5)]
    for thread in threads:
        thread.start()
    until(lambda: worker.monitor.taken)
    worker.monitor.look.set()
    for thread in threads:
        thread.join()
    assert worker.monitor.taken == 1 and len(shown) == 5 and all(each["time"] == [] for each in shown)


def test_whatever_ends_one_job_the_next_one_runs(worker, talking, voice, monkeypatch, caplog):
    def ends_the_thread(*_, **__):
        raise SystemExit(1)

    def fault(*_, **__):
        raise KeyError("by a test")

    with monkeypatch.context() as patch:
        patch.setattr("latentsync.pipeline.lipsync", ends_the_thread)
        job = ended(worker, worker.submit(Request(talking, voice, steps=1), ME))
    assert job.state == FAILED and "SystemExit" in job.error
    with monkeypatch.context() as patch:  # in what says why a job has failed
        patch.setattr("latentsync.pipeline.lipsync", fault)
        patch.setattr(execution, "is_out_of_memory", fault)
        job = ended(worker, worker.submit(Request(talking, voice, steps=1), ME))
    assert job.state == FAILED and "Something inside the program failed" in job.error
    with monkeypatch.context() as patch:  # between two jobs
        swept = []
        patch.setattr(worker, "keep_hours", 1.0)
        patch.setattr(worker.store, "remove_old", lambda _: swept.append(None) or fault())
        wake(worker)
        until(lambda: swept)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "optim.serving.side_by_side", None)  # its import fails
        job = ended(worker, worker.submit(Request(talking, voice, steps=1), ME))
        assert job.state == DONE, job.error
        worker.compare(job.id, ME)
        until(lambda: compared(job))
        assert job.comparison.state == FAILED and "could not be made" in job.comparison.error
    assert "by a test" in caplog.text and worker._thread.is_alive()


def test_the_model_stays_loaded_between_jobs_and_is_unloaded_when_idle(checkpoint, talking, voice, tmp_path, home):
    worker = Worker(tmp_path, model=str(checkpoint), device="cpu", idle_seconds=600)
    worker.start()
    ended(worker, worker.submit(Request(talking, voice, steps=1), ME))
    models = worker.runner.models
    assert ended(worker, worker.submit(Request(talking, voice, steps=1, level="1"), ME)).state == DONE
    assert worker.runner.models is models is not None
    worker.idle_seconds, worker.keep_hours = 0.1, 1e-9
    wake(worker)
    until(lambda: worker.runner.models is None)
    until(lambda: os.listdir(tmp_path) == [])  # old results go, too
    assert worker.store.jobs_of(ME) == []
    worker.close()
    assert "jobs" not in [thread.name for thread in threading.enumerate() if thread is worker._thread]


def test_a_worker_that_unloads_at_once_does_not_spin_and_removes_old_jobs_while_busy(
    checkpoint, talking, voice, tmp_path, home, monkeypatch
):
    worker, stored, timeouts = Worker(tmp_path, model=str(checkpoint), idle_seconds=0, keep_hours=1e-9), [], []
    remove_old, wait = worker.store.remove_old, worker.store.changed.wait

    def remove_and_count(hours):
        remove_old(hours)
        stored.append(len(worker.store.all()))

    monkeypatch.setattr(worker.store, "remove_old", remove_and_count)
    monkeypatch.setattr(worker.store.changed, "wait", lambda timeout: timeouts.append(timeout) or wait(timeout))
    jobs = [worker.submit(Request(talking, voice, steps=1), ME) for _ in range(3)]
    worker.start()
    until(lambda: len(timeouts) >= 2)
    assert min(timeouts) >= 1, "seconds"
    assert [job.state for job in jobs] == [DONE] * 3
    assert stored[:4] == [3, 2, 1, 0], "each is removed when it has ended, before the next one runs"
    worker.close()


def test_a_worker_that_is_closed_just_before_it_waits_ends_at_once(tmp_path, monkeypatch):
    looking, go_on = threading.Event(), threading.Event()
    worker = Worker(tmp_path)
    take_next = worker.store.take_next

    def delayed(timeout, is_needed):
        looking.set()
        go_on.wait(60)
        return take_next(60)

    monkeypatch.setattr(worker, "_inspect", lambda stack: None)
    monkeypatch.setattr(worker.store, "take_next", delayed)
    worker.start()
    assert looking.wait(60)
    closing = threading.Thread(target=worker.close)
    closing.start()
    until(worker._closed.is_set)
    go_on.set()
    closing.join()
    assert not worker._thread.is_alive(), "it waits for a job, and nobody will wake it"


def test_the_list_has_all_jobs_that_have_not_ended(talking, voice, tmp_path, monkeypatch):
    monkeypatch.setattr("optim.serving.store.MAX_LISTED", 1)
    worker = Worker(tmp_path)
    first, *others, last = (worker.submit(Request(talking, voice), ME) for _ in range(5))
    for job in others:
        worker.cancel(job.id, ME)
    assert worker.store.jobs_of(ME) == [last, others[-1], first]


def test_jobs_change_under_the_lock_and_a_sent_timeline_does_not_change(worker, talking, voice, tmp_path):
    job = ended(worker, worker.submit(Request(talking, voice, steps=1), ME))
    shown, before = job.timeline, json.dumps(job.timeline)
    execution.add_curves(job, worker.monitor)
    assert job.timeline is not shown and json.dumps(shown) == before
    with worker.store.lock:  # somebody counts them
        removing = threading.Thread(target=worker.remove, args=(job.id, ME))
        removing.start()
        removing.join(0.3)
        assert job.id in worker.store.jobs
    removing.join()
    assert job.id not in worker.store.jobs
    other = Worker(tmp_path)
    early = other.submit(Request(talking, voice), ME)  # the page may be used before its worker starts
    other._thread = threading.Thread()
    with other.store.lock:
        starting = threading.Thread(target=other.start)
        starting.start()
        starting.join(0.3)
        assert starting.is_alive()
    starting.join()
    assert list(other.store.jobs.values()) == [early]


def test_an_unreadable_folder_of_results_is_reported(tmp_path):
    (tmp_path / "outputs").mkdir()
    worker = Worker(tmp_path / "outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optim.serving.store.load_jobs", lambda folder: os.scandir(folder / "secret"))
        with pytest.raises(UserError, match="outputs' cannot be read .*--outputs"):
            worker.start()


@pytest.mark.parametrize("stuck", [False, True])
def test_a_slow_preview_does_not_delay_the_run(monkeypatch, tmp_path, stuck):
    go_on, shown = threading.Event(), []

    def write_fragments(*_):
        while True:
            frame = yield
            if shown:  # the first is taken at once, so that it is known that it begins
                go_on.wait(60)
            if frame is not None:
                shown.append(int(frame[0, 0, 0]))

    monkeypatch.setattr(preview, "write_fragments", write_fragments)
    monkeypatch.setattr(preview, "CLOSE_TIMEOUT", 0.5)
    job = Job(Request(Path("video"), Path("voice")), "me", tmp_path, ("a", "b"), (16, 16), 9.0)
    taking = preview.Preview(job)
    began = time.monotonic()
    for number in range(200):
        taking(np.full((16, 16, 3), number, np.uint8))
    if not stuck:
        go_on.set()
        until(lambda: taking._queue.empty())
        taking(np.full((16, 16, 3), 200, np.uint8))
    taking.close()
    assert time.monotonic() - began < 30, "the encoder would have taken 60 s"
    if not stuck:
        assert len(shown) == 201 and shown[:10] == list(range(10)) and shown[-1] == 200, "the sound stays in step"
    go_on.set()
    taking._thread.join(10)
    assert not taking._thread.is_alive()


def test_speeds_are_recorded_and_scaled_by_the_work(tmp_path):
    speeds = Speeds(tmp_path / "deep" / "speeds.json")
    full, half = Settings(steps=20), Settings(steps=10)
    assert speeds.estimate("demo, here", full, 100) is None
    speeds.record("demo, here", full, 50, 100.0)
    again = Speeds(tmp_path / "deep" / "speeds.json")
    assert again.estimate("demo, here", full, 100) == (200.0, 200.0 / 1.3, 200.0 * 1.3), "one job is not much to go by"
    assert again.estimate("demo, here", half, 100) == (100.0, 50.0, 200.0), "scaled from other settings"
    for seconds in (50.0, 400.0, 150.0, 120.0, 110.0, 130.0):
        again.record("demo, here", full, 50, seconds)
    assert Speeds(tmp_path / "deep" / "speeds.json").estimate("demo, here", full, 50) == pytest.approx(
        (130.0, 110.0, 400.0)
    )
    (tmp_path / "old").write_text('{"demo, here": {"40": 2.0}}')
    assert Speeds(tmp_path / "old").estimate("demo, here", full, 10).seconds == 20.0, "one number, as earlier versions"
    assert again.estimate("demo, there", full, 100) is None
    cached = Settings(steps=20, cache=DeepCache(2, 0))
    assert Speeds.work(half) < Speeds.work(cached) < Speeds.work(full)
    odd = '{"demo, here": {"20": "fast", "x": 1, "0": 1, "1": NaN, "2": -1}}'
    for text in ("[", "[" * 100_000, "[1]", '{"demo, here": 5}', odd):
        (tmp_path / "broken").write_text(text)
        assert Speeds(tmp_path / "broken").estimate("demo, here", full, 1) is None


def test_a_job_runs_on_a_lent_gpu_in_one_call(checkpoint, talking, voice, tmp_path, home):
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


def test_auto_is_the_best_model_present_on_a_lent_gpu(hub, talking, voice, tmp_path, monkeypatch):
    calls = []
    worker = Worker(tmp_path, lent=lambda request, output, model: calls.append(model) or {"ended_early": False})
    worker.start()
    assert worker.ready.wait(60) and worker.machine.chosen == "demo", worker.problem
    store.get(NAME)
    worker.find_models()
    assert worker.machine.chosen == NAME
    line, details, _ = worker.describe(Request(talking, voice), 10)
    assert f"model {NAME} (64 px), on a GPU lent for each job." in line and details == "conservative: 20 steps."
    assert ended(worker, worker.submit(Request(talking, voice), ME)).state == DONE and calls == [NAME]
    assert "demo" in worker.describe(Request(talking, voice, model="demo"), 10)[0]
    worker.close()


def test_a_job_on_a_lent_gpu_cannot_be_cancelled(checkpoint, talking, voice, tmp_path, home):
    go_on = threading.Event()
    worker = Worker(tmp_path, model=str(checkpoint), lent=lambda *_: go_on.wait(60) and {"ended_early": False})
    worker.start()
    job = worker.submit(Request(talking, voice, steps=1), ME)
    until(lambda: job.state == "running")
    with pytest.raises(UserError, match="wait until it is done"):
        worker.cancel(job.id, ME)
    assert not job.view(worker.store.place(job))["ending"]
    go_on.set()
    assert ended(worker, job).state == DONE
    worker.close()


def test_the_preview_video_has_its_colours_in_every_player(tmp_path):
    """Players guess the colour matrix of a file that names none, by its height."""
    frame = np.full((854, 480, 3), (200, 60, 40), np.uint8)
    with closing(
        preview.write_fragments(tmp_path / "first.mp4", (480, 854), [make_sound(tmp_path / "voice.wav")])
    ) as film:
        next(film)
        for _ in range(30):
            film.send(frame)
    info = probe_video(tmp_path / "first.mp4")
    assert (info.color_matrix, info.color_range, info.color_primaries) == ("bt709", "tv", "bt709")
    with closing(read_frames(info, count=1)) as frames:
        assert np.abs(next(frames)[400, 240].astype(int) - frame[0, 0]).max() <= 4
