"""How fast this machine is: the levels of optimization and the reference's way of computing.

    python -m optim.benchmark                            windows from pixels to pixels, the default
    python -m optim.benchmark --start                    from built networks to the first pass, cold and warm
    python -m optim.benchmark --first VIDEO AUDIO        from the command to the first painted window
    python -m optim.benchmark --job VIDEO AUDIO          the whole pipeline, file to file
    python -m optim.benchmark --voices VIDEO AUDIO       the same with a prepared film, see docs/command-line.md
    python -m optim.benchmark --vram 8 12 24             what fits into smaller cards (GB)

Modes may be combined (--windows adds the first); --json FILE writes all results.
The weights are random ones of the released architecture, float16, or with --model those of any model.

A window is 16 frames: VAE encode of masked and whole faces, the denoising steps at guidance 1.5, VAE decode. All
seconds are of one window, also where several go through the network together, and are the median of --repeats passes
after one to warm up. `ratio` is the speed relative to the first reference row of the same run. The reference rows are
optim/benchmark/reference.py: eager, NCHW memory, one window at a time, DeepCache by its own package. `work` is the
share of the device's matrix throughput (one large product, measured in the same run) that the row reached: FLOP of the
products, convolutions and attention that it computes, shallow passes as such, per second. `GPU` is NVML's utilization
while denoising. `error` is |a − b| / |b| of the first window's pixels to those of the first reference row; with random
weights it means little where a level skips steps.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from latentsync.checkpoints.find import resolve_model
from latentsync.errors import UserError
from latentsync.options import choose_device
from latentsync.paths import check_writable, write_text
from latentsync.settings import INFERENCE_STEPS
from optim.benchmark.first import FirstRow, first_rows
from optim.benchmark.flops import matrix_throughput
from optim.benchmark.rows import (
    BenchmarkConfig,
    JobRow,
    MemoryRow,
    StartRow,
    VoicesRow,
    WindowRow,
    job_rows,
    memory_row,
    start_rows,
    start_seconds,
    voices_rows,
    window_rows,
)
from optim.benchmark.windows import free_memory
from optim.levels import STOPS, find_level
from optim.trial import one_line

RESOLUTIONS = (512, 256)


# ---- worker processes


def run_in_process(config: BenchmarkConfig, job: dict, environment: dict) -> dict:
    """Run a job in a new Python process with these additional environment variables, and return its result."""
    job = job | {
        "device": str(config.device),
        "model": config.model,
        "steps": config.steps,
        "repeats": config.repeats,
    }
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "optim.benchmark", "--worker", json.dumps(job)]
    environment = os.environ | {"PYTHONPATH": path} | environment
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    lines = process.stdout.strip().splitlines()
    if process.returncode or not lines:
        raise RuntimeError(f"the process of {job['what']} ended with code {process.returncode}")
    result = json.loads(lines[-1])
    if job["what"] == "start" and "failed" in result:
        raise RuntimeError(result["failed"])
    return result


def run_worker(job: dict) -> dict:
    """Run a job of `run_in_process` in this process."""
    device = torch.device(job["device"])
    config = BenchmarkConfig(device, job["model"], job["steps"], job["repeats"])
    if job["what"] == "memory":
        return asdict(memory_row(job["limit"], job["resolution"], config))
    try:
        models = config.models(job["resolution"])
        plan = config.plan(find_level(str(job["level"])), models.resolution, config.gpu())
        return {"seconds": start_seconds(models, plan)}
    except Exception as error:
        return {"failed": one_line(error)}


# ---- tables


def _number(value: float | None, width: int, digits: int = 0) -> str:
    return f"{'–' if value is None else f'{value:.{digits}f}':>{width}}"


WINDOW_HEAD = (
    "side  level                         x  steps  encode denoise  decode  window  frames/s  ratio  work   GPU"
    "  alloc. reserved   error"
)


def window_line(row: WindowRow) -> str:
    head = f"{row.resolution:4}  {row.name:28}"
    if row.failed:
        return f"{head} failed: {row.failed}"
    share = None if row.share is None else 100 * row.share
    error = "–" if row.error is None else f"{row.error:.1e}"
    return (
        f"{head}{row.windows:3}{row.steps:7}{row.encode:8.3f}{row.denoise:8.3f}{row.decode:8.3f}{row.seconds:8.3f}"
        f"{row.frames_per_second:10.1f}{_number(row.ratio, 7, 2)}{_number(share, 5)}%{_number(row.utilization, 5)}%"
        f"{_number(row.allocated, 8, 1)}{_number(row.reserved, 9, 1)}{error:>8}"
    )


START_HEAD = "side  level           cold    warm"


def start_line(row: StartRow) -> str:
    head = f"{row.resolution:4}  {row.name:12}"
    return f"{head}  failed: {row.failed}" if row.failed else f"{head}{row.cold:8.2f}{row.warm:8.2f}"


JOB_HEAD = "side  level         frames    wall     GPU  ratio   GPU busy  stages (others waited)"


def job_line(row: JobRow) -> str:
    head = f"{row.resolution:4}  {row.name:12}"
    if row.failed or row.stages is None or row.waiting is None:
        return f"{head}  failed: {row.failed}"
    stages = ", ".join(f"{name} {seconds:.1f} ({row.waiting.get(name, 0):.1f})" for name, seconds in row.stages.items())
    return f"{head}{row.frames:8}{row.wall:8.2f}{row.gpu:8.2f}{row.ratio:7.2f}{_number(row.utilization, 10)}%  {stages}"


VOICES_HEAD = "side  level         frames   alone   first  second  ratio     MB"


def voices_line(row: VoicesRow) -> str:
    head = f"{row.resolution:4}  {row.name:12}"
    if row.failed:
        return f"{head}  failed: {row.failed}"
    return (
        f"{head}{row.frames:8}{row.alone:8.2f}{row.first:8.2f}{row.second:8.2f}{row.ratio:7.2f}"
        f"{_number(row.megabytes, 7, 1)}"
    )


FIRST_HEAD = "level          median  runs"


def first_line(row: FirstRow) -> str:
    if row.failed:
        return f"{row.name:12}  failed: {row.failed}"
    return f"{row.name:12}{row.median:9.2f}  {', '.join(f'{seconds:.2f}' for seconds in row.seconds)}"


MEMORY_HEAD = "  card  side  level         windows  frames  tiles  planned  alloc. reserved"


def memory_line(row: MemoryRow) -> str:
    head = f"{row.limit:4g}GB {row.resolution:5}  {row.name:12}"
    if row.windows is not None:
        head += f"{row.windows:9}{row.frames:8}{'yes' if row.tiling else 'no':>7}{row.planned:9.1f}"
    if row.failed:
        return f"{head}  failed: {row.failed}"
    end = f"  finished with {', then '.join(row.stepped_down)}" if row.stepped_down else "  finished"
    return f"{head}{_number(row.allocated, 8, 1)}{_number(row.reserved, 9, 1)}{end}"


# ---- the command


def describe_machine(config: BenchmarkConfig) -> dict[str, Any]:
    """Machine, versions and configuration, for the results."""
    gpu = config.gpu()
    return {
        "device": gpu.name if gpu else f"CPU, {torch.get_num_threads()} threads ({platform.machine()})",
        "memory": gpu.memory_total if gpu else None,
        "driver": gpu.driver if gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "dtype": str(config.dtype).removeprefix("torch."),
        "weights": config.model or "random, of the released architecture",
        "steps": config.steps,
        "repeats": config.repeats,
        "matrix_flops": None,  # FLOP/s
    }


def machine_line(machine: dict[str, Any]) -> str:
    driver = f"driver {machine['driver']}, " if machine["driver"] else ""
    speed = f", matrix products {machine['matrix_flops'] / 1e12:.3g} TFLOP/s" if machine["matrix_flops"] else ""
    return (
        f"{machine['device']}, {driver}torch {machine['torch']}, {machine['dtype']}, weights: {machine['weights']}"
        f"{speed}, {machine['date']}"
    )


def without_nan(value: object) -> object:
    """The value with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", action="store_true", help="measure windows, also besides another mode")
    parser.add_argument("--start", action="store_true", help="measure cold and warm starts")
    parser.add_argument(
        "--first", type=Path, nargs=2, metavar=("VIDEO", "AUDIO"), help="measure until the first window"
    )
    parser.add_argument("--job", type=Path, nargs=2, metavar=("VIDEO", "AUDIO"), help="measure the whole pipeline")
    parser.add_argument(
        "--voices", type=Path, nargs=2, metavar=("VIDEO", "AUDIO"), help="measure a film's first and second voice"
    )
    parser.add_argument("--vram", type=float, nargs="+", default=[], metavar="GB", help="smaller cards to try")
    parser.add_argument("--model", metavar="NAME|PATH", help="a model in place of random weights, at its resolution")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    parser.add_argument("--resolutions", type=int, nargs="+", default=list(RESOLUTIONS), metavar="PX")
    parser.add_argument("--levels", nargs="+", default=[level.name for level in STOPS], metavar="NAME|0…1")
    parser.add_argument(
        "--steps", type=int, default=INFERENCE_STEPS, help=f"before a level's share (default {INFERENCE_STEPS})"
    )
    parser.add_argument("--repeats", type=int, default=3, help="passes that the median is of (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write all results")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser


