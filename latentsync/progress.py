"""Progress of a run in words and bars, on stderr."""

import shutil
import sys
import time
from typing import TYPE_CHECKING

from latentsync import SPEAKERS, STAGES

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_SECONDS = 10  # between two lines of progress where there is no terminal


class ProgressBars:
    """Progress on a terminal: one bar for each stage, with frames per second and time left."""

    def __init__(self, stages: tuple[str, ...] = STAGES) -> None:
        self.stages = stages
        self.bars: dict[str, tqdm] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if stage not in self.bars:  # all of a run at once, so that a stage's time counts from its start
            layout = "{desc:8} {percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt} {rate_fmt}, {remaining} left"
            size = shutil.get_terminal_size()
            self.close()
            self.bars = {}
            for position, name in enumerate(self.stages if stage in self.stages else (stage,)):
                self.bars[name] = tqdm(
                    total=total,
                    desc=name,
                    unit=" frames",
                    bar_format=layout,
                    position=position,
                    mininterval=0.2,
                    miniters=1,
                    smoothing=0,
                    ncols=size.columns,
                    nrows=size.lines,
                )
        bar = self.bars[stage]
        if not bar.n and done > 1:  # frames of an earlier run do not count for the speed
            bar.initial = bar.n = done
        bar.update(done - bar.n)

    def close(self) -> None:
        for bar in self.bars.values():
            bar.close()


class ProgressLines:
    """Progress where stderr is no terminal: a line every LINE_SECONDS, without control characters."""

    def __init__(self) -> None:
        self.start = self.last_line = time.monotonic()
        self.done: dict[str, int] = {}
        self.resumed: dict[str, int] = {}  # frames of an earlier run do not count for the speed
        self.total = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != SPEAKERS and SPEAKERS in self.done:  # before the run itself
            self.close()
            self.start = time.monotonic()
        self.resumed.setdefault(stage, max(done - 1, 0))
        self.done[stage], self.total = done, total
        if time.monotonic() - self.last_line >= LINE_SECONDS:
            self.write()

    def write(self) -> None:
        self.last_line = time.monotonic()
        seconds = self.last_line - self.start
        counts = ", ".join(f"{stage} {done}/{self.total}" for stage, done in self.done.items())
        # The rate of frames that have passed all stages so far.
        rate = min(done - self.resumed[stage] for stage, done in self.done.items()) / seconds
        left = f", {(self.total - min(self.done.values())) / rate:.0f} s left" if rate else ""
        print(f"{counts}, {rate:.2f} frames/s{left}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.done:
            self.write()
            self.done = {}  # closing again writes nothing
