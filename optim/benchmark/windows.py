"""Windows from pixels to pixels, on tensors: as the reference and as the pipeline compute them, and timed.

One pass is the VAE encode (of masked and whole faces), the guided denoising loop, and the VAE decode of some windows of
16 frames. Faces and audio are random, and so may the weights be; both ways share weights and inputs, so that their
results can be compared.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from latentsync.alignment import fixed_mask
from latentsync.autoencoder import Autoencoder, AutoencoderConfig
from latentsync.checkpoints.load import Models
from latentsync.sampling import ddim_schedule, denoise, initial_noise
from latentsync.settings import SEED, WINDOW, Settings
from latentsync.unet import UNet, UNetConfig
from latentsync.vae import decode, encode_conditioning
from latentsync.whisper import AudioEncoder, WhisperDims
from optim.benchmark.flops import TOKENS, synchronized_time
from optim.benchmark.reference import PlainUNet, deepcache, denoise_window, make_pipe
from optim.hardware import nvml_index
from optim.monitor import GpuHistory, History, Monitor

UTILIZATION_RATE = 10.0  # samples of the GPU's utilization a second
MIN_UTILIZATION_SECONDS = 1.5  # a shorter denoising is repeated for this long, to sample the utilization
SETTLE_SECONDS = 0.5  # NVML's utilization is a mean over the time before
SD_VAE = AutoencoderConfig(  # stabilityai/sd-vae-ft-mse
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=256
)


# ---- networks


def random_models(device: torch.device, dtype: torch.dtype, resolution: int) -> Models:
    """The released architecture with random weights, the same ones every time on one kind of device."""
    torch.manual_seed(0)
    with device:
        unet, vae = UNet(UNetConfig()), Autoencoder(SD_VAE)
        encoder = AudioEncoder(WhisperDims())
    for module in (unet, vae):
        nn.Module.to(module.eval().requires_grad_(False), dtype)
    models = Models("random weights", resolution, unet, encoder.eval().requires_grad_(False), vae)
    free_memory()  # the float32 weights
    return models


def set_layout(models: Models, layout: torch.memory_format) -> None:
    """Set the memory format of the convolutions' weights: NCHW (torch.contiguous_format) or channels-last."""
    for module in (models.unet, models.vae):
        nn.Module.to(module, memory_format=layout)


def released_config(config: UNetConfig) -> dict:
    """A configuration with the names of the released files, which `PlainUNet` takes."""
    cross = ["CrossAttn" if attends else "" for attends in config.cross_attention]
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
        "motion_module_resolutions": [2**i for i, temporal in enumerate(config.temporal) if temporal],
        "motion_module_kwargs": {
            "num_attention_heads": config.temporal_heads,
            "attention_block_types": ["Temporal_Self"] * config.temporal_layers,
            "temporal_position_encoding_max_len": config.temporal_max_len,
        },
    }


# ---- inputs and stages


@dataclass(frozen=True)
class Inputs:
    """Faces and audio of b windows.

    pixels: (16·b, 3, R, R) in [−1, 1]; audio: (b, 16, 50, d); mask: (R, R); noise: (1, c, 1, h, w).
    """

    pixels: Tensor
    audio: Tensor
    mask: Tensor
    noise: Tensor


def make_inputs(models: Models, windows: int = 1) -> Inputs:
    """Random inputs; window i is the same for any number of windows and on every device."""
    resolution, width = models.resolution, models.unet.config.cross_attention_dim
    pixels, audio = [], []
    for i in range(windows):
        random = torch.Generator().manual_seed(i)
        pixels.append(torch.rand(WINDOW, 3, resolution, resolution, generator=random) * 2 - 1)
        audio.append(torch.randn(1, WINDOW, TOKENS, width, generator=random))
    like = {"device": models.device, "dtype": models.dtype}
    vae = models.vae.config
    side = resolution // vae.downscaling
    return Inputs(
        torch.cat(pixels).to(**like),
        torch.cat(audio).to(**like),
        torch.from_numpy(fixed_mask(resolution).copy()).to(**like),
        initial_noise(SEED, vae.latent_channels, side, side, models.device, models.dtype),
    )


@dataclass(frozen=True)
class Stages:
    """The stages of one pass over b windows.

    encode: () → conditioning (16·b, 1 + 2c, h, w); denoise: conditioning → latents (b, c, 16, h, w); decode: latents →
    pixels (16·b, 3, R, R).
    """

    encode: Callable[[], Tensor]
    denoise: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]

    def run(self) -> Tensor:
        return self.decode(self.denoise(self.encode()))