def measure(
    args: argparse.Namespace, config: BenchmarkConfig, on_row: Callable[[str, object], None], machine: dict[str, Any]
) -> None:
    """Measure all requested modes. Every row is printed, and given to `on_row` with the name of its table."""

    def table(name: str, title: str, head: str, rows: Iterable, line: Callable) -> None:
        print(f"\n{title}\n{head}", flush=True)
        for row in rows:
            print(line(row), flush=True)
            on_row(name, row)

    resolutions = args.resolutions
    if config.model is not None:  # resolved before the long work; a model has one resolution
        resolutions = [resolve_model(config.model, config.device).resolution]
    if args.windows or not (args.start or args.first or args.job or args.voices or args.vram):
        throughput = machine["matrix_flops"] = matrix_throughput(config.device, config.dtype)
        rows = window_rows(config.models(resolutions[0]), resolutions, config, throughput)
        title = "Seconds a window of 16 frames, x windows together; memory in GB"
        table("windows", title, WINDOW_HEAD, rows, window_line)
        del rows  # and the models
        free_memory()
    if args.start:
        for resolution in resolutions:
            starts = start_rows(resolution, config, partial(run_in_process, config))
            table("starts", "Seconds from built networks to the end of the first pass", START_HEAD, starts, start_line)
    if args.first:
        video, audio = args.first
        firsts = first_rows(video, audio, config)
        table("firsts", "Seconds from the command to the first painted window", FIRST_HEAD, firsts, first_line)
    if args.job:
        video, audio = args.job
        for resolution in resolutions:
            jobs = job_rows(video, audio, resolution, config)
            table("jobs", "Seconds of a job, file to file", JOB_HEAD, jobs, job_line)
            free_memory()
    if args.voices:
        video, audio = args.voices
        for resolution in resolutions:
            voices = voices_rows(video, audio, resolution, config)
            title = "Seconds of a job, file to file: alone, while it prepares the film, and with the film prepared"
            table("voices", title, VOICES_HEAD, voices, voices_line)
            free_memory()
    if args.vram and config.device.type != "cuda":
        print("\n--vram needs a GPU; it is left out.")
    elif args.vram:
        cards = memory_rows(args.vram, resolutions, config)
        table("memory", "Two passes on smaller cards; memory in GB", MEMORY_HEAD, cards, memory_line)


