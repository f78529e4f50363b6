"""The fused kernels against PyTorch, on a GPU, or in Triton's interpreter with TRITON_INTERPRET=1."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentsync.layers import GroupNorm
from optim import kernels

if kernels.triton is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
HALF, SINGLE = torch.float16, torch.float32
EPS = torch.finfo(SINGLE).eps
BOUND = {HALF: 1e-3, SINGLE: 1e-5}  # relative to PyTorch in float64 on the same inputs: rounding of the result
# Interpreting takes long; half precision there is tried by the networks of test_fused.py.
KINDS = [SINGLE] if kernels.INTERPRETED else [HALF, SINGLE]


@pytest.fixture(autouse=True)
def inference(monkeypatch):
    """No gradients, fixed inputs, and memory that shows up as NaN where nothing was written."""
    monkeypatch.setattr(kernels, "MERGE_TILE", 32)  # several rounds of its loops
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


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize(
    "n, c, h, w, span, groups",
    [
        (2, 320, 5, 7, 1, 32),  # a spatial transformer's
        (32, 320, 3, 5, 16, 32),  # a residual block's, two windows
        (10, 960, 3, 3, 10, 32),  # a short clip, behind a skip
        (2, 96, 19, 15, 2, 16),  # chunks and tiles that do not fill
        (2, 16, 1, 1, 1, 16),  # one value a group and frame
        (1, 640, 17, 16, 1, 32),  # 272 rows: a second chunk of 16
    ],
)
def test_group_norm_ties_the_frames_of_a_window(n, c, h, w, span, groups, dtype):
    x = image(n, c, h, w, dtype)
    norm = with_random_weights(GroupNorm(groups, c, 1e-5), dtype)
    out = kernels.group_norm(x, norm, span)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    # Where a group is one value its deviation is none, so that the rounding of that value is divided by √(norm.eps).
    alone = c // groups * span * h * w == 1
    assert error(out, norm_in_double(x, norm, span)) <= max(BOUND[dtype], alone * EPS / norm.eps**0.5)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("rows", [1, 20], ids=["one timestep", "a timestep a window"])
def test_group_norm_takes_in_bias_time_and_silu(dtype, rows):
    x = image(20, 320, 3, 5, dtype)
    norm = with_random_weights(GroupNorm(8, 320, 1e-5), dtype)
    time = rand(rows, 320, dtype=dtype) if rows == 1 else rand(2, 320, dtype=dtype).repeat_interleave(10, 0)
    bias = 5 * rand(320, dtype=dtype)
    out = kernels.group_norm(x, norm, 10, True, conv_bias=bias)
    assert error(out, F.silu(norm_in_double(x + bias[:, None, None], norm, 10))) <= 2 * BOUND[dtype]
    out = kernels.group_norm(x, norm, 10, True, time, bias)
    moved = x.double() + bias.double()[:, None, None] + time.double()[:, :, None, None]
    assert error(out, F.silu(norm_in_double(moved, norm, 10))) <= BOUND[dtype]


@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_group_norm_survives_a_mean_far_above_the_deviation(mean):
    """Off by the rounding of the mean; the mean of squares less the square of the mean is off by that of mean²."""
    x = image(4, 96, 11, 9, SINGLE) + mean * (1 + 0.001 * rand(96)[:, None, None])
    norm = with_random_weights(GroupNorm(32, 96, 1e-6), SINGLE)
    assert error(kernels.group_norm(x, norm, 2), norm_in_double(x, norm, 2)) <= 4 * EPS * mean


@pytest.mark.parametrize("dtype", KINDS, ids=str)
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
    shift, total_bias, apart = rand(channels, dtype=dtype), rand(channels, dtype=dtype), torch.empty_like(x)
    ours, out = kernels.layer_norm(x, norm, branch, shift=shift, total_bias=total_bias, total=apart)
    assert ours is apart and error(apart, total.double() + shift.double() + total_bias.double()) <= BOUND[dtype]
    assert error(out, F.layer_norm(total.double() + shift.double(), (channels,), *plain)) <= 2 * BOUND[dtype]

    ours, out = kernels.layer_norm(x, norm, branch, positions)
    assert torch.equal(ours, total)
    wanted = F.layer_norm(total.double(), (channels,), *plain) + positions[:10, None].double()
    assert error(out, wanted) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 2560), (1, 96), (9, 1000)], ids=str)
def test_geglu_is_value_times_exact_gelu_of_the_gate(shape, dtype):
    x = 3 * rand(*shape, dtype=dtype)
    value, gate = x.double().chunk(2, dim=-1)
    assert error(kernels.geglu(x), value * F.gelu(gate)) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_bias_and_residual_are_added_in_place(dtype):
    x, residual, bias = image(3, 96, 5, 7, dtype), image(3, 96, 5, 7, dtype), rand(96, dtype=dtype)
    wanted = x.double() + residual.double() + bias.double()[:, None, None]
    out = kernels.add_bias(x, residual, bias)
    assert out is x and error(x, wanted) <= BOUND[dtype]
    wanted = x.double() + bias.double()[:, None, None]
    assert kernels.add_bias(x, None, bias) is x and error(x, wanted) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
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
