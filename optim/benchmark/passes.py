"""One pass over windows, from pixels to pixels, on tensors: built plainly and as the pipeline does it, and timed.

A pass is VAE encode (masked and whole faces), the guided denoising loop, and VAE decode of `windows` windows of 16
frames. Faces and voices are random, and so may the weights be; both ways share weights and inputs, so that their
results can be compared.
"""

import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from latentsync.alignment import fixed_mask
from latentsync.checkpoints.load import Models
from latentsync.sampling import Schedule, ddim_schedule, denoise, initial_noise
from latentsync.settings import SEED, WINDOW, DeepCache
from latentsync.unet import UNet, UNetConfig
from latentsync.vae import decode, encode, encode_conditioning
from latentsync.whisper import AudioEncoder, WhisperDims
from optim.benchmark.reference import PlainUNet, deepcache, denoise_window, make_pipe
from optim.hardware import nvml_index
from optim.monitor import GpuHistory, History, Monitor

if TYPE_CHECKING:  # the pipeline imports what finds faces and reads media, which is not needed here
    from latentsync.settings import Settings

TOKENS = 50  # of the sound, a frame
WATCH_RATE = 10.0  # samples of the GPU's utilization a second
WATCHED = 1.5  # seconds that a denoising is looped for at least, to see the utilization
SETTLE = 0.5  # seconds; NVML's utilization is a mean over the time before
SD_VAE = {  # stabilityai/sd-vae-ft-mse
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
}


# ---- networks


def random_models(device: torch.device, dtype: torch.dtype, resolution: int) -> Models:
    """The released architecture with random weights, always the same on one kind of device."""
    torch.manual_seed(0)
    with device:
        unet, vae = UNet(UNetConfig()), AutoencoderKL.from_config(SD_VAE)
        encoder = AudioEncoder(WhisperDims())
    for module in (unet, vae):
        nn.Module.to(module.eval().requires_grad_(False), dtype)
    models = Models("random weights", resolution, unet, encoder.eval().requires_grad_(False), vae)
    free_memory()  # of the float32 weights
    return models


def set_layout(models: Models, layout: torch.memory_format) -> None:
    """Lay the convolutions' weights out as NCHW (torch.contiguous_format) or channels-last."""
    for module in (models.unet, models.vae):
        nn.Module.to(module, memory_format=layout)


def released_words(config: UNetConfig) -> dict:
    """A configuration in the words of the released files, which `PlainUNet` takes."""
    cross = ["CrossAttn" if here else "" for here in config.cross_attention]
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": [f"{kind}DownBlock3D" for kind in cross],
        "up_block_types": [f"{kind}UpBlock3D" for kind in reversed(cross)],
        "layers_per_block": config.layers_per_block,
        "attention_head_dim": config.heads,
        "cross_attention_dim": config.cross_attention_dim,
        "norm_num_groups": config.norm_num_groups,
        "use_motion_module": any(config.temporal),
        "motion_module_resolutions": [2**i for i, here in enumerate(config.temporal) if here],
        "motion_module_kwargs": {
            "num_attention_heads": config.temporal_heads,
            "attention_block_types": ["Temporal_Self"] * config.temporal_layers,
            "temporal_position_encoding_max_len": config.temporal_max_len,
        },
    }


# ---- inputs and stages


@dataclass(frozen=True)
class Inputs:
    """Faces and voices of b windows.

    pixels: (16·b, 3, R, R) in [−1, 1]; audio: (b, 16, 50, d); mask: (R, R); noise: (1, c, 1, h, w).
    """

    pixels: Tensor
    audio: Tensor
    mask: Tensor
    noise: Tensor


def make_inputs(models: Models, windows: int = 1) -> Inputs:
    """Random inputs; window i is the same however many there are, and on every device."""
    resolution, width = models.resolution, models.unet.config.cross_attention_dim
    pixels, audio = [], []
    for i in range(windows):
        random = torch.Generator().manual_seed(i)
        pixels.append(torch.rand(WINDOW, 3, resolution, resolution, generator=random) * 2 - 1)
        audio.append(torch.randn(1, WINDOW, TOKENS, width, generator=random))
    like = {"device": models.device, "dtype": models.dtype}
    vae = models.vae.config
    side = resolution // 2 ** (len(vae.block_out_channels) - 1)
    return Inputs(
        torch.cat(pixels).to(**like),
        torch.cat(audio).to(**like),
        torch.from_numpy(fixed_mask(resolution).copy()).to(**like),
        initial_noise(SEED, vae.latent_channels, side, side, models.device, models.dtype),
    )


