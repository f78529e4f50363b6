"""The benchmark: what its rows say, what they are compared with, and that one failure does not end a table."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import load_models
from latentsync.settings import DeepCache, Settings
from optim.benchmark import __main__ as benchmark
from optim.benchmark import rows as measuring
from optim.benchmark.first import first_rows
from optim.benchmark.flops import audio_flops, window_flops
from optim.benchmark.reference import PlainUNet
from optim.benchmark.rows import CACHED_REFERENCE, REFERENCE, BenchmarkConfig, start_rows, window_rows
from optim.benchmark.windows import Timing, mean_utilization, pipeline_stages, released_config
from optim.levels import CONSERVATIVE, STOPS, find_level
from optim.monitor import GpuHistory, History

BALANCED, AGGRESSIVE = find_level("balanced"), find_level("aggressive")
CPU = torch.device("cpu")
NAMES = [REFERENCE, CACHED_REFERENCE, "conservative", "balanced", "aggressive"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(checkpoint):
    torch.set_num_threads(1)  # before `one_thread` can
    return load_models(resolve_model(str(checkpoint), CPU), CPU, torch.float32)


@pytest.fixture(scope="module")
def measured(models, checkpoint):
    """Rows of a real run, of two steps."""
    return list(window_rows(models, [64], BenchmarkConfig(CPU, str(checkpoint), steps=2, repeats=1), 1e9))


class FakeClock:
    """In the place of `time_stages`: runs nothing, and reports the next seconds of the list, or fails.

    The pixels are those seconds, or of another value where that is given with them.
    """

    def __init__(self, *seconds, windows=1):
        self.seconds, self.windows = list(seconds), windows

    def __call__(self, stages, device, repeats):
        seconds = self.seconds.pop(0)
        if isinstance(seconds, Exception):
            raise seconds
        seconds, value = seconds if isinstance(seconds, tuple) else (seconds, seconds)
        pixels = torch.full((16 * self.windows, 1), value)
        return Timing(0.25 * seconds, 0.5 * seconds, 0.25 * seconds, None, pixels)


# ---- windows


def test_the_rows_of_a_run_are_whole_and_sane(measured):
    assert [row.name for row in measured] == NAMES and not any(row.failed for row in measured)
    for row in measured:
        assert row.resolution == 64 and row.windows == 1 and row.allocated is None and row.utilization is None
        assert min(row.encode, row.denoise, row.decode) > 0
        assert row.seconds == pytest.approx(row.encode + row.denoise + row.decode)
        assert row.frames_per_second == pytest.approx(16 / row.seconds)
        assert row.ratio == pytest.approx(measured[0].seconds / row.seconds)
        assert row.share == pytest.approx(row.tflop * 1e12 / row.seconds / 1e9)
    assert [row.steps for row in measured] == [2, 2, 2, 2, 1]
    work = [row.tflop for row in measured]
    assert work[0] > work[2] > work[3] > work[4] and work[0] > work[1]


def test_conservative_makes_the_reference_s_pixels_and_the_others_do_not(measured):
    errors = {row.name: row.error for row in measured}
    assert errors[REFERENCE] is None
    assert errors["conservative"] < 1e-4
    assert errors["balanced"] > 5e-4 and errors["aggressive"] > 5e-4


def test_ratios_are_to_the_plain_reference_of_the_same_resolution(models, checkpoint, monkeypatch):
    monkeypatch.setattr(measuring, "time_stages", FakeClock(8.0, 4.0, 2.0, 1.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.2))
    rows = list(window_rows(models, [128, 64], BenchmarkConfig(CPU, str(checkpoint))))
    ratios = {(row.resolution, row.name): row.ratio for row in rows}
    assert ratios == {
        (128, REFERENCE): 1, (128, CACHED_REFERENCE): 2, (64, REFERENCE): 1, (64, CACHED_REFERENCE): 2,
        (128, "conservative"): 2, (128, "balanced"): 4, (128, "aggressive"): 8,
        (64, "conservative"): 4, (64, "balanced"): 8, (64, "aggressive"): 10,
    }  # fmt: skip


def test_windows_that_go_together_count_together(models, checkpoint, monkeypatch):
    def two(level, config, resolution, gpu):
        plan = make_plan(level, config, resolution, gpu)
        return dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, windows_per_pass=2))

    make_plan = measuring.make_plan
    monkeypatch.setattr(measuring, "make_plan", two)
    monkeypatch.setattr(measuring, "time_stages", FakeClock(4.0, 4.0, 4.0, windows=2))
    config = BenchmarkConfig(CPU, str(checkpoint), levels=(CONSERVATIVE,))
    row = list(window_rows(models, [64], config))[-1]
    assert (row.windows, row.seconds, row.frames_per_second, row.ratio) == (2, 2.0, 8.0, 2.0)


@torch.inference_mode()
def test_a_window_is_the_same_in_company(models):
    alone = pipeline_stages(models, Settings(steps=1)).run()
    both = pipeline_stages(models, Settings(steps=1, frames_per_pass=12, windows_per_pass=2)).run()
    assert len(both) == 32
    apart, wrong = ((part - alone).abs().max() for part in (both[:16], both[16:]))
    assert apart < 1e-4 < 1e-3 < wrong


@pytest.mark.parametrize("failing", (0, 3))
def test_a_row_that_fails_leaves_the_others(models, checkpoint, monkeypatch, failing):
    seconds = [4.0, 2.0, 2.0, 1.0, 0.5]
    seconds[failing] = torch.OutOfMemoryError("too large\nby much")
    monkeypatch.setattr(measuring, "time_stages", FakeClock(*seconds))
    rows = list(window_rows(models, [64], BenchmarkConfig(CPU, str(checkpoint))))
    assert [row.name for row in rows] == NAMES
    assert [row.failed for row in rows] == ["OutOfMemoryError: too large" if i == failing else "" for i in range(5)]
    assert "failed: OutOfMemoryError" in benchmark.window_line(rows[failing])
    for row in rows:
        assert benchmark.window_line(row)
        assert (row.ratio is None) == (failing in (0, rows.index(row)))


def test_a_level_without_a_plan_is_a_row_that_fails(models, checkpoint, monkeypatch):
    def refuse(*_):
        raise ValueError("no plan")

    monkeypatch.setattr(measuring, "make_plan", refuse)
    monkeypatch.setattr(measuring, "time_stages", FakeClock(1.0, 1.0))
    rows = list(window_rows(models, [64], BenchmarkConfig(CPU, str(checkpoint))))
    assert [row.failed for row in rows] == ["", ""] + 3 * ["ValueError: no plan"]


def test_the_reference_s_work_is_that_of_the_plain_network(models):
    config = models.unet.config

    def work(steps, cache=None, reference=False):
        return window_flops(models, Settings(steps=steps, cache=cache), reference)

    with torch.device("meta"), torch.inference_mode():
        plain = PlainUNet(released_config(config))
        inputs = torch.empty(2, 13, 16, 8, 8), torch.ones(()), torch.empty(2, 16, 50, config.cross_attention_dim)
        with FlopCounterMode(display=False) as counter:
            plain(*inputs)
    audio = 2 * audio_flops(config, models.vae.config)
    assert audio > 0
    assert work(2, reference=True) - work(1, reference=True) == pytest.approx(
        counter.get_total_flops() - audio,
        rel=1e-3,  # it embeds the time once a window
    )
    full, shallow = work(2) - work(1), work(2, DeepCache(2, 0)) - work(1)
    assert 0 < shallow < full
    assert work(7, DeepCache(3, 0)) == pytest.approx(work(3) + 4 * shallow)
    assert work(7, DeepCache(3, 0, guided=False)) < work(7, DeepCache(3, 0))


def test_utilization_is_the_mean_once_it_has_settled():
    time = np.arange(0, 4, 0.25)
    load = np.where(time < 1.5, 10.0, 90.0)
    load[-1], load[8] = 0, np.nan  # after the end; a gap
    nothing = np.full(len(time), np.nan)
    gpu = GpuHistory(0, "GPU", 0, load, *[nothing] * 5)
    history = History(time, nothing, nothing, 0, (gpu,), ())
    assert mean_utilization(history, gpu, 1.0, 3.6) == 90
    assert mean_utilization(history, gpu, 0.6, 3.6) < 90
    assert mean_utilization(history, gpu, 3.6, 3.7) is None and mean_utilization(history, None, 0, 4) is None


# ---- the start


def test_a_start_is_timed_in_a_process_of_its_own(checkpoint):
    job = {
        "what": "start", "level": AGGRESSIVE.position, "resolution": 64,
        "device": "cpu", "model": str(checkpoint), "steps": 1, "repeats": 1,
    }  # fmt: skip
    assert benchmark.run_worker(job)["seconds"] > 0
    assert "failed" in benchmark.run_worker(job | {"model": "/nowhere"})


def test_every_level_starts_cold_and_then_warm_in_folders_of_its_own():
    launched = []

    def run_in_process(job, environment):
        launched.append((job["level"], tuple(environment[name] for name in measuring.CACHE_FOLDERS)))
        if job["level"] == BALANCED.position:
            raise RuntimeError("lost")
        return {"seconds": 3.0 if len(launched) % 2 else 1.0}

    rows = list(start_rows(64, BenchmarkConfig(CPU), run_in_process))
    levels, folders = zip(*launched, strict=True)
    assert levels == (0, 0, 0.5, 1, 1)
    assert folders[0] == folders[1] != folders[3] == folders[4] and len(set(folders[0])) == 2
    assert not any(Path(folder).parent.exists() for folder in folders[0])
    assert (rows[0].cold, rows[0].warm, rows[1].failed) == (3, 1, "RuntimeError: lost")
    assert rows[2].warm and all(benchmark.start_line(row) for row in rows)


# ---- the command


def test_all_that_was_measured_is_printed_and_kept_as_json(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "run_in_process", lambda _, job, environment: {"seconds": 2.0 - job["level"]})
    monkeypatch.setattr(measuring, "time_stages", FakeClock(4.0, RuntimeError("lost"), 2.0, (1.0, float("nan")), 0.5))
    monkeypatch.setattr(benchmark, "matrix_throughput", lambda *_: 1e12)
    file = tmp_path / "results.json"
    arguments = ["--model", str(checkpoint), "--device", "cpu", "--windows", "--start", "--vram", "8"]
    assert benchmark.main([*arguments, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)
    assert "failed: RuntimeError: lost" in printed and "needs a GPU" in printed
    assert "float32" in printed.splitlines()[-1]

    results = json.loads(file.read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert results["machine"]["torch"] == torch.__version__ and results["machine"]["date"]
    rows = [measuring.WindowRow(**row) for row in results["windows"]]
    assert [row.name for row in rows] == NAMES and rows[3].error is None and rows[4].error > 0
    assert [row.ratio for row in rows] == [1, None, 2, 4, 8]
    assert [measuring.StartRow(**row).cold for row in results["starts"]] == [2, 1.5, 1]


def test_a_job_is_measured_at_every_level(checkpoint, talking, voice, monkeypatch):
    monkeypatch.setattr(measuring, "time_stages", FakeClock(0.5))
    config = BenchmarkConfig(CPU, str(checkpoint), steps=1, levels=(AGGRESSIVE,))
    (row,) = measuring.job_rows(talking, voice, 64, config)
    assert not row.failed and row.frames == 20 and row.wall > 0
    assert row.gpu == 2 * 0.5 and row.ratio == pytest.approx(row.wall / row.gpu)  # 20 frames: two windows
    assert set(row.stages) >= {"faces", "mouths", "writing"} and "mouths" in benchmark.job_line(row)


def test_a_films_first_and_second_voice_are_measured(checkpoint, talking, voice, tmp_path):
    config = BenchmarkConfig(CPU, str(checkpoint), steps=1, levels=(AGGRESSIVE,))
    (row,) = measuring.voices_rows(talking, voice, 64, config)
    assert not row.failed and row.frames == 20 and row.megabytes > 0
    assert min(row.alone, row.first, row.second) > 0 and row.ratio == pytest.approx(row.alone / row.second)
    assert "20" in benchmark.voices_line(row)
    (row,) = measuring.voices_rows(tmp_path / "no.mp4", voice, 64, config)
    assert "no.mp4" in row.failed and "failed" in benchmark.voices_line(row)


def test_the_first_window_is_timed_in_a_process_that_ends_there(checkpoint, talking, voice, tmp_path):
    config = BenchmarkConfig(CPU, str(checkpoint), steps=1, repeats=1, levels=(AGGRESSIVE,))
    (row,) = first_rows(talking, voice, config)
    assert (row.name, row.failed) == ("aggressive", "")
    assert row.median == row.seconds[0] > 0
    (row,) = first_rows(tmp_path / "no.mp4", voice, config)
    assert row.seconds == () and "no.mp4" in row.failed


def test_a_job_that_fails_is_a_row(checkpoint, tmp_path):
    config = BenchmarkConfig(CPU, str(checkpoint), steps=1)
    rows = list(measuring.job_rows(tmp_path / "no.mp4", tmp_path / "no.wav", 64, config))
    assert [row.name for row in rows] == [level.name for level in STOPS] and all(row.failed for row in rows)


def test_what_cannot_be_done_is_said(capsys):
    assert benchmark.main(["--device", "cpu"]) == 2
    assert "--model demo" in capsys.readouterr().err
    assert benchmark.main(["--levels", "fastest", "--device", "cpu", "--model", "demo"]) == 2
    assert "fastest" in capsys.readouterr().err


def test_a_film_is_prepared_only_for_a_model_in_files(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "choose_device", lambda _: torch.device("cuda"))
    assert benchmark.main(["--voices", "film.mp4", "voice.wav"]) == 2
    assert "--model" in capsys.readouterr().err
