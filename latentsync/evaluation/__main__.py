"""How well mouths follow the sound: on real clips, and in one finished video.

python -m latentsync.evaluation clips CLIPS OUT         # CLIPS/SPEAKER/CLIP.mp4, those that training holds out
python -m latentsync.evaluation people FILMS VOICES OUT # FILMS/PERSON.mp4, each with the voice of a held-out clip
python -m latentsync.evaluation video RESULT            # mouth and sound of one file
python -m latentsync.evaluation strip VIDEO AUDIO RESULT PICTURE.png
python -m latentsync.evaluation judge PREPARED          # train the judge of sync
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import Models, load_models
from latentsync.errors import UserError
from latentsync.evaluation.clips import TRACKS, held_out, read_clip
from latentsync.evaluation.judge import WEIGHTS, Judge, judge_clip, load_judge, train, verdict
from latentsync.evaluation.measures import correlation, loudness, peak
from latentsync.evaluation.people import measure_people, people_table
from latentsync.evaluation.report import check_on, groups, measure, plain, table
from latentsync.evaluation.sheet import contact, save_picture, strip
from latentsync.options import between, choose_device, interrupt_on_signals
from latentsync.paths import check_writable, write_text
from latentsync.settings import Settings

FILMS = (".mp4", ".mkv", ".mov", ".webm")
SHEET_CLIPS = 2  # of every speaker, on the contact sheet

# Arguments, models, settings: those that are to be measured.
Prepare = Callable[[argparse.Namespace, Models, Settings], tuple[Models, Settings]]


def parsers() -> tuple[argparse.ArgumentParser, tuple[argparse.ArgumentParser, ...]]:
    """The whole command line, and the commands of it that dub, to which more can be added."""
    found = argparse.ArgumentParser(
        prog="python -m latentsync.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = found.add_subparsers(dest="command", required=True)
    clips = commands.add_parser("clips", help="dub held-out clips and measure them")
    clips.add_argument("clips", type=Path, help="folder of SPEAKER/CLIP.mp4, with sound")
    clips.add_argument("out", type=Path, help="folder for measures.json and SPEAKER.png")
    clips.add_argument(
        "--speakers", nargs="+", metavar="NAME", help="folders of CLIPS (default: all with held-out clips)"
    )
    clips.add_argument("--limit", type=between(int, 1, 1000), help="clips of every speaker (default: all held out)")
    people = commands.add_parser("people", help="dub films of people and measure what each keeps of them")
    people.add_argument("films", type=Path, help="folder of PERSON.mp4")
    people.add_argument("voices", type=Path, help="folder of SPEAKER/CLIP.mp4, with sound")
    people.add_argument("out", type=Path, help="folder for people.md and people.png")
    people.add_argument("--speakers", nargs="+", metavar="NAME", help="folders of VOICES (default: all held out)")
    for command in (clips, people):
        command.add_argument("--model", default="demo", metavar="NAME|PATH")
        command.add_argument("--steps", type=between(int, 1, 999), default=20)
        command.add_argument("--guidance", type=between(float, 0, 10), help="default: what suits the model")
        command.add_argument("--seed", type=between(int, 0, 2**63 - 1), default=1247)
    video = commands.add_parser("video", help="mouth and sound of one file")
    video.add_argument("result", type=Path)
    picture = commands.add_parser("strip", help="frames of a video and of its result, and the sound")
    for name in ("video", "audio", "result", "picture"):
        picture.add_argument(name, type=Path)
    judge = commands.add_parser("judge", help="train the judge of sync")
    judge.add_argument("prepared", type=Path, help="folder that `python -m latentsync.training prepare` wrote")
    judge.add_argument("--seconds", type=between(float, 0, 1e6), default=240.0, help="time to train for (default 240)")
    judge.add_argument("--output", type=Path, default=WEIGHTS, help="what to write (default: where it is looked for)")
    for command in (clips, people, video, judge):
        command.add_argument("--device", default="auto")
    for command in (clips, video):
        command.add_argument("--judge", type=Path, default=WEIGHTS, help="weights of the judge of sync")
    return found, (clips, people)


def parser() -> argparse.ArgumentParser:
    return parsers()[0]


def as_asked(_: argparse.Namespace, models: Models, settings: Settings) -> tuple[Models, Settings]:
    """The plain pipeline."""
    return models, settings


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def find_judge(args: argparse.Namespace, device: torch.device) -> Judge | None:
    """The judge, where it has been trained."""
    if args.judge.is_file():
        return load_judge(args.judge, device)
    say(f"'{args.judge}' is missing, so no judge of sync: train one with `python -m latentsync.evaluation judge`")
    return None


def load_and_make_folder(args: argparse.Namespace, prepare: Prepare) -> tuple[Models, Settings]:
    """The prepared models and settings of a run; makes its folder `out`. Raises UserError."""
    device = choose_device(args.device)
    models = load_models(resolve_model(args.model, device), device)
    settings = Settings.suiting(models, args.guidance, steps=args.steps, seed=args.seed)
    models, settings = prepare(args, models, settings)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"'{args.out}' cannot be made ({error.strerror}); choose another folder.") from error
    return models, settings


def evaluate_clips(args: argparse.Namespace, prepare: Prepare) -> None:
    """Dub, measure, and write measures.json and the contact sheets into the folder `out`."""
    files = held_out(args.clips, args.speakers)
    models, settings = load_and_make_folder(args, prepare)
    inputs = [*(path for paths in files.values() for path in paths), *models.files, args.judge]
    for name in ("measures.json", *(f"{speaker}.png" for speaker in files)):
        check_writable(args.out / name, inputs)
    # Those that are not dubbed are tracks among which the true one is to be found.
    say("following the faces of the real clips")
    most = None if args.limit is None else max(args.limit, TRACKS)
    clips = {speaker: [read_clip(speaker, path) for path in paths[:most]] for speaker, paths in files.items()}
    judge, checked = find_judge(args, models.device), None
    if judge is not None:
        checked = check_on(judge, clips)
        say(f"the judge finds {checked.sentence()}")
        judge = judge if checked.passed else None

    results, blocks = [], {}
    for result in measure(clips, args.limit, models, settings, judge):
        results.append(result)
        correlated, lag = peak(result.measures["correlation"])
        say(f"{result.speaker}/{result.name} saying {result.voice}: correlation {correlated:.2f} at {lag}, "
            f"LMD {result.measures['lmd']:.2f} px")  # fmt: skip
        sheet = blocks.setdefault(result.speaker, [])
        if len(sheet) < 2 * SHEET_CLIPS:
            name = f"{result.speaker}/{result.name} with"
            sheet += [
                contact(f"{name} {text}: reference, generated, truth", rows) for text, rows in result.faces.items()
            ]
        result.faces.clear()
        # Written anew with every clip, so that what is done stays when a run is stopped.
        save_picture(args.out / f"{result.speaker}.png", np.vstack(sheet))
        found = groups(results)
        write_text(args.out / "measures.json", json.dumps(plain({
            "model": models.name, "resolution": models.resolution, "device": str(models.device),
            "settings": asdict(settings),
            "judge": None if checked is None else asdict(checked) | {"passed": checked.passed}, "groups": found,
            "clips": [{"speaker": r.speaker, "name": r.name, "voice": r.voice} | r.measures for r in results],
        }), indent=1) + "\n")  # fmt: skip
    print(table(found))


def evaluate_people(args: argparse.Namespace, prepare: Prepare) -> None:
    """Dub films of people, and write people.md and the contact sheet into the folder `out`."""
    films = sorted(path for path in args.films.glob("*") if path.suffix in FILMS)
    if not films:
        raise UserError(f"'{args.films}' has no films; they are expected as PERSON.mp4.")
    models, settings = load_and_make_folder(args, prepare)
    files = [(speaker, path) for speaker, paths in held_out(args.voices, args.speakers).items() for path in paths]
    voices = [read_clip(speaker, path) for speaker, path in files[: len(films)]]
    found, blocks = [], []
    for measures, before, after in measure_people(films, voices, models, settings):
        found.append(measures)
        say(f"{measures.person}: {measures.outside:.0f} dB, correlation {measures.correlation:.2f}")
        blocks.append(contact(measures.person, (before, after)))
        save_picture(args.out / "people.png", np.vstack(blocks))
        (args.out / "people.md").write_text(people_table(found) + "\n", encoding="utf-8")
    print(people_table(found))


def evaluate_video(args: argparse.Namespace) -> None:
    """Print how the mouth of one file moves, and whether with its sound."""
    clip = read_clip("", args.result)
    judge = find_judge(args, choose_device(args.device))
    opening = clip.seen.opening
    correlated, lag = peak(correlation(opening, loudness(clip.wav)))
    print(f"frames with a face           {np.isfinite(opening).sum()} of {len(opening)}")
    print(f"mouth opening                {np.nanmean(opening):.3f} ± {np.nanstd(opening):.3f} of the eyes' distance")
    print(f"correlation with loudness    {correlated:.2f}" + ("" if lag is None else f" at {lag:+d} frames"))
    if judge is not None:
        found = verdict(judge_clip(judge, clip.seen.crops, clip.wav))
        print(f"judge of sync                confidence {found.confidence:.2f} at {found.offset:+d} frames")


def main(
    arguments: list[str] | None = None,
    parser: Callable[[], argparse.ArgumentParser] = parser,
    prepare: Prepare = as_asked,
) -> int:
    """Run a command; returns the exit code: 0, 2 for what the user can put right, 130 when interrupted."""
    args = parser().parse_args(arguments)
    interrupt_on_signals()
    try:
        if args.command == "clips":
            evaluate_clips(args, prepare)
        elif args.command == "people":
            evaluate_people(args, prepare)
        elif args.command == "video":
            evaluate_video(args)
        elif args.command == "strip":
            check_writable(args.picture, (args.video, args.audio, args.result), "The picture")
            save_picture(args.picture, strip(args.video, args.audio, args.result))
        else:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            check_writable(args.output, (args.prepared / "crops.mp4", args.prepared / "clips.npz"))
            train(args.prepared, args.output, args.seconds, choose_device(args.device))
    except UserError as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        say("stopped; what was measured so far is kept")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
