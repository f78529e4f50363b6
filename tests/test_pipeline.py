"""The chain of stages: what is cut into split_windows, what is painted where, what a run reports and leaves behind."""

import itertools
import math
import os
import random
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from clips import make_sound, make_video
from conftest import SIDE, one_person, portrait
from pasting import paste
from skimage.metrics import peak_signal_noise_ratio as psnr

from latentsync import STAGES, aligning, painting, pipeline
from latentsync.alignment import frame_rectangle
from latentsync.audio import audio_chunks, frame_count
from latentsync.compositing import match_colours
from latentsync.errors import UserError
from latentsync.faces import track_faces
from latentsync.media import COMMENT, VideoWriter, probe_audio, probe_video, read_frames
from latentsync.painting import Painter, PendingPass, paint_groups
from latentsync.pipeline import (
    DECODED_FRAMES,
    Hooks,
    Source,
    StopEarly,
    buffered_crops,
    buffered_results,
    fit_memory,
    generate_frames,
    lipsync,
    max_frames,
)
from latentsync.prefetch import prefetch
from latentsync.sampling import denoise, interpolate_ends
from latentsync.settings import WINDOW, DeepCache, Settings
from latentsync.timing import StageClock
from latentsync.vae import encode_conditioning, to_pixels
from latentsync.windows import AlignedFrame, Window, align_frames, group_windows, split_windows

CPU = torch.device("cpu")
CROP = np.zeros((1, 1, 3), np.uint8)
FRAMES = 40  # two split_windows and a slid-back third
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def wav():
    noise = torch.randn(FRAMES * 640, generator=torch.Generator().manual_seed(0))
    return noise * torch.linspace(0, 0.3, len(noise))


def run(models, wav, **settings) -> list[AlignedFrame]:
    frames = (portrait(t) for t in range(FRAMES))
    return list(
        generate_frames(Source(enumerate(frames), wav, FRAMES), models, Settings(steps=2, **settings), StageClock())
    )


def stacked(shots: list[AlignedFrame]) -> np.ndarray:
    return np.stack([shot.frame for shot in shots])


def shots_of(runs: list[int], gap: int = 1) -> list[AlignedFrame]:
    """Runs of numbered shots with a face, `gap` shots without one after each."""
    faces = [face for length in runs for face in [True] * length + [False] * gap]
    return [AlignedFrame(np.array(i), torch.empty(0), CROP if face else None) for i, face in enumerate(faces)]


def numbers(shots: list[AlignedFrame]) -> list[int]:
    return [int(shot.frame) for shot in shots]


def emitted(parts: list[Window | AlignedFrame]) -> list[int]:
    return [n for p in parts for n in (numbers(p.frames[p.context :]) if isinstance(p, Window) else numbers([p]))]


def runs_to_try() -> list[list[int]]:
    some = random.Random(0)
    return [[n] for n in range(1, 51)] + [[some.randint(0, 50) for _ in range(5)] for _ in range(30)]


@pytest.mark.parametrize("gap", [0, 1, 3])
def test_windows_are_full_and_give_every_frame_once_in_order(gap):
    for runs in runs_to_try():
        shots = shots_of(runs, gap)
        parts = list(split_windows(shots))
        assert emitted(parts) == list(range(len(shots)))
        lengths = [sum(runs)] if gap == 0 else runs
        cut = [part for part in parts if isinstance(part, Window)]
        wanted = [min(WINDOW, n) for n in lengths for _ in range(0, n, WINDOW)]
        assert [len(window.frames) for window in cut] == wanted
        for window in cut:
            held = numbers(window.frames)
            assert held == list(range(held[0], held[0] + len(held)))  # context is what came just before
            assert all(shot.crop is not None for shot in window.frames)


def test_only_the_last_window_of_a_run_slides_back():
    parts = list(split_windows(shots_of([40], gap=0)))
    assert [(numbers(w.frames)[0], w.context) for w in parts] == [(0, 0), (16, 0), (24, 8)]


@pytest.mark.parametrize("lengths", [[10, 30], [1, 2, 3, 16, 17, 1], [16, 16, 40], [5] * 6])
def test_windows_end_at_cuts(lengths):
    """Each scene has the split_windows that it would have as a clip of its own."""
    shots, wanted, start = [], [], 0
    for scene, length in enumerate(lengths):
        alone = shots_of([length], gap=0)
        wanted += [([start + n for n in numbers(w.frames)], w.context) for w in split_windows(alone)]
        shots += [replace(shot, frame=shot.frame + start, shot=scene) for shot in alone]
        start += length
    assert [(numbers(w.frames), w.context) for w in split_windows(shots)] == wanted


