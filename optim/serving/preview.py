"""Previews: a picture of an uploaded video, and pictures and a video of a result while its job runs."""

import logging
import queue
import subprocess
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from latentsync import FPS
from latentsync.media import VideoInfo, read_frames
from latentsync.media.process import file_url, input_arguments, open_pipe, run_ffmpeg
from latentsync.media.watchdog import Watchdog

if TYPE_CHECKING:
    import numpy as np

    from optim.serving.job import Job

log = logging.getLogger(__name__)

PREVIEW_SECONDS = 10  # length of the preview video
PREVIEW_SIDE = 480  # maximum of a preview's shorter side, pixels
PICTURE_SIDE = 640  # of a preview picture's longer side, pixels, at most
PICTURE_INTERVAL = 4.0  # seconds between two preview pictures, of which the page shows some
BT709 = "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"  # filter that tags frames
BT709_LINES = 720  # from which browsers take a video without a colour matrix for BT.709
CLOSE_TIMEOUT = 10.0  # seconds to wait for the preview at the end of a run


def scaled_size(width: int, height: int, max_side: int) -> tuple[int, int]:
    """Even width and height of a picture that is scaled down until its shorter side is at most `max_side`."""
    scale = min(1.0, max_side / min(height, width))
    return 2 * max(1, round(width * scale / 2)), 2 * max(1, round(height * scale / 2))


def as_jpeg(frame: "np.ndarray") -> bytes:
    """Encode a frame, uint8 (h, w, 3) RGB, as a JPEG file."""
    import cv2

    return cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()


def as_webp(frame: "np.ndarray") -> bytes:
    """Encode a frame, uint8 (h, w, 3) RGB, as a WebP file: a third of a JPEG file, in ten times the time."""
    import cv2

    return cv2.imencode(".webp", frame[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, 60])[1].tobytes()


def resized(frame: "np.ndarray", max_side: int = PREVIEW_SIDE) -> "np.ndarray":
    """A frame, uint8 (h, w, 3), scaled down until its shorter side is at most `max_side`."""
    import cv2

    size = scaled_size(frame.shape[1], frame.shape[0], max_side)
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA)


