"""From a level to a fast job: the settings for the pipeline, and the networks prepared for them.

plan = make_plan(level, Settings(), models.resolution, gpu)
models = accelerate(models, plan)
lipsync(video, audio, output, models, plan.settings, Hooks(on_out_of_memory=oom_handler(models, plan)))
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from latentsync.checkpoints.load import Models
from latentsync.rates import MIN_PAINTED
from latentsync.settings import WINDOW, Settings
from optim.compilation import LONG_JOB, compile_unet, configure_compilers, restore_eager
from optim.graphs import capture, captures_for, release
from optim.hardware import GIB, BatchSizes, Gpu, batch_sizes, gpu_of, recommended_level
from optim.lean import make_lean
from optim.levels import Level, find_level, override, steps_for
from optim.swap import restore_classes

log = logging.getLogger(__name__)

# 4 frames at a time were as fast as 16 on two cores, with 0.3 GB less.
PROCESSOR_BATCH = BatchSizes(frames=4, windows=1, tiling=False, planned=0, allowed=0)
SAFE_VRAM_FRACTION = 0.75  # after memory ran out


@dataclass(frozen=True)
class Plan:
    """A job at a level: its batch sizes, and the settings for the pipeline."""

    level: Level
    batch: BatchSizes
    settings: Settings


def make_plan(level: Level, settings: Settings, resolution: int, gpu: Gpu | None) -> Plan:
    """The plan for a level on a GPU, or on the processor (None).

    Steps, cache and batch sizes come from the level and the GPU, and so do the matching of colours and which frames
    are painted where the settings leave them open; all else comes from the settings for the plain pipeline.
    """
    batch = batch_sizes(gpu, resolution, level) if gpu else PROCESSOR_BATCH
    settings = replace(
        settings,
        steps=steps_for(level, settings.steps),
        cache=level.cache,
        windows_per_pass=batch.windows,
        frames_per_pass=batch.frames,
        paint=level.paint if settings.paint is None else settings.paint,
        match_colours=(level.match_colours or None) if settings.match_colours is None else settings.match_colours,
    )
    return Plan(level, batch, settings)


def plan_for_device(
    device: torch.device,
    resolution: int,
    settings: Settings,
    level: str = "auto",
    batch: int | None = None,
    **overrides: Any,
) -> Plan:
    """The plan for a device. Raises UserError.

    level: a name or a number, or `auto` for the level recommended for the device; batch: frames that go through the
    autoencoder together, None for what fits; overrides: single fields of the level.
    """
    gpu = gpu_of(device)
    chosen = recommended_level(gpu) if level == "auto" else find_level(level)
    plan = make_plan(override(chosen, **overrides), settings, resolution, gpu)
    if batch:
        settings = replace(plan.settings, frames_per_pass=batch)
        plan = replace(plan, batch=replace(plan.batch, frames=batch), settings=settings)
    return plan


def set_precision(level: Level) -> None:
    """Set how float32 is multiplied: the audio encoder's, and everything on a processor that has another mode.

    Of the whole process: a run that calls `accelerate` in a thread calls this before, as the sound may be first.
    """
    torch.set_float32_matmul_precision("high" if level.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = level.tf32


def accelerate(
    models: Models, plan: Plan, on_message: Callable[[str], None] = log.info, frames: int | None = None
) -> Models:
    """Prepare the networks for a plan, in place, undoing what an earlier plan did. Returns the same models.

    frames: length of the job, None if unknown; see `should_compile`. on_message gets one line with the plan's details.
    """
    level, batch, settings, on_gpu = plan.level, plan.batch, plan.settings, models.device.type == "cuda"
    configure_compilers()
    set_precision(level)
    if on_gpu:
        torch.cuda.set_device(models.device)  # of this thread, for Triton's kernels and for captures
        torch.cuda.set_per_process_memory_fraction(level.vram_fraction, models.device.index or 0)
    compiled = False
    configuration = level, batch.frames, batch.windows, batch.tiling, settings.cache, settings.guidance_scale > 1
    if not captures_for(models.unet, configuration):  # else it replays the graphs of the job before, 0.3 s on an H100
        compiled = _prepare_networks(models, plan, configuration, on_message, frames)
    models.vae.use_tiling = batch.tiling
    on_message(details(plan, models.device) + (", compiled" if compiled else ""))
    return models


def _prepare_networks(
    models: Models, plan: Plan, configuration: tuple, on_message: Callable[[str], None], frames: int | None
) -> bool:
    """Swap the modules and the methods of the networks; returns whether the U-Net is compiled.

    Compiled code and graphs stand for the U-Net's methods, so either is undone before the modules change, and made
    after it; the compiler gets the U-Net with its own modules.
    """
    unet, vae, level, on_gpu = models.unet, models.vae, plan.level, models.device.type == "cuda"
    restore_eager(unet)
    release(unet, vae)
    restore_classes(unet)
    restore_classes(vae)
    swap = make_lean
    if on_gpu:
        from optim.fused import fuse  # imports Triton, which a processor does not need

        swap = fuse
    if level.fused:
        swap(vae)
    if should_compile(plan, on_gpu, frames) and compile_unet(models, plan.settings, on_message):
        return True
    if level.fused:
        swap(unet)
    if level.graphs and on_gpu:
        # Graphs keep their memory, of which a card has little if it does not take a window's faces at once.
        capture(unet, vae if plan.batch.frames >= WINDOW else None, configuration)
    return False


def should_compile(plan: Plan, on_gpu: bool, frames: int | None) -> bool:
    """Whether a job of so many frames, None if unknown, runs with torch.compile.

    The level decides. Where it does not, a job compiles that is long enough to win back the compiler's time, except
    with fused kernels on a GPU, which are faster.
    """
    if plan.level.compile is not None:
        return plan.level.compile
    return frames is not None and frames >= LONG_JOB and not (on_gpu and plan.level.fused)


def details(plan: Plan, device: torch.device) -> str:
    """Everything that a plan does on a device, in one line."""
    level, settings, cache = plan.level, plan.settings, plan.settings.cache
    parts = [f"{settings.steps} steps"]
    if cache and cache.interval > 1:
        guidance = "" if cache.guided or settings.guidance_scale <= 1 else ", guidance in full passes only"
        parts.append(f"DeepCache every {cache.interval} steps (branch {cache.branch}{guidance})")
    if settings.paint == "second":
        parts.append(f"every second frame painted from {round(2 * MIN_PAINTED)} a second on")
    if device.type == "cuda":
        from optim import kernels

        switches = {
            "TF32": level.tf32,
            "fused kernels": level.fused and kernels.triton is not None,
            "CUDA graphs": level.graphs,
            "VAE in tiles": plan.batch.tiling,
        }
        parts += [name for name, on in switches.items() if on]
        parts.append(batch_text(settings.frames_per_pass, settings.windows_per_pass))
        parts.append(f"at most {plan.batch.allowed / GIB:.1f} GB of GPU memory")
    return f"{level.name}: {', '.join(parts)}"


def batch_text(frames: int, windows: int) -> str:
    """Batch sizes in words."""
    return f"{frames} frame{'s' * (frames != 1)} and {windows} window{'s' * (windows != 1)} a pass"


def summary(plan: Plan, device: torch.device) -> str:
    """What a plan saves, in plain words: the level's name, steps, how many reuse earlier work, TF32 on a GPU."""
    settings, cache = plan.settings, plan.settings.cache
    parts = ["1 step" if settings.steps == 1 else f"{settings.steps} steps"]
    if cache and cache.interval > 1 and settings.steps > 1:
        if cache.interval == 2:
            parts.append("every other one reuses earlier work")
        else:
            words = {2: "two", 3: "three", 4: "four", 5: "five"}
            reused, of = (words.get(count, count) for count in (cache.interval - 1, cache.interval))
            parts.append(f"{reused} of {of} reuse earlier work")
    if device.type == "cuda" and plan.level.tf32:
        parts.append("TF32")
    return f"{plan.level.name}: {', '.join(parts)}"


