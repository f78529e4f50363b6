"""What goes wrong around a run: disks, folders, other programs, memory. A sentence, nothing left over, on it goes."""

import ctypes
import gc
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from clips import ffmpeg, make_sound, make_video
from conftest import FACE_FRAMES, portrait, save_video

from latentsync.errors import UserError, is_out_of_memory
from latentsync.media import VideoWriter, probe_video, process, read_frames, reading, writing
from latentsync.paths import replacing
from latentsync.pipeline import Hooks, lipsync
from latentsync.settings import Settings
from optim.serving.job import CANCELLED, DONE, FAILED, Job, Request
from optim.serving.worker import Worker

ME = "m" * 24
FAULTS, ALL_FAULTS = 20, 100  # injected in the ordinary run, and with -m full_size
CLIENTS, JOBS_EACH = 5, 10
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform != "linux", reason="counts what Linux shows of a process"),
]


@pytest.fixture(scope="module")
def short_voice(tmp_path_factory):
    return make_sound(tmp_path_factory.mktemp("voice") / "short.wav", seconds=0.2)


@pytest.fixture
def start(tmp_path, start_worker, monkeypatch):
    """Starts a worker with nothing of other tests around it: home, outputs and temporary files."""
    monkeypatch.setenv("LATENTSYNC_HOME", str(tmp_path / "home"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return start_worker


def children(words: str = "ffmpeg") -> list[psutil.Process]:
    """Processes that this one started, with words in their command line."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE and words in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            pass
    return found


def settles(condition: Callable[[], bool], seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def is_sentence(error: object) -> bool:
    return "\n" not in str(error) and str(error).endswith(".") and "Traceback" not in str(error)


def run_and_spoil(models, talking, voice, output: Path, spoil: Callable[[], object]) -> UserError:
    """Lip-sync, and spoil things while the result is written; what came of it."""
    done = []

    def progress(stage: str, *_) -> None:
        if stage == "mouths" and not done:
            done.append(spoil())

    with pytest.raises(UserError) as caught:
        lipsync(talking, voice, output, models, Settings(steps=1), Hooks(on_progress=progress))
    assert done and is_sentence(caught.value), caught.value
    assert not children()
    return caught.value


# ---- disks and folders


def limited(folder: Path, monkeypatch, kilobytes: int) -> None:
    """Let every ffmpeg fail as on a file system whose files end there."""
    wrapper = folder / "ffmpeg"
    exe = process.get_ffmpeg_exe()
    wrapper.write_text(f'#!/bin/bash\ntrap "" XFSZ\nulimit -f {kilobytes}\nexec "{exe}" "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(process, "get_ffmpeg_exe", lambda: str(wrapper))


def test_a_full_file_system_raises_a_user_error(models, talking, voice, tmp_path, monkeypatch):
    (out := tmp_path / "out").mkdir()
    (out / "o.mp4").write_bytes(b"an earlier result")
    limited(tmp_path, monkeypatch, kilobytes=20)
    with pytest.raises(UserError, match="o.mp4 could not be written .*File too large.* free some space") as caught:
        lipsync(talking, voice, out / "o.mp4", models, Settings(steps=1))
    assert is_sentence(caught.value) and " @ 0x" not in str(caught.value)
    assert os.listdir(out) == ["o.mp4"] and (out / "o.mp4").read_bytes() == b"an earlier result"
    assert not children()


def test_a_full_disk_raises_a_user_error(talking, tmp_path, monkeypatch):
    """ffmpeg writes to the device that is always full."""
    info = probe_video(talking)
    (out := tmp_path / "out").mkdir()

    @contextmanager
    def on_full_disk(path, folder=None):
        with replacing(path, folder) as partial:
            partial.symlink_to("/dev/full")
            yield partial

    monkeypatch.setattr(writing, "replacing", on_full_disk)
    writer = VideoWriter(out / "o.mp4", info)
    with pytest.raises(UserError, match="o.mp4 could not be written .*No space left on device") as caught, writer:
        for frame in read_frames(info):
            writer.write(frame)
    assert is_sentence(caught.value) and os.listdir(out) == []


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("by_a_file", [False, True])
def test_a_folder_removed_during_a_run_raises_a_user_error(models, talking, voice, tmp_path, suffix, by_a_file):
    (out := tmp_path / "out").mkdir()

    def replace() -> None:
        shutil.rmtree(out)
        if by_a_file:
            out.write_text("not a folder")

    error = run_and_spoil(models, talking, voice, out / f"o{suffix}", replace)
    assert "out was removed while" in str(error)
    assert os.listdir(tmp_path) == ["out"] * by_a_file


@pytest.mark.permissions
def test_a_folder_made_read_only_during_a_run_raises_a_user_error(models, talking, voice, tmp_path):
    (out := tmp_path / "out").mkdir()
    try:
        run_and_spoil(models, talking, voice, out / "o.mp4", lambda: out.chmod(0o500) or True)
    finally:
        out.chmod(0o700)


def test_a_worker_runs_the_next_job_after_a_job_s_folder_is_removed(start, talking, short_voice, capfd):
    worker = start()
    for by_a_file in (False, True):
        job = worker.submit(Request(talking, short_voice), ME)
        assert settles(lambda job=job: job.progress.get("faces", 0) > 0)
        shutil.rmtree(job.folder)
        if by_a_file:
            job.folder.write_text("not a folder")
        assert worker.wait(job, 300) and job.state == FAILED and is_sentence(job.error), job.error
    job = worker.submit(Request(talking, short_voice, steps=1), ME)
    assert worker.wait(job, 300) and job.state == DONE, job.error


# ---- other programs, and what they do to ours


def test_a_killed_encoder_raises_a_user_error(models, talking, voice, tmp_path):
    (out := tmp_path / "out").mkdir()
    (out / "o.mp4").write_bytes(b"an earlier result")
    error = run_and_spoil(models, talking, voice, out / "o.mp4", lambda: children(".latentsync-")[0].kill() or True)
    assert "SIGKILL" in str(error) and "o.mp4" in str(error)
    assert os.listdir(out) == ["o.mp4"] and (out / "o.mp4").read_bytes() == b"an earlier result"


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    """Far more than the pipe from ffmpeg holds."""
    return make_video(tmp_path_factory.mktemp("long") / "long.mp4", size="640x480", seconds=4)


def test_a_killed_decoder_raises_a_user_error(long_clip):
    frames = read_frames(probe_video(long_clip))
    next(frames)
    children()[0].kill()
    with pytest.raises(UserError, match="SIGKILL.* while it read .*long.mp4") as caught:
        list(frames)
    assert is_sentence(caught.value)


def test_a_decoder_that_stops_delivering_is_ended(long_clip, monkeypatch):
    info = probe_video(long_clip)
    monkeypatch.setattr(reading, "FRAME_SECONDS", 5.0)
    frames = read_frames(info)
    next(frames)
    children()[0].send_signal(signal.SIGSTOP)  # without the watchdog the test would not end
    with pytest.raises(UserError, match="long.mp4 .* its disk does not answer, .* in 5 seconds") as caught:
        list(frames)
    assert is_sentence(caught.value) and not children()


class Clock:
    """The time module's clock, which can be set forward."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self.read_by_watcher = threading.Event()

    def monotonic(self) -> float:
        now = time.monotonic() + self.ahead
        if threading.current_thread() is not threading.main_thread():
            self.read_by_watcher.set()
        return now


def test_a_decoder_that_nobody_waits_for_is_not_ended(long_clip, monkeypatch):
    """A slow network behind the decoder is no stall of it; nor is a pause that ends in time."""
    info = probe_video(long_clip)
    wanted = sum(int(frame.sum()) for frame in read_frames(info))
    monkeypatch.setattr(process, "time", clock := Clock())
    found = 0
    for i, frame in enumerate(read_frames(info)):
        found += int(frame.sum())
        if i == 10:
            clock.ahead = 2 * reading.FRAME_SECONDS
            clock.read_by_watcher.clear()
            assert clock.read_by_watcher.wait(60)
        if i == 20:
            [decoder] = children()
            decoder.send_signal(signal.SIGSTOP)
            threading.Timer(0.3, decoder.send_signal, (signal.SIGCONT,)).start()
    assert found == wanted


@pytest.mark.parametrize("samples", [1, 160])
def test_sound_shorter_than_a_frame_gives_a_frame(models, talking, tmp_path, samples):
    sound = tmp_path / "click.wav"
    (tmp_path / "raw").write_bytes(np.full(samples, 9000, "<i2").tobytes())
    ffmpeg("-f", "s16le", "-ar", 16000, "-ac", 1, "-i", tmp_path / "raw", sound)
    report = lipsync(talking, sound, tmp_path / "o.mp4", models, Settings(steps=1))
    assert report.frames == probe_video(tmp_path / "o.mp4").n_frames == 1


# ---- memory

PLACES = {
    "decoding": (reading, "_fill"),
    "sound": ("latentsync.pipeline", "read_audio"),
    "faces": ("latentsync.landmarks", "detect"),
    "smoothing": ("latentsync.faces", "smoothed_points"),
    "alignment": ("latentsync.windows", "estimate_matrix"),
    "crops": ("latentsync.windows", "crop_face"),
    "audio encoder": ("latentsync.whisper", "AudioEncoder.forward"),
    "VAE encoder": ("latentsync.vae", "encode"),
    "U-Net": ("latentsync.unet", "UNet.full"),
    "VAE decoder": ("latentsync.painting", "decode"),
    "validation": ("latentsync.painting", "broken_faces"),
    "merging": ("latentsync.painting", "merge_faces"),
    "compositing": ("latentsync.painting", "paste_faces"),
    "opening": (VideoWriter, "_encoding"),
    "writing": (VideoWriter, "write"),
    "loading": ("latentsync.checkpoints.load", "load_weights"),
    "preparing": ("optim.accelerate", "accelerate"),
    "preview": ("optim.serving.preview", "Preview._encode"),
    "speeds": ("optim.serving.speeds", "Speeds.record"),
    "curves": ("optim.serving.execution", "thinned_curves"),
}


class Fault:
    """Raises an error at the n-th call of a function; counts the calls of all PLACES."""

    def __init__(self, monkeypatch):
        self.calls = dict.fromkeys(PLACES, 0)
        self.place, self.at, self.error = "", -1, None
        self.raised = False
        for place, (module, name) in PLACES.items():
            owner = sys.modules[module] if isinstance(module, str) else module
            *outer, name = name.split(".")
            for part in outer:
                owner = getattr(owner, part)
            monkeypatch.setattr(owner, name, self.wrapped(place, getattr(owner, name)))

    def wrapped(self, place: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            self.calls[place] += 1
            if place == self.place and self.calls[place] == self.at:
                self.raised = True
                raise self.error
            return function(*args, **kwargs)

        return call

    def arm(self, place: str = "", at: int = -1, error: Exception | None = None) -> None:
        self.calls = dict.fromkeys(PLACES, 0)
        self.place, self.at, self.error, self.raised = place, at, error, False


def held() -> Counter:
    """What a process can leave lying about, counted."""
    found = Counter(f"thread {thread.name}" for thread in threading.enumerate())
    found.update(f"temporary file {name}" for name in os.listdir(tempfile.gettempdir()))
    return found + Counter({"process": len(children("")), "open file": len(os.listdir("/proc/self/fd"))})


def held_at_rest() -> Counter:
    """The same once it no longer changes: threads of a job, and what other tests have dropped, end after it."""
    gc.collect()
    earlier = None
    while earlier != (now := held()):
        earlier = now
        time.sleep(0.5)
    return now


def inject(count: int, worker: Worker, fault: Fault, request: Request) -> None:
    """Jobs with a fault each, at a random call of every place in turn; every fifth is followed by one without."""

    def run() -> Job:
        job = worker.submit(request, ME)
        assert worker.wait(job, 300), (fault.place, job)
        return job

    assert run().state == DONE
    assert settles(lambda: min(fault.calls.values()) > 0), fault.calls  # the curves come after the end
    usual = fault.calls
    fault.arm()
    assert run().state == DONE
    before = held_at_rest()
    chance = random.Random(1)
    survived = 0
    for i in range(count):
        place = list(PLACES)[i % len(PLACES)]
        kind = chance.choice((torch.OutOfMemoryError, MemoryError))
        if place == "loading":
            worker.runner.unload()
        fault.arm(place, chance.randint(1, usual[place]), kind("by a test"))
        where = f"{kind.__name__} in call {fault.at} of {place}"
        job = run()
        assert settles(lambda: fault.raised), where
        fault.error = None  # its traceback holds what the run had
        assert job.state in (DONE, FAILED), where
        if job.state == FAILED:
            assert "memory" in job.error and is_sentence(job.error), (where, job.error)
        survived += job.state == DONE
        assert settles((job.folder / "job.json").exists), where  # what is written last
        assert settles(lambda: not held() - before), (where, held() - before)
        left = {name for name in os.listdir(job.folder) if not name.endswith("-synced.mp4")}
        assert left == {"job.json", "video.mp4", "voice.wav"}, where
        assert job.output is None or probe_video(job.output).n_frames == 5
        if i % 5 == 4:
            fault.arm()
            job = run()
            assert job.state == DONE, (where, job.error)
    print(f"{count} faults, of which {survived} were overcome")


@pytest.fixture
def fault(monkeypatch):
    import latentsync.pipeline  # noqa: F401
    import optim.accelerate  # noqa: F401
    import optim.serving.preview  # noqa: F401

    return Fault(monkeypatch)


def test_a_worker_survives_running_out_of_memory_anywhere(start, fault, talking, short_voice):
    inject(FAULTS, start(), fault, Request(talking, short_voice, steps=2))


@pytest.mark.full_size
def test_a_worker_survives_running_out_of_memory_a_hundred_times(start, fault, talking, short_voice):
    inject(ALL_FAULTS, start(), fault, Request(talking, short_voice, steps=2))


def test_memory_is_freed_before_the_next_job(start, talking, short_voice, monkeypatch):
    """The model is let go when nothing of the failed run holds it any more."""
    worker = start()
    assert worker.wait(worker.submit(Request(talking, short_voice, steps=1), ME), 300)
    network, freed, collect = weakref.ref(worker.runner.models.unet), [], gc.collect

    def starved(*_) -> None:
        raise MemoryError

    def collected() -> None:
        collect()
        freed.append(network() is None)

    monkeypatch.setattr("latentsync.painting.merge_faces", starved)
    monkeypatch.setattr(gc, "collect", collected)
    job = worker.submit(Request(talking, short_voice, steps=1), ME)
    assert worker.wait(job, 300) and job.state == FAILED and settles(lambda: freed)
    assert freed == [True]


def test_torch_s_messages_for_out_of_memory_are_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


# ---- many at once


def in_use() -> int:
    """Bytes of memory that this process holds, without what the allocator keeps for later."""
    gc.collect()
    with suppress(AttributeError, OSError):  # a libc of another kind
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


@pytest.fixture(scope="module")
def coloured(tmp_path_factory) -> dict[str, tuple[Path, np.ndarray]]:
    """A clip for every client, and the colour of its frame."""
    folder = tmp_path_factory.mktemp("clips")
    found = {}
    for client in range(CLIENTS):
        colour = np.random.default_rng(client).integers(40, 216, 3).astype(np.uint8)
        frames = [portrait(t) for t in range(FACE_FRAMES // 2)]
        for frame in frames:
            frame[:16] = colour
        path = save_video(folder / f"{client}.mp4", frames, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", 12)
        found[f"visitor {client} {'x' * 20}"] = (path, colour)
    return found


def test_fifty_jobs_of_five_clients_stay_separate(start, coloured, tmp_path):
    """Every client's frame has a colour, and every job of theirs a number of frames; some are cancelled."""
    worker = start(queue_size=8)
    voices = [make_sound(tmp_path / f"{n}.wav", seconds=n * 0.04) for n in range(1, JOBS_EACH + 1)]
    submitted: dict[str, list[Job]] = {visitor: [] for visitor in coloured}
    refused, problems = [], []

    def client(visitor: str, seed: int) -> None:
        chance = random.Random(seed)
        for voice in voices:
            while True:
                try:
                    request = Request(coloured[visitor][0], voice, steps=1, seed=seed)
                    job = worker.submit(request, visitor)
                    break
                except UserError as error:
                    refused.append(str(error))
                    time.sleep(0.1)
            submitted[visitor].append(job)
            if chance.random() < 0.5:
                time.sleep(chance.uniform(0, 0.5))
                worker.cancel(job.id, visitor, keep=chance.random() < 0.5)
        for job in submitted[visitor]:
            if not worker.wait(job, 300):
                problems.append(job)

    threads = [threading.Thread(target=client, args=(visitor, i)) for i, visitor in enumerate(coloured)]
    for thread in threads:
        thread.start()
    assert settles(lambda: sum(job.ended is not None for some in submitted.values() for job in some) >= 10, 300)
    early = in_use()
    for thread in threads:
        thread.join()
    everyone = [job for some in submitted.values() for job in some]
    assert not problems and len(everyone) == CLIENTS * JOBS_EACH and worker.store.load_counts() == (0, 0)
    assert all("queue is full" in words for words in refused)
    assert {job.state for job in everyone} == {DONE, CANCELLED}, [job.error for job in everyone if job.error]
    assert len({job.id for job in everyone}) == len({job.key for job in everyone}) == len(everyone)
    for visitor, (_, colour) in coloured.items():
        assert worker.store.jobs_of(visitor) == submitted[visitor][::-1]
        for frames, job in enumerate(submitted[visitor], 1):
            if job.output is None:
                assert job.state == CANCELLED
                continue
            assert job.output.parent == job.folder and worker.store.by_key(job.key) is job
            shown = list(read_frames(probe_video(job.output)))
            assert len(shown) == frames if job.state == DONE else 0 < len(shown) <= frames
            assert all(np.abs(frame[2:10, 4:-4].mean((0, 1)) - colour).max() < 6 for frame in shown)
    growth = (in_use() - early) / 2**20
    done = sum(job.state == DONE for job in everyone)
    print(f"{done} done, {50 - done} cancelled, {len(refused)} refused for a while, memory {growth:+.0f} MB")
    assert growth < 64
