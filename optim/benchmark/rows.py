"""The rows of the benchmark's tables: windows, starts, jobs from file to file, smaller cards.

A row that fails has the reason, and the next one is measured.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import Models, load_models, working_dtype
from latentsync.media import probe_video
from latentsync.paths import folder_bytes
from latentsync.pipeline import Hooks, lipsync
from latentsync.prepared.film import PreparedFilm, film_key
from latentsync.prepared.recording import Recorder
from latentsync.settings import INFERENCE_STEPS, WINDOW, DeepCache, Settings
from optim.accelerate import Plan, accelerate, make_plan, oom_handler
from optim.benchmark.flops import synchronized_time, window_flops
from optim.benchmark.windows import (
    Timing,
    UtilizationMonitor,
    free_memory,
    peak_memory,
    pipeline_stages,
    random_models,
    reference_stages,
    reset_memory,
    set_layout,
    time_stages,
)
from optim.hardware import GIB, Gpu, gpu_of, recommended_level
from optim.levels import STOPS, Level
from optim.trial import one_line, relative_error

REFERENCES = {"reference": None, "reference + DeepCache (3, 0)": DeepCache(3, 0)}  # names, and their caches
REFERENCE, CACHED_REFERENCE = REFERENCES
Row = TypeVar("Row", "JobRow", "VoicesRow")
CACHE_FOLDERS = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


@dataclass(frozen=True)
class WindowRow:
    """Seconds of one window; numbers are None where the row failed, or where the device has no such figure."""

    name: str
    resolution: int  # px
    windows: int | None = None  # per pass
    steps: int | None = None
    encode: float | None = None
    denoise: float | None = None
    decode: float | None = None
    seconds: float | None = None
    frames_per_second: float | None = None
    ratio: float | None = None  # speed relative to the reference
    tflop: float | None = None  # of one window
    share: float | None = None  # of the matrix throughput, 0 to 1
    utilization: float | None = None  # percent
    allocated: float | None = None  # GB at the peak
    reserved: float | None = None  # GB at the peak
    error: float | None = None
    failed: str = ""


@dataclass(frozen=True)
class StartRow:
    """Seconds from built networks to the end of the first pass, in processes without and with compile caches."""

    name: str
    resolution: int  # px
    cold: float | None = None
    warm: float | None = None
    failed: str = ""


@dataclass(frozen=True)
class JobRow:
    """A job from file to file, the second of two. Seconds, as in latentsync.settings.Report."""

    name: str
    resolution: int  # px
    frames: int = 0
    wall: float | None = None
    stages: dict[str, float] | None = None
    waiting: dict[str, float] | None = None
    gpu: float | None = None  # of as many windows from pixels to pixels alone
    ratio: float | None = None  # wall over gpu
    utilization: float | None = None  # percent, while painting
    failed: str = ""


@dataclass(frozen=True)
class VoicesRow:
    """Seconds of a job from file to file: alone, as a film's first voice, which prepares it, and as its second."""

    name: str
    resolution: int  # px
    frames: int = 0
    alone: float | None = None
    first: float | None = None
    second: float | None = None
    ratio: float | None = None  # of alone to second
    megabytes: float | None = None  # of the prepared film (10⁶ bytes)
    failed: str = ""


@dataclass(frozen=True)
class MemoryRow:
    """Two passes on a card whose memory is limited."""

    limit: float  # GB (2³⁰ bytes), as cards are sold
    resolution: int  # px
    name: str = ""  # the default level of such a card
    windows: int | None = None  # per pass, by the plan
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
        return make_plan(level, Settings(steps=self.steps), resolution, gpu)

    def gpu(self) -> Gpu | None:
        return gpu_of(self.device)


# ---- windows


def window_rows(
    models: Models, resolutions: Iterable[int], config: BenchmarkConfig, throughput: float | None = None
) -> Iterator[WindowRow]:
    """The reference's rows for every resolution, then those of the levels. throughput: FLOP/s, None: no shares.

    The models must come plain, and are accelerated at the end.
    """
    baselines: dict[int, tuple[float, Tensor]] = {}  # by resolution: frames/s and pixels of the first reference row
    sized = [replace(models, resolution=resolution) for resolution in resolutions]

    def row(name: str, models: Models, measure: Callable[[], tuple[Timing, Settings]]) -> WindowRow:
        reset_memory(config.device)
        try:
            timing, settings = measure()
            row = _window_row(name, models, timing, settings, throughput, baselines)
            allocated, reserved = peak_memory(config.device)
            return replace(row, allocated=allocated, reserved=reserved)
        except Exception as error:  # whatever is wrong with one row, the others are measured
            return WindowRow(name, models.resolution, failed=one_line(error))

    set_layout(models, torch.contiguous_format)
    for one in sized:
        for name, cache in REFERENCES.items():
            settings = Settings(steps=config.steps, cache=cache)
            yield row(name, one, partial(_measure_reference, one, settings, config))
    set_layout(models, torch.channels_last)
    for one in sized:
        for level in config.levels:
            yield row(level.name, one, partial(_measure_level, one, level, config))


