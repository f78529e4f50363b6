"""The machine's curves as a page draws them: lists of numbers from the monitor's samples."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imports NumPy, which takes a while
    from optim.monitor import GpuHistory, History

TIMELINE_POINTS = 300
NO_CURVES: dict[str, Any] = {"time": [], "curves": {}, "marks": [], "memory": {}, "sensors": {}}


def curves_of(history: "History") -> dict[str, list[float | None]]:
    """The curves by name, in percent: use and memory of each GPU, or else of the processor."""
    columns: dict[str, Any] = {}
    for gpu in history.gpus:
        name = gpu_label(history, gpu.index)
        columns[name] = gpu.utilization
        columns[f"{name} memory"] = 100 * gpu.memory_used / (gpu.memory_total or math.nan)
    if not history.gpus:
        columns = {"CPU": history.cpu, "Memory": 100 * history.ram_used / history.ram_total}
    return {
        name: [None if math.isnan(value) else round(float(value), 1) for value in values]
        for name, values in columns.items()
    }


def gpu_label(history: "History", index: int) -> str:
    return "GPU" if len(history.gpus) == 1 else f"GPU {index}"


def curves_since(history: "History", since: float = 0.0) -> dict[str, Any]:
    """The samples after the time `since`, in seconds of the monitor, with all marks.

    sensors: of each GPU now, power in W, temperature in °C and clock in MHz; None where it has no such meter.
    """
    new = int((history.time.round(2) <= since).sum())  # rounded as the page gets them
    begin = history.time[0] if len(history.time) else 0.0
    sizes = {gpu_label(history, gpu.index): gpu.memory_total for gpu in history.gpus}
    return {
        "time": [round(float(t), 2) for t in history.time[new:]],
        "curves": {name: values[new:] for name, values in curves_of(history).items()},
        "marks": [(round(t, 1), text) for t, text in history.marks if t >= begin],
        "memory": sizes or {"Memory": history.ram_total},
        "sensors": {gpu_label(history, gpu.index): sensors_of(gpu) for gpu in history.gpus},
    }


def sensors_of(gpu: "GpuHistory") -> list[int | None]:
    """Power in W, temperature in °C and clock in MHz of a GPU's newest sample."""
    newest = (values[-1] if len(values) else math.nan for values in (gpu.power, gpu.temperature, gpu.sm_clock))
    return [None if math.isnan(value) else round(float(value)) for value in newest]


def last_seconds(history: "History", seconds: float) -> "History | None":
    """The end of a history; None if it has no sample."""
    if not len(history.time):
        return None
    recent = history.time >= history.time[-1] - seconds
    gpus = tuple(
        replace(gpu, **{name: value[recent] for name, value in vars(gpu).items() if hasattr(value, "dtype")})
        for gpu in history.gpus
    )
    columns = {name: getattr(history, name)[recent] for name in ("time", "cpu", "ram_used")}
    return replace(history, **columns, gpus=gpus)


def thinned_curves(history: "History", seconds: float) -> dict[str, Any]:
    """The curves of a history with TIMELINE_POINTS points at most, and times from `seconds` before its end."""
    every = max(1, math.ceil(len(history.time) / TIMELINE_POINTS))
    start = history.time[-1] - seconds
    return {
        "time": [round(float(t - start), 1) for t in history.time[::every]],
        "curves": {name: values[::every] for name, values in curves_of(history).items()},
    }
