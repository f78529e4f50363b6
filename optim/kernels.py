"""Hand-written Triton kernels for operations that are bound by memory traffic in eager PyTorch.

Every kernel reads its input once (a group norm twice), writes its output once, computes in float32, and equals eager
except for the rounding of half precision, so it suits every level. No kernel is tuned at run time: block sizes are the
constants below, and the kernels compile in seconds and stay in Triton's cache. None synchronises with the host, so
captured graphs may contain them. `optim.fused` uses them in the networks.

A vector that a kernel may leave out is masked by a number, and no constant: each constant is another kernel to compile,
and Python's lock lets hardly more than one be compiled at a time. Whole rows are constants, as a test of a number costs
0.5 % of a pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except (ImportError, OSError):  # not installed, or a library that it needs is missing: `optim.fused` logs it
    triton = None

    def jit(**_):
        return lambda kernel: kernel


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, slowly: for tests
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

ROWS, CHANNELS = 64, 64  # tile of the elementwise and group norm kernels; 64 channels = 128 bytes a row in float16
CHUNK_TILES = 4  # tiles of rows in one program's share of a group norm's statistics
MERGE_TILE = 4096  # elements of the partial statistics that a program merges at once
NORM_TILE = 4096  # elements per program of a layer norm: whole rows
GEGLU_TILE = (8, 256)
# Rows, (frame, pixel, head) triples, of one program's matrix products: the 16 frames of one pair, on one warp, were the
# fastest of 16 to 128 rows and 1 to 8 warps on an H100 (0.195 ms at 4,096 pixels of width 320).
ATTENTION_ROWS, ATTENTION_WARPS = 16, 1
ATTENTION_FRAMES = 64  # maximum frames of a window
ATTENTION_DIM = 64  # maximum channels of a head loaded at once


# ---- group norm


@jit(do_not_specialize=["rows", "chunks"])
def _channel_statistics(
    x, partial, rows, channels, chunks, ROWS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr
):
    """Mean and sum of squared deviations of every channel over each chunk of ROWS · TILES rows.

    x (windows, rows, channels) → partial (windows, chunks, 2, channels), float32. The sums are of distances from
    the mean of the chunk's first tile, so that a mean far from zero does not swallow the variance.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    block = tl.program_id(0) % blocks  # neighbouring programs share rows
    part = tl.program_id(0) // blocks  # window · chunks + chunk
    first = part % chunks * (ROWS * TILES)
    count = tl.minimum(rows - first, ROWS * TILES)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    r = tl.arange(0, ROWS)
    x += (part // chunks).to(tl.int64) * rows * channels + first.to(tl.int64) * channels
    at = r[:, None] * channels + c[None, :]
    inside = c < channels
    tile = tl.load(x + at, mask=(r < count)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    origin = tl.sum(tile, 0) / tl.minimum(count, ROWS)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    for t in range(TILES):
        live = (t * ROWS + r < count)[:, None] & inside[None, :]
        tile = tl.load(x + t * ROWS * channels + at, mask=live, other=0.0).to(tl.float32)
        distance = tl.where(live, tile - origin[None, :], 0.0)
        total += distance
        squares += distance * distance
    shift = tl.sum(total, 0) / count
    deviation = tl.maximum(tl.sum(squares, 0) - shift * shift * count, 0.0)
    partial += part.to(tl.int64) * 2 * channels + c
    tl.store(partial, origin + shift, mask=inside)
    tl.store(partial + channels, deviation, mask=inside)


@jit(do_not_specialize=["rows", "chunks", "groups", "offset_stride", "chunk_rows", "has_bias", "has_offset"])
def _group_scale(
    partial,
    weight,
    bias,
    offset,
    conv_bias,
    scale,
    rows,
    channels,
    chunks,
    groups,
    offset_stride,
    chunk_rows,
    has_bias,
    has_offset,
    eps,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Factor and summand of every channel that turn an input into its normalised output.

    partial (windows, chunks, 2, channels) → scale (windows, 2, channels), float32. The input is x + conv_bias + offset
    per channel, where has_bias and has_offset are 1; the partial statistics are of x alone. One program merges one
    group of one window.
    """
    window = tl.program_id(0) // groups
    width = channels // groups
    c = tl.arange(0, WIDTH)
    inside = c < width
    c += tl.program_id(0) % groups * width
    move = tl.load(conv_bias + c, mask=inside & (has_bias != 0), other=0.0).to(tl.float32)
    move += tl.load(offset + window * offset_stride + c, mask=inside & (has_offset != 0), other=0.0).to(tl.float32)
    partial += window.to(tl.int64) * chunks * 2 * channels
    k = tl.arange(0, CHUNKS)
    # Means are summed as distances from the first, for the same reason as in `_channel_statistics`.
    origin = tl.sum(tl.where(inside, tl.load(partial + c, mask=inside, other=0.0) + move, 0.0), 0) / width
    total = tl.zeros((CHUNKS, WIDTH), tl.float32)
    for first in range(0, chunks, CHUNKS):
        live = (first + k < chunks)[:, None] & inside[None, :]
        count = tl.minimum(rows - (first + k) * chunk_rows, chunk_rows).to(tl.float32)[:, None]
        mean = tl.load(partial + (first + k)[:, None] * 2 * channels + c[None, :], mask=live, other=0.0)
        total += tl.where(live, count * (mean + move[None, :] - origin), 0.0)
    size = rows.to(tl.float32) * width
    centre = origin + tl.sum(tl.sum(total, 1), 0) / size
    total = tl.zeros((CHUNKS, WIDTH), tl.float32)
    for first in range(0, chunks, CHUNKS):
        live = (first + k < chunks)[:, None] & inside[None, :]
        count = tl.minimum(rows - (first + k) * chunk_rows, chunk_rows).to(tl.float32)[:, None]
        at = partial + (first + k)[:, None] * 2 * channels + c[None, :]
        distance = tl.load(at, mask=live, other=0.0) + move[None, :] - centre
        total += tl.where(live, tl.load(at + channels, mask=live, other=0.0) + count * distance * distance, 0.0)
    variance = tl.sum(tl.sum(total, 1), 0) / size
    factor = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32) / tl.sqrt(variance + eps)
    summand = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32) + (move - centre) * factor
    scale += window * 2 * channels + c
    tl.store(scale, factor, mask=inside)
    tl.store(scale + channels, summand, mask=inside)


@jit(do_not_specialize=["rows"])
def _scale_channels(x, scale, out, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr):
    """out = x · factor + summand, then SiLU; x and out (windows, rows, channels), scale (windows, 2, channels)."""
    blocks = tl.cdiv(channels, CHANNELS)
    parts = tl.cdiv(rows, ROWS)
    part = tl.program_id(0) // blocks
    window = part // parts
    r = part % parts * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    scale += window * 2 * channels + c
    factor = tl.load(scale, mask=inside, other=0.0)
    summand = tl.load(scale + channels, mask=inside, other=0.0)
    at = (window.to(tl.int64) * rows + r)[:, None] * channels + c[None, :]
    live = (r < rows)[:, None] & inside[None, :]
    y = tl.load(x + at, mask=live, other=0.0).to(tl.float32) * factor[None, :] + summand[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out + at, y.to(out.dtype.element_ty), mask=live)


# ---- additions, layer norm, GEGLU


@jit(do_not_specialize=["rows"])
def _add_bias(
    x, residual, bias, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):
    """x += residual + bias, in place; x and residual (rows, channels), bias (channels)."""
    blocks = tl.cdiv(channels, CHANNELS)
    r = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    at = r.to(tl.int64)[:, None] * channels + c[None, :]
    live = (r < rows)[:, None] & inside[None, :]
    y = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual + at, mask=live, other=0.0)
    y += tl.load(bias + c, mask=inside, other=0.0)[None, :]
    tl.store(x + at, y.to(x.dtype.element_ty), mask=live)


@jit(do_not_specialize=["rows", "pixels", "frames", "has_shift", "has_total_bias"])
def _layer_norm(
    x,
    branch,
    shift,
    weight,
    bias,
    positions,
    total_bias,
    total,
    out,
    rows,
    channels,
    pixels,
    frames,
    has_shift,
    has_total_bias,
    eps,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
):
    """s = x + branch + shift; out = norm(s) + position of the row's frame; total = s + total_bias. A summand whose
    flag is false is not read, and total not written.

    x, branch, total, out (rows, channels), rows ordered (window, frame, pixel); shift, total_bias (channels);
    positions (≥ frames, channels). total may be x or branch. CHANNELS ≥ channels: a program holds whole rows, so it
    computes first the mean, then the variance.
    """
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)
    inside = c < channels
    live = (r < rows)[:, None] & inside[None, :]
    at = r.to(tl.int64)[:, None] * channels + c[None, :]
    y = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        y += tl.load(branch + at, mask=live, other=0.0).to(tl.float32)
    y += tl.load(shift + c, mask=inside & (has_shift != 0), other=0.0).to(tl.float32)[None, :]
    if HAS_TOTAL:
        s = y + tl.load(total_bias + c, mask=inside & (has_total_bias != 0), other=0.0).to(tl.float32)[None, :]
        tl.store(total + at, s.to(total.dtype.element_ty), mask=live)
    y = y.to(total.dtype.element_ty).to(tl.float32)  # the norm sees the rounded sum, as it does in eager
    mean = tl.sum(y, 1) / channels
    y = tl.where(live, y - mean[:, None], 0.0)
    variance = tl.sum(y * y, 1) / channels
    y = y / tl.sqrt(variance + eps)[:, None]
    y = y * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = y + tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    if HAS_POSITIONS:
        frame = r // pixels % frames
        y += tl.load(positions + frame[:, None] * channels + c[None, :], mask=live, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=live)


@jit(do_not_specialize=["rows"])
def _geglu(x, out, rows, inner, ROWS: tl.constexpr, INNER: tl.constexpr):
    """x (rows, 2 · inner), value half then gate half → out (rows, inner), value · gelu(gate) with the exact erf."""
    blocks = tl.cdiv(inner, INNER)
    r = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.program_id(0) % blocks * INNER + tl.arange(0, INNER)
    live = (r < rows)[:, None] & (c < inner)[None, :]
    at = r[:, None] * (2 * inner) + c[None, :]
    value = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    gate = tl.load(x + inner + at, mask=live, other=0.0).to(tl.float32)
    y = value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    tl.store(out + r[:, None] * inner + c[None, :], y.to(out.dtype.element_ty), mask=live)


# ---- attention over frames


@jit(do_not_specialize=["frames", "pixels", "heads"])
def _frame_attention(
    q,
    k,
    v,
    out,
    frames,
    pixels,
    heads,
    stride,
    out_stride,
    scale,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Attention of every (pixel, head) over the frames of its window.

    q, k, v, out (windows, frames, pixels, heads · DIM), `stride` elements from pixel to pixel. A window of 16
    frames is too small for a matrix product, so a program takes ROWS // frames neighbouring (pixel, head) pairs, which
    are adjacent in memory, as the rows of one product, and masks out the scores between different pairs.
    """
    together = ROWS // frames
    pairs = pixels * heads
    parts = tl.cdiv(pairs, together)
    window = tl.program_id(0) // parts
    r = tl.arange(0, ROWS)
    frame = r // together
    lane = r % together
    pair = tl.program_id(0) % parts * together + lane
    live = (frame < frames) & (pair < pairs)
    row = (window.to(tl.int64) * frames + frame) * pixels + pair // heads
    head = pair % heads * DIM
    at = row * stride + head
    scores = tl.zeros((ROWS, ROWS), tl.float32)
    for first in tl.static_range(0, DIM, BLOCK_DIM):
        d = first + tl.arange(0, BLOCK_DIM)
        mask = live[:, None] & (d < DIM)[None, :]
        query = tl.load(q + at[:, None] + d[None, :], mask=mask, other=0.0)
        key = tl.load(k + at[:, None] + d[None, :], mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(key), scores, input_precision="ieee")
    # Rows past the end have a zero query and the keys of their lane: finite, and never stored.
    sees = (lane[:, None] == lane[None, :]) & (frame < frames)[None, :]
    scores = tl.where(sees, scores * scale, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    total = tl.sum(weights, 1)
    for first in tl.static_range(0, DIM, BLOCK_DIM):
        d = first + tl.arange(0, BLOCK_DIM)
        mask = live[:, None] & (d < DIM)[None, :]
        value = tl.load(v + at[:, None] + d[None, :], mask=mask, other=0.0)
        y = tl.dot(weights.to(value.dtype), value, input_precision="ieee") / total[:, None]
        tl.store(out + (row * out_stride + head)[:, None] + d[None, :], y.to(out.dtype.element_ty), mask=mask)


# ---- the kernels as functions of tensors


_to_compile: dict[tuple, Callable[[], object]] | None = None  # set while `compile_all` collects kernels


def launch(kernel, programs: int, x: Tensor, *args, **constants) -> None:
    """Launch a kernel, whose first argument is x, on x's device, which need not be the current one."""
    if _to_compile is not None:

        def compile_it() -> None:
            with torch.cuda.device_of(x):
                compiled = kernel.warmup(x, *args, grid=(1,), **constants)
                _ = compiled.run  # loads it, and makes its launcher, for which some versions call the C compiler

        general = kernel.do_not_specialize or ()
        arguments = zip(kernel.arg_names, (x, *args), strict=False)
        special = tuple(type(one) if name in general else _specialisation(one) for name, one in arguments)
        _to_compile[kernel, special, tuple(constants.items())] = compile_it
        return
    with torch.cuda.device_of(x):
        kernel[(programs,)](x, *args, **constants)


def _specialisation(argument: Any) -> tuple:
    """The properties of an argument for which Triton compiles a kernel again."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if not isinstance(argument, int | float):  # a tensor descriptor
        return argument.base.dtype, *argument.block_shape
    return type(argument), argument == 1, isinstance(argument, int) and argument % 16 == 0


def compile_all(run: Callable[[], object]) -> None:
    """Compile the kernels that `run` launches in parallel: `run` is called, but its kernels compute nothing.

    A kernel that cannot be compiled raises its error when it is launched.
    """
    global _to_compile
    if INTERPRETED:
        return
    _to_compile = {}
    try:
        run()
        jobs = list(_to_compile.values())
    finally:
        _to_compile = None
    with ThreadPoolExecutor() as pool:
        for job in jobs:
            pool.submit(job)


def group_norm(
    x: Tensor,
    norm: nn.GroupNorm,
    span: int = 1,
    silu: bool = False,
    offset: Tensor | None = None,
    conv_bias: Tensor | None = None,
) -> Tensor:
    """Group norm of x + conv_bias + offset over `span` frames together, then SiLU.

    x (n, C, h, w), preferably channels-last; offset (1, C), or (n, C) with the same row for all frames of a window;
    conv_bias (C). Returns (n, C, h, w) channels-last in x's dtype.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    n, channels, h, w = x.shape
    windows, rows = n // span, span * h * w
    chunk_rows = ROWS * CHUNK_TILES
    chunks = triton.cdiv(rows, chunk_rows)
    blocks = triton.cdiv(channels, CHANNELS)
    partial = x.new_empty(windows, chunks, 2, channels, dtype=torch.float32)
    scale = x.new_empty(windows, 2, channels, dtype=torch.float32)
    out = torch.empty_like(x)
    tile = {"ROWS": ROWS, "CHANNELS": CHANNELS}
    launch(
        _channel_statistics, windows * chunks * blocks, x, partial, rows, channels, chunks, **tile, TILES=CHUNK_TILES
    )
    offset_stride = 0
    if offset is not None:
        offset = offset.contiguous()
        offset_stride = span * channels if len(offset) > 1 else 0
    width = triton.next_power_of_2(channels // norm.num_groups)
    launch(
        _group_scale,
        windows * norm.num_groups,
        partial,
        norm.weight,
        norm.bias,
        norm.weight if offset is None else offset,  # any pointer of that kind: not read
        norm.weight if conv_bias is None else conv_bias,
        scale,
        rows,
        channels,
        chunks,
        norm.num_groups,
        offset_stride,
        chunk_rows,
        int(conv_bias is not None),
        int(offset is not None),
        norm.eps,
        CHUNKS=max(1, MERGE_TILE // width),
        WIDTH=width,
    )
    programs = windows * triton.cdiv(rows, ROWS) * blocks
    launch(_scale_channels, programs, x, scale, out, rows, channels, **tile, SILU=silu)
    return out


def add_bias(x: Tensor, residual: Tensor | None, bias: Tensor) -> Tensor:
    """x + residual + bias, in place of x where it is channels-last; x and residual (n, C, h, w), bias (C)."""
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    n, channels, h, w = x.shape
    rows = n * h * w
    programs = triton.cdiv(rows, ROWS) * triton.cdiv(channels, CHANNELS)
    tile = {"ROWS": ROWS, "CHANNELS": CHANNELS, "HAS_RESIDUAL": residual is not None}
    launch(_add_bias, programs, x, x if residual is None else residual, bias, rows, channels, **tile)
    return x


def layer_norm(
    x: Tensor,
    norm: nn.LayerNorm,
    branch: Tensor | None = None,
    positions: Tensor | None = None,
    shift: Tensor | None = None,
    total_bias: Tensor | None = None,
    total: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(s + total_bias, norm(s) + positions), where s = x + branch + shift; the norm is over the last axis.

    x and branch (…, C) contiguous; shift and total_bias (C). With positions (≥ f, C), x is (b, f, p, C). The first
    result is written to `total`, by default over branch, and without a branch it is x; the second to `out`, by default
    a new tensor.
    """
    channels = x.shape[-1]
    rows = x.numel() // channels
    frames, pixels = x.shape[1:3] if positions is not None else (1, 1)
    if total is None:
        total = branch
    out = torch.empty_like(x) if out is None else out
    width = triton.next_power_of_2(channels)
    tile_rows = max(1, NORM_TILE // width)
    any_pointer = norm.weight  # in place of missing tensors, which are not read
    launch(
        _layer_norm,
        triton.cdiv(rows, tile_rows),
        x,
        any_pointer if branch is None else branch,
        any_pointer if shift is None else shift,
        norm.weight,
        norm.bias,
        any_pointer if positions is None else positions,
        any_pointer if total_bias is None else total_bias,
        x if total is None else total,
        out,
        rows,
        channels,
        pixels,
        frames,
        int(shift is not None),
        int(total_bias is not None),
        norm.eps,
        ROWS=tile_rows,
        CHANNELS=width,
        HAS_BRANCH=branch is not None,
        HAS_POSITIONS=positions is not None,
        HAS_TOTAL=total is not None,
    )
    return x if total is None else total, out


def geglu(x: Tensor) -> Tensor:
    """(…, 2 · inner) contiguous → (…, inner): value half times exact GELU of the gate half."""
    inner = x.shape[-1] // 2
    rows = x.numel() // (2 * inner)
    out = x.new_empty(*x.shape[:-1], inner)
    tile_rows, tile_inner = GEGLU_TILE
    programs = triton.cdiv(rows, tile_rows) * triton.cdiv(inner, tile_inner)
    launch(_geglu, programs, x, out, rows, inner, ROWS=tile_rows, INNER=tile_inner)
    return out


def frame_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention over the frames, pixel by pixel; q, k, v (b, f, p, C) with f ≤ ATTENTION_FRAMES → (b, f, p, C).

    The three may be slices of one (b, f, p, 3C) tensor, but must have the same stride from pixel to pixel.
    """
    b, f, p, channels = q.shape
    dim = channels // heads
    stride = q.stride(2)
    out = q.new_empty(b, f, p, channels)
    rows = max(ATTENTION_ROWS, triton.next_power_of_2(f))
    launch(
        _frame_attention,
        b * triton.cdiv(p * heads, rows // f),
        q,
        k,
        v,
        out,
        f,
        p,
        heads,
        stride,
        channels,
        dim**-0.5,
        ROWS=rows,
        DIM=dim,
        BLOCK_DIM=max(16, min(ATTENTION_DIM, triton.next_power_of_2(dim))),
        num_warps=ATTENTION_WARPS,
    )
    return out
