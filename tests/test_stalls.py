"""Whoever waits for an ffmpeg that stands still can stop waiting, and does so at last without being asked to."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

import psutil
import pytest
from clips import make_sound, make_video

from latentsync.errors import UserError
from latentsync.media import (
    VideoWriter,
    extras,
    join_segments,
    probe_audio,
    probe_video,
    process,
    reading,
    sound,
    watchdog,
    writing,
)
from latentsync.media.watchdog import Watchdog
from latentsync.pipeline import Hooks, StopEarly, lipsync
from latentsync.prefetch import BackgroundConsumer, prefetch
from latentsync.settings import Settings
from optim.serving import side_by_side

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP is POSIX's"),
]
SOON = 20.0  # seconds: within one or two where the machine has nothing else to do


class Cancelled(Exception):
    pass


def cancel() -> None:
    raise Cancelled


@pytest.fixture(autouse=True)
def nothing_stays():
    threads, children = threading.enumerate(), psutil.Process().children(recursive=True)
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 3 * SOON, "it was waited for until the end"
    assert threading.enumerate() == threads
    assert psutil.Process().children(recursive=True) == children


@pytest.fixture
def info(tmp_path):
    return probe_video(make_video(tmp_path / "picture.mp4", seconds=0.4, size="320x240"))


@pytest.fixture
def voice(tmp_path):
    return make_sound(tmp_path / "voice.wav", seconds=2)


def stopping(monkeypatch, *modules, at: int = 1, stopped: Callable = lambda _: None) -> None:
    """Let the modules' `at`-th run of ffmpeg stand still from its beginning on; stopped(process) is called then."""
    real, runs = process.run_ffmpeg, []

    @contextmanager
    def run(*arguments, **options):
        with real(*arguments, **options) as (started, log):
            runs.append(started)
            if len(runs) == at:
                os.kill(started.pid, signal.SIGSTOP)
                stopped(started)
            yield started, log

    for module in modules:
        monkeypatch.setattr(module, "run_ffmpeg", run)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(watchdog, "STALL_SECONDS", 1.0)


def frames(info, count):
    return ([frame for frame in reading.read_frames(info)] * count)[:count]


def test_an_encoder_that_takes_no_frames_ends_with_a_sentence(tmp_path, info, voice, monkeypatch, short):
    stopping(monkeypatch, writing)
    (out := tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="o.mp4 could not be written, as ffmpeg has stood still for 1 seconds"):
        with VideoWriter(out / "o.mp4", info, voice) as writer:
            for frame in frames(info, 50):
                writer.write(frame)
    assert os.listdir(out) == []


def test_an_encoder_that_does_not_end_ends_with_a_sentence(tmp_path, info, voice, monkeypatch, short):
    (out := tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="stood still"), VideoWriter(out / "o.mp4", info, voice) as writer:
        writer.write(frames(info, 1)[0])
        os.kill(writer._process.pid, signal.SIGSTOP)
    assert os.listdir(out) == []


def test_the_end_of_a_file_is_not_waited_for_after_a_cancel(tmp_path, info, voice):
    (out := tmp_path / "out").mkdir()
    with pytest.raises(Cancelled), VideoWriter(out / "o.mp4", info, voice, on_wait=cancel) as writer:
        writer.write(frames(info, 1)[0])
        os.kill(writer._process.pid, signal.SIGSTOP)
    assert os.listdir(out) == []


def test_cutting_the_sound_hears_a_cancel(tmp_path, info, voice, monkeypatch):
    (out := tmp_path / "out").mkdir()
    with pytest.raises(Cancelled), VideoWriter(out / "o.mp4", info, voice) as writer:
        writer.write(frames(info, 1)[0])
        writer.cut, waits = True, []

        def on_wait():  # the encoder ends, and the second one does not
            if waits:
                raise Cancelled

        writer.on_wait = on_wait
        stopping(monkeypatch, writing)
        waits.append(True)
    assert os.listdir(out) == []


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_look_at_the_sound_hears_a_cancel(tmp_path, monkeypatch, at):
    voice = probe_audio(make_sound(tmp_path / "voice.m4a"))
    release = []

    def cancel():
        if release:
            raise Cancelled

    stopping(monkeypatch, watchdog, sound, at=at, stopped=release.append)
    with pytest.raises(Cancelled):
        sound.sound_options(voice, tmp_path / "o.mp4", False, cancel)
    assert os.listdir(tmp_path) == ["voice.m4a"]


