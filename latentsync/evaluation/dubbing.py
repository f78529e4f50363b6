"""Clips through the pipeline's own stages, from faces that have been followed before."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from latentsync.audio import audio_chunks, frame_count
from latentsync.checkpoints.load import Models
from latentsync.evaluation.clips import Clip
from latentsync.faces import face_reader
from latentsync.pipeline import Painter, Shot, align, batches, beside, paint, windows
from latentsync.retarget import MouthBank, retarget
from latentsync.settings import Settings


class ElsewherePainter(Painter):
    """A painter that shows the network another moment of the clip as its reference, as in training.

    The pipeline's reference is the frame itself, whose mouth is the answer where a clip is dubbed with its own sound.
    """

    def __init__(self, models: Models, settings: Settings, reference: list[Shot]):
        super().__init__(models, settings)
        self.reference = reference  # of every shot, by its `source`
        self.channels = models.vae.config.latent_channels

    def condition(self, shots: list[Shot], crops: Tensor) -> Tensor:
        others = [self.reference[shot.source] for shot in shots]
        there = super().condition(others, self.upload(torch.from_numpy(np.stack([other.crop for other in others]))))
        return torch.cat([super().condition(shots, crops)[:, : 1 + self.channels], there[:, 1 + self.channels :]], 1)


def elsewhere(n: int) -> np.ndarray:
    """The frame that is the reference of each of n, half a clip away."""
    return (np.arange(n) + n // 2) % n


def dub(clip: Clip, wav: np.ndarray, models: Models, settings: Settings, own: bool = False) -> np.ndarray:
    """The clip's frames with its mouth saying `wav` (samples,), while both last: uint8 (n, H, W, 3).

    own: the sound is the clip's, and the reference must be another moment.
    """
    n = min(len(clip.seen.frames), frame_count(len(wav)))

    def tracked() -> Iterator:
        yield from zip(clip.seen.frames[:n].copy(), clip.seen.faces[:n], strict=True)

    chunks = audio_chunks(models.audio_encoder, torch.from_numpy(wav), n, models.mel_range, models.speech_level)
    heard = beside(chunks, models.device)
    shots = list(align(tracked(), heard, models.resolution, most=n))
    painter = Painter(models, settings)
    if own:
        others = [shots[i] if shots[i].crop is not None else shots[k] for k, i in enumerate(elsewhere(n))]
        painter = ElsewherePainter(models, settings, others)
    with closing(paint(batches(windows(shots), settings.windows_per_pass), painter)) as painted:
        if models.face is None:
            return np.stack([shot.frame for shot in painted])
        bank = MouthBank()
        for _ in bank.collect(zip(clip.seen.frames, clip.seen.faces, strict=True)):
            pass
        with face_reader() as read_face:
            return np.stack([shot.frame for shot in retarget(painted, bank, read_face)])
