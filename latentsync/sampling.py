"""DDIM as LatentSync was trained for it, with guidance and DeepCache, free of host synchronisation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from latentsync.settings import GUIDANCE_SCALE, TRAIN_STEPS, DeepCache
from latentsync.unet import UNet, fold_frames, unfold_frames


@dataclass(frozen=True)
class Schedule:
    """Timesteps, and what a DDIM step (eta 0) multiplies the latents and the noise by."""

    timesteps: tuple[int, ...]
    latent_scale: tuple[float, ...]
    noise_scale: tuple[float, ...]

    def predicted(self, latents: Tensor, noise: Tensor) -> Tensor:
        """The noise that the network has predicted, its mean over all steps by their weight in the latents.

        latents (n, c, h, w) are what the steps have made of noise (1, c, h, w).
        """
        left, taken = 1.0, 0.0  # of the first noise, of what was predicted
        for latent_scale, noise_scale in zip(self.latent_scale, self.noise_scale, strict=True):
            left, taken = latent_scale * left, latent_scale * taken + noise_scale
        return (latents.float() - left * noise.float()) / taken


def between_ends(first: Tensor, last: Tensor, frames: int) -> Tensor:
    """What is known of a window's first and last frames (b, …) → of all, (b, frames, …), in even steps between them.

    Cheeks and jaw move with what the old mouth says, and a small network goes by them. Told of the ends alone it must
    go by the sound, and still each window begins where the one before it ended.
    """
    share = torch.linspace(0, 1, frames, device=first.device, dtype=first.dtype)
    return torch.lerp(first[:, None], last[:, None], share.view(-1, *[1] * (first.ndim - 1)))


def ddim_scheduler() -> DDIMScheduler:
    """The reference's scheduler: epsilon prediction, leading spacing, offset 1, alpha never set to one."""
    return DDIMScheduler(
        num_train_timesteps=TRAIN_STEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )


def ddim_schedule(steps: int) -> Schedule:
    """The schedule of 1 to 999 steps; under about 5, leading spacing starts too late to remove the noise.

    A DDIM step x' = √a'·(x − √(1−a)·e)/√a + √(1−a')·e is linear in x and e, so two numbers a step say it all;
    they are worked out here on the host in double precision, which leaves nothing to wait for on the device.
    """
    scheduler = ddim_scheduler()
    scheduler.set_timesteps(steps)
    alphas = scheduler.alphas_cumprod.double()
    timesteps = [int(t) for t in scheduler.timesteps]
    latent_scale, noise_scale = [], []
    for t in timesteps:
        before = t - TRAIN_STEPS // steps
        a = alphas[t]
        a_before = alphas[before] if before >= 0 else scheduler.final_alpha_cumprod.double()
        ratio = (a_before / a).sqrt()
        latent_scale.append(float(ratio))
        noise_scale.append(float((1 - a_before).sqrt() - ratio * (1 - a).sqrt()))
    return Schedule(tuple(timesteps), tuple(latent_scale), tuple(noise_scale))


def initial_noise(
    seed: int, channels: int, height: int, width: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """One frame of noise (1, channels, 1, height, width): all frames of all windows start from it.

    Drawn on the CPU, so that a seed means the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, channels, 1, height, width, generator=generator)
    return noise.to(device, dtype)


@torch.inference_mode()
def denoise(
    unet: UNet,
    noise: Tensor,
    condition: Tensor,
    audio: Tensor,
    schedule: Schedule,
    guidance_scale: float = GUIDANCE_SCALE,
    cache: DeepCache | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Run the guided DDIM loop over b windows of f frames.

    noise: (1, c, 1, h, w), repeated over windows and frames; condition: (b, 1 + 2c, f, h, w), i.e. mask, masked
    and reference latents; audio: (b, f, tokens, d). At guidance_scale ≤ 1 only the audio branch is computed.
    on_step(i) is called on the host after step i is queued; what it raises stops the loop.
    Returns latents (b, c, f, h, w), scaled as the VAE's latents × 0.18215.
    """
    b, _, f, h, w = condition.shape
    guided = guidance_scale > 1
    c = noise.shape[1]
    latents = fold_frames(noise.expand(b, c, f, h, w))
    condition = fold_frames(condition)
    context = unet.encode_audio(audio)
    timesteps = torch.tensor(schedule.timesteps).to(latents.device, non_blocking=True)[:, None].unbind()
    cached = added = None
    for i, timestep in enumerate(timesteps):
        x = torch.cat([latents, condition], dim=1)
        if cache is None:
            noise_now, _ = unet.full(x, timestep, context, f, None, guided)
        elif i % cache.interval == 0:
            noise_now, cached = unet.full(x, timestep, context, f, cache.branch, guided)
            heard_alone = guided and not cache.guided
            cached = cached[len(x) :] if heard_alone else cached
        else:
            noise_now = unet.shallow(x, timestep, context, f, cache.branch, cached, guided and cache.guided)
        if len(noise_now) > len(x):
            free, heard = noise_now.chunk(2)
            added = (guidance_scale - 1) * (heard - free)
            noise_now = heard + added
        elif guided:
            noise_now = noise_now + added
        latents = schedule.latent_scale[i] * latents + schedule.noise_scale[i] * noise_now
        if on_step is not None:
            on_step(i)
    return unfold_frames(latents, b)
