"""A sync judge in the manner of SyncNet (Chung and Zisserman 2016): it embeds mouths and sounds, close if in sync.

It is small, trained on the training clips in minutes, and used only after `check` has tested it on real clips.
"""

import logging
import math
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

log = logging.getLogger(__name__)

WEIGHTS = Path(__file__).parent.parent.parent / "assets" / "judge" / "judge.safetensors"
SPAN = 5  # frames in a window, 0.2 s (SyncNet)
MOUTH = (0.14, 0.42, 0.86, 0.98)  # of the crop's side: left, top, right, bottom of the patch
PATCH = (40, 48)  # pixels of the patch, height and width
JITTER = 4  # pixels by which training shifts the patch
WIDTHS = (24, 48, 72, 96)
DIMENSIONS = 96
MAX_SHIFT = 15  # frames of shift between sound and picture that are tried, either way (SyncNet)
CLIPS, WINDOWS = 16, 14  # in a batch, and of each of its clips
LEARNING_RATE = 2e-3
TEMPERATURE = 0.07
GAMMA_STD = 0.25  # deviation of the logarithm of gamma in training
MAX_BLUR = 5  # pixels: side of the blur in training
CHECK_SHIFT = 7  # frames by which `check` shifts real clips
MAX_OFFSET = 1  # frames of error that count as correct
MIN_CORRECT = 0.9  # share of real clips


def make_encoder(channels: int, strides: list[tuple[int, int]], size: tuple[int, int]) -> nn.Sequential:
    """A small convolutional network from (n, channels, *size) to (n, DIMENSIONS)."""
    layers: list[nn.Module] = []
    height, width = size
    for c_out, stride in zip(WIDTHS, strides, strict=True):
        layers += [nn.Conv2d(channels, c_out, 3, stride, padding=1), nn.GroupNorm(8, c_out), nn.GELU()]
        channels = c_out
        height, width = math.ceil(height / stride[0]), math.ceil(width / stride[1])
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, DIMENSIONS))


class Judge(nn.Module):
    """Embeds mouths and sounds on the unit sphere."""

    def __init__(self):
        super().__init__()
        self.mouth = make_encoder(SPAN, [(2, 2), (2, 2), (2, 2), (1, 1)], PATCH)
        self.sound = make_encoder(1, [(2, 1), (2, 2), (2, 2), (2, 2)], (N_MELS, SPAN * MEL_PER_FRAME))

    def embed_mouths(self, patches: Tensor) -> Tensor:
        """Grey patches (n, SPAN, *PATCH), of any range → (n, DIMENSIONS), independent of light and contrast."""
        patches = patches - patches.mean((1, 2, 3), keepdim=True)
        return F.normalize(self.mouth(patches / (patches.std((1, 2, 3), correction=0, keepdim=True) + 1e-3)), dim=1)

    def embed_sounds(self, mel: Tensor) -> Tensor:
        """`relative_mel` powers (n, SPAN · MEL_PER_FRAME, N_MELS) → (n, DIMENSIONS)."""
        return F.normalize(self.sound(mel.transpose(1, 2)[:, None]), dim=1)


def relative_mel(power: Tensor) -> Tensor:
    """Mel powers of a clip (n, N_MELS), log10, relative to its loudest: 1 down to −1."""
    return (power - power.max()).clamp(min=-MEL_RANGE) / (MEL_RANGE / 2) + 1


