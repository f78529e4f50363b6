"""Captured passes: when they are captured, what is copied into them and out of them, and that they are right."""

import pytest
import torch
from torch import Tensor

from latentsync.autoencoder import Autoencoder, AutoencoderConfig
from latentsync.sampling import ddim_schedule, denoise
from latentsync.settings import DeepCache
from latentsync.unet import Context, UNet, UNetConfig
from latentsync.vae import decode, encode_conditioning
from optim import graphs
from optim.graphs import MAX_GRAPHS, RUNS_TO_REPLACE, CapturedPass, Graphs, capture, release

pytestmark = pytest.mark.usefixtures("one_thread")

# Float32 rounds to 1e-7 and a loop multiplies that by tens; values of another pass or window are off by 1e-2 and more.
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}


class Recorded:
    """A graph of the processor: what was recorded is run again on the tensors that it was recorded with."""

    def __init__(self, run):
        self.run, self.replays = run, 0

    def replay(self) -> None:
        self.replays += 1
        self.run()


@pytest.fixture
def on_a_gpu(monkeypatch) -> list[CapturedPass]:
    """Let tensors of the processor be captured; returns the passes as they are."""
    captured = []

    def record(_: Graphs, run, x: Tensor, timestep: Tensor, context: Context, cached: Tensor | None) -> CapturedPass:
        x, timestep = x.clone(), None if timestep is None else timestep.clone()
        context = [(k.clone(), v.clone()) for k, v in context]
        cached = None if cached is None else cached.clone()
        out, kept = run(x, timestep, context, cached)

        def again() -> None:
            new, new_kept = run(x, timestep, context, cached)
            out.copy_(new)
            if kept is not None:
                kept.copy_(new_kept)

        captured.append(CapturedPass(Recorded(again), x, timestep, context, cached, out, kept))
        return captured[-1]

    monkeypatch.setattr(graphs, "_capture", record)
    monkeypatch.setattr(graphs, "can_capture", lambda x: True)
    return captured


def small_unet() -> UNet:
    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=(32, 32), cross_attention=(True, True), temporal=(True, True), heads=4,
        cross_attention_dim=24, norm_num_groups=4, temporal_heads=4,
    )  # fmt: skip
    return UNet(config).eval().requires_grad_(False).to(memory_format=torch.channels_last)


def window(frames: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (1, 4, 1, 8, 8), (1, 9, frames, 8, 8), (1, frames, 50, 24)
    return tuple(torch.randn(shape) for shape in shapes)


CACHES = [None, DeepCache(3, 0), DeepCache(2, 1), DeepCache(3, 0, guided=False)]


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_loops_over_replayed_passes_equal_eager_ones_window_after_window(on_a_gpu, cache):
    unet, windows = small_unet(), [window() for _ in range(3)]
    wanted = [denoise(unet, *each, ddim_schedule(7), 1.5, cache) for each in windows]
    capture(unet)
    for each, theirs in zip(windows, wanted, strict=True):
        assert torch.allclose(denoise(unet, *each, ddim_schedule(7), 1.5, cache), theirs, **ROUNDING)
    assert len(on_a_gpu) == (1 if cache is None else 2)
    assert sum(each.graph.replays for each in on_a_gpu) == 3 * 7 - len(on_a_gpu), "all but the first of each kind"


def test_other_shapes_are_captured_on_their_own_as_long_as_there_is_room(on_a_gpu):
    unet = small_unet()
    for frames in range(1, MAX_GRAPHS + 3):
        inputs = window(frames)
        wanted = denoise(unet, *inputs, ddim_schedule(3)) if frames == 1 else None
        capture(unet)
        ours = denoise(unet, *inputs, ddim_schedule(3))
        if wanted is not None:
            assert torch.allclose(ours, wanted, **ROUNDING)
    assert len(unet.graphs.passes) == len(on_a_gpu) == MAX_GRAPHS


def test_a_film_of_scenes_of_every_length_captures_few_graphs(on_a_gpu):
    unet, runs = small_unet(), 0
    capture(unet)
    for _ in range(3):
        for frames in range(1, 17):
            denoise(unet, *window(frames), ddim_schedule(7), 1.5, DeepCache(3, 0))
            runs += 7
    assert len(on_a_gpu) <= MAX_GRAPHS + runs / RUNS_TO_REPLACE


def test_a_shape_that_comes_to_stay_takes_the_place_of_the_graph_that_was_used_least_recently(on_a_gpu):
    unet = small_unet()
    capture(unet)
    for frames in range(1, MAX_GRAPHS + 1):
        denoise(unet, *window(frames), ddim_schedule(3))
    oldest = next(iter(unet.graphs.passes))
    denoise(unet, *window(16), ddim_schedule(RUNS_TO_REPLACE + 2))
    assert len(unet.graphs.passes) == MAX_GRAPHS and oldest not in unet.graphs.passes
    assert on_a_gpu[-1].x.shape[0] == 16 and on_a_gpu[-1].graph.replays == 2


def test_what_stays_the_same_from_step_to_step_is_copied_once(on_a_gpu, monkeypatch):
    copies = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *lists: (copies.append(1), copy(*lists)))
    unet = small_unet()
    capture(unet)
    for _ in range(2):
        denoise(unet, *window(), ddim_schedule(6))
    assert len(copies) == 2, "the context of each window, not of each step"


