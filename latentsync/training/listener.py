"""Training of the demo model's audio encoder, to predict the shape of the lips from audio.

The denoiser then uses its activations as audio tokens, as LatentSync uses Whisper's, and trains it further.
"""

import logging
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentsync.corpus import INNER_LOWER, INNER_UPPER, LIPS, ClipSet, load_clips, load_held_out_clips
from latentsync.training.sound import draw_sound, draw_windows, gather_tokens, segment_count
from latentsync.training.state import load_state, save_state
from latentsync.whisper import AudioEncoder, WhisperDims

log = logging.getLogger(__name__)

DIMS = WhisperDims(n_audio_state=128, n_audio_head=4, n_audio_layer=4)
TOKENS = 10 * (DIMS.n_audio_layer + 1)
SEGMENTS, WINDOWS_PER_SEGMENT = 16, 20
LEARNING_RATE = 1e-3
LIP_UNIT = 3.0  # pixels of the 128 crop, about the lips' deviation from their mean


def new_encoder() -> AudioEncoder:
    """An encoder with random weights and Whisper's sinusoidal positions."""
    encoder = AudioEncoder(DIMS)
    half = DIMS.n_audio_state // 2
    rate = torch.exp(-np.log(10000.0) / (half - 1) * torch.arange(half))
    angle = torch.arange(DIMS.n_audio_ctx)[:, None] * rate
    encoder.positional_embedding.copy_(torch.cat([angle.sin(), angle.cos()], dim=1))
    return encoder


class LipReader(nn.Module):
    """Audio tokens (b, f, 50, width) → lips (b, f, 40, 2) around their mean, in units of LIP_UNIT."""

    def __init__(self):
        super().__init__()
        width = TOKENS * DIMS.n_audio_state
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256), nn.GELU(), nn.Linear(256, len(LIPS) * 2))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens.flatten(2)).unflatten(-1, (len(LIPS), 2))


def centred_lips(data: ClipSet) -> Tensor:
    """The lips of every frame around their clip's mean shape, in units of LIP_UNIT: (n, 40, 2)."""
    lips = data.lips.clone()
    for start, length in zip(data.starts, data.lengths, strict=True):
        lips[start : start + length] -= lips[start : start + length].mean(0)
    return lips / LIP_UNIT


def train(
    prepared: Path, state: Path, seconds: float, device: torch.device, batch: int = SEGMENTS * WINDOWS_PER_SEGMENT
) -> None:
    """Train for `seconds`, continuing from `state/listener.pt` if it exists, and write it at the end."""
    segments = segment_count(batch, WINDOWS_PER_SEGMENT)
    data = load_clips(prepared, device)
    lips = centred_lips(data)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    encoder, reader = new_encoder().to(device), LipReader().to(device)
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.05)
    step = load_state(state / "listener.pt", {"encoder": encoder, "reader": reader}, optimizer)
    started = time.time()
    while (elapsed := time.time() - started) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 100) * max(0.02, 1 - elapsed / seconds)
        sound = draw_sound(data, rng, segments, augment=True)
        windows = draw_windows(data, sound, rng, WINDOWS_PER_SEGMENT)
        with torch.autocast(device.type, torch.bfloat16):
            out = reader(gather_tokens(encoder(sound.mel), windows.segment, windows.rows)).float()
        target = lips[windows.frames]
        # Changes count as well, or a slow average would suffice.
        loss = F.smooth_l1_loss(out, target) + F.smooth_l1_loss(out.diff(dim=1), target.diff(dim=1))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 200 == 0:
            log.info("listener step %d loss %.4f %.0f s", step, float(loss), elapsed)
    log.info("listener: step %d", step)
    if held_out := load_held_out_clips(prepared, device):
        scores = [opening_correlation(encoder, reader, held_out)]
        if len(held_out.mel) > 1:
            scores.append(opening_correlation(encoder, reader, held_out, own_voice=False))
        text = ", synthesised voices ".join(f"{score:.3f}" for score in scores)
        log.info("  held-out correlation of the mouth's opening %s", text)
    save_state(state / "listener.pt", {"encoder": encoder, "reader": reader}, optimizer, step)


@torch.no_grad()
def opening_correlation(encoder: AudioEncoder, reader: LipReader, data: ClipSet, own_voice: bool = True) -> float:
    """Correlation of the predicted and the true mouth opening, mean over windows; own_voice: of `draw_sound`."""
    rng = np.random.default_rng(1)
    sound = draw_sound(data, rng, 16, augment=False, own_voice=own_voice)
    windows = draw_windows(data, sound, rng, 16)
    out = reader(gather_tokens(encoder(sound.mel), windows.segment, windows.rows))
    pair = torch.stack([out, centred_lips(data)[windows.frames]])  # (2, b, f, 40, 2)
    opening = pair[..., INNER_LOWER, 1] - pair[..., INNER_UPPER, 1]
    opening = opening - opening.mean(-1, keepdim=True)
    product = (opening[0] * opening[1]).sum(-1) / (opening.norm(dim=-1).prod(0) + 1e-6)
    return float(product.mean())
