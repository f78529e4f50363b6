"""The audio-conditioned U-Net of LatentSync, shaped for speed.

Activations stay (b·f, C, h, w) in channels-last memory through the whole network (b windows of f frames), so
convolutions, linears and attention read them without a rearranging copy. `full` is one pass over everything;
`shallow` is DeepCache's pass over the outer layers alone. Neither synchronises with the device, so each can be
compiled or captured as a graph. Names of parameters are those of the released checkpoints.

Guidance wants two predictions, with the audio and with none. Until the first cross-attention both are the same, and
without audio cross-attention yields its output bias alone (keys and values have no bias). So a `guided` pass takes
each frame once, becomes two at that first cross-attention, and spares the silent half all others: exact, and about a
twentieth of the work at 512 px.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPORAL_GROUPS = 32  # the temporal module's own GroupNorm has 32 groups whatever the configuration says
TRANSFORMER_EPS = 1e-6  # GroupNorm of spatial and temporal transformers
FF_MULTIPLE = 4  # feed-forward width over model width

Context = list[tuple[Tensor, Tensor]]  # keys and values of the audio, one pair a spatial transformer


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a U-Net; the defaults are those of LatentSync 1.5 and 1.6."""

    in_channels: int = 13  # noisy latents, mask (1), masked latents, reference latents
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    cross_attention: tuple[bool, ...] = (True, True, True, False)  # a level, going down
    temporal: tuple[bool, ...] = (True, True, True, True)  # a level, going down
    layers_per_block: int = 2
    heads: int = 8
    cross_attention_dim: int = 384
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    temporal_heads: int = 8
    temporal_layers: int = 2  # self-attentions in a temporal module
    temporal_max_len: int = 24  # frames

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "UNetConfig":
        """Read the configuration in the released files' own words.

        Raises ValueError where it asks for something this network is not.
        """
        fixed = {
            "act_fn": "silu",
            "add_audio_layer": True,
            "center_input_sample": False,
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "mid_block_scale_factor": 1,
            "mid_block_type": "UNetMidBlock3DCrossAttn",
            "motion_module_decoder_only": False,
            "motion_module_mid_block": False,
            "motion_module_type": "Vanilla",
            "resnet_time_scale_shift": "default",
        }
        motion = config.get("motion_module_kwargs", {})
        fixed_motion = {
            "num_transformer_block": 1,
            "temporal_attention_dim_div": 1,
            "temporal_position_encoding": True,
        }
        for given, wanted in ((config, fixed), (motion, fixed_motion)):
            for name, value in wanted.items():
                if given.get(name, value) != value:
                    raise ValueError(f"{name} = {given[name]!r} is not supported, only {value!r}")
        attentions = motion.get("attention_block_types", ("Temporal_Self",) * cls.temporal_layers)
        if set(attentions) != {"Temporal_Self"}:
            raise ValueError(f"attention_block_types = {attentions!r} is not supported, only 'Temporal_Self'")
        widths = tuple(config.get("block_out_channels", cls.block_out_channels))
        down = config.get("down_block_types")
        cross = tuple("CrossAttn" in kind for kind in down) if down else cls.cross_attention
        up = config.get("up_block_types")
        if len(cross) != len(widths) or (up and tuple("CrossAttn" in k for k in up) != cross[::-1]):
            raise ValueError("the up blocks do not mirror the down blocks")
        resolutions = config.get("motion_module_resolutions", (1, 2, 4, 8))
        temporal = tuple(
            bool(config.get("use_motion_module", True)) and 2**level in resolutions for level in range(len(widths))
        )
        return cls(
            in_channels=config.get("in_channels", cls.in_channels),
            out_channels=config.get("out_channels", cls.out_channels),
            block_out_channels=widths,
            cross_attention=cross,
            temporal=temporal,
            layers_per_block=config.get("layers_per_block", cls.layers_per_block),
            heads=config.get("attention_head_dim", cls.heads),
            cross_attention_dim=config.get("cross_attention_dim", cls.cross_attention_dim),
            norm_num_groups=config.get("norm_num_groups", cls.norm_num_groups),
            norm_eps=config.get("norm_eps", cls.norm_eps),
            temporal_heads=motion.get("num_attention_heads", cls.temporal_heads),
            temporal_layers=len(attentions),
            temporal_max_len=motion.get("temporal_position_encoding_max_len", cls.temporal_max_len),
        )


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

    def __init__(self, config: UNetConfig, c_in: int, c_out: int, time_dim: int):
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
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
    """Multi-head attention, q, k, v without bias; (n, q, C) from context (n, k, D) → (n, q, C)."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context (n, k, D) → keys and values, each (n, k, C)."""
        return self.to_k(context), self.to_v(context)

    def forward(self, x: Tensor, keys: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for t in (self.to_q(x), *keys))
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

    def __init__(self, dim: int, config: UNetConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, config.heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, config.cross_attention_dim, config.heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, audio: tuple[Tensor, Tensor], guided: bool = False) -> Tensor:
        """audio: keys and values of m frames. Unguided, x has m frames → the same shape; guided, x has the m frames
        (not yet two), or m without audio and then m with it → 2m frames."""
        h = self.norm1(x)
        x = x + self.attn1(h, self.attn1.keys(h))
        m = len(audio[0])
        heard = x[-m:]
        heard = heard + self.attn2(self.norm2(heard), audio)
        x = torch.cat([x[:m] + self.attn2.to_out[0].bias, heard]) if guided else heard
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A SpatialBlock between two 1×1 convolutions, per frame; x (b·f, C, h, w) → the same, or twice the frames."""

    def __init__(self, dim: int, config: UNetConfig):
        super().__init__()
        self.norm = GroupNorm(config.norm_num_groups, dim, TRANSFORMER_EPS)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([SpatialBlock(dim, config)])
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, audio: tuple[Tensor, Tensor], guided: bool = False) -> Tensor:
        n, c, h, w = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(n, h * w, c)
        # A 1×1 convolution of channels-last memory is a linear layer on the tokens.
        tokens = F.linear(tokens, self.proj_in.weight.flatten(1), self.proj_in.bias)
        tokens = self.transformer_blocks[0](tokens, audio, guided)
        tokens = F.linear(tokens, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return tokens.reshape(-1, h, w, c).permute(0, 3, 1, 2) + as_many(x, tokens)


def as_many(x: Tensor, other: Tensor) -> Tensor:
    """x, repeated along its first axis where it is from before a guided pass became two and `other` from after."""
    return x if len(x) == len(other) else torch.cat([x, x])


class PositionalEncoding(nn.Module):
    """Buffer `pe` (1, max_len, C): even channels sine, odd channels cosine, base 10000."""

    def __init__(self, dim: int, max_len: int):
        super().__init__()
        position = torch.arange(max_len)[:, None]
        rate = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
        pe = torch.zeros(1, max_len, dim)
        pe[0, :, 0::2] = torch.sin(position * rate)
        pe[0, :, 1::2] = torch.cos(position * rate)
        self.register_buffer("pe", pe)


class TemporalAttention(Attention):
    """Self-attention over the frames of a window, pixel by pixel."""

    def __init__(self, dim: int, config: UNetConfig):
        super().__init__(dim, dim, config.temporal_heads)
        self.pos_encoder = PositionalEncoding(dim, config.temporal_max_len)

    def forward(self, x: Tensor) -> Tensor:
        """x (b, f, p, C), p pixels → the same. The positions go into q, k and v."""
        b = len(x)
        h = (x + self.pos_encoder.pe[:, : x.shape[1], None].to(x.dtype)).transpose(1, 2)  # (b, p, f, C)
        h = h.flatten(0, 1)  # three dimensions: the fused attention kernels take no more than a batch and heads
        return super().forward(h, self.keys(h)).unflatten(0, (b, -1)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.requires_grad:
            return super().attend(q, k, v)
        # Fused kernels work in blocks of 64 or more; there and back, 16 frames are quicker as plain products.
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1) @ v


class TemporalBlock(nn.Module):
    """Self-attentions over the frames, then feed-forward; x (b, f, p, C) → the same."""

    def __init__(self, dim: int, config: UNetConfig):
        super().__init__()
        layers = range(config.temporal_layers)
        self.attention_blocks = nn.ModuleList(TemporalAttention(dim, config) for _ in layers)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in layers)
        self.ff = FeedForward(dim)
        self.ff_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        for attention, norm in zip(self.attention_blocks, self.norms, strict=True):
            x = x + attention(norm(x))
        return x + self.ff(self.ff_norm(x))


class TemporalTransformer(nn.Module):
    """Per-frame norm, linear in, TemporalBlock, linear out, residual; x (b·f, C, h, w) → the same."""

    def __init__(self, dim: int, config: UNetConfig):
        super().__init__()
        self.norm = GroupNorm(TEMPORAL_GROUPS, dim, TRANSFORMER_EPS)
        self.proj_in = nn.Linear(dim, dim)
        self.transformer_blocks = nn.ModuleList([TemporalBlock(dim, config)])
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        n, c, h, w = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(n // frames, frames, h * w, c)
        tokens = self.proj_out(self.transformer_blocks[0](self.proj_in(tokens)))
        return tokens.reshape(n, h, w, c).permute(0, 3, 1, 2) + x


class MotionModule(nn.Module):
    """The temporal transformer under the name that the released weights have for it."""

    def __init__(self, dim: int, config: UNetConfig):
        super().__init__()
        self.temporal_transformer = TemporalTransformer(dim, config)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        return self.temporal_transformer(x, frames)


class Resample(nn.Module):
    """The 3×3 convolution that goes between two levels, under its released name."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=stride, padding=1)


