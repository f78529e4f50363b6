"""Puts the hand-written kernels under a network: the same weights, fewer trips to memory.

`fuse(network)` gives modules of the U-Net or of diffusers' autoencoder another forward, `unfuse(network)` takes it
back:

    GroupNorm            statistics in one pass, norm and SiLU in a second, straight on channels-last memory
    residual blocks      the first convolution's bias and the time embedding vanish into the second norm; the second
                         bias and the residual are one addition; the 1×1 shortcut is a linear layer
    transformer blocks   q, k and v are one product; residual additions are part of the layer norm that follows or of
                         the product before; positions, too; attention over frames reads q, k and v where they lie
    GEGLU                one pass
    convolutions         the bias of those between resolutions is added in one pass
    doubling             nearest ×2 and a 3×3 convolution are one transposed convolution of a 4×4 kernel with stride
                         2: the same sums with four products in place of nine

All of it is equal to eager but for the rounding of half precision, so it serves every level.
"""

import sys

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention as VaeAttention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from latentsync.layers import GEGLU, Attention, GroupNorm, ResnetBlock, SpatialBlock, TemporalBlock
from latentsync.unet import Level, UNet
from optim import kernels
from optim.kernels import DTYPES, add_bias, frame_attention, geglu, group_norm, layer_norm
from optim.lean import LEAN, lean

CHECK_SIDE, CHECK_FRAMES = 8, 16  # latent pixels and frames of the pass that `fuse` tries the kernels on
CHECK_ERROR = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-3}  # relative; a wrong kernel is off by 1

_said: set[str] = set()


def _say(sentence: str) -> None:
    """One line on the standard error, once a process."""
    if sentence not in _said:
        _said.add(sentence)
        print(sentence, file=sys.stderr)


def in_a_line(failure: Exception) -> str:
    """An exception's kind and the first line of what it says."""
    text = str(failure).strip()
    return f"{type(failure).__name__}: {text.splitlines()[0] if text else 'no detail'}"


def _serves(x: Tensor) -> bool:
    """Whether the kernels take x; if not, say why once, and the module runs as PyTorch has it."""
    if not (x.is_cuda or kernels.INTERPRETED):
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
    """Whether the products of `frame_attention` run on matrix units; without them they would spill registers."""
    if kernels.INTERPRETED or x.dtype != torch.float32 and torch.cuda.get_device_capability(x.device) >= (8, 0):
        return True
    _say("The fused attention over frames is not used (it wants half precision and an Ampere GPU or newer).")
    return False


# ---- weights that lie so that several products become one


def stack_weights(attention: nn.Module) -> None:
    """Lay the q, k and v weights of a self-attention end to end, as views of one tensor, without a second copy."""
    parts = attention.to_q, attention.to_k, attention.to_v
    whole = torch.cat([part.weight.data for part in parts])
    for part, weight in zip(parts, whole.chunk(3), strict=True):
        part.weight.data = weight
    if parts[0].bias is not None:
        whole = torch.cat([part.bias.data for part in parts])
        for part, bias in zip(parts, whole.chunk(3), strict=True):
            part.bias.data = bias


def _stacked(parts: tuple[Tensor, Tensor, Tensor]) -> Tensor | None:
    """The one tensor that three lie in end to end; None where they have been moved apart."""
    q, k, v = parts
    step = q.numel() * q.element_size()
    if not (k.data_ptr() - q.data_ptr() == v.data_ptr() - k.data_ptr() == step and q.is_contiguous()):
        return None
    return q.as_strided((3 * len(q), *q.shape[1:]), q.stride())


