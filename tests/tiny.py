"""A whole checkpoint with random weights, so small that a clip takes a second."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from latentsync.autoencoder import Autoencoder, AutoencoderConfig
from latentsync.unet import UNet, UNetConfig
from latentsync.whisper import AudioEncoder, WhisperDims

RESOLUTION = 64
WIDTH = 32  # the temporal module's norm has 32 groups
UNET = {
    "in_channels": 13,
    "block_out_channels": [WIDTH, WIDTH],
    "down_block_types": ["CrossAttnDownBlock3D", "CrossAttnDownBlock3D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": WIDTH,
    "norm_num_groups": 8,
    "motion_module_kwargs": {"num_attention_heads": 2},
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8, 8, 16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
}
DIMS = {"n_mels": 80, "n_audio_ctx": 1500, "n_audio_state": WIDTH, "n_audio_head": 2, "n_audio_layer": 1}


def make_checkpoint(folder: Path) -> Path:
    """Write the folder; the weights are the same on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet, encoder = UNet(UNetConfig.from_dict(UNET)), AudioEncoder(WhisperDims(**DIMS))
        vae = Autoencoder(AutoencoderConfig.from_dict(VAE))
    (folder / "whisper").mkdir(parents=True)
    (folder / "vae").mkdir()
    save_file(unet.state_dict(), folder / "latentsync_unet.safetensors")
    heard = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    save_file(heard, folder / "whisper" / "tiny.safetensors", {"dims": json.dumps(DIMS)})
    save_file(vae.state_dict(), folder / "vae" / "diffusion_pytorch_model.safetensors")
    (folder / "vae" / "config.json").write_text(json.dumps(VAE))
    (folder / "latentsync.json").write_text(json.dumps({"resolution": RESOLUTION, "unet": UNET}))
    return folder
