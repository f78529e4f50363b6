"""Layers of the U-Net: norms, residual blocks, spatial and temporal transformers.

Activations are (b·f, C, h, w) in channels-last memory: b windows of f frames. Convolutions, linears and attention read
them without a rearranging copy. Parameters have the names of the released checkpoints.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPORAL_GROUPS = 32  # groups of the temporal module's GroupNorm, whatever the configuration says
TRANSFORMER_EPS = 1e-6  # GroupNorm of spatial and temporal transformers
FF_MULTIPLE = 4  # feed-forward width over model width


class GroupNorm(nn.GroupNorm):
    """Group norm over `span` frames together, optionally followed by SiLU.

    x (n, C, h, w) channels-last → the same shape and layout. span = 1 normalises each frame alone; span = f
    ties the frames of a window, as a norm of the 5-D tensor does: in channels-last memory that is the 4-D norm
    of the view (n / span, C, span·h, w).
    """

    def __init__(self, groups: int, channels: int, eps: float, silu: bool = False):
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor, span: int = 1) -> Tensor:
        n, c, h, w = x.shape
        tied = x.permute(0, 2, 3, 1).reshape(n // span, span * h, w, c).permute(0, 3, 1, 2)
        tied = super().forward(tied)
        if self.silu:
            tied = F.silu(tied)
        return tied.permute(0, 2, 3, 1).reshape(n, h, w, c).permute(0, 3, 1, 2)


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, + time, norm, SiLU, conv, + shortcut; x (b·f, C_in, h, w) → (b·f, C_out, h, w)."""

    def __init__(self, c_in: int, c_out: int, time_dim: int, groups: int, eps: float):
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in, eps, silu=True)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, c_out)
        self.norm2 = GroupNorm(groups, c_out, eps, silu=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, time: Tensor, frames: int) -> Tensor:
        """time: (1 or b·f, time_dim), already through SiLU."""
        h = self.conv1(self.norm1(x, frames))
        h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(self.norm2(h, frames))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Multi-head attention; q, k and v have no bias."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context (n, k, context_dim) → keys and values, each (n, k, C)."""
        return self.to_k(context), self.to_v(context)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (n, q, C) → (n, q, C); without `keys_values`, x attends to itself."""
        if keys_values is None:
            keys_values = self.keys_values(x)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for t in (self.to_q(x), *keys_values))
        return self.to_out[0](self.attend(q, k, v).transpose(-3, -2).flatten(-2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(n, heads, q, c), (n, heads, k, c) twice → (n, heads, q, c)."""
        return F.scaled_dot_product_attention(q, k, v)


