"""The rows of `optim.benchmark.__main__`: windows, the start, jobs from file to file, smaller cards.

A row that fails says why, and the next one is measured.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import Models, load_models, working_dtype
from latentsync.pipeline import Hooks, lipsync
from latentsync.settings import GUIDANCE_SCALE, INFERENCE_STEPS, WINDOW, DeepCache, Settings
from optim import accelerate
from optim.accelerate import Plan
from optim.benchmark.passes import (
    Watch,
    clock,
    free_memory,
    our_stages,
    peak_memory,
    plain_stages,
    random_models,
    relative_error,
    reset_memory,
    set_layout,
    time_stages,
    window_work,
)
from optim.hardware import GIB, Gpu, apply_vram_fraction, gpu_of, recommended_level
from optim.levels import STOPS, Level

REFERENCE = "reference"
CACHED_REFERENCE = "reference + DeepCache (3, 0)"
CACHE_FOLDERS = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


@dataclass(frozen=True)
class WindowRow:
    """Seconds of one window; numbers are None where `failed` says why, or where there is no such figure."""

    name: str
    resolution: int  # px
    windows: int | None = None  # together
    steps: int | None = None
    encode: float | None = None
    denoise: float | None = None
    decode: float | None = None
    seconds: float | None = None
    frames_per_second: float | None = None
    ratio: float | None = None  # times the plain reference
    tflop: float | None = None  # a window's work
    share: float | None = None  # of the matrix throughput, 0 to 1
    utilization: float | None = None  # percent
    allocated: float | None = None  # GB at the peak
    reserved: float | None = None  # GB at the peak
    error: float | None = None
    failed: str = ""


@dataclass(frozen=True)
class StartRow:
    """Seconds from built networks to the end of the first pass, in a process without and with compile caches."""

    name: str
    resolution: int  # px
    cold: float | None = None
    warm: float | None = None
    failed: str = ""


@dataclass(frozen=True)
class JobRow:
    """A run from file to file, the second of two. Seconds, as in latentsync.pipeline.Report."""

    name: str
    resolution: int  # px
    frames: int = 0
    wall: float | None = None
    stages: dict[str, float] | None = None
    waiting: dict[str, float] | None = None
    gpu: float | None = None  # as many windows from pixels to pixels, alone
    ratio: float | None = None  # wall over gpu
    utilization: float | None = None  # percent, while painting
    failed: str = ""


@dataclass(frozen=True)
class MemoryRow:
    """Two passes on a card that has been made smaller."""

    limit: float  # GB (2³⁰ bytes), as cards are sold
    resolution: int  # px
    name: str = ""  # the default level of such a card
    windows: int | None = None  # together, of the plan
    frames: int | None = None
    tiling: bool | None = None
    planned: float | None = None  # GB (10⁹ bytes)
    allocated: float | None = None  # GB at the peak
    reserved: float | None = None
    stepped_down: tuple[str, ...] = ()  # what was given up when memory ran out
    failed: str = ""


@dataclass(frozen=True)
class BenchmarkConfig:
    """Device, model and sizes of a benchmark run."""

    device: torch.device
    model: str | None = None  # None: random weights
    steps: int = INFERENCE_STEPS
    repeats: int = 3
    levels: tuple[Level, ...] = STOPS

    @property
    def dtype(self) -> torch.dtype:
        return working_dtype(self.device)

    def models(self, resolution: int) -> Models:
        """The networks; a model has its own resolution."""
        if self.model is None:
            return random_models(self.device, self.dtype, resolution)
        return load_models(resolve_model(self.model, self.device), self.device)

    def plan(self, level: Level, resolution: int, gpu: Gpu | None) -> Plan:
        return accelerate.make_plan(level, Settings(steps=self.steps), resolution, gpu)

    def gpu(self) -> Gpu | None:
        return gpu_of(self.device)


def accelerated(models: Models, plan: Plan) -> Models:
    """The same models, fast, without a word."""

    return accelerate.accelerate(models, plan, lambda _: None)


def problem(error: Exception) -> str:
    """An exception in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


# ---- windows


def window_rows(
    models: Models, resolutions: Iterable[int], config: BenchmarkConfig, throughput: float | None = None
) -> Iterator[WindowRow]:
    """The reference's rows for every resolution, then those of the levels. throughput: FLOP/s, None: no shares.

    Ends with the models accelerated; they must come plain.
    """
    plain: dict[int, tuple[float, Tensor]] = {}  # frames/s and pixels of the first reference row
    resolutions = list(resolutions)

    def row(name: str, at: Models, measure: Callable[[], tuple]) -> WindowRow:
        """measure: () → Timing, windows together, steps, guidance, cache"""
        reset_memory(config.device)
        try:
            timing, windows, steps, guidance, cache = measure()
            allocated, reserved = peak_memory(config.device)
            rate = WINDOW * windows / timing.seconds
            pixels = timing.pixels[:WINDOW].cpu()
            if name == REFERENCE:
                plain[at.resolution] = rate, pixels
            baseline, expected = plain.get(at.resolution, (None, None))
            reference = name in (REFERENCE, CACHED_REFERENCE)
            work = throughput and window_work(at, at.resolution, steps, guidance, cache, reference)
            return WindowRow(
                name, at.resolution, windows, steps,
                timing.encode / windows, timing.denoise / windows, timing.decode / windows, timing.seconds / windows,
                rate, rate / baseline if baseline else None,
                work / 1e12 if work else None, work * windows / timing.seconds / throughput if work else None,
                timing.utilization, allocated, reserved,
                None if expected is None or name == REFERENCE else relative_error(pixels, expected),
            )  # fmt: skip
        except Exception as error:  # one row must not take the others with it, whatever is wrong with it
            return WindowRow(name, at.resolution, failed=problem(error))

    def measure_plain(at: Models, cache: DeepCache | None) -> tuple:
        with plain_stages(at, config.steps, GUIDANCE_SCALE, cache) as stages:
            return time_stages(stages, config.device, config.repeats), 1, config.steps, GUIDANCE_SCALE, cache

    def measure_level(at: Models, level: Level) -> tuple:
        plan = config.plan(level, at.resolution, config.gpu())
        settings = plan.settings
        timing = time_stages(our_stages(accelerated(at, plan), settings), config.device, config.repeats)
        return timing, settings.windows_per_pass, settings.steps, settings.guidance_scale, settings.cache

    set_layout(models, torch.contiguous_format)
    for at in (replace(models, resolution=resolution) for resolution in resolutions):
        for name, cache in ((REFERENCE, None), (CACHED_REFERENCE, DeepCache(3, 0))):
            yield row(name, at, partial(measure_plain, at, cache))
    set_layout(models, torch.channels_last)
    for at in (replace(models, resolution=resolution) for resolution in resolutions):
        for level in config.levels:
            yield row(level.name, at, partial(measure_level, at, level))


