"""Write a video of the original and the result side by side."""

import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import cv2
import numpy as np

from latentsync.errors import UserError
from latentsync.media import COMMENT, probe_audio, probe_video, read_frames, read_frames_looped
from latentsync.media.colour import SCALE_MATRIX
from latentsync.media.process import file_url, input_arguments, open_pipe, run_ffmpeg
from latentsync.media.watchdog import Watchdog
from latentsync.media.writing import PRESET, ffmpeg_error
from optim.serving.job import COMPARED_SECONDS
from optim.serving.preview import scaled_size

MAX_SIDE = 720  # maximum of the shorter side of each half, pixels
CRF = 20
AAC_BITRATE = "256k"


def side_by_side(
    original: Path,
    result: Path,
    output: Path,
    step: Callable[[int, int], None],
    cancel: threading.Event | None = None,
) -> None:
    """Write the original, looped forward and backward as in the result, left of the result, with the result's sound.

    The output is H.264 of the first COMPARED_SECONDS, at the result's rate; each half is scaled down to a shorter side
    of at most MAX_SIDE. Memory does not grow with the length of the clip. step(frames done, frames in all) is called
    before every frame, and several times a second at the end; an exception of it ends the work and leaves an unfinished
    file. cancel: when set, ends ffmpeg whatever it waits for, after which `step` is called once more. Raises UserError
    if the file cannot be written.
    """
    from moviepy import VideoClip, clips_array  # takes a second or two to import

    after = probe_video(result)
    after = after.at(after.nominal_rate)
    before, rate = probe_video(original).at(after.rate), float(after.rate)
    total = min(after.n_frames, int(COMPARED_SECONDS * after.rate))
    width, height = size = scaled_size(before.width, before.height, MAX_SIDE)
    tags = after.color_matrix, after.color_primaries, after.color_transfer
    matrix, primaries, transfer = tags if after.color_matrix in SCALE_MATRIX else ("bt709",) * 3
    graph = (
        f"scale=out_color_matrix={SCALE_MATRIX[matrix]}:out_range=tv,format=yuv420p,setsar=1,"
        f"setparams=range=tv:colorspace={matrix}:color_primaries={primaries}:color_trc={transfer}"
    )
    # Every player supports AAC, unlike FLAC.
    sound = ["-c:a", "copy"] if probe_audio(result).codec == "aac" else ["-c:a", "aac", "-b:a", AAC_BITRATE]
    arguments = [
        *("-loglevel", "error", "-nostats", "-y", "-f", "rawvideo", "-pixel_format", "rgb24"),
        *(
            "-video_size",
            f"{2 * width}x{height}",
            "-framerate",
            str(after.rate),
            "-i",
            "pipe:0",
            *input_arguments(result),
        ),
        *("-map", "0:v:0", "-vf", graph, "-c:v", "libx264", "-preset", PRESET, "-crf", str(CRF)),
        *("-map", "1:a:0", *sound, "-t", f"{total / rate:.6f}", "-map_metadata", "-1", "-map_chapters", "-1"),
        *("-metadata", f"comment={COMMENT}", "-movflags", "+faststart", "-f", "mp4", file_url(output)),
    ]
    done = 0
    with (
        # Both are read as in the pipeline: upright, at the result's rate, with the colours of their tags.
        closing(read_frames_looped(before, total)) as left,
        closing(read_frames(after, count=total)) as right,
        run_ffmpeg(arguments, stdin=subprocess.PIPE) as (process, log),
        Watchdog(process, cancel) as watchdog,
    ):
        try:
            seconds = (total + 0.5) / rate  # moviepy rounds down to whole frames
            sources = (frame for _, frame in left), right
            halves = [VideoClip(_frame_function(frames, size, rate), duration=seconds) for frames in sources]
            # Without a bg_color moviepy composes with transparency, which is slower.
            for frame in clips_array([halves], bg_color=(0, 0, 0)).iter_frames(fps=rate, dtype="uint8"):
                step(done, total)
                watchdog.write(np.ascontiguousarray(frame).data.cast("B"))
                done += 1
            open_pipe(process.stdin).close()
        except OSError:
            pass  # ffmpeg has ended; its log says why
        if watchdog.wait(lambda: step(done, total)) != 0:
            step(done, total)
            if watchdog.stalled is not None:
                raise _write_error(f"ffmpeg stood still for {watchdog.stalled:g} seconds")
            raise _write_error(ffmpeg_error(log))


def _frame_function(frames: Iterator[np.ndarray], size: tuple[int, int], rate: float) -> Callable[[float], np.ndarray]:
    """A moviepy frame function: frames in order, `rate` a second, scaled to `size` (width, height)."""
    position = -1
    frame: np.ndarray = np.empty(0)

    def frame_at(t: float) -> np.ndarray:
        nonlocal position, frame
        while position < round(t * rate):
            if (following := next(frames, None)) is None:
                raise _write_error("one of the two videos is cut short")
            position, frame = position + 1, following
        is_scaled = (frame.shape[1], frame.shape[0]) == size
        return frame if is_scaled else cv2.resize(frame, size, interpolation=cv2.INTER_AREA)

    return frame_at


def _write_error(reason: str) -> UserError:
    return UserError(f"The side-by-side video could not be written ({reason}): check for a full disk, and try again.")