@dataclass(frozen=True)
class Stages:
    """What one pass does, each with what the one before returns.

    encode: () → (16·b, 1 + 2c, h, w); denoise: that → latents (b, c, 16, h, w); decode: those → pixels
    (16·b, 3, R, R).
    """

    windows: int
    encode: Callable[[], Tensor]
    denoise: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]

    def run(self) -> Tensor:
        return self.decode(self.denoise(self.encode()))


@contextmanager
def plain_stages(models: Models, steps: int, guidance: float, cache: DeepCache | None) -> Iterator[Stages]:
    """One window the reference's way: the network and loop of `reference`, NCHW, eager, diffusers' autoencoder.

    The models must be laid out as NCHW and not be accelerated; the plain network shares their weights.
    """
    with torch.device("meta"):
        plain = PlainUNet(released_words(models.unet.config))
    plain.load_state_dict(models.unet.state_dict(), assign=True)
    pipe = make_pipe(plain.eval().requires_grad_(False))
    given = make_inputs(models)

    def denoised(conditions: Tensor) -> Tensor:
        conditions = conditions.transpose(0, 1)[None].contiguous()
        return denoise_window(pipe, given.noise, conditions, given.audio, steps, guidance)

    with deepcache(pipe, cache.interval, cache.branch) if cache else nullcontext():
        yield Stages(
            1,
            lambda: encode_conditioning(models.vae, given.pixels, given.mask),
            denoised,
            lambda latents: decode(models.vae, latents[0].transpose(0, 1).contiguous()),
        )


def our_stages(models: Models, settings: "Settings", windows: int | None = None) -> Stages:
    """`settings.windows_per_pass` windows as `latentsync.pipeline.Painter` does them; windows: another number."""
    b = windows or settings.windows_per_pass
    given, schedule = make_inputs(models, b), ddim_schedule(settings.steps)
    pixels = given.pixels.contiguous(memory_format=torch.channels_last)

    def encoded() -> Tensor:
        parts = pixels.split(settings.frames_per_pass)
        return torch.cat([encode_conditioning(models.vae, some, given.mask) for some in parts])

    def denoised(conditions: Tensor) -> Tensor:
        conditions = conditions.unflatten(0, (b, WINDOW)).transpose(1, 2)
        return denoise(
            models.unet, given.noise, conditions, given.audio, schedule, settings.guidance_scale, settings.cache
        )

    def decoded(latents: Tensor) -> Tensor:
        parts = latents.transpose(1, 2).flatten(0, 1).split(settings.frames_per_pass)
        return torch.cat([decode(models.vae, some) for some in parts])

    return Stages(b, encoded, denoised, decoded)


# ---- time


@dataclass(frozen=True)
class Timing:
    """Median seconds of the stages of a pass, the mean GPU utilization while denoising, and the last pass's pixels."""

    encode: float
    denoise: float
    decode: float
    utilization: float | None  # percent; None where it cannot be read
    pixels: Tensor

    @property
    def seconds(self) -> float:
        return self.encode + self.denoise + self.decode


def clock(device: torch.device) -> float:
    """Seconds, after everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def time_stages(stages: Stages, device: torch.device, repeats: int = 3) -> Timing:
    """Run the pass once to warm up and `repeats` times for the clock."""
    runs, spans = [], []
    with Watch(device) as watch:
        for repeat in range(repeats + 1):
            at = [clock(device)]
            given = stages.encode()
            at.append(clock(device))
            began = time.monotonic()
            latents = stages.denoise(given)
            at.append(clock(device))
            spans.append((began, time.monotonic()))
            pixels = stages.decode(latents)
            at.append(clock(device))
            if repeat:
                runs.append([end - begin for begin, end in zip(at, at[1:], strict=False)])
        spans = spans[1:]
        if device.type == "cuda" and max(end - begin for begin, end in spans) < WATCHED:
            began = time.monotonic()
            while time.monotonic() - began < WATCHED:
                stages.denoise(given)
                clock(device)
            spans.append((began, time.monotonic()))
    span = max(spans, key=lambda span: span[1] - span[0])
    return Timing(*(statistics.median(column) for column in zip(*runs, strict=True)), watch.utilization(*span), pixels)


class Watch:
    """Follows a GPU's utilization for the length of a `with` block; on another device it does nothing."""

    def __init__(self, device: torch.device, seconds: float = 600.0) -> None:
        self.device, self.began = device, time.monotonic()
        self.monitor = Monitor(WATCH_RATE, seconds) if device.type == "cuda" else None

    def __enter__(self) -> "Watch":
        if self.monitor:
            self.monitor.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.monitor:
            self.monitor.stop()

    def utilization(self, begin: float, end: float) -> float | None:
        """Mean percent between two times of time.monotonic(); None where no sample falls between them."""
        if self.monitor is None:
            return None
        history = self.monitor.snapshot()
        return mean_utilization(history, history.gpu(nvml_index(self.device)), begin - self.began, end - self.began)


