"""How fast this machine is: the levels of optimization beside the reference's way of computing.

    python -m optim.benchmark                            windows from pixels to pixels, the default
    python -m optim.benchmark --lengths 1 4 10 60        clips of so many seconds, from a cold and from a warm start
    python -m optim.benchmark --job VIDEO AUDIO          the whole pipeline, file to file
    python -m optim.benchmark --vram 8 12 24             what fits into smaller cards (GB)
    python -m optim.benchmark --from FILE.json --chart FILE.html      only draws what was measured before

Modes may be combined (--windows adds the first); --json FILE keeps all that was measured, --chart FILE.html draws it.
The weights are random ones of the released architecture, float16, or with --model those of any model.

A window is 16 frames: VAE encode of masked and whole faces, the steps of denoising at guidance 1.5, VAE decode. All
seconds are of one window, also where several go through the network together, and are the median of --repeats passes
after one to warm up. `ratio` is to the first reference row of the same run. The reference rows are optim/plain.py:
eager, NCHW memory, one window at a time, DeepCache by its own package. `work` is what part of the device's matrix
throughput (one large product, measured in the same run) the row's own work came to: FLOP of the products,
convolutions and attention that it computes, shallow passes as such, per second. `GPU` is NVML's utilization while
denoising. `error` is |a − b| / |b| of the first window's pixels against the first reference row's; with random weights
it means little where a level skips steps.
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
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

from latentsync.checkpoints import resolve
from latentsync.errors import UserError
from latentsync.paths import check_writable, write_text
from latentsync.sampling import INFERENCE_STEPS
from optim.levels import STOPS, find_level
from optim.measure import (
    Asked,
    JobRow,
    LengthRow,
    MemoryRow,
    WindowRow,
    job_rows,
    length_rows,
    memory_row,
    order_violations,
    problem,
    run_clips,
    window_rows,
)
from optim.passes import free_memory, matrix_throughput

RESOLUTIONS = (512, 256)
RUN_UP_TO = 10.0  # seconds of a clip that --quick still runs
# What latentsync.pipeline imports to find faces and to read media.
MEDIA_MODULES = (
    "mediapipe", "mediapipe.tasks", "mediapipe.tasks.python", "mediapipe.tasks.python.vision", "imageio_ffmpeg",
)  # fmt: skip


# ---- processes of their own


def launch(asked: Asked) -> Callable[[dict, dict], dict]:
    """What runs a job in a fresh Python with more environment variables, and returns what it found."""

    def run(job: dict, environment: dict) -> dict:
        job = job | {
            "device": str(asked.device), "model": asked.model, "steps": asked.steps, "repeats": asked.repeats,
        }  # fmt: skip
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "optim.benchmark", "--worker", json.dumps(job)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path} | environment
        )
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            raise RuntimeError(f"the process of {job['what']} ended with code {done.returncode}")
        found = json.loads(lines[-1])
        if "failed" in found and found["failed"] and job["what"] == "clips":
            raise RuntimeError(found["failed"])
        return found

    return run


def work(job: dict) -> dict:
    """Do what `launch` was given, in this process."""
    device = torch.device(job["device"])
    asked = Asked(device, job["model"], job["steps"], job["repeats"])
    if job["what"] == "memory":
        return asdict(memory_row(job["limit"], job["resolution"], asked))
    try:
        models = asked.models(job["resolution"])
        plan = asked.plan(find_level(str(job["level"])), models.resolution, asked.gpu())
        return asdict(run_clips(models, plan, job["lengths"]))
    except Exception as error:
        return {"failed": problem(error)}


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


LENGTH_HEAD = "side  level           clip  windows     cold     warm  first: cold  warm"


def length_line(row: LengthRow) -> str:
    head = f"{row.resolution:4}  {row.name:12}{row.length:6g} s{row.windows:9}"
    if row.failed:
        return f"{head}  failed: {row.failed}"
    note = "  computed" if row.computed else ""
    return f"{head}{row.cold:9.2f}{row.warm:9.2f}{row.cold_first:13.2f}{row.warm_first:6.2f}{note}"


JOB_HEAD = "side  level         frames    wall     GPU  ratio   GPU busy  stages (others waited)"


def job_line(row: JobRow) -> str:
    head = f"{row.resolution:4}  {row.name:12}"
    if row.failed:
        return f"{head}  failed: {row.failed}"
    stages = ", ".join(f"{name} {seconds:.1f} ({row.waiting.get(name, 0):.1f})" for name, seconds in row.stages.items())
    return (
        f"{head}{row.frames:8}{row.wall:8.2f}{row.gpu:8.2f}{row.ratio:7.2f}{_number(row.utilization, 10)}%  {stages}"
    )


MEMORY_HEAD = "  card  side  level         windows  frames  tiles  planned  alloc. reserved"


def memory_line(row: MemoryRow) -> str:
    head = f"{row.limit:4g}GB {row.resolution:5}  {row.name:12}"
    if row.windows is not None:
        head += f"{row.windows:9}{row.frames:8}{'yes' if row.tiling else 'no':>7}{row.planned:9.1f}"
    if row.failed:
        return f"{head}  failed: {row.failed}"
    gave_up = f"  finished with {', then '.join(row.stepped_down)}" if row.stepped_down else "  finished"
    return f"{head}{_number(row.allocated, 8, 1)}{_number(row.reserved, 9, 1)}{gave_up}"


# ---- the command


def stand_in_for_media() -> None:
    """Let the pipeline be imported where what finds faces or reads media is not installed.

    All but --job use tensors alone; a server without a display often lacks these packages.
    """
    for name in MEDIA_MODULES:
        top = name.partition(".")[0]
        if name not in sys.modules and (isinstance(sys.modules.get(top), Absent) or find_spec(top) is None):
            sys.modules[name] = Absent(name)


class Absent(ModuleType):
    """A package that is not installed: it can be imported, and anything be named in it."""

    __path__ = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def machine(asked: Asked) -> dict:
    """What was measured on."""
    gpu = asked.gpu()
    return {
        "device": gpu.name if gpu else f"CPU, {torch.get_num_threads()} threads ({platform.machine()})",
        "memory": gpu.memory_total if gpu else None,
        "driver": gpu.driver if gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "dtype": str(asked.dtype).removeprefix("torch."),
        "weights": asked.model or "random, of the released architecture",
        "steps": asked.steps,
        "repeats": asked.repeats,
        "matrix_flops": None,  # FLOP/s
    }


def describe(machine: dict) -> str:
    """The machine in one line."""
    driver = f"driver {machine['driver']}, " if machine["driver"] else ""
    speed = f", matrix products {machine['matrix_flops'] / 1e12:.3g} TFLOP/s" if machine["matrix_flops"] else ""
    return (
        f"{machine['device']}, {driver}torch {machine['torch']}, {machine['dtype']}, weights: {machine['weights']}"
        f"{speed}, {machine['date']}"
    )


def plain_json(value: object) -> object:
    """The value with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): plain_json(some) for key, some in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(some) for some in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def merge(results: list[dict]) -> dict:
    """Several runs as one: the rows of all, the machine of the first."""
    lists = {key for one in results for key, value in one.items() if isinstance(value, list)}
    return {"machine": results[0]["machine"]} | {
        key: [row for one in results for row in one.get(key, [])] for key in sorted(lists)
    }


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m optim.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--windows", action="store_true", help="measure windows, also beside another mode")
    found.add_argument("--lengths", type=float, nargs="+", default=[], metavar="SECONDS", help="clips to measure")
    found.add_argument("--quick", action="store_true", help="compute clips longer than --run-up-to")
    found.add_argument("--run-up-to", type=float, default=RUN_UP_TO, metavar="SECONDS", help="(default %(default)g)")
    found.add_argument("--job", type=Path, nargs=2, metavar=("VIDEO", "AUDIO"), help="measure the whole pipeline")
    found.add_argument("--vram", type=float, nargs="+", default=[], metavar="GB", help="smaller cards to try")
    found.add_argument("--model", metavar="NAME|PATH", help="a model in place of random weights, at its resolution")
    found.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    found.add_argument("--resolutions", type=int, nargs="+", default=list(RESOLUTIONS), metavar="PX")
    found.add_argument("--levels", nargs="+", default=[level.name for level in STOPS], metavar="NAME|0…1")
    found.add_argument("--steps", type=int, default=INFERENCE_STEPS, help="before a level's share (default 20)")
    found.add_argument("--repeats", type=int, default=3, help="passes that the median is of (default 3)")
    found.add_argument("--json", type=Path, metavar="FILE.json", help="write all that was measured")
    found.add_argument("--chart", type=Path, metavar="FILE.html", help="draw it")
    found.add_argument("--from", type=Path, nargs="+", dest="given", metavar="FILE.json", help="measure nothing")
    found.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return found


