"""How well mouths follow the sound: on real clips, and in one finished video.

python -m latentsync.evaluation clips CLIPS OUT         # CLIPS/SPEAKER/CLIP.mp4, those that training holds out
python -m latentsync.evaluation people FILMS VOICES OUT # FILMS/PERSON.mp4, each with the voice of a held-out clip
python -m latentsync.evaluation rates CLIPS OUT         # the same clips at 25, 30 and 60 frames a second
python -m latentsync.evaluation crossing CLIPS OUT      # two people who cross, each with a voice of their own
python -m latentsync.evaluation colours FILMS           # FILMS/PERSON.mp4: what matching of colours gives
python -m latentsync.evaluation video RESULT            # mouth and sound of one file
python -m latentsync.evaluation strip VIDEO AUDIO RESULT PICTURE.png
python -m latentsync.evaluation speaking CLIPS OUT      # how often it is found who speaks, in films made of clips
python -m latentsync.evaluation judge PREPARED          # train the sync judge
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
from latentsync.corpus import HELD_OUT_SPEAKERS, list_clips
from latentsync.errors import UserError
from latentsync.evaluation.clips import MAX_TRACKS, held_out_clips, read_clip
from latentsync.evaluation.colours import colours_table, measure_colours, read_crops
from latentsync.evaluation.conversations import Sentence, read_sentence
from latentsync.evaluation.crossing import crossing_table, least_alike, measure_crossing, speak
from latentsync.evaluation.judge import WEIGHTS, Check, Judge, judge_clip, load_judge, sync_score, train
from latentsync.evaluation.measures import correlation, loudness, peak
from latentsync.evaluation.people import measure_people, people_table
from latentsync.evaluation.rates import measure_rates, rates_table
from latentsync.evaluation.report import Result, as_json, check_judge, measure_clips, summarise_groups, table
from latentsync.evaluation.sheet import contact_sheet, save_picture, strip
from latentsync.evaluation.speaking import Score, measure_speaking, speaking_table
from latentsync.options import between, choose_device, exit_code
from latentsync.paths import check_writable, write_text
from latentsync.settings import INFERENCE_STEPS, SEED, TRAIN_STEPS, Settings

FILMS = (".mp4", ".mkv", ".mov", ".webm")
SENTENCES = 2  # of every speaker in films of conversations, and of every voice in films of people who cross
SHEET_CLIPS = 2  # of every speaker, on the contact sheet

# From arguments, models and settings to the models and settings to measure.
Prepare = Callable[[argparse.Namespace, Models, Settings], tuple[Models, Settings]]
AddOptions = Callable[[argparse.ArgumentParser], None]


def build_parser(prog: str, add_options: AddOptions | None = None) -> argparse.ArgumentParser:
    """The whole command line; add_options: adds options to the commands that dub."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    clips = commands.add_parser("clips", help="dub held-out clips and measure them")
    clips.add_argument("clips", type=Path, help="folder of SPEAKER/CLIP.mp4, with sound")
    clips.add_argument("out", type=Path, help="folder for measures.json and SPEAKER.png")
    clips.add_argument(
        "--speakers", nargs="+", metavar="NAME", help="folders of CLIPS (default: all with held-out clips)"
    )
    clips.add_argument("--limit", type=between(int, 1, 1000), help="clips of every speaker (default: all held out)")
    people = commands.add_parser("people", help="dub films of people and measure how much of each person is kept")
    people.add_argument("films", type=Path, help="folder of PERSON.mp4")
    people.add_argument("voices", type=Path, help="folder of SPEAKER/CLIP.mp4, with sound")
    people.add_argument("out", type=Path, help="folder for people.md and people.png")
    people.add_argument("--speakers", nargs="+", metavar="NAME", help="folders of VOICES (default: all held out)")
    rates = commands.add_parser("rates", help="dub clips at 25, 30 and 60 frames a second, the last in several ways")
    rates.add_argument("clips", type=Path, help="folder of SPEAKER/CLIP.mp4, with sound")
    rates.add_argument("out", type=Path, help="folder for the films at other rates and for rates.md")
    rates.add_argument("--speakers", nargs="+", metavar="NAME", help="folders of CLIPS (default: all held out)")
    rates.add_argument("--limit", type=between(int, 1, 1000), default=1, help="clips of every speaker (default 1)")
    rates.add_argument("--all", action="store_true", help="every clip of CLIPS, for a folder of held-out ones alone")
    crossing = commands.add_parser("crossing", help="dub films of two people who cross, and of two who do not")
    crossing.add_argument("clips", type=Path, help="folder of SPEAKER/CLIP.mp4, with sound")
    crossing.add_argument("out", type=Path, help="folder for the films, their results and crossing.md")
    crossing.add_argument(
        "--speakers", nargs="+", metavar="NAME", help="folders of CLIPS whose people are shown (default: all held out)"
    )
    crossing.add_argument("--voice", default="s1", metavar="NAME", help="folder of CLIPS that speaks (default s1)")
    crossing.add_argument("--pairs", type=between(int, 1, 100), default=3, help="of people (default 3)")
    colours = commands.add_parser("colours", help="damage faces as a network may do it, and match their colours")
    colours.add_argument("films", type=Path, help="folder of PERSON.mp4")
    colours.add_argument("--model", default="demo", metavar="NAME|PATH", help="whose autoencoder is tried, too")
    for command in (clips, people, rates, crossing):
        command.add_argument("--model", default="demo", metavar="NAME|PATH")
        command.add_argument("--steps", type=between(int, 1, TRAIN_STEPS - 1), default=INFERENCE_STEPS)
        command.add_argument("--guidance", type=between(float, 0, 10), help="default: the model's")
        command.add_argument("--seed", type=between(int, 0, 2**63 - 1), default=SEED)
        if add_options is not None:
            add_options(command)
    video = commands.add_parser("video", help="mouth and sound of one file")
    video.add_argument("result", type=Path)
    picture = commands.add_parser("strip", help="frames of a video and of its result, and the waveform")
    for name in ("video", "audio", "result", "picture"):
        picture.add_argument(name, type=Path)
    judge = commands.add_parser("judge", help="train the sync judge")
    judge.add_argument("prepared", type=Path, help="folder written by `python -m latentsync.training prepare`")
    judge.add_argument("--seconds", type=between(float, 0, 1e6), default=240.0, help="time to train for (default 240)")
    judge.add_argument("--output", type=Path, default=WEIGHTS, help="file to write (default: where it is looked for)")
    speaking = commands.add_parser("speaking", help="make films of several people and find who speaks in them")
    speaking.add_argument("clips", type=Path, help="folder of SPEAKER/CLIP.mp4, with sound")
    speaking.add_argument("out", type=Path, help="folder for speaking.md and speaking.json")
    speaking.add_argument(
        "--speakers",
        nargs="+",
        metavar="NAME",
        default=HELD_OUT_SPEAKERS,
        help="default: those that training holds out",
    )
    for count, default in (("two", 5), ("three", 2)):
        help_text = f"films of {count} people, for each kind of listener (default {default})"
        speaking.add_argument(f"--{count}", type=between(int, 0, 1000), default=default, metavar="N", help=help_text)
    for command in (clips, people, rates, crossing, colours, video, judge, speaking):
        command.add_argument("--device", default="auto")
    for command in (clips, video, speaking):
        command.add_argument("--judge", type=Path, default=WEIGHTS, help="weights of the sync judge")
    return parser


