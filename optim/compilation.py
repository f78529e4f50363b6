"""torch.compile for the two passes of the U-Net.

Compiling takes minutes and saves about a tenth of a pass on a processor; on a GPU the fused kernels with CUDA graphs
are faster still (docs/speed.md). So a level compiles only long jobs, and only where nothing faster runs; `--compile`
compiles whatever the job. Artifacts stay in the user's cache folder, which makes a later start shorter.
"""

import os
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from latentsync.checkpoints.load import Models
from latentsync.checkpoints.releases import home
from latentsync.sampling import ddim_schedule, denoise
from latentsync.settings import WINDOW, Settings
from latentsync.unet import UNet
from optim.fused import CHECK_ERROR, in_a_line

# Frames from which a level compiles: 200 s of compiling (demo model, two cores of an AMD EPYC, 2026-11-24) are won
# back three times over at half a second a frame, of which a tenth is saved.
LONG_JOB = 15_000
TOKENS = 50  # of the sound, a frame


def use_cache_folder() -> None:
    """Have inductor and Triton keep their artifacts in our folder, unless the user has set another.

    To be called before anything is compiled: Triton's kernels, too, are compiled where these variables point then.
    """
    folder = home() / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def compile_unet(models: Models, settings: Settings, say: Callable[[str], None]) -> bool:
    """Compile the full and the shallow pass for the full windows of a run, in place; returns whether that worked.

    Passes of any other shape run eager: nothing is compiled in the middle of a run. The compiled passes must agree with
    the eager ones; whatever goes wrong, the network stays eager, and `say` gets one line with the reason.
    """
    unet = models.unet
    if problem := missing_compiler(models.device.type):
        say(f"torch.compile is off: {problem}; the network runs eager instead.")
        return False
    expected = _denoise_random(models, settings)
    unet.full, unet.shallow = (torch.compile(run, dynamic=False, fullgraph=True) for run in (unet.full, unet.shallow))
    try:
        _denoise_random(models, settings)  # compiles
        unet.full, unet.shallow = _eager_if_new(unet.full), _eager_if_new(unet.shallow)
        error = float((_denoise_random(models, settings) - expected).norm() / expected.norm())
        bound = CHECK_ERROR[models.dtype]
        problem = "" if error <= bound else f"its result is off by {error:.1e} (at most {bound:.0e})"
    except Exception as failure:  # no headers of Python, an unknown GPU, a full disk, ...
        problem = in_a_line(failure)
    if problem:
        restore(unet)
        say(f"torch.compile is off: {problem}; the network runs eager instead.")
    return not problem


def is_compiled(unet: UNet) -> bool:
    return "full" in vars(unet)


def restore(unet: UNet) -> None:
    """Undo `compile_unet`."""
    for name in ("full", "shallow"):
        vars(unet).pop(name, None)


def missing_compiler(device: str) -> str | None:
    """What inductor lacks to compile for "cpu" or "cuda", in words; None where nothing is known to be missing."""
    if device == "cuda":
        return None if find_spec("triton") else "Triton is not installed"
    usual = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    name = os.environ.get("CXX", usual)
    return None if shutil.which(name) or shutil.which(name.split()[0]) else f"there is no C++ compiler '{name}'"


def _eager_if_new(run: Callable) -> Callable:
    def guarded(*arguments: Any) -> Any:
        with torch.compiler.set_stance("eager_on_recompile"):
            return run(*arguments)

    return guarded


@torch.inference_mode()
def _denoise_random(models: Models, settings: Settings) -> torch.Tensor:
    """One full pass and the shallow ones that follow it, on fixed random inputs of a run's shape."""
    config, windows, cache = models.unet.config, settings.windows_per_pass, settings.cache
    side = models.resolution // 2 ** (len(models.vae.config.block_out_channels) - 1)
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