class GEGLU(nn.Module):
    """(…, d) → (…, inner): value half times exact GELU of the gate half."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU and a linear back; (…, d) → (…, d). `net.1` is the reference's dropout, which has no weights."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, FF_MULTIPLE * dim), nn.Identity(), nn.Linear(FF_MULTIPLE * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class SpatialBlock(nn.Module):
    """Self-attention, cross-attention to the frame's audio, feed-forward; tokens (b·f, h·w, C)."""

    def __init__(self, dim: int, audio_dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, audio_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, audio: tuple[Tensor, Tensor], guided: bool = False) -> Tensor:
        """audio: keys and values of m frames. Unguided, x has m frames → the same shape. Guided, x has m frames (not
        yet split into uncond and cond) or 2m (m uncond, then m cond) → 2m frames."""
        x = x + self.attn1(self.norm1(x))
        m = len(audio[0])
        cond = x[-m:]
        cond = cond + self.attn2(self.norm2(cond), audio)
        # Without audio, cross-attention yields its output bias alone.
        x = torch.cat([x[:m] + self.attn2.to_out[0].bias, cond]) if guided else cond
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A SpatialBlock between two 1×1 convolutions, per frame; x (b·f, C, h, w) → the same, or twice the frames."""

    def __init__(self, dim: int, audio_dim: int, heads: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, dim, TRANSFORMER_EPS)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([SpatialBlock(dim, audio_dim, heads)])
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, audio: tuple[Tensor, Tensor], guided: bool = False) -> Tensor:
        """Arguments as of `SpatialBlock`."""
        n, c, h, w = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(n, h * w, c)
        # A 1×1 convolution of channels-last memory is a linear layer on the tokens.
        tokens = F.linear(tokens, self.proj_in.weight.flatten(1), self.proj_in.bias)
        tokens = self.transformer_blocks[0](tokens, audio, guided)
        tokens = F.linear(tokens, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return tokens.reshape(-1, h, w, c).permute(0, 3, 1, 2) + match_batch(x, tokens)


def match_batch(x: Tensor, other: Tensor) -> Tensor:
    """x, repeated along its first axis if a guided pass has split into uncond and cond between x and `other`."""
    return x if len(x) == len(other) else torch.cat([x, x])


class PositionalEncoding(nn.Module):
    """Buffer `pe` (1, max_len, C): even channels sine, odd channels cosine, base 10000."""

    def __init__(self, dim: int, max_len: int):
        super().__init__()
        position = torch.arange(max_len, device="cpu")[:, None]
        rate = torch.exp(torch.arange(0, dim, 2, device="cpu") * (-math.log(10000.0) / dim))
        pe = torch.zeros(1, max_len, dim)
        pe[0, :, 0::2] = torch.sin(position * rate)
        pe[0, :, 1::2] = torch.cos(position * rate)
        self.register_buffer("pe", pe)


class TemporalAttention(Attention):
    """Attention over the frames of a window; their positions go into q, k and v. x (n, f, C) → the same."""

    def __init__(self, dim: int, heads: int, max_len: int):
        super().__init__(dim, dim, heads)
        self.pos_encoder = PositionalEncoding(dim, max_len)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return super().forward(x + self.pos_encoder.pe[:, : x.shape[1]].to(x.dtype), keys_values)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.requires_grad:
            return super().attend(q, k, v)
        # Fused kernels work in blocks of 64 or more; forward and backward, 16 frames are quicker as plain products.
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1) @ v


class TemporalBlock(nn.Module):
    """Self-attentions over the frames, pixel by pixel, then feed-forward; x (b, f, p, C), p pixels → the same."""

    def __init__(self, dim: int, heads: int, attentions: int, max_len: int):
        super().__init__()
        self.attention_blocks = nn.ModuleList(TemporalAttention(dim, heads, max_len) for _ in range(attentions))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(attentions))
        self.ff = FeedForward(dim)
        self.ff_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        for attention, norm in zip(self.attention_blocks, self.norms, strict=True):
            # (b·p, f, C): the fused attention kernels take no more than a batch and heads.
            h = attention(norm(x).transpose(1, 2).flatten(0, 1))
            x = x + h.unflatten(0, (len(x), -1)).transpose(1, 2)
        return x + self.ff(self.ff_norm(x))


class TemporalTransformer(nn.Module):
    """Per-frame norm, linear in, TemporalBlock, linear out, residual; x (b·f, C, h, w) → the same."""

    def __init__(self, dim: int, heads: int, attentions: int, max_len: int):
        super().__init__()
        self.norm = GroupNorm(TEMPORAL_GROUPS, dim, TRANSFORMER_EPS)
        self.proj_in = nn.Linear(dim, dim)
        self.transformer_blocks = nn.ModuleList([TemporalBlock(dim, heads, attentions, max_len)])
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        n, c, h, w = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(n // frames, frames, h * w, c)
        tokens = self.proj_out(self.transformer_blocks[0](self.proj_in(tokens)))
        return tokens.reshape(n, h, w, c).permute(0, 3, 1, 2) + x


class MotionModule(nn.Module):
    """The temporal transformer under the name it has in the released weights."""

    def __init__(self, dim: int, heads: int, attentions: int, max_len: int):
        super().__init__()
        self.temporal_transformer = TemporalTransformer(dim, heads, attentions, max_len)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        return self.temporal_transformer(x, frames)


class Resample(nn.Module):
    """The 3×3 convolution between two resolutions, under the name it has in the released weights."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=stride, padding=1)


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep (cosines first), Linear, SiLU, Linear."""

    def __init__(self, width: int, time_dim: int):
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, timestep: Tensor) -> Tensor:
        """timestep (n,) → (n, time_dim)."""
        half = self.width // 2
        rate = torch.exp(torch.arange(half, device=timestep.device) * (-math.log(10000.0) / half))
        angle = timestep.float()[:, None] * rate
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))
