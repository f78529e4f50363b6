"""Adversarial training of the demo model's decoder, for sharper faces.

The encoder is not changed, so a denoiser's latents keep their meaning.
"""

import copy
import logging
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from latentsync.corpus import ClipSet, load_clips, load_held_out_clips
from latentsync.training.augmentation import random_augmentation, random_mouth, render
from latentsync.training.autoencoder import CONFIG, detail_loss, reconstruct, reconstruction_psnr
from latentsync.training.state import load_weights, save_state

log = logging.getLogger(__name__)

BATCH = 64
LEARNING_RATE, CRITIC_RATE = 2e-4, 4e-4
CRITIC_WARMUP = 100  # steps before the critic's loss counts
CRITIC_SHARE = 0.4  # gradient of the adversarial loss in the last layer over that of the reconstruction loss
FEATURE_WEIGHT = 1.0  # of the difference of the critic's features
NOISE = 0.25  # of the latents' deviation: the largest error of a denoiser
EMA = 0.998


class Critic(nn.Module):
    """Faces (n, 3, 128, 128) → logits (n, 1, 14, 14) of 46 px patches, positive for real, and features."""

    def __init__(self, width: int = 64):
        super().__init__()

        def layer(c_in: int, c_out: int, stride: int) -> nn.Module:
            return spectral_norm(nn.Conv2d(c_in, c_out, 4, stride, 1))

        self.layers = nn.ModuleList(
            [
                layer(3, width, 2),
                layer(width, 2 * width, 2),
                layer(2 * width, 4 * width, 2),
                layer(4 * width, 4 * width, 1),
            ]
        )
        self.last = layer(4 * width, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.last(x), features


def adversarial_weight(reconstruction: Tensor, adversarial: Tensor, parameter: Tensor) -> Tensor:
    """Weight of the adversarial loss with which its gradient at `parameter` is CRITIC_SHARE of the reconstruction's."""
    losses = (reconstruction, adversarial)
    norms = [torch.autograd.grad(loss, parameter, retain_graph=True)[0].float().norm() for loss in losses]
    return (CRITIC_SHARE * norms[0] / (norms[1] + 1e-8)).clamp(max=1e3)


def train(prepared: Path, state: Path, seconds: float, device: torch.device, batch: int = BATCH) -> None:
    """Train the decoder of `state/autoencoder.pt` for `seconds` and write it back, with a new critic every time."""
    data = load_clips(prepared, device)
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(CONFIG)
    scale = load_weights(state / "autoencoder.pt", {"vae": vae})["scaling_factor"]
    vae.to(device).encoder.requires_grad_(False)
    decoder, critic = vae.decoder, Critic().to(device)
    average = copy.deepcopy(decoder).requires_grad_(False)
    fused = device.type == "cuda"
    parameters, average_parameters = list(decoder.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, betas=(0.5, 0.99), weight_decay=0.0, fused=fused)
    critic_optimizer = torch.optim.AdamW(
        critic.parameters(), CRITIC_RATE, betas=(0.5, 0.99), weight_decay=0.0, fused=fused
    )
    clip_of, mouths = data.clip_of(), data.mouths()
    held_out = load_held_out_clips(prepared, device)
    if held_out:
        log.info("decoder: held-out %s", quality_text(vae, held_out))

    started, step = time.time(), 0
    while (elapsed := time.time() - started) < seconds or step == 0:
        for group, rate in (
            (optimizer.param_groups[0], LEARNING_RATE),
            (critic_optimizer.param_groups[0], CRITIC_RATE),
        ):
            group["lr"] = rate * max(0.05, 1 - elapsed / seconds)
        indices = torch.randint(len(data.frames), (batch,), device=device)
        augmentation = random_augmentation(batch, device, zoom=0.15, turn=0.2)
        # Without blur: the critic's real faces must be sharp.
        none = torch.zeros(batch, device=device)
        augmentation = replace(augmentation, blur=none, sharpen=none)
        with torch.no_grad():
            x = render(data.frames[indices], augmentation, random_mouth(mouths[clip_of[indices]]))
            with torch.autocast(device.type, torch.bfloat16):
                z = vae.encode(x).latent_dist.mode().float()
            z += NOISE / scale * torch.rand(batch, 1, 1, 1, device=device) * torch.randn_like(z)
        with torch.autocast(device.type, torch.bfloat16):
            out = decoder(z)
            real, _ = critic(x)
            fake, _ = critic(out.detach())
        critic_optimizer.zero_grad(set_to_none=True)
        (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()).backward()
        critic_optimizer.step()

        critic.requires_grad_(False)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                _, real_features = critic(x)
            logits, features = critic(out)
        reconstruction = detail_loss(out.float(), x)
        feature_loss = sum(
            F.l1_loss(a.float(), b.float()) / b.float().abs().mean()
            for a, b in zip(features, real_features, strict=True)
        )
        adversarial = -logits.float().mean() + FEATURE_WEIGHT * feature_loss
        weight = 0.0
        if step >= CRITIC_WARMUP:
            weight = adversarial_weight(reconstruction, adversarial, decoder.conv_out.weight)
        optimizer.zero_grad(set_to_none=True)
        (reconstruction + weight * adversarial).backward()
        critic.requires_grad_(True)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(average_parameters, parameters, 1 - min(EMA, step / (step + 10)))
        if step % 200 == 0:
            values = [float(value.detach().mean()) for value in (reconstruction, real, fake)]
            log.info("decoder step %d loss %.4f, real %.2f, fake %.2f, %.0f s", step, *values, time.time() - started)
    vae.decoder = average
    log.info("decoder: %d steps", step)
    if held_out:
        log.info("decoder: held-out %s", quality_text(vae, held_out))
    save_state(state / "autoencoder.pt", {"vae": vae}, None, step, scaling_factor=scale)


def quality_text(vae: AutoencoderKL, data: ClipSet) -> str:
    """PSNR and detail of reconstructed faces, for the log."""
    return f"PSNR {reconstruction_psnr(vae, data):.2f} dB, detail {detail_ratio(vae, data):.2f} of the real faces'"


def detail_ratio(vae: AutoencoderKL, data: ClipSet) -> float:
    """Mean absolute Laplacian of reconstructed faces over that of the originals."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], device=data.frames.device)[None, None]
    out, x = (F.conv2d(faces.mean(1, keepdim=True), kernel).abs().mean() for faces in reconstruct(vae, data))
    return float(out / x)
