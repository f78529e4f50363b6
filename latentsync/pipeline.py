"""From a video and a voice to the video with the mouth saying the new words.

    frames → faces → windows → latents → faces → frames

Each stage is an iterator that takes from the one before it, so that what is held does not grow with the clip.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latentsync.alignment import crop_face, estimate_matrix, fixed_mask
from latentsync.audio import audio_chunks, frame_count
from latentsync.checkpoints import Models
from latentsync.compositing import match_colours, merge_faces, paste_face
from latentsync.errors import UserError
from latentsync.faces import track_faces
from latentsync.media import (
    CRF,
    VideoWriter,
    check_output,
    probe_video,
    read_audio,
    read_frames_looped,
)
from latentsync.sampling import (
    GUIDANCE_SCALE,
    INFERENCE_STEPS,
    SEED,
    WINDOW,
    DeepCache,
    Schedule,
    ddim_schedule,
    denoise,
    initial_noise,
)
from latentsync.vae import condition, decode, to_pixels

STAGES = ("faces", "mouths", "writing")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What a run is asked for."""

    steps: int = INFERENCE_STEPS  # 1 to 999
    guidance_scale: float = GUIDANCE_SCALE  # 1 (off) to 3 are useful
    seed: int = SEED
    windows_per_pass: int = 1  # windows that go through the U-Net together
    cache: DeepCache | None = None
    crf: float = CRF  # x264's, of the output


@dataclass
class Report:
    """What a run did."""

    settings: Settings
    model: str
    resolution: int
    device: str
    dtype: str
    frames: int = 0
    frames_without_face: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # spent in each stage
    total_seconds: float = 0.0

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass
class Shot:
    """One frame on its way through the pipeline.

    frame: uint8 (H, W, 3), changed in place when its face is put back; tokens: audio (50, d);
    crop: uint8 (R, R, 3), None without a usable face; matrix (2, 3) and opacity: how it goes back.
    """

    frame: np.ndarray
    tokens: Tensor
    crop: np.ndarray | None = None
    matrix: np.ndarray | None = None
    opacity: float = 0.0


@dataclass(frozen=True)
class Window:
    """Consecutive shots with a face; the first `done` of them only lend context and have been painted before."""

    shots: list[Shot]
    done: int = 0


def align(frames: Iterable[np.ndarray], tokens: Iterator[Tensor], resolution: int) -> Iterator[Shot]:
    """Find, follow and cut out the face of every frame; tokens: the audio of each frame, in step."""
    bias = None
    for frame, face in track_faces(frames):
        shot = Shot(frame, next(tokens))
        if face is None:
            bias = None
        else:
            shot.matrix, bias = estimate_matrix(face.points, resolution, None if face.first else bias)
            shot.crop = crop_face(frame, shot.matrix, resolution)
            shot.opacity = face.opacity
        yield shot


def windows(shots: Iterable[Shot]) -> Iterator[Window | Shot]:
    """Cut runs of shots with a face into windows; shots without one come through between them, in order.

    A run's last window is slid back so that it is full: norms and temporal attention see every frame of a
    window, so a padded one would change the real frames. A run shorter than a window is one at its true length.
    """
    painted: list[Shot] = []  # the run's last window, for context
    waiting: list[Shot] = []

    def rest() -> Iterator[Window]:
        if waiting:
            lent = painted[len(painted) - (WINDOW - len(waiting)) :] if painted else []
            yield Window(lent + waiting, len(lent))

    for shot in shots:
        if shot.crop is None:
            yield from rest()
            painted, waiting = [], []
            yield shot
            continue
        waiting.append(shot)
        if len(waiting) == WINDOW:
            yield Window(waiting)
            painted, waiting = waiting, []
    yield from rest()


def batches(parts: Iterable[Window | Shot], size: int) -> Iterator[list[Window | Shot]]:
    """Group parts, in order, so that a group holds up to `size` windows and not many more frames than they do."""
    group: list[Window | Shot] = []
    count = frames = 0
    for part in parts:
        group.append(part)
        count += isinstance(part, Window)
        frames += len(part.shots) if isinstance(part, Window) else 1
        if count == size or frames >= size * WINDOW:
            yield group
            group, count, frames = [], 0, 0
    if group:
        yield group