def queries_keys_values(attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (…, C) → q, k and v of its self-attention, each (…, C); slices of one tensor where the weights are stacked."""
    parts = attention.to_q, attention.to_k, attention.to_v
    weight = _stacked(tuple(part.weight for part in parts))
    bias = None if parts[0].bias is None else _stacked(tuple(part.bias for part in parts))
    if weight is None or (bias is None) != (parts[0].bias is None):
        return tuple(part(x) for part in parts)
    return F.linear(x, weight, bias).chunk(3, dim=-1)


def doubling_weight(conv: nn.Conv2d) -> Tensor:
    """Of a 3×3 convolution after nearest ×2: (C_in, C_out, 4, 4), for a transposed one with stride 2, padding 1."""
    # Along an axis, with weights w0, w1, w2: what a pixel adds to the 4 that it reaches.
    reach = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], device=conv.weight.device).float()
    kernel = (reach @ conv.weight.float() @ reach.T).transpose(0, 1)
    return kernel.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last)


def double(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Nearest ×2, then the 3×3 convolution; x (n, C_in, h, w) → (n, C_out, 2h, 2w)."""
    kernel = getattr(conv, "doubling", None)
    if kernel is None or kernel.device != x.device or kernel.dtype != x.dtype or not _serves(x):
        return conv(F.interpolate(x, scale_factor=2.0))
    return add_bias(F.conv_transpose2d(x, kernel, stride=2, padding=1), None, conv.bias)


def convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The convolution, its bias added in one pass; x (n, C_in, h, w) → (n, C_out, …)."""
    if not _serves(x):
        return conv(x)
    return add_bias(F.conv2d(x, conv.weight, None, conv.stride, conv.padding), None, conv.bias)


def _add_product(x: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """x + h · weightᵀ, written over x; x (…, C) contiguous, h (…, D), weight (C, D)."""
    return x.flatten(0, -2).addmm_(h.flatten(0, -2), weight.T).view(x.shape)


# ---- the U-Net's modules


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
        h = F.conv2d(h, self.conv2.weight, padding=1)
        return add_bias(h, _shortcut(x, self.conv_shortcut), self.conv2.bias)


def _shortcut(x: Tensor, conv: nn.Conv2d | None) -> Tensor:
    """A residual block's 1×1 convolution as a linear layer on channels-last memory; x itself where there is none."""
    if conv is None:
        return x
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


class FastSpatialBlock(SpatialBlock):
    def forward(self, x: Tensor, audio: tuple[Tensor, Tensor], guided: bool = False) -> Tensor:
        if not _serves(x):
            return super().forward(x, audio, guided)
        x = x.contiguous()
        m = len(audio[0])
        gate, back = self.ff.net[0], self.ff.net[2]
        _, h = layer_norm(x, self.norm1)
        branch = attend(self.attn1, queries_keys_values(self.attn1, h))
        total = x.new_empty(2 * m if guided else m, *x.shape[1:])
        normed = torch.empty_like(total)
        if guided:  # the silent half first: it reads what the heard half overwrites
            silent = {"shift": self.attn2.to_out[0].bias, "total": total[:m], "out": normed[:m]}
            layer_norm(x[:m], self.norm3, branch[:m], later=back.bias, **silent)
        x, h = layer_norm(x[-m:], self.norm2, branch[-m:])
        heard = attend(self.attn2, (self.attn2.to_q(h), *audio))
        layer_norm(x, self.norm3, heard, later=back.bias, total=total[-m:], out=normed[-m:])
        return _add_product(total, gate(normed), back.weight)


def attend(attention: Attention, parts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Attention and its output product; q (n, t, C), k and v (n, s, C) → (n, t, C)."""
    q, k, v = (part.unflatten(-1, (attention.heads, -1)).transpose(-3, -2) for part in parts)
    return attention.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))


class FastTemporalBlock(TemporalBlock):
    def forward(self, x: Tensor) -> Tensor:
        known = min(attention.pos_encoder.pe.shape[1] for attention in self.attention_blocks)
        if x.shape[1] > min(known, kernels.ATTENTION_FRAMES) or not (_serves(x) and _multiplies(x)):
            return super().forward(x)
        x, branch = x.contiguous(), None
        for attention, norm in zip(self.attention_blocks, self.norms, strict=True):
            x, h = layer_norm(x, norm, branch, attention.pos_encoder.pe[0])
            h = frame_attention(*queries_keys_values(attention, h), attention.heads)
            branch = attention.to_out[0](h)
        back = self.ff.net[2]
        x, h = layer_norm(x, self.ff_norm, branch, later=back.bias)
        return _add_product(x, self.ff.net[0](h), back.weight)


class FastGEGLU(GEGLU):
    def forward(self, x: Tensor) -> Tensor:
        if not _serves(x):
            return super().forward(x)
        return geglu(self.proj(x).contiguous())


class FastLevel(Level):
    def downsample(self, x: Tensor) -> Tensor:
        return convolve(x, self.downsamplers[0].conv) if self.downsamplers else x

    def upsample(self, x: Tensor) -> Tensor:
        return double(x, self.upsamplers[0].conv) if self.upsamplers else x


# ---- the autoencoder's modules, which are diffusers'


class FastVaeResnetBlock(ResnetBlock2D):
    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args, **kwargs) -> Tensor:
        x = input_tensor
        if temb is not None or not _serves(x):
            return super().forward(input_tensor, temb, *args, **kwargs)
        h = F.conv2d(group_norm(x, self.norm1, silu=True), self.conv1.weight, padding=1)
        h = group_norm(h, self.norm2, silu=True, conv_bias=self.conv1.bias)
        h = F.conv2d(h, self.conv2.weight, padding=1)
        return add_bias(h, _shortcut(x, self.conv_shortcut), self.conv2.bias)


class FastVaeAttention(VaeAttention):
    """Self-attention of one head over all pixels, in the middle of encoder and decoder."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        x = hidden_states
        if x.ndim != 4 or not _serves(x):
            return super().forward(hidden_states, *args, **kwargs)
        n, c, h, w = x.shape
        tokens = group_norm(x, self.group_norm).permute(0, 2, 3, 1).reshape(n, h * w, c)
        tokens = attend(self, queries_keys_values(self, tokens))
        return tokens.reshape(n, h, w, c).permute(0, 3, 1, 2) + x


class FastUpsample(Upsample2D):
    def forward(self, hidden_states: Tensor, output_size: int | None = None, *args, **kwargs) -> Tensor:
        if output_size is not None:
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return double(hidden_states, self.conv)


class FastDownsample(Downsample2D):
    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if not _serves(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        padded = hidden_states if self.padding else F.pad(hidden_states, (0, 1, 0, 1))
        return convolve(padded, self.conv)


class FastNormSilu(nn.GroupNorm):
    """The norm before the last convolution, with the activation that follows it."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self, silu=True) if _serves(x) else F.silu(super().forward(x))


class DoneBefore(nn.SiLU):
    """An activation that `FastNormSilu` has taken in."""

    def forward(self, x: Tensor) -> Tensor:
        return x


FAST = {
    GroupNorm: FastGroupNorm,
    ResnetBlock: FastResnetBlock,
    SpatialBlock: FastSpatialBlock,
    TemporalBlock: FastTemporalBlock,
    GEGLU: FastGEGLU,
    Level: FastLevel,
    ResnetBlock2D: FastVaeResnetBlock,
    VaeAttention: FastVaeAttention,
    Upsample2D: FastUpsample,
    Downsample2D: FastDownsample,
}


def _swap(network: nn.Module) -> None:
    for module in network.modules():
        module.__class__ = FAST.get(type(module), type(module))
        if isinstance(module, FastSpatialBlock):
            stack_weights(module.attn1)
        elif isinstance(module, FastTemporalBlock):
            for attention in module.attention_blocks:
                stack_weights(attention)
        elif isinstance(module, FastVaeAttention):
            stack_weights(module)
        elif isinstance(module, FastLevel | FastUpsample):
            for conv in [up.conv for up in module.upsamplers] if isinstance(module, FastLevel) else [module.conv]:
                conv.doubling = doubling_weight(conv)
    if isinstance(network, AutoencoderKL):
        for part in (network.encoder, network.decoder):
            part.conv_norm_out.__class__, part.conv_act.__class__ = FastNormSilu, DoneBefore


@torch.inference_mode()
def _trial(network: UNet | AutoencoderKL) -> Tensor:
    """A small pass on fixed random inputs: two guided windows, or two faces there and back."""
    random = torch.Generator().manual_seed(0)
    if isinstance(network, AutoencoderKL):
        like = {"device": network.device, "dtype": network.dtype}
        faces = torch.randn(2, 3, 8 * CHECK_SIDE, 8 * CHECK_SIDE, generator=random).to(**like)
        latents = network.encode(faces.contiguous(memory_format=torch.channels_last)).latent_dist.mode()
        return torch.cat([latents.flatten(), network.decode(latents).sample.flatten()]).float()
    config, weight = network.config, network.conv_in.weight
    like = {"device": weight.device, "dtype": weight.dtype}
    frames = min(CHECK_FRAMES, config.temporal_max_len)
    x = torch.randn(2 * frames, config.in_channels, CHECK_SIDE, CHECK_SIDE, generator=random).to(**like)
    audio = torch.randn(2, frames, 50, config.cross_attention_dim, generator=random).to(**like)
    x, timestep = x.contiguous(memory_format=torch.channels_last), torch.tensor([500], device=weight.device)
    return network.full(x, timestep, network.encode_audio(audio), frames, guided=True)[0].float()


def fuse(network: UNet | AutoencoderKL) -> UNet | AutoencoderKL:
    """Put the fused kernels under the modules of a network on a GPU; weights and their names stay as they are.

    Tries them first: one small pass with and without must agree, or the network stays as it was and one line on
    the standard error says why. The pass also compiles the kernels, so a graph can be captured right afterwards.
    On the CPU it becomes lean, see `optim.lean`, and nothing is said. Returns the same network;
    `unfuse` undoes it.
    """
    weight = next(network.parameters())
    if not (weight.is_cuda or kernels.INTERPRETED):
        return lean(network)
    if kernels.triton is None:
        _say("Fused kernels are off: Triton is not installed; PyTorch's own run instead.")
        return network
    expected = _trial(network)
    _swap(network)
    try:
        kernels.compile_all(lambda: _trial(network))
        error = float((_trial(network) - expected).norm() / expected.norm())
    except Exception as failure:  # no C compiler, a GPU that Triton does not know, ...: whatever it is, eager works
        problem = in_a_line(failure)
    else:
        bound = CHECK_ERROR.get(weight.dtype, 0.0)
        problem = "" if error <= bound else f"their result is off by {error:.1e} (at most {bound:.0e})"
    if problem:
        unfuse(network)
        _say(f"Fused kernels are off: {problem}; PyTorch's own run instead.")
    return network


def unfuse(network: UNet | AutoencoderKL) -> UNet | AutoencoderKL:
    """Take back what `fuse` did."""
    plain = {fast: plain for table in (FAST, LEAN) for plain, fast in table.items()}
    plain |= {FastNormSilu: nn.GroupNorm, DoneBefore: nn.SiLU}
    for module in network.modules():
        module.__class__ = plain.get(type(module), type(module))
        if hasattr(module, "doubling"):
            del module.doubling
    return network
