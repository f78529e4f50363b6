"""A second, plain implementation of the LatentSync U-Net and its sampling loop, the yardstick for results and speed.

It was written independently of latentsync/unet.py and computes as the reference does: 5-D tensors (b, C, f, h, w) in
NCHW memory, folded to (b·f, C, h, w) and back around every 2-D operation, eager, one window at a time, with diffusers'
scheduler.

It is slow on purpose and has three uses: a cross-check of latentsync.unet on any configuration, the baseline of speed
measurements, and a network that the DeepCache package's own hooks fit (``down_blocks[i].resnets``, ``.attentions``,
``.downsamplers``, ``mid_block``, ``up_blocks[i].upsamplers``). Parameters have the released names.

    pipe = make_pipe(PlainUNet(config))                        # config: a dict, as released with the weights
    latents = denoise_window(pipe, noise, conditioning, audio, steps=20, guidance=1.5)
    with deepcache(pipe, interval=3, branch=0):                # the same loop through the DeepCache package
        latents = denoise_window(pipe, noise, conditioning, audio, steps=20, guidance=1.5)
"""

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from DeepCache import DeepCacheSDHelper
from diffusers import DDIMScheduler
from torch import Tensor, nn

RESIDUAL_EPS = 1e-5  # group norms over all frames of a window
TRANSFORMER_EPS = 1e-6  # group norms before spatial and temporal transformers, frame by frame
TEMPORAL_GROUPS = 32  # the temporal module's group norm ignores norm_num_groups


def fold(x: Tensor) -> Tensor:
    """(b, C, f, h, w) to (b·f, C, h, w), a copy unless f is 1."""
    b, c, f, h, w = x.shape
    return x.permute(0, 2, 1, 3, 4).reshape(b * f, c, h, w)