def _measure_reference(models: Models, settings: Settings, config: BenchmarkConfig) -> tuple[Timing, Settings]:
    with reference_stages(models, settings) as stages:
        return time_stages(stages, config.device, config.repeats), settings


def _measure_level(models: Models, level: Level, config: BenchmarkConfig) -> tuple[Timing, Settings]:
    plan = config.plan(level, models.resolution, config.gpu())
    stages = pipeline_stages(accelerate(models, plan), plan.settings)
    return time_stages(stages, config.device, config.repeats), plan.settings


def _window_row(
    name: str,
    models: Models,
    timing: Timing,
    settings: Settings,
    throughput: float | None,
    baselines: dict[int, tuple[float, Tensor]],
) -> WindowRow:
    """The row of a timing; the first reference row of a resolution becomes its baseline."""
    windows = settings.windows_per_pass
    rate = WINDOW * windows / timing.seconds
    pixels = timing.pixels[:WINDOW].cpu()
    if name == REFERENCE:
        baselines[models.resolution] = rate, pixels
    baseline, expected = baselines.get(models.resolution, (None, None))
    row = WindowRow(
        name,
        models.resolution,
        windows=windows,
        steps=settings.steps,
        encode=timing.encode / windows,
        denoise=timing.denoise / windows,
        decode=timing.decode / windows,
        seconds=timing.seconds / windows,
        frames_per_second=rate,
        ratio=rate / baseline if baseline else None,
        utilization=timing.utilization,
        error=None if expected is None or name == REFERENCE else relative_error(pixels, expected),
    )
    if not throughput:
        return row
    flops = window_flops(models, settings, reference=name in REFERENCES)
    return replace(row, tflop=flops / 1e12, share=flops * windows / timing.seconds / throughput)


# ---- starts


@torch.inference_mode()
def start_seconds(models: Models, plan: Plan) -> float:
    """Seconds of accelerating networks that were just built, and of their first pass."""
    start = synchronized_time(models.device)
    pipeline_stages(accelerate(models, plan), plan.settings).run()
    return synchronized_time(models.device) - start


def start_rows(
    resolution: int, config: BenchmarkConfig, run_in_process: Callable[[dict, dict], dict]
) -> Iterator[StartRow]:
    """A row for each level, from two processes: one with new compile caches, and one that finds these filled."""
    for level in config.levels:
        job = {"what": "start", "level": level.position, "resolution": resolution}
        with tempfile.TemporaryDirectory(prefix="latentsync-") as folder:
            environment = {name: os.path.join(folder, name.lower()) for name in CACHE_FOLDERS}
            try:
                cold, warm = (run_in_process(job, environment)["seconds"] for _ in range(2))
                yield StartRow(level.name, resolution, cold, warm)
            except Exception as error:
                yield StartRow(level.name, resolution, failed=one_line(error))


# ---- jobs from file to file


def job_rows(video: Path, audio: Path, resolution: int, config: BenchmarkConfig) -> Iterator[JobRow]:
    """The whole pipeline at every level. The first of two runs is a cold start and is not counted."""
    return _level_rows(JobRow, partial(_job_row, video, audio, config), resolution, config)


def _level_rows(
    kind: type[Row], measure: Callable[[Row, Models, Settings], Row], resolution: int, config: BenchmarkConfig
) -> Iterator[Row]:
    """A row of a kind for each level, which `measure` fills in with the models accelerated."""
    models = config.models(resolution)
    for level in config.levels:
        row = kind(level.name, models.resolution)
        free_memory()
        try:
            plan = config.plan(level, models.resolution, config.gpu())
            yield measure(row, accelerate(models, plan), plan.settings)
        except Exception as error:
            yield replace(row, failed=one_line(error))


