"""Clips of talking faces that a small model is trained on and measured with: who is held out, and what `prepare` wrote.

A prepared set stays on the device: frames as uint8, mel spectra as they were stored. Randomness on the host is drawn
with numpy (which clips, where), on the device with torch (how they look and sound, see `latentsync.training`).
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from latentsync import FPS, SAMPLE_RATE
from latentsync.audio import HOP_LENGTH
from latentsync.errors import UserError
from latentsync.settings import WINDOW

RESOLUTION = 128  # side of the crop that the demo model sees
MARGIN = 16  # pixels of the aligned picture kept around it
SIDE = RESOLUTION + 2 * MARGIN
LIPS = (  # outer, then inner contour in the 478-point mesh
    61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185,
    78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 415, 310, 311, 312, 13, 82, 81, 80, 191,
)  # fmt: skip
INNER_UPPER, INNER_LOWER = LIPS.index(13), LIPS.index(14)
CORNERS = LIPS.index(61), LIPS.index(291)
MEL_STEP, MEL_BASE = 0.055, -10.0  # decades of power a grey level of the stored mel, and its zero
MEL_PER_FRAME = SAMPLE_RATE // HOP_LENGTH // FPS
N_MELS = 80
HELD_OUT_SPEAKERS = ("s3", "s7", "s25", "s31", "s34")  # people whom the model must never have seen
HELD_OUT_EVERY = 20  # of the clips of people with more than that many, every 20th is held out
EDGE = 2  # frames at a clip's ends whose audio tokens reach into the next clip
RESTING = 0.03  # of a mouth's width: how far open it is at most where it rests


@dataclass(frozen=True)
class ClipSet:
    """Clips end to end. frames uint8 (n, 3, SIDE, SIDE); lips (n, 40, 2) pixels; mel uint8 (voices, 4n, 80), of which
    the first is the clips' own and the others are synthesised; means (clips, 3, SIDE, SIDE), the average frames; rest
    (clips, 2), for how many frames the mouth rests at its beginning and end."""

    frames: Tensor
    lips: Tensor
    mel: Tensor
    means: Tensor
    rest: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray  # probability of a clip: people count by the square root of their clips
    names: list[str]

    def clip_of(self) -> Tensor:
        """The clip of every frame, (n,)."""
        return torch.from_numpy(np.repeat(np.arange(len(self.starts)), self.lengths)).to(self.frames.device)

    def mouths(self) -> Tensor:
        """Where each clip's mouth is on average: x, y and half its width, in grid_sample's units, (clips, 3)."""
        left, right = (self.lips[:, corner] for corner in CORNERS)
        middle = (2 * (self.lips.mean(1) + MARGIN) + 1) / SIDE - 1
        here = torch.cat([middle, (right - left).norm(dim=1, keepdim=True) / SIDE], dim=1)
        total = torch.zeros(len(self.starts), 3, device=here.device).index_add_(0, self.clip_of(), here)
        return total / torch.from_numpy(self.lengths).to(here)[:, None]

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.choice(len(self.starts), count, p=self.weights)


def clips_below(folder: Path) -> list[tuple[str, Path]]:
    """(speaker, file) of FOLDER/SPEAKER/CLIP.mp4."""
    clips = [(file.parent.name, file) for file in sorted(folder.glob("*/*")) if file.suffix in (".mp4", ".mpg", ".mov")]
    if not clips:
        raise UserError(f"'{folder}' has no clips; they are expected as SPEAKER/CLIP.mp4.")
    return clips


def is_held_out(speaker: str, index: int, of: int) -> bool:
    """Whether a speaker's clip `index` of `of` must not be trained on."""
    return speaker in HELD_OUT_SPEAKERS or (of > HELD_OUT_EVERY and index % HELD_OUT_EVERY == 0)


def clip_table(folder: Path) -> "np.lib.npyio.NpzFile":
    """What `prepare` wrote of every clip. Raises UserError where the folder holds none."""
    try:
        return np.load(folder / "clips.npz")
    except OSError as error:
        raise UserError(f"'{folder}' is not a prepared training set; run `prepare` first.") from error


def load_clips(folder: Path, device: torch.device, held_out: bool = False) -> ClipSet | None:
    """The training clips of a prepared folder, or its held-out ones, None if there are none of these.

    Raises UserError where it is not a prepared folder, or has nothing to train on.
    """
    table = clip_table(folder)
    speakers, lengths = table["speakers"], table["lengths"]
    starts = np.cumsum(lengths) - lengths
    chosen = []
    for speaker in dict.fromkeys(speakers):
        own = np.flatnonzero(speakers == speaker)
        chosen += [clip for i, clip in enumerate(own) if is_held_out(speaker, i, len(own)) == held_out]
    # A clip must hold a window and a reference window besides its edges.
    chosen = [clip for clip in sorted(chosen) if lengths[clip] >= 2 * WINDOW + 2 * EDGE]
    if not chosen and held_out:
        return None
    if not chosen:
        raise UserError(f"'{folder}' has no clip of {2 * WINDOW + 2 * EDGE} frames to train on; prepare longer ones.")
    wanted = np.zeros(lengths.sum(), bool)
    for clip in chosen:
        wanted[starts[clip] : starts[clip] + lengths[clip]] = True

    reader = cv2.VideoCapture(str(folder / "crops.mp4"))
    frames = np.empty((wanted.sum(), SIDE, SIDE, 3), np.uint8)
    row = 0
    for use in wanted:
        ok, frame = reader.read()
        if not ok:
            raise UserError(f"'{folder / 'crops.mp4'}' ends too early; run `prepare` again.")
        if use:
            frames[row] = frame[:, :, ::-1]
            row += 1
    reader.release()

    root = {s: 1 / np.sqrt(np.sum(speakers[chosen] == s)) for s in set(speakers[chosen])}
    weights = np.array([root[s] for s in speakers[chosen]])
    kept = lengths[chosen]
    frames = torch.from_numpy(frames).to(device).permute(0, 3, 1, 2)
    lips = table["lips"][wanted].astype(np.float32)
    mel = table["mel"][None]
    if (voices := folder / "voices.npz").is_file():
        mel = np.concatenate([mel, np.load(voices)["mel"]])
    return ClipSet(
        frames=frames,
        lips=torch.from_numpy(lips).to(device),
        mel=torch.from_numpy(mel[:, np.repeat(wanted, MEL_PER_FRAME)]).to(device),
        means=torch.stack([clip.float().mean(0) for clip in frames.split(kept.tolist())]),
        rest=np.array([resting_ends(clip) for clip in np.split(lips, np.cumsum(kept)[:-1])]),
        starts=np.cumsum(kept) - kept,
        lengths=kept,
        weights=weights / weights.sum(),
        names=[f"{s}/{n}" for s, n in zip(speakers[chosen], table["names"][chosen], strict=True)],
    )


def resting_ends(lips: np.ndarray) -> tuple[int, int]:
    """For how many frames of a clip (n, 40, 2) the mouth rests at the beginning, and at the end."""
    gap, width = (np.linalg.norm(lips[:, a] - lips[:, b], axis=1) for a, b in ((INNER_UPPER, INNER_LOWER), CORNERS))
    open_at = np.flatnonzero(gap > RESTING * width)
    return (int(open_at[0]), int(len(lips) - 1 - open_at[-1])) if len(open_at) else (len(lips), len(lips))


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Without waiting for what the device still has to do, which a copy from pageable memory would."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
