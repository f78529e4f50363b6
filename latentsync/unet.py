"""The audio-conditioned U-Net of LatentSync, shaped for speed.

`full` is one pass over everything; `shallow` is DeepCache's pass over the outer layers alone. Neither synchronises with
the device, so each can be compiled or captured as a graph. Activations stay in the layout described in
`latentsync.layers` through the whole network.

Classifier-free guidance needs two predictions, cond (with the audio) and uncond (without). Until the first
cross-attention both are the same, and without audio cross-attention yields its output bias alone (keys and values have
no bias). So a `guided` pass computes each frame once up to the first cross-attention, splits there into uncond and
cond, and skips cross-attention for the uncond half: exact, and about a twentieth of the work at 512 px.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentsync.layers import (
    GroupNorm,
    MotionModule,
    Resample,
    ResnetBlock,
    SpatialTransformer,
    TimeEmbedding,
    match_batch,
)

Context = list[tuple[Tensor, Tensor]]  # keys and values of the audio, one pair a spatial transformer


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a U-Net; the defaults are those of LatentSync 1.5 and 1.6."""

    in_channels: int = 13  # noisy latents, mask (1), masked latents, reference latents
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    cross_attention: tuple[bool, ...] = (True, True, True, False)  # per level, going down
    temporal: tuple[bool, ...] = (True, True, True, True)  # per level, going down
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
        """Read a configuration in the format of the released files.

        Raises ValueError if it asks for something that this network does not implement.
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
        for options, supported in ((config, fixed), (motion, fixed_motion)):
            for name, value in supported.items():
                if options.get(name, value) != value:
                    raise ValueError(f"{name} = {options[name]!r} is not supported, only {value!r}")
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


def make_resnet(config: UNetConfig, c_in: int, c_out: int, time_dim: int) -> ResnetBlock:
    return ResnetBlock(c_in, c_out, time_dim, config.norm_num_groups, config.norm_eps)


def make_transformer(config: UNetConfig, width: int) -> SpatialTransformer:
    return SpatialTransformer(width, config.cross_attention_dim, config.heads, config.norm_num_groups)


def make_motion_module(config: UNetConfig, width: int) -> MotionModule:
    return MotionModule(width, config.temporal_heads, config.temporal_layers, config.temporal_max_len)


class Level(nn.Module):
    """One resolution of the U-Net: layers of (residual block, spatial transformer, temporal module).

    widths_in[j]: input channels of layer j (on the way up, with those of the skip). stride: 2 ends the level with a
    convolution that halves height and width, 1 with one after doubling them, None with neither.
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
        self.resnets = nn.ModuleList(make_resnet(config, c, width, time_dim) for c in widths_in)
        self.attentions = nn.ModuleList(make_transformer(config, width) for _ in widths_in if cross_attention)
        self.motion_modules = nn.ModuleList(make_motion_module(config, width) for _ in widths_in if temporal)
        self.downsamplers = nn.ModuleList([Resample(width, 2)] if stride == 2 else [])
        self.upsamplers = nn.ModuleList([Resample(width, 1)] if stride == 1 else [])

    def layer(self, j: int, x: Tensor, time: Tensor, audio: Context, frames: int, guided: bool) -> Tensor:
        """Layer j; audio: this level's keys and values, one pair per layer (empty without cross-attention)."""
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
        self.attentions = nn.ModuleList([make_transformer(config, width)])
        self.resnets = nn.ModuleList(make_resnet(config, width, width, time_dim) for _ in range(2))

    def forward(self, x: Tensor, time: Tensor, audio: Context, frames: int, guided: bool) -> Tensor:
        x = self.resnets[0](x, time, frames)
        x = self.attentions[0](x, audio[0], guided)
        return self.resnets[1](x, time, frames)


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
        skips = [widths[0]]  # channels of the skip connections
        for i, width in enumerate(widths):
            stride = 2 if i < last else None
            widths_in = [skips[-1]] + [width] * (layers - 1)
            kinds = config.cross_attention[i], config.temporal[i]
            self.down_blocks.append(Level(config, widths_in, width, time_dim, *kinds, stride))
            skips += [width] * (layers + (stride == 2))

        self.mid_block = MidBlock(config, widths[-1], time_dim)

        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            stride = 1 if i > 0 else None
            widths_in = [skips.pop() + (below if j == 0 else width) for j in range(layers + 1)]
            kinds = config.cross_attention[i], config.temporal[i]
            self.up_blocks.append(Level(config, widths_in, width, time_dim, *kinds, stride))
            below = width

        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], config.norm_eps, silu=True)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def transformers(self) -> list[SpatialTransformer]:
        """The spatial transformers in the order of a full pass, which is that of a `Context`."""
        return [t for part in (*self.down_blocks, self.mid_block, *self.up_blocks) for t in part.attentions]

    def encode_audio(self, audio: Tensor) -> Context:
        """Keys and values of the audio for every cross-attention; they are the same for all timesteps.

        audio: (b, f, tokens, cross_attention_dim) → pairs of (b·f, tokens, C).
        """
        tokens = audio.flatten(0, 1)
        return [t.transformer_blocks[0].attn2.keys_values(tokens) for t in self.transformers()]

    def _split(self, context: Context) -> tuple[list[Context], Context, list[Context]]:
        """Split a context into those of the down levels, the middle block and the up levels."""
        rest = iter(context)
        parts = [[next(rest) for _ in part.attentions] for part in (*self.down_blocks, self.mid_block, *self.up_blocks)]
        n = len(self.down_blocks)
        return parts[:n], parts[n], parts[n + 1 :]

    def _time(self, timestep: Tensor, frames: int) -> Tensor:
        """timestep (1,) or (b,) → (1 or b·f, time_dim) through SiLU, as the residual blocks expect it."""
        time = F.silu(self.time_embedding(timestep))
        return time if len(time) == 1 else time.repeat_interleave(frames, dim=0)

    def _outer(self, branch: int) -> tuple[int, int]:
        """DeepCache branch → (level, number of its layers) that a shallow pass computes on the way down."""
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
        """Run every layer once.

        x: (b·f, in_channels, h, w), h and w multiples of 2^(levels − 1); timestep: (1,), or (b,) if not guided;
        context: from `encode_audio`; frames: f.
        Returns epsilon (b·f, out_channels, h, w), or if guided (2·b·f, …), uncond before cond; and, with a DeepCache
        branch, the cached tensor for `shallow` with the same number of frames.
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
        cache_at = None  # number of skips left before the up layer whose input is cached
        if branch is not None:
            outer, layers = self._outer(branch)
            cache_at = outer * (self.config.layers_per_block + 1) + layers + 1
        for level, audio in zip(self.up_blocks, up_audio, strict=True):
            for j in range(len(level.resnets)):
                if len(skips) == cache_at:
                    cached = x
                x = level.layer(j, join_skip(x, skips.pop()), time, audio, frames, guided)
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
        """Run the outer layers alone and take the rest from the last full pass (DeepCache).

        Arguments as in `full`. branch k stands for level k // 3, of which k % 3 layers are computed on the way down;
        cached: what `full` returned for the same branch, or, for an unguided pass after a guided one, its cond half.
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
                x = level.layer(j, join_skip(x, skips.pop()), time, up_audio[i], frames, guided)
            x = level.upsample(x)
        return self.conv_out(self.conv_norm_out(x, frames))

    def forward(self, sample: Tensor, timestep: Tensor, audio: Tensor) -> Tensor:
        """Run one full pass in the reference's tensor layout.

        sample: (b, in_channels, f, h, w); timestep: (1,) or (b,); audio: (b, f, tokens, cross_attention_dim).
        Returns epsilon (b, out_channels, f, h, w).
        """
        b, _, f, _, _ = sample.shape
        x = fold_frames(sample)
        out, _ = self.full(x, timestep, self.encode_audio(audio), f)
        return unfold_frames(out, b)


def join_skip(x: Tensor, skip: Tensor) -> Tensor:
    """Concatenate a skip connection to x along the channels."""
    return torch.cat([x, match_batch(skip, x)], dim=1)


def fold_frames(x: Tensor) -> Tensor:
    """(b, C, f, h, w) → (b·f, C, h, w), channels-last."""
    return x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def unfold_frames(x: Tensor, windows: int) -> Tensor:
    """(b·f, C, h, w) → (b, C, f, h, w)."""
    return x.unflatten(0, (windows, -1)).transpose(1, 2)