def unfold(x: Tensor, frames: int) -> Tensor:
    """(b·f, C, h, w) to a contiguous (b, C, f, h, w)."""
    n, c, h, w = x.shape
    return x.reshape(n // frames, frames, c, h, w).permute(0, 2, 1, 3, 4).contiguous()


class FrameConv(nn.Conv2d):
    """A 2-D convolution of every frame of (b, C, f, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return unfold(super().forward(fold(x)), x.shape[2])


def time_features(timesteps: Tensor, width: int) -> Tensor:
    """(b,) steps of training time to (b, width) float32: cosines, then sines."""
    frequencies = torch.exp(torch.arange(width // 2, device=timesteps.device) * (-math.log(10000) / (width // 2)))
    angles = timesteps.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Residual(nn.Module):
    """Residual block. Its group norms normalise the 5-D tensor, over all frames of a window."""

    def __init__(self, config: dict, width_in: int, width: int):
        super().__init__()
        groups, time_width = config["norm_num_groups"], 4 * config["block_out_channels"][0]
        self.norm1 = nn.GroupNorm(groups, width_in, eps=RESIDUAL_EPS)
        self.conv1 = FrameConv(width_in, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, width)
        self.norm2 = nn.GroupNorm(groups, width, eps=RESIDUAL_EPS)
        self.conv2 = FrameConv(width, width, 3, padding=1)
        self.conv_shortcut = FrameConv(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = y + self.time_emb_proj(F.silu(time))[:, :, None, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return self.conv_shortcut(x) + y


class Attention(nn.Module):
    """Queries from x (n, length, width), keys and values from context (n, tokens, context width)."""

    def __init__(self, width: int, heads: int, context_width: int | None = None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width or width, width, bias=False)
        self.to_v = nn.Linear(context_width or width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            t.reshape(t.shape[0], t.shape[1], self.heads, -1).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class GEGLU(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)  # exact, by erf


def feed_forward(width: int) -> nn.Module:
    net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))
    return nn.Sequential(OrderedDict(net=net))


class SpatialBlock(nn.Module):
    def __init__(self, config: dict, width: int):
        super().__init__()
        heads, audio_width = config["attention_head_dim"], config["cross_attention_dim"]
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.attn2 = nn.LayerNorm(width), Attention(width, heads, audio_width)
        self.norm3, self.ff = nn.LayerNorm(width), feed_forward(width)

    def forward(self, x: Tensor, audio: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), audio)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """The pixels of a frame attend to one another and to that frame's audio tokens."""

    def __init__(self, config: dict, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(config["norm_num_groups"], width, eps=TRANSFORMER_EPS)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([SpatialBlock(config, width)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, audio: Tensor) -> Tensor:
        frames = fold(x)
        tokens = self.proj_in(self.norm(frames)).flatten(2).transpose(1, 2)  # (b·f, h·w, C)
        for block in self.transformer_blocks:
            tokens = block(tokens, audio.flatten(0, 1))
        y = self.proj_out(tokens.transpose(1, 2).reshape(frames.shape))
        return unfold(y + frames, x.shape[2])


class PositionEncoder(nn.Module):
    """Adds sin, cos, sin, cos … of the frame index to (n, f, C). The table is a buffer of the checkpoint."""

    def __init__(self, width: int, max_length: int):
        super().__init__()
        position = torch.arange(max_length)[:, None].float()
        frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        table = torch.zeros(1, max_length, width)
        table[0, :, 0::2] = torch.sin(position * frequency)
        table[0, :, 1::2] = torch.cos(position * frequency)
        self.register_buffer("pe", table)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pe[:, : x.shape[1]]


class FrameAttention(Attention):
    def __init__(self, config: dict, width: int):
        kwargs = config["motion_module_kwargs"]
        super().__init__(width, kwargs["num_attention_heads"])
        self.pos_encoder = PositionEncoder(width, kwargs["temporal_position_encoding_max_len"])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(self.pos_encoder(x), context)


class TemporalBlock(nn.Module):
    def __init__(self, config: dict, width: int):
        super().__init__()
        attentions = config["motion_module_kwargs"]["attention_block_types"]
        self.attention_blocks = nn.ModuleList(FrameAttention(config, width) for _ in attentions)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in attentions)
        self.ff_norm, self.ff = nn.LayerNorm(width), feed_forward(width)

    def forward(self, x: Tensor) -> Tensor:
        for norm, attention in zip(self.norms, self.attention_blocks, strict=True):
            x = x + attention(norm(x))
        return x + self.ff(self.ff_norm(x))


class TemporalTransformer(nn.Module):
    """Each pixel attends to itself in the other frames of the window."""

    def __init__(self, config: dict, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(TEMPORAL_GROUPS, width, eps=TRANSFORMER_EPS)
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks = nn.Sequential(TemporalBlock(config, width))
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, c, f, h, w = x.shape
        tokens = unfold(self.norm(fold(x)), f).permute(0, 3, 4, 2, 1).reshape(b * h * w, f, c)
        tokens = self.proj_out(self.transformer_blocks(self.proj_in(tokens)))
        return x + tokens.reshape(b, h, w, f, c).permute(0, 4, 3, 1, 2)


class Resample(nn.Module):
    """Downsamples with a strided convolution, or upsamples (nearest ×2) before a convolution."""

    def __init__(self, width: int, double: bool):
        super().__init__()
        self.double = double
        self.conv = FrameConv(width, width, 3, stride=1 if double else 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0)) if self.double else x)


class Level(nn.Module):
    """Layers of one resolution: residual block, spatial transformer, temporal module; the latter two may be absent."""

    def __init__(self, config: dict, level: int, widths_in: list[int], kind: str, halve: bool, double: bool):
        super().__init__()
        width, spatial = config["block_out_channels"][level], kind.startswith("CrossAttn")
        temporal = config["use_motion_module"] and 2**level in config["motion_module_resolutions"]
        self.resnets = nn.ModuleList(Residual(config, width_in, width) for width_in in widths_in)
        self.attentions = nn.ModuleList(SpatialTransformer(config, width) for _ in widths_in if spatial)
        self.motion_modules = nn.ModuleList(
            nn.Sequential(OrderedDict(temporal_transformer=TemporalTransformer(config, width)))
            for _ in widths_in
            if temporal
        )
        self.downsamplers = nn.ModuleList([Resample(width, double=False)] if halve else [])
        self.upsamplers = nn.ModuleList([Resample(width, double=True)] if double else [])

    def layer(self, i: int, x: Tensor, time: Tensor, audio: Tensor) -> Tensor:
        x = self.resnets[i](x, time)
        if self.attentions:
            x = self.attentions[i](x, audio)
        if self.motion_modules:
            x = self.motion_modules[i](x)
        return x


class DownLevel(Level):
    def forward(self, x: Tensor, time: Tensor, audio: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time, audio)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, tuple(skips)


class MidLevel(nn.Module):
    def __init__(self, config: dict, width: int):
        super().__init__()
        self.resnets = nn.ModuleList(Residual(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(config, width)])

    def forward(self, x: Tensor, time: Tensor, audio: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, time), audio)
        return self.resnets[1](x, time)


