"""`python -m latentsync.training prepare | voices | autoencoder | listener | denoiser | decoder | export | import`."""

import argparse
import sys
from pathlib import Path

import torch

from latentsync.corpus import list_clips
from latentsync.errors import UserError
from latentsync.options import log_to_stderr
from latentsync.training import autoencoder, decoder, denoiser, listener
from latentsync.training.export import export
from latentsync.training.restore import restore

TRAIN = {
    "autoencoder": autoencoder.train,
    "listener": listener.train,
    "denoiser": denoiser.train,
    "decoder": decoder.train,
}


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    prepare = stages.add_parser("prepare", help="align faces and store mel spectra")
    prepare.add_argument("clips", type=Path, help="folder of SPEAKER/CLIP.mp4")
    prepare.add_argument("prepared", type=Path)
    prepare.add_argument("--crf", type=int, default=18, help="x264 quality of the crops (default 18)")
    voices = stages.add_parser("voices", help="add synthesised voices that say the clips' words (GRID only)")
    voices.add_argument("prepared", type=Path)
    voices.add_argument("--count", type=int, default=3, help="voices added to each clip (default 3)")
    for name in TRAIN:
        stage = stages.add_parser(name, help=f"train the {name}, in this order")
        stage.add_argument("prepared", type=Path)
        stage.add_argument("state", type=Path, help="folder of training states, continued if they exist")
        stage.add_argument("--seconds", type=float, required=True, help="time to train for")
        stage.add_argument("--batch", type=int, help="faces or windows per step (default: for 24 GB and more)")
        stage.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        if name == "denoiser":
            stage.add_argument(
                "--lip-weight",
                type=float,
                default=denoiser.LIP_WEIGHT,
                help="weight of the loss of the mouth's shape relative to that of the noise, 0 for none "
                "(default %(default)g)",
            )
    export_ = stages.add_parser("export", help="write a checkpoint folder")
    export_.add_argument("state", type=Path)
    export_.add_argument("folder", type=Path)
    import_ = stages.add_parser("import", help="write training states from a checkpoint folder, to train on from them")
    import_.add_argument("folder", type=Path)
    import_.add_argument("state", type=Path)
    return parser


def run(args: argparse.Namespace) -> None:
    if args.stage == "prepare":
        from latentsync.training.prepare import prepare  # needs MediaPipe, which a training machine may lack

        prepare(list_clips(args.clips), args.prepared, args.crf)
    elif args.stage == "voices":
        from latentsync.training.voices import add_voices  # needs SciPy

        add_voices(args.prepared, args.count)
    elif args.stage == "export":
        export(args.state, args.folder)
    elif args.stage == "import":
        restore(args.folder, args.state)
    else:
        torch.set_float32_matmul_precision("high")
        options = {"batch": args.batch} if args.batch else {}
        if args.stage == "denoiser":
            options["lip_weight"] = args.lip_weight
        TRAIN[args.stage](args.prepared, args.state, args.seconds, torch.device(args.device), **options)


def main(arguments: list[str] | None = None, prog: str = "python -m latentsync.training") -> int:
    """Run a stage; returns the exit code: 0, or 2 for an error that the user can correct."""
    args = build_parser(prog).parse_args(arguments)
    log_to_stderr()
    try:
        run(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
