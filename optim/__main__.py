"""The accelerated command line: `python -m optim VIDEO AUDIO -o OUT.mp4 [--level NAME|0…1]`.

All options of `python -m latentsync`, the level, and every setting of a level on its own.
"""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from latentsync import __main__ as plain
from latentsync.options import between
from latentsync.prefetch import in_background
from latentsync.several import LoadModels
from optim.cluster.options import add_worker_options
from optim.levels import SWITCHES, VRAM_FRACTION
from optim.options import add_level_options, cache_override

if TYPE_CHECKING:  # torch takes seconds to load
    import torch

    from latentsync.checkpoints.find import Checkpoint
    from latentsync.settings import Report, Settings

log = logging.getLogger(__name__)


def level_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the level that the options set. Raises UserError."""
    names = ("vram_fraction", "step_share", *SWITCHES)
    return {name: value for name in names if (value := getattr(args, name)) is not None} | cache_override(args)


def build_parser(parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser = plain.make_parser(parser_class)
    add_level_options(parser, default="auto")
    add_worker_options(parser)
    fraction, batch, share = between(float, 0.1, 1), between(int, 1, 256), between(float, 0.01, 1)
    parser.add_argument(
        "--vram-fraction", type=fraction, help=f"share of the GPU's memory to use (default {VRAM_FRACTION})"
    )
    parser.add_argument(
        "--batch",
        type=batch,
        metavar="FRAMES",
        help="frames that go through the autoencoder together (default: what the memory allows)",
    )
    parser.add_argument("--step-share", type=share, help="share of --steps that is run (default: the level's)")
    options = [f"--{name.replace('_', '-')}" for name in SWITCHES]
    for option in options:
        parser.add_argument(option, action=argparse.BooleanOptionalAction, help=argparse.SUPPRESS)
    parser.epilog = "Switches: " + ", ".join(option.replace("--", "--[no-]") for option in options) + "."
    return parser


@contextmanager
def prepare(
    args: argparse.Namespace,
    checkpoint: "Checkpoint",
    device: "torch.device",
    settings: "Settings",
    frames: int,
    load: LoadModels,
) -> Iterator[plain.PreparedRun]:
    """Load and accelerate the models for a job of this many frames while its first faces are found, watch the GPU, and
    give advice at the end."""
    overrides = level_overrides(args)
    if args.gpus is not None or args.cluster is not None:
        from optim.cluster.command import prepare_workers

        with prepare_workers(args, checkpoint, device, settings, overrides, frames) as prepared:
            if prepared is not None:
                yield prepared
                return
    import torch

    from optim.accelerate import accelerate, log_memory, oom_handler, plan_for_device, set_precision
    from optim.compilation import start_triton
    from optim.doctor import advise_report
    from optim.hardware import nvml_index
    from optim.monitor import Monitor

    models, load_weights = load(checkpoint, device)
    plan = plan_for_device(device, models.resolution, settings, args.level, args.batch, **overrides)
    set_precision(plan.level)
    messages: list[str] = []
    step_downs: list[str] = []

    def load_and_accelerate() -> None:
        with in_background(lambda: start_triton(device), "triton"):
            load_weights()
        accelerate(models, plan, messages.append, frames)

    with (
        Monitor() if device.type == "cuda" else nullcontext() as monitor,
        in_background(load_and_accelerate, "models") as wait_for_models,
    ):

        def before_painting() -> None:
            wait_for_models()
            if device.type == "cuda":
                torch.cuda.set_device(models.device)  # of this thread; `accelerate` has run in another one
            while messages:
                log.info(messages.pop(0))
            log_memory("before painting", device)

        def on_finished(report: "Report") -> None:
            log_memory("after the run", device)
            gpu = monitor.snapshot().gpu(nvml_index(device)) if monitor else None
            for advice in advise_report(report, plan, step_downs, gpu):
                log.info(f"{advice.severity}: {advice.problem} {advice.remedy}")

        yield plain.PreparedRun(
            models,
            plan.settings,
            oom_handler(models, plan, on_step_down=step_downs.append),
            on_finished,
            {"level": plan.level.name, "step_downs": step_downs},
            before_painting=before_painting,
        )


def main(arguments: list[str] | None = None, prog: str = "python -m optim") -> int:
    """Run the command line; returns the exit code, see `latentsync.__main__.main`."""
    return plain.main(arguments, build_parser, prepare, prog)


if __name__ == "__main__":
    plain.leave(main())
