"""The fused kernels against PyTorch, in Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentsync import unet as network
from latentsync.sampling import DeepCache, ddim_schedule, denoise
from latentsync.unet import GroupNorm, UNet, UNetConfig
from optim import kernels

if kernels.triton is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF, SINGLE = torch.float16, torch.float32
BOUND = {HALF: 1e-3, SINGLE: 1e-5}  # relative to PyTorch in float64 on the same inputs: rounding of the result
FRAMES = 2  # interpreting a kernel is slow
CONFIG = UNetConfig(
    block_out_channels=(96,),
    cross_attention=(True,),
    temporal=(True,),
    layers_per_block=1,
    heads=4,
    cross_attention_dim=24,
    norm_num_groups=4,
    temporal_heads=2,
    temporal_max_len=FRAMES,
)
RUNS_HERE = torch.cuda.is_available() or kernels.INTERPRETED


@pytest.mark.skipif(RUNS_HERE, reason="the tests below run in this process")
def test_all_below_pass_in_tritons_interpreter():
    # Triton settles at its import whether it interprets, and other tests have imported it by now.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(autouse=True)
def inference(request, monkeypatch):
    """No gradients, fixed inputs, and memory that shows up as NaN where nothing was written."""
    if not RUNS_HERE:
        if request.function is not test_all_below_pass_in_tritons_interpreter:
            pytest.skip("runs in a process of its own, above")
        yield
        return
    monkeypatch.setattr(kernels, "MERGE_TILE", 32)  # several rounds of its loops
    monkeypatch.setattr(network, "TEMPORAL_GROUPS", 4)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN
    with torch.inference_mode():
        yield
    torch.use_deterministic_algorithms(False)


def rand(*shape: int, dtype: torch.dtype = SINGLE) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def image(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    return rand(n, c, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)


def error(ours: Tensor, wanted: Tensor) -> float:
    return float((ours.double() - wanted.double()).norm() / wanted.double().norm())


def with_random_weights(norm: nn.Module, dtype: torch.dtype) -> nn.Module:
    norm.weight.copy_(torch.randn_like(norm.weight))
    norm.bias.copy_(torch.randn_like(norm.bias))
    return norm.to(DEVICE, dtype)


def norm_in_double(x: Tensor, norm: nn.GroupNorm, span: int) -> Tensor:
    n, c, h, w = x.shape
    tied = x.double().unflatten(0, (n // span, span)).transpose(1, 2)
    out = F.group_norm(tied, norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
    return out.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize(
    "n, c, h, w, span, groups",
    [
        (2, 320, 5, 7, 1, 32),  # a spatial transformer's
        (32, 320, 3, 5, 16, 32),  # a residual block's, two windows
        (10, 960, 3, 3, 10, 32),  # a short clip, behind a skip
        (2, 96, 19, 15, 2, 16),  # chunks and tiles that do not fill
        (4, 32, 1, 1, 1, 32),  # one value a group and frame
        (1, 640, 17, 16, 1, 32),  # 272 rows: a second chunk of 16
    ],
)
def test_group_norm_ties_the_frames_of_a_window(n, c, h, w, span, groups, dtype):
    x = image(n, c, h, w, dtype)
    norm = with_random_weights(GroupNorm(groups, c, 1e-5), dtype)
    out = kernels.group_norm(x, norm, span)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert error(out, norm_in_double(x, norm, span)) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("rows", [1, 20], ids=["one timestep", "a timestep a window"])
def test_group_norm_takes_in_bias_time_and_silu(dtype, rows):
    x = image(20, 320, 3, 5, dtype)
    norm = with_random_weights(GroupNorm(32, 320, 1e-5), dtype)
    time = rand(rows, 320, dtype=dtype) if rows == 1 else rand(2, 320, dtype=dtype).repeat_interleave(10, 0)
    bias = 5 * rand(320, dtype=dtype)
    out = kernels.group_norm(x, norm, 10, True, time, bias)
    moved = x.double() + bias.double()[:, None, None] + time.double()[:, :, None, None]
    assert error(out, F.silu(norm_in_double(moved, norm, 10))) <= BOUND[dtype]


@pytest.mark.parametrize("mean, bound", [(1e2, 1e-5), (1e4, 1e-3)])
def test_group_norm_survives_a_mean_far_above_the_deviation(mean, bound):
    x = image(4, 96, 11, 9, SINGLE) + mean * (1 + 0.001 * rand(96)[:, None, None])
    norm = with_random_weights(GroupNorm(32, 96, 1e-6), SINGLE)
    assert error(kernels.group_norm(x, norm, 2), norm_in_double(x, norm, 2)) <= bound


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("channels", [32, 320, 640, 1280, 96])
def test_layer_norm_adds_the_branch_before_and_the_positions_after(channels, dtype):
    x, branch = rand(2, 10, 3, channels, dtype=dtype) + 3, rand(2, 10, 3, channels, dtype=dtype)
    positions = rand(24, channels, dtype=dtype)
    norm = with_random_weights(nn.LayerNorm(channels), dtype)
    plain = (norm.weight.double(), norm.bias.double(), norm.eps)

    same, out = kernels.layer_norm(x, norm)
    assert same is x
    assert error(out, F.layer_norm(x.double(), (channels,), *plain)) <= BOUND[dtype]

    total = x + branch
    ours, out = kernels.layer_norm(x, norm, branch, positions)
    assert torch.equal(ours, total)
    wanted = F.layer_norm(total.double(), (channels,), *plain) + positions[:10, None].double()
    assert error(out, wanted) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 2560), (1, 96), (9, 1000)], ids=str)
def test_geglu_is_value_times_exact_gelu_of_the_gate(shape, dtype):
    x = 3 * rand(*shape, dtype=dtype)
    value, gate = x.double().chunk(2, dim=-1)
    assert error(kernels.geglu(x), value * F.gelu(gate)) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
def test_bias_and_residual_are_added_in_place(dtype):
    x, residual, bias = image(3, 96, 5, 7, dtype), image(3, 96, 5, 7, dtype), rand(96, dtype=dtype)
    wanted = x.double() + residual.double() + bias.double()[:, None, None]
    out = kernels.add_bias(x, residual, bias)
    assert out is x and error(x, wanted) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize(
    "b, f, p, heads, dim",
    [(2, 16, 9, 8, 40), (1, 10, 5, 8, 80), (1, 24, 3, 8, 160), (2, 1, 7, 2, 16), (1, 16, 1, 1, 8), (1, 7, 6, 3, 48)],
)
def test_frame_attention_equals_pytorchs(b, f, p, heads, dim, dtype):
    q, k, v = rand(b, f, p, 3 * heads * dim, dtype=dtype).chunk(3, dim=-1)  # slices of one tensor
    q = 3 * q if p > 1 else q.contiguous()
    k, v = (k, v) if q.stride(2) == k.stride(2) else (k.contiguous(), v.contiguous())
    split = [t.double().unflatten(-1, (heads, dim)).permute(0, 2, 3, 1, 4) for t in (q, k, v)]  # (b, p, heads, f, d)
    wanted = F.scaled_dot_product_attention(*split).permute(0, 3, 1, 2, 4).flatten(-2)
    out = kernels.frame_attention(q, k, v, heads)
    assert out.is_contiguous() and error(out, wanted) <= BOUND[dtype]


def swapped(unet: UNet) -> UNet:
    """Accelerated without the trial."""
    kernels._swap(unet, kernels.FAST)
    return unet


def small_unet(dtype: torch.dtype = SINGLE) -> UNet:
    unet = UNet(CONFIG).eval().requires_grad_(False)
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            with_random_weights(module, SINGLE)
    return unet.to(DEVICE, dtype, memory_format=torch.channels_last)


def loop(unet: UNet, windows: int = 1) -> Tensor:
    """A guided loop of a full and a shallow pass on fixed inputs."""
    dtype = unet.conv_in.weight.dtype
    torch.manual_seed(1)
    noise, condition = rand(1, 4, 1, 6, 4, dtype=dtype), rand(windows, 9, FRAMES, 6, 4, dtype=dtype)
    audio = rand(windows, FRAMES, 50, CONFIG.cross_attention_dim, dtype=dtype)
    return denoise(unet, noise, condition, audio, ddim_schedule(2), 1.5, DeepCache(2, 0))


def test_accelerated_loop_equals_eager_and_restore_undoes_it():
    unet = small_unet()
    names, plain = list(unet.state_dict()), [type(m) for m in unet.modules()]
    wanted = loop(unet, 2)
    assert kernels.accelerate(unet) is unet
    assert {type(m) for m in unet.modules()} >= set(kernels.FAST.values())
    assert list(unet.state_dict()) == names
    assert error(loop(unet, 2), wanted) <= 1e-5
    assert [type(m) for m in kernels.restore(unet).modules()] == plain
    assert torch.equal(loop(unet, 2), wanted)


def test_half_precision_is_no_further_from_the_truth_than_eager():
    unet = small_unet(HALF)
    eager, ours = loop(unet), loop(swapped(unet))
    truth = loop(kernels.restore(unet).float())  # the same rounded weights; inputs differ by their rounding
    assert not torch.equal(ours, eager)
    assert error(ours, truth) <= 1.2 * error(eager, truth)


def test_timesteps_may_differ_between_windows():
    unet = small_unet()
    sample, audio = rand(2, 13, FRAMES, 4, 4), rand(2, FRAMES, 50, CONFIG.cross_attention_dim)
    timesteps = torch.tensor([900, 20], device=DEVICE)
    wanted = unet(sample, timesteps, audio)
    assert error(swapped(unet)(sample, timesteps, audio), wanted) <= 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_an_accelerated_pass_can_be_captured_and_replayed():
    unet = kernels.accelerate(small_unet(HALF))
    x, other = image(2 * FRAMES, 13, 8, 8, HALF), image(2 * FRAMES, 13, 8, 8, HALF)
    context = unet.encode_audio(rand(2, FRAMES, 50, CONFIG.cross_attention_dim, dtype=HALF))
    timestep = torch.tensor([500], device=DEVICE)
    wanted = unet.full(other, timestep, context, FRAMES)[0]
    unet.full(x, timestep, context, FRAMES)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = unet.full(x, timestep, context, FRAMES)[0]
    x.copy_(other)
    graph.replay()
    assert error(out, wanted) <= BOUND[HALF]


def test_modules_that_cannot_be_served_run_as_before_and_say_so_once(capsys, monkeypatch):
    monkeypatch.setattr(kernels, "_said", set())
    unet = swapped(small_unet())
    block = unet.down_blocks[0].resnets[0].double()
    x, time = image(2, 96, 3, 3, torch.float64), rand(1, 384, dtype=torch.float64)
    out = block(x, time, 2)
    assert torch.equal(out, kernels.restore(unet).down_blocks[0].resnets[0](x, time, 2))
    assert capsys.readouterr().err.splitlines() == [
        "Fused kernels are not used for some modules (torch.float64 has no kernel); PyTorch's own run instead."
    ]


def test_gradients_pass_through_pytorchs_own_modules():
    with torch.inference_mode(False), torch.enable_grad():
        norm = kernels.FastGroupNorm(16, 32, 1e-5).to(DEVICE)
        x = torch.randn(2, 32, 3, 3, device=DEVICE, requires_grad=True)
        norm(x).square().sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("fault", ["wrong", "broken"])
def test_kernels_that_fail_their_trial_are_taken_out_with_one_message(fault, capsys, monkeypatch):
    def geglu(x: Tensor) -> Tensor:
        if fault == "broken":
            raise RuntimeError("Failed to find C compiler.\nmore")
        return F.gelu(x.chunk(2, dim=-1)[0])

    monkeypatch.setattr(kernels, "_said", set())
    monkeypatch.setattr(kernels, "geglu", geglu)
    unet = small_unet()
    plain = [type(m) for m in unet.modules()]
    kernels.accelerate(unet)
    assert [type(m) for m in unet.modules()] == plain
    (line,) = capsys.readouterr().err.splitlines()
    reason = "RuntimeError: Failed to find C compiler.;" if fault == "broken" else "off by"
    assert line.startswith("Fused kernels are off: ") and reason in line


def test_nothing_changes_on_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    unet = small_unet().cpu()
    plain = [type(m) for m in unet.modules()]
    assert [type(m) for m in kernels.accelerate(unet).modules()] == plain
    assert capsys.readouterr().err == ""


def test_without_triton_eager_runs_and_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "triton", None)
    monkeypatch.setattr(kernels, "_said", set())
    unet = small_unet()
    plain = [type(m) for m in unet.modules()]
    assert [type(m) for m in kernels.accelerate(kernels.accelerate(unet)).modules()] == plain
    assert len(capsys.readouterr().err.splitlines()) == 1