def unchanged(_: argparse.Namespace, models: Models, settings: Settings) -> tuple[Models, Settings]:
    """Measure the plain pipeline."""
    return models, settings


def load_judge_if_trained(path: Path, device: torch.device) -> Judge | None:
    if path.is_file():
        return load_judge(path, device)
    print(
        f"'{path}' is missing, so no judge of sync: train one with `python -m latentsync.evaluation judge`",
        file=sys.stderr,
    )
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
    files = held_out_clips(args.clips, args.speakers)
    models, settings = load_and_make_folder(args, prepare)
    inputs = [*(path for paths in files.values() for path in paths), *models.files, args.judge]
    for name in ("measures.json", *(f"{speaker}.png" for speaker in files)):
        check_writable(args.out / name, inputs)
    print("following the faces of the real clips", file=sys.stderr)
    # Clips beyond the limit are not dubbed; the true track is to be identified among theirs.
    max_clips = None if args.limit is None else max(args.limit, MAX_TRACKS)
    clips = {speaker: [read_clip(speaker, path) for path in paths[:max_clips]] for speaker, paths in files.items()}
    judge, check = load_judge_if_trained(args.judge, models.device), None
    if judge is not None:
        check = check_judge(judge, clips)
        print(f"the judge finds {check.summary()}", file=sys.stderr)
        judge = judge if check.passed else None

    results: list[Result] = []
    sheets: dict[str, list[np.ndarray]] = {}
    for result in measure_clips(clips, args.limit, models, settings, judge):
        results.append(result)
        best, lag = peak(result.measures["correlation"])
        name = f"{result.speaker}/{result.name}"
        lmd = result.measures["lmd"]
        print(f"{name} saying {result.voice}: correlation {best:.2f} at {lag}, LMD {lmd:.2f} px", file=sys.stderr)
        sheet = sheets.setdefault(result.speaker, [])
        if len(sheet) < 2 * SHEET_CLIPS:
            for sound, rows in result.faces.items():
                sheet.append(contact_sheet(f"{name} with {sound}: reference, generated, truth", rows))
        result.faces.clear()
        # Written after every clip, so that an interrupted run keeps its results.
        save_picture(args.out / f"{result.speaker}.png", np.vstack(sheet))
        write_measures(args.out / "measures.json", models, settings, check, results)
    print(table(summarise_groups(results)))