@contextmanager
def reference_stages(models: Models, settings: Settings) -> Iterator[Stages]:
    """One window as the reference computes it: network and loop of `reference`, NCHW, eager.

    The models must be in NCHW memory and not be accelerated; the plain network shares their weights.
    """
    with torch.device("meta"):
        plain = PlainUNet(released_config(models.unet.config))
    plain.load_state_dict(models.unet.state_dict(), assign=True)
    pipe = make_pipe(plain.eval().requires_grad_(False))
    inputs, cache = make_inputs(models), settings.cache

    def denoise_plain(conditioning: Tensor) -> Tensor:
        conditioning = conditioning.transpose(0, 1)[None].contiguous()
        return denoise_window(pipe, inputs.noise, conditioning, inputs.audio, settings.steps, settings.guidance_scale)

    with deepcache(pipe, cache.interval, cache.branch) if cache else nullcontext():
        yield Stages(
            encode=lambda: encode_conditioning(models.vae, inputs.pixels, inputs.mask),
            denoise=denoise_plain,
            decode=lambda latents: decode(models.vae, latents[0].transpose(0, 1).contiguous()),
        )


def pipeline_stages(models: Models, settings: Settings) -> Stages:
    """`settings.windows_per_pass` windows as `latentsync.painting.Painter` computes them."""
    b = settings.windows_per_pass
    inputs, schedule = make_inputs(models, b), ddim_schedule(settings.steps)
    pixels = inputs.pixels.contiguous(memory_format=torch.channels_last)

    def encode_batches() -> Tensor:
        batches = pixels.split(settings.frames_per_pass)
        return torch.cat([encode_conditioning(models.vae, batch, inputs.mask) for batch in batches])

    def denoise_windows(conditioning: Tensor) -> Tensor:
        conditioning = conditioning.unflatten(0, (b, WINDOW)).transpose(1, 2)
        guidance, cache = settings.guidance_scale, settings.cache
        return denoise(models.unet, inputs.noise, conditioning, inputs.audio, schedule, guidance, cache)

    def decode_batches(latents: Tensor) -> Tensor:
        batches = latents.transpose(1, 2).flatten(0, 1).split(settings.frames_per_pass)
        return torch.cat([decode(models.vae, batch) for batch in batches])

    return Stages(encode_batches, denoise_windows, decode_batches)


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


@torch.inference_mode()
def time_stages(stages: Stages, device: torch.device, repeats: int = 3) -> Timing:
    """Run the pass once to warm up, then `repeats` times for the clock."""
    runs, spans = [], []  # seconds of the stages; start and end of the denoising, by time.monotonic()
    with UtilizationMonitor(device) as monitor:
        for _ in range(repeats + 1):
            times = [synchronized_time(device)]
            conditioning = stages.encode()
            times.append(synchronized_time(device))
            start = time.monotonic()
            latents = stages.denoise(conditioning)
            times.append(synchronized_time(device))
            spans.append((start, time.monotonic()))
            pixels = stages.decode(latents)
            times.append(synchronized_time(device))
            runs.append(np.diff(times))
        spans = spans[1:]
        if device.type == "cuda" and max(end - start for start, end in spans) < MIN_UTILIZATION_SECONDS:
            start = time.monotonic()
            while time.monotonic() - start < MIN_UTILIZATION_SECONDS:
                stages.denoise(conditioning)
                synchronized_time(device)
            spans.append((start, time.monotonic()))
    longest = max(spans, key=lambda span: span[1] - span[0])
    encode, denoise, decode = (statistics.median(map(float, column)) for column in zip(*runs[1:], strict=True))
    return Timing(encode, denoise, decode, monitor.utilization(*longest), pixels)


class UtilizationMonitor:
    """Samples a GPU's utilization for the length of a `with` block; does nothing on another device."""

    def __init__(self, device: torch.device, seconds: float = 600.0) -> None:
        self.device, self.start = device, time.monotonic()
        self.monitor = Monitor(UTILIZATION_RATE, seconds) if device.type == "cuda" else None

    def __enter__(self) -> "UtilizationMonitor":
        if self.monitor:
            self.monitor.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.monitor:
            self.monitor.stop()

    def utilization(self, start: float, end: float) -> float | None:
        """Mean percent between two times of time.monotonic(); None without a sample between them."""
        if self.monitor is None:
            return None
        history = self.monitor.snapshot()
        return mean_utilization(history, history.gpu(nvml_index(self.device)), start - self.start, end - self.start)


def mean_utilization(history: History, gpu: GpuHistory | None, start: float, end: float) -> float | None:
    """Mean percent of the samples from `start` + SETTLE_SECONDS to `end`, seconds of the history, without gaps."""
    if gpu is None:
        return None
    samples = gpu.utilization[(history.time >= start + SETTLE_SECONDS) & (history.time <= end)]
    samples = samples[~np.isnan(samples)]
    return float(samples.mean()) if len(samples) else None


# ---- GPU memory


def peak_memory(device: torch.device) -> tuple[float, float] | tuple[None, None]:
    """The maximum allocated and reserved since `reset_memory`, GB; None for the CPU."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(device) / 1e9, torch.cuda.max_memory_reserved(device) / 1e9


def free_memory() -> None:
    """Return unused memory to the GPU; does nothing without one."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def reset_memory(device: torch.device) -> None:
    """Free unused memory, and let `peak_memory` count from here."""
    free_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
