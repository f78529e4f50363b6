"""Matrix products whose results need not be written to memory as they are.

Both equal eager except for the rounding of half precision. Measured on an H200 (docs/speed.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from optim import kernels
from optim.kernels import jit, launch

if kernels.triton is not None:
    import triton.language as tl

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except (ImportError, OSError):  # a Triton before 3.3, or none
    TensorDescriptor = None

# Rows and value columns of a program's tile, and channels at a time: the fastest of eight tiles on an H200, for all
# widths of the released U-Nets.
TILE_ROWS, TILE_INNER, TILE_CHANNELS = 128, 64, 64
PROGRAM_ROWS = 8  # tiles of rows whose programs run next to each other, and so share weights in the cache
STAGES, WARPS = 3, 4
TILE_CAPABILITY = (9, 0)  # Hopper: the first GPU that loads whole tiles by itself
FLASH_WIDTH = 256  # channels of a head, at most, in flash attention
MAX_SCORES = 2**26  # float32 scores that are held at a time: 256 MB
# PyTorch gives a product of halves in float32 since 2.8.
WIDE_PRODUCTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


@jit(do_not_specialize=["rows"])
def _geglu_product(
    bias,
    x,
    weight,
    out,
    rows,
    inner,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out = value · gelu(gate), where (value, gate) = x · weightᵀ + bias; x, weight and out are tensor descriptors.

    x (rows, CHANNELS), weight (2 · inner, CHANNELS), value half then gate half, bias (2 · inner), out (rows, inner).
    What lies outside is read as zero, and not written.
    """
    row_tiles, columns = tl.cdiv(rows, ROWS), tl.cdiv(inner, INNER)
    first = tl.program_id(0) // (GROUP * columns) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    r = (first + tl.program_id(0) % (GROUP * columns) % size) * ROWS
    c = tl.program_id(0) % (GROUP * columns) // size * INNER
    value = tl.zeros((ROWS, INNER), tl.float32)
    gate = tl.zeros((ROWS, INNER), tl.float32)
    for k in range(0, CHANNELS, DEPTH):
        tile = x.load([r, k])
        value = tl.dot(tile, weight.load([c, k]).T, value)
        gate = tl.dot(tile, weight.load([inner + c, k]).T, gate)
    at = bias + c + tl.arange(0, INNER)
    value += tl.load(at).to(tl.float32)[None, :]
    gate += tl.load(at + inner).to(tl.float32)[None, :]
    y = value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    out.store([r, c], y.to(out.dtype))


@jit(do_not_specialize=["columns"])
def _softmax_rows(scores, out, columns, scale, WIDTH: tl.constexpr):
    """out = softmax(scores · scale) over the last axis; scores (rows, columns), one row a program, WIDTH ≥ columns."""
    row = tl.program_id(0).to(tl.int64) * columns
    c = tl.arange(0, WIDTH)
    y = tl.load(scores + row + c, mask=c < columns, other=float("-inf")).to(tl.float32) * scale
    y = tl.exp(y - tl.max(y, 0))
    tl.store(out + row + c, (y / tl.sum(y, 0)).to(out.dtype.element_ty), mask=c < columns)


def has_geglu_product(x: Tensor, weight: Tensor) -> bool:
    """Whether `geglu_product` takes these; else the product is followed by `kernels.geglu`."""
    if TensorDescriptor is None or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    capable = kernels.INTERPRETED or torch.cuda.get_device_capability(x.device) >= TILE_CAPABILITY
    # A tile of values must not reach into the gates, and a row must begin at a multiple of 16 bytes.
    fits = len(weight) // 2 % TILE_INNER == 0 and weight.shape[1] % 8 == 0
    return capable and fits and all(each.is_contiguous() and each.data_ptr() % 16 == 0 for each in (x, weight))


def geglu_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GEGLU of a linear layer in one pass: x (…, C), weight (2 · inner, C), bias (2 · inner) → (…, inner)."""
    rows, inner = x.numel() // x.shape[-1], len(weight) // 2
    flat = x.reshape(rows, x.shape[-1])
    out = x.new_empty(rows, inner)
    programs = -(-rows // TILE_ROWS) * (inner // TILE_INNER)
    launch(
        _geglu_product,
        programs,
        bias,
        TensorDescriptor.from_tensor(flat, [TILE_ROWS, TILE_CHANNELS]),
        TensorDescriptor.from_tensor(weight, [TILE_INNER, TILE_CHANNELS]),
        TensorDescriptor.from_tensor(out, [TILE_ROWS, TILE_INNER]),
        rows,
        inner,
        CHANNELS=x.shape[-1],
        ROWS=TILE_ROWS,
        INNER=TILE_INNER,
        DEPTH=TILE_CHANNELS,
        GROUP=PROGRAM_ROWS,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out.view(*x.shape[:-1], inner)


def wide_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one head, (n, t, C) each → (n, t, C); of a width that flash attention does not take by two products
    with the scores in memory, in float32.

    Which takes a third of the time of PyTorch's kernel for such widths (512 channels, 4,096 tokens, one H200).
    """
    n, tokens, channels = q.shape
    if channels <= FLASH_WIDTH or q.dtype == torch.float32 or not (WIDE_PRODUCTS and q.is_cuda):
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    part = max(1, MAX_SCORES // tokens**2)
    results = []
    for queries, keys, values in zip(q.split(part), k.split(part), v.split(part), strict=True):
        scores = torch.bmm(queries, keys.transpose(1, 2), out_dtype=torch.float32)
        weights = torch.empty_like(scores, dtype=q.dtype)
        width = kernels.triton.next_power_of_2(tokens)
        launch(_softmax_rows, len(scores) * tokens, scores, weights, tokens, channels**-0.5, WIDTH=width)
        results.append(torch.bmm(weights, values))
    return torch.cat(results)
