"""Training audio: 30 s segments of clips with augmented voices, rooms, noise and silence, and windows in them."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latentsync.audio import PADDING, ROWS_AFTER, ROWS_BEFORE, SEGMENT_FRAMES
from latentsync.corpus import EDGE, MEL_BASE, MEL_PER_FRAME, MEL_STEP, N_MELS, ClipSet, copy_to_device
from latentsync.errors import UserError
from latentsync.settings import WINDOW

TRAINED_MEL_RANGE = 4.5  # decades below the loudest sound that are kept: rooms are seldom quieter, synthesisers are
MIN_SPEECH_LEVEL = -20.0  # dB: the quietest speech in training, GRID's level (−9 dB) less 10 dB, see `change_voices`
MAX_LEAD = 50  # frames of silence before the first clip of a segment, at most
SURROUNDED_SHARE = 0.3  # share of clips with silence before and after them, in which the mouth rests
MAX_SILENCE = 40  # frames of that
SILENT_SEGMENT_SHARE = 0.06  # share of segments without speech
NOISY_SHARE, MAX_NOISE = 0.5, -1.0  # share of these with noise, and its maximal power in decades
SILENT_FRAME, NO_FRAME = -2, -1  # instead of the index of a mel frame: silence, and after the sound
CLIPS_PER_SEGMENT = 10  # clips of 3 s that share one 30 s segment of sound
MIN_PART = WINDOW + 2 * EDGE + 4  # frames: the shortest part of a clip
WHOLE_CLIP_SHARE = 0.3  # share of clips used whole, as sentences; parts teach sounds and not the grammar of GRID
BEGINNING_SHARE = 0.1  # share of windows at the start of the sound, like the first window of every job
OWN_VOICE_SHARE = 0.4  # share of clips in their own voice, if there are synthesised ones too


@dataclass(frozen=True)
class Sound:
    """Audio of s segments, made of clips or parts of them. mel (s, 80, 3000), the encoder's input.

    clips[s][k]: number of the k-th clip; counts, offsets: how many frames of the segment it takes, its silence
    included, and from which one on. frames (s, 750): number of the video frame at every moment, −1 for none.
    """

    mel: Tensor
    clips: list[np.ndarray]
    counts: list[np.ndarray]
    offsets: list[np.ndarray]
    frames: np.ndarray


def back_and_forth(steps: np.ndarray, n: int) -> np.ndarray:
    """The values of 0, 1, … n − 1, n − 2, … 0, 1, … at these steps."""
    period = max(2 * (n - 1), 1)
    return np.minimum(steps % period, period - steps % period)


def frames_at(positions: np.ndarray, length: int, rest: tuple[int, int]) -> np.ndarray:
    """Frames of a clip at positions that may lie before and after it: those show the clip's frames at rest."""
    before = back_and_forth(-positions, rest[0])
    after = length - 1 - back_and_forth(positions - length + 1, rest[1])
    return np.where(positions < 0, before, np.where(positions >= length, after, positions))


def draw_part(rng: np.random.Generator, length: int, rest: tuple[int, int], augment: bool) -> np.ndarray:
    """Positions of a whole clip or a part, maybe with silence around it, see `frames_at`."""
    count = length
    if augment and rng.random() >= WHOLE_CLIP_SHARE:
        count = int(rng.integers(MIN_PART, length + 1))
    first = int(rng.integers(0, length - count + 1))
    before = after = 0
    if augment and rng.random() < SURROUNDED_SHARE:
        before, after = (int(rng.integers(0, MAX_SILENCE)) if at_end else 0 for at_end in rest)
        if first > 0 and rng.random() < 0.5:  # a part gets silence at one end only
            first, before = length - count, 0
        else:
            first, after = 0, after if count == length else 0
    return np.arange(first - before, first + count + after)


