"""For scripts of tests: a process that ends itself in the middle of a job."""

import os
import signal
from functools import partial

from latentsync import pipeline
from latentsync.media import VideoWriter


def write_in_segments(frames: int) -> None:
    """Let the jobs of this process be written in segments of so many frames."""
    pipeline.lipsync = partial(pipeline.lipsync, segment_frames=frames)


def kill_at(frames: int) -> None:
    """SIGKILL this process when so many frames are to be written."""
    write, written = VideoWriter.write, []

    def killing(self, frame):
        written.append(0)
        if len(written) == frames:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, frame)

    VideoWriter.write = killing
