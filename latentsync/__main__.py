"""The command line: `python -m latentsync VIDEO AUDIO -o OUT.mp4`."""

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentsync import __version__
from latentsync.choice import CHOICES, FACES
from latentsync.errors import UserError, is_out_of_memory
from latentsync.machine import peak_memory
from latentsync.options import (
    between,
    choose_device,
    clock_time,
    exit_code,
    face_name,
    import_early,
)
from latentsync.paths import check_writable, write_text
from latentsync.prefetch import in_background
from latentsync.progress import ProgressBars, ProgressLines
from latentsync.rates import PAINTED, RATES
from latentsync.settings import CRF, GUIDANCE_SCALE, INFERENCE_STEPS, SEED, SOUNDS, TRAIN_STEPS, Report, Settings
from latentsync.several import LoadModels, faces_and_voices, job_for_each_voice, load_once

if TYPE_CHECKING:  # these import torch, which takes seconds
    import torch

    from latentsync.checkpoints.find import Checkpoint
    from latentsync.checkpoints.load import Models
    from latentsync.painting import Workers

REPORT = "The report"


def make_parser(parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser of the command line; parser_class: one that treats errors in another way, if need be."""
    parser = parser_class(prog="python -m latentsync", description="Make the mouth in VIDEO say the words of AUDIO.")
    parser.add_argument("video", metavar="VIDEO", help="any video of a face, or a picture")
    parser.add_argument("audio", metavar="AUDIO", nargs="?", help="any recording of a voice, or a video with sound")
    parser.add_argument("voices", metavar="AUDIO", nargs="*", help="more recordings: a result each, in the folder OUT")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="what to write: .mp4, .mov or .mkv")
    parser.add_argument(
        "--model",
        default="auto",
        metavar="NAME|PATH",
        help="auto (default), demo, latentsync-1.5, latentsync-1.6, or a checkpoint folder",
    )
    parser.add_argument(
        "--steps",
        type=between(int, 1, TRAIN_STEPS - 1),
        default=INFERENCE_STEPS,
        help="diffusion steps, 12 to 50 are useful (default %(default)s)",
    )
    parser.add_argument(
        "--guidance",
        type=between(float, 0, 10),
        help=f"lip strength, 1 (off) to 3 (default: what suits the model; {GUIDANCE_SCALE} for the released ones)",
    )
    parser.add_argument("--seed", type=between(int, 0, 2**63 - 1), default=SEED, help="default %(default)s")
    parser.add_argument(
        "--face",
        action="append",
        type=face_name,
        metavar="WHO",
        help=f"which one, if the video shows several: {', '.join(CHOICES)} (at each time who speaks then), or a "
        f"point on it, X,Y or X,Y@SECONDS (default: {FACES[0]}); several times with --audio",
    )
    parser.add_argument(
        "--audio",
        action="append",
        dest="face_audio",
        metavar="FILE",
        help="what the face before it says, in place of AUDIO: --face left --audio A.wav --face right --audio B.wav",
    )
    parser.add_argument(
        "--sound",
        metavar="FILE",
        help="what is heard in the result, while the mouth follows AUDIO (default: AUDIO, or all --audio mixed)",
    )
    parser.add_argument(
        "--crf",
        type=between(float, 0, 40),
        default=CRF,
        help="quality of the written video: x264's CRF, smaller numbers are better and larger (default %(default)s)",
    )
    parser.add_argument(
        "--fps",
        choices=RATES,
        default=Settings.fps,
        help="frames a second of the result: those of the video, or the 25 that the model was trained on "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--paint",
        choices=PAINTED,
        help="frames of a film of 48 a second or more that are painted: every one, or every second one, between which "
        "the others are composed, at half the work (default: what suits the level)",
    )
    for option, what in (("--from", "begins"), ("--to", "ends")):
        help_text = (
            f"where the part of VIDEO {what} that is used, in seconds or as 1:15.5, as if it had been cut out before"
        )
        parser.add_argument(option, type=clock_time, metavar="TIME", help=help_text)
    parser.add_argument(
        "--at",
        type=clock_time,
        metavar="TIME",
        help="lay the voice into VIDEO, or into its part, at this time: the result has all of it",
    )
    parser.add_argument(
        "--at-sound",
        choices=SOUNDS,
        default=Settings.at_sound,
        help="with --at: the voice takes the place of VIDEO's own sound, or is mixed with it (default %(default)s)",
    )
    for kind in ("video", "audio"):
        parser.add_argument(
            f"--{kind}-track",
            type=between(int, 1, 1000),
            metavar="N",
            help=f"which track of {kind.upper()}, from 1 (default: the one with the default flag, else the first)",
        )
    parser.add_argument(
        "--silence-gate",
        choices=("on", "off"),
        default="on",
        help="on (default): between words the model hears silence, so that noise moves no mouth; off: it hears all",
    )
    parser.add_argument(
        "--match-colours",
        choices=("on", "off"),
        help="on: give the painted part the colours that the visible part of the face has in the video "
        "(default: what suits the model and the level)",
    )
    parser.add_argument(
        "--restore",
        metavar="FILE",
        help="sharpen the painted part with a face restorer that you have, .safetensors or .pth of GFPGAN or "
        "RestoreFormer (needs the packages of `pip install -e .[restore]`)",
    )
    parser.add_argument(
        "--restore-strength",
        type=between(float, 0, 1),
        default=Settings.restore_strength,
        metavar="0…1",
        help="how much of what --restore changes is used (default %(default)s)",
    )
    parser.add_argument(
        "--copy-audio",
        action="store_true",
        help="keep the sound of .mp4 and .mov bit for bit, which not every player knows (default: AAC; .mkv keeps it)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    parser.add_argument(
        "--prepared",
        type=Path,
        metavar="FOLDER",
        help="start from what `latentsync prepare` made of VIDEO for this model: no face is followed or encoded anew",
    )
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="write what was done, and how long it took")
    parser.add_argument(
        "--discard-unfinished",
        action="store_true",
        help="first remove what interrupted runs with this output have finished, and start from the beginning",
    )
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def shield_dashes(arguments: list[str]) -> list[str]:
    """Let file names begin with a dash: one that exists, or that follows an option for a file, gets a './'."""
    shielded: list[str] = []
    for argument in arguments:
        names_file = bool(shielded) and shielded[-1] in ("-o", "--output", "--report", "--prepared", "--restore")
        dashed = argument.startswith("-") and argument != "--"
        is_file = dashed and (names_file or os.path.isfile(argument))
        shielded.append(os.path.join(".", argument) if is_file else argument)
    return shielded


@dataclass
class PreparedRun:
    """The models and settings of a run, and what to do during it and afterwards."""

    models: "Models"
    settings: Settings
    on_out_of_memory: Callable[[], Settings | None] | None = None  # see `latentsync.pipeline.lipsync`
    on_finished: Callable[[Report], None] = lambda report: None  # called before the report is written
    report_extras: dict[str, Any] = field(default_factory=dict)  # added to the file of --report
    workers: "Workers | None" = None  # other processes that paint the faces
    before_painting: Callable[[], None] = lambda: None  # see `latentsync.hooks.Hooks`


# (arguments, checkpoint, device, settings, frames of the result, how to load models) → context manager of the run
Prepare = Callable[
    [argparse.Namespace, "Checkpoint", "torch.device", Settings, int, LoadModels], AbstractContextManager[PreparedRun]
]


@contextmanager
def prepare_plain(
    args: argparse.Namespace,
    checkpoint: "Checkpoint",
    device: "torch.device",
    settings: Settings,
    frames: int,
    load: LoadModels,
) -> Iterator[PreparedRun]:
    """Run the pipeline as it is, with the settings that the user gave."""
    models, load_weights = load(checkpoint, device)
    with in_background(load_weights, "models") as wait_for_weights:
        yield PreparedRun(models, settings, before_painting=wait_for_weights)


def run(args: argparse.Namespace, prepare: Prepare = prepare_plain, load: LoadModels | None = None) -> None:
    """Run one job from parsed arguments; `prepare` gets its models from `load` and may change its settings.

    load: a `load_once` that several jobs share. Raises UserError.
    """
    # Imported late: --help needs none of it. While the files are looked at, another thread imports what comes next.
    import_early("torch", "latentsync.mediapipe_vision")
    from latentsync.media import check_output, probe_audio, probe_video

    start, end = getattr(args, "from") or 0.0, args.to
    info = probe_video(args.video, args.video_track).at_choice(args.fps).between(start, end)
    if args.at is not None:
        info.frame_at(args.at)
    faces, voices = faces_and_voices(args)
    sounds = [probe_audio(voice, None if i else args.audio_track) for i, voice in enumerate(voices)]
    inputs = (args.video, *voices)
    if args.sound:
        sounds, inputs = [*sounds, probe_audio(args.sound)], (*inputs, args.sound)
    if args.restore:
        inputs = (*inputs, args.restore)
    check_output(args.output, inputs)
    if args.report:
        check_writable(args.report, (*inputs, args.output), REPORT)
    for remark in (*info.remarks, *(remark for sound in sounds for remark in sound.remarks)):
        print(remark, file=sys.stderr)

    import torch

    from latentsync.checkpoints.find import resolve_model
    from latentsync.media.segments import discard
    from latentsync.pipeline import Hooks, lipsync

    if args.discard_unfinished:
        discard(Path(args.output))
    device = choose_device(args.device)
    checkpoint = resolve_model(args.model, device)
    check_output(args.output, checkpoint.files)
    if args.restore:
        from latentsync.restoring import check_restorable, check_restorer

        check_restorer(args.restore)
        check_restorable(checkpoint)
    if args.report:
        check_writable(args.report, checkpoint.files, REPORT)
    settings = Settings.suiting(
        checkpoint,
        args.guidance,
        steps=args.steps,
        seed=args.seed,
        face=faces[0],
        other_faces=tuple(faces[1:]),
        crf=args.crf,
        fps=args.fps,
        paint=args.paint,
        silence_gate=args.silence_gate == "on",
        start=start,
        end=end,
        at=args.at,
        at_sound=args.at_sound,
        restore=args.restore,
        restore_strength=args.restore_strength,
        match_colours=None if args.match_colours is None else args.match_colours == "on",
    )
    progress = ProgressBars() if sys.stderr.isatty() else ProgressLines()

    def print_message(message: str) -> None:
        progress.close()
        print(message, file=sys.stderr, flush=True)

    try:
        print_message(f"model {checkpoint.name}, {checkpoint.resolution} px, on {device}")
        if checkpoint.remark:
            print_message(checkpoint.remark)
        seconds = sounds[-1].duration if args.sound else max(sound.duration for sound in sounds)
        frames = math.ceil(seconds * info.rate)
        with prepare(args, checkpoint, device, settings, frames, load or load_once()) as prepared:
            film = None
            if args.prepared:
                from latentsync.prepared.film import PreparedFilm, film_key

                film = PreparedFilm(args.prepared, film_key(info, prepared.settings, prepared.models))
            report = lipsync(
                args.video,
                voices[0],
                args.output,
                prepared.models,
                prepared.settings,
                Hooks(
                    on_progress=progress,
                    on_out_of_memory=prepared.on_out_of_memory,
                    on_message=print_message,
                    before_painting=prepared.before_painting,
                ),
                video_track=args.video_track,
                audio_track=args.audio_track,
                copy_audio=args.copy_audio,
                workers=prepared.workers,
                other_voices=voices[1:],
                sound=args.sound,
                film=film,
            )
            progress.close()
            for remark in report.remarks:
                print_message(remark)
            prepared.on_finished(report)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"The memory of {device} is not enough for '{args.video}' with the model {checkpoint.name}: close other "
            "programs that use it, take --model latentsync-1.5 or demo, or --device cpu."
        ) from error
    finally:
        progress.close()
    if report.frames_without_face:
        print(f"{report.frames_without_face} frames show no usable face and were left as they are", file=sys.stderr)
    if args.report:
        contents = report.as_dict() | prepared.report_extras | {"peak_memory_bytes": peak_memory()}
        if device.type == "cuda" and prepared.workers is None:
            contents["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        try:
            write_text(args.report, json.dumps(contents, indent=2) + "\n", REPORT)
        except UserError as error:
            raise UserError(f"'{args.output}' is done. {error}") from error
    print(args.output)


def main(
    arguments: list[str] | None = None,
    make_parser: Callable[[], argparse.ArgumentParser] = make_parser,
    prepare: Prepare = prepare_plain,
    prog: str | None = None,
) -> int:
    """Run the command line; returns the exit code: 0, 2 for what the user can put right, 130 when interrupted.

    make_parser and prepare: of a command line with more options. prog: the command's name in messages, if not that of
    the parser.
    """
    parser = make_parser()
    parser.prog = prog or parser.prog
    args = parser.parse_args(shield_dashes(sys.argv[1:] if arguments is None else arguments))
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may have letters that the console's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")

    def work() -> int:
        nonlocal args
        code, load = 0, load_once()
        for job in job_for_each_voice(args):
            args = job
            try:
                run(job, prepare, load)
            except UserError as error:
                print(error, file=sys.stderr)
                code = 2
        return code

    return exit_code(work, lambda: f"stopped; {args.output} was not written")


def leave(code: int) -> None:
    """Exit the process at once: Python would take a second or more to unload torch."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