def scenes_of(frames, *, cuts, scenes=True, **_):
    """A tracker to whom scenes begin at these positions; `scenes`: whether it tells the pipeline so."""
    frames = list(frames)
    for scene, (start, end) in enumerate(itertools.pairwise([0, *cuts, len(frames)])):
        for frame, face in track_faces(frames[start:end]):
            yield frame, replace(face, shot=scene * scenes)


def test_a_looped_video_is_cut_at_the_same_places_backward_and_not_where_it_turns(models, wav, monkeypatch):
    monkeypatch.setattr(aligning, "track_people", one_person(lambda frames, **_: scenes_of(frames, cuts=(7, 9))))
    cut, painted = [], pipeline.split_windows

    def watched(shots):
        for part in painted(shots):
            cut.append([shot.source for shot in part.new])
            yield part

    monkeypatch.setattr(pipeline, "split_windows", watched)
    list(generate_frames(Source(there_and_back(12, 30), wav, 30, True), models, Settings(steps=1), StageClock()))
    assert cut == [[*range(7)], [7, 8], [9, 10, 11, 11, 10, 9], [8, 7], [*range(6, -1, -1), *range(6)]]


@pytest.mark.parametrize("scenes", [False, True])
def test_what_lies_behind_a_cut_does_not_change_the_frames_before_it(models, wav, monkeypatch, scenes):
    """Within a window frames do depend on one another, so that without scenes the test fails."""
    monkeypatch.setattr(
        aligning, "track_people", one_person(lambda frames, **_: scenes_of(frames, cuts=(10,), scenes=scenes))
    )

    def painted(shade: int) -> np.ndarray:
        frames = [portrait(t) if t < 10 else portrait(t) // shade for t in range(20)]
        return stacked(
            list(generate_frames(Source(enumerate(frames), wav, 20), models, Settings(steps=2), StageClock()))
        )

    assert np.array_equal(painted(1)[:10], painted(2)[:10]) == scenes


def test_windows_are_emitted_as_soon_as_they_are_full():
    taken = []
    parts = split_windows(taken.append(shot) or shot for shot in shots_of([100], gap=0))
    next(parts)
    assert len(taken) == WINDOW
    next(parts)
    assert len(taken) == 2 * WINDOW


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_keep_the_order_and_hold_little(size):
    for runs in runs_to_try():
        parts = list(split_windows(shots_of(runs)))
        groups = list(group_windows(parts, size))
        assert [part for group in groups for part in group] == parts
        for group in groups:
            assert 0 < sum(isinstance(part, Window) for part in group) <= size or len(group) <= size * WINDOW
            assert sum(len(p.frames) if isinstance(p, Window) else 1 for p in group) < (size + 1) * WINDOW


def test_frames_without_a_face_do_not_wait_for_one_that_never_comes():
    parts = group_windows(split_windows(shots_of([0], gap=1000)), 2)
    assert max(len(group) for group in parts) <= 2 * WINDOW


def test_the_clock_charges_each_stage_its_own_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pipeline.time, "perf_counter", lambda: now[0])

    def stage(items, seconds, every=1):
        for i, item in enumerate(items):
            if i % every == 0:
                now[0] += seconds
            yield item

    clock = StageClock()
    inner = clock.time(stage(range(20), 1), "inner")
    twin = clock.time(stage(range(20), 3), "twin")
    middle = clock.time(stage(((a, next(twin)) for a in inner), 10), "middle")
    outer = clock.time(stage(middle, 100, every=4), "outer")
    for _ in outer:
        now[0] += 1000  # the caller's own time is nobody's
    assert clock.seconds == {"inner": 20, "twin": 60, "middle": 200, "outer": 500}


def test_the_clock_keeps_threads_apart():
    wanted = threading.Semaphore(0)

    def slow():
        for i in range(10):
            wanted.acquire()
            time.sleep(0.02)
            yield i

    def asking(items):
        """Let an item be made when it is waited for, and not before."""
        while True:
            wanted.release()
            try:
                yield next(items)
            except StopIteration:
                return

    clock = StageClock()
    began = time.perf_counter()
    made = prefetch(clock.time(slow(), "slow"), 2, "slow")
    assert list(clock.time(clock.wait(asking(made), "slow"), "fast")) == list(range(10))
    spent = time.perf_counter() - began
    slept = 10 * 0.02 - 0.01  # clocks are coarse
    assert slept <= clock.seconds["slow"] <= spent
    assert slept <= clock.waiting["slow"]  # the other thread's time is not the waiting one's own
    assert clock.seconds["fast"] + clock.waiting["slow"] <= spent


