"""Waiting for an ffmpeg that writes, without waiting for ever: an encoder may be stopped, or its disk not answer."""

import subprocess
import threading
import time
from collections.abc import Callable

import psutil

STALL_SECONDS = 60.0  # in which a process that is waited for does nothing at all
POLL = 0.1  # seconds between two looks at the process, and between two calls of `on_wait`
LEAST_WORK = 0.05  # seconds of processor time that count as work; an idle ffmpeg takes some for its clock

OnWait = Callable[[], None]


class Watchdog:
    """Kill ffmpeg where it stands still while something waits for it, or when `cancel` is set; for a `with` block.

    Standing still means STALL_SECONDS without using the processor or moving a byte, so that a slow machine or a slow
    disk is no reason. Nothing is watched between two waits.
    """

    def __init__(self, process: subprocess.Popen, cancel: threading.Event | None = None):
        self.stalled: float | None = None  # seconds that ffmpeg stood still, after which it was killed
        self._process, self._cancel = process, cancel
        self._since: float | None = None  # when the present wait began
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ffmpeg watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()

    def write(self, data: memoryview) -> None:
        """Write bytes to ffmpeg's input, which is a pipe. Raises OSError where ffmpeg ends meanwhile."""
        self._since = time.monotonic()
        try:
            while data:
                data = data[self._process.stdin.write(data) :]
        finally:
            self._since = None

    def wait(self, on_wait: OnWait | None = None) -> int:
        """Wait for the end of ffmpeg, and return its exit status.

        on_wait() is called every POLL seconds; what it raises comes out of here, and ffmpeg is left running.
        """
        self._since = time.monotonic()
        try:
            while True:
                try:
                    return self._process.wait(POLL)
                except subprocess.TimeoutExpired:
                    if on_wait:
                        on_wait()
        finally:
            self._since = None

    def _watch(self) -> None:
        work, changed = _work(self._process.pid), time.monotonic()
        while not self._ended.wait(POLL):
            if self._cancel is not None and self._cancel.is_set():
                return self._process.kill()
            since, now = self._since, time.monotonic()
            if since is None or now - since < POLL:  # a wait that has just begun
                changed = now
                continue
            latest = _work(self._process.pid)
            if latest is None or work is None or latest[0] - work[0] >= LEAST_WORK or latest[1] != work[1]:
                work, changed = latest, now
            elif now - max(since, changed) > STALL_SECONDS:
                self.stalled = STALL_SECONDS
                return self._process.kill()


def _work(pid: int) -> tuple[float, int] | None:
    """What a process has done so far: seconds of processor time, bytes read and written; None where it has ended."""
    try:
        process = psutil.Process(pid)
        spent = process.cpu_times()
        seconds = spent.user + spent.system
        try:
            moved = process.io_counters()
        except (AttributeError, psutil.AccessDenied):  # macOS does not count them, some containers do not tell
            return seconds, 0
        # Where the system counts what goes through pipes and the disk's cache, too, that is what counts.
        return seconds, sum(moved[2:])
    except psutil.Error:
        return None
