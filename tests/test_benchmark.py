"""The benchmark: what its rows say, what they are compared with, and that one failure does not end a table."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from latentsync.checkpoints import load_models, resolve
from latentsync.pipeline import Settings
from latentsync.sampling import DeepCache
from optim import accelerate, benchmark, measure, passes
from optim.benchmark import plain_json
from optim.levels import AGGRESSIVE, BALANCED, CONSERVATIVE, STOPS
from optim.measure import (
    CACHED_REFERENCE,
    REFERENCE,
    Asked,
    ClipRun,
    LengthRow,
    MemoryRow,
    clip_seconds,
    length_rows,
    order_violations,
    read_clip_run,
    window_count,
    window_rows,
)
from optim.monitor import GpuHistory, History
from optim.passes import Timing, mean_utilization, our_stages, released_words, window_work
from optim.plain import PlainUNet

CPU = torch.device("cpu")
NAMES = [REFERENCE, CACHED_REFERENCE, "conservative", "balanced", "aggressive"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(checkpoint):
    torch.set_num_threads(1)  # before `one_thread` can
    return load_models(resolve(str(checkpoint), CPU), CPU, torch.float32)


@pytest.fixture(scope="module")
def measured(models, checkpoint):
    """Rows of a real run, of two steps."""
    return list(window_rows(models, [64], Asked(CPU, str(checkpoint), steps=2, repeats=1), 1e9))


class FakeClock:
    """In the place of `time_stages`: runs nothing, and says that it took as long as is next on the list, or fails.

    The pixels are those seconds, or of another value where that is given with them.
    """

    def __init__(self, *seconds):
        self.seconds = list(seconds)

    def __call__(self, stages, device, repeats):
        seconds = self.seconds.pop(0)
        if isinstance(seconds, Exception):
            raise seconds
        seconds, value = seconds if isinstance(seconds, tuple) else (seconds, seconds)
        pixels = torch.full((16 * stages.windows, 1), value)
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
    monkeypatch.setattr(measure, "time_stages", FakeClock(8.0, 4.0, 2.0, 1.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.2))
    rows = list(window_rows(models, [128, 64], Asked(CPU, str(checkpoint))))
    ratios = {(row.resolution, row.name): row.ratio for row in rows}
    assert ratios == {
        (128, REFERENCE): 1, (128, CACHED_REFERENCE): 2, (64, REFERENCE): 1, (64, CACHED_REFERENCE): 2,
        (128, "conservative"): 2, (128, "balanced"): 4, (128, "aggressive"): 8,
        (64, "conservative"): 4, (64, "balanced"): 8, (64, "aggressive"): 10,
    }  # fmt: skip


def test_windows_that_go_together_count_together(models, checkpoint, monkeypatch):
    def two(level, asked, resolution, gpu):
        plan = make_plan(level, asked, resolution, gpu)
        return dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, windows_per_pass=2))

    make_plan = accelerate.make_plan
    monkeypatch.setattr(accelerate, "make_plan", two)
    monkeypatch.setattr(measure, "time_stages", FakeClock(4.0, 4.0, 4.0))
    asked = Asked(CPU, str(checkpoint), levels=(CONSERVATIVE,))
    row = list(window_rows(models, [64], asked))[-1]
    assert (row.windows, row.seconds, row.frames_per_second, row.ratio) == (2, 2.0, 8.0, 2.0)


@torch.inference_mode()
def test_a_window_is_the_same_in_company(models):
    alone = our_stages(models, Settings(steps=1)).run()
    both = our_stages(models, Settings(steps=1, frames_per_pass=12), 2).run()
    assert len(both) == 32
    apart, wrong = ((part - alone).abs().max() for part in (both[:16], both[16:]))
    assert apart < 1e-4 < 1e-3 < wrong


@pytest.mark.parametrize("failing", (0, 3))
def test_a_row_that_fails_leaves_the_others(models, checkpoint, monkeypatch, failing):
    seconds = [4.0, 2.0, 2.0, 1.0, 0.5]
    seconds[failing] = torch.OutOfMemoryError("too large\nby much")
    monkeypatch.setattr(measure, "time_stages", FakeClock(*seconds))
    rows = list(window_rows(models, [64], Asked(CPU, str(checkpoint))))
    assert [row.name for row in rows] == NAMES
    assert [row.failed for row in rows] == [
        "OutOfMemoryError: too large" if i == failing else "" for i in range(5)
    ]
    assert "failed: OutOfMemoryError" in benchmark.window_line(rows[failing])
    for row in rows:
        assert benchmark.window_line(row)
        assert (row.ratio is None) == (failing in (0, rows.index(row)))


def test_a_level_without_a_plan_is_a_row_that_fails(models, checkpoint, monkeypatch):
    def refuse(*_):
        raise ValueError("no plan")

    monkeypatch.setattr(accelerate, "make_plan", refuse)
    monkeypatch.setattr(measure, "time_stages", FakeClock(1.0, 1.0))
    rows = list(window_rows(models, [64], Asked(CPU, str(checkpoint))))
    assert [row.failed for row in rows] == ["", ""] + 3 * ["ValueError: no plan"]


def test_the_reference_s_work_is_that_of_the_plain_network(models):
    config, guidance = models.unet.config, 1.5

    def work(steps, cache=None, plain=False):
        return window_work(models, 64, steps, guidance, cache, plain)

    with torch.device("meta"), torch.inference_mode():
        plain = PlainUNet(released_words(config))
        inputs = torch.empty(2, 13, 16, 8, 8), torch.ones(()), torch.empty(2, 16, 50, config.cross_attention_dim)
        with FlopCounterMode(display=False) as counter:
            plain(*inputs)
    audio = 2 * passes._work_around(config, json.dumps(dict(models.vae.config), sort_keys=True, default=str), 64)[1]
    assert audio > 0
    assert work(2, plain=True) - work(1, plain=True) == pytest.approx(
        counter.get_total_flops() - audio, rel=1e-3  # it embeds the time once a window
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


# ---- clips


def test_windows_of_a_clip():
    assert [window_count(length) for length in (0.64, 0.66, 1, 4, 10, 60)] == [1, 2, 2, 7, 16, 94]


RUN = ClipRun(  # four windows together: first 10 s, then 4; three: 6, then 3; two: 5
    together=4,
    accelerate=1.0,
    clips={
        1.0: [(2, 5.0)],
        4.0: [(4, 10.0), (3, 6.0)],
        5.0: [(4, 4.1), (4, 3.9)],
        7.0: [(4, 4.0), (4, 4.0), (3, 3.0)],
    },
    more=[(2, 2.0)],
)


def test_a_clip_pays_for_its_own_start():
    assert clip_seconds(RUN, 1.0) == 1 + 5
    assert clip_seconds(RUN, 4.0) == 1 + 16 + 3  # and what the process's first pass took over a steady one
    assert clip_seconds(RUN, 5.0) == pytest.approx(1 + 8 + 6 + 3)
    assert clip_seconds(RUN, 7.0) == pytest.approx(1 + 11 + 6 + 3 + 3)


def test_a_clip_that_was_not_run_is_computed():
    # 10 s: 16 windows, four full passes; 6.5 s: 11 windows, two full passes and three
    assert clip_seconds(RUN, 10.0) == pytest.approx(1 + 4 * 4 + 6 + 3)
    assert clip_seconds(RUN, 6.5) == pytest.approx(1 + 2 * 4 + 3 + 6 + 3 + 3)


def test_clips_are_run_and_survive_the_way_between_processes(checkpoint):
    job = {
        "what": "clips", "level": AGGRESSIVE.position, "resolution": 64, "lengths": [1.0, 0.5],
        "device": "cpu", "model": str(checkpoint), "steps": 1, "repeats": 1,
    }  # fmt: skip
    found = json.loads(json.dumps(plain_json(benchmark.work(job))))
    run = read_clip_run(found)
    assert list(run.clips) == [0.5, 1.0] and [len(p) for p in run.clips.values()] == [1, 2] and run.more == []
    assert all(windows == 1 and seconds > 0 for clip in run.clips.values() for windows, seconds in clip)
    assert run.accelerate > 0 and json.loads(json.dumps(plain_json(dataclasses.asdict(run)))) == found
    assert "failed" in benchmark.work(job | {"model": "/nowhere"})


def test_every_level_starts_cold_and_then_warm_in_folders_of_its_own():
    seen = []

    def launch(job, environment):
        seen.append((job["level"], tuple(environment[name] for name in measure.CACHE_FOLDERS), job["lengths"]))
        if job["level"] == BALANCED.position:
            raise RuntimeError("lost")
        seconds = 3.0 if len(seen) % 2 else 1.0
        return {"together": 1, "accelerate": 0.0, "clips": {"1.0": [[1, seconds], [1, 1.0]]}, "more": [[1, 1.0]]}

    rows = list(length_rows(64, [60, 1.0], 10, Asked(CPU), launch))
    levels, folders, lengths = zip(*seen, strict=True)
    assert levels == (0, 0, 0.5, 1, 1) and set(map(tuple, lengths)) == {(1.0,)}
    assert folders[0] == folders[1] != folders[3] == folders[4] and len(set(folders[0])) == 2
    assert not any(Path(folder).parent.exists() for folder in folders[0])
    assert [(row.name, row.length, row.computed) for row in rows[:2]] == [
        ("conservative", 1, False), ("conservative", 60, True),
    ]  # fmt: skip
    assert (rows[0].cold, rows[0].warm, rows[0].cold_first, rows[1].warm) == (4, 2, 3, 94)
    assert [row.failed for row in rows[2:4]] == ["RuntimeError: lost"] * 2
    assert rows[4].warm and all(benchmark.length_line(row) for row in rows)


def length_row(level, cold, warm, length=1.0, resolution=512):
    return LengthRow(level.name, level.position, resolution, length, 2, cold, warm, cold, warm)


def test_the_order_of_levels_is_checked():
    rows = [length_row(AGGRESSIVE, 1.0, 1.0), length_row(CONSERVATIVE, 3.0, 3.0), length_row(BALANCED, 2.0, 3.0)]
    assert order_violations(rows) == []
    rows += [dataclasses.replace(row, length=4.0) for row in rows]
    rows[3] = dataclasses.replace(rows[3], cold=2.5)
    assert order_violations(rows) == ["512 px, 4 s, cold: aggressive takes 2.50 s, balanced 2.00 s."]
    rows[5] = dataclasses.replace(rows[5], cold=None, warm=None, failed="lost")
    assert len(order_violations(rows)) == 2 and "balanced was not measured" in order_violations(rows)[0]
    assert order_violations([length_row(CONSERVATIVE, 1.0, 1.0), length_row(AGGRESSIVE, 1.0, 1.1)])


# ---- the command


def test_json_and_chart_go_round(checkpoint, tmp_path, monkeypatch, capsys):
    def fake(asked):
        def run(job, environment):
            seconds = 2.0 - job["level"]
            return {"together": 1, "accelerate": 0.0, "clips": {"1.0": [[1, seconds], [1, seconds]]}, "more": []}

        return run

    monkeypatch.setattr(benchmark, "launch", fake)
    monkeypatch.setattr(measure, "time_stages", FakeClock(4.0, RuntimeError("lost"), 2.0, (1.0, float("nan")), 0.5))
    monkeypatch.setattr(benchmark, "matrix_throughput", lambda *_: 1e12)
    file, page = tmp_path / "found.json", tmp_path / "found.html"
    arguments = ["--model", str(checkpoint), "--device", "cpu", "--windows", "--lengths", "1", "--vram", "8"]
    assert benchmark.main([*arguments, "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in NAMES) and "failed: RuntimeError: lost" in said and "needs a GPU" in said
    assert "at least as fast" in said and "float32" in said.splitlines()[-1]

    found = json.loads(file.read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["date"]
    rows = [measure.WindowRow(**row) for row in found["windows"]]
    assert [row.name for row in rows] == NAMES and rows[3].error is None and rows[4].error > 0
    assert [row.ratio for row in rows] == [1, None, 2, 4, 8]
    assert [LengthRow(**row).cold for row in found["lengths"]] == [4, 3, 2]

    other = tmp_path / "other.json"
    limited = plain_json(dataclasses.asdict(MemoryRow(8, 512, "conservative", 1, 8, False, 6e9, 5.0, 5.5)))
    other.write_text(json.dumps({"machine": {}, "memory": [limited], "windows": [], "lengths": [], "jobs": []}))
    merged = tmp_path / "merged.json"
    command = ["--from", str(file), str(other), "--json", str(merged), "--chart", str(page)]
    assert benchmark.main(command) == 0
    again = json.loads(merged.read_text())
    assert again == found | {"memory": [limited]}
    html = page.read_text(encoding="utf-8")
    assert all(level.name in html for level in STOPS) and "real time" in html and "denoise" in html
    assert "src=" not in html.split("<body>")[1][:200] and len(html) > 1e6  # carries plotly itself


def test_a_job_is_measured_at_every_level(checkpoint, talking, voice, monkeypatch):
    monkeypatch.setattr(measure, "time_stages", FakeClock(0.5))
    asked = Asked(CPU, str(checkpoint), steps=1, levels=(AGGRESSIVE,))
    (row,) = measure.job_rows(talking, voice, 64, asked)
    assert not row.failed and row.frames == 20 and row.wall > 0
    assert row.gpu == 2 * 0.5 and row.ratio == pytest.approx(row.wall / row.gpu)  # 20 frames: two windows
    assert set(row.stages) >= {"faces", "mouths", "writing"} and "mouths" in benchmark.job_line(row)


def test_a_job_that_fails_is_a_row(checkpoint, tmp_path):
    asked = Asked(CPU, str(checkpoint), steps=1)
    rows = list(measure.job_rows(tmp_path / "no.mp4", tmp_path / "no.wav", 64, asked))
    assert [row.name for row in rows] == [level.name for level in STOPS] and all(row.failed for row in rows)


def test_what_cannot_be_done_is_said(capsys):
    assert benchmark.main(["--device", "cpu"]) == 2
    assert "--model demo" in capsys.readouterr().err
    assert benchmark.main(["--levels", "fastest", "--device", "cpu", "--model", "demo"]) == 2
    assert "fastest" in capsys.readouterr().err


def test_packages_for_media_may_be_absent(monkeypatch):
    names = ("absent_package", "absent_package.part")
    monkeypatch.setattr(benchmark, "MEDIA_MODULES", (*names, "json"))
    try:
        benchmark.stand_in_for_media()
        assert importlib.import_module("absent_package.part").Anything
        assert sys.modules["json"] is json  # what is there stays
    finally:
        for name in names:
            sys.modules.pop(name, None)
