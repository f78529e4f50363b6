"""What the levels cost in quality: the difference of their faces from the plain pipeline's, where they are generated.

    python -m optim.quality VIDEO AUDIO [--model demo] [--seconds 3] [--levels …] [--json FILE]

Every level runs the same clip. The faces are cropped from the finished frames before encoding, and compared with those
of the plain pipeline and of the conservative level: PSNR in dB and SSIM (Wang et al. 2004) where the mask hides the
face. A model that has a face of its own (the demo model) paints on the film's here: the film's pixels, which it shows
otherwise, hide what a level changes. `python -m optim.evaluation` measures whether the mouth still follows the sound.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentsync import SAMPLE_RATE
from latentsync.alignment import crop_face, fixed_mask
from latentsync.audio import frame_count
from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import Models, load_models
from latentsync.errors import UserError
from latentsync.evaluation.measures import psnr, ssim
from latentsync.media import probe_video, read_audio, read_frames_looped
from latentsync.options import between, choose_device
from latentsync.paths import check_writable, write_text
from latentsync.pipeline import Source, generate_frames
from latentsync.settings import INFERENCE_STEPS, TRAIN_STEPS, Settings
from latentsync.timing import StageClock
from optim.accelerate import accelerate, make_plan
from optim.hardware import gpu_of
from optim.levels import CONSERVATIVE, STOPS, Level, find_level


def faces_of(video: Path, wav: torch.Tensor, models: Models, settings: Settings) -> np.ndarray:
    """The face crops of the finished frames, uint8 (n, R, R, 3). Raises UserError where no frame has a face."""
    info, total = probe_video(video), frame_count(len(wav))
    frames = read_frames_looped(info, total)
    crops = []
    source = Source(frames, wav, total, repeats=total > info.n_frames)
    with closing(generate_frames(source, models, settings, StageClock())) as finished:
        for aligned in finished:
            if aligned.crop is not None:
                crops.append(crop_face(aligned.frame, aligned.matrix, models.resolution))
    if not crops:
        raise UserError(f"'{video}' shows no face that can be used: use one in which a face is seen from the front.")
    return np.stack(crops)


def compare(
    video: Path, wav: torch.Tensor, models: Models, settings: Settings, levels: list[Level]
) -> Iterator[dict[str, Any]]:
    """A row for each level: name, steps, cache, PSNR and SSIM to the plain pipeline and to conservative."""
    gpu = gpu_of(models.device)
    hidden = fixed_mask(models.resolution) < 0.5
    plain = faces_of(video, wav, models, settings)
    conservative = None
    for level in [CONSERVATIVE, *(level for level in levels if level is not CONSERVATIVE)]:
        plan = make_plan(level, settings, models.resolution, gpu)
        faces = faces_of(video, wav, accelerate(models, plan), plan.settings)
        conservative = faces if conservative is None else conservative
        cache = plan.settings.cache
        yield {
            "level": level.name,
            "steps": plan.settings.steps,
            "cache": [cache.interval, cache.branch] if cache else None,
            "frames": len(faces),
            "psnr_plain": psnr(faces, plain, hidden),
            "ssim_plain": ssim(faces, plain, hidden),
            "psnr_conservative": psnr(faces, conservative, hidden),
            "ssim_conservative": ssim(faces, conservative, hidden),
        }


HEADER = "level         steps  cache  frames    to the plain pipeline    to conservative"


def format_row(row: dict[str, Any]) -> str:
    cache = "{}, {}".format(*row["cache"]) if row["cache"] else "none"
    return (
        f"{row['level']:13} {row['steps']:5}  {cache:5}  {row['frames']:6}"
        f"    {row['psnr_plain']:5.1f} dB, SSIM {row['ssim_plain']:.4f}"
        f"    {row['psnr_conservative']:5.1f} dB, SSIM {row['ssim_conservative']:.4f}"
    )


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="What the levels cost in quality.")
    parser.add_argument("video", type=Path, metavar="VIDEO")
    parser.add_argument("audio", type=Path, metavar="AUDIO")
    parser.add_argument("--model", default="demo", metavar="NAME|PATH")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=between(int, 1, TRAIN_STEPS - 1), default=INFERENCE_STEPS)
    parser.add_argument("--seconds", type=float, default=3.0, help="of the clip (default 3)")
    parser.add_argument("--levels", nargs="+", default=[stop.name for stop in STOPS], metavar="NAME|0…1")
    parser.add_argument("--json", type=Path, metavar="FILE.json")
    return parser


def main(arguments: list[str] | None = None, prog: str = "python -m optim.quality") -> int:
    """Print the table; returns the exit code: 0, or 2 for an error that the user can correct."""
    args = build_parser(prog).parse_args(arguments)
    try:
        levels = [find_level(name) for name in args.levels]
        device = choose_device(args.device)
        checkpoint = resolve_model(args.model, device)
        if args.json:
            check_writable(args.json, (args.video, args.audio, *checkpoint.files))
        models = replace(load_models(checkpoint, device), face=None)
        wav = torch.from_numpy(read_audio(args.audio))[: round(args.seconds * SAMPLE_RATE)]
        print(HEADER)
        rows = []
        for row in compare(args.video, wav, models, Settings.suiting(models, steps=args.steps), levels):
            print(format_row(row), flush=True)
            rows.append(row)
        if args.json:
            write_text(args.json, json.dumps(rows, indent=2) + "\n")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
