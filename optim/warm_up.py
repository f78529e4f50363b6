"""What a GPU's first pass needs besides the weights, done while these are loaded."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import torch
import torch.nn.functional as F

from latentsync.checkpoints.load import Models
from latentsync.settings import WINDOW, Settings
from optim.compilation import TOKENS, configure_compilers


def start_triton(device: torch.device) -> None:
    """Import the fused kernels and run a first one, in which Triton starts. Does nothing on a processor.

    It takes a second, in which another thread can load the weights. What goes wrong is met again, and logged, by
    `optim.fused.fuse`.
    """
    if device.type != "cuda":
        return
    configure_compilers()
    with suppress(Exception):
        from optim import fused, kernels  # noqa: F401  # also what `fused` imports takes its time

        kernels.geglu(torch.zeros(1, 2, device=device))


@torch.inference_mode()
def plan_attention(models: Models, settings: Settings) -> None:
    """Run the spatial attentions of a guided pass once, on zeros; the U-Net needs no weights for it.

    cuDNN plans each shape for each thread, and cuBLAS starts in each: the thread that will paint does so while it waits
    for the weights. Does nothing on a processor. Memory that runs out is met again in the pass itself.
    """
    if models.device.type != "cuda":
        return
    config, last = models.unet.config, len(models.unet.config.block_out_channels) - 1
    side = models.resolution // models.vae.config.downscaling
    frames = WINDOW * settings.windows_per_pass
    zeros = partial(torch.zeros, device=models.device, dtype=models.dtype)
    with suppress(torch.OutOfMemoryError):
        for i in {i for i, attends in enumerate(config.cross_attention) if attends} | {last}:  # also the middle block
            tokens, width = (side >> i) ** 2, config.block_out_channels[i]
            for n in {frames, 2 * frames} if settings.guidance_scale > 1 else {frames}:
                _attend(zeros(n, tokens, 3 * width).chunk(3, dim=-1), config.heads)
            sound = F.linear(zeros(frames, TOKENS, width), zeros(width, width))
            _attend((zeros(frames, tokens, width), sound, sound), config.heads)


def _attend(qkv: Sequence[torch.Tensor], heads: int) -> None:
    """Attention as `optim.fused.attend` computes it: the layout of the heads is part of a plan."""
    F.scaled_dot_product_attention(*(part.unflatten(-1, (heads, -1)).transpose(-3, -2) for part in qkv))
