"""On a processor: windows that go through the U-Net together take cores of their own.

Within an operation the cores of a processor wait for one another, a thousand times a pass, and where other programs run
too, for the one that was held up. Windows have nothing to wait for: the norms and the attention over frames see one
window each. So each of several windows has a thread, with its share of the cores; a window alone has them all.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier

import torch
from torch import Tensor

from latentsync.unet import Context, UNet
from optim.directed import DirectedUNet, Run

MOST_WINDOWS = 4  # more save little, and the first finished frames of a run would come late


def windows_for(cores: int) -> int:
    """Windows at a time, 2 to MOST_WINDOWS, for a number of cores: those that leave the fewest idle; 1 for one core."""
    possible = range(min(cores, 2), min(cores, MOST_WINDOWS) + 1)
    return max(possible, key=lambda windows: (windows * (cores // windows), windows))


@lru_cache
def workers(count: int, cores: int) -> ThreadPoolExecutor:
    """Threads that compute with so many cores each; they stay."""
    before, ready = torch.get_num_threads(), Barrier(count + 1)

    def settle() -> None:
        torch.get_num_threads()  # a thread takes the number for all when it first asks
        torch.set_num_threads(cores)  # of this thread, but also what later ones begin with
        ready.wait()

    pool = ThreadPoolExecutor(count, "window", settle)
    for _ in range(count):
        pool.submit(lambda: None)
    ready.wait()
    torch.set_num_threads(before)
    return pool


class SpreadUNet(DirectedUNet):
    def direct(
        self,
        run: Run,
        kind: tuple,
        x: Tensor,
        timestep: Tensor,
        context: Context,
        frames: int,
        cached: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        return spread(run, x, timestep, context, frames, cached)


def spread(
    run: Run,
    x: Tensor,
    timestep: Tensor,
    context: Context,
    frames: int,
    cached: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """What `run` makes of each window of x (b·frames, …), put together again as of all.

    Its results, and cached, may be of 2·b·frames: all windows without audio, then all with it.
    """
    b = len(x) // frames
    if b == 1:
        return run(x, timestep, context, cached)
    inference = torch.is_inference_mode_enabled()

    def one(window: int) -> tuple[Tensor, Tensor | None]:
        at = slice(window * frames, (window + 1) * frames)
        known = None if cached is None else torch.cat([half[at] for half in cached.split(b * frames)])
        heard = [(k[at], v[at]) for k, v in context]
        with torch.inference_mode(inference):
            return run(x[at], timestep if len(timestep) == 1 else timestep[window : window + 1], heard, known)

    parts = workers(b, max(1, torch.get_num_threads() // b)).map(one, range(b))

    def whole(parts: tuple[Tensor | None, ...]) -> Tensor | None:
        if parts[0] is None:
            return None
        return torch.cat([part for halves in zip(*(p.split(frames) for p in parts), strict=True) for part in halves])

    return tuple(whole(results) for results in zip(*parts, strict=True))


def spread_windows(unet: UNet) -> UNet:
    """Let the windows of a pass be computed side by side. Returns the same network."""
    if type(unet) is UNet:
        unet.__class__ = SpreadUNet
    return unet


def gather_windows(unet: UNet) -> UNet:
    """Take back what `spread_windows` did."""
    if type(unet) is SpreadUNet:
        unet.__class__ = UNet
    return unet
