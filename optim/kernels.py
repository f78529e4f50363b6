"""Hand-written Triton kernels for what PyTorch's eager U-Net spends on memory traffic instead of arithmetic.

`accelerate(unet)` gives the modules below another forward over the same weights, `restore(unet)` takes it back:

    GroupNorm      statistics in one pass, norm and SiLU in a second, straight on channels-last memory
    ResnetBlock    the first convolution's bias and the time embedding vanish into the second norm; the second
                   bias and the residual are one addition; the 1×1 shortcut is a linear layer
    SpatialBlock   the residual additions are part of the layer norm that follows
    TemporalBlock  the same; the positions too; attention over frames reads q, k and v where they lie
    GEGLU          one pass

Every kernel reads its input once (a group norm twice) and writes its output once, works in float32 inside, and is
equal to eager but for the rounding of half precision, so it serves every level. No kernel is tuned at run time:
block sizes are the constants below, and the kernels compile in seconds and are kept in Triton's cache. None
synchronises with the host, so captured graphs may contain them.

Checked in Triton's interpreter against PyTorch, and compiled for compute capabilities 8.0, 9.0 and 12.0 with
Triton 3.7.1 (9.0 also with 3.6.0), but **not run or timed yet on any GPU**: the block sizes are reasoned, not
measured, and nothing is said here about speed.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentsync.unet import GEGLU, GroupNorm, ResnetBlock, SpatialBlock, TemporalBlock, UNet

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # as with PyTorch for the CPU, macOS and Windows: `accelerate` says so and changes nothing
    triton = None

    def jit(**_):
        return lambda kernel: kernel


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, slowly: for tests
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

ROWS, CHANNELS = 64, 64  # tile of the elementwise and group norm kernels; 64 channels = 128 bytes a row in float16
CHUNK_TILES = 4  # tiles of rows in one program's share of a group norm's statistics
MERGE_TILE = 4096  # elements of the partial statistics that a program merges at once
NORM_TILE = 4096  # elements in a layer norm's program: whole rows
GEGLU_TILE = (8, 256)
ATTENTION_ROWS = 64  # (frame, pixel, head) triples that one program's matrix products hold together
ATTENTION_DIM = 64  # most channels of a head loaded at once

CHECK_SIDE, CHECK_FRAMES = 8, 16  # latent pixels and frames of the pass that `accelerate` tries the kernels on
CHECK_ERROR = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-3}  # relative; a wrong kernel is off by 1


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


@jit(do_not_specialize=["rows", "chunks", "groups", "offset_stride", "chunk_rows"])
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
    eps,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):
    """What turns an input into its normalised output: factor and summand of every channel.

    partial (windows, chunks, 2, channels) → scale (windows, 2, channels), float32. With HAS_OFFSET the input is
    x + conv_bias + offset, per channel, though x alone was measured. One program merges one group of one window.
    """
    window = tl.program_id(0) // groups
    width = channels // groups
    c = tl.arange(0, WIDTH)
    inside = c < width
    c += tl.program_id(0) % groups * width
    move = tl.zeros((WIDTH,), tl.float32)
    if HAS_OFFSET:
        move += tl.load(conv_bias + c, mask=inside, other=0.0).to(tl.float32)
        move += tl.load(offset + window * offset_stride + c, mask=inside, other=0.0).to(tl.float32)
    partial += window.to(tl.int64) * chunks * 2 * channels
    k = tl.arange(0, CHUNKS)
    # Means are summed as distances from the first, for the same reason as above.
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
def _scale_channels(
    x, scale, out, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr
):
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
def _add_bias(x, residual, bias, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """x += residual + bias, in place; x and residual (rows, channels), bias (channels)."""
    blocks = tl.cdiv(channels, CHANNELS)
    r = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    at = r.to(tl.int64)[:, None] * channels + c[None, :]
    live = (r < rows)[:, None] & inside[None, :]
    y = tl.load(x + at, mask=live, other=0.0).to(tl.float32) + tl.load(residual + at, mask=live, other=0.0)
    y += tl.load(bias + c, mask=inside, other=0.0)[None, :]
    tl.store(x + at, y.to(x.dtype.element_ty), mask=live)


@jit(do_not_specialize=["rows", "pixels", "frames"])
def _layer_norm(
    x,
    branch,
    weight,
    bias,
    positions,
    out,
    rows,
    channels,
    pixels,
    frames,
    eps,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
):
    """out = norm(x + branch) + position of the row's frame; x + branch goes back into branch.

    x, branch, out (rows, channels), rows ordered (window, frame, pixel); positions (≥ frames, channels).
    CHANNELS ≥ channels: a program holds whole rows, so mean and variance are taken one after the other.
    """
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)
    inside = c < channels
    live = (r < rows)[:, None] & inside[None, :]
    at = r.to(tl.int64)[:, None] * channels + c[None, :]
    y = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        total = (y + tl.load(branch + at, mask=live, other=0.0)).to(branch.dtype.element_ty)
        tl.store(branch + at, total, mask=live)
        y = total.to(tl.float32)  # the norm sees the rounded sum, as it does in eager
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
    frames is too small for a matrix product of its own, so a program takes ROWS // frames neighbouring
    (pixel, head) pairs, which lie side by side in memory, as the rows of one product and masks out what pairs have
    to do with one another.
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


def _launch(kernel, programs: int, x: Tensor, *args, **constants) -> None:
    """Start the kernel on x's device, which need not be the current one."""
    with torch.cuda.device_of(x):
        kernel[(programs,)](x, *args, **constants)