class Slate:
    """A painter that records its calls."""

    settings = Settings()

    def __init__(self, max_pending: int):
        self.max_pending, self.calls = max_pending, []

    def paint(self, windows: list[Window]) -> int:
        first = numbers(windows[0].frames)[0]
        self.calls.append(f"queue {first}")
        return first

    def queue_paste(self) -> None:
        pass

    def finish(self, first: int) -> list[Window]:
        self.calls.append(f"finish {first}")
        return []


@pytest.mark.parametrize("behind", [0, 1])
def test_a_group_is_finished_when_the_device_has_the_next_ones(behind):
    slate = Slate(behind)
    shots = []
    for shot in paint_groups(group_windows(split_windows(shots_of([48], gap=2)), 1), slate):
        shots.append(shot)
        slate.calls.append(f"out {numbers([shot])[0]}")
    assert numbers(shots) == list(range(50))
    told = [line for line in slate.calls if not line.startswith("out") or int(line[4:]) % WINDOW == 0]
    wanted = {
        0: ["queue 0", "finish 0", "out 0", "queue 16", "finish 16", "out 16", "queue 32", "finish 32", "out 32"],
        # The first one at once, to be shown.
        1: ["queue 0", "finish 0", "out 0", "queue 16", "queue 32", "finish 16", "out 16", "finish 32", "out 32"],
    }
    assert told == [*wanted[behind], "out 48"]


def test_the_host_waits_for_the_third_last_step(models, monkeypatch):
    waited = []

    class Event:
        def __init__(self, step: int):
            self.synchronize = lambda: waited.append(step)

    painter = Painter(models, Settings(steps=1))
    painter.on_gpu = True
    steps_behind = []
    for step in range(6):
        monkeypatch.setattr(painting, "record_event", lambda _, step=step: Event(step))
        painter.on_denoising_step(step)
        steps_behind.append(step - (waited[-1] if waited else -1))
    assert waited == [0, 1, 2] and steps_behind == [1, 2, 3, 3, 3, 3]


def test_stages_that_overlap_give_what_they_give_in_turns(models, wav):
    settings = Settings(steps=2)
    tokens = audio_chunks(models.audio_encoder, wav, FRAMES, silence_gate=settings.silence_gate)
    shots = align_frames(track_faces(portrait(t) for t in range(FRAMES)), tokens, models.resolution)
    in_turns = list(paint_groups(group_windows(split_windows(shots), 1), Painter(models, settings)))
    assert np.array_equal(stacked(in_turns), stacked(run(models, wav)))


def test_a_delayed_painter_gives_the_same_video(models, wav, monkeypatch):
    at_once = stacked(run(models, wav))
    delayed(monkeypatch)
    assert np.array_equal(at_once, stacked(run(models, wav)))


def delayed(monkeypatch) -> None:
    """Let painters finish a group when the next one has been queued, as on a GPU."""
    given = Painter.__init__

    def one_behind(self, *args):
        given(self, *args)
        self.max_pending = 1

    monkeypatch.setattr(Painter, "__init__", one_behind)


def test_a_delayed_painter_pastes_behind_the_first_step_of_the_next_pass(models, wav, monkeypatch):
    done, (paste, on_denoising_step) = [], (PendingPass._pasted_regions, Painter.on_denoising_step)
    monkeypatch.setattr(PendingPass, "_pasted_regions", lambda self: (done.append("paste"), paste(self))[1])
    monkeypatch.setattr(Painter, "on_denoising_step", lambda self, i: (done.append(i), on_denoising_step(self, i))[1])
    delayed(monkeypatch)
    run(models, wav)
    first, second, later = [0, 1, "paste"], [0, 1], [0, "paste", 1]
    assert done == [*first, *second, *later * (math.ceil(FRAMES / WINDOW) - 2), "paste"]


