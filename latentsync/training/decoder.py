"""The demo model's decoder, sharpened: a critic learns to tell its faces from real ones, and it to deceive the critic.

The encoder stays as it is, so a denoiser's latents keep their meaning.
"""

import copy
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from latentsync.corpus import ClipSet, load_clips, load_held_out_clips
from latentsync.training.autoencoder import CONFIG, detail_loss, held_out_psnr, there_and_back
from latentsync.training.looks import random_look, random_mouth, render
from latentsync.training.state import load_weights, save_state

BATCH = 64
LEARNING_RATE, CRITIC_RATE = 2e-4, 4e-4
ALONE = 100  # steps that the critic has before it counts
CRITIC_SHARE = 0.4  # of the gradient in the last layer, beside that of the plain loss
FEATURE_WEIGHT = 1.0  # of the critic's view of how a face differs from the true one
NOISE = 0.25  # of the latents' deviation: the most by which a denoiser may be off
EMA = 0.998


class Critic(nn.Module):
    """Faces (n, 3, 128, 128) → how real each of 14 × 14 patches of 46 px is, and what led to it."""

    def __init__(self, width: int = 64):
        super().__init__()

        def layer(c_in: int, c_out: int, stride: int) -> nn.Module:
            return spectral_norm(nn.Conv2d(c_in, c_out, 4, stride, 1))

        self.layers = nn.ModuleList([
            layer(3, width, 2), layer(width, 2 * width, 2), layer(2 * width, 4 * width, 2),
            layer(4 * width, 4 * width, 1),
        ])  # fmt: skip
        self.last = layer(4 * width, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for part in self.layers:
            x = F.leaky_relu(part(x), 0.2)
            features.append(x)
        return self.last(x), features


def balance(plain: Tensor, critical: Tensor, weight: Tensor) -> Tensor:
    """What `critical` must be multiplied by for its gradient at `weight` to be CRITIC_SHARE of that of `plain`."""
    sizes = [torch.autograd.grad(loss, weight, retain_graph=True)[0].float().norm() for loss in (plain, critical)]
    return (CRITIC_SHARE * sizes[0] / (sizes[1] + 1e-8)).clamp(max=1e3)


def train(prepared: Path, state: Path, seconds: float, device: torch.device, batch: int = BATCH) -> None:
    """Train the decoder of `state/autoencoder.pt` for `seconds` and write it back; the critic is always new."""
    data = load_clips(prepared, device)
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(CONFIG)
    scale = load_weights(state / "autoencoder.pt", {"vae": vae})["scaling_factor"]
    vae.to(device).encoder.requires_grad_(False)
    decoder, critic = vae.decoder, Critic().to(device)
    average = copy.deepcopy(decoder).requires_grad_(False)
    fused = device.type == "cuda"
    learnt, followers = list(decoder.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(learnt, LEARNING_RATE, betas=(0.5, 0.99), weight_decay=0.0, fused=fused)
    critics = torch.optim.AdamW(critic.parameters(), CRITIC_RATE, betas=(0.5, 0.99), weight_decay=0.0, fused=fused)
    clip_of, mouths = data.clip_of(), data.mouths()
    unseen = load_held_out_clips(prepared, device)
    if unseen:
        print(f"decoder: held-out {held_out_words(vae, unseen)}", flush=True)

    began, step = time.time(), 0
    while (elapsed := time.time() - began) < seconds or step == 0:
        for group, rate in ((optimizer.param_groups[0], LEARNING_RATE), (critics.param_groups[0], CRITIC_RATE)):
            group["lr"] = rate * max(0.05, 1 - elapsed / seconds)
        picked = torch.randint(len(data.frames), (batch,), device=device)
        # Not blurred: what the critic takes for real must be sharp.
        look = random_look(batch, device, zoom=0.15, turn=0.2)
        look = replace(look, blur=torch.zeros_like(look.blur), sharpen=torch.zeros_like(look.sharpen))
        with torch.no_grad():
            x = render(data.frames[picked], look, random_mouth(mouths[clip_of[picked]]))
            with torch.autocast(device.type, torch.bfloat16):
                z = vae.encode(x).latent_dist.mode().float()
            z += NOISE / scale * torch.rand(batch, 1, 1, 1, device=device) * torch.randn_like(z)
        with torch.autocast(device.type, torch.bfloat16):
            out = decoder(z)
            real, _ = critic(x)
            fake, _ = critic(out.detach())
        critics.zero_grad(set_to_none=True)
        (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()).backward()
        critics.step()

        critic.requires_grad_(False)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                _, wanted = critic(x)
            judged, seen = critic(out)
        plain = detail_loss(out.float(), x)
        alike = sum(F.l1_loss(a.float(), b.float()) / b.float().abs().mean() for a, b in zip(seen, wanted, strict=True))
        critical = -judged.float().mean() + FEATURE_WEIGHT * alike
        share = balance(plain, critical, decoder.conv_out.weight) if step >= ALONE else 0.0
        optimizer.zero_grad(set_to_none=True)
        (plain + share * critical).backward()
        critic.requires_grad_(True)
        nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(followers, learnt, 1 - min(EMA, step / (step + 10)))
        if step % 200 == 0:
            loss, judged_real, judged_made = (float(value.detach().mean()) for value in (plain, real, fake))
            print(
                f"decoder step {step} loss {loss:.4f}, real {judged_real:.2f}, made {judged_made:.2f}, "
                f"{time.time() - began:.0f} s", flush=True,
            )  # fmt: skip
    vae.decoder = average
    print(f"decoder: {step} steps", flush=True)
    if unseen:
        print(f"decoder: held-out {held_out_words(vae, unseen)}", flush=True)
    save_state(state / "autoencoder.pt", {"vae": vae}, None, step, scaling_factor=scale)


def held_out_words(vae: AutoencoderKL, data: ClipSet) -> str:
    """How near and how sharp faces come back that were never trained on."""
    return f"PSNR {held_out_psnr(vae, data):.2f} dB, detail {held_out_detail(vae, data):.2f} of the real faces'"


def held_out_detail(vae: AutoencoderKL, data: ClipSet) -> float:
    """Share of the mean size of the Laplacian that is left, there and back."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], device=data.frames.device)[None, None]
    pair = there_and_back(vae, data)
    out, x = (F.conv2d(faces.mean(1, keepdim=True), kernel).abs().mean() for faces in pair)
    return float(out / x)
