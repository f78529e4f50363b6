"""Replaces modules of a network with ones that call the hand-written kernels: the same weights, less memory traffic.

`fuse(network)` does so for the modules of the U-Net or of the autoencoder; `optim.swap.restore_classes` undoes
it:

    GroupNorm            statistics in one pass, norm and SiLU in a second, directly on channels-last memory
    residual blocks      the first convolution's bias and the time embedding are folded into the second norm; the second
                         bias and the residual are one addition; the 1×1 shortcut is a linear layer
    transformer blocks   q, k and v are one product; residual additions, and positions, are part of the layer norm that
                         follows or of the product before; attention over frames reads q, k and v where they are
    GEGLU                one pass; on a GPU from Hopper on, in the product before it
    autoencoder          its attention of one wide head keeps the scores in memory
    convolutions         the bias of those between resolutions is added in one pass
    upsampling           nearest ×2 and a 3×3 convolution are one transposed convolution with a 4×4 kernel and stride 2:
                         the same sums with four products instead of nine

All of it equals eager except for the rounding of half precision, so it suits every level.
"""

import hashlib
import logging
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentsync.autoencoder import Autoencoder, VaeAttention, VaeDownsample, VaeResnetBlock, VaeUpsample
from latentsync.layers import GEGLU, Attention, GroupNorm, ResnetBlock, SpatialBlock, TemporalBlock
from latentsync.unet import Level, UNet
from optim import kernels, products
from optim.kernels import DTYPES, add_bias, frame_attention, geglu, group_norm, layer_norm
from optim.products import geglu_product, has_geglu_product, wide_attention
from optim.swap import attach, restore_classes, swap_class, swap_classes
from optim.trial import disagreement, one_line, passed_file

log = logging.getLogger(__name__)

TRIAL_SIDE, TRIAL_FRAMES = 8, 16  # latent pixels and frames of the pass on which `fuse` tries the kernels

Fusible = TypeVar("Fusible", UNet, Autoencoder)


@cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _supported(x: Tensor) -> bool:
    """Whether the kernels take x; if not, PyTorch's own module runs, and the log says why, once."""
    if not (x.is_cuda or kernels.INTERPRETED):
        reason = f"a tensor is on {x.device.type}"
    elif x.dtype not in DTYPES:
        reason = f"{x.dtype} has no kernel"
    elif torch.is_grad_enabled():
        reason = "gradients are being recorded"
    else:
        return True
    _warn_once(f"Fused kernels are not used for some modules ({reason}); PyTorch's own run instead.")
    return False


def _has_matrix_units(x: Tensor) -> bool:
    """Whether the products of `frame_attention` run on matrix units; without them they would spill registers."""
    if kernels.INTERPRETED or x.dtype != torch.float32 and torch.cuda.get_device_capability(x.device) >= (8, 0):
        return True
    _warn_once("The fused attention over frames is not used (it needs half precision and an Ampere GPU or newer).")
    return False


# ---- several products as one


def stack_weights(attention: nn.Module) -> None:
    """Make the q, k and v weights of a self-attention views of one tensor, end to end."""
    layers = attention.to_q, attention.to_k, attention.to_v
    for name in ("weight", "bias") if layers[0].bias is not None else ("weight",):
        parameters = [getattr(layer, name) for layer in layers]
        stacked = torch.cat([parameter.data for parameter in parameters])
        for parameter, view in zip(parameters, stacked.chunk(3), strict=True):
            parameter.data = view


def _stacked(parts: tuple[Tensor, Tensor, Tensor]) -> Tensor | None:
    """The tensor that three weights are views of, end to end; None where they have been moved apart."""
    q, k, v = parts
    step = q.numel() * q.element_size()
    if not (k.data_ptr() - q.data_ptr() == v.data_ptr() - k.data_ptr() == step and q.is_contiguous()):
        return None
    return q.as_strided((3 * len(q), *q.shape[1:]), q.stride())


