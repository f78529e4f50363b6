"""`python -m latentsync.training prepare | voices | autoencoder | listener | denoiser | decoder | export | import`."""

import argparse
import sys
from pathlib import Path

import torch

from latentsync.corpus import list_clips
from latentsync.errors import UserError
from latentsync.training import autoencoder, decoder, denoiser, listener
from latentsync.training.export import export
from latentsync.training.restore import restore


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m latentsync.training", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    prepare = stages.add_parser("prepare", help="align faces and take down sound")
    prepare.add_argument("clips", type=Path, help="folder of SPEAKER/CLIP.mp4")
    prepare.add_argument("prepared", type=Path)
    prepare.add_argument("--crf", type=int, default=18, help="x264 quality of the crops (default 18)")
    voices = stages.add_parser("voices", help="let speech synthesisers say the clips as well (GRID only)")
    voices.add_argument("prepared", type=Path)
    voices.add_argument("--count", type=int, default=3, help="other voices a clip (default 3)")
    for name in ("autoencoder", "listener", "denoiser", "decoder"):
        stage = stages.add_parser(name, help=f"train the {name}, in this order")
        stage.add_argument("prepared", type=Path)
        stage.add_argument("state", type=Path, help="folder of training states, continued where they exist")
        stage.add_argument("--seconds", type=float, required=True, help="time to train for")
        stage.add_argument("--batch", type=int, help="faces or windows a step (default: for 24 GB and more)")
        stage.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        if name == "denoiser":
            stage.add_argument(
                "--lip-weight", type=float, default=denoiser.LIP_WEIGHT,
                help="of the loss of the mouth's shape beside that of the noise, 0 for without (default %(default)g)",
            )  # fmt: skip
    out = stages.add_parser("export", help="write a checkpoint folder")
    out.add_argument("state", type=Path)
    out.add_argument("folder", type=Path)
    back = stages.add_parser("import", help="write states to train on from, of a checkpoint folder")
    back.add_argument("folder", type=Path)
    back.add_argument("state", type=Path)
    args = parser.parse_args()
    try:
        if args.stage == "prepare":
            # Needs MediaPipe, which a training machine may lack.
            from latentsync.training.prepare import prepare as run

            run(list_clips(args.clips), args.prepared, args.crf)
        elif args.stage == "voices":
            # Needs SciPy.
            from latentsync.training.voices import add_voices

            add_voices(args.prepared, args.count)
        elif args.stage == "export":
            export(args.state, args.folder)
        elif args.stage == "import":
            restore(args.folder, args.state)
        else:
            torch.set_float32_matmul_precision("high")
            device = torch.device(args.device)
            trained = {"autoencoder": autoencoder, "listener": listener, "denoiser": denoiser, "decoder": decoder}
            others = {"batch": args.batch} if args.batch else {}
            if args.stage == "denoiser":
                others["lip_weight"] = args.lip_weight
            trained[args.stage].train(args.prepared, args.state, args.seconds, device, **others)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
