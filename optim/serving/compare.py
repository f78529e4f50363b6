"""Original and result side by side in one video, for whoever is to be shown what has changed."""

import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import cv2
import numpy as np

from latentsync import FPS
from latentsync.errors import UserError
from latentsync.media import COMMENT, probe_audio, probe_video, read_frames, read_frames_looped
from latentsync.media.colour import SCALE_MATRIX
from latentsync.media.process import file_url, input_arguments, run_ffmpeg
from latentsync.media.watchdog import Watchdog
from latentsync.media.writing import PRESET, ffmpeg_error
from optim.serving.job import COMPARED_SECONDS

MOST_PIXELS = 720  # the shorter side of each half
CRF = 20
AAC_BITRATE = "256k"


def side_by_side(
    original: Path,
    result: Path,
    output: Path,
    step: Callable[[int, int], None],
    cancel: threading.Event | None = None,
) -> None:
    """Write the original, forward and backward as the result shows it, left of the result, with the result's sound.

    25 fps, H.264, the first COMPARED_SECONDS; each half is made smaller where its shorter side is over MOST_PIXELS.
    What is held does not grow with the clip. step(frames done, frames in all) is called before every frame, and several
    times a second at the end; what it raises ends the work and leaves an unfinished file behind. cancel: ends ffmpeg
    when it is set, whatever that is waiting for, so that step is called once more. Raises UserError where the file
    cannot be written.
    """
    from moviepy import VideoClip, clips_array  # which takes a second or two

    before, after = probe_video(original), probe_video(result)
    total = min(after.n_frames, COMPARED_SECONDS * FPS)
    scale = min(1.0, MOST_PIXELS / min(before.width, before.height))
    width, height = (2 * max(1, round(side * scale / 2)) for side in (before.width, before.height))
    tags = after.color_matrix, after.color_primaries, after.color_transfer
    matrix, primaries, transfer = tags if after.color_matrix in SCALE_MATRIX else ("bt709",) * 3
    graph = (
        f"scale=out_color_matrix={SCALE_MATRIX[matrix]}:out_range=tv,format=yuv420p,setsar=1,"
        f"setparams=range=tv:colorspace={matrix}:color_primaries={primaries}:color_trc={transfer}"
    )
    # AAC is what every player knows, unlike FLAC.
    sound = ["-c:a", "copy"] if probe_audio(result).codec == "aac" else ["-c:a", "aac", "-b:a", AAC_BITRATE]
    arguments = [
        *("-loglevel", "error", "-nostats", "-y", "-f", "rawvideo", "-pixel_format", "rgb24"),
        *("-video_size", f"{2 * width}x{height}", "-framerate", str(FPS), "-i", "pipe:0", *input_arguments(result)),
        *("-map", "0:v:0", "-vf", graph, "-c:v", "libx264", "-preset", PRESET, "-crf", str(CRF)),
        *("-map", "1:a:0", *sound, "-t", f"{total / FPS:.3f}", "-map_metadata", "-1", "-map_chapters", "-1"),
        *("-metadata", f"comment={COMMENT}", "-movflags", "+faststart", "-f", "mp4", file_url(output)),
    ]
    done = 0
    with (
        # Both are read as the pipeline reads: turned upright, at 25 fps, in the colours that their tags name.
        closing(read_frames_looped(before, total)) as left,
        closing(read_frames(after, count=total)) as right,
        run_ffmpeg(arguments, stdin=subprocess.PIPE) as (process, log),
        Watchdog(process, cancel) as watchdog,
    ):
        try:
            seconds = (total + 0.5) / FPS  # moviepy rounds down to whole frames
            both = (frame for _, frame in left), right
            halves = [VideoClip(_in_order(frames, (width, height)), duration=seconds) for frames in both]
            # bg_color: without one moviepy blends the two as if they could be seen through, and is slower.
            for frame in clips_array([halves], bg_color=(0, 0, 0)).iter_frames(fps=FPS, dtype="uint8"):
                step(done, total)
                watchdog.write(memoryview(np.ascontiguousarray(frame)).cast("B"))
                done += 1
            process.stdin.close()
        except OSError:
            pass  # ffmpeg has ended, and says why
        if watchdog.wait(lambda: step(done, total)) != 0:
            step(done, total)
            stalled = watchdog.stalled is not None and f"ffmpeg stood still for {watchdog.stalled:g} seconds"
            raise UserError(_not_written(stalled or ffmpeg_error(log)))


def _in_order(frames: Iterator[np.ndarray], size: tuple[int, int]) -> Callable[[float], np.ndarray]:
    """A moviepy frame function over frames that come one after the other at 25 fps, made `size` (width, height)."""
    position, shown = -1, None

    def frame_at(t: float) -> np.ndarray:
        nonlocal position, shown
        while position < round(t * FPS):
            shown = next(frames, None)
            if shown is None:
                raise UserError(_not_written("one of the two videos is cut short"))
            position += 1
        same = (shown.shape[1], shown.shape[0]) == size
        return shown if same else cv2.resize(shown, size, interpolation=cv2.INTER_AREA)

    return frame_at


def _not_written(why: str) -> str:
    return f"The side-by-side video could not be written ({why}): see whether the disk is full, and try again."
