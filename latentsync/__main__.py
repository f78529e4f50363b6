"""The command line: `python -m latentsync VIDEO AUDIO -o OUT.mp4`."""

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from latentsync import STAGES, __version__
from latentsync.errors import UserError, short_of_memory
from latentsync.options import between, choose_device, interrupt_on_signals
from latentsync.paths import check_writable, write_text

if TYPE_CHECKING:  # torch takes seconds to load
    from latentsync.checkpoints.load import Models
    from latentsync.settings import Report, Settings

LINE_SECONDS = 10  # between two lines of progress where there is no terminal
REPORT = "The report"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m latentsync", description="Make the mouth in VIDEO say the words of AUDIO."
    )
    found.add_argument("video", metavar="VIDEO", help="any video of a face, or a picture")
    found.add_argument("audio", metavar="AUDIO", help="any recording of a voice, or a video with sound")
    found.add_argument("-o", "--output", required=True, metavar="OUT", help="what to write: .mp4, .mov or .mkv")
    found.add_argument(
        "--model", default="auto", metavar="NAME|PATH",
        help="auto (default), demo, latentsync-1.5, latentsync-1.6, or a checkpoint folder",
    )  # fmt: skip
    found.add_argument(
        "--steps", type=between(int, 1, 999), default=20, help="diffusion steps, 12 to 50 are useful (default 20)"
    )
    found.add_argument(
        "--guidance", type=between(float, 0, 10),
        help="lip strength, 1 (off) to 3 (default: what suits the model; 1.5 for the released ones)",
    )  # fmt: skip
    found.add_argument("--seed", type=between(int, 0, 2**63 - 1), default=1247, help="default 1247")
    found.add_argument(
        "--face", choices=("largest", "left", "right", "centre"), default="largest",
        help="which one, where several are seen (default largest)",
    )  # fmt: skip
    for kind in ("video", "audio"):
        found.add_argument(
            f"--{kind}-track", type=between(int, 1, 1000), metavar="N",
            help=f"which track of {kind.upper()}, from 1 (default: the one with the default flag, else the first)",
        )  # fmt: skip
    found.add_argument(
        "--copy-audio", action="store_true",
        help="keep the sound of .mp4 and .mov bit for bit, which not every player knows (default: AAC; .mkv keeps it)",
    )  # fmt: skip
    found.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    found.add_argument("--report", type=Path, metavar="FILE.json", help="write what was done, and how long it took")
    found.add_argument(
        "--discard-unfinished", action="store_true",
        help="first remove what interrupted runs with this output have kept, and begin anew",
    )  # fmt: skip
    found.add_argument("--version", action="version", version=__version__)
    return found


def shield_dashes(arguments: list[str]) -> list[str]:
    """Let file names begin with a dash: one that exists, or that follows an option for a file, gets a './'."""
    out: list[str] = []
    for argument in arguments:
        names_file = bool(out) and out[-1] in ("-o", "--output", "--report")
        dashed = argument.startswith("-") and argument != "--"
        out.append(os.path.join(".", argument) if dashed and (names_file or os.path.isfile(argument)) else argument)
    return out


class Bars:
    """Progress on a terminal: a bar a stage, with frames per second and time left."""

    def __init__(self) -> None:
        self.bars = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if not self.bars:  # all at once, so that a stage's time counts from the start of the run
            shape = "{desc:8} {percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt} {rate_fmt}, {remaining} left"
            size = shutil.get_terminal_size()
            for position, name in enumerate(STAGES):
                self.bars[name] = tqdm(
                    total=total, desc=name, unit=" frames", bar_format=shape, position=position,
                    mininterval=0.2, miniters=1, smoothing=0, ncols=size.columns, nrows=size.lines,
                )  # fmt: skip
        bar = self.bars[stage]
        if not bar.n and done > 1:  # what an earlier run has done says nothing of the speed
            bar.initial = bar.n = done
        bar.update(done - bar.n)

    def close(self) -> None:
        for bar in self.bars.values():
            bar.close()


