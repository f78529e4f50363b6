"""The training set on the device, and its augmentation.

Everything stays on the GPU: frames as uint8, mel spectra as they were stored. Randomness on the host is drawn
with numpy (which clips, where), on the device with torch (how they look and sound).
"""

from dataclasses import dataclass, fields
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentsync.audio import (
    HOP_LENGTH,
    PADDING,
    ROWS_AFTER,
    ROWS_BEFORE,
    SAMPLE_RATE,
    SEGMENT_FRAMES,
    VIDEO_FPS,
)
from latentsync.errors import UserError
from latentsync.sampling import WINDOW

RESOLUTION = 128  # side of the crop that the demo model sees
MARGIN = 16  # pixels of the aligned picture kept around it
SIDE = RESOLUTION + 2 * MARGIN
LIPS = (  # outer, then inner contour in the 478-point mesh
    61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185,
    78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 415, 310, 311, 312, 13, 82, 81, 80, 191,
)  # fmt: skip
INNER_UPPER, INNER_LOWER = LIPS.index(13), LIPS.index(14)
CORNERS = LIPS.index(61), LIPS.index(291)
MOUTH_REACH = 2.0  # of half the mouth's width: how far from its middle a mouth warp moves anything
PLAIN_MOUTHS = 0.25  # share of mouth warps that are none
MEL_STEP, MEL_BASE = 0.055, -10.0  # decades of power a grey level of the stored mel, and its zero
QUIETEST = 4.5  # decades under the loudest sound that are heard: rooms are seldom quieter, synthesisers are
MEL_PER_FRAME = SAMPLE_RATE // HOP_LENGTH // VIDEO_FPS
N_MELS = 80
WARP = 0.05  # of half the canvas: the largest standard deviation of the displacements that change a face's shape
HELD_OUT_SPEAKERS = ("s3", "s7", "s25", "s31", "s34")  # people whom the model must never have seen
HELD_OUT_EVERY = 20  # of the clips of people with more than that many, every 20th is held out
EDGE = 2  # frames at a clip's ends whose audio tokens reach into the next clip
LATEST_START = 50  # frames of silence before the first clip of a segment, at most
RESTING = 0.03  # of a mouth's width: how far open it is at most where it rests
AROUND = 0.3  # share of clips that are heard with silence before and after them, in which the mouth rests
LONGEST_SILENCE = 40  # frames of it
SILENT_SEGMENTS = 0.06  # share of segments in which nobody speaks
NOISY, LOUDEST_HUM = 0.5, -1.0  # share of these with noise, and its power at most, in decades
SILENT = -2  # instead of the index of a mel frame
CLIPS_PER_SEGMENT = 10  # clips of 3 s that share one 30 s segment of sound
SPAN = WINDOW + 2 * EDGE + 4  # frames: the shortest part of a clip that is heard
WHOLE_SPANS = 0.3  # share of clips that are heard whole, as sentences; parts teach sounds and not the grammar of GRID
OWN_VOICE = 0.4  # share of clips that are heard as they were recorded, where synthesised voices say them as well
BLENDED = 0.6  # share of looks in which another person's features are mixed in
MOST_BLENDED = 0.7  # of the other person


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


def is_held_out(speaker: str, index: int, of: int) -> bool:
    """Whether a speaker's clip `index` of `of` must not be trained on."""
    return speaker in HELD_OUT_SPEAKERS or (of > HELD_OUT_EVERY and index % HELD_OUT_EVERY == 0)


def load_clips(folder: Path, device: torch.device, held_out: bool = False) -> ClipSet | None:
    """The training clips of a prepared folder, or its held-out ones, None if there are none of these.

    Raises UserError where it is not a prepared folder, or has nothing to train on.
    """
    try:
        table = np.load(folder / "clips.npz")
    except OSError as error:
        raise UserError(f"'{folder}' is not a prepared training set; run `prepare` first.") from error
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
    gap, width = (
        np.linalg.norm(lips[:, a] - lips[:, b], axis=1) for a, b in ((INNER_UPPER, INNER_LOWER), CORNERS)
    )
    open_at = np.flatnonzero(gap > RESTING * width)
    return (int(open_at[0]), int(len(lips) - 1 - open_at[-1])) if len(open_at) else (len(lips), len(lips))