# ---- the start


@torch.inference_mode()
def start_seconds(models: Models, plan: Plan) -> float:
    """Seconds of accelerating networks that were just built, and of their first pass."""
    began = clock(models.device)
    our_stages(accelerated(models, plan), plan.settings).run()
    return clock(models.device) - began


def start_rows(resolution: int, config: BenchmarkConfig, launch: Callable[[dict, dict], dict]) -> Iterator[StartRow]:
    """A row a level, from two processes of `launch`: with new compile caches, and with these again."""
    for level in config.levels:
        job = {"what": "start", "level": level.position, "resolution": resolution}
        with tempfile.TemporaryDirectory(prefix="latentsync-") as folder:
            environment = {name: os.path.join(folder, name.lower()) for name in CACHE_FOLDERS}
            try:
                cold, warm = (launch(job, environment)["seconds"] for _ in range(2))
                yield StartRow(level.name, resolution, cold, warm)
            except Exception as error:
                yield StartRow(level.name, resolution, failed=problem(error))


# ---- from file to file


def job_rows(video: Path, audio: Path, resolution: int, config: BenchmarkConfig) -> Iterator[JobRow]:
    """The whole pipeline at every level. The first of two runs finds everything cold and is not counted."""
    models = config.models(resolution)
    for level in config.levels:
        row = JobRow(level.name, models.resolution)
        free_memory()
        try:
            plan = config.plan(level, models.resolution, config.gpu())
            accelerated(models, plan)
            painting: list[float] = []

            def on_progress(stage: str, done: int, total: int, painting: list[float] = painting) -> None:
                if stage == "mouths":
                    painting.append(time.monotonic())

            with tempfile.TemporaryDirectory(prefix="latentsync-") as folder:
                output = Path(folder, "out.mp4")
                lipsync(video, audio, output, models, plan.settings)
                with Watch(config.device) as watch:
                    report = lipsync(video, audio, output, models, plan.settings, Hooks(on_progress=on_progress))
            stages = our_stages(models, plan.settings)
            timing = time_stages(stages, config.device, config.repeats)
            gpu = math.ceil((report.frames - report.frames_without_face) / WINDOW) * timing.seconds / stages.windows
            wall = report.total_seconds
            utilization = watch.utilization(painting[0], painting[-1])
            yield replace(
                row, frames=report.frames, wall=wall, stages=report.seconds, waiting=report.waiting, gpu=gpu,
                ratio=wall / gpu, utilization=utilization,
            )  # fmt: skip
        except Exception as error:
            yield replace(row, failed=problem(error))


# ---- smaller cards


@torch.inference_mode()
def two_passes(models: Models, settings: Settings) -> str:
    """Run them; returns what ran out, or nothing. A sentence, since an exception would hold the tensors it met."""
    try:
        stages = our_stages(models, settings)
        for _ in range(2):
            stages.run()
            clock(models.device)
    except torch.OutOfMemoryError as error:
        return problem(error)
    return ""


def memory_row(limit: float, resolution: int, config: BenchmarkConfig) -> MemoryRow:
    """Two passes at the default level of a card of `limit` GB, in a process that may take the level's share of it."""

    row, device = MemoryRow(limit, resolution), config.device
    try:
        models = config.models(resolution)
        gpu = config.gpu()
        total = torch.cuda.get_device_properties(device).total_memory
        small = replace(gpu, memory_total=int(limit * GIB), memory_free=int(limit * GIB))
        level = recommended_level(small)
        plan = config.plan(level, models.resolution, small)
        row = replace(
            row, resolution=models.resolution, name=level.name, windows=plan.batch.windows, frames=plan.batch.frames,
            tiling=plan.batch.tiling, planned=plan.batch.planned / 1e9,
        )  # fmt: skip

        def shrink() -> None:  # accelerating sets a limit by the whole card
            reset_memory(device)
            apply_vram_fraction(min(1.0, level.vram_fraction * limit * GIB / total), device.index or 0)

        given_up: list[str] = []
        relieve = accelerate.oom_handler(models, plan, lambda _: None, given_up.append)
        settings = plan.settings
        shrink()
        accelerated(models, plan)
        shrink()
        while out_of_memory := two_passes(models, settings):
            settings = relieve()
            if settings is None:
                return replace(row, stepped_down=tuple(given_up), failed=out_of_memory)
            shrink()
        allocated, reserved = peak_memory(device)
        return replace(row, allocated=allocated, reserved=reserved, stepped_down=tuple(given_up))
    except Exception as error:
        return replace(row, failed=problem(error))