def group_norm(
    x: Tensor,
    norm: nn.GroupNorm,
    span: int = 1,
    silu: bool = False,
    offset: Tensor | None = None,
    conv_bias: Tensor | None = None,
) -> Tensor:
    """Group norm over `span` frames together of x + conv_bias + offset, then SiLU.

    x (n, C, h, w), best channels-last; offset (1, C), or (n, C) with the same row for all frames of a window; it
    comes with conv_bias (C). Returns (n, C, h, w) channels-last in x's dtype.
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
    _launch(
        _channel_statistics, windows * chunks * blocks, x, partial, rows, channels, chunks, **tile, TILES=CHUNK_TILES
    )
    has_offset = offset is not None
    if has_offset:
        offset = offset.contiguous()
    width = triton.next_power_of_2(channels // norm.num_groups)
    _launch(
        _group_scale,
        windows * norm.num_groups,
        partial,
        norm.weight,
        norm.bias,
        offset if has_offset else partial,  # any pointer: not read
        conv_bias if has_offset else partial,
        scale,
        rows,
        channels,
        chunks,
        norm.num_groups,
        span * channels if has_offset and len(offset) > 1 else 0,
        chunk_rows,
        norm.eps,
        CHUNKS=max(1, MERGE_TILE // width),
        WIDTH=width,
        HAS_OFFSET=has_offset,
    )
    programs = windows * triton.cdiv(rows, ROWS) * blocks
    _launch(_scale_channels, programs, x, scale, out, rows, channels, **tile, SILU=silu)
    return out


def add_bias(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
    """x + residual + bias, written over x; x and residual (n, C, h, w) channels-last, bias (C)."""
    residual = residual.contiguous(memory_format=torch.channels_last)
    n, channels, h, w = x.shape
    rows = n * h * w
    programs = triton.cdiv(rows, ROWS) * triton.cdiv(channels, CHANNELS)
    _launch(_add_bias, programs, x, residual, bias, rows, channels, ROWS=ROWS, CHANNELS=CHANNELS)
    return x


def layer_norm(
    x: Tensor, norm: nn.LayerNorm, branch: Tensor | None = None, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(x + branch, its layer norm over the last axis plus the positions).

    x and branch (…, C) contiguous; the sum is written over branch. With positions (≥ f, C), x is (b, f, p, C).
    """
    channels = x.shape[-1]
    rows = x.numel() // channels
    frames, pixels = x.shape[1:3] if positions is not None else (1, 1)
    out = torch.empty_like(x)
    width = triton.next_power_of_2(channels)
    tile_rows = max(1, NORM_TILE // width)
    _launch(
        _layer_norm,
        triton.cdiv(rows, tile_rows),
        x,
        x if branch is None else branch,
        norm.weight,
        norm.bias,
        norm.weight if positions is None else positions,
        out,
        rows,
        channels,
        pixels,
        frames,
        norm.eps,
        ROWS=tile_rows,
        CHANNELS=width,
        HAS_BRANCH=branch is not None,
        HAS_POSITIONS=positions is not None,
    )
    return x if branch is None else branch, out


def geglu(x: Tensor) -> Tensor:
    """(…, 2 · inner) contiguous → (…, inner): value half times exact GELU of the gate half."""
    inner = x.shape[-1] // 2
    rows = x.numel() // (2 * inner)
    out = x.new_empty(*x.shape[:-1], inner)
    tile_rows, tile_inner = GEGLU_TILE
    programs = triton.cdiv(rows, tile_rows) * triton.cdiv(inner, tile_inner)
    _launch(_geglu, programs, x, out, rows, inner, ROWS=tile_rows, INNER=tile_inner)
    return out


def frame_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention over the frames, pixel by pixel; q, k, v (b, f, p, C) with f ≤ ATTENTION_ROWS → (b, f, p, C).

    The three may be slices of one (b, f, p, 3C) tensor: only the step from pixel to pixel must be the same.
    """
    b, f, p, channels = q.shape
    dim = channels // heads
    stride = q.stride(2)
    out = q.new_empty(b, f, p, channels)
    _launch(
        _frame_attention,
        b * triton.cdiv(p * heads, ATTENTION_ROWS // f),
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
        ROWS=ATTENTION_ROWS,
        DIM=dim,
        BLOCK_DIM=max(16, min(ATTENTION_DIM, triton.next_power_of_2(dim))),
    )
    return out


# ---- the modules over them


_said: set[str] = set()


def _say(sentence: str) -> None:
    """One line on the standard error, once a process."""
    if sentence not in _said:
        _said.add(sentence)
        print(sentence, file=sys.stderr)


def _serves(x: Tensor) -> bool:
    """Whether the kernels take x; if not, say why once, and the module runs as PyTorch has it."""
    if not (x.is_cuda or INTERPRETED):
        why = f"a tensor is on {x.device.type}"
    elif x.dtype not in DTYPES:
        why = f"{x.dtype} has no kernel"
    elif torch.is_grad_enabled():
        why = "gradients are being recorded"
    else:
        return True
    _say(f"Fused kernels are not used for some modules ({why}); PyTorch's own run instead.")
    return False


def _multiplies(x: Tensor) -> bool:
    """Whether the products of `_frame_attention` run on matrix units; without them they would spill registers."""
    if INTERPRETED or x.dtype != torch.float32 and torch.cuda.get_device_capability(x.device) >= (8, 0):
        return True
    _say("The fused attention over frames is not used (it wants half precision and an Ampere GPU or newer).")
    return False


class FastGroupNorm(GroupNorm):
    def forward(self, x: Tensor, span: int = 1) -> Tensor:
        if not _serves(x):
            return super().forward(x, span)
        return group_norm(x, self, span, self.silu)


class FastResnetBlock(ResnetBlock):
    def forward(self, x: Tensor, time: Tensor, frames: int) -> Tensor:
        if not _serves(x):
            return super().forward(x, time, frames)
        h = F.conv2d(self.norm1(x, frames), self.conv1.weight, padding=1)
        h = group_norm(h, self.norm2, frames, True, self.time_emb_proj(time), self.conv1.bias)
        h = F.conv2d(h, self.conv2.weight, padding=1).contiguous(memory_format=torch.channels_last)
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut
            x = F.linear(x.permute(0, 2, 3, 1), shortcut.weight.flatten(1), shortcut.bias).permute(0, 3, 1, 2)
        return add_bias(h, x, self.conv2.bias)


class FastSpatialBlock(SpatialBlock):
    def forward(self, x: Tensor, audio: tuple[Tensor, Tensor]) -> Tensor:
        if not _serves(x):
            return super().forward(x, audio)
        x, h = layer_norm(x.contiguous(), self.norm1)
        x, h = layer_norm(x, self.norm2, self.attn1(h, self.attn1.keys(h)))
        x, h = layer_norm(x, self.norm3, self.attn2(h, audio))
        return x + self.ff(h)


class FastTemporalBlock(TemporalBlock):
    def forward(self, x: Tensor) -> Tensor:
        known = min(attention.pos_encoder.pe.shape[1] for attention in self.attention_blocks)
        if x.shape[1] > min(known, ATTENTION_ROWS) or not (_serves(x) and _multiplies(x)):
            return super().forward(x)
        x, branch = x.contiguous(), None
        for attention, norm in zip(self.attention_blocks, self.norms, strict=True):
            x, h = layer_norm(x, norm, branch, attention.pos_encoder.pe[0])
            h = frame_attention(attention.to_q(h), *attention.keys(h), attention.heads)
            branch = attention.to_out[0](h)
        x, h = layer_norm(x, self.ff_norm, branch)
        return x + self.ff(h)


class FastGEGLU(GEGLU):
    def forward(self, x: Tensor) -> Tensor:
        if not _serves(x):
            return super().forward(x)
        return geglu(self.proj(x).contiguous())


FAST = {
    GroupNorm: FastGroupNorm,
    ResnetBlock: FastResnetBlock,
    SpatialBlock: FastSpatialBlock,
    TemporalBlock: FastTemporalBlock,
    GEGLU: FastGEGLU,
}


def _swap(unet: UNet, classes: dict[type, type]) -> None:
    for module in unet.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]


@torch.inference_mode()
def _trial(unet: UNet) -> Tensor:
    """One small pass of two windows on fixed random inputs."""
    config, weight = unet.config, unet.conv_in.weight
    like = {"device": weight.device, "dtype": weight.dtype}
    frames = min(CHECK_FRAMES, config.temporal_max_len)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, config.in_channels, frames, CHECK_SIDE, CHECK_SIDE, generator=random)
    audio = torch.randn(2, frames, 50, config.cross_attention_dim, generator=random)
    return unet(x.to(**like), torch.tensor([500], device=weight.device), audio.to(**like)).float()


def accelerate(unet: UNet) -> UNet:
    """Put the fused kernels under the modules of a U-Net on a GPU; weights and their names stay as they are.

    Tries them first: one small pass with and without must agree, or the network stays as it was and one line on
    the standard error says why. The pass also compiles the kernels, so a graph can be captured right afterwards.
    On the CPU nothing changes and nothing is said. Returns the same network; `restore` undoes it.
    """
    weight = unet.conv_in.weight
    if not (weight.is_cuda or INTERPRETED):
        return unet
    if triton is None:
        _say("Fused kernels are off: Triton is not installed; PyTorch's own run instead.")
        return unet
    expected = _trial(unet)
    _swap(unet, FAST)
    try:
        error = float((_trial(unet) - expected).norm() / expected.norm())
    except Exception as failure:  # no C compiler, a GPU that Triton does not know, ...: whatever it is, eager works
        problem = f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure) else 'no detail'}"
    else:
        bound = CHECK_ERROR.get(weight.dtype, 0.0)
        problem = "" if error <= bound else f"their result is off by {error:.1e} (at most {bound:.0e})"
    if problem:
        restore(unet)
        _say(f"Fused kernels are off: {problem}; PyTorch's own run instead.")
    return unet


def restore(unet: UNet) -> UNet:
    """Take back what `accelerate` did."""
    _swap(unet, {fast: plain for plain, fast in FAST.items()})
    return unet
