"""Options of command lines that run at a level."""

import argparse
from typing import Any

from latentsync.errors import UserError
from latentsync.settings import DeepCache
from optim.levels import STOPS


def add_level_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --level and --deepcache; default: of the level, "auto" where that is a level too."""
    names = ", ".join(stop.name for stop in STOPS)
    if default == "auto":
        names = f"auto (the level that suits the GPU), {names}"
    parser.add_argument(
        "--level",
        default=default,
        metavar="NAME|0…1",
        help=f"{names}, or a number from 0 (quality) to 1 (speed); default: {default}",
    )
    parser.add_argument(
        "--deepcache",
        metavar="INTERVAL[,BRANCH]|off",
        help="all layers at every INTERVAL-th step only (default: the level's)",
    )


def cache_override(args: argparse.Namespace) -> dict[str, Any]:
    """The override of the level's cache that --deepcache sets, if any. Raises UserError."""
    return {} if args.deepcache is None else {"cache": parse_cache(args.deepcache)}


def parse_cache(text: str) -> DeepCache | None:
    """A value of --deepcache; None for "off". Raises UserError."""
    if text == "off":
        return None
    try:
        interval, branch = (*map(int, text.split(",")), 0)[:2]
    except ValueError:
        raise UserError(
            f"--deepcache {text} is not understood: give an interval, as 3, or with a branch, as 3,0, or off."
        ) from None
    return DeepCache(interval, branch)