class Painter:
    """Generates the faces of windows: all that stays the same from window to window.

    on_step is called at every denoising step; what it raises stops the run.
    """

    def __init__(self, models: Models, settings: Settings, on_step: Callable[[], None] | None = None):
        self.models, self.settings, self.on_step = models, settings, on_step
        self.queued: torch.cuda.Event | None = None  # the end of the last step that was given to the GPU
        device, dtype = models.device, models.dtype
        self.mask = torch.from_numpy(fixed_mask(models.resolution).copy()).to(device, dtype)
        self.schedule: Schedule = ddim_schedule(settings.steps)
        vae = models.vae.config
        side = models.resolution // 2 ** (len(vae.block_out_channels) - 1)
        self.noise = initial_noise(settings.seed, vae.latent_channels, side, side, device, dtype)

    @torch.inference_mode()
    def paint(self, windows: list[Window]) -> None:
        """Generate the mouths of windows of one length, and put the faces into their frames, in place."""
        device, dtype = self.models.device, self.models.dtype
        b, f = len(windows), len(windows[0].shots)
        shots = [shot for window in windows for shot in window.shots]
        crops = torch.from_numpy(np.stack([shot.crop for shot in shots])).to(device)
        tokens = torch.stack([shot.tokens for shot in shots]).to(device, dtype).unflatten(0, (b, f))
        given = condition(self.models.vae, to_pixels(crops, dtype), self.mask)
        latents = denoise(
            self.models.unet,
            self.noise,
            given.unflatten(0, (b, f)).transpose(1, 2),
            tokens,
            self.schedule,
            self.settings.guidance_scale,
            self.settings.cache,
            self.step_given,
        )
        new = [i * f + j for i, window in enumerate(windows) for j in range(window.done, f)]
        generated = decode(self.models.vae, latents.transpose(1, 2).flatten(0, 1)[new])
        if self.models.match_colours:
            generated = match_colours(generated, crops[new], self.mask)
        faces = merge_faces(generated, crops[new], self.mask)
        for face, index in zip(faces, new, strict=True):
            shot = shots[index]
            frame = torch.from_numpy(shot.frame)
            on_device = frame.to(device)
            paste_face(on_device, face, shot.matrix, shot.opacity)
            frame.copy_(on_device)


    def step_given(self, _: int) -> None:
        """Stay one step ahead of the GPU and no more, or a run could not be stopped before its window ends."""
        if self.models.device.type == "cuda":
            before, self.queued = self.queued, torch.cuda.Event(blocking=True)
            self.queued.record()
            if before is not None:
                before.synchronize()
        if self.on_step:
            self.on_step()


def paint(groups: Iterable[list[Window | Shot]], painter: Painter) -> Iterator[Shot]:
    """Paint every window of every group; yields the finished shots in order, each once."""
    for group in groups:
        by_length: dict[int, list[Window]] = {}
        for part in group:
            if isinstance(part, Window):
                by_length.setdefault(len(part.shots), []).append(part)
        for alike in by_length.values():
            painter.paint(alike)
        for part in group:
            if isinstance(part, Window):
                yield from part.shots[part.done :]
            else:
                yield part


class StageClock:
    """Seconds spent in each stage of a chain of iterators: a stage's own time, without that of those before it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0

    def time(self, items: Iterable, stage: str) -> Iterator:
        """Pass the items on, charging the time each takes, less what inner stages took, to `stage`."""
        items = iter(items)
        while True:
            outer, self._inner = self._inner, 0.0
            began = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                spent = time.perf_counter() - began
                self.seconds[stage] = self.seconds.get(stage, 0.0) + spent - self._inner
                self._inner = outer + spent
            yield item


def lipsync(
    video: str | Path,
    audio: str | Path,
    output: str | Path,
    models: Models,
    settings: Settings | None = None,
    on_progress: Progress | None = None,
) -> Report:
    """Write `output`: the video with its mouth saying the audio.

    It lasts as long as the sound, ceil(seconds × 25) frames; a shorter video is played forward and backward.
    on_progress(stage, frames done, frames in all) is called as the stages of STAGES advance, and at every
    denoising step; what it raises stops the run. Whatever ends a run early, no part of the output is left.
    Raises UserError where the files cannot be used, or the video never shows a usable face.
    """
    settings = settings or Settings()
    began = time.perf_counter()
    output = check_output(output, (video, audio))
    info = probe_video(video)
    clock = StageClock()
    wav = next(clock.time([torch.from_numpy(read_audio(audio))], "sound"))
    total = frame_count(len(wav))
    report = Report(
        settings, models.name, models.resolution, str(models.device), str(models.dtype).removeprefix("torch.")
    )
    frames = (frame for _, frame in read_frames_looped(info, total))
    with closing(frames), VideoWriter(output, info, audio, settings.crf) as writer:
        for shot in generate(frames, wav, models, settings, total, clock, on_progress):
            report.frames += 1
            report.frames_without_face += shot.crop is None
            wrote = time.perf_counter()
            writer.write(shot.frame)
            clock.seconds["writing"] = clock.seconds.get("writing", 0.0) + time.perf_counter() - wrote
            if on_progress:
                on_progress("writing", report.frames, total)
        if report.frames_without_face == report.frames:
            raise UserError(
                f"'{video}' shows no face that can be used: use a video in which the speaker's face is seen from "
                "the front, with the whole mouth in the picture."
            )
    report.seconds = {stage: round(seconds, 3) for stage, seconds in clock.seconds.items()}
    report.total_seconds = round(time.perf_counter() - began, 3)
    return report


def generate(
    frames: Iterator[np.ndarray],
    wav: Tensor,
    models: Models,
    settings: Settings,
    total: int,
    clock: StageClock,
    on_progress: Progress | None = None,
) -> Iterator[Shot]:
    """The chain of stages between decoding and encoding: finished shots, in order.

    frames: uint8 (H, W, 3) at 25 fps, writable; wav: (samples,) float32 at 16 kHz; total: frames to expect.
    """
    painted = 0

    def watched(shots: Iterable[Shot], stage: str) -> Iterator[Shot]:
        for done, shot in enumerate(shots, 1):
            if on_progress:
                on_progress(stage, done, total)
            yield shot

    def still_painting() -> None:
        if on_progress:
            on_progress("mouths", painted, total)

    tokens = clock.time(audio_chunks(models.audio_encoder, wav, total), "sound")
    decoded = clock.time(frames, "reading")
    aligned = watched(clock.time(align(decoded, tokens, models.resolution), "faces"), "faces")
    groups = batches(windows(aligned), settings.windows_per_pass)
    painter = Painter(models, settings, still_painting)
    for shot in watched(clock.time(paint(groups, painter), "mouths"), "mouths"):
        painted += 1
        yield shot