def measure(args: argparse.Namespace, asked: Asked, keep: Callable[[str, object], None], results: dict) -> None:
    """All modes that were asked for; every row is printed and given to `keep` when it is there."""

    def table(kind: str, title: str, head: str, rows: Iterable, line: Callable) -> list:
        print(f"\n{title}\n{head}", flush=True)
        found = []
        for row in rows:
            print(line(row), flush=True)
            keep(kind, row)
            found.append(row)
        return found

    resolutions = args.resolutions
    if asked.model is not None:  # found before the long work, and its resolution is the one
        resolutions = [resolve(asked.model, asked.device).resolution]
    if args.windows or not (args.lengths or args.job or args.vram):
        throughput = results["machine"]["matrix_flops"] = matrix_throughput(asked.device, asked.dtype)
        models = asked.models(resolutions[0])
        rows = window_rows(models, resolutions, asked, throughput)
        title = "Seconds a window of 16 frames, x windows together; memory in GB"
        table("windows", title, WINDOW_HEAD, rows, window_line)
        del models, rows
        free_memory()
    if args.lengths:
        up_to = args.run_up_to if args.quick else math.inf
        rows = []
        for resolution in resolutions:
            found = length_rows(resolution, args.lengths, up_to, asked, launch(asked))
            rows += table("lengths", "Seconds of a clip, from built networks on", LENGTH_HEAD, found, length_line)
        wrong = order_violations(rows)
        print("\n".join(wrong) or "Every level is at least as fast as the one nearer to quality, at every length.")
    if args.job:
        for resolution in resolutions:
            found = job_rows(*args.job, resolution, asked)
            table("jobs", "Seconds of a job, file to file", JOB_HEAD, found, job_line)
            free_memory()
    if args.vram:
        run = launch(asked)

        def memory_rows() -> Iterator[MemoryRow]:
            for limit in args.vram:
                for resolution in resolutions:
                    try:
                        yield MemoryRow(**run({"what": "memory", "limit": limit, "resolution": resolution}, {}))
                    except Exception as error:
                        yield MemoryRow(limit, resolution, failed=problem(error))

        if asked.device.type == "cuda":
            table("memory", "Two passes on smaller cards; memory in GB", MEMORY_HEAD, memory_rows(), memory_line)
        else:
            print("\n--vram needs a GPU; it is left out.")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 2 for what the user can put right."""
    from latentsync.options import choose_device

    args = parser().parse_args(arguments)
    stand_in_for_media()
    try:
        if args.worker:
            print(json.dumps(plain_json(work(args.worker))), flush=True)
            return 0
        if args.chart and find_spec("plotly") is None:
            raise UserError("--chart needs the package plotly; keep --json and draw it elsewhere with --from.")
        outputs = [path for path in (args.json, args.chart) if path]
        for number, path in enumerate(outputs):
            check_writable(path, (*(args.given or ()), *(args.job or ()), *outputs[:number]))
        if args.given:
            results = merge([json.loads(path.read_text(encoding="utf-8")) for path in args.given])
        else:
            levels = tuple(find_level(text) for text in args.levels)
            asked = Asked(choose_device(args.device), args.model, args.steps, args.repeats, levels)
            if asked.device.type == "cpu" and asked.model is None:
                raise UserError("The released architecture is too large for a processor: add --model demo.")
            if args.job and (lacking := [name for name in MEDIA_MODULES if isinstance(sys.modules.get(name), Absent)]):
                raise UserError(f"--job needs the packages {', '.join(n for n in lacking if '.' not in n)}.")
            results = {"machine": machine(asked), "windows": [], "lengths": [], "jobs": [], "memory": []}

            def keep(kind: str, row: object) -> None:
                results[kind].append(plain_json(asdict(row)))
                if args.json:
                    write_text(args.json, json.dumps(results, indent=1) + "\n")

            measure(args, asked, keep, results)
            print(f"\n{describe(results['machine'])}", flush=True)
        if args.json:
            write_text(args.json, json.dumps(results, indent=1) + "\n")
        if args.chart:
            from optim import chart

            write_text(args.chart, chart.draw(results))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
