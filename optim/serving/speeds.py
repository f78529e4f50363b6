"""How fast this machine was in earlier jobs, to estimate how long a job will take."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from latentsync.paths import replacing
from latentsync.settings import Settings

if TYPE_CHECKING:
    from optim.serving.machine import Machine


class Estimate(NamedTuple):
    """The time that a job will take."""

    seconds: float
    measured: bool  # with these settings, not scaled from others


class Speeds:
    """Seconds a frame, by a key for model and device and by the work that a frame takes, in a small JSON file."""

    def __init__(self, path: Path):
        self.path = path
        self.jobs = 0  # that were recorded by this process
        self._seconds: dict[str, dict[str, float]] = {}
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
        seconds = {float(work): value for work, value in self._seconds.get(key, {}).items()}
        if not seconds:
            return None
        work = round(self.work(settings), 2)
        nearest = min(seconds, key=lambda other: abs(math.log(other / work)))
        return Estimate(frames * seconds[nearest] * work / nearest, measured=nearest == work)

    def record(self, key: str, settings: Settings, frames: int, seconds: float) -> None:
        """Record a job; it replaces an earlier one of the same work. A full disk costs the file, not the job."""
        self.jobs += 1
        self._seconds.setdefault(key, {})[str(round(self.work(settings), 2))] = seconds / frames
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as partial:
                partial.write_text(json.dumps(self._seconds, indent=1), encoding="utf-8")


def _valid_entries(content: object) -> dict[str, dict[str, float]]:
    """The entries of a file's content that are speeds: by key, positive numbers by positive numbers as text."""
    valid: dict[str, dict[str, float]] = {}
    for key, speeds in content.items() if isinstance(content, dict) else ():
        for work, seconds in speeds.items() if isinstance(speeds, dict) else ():
            with suppress(ValueError):
                if type(seconds) in (int, float) and 0 < seconds < math.inf and 0 < float(work) < math.inf:
                    valid.setdefault(key, {})[work] = seconds
    return valid


def speed_key(model: str, machine: "Machine") -> str:
    """The key in `Speeds` for a model, by name, on a machine."""
    return f"{model}, {machine.device_name}"