def mean_utilization(history: History, gpu: GpuHistory | None, begin: float, end: float) -> float | None:
    """Mean percent of the samples between `begin` + SETTLE and `end`, seconds of the history; gaps do not count."""
    if gpu is None:
        return None
    samples = gpu.utilization[(history.time >= begin + SETTLE) & (history.time <= end)]
    samples = samples[~np.isnan(samples)]
    return float(samples.mean()) if len(samples) else None


def peak_memory(device: torch.device) -> tuple[float, float] | tuple[None, None]:
    """The most that was allocated and reserved since `reset_memory`, GB; None for the CPU."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(device) / 1e9, torch.cuda.max_memory_reserved(device) / 1e9


def free_memory() -> None:
    """Give back to the GPU what nothing holds any more; nothing without one."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def reset_memory(device: torch.device) -> None:
    free_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def relative_error(a: Tensor, b: Tensor) -> float:
    """|a − b| / |b| of two windows' pixels."""
    a, b = a.cpu().double(), b.cpu().double()
    return float((a - b).norm() / b.norm())


# ---- work


def matrix_throughput(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large square matrix product of random numbers: what the device can do at most, as measured."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(15):
        began = clock(device)
        a @ b
        seconds.append(clock(device) - began)
    return 2 * side**3 / statistics.median(seconds[5:])


def window_work(
    models: Models, resolution: int, steps: int, guidance: float, cache: DeepCache | None, plain: bool = False
) -> float:
    """FLOP of the products, convolutions and attention that one window from pixels to pixels is made of.

    Only what is computed: shallow passes of DeepCache, and guidance's halves together where they are the same
    (plain: apart, as in the reference). Counted on the networks as they are written, not as kernels fuse them.
    """
    config, vae = models.unet.config, json.dumps(dict(models.vae.config), sort_keys=True, default=str)
    around, keys = _work_around(config, vae, resolution)
    twice = 2 if plain and guidance > 1 else 1
    full = _work_of_steps(config, vae, resolution, guidance, None, plain, 1)
    total = around + keys * twice + steps * (full - keys * twice)
    if cache and cache.interval > 1:
        # The interval does not matter to the two steps that are counted, and is left out so that they are shared.
        shallow = _work_of_steps(config, vae, resolution, guidance, replace(cache, interval=2), plain, 2) - full
        total -= (steps - math.ceil(steps / cache.interval)) * (full - keys * twice - shallow)
    return total


@lru_cache(maxsize=1)
def _meta(config: UNetConfig, vae_config: str) -> tuple[UNet, AutoencoderKL]:
    with torch.device("meta"):
        return UNet(config), AutoencoderKL.from_config(json.loads(vae_config))


@torch.inference_mode()
def _count(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


@lru_cache
def _work_around(config: UNetConfig, vae_config: str, resolution: int) -> tuple[float, float]:
    """FLOP of one window's encodes and decode, and of its audio's keys and values."""
    unet, vae = _meta(config, vae_config)
    side = resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    pixels = torch.empty(WINDOW, 3, resolution, resolution, device="meta")
    latents = torch.empty(WINDOW, vae.config.latent_channels, side, side, device="meta")
    audio = torch.empty(1, WINDOW, TOKENS, config.cross_attention_dim, device="meta")
    around = 2 * _count(lambda: encode(vae, pixels)) + _count(lambda: decode(vae, latents))
    return around, _count(lambda: unet.encode_audio(audio))


@lru_cache
def _work_of_steps(
    config: UNetConfig, vae_config: str, resolution: int, guidance: float, cache: DeepCache | None, plain: bool, n: int
) -> float:
    """FLOP of the first n denoising steps of one window, and of its audio's keys and values."""
    unet, vae = _meta(config, vae_config)
    channels, side = vae.config.latent_channels, resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    windows = 1
    if plain and guidance > 1:  # the same work as two windows without guidance: nothing is shared
        windows, guidance = 2, 1.0
    noise = torch.empty(1, channels, 1, side, side, device="meta")
    given = torch.empty(windows, config.in_channels - channels, WINDOW, side, side, device="meta")
    audio = torch.empty(windows, WINDOW, TOKENS, config.cross_attention_dim, device="meta")
    schedule = ddim_schedule(2)
    some = Schedule(*(numbers[:n] for numbers in (schedule.timesteps, schedule.latent_scale, schedule.noise_scale)))
    return _count(lambda: denoise(unet, noise, given, audio, some, guidance, cache))
