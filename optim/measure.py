"""The rows of `optim.benchmark`: windows, clips of a length, jobs from file to file, smaller cards.

A row that fails says why, and the next one is measured.
"""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentsync import FPS
from latentsync.checkpoints import Models, load_models, resolve, working_dtype
from latentsync.sampling import GUIDANCE_SCALE, INFERENCE_STEPS, WINDOW, DeepCache
from optim.hardware import GIB, Gpu, apply_vram_fraction, read_gpus, recommended_level
from optim.levels import STOPS, Level
from optim.passes import (
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

if TYPE_CHECKING:  # both need the packages that find faces and read media, which may be absent
    from latentsync.pipeline import Settings
    from optim.accelerate import Plan

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
class LengthRow:
    """Seconds from built networks to a clip's last window, in a process without and with compile caches."""

    name: str
    position: float  # of the level on the slider
    resolution: int  # px
    length: float  # seconds of clip
    windows: int
    cold: float | None = None
    warm: float | None = None
    cold_first: float | None = None  # to the first pass's end
    warm_first: float | None = None
    computed: bool = False  # from the start and steady passes, not run
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
class Asked:
    """What is to be measured on."""

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
        return load_models(resolve(self.model, self.device), self.device)

    def plan(self, level: Level, resolution: int, gpu: Gpu | None) -> "Plan":
        from latentsync.pipeline import Settings
        from optim import accelerate

        return accelerate.make_plan(level, Settings(steps=self.steps), resolution, gpu)

    def gpu(self) -> Gpu | None:
        return read_gpus()[self.device.index or 0] if self.device.type == "cuda" else None


def accelerated(models: Models, plan: "Plan") -> Models:
    """The same models, fast, without a word."""
    from optim import accelerate

    return accelerate.accelerate(models, plan, lambda _: None)


def problem(error: Exception) -> str:
    """An exception in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


# ---- windows


def window_rows(
    models: Models, resolutions: Iterable[int], asked: Asked, throughput: float | None = None
) -> Iterator[WindowRow]:
    """The reference's rows for every resolution, then those of the levels. throughput: FLOP/s, None: no shares.

    Ends with the models accelerated; they must come plain.
    """
    plain: dict[int, tuple[float, Tensor]] = {}  # frames/s and pixels of the first reference row
    resolutions = list(resolutions)

    def row(name: str, at: Models, measure: Callable[[], tuple]) -> WindowRow:
        """measure: () → Timing, windows together, steps, guidance, cache"""
        reset_memory(asked.device)
        try:
            timing, windows, steps, guidance, cache = measure()
            allocated, reserved = peak_memory(asked.device)
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
        with plain_stages(at, asked.steps, GUIDANCE_SCALE, cache) as stages:
            return time_stages(stages, asked.device, asked.repeats), 1, asked.steps, GUIDANCE_SCALE, cache

    def measure_level(at: Models, level: Level) -> tuple:
        plan = asked.plan(level, at.resolution, asked.gpu())
        settings = plan.settings
        timing = time_stages(our_stages(accelerated(at, plan), settings), asked.device, asked.repeats)
        return timing, settings.windows_per_pass, settings.steps, settings.guidance_scale, settings.cache

    set_layout(models, torch.contiguous_format)
    for at in (replace(models, resolution=resolution) for resolution in resolutions):
        for name, cache in ((REFERENCE, None), (CACHED_REFERENCE, DeepCache(3, 0))):
            yield row(name, at, partial(measure_plain, at, cache))
    set_layout(models, torch.channels_last)
    for at in (replace(models, resolution=resolution) for resolution in resolutions):
        for level in asked.levels:
            yield row(level.name, at, partial(measure_level, at, level))


# ---- clips of a length


@dataclass(frozen=True)
class ClipRun:
    """A process's passes in order, after networks were built: seconds of accelerating and of every pass.

    clips: length in seconds → passes as (windows, seconds); passes come clip after clip, then `more` of full passes.
    """

    together: int  # windows in a full pass
    accelerate: float
    clips: dict[float, list[tuple[int, float]]]
    more: list[tuple[int, float]]


def window_count(length: float) -> int:
    """Windows of a clip; the last one slides back so that it is full."""
    return math.ceil(math.ceil(length * FPS) / WINDOW)


def split_passes(windows: int, together: int) -> list[int]:
    """Windows of every pass over a clip: full ones, then what is left."""
    return [together] * (windows // together) + [windows % together] * (windows % together > 0)


def run_clips(models: Models, plan: "Plan", lengths: Iterable[float]) -> ClipRun:
    """Accelerate and run clips of these lengths, ascending, and full passes until two of them were steady."""
    device, settings = models.device, plan.settings
    began = clock(device)
    accelerated(models, plan)
    accelerate = clock(device) - began
    stages = {}

    @torch.inference_mode()
    def timed(windows: int) -> tuple[int, float]:
        if windows not in stages:
            stages[windows] = our_stages(models, settings, windows)
        began = clock(device)
        stages[windows].run()
        return windows, clock(device) - began

    together = settings.windows_per_pass
    clips = {
        length: [timed(windows) for windows in split_passes(window_count(length), together)]
        for length in sorted(lengths)
    }
    known = sum(windows == together for passes in clips.values() for windows, _ in passes)
    return ClipRun(together, accelerate, clips, [timed(together) for _ in range(max(0, 3 - known))])


def clip_seconds(run: ClipRun, length: float) -> float:
    """Seconds of a clip in a process of its own, from built networks on.

    Of a clip that was run: accelerating, its own passes, and what earlier clips of the process had paid for it: the
    first pass of the process, and the first one of each number of windows together. Of another: all by steady passes.
    """
    order = [a_pass for passes in run.clips.values() for a_pass in passes] + run.more
    times: dict[int, list[float]] = {}
    for windows, seconds in order:
        times.setdefault(windows, []).append(seconds)
    steady = {windows: statistics.median(some[1:] or some) for windows, some in times.items()}
    extra = {windows: max(0.0, some[0] - steady[windows]) for windows, some in times.items()}
    a_window = steady[run.together] / run.together
    shapes = set(split_passes(window_count(length), run.together))
    paid = {order[0][0]}  # the first pass of a process pays for what serves all shapes, too
    for earlier, passes in run.clips.items():
        if earlier == length:
            own = {windows for windows, _ in passes}
            met = {w for before, some in run.clips.items() if before < length for w, _ in some}
            due = sum(extra[w] for w in (own & met) | (paid - own))
            return run.accelerate + sum(seconds for _, seconds in passes) + due
    due = sum(extra.get(windows, 0.0) for windows in shapes | paid)
    passes = split_passes(window_count(length), run.together)
    return run.accelerate + sum(steady.get(windows, windows * a_window) for windows in passes) + due


def first_seconds(run: ClipRun) -> float:
    """Seconds from built networks to the end of the first pass."""
    first = next(iter(run.clips.values())) if run.clips else run.more
    return run.accelerate + first[0][1]


def length_rows(
    resolution: int, lengths: list[float], run_up_to: float, asked: Asked, launch: Callable[[dict, dict], dict]
) -> Iterator[LengthRow]:
    """A level's lengths together, from two processes of `launch`: with new compile caches, and with these again.

    Clips up to `run_up_to` seconds are run, longer ones are computed; the shortest is always run.
    """
    real = [length for length in lengths if length <= run_up_to] or [min(lengths)]
    for level in asked.levels:
        rows = [
            LengthRow(level.name, level.position, resolution, length, window_count(length), computed=length not in real)
            for length in sorted(lengths)
        ]
        job = {"what": "clips", "level": level.position, "resolution": resolution, "lengths": real}
        with tempfile.TemporaryDirectory(prefix="latentsync-") as folder:
            environment = {name: os.path.join(folder, name.lower()) for name in CACHE_FOLDERS}
            try:
                cold, warm = (read_clip_run(launch(job, environment)) for _ in range(2))
            except Exception as error:
                yield from (replace(row, failed=problem(error)) for row in rows)
                continue
        for row in rows:
            yield replace(
                row,
                cold=clip_seconds(cold, row.length), warm=clip_seconds(warm, row.length),
                cold_first=first_seconds(cold), warm_first=first_seconds(warm),
            )  # fmt: skip


def read_clip_run(found: dict) -> ClipRun:
    """A ClipRun that has been JSON."""
    clips = {float(length): [tuple(p) for p in passes] for length, passes in found["clips"].items()}
    clips = dict(sorted(clips.items()))
    return ClipRun(found["together"], found["accelerate"], clips, [tuple(p) for p in found["more"]])


def order_violations(rows: Iterable[LengthRow]) -> list[str]:
    """Where a level is slower than one that stands nearer to quality, or has not been measured; a sentence each."""
    found: dict[tuple[int, float, str], list[tuple[float, str, float | None]]] = {}
    for row in rows:
        for start in ("cold", "warm"):
            entry = row.position, row.name, getattr(row, start)
            found.setdefault((row.resolution, row.length, start), []).append(entry)
    sentences = []
    for (resolution, length, start), entries in found.items():
        entries.sort(key=lambda entry: entry[0])
        where = f"{resolution} px, {length:g} s, {start}"
        sentences += [f"{where}: {name} was not measured." for _, name, seconds in entries if seconds is None]
        measured = [entry for entry in entries if entry[2] is not None]
        for (_, slow, slow_seconds), (_, fast, fast_seconds) in zip(measured, measured[1:], strict=False):
            if fast_seconds > slow_seconds:
                sentences.append(f"{where}: {fast} takes {fast_seconds:.2f} s, {slow} {slow_seconds:.2f} s.")
    return sentences


# ---- from file to file


def job_rows(video: Path, audio: Path, resolution: int, asked: Asked) -> Iterator[JobRow]:
    """The whole pipeline at every level. The first of two runs finds everything cold and is not counted."""
    from latentsync.pipeline import lipsync

    models = asked.models(resolution)
    for level in asked.levels:
        row = JobRow(level.name, models.resolution)
        free_memory()
        try:
            plan = asked.plan(level, models.resolution, asked.gpu())
            accelerated(models, plan)
            painting: list[float] = []

            def on_progress(stage: str, done: int, total: int, painting: list[float] = painting) -> None:
                if stage == "mouths":
                    painting.append(time.monotonic())

            with tempfile.TemporaryDirectory(prefix="latentsync-") as folder:
                output = Path(folder, "out.mp4")
                lipsync(video, audio, output, models, plan.settings)
                with Watch(asked.device) as watch:
                    report = lipsync(video, audio, output, models, plan.settings, on_progress)
            stages = our_stages(models, plan.settings)
            timing = time_stages(stages, asked.device, asked.repeats)
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
def two_passes(models: Models, settings: "Settings") -> str:
    """Run them; returns what ran out, or nothing. A sentence, since an exception would hold the tensors it met."""
    try:
        stages = our_stages(models, settings)
        for _ in range(2):
            stages.run()
            clock(models.device)
    except torch.OutOfMemoryError as error:
        return problem(error)
    return ""


def memory_row(limit: float, resolution: int, asked: Asked) -> MemoryRow:
    """Two passes at the default level of a card of `limit` GB, in a process that may take the level's share of it."""
    from optim import accelerate

    row, device = MemoryRow(limit, resolution), asked.device
    try:
        models = asked.models(resolution)
        gpu = asked.gpu()
        total = torch.cuda.get_device_properties(device).total_memory
        small = replace(gpu, memory_total=int(limit * GIB), memory_free=int(limit * GIB))
        level = recommended_level(small)
        plan = asked.plan(level, models.resolution, small)
        row = replace(
            row, resolution=models.resolution, name=level.name, windows=plan.batch.windows, frames=plan.batch.frames,
            tiling=plan.batch.tiling, planned=plan.batch.planned / 1e9,
        )  # fmt: skip

        def shrink() -> None:  # accelerating sets a limit by the whole card
            reset_memory(device)
            apply_vram_fraction(min(1.0, level.vram_fraction * limit * GIB / total), device.index or 0)

        given_up: list[str] = []
        relieve = accelerate.reliever(models, plan, lambda _: None, given_up.append)
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