def _uniform(n: int, low: float, high: float, device: torch.device) -> Tensor:
    return torch.rand(n, device=device) * (high - low) + low


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Without waiting for what the device still has to do, which a copy from pageable memory would."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True)
class Look:
    """How n clips are seen.

    affine (n, 2, 3) and warp (n, 2, 4, 4), a smooth displacement, in grid_sample's units; texture
    (n, 1, SIDE, SIDE), of the skin, a share of the tone; colour (n, 3, 4); light (n, 3, 4, 4), a smooth field of
    factors; gamma (n,); blur (n,), sigma in pixels; sharpen (n,), share of what the blur would take that is added.
    """

    affine: Tensor
    warp: Tensor
    texture: Tensor
    colour: Tensor
    light: Tensor
    gamma: Tensor
    blur: Tensor
    sharpen: Tensor

    def __getitem__(self, index: Tensor) -> "Look":
        return Look(*(getattr(self, field.name)[index] for field in fields(self)))


def plain_look(n: int, device: torch.device) -> Look:
    """No augmentation: the inner crop as it is."""
    affine = torch.eye(2, 3, device=device).repeat(n, 1, 1)
    affine[:, :, :2] *= RESOLUTION / SIDE
    colour = torch.eye(3, 4, device=device).repeat(n, 1, 1)
    none = torch.zeros(n, device=device)
    return Look(
        affine=affine,
        warp=torch.zeros(n, 2, 4, 4, device=device),
        texture=torch.zeros(n, 1, SIDE, SIDE, device=device),
        colour=colour,
        light=torch.ones(n, 3, 4, 4, device=device),
        gamma=none + 1,
        blur=none,
        sharpen=none,
    )


def random_look(n: int, device: torch.device, zoom: float = 0.06, turn: float = 0.07) -> Look:
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
    return Look(
        affine=affine,
        warp=torch.randn(n, 2, 4, 4, device=device) * _uniform(n, 0, WARP, device)[:, None, None, None],
        texture=torch.randn(n, 1, SIDE, SIDE, device=device) * _uniform(n, 0, 0.04, device)[:, None, None, None],
        colour=colour,
        light=light,
        gamma=_uniform(n, 0.7, 1.4, device),
        # A third of a pixel is no blur; sharpening works on what a blur of one pixel would take.
        blur=torch.where(softness > 0, softness, 1.0) * (softness.abs() > 0.3),
        sharpen=1.5 * (-softness).clamp(min=0),
    )


def random_people(data: ClipSet, rng: np.random.Generator) -> Tensor:
    """What turns every clip's person a part of the way into another one: (clips, 3, SIDE, SIDE), to be added.

    The difference of two average faces leaves all motion as it is; few people become many.
    """
    other = _to_device(data.draw(rng, len(data.starts)), data.means.device)
    share = rng.uniform(0, MOST_BLENDED, len(other)) * (rng.random(len(other)) < BLENDED)
    return _to_device(share.astype(np.float32), data.means.device)[:, None, None, None] * (
        data.means[other] - data.means
    )


@dataclass(frozen=True)
class MouthWarp:
    """Another expression for n mouths that lie at `mouth` (n, 3), see `ClipSet.mouths`.

    wider, higher (n,): size over what it was, at the middle; corners (n,), how far they sink (smile: below zero), and
    shift (n, 2), in halves of the mouth's width.
    """

    mouth: Tensor
    wider: Tensor
    higher: Tensor
    corners: Tensor
    shift: Tensor

    def __getitem__(self, index: Tensor) -> "MouthWarp":
        return MouthWarp(*(getattr(self, field.name)[index] for field in fields(self)))

    def displacement(self, grid: Tensor) -> Tensor:
        """What to add to the places (n, h, w, 2) in the canvas that are looked up; zero beyond MOUTH_REACH."""
        half = self.mouth[:, None, None, 2]
        at = (grid - self.mouth[:, None, None, :2]) / half[..., None]
        x, y = at.unbind(-1)
        window = (1 - at.square().sum(-1) / MOUTH_REACH**2).clamp(min=0).square()
        wider, higher, corners, left, down = (
            part[:, None, None] for part in (self.wider, self.higher, self.corners, *self.shift.unbind(1))
        )
        across = x * (1 / wider - 1) - left
        along = y * (1 / higher - 1) - down - corners * (x.square() - 0.3)
        return torch.stack([across, along], dim=-1) * (window * half)[..., None]