def step_down(plan: Plan) -> tuple[Plan, str] | None:
    """A plan that needs less memory, and what was given up, in words; None where nothing is left.

    In this order: smaller batches, the autoencoder in tiles, no graphs, a smaller share of the card (the rest is
    for the desktop and the driver), no DeepCache, whose features take memory.
    """
    level, batch = plan.level, plan.batch
    if batch.frames > 1 or batch.windows > 1:
        batch = replace(batch, frames=max(1, batch.frames // 4), windows=max(1, batch.windows // 4))
        words = batch_text(batch.frames, batch.windows)
    elif not batch.tiling:
        batch, words = replace(batch, tiling=True), "the autoencoder in tiles"
    elif level.graphs:
        level, words = replace(level, graphs=False), "no CUDA graphs"
    elif level.vram_fraction > SAFE_VRAM_FRACTION:
        level = replace(level, vram_fraction=SAFE_VRAM_FRACTION)
        words = f"at most {SAFE_VRAM_FRACTION} of the GPU's memory"
    elif level.cache is not None:
        level, words = replace(level, cache=None), "no DeepCache"
    else:
        return None
    settings = replace(plan.settings, cache=level.cache, windows_per_pass=batch.windows, frames_per_pass=batch.frames)
    return Plan(level, batch, settings), words


def oom_handler(
    models: Models,
    plan: Plan,
    on_message: Callable[[str], None] = log.warning,
    on_step_down: Callable[[str], None] | None = None,
) -> Callable[[], Settings | None]:
    """A function for the pipeline to call when memory ran out.

    Each call steps down once and returns the settings to continue with, or None when nothing is left to give up.
    on_message gets a sentence for each step, on_step_down its words alone, for a report.
    """

    def on_out_of_memory() -> Settings | None:
        nonlocal plan
        smaller = step_down(plan)
        if smaller is None:
            return None
        plan, words = smaller
        on_message(f"The GPU's memory ran short: continuing with {words}.")
        if on_step_down:
            on_step_down(words)
        accelerate(models, plan, lambda _: None)
        return plan.settings

    return on_out_of_memory


def log_memory(when: str, device: torch.device) -> None:
    """Log the GPU's memory, before or after a job; nothing for the processor."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    used, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    log.info(
        f"GPU memory {when}: {used / GIB:.2f} GB in use, {peak / GIB:.2f} GB at the peak, "
        f"{torch.cuda.memory_reserved(device) / GIB:.2f} GB held, {free / GIB:.2f} of {total / GIB:.2f} GB free"
    )