def draw_silence(rng: np.random.Generator, length: int, rest: tuple[int, int]) -> np.ndarray:
    """Positions before or after a clip, if its mouth rests there, see `frames_at`."""
    count = int(rng.integers(MIN_PART, length + 1))
    before = rest[0] and (not rest[1] or rng.random() < 0.5)
    return np.arange(-count, 0) if before else np.arange(length, length + count)


def segment_count(windows: int, per_segment: int) -> int:
    """Number of segments in a batch of windows. Raises UserError if it is not a whole number."""
    if windows < per_segment or windows % per_segment:
        raise UserError(f"A batch of {windows} windows is not possible: give a multiple of {per_segment}.")
    return windows // per_segment


def draw_sound(data: ClipSet, rng: np.random.Generator, segments: int, augment: bool, own_voice: bool = True) -> Sound:
    """Join random clips to segments of up to 30 s, so that the encoder is trained at every position and length.

    augment: parts of clips, other voices, rooms and noise, silence; without it whole clips, in their own voice or,
    if not own_voice, in synthesised ones.
    """
    index = np.full((segments, SEGMENT_FRAMES), NO_FRAME)  # of mel frames
    owner, voice = np.zeros((2, segments, SEGMENT_FRAMES), np.int64)
    frames = np.full((segments, SEGMENT_FRAMES // MEL_PER_FRAME), -1)
    noise = np.full((segments, 1, 1), MEL_BASE, np.float32)
    clips_of: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    offsets: list[np.ndarray] = []
    for s in range(segments):
        max_clips = CLIPS_PER_SEGMENT if rng.random() < 0.5 else int(rng.integers(1, CLIPS_PER_SEGMENT))
        # Not always from 0, or the position in the segment would reveal the position in the sentence.
        drawn: list[tuple[int, int, int]] = []
        at = int(rng.integers(0, MAX_LEAD)) if augment and rng.random() < 0.5 else 0
        index[s, : at * MEL_PER_FRAME] = SILENT_FRAME
        clips = data.draw(rng, max_clips)
        resting = clips[data.rest[clips].any(1)]
        silent = augment and rng.random() < SILENT_SEGMENT_SHARE and len(resting) > 0
        if silent and rng.random() < NOISY_SHARE:
            noise[s] = rng.uniform(PADDING, MAX_NOISE)
        for clip in resting if silent else clips:
            start, length, rest = int(data.starts[clip]), int(data.lengths[clip]), data.rest[clip]
            positions = draw_silence(rng, length, rest) if silent else draw_part(rng, length, rest, augment)
            positions = positions[: frames.shape[1] - at]
            count = len(positions)
            if count < MIN_PART:
                break
            mel_part = slice(at * MEL_PER_FRAME, (at + count) * MEL_PER_FRAME)
            frames[s, at : at + count] = start + frames_at(positions, length, rest)
            mel_frames = ((start + positions)[:, None] * MEL_PER_FRAME + np.arange(MEL_PER_FRAME)).ravel()
            outside = np.repeat((positions < 0) | (positions >= length), MEL_PER_FRAME)
            index[s, mel_part] = np.where(outside, SILENT_FRAME, mel_frames)
            owner[s, mel_part] = len(drawn)
            if len(data.mel) > 1 and (rng.random() >= OWN_VOICE_SHARE if augment else not own_voice):
                voice[s, mel_part] = rng.integers(1, len(data.mel))
            drawn.append((clip, count, at))
            at += count
        for values, column in zip((clips_of, counts, offsets), np.array(drawn).T, strict=True):
            values.append(column)
    device = data.mel.device
    mel_index, clip_index, voice_index, noise_level = (
        copy_to_device(array, device) for array in (index, owner, voice, noise)
    )
    power = data.mel[voice_index, mel_index.clamp(min=0)].float() * MEL_STEP + MEL_BASE  # (s, t, 80), log10
    power = torch.where((mel_index < 0)[..., None], noise_level + noise_deviation(power), power)
    if augment:
        power = change_voices(power, clip_index)
    after = (mel_index == NO_FRAME)[..., None]
    power = power.masked_fill(after, MEL_BASE)
    floor = (power.amax((1, 2), keepdim=True) - TRAINED_MEL_RANGE).clamp(min=PADDING)
    mel = (power.maximum(floor) + 4) / 4
    return Sound(mel.masked_fill(after, 0.0).transpose(1, 2), clips_of, counts, offsets, frames)


def noise_deviation(power: Tensor) -> Tensor:
    """Random deviations of the power of white noise from its mean, in decades, of the shape of `power`."""
    return torch.rand(power.shape, device=power.device).clamp(min=1e-6).log().neg().log10()


def change_voices(power: Tensor, owner: Tensor) -> Tensor:
    """Give every clip another vocal tract, room, level and noise; power (s, t, 80) log10, owner (s, t) the clip."""
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
    return torch.logaddexp(power * 2.302585, (floor + noise_deviation(power)) * 2.302585) / 2.302585


@dataclass(frozen=True)
class Windows:
    """b windows: frame indices of target and reference (b, WINDOW), segment (b,), feature rows (b, WINDOW, 10)."""

    frames: Tensor
    reference: Tensor
    segment: Tensor
    rows: Tensor


def draw_windows(data: ClipSet, sound: Sound, rng: np.random.Generator, per_segment: int) -> Windows:
    """Draw windows of the clips in `sound`, each with another window of the same clip as its reference.

    The tokens of a part's first and last frames reach into other parts, so these are not drawn. The beginning and end
    of the sound are: there, as in a job, the rows are those of the first and last moment.
    """
    parts = np.array([len(clips) for clips in sound.clips])
    segment, first_part = np.repeat(np.arange(len(parts)), per_segment), np.cumsum(parts) - parts
    ends = np.array([at[-1] + count[-1] for at, count in zip(sound.offsets, sound.counts, strict=True)])[segment]
    k = rng.integers(0, parts[segment])
    starts_at_0 = np.array([at[0] == 0 for at in sound.offsets])[segment]
    beginning = starts_at_0 & (rng.random(len(k)) < BEGINNING_SHARE)
    k = np.where(beginning, 0, k) + first_part[segment]
    clip, count, offset = (np.concatenate(values)[k] for values in (sound.clips, sound.counts, sound.offsets))
    start, length = data.starts[clip], data.lengths[clip]
    span = np.arange(WINDOW)
    lowest = np.where(offset == 0, 0, EDGE)
    # After a full segment a job has more audio, so its end is not the end of the sound.
    ended = (offset + count == ends) & (ends < SEGMENT_FRAMES // MEL_PER_FRAME)
    highest = np.where(beginning, 0, count - WINDOW - np.where(ended, 0, EDGE))
    at = (offset + rng.integers(lowest, highest + 1))[:, None] + span
    frames = sound.frames[segment[:, None], at]
    first, last = frames.min(1) - start, frames.max(1) - start
    # Numbers of windows that end before this one begins, and of those that begin after its end.
    before, after = np.maximum(first - WINDOW + 1, 0), np.maximum(length - WINDOW - last, 0)
    pick = rng.integers(0, np.maximum(before + after, 1))
    other = np.where(pick < before, pick, pick - before + last + 1)
    other = np.where(before + after > 0, other, (first + length // 2) % (length - WINDOW))
    rows = (2 * at[:, :, None] + np.arange(-ROWS_BEFORE, ROWS_AFTER)).clip(0, 2 * ends[:, None, None] - 1)
    arrays = frames, (start + other)[:, None] + span, segment, rows
    return Windows(*(copy_to_device(array, data.mel.device) for array in arrays))


def gather_tokens(features: Tensor, segment: Tensor, rows: Tensor) -> Tensor:
    """Audio tokens (b, f, 10·layers, width) of windows, from features (s, 1500, layers, width)."""
    return features[segment[:, None, None], rows].flatten(2, 3)