def write_measures(path: Path, models: Models, settings: Settings, check: Check | None, results: list[Result]) -> None:
    report = {
        "model": models.name,
        "resolution": models.resolution,
        "device": str(models.device),
        "settings": asdict(settings),
        "judge": None if check is None else asdict(check) | {"passed": check.passed},
        "groups": summarise_groups(results),
        "clips": [
            {"speaker": result.speaker, "name": result.name, "voice": result.voice} | result.measures
            for result in results
        ],
    }
    write_text(path, json.dumps(as_json(report), indent=1) + "\n")


def films_in(folder: Path) -> list[Path]:
    """The films of FOLDER/PERSON.mp4. Raises UserError if there are none."""
    films = sorted(path for path in folder.glob("*") if path.suffix in FILMS)
    if not films:
        raise UserError(f"'{folder}' has no films; they are expected as PERSON.mp4.")
    return films


def evaluate_people(args: argparse.Namespace, prepare: Prepare) -> None:
    """Dub films of people, and write people.md and the contact sheet into the folder `out`."""
    films = films_in(args.films)
    models, settings = load_and_make_folder(args, prepare)
    files = [(speaker, path) for speaker, paths in held_out_clips(args.voices, args.speakers).items() for path in paths]
    voices = [read_clip(speaker, path) for speaker, path in files[: len(films)]]
    people, sheets = [], []
    for measures, before, after in measure_people(films, voices, models, settings):
        people.append(measures)
        print(f"{measures.person}: {measures.outside:.0f} dB, correlation {measures.correlation:.2f}", file=sys.stderr)
        sheets.append(contact_sheet(measures.person, (before, after)))
        save_picture(args.out / "people.png", np.vstack(sheets))
        (args.out / "people.md").write_text(people_table(people) + "\n", encoding="utf-8")
    print(people_table(people))


