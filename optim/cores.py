"""On a processor: windows that are denoised together take cores of their own.

Within an operation the cores of a processor wait for one another, a thousand times a pass, and where other programs run
too, for the one that was held up. Windows have nothing to wait for: the norms and the attention over frames see one
window each. So each of several windows has a thread, with its share of the cores; a window alone has them all.
"""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from queue import SimpleQueue
from threading import Barrier, Event

import torch
from torch import Tensor

from latentsync.sampling import Schedule, denoise
from latentsync.settings import GUIDANCE_SCALE, DeepCache
from latentsync.unet import UNet

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


class Stopped(Exception):
    """For a window's thread: the run it belongs to is over."""


def denoise_side_by_side(
    unet: UNet,
    noise: Tensor,
    condition: Tensor,
    audio: Tensor,
    schedule: Schedule,
    guidance_scale: float = GUIDANCE_SCALE,
    cache: DeepCache | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """`latentsync.sampling.denoise` with a thread for each of b windows, from its first step to its last.

    on_step(i) is called in the caller's thread when all windows have taken step i. What it raises, and what goes wrong
    in any window, ends all of them within a step.
    """
    b = len(condition)
    if b == 1:
        return denoise(unet, noise, condition, audio, schedule, guidance_scale, cache, on_step)
    taken: SimpleQueue[int | None] = SimpleQueue()  # steps, as each window has taken them; None when it has ended
    over = Event()

    def one(window: int) -> Tensor | None:
        def step_taken(i: int) -> None:
            if over.is_set():
                raise Stopped
            taken.put(i)

        only = slice(window, window + 1)
        try:
            return denoise(unet, noise, condition[only], audio[only], schedule, guidance_scale, cache, step_taken)
        except Stopped:
            return None
        except BaseException:
            over.set()
            raise
        finally:
            taken.put(None)

    pool = workers(b, max(1, torch.get_num_threads() // b))
    windows = [pool.submit(one, window) for window in range(b)]
    reached: Counter[int | None] = Counter()  # by how many windows
    try:
        while reached[None] < b:
            step = taken.get()
            reached[step] += 1
            if on_step is not None and step is not None and reached[step] == b:
                on_step(step)
    finally:
        over.set()
        wait(windows)
    return torch.cat([window.result() for window in windows])
