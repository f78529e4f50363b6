"""From training states to a checkpoint folder for `--model`: float16 safetensors."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from latentsync.checkpoints.find import CONFIG, UNET_NAMES, VAE_CONFIG, VAE_NAMES, WHISPER_NAMES
from latentsync.corpus import RESOLUTION
from latentsync.paths import check_writable, write_bytes, write_text
from latentsync.training import autoencoder, denoiser, listener
from latentsync.training.sound import MIN_SPEECH_LEVEL, TRAINED_MEL_RANGE
from latentsync.training.state import load_weights
from latentsync.unet import UNet, UNetConfig

# The face that the model paints for `latentsync.retarget`, of the person with the most clips.
FACE = Path(__file__).resolve().parents[2] / "assets" / "demo" / "face.png"
GUIDANCE_SCALE = 2.5  # at 1.5 the mouths of a small model open less far (see the log in README.md)


def half_precision(module: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + name: t.detach().half().contiguous() for name, t in module.state_dict().items()}


def export(state: Path, folder: Path) -> None:
    """Write a checkpoint folder from a state folder: averaged U-Net and audio encoder, and the autoencoder."""
    vae = AutoencoderKL.from_config(autoencoder.CONFIG)
    scale = load_weights(state / "autoencoder.pt", {"vae": vae})["scaling_factor"]
    average = nn.ModuleDict({"unet": UNet(UNetConfig.from_dict(denoiser.CONFIG)), "encoder": listener.new_encoder()})
    load_weights(state / "denoiser.pt", {"average": average})
    for name in (CONFIG, FACE.name, UNET_NAMES[0], WHISPER_NAMES[0], VAE_NAMES[0], VAE_CONFIG):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        check_writable(folder / name, (state / "autoencoder.pt", state / "denoiser.pt"), "The model's file")
    config = {
        "resolution": RESOLUTION,
        "match_colours": True,
        "ends_only": True,
        "guidance_scale": GUIDANCE_SCALE,
        "mel_range": TRAINED_MEL_RANGE,
        "speech_level": MIN_SPEECH_LEVEL,
        "face": FACE.name,
        "unet": denoiser.CONFIG,
    }
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    if (folder / FACE.name).resolve() != FACE:
        write_bytes(folder / FACE.name, FACE.read_bytes())
    save_file(half_precision(average["unet"]), folder / UNET_NAMES[0])
    dims = json.dumps(vars(listener.DIMS))
    save_file(half_precision(average["encoder"], "encoder."), folder / WHISPER_NAMES[0], metadata={"dims": dims})
    save_file(half_precision(vae), folder / VAE_NAMES[0])
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    config["scaling_factor"] = scale
    write_text(folder / VAE_CONFIG, json.dumps(config, indent=2) + "\n")
