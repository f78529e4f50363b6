"""A small network that reads the mouth's shape off latents, so that the denoiser can be told how wrong its mouths are.

The loss of the noise hardly notices a mouth that is shut where it should be open: it is few latents of many. LatentSync
has a judge of sync watch the decoded estimate of the clean face for that; here the estimate itself is read, undecoded,
and compared in the distances that speech changes.
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentsync.corpus import LIPS, ClipSet

DISTANCES = (  # pairs of points of the 478-point mesh; a row's mean is one distance, the same in a mirrored face
    ((13, 14),),  # opening in the middle
    ((82, 87), (312, 317)),  # and beside it
    ((61, 291),),  # outer width
    ((78, 308),),  # inner width
    ((0, 13),),  # upper lip
    ((14, 17),),  # lower lip
    ((0, 17),),  # height over all
)
STEPS, BATCH, LEARNING_RATE = 1500, 1024, 2e-3
NOISE = 0.5  # largest deviation of the noise in what it reads, so that no small pattern decides


def mouth_shapes(data: ClipSet) -> Tensor:
    """The DISTANCES of every frame, (n, 7), each with mean 0 and deviation 1 over the set."""
    place = {point: i for i, point in enumerate(LIPS)}
    shapes = []
    for pairs in DISTANCES:
        lengths = [(data.lips[:, place[a]] - data.lips[:, place[b]]).norm(dim=-1) for a, b in pairs]
        shapes.append(torch.stack(lengths).mean(0))
    shapes = torch.stack(shapes, dim=-1)
    return (shapes - shapes.mean(0)) / shapes.std(0)


class LatentLipReader(nn.Module):
    """Latents of one face each, (n, c, 16, 16) → its mouth's DISTANCES (n, 7)."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, 64, 3, padding=1), nn.SiLU(),
            nn.Conv2d(64, 96, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(96, 128, 3, padding=1), nn.SiLU(),
            nn.Conv2d(128, 64, 3, stride=2, padding=1), nn.SiLU(),
            nn.Flatten(), nn.Linear(64 * 16, len(DISTANCES)),
        )  # fmt: skip

    def forward(self, latents: Tensor) -> Tensor:
        return self.net(latents)


def train_reader(latents: Tensor, data: ClipSet, steps: int = STEPS, batch: int = BATCH) -> LatentLipReader:
    """Teach a reader on latents (looks, n, c, 16, 16) of all frames; it comes back frozen.

    Pairs of frames of a clip are mixed, with their shapes: the estimate from much noise is a mean of many mouths.
    """
    device = latents.device
    shapes = mouth_shapes(data)
    starts, lengths = (torch.as_tensor(values, device=device) for values in (data.starts, data.lengths))
    clip_of = data.clip_of()
    reader = LatentLipReader(latents.shape[2]).to(device)
    optimizer = torch.optim.AdamW(reader.parameters(), LEARNING_RATE, weight_decay=0.01)
    began, error = time.time(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / steps)
        look = torch.randint(len(latents), (batch,), device=device)
        one = torch.randint(len(shapes), (batch,), device=device)
        clip = clip_of[one]
        other = starts[clip] + (torch.rand(batch, device=device) * lengths[clip]).long()
        share = torch.rand(batch, device=device) * (torch.rand(batch, device=device) < 0.5)
        mixed = torch.lerp(latents[look, one].float(), latents[look, other].float(), share[:, None, None, None])
        wanted = torch.lerp(shapes[one], shapes[other], share[:, None])
        mixed += NOISE * torch.rand(batch, 1, 1, 1, device=device) * torch.randn_like(mixed)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            read = reader(mixed)
        loss = F.smooth_l1_loss(read.float(), wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        error += float(loss.detach()) if step >= steps - 20 else 0.0
    print(f"lip reader: error {error / min(steps, 20):.3f} after {time.time() - began:.0f} s", flush=True)
    return reader.eval().requires_grad_(False)


def shape_loss(read: Tensor, wanted: Tensor) -> Tensor:
    """(b, f, 7) each, of windows of f frames → (b,): how far shapes and their changes are off."""
    still = F.smooth_l1_loss(read, wanted, reduction="none").mean((1, 2))
    return still + F.smooth_l1_loss(read.diff(dim=1), wanted.diff(dim=1), reduction="none").mean((1, 2))
