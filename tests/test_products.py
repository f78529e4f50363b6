"""Products with what follows them against PyTorch, on a GPU, or in Triton's interpreter with TRITON_INTERPRET=1."""

import pytest
import torch
import torch.nn.functional as F

from optim import kernels, products

if kernels.triton is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
HALF = torch.float16
BOUND = 1e-3  # relative to PyTorch in float64 on the same inputs: rounding of the result


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def rand(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, HALF)


def error(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((ours.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(
    "shape, inner",
    [
        ((2, 70, 64), 256),  # rows that do not fill a tile
        ((1, 130, 96), 384),  # channels that do not
        ((1, 16, 9, 64), 64),  # one tile of values next to the gates
    ],
    ids=str,
)
def test_a_product_with_geglu_equals_the_linear_layer_and_geglu(shape, inner):
    x, weight, bias = rand(*shape), rand(2 * inner, shape[-1], scale=shape[-1] ** -0.5), rand(2 * inner)
    if not products.has_geglu_product(x, weight):
        pytest.skip("this GPU does not load tiles by itself")
    value, gate = F.linear(x.double(), weight.double(), bias.double()).chunk(2, dim=-1)
    out = products.geglu_product(x, weight, bias)
    assert out.shape == (*shape[:-1], inner)
    assert error(out, value * F.gelu(gate)) <= BOUND


@pytest.mark.parametrize("inner, channels", [(96, 64), (64, 12)])
def test_a_product_whose_tiles_would_not_fit_is_not_taken(inner, channels):
    assert not products.has_geglu_product(rand(4, channels), rand(2 * inner, channels))


def test_the_softmax_of_scores_is_that_of_each_row():
    scores = 30 * torch.randn(7, 100, device=DEVICE)
    out = torch.empty_like(scores, dtype=HALF)
    kernels.launch(products._softmax_rows, 7, scores, out, 100, 0.25, WIDTH=128)
    assert error(out, (0.25 * scores.double()).softmax(-1)) <= BOUND


@pytest.mark.skipif(kernels.INTERPRETED, reason="products of halves in float32 need a GPU")
@pytest.mark.parametrize("held", [2**26, 300 * 300], ids=["together", "one by one"])
def test_attention_of_a_wide_head_equals_pytorchs(held, monkeypatch):
    monkeypatch.setattr(products, "MAX_SCORES", held)
    q, k, v = rand(3, 300, 3 * 512).chunk(3, -1)
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert error(products.wide_attention(q, k, v), wanted) <= BOUND


def test_attention_of_a_narrow_head_equals_pytorchs():
    q, k, v = rand(2, 20, 3 * 64).float().chunk(3, -1)
    assert (
        error(products.wide_attention(q, k, v), F.scaled_dot_product_attention(q.double(), k.double(), v.double()))
        <= BOUND
    )
