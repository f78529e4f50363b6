"""Finds generated faces that cannot be pictures, and gives the networks a wider dtype to compute them again.

Half precision can overflow, and weights of another model or a card that is short of memory can make networks return
garbage: users see black, grey or a mosaic where the mouth should be.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from latentsync.autoencoder import Autoencoder
from latentsync.checkpoints.load import Models
from latentsync.unet import UNet

MIN_MOUTH_SPREAD = 1 / 127.5  # standard deviation of the masked pixels: one grey level; every mouth varies more
MAX_RMS = 4.0  # of pixels that should lie in [-1, 1]; those of a trained autoencoder stay below 1
# Standard deviation of the noise that the network predicts: 1 for a trained one, 0.2 and more for random weights.
MIN_NOISE_SPREAD = 0.01
FALLBACK_DTYPES = {  # in the order to try
    torch.float16: (torch.float32, torch.bfloat16),
    torch.bfloat16: (torch.float32,),
}


def broken_faces(predicted_noise: Tensor, pixels: Tensor, masked: tuple[slice, slice]) -> Tensor:
    """Which of n generated faces cannot be a picture: bool (n,), on their device and without synchronising with it.

    predicted_noise: (n, c, h, w), the network's prediction over all steps; pixels: (n, 3, R, R), decoded, in about
    [-1, 1]; masked: rows and columns of the region that is generated. A face is broken if it holds a number that is
    not finite, or pixels far out of range, if its mouth is flat, or if the network predicted the same value everywhere.
    """
    deviation, mean = (part.float() for part in torch.std_mean(pixels, dim=(1, 2, 3)))
    mouth_spread = pixels[(..., *masked)].float().std(dim=(1, 2, 3))
    noise_spread = predicted_noise.float().std(dim=(2, 3)).amax(1)
    in_range = deviation**2 + mean**2 <= MAX_RMS**2  # False for NaN, too
    return ~(in_range & (mouth_spread >= MIN_MOUTH_SPREAD) & (noise_spread >= MIN_NOISE_SPREAD))


def in_dtype(models: Models, dtype: torch.dtype) -> Models:
    """Plain copies of U-Net and autoencoder in `dtype`; the audio encoder, which is float32, is shared.

    Kernels, graphs and compiled passes belong to the original networks, which stay as they are.
    """
    with torch.device("meta"):
        unet, vae = UNet(models.unet.config), Autoencoder(models.vae.config)
    _copy_weights(models.unet, unet, dtype)
    _copy_weights(models.vae, vae, dtype)
    vae.use_tiling = models.vae.use_tiling
    return replace(models, unet=unet, vae=vae)


def _copy_weights(source: nn.Module, target: nn.Module, dtype: torch.dtype) -> None:
    target.load_state_dict({name: value.to(dtype) for name, value in source.state_dict().items()}, assign=True)
    target.eval().requires_grad_(False)