class UpLevel(Level):
    def forward(self, x: Tensor, skips: tuple[Tensor, ...], time: Tensor, audio: Tensor) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips[-1 - i]], dim=1), time, audio)
        for upsampler in self.upsamplers:
            x = upsampler(x)
        return x


class PlainUNet(nn.Module):
    """The audio-conditioned U-Net of a released configuration (a dict of its JSON)."""

    def __init__(self, config: dict):
        super().__init__()
        widths, layers = config["block_out_channels"], config["layers_per_block"]
        last = len(widths) - 1
        self.conv_in = FrameConv(config["in_channels"], widths[0], 3, padding=1)
        time = 4 * widths[0]
        self.time_embedding = nn.Sequential(
            OrderedDict(linear_1=nn.Linear(widths[0], time), act=nn.SiLU(), linear_2=nn.Linear(time, time))
        )
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            widths_in = [widths[max(i - 1, 0)]] + [width] * (layers - 1)
            kind = config["down_block_types"][i]
            self.down_blocks.append(DownLevel(config, i, widths_in, kind, halve=i < last, double=False))
        self.mid_block = MidLevel(config, widths[-1])
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(widths))):  # i: the level of the way down that this one mirrors
            width, below, above = widths[i], widths[min(i + 1, last)], widths[max(i - 1, 0)]
            decoder, skip = [below] + [width] * layers, [width] * layers + [above]
            widths_in = [d + s for d, s in zip(decoder, skip, strict=True)]
            kind = config["up_block_types"][last - i]
            self.up_blocks.append(UpLevel(config, i, widths_in, kind, halve=False, double=i > 0))
        self.conv_norm_out = nn.GroupNorm(config["norm_num_groups"], widths[0], eps=RESIDUAL_EPS)
        self.conv_out = FrameConv(widths[0], config["out_channels"], 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, audio: Tensor) -> Tensor:
        """sample (b, 13, f, h, w), timestep () or (b,), audio (b, f, tokens, width); returns epsilon (b, 4, f, h, w).

        h and w must divide by 2 to the number of downsamplings; f must not exceed the position table (24).
        """
        width = self.conv_in.out_channels
        time = self.time_embedding(time_features(timestep.expand(sample.shape[0]), width).to(sample.dtype))
        x = self.conv_in(sample)
        skips = (x,)
        for block in self.down_blocks:
            x, block_skips = block(x, time, audio)
            skips += block_skips
        x = self.mid_block(x, time, audio)
        for block in self.up_blocks:
            count = len(block.resnets)
            x = block(x, skips[-count:], time, audio)
            skips = skips[:-count]
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def make_pipe(unet: nn.Module) -> SimpleNamespace:
    """A pipeline as DeepCache expects it: the network and diffusers' DDIM scheduler with the LatentSync constants."""
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )
    return SimpleNamespace(unet=unet, scheduler=scheduler)


@contextlib.contextmanager
def deepcache(pipe: SimpleNamespace, interval: int, branch: int) -> Iterator[None]:
    """Run pipe's network under the DeepCache package's hooks within the block."""
    helper = DeepCacheSDHelper(pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


@torch.inference_mode()
def denoise_window(
    pipe: SimpleNamespace, noise: Tensor, conditioning: Tensor, audio: Tensor, steps: int = 20, guidance: float = 1.5
) -> Tensor:
    """One window from noise to latents (1, 4, f, h, w).

    noise (1, 4, 1, h, w), repeated over the frames; conditioning (1, 9, f, h, w): mask, masked face, reference face;
    audio (1, f, tokens, width). All on one device and in the network's dtype. Guidance of at most 1 halves the batch.
    """
    guided = guidance > 1
    pipe.scheduler.set_timesteps(steps, device=noise.device)
    latents = noise.repeat(1, 1, conditioning.shape[2], 1, 1)
    if guided:
        conditioning, audio = torch.cat([conditioning, conditioning]), torch.cat([torch.zeros_like(audio), audio])
    for t in pipe.scheduler.timesteps:
        sample = torch.cat([torch.cat([latents, latents]) if guided else latents, conditioning], dim=1)
        epsilon = pipe.unet(sample, t, audio)
        if guided:
            uncond, cond = epsilon.chunk(2)
            epsilon = uncond + guidance * (cond - uncond)
        latents = pipe.scheduler.step(epsilon, t, latents, eta=0.0).prev_sample
    return latents
