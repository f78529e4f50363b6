"""How clips are heard: segments of 30 s of other voices, rooms, noise and silence, and the windows that lie in them."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentsync.audio import PADDING, ROWS_AFTER, ROWS_BEFORE, SEGMENT_FRAMES
from latentsync.corpus import EDGE, MEL_BASE, MEL_PER_FRAME, MEL_STEP, N_MELS, ClipSet, copy_to_device
from latentsync.errors import UserError
from latentsync.settings import WINDOW

QUIETEST = 4.5  # decades under the loudest sound that are heard: rooms are seldom quieter, synthesisers are
SPEECH_LEVEL = -20.0  # dB: as quiet as speech is heard in training, GRID's level (−9 dB) less 10 dB, see `_other_voice`
LATEST_START = 50  # frames of silence before the first clip of a segment, at most
AROUND = 0.3  # share of clips that are heard with silence before and after them, in which the mouth rests
LONGEST_SILENCE = 40  # frames of it
SILENT_SEGMENTS = 0.06  # share of segments in which nobody speaks
NOISY, LOUDEST_HUM = 0.5, -1.0  # share of these with noise, and its power at most, in decades
SILENT = -2  # instead of the index of a mel frame
CLIPS_PER_SEGMENT = 10  # clips of 3 s that share one 30 s segment of sound
SPAN = WINDOW + 2 * EDGE + 4  # frames: the shortest part of a clip that is heard
WHOLE_SPANS = 0.3  # share of clips that are heard whole, as sentences; parts teach sounds and not the grammar of GRID
BEGINNINGS = 0.1  # share of windows that begin with the sound, as the first one of every job does
OWN_VOICE = 0.4  # share of clips that are heard as they were recorded, where synthesised voices say them as well


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


def segments_of(windows: int, each: int) -> int:
    """How many segments of `each` windows a batch of windows is of. Raises UserError where it is none of them."""
    if windows < each or windows % each:
        raise UserError(f"A batch of {windows} windows is not possible: give a multiple of {each}.")
    return windows // each


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
    index, owner, voice, hum = (copy_to_device(array, device) for array in (index, owner, voice, hum))
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
    """Windows of the clips in `sound`, each with another window of the same clip as its reference.

    The tokens of a part's first and last frames reach into other parts and are not drawn, but where the sound begins
    and ends: as in a job, nothing is there, and the rows are those of its own first and last moment.
    """
    parts = np.array([len(clips) for clips in sound.clips])
    segment, first_part = np.repeat(np.arange(len(parts)), per_segment), np.cumsum(parts) - parts
    ends = np.array([at[-1] + count[-1] for at, count in zip(sound.offsets, sound.counts, strict=True)])[segment]
    k = rng.integers(0, parts[segment])
    at_once = np.array([at[0] == 0 for at in sound.offsets])[segment]
    beginning = at_once & (rng.random(len(k)) < BEGINNINGS)
    k = np.where(beginning, 0, k) + first_part[segment]
    clip, count, offset = (np.concatenate(values)[k] for values in (sound.clips, sound.counts, sound.offsets))
    start, length = data.starts[clip], data.lengths[clip]
    span = np.arange(WINDOW)
    lowest = np.where(offset == 0, 0, EDGE)
    # Of a full segment's end a job hears what follows.
    ended = (offset + count == ends) & (ends < SEGMENT_FRAMES // MEL_PER_FRAME)
    highest = np.where(beginning, 0, count - WINDOW - np.where(ended, 0, EDGE))
    at = (offset + rng.integers(lowest, highest + 1))[:, None] + span
    frames = sound.frames[segment[:, None], at]
    first, last = frames.min(1) - start, frames.max(1) - start
    # The windows that end before the own one begins, and those that begin after its end.
    before, after = np.maximum(first - WINDOW + 1, 0), np.maximum(length - WINDOW - last, 0)
    pick = rng.integers(0, np.maximum(before + after, 1))
    other = np.where(pick < before, pick, pick - before + last + 1)
    other = np.where(before + after > 0, other, (first + length // 2) % (length - WINDOW))
    rows = (2 * at[:, :, None] + np.arange(-ROWS_BEFORE, ROWS_AFTER)).clip(0, 2 * ends[:, None, None] - 1)
    arrays = frames, (start + other)[:, None] + span, segment, rows
    return Windows(*(copy_to_device(array, data.mel.device) for array in arrays))


def tokens_of(features: Tensor, segment: Tensor, rows: Tensor) -> Tensor:
    """features (s, 1500, layers, width) → audio tokens (b, f, 10·layers, width) of the windows that lie there."""
    return features[segment[:, None, None], rows].flatten(2, 3)
