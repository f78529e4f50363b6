"""The machine's curves as a page draws them: lists of numbers, out of what the monitor has seen."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it imports NumPy, which takes its time
    from optim.monitor import History

TIMELINE_POINTS = 300
NO_CURVES: dict[str, Any] = {"time": [], "curves": {}, "marks": [], "memory": {}}


def curves(history: "History") -> dict[str, list[float | None]]:
    """The curves to draw, in percent, by what they are called: each GPU's use and memory, or the processor's."""
    found: dict[str, Any] = {}
    for gpu in history.gpus:
        name = "GPU" if len(history.gpus) == 1 else f"GPU {gpu.index}"
        found[name] = gpu.utilization
        found[f"{name} memory"] = 100 * gpu.memory_used / (gpu.memory_total or math.nan)
    if not history.gpus:
        found = {"CPU": history.cpu, "Memory": 100 * history.ram_used / history.ram_total}
    return {
        name: [None if math.isnan(value) else round(float(value), 1) for value in values]
        for name, values in found.items()
    }


def live(history: "History", since: float = 0.0) -> dict[str, Any]:
    """What there is after the time `since`, in seconds of the monitor, with all marks."""
    new = int((history.time.round(2) <= since).sum())  # rounded as it is given away
    begin = history.time[0] if len(history.time) else 0.0
    sizes = {f"GPU {gpu.index}" if len(history.gpus) > 1 else "GPU": gpu.memory_total for gpu in history.gpus}
    return {
        "time": [round(float(t), 2) for t in history.time[new:]],
        "curves": {name: values[new:] for name, values in curves(history).items()},
        "marks": [(round(t, 1), text) for t, text in history.marks if t >= begin],
        "memory": sizes or {"Memory": history.ram_total},
    }


def latest(history: "History", seconds: float) -> "History | None":
    """The last seconds of a history; None where it has no sample."""
    if not len(history.time):
        return None
    keep = history.time >= history.time[-1] - seconds
    gpus = tuple(
        replace(gpu, **{name: value[keep] for name, value in vars(gpu).items() if hasattr(value, "dtype")})
        for gpu in history.gpus
    )
    columns = {name: getattr(history, name)[keep] for name in ("time", "cpu", "ram_used")}
    return replace(history, **columns, gpus=gpus)


def thinned(history: "History", seconds: float) -> dict[str, Any]:
    """The curves of the last seconds, with no more than TIMELINE_POINTS points and times from their beginning."""
    every = max(1, math.ceil(len(history.time) / TIMELINE_POINTS))
    start = history.time[-1] - seconds
    return {
        "time": [round(float(t - start), 1) for t in history.time[::every]],
        "curves": {name: values[::every] for name, values in curves(history).items()},
    }
