"""What can be seen of a video that was given, and of a job's result before it is done."""

import queue
import subprocess
import threading
import time
import traceback
from collections.abc import Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentsync import FPS
from latentsync.media import VideoInfo, read_frames
from latentsync.media.process import file_url, input_arguments, run_ffmpeg
from latentsync.media.watchdog import Watchdog

if TYPE_CHECKING:
    import numpy as np

    from optim.serving.job import Job

PREVIEW_SECONDS = 10  # of the result that can be played before it is done
PREVIEW_PIXELS = 480  # the shorter side of what is shown, at most
PICTURE_INTERVAL = 1.0  # seconds between two preview pictures
STUCK_SECONDS = 10.0  # that a run waits for the preview at its end, and no longer


def preview_size(width: int, height: int) -> tuple[int, int]:
    """Even sides of a preview of a picture."""
    scale = min(1.0, PREVIEW_PIXELS / min(height, width))
    return 2 * max(1, round(width * scale / 2)), 2 * max(1, round(height * scale / 2))


def as_jpeg(frame: "np.ndarray") -> bytes:
    """A frame, uint8 (h, w, 3) RGB, as a JPEG file."""
    import cv2

    return cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()


def first_picture(info: VideoInfo) -> bytes:
    """The first frame of a video, small, as a JPEG file. Raises UserError where none can be decoded."""
    import cv2

    with closing(read_frames(info, count=1)) as frames:
        frame = next(frames)
    return as_jpeg(cv2.resize(frame, preview_size(info.width, info.height), interpolation=cv2.INTER_AREA))


def write_fragments(path: Path, size: tuple[int, int], audio: Path) -> Generator[None, "np.ndarray", None]:
    """Write the frames that are sent, with the sound, to an MP4 file that is playable while it grows.

    size: (width, height) of the frames, uint8 (height, width, 3) RGB. Send None first; close it at the end.
    """
    arguments = [
        *("-loglevel", "error", "-nostats", "-y", "-f", "rawvideo", "-pixel_format", "rgb24"),
        *("-video_size", f"{size[0]}x{size[1]}", "-framerate", str(FPS), "-i", "pipe:0", *input_arguments(audio)),
        *("-map", "0:v:0", "-map", "1:a:0", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-preset", "ultrafast"),
        *("-crf", "23", "-g", str(FPS), "-c:a", "aac", "-shortest", "-map_metadata", "-1", "-map_chapters", "-1"),
        *("-movflags", "+frag_keyframe+empty_moov+default_base_moof", "-flush_packets", "1"),
        *("-f", "mp4", file_url(path)),
    ]
    with run_ffmpeg(arguments, stdin=subprocess.PIPE) as (process, _), Watchdog(process) as watchdog:
        try:
            while True:
                watchdog.write(memoryview((yield)).cast("B"))
        except BrokenPipeError:  # the sound has ended, and with it the video
            while True:
                yield
        finally:
            with suppress(OSError, subprocess.TimeoutExpired):
                process.stdin.close()
                process.wait(STUCK_SECONDS)


class Preview:
    """Looks at finished frames in a thread of its own: a picture now and then, and the first seconds as a video.

    The video is in fragments, each playable as soon as it is there. Where it cannot keep up, the run does not wait: a
    frame stands for those after it that were left out.
    """

    def __init__(self, job: "Job"):
        self._job = job
        self._taken = 0
        self._due = 0.0
        self._given: queue.Queue = queue.Queue(2 * FPS)
        self._thread = threading.Thread(target=self._work, name="preview", daemon=True)
        self._thread.start()

    def __call__(self, frame: "np.ndarray") -> None:
        """Take a frame, if it is wanted; costs the run no more than that. frame: uint8 (H, W, 3)."""
        self._taken += 1
        now = time.monotonic()
        # Of a run that resumes, the first seconds do not come here.
        in_video = not self._job.resumed_from and self._taken <= PREVIEW_SECONDS * FPS
        in_picture = now >= self._due
        if in_picture:
            self._due = now + PICTURE_INTERVAL
        if in_video or in_picture:
            with suppress(queue.Full):
                self._given.put_nowait((frame, self._taken if in_video else 0, in_picture))

    def close(self) -> None:
        """End it; an encoder that is stuck is left behind after STUCK_SECONDS."""
        while True:
            with suppress(queue.Full):
                self._given.put_nowait(None)
                break
            with suppress(queue.Empty):
                self._given.get_nowait()
        self._thread.join(STUCK_SECONDS)

    def _work(self) -> None:
        writer = None
        try:
            writer = self._show()
        except Exception:  # whatever a preview cannot do, the job can
            traceback.print_exc()
            while self._given.get() is not None:
                pass
        finally:
            if writer is not None:
                writer.close()

    def _show(self) -> Any:
        import cv2

        job, writer, written = self._job, None, 0
        size = None
        while (item := self._given.get()) is not None:
            frame, number, in_picture = item  # from 1, of those in the video; 0: not in it
            if size is None:
                size = preview_size(frame.shape[1], frame.shape[0])
            small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
            if number:
                if writer is None:
                    writer = write_fragments(job.first, size, job.request.audio)
                    writer.send(None)
                while written < number:
                    writer.send(small)
                    written += 1
                # A fragment is written when the next one begins, and the encoder looks ahead.
                job.playable = max(0, written // FPS - 1) if written < PREVIEW_SECONDS * FPS else PREVIEW_SECONDS
                if written == PREVIEW_SECONDS * FPS:
                    writer.close()
            if in_picture:
                job.picture, job.pictures = as_jpeg(small), job.pictures + 1
        return writer
