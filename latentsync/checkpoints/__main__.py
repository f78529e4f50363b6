"""The released models on the command line: `python -m latentsync.checkpoints list | get | verify | remove`."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from latentsync.checkpoints.download import Progress
from latentsync.checkpoints.releases import RELEASES, gigabytes, notice
from latentsync.checkpoints.store import Stored, get, remove, stored, verify
from latentsync.errors import UserError
from latentsync.options import interrupt_on_signals


class ProgressBar:
    """Progress on a terminal: one bar for each step, one after the other; elsewhere a line for each."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.what = ""

    def __call__(self, done: int, total: int, what: str) -> None:
        if self.bar is None or what != self.what:
            self.close()
            self.what = what
            disable = None if total else True  # None: shown where stderr is a terminal
            self.bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=disable)
            if self.bar.disable:
                print(what, file=sys.stderr, flush=True)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def describe(model: Stored) -> str:
    """What is here of a model, in a line."""
    if model.where is None:
        state = f"not here, {gigabytes(model.to_fetch)} to fetch"
    elif model.converted:
        state = f"ready, {gigabytes(model.size)} in {model.where}"
        if model.pickle:
            state += f" ({gigabytes(model.pickle)} of it can go: remove {model.name} --pickle)"
    else:
        state = f"here, starts faster after get {model.name}: {model.where}"
    return f"{model.name}  {model.resolution} px  {state}"


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="The released models on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what is here, what could be fetched, and under which licences")
    get_parser = commands.add_parser("get", help="fetch a model, or continue an interrupted download, and convert it")
    get_parser.add_argument("name", choices=RELEASES)
    get_parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="take files that are in this folder instead of fetching them",
    )
    get_parser.add_argument(
        "--remove-pickle", action="store_true", help="afterwards, remove the U-Net as it was fetched"
    )
    commands.add_parser("verify", help="compare the hashes of all files").add_argument("name", choices=RELEASES)
    remove_parser = commands.add_parser("remove", help="remove a model")
    remove_parser.add_argument("name", choices=RELEASES)
    remove_parser.add_argument("--pickle", action="store_true", help="only the U-Net as it was fetched, once converted")
    return parser


def run(args: argparse.Namespace, progress: Progress) -> int:
    if args.command == "list":
        for name in RELEASES:
            print(describe(stored(name)))
        for name in RELEASES:
            print(notice(name))
    elif args.command == "get":
        print(notice(args.name), file=sys.stderr, flush=True)
        get(args.name, progress, sources=args.source, keep_pickle=not args.remove_pickle)
        print(describe(stored(args.name)))
    elif args.command == "verify":
        problems = verify(args.name, progress)
        for sentence in problems:
            print(sentence, file=sys.stderr)
        if problems:
            return 2
        print(f"all files of {args.name} are as they should be")
    else:
        print(f"removed {gigabytes(remove(args.name, args.pickle))}")
    return 0


def main(arguments: list[str] | None = None, prog: str = "python -m latentsync.checkpoints") -> int:
    """Run the command; returns the exit code: 0, 2 for what the user can put right, 130 when interrupted."""
    args, bar = make_parser(prog).parse_args(arguments), ProgressBar()
    interrupt_on_signals()
    try:
        return run(args, bar)
    except UserError as error:
        bar.close()
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        bar.close()
        print("stopped; what was fetched is kept, and the next get continues from there", file=sys.stderr)
        return 130
    finally:
        bar.close()


if __name__ == "__main__":
    sys.exit(main())
