"""How fast this machine has been, so that a page can say how long a job will take."""

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to load
    from latentsync.checkpoints.find import Checkpoint
    from latentsync.settings import Settings
    from optim.serving.machine import Machine


class Speeds:
    """How fast this machine has been, in a small file: seconds a frame by model, device and what a frame costs."""

    def __init__(self, path: Path):
        self.path = path
        self.jobs = 0  # that were measured since
        self._known: dict[str, dict[str, float]] = {}
        with suppress(OSError, ValueError, RecursionError):
            self._known = _checked(json.loads(path.read_text(encoding="utf-8")))

    @staticmethod
    def work(settings: "Settings") -> float:
        """What denoising a frame costs, in full unguided passes; shallow ones take a ninth (docs/speed.md)."""
        sides = 2 if settings.guidance_scale > 1 else 1
        if settings.cache is None or settings.cache.interval < 2:
            return sides * settings.steps
        full = math.ceil(settings.steps / settings.cache.interval)
        return sides * full + (settings.steps - full) / 9 * (sides if settings.cache.guided else 1)

    def estimate(self, place: str, settings: "Settings", frames: int) -> tuple[float, bool] | None:
        """Seconds for so many frames, and whether that was measured with these settings; None where nothing was.

        With other settings, the time is scaled by the work of the nearest that were.
        """
        known = {float(work): seconds for work, seconds in self._known.get(place, {}).items()}
        if not known:
            return None
        work = round(self.work(settings), 2)
        nearest = min(known, key=lambda other: abs(math.log(other / work)))
        return frames * known[nearest] * work / nearest, nearest == work

    def record(self, place: str, settings: "Settings", frames: int, seconds: float) -> None:
        """Remember a job; the newest of its kind counts."""
        self.jobs += 1
        self._known.setdefault(place, {})[str(round(self.work(settings), 2))] = seconds / frames
        with suppress(OSError):  # a full disk costs the memory, not the job
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self._known, indent=1), encoding="utf-8")
            os.replace(partial, self.path)


def _checked(read: object) -> dict[str, dict[str, float]]:
    """What of a file's content are speeds: by place, a positive number by a positive number in text."""
    known: dict[str, dict[str, float]] = {}
    for place, speeds in read.items() if isinstance(read, dict) else ():
        for work, seconds in speeds.items() if isinstance(speeds, dict) else ():
            with suppress(ValueError):
                if type(seconds) in (int, float) and 0 < seconds < math.inf and 0 < float(work) < math.inf:
                    known.setdefault(place, {})[work] = seconds
    return known


def speed_key(checkpoint: "Checkpoint", machine: "Machine") -> str:
    """What a speed is filed under."""
    return f"{checkpoint.name}, {machine.device_name}"
