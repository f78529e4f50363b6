"""The fast command line: `python -m optim VIDEO AUDIO -o OUT.mp4 [--level NAME|0…1]`.

All options of `python -m latentsync`, the level, and every setting of a level on its own.
"""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from latentsync import __main__ as plain
from latentsync.errors import UserError
from latentsync.options import between

if TYPE_CHECKING:  # torch takes seconds to load
    from latentsync.checkpoints.load import Models
    from latentsync.settings import DeepCache, Report, Settings

log = logging.getLogger(__name__)

SWITCHES = ("tf32", "compile", "graphs", "fused", "vae_tiling")  # settings of a level that are on or off


def parser() -> argparse.ArgumentParser:
    found = plain.make_parser()
    found.prog = "python -m optim"
    found.add_argument(
        "--level", default="auto", metavar="NAME|0…1",
        help="auto (default: what suits the GPU), conservative, balanced, aggressive, or a number from 0 (quality) "
        "to 1 (speed)",
    )  # fmt: skip
    found.add_argument(
        "--vram-fraction", type=between(float, 0.1, 1), help="share of the GPU's memory to use (default 0.85)"
    )
    found.add_argument(
        "--batch", type=between(int, 1, 256), metavar="FRAMES",
        help="frames that go through the autoencoder together (default: what the memory allows)",
    )  # fmt: skip
    found.add_argument(
        "--step-share", type=between(float, 0.01, 1), help="share of --steps that is run (default: the level's)"
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
    from latentsync.settings import DeepCache

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
) -> Iterator[plain.PreparedRun]:
    """Make the run as fast as the level says, watch it, and give advice on it."""
    import math

    from latentsync import FPS
    from optim.accelerate import accelerate, log_memory, oom_handler, plan_for_device
    from optim.doctor import advise_report
    from optim.hardware import nvml_index
    from optim.monitor import Monitor

    given = {name: getattr(args, name) for name in ("vram_fraction", "step_share", *SWITCHES)}
    given = {name: value for name, value in given.items() if value is not None}
    if args.deepcache is not None:
        given["cache"] = parse_cache(args.deepcache)
    device = models.device
    plan = plan_for_device(device, models.resolution, settings, args.level, args.batch, **given)
    accelerate(models, plan, frames=math.ceil(seconds * FPS))
    log_memory("before the run", device)
    step_downs: list[str] = []
    prepared = plain.PreparedRun(plan.settings, oom_handler(models, plan, on_step_down=step_downs.append))
    prepared.report_extras = {"level": plan.level.name, "step_downs": step_downs}
    with Monitor() if device.type == "cuda" else nullcontext() as monitor:

        def on_finished(report: "Report") -> None:
            log_memory("after the run", device)
            gpu = monitor.snapshot().gpu(nvml_index(device)) if monitor else None
            for advice in advise_report(report, plan, step_downs, gpu):
                log.info(f"{advice.severity}: {advice.problem} {advice.remedy}")

        prepared.on_finished = on_finished
        yield prepared


if __name__ == "__main__":
    plain.leave(plain.main(make_parser=parser, prepare=prepare))