def memory_rows(limits: list[float], resolutions: list[int], config: BenchmarkConfig) -> Iterator[MemoryRow]:
    """A row for each card and resolution, from a process for each."""
    for limit in limits:
        for resolution in resolutions:
            job = {"what": "memory", "limit": limit, "resolution": resolution}
            try:
                yield MemoryRow(**run_in_process(config, job, {}))
            except Exception as error:
                yield MemoryRow(limit, resolution, failed=one_line(error))


def main(arguments: list[str] | None = None, prog: str = "python -m optim.benchmark") -> int:
    """Run the command; returns the exit code: 0, or 2 for an error that the user can correct."""
    args = build_parser(prog).parse_args(arguments)
    try:
        if args.worker:
            print(json.dumps(without_nan(run_worker(args.worker))), flush=True)
            return 0
        if args.json:
            check_writable(args.json, [*(args.first or ()), *(args.job or ()), *(args.voices or ())])
        levels = tuple(find_level(text) for text in args.levels)
        config = BenchmarkConfig(choose_device(args.device), args.model, args.steps, args.repeats, levels)
        if config.device.type == "cpu" and config.model is None:
            raise UserError("The released architecture is too large for a processor: add --model demo.")
        if args.voices and config.model is None:
            raise UserError("A film is prepared for a model that lies in files: add --model to --voices.")
        machine = describe_machine(config)
        results: dict[str, Any] = {
            "machine": machine,
            "windows": [],
            "starts": [],
            "firsts": [],
            "jobs": [],
            "voices": [],
            "memory": [],
        }

        def on_row(table: str, row: Any) -> None:
            results[table].append(without_nan(asdict(row)))
            if args.json:
                write_text(args.json, json.dumps(results, indent=1) + "\n")

        measure(args, config, on_row, machine)
        print(f"\n{machine_line(machine)}", flush=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
