"""One run of the node LatentSync: through the pipeline to a file, with ComfyUI's progress, preview and interruption."""

import logging
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.utils
import folder_paths
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentsync import FPS
from latentsync.choice import FACES
from latentsync.errors import UserError
from latentsync.pipeline import Hooks, lipsync
from latentsync.settings import WINDOW, Settings
from optim.accelerate import accelerate, oom_handler, plan_for_device
from optim.comfyui.media import check_audio, mix_audio, write_audio, write_images, write_video
from optim.comfyui.models import compute_device, find_checkpoint, loaded_models, own_torch_settings
from optim.doctor import advise_report
from optim.hardware import gpu_of, recommended_level
from optim.levels import Level, find_level, override
from optim.serving.run import interruptible

log = logging.getLogger(__name__)

PREVIEW_SIDE = 512  # pixels, the longer side of a preview at most
SUFFIX = ".mp4"


@dataclass(frozen=True)
class Request:
    """What the node is asked for.

    source: IMAGE (B, H, W, C) or VIDEO; fps: of an IMAGE batch, frames a second; vram_fraction: of the card's memory,
    0: the level's own; keep_frames: return the frames as well, which takes 12 bytes a pixel of each; other_face: who
    says other_audio, if there is one.
    """

    source: Any
    audio: Mapping[str, Any]
    model: str
    level: str
    seed: int
    guidance_scale: float
    steps: int
    vram_fraction: float
    fps: float
    face: str
    crf: float
    silence_gate: bool
    filename_prefix: str
    keep_frames: bool
    other_face: str = ""
    other_audio: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if (self.other_audio is not None) and not self.other_face:
            raise UserError(
                f"'other_face' is empty: say who says 'other_audio', {', '.join(FACES)}, or X,Y of a point."
            )
        if self.other_audio is None and self.other_face:
            raise UserError("'other_face' has no 'other_audio': link a sound to that input, or leave the face empty.")


@dataclass(frozen=True)
class Result:
    """What a run made: a file in ComfyUI's output folder, its sound, and float32 frames (N, H, W, 3) where kept."""

    path: Path
    subfolder: str  # of the output folder
    audio: Mapping[str, Any]
    frames: Tensor | None


class Progress:
    """Hooks of the pipeline: ComfyUI's progress bar in frames, a preview a window, and the frames if they are kept."""

    def __init__(self, steps: int, keep_frames: bool):
        self._bar = comfy.utils.ProgressBar(1)
        self._steps, self._keep_frames = steps, keep_frames
        self._total = 1
        self._painted = self._taken = self._received = 0  # frames, steps since the last of them, frames
        self._shown = 0  # what the bar has shown; the frames of a window are counted one by one after its steps
        self.frames: Tensor | None = None

    def on_progress(self, stage: str, done: int, total: int) -> None:
        management.throw_exception_if_processing_interrupted()
        self._total = total
        if stage != "mouths":
            return
        # A call without a new frame is a denoising step. Decoding follows the last one.
        self._taken = self._taken + 1 if done == self._painted else 0
        self._painted = done
        within = min(self._taken / (self._steps + 1), 1) * min(WINDOW, total - done)
        self._shown = max(self._shown, math.floor(done + within))
        self._bar.update_absolute(self._shown, total)

    def on_frame(self, frame: np.ndarray) -> None:
        if self._received % WINDOW == 0:
            picture = Image.fromarray(frame)
            self._bar.update_absolute(self._shown, self._total, ("JPEG", picture, PREVIEW_SIDE))
        if self._keep_frames:
            if self.frames is None:
                self.frames = torch.empty((self._total, *frame.shape), dtype=torch.float32)
            self.frames[self._received] = torch.from_numpy(frame).float().div_(255)
        self._received += 1


def run(request: Request) -> Result:
    """Make the video. Raises UserError, ComfyUI's interruption and whatever else goes wrong; then no file is left."""
    check = management.throw_exception_if_processing_interrupted
    sounds = {"audio": request.audio} | ({} if request.other_audio is None else {"other_audio": request.other_audio})
    waveforms = [check_audio(sound, name) for name, sound in sounds.items()]
    seconds = max(waveform.shape[-1] / rate for waveform, rate in waveforms)
    with own_torch_settings(), temporary_folder() as folder:
        audio, *others = (write_audio(sound, folder / f"{name}.wav") for name, sound in sounds.items())
        mixed = folder / "mixed.wav" if others else None
        heard = request.audio if mixed is None else mix_audio([audio, *others], mixed, check)
        if isinstance(request.source, Tensor):
            video = write_images(request.source, request.fps, folder / "frames.mkv", check)
        else:
            video = write_video(request.source, folder, check)
        checkpoint = find_checkpoint(request.model, compute_device())
        models = loaded_models(checkpoint, requested_level(request))
        settings = Settings(
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            seed=request.seed,
            crf=request.crf,
            face=request.face,
            other_faces=(request.other_face,) if others else (),
            silence_gate=request.silence_gate,
        )
        plan = plan_for_device(models.device, models.resolution, settings, request.level, **overrides(request))
        accelerate(models, plan, frames=math.ceil(seconds * FPS))
        output, subfolder = output_path(request.filename_prefix)
        step_downs: list[str] = []
        progress = Progress(plan.settings.steps * len(sounds), request.keep_frames)
        hooks = Hooks(
            on_progress=progress.on_progress,
            on_frame=progress.on_frame,
            on_wait=check,
            on_out_of_memory=oom_handler(models, plan, on_step_down=step_downs.append),
            on_message=log.info,
        )
        with interruptible(models, check):
            # In one piece: the next run has another temporary sound, and would not find the segments of this one.
            report = lipsync(video, audio, output, models, plan.settings, hooks, None, other_voices=others, sound=mixed)
    for remark in report.remarks:
        log.info(remark)
    for advice in advise_report(report, plan, step_downs):
        log.info(f"{advice.problem} {advice.remedy}")
    return Result(output, subfolder, heard, progress.frames)


def overrides(request: Request) -> dict[str, Any]:
    """The single settings of the level that the request changes."""
    return {"vram_fraction": request.vram_fraction} if request.vram_fraction else {}


def requested_level(request: Request) -> Level:
    """The level of the request, as it will be run. Raises UserError."""
    level = recommended_level(gpu_of(compute_device())) if request.level == "auto" else find_level(request.level)
    return override(level, **overrides(request))


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder in ComfyUI's temp/ during a `with` block."""
    parent = Path(folder_paths.get_temp_directory())
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="latentsync-", dir=parent) as folder:
        yield Path(folder)


def output_path(prefix: str) -> tuple[Path, str]:
    """A free name in ComfyUI's output/, numbered as those of its own nodes, and the subfolder. Raises UserError."""
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            prefix, folder_paths.get_output_directory()
        )
    except Exception as error:  # ComfyUI has no type of its own for a folder outside of its output
        raise UserError(f"The result cannot be saved as '{prefix}' ({error}): give another filename_prefix.") from error
    return Path(folder) / f"{name}_{counter:05}_{SUFFIX}", subfolder
