"""Samples the load of processor, memory and GPUs a few times a second, into a ring buffer."""

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
from optim.hardware import nvml_gpus, nvml_session, query

MIN_RATE, MAX_RATE = 0.1, 10.0  # samples a second
GAP = float("nan")
MAX_MARKS = 1000
SERIES = 6  # numbers per GPU in a sample: the arrays of GpuHistory


@dataclass(frozen=True)
class GpuHistory:
    """One GPU over time. The arrays are float64 (n,), as long as the history's time; NaN is a gap."""

    index: int  # NVML's
    name: str
    memory_total: int  # bytes; 0: unknown
    utilization: np.ndarray  # percent of the time in which a kernel ran
    memory_used: np.ndarray  # bytes, of all processes
    power: np.ndarray  # W
    temperature: np.ndarray  # °C
    sm_clock: np.ndarray  # MHz
    slowdowns: np.ndarray  # NVML's clock event reasons, bits


@dataclass(frozen=True)
class History:
    """The samples of the ring buffer. The arrays are float64 (n,), oldest first."""

    time: np.ndarray  # s since the monitor was created
    cpu: np.ndarray  # percent of all cores
    ram_used: np.ndarray  # bytes
    ram_total: int  # bytes
    gpus: tuple[GpuHistory, ...]
    marks: tuple[tuple[float, str], ...]  # (s since the monitor was created, text)

    def gpu(self, index: int) -> GpuHistory | None:
        """The GPU with this NVML index."""
        return next((gpu for gpu in self.gpus if gpu.index == index), None)


@dataclass(frozen=True)
class GpuProcess:
    """Another process that uses a GPU."""

    gpu: int  # NVML's index
    pid: int
    name: str  # "process 123" where it cannot be read
    memory: int | None  # bytes; None where the system does not say (Windows)


class Monitor:
    """Samples CPU, RAM and all GPUs of NVML in a thread, between start and stop.

    Without NVML the history has no GPUs; a query that fails, for a lost GPU or a card without a power meter, leaves a
    gap. Use as `with Monitor() as monitor:`.
    """

    def __init__(self, rate: float = 2.0, seconds: float = 600.0, nvml: Any = pynvml) -> None:
        """rate: samples a second, 0.1 to 10; seconds: length of the history; nvml: pynvml or a substitute."""
        if not MIN_RATE <= rate <= MAX_RATE:
            raise ValueError(f"{rate} samples a second: give {MIN_RATE} to {MAX_RATE}")
        self._rate, self._nvml = rate, nvml
        self._started = time.monotonic()
        self._rows: deque[tuple[float, ...]] = deque(maxlen=max(2, round(rate * seconds)))
        self._marks: deque[tuple[float, str]] = deque(maxlen=MAX_MARKS)
        self._gpus: list[tuple[int, str, int]] = []  # index, name, memory
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="monitor", daemon=True)

    def start(self) -> "Monitor":
        """Start sampling. A second start raises RuntimeError, since there might be other GPUs by then."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop sampling. Waits for the current sample, but not for a driver that does not respond."""
        self._stop.set()
        self._thread.join(timeout=5)

    def __enter__(self) -> "Monitor":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def mark(self, text: str) -> None:
        """Mark the beginning of a stage, a level or a step down."""
        with self._lock:
            self._marks.append((time.monotonic() - self._started, text))

    def snapshot(self, seconds: float | None = None) -> History:
        """A copy of the history, or of its last seconds; may be called at any time from any thread."""
        last = None if seconds is None else max(1, round(seconds * self._rate))
        with self._lock:
            rows, marks, gpus = list(self._rows), tuple(self._marks), list(self._gpus)
        rows = rows if last is None else rows[-last:]
        columns = np.array(rows, dtype=np.float64).reshape(len(rows), 3 + SERIES * len(gpus)).T.copy()
        seconds_since_start, cpu, ram_used = columns[:3]
        histories = [GpuHistory(*gpu, *columns[3 + SERIES * i :][:SERIES]) for i, gpu in enumerate(gpus)]
        return History(seconds_since_start, cpu, ram_used, total_memory(), tuple(histories), marks)

    def _sample(self) -> None:
        with nvml_session(self._nvml) as nvml:
            handles = self._find_gpus(nvml)
            psutil.cpu_percent()  # the first call in a thread only sets the reference point
            due = time.monotonic()
            while True:
                due = max(due + 1 / self._rate, time.monotonic())
                if self._stop.wait(due - time.monotonic()):
                    return
                used = total_memory() - available_memory()
                row = [time.monotonic() - self._started, psutil.cpu_percent(), float(used)]
                for handle in handles:
                    row += read_series(nvml, handle)
                with self._lock:
                    self._rows.append(tuple(row))

    def _find_gpus(self, nvml: Any | None) -> list[Any]:
        handles, gpus = [], []
        for index, handle in nvml_gpus(nvml):
            memory = query(nvml, "nvmlDeviceGetMemoryInfo", handle)
            gpus.append((index, query(nvml, "nvmlDeviceGetName", handle) or "GPU", memory.total if memory else 0))
            handles.append(handle)
        with self._lock:
            self._gpus = gpus
        return handles


def read_series(nvml: Any, handle: Any) -> tuple[float, float, float, float, float, float]:
    """One sample of a GPU, in GpuHistory's order and units; NaN where the query failed."""
    load = query(nvml, "nvmlDeviceGetUtilizationRates", handle)
    memory = query(nvml, "nvmlDeviceGetMemoryInfo", handle)
    power = query(nvml, "nvmlDeviceGetPowerUsage", handle)  # mW
    temperature = query(nvml, "nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU)
    clock = query(nvml, "nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM)
    reasons = read_slowdowns(nvml, handle)
    return (
        GAP if load is None else float(load.gpu),
        GAP if memory is None else float(memory.used),
        GAP if power is None else power / 1000,
        GAP if temperature is None else float(temperature),
        GAP if clock is None else float(clock),
        GAP if reasons is None else float(reasons),
    )


def read_slowdowns(nvml: Any, handle: Any) -> int | None:
    """Why the clocks are below their maximum, as NVML's bits; drivers before 535 have an older name for them."""
    reasons = query(nvml, "nvmlDeviceGetCurrentClocksEventReasons", handle)
    return query(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", handle) if reasons is None else reasons


def other_processes(nvml: Any = pynvml) -> list[GpuProcess]:
    """The other processes that use a GPU, largest first; empty where NVML cannot be used."""
    processes: dict[tuple[int, int], GpuProcess] = {}
    with nvml_session(nvml) as session:
        for index, handle in nvml_gpus(session):
            for kind in ("Compute", "Graphics"):
                for process in query(session, f"nvmlDeviceGet{kind}RunningProcesses", handle) or ():
                    pid, key = process.pid, (index, process.pid)
                    if pid != os.getpid() and (key not in processes or processes[key].memory is None):
                        processes[key] = GpuProcess(index, pid, _name(pid), process.usedGpuMemory)
    return sorted(processes.values(), key=lambda process: -(process.memory or 0))


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except (psutil.Error, ValueError):  # another user's, another container's, or ended
        return f"process {pid}"
