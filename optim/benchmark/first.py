"""Seconds from the command to the first painted window: each time in a new process, which ends there."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from latentsync import __main__ as command_line
from latentsync.__main__ import leave
from latentsync.progress import ProgressLines
from latentsync.settings import WINDOW

if TYPE_CHECKING:  # it imports diffusers, which would count as part of the start
    from optim.benchmark.rows import BenchmarkConfig

PAINTED = "painted"


@dataclass(frozen=True)
class FirstRow:
    """The command line until its first window is painted."""

    name: str
    seconds: tuple[float, ...] = ()  # of each repeat, in order
    failed: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class UntilPainted(ProgressLines):
    """Progress that ends the process when the first window is painted."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "mouths" and done >= min(WINDOW, total):
            print(PAINTED, flush=True)
            leave(0)


def first_rows(video: Path, audio: Path, config: "BenchmarkConfig") -> Iterator[FirstRow]:
    """A row for each level. The first run of a machine also fills the caches."""
    for level in config.levels:
        with tempfile.TemporaryDirectory() as folder:
            arguments = [
                video,
                audio,
                "-o",
                Path(folder, "out.mp4"),
                "--device",
                config.device,
                "--steps",
                config.steps,
            ]
            arguments += ["--level", level.name, "--model", config.model or "auto"]
            seconds: list[float] = []
            failed = ""
            for _ in range(config.repeats):
                began = time.monotonic()
                process = subprocess.run(
                    [sys.executable, "-m", "optim.benchmark.first", *map(str, arguments)],
                    capture_output=True,
                    text=True,
                )
                if PAINTED not in process.stdout.splitlines():
                    failed = (process.stderr.strip() or "it ended early").splitlines()[-1]
                    break
                seconds.append(time.monotonic() - began)
        yield FirstRow(level.name, tuple(seconds), failed)


if __name__ == "__main__":
    from optim.__main__ import main

    command_line.ProgressLines = UntilPainted  # type: ignore[misc]  # standard error is no terminal here
    leave(main())
