"""The fast command line: `python -m optim VIDEO AUDIO -o OUT.mp4 [--level NAME|0…1]`.

All options of `python -m latentsync`, the level, and every setting of a level on its own.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from latentsync import __main__ as plain
from latentsync.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to load
    from latentsync.checkpoints import Models
    from latentsync.pipeline import Report, Settings
    from latentsync.sampling import DeepCache
    from optim.accelerate import Plan
    from optim.doctor import Advice
    from optim.monitor import Monitor

SWITCHES = ("tf32", "compile", "graphs", "fused", "vae_tiling")  # settings of a level that are on or off


def parser() -> argparse.ArgumentParser:
    found = plain.parser()
    found.prog = "python -m optim"
    found.add_argument(
        "--level", default="auto", metavar="NAME|0…1",
        help="auto (default: what suits the GPU), conservative, balanced, aggressive, or a number from 0 (quality) "
        "to 1 (speed)",
    )  # fmt: skip
    found.add_argument(
        "--vram-fraction", type=plain.between(float, 0.1, 1), help="share of the GPU's memory to use (default 0.85)"
    )
    found.add_argument(
        "--batch", type=plain.between(int, 1, 256), metavar="FRAMES",
        help="frames that go through the autoencoder together (default: what the memory allows)",
    )  # fmt: skip
    found.add_argument(
        "--step-share", type=plain.between(float, 0.01, 1), help="share of --steps that is run (default: the level's)"
    )
    found.add_argument(
        "--deepcache", metavar="INTERVAL[,BRANCH]|off",
        help="all layers at every INTERVAL-th step only (default: the level's)",
    )  # fmt: skip
    for name in SWITCHES:
        found.add_argument(f"--{name.replace('_', '-')}", action=argparse.BooleanOptionalAction, help=argparse.SUPPRESS)
    found.epilog = "Switches: " + ", ".join(f"--[no-]{name.replace('_', '-')}" for name in SWITCHES) + "."
    return found


def parse_cache(text: str) -> "DeepCache | None":
    """What --deepcache asks for. Raises UserError."""
    from latentsync.sampling import DeepCache

    if text == "off":
        return None
    try:
        interval, branch = (*map(int, text.split(",")), 0)[:2]
    except ValueError:
        raise UserError(
            f"--deepcache {text} is not understood: give an interval, as 3, or with a branch, as 3,0, or off."
        ) from None
    return DeepCache(interval, branch)


@contextmanager
def prepare(
    args: argparse.Namespace, models: "Models", settings: "Settings", seconds: float
) -> Iterator[plain.Job]:
    """Make the run as fast as the level says, watch it, and give advice on it."""
    import math
    from dataclasses import replace

    from latentsync.audio import VIDEO_FPS
    from optim.accelerate import accelerate, log_memory, make_plan, reliever, say
    from optim.hardware import read_gpus, recommended_level
    from optim.levels import find_level, override
    from optim.monitor import Monitor

    device = models.device
    gpu = read_gpus()[device.index or 0] if device.type == "cuda" else None
    level = recommended_level(gpu) if args.level == "auto" else find_level(args.level)
    given = {name: getattr(args, name) for name in ("vram_fraction", "step_share", *SWITCHES)}
    given = {name: value for name, value in given.items() if value is not None}
    if args.deepcache is not None:
        given["cache"] = parse_cache(args.deepcache)
    plan = make_plan(override(level, **given), settings, models.resolution, gpu)
    if args.batch:
        plan = replace(
            plan,
            batch=replace(plan.batch, frames=args.batch),
            settings=replace(plan.settings, frames_per_pass=args.batch),
        )
    accelerate(models, plan, frames=math.ceil(seconds * VIDEO_FPS))
    log_memory("before the run", device)
    step_downs: list[str] = []
    job = plain.Job(plan.settings, reliever(models, plan, on_step_down=step_downs.append))
    job.notes = {"level": plan.level.name, "step_downs": step_downs}
    with Monitor() if gpu else nullcontext() as monitor:

        def finished(report: "Report") -> None:
            log_memory("after the run", device)
            for advice in advice_on(report, plan, step_downs, monitor):
                say(f"{advice.severity}: {advice.problem} {advice.remedy}")

        job.finished = finished
        yield job


def advice_on(
    report: "Report", plan: "Plan", step_downs: list[str], monitor: "Monitor | None"
) -> "list[Advice]":
    """The doctor's advice on a finished run."""
    import numpy as np

    from optim.doctor import RunFacts, advise_run

    cache = plan.settings.cache
    utilization, slowdowns = None, 0
    gpus = monitor.snapshot().gpus if monitor else ()
    if gpus and np.isfinite(gpus[0].utilization).any():
        utilization = float(np.nanmean(gpus[0].utilization))
        for bits in gpus[0].slowdowns[np.isfinite(gpus[0].slowdowns)]:
            slowdowns |= int(bits)
    return advise_run(
        RunFacts(
            frames=report.frames,
            seconds=report.total_seconds,
            resolution=report.resolution,
            steps=plan.settings.steps,
            device=report.device,
            position=plan.level.position,
            cache_interval=cache.interval if cache else 1,
            frames_without_face=report.frames_without_face,
            utilization=utilization,
            slowdowns=slowdowns,
            step_downs=tuple(step_downs),
        )
    )


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    plain.leave(plain.main(parser=parser, prepare=prepare))
