"""Measures of lip sync at a level: `python -m optim.evaluation clips CLIPS OUT --level aggressive`.

All of `python -m latentsync.evaluation`, with the level and its DeepCache added.
"""

import argparse
import sys
from functools import partial

from latentsync.checkpoints.load import Models
from latentsync.evaluation import __main__ as plain
from latentsync.options import log_to_stderr
from latentsync.settings import Settings
from optim.accelerate import accelerate, make_plan
from optim.hardware import gpu_of
from optim.levels import CONSERVATIVE, find_level, override
from optim.options import add_level_options, cache_override


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser, dubbing_commands = plain.parsers()
    parser.prog = prog
    for command in dubbing_commands:
        add_level_options(command, default=CONSERVATIVE.name)
    return parser


def prepare(args: argparse.Namespace, models: Models, settings: Settings) -> tuple[Models, Settings]:
    """The models and settings of the level."""
    level = override(find_level(args.level), **cache_override(args))
    plan = make_plan(level, settings, models.resolution, gpu_of(models.device))
    return accelerate(models, plan), plan.settings


def main(arguments: list[str] | None = None, prog: str = "python -m optim.evaluation") -> int:
    """Run a command; returns the exit code, see `latentsync.evaluation.__main__.main`."""
    log_to_stderr()
    return plain.main(arguments, partial(build_parser, prog), prepare)


if __name__ == "__main__":
    sys.exit(main())