class Level(nn.Module):
    """One resolution of the U-Net: layers of (residual block, spatial transformer, temporal module).

    `widths_in[j]` is what enters layer j (skip included, going up). `stride` 2 ends with a convolution that
    halves the picture, 1 with one that follows a doubling, None with nothing.
    """

    def __init__(
        self,
        config: UNetConfig,
        widths_in: Sequence[int],
        width: int,
        time_dim: int,
        cross_attention: bool,
        temporal: bool,
        stride: int | None,
    ):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(config, c, width, time_dim) for c in widths_in)
        self.attentions = nn.ModuleList(SpatialTransformer(width, config) for _ in widths_in if cross_attention)
        self.motion_modules = nn.ModuleList(MotionModule(width, config) for _ in widths_in if temporal)
        self.downsamplers = nn.ModuleList([Resample(width, 2)] if stride == 2 else [])
        self.upsamplers = nn.ModuleList([Resample(width, 1)] if stride == 1 else [])

    def layer(self, j: int, x: Tensor, time: Tensor, audio: Context, frames: int, guided: bool) -> Tensor:
        """Layer j; audio: this level's keys and values, one pair a layer (empty without cross-attention)."""
        x = self.resnets[j](x, time, frames)
        if self.attentions:
            x = self.attentions[j](x, audio[j], guided)
        if self.motion_modules:
            x = self.motion_modules[j](x, frames)
        return x

    def downsample(self, x: Tensor) -> Tensor:
        return self.downsamplers[0].conv(x) if self.downsamplers else x

    def upsample(self, x: Tensor) -> Tensor:
        return self.upsamplers[0].conv(F.interpolate(x, scale_factor=2.0)) if self.upsamplers else x


