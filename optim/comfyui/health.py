"""The state of the GPUs and the advice of the doctor, as text for a node."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pynvml

from optim.doctor import advise, read_facts
from optim.hardware import GIB, nvml_gpus, nvml_session, query
from optim.monitor import read_series


def health_text(output_folder: Path, nvml: Any = pynvml) -> str:
    """One line a GPU, then one a piece of advice. nvml: the pynvml module or a substitute."""
    with nvml_session(nvml) as session:
        lines = [gpu_line(session, handle) for _, handle in nvml_gpus(session)]
    facts = read_facts(output_folder=output_folder if output_folder.is_dir() else None, nvml=nvml)
    advice = [f"{one.severity}: {one.problem} {one.remedy}" for one in advise(facts)]
    return "\n".join([*(lines or ["no NVIDIA GPU"]), *(advice or ["nothing to improve"])])


def gpu_line(nvml: Any, handle: Any) -> str:
    """Name and current figures of a GPU; those that the card does not report are left out."""
    return ", ".join([query(nvml, "nvmlDeviceGetName", handle) or "GPU", *_figures(nvml, handle)])


def _figures(nvml: Any, handle: Any) -> Iterator[str]:
    busy, used, power, temperature, clock, _ = read_series(nvml, handle)
    memory = query(nvml, "nvmlDeviceGetMemoryInfo", handle)
    if memory is not None and not math.isnan(used):
        yield f"{used / GIB:.1f} of {memory.total / GIB:.1f} GB in use"
    for value, text in (busy, "{:.0f} % busy"), (power, "{:.0f} W"), (temperature, "{:.0f} °C"), (clock, "{:.0f} MHz"):
        if not math.isnan(value):
            yield text.format(value)
