"""What flows through ComfyUI's graph, as files that the pipeline reads: frames, sound and videos.

IMAGE is a float32 tensor (B, H, W, C), RGB or RGBA from 0 to 1. AUDIO is a dict with the waveform, a float tensor
(B, channels, samples), and its sample_rate. VIDEO is a `comfy_api` object over a file or over such tensors.
"""

import inspect
import math
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy_api.latest import Input, InputImpl
from scipy.io import wavfile
from torch import Tensor

from latentsync.errors import UserError
from latentsync.media import mix_voices, probe_audio
from latentsync.media.process import file_url, run_ffmpeg
from latentsync.media.watchdog import Watchdog
from latentsync.media.writing import ffmpeg_error

KEYFRAMES = 25  # frames between two of them in the lossless file, so that reading it backward is quick
MAX_RATE = 1000  # frames a second
TRIMMED_CRF = 12  # x264 quality of a VIDEO that ComfyUI cuts; only its newer versions take one
LENGTHS = ("normal", "pingpong", "loop_to_audio")


def check_images(images: Tensor) -> Tensor:
    """An IMAGE batch as it is. Raises UserError unless it holds frames of RGB or RGBA."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[-1] not in (3, 4) or 0 in images.shape:
        shape = tuple(getattr(images, "shape", ()))
        raise UserError(f"'images' is no batch of frames, its shape is {shape}: give (frames, height, width, 3).")
    return images


def check_audio(audio: Mapping[str, Any] | None, name: str = "audio") -> tuple[Tensor, int]:
    """The first sound of an AUDIO batch, float (channels, samples), and its rate in Hz; name: the input's.

    Raises UserError.
    """
    waveform, rate = (audio or {}).get("waveform"), (audio or {}).get("sample_rate")
    if not isinstance(waveform, Tensor) or waveform.ndim != 3 or 0 in waveform.shape:
        raise UserError(
            f"'{name}' holds no sound: give the output of Load Audio, and check that its file is not empty."
        )
    if not isinstance(rate, int) or rate < 1:
        raise UserError(f"'{name}' has a sample rate of {rate}: give a whole number of samples a second.")
    return waveform[0], rate


def as_uint8(image: Tensor) -> np.ndarray:
    """A frame of an IMAGE batch, (H, W, C), as the uint8 RGB (H, W, 3) that it was made from."""
    return image[..., :3].float().nan_to_num().clamp(0, 1).mul(255).round().to("cpu", torch.uint8).numpy()


def write_audio(audio: Mapping[str, Any] | None, path: Path) -> Path:
    """Write AUDIO to a WAV file in float32, which loses nothing. Raises UserError."""
    waveform, rate = check_audio(audio)
    wavfile.write(path, rate, waveform.float().nan_to_num().T.contiguous().cpu().numpy())
    return path


def mix_audio(paths: Sequence[Path], path: Path, check: Callable[[], None]) -> dict[str, Any]:
    """Mix sounds into a WAV file, as `mix_voices` does, and return it as AUDIO. Raises UserError, and as `check`."""
    mix_voices([probe_audio(each) for each in paths], path, check)
    rate, samples = wavfile.read(path)  # of 24 bits, as the upper ones of 32
    return {"waveform": torch.from_numpy(samples.T / np.float32(2**31))[None].float(), "sample_rate": rate}


def write_images(images: Tensor, fps: float, path: Path, check: Callable[[], None]) -> Path:
    """Write an IMAGE batch to a Matroska file in lossless RGB. Raises UserError, and what `check` raises.

    check: called before every frame, to end the work.
    """
    check_images(images)
    if not 0 < fps <= MAX_RATE:
        raise UserError(f"fps = {fps} is not possible: give a number above 0, to {MAX_RATE}.")
    height, width = images.shape[1:3]
    arguments = [
        *("-loglevel", "error", "-nostats", "-y", "-f", "rawvideo", "-pixel_format", "rgb24"),
        *("-video_size", f"{width}x{height}", "-framerate", str(Fraction(fps).limit_denominator(1001))),
        *("-i", "pipe:0", "-c:v", "libx264rgb", "-qp", "0", "-preset", "ultrafast", "-g", str(KEYFRAMES)),
        file_url(path),
    ]
    with run_ffmpeg(arguments, stdin=subprocess.PIPE) as (process, log), Watchdog(process) as watchdog:
        failed = False
        try:
            for image in images:
                check()
                watchdog.write(np.ascontiguousarray(as_uint8(image)).data.cast("B"))
        except OSError:
            failed = True
        if process.stdin is not None:
            process.stdin.close()
        if watchdog.wait(check) != 0 or failed:
            raise UserError(f"The frames could not be written to '{path}' ({ffmpeg_error(log)}): make room there.")
    return path


def write_video(video: Any, folder: Path, check: Callable[[], None]) -> Path:
    """The file of a VIDEO: its own where it has one, else a new one in `folder`. Raises UserError.

    Frames that are tensors already are written without loss. A video that ComfyUI trims or crops is one that it
    encodes once more.
    """
    if isinstance(video, InputImpl.VideoFromComponents):
        components = video.get_components()
        return write_images(components.images, float(components.frame_rate), folder / "frames.mkv", check)
    if not isinstance(video, Input.Video):
        raise UserError(f"'images' is a {type(video).__name__}: give an IMAGE batch or a VIDEO.")
    source = video.get_stream_source()
    if not isinstance(source, BytesIO) and _is_whole(video, source):
        return Path(source)
    path = folder / "video.mp4"
    if isinstance(source, BytesIO) and _is_whole(video, source):
        source.seek(0)
        with path.open("wb") as file:
            shutil.copyfileobj(source, file)
        return path
    takes_crf = "crf" in inspect.signature(video.save_to).parameters
    video.save_to(str(path), **({"crf": TRIMMED_CRF} if takes_crf else {}))
    return path


def _is_whole(video: Any, source: str | BytesIO) -> bool:
    """Whether a VIDEO shows all of its file, neither trimmed nor cropped.

    What ComfyUI cannot read is left to the pipeline, whose message is better.
    """
    try:
        whole = InputImpl.VideoFromFile(source)
        return (video.get_duration(), video.get_dimensions()) == (whole.get_duration(), whole.get_dimensions())
    except Exception:
        return True


def fit_length(
    images: Tensor, audio: Mapping[str, Any], mode: str, fps: float, silence: float
) -> tuple[Tensor, dict[str, Any]]:
    """Fit the length of frames to a sound, which gets `silence` seconds at its end. Raises UserError.

    normal: all frames stay, and the sound gets as much silence as they need. pingpong: as many frames as the sound
    lasts, played forward and backward. loop_to_audio: the same, always from the first frame on.
    """
    check_images(images)
    waveform, rate = check_audio(audio)
    if mode not in LENGTHS:
        raise UserError(f"There is no mode '{mode}': give one of {', '.join(LENGTHS)}.")
    if not 0 < fps <= MAX_RATE or silence < 0:
        raise UserError(f"fps = {fps}, silent_padding_sec = {silence}: give fps above 0 and no negative silence.")
    frames, samples = len(images), waveform.shape[-1] + round(silence * rate)
    if mode == "normal":
        samples = max(samples, math.ceil(frames / fps * rate))
    else:
        # A sample more than a frame lasts is no new frame: rounding of the rates.
        wanted = max(1, math.ceil(samples / rate * fps - 1e-6))
        cycle = [*range(frames), *range(frames - 1, -1, -1)] if mode == "pingpong" else [*range(frames)]
        images = images[[cycle[i % len(cycle)] for i in range(wanted)]]
    padded = torch.nn.functional.pad(audio["waveform"], (0, samples - waveform.shape[-1]))
    return images, {"waveform": padded, "sample_rate": rate}
