"""Watches the machine while it works: a few numbers, a few times a second, in a ring."""

import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import pynvml

from latentsync.machine import available_memory, total_memory
from optim.hardware import ask, nvml_gpus, nvml_session

SLOWEST, FASTEST = 0.1, 10.0  # samples a second
GAP = float("nan")
MARKS = 1000  # the most that are kept
SERIES = 6  # numbers that a GPU adds to a sample


@dataclass(frozen=True)
class GpuHistory:
    """One GPU over time. The arrays are float64 (n,), as long as the history's time; NaN where there is a gap."""

    index: int  # NVML's
    name: str
    memory_total: int  # bytes; 0 where it is not known
    utilization: np.ndarray  # percent of the time in which a kernel ran
    memory_used: np.ndarray  # bytes, of all processes
    power: np.ndarray  # W
    temperature: np.ndarray  # °C
    sm_clock: np.ndarray  # MHz
    slowdowns: np.ndarray  # NVML's clock event reasons, bits


@dataclass(frozen=True)
class History:
    """What the ring holds. The arrays are float64 (n,), oldest first."""

    time: np.ndarray  # s since the monitor was made
    cpu: np.ndarray  # percent of all cores
    ram_used: np.ndarray  # bytes
    ram_total: int  # bytes
    gpus: tuple[GpuHistory, ...]
    marks: tuple[tuple[float, str], ...]  # (s since the monitor was made, text)

    def gpu(self, index: int) -> GpuHistory | None:
        """The GPU of NVML's number."""
        return next((gpu for gpu in self.gpus if gpu.index == index), None)


@dataclass(frozen=True)
class GpuProcess:
    """Another process that uses a GPU."""

    gpu: int  # NVML's index
    pid: int
    name: str  # "process 123" where it may not be asked
    memory: int | None  # bytes; None where the system does not tell (Windows)


class Monitor:
    """Samples CPU, RAM and every GPU that NVML shows from a thread of its own, between start and stop.

    With no NVML there are no GPUs in the history; a question that fails, for a lost GPU as for a card without a
    power meter, leaves a gap. Use as `with Monitor() as monitor:`.
    """

    def __init__(self, rate: float = 2.0, seconds: float = 600.0, nvml: Any = pynvml) -> None:
        """rate: samples a second, 0.1 to 10; seconds: how much is kept; nvml: pynvml, or what answers like it."""
        if not SLOWEST <= rate <= FASTEST:
            raise ValueError(f"{rate} samples a second: give {SLOWEST} to {FASTEST}")
        self._rate, self._nvml = rate, nvml
        self._began = time.monotonic()
        self._rows: deque[tuple[float, ...]] = deque(maxlen=max(2, round(rate * seconds)))
        self._marks: deque[tuple[float, str]] = deque(maxlen=MARKS)
        self._gpus: list[tuple[int, str, int]] = []  # index, name, memory
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)

    def start(self) -> "Monitor":
        """Begin; once a monitor, since a later start might find other GPUs. Raises RuntimeError."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End sampling. Waits for the sample under way, but not for a driver that no longer answers."""
        self._stop.set()
        self._thread.join(timeout=5)

    def __enter__(self) -> "Monitor":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def mark(self, text: str) -> None:
        """Note that something begins now: a stage, a level, a step down."""
        with self._lock:
            self._marks.append((time.monotonic() - self._began, text))

    def snapshot(self, seconds: float | None = None) -> History:
        """A copy of what is held, or of its last seconds, for drawing; may be called at any time from any thread."""
        last = None if seconds is None else max(1, round(seconds * self._rate))
        with self._lock:
            rows, marks, gpus = list(self._rows), tuple(self._marks), list(self._gpus)
        rows = rows if last is None else rows[-last:]
        columns = np.array(rows, dtype=np.float64).reshape(len(rows), 3 + SERIES * len(gpus)).T.copy()
        histories = [GpuHistory(*gpu, *columns[3 + SERIES * i :][:SERIES]) for i, gpu in enumerate(gpus)]
        return History(*columns[:3], total_memory(), tuple(histories), marks)

    def _watch(self) -> None:
        with nvml_session(self._nvml) as nvml:
            handles = self._find_gpus(nvml)
            psutil.cpu_percent()  # the first call of a thread only sets its starting point
            due = time.monotonic()
            while True:
                due = max(due + 1 / self._rate, time.monotonic())
                if self._stop.wait(due - time.monotonic()):
                    return
                used = total_memory() - available_memory()
                row = [time.monotonic() - self._began, psutil.cpu_percent(), float(used)]
                for handle in handles:
                    row += read_series(nvml, handle)
                with self._lock:
                    self._rows.append(tuple(row))

    def _find_gpus(self, nvml: Any | None) -> list[Any]:
        handles, gpus = [], []
        for index, handle in nvml_gpus(nvml):
            memory = ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
            gpus.append((index, ask(nvml, "nvmlDeviceGetName", handle) or "GPU", memory.total if memory else 0))
            handles.append(handle)
        with self._lock:
            self._gpus = gpus
        return handles


def read_series(nvml: Any, handle: Any) -> tuple[float, float, float, float, float, float]:
    """One sample of the SERIES of a GPU, in GpuHistory's order and units; NaN for what is not answered."""
    load = ask(nvml, "nvmlDeviceGetUtilizationRates", handle)
    memory = ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    power = ask(nvml, "nvmlDeviceGetPowerUsage", handle)  # mW
    heat = ask(nvml, "nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU)
    clock = ask(nvml, "nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM)
    reasons = read_slowdowns(nvml, handle)
    return (
        GAP if load is None else float(load.gpu),
        GAP if memory is None else float(memory.used),
        GAP if power is None else power / 1000,
        GAP if heat is None else float(heat),
        GAP if clock is None else float(clock),
        GAP if reasons is None else float(reasons),
    )


def read_slowdowns(nvml: Any, handle: Any) -> int | None:
    """Why the clocks are below their most, as NVML's bits; drivers before 535 know them by the older name."""
    reasons = ask(nvml, "nvmlDeviceGetCurrentClocksEventReasons", handle)
    return ask(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", handle) if reasons is None else reasons


def other_processes(nvml: Any = pynvml) -> list[GpuProcess]:
    """The processes besides this one that hold a GPU, largest first; empty where NVML cannot be read."""
    found: dict[tuple[int, int], GpuProcess] = {}
    with nvml_session(nvml) as session:
        for index, handle in nvml_gpus(session):
            for kind in ("Compute", "Graphics"):
                for process in ask(session, f"nvmlDeviceGet{kind}RunningProcesses", handle) or ():
                    known = found.get((index, process.pid))
                    if process.pid != os.getpid() and (known is None or known.memory is None):
                        found[index, process.pid] = GpuProcess(
                            index, process.pid, _name(process.pid), process.usedGpuMemory
                        )
    return sorted(found.values(), key=lambda process: -(process.memory or 0))


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except (psutil.Error, ValueError):  # another user's, another container's, or gone by now
        return f"process {pid}"