def evaluate_rates(args: argparse.Namespace, prepare: Prepare) -> None:
    """Dub clips at several frame rates, two with each of the voices of held-out clips, and write rates.md."""
    files = held_out_clips(args.clips, args.speakers, args.all)
    models, settings = load_and_make_folder(args, prepare)
    clips = [(speaker, path) for speaker, paths in files.items() for path in paths[: args.limit]]
    # Of the first person, whom the demo model knows best, since the film is not to say its own words.
    speaker, *_ = files
    spoken = [read_clip(speaker, path) for path in files[speaker][args.limit : args.limit + (len(clips) + 1) // 2]]
    if not spoken:
        raise UserError(
            f"'{args.clips / speaker}' has no more than {args.limit} clips: name a speaker with more first."
        )
    films = [(path, spoken[i // 2 % len(spoken)]) for i, (_, path) in enumerate(clips)]
    measures = []
    for each in measure_rates(films, args.out, models, settings):
        measures.append(each)
        best, lag = peak(each.correlations)
        case = f"{each.person} at {each.rate}, {each.way}"
        ratio = each.flicker / each.flicker_real
        print(f"{case}: correlation {best:.2f} at {lag}, flicker {ratio:.2f}", file=sys.stderr)
        (args.out / "rates.md").write_text(rates_table(measures) + "\n", encoding="utf-8")
    print(rates_table(measures))


def evaluate_crossing(args: argparse.Namespace, prepare: Prepare) -> None:
    """Draw and dub films of two people, and write crossing.md; everything stays in the folder `out`."""
    shown = args.speakers or HELD_OUT_SPEAKERS
    files = held_out_clips(args.clips, None, every=True)
    people = [speaker for speaker in shown if speaker in files]
    if len(people) < 2:
        raise UserError(f"'{args.clips}' has clips of {len(people)} of {', '.join(shown)}: give two people or more.")
    sentences = held_out_clips(args.clips, [args.voice])[args.voice]
    if len(sentences) < 2 * SENTENCES:
        raise UserError(f"'{args.clips / args.voice}' has no {2 * SENTENCES} held-out clips: name another --voice.")
    models, settings = load_and_make_folder(args, prepare)
    spoken = [read_clip(args.voice, path) for path in sentences[: 2 * SENTENCES]]
    first, second = speak(spoken[:SENTENCES]), speak(spoken[SENTENCES:])
    clips = [read_clip(speaker, files[speaker][0]) for speaker in people]
    pairs = [(clips[2 * i % len(clips)], clips[(2 * i + 1) % len(clips)]) for i in range(args.pairs)]
    measures = []
    for each in measure_crossing(pairs, (first, least_alike(first, second)), args.out, models, settings):
        measures.append(each)
        case = f"{each.scene}, {each.film}, {each.whose}"
        print(f"{case}: own {each.own:.2f}, other {each.other:.2f}, {each.found} of {each.whole}", file=sys.stderr)
        (args.out / "crossing.md").write_text(crossing_table(measures) + "\n", encoding="utf-8")
    print(crossing_table(measures))


def evaluate_colours(args: argparse.Namespace) -> None:
    """Print what matching of colours gives on the faces of films."""
    films = films_in(args.films)
    device = choose_device(args.device)
    models = load_models(resolve_model(args.model, device), device)
    print(colours_table([each for film in films for each in measure_colours(read_crops(film), models)]))


def evaluate_video(args: argparse.Namespace) -> None:
    """Print how the mouth of one file moves, and whether it follows the sound."""
    clip = read_clip("", args.result)
    judge = load_judge_if_trained(args.judge, choose_device(args.device))
    opening = clip.track.opening
    best, lag = peak(correlation(opening, loudness(clip.wav)))
    print(f"frames with a face           {np.isfinite(opening).sum()} of {len(opening)}")
    print(f"mouth opening                {np.nanmean(opening):.3f} ± {np.nanstd(opening):.3f} of the eyes' distance")
    print(f"correlation with loudness    {best:.2f}" + ("" if lag is None else f" at {lag:+d} frames"))
    if judge is not None:
        score = sync_score(judge_clip(judge, clip.track.crops, clip.wav))
        print(f"judge of sync                confidence {score.confidence:.2f} at {score.offset:+d} frames")


def evaluate_speaking(args: argparse.Namespace) -> None:
    """Make films, find who speaks in them, and write speaking.md and speaking.json into the folder `out`."""
    judge = load_judge(args.judge, choose_device(args.device))
    clips: dict[str, list[Sentence]] = {}
    for speaker, path in list_clips(args.clips):
        if speaker in args.speakers and len(clips.setdefault(speaker, [])) < SENTENCES:
            try:
                clips[speaker].append(read_sentence(path))
            except UserError as error:
                print(error, file=sys.stderr)
    clips = {speaker: sentences for speaker, sentences in clips.items() if sentences}
    if len(clips) < 3:
        raise UserError(f"'{args.clips}' has clips of {len(clips)} of these people: give three or more.")
    args.out.mkdir(parents=True, exist_ok=True)
    scores: list[Score] = []

    def write(name: str) -> None:
        # After every film, so that an interrupted run keeps its results.
        print(name, file=sys.stderr)
        write_text(args.out / "speaking.json", json.dumps([asdict(score) for score in scores], indent=1) + "\n")
        write_text(args.out / "speaking.md", speaking_table(scores) + "\n")

    for score in measure_speaking(clips, {2: args.two, 3: args.three}, judge, write):
        scores.append(score)
    print(speaking_table(scores))


def train_judge(args: argparse.Namespace) -> None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    check_writable(args.output, (args.prepared / "crops.mp4", args.prepared / "clips.npz"))
    check = train(args.prepared, args.output, args.seconds, choose_device(args.device))
    if check is not None:
        print(f"on held-out clips: {check.summary()}")


def main(
    arguments: list[str] | None = None,
    prog: str = "python -m latentsync.evaluation",
    add_options: AddOptions | None = None,
    prepare: Prepare = unchanged,
) -> int:
    """Run a command; returns the exit code: 0, 2 for an error that the user can correct, 130 when interrupted."""
    args = build_parser(prog, add_options).parse_args(arguments)

    def work() -> int:
        if args.command == "clips":
            evaluate_clips(args, prepare)
        elif args.command == "people":
            evaluate_people(args, prepare)
        elif args.command == "rates":
            evaluate_rates(args, prepare)
        elif args.command == "crossing":
            evaluate_crossing(args, prepare)
        elif args.command == "colours":
            evaluate_colours(args)
        elif args.command == "video":
            evaluate_video(args)
        elif args.command == "strip":
            check_writable(args.picture, (args.video, args.audio, args.result), "The picture")
            save_picture(args.picture, strip(args.video, args.audio, args.result))
        elif args.command == "speaking":
            evaluate_speaking(args)
        else:
            train_judge(args)
        return 0

    return exit_code(work, lambda: "stopped; what was measured so far is kept")


if __name__ == "__main__":
    sys.exit(main())
