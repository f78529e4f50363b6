"""A judge of sync in the manner of SyncNet (Chung and Zisserman 2016): sound and mouth as points that lie close where
they belong together.

It is small, trained here on the training clips in minutes, and may judge only what it can: `check` tries it on real
clips first.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from latentsync.audio import MEL_RANGE, log_powers
from latentsync.checkpoints.tensors import load_exactly, read_tensors
from latentsync.corpus import (
    MARGIN,
    MEL_BASE,
    MEL_PER_FRAME,
    MEL_STEP,
    N_MELS,
    RESOLUTION,
    ClipSet,
    load_clips,
    load_held_out_clips,
)

WEIGHTS = Path(__file__).parent.parent.parent / "assets" / "judge" / "judge.safetensors"
SPAN = 5  # frames that are judged together, 0.2 s (SyncNet)
MOUTH = (0.14, 0.42, 0.86, 0.98)  # of the crop's side: left, top, right, bottom of what is seen
PATCH = (40, 48)  # pixels, height and width, of it
JITTER = 4  # pixels around the patch that training shifts it by
WIDTHS = (24, 48, 72, 96)
DIMENSIONS = 96
LATEST = 15  # frames that sound and picture are shifted by, either way (SyncNet)
CLIPS, WINDOWS = 16, 14  # of a batch, and of each of its clips
LEARNING_RATE = 2e-3
TEMPERATURE = 0.07
TONES = 0.25  # deviation of the exponent of the tones in training
SOFT = 5  # pixels: the widest blur in training
FAR = 7  # frames that a real clip is shifted by for the check
MOST_OFF = 1  # frames that the judge may be off
ENOUGH = 0.9  # share of real clips that it must get right


def tower(channels: int, strides: list[tuple[int, int]], size: tuple[int, int]) -> nn.Sequential:
    """A small convolutional network from (n, channels, *size) to (n, DIMENSIONS)."""
    layers: list[nn.Module] = []
    for width, stride in zip(WIDTHS, strides, strict=True):
        layers += [nn.Conv2d(channels, width, 3, stride, padding=1), nn.GroupNorm(8, width), nn.GELU()]
        channels = width
        size = tuple(-(-length // step) for length, step in zip(size, stride, strict=True))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size[0] * size[1], DIMENSIONS))


class Judge(nn.Module):
    """Mouths and sounds as points on the unit sphere."""

    def __init__(self):
        super().__init__()
        self.mouth = tower(SPAN, [(2, 2), (2, 2), (2, 2), (1, 1)], PATCH)
        self.sound = tower(1, [(2, 1), (2, 2), (2, 2), (2, 2)], (N_MELS, SPAN * MEL_PER_FRAME))

    def see(self, patches: Tensor) -> Tensor:
        """Grey patches (n, SPAN, *PATCH), of any range → (n, DIMENSIONS). Light and contrast do not count."""
        patches = patches - patches.mean((1, 2, 3), keepdim=True)
        return F.normalize(self.mouth(patches / (patches.std((1, 2, 3), correction=0, keepdim=True) + 1e-3)), dim=1)

    def hear(self, mel: Tensor) -> Tensor:
        """`relative` mel powers (n, SPAN · MEL_PER_FRAME, N_MELS) → (n, DIMENSIONS)."""
        return F.normalize(self.sound(mel.transpose(1, 2)[:, None]), dim=1)


def relative(power: Tensor) -> Tensor:
    """Mel powers of a clip (n, N_MELS), log10, over its loudest: 1 down to −1."""
    return (power - power.max()).clamp(min=-MEL_RANGE) / (MEL_RANGE / 2) + 1


def patches_of(crops: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """The mouths of crops uint8 (n, R, R, 3) that have `margin` · R pixels more around them, (n, h, w) grey uint8.

    As large as PATCH and JITTER around it.
    """
    side = crops.shape[1] / (1 + 2 * margin)
    height, width = (length + 2 * JITTER for length in PATCH)
    left, top, right, bottom = ((edge + margin) * side for edge in MOUTH)
    # One affine map from the patch to the crop, centres to centres, JITTER beyond the mouth on every side.
    scale = (right - left) / PATCH[1], (bottom - top) / PATCH[0]
    matrix = np.array([
        [scale[0], 0, left + (0.5 - JITTER) * scale[0] - 0.5],
        [0, scale[1], top + (0.5 - JITTER) * scale[1] - 0.5],
    ])  # fmt: skip
    soft = max(scale) / 2
    out = []
    for crop in crops:
        grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
        if soft > 0.5:  # against aliasing
            grey = cv2.GaussianBlur(grey, (0, 0), soft * 0.8)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        out.append(cv2.warpAffine(grey, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE))
    return np.stack(out)


def load_judge(path: Path, device: torch.device) -> Judge:
    """Raises UserError where the file is missing or of another judge."""
    tensors, _ = read_tensors(path)
    judge = Judge()
    load_exactly(judge, lambda: tensors, path, device, torch.float32)
    return judge.to(device).eval()


def windows(values: Tensor, starts: Tensor, length: int) -> Tensor:
    """(n, …) at starts (k,) → (k, length, …)."""
    return values[starts[:, None] + torch.arange(length, device=values.device)]


def train(prepared: Path, output: Path, seconds: float, device: torch.device) -> None:
    """Train on a folder of `latentsync.training prepare` for `seconds` and write the weights in half precision."""
    output.parent.mkdir(parents=True, exist_ok=True)
    data = load_clips(prepared, torch.device("cpu"))
    patches, mel = material(data, device)
    data = replace(data, frames=data.frames[:0].clone())  # gigabytes that are not needed any more
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    judge = Judge().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), LEARNING_RATE, weight_decay=0.1)
    wanted = torch.arange(CLIPS * WINDOWS, device=device)
    began, step, average = time.monotonic(), 0, 0.0
    while (elapsed := time.monotonic() - began) < seconds or step == 0:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * max(0.02, 1 - elapsed / max(seconds, 1))
        seen, heard = draw(data, patches, mel, rng)
        close = judge.see(seen) @ judge.hear(heard).T / TEMPERATURE
        loss = (F.cross_entropy(close, wanted) + F.cross_entropy(close.T, wanted)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        average += (float(loss.detach()) - average) / min(step, 100)
        if step % 100 == 0:
            print(f"judge step {step} loss {average:.3f} {elapsed:.0f} s", flush=True)
    save_file({name: tensor.half().cpu().contiguous() for name, tensor in judge.state_dict().items()}, output)
    print(f"judge: {step} steps; {output}", flush=True)
    if unseen := load_held_out_clips(prepared, torch.device("cpu")):
        print("on clips that were held out: " + check(*tables(judge.eval(), unseen, device)).sentence())


def material(data: ClipSet, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mouth patches (n, h, w) uint8 and relative mel (n · MEL_PER_FRAME, N_MELS) of clips end to end."""
    patches = patches_of(data.frames.permute(0, 2, 3, 1).numpy(), MARGIN / RESOLUTION)
    power = data.mel[0].float() * MEL_STEP + MEL_BASE
    mel = [relative(part) for part in power.split([int(length) * MEL_PER_FRAME for length in data.lengths])]
    return torch.from_numpy(patches).to(device), torch.cat(mel).to(device)


