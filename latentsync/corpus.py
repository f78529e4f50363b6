"""Prepared clips of talking faces, to train a small model on and to measure it with.

A prepared set stays on the device: frames as uint8, mel spectra as they were stored. Random choices of clips and places
are drawn on the host with numpy, augmentation on the device with torch (see `latentsync.training`).
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

RESOLUTION = 128  # side of the demo model's crops
MARGIN = 16  # pixels of the aligned picture around the crop
SIDE = RESOLUTION + 2 * MARGIN
# fmt: off
LIPS = (  # outer, then inner contour in the 478-point mesh
    61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185,
    78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 415, 310, 311, 312, 13, 82, 81, 80, 191,
)
# fmt: on
INNER_UPPER, INNER_LOWER = LIPS.index(13), LIPS.index(14)
CORNERS = LIPS.index(61), LIPS.index(291)
MEL_STEP, MEL_BASE = 0.055, -10.0  # decades of power per grey level of the stored mel, and its zero
MEL_PER_FRAME = SAMPLE_RATE // HOP_LENGTH // FPS
N_MELS = 80
HELD_OUT_SPEAKERS = ("s3", "s7", "s25", "s31", "s34")  # people the model must never be trained on
HELD_OUT_EVERY = 20  # of people with more than that many clips, every 20th clip is held out
EDGE = 2  # frames at a clip's ends whose audio tokens reach into the next clip
RESTING = 0.03  # of a mouth's width: the largest opening of a mouth at rest


@dataclass(frozen=True)
class ClipSet:
    """Clips end to end. frames uint8 (n, 3, SIDE, SIDE); lips (n, 40, 2) pixels; mel uint8 (voices, 4n, 80), of which
    the first is the clips' own and the others are synthesised; means (clips, 3, SIDE, SIDE), the average frames; rest
    (clips, 2), for how many frames the mouth rests at the clip's beginning and end."""

    frames: Tensor
    lips: Tensor
    mel: Tensor
    means: Tensor
    rest: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray  # probability of a clip: people count by the square root of their clips

    def clip_of(self) -> Tensor:
        """The clip of every frame, (n,)."""
        return torch.from_numpy(np.repeat(np.arange(len(self.starts)), self.lengths)).to(self.frames.device)

    def mouths(self) -> Tensor:
        """Each clip's average mouth: x, y and half its width, in grid_sample's units, (clips, 3)."""
        left, right = (self.lips[:, corner] for corner in CORNERS)
        middle = (2 * (self.lips.mean(1) + MARGIN) + 1) / SIDE - 1
        per_frame = torch.cat([middle, (right - left).norm(dim=1, keepdim=True) / SIDE], dim=1)
        total = torch.zeros(len(self.starts), 3, device=per_frame.device).index_add_(0, self.clip_of(), per_frame)
        return total / torch.from_numpy(self.lengths).to(per_frame)[:, None]

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Random clips (count,), by their weights."""
        return rng.choice(len(self.starts), count, p=self.weights)


def list_clips(folder: Path) -> list[tuple[str, Path]]:
    """(speaker, file) of FOLDER/SPEAKER/CLIP.mp4. Raises UserError if there are none."""
    clips = [(file.parent.name, file) for file in sorted(folder.glob("*/*")) if file.suffix in (".mp4", ".mpg", ".mov")]
    if not clips:
        raise UserError(f"'{folder}' has no clips; they are expected as SPEAKER/CLIP.mp4.")
    return clips


def is_held_out(speaker: str, index: int, count: int) -> bool:
    """Whether clip `index` of a speaker with `count` clips must not be trained on."""
    return speaker in HELD_OUT_SPEAKERS or (count > HELD_OUT_EVERY and index % HELD_OUT_EVERY == 0)


def clip_table(folder: Path) -> "np.lib.npyio.NpzFile":
    """The arrays that `prepare` wrote about all clips. Raises UserError if the folder has none."""
    try:
        return np.load(folder / "clips.npz")
    except OSError as error:
        raise UserError(f"'{folder}' is not a prepared training set; run `prepare` first.") from error


def load_clips(folder: Path, device: torch.device) -> ClipSet:
    """Load the training clips of a prepared folder.

    Raises UserError if it is not a prepared folder or has nothing to train on.
    """
    table = clip_table(folder)
    clips = usable_clips(table, held_out=False)
    if not clips:
        raise UserError(f"'{folder}' has no clip of {2 * WINDOW + 2 * EDGE} frames to train on; prepare longer ones.")
    return load_clip_set(folder, table, clips, device)


def load_held_out_clips(folder: Path, device: torch.device) -> ClipSet | None:
    """Load the held-out clips of a prepared folder, None if there are none. Raises UserError as `load_clips`."""
    table = clip_table(folder)
    clips = usable_clips(table, held_out=True)
    return load_clip_set(folder, table, clips, device) if clips else None


def usable_clips(table: "np.lib.npyio.NpzFile", held_out: bool) -> list[int]:
    """Numbers of the clips that are held out, or are not, and long enough."""
    speakers, lengths = table["speakers"], table["lengths"]
    clips: list[int] = []
    for speaker in dict.fromkeys(speakers):
        of_speaker = np.flatnonzero(speakers == speaker)
        clips += [
            int(clip) for i, clip in enumerate(of_speaker) if is_held_out(speaker, i, len(of_speaker)) == held_out
        ]
    # A clip must hold a window and a reference window besides its edges.
    return [clip for clip in sorted(clips) if lengths[clip] >= 2 * WINDOW + 2 * EDGE]


def load_clip_set(folder: Path, table: "np.lib.npyio.NpzFile", clips: list[int], device: torch.device) -> ClipSet:
    """Load the clips with these numbers. Raises UserError if the crops are incomplete."""
    speakers, lengths = table["speakers"], table["lengths"]
    starts = np.cumsum(lengths) - lengths
    selected = np.zeros(lengths.sum(), bool)
    for clip in clips:
        selected[starts[clip] : starts[clip] + lengths[clip]] = True

    reader = cv2.VideoCapture(str(folder / "crops.mp4"))
    pixels = np.empty((selected.sum(), SIDE, SIDE, 3), np.uint8)
    row = 0
    for is_selected in selected:
        ok, frame = reader.read()
        if not ok:
            raise UserError(f"'{folder / 'crops.mp4'}' ends too early; run `prepare` again.")
        if is_selected:
            pixels[row] = frame[:, :, ::-1]
            row += 1
    reader.release()

    speaker_weights = {s: 1 / np.sqrt(np.sum(speakers[clips] == s)) for s in set(speakers[clips])}
    weights = np.array([speaker_weights[s] for s in speakers[clips]])
    lengths = lengths[clips]
    frames = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
    lips = table["lips"][selected].astype(np.float32)
    mel = table["mel"][None]
    if (voices := folder / "voices.npz").is_file():
        mel = np.concatenate([mel, np.load(voices)["mel"]])
    return ClipSet(
        frames=frames,
        lips=torch.from_numpy(lips).to(device),
        mel=torch.from_numpy(mel[:, np.repeat(selected, MEL_PER_FRAME)]).to(device),
        means=torch.stack([clip.float().mean(0) for clip in frames.split(lengths.tolist())]),
        rest=np.array([resting_ends(clip) for clip in np.split(lips, np.cumsum(lengths)[:-1])]),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        weights=weights / weights.sum(),
    )


def resting_ends(lips: np.ndarray) -> tuple[int, int]:
    """For how many frames the mouth rests at the beginning and at the end of a clip; lips (n, 40, 2)."""
    gap, width = (np.linalg.norm(lips[:, a] - lips[:, b], axis=1) for a, b in ((INNER_UPPER, INNER_LOWER), CORNERS))
    open_frames = np.flatnonzero(gap > RESTING * width)
    if len(open_frames) == 0:
        return len(lips), len(lips)
    return int(open_frames[0]), int(len(lips) - 1 - open_frames[-1])


def copy_to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy `array` to the device asynchronously; from memory that is not pinned, the copy would synchronise."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