def test_the_tensor_for_shallow_passes_is_the_callers_own(on_a_gpu):
    unet = small_unet()
    capture(unet)
    x = torch.randn(4, 13, 8, 8).contiguous(memory_format=torch.channels_last)
    context = unet.encode_audio(torch.randn(1, 4, 50, 24))
    with torch.inference_mode():
        passes = [unet.full(x + i, torch.tensor([500]), context, 4, 0, True)[1] for i in range(3)]
        kept = passes[1].clone()
        unet.full(x + 9, torch.tensor([500]), context, 4, 0, True)
    assert torch.equal(passes[1], kept)


def test_on_the_processor_nothing_is_captured():
    unet = small_unet()
    wanted = denoise(unet, *(inputs := window()), ddim_schedule(4))
    capture(unet)
    assert "full" in vars(unet)
    assert torch.equal(denoise(unet, *inputs, ddim_schedule(4)), wanted)
    assert not unet.graphs.passes
    release(unet)
    assert not {"full", "shallow", "graphs"} & set(vars(unet))


def small_vae() -> Autoencoder:
    torch.manual_seed(0)
    vae = Autoencoder(AutoencoderConfig(block_out_channels=(32, 64), norm_num_groups=8))
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def there_and_back(vae: Autoencoder, faces: list[Tensor]) -> list[Tensor]:
    """Latents and pictures of each, looked at only when all are made: none may be overwritten by a later pass."""
    mask = torch.ones(faces[0].shape[-2:], device=faces[0].device, dtype=faces[0].dtype)
    mask[16:] = 0
    with torch.inference_mode():
        given = [encode_conditioning(vae, some, mask) for some in faces]
        return [*given, *[decode(vae, some[:, 1:5]) for some in given]]


def test_the_autoencoder_is_captured_with_the_unet_and_released_with_it(on_a_gpu):
    unet, vae = small_unet(), small_vae()
    faces = [torch.randn(count, 3, 32, 32) for count in (3, 3, 2, 3)]
    wanted, windows = there_and_back(vae, faces), window()
    latents = denoise(unet, *windows, ddim_schedule(3))
    capture(unet, vae)
    for ours, theirs in zip(there_and_back(vae, faces), wanted, strict=True):
        assert torch.allclose(ours, theirs, **ROUNDING)
    assert torch.allclose(denoise(unet, *windows, ddim_schedule(3)), latents, **ROUNDING)
    shapes = [tuple(each.x.shape) for each in on_a_gpu[:3]]
    assert shapes == [(3, 3, 32, 32), (2, 3, 32, 32), (3, 4, 16, 16)], "two faces are decoded but once"
    assert len(on_a_gpu) == len(unet.graphs.passes) == 4
    release(unet, vae)
    assert not any("full" in vars(part) or "forward" in vars(part) for part in (unet, vae.encoder, vae.decoder))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_replayed_autoencoder_equals_the_eager_one_and_never_waits_for_the_gpu():
    unet, vae = small_unet().cuda().half(), small_vae().cuda().half()
    faces = [torch.randn(8, 3, 32, 32, device="cuda", dtype=torch.float16) for _ in range(3)]
    wanted = there_and_back(vae, faces)
    capture(unet, vae)
    there_and_back(vae, faces)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = there_and_back(vae, faces)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(unet.graphs.passes) == 2
    for each, theirs in zip(ours, wanted, strict=True):
        assert torch.equal(each, theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("cache", [None, DeepCache(3, 0), DeepCache(3, 0, guided=False)], ids=str)
def test_replayed_loops_equal_eager_ones_and_never_wait_for_the_gpu(cache):
    torch.manual_seed(0)
    config = UNetConfig(block_out_channels=(64, 96), cross_attention=(True, True), temporal=(True, True), heads=4)
    unet = UNet(config).eval().requires_grad_(False).cuda().half().to(memory_format=torch.channels_last)

    def window() -> tuple[torch.Tensor, ...]:
        shapes = (1, 4, 1, 16, 16), (1, 9, 16, 16, 16), (1, 16, 50, 384)
        return tuple(torch.randn(shape, device="cuda", dtype=torch.float16) for shape in shapes)

    inputs = [window() for _ in range(3)]
    wanted = [denoise(unet, *each, ddim_schedule(8), 1.5, cache) for each in inputs]
    capture(unet)
    denoise(unet, *inputs[0], ddim_schedule(8), 1.5, cache)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = [denoise(unet, *each, ddim_schedule(8), 1.5, cache) for each in inputs]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for each, theirs in zip(ours, wanted, strict=True):
        assert float((each.float() - theirs.float()).norm() / theirs.float().norm()) < 5e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA GPU")
def test_passes_on_the_second_gpu_are_captured_there():
    unet = small_unet().to("cuda:1").half()
    inputs = [tuple(part.to("cuda:1").half() for part in window()) for _ in range(2)]
    wanted = [denoise(unet, *each, ddim_schedule(5)) for each in inputs]
    capture(unet)
    for each, theirs in zip(inputs, wanted, strict=True):
        ours = denoise(unet, *each, ddim_schedule(5))
        assert float((ours.float() - theirs.float()).norm() / theirs.float().norm()) < 5e-3
    assert unet.graphs.passes
