"""DDIM with LatentSync's schedule, classifier-free guidance and DeepCache, free of host synchronisation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentsync.settings import GUIDANCE_SCALE, TRAIN_STEPS, DeepCache
from latentsync.unet import UNet, fold_frames, unfold_frames

BETA_START, BETA_END = 0.00085, 0.012  # of the diffusion process (LatentSync, as Stable Diffusion)
STEPS_OFFSET = 1  # timesteps by which each step is later than its multiple (LatentSync)


@dataclass(frozen=True)
class Schedule:
    """Timesteps of a DDIM run (eta 0), and the factors of latents and noise at each step."""

    timesteps: tuple[int, ...]
    latent_scale: tuple[float, ...]
    noise_scale: tuple[float, ...]

    def predicted_noise(self, latents: Tensor, initial: Tensor) -> Tensor:
        """Mean of the noise predicted at all steps, weighted by its share in the final latents.

        latents: (n, c, h, w), the result of the steps; initial: (1, c, h, w), the noise they started from.
        """
        initial_share, predicted_share = 1.0, 0.0
        for latent_scale, noise_scale in zip(self.latent_scale, self.noise_scale, strict=True):
            initial_share *= latent_scale
            predicted_share = latent_scale * predicted_share + noise_scale
        return (latents.float() - initial_share * initial.float()) / predicted_share


def interpolate_ends(first: Tensor, last: Tensor, frames: int) -> Tensor:
    """Interpolate a window's conditioning linearly from its first and last frames: (b, …) each → (b, frames, …).

    Cheeks and jaw move with the old speech, and a small network follows them. Conditioned on the ends of a window alone
    it must follow the audio, and each window still begins where the one before it ended.
    """
    share = torch.linspace(0, 1, frames, device=first.device, dtype=first.dtype)
    return torch.lerp(first[:, None], last[:, None], share.view(-1, *[1] * (first.ndim - 1)))


def cumulative_alphas() -> Tensor:
    """Share of the signal's variance left at each training timestep, (1000,) float32: a scaled linear schedule."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS) ** 2
    return (1 - betas).cumprod(0)


def ddim_schedule(steps: int) -> Schedule:
    """The schedule of 1 to 999 steps; under about 5, leading spacing starts too late to remove the noise.

    A DDIM step x' = √a'·(x − √(1−a)·e)/√a + √(1−a')·e is linear in x and e, so two numbers a step say it all. They are
    computed here on the host in double precision, so that no step waits for the device.
    """
    alphas = cumulative_alphas().double()
    spacing = TRAIN_STEPS // steps
    timesteps = [i * spacing + STEPS_OFFSET for i in reversed(range(steps))]  # "leading" spacing
    latent_scale, noise_scale = [], []
    for t in timesteps:
        t_next = t - spacing
        a = alphas[t]
        a_next = alphas[max(t_next, 0)]  # the last step ends at the first alpha, not at one
        ratio = (a_next / a).sqrt()
        latent_scale.append(float(ratio))
        noise_scale.append(float((1 - a_next).sqrt() - ratio * (1 - a).sqrt()))
    return Schedule(tuple(timesteps), tuple(latent_scale), tuple(noise_scale))


def initial_noise(
    seed: int, channels: int, height: int, width: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """One frame of noise (1, channels, 1, height, width): all frames of all windows start from it.

    Drawn on the CPU, so that a seed gives the same noise on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, channels, 1, height, width, generator=generator)
    return noise.to(device, dtype)


@torch.inference_mode()
def denoise(
    unet: UNet,
    noise: Tensor,
    conditioning: Tensor,
    audio: Tensor,
    schedule: Schedule,
    guidance_scale: float = GUIDANCE_SCALE,
    cache: DeepCache | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Run the guided DDIM loop over b windows of f frames.

    noise: (1, c, 1, h, w), repeated over windows and frames; conditioning: (b, 1 + 2c, f, h, w), i.e. mask, masked
    and reference latents; audio: (b, f, tokens, d). At guidance_scale ≤ 1 only the cond branch is computed.
    on_step(i) is called on the host after step i is queued; an exception it raises ends the loop.
    Returns latents (b, c, f, h, w), scaled as the VAE's latents × 0.18215.
    """
    b, _, f, h, w = conditioning.shape
    guided = guidance_scale > 1
    c = noise.shape[1]
    latents = fold_frames(noise.expand(b, c, f, h, w))
    conditioning = fold_frames(conditioning)
    context = unet.encode_audio(audio)
    timesteps = torch.tensor(schedule.timesteps).to(latents.device, non_blocking=True)[:, None].unbind()
    cached = guidance = None
    for i, timestep in enumerate(timesteps):
        x = torch.cat([latents, conditioning], dim=1)
        if cache is None:
            prediction, _ = unet.full(x, timestep, context, f, None, guided)
        elif i % cache.interval == 0:
            prediction, cached = unet.full(x, timestep, context, f, cache.branch, guided)
            if cached is not None and not cache.guided:
                cached = cached[-len(x) :]  # the cond half
        else:
            prediction = unet.shallow(x, timestep, context, f, cache.branch, cached, guided and cache.guided)
        if len(prediction) > len(x):
            uncond, cond = prediction.chunk(2)
            guidance = (guidance_scale - 1) * (cond - uncond)
            prediction = cond + guidance
        elif guided:
            prediction = prediction + guidance  # of the last full pass
        latents = schedule.latent_scale[i] * latents + schedule.noise_scale[i] * prediction
        if on_step is not None:
            on_step(i)
    return unfold_frames(latents, b)