@pytest.fixture
def segments(tmp_path, info):
    (folder := tmp_path / "work").mkdir()
    files = []
    for number in range(2):
        with VideoWriter(folder / f"{number}.mp4", info) as writer:
            for frame in frames(info, 10):
                writer.write(frame)
        files.append((folder / f"{number}.mp4", 10))
    return files


def test_joining_hears_a_cancel(tmp_path, info, voice, segments, monkeypatch):
    audio, before = probe_audio(voice), sorted(os.listdir(tmp_path / "work"))
    stopping(monkeypatch, writing)
    with pytest.raises(Cancelled):
        join_segments(segments, tmp_path / "o.mp4", info, audio, on_wait=cancel)
    assert not (tmp_path / "o.mp4").exists()
    assert sorted(os.listdir(tmp_path / "work")) == sorted([*before, "segments.txt"])


def test_joining_that_stands_still_ends_with_a_sentence(tmp_path, info, voice, segments, monkeypatch, short):
    stopping(monkeypatch, writing)
    with pytest.raises(UserError, match="o.mp4 could not be written, as ffmpeg has stood still"):
        join_segments(segments, tmp_path / "o.mp4", info, probe_audio(voice))
    assert not (tmp_path / "o.mp4").exists()


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_comparison_ends_when_it_is_cancelled_and_when_it_stands_still(
    tmp_path, info, voice, monkeypatch, cancelled, short
):
    result = tmp_path / "result.mp4"
    with VideoWriter(result, info, voice) as writer:
        for frame in frames(info, 50):
            writer.write(frame)
    ending = threading.Event()

    def step(done, total):
        if ending.is_set():
            raise Cancelled
        if cancelled and done == 1:  # it is waited for from another thread, while this one writes
            ending.set()

    stopping(monkeypatch, side_by_side)
    if cancelled:
        monkeypatch.setattr(watchdog, "STALL_SECONDS", 600.0)
    with pytest.raises(Cancelled if cancelled else UserError, match=None if cancelled else "stood still"):
        side_by_side.side_by_side(info.path, result, tmp_path / "both.mp4", step, ending)


class Stuck:
    """An encoder in a pipeline that is stopped at its first frame."""

    def __init__(self, monkeypatch):
        self.stopped = threading.Event()
        write = VideoWriter.write

        def stop(writer, frame):
            if not self.stopped.is_set():
                os.kill(writer._process.pid, signal.SIGSTOP)
                self.stopped.set()
            while True:  # until the pipe is full
                write(writer, frame)

        monkeypatch.setattr(VideoWriter, "write", stop)


@pytest.mark.parametrize("segment_frames", [None, 10], ids=["in one piece", "in segments"])
@pytest.mark.parametrize("error", [Cancelled, KeyboardInterrupt])
def test_a_job_hears_a_cancel_while_its_encoder_stands_still(
    models, talking, voice, tmp_path, monkeypatch, segment_frames, error
):
    stuck = Stuck(monkeypatch)
    (out := tmp_path / "out").mkdir()

    def on_wait():
        if stuck.stopped.is_set():
            raise error

    with pytest.raises(error):
        lipsync(
            talking,
            voice,
            out / "o.mp4",
            models,
            Settings(steps=1),
            Hooks(on_wait=on_wait),
            segment_frames=segment_frames,
        )
    assert os.listdir(out) == []


