"""The chain of stages: what is cut into windows, what is painted where, what a run reports and leaves behind."""

import os
import random

import numpy as np
import pytest
import torch
from conftest import SIDE, portrait
from skimage.metrics import peak_signal_noise_ratio as psnr

from latentsync import pipeline
from latentsync.alignment import frame_rectangle
from latentsync.audio import frame_count
from latentsync.checkpoints import load_models, resolve
from latentsync.compositing import match_colours
from latentsync.media import probe_video, read_frames
from latentsync.pipeline import STAGES, WINDOW, Settings, Shot, StageClock, Window, batches, generate, lipsync, windows
from latentsync.sampling import DeepCache
from latentsync.vae import to_pixels

CPU = torch.device("cpu")
CROP = np.zeros((1, 1, 3), np.uint8)
FRAMES = 40  # two windows and a slid-back third
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(checkpoint):
    return load_models(resolve(str(checkpoint), CPU), CPU, torch.float32)


@pytest.fixture(scope="module")
def wav():
    noise = torch.randn(FRAMES * 640, generator=torch.Generator().manual_seed(0))
    return noise * torch.linspace(0, 0.3, len(noise))


def run(models, wav, **settings) -> list[Shot]:
    frames = (portrait(t) for t in range(FRAMES))
    return list(generate(frames, wav, models, Settings(steps=2, **settings), FRAMES, StageClock()))


def stacked(shots: list[Shot]) -> np.ndarray:
    return np.stack([shot.frame for shot in shots])


def shots_of(runs: list[int], gap: int = 1) -> list[Shot]:
    """Runs of numbered shots with a face, `gap` shots without one after each."""
    faces = [face for length in runs for face in [True] * length + [False] * gap]
    return [Shot(np.array(i), torch.empty(0), CROP if face else None) for i, face in enumerate(faces)]


def numbers(shots: list[Shot]) -> list[int]:
    return [int(shot.frame) for shot in shots]


def emitted(parts: list[Window | Shot]) -> list[int]:
    return [n for p in parts for n in (numbers(p.shots[p.done :]) if isinstance(p, Window) else numbers([p]))]


def runs_to_try() -> list[list[int]]:
    some = random.Random(0)
    return [[n] for n in range(1, 51)] + [[some.randint(0, 50) for _ in range(5)] for _ in range(30)]


@pytest.mark.parametrize("gap", [0, 1, 3])
def test_windows_are_full_and_give_every_frame_once_in_order(gap):
    for runs in runs_to_try():
        shots = shots_of(runs, gap)
        parts = list(windows(shots))
        assert emitted(parts) == list(range(len(shots)))
        lengths = [sum(runs)] if gap == 0 else runs
        cut = [part for part in parts if isinstance(part, Window)]
        wanted = [min(WINDOW, n) for n in lengths for _ in range(0, n, WINDOW)]
        assert [len(window.shots) for window in cut] == wanted
        for window in cut:
            held = numbers(window.shots)
            assert held == list(range(held[0], held[0] + len(held)))  # context is what came just before
            assert all(shot.crop is not None for shot in window.shots)


def test_only_the_last_window_of_a_run_slides_back():
    parts = list(windows(shots_of([40], gap=0)))
    assert [(numbers(w.shots)[0], w.done) for w in parts] == [(0, 0), (16, 0), (24, 8)]


def test_windows_are_emitted_as_soon_as_they_are_full():
    taken = []
    parts = windows(taken.append(shot) or shot for shot in shots_of([100], gap=0))
    next(parts)
    assert len(taken) == WINDOW
    next(parts)
    assert len(taken) == 2 * WINDOW


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_keep_the_order_and_hold_little(size):
    for runs in runs_to_try():
        parts = list(windows(shots_of(runs)))
        groups = list(batches(parts, size))
        assert [part for group in groups for part in group] == parts
        for group in groups:
            assert 0 < sum(isinstance(part, Window) for part in group) <= size or len(group) <= size * WINDOW
            assert sum(len(p.shots) if isinstance(p, Window) else 1 for p in group) < (size + 1) * WINDOW


def test_frames_without_a_face_do_not_wait_for_one_that_never_comes():
    parts = batches(windows(shots_of([0], gap=1000)), 2)
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
    shots = generate(frames, wav, models, Settings(steps=1), FRAMES, StageClock())
    as_given = [(shot, shot.frame.copy()) for shot in shots]
    assert all(np.array_equal(shot.frame, copy) for shot, copy in as_given)


def test_a_run_holds_few_frames(models, wav):
    """Between decoding and encoding there is room for the tracker's frames and one window, whatever the length."""
    taken = 0

    def counted():
        nonlocal taken
        for t in range(FRAMES):
            taken += 1
            yield portrait(t)

    ahead = [
        taken - done for done, _ in enumerate(generate(counted(), wav, models, Settings(steps=1), FRAMES, StageClock()))
    ]
    assert max(ahead) <= WINDOW + 12


def test_progress_reaches_the_end_in_every_stage(models, talking, voice, tmp_path):
    seen = {}
    report = lipsync(
        talking, voice, tmp_path / "out.mp4", models, Settings(steps=1),
        lambda stage, done, total: seen.setdefault(stage, []).append((done, total)),
    )  # fmt: skip
    assert set(seen) == set(STAGES)
    for steps in seen.values():
        # A step of denoising reports the frames that are done by then once more.
        assert [step for step, before in zip(steps, [(0, 20), *steps], strict=False) if step != before] == [
            (i, 20) for i in range(1, 21)
        ]
    assert report.frames == 20 and report.frames_without_face == 0
    assert sum(report.seconds.values()) <= report.total_seconds
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
    def stop(name, done, total):
        if name == stage and done == at:
            raise Stop

    with pytest.raises(Stop):
        lipsync(talking, voice, tmp_path / "out.mp4", models, Settings(steps=1), stop)
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