class Lines:
    """Progress where stderr is no terminal: now and then a line, without control characters."""

    def __init__(self) -> None:
        self.began = self.written = time.monotonic()
        self.done: dict[str, int] = {}
        self.before: dict[str, int] = {}  # what an earlier run has done says nothing of the speed
        self.total = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.before.setdefault(stage, max(done - 1, 0))
        self.done[stage], self.total = done, total
        if time.monotonic() - self.written >= LINE_SECONDS:
            self.write()

    def write(self) -> None:
        self.written = time.monotonic()
        seconds = self.written - self.began
        counts = ", ".join(f"{stage} {done}/{self.total}" for stage, done in self.done.items())
        # Of the frames that every stage so far has passed on.
        rate = min(done - self.before[stage] for stage, done in self.done.items()) / seconds
        left = f", {(self.total - min(self.done.values())) / rate:.0f} s left" if rate else ""
        print(f"{counts}, {rate:.2f} frames/s{left}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.done:
            self.write()
            self.done = {}  # said once, however often it is closed


def peak_memory() -> int:
    """The most memory that this process ever held, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    with suppress(OSError, TypeError):  # Linux; there getrusage also counts what the parent held when it started us
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class Job:
    """What a run is to be given, and what is to be said of it afterwards."""

    settings: "Settings"
    relieve: "Callable[[], Settings | None] | None" = None  # see `latentsync.pipeline.lipsync`
    finished: "Callable[[Report], None]" = lambda _: None  # called with the report, before it is written
    notes: dict = field(default_factory=dict)  # more for the report's file


# Arguments, models, settings, seconds of sound.
Prepare = Callable[[argparse.Namespace, "Models", "Settings", float], AbstractContextManager[Job]]


@contextmanager
def as_asked(args: argparse.Namespace, models: "Models", settings: "Settings", seconds: float) -> Iterator[Job]:
    """The plain pipeline."""
    yield Job(settings)


def run(args: argparse.Namespace, prepare: Prepare = as_asked) -> None:
    """One job, from checked arguments; what `prepare` makes of its models and settings is run."""
    # Imported here, so that --help is answered at once, and mistakes in the files before torch is there.
    from latentsync.media import check_output, probe_audio, probe_video

    info = probe_video(args.video, args.video_track)
    sound = probe_audio(args.audio, args.audio_track)
    check_output(args.output, (args.video, args.audio))
    if args.report:
        check_writable(args.report, (args.video, args.audio, args.output), REPORT)
    for remark in (*info.remarks, *sound.remarks):
        print(remark, file=sys.stderr)

    import torch

    from latentsync.checkpoints.find import resolve_model
    from latentsync.checkpoints.load import load_models
    from latentsync.media.segments import discard
    from latentsync.pipeline import Hooks, lipsync
    from latentsync.settings import Settings

    if args.discard_unfinished:
        discard(Path(args.output))
    device = choose_device(args.device)
    checkpoint = resolve_model(args.model, device)
    check_output(args.output, checkpoint.files)
    if args.report:
        check_writable(args.report, checkpoint.files, REPORT)
    settings = Settings.suiting(checkpoint, args.guidance, steps=args.steps, seed=args.seed, face=args.face)
    bars = Bars() if sys.stderr.isatty() else Lines()

    def say(line: str) -> None:
        bars.close()
        print(line, file=sys.stderr, flush=True)

    try:
        models = load_models(checkpoint, device)
        say(f"model {models.name}, {models.resolution} px, on {device}")
        if checkpoint.remark:
            say(checkpoint.remark)
        with prepare(args, models, settings, sound.duration) as job:
            report = lipsync(
                args.video,
                args.audio,
                args.output,
                models,
                job.settings,
                Hooks(on_progress=bars, on_out_of_memory=job.relieve, on_message=say),
                video_track=args.video_track,
                audio_track=args.audio_track,
                copy_audio=args.copy_audio,
            )
            bars.close()
            for remark in report.remarks:
                say(remark)
            job.finished(report)
    except Exception as error:
        if not short_of_memory(error):
            raise
        raise UserError(
            f"The memory of {device} is not enough for '{args.video}' with the model {checkpoint.name}: close other "
            "programs that use it, take --model latentsync-1.5 or demo, or --device cpu."
        ) from error
    finally:
        bars.close()
    if report.frames_without_face:
        print(f"{report.frames_without_face} frames show no usable face and were left as they are", file=sys.stderr)
    if args.report:
        found = report.as_dict() | job.notes | {"peak_memory_bytes": peak_memory()}
        if device.type == "cuda":
            found["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        try:
            write_text(args.report, json.dumps(found, indent=2) + "\n", REPORT)
        except UserError as error:
            raise UserError(f"'{args.output}' is done. {error}") from error
    print(args.output)


def main(
    arguments: list[str] | None = None,
    parser: Callable[[], argparse.ArgumentParser] = parser,
    prepare: Prepare = as_asked,
) -> int:
    """Run the command line; returns the exit code: 0, 2 for what the user can put right, 130 when interrupted.

    parser and prepare: for a command line that knows more options, and does more with them.
    """
    args = parser().parse_args(shield_dashes(sys.argv[1:] if arguments is None else arguments))

    interrupt_on_signals()
    try:
        run(args, prepare)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {args.output} was not written", file=sys.stderr)
        return 130
    return 0


def leave(code: int) -> None:
    """End the process at once: Python would take a second or more to take torch apart."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # of the output's name, where its letters are not the console's
    leave(main())
