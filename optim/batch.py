"""Work through a list of jobs: `latentsync batch LIST.jsonl` or `LIST.csv`; see `optim.job_list` for its rows.

Rows run one after the other and share the loaded model. What became of each is appended to a file beside the list, and
the same command skips the rows that it lists as done, as long as row, film and voice are unchanged and the output is
there. A row that was interrupted resumes by its segments, as a single run does.
"""

import argparse
import hashlib
import io
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from latentsync import __main__ as plain
from latentsync.errors import UserError
from latentsync.media import check_output
from latentsync.options import interrupt_on_signals, log_to_stderr
from latentsync.paths import check_writable
from latentsync.several import LoadModels, load_once
from optim.__main__ import build_parser, prepare
from optim.job_list import Row, input_files, read_list

log = logging.getLogger(__name__)

RESULTS = "The file of results"


def results_path(path: Path) -> Path:
    """The file of JSON lines, beside the list, that says what became of its rows."""
    return path.with_name(f"{path.name}.results.jsonl")


@contextmanager
def only_run_of(path: Path) -> Iterator[None]:
    """Hold a lock on a list during a `with` block. Raises UserError where another process has it."""
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"The list {path} is being worked on by another run; wait for it.") from None
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):
            os.unlink(lock.lock_file)


def identify(row: Row) -> str:
    """A hash of what decides a row's result: its settings as they stand there, and size and time of its inputs."""
    inputs = []
    for path in input_files(row.args) if row.args else ():
        try:
            status = os.stat(path)
            inputs.append([status.st_size, status.st_mtime_ns])
        except OSError:  # the run says what is wrong
            inputs.append([])
    return hashlib.sha256(json.dumps([row.values, inputs], sort_keys=True).encode()).hexdigest()


def read_done(path: Path) -> dict[str, str]:
    """Output → `identify` of the row that was last done with it, from a file of results; lines that are damaged, as by
    a power cut, do not count."""
    done: dict[str, str] = {}
    with suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
                if entry["status"] == "done":
                    done[str(entry["output"])] = str(entry["row"])
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
    return done


def append_result(path: Path, entry: dict[str, Any]) -> None:
    """Append a line to the file of results, and wait until it is on the disk. Raises UserError."""
    try:
        with open(path, "ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                ended = file.read(1) == b"\n"
            else:
                ended = True
            file.write((b"" if ended else b"\n") + json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{RESULTS} {path} cannot be written ({error.strerror}); free some space.") from error


def printable(text: object) -> str:
    """Text of a list on one line, without characters that would control a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def run_row(row: Row, load: LoadModels, protected: tuple[Path, ...]) -> str | None:
    """Run the job of a row, which must write none of the `protected` files; returns a sentence where it fails."""
    if row.args is None:
        return row.error
    try:
        check_output(row.args.output, protected)
        if row.args.report:
            check_writable(row.args.report, protected, plain.REPORT)
        plain.run(row.args, prepare, load)
    except UserError as error:
        return str(error)
    except Exception as error:  # of the program: the other rows may be without it
        log.debug("row failed", exc_info=True)
        return f"The program has failed ({type(error).__name__}: {error}); run this row with `sync`, and report it."
    return None


def run_list(path: Path) -> int:
    """Run the rows of a list that are not done; returns how many failed. Raises UserError where the list or the file of
    results cannot be used."""
    rows = read_list(path, build_parser)
    results = check_writable(results_path(path), (path,), RESULTS)
    load, counts = load_once(), Counter[str]()
    with only_run_of(path):
        done = read_done(results)
        try:
            for number, row in enumerate(rows, 1):
                identity = identify(row)
                output = row.values.get("output", "")
                if row.args and done.get(output) == identity and Path(row.args.output).is_file():
                    counts["done before"] += 1
                    continue
                if row.args:
                    print(f"row {number} of {len(rows)}: {printable(row.args.output)}", file=sys.stderr, flush=True)
                began = time.monotonic()
                error = run_row(row, load, (path, results))
                counts["failed" if error else "done"] += 1
                entry = {"line": row.line, "output": output, "row": identity, "status": "failed" if error else "done"}
                if error:
                    print(f"line {row.line}: {printable(error)}", file=sys.stderr, flush=True)
                    entry["error"] = error
                append_result(results, entry | {"seconds": round(time.monotonic() - began, 3)})
        finally:
            left = len(rows) - counts.total()
            parts = {"done": counts["done"], "done before": counts["done before"], "failed": counts["failed"]}
            parts |= {"not begun or not finished": left} if left else {}
            summary = ", ".join(f"{count} {what}" for what, count in parts.items())
            print(f"{len(rows)} rows: {summary}; see {printable(results)}", file=sys.stderr, flush=True)
    return counts["failed"]


def main(arguments: list[str] | None = None, prog: str = "python -m optim.batch") -> int:
    """Run the command line; returns the exit code: 0, 1 where a row failed, 2 where the list or the file of results
    cannot be used, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Run every row of a list of jobs; the same command goes on where it was interrupted.",
        epilog="A row has video, audio and output, and settings by the names of the options of `sync`; "
        "docs/command-line.md shows examples.",
    )
    parser.add_argument("list", metavar="LIST", type=Path, help="a file of JSON lines (.jsonl), or .csv with a header")
    args = parser.parse_args(plain.shield_dashes(sys.argv[1:] if arguments is None else arguments))
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may have letters that the console's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    interrupt_on_signals()
    log_to_stderr()
    try:
        return 1 if run_list(args.list) else 0
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    plain.leave(main())
