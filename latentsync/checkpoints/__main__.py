"""The released models on the command line: `python -m latentsync.checkpoints list | get | verify | remove`."""

import argparse
import signal
import sys
from pathlib import Path

from tqdm import tqdm

from latentsync.checkpoints.download import Progress
from latentsync.checkpoints.releases import RELEASES, gigabytes, notice
from latentsync.checkpoints.store import Stored, get, remove, stored, verify
from latentsync.errors import UserError


class Bar:
    """Progress on a terminal: one bar for each thing that is done, one after the other."""

    def __init__(self) -> None:
        self.bar, self.what = None, ""

    def __call__(self, done: int, total: int, what: str) -> None:
        if what != self.what:
            self.close()
            self.what = what
            off = None if total else True  # None: on, where stderr is a terminal
            self.bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=off)
            if self.bar.disable:
                print(what, file=sys.stderr, flush=True)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def describe(found: Stored) -> str:
    """What is here of a model, in a line."""
    if found.where is None:
        state = f"not here, {gigabytes(found.to_fetch)} to fetch"
    elif found.converted:
        state = f"ready, {gigabytes(found.size)} in {found.where}"
        if found.pickle:
            state += f" ({gigabytes(found.pickle)} of it can go: remove {found.name} --pickle)"
    else:
        state = f"here, starts faster after get {found.name}: {found.where}"
    return f"{found.name}  {found.resolution} px  {state}"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m latentsync.checkpoints", description="The released models on this machine."
    )
    commands = found.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what is here, what could be fetched, and under which licences")
    getting = commands.add_parser("get", help="fetch a model, or go on with it, and convert it")
    getting.add_argument("name", choices=RELEASES)
    getting.add_argument(
        "--from", dest="source", type=Path, action="append", default=[], metavar="FOLDER",
        help="take files that are in this folder instead of fetching them",
    )  # fmt: skip
    getting.add_argument("--remove-pickle", action="store_true", help="afterwards, remove the U-Net as it was fetched")
    commands.add_parser("verify", help="compare the hashes of all files").add_argument("name", choices=RELEASES)
    removing = commands.add_parser("remove", help="remove a model")
    removing.add_argument("name", choices=RELEASES)
    removing.add_argument("--pickle", action="store_true", help="only the U-Net as it was fetched, once converted")
    return found


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
        wrong = verify(args.name, progress)
        for sentence in wrong:
            print(sentence, file=sys.stderr)
        if wrong:
            return 2
        print(f"all files of {args.name} are as they should be")
    else:
        print(f"removed {gigabytes(remove(args.name, args.pickle))}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for what the user can put right, 130 when interrupted."""
    args, bar = parser().parse_args(arguments), Bar()

    def stop(*_) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        return run(args, bar)
    except UserError as error:
        bar.close()
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        bar.close()
        print("stopped; what was fetched is kept, and the next time goes on from there", file=sys.stderr)
        return 130
    finally:
        bar.close()


if __name__ == "__main__":
    sys.exit(main())
