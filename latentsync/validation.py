"""Results that are no picture, and the networks in a wider type to compute them again.

Half precision can overflow, and weights of another model or a card that is short of memory can make networks give
nothing at all: users see black, grey or a mosaic where the mouth should be.
"""

from dataclasses import replace

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from latentsync.checkpoints.load import Models
from latentsync.unet import UNet

FLAT = 1 / 127.5  # one grey level: no mouth varies less over its pixels
FAR = 4.0  # root mean square of pixels that should lie in [-1, 1]; those of a trained autoencoder stay below 1
# Of a spread of 1, which the noise has that a trained network predicts; random ones predicted 0.2 and more.
NOTHING = 0.01
WIDER = {torch.float16: (torch.float32, torch.bfloat16), torch.bfloat16: (torch.float32,)}  # in the order to try


def unusable(predicted: Tensor, pixels: Tensor, hidden: tuple[slice, slice]) -> Tensor:
    """Which of n generated faces cannot be a picture: bool (n,), on their device and without waiting for it.

    predicted: (n, c, h, w), the noise that the network saw in the faces, over all steps; pixels: (n, 3, R, R), decoded,
    in about [-1, 1]; hidden: rows and columns of what is generated. A face counts as unusable with a number that is not
    finite, with pixels far out of range, with a flat mouth, or if the network saw the same everywhere.
    """
    deviation, mean = (part.float() for part in torch.std_mean(pixels, dim=(1, 2, 3)))
    mouth = pixels[(..., *hidden)].float().std(dim=(1, 2, 3))
    seen = predicted.float().std(dim=(2, 3)).amax(1)
    usable = deviation**2 + mean**2 <= FAR**2  # False for what is not a number, too
    return ~(usable & (mouth >= FLAT) & (seen >= NOTHING))


def widened(models: Models, dtype: torch.dtype) -> Models:
    """U-Net and autoencoder as plain copies in `dtype`; the audio encoder, which is float32, is shared.

    Kernels, graphs and compiled passes belong to the networks that are copied, which stay as they are.
    """
    with torch.device("meta"):
        unet, vae = UNet(models.unet.config), AutoencoderKL.from_config(models.vae.config)
    _copy_weights(models.unet, unet, dtype)
    _copy_weights(models.vae, vae, dtype)
    if models.vae.use_tiling:
        vae.enable_tiling()
    return replace(models, unet=unet, vae=vae)


def _copy_weights(source: nn.Module, target: nn.Module, dtype: torch.dtype) -> None:
    target.load_state_dict({name: value.to(dtype) for name, value in source.state_dict().items()}, assign=True)
    target.eval().requires_grad_(False)
