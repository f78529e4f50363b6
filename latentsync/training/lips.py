"""A small network that estimates the mouth's shape from latents, for a loss on the denoiser's mouths.

The noise loss hardly changes when a mouth is shut that should be open: it covers few of the latents. LatentSync applies
a sync network to the decoded estimate of the clean face for that. Here the shape is estimated from the latents
themselves, without decoding, and compared in the distances that speech changes.
"""

import logging
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentsync.corpus import LIPS, ClipSet

log = logging.getLogger(__name__)

DISTANCES = (  # pairs of points of the 478-point mesh; a row's mean is one distance, equal in a mirrored face
    ((13, 14),),  # opening in the middle
    ((82, 87), (312, 317)),  # opening at both sides of the middle
    ((61, 291),),  # outer width
    ((78, 308),),  # inner width
    ((0, 13),),  # upper lip
    ((14, 17),),  # lower lip
    ((0, 17),),  # total height
)
STEPS, BATCH, LEARNING_RATE = 1500, 1024, 2e-3
NOISE = 0.5  # largest deviation of the noise added to the input, so that no small pattern decides


def mouth_shapes(data: ClipSet) -> Tensor:
    """The DISTANCES of every frame, (n, 7), each with mean 0 and deviation 1 over the set."""
    index = {point: i for i, point in enumerate(LIPS)}
    shapes = []
    for pairs in DISTANCES:
        lengths = [(data.lips[:, index[a]] - data.lips[:, index[b]]).norm(dim=-1) for a, b in pairs]
        shapes.append(torch.stack(lengths).mean(0))
    shapes = torch.stack(shapes, dim=-1)
    return (shapes - shapes.mean(0)) / shapes.std(0)


class LatentLipReader(nn.Module):
    """Latents of n faces (n, c, 16, 16) → the DISTANCES of their mouths (n, 7)."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, 64, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 96, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(96, 128, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(128, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64 * 16, len(DISTANCES)),
        )

    def forward(self, latents: Tensor) -> Tensor:
        return self.net(latents)


def train_reader(latents: Tensor, data: ClipSet, steps: int = STEPS, batch: int = BATCH) -> LatentLipReader:
    """Train a reader on latents (renderings, n, c, 16, 16) of all frames; returns it frozen.

    Pairs of frames of a clip are mixed, and their shapes too: an estimate from much noise is a mean of many mouths.
    """
    device = latents.device
    shapes = mouth_shapes(data)
    starts, lengths = (torch.as_tensor(values, device=device) for values in (data.starts, data.lengths))
    clip_of = data.clip_of()
    reader = LatentLipReader(latents.shape[2]).to(device)
    optimizer = torch.optim.AdamW(reader.parameters(), LEARNING_RATE, weight_decay=0.01)
    started, error = time.time(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / steps)
        rendering = torch.randint(len(latents), (batch,), device=device)
        one = torch.randint(len(shapes), (batch,), device=device)
        clip = clip_of[one]
        other = starts[clip] + (torch.rand(batch, device=device) * lengths[clip]).long()
        share = torch.rand(batch, device=device) * (torch.rand(batch, device=device) < 0.5)
        pair = latents[rendering, one].float(), latents[rendering, other].float()
        mixed = torch.lerp(*pair, share[:, None, None, None])
        target = torch.lerp(shapes[one], shapes[other], share[:, None])
        mixed += NOISE * torch.rand(batch, 1, 1, 1, device=device) * torch.randn_like(mixed)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = reader(mixed)
        loss = F.smooth_l1_loss(out.float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        error += float(loss.detach()) if step >= steps - 20 else 0.0
    log.info("lip reader: error %.3f after %.0f s", error / min(steps, 20), time.time() - started)
    return reader.eval().requires_grad_(False)


def shape_loss(shapes: Tensor, target: Tensor) -> Tensor:
    """Loss of mouth shapes and of their changes from frame to frame; (b, f, 7) each → (b,)."""
    loss = F.smooth_l1_loss(shapes, target, reduction="none").mean((1, 2))
    return loss + F.smooth_l1_loss(shapes.diff(dim=1), target.diff(dim=1), reduction="none").mean((1, 2))
