"""From a checkpoint folder back to training states, the inverse of `export`."""

from pathlib import Path

import torch
from torch import nn

from latentsync.autoencoder import AutoencoderConfig
from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import load_models
from latentsync.errors import UserError
from latentsync.training import autoencoder, denoiser, listener
from latentsync.training.state import save_state
from latentsync.unet import UNetConfig


def restore(folder: Path, state: Path) -> None:
    """Write states at step 0 with the folder's weights and no optimizer; the listener's lip reader is new.

    Raises UserError if the folder's model has other sizes than those trained here.
    """
    models = load_models(resolve_model(str(folder), torch.device("cpu")), torch.device("cpu"), torch.float32)
    vae, unet, encoder = models.vae, models.unet, models.audio_encoder
    same = unet.config == UNetConfig.from_dict(denoiser.CONFIG) and encoder.dims == listener.DIMS
    sizes = AutoencoderConfig.from_dict(autoencoder.CONFIG | {"scaling_factor": vae.config.scaling_factor})
    if not same or vae.config != sizes:
        raise UserError(f"'{folder}' holds a model of other sizes than those trained here; only these can go on.")
    scale = vae.config.scaling_factor
    save_state(state / "autoencoder.pt", {"vae": vae}, None, 0, scaling_factor=scale)
    save_state(state / "listener.pt", {"encoder": encoder, "reader": listener.LipReader()}, None, 0)
    average = nn.ModuleDict({"unet": unet, "encoder": encoder})
    save_state(state / "denoiser.pt", {"unet": unet, "encoder": encoder, "average": average}, None, 0)