def project_qkv(attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (…, C) → q, k and v of its self-attention, each (…, C); slices of one tensor where the weights are stacked."""
    q, k, v = attention.to_q, attention.to_k, attention.to_v
    weight = _stacked((q.weight, k.weight, v.weight))
    bias = None if q.bias is None else _stacked((q.bias, k.bias, v.bias))
    if weight is None or (bias is None) != (q.bias is None):
        return q(x), k(x), v(x)
    return F.linear(x, weight, bias).chunk(3, dim=-1)


def upsample_kernel(conv: nn.Conv2d) -> Tensor:
    """The kernel (C_in, C_out, 4, 4) of a transposed convolution (stride 2, padding 1) that equals nearest ×2 and then
    this 3×3 convolution."""
    # Along one axis, with weights w0, w1, w2: what a pixel contributes to the 4 pixels that it reaches.
    reach = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], device=conv.weight.device).float()
    kernel = (reach @ conv.weight.float() @ reach.T).transpose(0, 1)
    return kernel.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last)


def upsample(x: Tensor, conv: nn.Conv2d, kernel: Tensor) -> Tensor:
    """Nearest ×2, then the 3×3 convolution, whose `upsample_kernel` is given; (n, C_in, h, w) → (n, C_out, 2h, 2w)."""
    if kernel.device != x.device or kernel.dtype != x.dtype or not _supported(x):
        return conv(F.interpolate(x, scale_factor=2.0))
    return add_bias(F.conv_transpose2d(x, kernel, stride=2, padding=1), None, conv.bias)


def convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The convolution, its bias added in one pass; x (n, C_in, h, w) → (n, C_out, …)."""
    if not _supported(x):
        return conv(x)
    return add_bias(F.conv2d(x, conv.weight, None, conv.stride, conv.padding), None, conv.bias)


def _add_product(x: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """x + h · weightᵀ, in place of x; x (…, C) contiguous, h (…, D), weight (C, D)."""
    return x.flatten(0, -2).addmm_(h.flatten(0, -2), weight.T).view(x.shape)


# ---- the U-Net's modules


class FastGroupNorm(GroupNorm):
    def forward(self, x: Tensor, span: int = 1) -> Tensor:
        if not _supported(x):
            return super().forward(x, span)
        return group_norm(x, self, span, self.silu)


class FastResnetBlock(ResnetBlock):
    def forward(self, x: Tensor, time: Tensor, frames: int) -> Tensor:
        if not _supported(x):
            return super().forward(x, time, frames)
        h = F.conv2d(self.norm1(x, frames), self.conv1.weight, padding=1)
        h = group_norm(h, self.norm2, frames, True, self.time_emb_proj(time), self.conv1.bias)
        h = F.conv2d(h, self.conv2.weight, padding=1)
        return add_bias(h, _shortcut(x, self.conv_shortcut), self.conv2.bias)


def _shortcut(x: Tensor, conv: nn.Conv2d | None) -> Tensor:
    """A residual block's 1×1 convolution as a linear layer on channels-last memory; x itself where there is none."""
    if conv is None:
        return x
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


class FastSpatialBlock(SpatialBlock):
    def forward(self, x: Tensor, audio: tuple[Tensor, Tensor], guided: bool = False) -> Tensor:
        if not _supported(x):
            return super().forward(x, audio, guided)
        x = x.contiguous()
        m = len(audio[0])
        proj_in, proj_out = self.ff.net[0], self.ff.net[2]
        _, h = layer_norm(x, self.norm1)
        branch = attend(self.attn1, project_qkv(self.attn1, h))
        total = x.new_empty(2 * m if guided else m, *x.shape[1:])
        normed = torch.empty_like(total)
        if guided:  # uncond first: it reads what cond overwrites
            uncond = {"shift": self.attn2.to_out[0].bias, "total": total[:m], "out": normed[:m]}
            layer_norm(x[:m], self.norm3, branch[:m], total_bias=proj_out.bias, **uncond)
        x, h = layer_norm(x[-m:], self.norm2, branch[-m:])
        branch = attend(self.attn2, (self.attn2.to_q(h), *audio))
        layer_norm(x, self.norm3, branch, total_bias=proj_out.bias, total=total[-m:], out=normed[-m:])
        return _add_product(total, proj_in(normed), proj_out.weight)


def attend(attention: Attention, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Attention and its output product; q (n, t, C), k and v (n, s, C) → (n, t, C)."""
    q, k, v = (part.unflatten(-1, (attention.heads, -1)).transpose(-3, -2) for part in qkv)
    return attention.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))


class FastTemporalBlock(TemporalBlock):
    def forward(self, x: Tensor) -> Tensor:
        positions = min(attention.pos_encoder.pe.shape[1] for attention in self.attention_blocks)
        fits = x.shape[1] <= min(positions, kernels.ATTENTION_FRAMES)
        if not (fits and _supported(x) and _has_matrix_units(x)):
            return super().forward(x)
        x, branch = x.contiguous(), None
        for attention, norm in zip(self.attention_blocks, self.norms, strict=True):
            x, h = layer_norm(x, norm, branch, attention.pos_encoder.pe[0])
            h = frame_attention(*project_qkv(attention, h), attention.heads)
            branch = attention.to_out[0](h)
        proj_in, proj_out = self.ff.net[0], self.ff.net[2]
        x, h = layer_norm(x, self.ff_norm, branch, total_bias=proj_out.bias)
        return _add_product(x, proj_in(h), proj_out.weight)


class FastGEGLU(GEGLU):
    def forward(self, x: Tensor) -> Tensor:
        if not _supported(x):
            return super().forward(x)
        if has_geglu_product(x, self.proj.weight):
            return geglu_product(x, self.proj.weight, self.proj.bias)
        return geglu(self.proj(x).contiguous())


class FastLevel(Level):
    kernel: Tensor  # the `upsample_kernel` of its upsampler, if it has one

    def downsample(self, x: Tensor) -> Tensor:
        return convolve(x, self.downsamplers[0].conv) if self.downsamplers else x

    def upsample(self, x: Tensor) -> Tensor:
        return upsample(x, self.upsamplers[0].conv, self.kernel) if self.upsamplers else x


# ---- the autoencoder's modules


class FastVaeResnetBlock(VaeResnetBlock):
    def forward(self, x: Tensor) -> Tensor:
        if not _supported(x):
            return super().forward(x)
        h = F.conv2d(group_norm(x, self.norm1, silu=True), self.conv1.weight, padding=1)
        h = group_norm(h, self.norm2, silu=True, conv_bias=self.conv1.bias)
        h = F.conv2d(h, self.conv2.weight, padding=1)
        return add_bias(h, _shortcut(x, self.conv_shortcut), self.conv2.bias)


class FastVaeAttention(VaeAttention):
    """Self-attention of one head over all pixels, in the middle of encoder and decoder."""

    def forward(self, x: Tensor) -> Tensor:
        if not _supported(x):
            return super().forward(x)
        n, c, h, w = x.shape
        tokens = group_norm(x, self.group_norm).permute(0, 2, 3, 1).reshape(n, h * w, c)
        tokens = self.to_out[0](wide_attention(*project_qkv(self, tokens)))
        return tokens.reshape(n, h, w, c).permute(0, 3, 1, 2) + x


class FastVaeUpsample(VaeUpsample):
    kernel: Tensor  # its `upsample_kernel`

    def forward(self, x: Tensor) -> Tensor:
        return upsample(x, self.conv, self.kernel)


class FastVaeDownsample(VaeDownsample):
    def forward(self, x: Tensor) -> Tensor:
        if not _supported(x):
            return super().forward(x)
        return convolve(F.pad(x, (0, 1, 0, 1)), self.conv)


class FastNormSilu(nn.GroupNorm):
    """The norm before the last convolution together with the activation that follows it."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self, silu=True) if _supported(x) else F.silu(super().forward(x))


class SkippedSilu(nn.SiLU):
    """An activation that `FastNormSilu` has already applied."""

    def forward(self, x: Tensor) -> Tensor:
        return x


FAST: dict[type[nn.Module], type[nn.Module]] = {
    GroupNorm: FastGroupNorm,
    ResnetBlock: FastResnetBlock,
    SpatialBlock: FastSpatialBlock,
    TemporalBlock: FastTemporalBlock,
    GEGLU: FastGEGLU,
    Level: FastLevel,
    VaeResnetBlock: FastVaeResnetBlock,
    VaeAttention: FastVaeAttention,
    VaeUpsample: FastVaeUpsample,
    VaeDownsample: FastVaeDownsample,
}


def fuse_untried(network: Fusible) -> Fusible:
    """Swap the modules of a network for those that call the kernels. Returns the same network."""
    swap_classes(network, FAST)
    for module in network.modules():
        if isinstance(module, FastSpatialBlock):
            stack_weights(module.attn1)
        elif isinstance(module, FastTemporalBlock):
            for attention in module.attention_blocks:
                stack_weights(attention)
        elif isinstance(module, FastVaeAttention):
            stack_weights(module)
        elif isinstance(module, FastLevel) and module.upsamplers:
            attach(module, kernel=upsample_kernel(module.upsamplers[0].conv))
        elif isinstance(module, FastVaeUpsample):
            attach(module, kernel=upsample_kernel(module.conv))
    if isinstance(network, Autoencoder):
        for part in (network.encoder, network.decoder):
            swap_class(part.conv_norm_out, FastNormSilu)
            swap_class(part.conv_act, SkippedSilu)
    return network


@torch.inference_mode()
def _trial_pass(network: UNet | Autoencoder) -> Tensor:
    """A small pass on fixed random inputs: two guided windows, or two faces encoded and decoded."""
    random = torch.Generator().manual_seed(0)
    if isinstance(network, Autoencoder):
        weight = network.decoder.conv_in.weight
        like = {"device": weight.device, "dtype": weight.dtype}
        faces = torch.randn(2, 3, 8 * TRIAL_SIDE, 8 * TRIAL_SIDE, generator=random).to(**like)
        latents = network.encode(faces.contiguous(memory_format=torch.channels_last))
        return torch.cat([latents.flatten(), network.decode(latents).flatten()]).float()
    config, weight = network.config, network.conv_in.weight
    like = {"device": weight.device, "dtype": weight.dtype}
    frames = min(TRIAL_FRAMES, config.temporal_max_len)
    x = torch.randn(2 * frames, config.in_channels, TRIAL_SIDE, TRIAL_SIDE, generator=random).to(**like)
    audio = torch.randn(2, frames, 50, config.cross_attention_dim, generator=random).to(**like)
    x, timestep = x.contiguous(memory_format=torch.channels_last), torch.tensor([500], device=weight.device)
    return network.full(x, timestep, network.encode_audio(audio), frames, guided=True)[0].float()


def fuse(network: Fusible) -> Fusible:
    """Swap the modules of a network on a GPU for those that call the kernels; weights and their names stay.

    The kernels are tried first: where one small pass with and without them does not agree, the network stays as it was
    and the log says why. The trial also compiles the kernels, so that a graph can be captured right afterwards. It is
    made once for a GPU, versions and a network's sizes. Returns the same network; `restore_classes` undoes it.
    """
    if kernels.triton is None:
        _warn_once("Fused kernels are off: Triton is not installed; PyTorch's own run instead.")
        return network
    passed = _passed_file(network)
    if passed is not None and passed.is_file():
        return fuse_untried(network)
    expected = _trial_pass(network)
    fuse_untried(network)
    try:
        kernels.compile_all(lambda: _trial_pass(network))
        problem = disagreement(_trial_pass(network), expected, next(network.parameters()).dtype)
    except Exception as error:  # no C compiler, a GPU that Triton does not know, ...: eager works in any case
        problem = one_line(error)
    if problem:
        restore_classes(network)
        _warn_once(f"Fused kernels are off: {problem}; PyTorch's own run instead.")
    elif passed is not None:
        with suppress(OSError):
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()
    return network


def _passed_file(network: UNet | Autoencoder) -> Path | None:
    """Where it is remembered that this network's kernels have passed their trial; None on a processor."""
    weight = next(network.parameters())
    if not weight.is_cuda:
        return None
    source = hashlib.sha256(
        b"".join(Path(file).read_bytes() for file in (kernels.__file__, products.__file__, __file__))
    )
    versions = torch.__version__, torch.version.cuda, kernels.triton.__version__, source.hexdigest()
    properties = torch.cuda.get_device_properties(weight.device)
    return passed_file(versions, properties.name, properties.major, properties.minor, network.config, weight.dtype)
