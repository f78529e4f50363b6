"""Windows side by side on the cores of a processor: the same results, and threads that do not spread."""

from threading import Thread

import pytest
import torch
from tiny import UNET

from latentsync.checkpoints import load_models, resolve
from latentsync.pipeline import Settings
from latentsync.sampling import WINDOW, DeepCache, ddim_schedule, denoise
from latentsync.unet import UNet, UNetConfig
from optim.accelerate import accelerate, plan_as_asked
from optim.cores import SpreadUNet, gather_windows, spread_windows, windows_for

CPU = torch.device("cpu")


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


def denoised(unet: UNet, windows: int, frames: int = WINDOW, **settings: object) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 1, 8, 8, generator=random)
    given = torch.randn(windows, 9, frames, 8, 8, generator=random)
    audio = torch.randn(windows, frames, 50, UNET["cross_attention_dim"], generator=random)
    return denoise(unet, noise, given, audio, ddim_schedule(4), **settings)


@pytest.mark.parametrize("cores, windows", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (6, 3), (7, 3), (8, 4), (64, 4)])
def test_few_cores_are_left_idle(cores, windows):
    assert windows_for(cores) == windows


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("cache", [None, DeepCache(2, 0), DeepCache(2, 1), DeepCache(3, 0, guided=False)])
@pytest.mark.parametrize("windows, frames", [(1, 4), (2, 4), (3, 5)])
def test_windows_side_by_side_become_what_they_become_together(unet, three_threads, windows, frames, cache, guidance):
    settings = {"guidance_scale": guidance, "cache": cache}
    wanted = denoised(unet, windows, frames, **settings)
    assert type(spread_windows(unet)) is SpreadUNet
    try:
        found = denoised(unet, windows, frames, **settings)
    finally:
        assert type(gather_windows(unet)) is UNet
    assert found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-4)
    assert windows == 1 or not torch.allclose(found[0], found[1], atol=1e-2), "each has sound of its own"


def test_each_window_is_computed_by_a_thread_with_its_share_of_the_cores(unet, three_threads, monkeypatch):
    seen, full = [], UNet.full

    def watched(self, x, *rest):
        seen.append((len(x), torch.get_num_threads(), torch.is_inference_mode_enabled()))
        return full(self, x, *rest)

    monkeypatch.setattr(UNet, "full", watched)
    spread_windows(unet)
    try:
        denoised(unet, 3)
        assert seen == [(WINDOW, 1, True)] * 12
        seen.clear()
        denoised(unet, 1)
        assert seen == [(WINDOW, 3, True)] * 4, "a window alone has all cores"
    finally:
        gather_windows(unet)
    later = []
    thread = Thread(target=lambda: later.append((torch.ones(9).sum(), torch.get_num_threads())[1]))
    thread.start()
    thread.join()
    assert later == [3] and torch.get_num_threads() == 3, "the rest of the program keeps its cores"


def test_a_failure_in_one_window_is_the_callers(unet, three_threads, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    spread_windows(unet)
    monkeypatch.setattr(UNet, "full", fail)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            denoised(unet, 2)
    finally:
        gather_windows(unet)


def test_a_plan_for_a_processor_spreads_windows_and_another_takes_it_back(checkpoint, three_threads):
    models, said = load_models(resolve(str(checkpoint), CPU), CPU, torch.float32), []
    plan = plan_as_asked(CPU, models.resolution, Settings(), "aggressive")
    assert plan.settings.windows_per_pass == 3
    # A job that is long enough to be compiled for is not: side by side gains more.
    accelerate(models, plan, said.append, frames=10**6)
    assert type(models.unet) is SpreadUNet and "3 windows side by side" in said[-1] and "compiled" not in said[-1]
    torch.set_num_threads(1)
    accelerate(models, plan_as_asked(CPU, models.resolution, Settings(), "aggressive"), said.append)
    assert type(models.unet) is UNet and "side by side" not in said[-1]


def test_large_pictures_are_not_computed_side_by_side_where_memory_is_short(three_threads, monkeypatch):
    class Memory:
        total = 8 * 2**30

    monkeypatch.setattr("optim.accelerate.psutil.virtual_memory", Memory)
    assert [plan_as_asked(CPU, side, Settings()).settings.windows_per_pass for side in (128, 256, 512)] == [3, 1, 1]
