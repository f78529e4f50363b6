"""From a level to a fast run: what the pipeline is asked for, and how the networks carry it out.

plan = make_plan(level, Settings(), models.resolution, gpu)
models = accelerate(models, plan)
lipsync(video, audio, output, models, plan.settings, relieve=reliever(models, plan))
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from latentsync.checkpoints.load import Models
from latentsync.machine import total_memory
from latentsync.sampling import denoise
from latentsync.settings import WINDOW, Settings
from optim import kernels
from optim.compilation import LONG_JOB, compile_unet, restore, use_cache_folder
from optim.cores import denoise_side_by_side, windows_for
from optim.fused import fuse, unfuse
from optim.graphs import capture, ready_for, release
from optim.hardware import (
    GIB,
    RELEASED,
    BatchSizes,
    Gpu,
    apply_vram_fraction,
    batch_sizes,
    gpu_of,
    recommended_level,
)
from optim.levels import STOPS, Level, find_level, override, steps_for

CPU_FRAMES = 4  # faces at a time were as fast as 16 on two cores, with 0.3 GB less
CPU_SHARE = 0.25  # of the memory, for the windows that a processor computes side by side
FLOAT32 = 2  # times what a window takes in half precision
SAFE_VRAM_FRACTION = 0.75  # after memory ran out


def say(line: str) -> None:
    """One line on the console."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Plan:
    """A run at a level: batch, what goes through the device together; settings, what the pipeline is to be given."""

    level: Level
    batch: BatchSizes
    settings: Settings


def make_plan(level: Level, asked: Settings, resolution: int, gpu: Gpu | None) -> Plan:
    """The plan for a level on a GPU, None for the processor; asked: settings as for the plain pipeline.

    Steps, cache and batches of the settings come from the level and the GPU, all else from what is asked.
    """
    batch = batch_sizes(gpu, resolution, level) if gpu else processor_batch(resolution)
    return Plan(level, batch, _settings(level, batch, asked))