def _job_row(
    video: Path, audio: Path, config: BenchmarkConfig, row: JobRow, models: Models, settings: Settings
) -> JobRow:
    painting: list[float] = []  # times of progress, by time.monotonic()

    def on_progress(stage: str, done: int, total: int) -> None:
        if stage == "mouths":
            painting.append(time.monotonic())

    with tempfile.TemporaryDirectory(prefix="latentsync-") as folder:
        output = Path(folder, "out.mp4")
        lipsync(video, audio, output, models, settings)
        with UtilizationMonitor(config.device) as monitor:
            report = lipsync(video, audio, output, models, settings, Hooks(on_progress=on_progress))
    timing = time_stages(pipeline_stages(models, settings), config.device, config.repeats)
    windows = math.ceil((report.frames - report.frames_without_face) / WINDOW)
    gpu = windows * timing.seconds / settings.windows_per_pass
    return replace(
        row,
        frames=report.frames,
        wall=report.total_seconds,
        stages=report.seconds,
        waiting=report.waiting,
        gpu=gpu,
        ratio=report.total_seconds / gpu,
        utilization=monitor.utilization(painting[0], painting[-1]),
    )


# ---- a film's first and second voice


def voices_rows(video: Path, audio: Path, resolution: int, config: BenchmarkConfig) -> Iterator[VoicesRow]:
    """A film's first and second voice at every level, after a run that is not counted."""
    return _level_rows(VoicesRow, partial(_voices_row, video, audio), resolution, config)


def _voices_row(video: Path, audio: Path, row: VoicesRow, models: Models, settings: Settings) -> VoicesRow:
    key = film_key(probe_video(video).at_choice(settings.fps), settings, models)
    with tempfile.TemporaryDirectory(prefix="latentsync-") as folder:
        output, prepared = Path(folder, "out.mp4"), Path(folder, "film")
        run = partial(lipsync, video, audio, output, models, settings)
        run()
        alone = run()
        with Recorder(prepared, key) as recorder:
            first = run(film=recorder)
            recorder.finish()
        second = run(film=PreparedFilm(prepared, key))
        size = folder_bytes(prepared)
    return replace(
        row,
        frames=alone.frames,
        alone=alone.total_seconds,
        first=first.total_seconds,
        second=second.total_seconds,
        ratio=alone.total_seconds / second.total_seconds,
        megabytes=size / 1e6,
    )


# ---- smaller cards


@torch.inference_mode()
def run_twice(models: Models, settings: Settings) -> str:
    """Run two passes; returns an empty string, or the message where memory ran out.

    No exception is passed on: it would keep the tensors of its frames alive.
    """
    try:
        stages = pipeline_stages(models, settings)
        for _ in range(2):
            stages.run()
            synchronized_time(models.device)
    except torch.OutOfMemoryError as error:
        return one_line(error)
    return ""


def memory_row(limit: float, resolution: int, config: BenchmarkConfig) -> MemoryRow:
    """Two passes at the default level of a card of `limit` GB, in a process that may take the level's share of it."""
    row, device = MemoryRow(limit, resolution), config.device
    try:
        gpu = config.gpu()
        if gpu is None:
            raise ValueError(f"{device} has no memory of its own")
        models = config.models(resolution)
        total = torch.cuda.get_device_properties(device).total_memory
        small = replace(gpu, memory_total=int(limit * GIB), memory_free=int(limit * GIB))
        level = recommended_level(small)
        plan = config.plan(level, models.resolution, small)
        row = replace(
            row,
            resolution=models.resolution,
            name=level.name,
            windows=plan.batch.windows,
            frames=plan.batch.frames,
            tiling=plan.batch.tiling,
            planned=plan.batch.planned / 1e9,
        )

        def limit_memory() -> None:  # `accelerate` limits it by the whole card
            reset_memory(device)
            fraction = min(1.0, level.vram_fraction * limit * GIB / total)
            torch.cuda.set_per_process_memory_fraction(fraction, device.index or 0)

        step_downs: list[str] = []
        on_out_of_memory = oom_handler(models, plan, on_step_down=step_downs.append)
        settings: Settings | None = plan.settings
        limit_memory()
        accelerate(models, plan)
        limit_memory()
        while settings and (problem := run_twice(models, settings)):
            settings = on_out_of_memory()
            limit_memory()
        if settings is None:
            return replace(row, stepped_down=tuple(step_downs), failed=problem)
        allocated, reserved = peak_memory(device)
        return replace(row, allocated=allocated, reserved=reserved, stepped_down=tuple(step_downs))
    except Exception as error:
        return replace(row, failed=one_line(error))
