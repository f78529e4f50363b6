"""How fast this machine was in earlier jobs, to estimate how long a job will take."""

import json
import math
import threading
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from latentsync.paths import replacing
from latentsync.settings import Settings

if TYPE_CHECKING:
    from optim.serving.job import Request
    from optim.serving.machine import Machine


KEPT = 5  # of the newest jobs with the same work, from which an estimate is made
# The time of a job varies: by that much around a single earlier one, and around one with other settings.
SINGLE_SPREAD, SCALED_SPREAD = 1.3, 2.0


class Estimate(NamedTuple):
    """The time that a job will take, in seconds: the most probable, and the range it will lie in."""

    seconds: float
    low: float
    high: float


class Speeds:
    """Seconds a frame of the last jobs, by a key for model and device and by the work of a frame, in a JSON file.

    Any thread may use it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.jobs = 0  # that were recorded by this process
        self._lock = threading.Lock()
        self._seconds: dict[str, dict[str, list[float]]] = {}
        with suppress(OSError, ValueError, RecursionError):
            self._seconds = _valid_entries(json.loads(path.read_text(encoding="utf-8")))

    @staticmethod
    def work(settings: Settings) -> float:
        """The work of denoising a frame, in full unguided passes; a shallow one takes a ninth (docs/speed.md)."""
        sides = 2 if settings.guidance_scale > 1 else 1
        if settings.cache is None or settings.cache.interval < 2:
            return sides * settings.steps
        full = math.ceil(settings.steps / settings.cache.interval)
        return sides * full + (settings.steps - full) / 9 * (sides if settings.cache.guided else 1)

    def estimate(self, key: str, settings: Settings, frames: int) -> Estimate | None:
        """The time for a number of frames, scaled by the work from the nearest recorded settings; None without any."""
        with self._lock:
            jobs = {float(work): list(values) for work, values in self._seconds.get(key, {}).items()}
        if not jobs:
            return None
        work = round(self.work(settings), 2)
        nearest = min(jobs, key=lambda other: abs(math.log(other / work)))
        values = [frames * value * work / nearest for value in jobs[nearest]]
        spread = SCALED_SPREAD if nearest != work else SINGLE_SPREAD if len(values) < 3 else 1.0
        return Estimate(median(values), min(values) / spread, max(values) * spread)

    def record(self, key: str, settings: Settings, frames: int, seconds: float) -> None:
        """Record a job; the oldest beyond KEPT of the same work goes. A full disk costs the file, not the job."""
        with self._lock, suppress(OSError):
            self.jobs += 1
            values = self._seconds.setdefault(key, {}).setdefault(str(round(self.work(settings), 2)), [])
            values[:] = [*values, seconds / frames][-KEPT:]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as partial:
                partial.write_text(json.dumps(self._seconds, indent=1), encoding="utf-8")


def _valid_entries(content: object) -> dict[str, dict[str, list[float]]]:
    """The entries of a file's content that are speeds: by key, positive numbers by positive numbers as text.

    Earlier versions saved one number in place of a list.
    """
    valid: dict[str, dict[str, list[float]]] = {}
    for key, speeds in content.items() if isinstance(content, dict) else ():
        for work, values in speeds.items() if isinstance(speeds, dict) else ():
            values = values if isinstance(values, list) else [values]
            with suppress(ValueError):
                if values and 0 < float(work) < math.inf and all(map(_is_speed, values)):
                    valid.setdefault(key, {})[work] = values[-KEPT:]
    return valid


def _is_speed(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf  # type: ignore[operator]


def speed_key(model: str, machine: "Machine", request: "Request", gpus: int = 1) -> str:
    """The key in `Speeds` for a model, by name, on a machine; gpus: that a job has there.

    A restorer's work does not depend on the model's.
    """
    several, restored = f", {gpus} of them" if machine.gpus > 1 else "", ", restored" if request.restore else ""
    return f"{model}, {machine.device_name}{several}{restored}"
