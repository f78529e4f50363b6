"""The audio encoder of an OpenAI-format Whisper, whose activations are LatentSync's audio tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class WhisperDims:
    """The encoder's entries in the `dims` of a Whisper file; the defaults are Whisper tiny."""

    n_mels: int = 80
    n_audio_ctx: int = 1500  # positions, half the mel frames of a segment
    n_audio_state: int = 384
    n_audio_head: int = 6
    n_audio_layer: int = 4


class SelfAttention(nn.Module):
    """(1, t, C) → (1, t, C); the key has no bias."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block; (n, t, C) → (n, t, C)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn = SelfAttention(dim, heads)
        self.attn_ln = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.mlp_ln = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_ln(x))
        return x + self.mlp(self.mlp_ln(x))


class AudioEncoder(nn.Module):
    """Two convolutions, positional embedding, transformer blocks; returns the activations between the blocks."""

    def __init__(self, dims: WhisperDims):
        super().__init__()
        self.dims = dims
        width = dims.n_audio_state
        self.conv1 = nn.Conv1d(dims.n_mels, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.register_buffer("positional_embedding", torch.zeros(dims.n_audio_ctx, width))
        self.blocks = nn.ModuleList(Block(width, dims.n_audio_head) for _ in range(dims.n_audio_layer))
        # In the weights, but not used: LatentSync's features are those before this norm.
        self.ln_post = nn.LayerNorm(width)

    def forward(self, mel: Tensor) -> Tensor:
        """mel (n, n_mels, 2·n_audio_ctx) → (n, n_audio_ctx, n_audio_layer + 1, n_audio_state).

        The layers are the input of the first block and the output of each block, without the final norm.
        """
        x = F.gelu(self.conv1(mel))
        x = F.gelu(self.conv2(x)).transpose(1, 2) + self.positional_embedding
        layers = [x]
        for block in self.blocks:
            x = block(x)
            layers.append(x)
        return torch.stack(layers, dim=2)
