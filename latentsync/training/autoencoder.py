"""Training of the demo model's autoencoder: 128 px faces to 16 × 16 latents and back."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from latentsync.corpus import ClipSet, load_clips, load_held_out_clips
from latentsync.training.augmentation import no_augmentation, random_augmentation, random_mouth, render
from latentsync.training.state import load_state, save_state

log = logging.getLogger(__name__)

CONFIG: dict[str, Any] = {
    "block_out_channels": [48, 64, 96, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "latent_channels": 8,
    "sample_size": 128,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
KL_WEIGHT = 1e-4  # of the KL divergence, averaged over the latents' elements
BATCH = 128
LEARNING_RATE = 8e-4
CONTINUED_RATE = 3e-4  # when continuing from trained weights, whose latents a denoiser may already have learnt


def detail_loss(a: Tensor, b: Tensor) -> Tensor:
    """L1 of pixels and of their differences at three scales: blur costs as much as a wrong tone."""
    loss = (a - b).abs().mean()
    for _ in range(3):
        for axis in (2, 3):
            loss = loss + (a.diff(dim=axis) - b.diff(dim=axis)).abs().mean()
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return loss


def train(prepared: Path, state: Path, seconds: float, device: torch.device, batch: int = BATCH) -> None:
    """Train for `seconds`, continuing from `state/autoencoder.pt` if it exists, and write it at the end."""
    data = load_clips(prepared, device)
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(CONFIG).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), LEARNING_RATE, weight_decay=1e-4, fused=device.type == "cuda")
    rate = CONTINUED_RATE if (state / "autoencoder.pt").is_file() else LEARNING_RATE
    step = load_state(state / "autoencoder.pt", {"vae": vae}, optimizer)
    clip_of, mouths = data.clip_of(), data.mouths()

    def loss_of(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            out = vae.decode(posterior.sample()).sample
        out = out.float()
        recon = detail_loss(out, x)
        return recon + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel(), recon

    started, first = time.time(), step
    while (elapsed := time.time() - started) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step - first + 1) / 100) * max(0.02, 1 - elapsed / seconds)
        indices = torch.randint(len(data.frames), (batch,), device=device)
        # Stronger than the denoiser's: the autoencoder must reproduce any face, expression, light and size.
        augmentation = random_augmentation(batch, device, zoom=0.3, turn=0.4)
        x = render(data.frames[indices], augmentation, random_mouth(mouths[clip_of[indices]]))
        loss, recon = loss_of(x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 200 == 0:
            log.info("autoencoder step %d loss %.4f %.0f s", step, float(recon.detach()), elapsed)
    scale = latent_scale(vae, data)
    log.info("autoencoder: %d steps, latents scaled by %.4f", step - first, scale)
    if held_out := load_held_out_clips(prepared, device):
        log.info("  held-out PSNR %.2f dB", reconstruction_psnr(vae, held_out))
    save_state(state / "autoencoder.pt", {"vae": vae}, optimizer, step, scaling_factor=scale)


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, data: ClipSet) -> float:
    """1 / standard deviation of the latents, for diffusion on unit variance."""
    device = data.frames.device
    frames = data.frames[torch.randint(len(data.frames), (256,), device=device)]
    return float(1 / vae.encode(render(frames, random_augmentation(256, device))).latent_dist.mode().std())


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, data: ClipSet) -> tuple[Tensor, Tensor]:
    """About 128 faces of the set, reconstructed and original: (n, 3, 128, 128) each, in [−1, 1]."""
    frames = data.frames[:: max(1, len(data.frames) // 128)][:128]
    x = render(frames, no_augmentation(len(frames), frames.device))
    return vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1), x


def reconstruction_psnr(vae: AutoencoderKL, data: ClipSet) -> float:
    """PSNR in dB of reconstructed faces."""
    out, x = reconstruct(vae, data)
    return float(-10 * torch.log10(((out - x) / 2).square().mean()))
