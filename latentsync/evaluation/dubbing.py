"""Dub clips with the pipeline's stages, from faces that have been tracked before."""

import numpy as np
import torch
from torch import Tensor

from latentsync.audio import audio_chunks, frame_count, on_side_stream
from latentsync.checkpoints.load import Models
from latentsync.evaluation.clips import Clip
from latentsync.landmarks import face_reader
from latentsync.painting import Painter, paint_groups
from latentsync.retarget import MouthBank, retarget
from latentsync.settings import Settings
from latentsync.windows import AlignedFrame, align_frames, group_windows, split_windows


class OtherReferencePainter(Painter):
    """A painter whose reference latents are of another moment of the clip, as in training.

    The pipeline's reference is the frame itself, whose mouth is the solution if a clip is dubbed with its own sound.
    """

    def __init__(self, models: Models, settings: Settings, reference: list[AlignedFrame]):
        super().__init__(models, settings)
        self.reference = reference  # of every frame, by its `source`
        self.channels = models.vae.config.latent_channels

    def cached_conditioning(self, frames: list[AlignedFrame], crops: Tensor) -> Tensor:
        others = [self.reference[frame.source] for frame in frames if frame.source is not None]
        other_crops = self.copy_to_device(torch.from_numpy(np.stack([other.crop for other in others])))
        masked = super().cached_conditioning(frames, crops)[:, : 1 + self.channels]
        reference = super().cached_conditioning(others, other_crops)[:, 1 + self.channels :]
        return torch.cat([masked, reference], 1)


def reference_frames(n: int) -> np.ndarray:
    """For each of n frames the one that is its reference, half a clip away."""
    return (np.arange(n) + n // 2) % n


def dub(clip: Clip, wav: np.ndarray, models: Models, settings: Settings, own_sound: bool = False) -> np.ndarray:
    """Dub a clip with `wav` (samples,), up to the end of the shorter one: uint8 (n, H, W, 3).

    own_sound: `wav` is the clip's own, so the reference must be another moment.
    """
    n = min(len(clip.track.frames), frame_count(len(wav)))

    bank = MouthBank()
    faces = clip.track.faces
    if models.retargets:
        faces = list(bank.collect(zip(clip.track.frames, faces, strict=True)))
    tracked = zip(clip.track.frames[:n].copy(), faces[:n], strict=True)
    chunks = audio_chunks(
        models.audio_encoder, torch.from_numpy(wav), n, models.mel_range, models.speech_level, settings.silence_gate
    )
    tokens = on_side_stream(chunks, models.device)
    frames = list(align_frames(tracked, tokens, models.resolution, max_crops=n))
    painter = Painter(models, settings)
    if own_sound:
        others = [frames[i] if frames[i].crop is not None else frames[k] for k, i in enumerate(reference_frames(n))]
        painter = OtherReferencePainter(models, settings, others)
    painted = paint_groups(group_windows(split_windows(frames), settings.windows_per_pass), painter)
    if not models.retargets:
        return np.stack([frame.frame for frame in painted])
    with face_reader() as read_face:
        return np.stack([frame.frame for frame in retarget(painted, bank, read_face)])
