"""Augmentation of frames: geometry, face shape, skin, light, colour, sharpness, blended people, expressions."""

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentsync.corpus import RESOLUTION, SIDE, ClipSet, copy_to_device

WARP = 0.05  # of half the canvas: maximal standard deviation of the displacements that change a face's shape
MOUTH_REACH = 2.0  # of half the mouth's width: radius around its middle that a mouth warp changes
UNCHANGED_SHARE = 0.25  # share of mouth warps that change nothing
BLENDED_SHARE = 0.6  # share of augmentations that mix in another person's features
MAX_BLEND = 0.7  # share of the other person


def _uniform(n: int, low: float, high: float, device: torch.device) -> Tensor:
    return torch.rand(n, device=device) * (high - low) + low


@dataclass(frozen=True)
class Augmentation:
    """Parameters of an augmentation of n frames or clips.

    affine (n, 2, 3) and warp (n, 2, 4, 4), a smooth displacement, in grid_sample's units; texture
    (n, 1, SIDE, SIDE), of the skin, a share of the tone; colour (n, 3, 4); light (n, 3, 4, 4), a smooth field of
    factors; gamma (n,); blur (n,), sigma in pixels; sharpen (n,), amount of unsharp masking with that blur.
    """

    affine: Tensor
    warp: Tensor
    texture: Tensor
    colour: Tensor
    light: Tensor
    gamma: Tensor
    blur: Tensor
    sharpen: Tensor

    def __getitem__(self, index: Tensor) -> "Augmentation":
        return Augmentation(*(getattr(self, field.name)[index] for field in fields(self)))


def no_augmentation(n: int, device: torch.device) -> Augmentation:
    """The identity: the inner crop, unchanged."""
    affine = torch.eye(2, 3, device=device).repeat(n, 1, 1)
    affine[:, :, :2] *= RESOLUTION / SIDE
    colour = torch.eye(3, 4, device=device).repeat(n, 1, 1)
    none = torch.zeros(n, device=device)
    return Augmentation(
        affine=affine,
        warp=torch.zeros(n, 2, 4, 4, device=device),
        texture=torch.zeros(n, 1, SIDE, SIDE, device=device),
        colour=colour,
        light=torch.ones(n, 3, 4, 4, device=device),
        gamma=none + 1,
        blur=none,
        sharpen=none,
    )


def random_augmentation(n: int, device: torch.device, zoom: float = 0.06, turn: float = 0.07) -> Augmentation:
    """Random geometry, face shape, skin, light, colour and sharpness. zoom: ± share; turn: ± radians."""
    scale = RESOLUTION / SIDE * (1 + _uniform(n, -zoom, zoom, device))
    angle = _uniform(n, -turn, turn, device)
    flip = torch.where(torch.rand(n, device=device) < 0.5, -1.0, 1.0)
    affine = torch.zeros(n, 2, 3, device=device)
    affine[:, 0, 0] = scale * angle.cos() * flip
    affine[:, 0, 1] = -scale * angle.sin()
    affine[:, 1, 0] = scale * angle.sin() * flip
    affine[:, 1, 1] = scale * angle.cos()
    affine[:, :, 2] = (torch.rand(n, 2, device=device) - 0.5) * 0.06

    # Hue turns about the grey axis, saturation shrinks or stretches away from it, then gain, tint and contrast.
    grey = torch.full((3, 3), 1 / 3, device=device)
    k = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]], device=device) / 3**0.5
    hue = _uniform(n, -0.5, 0.5, device)[:, None, None]
    saturation = _uniform(n, 0.3, 1.5, device)[:, None, None]
    away = torch.eye(3, device=device) - grey
    matrix = grey + saturation * (hue.cos() * away + hue.sin() * k)
    gain = _uniform(n, 0.6, 1.25, device)[:, None, None] * (1 + 0.2 * (torch.rand(n, 3, 1, device=device) - 0.5))
    lift = _uniform(n, -0.1, 0.12, device)[:, None, None].expand(n, 3, 1)
    contrast = _uniform(n, 0.75, 1.25, device)[:, None, None]
    colour = torch.cat([matrix * gain, lift], dim=2) * contrast
    colour[:, :, 3:] += 0.4 * (1 - contrast)  # about the tone of a face

    # Light from one side, and a little of every colour from everywhere.
    across = torch.linspace(-1, 1, 4, device=device)
    side, strength = _uniform(n, 0, 2 * np.pi, device), _uniform(n, 0, 0.35, device)
    light = 1 + (strength * side.cos())[:, None, None, None] * across
    light = light + (strength * side.sin())[:, None, None, None] * across[:, None]
    light = light + torch.randn(n, 3, 4, 4, device=device) * _uniform(n, 0, 0.06, device)[:, None, None, None]

    softness = _uniform(n, -1.0, 1.0, device)
    return Augmentation(
        affine=affine,
        warp=torch.randn(n, 2, 4, 4, device=device) * _uniform(n, 0, WARP, device)[:, None, None, None],
        texture=torch.randn(n, 1, SIDE, SIDE, device=device) * _uniform(n, 0, 0.04, device)[:, None, None, None],
        colour=colour,
        light=light,
        gamma=_uniform(n, 0.7, 1.4, device),
        # A third of a pixel is no blur; sharpening adds what a blur of one pixel would remove.
        blur=torch.where(softness > 0, softness, 1.0) * (softness.abs() > 0.3),
        sharpen=1.5 * (-softness).clamp(min=0),
    )