def preview_picture(frame: "np.ndarray") -> "np.ndarray":
    """A frame, uint8 (h, w, 3), scaled down until its longer side is at most PICTURE_SIDE."""
    height, width = frame.shape[:2]
    return resized(frame, PICTURE_SIDE * min(height, width) // max(height, width))


def as_browsers_show(info: VideoInfo) -> VideoInfo:
    """A video that is read with the colour matrix that browsers assume where its file names none: a picture of it looks
    like the video that plays in its place.

    Chromium 156 takes BT.709 from 720 lines on and BT.601 below, and always BT.601 for VP9 and AV1. Runs go by the
    width, too, as mpv does.
    """
    large = info.stored_height >= BT709_LINES and info.codec not in ("vp9", "av1")
    return replace(info, assumed_matrix="bt709" if large else "smpte170m")


def thumbnail(info: VideoInfo) -> bytes:
    """The first frame of a video, scaled down, as a JPEG file. Raises UserError if it cannot be decoded."""
    with closing(read_frames(as_browsers_show(info), count=1)) as frames:
        return as_jpeg(resized(next(frames)))


def write_fragments(
    path: Path, size: tuple[int, int], sounds: Sequence[Path], rate: Fraction = Fraction(FPS)
) -> Generator[None, "np.ndarray", None]:
    """Write the frames sent to this generator, with the sounds mixed, to an MP4 file that can be played while it grows.

    size: (width, height) of the frames, uint8 (height, width, 3) RGB; rate: of them a second. Start it with next();
    close it at the end.
    """
    mixing, heard = [], "1:a:0"
    if len(sounds) > 1:
        inputs, heard = "".join(f"[{number}:a:0]" for number, _ in enumerate(sounds, 1)), "[mixed]"
        mixing = ["-filter_complex", f"{inputs}amix=inputs={len(sounds)}:normalize=0{heard}"]
    arguments = [
        *("-loglevel", "error", "-nostats", "-y", "-f", "rawvideo", "-pixel_format", "rgb24"),
        *("-video_size", f"{size[0]}x{size[1]}", "-framerate", str(rate), "-i", "pipe:0"),
        *(option for sound in sounds for option in input_arguments(sound)),
        *mixing,
        # Browsers guess what is not said.
        *("-vf", f"scale=out_color_matrix=bt709:out_range=tv,{BT709}"),
        *("-map", "0:v:0", "-map", heard, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-preset", "ultrafast"),
        *(
            "-crf",
            "23",
            "-g",
            str(round(rate)),
            "-c:a",
            "aac",
            "-shortest",
            "-map_metadata",
            "-1",
            "-map_chapters",
            "-1",
        ),
        *("-movflags", "+frag_keyframe+empty_moov+default_base_moof", "-flush_packets", "1"),
        *("-f", "mp4", file_url(path)),
    ]
    with run_ffmpeg(arguments, stdin=subprocess.PIPE) as (process, _), Watchdog(process) as watchdog:
        try:
            while True:
                frame = yield
                watchdog.write(frame.data.cast("B"))
        except BrokenPipeError:  # the sound has ended, and ffmpeg with it
            while True:
                yield
        finally:
            with suppress(OSError, subprocess.TimeoutExpired):
                open_pipe(process.stdin).close()
                process.wait(CLOSE_TIMEOUT)


class Preview:
    """Makes previews of a job from its finished frames, in a thread: pictures, and a video of the first seconds.

    The run never waits for it. Frames that it is too slow to take are dropped, and the next one is repeated in their
    place in the video.
    """

    def __init__(self, job: "Job"):
        self._job = job
        self._frames_in_video = round(PREVIEW_SECONDS * job.rate)
        self._frames = 0
        self._next_picture = 0.0  # time of the monotonic clock
        # (frame, number of the frame in the video from 1, or 0 if it is not in it, whether to make a picture of it)
        self._queue: queue.Queue[tuple[np.ndarray, int, bool] | None] = queue.Queue(2 * round(job.rate))
        self._thread = threading.Thread(target=self._run, name="preview", daemon=True)
        self._thread.start()

    def __call__(self, frame: "np.ndarray") -> None:
        """Queue a frame, uint8 (H, W, 3), if the preview needs it; never blocks."""
        self._frames += 1
        now = time.monotonic()
        # A resumed run does not produce the first seconds.
        in_video = not self._job.resumed_from and self._frames <= self._frames_in_video
        as_picture = now >= self._next_picture
        if as_picture:
            self._next_picture = now + PICTURE_INTERVAL
        if in_video or as_picture:
            with suppress(queue.Full):
                self._queue.put_nowait((frame, self._frames if in_video else 0, as_picture))

    def close(self) -> None:
        """End the thread; an encoder that hangs is left behind after CLOSE_TIMEOUT."""
        while True:
            with suppress(queue.Full):
                self._queue.put_nowait(None)
                break
            with suppress(queue.Empty):
                self._queue.get_nowait()
        self._thread.join(CLOSE_TIMEOUT)

    def _run(self) -> None:
        items = iter(self._queue.get, None)  # ends at the None of `close`
        try:
            self._encode(items)
        except Exception:  # the job goes on without a preview
            log.exception("The preview failed:")
            for _ in items:  # hold no more frames
                pass

    def _encode(self, items: Iterable[tuple["np.ndarray", int, bool]]) -> None:
        import cv2

        job, writer, written, size = self._job, None, 0, None
        with ExitStack() as stack:
            for frame, number, as_picture in items:
                if size is None:
                    size = scaled_size(frame.shape[1], frame.shape[0], PREVIEW_SIDE)
                small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
                if number:
                    if writer is None:
                        writer = stack.enter_context(
                            closing(write_fragments(job.first, size, job.request.heard, job.rate))
                        )
                        next(writer)
                    while written < number:
                        writer.send(small)
                        written += 1
                    # ffmpeg writes a fragment when the next one begins, and the encoder buffers frames.
                    complete = written == self._frames_in_video
                    job.playable = PREVIEW_SECONDS if complete else max(0, int(written / job.rate) - 1)
                    if complete:
                        writer.close()
                if as_picture:
                    job.picture = preview_picture(small)
                    job.pictures += 1