class MidBlock(nn.Module):
    """Residual block, spatial transformer, residual block; no temporal module."""

    def __init__(self, config: UNetConfig, width: int, time_dim: int):
        super().__init__()
        self.attentions = nn.ModuleList([SpatialTransformer(width, config)])
        self.resnets = nn.ModuleList(ResnetBlock(config, width, width, time_dim) for _ in range(2))

    def forward(self, x: Tensor, time: Tensor, audio: Context, frames: int, guided: bool) -> Tensor:
        x = self.resnets[0](x, time, frames)
        x = self.attentions[0](x, audio[0], guided)
        return self.resnets[1](x, time, frames)


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


class UNet(nn.Module):
    """Predicts the noise (epsilon) in a window's latents from the audio of each frame."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, layers = config.block_out_channels, config.layers_per_block
        time_dim = 4 * widths[0]
        last = len(widths) - 1
        self.time_embedding = TimeEmbedding(widths[0], time_dim)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # widths of the tensors that the decoder will take up
        for i, width in enumerate(widths):
            stride = 2 if i < last else None
            entering = [skips[-1]] + [width] * (layers - 1)
            kinds = config.cross_attention[i], config.temporal[i]
            self.down_blocks.append(Level(config, entering, width, time_dim, *kinds, stride))
            skips += [width] * (layers + (stride == 2))

        self.mid_block = MidBlock(config, widths[-1], time_dim)

        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            stride = 1 if i > 0 else None
            entering = [skips.pop() + (below if j == 0 else width) for j in range(layers + 1)]
            kinds = config.cross_attention[i], config.temporal[i]
            self.up_blocks.append(Level(config, entering, width, time_dim, *kinds, stride))
            below = width

        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], config.norm_eps, silu=True)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def transformers(self) -> list[SpatialTransformer]:
        """The spatial transformers in the order in which a full pass meets them: that of a `Context`."""
        return [t for part in (*self.down_blocks, self.mid_block, *self.up_blocks) for t in part.attentions]

    def encode_audio(self, audio: Tensor) -> Context:
        """Keys and values of the audio for every cross-attention; they are the same at all timesteps.

        audio: (b, f, tokens, cross_attention_dim) → pairs of (b·f, tokens, C).
        """
        tokens = audio.flatten(0, 1)
        return [t.transformer_blocks[0].attn2.keys(tokens) for t in self.transformers()]

    def _split(self, context: Context) -> tuple[list[Context], Context, list[Context]]:
        """A context by part: down levels, middle, up levels."""
        rest = iter(context)
        parts = [[next(rest) for _ in part.attentions] for part in (*self.down_blocks, self.mid_block, *self.up_blocks)]
        n = len(self.down_blocks)
        return parts[:n], parts[n], parts[n + 1 :]

    def _time(self, timestep: Tensor, frames: int) -> Tensor:
        """timestep (1,) or (b,) → (1 or b·f, time_dim) through SiLU, as every residual block takes it."""
        time = F.silu(self.time_embedding(timestep))
        return time if len(time) == 1 else time.repeat_interleave(frames, dim=0)

    def _outer(self, branch: int) -> tuple[int, int]:
        """DeepCache branch → (level, layers of it) that a shallow pass computes on the way down."""
        level, layers = branch // 3, branch % 3
        return level, min(layers, self.config.layers_per_block)

    def full(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Context,
        frames: int,
        branch: int | None = None,
        guided: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Every layer once.

        x: (b·f, in_channels, h, w), h and w multiples of 2^(levels − 1); timestep: (1,), or (b,) if not guided;
        context: from `encode_audio`; frames: f.
        Returns epsilon (b·f, out_channels, h, w), or if guided (2·b·f, …), first without audio, then with it; and,
        with a DeepCache branch, the tensor that `shallow` takes, of as many frames.
        """
        time = self._time(timestep, frames)
        down_audio, mid_audio, up_audio = self._split(context)
        x = self.conv_in(x)
        skips = [x]
        for level, audio in zip(self.down_blocks, down_audio, strict=True):
            for j in range(len(level.resnets)):
                x = level.layer(j, x, time, audio, frames, guided)
                skips.append(x)
            if level.downsamplers:
                x = level.downsample(x)
                skips.append(x)

        x = self.mid_block(x, time, mid_audio, frames, guided)

        cached = None
        keep_at = None  # skips left when the tensor to keep stands before its up layer
        if branch is not None:
            outer, layers = self._outer(branch)
            keep_at = outer * (self.config.layers_per_block + 1) + layers + 1
        for level, audio in zip(self.up_blocks, up_audio, strict=True):
            for j in range(len(level.resnets)):
                if len(skips) == keep_at:
                    cached = x
                x = level.layer(j, torch.cat([x, as_many(skips.pop(), x)], dim=1), time, audio, frames, guided)
            x = level.upsample(x)
        return self.conv_out(self.conv_norm_out(x, frames)), cached

    def shallow(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Context,
        frames: int,
        branch: int,
        cached: Tensor,
        guided: bool = False,
    ) -> Tensor:
        """The outer layers alone, the rest taken from the last full pass (DeepCache).

        Arguments as in `full`; branch k names level k // 3 and the k % 3 of its layers computed on the way down;
        cached: what `full` returned for the same branch, or, unguided after a guided one, its second half.
        Returns epsilon as `full` does.
        """
        time = self._time(timestep, frames)
        down_audio, _, up_audio = self._split(context)
        outer, layers = self._outer(branch)
        x = self.conv_in(x)
        skips = [x]
        for i in range(outer + 1):
            level = self.down_blocks[i]
            for j in range(len(level.resnets) if i < outer else layers):
                x = level.layer(j, x, time, down_audio[i], frames, guided)
                skips.append(x)
            if i < outer:
                x = level.downsample(x)
                skips.append(x)

        x = cached
        for i in range(len(self.up_blocks) - 1 - outer, len(self.up_blocks)):
            level = self.up_blocks[i]
            n = len(level.resnets)
            first = n - 1 - layers if len(self.up_blocks) - 1 - i == outer else 0
            for j in range(first, n):
                x = level.layer(j, torch.cat([x, as_many(skips.pop(), x)], dim=1), time, up_audio[i], frames, guided)
            x = level.upsample(x)
        return self.conv_out(self.conv_norm_out(x, frames))

    def forward(self, sample: Tensor, timestep: Tensor, audio: Tensor) -> Tensor:
        """One pass in the reference's shapes.

        sample: (b, in_channels, f, h, w); timestep: (1,) or (b,); audio: (b, f, tokens, cross_attention_dim).
        Returns epsilon (b, out_channels, f, h, w).
        """
        b, _, f, _, _ = sample.shape
        x = frames_first(sample)
        out, _ = self.full(x, timestep, self.encode_audio(audio), f)
        return windows_first(out, b)


def frames_first(x: Tensor) -> Tensor:
    """(b, C, f, h, w) → (b·f, C, h, w), channels-last."""
    return x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def windows_first(x: Tensor, windows: int) -> Tensor:
    """(b·f, C, h, w) → (b, C, f, h, w)."""
    return x.unflatten(0, (windows, -1)).transpose(1, 2)
