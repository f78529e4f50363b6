"""torch.compile for the full and the shallow pass of the U-Net.

Compiling takes minutes and saves about a tenth of a pass on a processor; on a GPU the fused kernels with CUDA graphs
are faster still (docs/speed.md). Therefore a level compiles only for long jobs, and only without fused kernels;
`--compile` compiles for any job. Artifacts stay in the user's cache folder, which makes a later start shorter.
"""

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import torch

from latentsync.checkpoints.load import Models
from latentsync.checkpoints.releases import home
from latentsync.machine import usable_cores
from latentsync.sampling import ddim_schedule, denoise
from latentsync.settings import WINDOW, Settings
from latentsync.unet import UNet
from optim.swap import has_swapped, restore_methods, swap_methods
from optim.trial import disagreement, one_line

# Frames from which a level compiles: 200 s of compiling (demo model, two cores of an AMD EPYC, 2026-11-24) are won
# back three times over at half a second a frame, of which a tenth is saved.
LONG_JOB = 15_000
TOKENS = 50  # audio tokens per frame
MAX_COMPILE_THREADS = 32  # inductor's own limit


def configure_compilers() -> None:
    """Set the cache folders of inductor and Triton and inductor's threads, as far as the user has not set them.

    Must be called before anything is compiled, Triton's kernels included: inductor reads these variables when it is
    imported. By itself it starts a worker for every core of the machine, too many in a container that may use fewer.
    """
    folder = home() / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(usable_cores(), MAX_COMPILE_THREADS)))


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


def compile_unet(models: Models, settings: Settings, on_message: Callable[[str], None]) -> bool:
    """Compile the full and the shallow pass for the full windows of a job, in place; returns whether that worked.

    Passes of any other shape run eager: nothing is compiled in the middle of a job. The compiled passes must agree with
    the eager ones; after any failure the network stays eager, and `on_message` gets one line with the reason.
    """
    unet = models.unet
    problem = missing_compiler(models.device.type)
    if not problem:
        expected = _denoise_random(models, settings)
        full, shallow = (torch.compile(run, dynamic=False, fullgraph=True) for run in (unet.full, unet.shallow))
        swap_methods(unet, full=full, shallow=shallow)
        try:
            _denoise_random(models, settings)  # compiles
            swap_methods(unet, full=_without_recompiling(full), shallow=_without_recompiling(shallow))
            problem = disagreement(_denoise_random(models, settings), expected, models.dtype)
        except Exception as error:  # Python's headers are missing, the GPU is unknown, the disk is full, ...
            problem = one_line(error)
    if problem:
        restore_eager(unet)
        on_message(f"torch.compile is off: {problem}; the network runs eager instead.")
    return not problem


def is_compiled(unet: UNet) -> bool:
    return has_swapped(unet, "full")


def restore_eager(unet: UNet) -> None:
    """Undo `compile_unet`."""
    restore_methods(unet, "full", "shallow")


def missing_compiler(device: str) -> str:
    """What inductor lacks to compile for "cpu" or "cuda", as a phrase; empty where nothing is known to be missing."""
    if device == "cuda":
        return "" if find_spec("triton") else "Triton is not installed"
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    name = os.environ.get("CXX", default)
    return "" if shutil.which(name) or shutil.which(name.split()[0]) else f"there is no C++ compiler '{name}'"


def _without_recompiling(run: Callable) -> Callable:
    """The compiled pass, which runs eager for shapes that it was not compiled for."""

    def guarded(*arguments: Any) -> Any:
        with torch.compiler.set_stance("eager_on_recompile"):
            return run(*arguments)

    return guarded


@torch.inference_mode()
def _denoise_random(models: Models, settings: Settings) -> torch.Tensor:
    """One full pass and the shallow ones that follow it, on fixed random inputs of a job's shape."""
    config, windows, cache = models.unet.config, settings.windows_per_pass, settings.cache
    side = models.resolution // models.vae.config.downscaling
    random = torch.Generator().manual_seed(0)
    noise, condition, audio = (
        torch.randn(shape, generator=random).to(models.device, models.dtype)
        for shape in (
            (1, config.out_channels, 1, side, side),
            (windows, config.in_channels - config.out_channels, WINDOW, side, side),
            (windows, WINDOW, TOKENS, config.cross_attention_dim),
        )
    )
    schedule = ddim_schedule(cache.interval if cache else 1)
    return denoise(models.unet, noise, condition, audio, schedule, settings.guidance_scale, cache).float()