def test_a_part_of_the_frame_is_pasted_as_the_whole_is(models):
    generator = torch.Generator().manual_seed(0)
    faces = torch.rand(5, 3, 64, 64, generator=generator) * 2 - 1
    shots, wanted = [], []
    # In the picture, small, over its edge, turned, and beyond it.
    matrices = [(0.5, 0, -10, -5), (2, 0, -100, -90), (0.4, 0, 20, 10), (0.5, 0.2, -30, -5), (0.5, 0, 4000, 0)]
    for i, (face, (a, b, x, y)) in enumerate(zip(faces, matrices, strict=True)):
        matrix = np.array([[a, -b, x], [b, a, y]], np.float32)
        frame = torch.randint(0, 256, (SIDE, SIDE + 20, 3), dtype=torch.uint8, generator=generator)
        shots.append(AlignedFrame(frame.numpy().copy(), torch.empty(0), CROP, matrix, 1 - i / 10))
        paste(frame, face, matrix, 1 - i / 10)
        wanted.append(frame.numpy())
    before = stacked(shots)
    pending = PendingPass([Window(shots)], faces, torch.zeros(5, dtype=torch.bool), own_face=False)
    pending.queue_paste()
    assert np.array_equal(stacked(shots), before)  # until it is finished
    assert pending.finish() == []
    assert np.array_equal(stacked(shots), np.stack(wanted))
    assert [np.array_equal(*pair) for pair in zip(before, wanted, strict=True)] == [False] * 4 + [True]


def test_the_autoencoder_sees_few_frames_at_a_time(models, wav, monkeypatch):
    passes = {"encode_conditioning": [], "decode": []}

    def counted(name):
        real = getattr(painting, name)
        monkeypatch.setattr(painting, name, lambda vae, x, *rest: passes[name].append(len(x)) or real(vae, x, *rest))

    whole = stacked(run(models, wav))
    counted("encode_conditioning"), counted("decode")
    parts = stacked(run(models, wav, frames_per_pass=6, windows_per_pass=2))
    # On a processor faces are encoded one by one, so that their latents do not depend on those beside them.
    assert passes == {"encode_conditioning": [1] * 48, "decode": [6] * 5 + [2, 6, 2]}
    assert psnr(whole, parts) >= 50


@pytest.mark.parametrize("name", ["windows_per_pass", "frames_per_pass"])
def test_passes_of_nothing_are_refused(name):
    with pytest.raises(UserError, match=f"{name} = 0"):
        Settings(**{name: 0})


def test_several_windows_a_pass_give_the_same_video(models, wav):
    one, three = (stacked(run(models, wav, windows_per_pass=n)) for n in (1, 3))
    assert psnr(one, three) >= 50


