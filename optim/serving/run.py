"""What the run of one job needs besides the pipeline: its plan, its progress, how it is interrupted, what went wrong.

torch is imported by what is called, so that a page can be shown before.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentsync.media.segments import clock
from optim.serving.job import Job, Request

if TYPE_CHECKING:  # torch takes seconds to load
    import torch

    from latentsync.checkpoints.find import Checkpoint
    from latentsync.checkpoints.load import Models
    from optim.accelerate import Plan
    from optim.monitor import Monitor
    from optim.serving.jobs import Machine


class Cancelled(Exception):
    """Raised inside a run that is to end and leave nothing."""


@contextmanager
def interruptible(models: "Models", check: Callable[[], None]) -> Iterator[None]:
    """On a processor, ask `check` in the middle of passes too, which may take many seconds; what it raises ends them.

    On a GPU there is no need: the pipeline never runs far ahead of it. A compiled network is left alone.
    """
    from optim.compilation import is_compiled

    hooks = []
    if models.device.type == "cpu":
        for network in (models.vae, models.audio_encoder, *(() if is_compiled(models.unet) else (models.unet,))):
            for module in network.modules():
                hooks.append(module.register_forward_pre_hook(lambda *_: check()))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def make_plan(request: Request, model: "Checkpoint | Models", device: "torch.device") -> "Plan":
    """The plan for a request with a model on a device. Raises UserError."""
    from latentsync.settings import DeepCache, Settings
    from optim.accelerate import plan_for_device

    asked = Settings.suiting(
        model, request.guidance, steps=request.steps, seed=request.seed, crf=request.crf, face=request.face
    )
    overrides: dict[str, Any] = {"vram_fraction": request.vram_fraction, "compile": request.compile}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if request.cache != "level":
        overrides["cache"] = request.cache and DeepCache(request.cache, 0)
    return plan_for_device(device, model.resolution, asked, request.level, request.batch, **overrides)


def run_alone(request: Request, output: Path, model: str) -> dict[str, Any]:
    """All of a job in one call, for places that lend a GPU to one function at a time, in a process of its own.

    model: as on the command line. Returns the report. Nobody can follow it, or end it. Raises UserError.
    """
    from latentsync.checkpoints.find import resolve_model
    from latentsync.checkpoints.load import load_models
    from latentsync.options import choose_device
    from latentsync.pipeline import Hooks, lipsync
    from optim.accelerate import accelerate, oom_handler

    device = choose_device("auto")
    models = load_models(resolve_model(model, device), device)
    plan = make_plan(request, models, device)
    accelerate(models, plan, log)
    relieve = oom_handler(models, plan, log)
    # In one piece: no later job finds the segments of this one, as each has a folder of its own.
    hooks = Hooks(on_out_of_memory=relieve)
    report = lipsync(request.video, request.audio, output, models, plan.settings, hooks, segment_frames=None)
    return report.as_dict() | {"level": plan.level.name, "position": plan.level.position, "step_downs": []}


class Progress:
    """What the pipeline calls as it gets on: writes into the job, and ends the run when that is wished."""

    def __init__(self, job: Job, steps: int, monitor: "Monitor", check: Callable[[], None]):
        from latentsync.settings import WINDOW

        self._job, self._steps, self._monitor, self._check = job, steps, monitor, check
        self._window, self._stepped = WINDOW, 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._check()
        job, now = self._job, time.time()
        if not job.progress and stage == "mouths":  # before any face: what earlier runs have finished
            job.resumed_from = done
            job.messages.append(f"Resumed after {clock(done)} of {clock(total)}.")
        span = job.timeline["stages"].setdefault(stage, [now - job.started, 0.0])
        span[1] = now - job.started
        if stage not in job.progress:
            self._monitor.mark(stage)
        if stage == "mouths":
            job.doing = "painting mouths"
            # Between two frames it is a denoising step that calls. Decoding follows the last one.
            self._stepped = self._stepped + 1 if done == job.progress.get(stage, 0) else 0
            part = min(self._stepped / (self._steps + 1), 1.0) * self._window
            job.part = min(part, total - done)
        elif stage == "faces" and "mouths" not in job.progress:
            job.doing = "finding faces"
        job.progress[stage] = done


def out_of_memory(machine: "Machine", ran: "Checkpoint | None") -> tuple[str, dict | None]:
    """The sentence for a run that the memory was not enough for, and what to try next; ran: with which model.

    All that a level can give up has been given up by then.
    """
    sentence = f"The memory of {machine.device_name} is not enough for this, even in the smallest pieces: "
    smaller = [m for m in machine.models if m["present"] and ran and m["resolution"] < ran.resolution]
    if not smaller:
        return sentence + "close other programs that use it.", None
    name = max(smaller, key=lambda model: model["resolution"])["name"]
    remedy = {"label": f"Run again with {name}", "settings": {"model": name}}
    return sentence + "close other programs that use it, or take a smaller model.", remedy


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
