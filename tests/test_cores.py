"""Windows side by side on the cores of a processor: the same results, and threads that do not spread."""

from collections import Counter
from collections.abc import Callable
from threading import Event, Thread, current_thread
from time import sleep

import pytest
import torch
from tiny import UNET

from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import load_models
from latentsync.sampling import ddim_schedule, denoise
from latentsync.settings import WINDOW, DeepCache, Settings
from latentsync.unet import UNet, UNetConfig
from optim.accelerate import accelerate, plan_as_asked
from optim.cores import denoise_side_by_side, windows_for

CPU = torch.device("cpu")
STEPS = 4


@pytest.fixture
def three_threads():
    """More than this machine may have cores; nothing here is about speed."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(UNetConfig.from_dict(UNET)).eval().requires_grad_(False)


def denoised(
    way: Callable, unet: UNet, windows: int, frames: int = WINDOW, steps: int = STEPS, **settings: object
) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 1, 8, 8, generator=random)
    given = torch.randn(windows, 9, frames, 8, 8, generator=random)
    audio = torch.randn(windows, frames, 50, UNET["cross_attention_dim"], generator=random)
    return way(unet, noise, given, audio, ddim_schedule(steps), **settings)


@pytest.mark.parametrize("cores, windows", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (6, 3), (7, 3), (8, 4), (64, 4)])
def test_few_cores_are_left_idle(cores, windows):
    assert windows_for(cores) == windows


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("cache", [None, DeepCache(2, 0), DeepCache(2, 1), DeepCache(3, 0, guided=False)])
@pytest.mark.parametrize("windows, frames", [(1, 4), (2, 4), (3, 5)])
def test_windows_side_by_side_become_what_they_become_together(unet, three_threads, windows, frames, cache, guidance):
    settings = {"guidance_scale": guidance, "cache": cache}
    wanted = denoised(denoise, unet, windows, frames, **settings)
    found = denoised(denoise_side_by_side, unet, windows, frames, **settings)
    assert found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-4)
    assert windows == 1 or not torch.allclose(found[0], found[1], atol=1e-2), "each has sound of its own"


def test_each_window_is_computed_by_a_thread_with_its_share_of_the_cores(unet, three_threads, monkeypatch):
    seen, full = [], UNet.full

    def watched(self, x, *rest):
        seen.append((len(x), torch.get_num_threads(), torch.is_inference_mode_enabled(), current_thread().name))
        return full(self, x, *rest)

    monkeypatch.setattr(UNet, "full", watched)
    denoised(denoise_side_by_side, unet, 3)
    assert {(frames, cores, inference) for frames, cores, inference, _ in seen} == {(WINDOW, 1, True)}
    assert sorted(Counter(name for *_, name in seen).values()) == [STEPS] * 3
    seen.clear()
    denoised(denoise_side_by_side, unet, 1)
    assert seen == [(WINDOW, 3, True, current_thread().name)] * STEPS, "a window alone has all cores"
    later = []
    thread = Thread(target=lambda: later.append((torch.ones(9).sum(), torch.get_num_threads())[1]))
    thread.start()
    thread.join()
    assert later == [3] and torch.get_num_threads() == 3, "the rest of the program keeps its cores"


def late_window(monkeypatch, act, before_second=lambda: None) -> Counter:
    """Let `act` be called before every pass but those of the first thread to begin; returns passes by thread.

    before_second: called in the first thread, before its second pass.
    """
    passes, full = Counter(), UNet.full

    def watched(self, *rest):
        thread = current_thread().name
        if passes and thread != next(iter(passes)):
            act()
        elif passes[thread] == 1:
            before_second()
        passes[thread] += 1
        return full(self, *rest)

    monkeypatch.setattr(UNet, "full", watched)
    return passes


def test_a_step_is_taken_when_the_last_window_has_taken_it(unet, three_threads, monkeypatch):
    passes = late_window(monkeypatch, lambda: sleep(0.05))
    told = []

    def step(i):
        told.append((i, current_thread(), min(passes.values()) > i and len(passes) == 2))

    denoised(denoise_side_by_side, unet, 2, on_step=step)
    assert told == [(i, current_thread(), True) for i in range(STEPS)]


def test_what_a_step_raises_ends_every_window(unet, three_threads, monkeypatch):
    passes = late_window(monkeypatch, lambda: sleep(0.05))

    def cancelled(i):
        raise KeyboardInterrupt

    steps = 400  # of which the late window would take 20 s
    with pytest.raises(KeyboardInterrupt):
        denoised(denoise_side_by_side, unet, 2, steps=steps, on_step=cancelled)
    done = dict(passes)
    assert min(done.values()) < steps
    sleep(0.2)
    assert passes == done, "no thread computes on"


def test_a_failure_in_one_window_is_the_callers_and_ends_the_others(unet, three_threads, monkeypatch):
    failed = Event()

    def fail():
        failed.set()
        raise torch.OutOfMemoryError("no room")

    passes = late_window(monkeypatch, fail, lambda: failed.wait(60))
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        denoised(denoise_side_by_side, unet, 3, steps=400)
    assert sum(passes.values()) < 400


def test_a_plan_for_a_processor_has_windows_side_by_side(checkpoint, three_threads):
    models, said = load_models(resolve_model(str(checkpoint), CPU), CPU, torch.float32), []
    plan = plan_as_asked(CPU, models.resolution, Settings(), "aggressive")
    assert plan.settings.windows_per_pass == 3
    # A job that is long enough to be compiled for is not: side by side gains more.
    accelerate(models, plan, said.append, frames=10**6)
    assert models.denoise is denoise_side_by_side
    assert "3 windows side by side" in said[-1] and "compiled" not in said[-1]


def test_large_pictures_are_not_computed_side_by_side_where_memory_is_short(three_threads, monkeypatch):
    monkeypatch.setattr("optim.accelerate.total_memory", lambda: 8 * 2**30)
    assert [plan_as_asked(CPU, side, Settings()).settings.windows_per_pass for side in (128, 256, 512)] == [3, 1, 1]