def test_a_seed_says_what_comes_out(models, wav):
    first, same, other = (stacked(run(models, wav, seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_the_sound_and_the_settings_change_what_comes_out(models, wav):
    plain = stacked(run(models, wav))
    assert not np.array_equal(plain, stacked(run(models, wav.flip(0))))
    assert not np.array_equal(plain, stacked(run(models, wav, guidance_scale=3)))
    assert not np.array_equal(plain, stacked(run(models, wav, cache=DeepCache(2, 0))))


def test_pixels_outside_the_face_are_those_of_the_decoded_frame(models, wav):
    for t, shot in enumerate(run(models, wav)):
        given = portrait(t)
        x0, y0, x1, y1 = frame_rectangle(shot.matrix, models.resolution, given.shape, margin=2)
        assert (x1 - x0) * (y1 - y0) < 0.8 * SIDE * SIDE
        assert np.abs(shot.frame[y0:y1, x0:x1].astype(int) - given[y0:y1, x0:x1]).mean() > 1
        shot.frame[y0:y1, x0:x1] = given[y0:y1, x0:x1]
        assert np.array_equal(shot.frame, given)


def test_a_frame_is_painted_once_and_then_left_alone(models, wav):
    frames = (portrait(t) for t in range(FRAMES))
    shots = generate_frames(Source(enumerate(frames), wav, FRAMES), models, Settings(steps=1), StageClock())
    as_given = [(shot, shot.frame.copy()) for shot in shots]
    assert all(np.array_equal(shot.frame, copy) for shot, copy in as_given)


def still(models, monkeypatch, face: bool = True) -> None:
    """Let faces and painting take no time; with `max_pending` as on a GPU."""

    def instead(tracked, tokens, *_):
        for frame, _ in tracked:
            yield AlignedFrame(frame, next(tokens), CROP if face else None)

    monkeypatch.setattr(aligning, "track_people", one_person(lambda frames, **_: ((frame, None) for frame in frames)))
    monkeypatch.setattr(aligning, "align_frames", instead)
    monkeypatch.setattr(pipeline, "Painter", lambda *_: Slate(1))
    monkeypatch.setattr(aligning, "audio_chunks", lambda *_: iter(lambda: torch.empty(0), None))


@pytest.mark.parametrize("size", [1, 3])
def test_a_run_holds_few_frames(models, wav, monkeypatch, size):
    """As many as the settings say, whatever the length, and whoever is slow."""
    still(models, monkeypatch)
    frames = []

    def made():
        for i in range(600):
            frame = np.array(i)
            frames.append(weakref.ref(frame))
            yield frame
            del frame

    settings = Settings(windows_per_pass=size)
    most, least = 0, buffered_crops(settings) + DECODED_FRAMES
    for i, shot in enumerate(generate_frames(Source(enumerate(made()), wav, 600), models, settings, StageClock())):
        assert int(shot.frame) == i
        deadline = time.monotonic() + (60 if i == 100 else 0)
        while True:
            most = max(most, sum(frame() is not None for frame in list(frames)))
            if most > least or time.monotonic() > deadline:
                break
            time.sleep(0.01)  # the others fill their queues
    assert i == 599
    assert least < most <= max_frames(settings) - buffered_results(settings)


def test_stages_work_at_the_same_time(models, wav, monkeypatch):
    """Decoding, finding faces and writing meet ten times, each with another frame in its hand."""
    at_once = threading.Barrier(3)

    def meet(items, first):
        for i, item in enumerate(items):
            if first <= i < first + 10:
                at_once.wait(60)
            yield item

    still(models, monkeypatch, face=False)
    align_frames = aligning.align_frames
    monkeypatch.setattr(aligning, "align_frames", lambda *given: meet(align_frames(*given), 2 * WINDOW + 2))
    frames = meet(map(np.array, range(80)), 2 * WINDOW + 4)  # writing begins behind a group of up to two split_windows
    shots = generate_frames(Source(enumerate(frames), wav, 80), models, Settings(), StageClock())
    assert len(list(meet(shots, 0))) == 80


def test_what_decoding_raises_ends_the_run(models, wav, monkeypatch):
    still(models, monkeypatch)
    before = threading.enumerate()

    def frames():
        yield from map(np.array, range(20))
        raise UserError("cut off")

    done = []
    with pytest.raises(UserError, match="cut off"):
        for shot in generate_frames(Source(enumerate(frames()), wav, 40), models, Settings(), StageClock()):
            done.append(shot)
    assert threading.enumerate() == before


def test_progress_reaches_the_end_in_every_stage(models, talking, voice, tmp_path):
    seen = {}
    report = lipsync(
        talking,
        voice,
        tmp_path / "out.mp4",
        models,
        Settings(steps=1),
        Hooks(on_progress=lambda stage, done, total: seen.setdefault(stage, []).append((done, total))),
    )
    assert set(seen) == set(STAGES)
    for steps in seen.values():
        # A step of denoising reports the frames that are done by then once more.
        assert [step for step, before in zip(steps, [(0, 20), *steps], strict=False) if step != before] == [
            (i, 20) for i in range(1, 21)
        ]
    assert report.frames == 20 and report.frames_without_face == 0
    assert all(0 < seconds <= report.total_seconds for seconds in report.seconds.values())
    assert all(0 <= seconds < report.total_seconds for seconds in report.waiting.values())
    assert set(report.waiting) == {"reading", "faces", "sound", "crops", "models", "writing"}
    assert sum(report.seconds.values()) > 0.5 * report.total_seconds


def test_a_video_shorter_than_the_sound_is_played_forward_and_backward(models, talking, tmp_path, wav):
    from scipy.io import wavfile

    sound = tmp_path / "long.wav"
    wavfile.write(sound, 16000, wav.numpy())
    lipsync(talking, sound, tmp_path / "out.mkv", models, Settings(steps=1))
    given, made = (list(read_frames(probe_video(path))) for path in (talking, tmp_path / "out.mkv"))
    n = len(given)
    assert len(made) == frame_count(len(wav)) == FRAMES > n
    for t in range(FRAMES):
        source = given[t if t < n else 2 * n - 1 - t]
        assert psnr(source[:20], made[t][:20]) > 35  # above the face


class Stop(Exception):
    pass


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("at", [1, 20])
def test_an_exception_from_the_progress_stops_the_run_and_leaves_nothing(models, talking, voice, tmp_path, stage, at):
    before = threading.enumerate()
    stopped = []

    def stop(name, done, total):
        assert threading.current_thread() is threading.main_thread()
        if name == stage and done == at:
            stopped.append(time.monotonic())
            raise Stop

    with pytest.raises(Stop):
        lipsync(talking, voice, tmp_path / "out.mp4", models, Settings(steps=1), Hooks(on_progress=stop))
    assert time.monotonic() - stopped[0] < 20  # a second on an idle machine
    assert os.listdir(tmp_path) == []
    assert threading.enumerate() == before


@pytest.mark.parametrize("where", ["progress", "frame"])
def test_a_run_that_has_enough_keeps_its_finished_part_with_the_sound_up_to_there(models, talking, tmp_path, where):
    sound, output = make_sound(tmp_path / "long.wav", seconds=4), tmp_path / "out.mp4"
    seen = []

    def progress(stage, done, _):
        if where == "progress" and stage == "mouths" and done == 40:
            raise StopEarly

    def on_frame(frame):
        seen.append(frame.shape)
        if where == "frame" and len(seen) == 30:
            raise StopEarly

    threads = threading.active_count()
    report = lipsync(talking, sound, output, models, Settings(steps=1), Hooks(on_progress=progress, on_frame=on_frame))
    assert report.ended_early and set(seen) == {(SIDE, SIDE, 3)}
    assert report.frames == len(seen) == len(list(read_frames(probe_video(output)))) < 100
    assert abs(probe_audio(output).duration - report.frames / 25) < 0.3
    assert COMMENT.encode() in output.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["long.wav", "out.mp4"] and threading.active_count() == threads


def test_enough_before_the_first_frame_leaves_nothing(models, talking, voice, tmp_path):
    def progress(*_):
        raise StopEarly

    with pytest.raises(StopEarly):
        lipsync(talking, voice, tmp_path / "out.mp4", models, Settings(steps=1), Hooks(on_progress=progress))
    assert os.listdir(tmp_path) == []


def test_frames_are_shown_in_order_as_they_are_written(models, talking, voice, tmp_path):
    seen = []
    settings = Settings(steps=1, crf=1)
    lipsync(
        talking, voice, tmp_path / "out.mkv", models, settings, Hooks(on_frame=lambda frame: seen.append(frame.copy()))
    )
    written = np.stack(list(read_frames(probe_video(tmp_path / "out.mkv"))))
    assert len(seen) == len(written) and psnr(np.stack(seen), written) > 35


def test_a_face_that_there_is_not_is_refused():
    with pytest.raises(UserError, match="largest, left, right, centre"):
        Settings(face="pretty")


def test_an_encoder_that_dies_stops_the_run_and_leaves_nothing(models, talking, voice, tmp_path, monkeypatch):
    enter, processes = VideoWriter.__enter__, []

    def entered(self):
        enter(self)
        processes.append(self._process)
        return self

    def kill(stage, *_):
        if stage == "writing":
            processes[0].kill()

    before = threading.enumerate()
    monkeypatch.setattr(VideoWriter, "__enter__", entered)
    with pytest.raises(UserError, match="was ended from outside .SIGKILL. while it wrote"):
        lipsync(talking, voice, tmp_path / "out.mp4", models, Settings(steps=1), Hooks(on_progress=kill))
    assert os.listdir(tmp_path) == []
    assert threading.enumerate() == before


def test_a_frame_that_cannot_be_written_stops_the_denoising(models, talking, voice, tmp_path, monkeypatch):
    def full(self, frame):
        raise UserError("no room.")

    steps = []
    monkeypatch.setattr(VideoWriter, "write", full)
    with pytest.raises(UserError, match="no room"):
        lipsync(
            talking,
            voice,
            tmp_path / "out.mp4",
            models,
            Settings(steps=40),
            Hooks(on_progress=lambda stage, done, total: steps.append(done) if stage == "mouths" else None),
        )
    assert 40 < len(steps) < 40 + WINDOW + 20  # in the second window
    assert os.listdir(tmp_path) == []


def test_colours_of_the_visible_part_come_back_on_the_whole_face():
    generator = torch.Generator().manual_seed(0)
    crops = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=generator)
    original = to_pixels(crops, torch.float32)
    tint = torch.tensor([[0.7, 0.2, 0.0], [0.0, 0.8, 0.1], [0.1, 0.0, 0.9]])
    tinted = torch.einsum("ij,njhw->nihw", tint, original) + torch.tensor([0.2, -0.1, 0.05])[:, None, None]
    mask = torch.ones(64, 64)
    mask[32:] = 0
    matched = match_colours(tinted, crops, mask)
    assert float((matched - original).abs().max()) < 1 / 127.5


def failing_denoise(models, monkeypatch, failures: int) -> list[int]:
    """Let the first passes run out of memory; returns the split_windows of every pass, as they come."""
    passes = []

    def short_of_memory(unet, noise, conditioning, *rest):
        passes.append(len(conditioning))
        if len(passes) <= failures:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return denoise(unet, noise, conditioning, *rest)

    monkeypatch.setattr(painting, "denoise", short_of_memory)
    return passes


def test_a_run_short_of_memory_goes_on_with_less_and_loses_no_frame(models, wav, monkeypatch):
    wanted = run(models, wav, windows_per_pass=2)
    offers = iter([Settings(steps=2, windows_per_pass=2), Settings(steps=2, windows_per_pass=1)])
    passes = failing_denoise(models, monkeypatch, failures=2)
    frames = (portrait(t) for t in range(FRAMES))
    settings = Settings(steps=2, windows_per_pass=2)
    shots = generate_frames(
        Source(enumerate(frames), wav, FRAMES), models, settings, StageClock(), on_out_of_memory=lambda: next(offers)
    )
    found = list(shots)
    assert passes == [2, 2, 1, 1, 1], "the rest of the run goes on with what sufficed"
    assert len(found) == FRAMES
    for ours, theirs in zip(found, wanted, strict=True):
        assert psnr(ours.frame, theirs.frame) > 50


def test_a_frame_whose_pasting_ran_out_of_memory_is_pasted_again(models, wav, monkeypatch):
    wanted, paste, failures = stacked(run(models, wav)), PendingPass._pasted_regions, iter([True])
    delayed(monkeypatch)

    def short_of_memory(*args):
        if next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return paste(*args)

    monkeypatch.setattr(PendingPass, "_pasted_regions", short_of_memory)
    settings = Settings(steps=2)
    frames = enumerate(portrait(t) for t in range(FRAMES))
    shots = generate_frames(
        Source(frames, wav, FRAMES), models, settings, StageClock(), on_out_of_memory=lambda: settings
    )
    assert np.array_equal(stacked(list(shots)), wanted)
    assert next(failures, None) is None


def test_a_run_that_nothing_relieves_fails_with_the_memory_error(models, wav, monkeypatch):
    failing_denoise(models, monkeypatch, failures=100)
    for relieve in (None, lambda: None):
        frames = (portrait(t) for t in range(FRAMES))
        with pytest.raises(torch.OutOfMemoryError):
            clock = StageClock()
            list(
                generate_frames(
                    Source(enumerate(frames), wav, FRAMES), models, Settings(steps=2), clock, on_out_of_memory=relieve
                )
            )


def there_and_back(n: int, count: int):
    """`count` numbered frames of a face, 0 to n - 1 and back, and so on."""
    for i in range(count):
        number = min(i % (2 * n), 2 * n - 1 - i % (2 * n))
        yield number, portrait(number)


@pytest.mark.parametrize("n", [1, 10, 16, 23])
def test_a_video_that_comes_again_is_searched_and_encoded_once(models, wav, monkeypatch, n):
    searched, encoded = [], []
    track = track_faces

    def counted(frames, **options):
        return track((searched.append(0) or frame for frame in frames), **options)

    def counted_condition(vae, pixels, mask):
        encoded.append(len(pixels))
        return encode_conditioning(vae, pixels, mask)

    monkeypatch.setattr(aligning, "track_people", one_person(counted))
    monkeypatch.setattr(painting, "encode_conditioning", counted_condition)
    frames = there_and_back(n, FRAMES)
    shots = list(generate_frames(Source(frames, wav, FRAMES, True), models, Settings(steps=1), StageClock()))
    assert len(shots) == FRAMES and len(searched) == n
    assert [shot.source for shot in shots] == [number for number, _ in there_and_back(n, FRAMES)]
    assert sum(encoded) <= -(-n // WINDOW) * WINDOW + WINDOW, "split_windows of known faces are not encoded again"
    for shot in shots:
        first = shots[shot.source]
        assert np.array_equal(shot.crop, first.crop) and np.array_equal(shot.matrix, first.matrix)


def test_faces_that_come_again_are_painted_as_if_encoded_anew(models, wav, monkeypatch):
    def painted() -> np.ndarray:
        frames = there_and_back(16, FRAMES)
        return stacked(
            list(generate_frames(Source(frames, wav, FRAMES, True), models, Settings(steps=2), StageClock()))
        )

    wanted = painted()
    monkeypatch.setattr(Painter, "cached_conditioning", forgetful(Painter.cached_conditioning))
    assert np.abs(painted().astype(int) - wanted.astype(int)).max() <= 1


def forgetful(condition):
    def encode_anew(self, shots, crops):
        self.conditioning.clear()
        return condition(self, shots, crops)

    return encode_anew


def test_a_video_whose_faces_are_too_many_to_be_kept_is_cut_out_again_and_searched_once(models, wav, monkeypatch):
    whole = list(
        generate_frames(Source(there_and_back(10, FRAMES), wav, FRAMES, True), models, Settings(steps=1), StageClock())
    )
    monkeypatch.setattr(aligning, "MAX_CROP_BYTES", 5 * 3 * models.resolution**2)
    searched, track = [], track_faces
    monkeypatch.setattr(
        aligning,
        "track_people",
        one_person(lambda frames, **others: track((searched.append(0) or f for f in frames), **others)),
    )
    frames = there_and_back(10, FRAMES)
    shots = list(generate_frames(Source(frames, wav, FRAMES, True), models, Settings(steps=1), StageClock()))
    numbers = [number for number, _ in there_and_back(10, FRAMES)]
    assert len(searched) == 10
    assert [shot.source for shot in shots] == [number if number < 5 else None for number in numbers]
    for ours, theirs in zip(shots, whole, strict=True):
        assert np.array_equal(ours.crop, theirs.crop) and np.array_equal(ours.frame, theirs.frame)


def test_large_pictures_go_through_in_fewer_windows_or_are_refused_with_a_sentence(tmp_path, monkeypatch):
    info = replace(probe_video(make_video(tmp_path / "a.mp4", seconds=0.2)), width=3840, height=2160)
    settings = Settings(windows_per_pass=4)

    def free(gigabytes: float) -> None:
        monkeypatch.setattr(pipeline, "available_memory", lambda: int(gigabytes * 1e9))

    found = []
    for gigabytes in (16, 8, 5):
        free(gigabytes)
        fewer = fit_memory(settings, info)
        assert max_frames(fewer) * 3 * 3840 * 2160 <= 0.8 * gigabytes * 1e9
        assert replace(fewer, windows_per_pass=4) == settings
        found.append(fewer.windows_per_pass)
    assert found == [4, 2, 1]
    free(3)
    with pytest.raises(UserError, match=r"a\.mp4.*3840 × 2160.*smaller"):
        fit_memory(settings, info)


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 1000}, {"windows_per_pass": 0}, {"frames_per_pass": 0}])
def test_settings_that_cannot_be_are_refused(options):
    with pytest.raises(UserError, match="give a number from 1"):
        Settings(**options)


