"""Time and peak memory of one guided window of the released architecture, on random weights.

    python -m optim.benchmark [--resolutions 512 256] [--json FILE]

From pixels to pixels: VAE encode (masked and whole faces), 20 DDIM steps at guidance 1.5, VAE decode. The
reference's own figures stand beside it.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from latentsync.alignment import fixed_mask
from latentsync.sampling import (
    GUIDANCE_SCALE,
    INFERENCE_STEPS,
    SEED,
    DeepCache,
    ddim_schedule,
    denoise,
    initial_noise,
)
from latentsync.unet import UNet, UNetConfig
from latentsync.vae import condition, decode

WINDOW = 16  # frames
REPEATS = 3
# One H100 80 GB, float16, torch 2.11: the reference's seconds a window (without and with DeepCache (3, 0)) and GB.
REFERENCE = {512: (4.28, 2.36, 10.6), 256: (1.57, 1.03, 4.6)}
SD_VAE = {  # stabilityai/sd-vae-ft-mse
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
}


def random_models(device: torch.device, dtype: torch.dtype) -> tuple[UNet, AutoencoderKL]:
    """The released architecture with random weights."""
    torch.manual_seed(0)
    with device:
        unet = UNet(UNetConfig())
        vae = AutoencoderKL.from_config(SD_VAE)
    layout = torch.channels_last
    return tuple(m.eval().requires_grad_(False).to(dtype, memory_format=layout) for m in (unet, vae))


def clock(device: torch.device) -> float:
    """Seconds, after everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def time_window(unet: UNet, vae: AutoencoderKL, resolution: int, cache: DeepCache | None) -> dict[str, float]:
    """Median seconds of encode, denoise and decode of one window, and peak memory in GB."""
    device, dtype = unet.conv_in.weight.device, unet.conv_in.weight.dtype
    mask = torch.from_numpy(fixed_mask(resolution).copy()).to(device, dtype)
    pixels = torch.rand(WINDOW, 3, resolution, resolution, device=device, dtype=dtype) * 2 - 1
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    audio = torch.randn(1, WINDOW, 50, unet.config.cross_attention_dim, device=device, dtype=dtype)
    side = resolution // 8
    noise = initial_noise(SEED, 4, side, side, device, dtype)
    schedule = ddim_schedule(INFERENCE_STEPS)
    stages = {"encode": [], "denoise": [], "decode": []}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for repeat in range(REPEATS + 1):
        at = [clock(device)]
        given = condition(vae, pixels, mask)
        at.append(clock(device))
        latents = denoise(
            unet, noise, given.transpose(0, 1)[None], audio, schedule, GUIDANCE_SCALE, cache
        )
        at.append(clock(device))
        decode(vae, latents[0].transpose(0, 1))
        at.append(clock(device))
        if repeat:  # the first warms up
            for stage, begin, end in zip(stages, at, at[1:], strict=False):
                stages[stage].append(end - begin)
    times = {stage: statistics.median(values) for stage, values in stages.items()}
    times["window"] = sum(times.values())
    times["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    return times


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m optim.benchmark", description=__doc__)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[512, 256])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {dtype}, random weights, {WINDOW} frames, {INFERENCE_STEPS} steps")
    print("side  cache    encode  denoise  decode   window   frames/s   peak GB   reference (H100) s, GB")
    unet, vae = random_models(device, dtype)
    rows = []
    for resolution in args.resolutions:
        for cache in (None, DeepCache(3, 0)):
            row = time_window(unet, vae, resolution, cache)
            seconds, cached_seconds, gb = REFERENCE.get(resolution, (float("nan"),) * 3)
            print(
                f"{resolution:4}  {'3, 0' if cache else 'none':6} {row['encode']:7.3f}s {row['denoise']:7.3f}s "
                f"{row['decode']:6.3f}s {row['window']:7.3f}s {WINDOW / row['window']:9.1f} {row['peak_gb']:9.1f}"
                f"   {cached_seconds if cache else seconds:.2f}, {gb:.1f}",
                flush=True,
            )
            rows.append({"resolution": resolution, "deepcache": bool(cache), **row})
    if args.json:
        args.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
