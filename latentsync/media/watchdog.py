"""Wait for an ffmpeg that writes, but not for ever: it may have been stopped, or its disk may not answer."""

import subprocess
import threading
import time
from collections.abc import Callable

import psutil

from latentsync.media.process import Limits, open_pipe, read_log, run_ffmpeg

STALL_SECONDS = 60.0  # without any activity, after which a process counts as stalled
POLL = 0.1  # seconds between two checks of the process, and between two calls of `on_wait`
MIN_WORK = 0.05  # seconds of processor time that count as activity; an idle ffmpeg uses a little for its clock

OnWait = Callable[[], None]


class Watchdog:
    """Kill ffmpeg when it stalls while something waits for it, or when `cancel` is set; use it in a `with` block.

    A stall is STALL_SECONDS without using the processor or transferring a byte, so that a slow machine or disk is none.
    Between two waits the process is not watched.
    """

    def __init__(self, process: subprocess.Popen[bytes], cancel: threading.Event | None = None):
        self.stalled: float | None = None  # seconds of the stall for which ffmpeg was killed
        self._process, self._cancel = process, cancel
        self._since: float | None = None  # when the current wait began
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ffmpeg watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()

    def write(self, data: memoryview) -> None:
        """Write bytes to ffmpeg's stdin, a pipe. Raises OSError if ffmpeg ends meanwhile."""
        pipe = open_pipe(self._process.stdin)
        self._since = time.monotonic()
        try:
            while data:
                data = data[pipe.write(data) :]
        finally:
            self._since = None

    def wait(self, on_wait: OnWait | None = None) -> int:
        """Wait for the end of ffmpeg, and return its exit status.

        on_wait() is called every POLL seconds; its exceptions are passed on, and leave ffmpeg running.
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
        activity, changed = _activity(self._process.pid), time.monotonic()
        while not self._ended.wait(POLL):
            if self._cancel is not None and self._cancel.is_set():
                return self._process.kill()
            since, now = self._since, time.monotonic()
            if since is None or now - since < POLL:  # the wait has just begun
                changed = now
                continue
            latest = _activity(self._process.pid)
            if latest is None or activity is None or latest[0] - activity[0] >= MIN_WORK or latest[1] != activity[1]:
                activity, changed = latest, now
            elif now - max(since, changed) > STALL_SECONDS:
                self.stalled = STALL_SECONDS
                return self._process.kill()


def run_to_end(arguments: list[str], limits: Limits, on_wait: OnWait | None = None) -> str | None:
    """Run ffmpeg without pipes; returns its messages, or None if it fails or stalls. on_wait: as in `Watchdog.wait`."""
    with run_ffmpeg(arguments, limits=limits) as (process, log), Watchdog(process) as watchdog:
        return read_log(log) if watchdog.wait(on_wait) == 0 else None


def _activity(pid: int) -> tuple[float, int] | None:
    """Seconds of processor time and bytes read and written by a process so far; None if it has ended."""
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        seconds = times.user + times.system
        try:
            counters = process.io_counters()
        except (AttributeError, psutil.AccessDenied):  # not on macOS, and not allowed in some containers
            return seconds, 0
        # On Linux the last fields include bytes through pipes and the page cache, which the first do not.
        return seconds, sum(counters[2:])
    except psutil.Error:
        return None
