"""How much faster several workers are: one job, file to file, in one process and with 1, 2, … workers.

    python -m optim.cluster.benchmark VIDEO AUDIO --model latentsync-1.6 --workers 1 2

Every row comes after a run with the first seconds of AUDIO, so that loading, graphs and compilers do not count. `busy`
is NVML's utilization of each GPU from the first to the last sign of painting. VIDEO should be as long as AUDIO: faces
of a video that is played again are encoded once by each worker.
"""

import argparse
import json
import sys
import tempfile
import time
import wave
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from latentsync import SAMPLE_RATE
from latentsync.checkpoints.find import MODEL_NAMES, resolve_model
from latentsync.checkpoints.load import Models, load_models, load_outline
from latentsync.errors import UserError
from latentsync.hooks import Hooks
from latentsync.media import read_audio
from latentsync.options import choose_device
from latentsync.painting import Workers
from latentsync.paths import check_writable, write_text
from latentsync.pipeline import lipsync
from latentsync.settings import Settings
from optim.accelerate import accelerate, plan_for_device
from optim.benchmark.windows import UtilizationMonitor, free_memory
from optim.cluster.actor import Order
from optim.cluster.session import local_session

WARM_UP = 6.0  # seconds of sound before what is measured: several passes on each of a few workers
HEAD = "level         workers    wall  frames/s  ratio  busy"


@dataclass(frozen=True)
class Row:
    """One measurement. workers: 0 for the single process; seconds: file to file; ratio: to the single process."""

    level: str
    workers: int
    seconds: float
    frames: int
    ratio: float
    busy: list[float | None]  # percent, of each GPU

    def line(self) -> str:
        name = str(self.workers) if self.workers else "(one process)"
        busy = ", ".join("–" if share is None else f"{share:.0f} %" for share in self.busy)
        rate = self.frames / self.seconds
        return f"{self.level:14}{name:>7}{self.seconds:8.2f}{rate:10.2f}{self.ratio:7.2f}  {busy}"


def write_beginning(audio: str, path: Path) -> None:
    """Write the first seconds of a sound, to warm up with."""
    sound = read_audio(audio)[: round(WARM_UP * SAMPLE_RATE)]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((sound * 32767).astype("<i2").tobytes())


def time_job(
    args: argparse.Namespace, models: Models, settings: Settings, workers: Workers | None, device: torch.device
) -> tuple[float, int, list[float | None]]:
    """Seconds and frames of a run after a short one, and how busy each GPU was."""
    painting: list[float] = []

    def on_progress(stage: str, done: int, total: int) -> None:
        if stage == "mouths":
            painting.append(time.monotonic())

    count = torch.cuda.device_count() if device.type == "cuda" else 0
    with tempfile.TemporaryDirectory(prefix="latentsync-") as folder, ExitStack() as stack:
        output, beginning = Path(folder, "out.mp4"), Path(folder, "beginning.wav")
        write_beginning(args.audio, beginning)
        lipsync(args.video, beginning, output, models, settings, workers=workers)
        gpus = [stack.enter_context(UtilizationMonitor(torch.device("cuda", index))) for index in range(count)]
        report = lipsync(
            args.video, args.audio, output, models, settings, Hooks(on_progress=on_progress), workers=workers
        )
        busy = [gpu.utilization(painting[0], painting[-1]) for gpu in gpus]
    return report.total_seconds, report.frames, busy


def rows(args: argparse.Namespace, level: str, device: torch.device) -> Iterator[Row]:
    """The rows of a level, as they are measured."""
    checkpoint = resolve_model(args.model, device)
    settings = Settings.suiting(checkpoint)
    models = load_models(checkpoint, device)
    plan = plan_for_device(device, models.resolution, settings, level)
    accelerate(models, plan)
    alone, frames, busy = time_job(args, models, plan.settings, None, device)
    yield Row(level, 0, alone, frames, 1.0, busy)
    outline = load_outline(checkpoint, models.dtype)
    del models
    free_memory()
    numbers = list(range(max(args.workers))) if device.type == "cuda" else []
    order = Order(
        model=args.model if args.model in MODEL_NAMES else str(Path(args.model).resolve()),
        kind=device.type,
        settings=settings,
        level=level,
        batch=None,
        overrides={},
        frames=frames,
    )
    with local_session(max(args.workers), numbers):
        from optim.cluster.workers import RayWorkers  # imports Ray, which reads its settings then

        for count in args.workers:
            own_face = outline.retargets
            with RayWorkers(order, count, count, outline.resolution, own_face, lambda line: None) as workers:
                prepared = workers.wait_until_ready(count)
                seconds, frames, busy = time_job(args, outline, prepared.plan.settings, workers, device)
            yield Row(level, count, seconds, frames, alone / seconds, busy)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 2 for an error that the user can correct."""
    parser = argparse.ArgumentParser(
        prog="python -m optim.cluster.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("video", metavar="VIDEO")
    parser.add_argument("audio", metavar="AUDIO")
    parser.add_argument("--model", required=True, metavar="NAME|PATH", help="as of `latentsync sync`")
    parser.add_argument("--levels", nargs="+", default=["conservative", "aggressive"], metavar="NAME|0…1")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="default 1 2")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write all rows")
    args = parser.parse_args(arguments)
    try:
        if args.json:
            check_writable(args.json, (args.video, args.audio))
        device = choose_device(args.device)
        results = []
        print(HEAD, flush=True)
        for level in args.levels:
            for row in rows(args, level, device):
                print(row.line(), flush=True)
                results.append(asdict(row))
                if args.json:
                    write_text(args.json, json.dumps(results, indent=1) + "\n")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
