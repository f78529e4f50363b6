"""Measures of lip sync at a level: `python -m optim.evaluation clips CLIPS OUT --level aggressive`.

All of `python -m latentsync.evaluation`, with the level and its DeepCache added.
"""

import argparse
import sys

from latentsync.checkpoints.load import Models
from latentsync.evaluation import __main__ as plain
from latentsync.settings import Settings
from optim.accelerate import accelerate, make_plan
from optim.hardware import gpu_of
from optim.levels import CONSERVATIVE, find_level, override
from optim.options import add_level_options, cache_override


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of the level to a command that dubs."""
    add_level_options(command, default=CONSERVATIVE.name)


def prepare(args: argparse.Namespace, models: Models, settings: Settings) -> tuple[Models, Settings]:
    """The models and settings of the level."""
    level = override(find_level(args.level), **cache_override(args))
    plan = make_plan(level, settings, models.resolution, gpu_of(models.device))
    return accelerate(models, plan), plan.settings


def main(arguments: list[str] | None = None, prog: str = "python -m optim.evaluation") -> int:
    """Run a command; returns the exit code, see `latentsync.evaluation.__main__.main`."""
    return plain.main(arguments, prog, add_options, prepare)


if __name__ == "__main__":
    sys.exit(main())