def test_a_cache_of_layers_that_the_model_has_not_is_refused(models):
    branches = 3 * len(models.unet.config.block_out_channels)
    Painter(models, Settings(cache=DeepCache(3, branches - 1)))
    with pytest.raises(UserError, match=f"from 0 to {branches - 1}"):
        Painter(models, Settings(cache=DeepCache(3, branches)))


@pytest.mark.parametrize("ends_only", [True, False])
def test_a_model_that_reads_cheeks_and_jaw_is_told_of_a_windows_ends(models, wav, monkeypatch, ends_only):
    told, encoded = [], []

    def watched(unet, noise, given, *rest):
        told.append(given.transpose(1, 2).clone())
        return denoise(unet, noise, given, *rest)

    def counted(vae, pixels, mask):
        encoded.append(len(pixels))
        return encode_conditioning(vae, pixels, mask)

    monkeypatch.setattr(painting, "encode_conditioning", counted)
    monkeypatch.setattr(painting, "denoise", watched)
    run(replace(models, ends_only=ends_only), wav)
    assert sum(encoded) == sum(2 if ends_only else group.shape[1] for group in told for _ in group)
    for frames in (window for group in told for window in group):
        steps = torch.linspace(0, 1, len(frames))
        between = torch.stack([torch.lerp(frames[0], frames[-1], step) for step in steps])
        assert torch.allclose(frames, between, atol=1e-4) == ends_only
        assert not torch.equal(frames[0], frames[-1])


def test_what_lies_between_the_ends_is_known_to_the_bit_there():
    first, last = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    given = interpolate_ends(first, last, 5)
    assert torch.equal(given[:, 0], first) and torch.equal(given[:, 4], last)
    assert torch.allclose(given[:, 2], (first + last) / 2, atol=1e-6)  # rounding of values of about 1
    assert torch.equal(interpolate_ends(first, last, 1), first[:, None]), "a window of one frame has one end"