def processor_batch(resolution: int) -> BatchSizes:
    """The batches of a processor: as many windows as its cores are best used by, and its memory holds."""
    fit = int(CPU_SHARE * total_memory() // (FLOAT32 * RELEASED.window_at(resolution)))
    windows = max(1, min(fit, windows_for(torch.get_num_threads())))
    return BatchSizes(CPU_FRAMES, windows, tiling=False, planned=0, allowed=0)


def plan_as_asked(
    device: torch.device,
    resolution: int,
    asked: Settings,
    level: str = "auto",
    batch: int | None = None,
    **overrides: object,
) -> Plan:
    """The plan for a device: level as users name it, or `auto` for what suits the device; overrides: of single settings
    of the level; batch: frames that go through the autoencoder together. Raises UserError."""
    gpu = gpu_of(device)
    chosen = recommended_level(gpu) if level == "auto" else find_level(level)
    plan = make_plan(override(chosen, **overrides), asked, resolution, gpu)
    if batch:
        settings = replace(plan.settings, frames_per_pass=batch)
        plan = replace(plan, batch=replace(plan.batch, frames=batch), settings=settings)
    return plan


def _settings(level: Level, batch: BatchSizes, asked: Settings) -> Settings:
    return replace(
        asked,
        steps=steps_for(level, asked.steps),
        cache=level.cache,
        windows_per_pass=batch.windows,
        frames_per_pass=batch.frames,
    )


def accelerate(models: Models, plan: Plan, say: Callable[[str], None] = say, frames: int | None = None) -> Models:
    """Make the networks run as the plan says, in place; another plan may follow, and undoes what it does not want.

    frames: of the job, None if that is not known; see `should_compile`. Says in a line what is done. Returns the same
    models.
    """
    level, settings, on_gpu = plan.level, plan.settings, models.device.type == "cuda"
    use_cache_folder()
    # Of float32: the audio encoder, and all on a processor that has a mode for it.
    torch.set_float32_matmul_precision("high" if level.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = level.tf32
    if on_gpu:
        torch.cuda.set_device(models.device)  # of this thread, for Triton's kernels and captures, which go by it
        apply_vram_fraction(level.vram_fraction, models.device.index or 0)
    models.denoise = denoise if on_gpu or settings.windows_per_pass == 1 else denoise_side_by_side
    compiled, batch = False, plan.batch
    # A job as the one before replays its graphs: fusing and capturing anew take 0.3 s (an H100, 2026-11-25).
    purpose = level, batch.frames, batch.windows, batch.tiling, settings.cache, settings.guidance_scale > 1
    if not ready_for(models.unet, purpose):
        restore(models.unet)
        release(models.unet, models.vae)
        (fuse if level.fused else unfuse)(models.vae)
        if should_compile(plan, on_gpu, frames):
            compiled = compile_unet(replace(models, unet=unfuse(models.unet)), settings, say)
        if not compiled:
            (fuse if level.fused else unfuse)(models.unet)
        if level.graphs and on_gpu and not compiled:
            # Graphs keep their memory, of which a card has little that does not take a window's faces at once.
            capture(models.unet, models.vae if batch.frames >= WINDOW else None, purpose)
    (models.vae.enable_tiling if batch.tiling else models.vae.disable_tiling)()
    say(describe(plan, models.device) + (", compiled" if compiled else ""))
    return models


def should_compile(plan: Plan, on_gpu: bool, frames: int | None) -> bool:
    """Whether a job of so many frames, None if that is not known, is to run with torch.compile.

    As the level says; where it leaves that open, a job compiles that is long enough to win back the compiler's time
    and for which nothing faster runs: fused kernels on a GPU, several windows at a time on a processor.
    """
    if plan.level.compile is not None:
        return plan.level.compile
    faster = plan.level.fused if on_gpu else plan.settings.windows_per_pass > 1
    return not faster and frames is not None and frames >= LONG_JOB


def describe(plan: Plan, device: torch.device) -> str:
    """The plan in one line, as it is carried out on a device."""
    level, settings, cache = plan.level, plan.settings, plan.settings.cache
    parts = [f"{settings.steps} steps"]
    if cache and cache.interval > 1:
        half = "" if cache.guided or settings.guidance_scale <= 1 else ", guidance in full passes only"
        parts.append(f"DeepCache every {cache.interval} steps (branch {cache.branch}{half})")
    if device.type == "cuda":
        parts += [name for name, on in (
            ("TF32", level.tf32), ("fused kernels", level.fused and kernels.triton is not None),
            ("CUDA graphs", level.graphs),
            ("VAE in tiles", plan.batch.tiling),
        ) if on]  # fmt: skip
        parts.append(a_pass(settings.frames_per_pass, settings.windows_per_pass))
        parts.append(f"at most {plan.batch.allowed / GIB:.1f} GB of GPU memory")
    elif settings.windows_per_pass > 1:
        parts.append(f"{settings.windows_per_pass} windows side by side")
    return f"{level.name}: {', '.join(parts)}"


def a_pass(frames: int, windows: int) -> str:
    """Batches in words."""
    return " and ".join(f"{n} {one}{'s' * (n != 1)}" for n, one in ((frames, "frame"), (windows, "window"))) + " a pass"


def in_words(plan: Plan, device: torch.device) -> str:
    """What a plan saves, as one says it: the level's name, steps, what is not computed anew, TF32 where it is used."""
    settings, cache = plan.settings, plan.settings.cache
    parts = ["1 step" if settings.steps == 1 else f"{settings.steps} steps"]
    if cache and cache.interval > 1 and settings.steps > 1:
        if cache.interval == 2:
            parts.append("every other one reuses earlier work")
        else:
            few = {2: "two", 3: "three", 4: "four", 5: "five"}
            most, of = (few.get(count, count) for count in (cache.interval - 1, cache.interval))
            parts.append(f"{most} of {of} reuse earlier work")
    if device.type == "cuda" and plan.level.tf32:
        parts.append("TF32")
    return f"{plan.level.name}: {', '.join(parts)}"


def step_down(plan: Plan) -> tuple[Plan, str] | None:
    """What to try when memory ran out, and what that is in words; None when there is nothing left to give up.

    In this order: smaller batches, the autoencoder in tiles, no graphs, a smaller share of the card (the rest is
    the desktop's and the driver's), the next level towards quality, whose batches are the smallest.
    """
    level, batch = plan.level, plan.batch
    if batch.frames > 1 or batch.windows > 1:
        frames, windows = max(1, batch.frames // 4), max(1, batch.windows // 4)
        batch = replace(batch, frames=frames, windows=windows)
        words = a_pass(frames, windows)
    elif not batch.tiling:
        batch, words = replace(batch, tiling=True), "the autoencoder in tiles"
    elif level.graphs:
        level, words = replace(level, graphs=False), "no CUDA graphs"
    elif level.vram_fraction > SAFE_VRAM_FRACTION:
        level = replace(level, vram_fraction=SAFE_VRAM_FRACTION)
        words = f"at most {SAFE_VRAM_FRACTION} of the GPU's memory"
    else:
        slower = [stop for stop in STOPS if stop.position < level.position]
        if not slower:
            return None
        kept = {"graphs": False, "vram_fraction": level.vram_fraction}
        level = replace(slower[-1], **kept)
        words = f"level {level.name}"
    # The steps asked for are not known any more: they are those of the plan, at every level.
    settings = replace(plan.settings, cache=level.cache, windows_per_pass=batch.windows, frames_per_pass=batch.frames)
    return Plan(level, batch, settings), words


def reliever(
    models: Models, plan: Plan, say: Callable[[str], None] = say, on_step_down: Callable[[str], None] | None = None
) -> Callable[[], Settings | None]:
    """For the pipeline to call when memory ran out: every call steps down once, says so in one line, and gives the
    settings to go on with; None at the end. on_step_down is told the words, for a report."""

    def relieve() -> Settings | None:
        nonlocal plan
        found = step_down(plan)
        if found is None:
            return None
        plan, words = found
        say(f"The GPU's memory ran short: going on with {words}.")
        if on_step_down:
            on_step_down(words)
        accelerate(models, plan, lambda _: None)
        return plan.settings

    return relieve


def log_memory(when: str, device: torch.device, say: Callable[[str], None] = say) -> None:
    """A line on the GPU's memory, before or after a run; nothing for the processor."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    say(
        f"GPU memory {when}: {torch.cuda.memory_allocated(device) / GIB:.2f} GB in use, "
        f"{torch.cuda.max_memory_allocated(device) / GIB:.2f} GB at the peak, "
        f"{torch.cuda.memory_reserved(device) / GIB:.2f} GB held, {free / GIB:.2f} of {total / GIB:.2f} GB free"
    )