def random_blends(data: ClipSet, rng: np.random.Generator) -> Tensor:
    """Differences (clips, 3, SIDE, SIDE) that, added to its frames, blend another person into every clip's.

    The difference of two average faces does not change any motion, and few people become many.
    """
    other = copy_to_device(data.draw(rng, len(data.starts)), data.means.device)
    share = rng.uniform(0, MAX_BLEND, len(other)) * (rng.random(len(other)) < BLENDED_SHARE)
    share = copy_to_device(share.astype(np.float32), data.means.device)
    return share[:, None, None, None] * (data.means[other] - data.means)


@dataclass(frozen=True)
class MouthWarp:
    """Changed expressions of n mouths at `mouth` (n, 3), see `ClipSet.mouths`.

    wider, higher (n,): new size over the old one, at the middle; corners (n,): how far they sink (below zero: a smile),
    and shift (n, 2), both in halves of the mouth's width.
    """

    mouth: Tensor
    wider: Tensor
    higher: Tensor
    corners: Tensor
    shift: Tensor

    def __getitem__(self, index: Tensor) -> "MouthWarp":
        return MouthWarp(*(getattr(self, field.name)[index] for field in fields(self)))

    def displacement(self, grid: Tensor) -> Tensor:
        """Offsets to add to a sampling grid (n, h, w, 2) of the canvas; zero beyond MOUTH_REACH."""
        half = self.mouth[:, None, None, 2]
        relative = (grid - self.mouth[:, None, None, :2]) / half[..., None]
        x, y = relative.unbind(-1)
        window = (1 - relative.square().sum(-1) / MOUTH_REACH**2).clamp(min=0).square()
        wider, higher, corners, left, down = (
            part[:, None, None] for part in (self.wider, self.higher, self.corners, *self.shift.unbind(1))
        )
        across = x * (1 / wider - 1) - left
        along = y * (1 / higher - 1) - down - corners * (x.square() - 0.3)
        return torch.stack([across, along], dim=-1) * (window * half)[..., None]


def random_mouth(mouth: Tensor) -> MouthWarp:
    """A random expression for each of n mouths (n, 3): wider or narrower, more open or shut, smiling or sulking."""
    n, device = len(mouth), mouth.device
    changed = torch.rand(n, device=device) >= UNCHANGED_SHARE
    return MouthWarp(
        mouth,
        wider=(changed * _uniform(n, -0.35, 0.5, device)).exp(),
        higher=(changed * _uniform(n, -0.6, 0.6, device)).exp(),
        corners=changed * _uniform(n, -0.6, 0.4, device),
        shift=changed[:, None] * (torch.rand(n, 2, device=device) - 0.5) * 0.2,
    )


def render(frames: Tensor, augmentation: Augmentation, mouth: MouthWarp | None = None) -> Tensor:
    """Augment frames (n, 3, SIDE, SIDE) in 0 … 255 → float (n, 3, RESOLUTION, RESOLUTION) in [−1, 1]."""
    size = [len(frames), 3, RESOLUTION, RESOLUTION]
    grid = F.affine_grid(augmentation.affine, size, align_corners=False)
    grid = grid + F.interpolate(augmentation.warp, size[2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    if mouth is not None:
        grid = grid + mouth.displacement(grid)
    x = F.grid_sample(
        frames.float() / 255 * (1 + augmentation.texture), grid, padding_mode="reflection", align_corners=False
    )
    x = torch.einsum("nij,njhw->nihw", augmentation.colour[:, :, :3], x) + augmentation.colour[:, :, 3, None, None]
    x = x * F.interpolate(augmentation.light, size[2:], mode="bicubic", align_corners=True)
    x = x.clamp(0, 1) ** augmentation.gamma[:, None, None, None]
    offsets = torch.arange(-2, 3, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / augmentation.blur.clamp(min=1e-3)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    soft = x
    for padding in ((2, 2, 0, 0), (0, 0, 2, 2)):
        wide = F.pad(soft, padding, mode="replicate")
        axis = 3 if padding[0] else 2
        soft = sum(wide.narrow(axis, i, RESOLUTION) * kernel[:, i, None, None, None] for i in range(5))
    sharpen = augmentation.sharpen[:, None, None, None]
    x = torch.where(sharpen > 0, x + sharpen * (x - soft), soft).clamp(0, 1)
    return x * 2 - 1
