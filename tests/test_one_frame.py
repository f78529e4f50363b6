"""The preview of one frame before a job."""

import base64
import threading
import time
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from clips import ffmpeg, make_sound, make_video
from conftest import SIDE, portrait, save_video

from latentsync.errors import UserError
from latentsync.media import probe_video
from optim.serving import one_frame
from optim.serving import worker as serving_worker
from optim.serving.estimate import describe_preview
from optim.serving.job import DONE, Request
from optim.serving.one_frame import JOBS_FIRST, MAX_WAITING, NEWER, TOO_MANY, place_window, preview_key
from optim.serving.run import make_plan
from optim.serving.speeds import Speeds, speed_key
from optim.serving.worker import Worker

ME, OTHER = "m" * 24, "o" * 24
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A face for two seconds, which moves."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    save_video(path, [portrait(t) for t in range(50)], "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", 4)
    return path


def pixels(uri: str) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(uri.partition(",")[2]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(int)


def painted(worker, *request, at=None, visitor=ME, **settings):
    frame = worker.previews.add(Request(*request, **{"steps": 2} | settings), visitor, at)
    assert frame.done.wait(120)
    return frame


def test_the_frame_at_a_time_is_painted_and_stands_beside_its_original(worker, film, voice):
    frame = painted(worker, film, voice, at=0.4)
    reply = frame.reply
    assert reply, frame.error
    assert (reply["at"], reply["level"]) == (0.4, "conservative") and reply["seconds"] >= 0
    before, after = pixels(reply["original"]), pixels(reply["painted"])
    assert before.shape == after.shape == (SIDE, SIDE, 3)
    assert np.abs(before - portrait(10).astype(int)).mean() < 3 < np.abs(before - portrait(0).astype(int)).mean()
    changed = np.abs(before - after).sum(-1) > 60
    assert changed[SIDE // 2 :].sum() > 200 > changed[: SIDE // 4].sum(), "the mouth, and nothing of the forehead"
    assert worker.store.all() == [], "no job came of it"


def test_a_picture_and_a_film_shorter_than_a_window_have_a_preview(worker, tmp_path, film, voice):
    picture = tmp_path / "face.png"
    ffmpeg("-i", film, "-frames:v", 1, picture)
    short = tmp_path / "short.mp4"
    ffmpeg("-i", film, "-frames:v", 5, short)
    for video in (picture, short):
        frame = painted(worker, video, voice)
        assert frame.reply, frame.error
        assert frame.reply["at"] == 0.4, "the middle"


def test_the_window_lies_around_the_time_and_within_voice_and_film(film):
    info = probe_video(film)  # 50 frames
    second = 16000
    assert place_window(None, 4 * second, info) == place_window(2.0, 4 * second, info)
    middle = place_window(1.0, 4 * second, info)
    assert (middle.first + middle.shown, middle.count, middle.film) == (25, 16, 17)
    assert middle.samples(info) == slice(17 * 640, 33 * 640 + second)
    start, end = place_window(0.0, 4 * second, info), place_window(1e308, 4 * second, info)
    assert (start.first, start.shown, start.film) == (0, 0, 0)
    assert (end.first + end.count, end.first + end.shown) == (100, 99)
    back = place_window(3.0, 4 * second, info)  # frame 75, on the way back, shows the film's frame 24
    assert back.film + back.shown == 24
    assert place_window(5.0, 8 * second, replace(info, still=True)).film == 0
    tiny = place_window(None, 640 * 3, info)
    assert (tiny.count, tiny.first, tiny.shown) == (3, 0, 1)
    ntsc = info.at(Fraction(30000, 1001))
    assert place_window(1.0, 4 * second, ntsc).first + place_window(1.0, 4 * second, ntsc).shown == 29


def test_a_time_without_a_face_and_files_that_cannot_be_used_are_a_sentence(worker, tmp_path, film, voice):
    faceless = make_video(tmp_path / "faceless.mp4", seconds=1)
    frame = painted(worker, faceless, voice, at=0.2)
    assert frame.reply is None and frame.error.startswith("No face that can be used is seen at 0.2 s")
    broken = tmp_path / "my broken one.mp4"
    broken.write_text("no video")
    assert "my broken one.mp4" in painted(worker, broken, voice).error
    assert painted(worker, film, voice).reply, "and the next one is painted"


def test_jobs_go_first(worker, film, voice, tmp_path, monkeypatch):
    job = worker.submit(Request(film, make_sound(tmp_path / "long.wav", seconds=20)), ME)
    with pytest.raises(UserError, match=JOBS_FIRST[:20]):
        worker.previews.add(Request(film, voice), OTHER)
    worker.cancel(job.id, ME)
    assert worker.wait(job, 60)
    began, go_on = threading.Event(), threading.Event()
    load = worker.runner.load

    def slow(job, checkpoint):
        began.set()
        assert go_on.wait(60)
        return load(job, checkpoint)

    monkeypatch.setattr(worker.runner, "load", slow)
    frame = worker.previews.add(Request(film, voice), ME)
    assert began.wait(60)
    job = worker.submit(Request(film, voice, steps=2), ME)
    go_on.set()
    assert frame.done.wait(60) and frame.error == JOBS_FIRST
    assert worker.wait(job, 120) and job.state == DONE, job.error


def test_a_newer_preview_takes_the_place_of_the_visitor_s_own(worker, film, voice, monkeypatch):
    go_on = threading.Event()
    load = worker.runner.load
    monkeypatch.setattr(worker.runner, "load", lambda *args: go_on.wait(60) and load(*args))
    request = Request(film, voice, steps=2)
    first, other, newer = (worker.previews.add(request, who) for who in (ME, OTHER, ME))
    for i in range(MAX_WAITING - 2):
        worker.previews.add(request, f"{i}" * 24).cancel()
    others = [worker.previews.add(request, f"{i}" * 25) for i in range(MAX_WAITING - 2)]
    with pytest.raises(UserError, match=TOO_MANY[:20]):
        worker.previews.add(request, "n" * 24)
    for each in others:
        each.cancel()
    go_on.set()
    assert all(each.done.wait(120) for each in (first, other, newer))
    assert first.error == NEWER and other.reply and newer.reply


def test_the_end_of_the_server_ends_a_preview(tmp_path, checkpoint, film, voice, monkeypatch):
    monkeypatch.setenv("LATENTSYNC_HOME", str(tmp_path / "home"))
    worker = Worker(tmp_path / "outputs", model=str(checkpoint), device="cpu")
    worker.start()
    assert worker.ready.wait(60)
    frame = worker.previews.add(Request(film, voice, steps=200), ME)
    while not worker.previews._painting:
        time.sleep(0.01)
    worker.close()
    assert frame.done.wait(60) and frame.reply is None


def test_a_fault_inside_ends_the_preview_alone(worker, film, voice, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(one_frame, "paint", lambda *_: 1 / 0)
        assert "failed" in painted(worker, film, voice).error
        patch.setattr(one_frame, "paint", lambda *_: np.empty(2**62, np.uint8))
        assert "memory" in painted(worker, film, voice).error
    assert painted(worker, film, voice).reply


def test_it_is_offered_on_a_processor_only_where_it_is_known_to_take_less_than_a_minute(worker, tmp_path):
    request, speeds = Request(Path(), Path()), Speeds(tmp_path / "speeds.json")
    found, machine = worker._find_checkpoint(request), worker.machine
    plan, key = make_plan(request, found, torch.device("cpu")), speed_key(found.name, machine, request)
    offer = partial(describe_preview, request, found, plan)
    assert offer(machine, speeds) is None and offer(replace(machine, device="cuda:0"), speeds) == ""
    speeds.record(key, plan.settings, 10, 10)  # a second a frame
    assert offer(machine, speeds) == "12 to 21 s"
    speeds.record(key, plan.settings, 10, 1000)
    assert offer(machine, speeds) is None and offer(replace(machine, device="cuda:0"), speeds) is not None
    speeds.record(preview_key(key), plan.settings, 1, 20)
    assert offer(machine, speeds) == "15 to 26 s", "by previews, once there are some"


def test_a_change_of_a_setting_makes_one_plan(worker, monkeypatch):
    plans = []
    monkeypatch.setattr(serving_worker, "make_plan", lambda *args: plans.append(args) or make_plan(*args))
    worker.describe(Request(Path(), Path()), 10)
    assert len(plans) == 1