def mouth_patches(crops: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """Cut the mouths, (n, h, w) grey uint8, from crops uint8 (n, R, R, 3) with `margin` · R pixels more around them.

    The patches have the size of PATCH with JITTER around it.
    """
    side = crops.shape[1] / (1 + 2 * margin)
    height, width = (length + 2 * JITTER for length in PATCH)
    left, top, right, bottom = ((edge + margin) * side for edge in MOUTH)
    # One affine map from the patch to the crop, centres to centres, JITTER beyond the mouth on every side.
    scale = (right - left) / PATCH[1], (bottom - top) / PATCH[0]
    x0, y0 = left + (0.5 - JITTER) * scale[0] - 0.5, top + (0.5 - JITTER) * scale[1] - 0.5
    matrix = np.array([[scale[0], 0, x0], [0, scale[1], y0]])
    blur = max(scale) / 2
    patches = []
    for crop in crops:
        grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
        if blur > 0.5:  # against aliasing
            grey = cv2.GaussianBlur(grey, (0, 0), blur * 0.8)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        patches.append(cv2.warpAffine(grey, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE))
    return np.stack(patches)


def load_judge(path: Path, device: torch.device) -> Judge:
    """Load a judge. Raises UserError if the file is missing or has other tensors."""
    tensors, _ = read_tensors(path)
    judge = Judge()
    load_exactly(judge, lambda: tensors, path, device, torch.float32)
    return judge.to(device).eval()


def take_windows(values: Tensor, starts: Tensor, length: int) -> Tensor:
    """Windows of values (n, …) from starts (k,) on → (k, length, …)."""
    return values[starts[:, None] + torch.arange(length, device=values.device)]


def train(prepared: Path, output: Path, seconds: float, device: torch.device) -> "Check | None":
    """Train on a folder written by `latentsync.training prepare` and write the weights in half precision.

    Returns the check on the held-out clips, if there are any.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    data = load_clips(prepared, torch.device("cpu"))
    patches, mel = prepare_inputs(data, device)
    data = replace(data, frames=data.frames[:0].clone())  # frees gigabytes
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    judge = Judge().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), LEARNING_RATE, weight_decay=0.1)
    targets = torch.arange(CLIPS * WINDOWS, device=device)
    started, step, average = time.monotonic(), 0, 0.0
    while (elapsed := time.monotonic() - started) < seconds or step == 0:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * max(0.02, 1 - elapsed / max(seconds, 1))
        mouths, sounds = draw_batch(data, patches, mel, rng)
        logits = judge.embed_mouths(mouths) @ judge.embed_sounds(sounds).T / TEMPERATURE
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        average += (float(loss.detach()) - average) / min(step, 100)
        if step % 100 == 0:
            log.info("judge step %d loss %.3f %.0f s", step, average, elapsed)
    save_file({name: tensor.half().cpu().contiguous() for name, tensor in judge.state_dict().items()}, output)
    log.info("judge: %d steps; %s", step, output)
    held_out = load_held_out_clips(prepared, torch.device("cpu"))
    return check(*clip_similarities(judge.eval(), held_out, device)) if held_out else None


def prepare_inputs(data: ClipSet, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mouth patches (n, h, w) uint8 and `relative_mel` (n · MEL_PER_FRAME, N_MELS) of clips end to end."""
    patches = mouth_patches(data.frames.permute(0, 2, 3, 1).numpy(), MARGIN / RESOLUTION)
    power = data.mel[0].float() * MEL_STEP + MEL_BASE
    mel = [relative_mel(part) for part in power.split([int(length) * MEL_PER_FRAME for length in data.lengths])]
    return torch.from_numpy(patches).to(device), torch.cat(mel).to(device)


def draw_batch(data: ClipSet, patches: Tensor, mel: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw a batch of pairs in sync, the windows of each clip spread over its length, with augmentation."""
    device, n = patches.device, CLIPS * WINDOWS
    clips = np.repeat(data.draw(rng, CLIPS), WINDOWS)
    spacing = (data.lengths[clips] - SPAN) / WINDOWS  # frames
    first = ((np.tile(np.arange(WINDOWS), CLIPS) + rng.random(n)) * spacing).astype(int)
    starts = torch.from_numpy(data.starts[clips] + first).to(device)
    mouths = take_windows(patches, starts, SPAN).float() / 255
    # One shift, flip and gamma per window.
    corner = torch.from_numpy(rng.integers(0, 2 * JITTER + 1, (n, 2))).to(device)
    rows = corner[:, :1] + torch.arange(PATCH[0], device=device)
    columns = corner[:, 1:] + torch.arange(PATCH[1], device=device)
    columns = torch.where(torch.rand(n, 1, device=device) < 0.5, columns, columns.flip(1))
    index = torch.arange(n, device=device)[:, None, None]
    mouths = mouths.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
    mouths = mouths ** (torch.randn(n, 1, 1, 1, device=device) * GAMMA_STD).exp()
    # Generated mouths are softer than real ones, and the score should not depend on it.
    soft = F.avg_pool2d(mouths, MAX_BLUR, 1, MAX_BLUR // 2, count_include_pad=False)
    mouths = torch.lerp(mouths, soft, torch.rand(n, 1, 1, 1, device=device))
    mouths = mouths + 0.02 * torch.randn_like(mouths)
    sounds = take_windows(mel, starts * MEL_PER_FRAME, SPAN * MEL_PER_FRAME)
    sounds = sounds + 0.1 * torch.randn(n, 1, 1, device=device) + 0.1 * torch.randn(n, 1, N_MELS, device=device)
    return mouths, sounds + 0.05 * torch.randn_like(sounds)


@torch.inference_mode()
def similarities(judge: Judge, patches: Tensor, mel: Tensor) -> Tensor:
    """Cosine similarity of windows of mouths (n, h, w) and of sound (m · MEL_PER_FRAME, N_MELS): (n − 4, m − 4)."""
    patches = patches[:, JITTER:-JITTER, JITTER:-JITTER].float() / 255
    device = patches.device
    frames = len(mel) // MEL_PER_FRAME
    starts = torch.arange(max(len(patches) - SPAN + 1, 0), device=device)
    mouths = judge.embed_mouths(take_windows(patches, starts, SPAN))
    starts = torch.arange(max(frames - SPAN + 1, 0), device=device) * MEL_PER_FRAME
    return mouths @ judge.embed_sounds(take_windows(mel, starts, SPAN * MEL_PER_FRAME)).T


@dataclass(frozen=True)
class SyncScore:
    """offset: frames that the picture is late; confidence: similarity there above the median over all shifts."""

    offset: int
    confidence: float


def sync_score(similarity: Tensor, shift: int = 0) -> SyncScore:
    """Score `similarities` (n, m), as if the picture came `shift` frames later; NaN if there are too few."""
    lags = [lag for lag in range(-MAX_SHIFT, MAX_SHIFT + 1) if min(similarity.shape) > abs(lag - shift) + SPAN] or [0]
    # A picture that is late by `lag` matches the sound of `lag` frames before.
    mean = torch.stack([similarity.diagonal(shift - lag).mean() for lag in lags])
    best = int(mean.argmax())
    return SyncScore(lags[best], float(mean[best] - mean.median()))


def judge_clip(judge: Judge, crops: np.ndarray, wav: np.ndarray) -> Tensor:
    """`similarities` of aligned crops uint8 (n, R, R, 3) and their sound (samples,)."""
    device = next(judge.parameters()).device
    mel = relative_mel(torch.cat(list(log_powers(torch.from_numpy(wav), N_MELS)), dim=1).T)
    return similarities(judge, torch.from_numpy(mouth_patches(crops)).to(device), mel.to(device))


@dataclass(frozen=True)
class Check:
    """Accuracy of a judge on real clips: shares of them, and its mean confidence."""

    clips: int
    in_step: float  # scored in sync, unchanged
    shifted: float  # scored out of sync by CHECK_SHIFT, if shifted by it
    confidence: float  # with their own sound
    mismatched: float  # confidence with another clip's sound

    @property
    def passed(self) -> bool:
        return min(self.in_step, self.shifted) >= MIN_CORRECT and self.mismatched < self.confidence

    def summary(self) -> str:
        return (
            f"{self.in_step:.0%} of {self.clips} real clips in step, {self.shifted:.0%} of shifted ones found shifted, "
            f"confidence {self.confidence:.2f}, of another clip's sound {self.mismatched:.2f}: "
            + ("it may judge" if self.passed else "it may not judge")
        )


def check(true: list[Tensor], mismatched: list[Tensor]) -> Check:
    """Check a judge by `similarities` of real clips with their own sound, and with another clip's."""
    unshifted = [sync_score(similarity) for similarity in true]
    errors = [
        sync_score(similarity, shift).offset - shift for similarity in true for shift in (-CHECK_SHIFT, CHECK_SHIFT)
    ]
    mismatches = [sync_score(similarity).confidence for similarity in mismatched]
    return Check(
        clips=len(true),
        in_step=float(np.mean([abs(score.offset) <= MAX_OFFSET for score in unshifted])),
        shifted=float(np.mean([abs(error) <= MAX_OFFSET for error in errors])),
        confidence=float(np.mean([score.confidence for score in unshifted])),
        mismatched=float(np.mean(mismatches)) if mismatches else 0.0,
    )


def clip_similarities(judge: Judge, data: ClipSet, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """`similarities` of prepared clips with their own sound, and with the next clip's."""
    patches, mel = prepare_inputs(data, device)
    lengths = [int(length) for length in data.lengths]
    patches, mel = patches.split(lengths), mel.split([length * MEL_PER_FRAME for length in lengths])
    true = [similarities(judge, *pair) for pair in zip(patches, mel, strict=True)]
    others = [similarities(judge, mouths, mel[i - 1]) for i, mouths in enumerate(patches) if len(mel) > 1]
    return true, others