def test_a_job_whose_encoder_stands_still_ends_with_a_sentence(models, talking, voice, tmp_path, monkeypatch, short):
    Stuck(monkeypatch)
    (out := tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="o.mp4 could not be written, as ffmpeg has stood still"):
        lipsync(talking, voice, out / "o.mp4", models, Settings(steps=1))
    assert os.listdir(out) == []


@pytest.mark.parametrize("error", [Cancelled, KeyboardInterrupt])
def test_a_job_hears_a_cancel_while_its_decoder_stands_still(models, talking, voice, tmp_path, monkeypatch, error):
    stopping(monkeypatch, reading, at=2)  # the first one reads the sound
    (out := tmp_path / "out").mkdir()

    def on_wait():
        raise error

    with pytest.raises(error):
        lipsync(talking, voice, out / "o.mp4", models, Settings(steps=1), Hooks(on_wait=on_wait))
    assert os.listdir(out) == []


def test_a_job_that_has_nothing_left_to_end_early_becomes_whole(models, talking, tmp_path):
    """`StopEarly` that comes when all frames are with the encoder."""
    voice = make_sound(tmp_path / "short.wav", seconds=0.4)
    ended = []

    def on_progress(stage, done, total):
        if stage == "writing" and done == total:
            ended.append(True)
            raise StopEarly

    report = lipsync(talking, voice, tmp_path / "o.mp4", models, Settings(steps=1), Hooks(on_progress=on_progress))
    assert ended and not report.ended_early and probe_video(tmp_path / "o.mp4").n_frames == report.frames == 10


def test_what_works_slowly_is_not_taken_for_standing_still(monkeypatch, short):
    """A process is judged by what it does, not by the time it takes."""
    work = []
    monkeypatch.setattr(watchdog, "STALL_SECONDS", 0.5)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as sleeper:
        # Each look finds a little more done, for ten times as long as it may stand still; then nothing more.
        monkeypatch.setattr(watchdog, "_activity", lambda pid: (0.0, work.append(pid) or min(len(work), 50)))
        with Watchdog(sleeper) as dog:
            assert dog.wait() == -signal.SIGKILL
    assert len(work) > 50 and dog.stalled == 0.5


def test_an_encoder_that_nobody_waits_for_may_stand_still(tmp_path, info, short):
    with VideoWriter(tmp_path / "o.mp4", info) as writer:
        writer.write(frames(info, 1)[0])
        time.sleep(2.5)  # over twice the limit, in which the next frame is painted
        writer.write(frames(info, 1)[0])
    assert probe_video(tmp_path / "o.mp4").n_frames == 2


def test_extras_hear_a_cancel(tmp_path, info, voice, monkeypatch):
    stopping(monkeypatch, watchdog)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(Cancelled), extras.collect_extras(info, probe_audio(voice), 2, tmp_path / "o.mp4", cancel):
        pass
    assert sorted(os.listdir(tmp_path)) == before


def test_a_thread_that_waits_for_another_calls_on_wait():
    release = threading.Event()

    def slow():
        assert release.wait(SOON)
        yield 1

    assert list(prefetch(slow(), 1, "slow", release.set)) == [1]
    release.clear()
    behind = BackgroundConsumer(lambda _: release.wait(SOON), 1, "slow", release.set)
    behind.submit(1)
    behind.finish()
    assert behind.completed == 1
    behind.close()


def test_what_is_in_hand_is_interrupted_when_it_does_not_end():
    begun, interrupted = threading.Event(), threading.Event()

    def work(_):
        begun.set()
        assert interrupted.wait(SOON)

    def slow():
        yield 1
        work(2)

    behind = BackgroundConsumer(work, 1, "stuck", interrupt=interrupted.set)
    behind.submit(1)
    assert begun.wait(SOON)
    behind.close()
    assert interrupted.is_set()
    begun.clear()
    interrupted.clear()
    items = prefetch(slow(), 1, "stuck", interrupt=interrupted.set)
    assert next(items) == 1 and begun.wait(SOON)
    items.close()
    assert interrupted.is_set()
