"""The image autoencoder (AutoencoderKL of Stable Diffusion), under diffusers' names and with its weights.

Equal to diffusers' class to the bit, which a test holds. It is here because importing diffusers' takes longer than
loading the weights. Tensors are (n, channels, height, width).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6
TILE_OVERLAP = 0.25  # of a tile's side, where it is blended with its neighbours
BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


@dataclass(frozen=True)
class AutoencoderConfig:
    """The sizes of an autoencoder, as in diffusers' config.json, with its defaults."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32  # pixels, the side of a tile
    scaling_factor: float = 0.18215  # of the latents
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "AutoencoderConfig":
        """The sizes in a config.json; other names are ignored. Raises ValueError for unknown kinds of blocks."""
        for name, kind in BLOCK_TYPES.items():
            if any(each != kind for each in config.get(name, ())):
                raise ValueError(f"{name} = {config[name]}: only {kind} is known")
        if config.get("act_fn", "silu") != "silu":
            raise ValueError(f"act_fn = {config['act_fn']}: only silu is known")
        sizes = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        if "block_out_channels" in sizes:
            sizes["block_out_channels"] = tuple(sizes["block_out_channels"])
        if isinstance(sizes.get("sample_size"), list | tuple):
            sizes["sample_size"] = sizes["sample_size"][0]
        built = cls(**sizes)
        for name in BLOCK_TYPES.keys() & config.keys():
            if len(config[name]) != len(built.block_out_channels):
                raise ValueError(f"{name} and block_out_channels are of different lengths")
        return built

    @property
    def downscaling(self) -> int:
        """Pixels of a picture per latent pixel, along a side."""
        return 2 ** (len(self.block_out_channels) - 1)


class VaeResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, NORM_EPS)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class VaeAttention(nn.Module):
    """Self-attention of one head over all pixels."""

    heads = 1

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = self.group_norm(x.view(n, c, h * w)).transpose(1, 2)
        q, k, v = (project(tokens)[:, None] for project in (self.to_q, self.to_k, self.to_v))
        tokens = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return tokens.transpose(1, 2).reshape(n, c, h, w) + x


class VaeDownsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class VaeUpsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) >= 64 or 2 * x.numel() > 2**31:  # PyTorch's channels-last kernel fails for these (issue 141831)
            x = x.contiguous()
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class VaeBlock(nn.Module):
    """Residual blocks of one width, and a change of resolution behind them."""

    def __init__(self, channels: int, out_channels: int, layers: int, groups: int, resample: str, last: bool):
        super().__init__()
        widths = [channels, *[out_channels] * layers]
        pairs = zip(widths, widths[1:], strict=False)
        self.resnets = nn.ModuleList([VaeResnetBlock(width, after, groups) for width, after in pairs])
        if not last:
            sampler = VaeDownsample if resample == "downsamplers" else VaeUpsample
            self.add_module(resample, nn.ModuleList([sampler(out_channels)]))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():  # the residual blocks, then the sampler
            for module in part:
                x = module(x)
        return x


class VaeMidBlock(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.attentions = nn.ModuleList([VaeAttention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList([VaeResnetBlock(channels, channels, groups) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Pixels → mean and logarithm of the variance of the latents."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        pairs = list(zip((widths[0], *widths), widths, strict=False))
        self.down_blocks = nn.ModuleList(
            [
                VaeBlock(width, after, config.layers_per_block, groups, "downsamplers", last=i == len(pairs) - 1)
                for i, (width, after) in enumerate(pairs)
            ]
        )
        self.mid_block = VaeMidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        x = self.conv_in(sample)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_act(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents → pixels."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = VaeMidBlock(widths[0], groups, config.mid_block_add_attention)
        pairs = list(zip((widths[0], *widths), widths, strict=False))
        self.up_blocks = nn.ModuleList(
            [
                VaeBlock(width, after, config.layers_per_block + 1, groups, "upsamplers", last=i == len(pairs) - 1)
                for i, (width, after) in enumerate(pairs)
            ]
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(sample))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """Encoder and decoder; with tiling, a picture larger than `config.sample_size` goes through in tiles."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        latents = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if config.use_post_quant_conv else nn.Identity()
        self.use_tiling = False

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (n, 3, H, W) in [−1, 1] → means of the latents, not scaled, (n, c, H/8, W/8) of the usual sizes."""
        tile = self.config.sample_size
        moments = self._through(lambda part: self.quant_conv(self.encoder(part)), pixels, tile, self._latent_tile)
        return moments.chunk(2, dim=1)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, c, h, w), not scaled → pixels (n, 3, 8h, 8w) of the usual sizes, about [−1, 1]."""
        tile = self.config.sample_size
        return self._through(lambda part: self.decoder(self.post_quant_conv(part)), latents, self._latent_tile, tile)

    @property
    def _latent_tile(self) -> int:
        return self.config.sample_size // self.config.downscaling

    def _through(self, half: Callable[[Tensor], Tensor], x: Tensor, tile: int, out_tile: int) -> Tensor:
        """One half of the autoencoder, whole or, where the input is larger than a tile, in overlapping tiles.

        tile, out_tile: sides of a tile of the input and of the output. Edges of neighbours are blended linearly.
        """
        if not self.use_tiling or max(x.shape[-2:]) <= tile:
            return half(x)
        step, overlap = int(tile * (1 - TILE_OVERLAP)), int(out_tile * TILE_OVERLAP)
        rows = [
            [half(x[:, :, i : i + tile, j : j + tile]) for j in range(0, x.shape[3], step)]
            for i in range(0, x.shape[2], step)
        ]
        kept = out_tile - overlap
        lines = []
        for i, row in enumerate(rows):
            for j, part in enumerate(row):
                if i:
                    blend(rows[i - 1][j], part, overlap, dim=2)
                if j:
                    blend(row[j - 1], part, overlap, dim=3)
            lines.append(torch.cat([part[:, :, :kept, :kept] for part in row], dim=3))
        return torch.cat(lines, dim=2)


def blend(before: Tensor, after: Tensor, overlap: int, dim: int) -> None:
    """Fade the first lines of a tile, in place, in from the last ones of the tile before it along a dimension."""
    overlap = min(before.shape[dim], after.shape[dim], overlap)
    for i in range(overlap):
        line, earlier = after.select(dim, i), before.select(dim, before.shape[dim] - overlap + i)
        line.copy_(earlier * (1 - i / overlap) + line * (i / overlap))