def random_mouth(mouth: Tensor) -> MouthWarp:
    """A random expression for each of n mouths (n, 3): wider or narrower, more open or shut, smiling or sulking."""
    n, device = len(mouth), mouth.device
    own = torch.rand(n, device=device) >= PLAIN_MOUTHS
    return MouthWarp(
        mouth,
        wider=(own * _uniform(n, -0.35, 0.5, device)).exp(),
        higher=(own * _uniform(n, -0.6, 0.6, device)).exp(),
        corners=own * _uniform(n, -0.6, 0.4, device),
        shift=own[:, None] * (torch.rand(n, 2, device=device) - 0.5) * 0.2,
    )


def render(frames: Tensor, look: Look, mouth: MouthWarp | None = None) -> Tensor:
    """0 … 255 (n, 3, SIDE, SIDE), one look and expression each → float (n, 3, RESOLUTION, RESOLUTION) in [−1, 1]."""
    size = (len(frames), 3, RESOLUTION, RESOLUTION)
    grid = F.affine_grid(look.affine, size, align_corners=False)
    grid = grid + F.interpolate(look.warp, size[2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    if mouth is not None:
        grid = grid + mouth.displacement(grid)
    x = F.grid_sample(frames.float() / 255 * (1 + look.texture), grid, padding_mode="reflection", align_corners=False)
    x = torch.einsum("nij,njhw->nihw", look.colour[:, :, :3], x) + look.colour[:, :, 3, None, None]
    x = x * F.interpolate(look.light, size[2:], mode="bicubic", align_corners=True)
    x = x.clamp(0, 1) ** look.gamma[:, None, None, None]
    offsets = torch.arange(-2, 3, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / look.blur.clamp(min=1e-3)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    soft = x
    for padding in ((2, 2, 0, 0), (0, 0, 2, 2)):
        wide = F.pad(soft, padding, mode="replicate")
        axis = 3 if padding[0] else 2
        soft = sum(wide.narrow(axis, i, RESOLUTION) * kernel[:, i, None, None, None] for i in range(5))
    sharpen = look.sharpen[:, None, None, None]
    x = torch.where(sharpen > 0, x + sharpen * (x - soft), soft).clamp(0, 1)
    return x * 2 - 1


@dataclass(frozen=True)
class Sound:
    """Sound of s segments, of clips or parts of them. mel (s, 80, 3000), ready for the encoder.

    clips[s][k]: which clip; counts, offsets: how many frames of the segment it takes, and from which on, its silence
    included. frames (s, 750): what is seen at every moment, −1 where nobody is.
    """

    mel: Tensor
    clips: list[np.ndarray]
    counts: list[np.ndarray]
    offsets: list[np.ndarray]
    frames: np.ndarray


def to_and_fro(steps: np.ndarray, n: int) -> np.ndarray:
    """0, 1, … n − 1, n − 2, … 0, 1, … at these steps."""
    period = max(2 * (n - 1), 1)
    return np.minimum(steps % period, period - steps % period)


def seen_at(places: np.ndarray, length: int, rest: tuple[int, int]) -> np.ndarray:
    """Frames of a clip at places that may lie before and after it: there the mouth rests, in its frames at rest."""
    early, late = to_and_fro(-places, rest[0]), length - 1 - to_and_fro(places - length + 1, rest[1])
    return np.where(places < 0, early, np.where(places >= length, late, places))


def _draw_part(rng: np.random.Generator, length: int, rest: tuple[int, int], augment: bool) -> np.ndarray:
    """Places in a clip that are heard: all of it or a part, and maybe silence around it, see `seen_at`."""
    count = length
    if augment and rng.random() >= WHOLE_SPANS:
        count = int(rng.integers(SPAN, length + 1))
    first = int(rng.integers(0, length - count + 1))
    before = after = 0
    if augment and rng.random() < AROUND:
        before, after = (int(rng.integers(0, LONGEST_SILENCE)) if at_end else 0 for at_end in rest)
        if first > 0 and rng.random() < 0.5:  # parts have silence at one end
            first, before = length - count, 0
        else:
            first, after = 0, after if count == length else 0
    return np.arange(first - before, first + count + after)


def _draw_silence(rng: np.random.Generator, length: int, rest: tuple[int, int]) -> np.ndarray:
    """Places before or after a clip whose mouth rests there, see `seen_at`."""
    count = int(rng.integers(SPAN, length + 1))
    ahead = rest[0] and (not rest[1] or rng.random() < 0.5)
    return np.arange(-count, 0) if ahead else np.arange(length, length + count)


def draw_sound(data: ClipSet, rng: np.random.Generator, segments: int, augment: bool, own: bool = True) -> Sound:
    """Join random clips to segments of up to 30 s, so that the encoder hears every position and length.

    augment: parts of clips, other voices, rooms and noise, silence; without it whole clips, in their own voice or,
    with own False, in synthesised ones.
    """
    index = np.full((segments, SEGMENT_FRAMES), -1)  # of the mel frame that is heard, −1 after the sound
    owner, voice = np.zeros((2, segments, SEGMENT_FRAMES), np.int64)
    frames = np.full((segments, SEGMENT_FRAMES // MEL_PER_FRAME), -1)
    hum = np.full((segments, 1, 1), MEL_BASE, np.float32)
    parts: list[list[np.ndarray]] = [[], [], []]
    for s in range(segments):
        most = CLIPS_PER_SEGMENT if rng.random() < 0.5 else int(rng.integers(1, CLIPS_PER_SEGMENT))
        # Not always at once: or the place in the segment would tell where in a sentence one is.
        drawn, at = [], int(rng.integers(0, LATEST_START)) if augment and rng.random() < 0.5 else 0
        index[s, : at * MEL_PER_FRAME] = SILENT
        clips = data.draw(rng, most)
        resting = clips[data.rest[clips].any(1)]
        silent = augment and rng.random() < SILENT_SEGMENTS and len(resting) > 0
        if silent and rng.random() < NOISY:
            hum[s] = rng.uniform(PADDING, LOUDEST_HUM)
        for clip in resting if silent else clips:
            start, length, rest = int(data.starts[clip]), int(data.lengths[clip]), data.rest[clip]
            places = _draw_silence(rng, length, rest) if silent else _draw_part(rng, length, rest, augment)
            places = places[: frames.shape[1] - at]
            count = len(places)
            if count < SPAN:
                break
            here = slice(at * MEL_PER_FRAME, (at + count) * MEL_PER_FRAME)
            frames[s, at : at + count] = start + seen_at(places, length, rest)
            heard = ((start + places)[:, None] * MEL_PER_FRAME + np.arange(MEL_PER_FRAME)).ravel()
            index[s, here] = np.where(np.repeat((places < 0) | (places >= length), MEL_PER_FRAME), SILENT, heard)
            owner[s, here] = len(drawn)
            if len(data.mel) > 1 and (rng.random() >= OWN_VOICE if augment else not own):
                voice[s, here] = rng.integers(1, len(data.mel))
            drawn.append((clip, count, at))
            at += count
        for part, values in zip(parts, np.array(drawn).T, strict=True):
            part.append(values)
    device = data.mel.device
    index, owner, voice, hum = (_to_device(array, device) for array in (index, owner, voice, hum))
    power = data.mel[voice, index.clamp(min=0)].float() * MEL_STEP + MEL_BASE  # (s, t, 80), log10
    power = torch.where((index < 0)[..., None], hum + noise_like(power), power)
    if augment:
        power = _other_voice(power, owner)
    after = (index == -1)[..., None]
    power = power.masked_fill(after, MEL_BASE)
    floor = (power.amax((1, 2), keepdim=True) - QUIETEST).clamp(min=PADDING)
    mel = (power.maximum(floor) + 4) / 4
    return Sound(mel.masked_fill(after, 0.0).transpose(1, 2), *parts, frames)


def noise_like(power: Tensor) -> Tensor:
    """What the power of white noise adds to its mean, in decades."""
    return torch.rand(power.shape, device=power.device).clamp(min=1e-6).log().neg().log10()


def _other_voice(power: Tensor, owner: Tensor) -> Tensor:
    """Another vocal tract, room, level and noise for every clip; power (s, t, 80) log10."""
    s, t, _ = power.shape
    device = power.device
    shape = (s, CLIPS_PER_SEGMENT)

    def per_frame(values: Tensor) -> Tensor:
        return values.gather(1, owner.reshape(s, t, *[1] * (values.ndim - 2)).expand(s, t, *values.shape[2:]))

    bins = torch.arange(N_MELS, device=device)
    warp = per_frame(0.85 + 0.33 * torch.rand(*shape, 1, device=device))
    source = (bins * warp).clamp(max=N_MELS - 1.001)
    low = source.long()
    power = torch.lerp(power.gather(2, low), power.gather(2, low + 1), source - low)
    curve = F.interpolate(torch.randn(s, CLIPS_PER_SEGMENT, 5, device=device) * 0.35, N_MELS, mode="linear")
    level = torch.rand(*shape, 1, device=device) * 2 - 1
    power = power + per_frame(curve + level)
    floor = power.amax((1, 2), keepdim=True) - per_frame(1.5 + 5 * torch.rand(*shape, 1, device=device))
    return torch.logaddexp(power * 2.302585, (floor + noise_like(power)) * 2.302585) / 2.302585


@dataclass(frozen=True)
class Windows:
    """b windows: frame indices of target and reference (b, WINDOW), segment (b,), feature rows (b, WINDOW, 10)."""

    frames: Tensor
    reference: Tensor
    segment: Tensor
    rows: Tensor


def draw_windows(data: ClipSet, sound: Sound, rng: np.random.Generator, per_segment: int) -> Windows:
    """Windows of the clips in `sound`, each with another window of the same clip as its reference."""
    parts = np.array([len(clips) for clips in sound.clips])
    segment = np.repeat(np.arange(len(parts)), per_segment)
    k = (np.cumsum(parts) - parts)[segment] + rng.integers(0, parts[segment])
    clip, count, offset = (np.concatenate(values)[k] for values in (sound.clips, sound.counts, sound.offsets))
    start, length = data.starts[clip], data.lengths[clip]
    span = np.arange(WINDOW)
    at = (offset + rng.integers(EDGE, count - WINDOW - EDGE + 1))[:, None] + span
    frames = sound.frames[segment[:, None], at]
    first, last = frames.min(1) - start, frames.max(1) - start
    # The windows that end before the own one begins, and those that begin after its end.
    before, after = np.maximum(first - WINDOW + 1, 0), np.maximum(length - WINDOW - last, 0)
    pick = rng.integers(0, np.maximum(before + after, 1))
    other = np.where(pick < before, pick, pick - before + last + 1)
    other = np.where(before + after > 0, other, (first + length // 2) % (length - WINDOW))
    rows = (2 * at[:, :, None] + np.arange(-ROWS_BEFORE, ROWS_AFTER)).clip(0, SEGMENT_FRAMES // 2 - 1)
    arrays = frames, (start + other)[:, None] + span, segment, rows
    return Windows(*(_to_device(array, data.mel.device) for array in arrays))


def tokens_of(features: Tensor, segment: Tensor, rows: Tensor) -> Tensor:
    """features (s, 1500, layers, width) → audio tokens (b, f, 10·layers, width) of the windows that lie there."""
    return features[segment[:, None, None], rows].flatten(2, 3)
