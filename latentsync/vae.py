"""Faces to latents and back, and the U-Net's conditioning besides audio."""

import torch
import torch.nn.functional as F
from torch import Tensor

from latentsync.autoencoder import Autoencoder


def to_pixels(faces: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 (n, R, R, 3) → (n, 3, R, R) in [−1, 1], channels-last memory."""
    return (faces.to(dtype) / 127.5 - 1).permute(0, 3, 1, 2)


def encode(vae: Autoencoder, pixels: Tensor) -> Tensor:
    """pixels (n, 3, R, R) in [−1, 1] → scaled latents (n, c, R/8, R/8).

    Takes the mean of the posterior; the reference samples from it. The posterior's deviation is far below a grey level,
    and the mean neither flickers nor depends on how frames are batched.
    """
    return vae.encode(pixels) * vae.config.scaling_factor


def decode(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Scaled latents (n, c, h, w) → pixels (n, 3, 8h, 8w), about [−1, 1]."""
    return vae.decode(latents / vae.config.scaling_factor)


def latent_mask(mask: Tensor, side: int) -> Tensor:
    """The fixed mask (R, R) at latent size (side, side), nearest by floor of the index."""
    return F.interpolate(mask[None, None], (side, side), mode="nearest")[0, 0]


def encode_conditioning(vae: Autoencoder, pixels: Tensor, mask: Tensor) -> Tensor:
    """Mask, masked latents and reference latents of n faces, the U-Net's input channels after the noise.

    pixels: (n, 3, R, R) in [−1, 1]; mask: (R, R), 1 visible, 0 to be generated. Returns (n, 1 + 2c, h, w).
    """
    masked = encode(vae, pixels * mask)
    reference = encode(vae, pixels)
    small_mask = latent_mask(mask, masked.shape[-1]).expand(len(pixels), 1, -1, -1)
    return torch.cat([small_mask, masked, reference], dim=1)
