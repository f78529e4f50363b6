"""Floating-point operations: what a window needs, and how many a second the device can do."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from latentsync.autoencoder import Autoencoder, AutoencoderConfig
from latentsync.checkpoints.load import Models
from latentsync.sampling import Schedule, ddim_schedule, denoise
from latentsync.settings import WINDOW, DeepCache, Settings
from latentsync.unet import UNet, UNetConfig
from latentsync.vae import decode, encode

TOKENS = 50  # audio tokens per frame


def synchronized_time(device: torch.device) -> float:
    """Seconds on a clock, read when everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matrix_throughput(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large square matrix product of random numbers: the maximum of the device, as measured."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(15):
        start = synchronized_time(device)
        a @ b
        seconds.append(synchronized_time(device) - start)
    return 2 * side**3 / statistics.median(seconds[5:])


def window_flops(models: Models, settings: Settings, reference: bool = False) -> float:
    """FLOP of the products, convolutions and attention of one window from pixels to pixels.

    Only what is computed counts: shallow passes of DeepCache, and what cond and uncond share once (reference: twice, as
    it shares nothing). Counted on the networks as they are written, not as kernels fuse them.
    """
    guidance, cache, resolution = settings.guidance_scale, settings.cache, models.resolution
    config, vae_config = models.unet.config, models.vae.config
    autoencoder = _autoencoder_flops(config, vae_config, resolution)
    audio = audio_flops(config, vae_config) * (2 if reference and guidance > 1 else 1)
    full = _steps_flops(config, vae_config, resolution, guidance, None, reference, 1) - audio
    total = autoencoder + audio + settings.steps * full
    if cache and cache.interval > 1:
        # The interval does not matter for the two steps that are counted: a fixed one lets levels share the result.
        cache_of_two = replace(cache, interval=2)
        shallow = _steps_flops(config, vae_config, resolution, guidance, cache_of_two, reference, 2) - audio - full
        shallow_steps = settings.steps - math.ceil(settings.steps / cache.interval)
        total -= shallow_steps * (full - shallow)
    return total


@lru_cache(maxsize=1)
def _meta_networks(config: UNetConfig, vae_config: AutoencoderConfig) -> tuple[UNet, Autoencoder]:
    with torch.device("meta"):
        return UNet(config), Autoencoder(vae_config)


@torch.inference_mode()
def _count(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


@lru_cache
def _autoencoder_flops(config: UNetConfig, vae_config: AutoencoderConfig, resolution: int) -> float:
    """FLOP of one window's two encodes and one decode."""
    _, vae = _meta_networks(config, vae_config)
    side = resolution // vae_config.downscaling
    pixels = torch.empty(WINDOW, 3, resolution, resolution, device="meta")
    latents = torch.empty(WINDOW, vae_config.latent_channels, side, side, device="meta")
    return 2 * _count(lambda: encode(vae, pixels)) + _count(lambda: decode(vae, latents))


@lru_cache
def audio_flops(config: UNetConfig, vae_config: AutoencoderConfig) -> float:
    """FLOP of the keys and values of one window's audio."""
    unet, _ = _meta_networks(config, vae_config)
    audio = torch.empty(1, WINDOW, TOKENS, config.cross_attention_dim, device="meta")
    return _count(lambda: unet.encode_audio(audio))


@lru_cache
def _steps_flops(
    config: UNetConfig,
    vae_config: AutoencoderConfig,
    resolution: int,
    guidance: float,
    cache: DeepCache | None,
    reference: bool,
    steps: int,
) -> float:
    """FLOP of the first denoising steps of one window, and of its audio's keys and values."""
    unet, _ = _meta_networks(config, vae_config)
    channels, side = vae_config.latent_channels, resolution // vae_config.downscaling
    windows = 1
    if reference and guidance > 1:  # as much as two windows without guidance: cond and uncond share nothing
        windows, guidance = 2, 1.0
    noise = torch.empty(1, channels, 1, side, side, device="meta")
    conditioning = torch.empty(windows, config.in_channels - channels, WINDOW, side, side, device="meta")
    audio = torch.empty(windows, WINDOW, TOKENS, config.cross_attention_dim, device="meta")
    whole = ddim_schedule(2)
    schedule = Schedule(whole.timesteps[:steps], whole.latent_scale[:steps], whole.noise_scale[:steps])
    return _count(lambda: denoise(unet, noise, conditioning, audio, schedule, guidance, cache))
