"""The command line: `latentsync prepare FILM -o FOLDER`, also `python -m latentsync.prepared`."""

import argparse
import sys
from pathlib import Path

from latentsync import __version__
from latentsync.__main__ import leave, shield_dashes
from latentsync.errors import UserError, is_out_of_memory
from latentsync.options import between, choose_device, exit_code, face_name
from latentsync.paths import folder_bytes
from latentsync.progress import ProgressBars, ProgressLines
from latentsync.rates import RATES
from latentsync.settings import Settings


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m latentsync.prepared",
        description="Follow the face through FILM and encode it, once for every voice that is to come: give FOLDER to "
        "the runs on this film as --prepared.",
    )
    add = parser.add_argument
    add("film", metavar="FILM", help="any video of a face, or a picture")
    add("-o", "--output", required=True, type=Path, metavar="FOLDER", help="a new folder to write")
    add("--model", default="auto", metavar="NAME|PATH", help="as of the runs (default %(default)s)")
    add("--face", type=face_name, default=Settings.face, metavar="WHO", help="as of the runs (default %(default)s)")
    add("--fps", choices=RATES, default=Settings.fps, help="as of the runs (default %(default)s)")
    add("--video-track", type=between(int, 1, 1000), metavar="N", help="which track of FILM, from 1")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    add("--version", action="version", version=__version__)
    return parser


def run(args: argparse.Namespace) -> int:
    """Prepare a film from parsed arguments; returns 0. Raises UserError."""
    from latentsync.checkpoints.find import resolve_model
    from latentsync.checkpoints.load import load_models
    from latentsync.hooks import Hooks
    from latentsync.media import probe_video
    from latentsync.prepared.making import prepare_film

    info = probe_video(args.film, args.video_track).at_choice(args.fps)
    for remark in info.remarks:
        print(remark, file=sys.stderr)
    device = choose_device(args.device)
    checkpoint = resolve_model(args.model, device)
    print(f"model {checkpoint.name}, {checkpoint.resolution} px, on {device}", file=sys.stderr)
    progress = ProgressBars(("faces",)) if sys.stderr.isatty() else ProgressLines()
    settings = Settings(face=args.face, fps=args.fps)
    try:
        frames, faces = prepare_film(
            args.film,
            args.output,
            load_models(checkpoint, device),
            settings,
            Hooks(on_progress=progress),
            args.video_track,
        )
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"The memory of {device} is not enough for '{args.film}' with the model {checkpoint.name}: close other "
            "programs that use it, or take --device cpu."
        ) from error
    finally:
        progress.close()
    print(f"{faces} of {frames} frames show the face; {folder_bytes(args.output) / 1e6:.1f} MB", file=sys.stderr)
    print(args.output)
    return 0


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for what the user can put right, 130 when interrupted."""
    parser = make_parser()
    parser.prog = prog or parser.prog
    args = parser.parse_args(shield_dashes(sys.argv[1:] if arguments is None else arguments))
    return exit_code(lambda: run(args), lambda: f"stopped; {args.output} was not written")


if __name__ == "__main__":
    leave(main())