def draw(data: ClipSet, patches: Tensor, mel: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A batch of windows that belong together, each clip's spread over its length, looks and voices varied."""
    device, n = patches.device, CLIPS * WINDOWS
    clips = np.repeat(data.draw(rng, CLIPS), WINDOWS)
    room = (data.lengths[clips] - SPAN) / WINDOWS  # frames a window may begin in
    first = ((np.tile(np.arange(WINDOWS), CLIPS) + rng.random(n)) * room).astype(int)
    starts = torch.from_numpy(data.starts[clips] + first).to(device)
    seen = windows(patches, starts, SPAN).float() / 255
    # One shift, flip and exponent a window; neighbours of a batch stay comparable, as they come from one clip.
    at = torch.from_numpy(rng.integers(0, 2 * JITTER + 1, (n, 2))).to(device)
    rows = at[:, :1] + torch.arange(PATCH[0], device=device)
    columns = at[:, 1:] + torch.arange(PATCH[1], device=device)
    columns = torch.where(torch.rand(n, 1, device=device) < 0.5, columns, columns.flip(1))
    index = torch.arange(n, device=device)[:, None, None]
    seen = seen.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
    seen = seen ** (torch.randn(n, 1, 1, 1, device=device) * TONES).exp()
    # Generated mouths are softer than real ones, which must not count.
    soft = F.avg_pool2d(seen, SOFT, 1, SOFT // 2, count_include_pad=False)
    seen = torch.lerp(seen, soft, torch.rand(n, 1, 1, 1, device=device))
    seen = seen + 0.02 * torch.randn_like(seen)
    heard = windows(mel, starts * MEL_PER_FRAME, SPAN * MEL_PER_FRAME)
    heard = heard + 0.1 * torch.randn(n, 1, 1, device=device) + 0.1 * torch.randn(n, 1, N_MELS, device=device)
    return seen, heard + 0.05 * torch.randn_like(heard)


@torch.inference_mode()
def similarities(judge: Judge, patches: Tensor, mel: Tensor) -> Tensor:
    """How close windows of mouths (n, h, w) lie to windows of sound (m · MEL_PER_FRAME, N_MELS): (n − 4, m − 4)."""
    patches = patches[:, JITTER:-JITTER, JITTER:-JITTER].float() / 255
    device = patches.device
    sounds = len(mel) // MEL_PER_FRAME
    seen = judge.see(windows(patches, torch.arange(max(len(patches) - SPAN + 1, 0), device=device), SPAN))
    starts = torch.arange(max(sounds - SPAN + 1, 0), device=device) * MEL_PER_FRAME
    return seen @ judge.hear(windows(mel, starts, SPAN * MEL_PER_FRAME)).T


@dataclass(frozen=True)
class Verdict:
    """offset: frames that the picture is late; confidence: how much closer it lies there than usually."""

    offset: int
    confidence: float


def verdict(close: Tensor, shift: int = 0) -> Verdict:
    """Of `similarities` (n, m); NaN where they are too few. shift: as if the picture came so many frames later."""
    lags = [lag for lag in range(-LATEST, LATEST + 1) if min(close.shape) > abs(lag - shift) + SPAN] or [0]
    # A picture that is late by `lag` matches the sound of `lag` frames before.
    mean = torch.stack([close.diagonal(shift - lag).mean() for lag in lags])
    best = int(mean.argmax())
    return Verdict(lags[best], float(mean[best] - mean.median()))


def judge_clip(judge: Judge, crops: np.ndarray, wav: np.ndarray) -> Tensor:
    """`similarities` of aligned crops uint8 (n, R, R, 3) and their sound (samples,)."""
    device = next(judge.parameters()).device
    mel = relative(torch.cat(list(log_powers(torch.from_numpy(wav), N_MELS)), dim=1).T)
    return similarities(judge, torch.from_numpy(patches_of(crops)).to(device), mel.to(device))


@dataclass(frozen=True)
class Check:
    """What a judge finds of real clips: shares of them, and its mean confidence."""

    clips: int
    in_step: float  # found in step, as they are
    shifted: float  # found out of step by FAR, when shifted by it
    confidence: float  # of true pairs
    mismatched: float  # of other clips' sounds

    @property
    def passed(self) -> bool:
        return min(self.in_step, self.shifted) >= ENOUGH and self.mismatched < self.confidence

    def sentence(self) -> str:
        return (
            f"{self.in_step:.0%} of {self.clips} real clips in step, {self.shifted:.0%} of shifted ones found shifted, "
            f"confidence {self.confidence:.2f}, of another clip's sound {self.mismatched:.2f}: "
            + ("it may judge" if self.passed else "it may not judge")
        )


def check(true: list[Tensor], mismatched: list[Tensor]) -> Check:
    """Of the `similarities` of real clips with their own sound, and with another clip's."""
    own = [verdict(close) for close in true]
    late = [verdict(close, shift) for close in true for shift in (-FAR, FAR)]
    shifts = [shift for _ in true for shift in (-FAR, FAR)]
    return Check(
        clips=len(true),
        in_step=float(np.mean([abs(found.offset) <= MOST_OFF for found in own])),
        shifted=float(np.mean([abs(v.offset - s) <= MOST_OFF for v, s in zip(late, shifts, strict=True)])),
        confidence=float(np.mean([found.confidence for found in own])),
        mismatched=float(np.mean([verdict(close).confidence for close in mismatched])) if mismatched else 0.0,
    )


def tables(judge: Judge, data: ClipSet, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """`similarities` of prepared clips with their own sound, and with the next clip's."""
    patches, mel = material(data, device)
    lengths = [int(length) for length in data.lengths]
    patches, mel = patches.split(lengths), mel.split([length * MEL_PER_FRAME for length in lengths])
    true = [similarities(judge, *pair) for pair in zip(patches, mel, strict=True)]
    others = [similarities(judge, seen, mel[i - 1]) for i, seen in enumerate(patches) if len(mel) > 1]
    return true, others
