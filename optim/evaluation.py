"""Measures of lip sync at a level: `python -m optim.evaluation clips CLIPS OUT --level aggressive`.

All of `python -m latentsync.evaluation`, with the level and its DeepCache besides.
"""

import argparse
import sys

from latentsync.checkpoints.load import Models
from latentsync.evaluation import __main__ as plain
from latentsync.settings import Settings
from optim.__main__ import parse_cache
from optim.accelerate import accelerate, make_plan
from optim.hardware import gpu_of
from optim.levels import CONSERVATIVE, find_level, override


def parser() -> argparse.ArgumentParser:
    found, dubbing = plain.parsers()
    found.prog = "python -m optim.evaluation"
    for command in dubbing:
        command.add_argument("--level", default=CONSERVATIVE.name, metavar="NAME|0…1", help="default: conservative")
        command.add_argument("--deepcache", metavar="INTERVAL[,BRANCH]|off", help="default: the level's")
    return found


def prepare(args: argparse.Namespace, models: Models, settings: Settings) -> tuple[Models, Settings]:
    """Models and settings as the level has them."""
    level = find_level(args.level)
    if args.deepcache is not None:
        level = override(level, cache=parse_cache(args.deepcache))
    device = models.device
    gpu = gpu_of(device)
    plan = make_plan(level, settings, models.resolution, gpu)
    return accelerate(models, plan), plan.settings


if __name__ == "__main__":
    sys.exit(plain.main(parser=parser, prepare=prepare))
