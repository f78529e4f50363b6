"""Several jobs of one command: they share the loaded models, and their results get names."""

import argparse
import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from latentsync.choice import FACES
from latentsync.errors import UserError
from latentsync.media.sound import SUFFIXES
from latentsync.paths import same_file

if TYPE_CHECKING:  # these import torch, which takes seconds
    import torch

    from latentsync.checkpoints.find import Checkpoint
    from latentsync.checkpoints.load import Models

MAX_STEM_BYTES = 100  # of the film's and of a voice's name in that of a result: file names have 255

# A checkpoint and a device → its models, and a function that loads their weights if they are not there yet.
LoadModels = Callable[["Checkpoint", "torch.device"], tuple["Models", Callable[[], None]]]


def load_once() -> LoadModels:
    """A function that returns the last models again while checkpoint and device stay the same."""
    kept: list[tuple[Checkpoint, torch.device, Models, Callable[[], None]]] = []

    def load(checkpoint: "Checkpoint", device: "torch.device") -> tuple["Models", Callable[[], None]]:
        import gc

        from torch.cuda import empty_cache

        from latentsync.checkpoints.load import load_outline, load_weights, working_dtype

        if not kept or kept[0][:2] != (checkpoint, device):
            if kept:  # memory may not hold both
                kept.clear()
                gc.collect()
                if device.type == "cuda":
                    empty_cache()
            models = load_outline(checkpoint, working_dtype(device), device)
            kept.append((checkpoint, device, models, cache(lambda: load_weights(models, checkpoint))))
        return kept[0][2:]

    return load


def faces_and_voices(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The faces of a command line and what each says, equally many. Raises UserError where they do not pair up."""
    faces = args.face or []
    if not args.face_audio:
        if len(faces) > 1:
            raise UserError(
                "Several faces need a recording each: --face left --audio A.wav --face right --audio B.wav."
            )
        if args.audio is None:
            raise UserError("There is no recording: name one after the video.")
        return faces or [FACES[0]], [args.audio]
    if args.audio is not None:
        raise UserError(f"'{args.audio}' and --audio were both given: pair --face with --audio, or name one file.")
    if len(faces) != len(args.face_audio):
        raise UserError(f"{len(faces)} --face and {len(args.face_audio)} --audio were given: pair them.")
    return faces, args.face_audio


def job_for_each_voice(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments of one job for each voice of a command line; of several, the output is a folder, which is made.

    Raises UserError where it cannot be one, or where there is one report for several results.
    """
    if not args.voices:
        return [args]
    folder, voices = Path(args.output), [args.audio, *args.voices]
    if args.report:
        raise UserError("--report describes one result: leave it out where several voices are given.")
    if folder.suffix.lower() in SUFFIXES and not folder.is_dir():
        raise UserError(f"With several voices the output is a folder, and '{folder}' is the name of a video; name one.")
    try:
        folder.mkdir(exist_ok=True)
        outputs = result_paths(folder, args.video, voices)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in a name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"The folder '{folder}' cannot be made or read ({reason}); choose another one.") from error
    changes = ({"audio": voice, "output": str(path), "voices": []} for voice, path in zip(voices, outputs, strict=True))
    return [argparse.Namespace(**vars(args) | change) for change in changes]


def result_paths(folder: Path, film: str, voices: Iterable[str], suffix: str = ".mp4") -> list[Path]:
    """Paths of results in a folder, named after the film and the voice of each.

    Names that would be the same, or that of an input, get a number. The names of earlier results are given again, so
    that the same command resumes and replaces them. Raises OSError.
    """
    voices = list(voices)
    paths: list[Path] = []
    taken: set[str] = set()
    for voice in voices:
        name, number = f"{_short_stem(film)}-{_short_stem(voice)}", 1
        while True:
            path = folder / f"{name}{f'-{number}' if number > 1 else ''}{suffix}"
            # Some disks do not tell capital letters from small ones.
            if path.name.casefold() not in taken and not any(same_file(path, other) for other in (film, *voices)):
                break
            number += 1
        taken.add(path.name.casefold())
        paths.append(path)
    return paths


def _short_stem(path: str) -> str:
    stem = os.fsencode(Path(path).stem)
    return os.fsdecode(stem) if len(stem) <= MAX_STEM_BYTES else stem[:MAX_STEM_BYTES].decode(errors="ignore")
