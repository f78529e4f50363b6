"""One job through the pipeline: its plan, its progress, how it is cancelled, and what to try when memory runs out.

`runners` decide where that happens.

The functions import torch, not the module, so that the page can be shown before it is loaded.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentsync import SPEAKERS
from latentsync.errors import UserError
from latentsync.media.segments import clock
from latentsync.rates import describe_painting, painted_step
from latentsync.settings import WINDOW
from optim.serving.curves import last_seconds
from optim.serving.job import Job, Request
from optim.serving.machine import Machine
from optim.serving.prepared_films import KNOWN, Film, PreparedFilms
from optim.serving.preview import Preview
from optim.serving.speeds import Speeds

if TYPE_CHECKING:  # torch takes seconds to load
    import torch

    from latentsync.checkpoints.find import Checkpoint
    from latentsync.checkpoints.load import Models
    from latentsync.settings import Report, Settings
    from optim.accelerate import Plan
    from optim.cluster.workers import RayWorkers
    from optim.monitor import Monitor

NETWORKS = "audio_encoder", "vae", "unet"  # of `Models`; the first has its weights before the others
NO_RESTORER = "This server has no face restorer: set Restore faces to 0, or start it with --restore FILE."


class Cancelled(Exception):
    """Raised inside a run to end it and leave nothing."""


def requested_settings(
    request: Request, model: "Checkpoint | Models", restorer: Path | None = None
) -> tuple["Settings", dict[str, Any]]:
    """The settings of a request before its level applies, and the fields of the level that it overrides.

    restorer: the server's. Raises UserError.
    """
    from latentsync.settings import DeepCache, Settings

    if request.restore:
        from latentsync.restoring import check_restorable

        if restorer is None:
            raise UserError(NO_RESTORER)
        check_restorable(model)
    settings = Settings.suiting(
        model,
        request.guidance,
        steps=request.steps,
        seed=request.seed,
        crf=request.crf,
        face=request.face,
        other_faces=request.faces[1:],
        silence_gate=request.silence_gate,
        fps=request.fps,
        paint=request.paint,
        match_colours=request.match_colours,
        restore=str(restorer) if request.restore else None,
        restore_strength=request.restore,
    )
    overrides: dict[str, Any] = {"vram_fraction": request.vram_fraction, "compile": request.compile}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if request.cache != "level":
        overrides["cache"] = DeepCache(int(request.cache), 0) if request.cache else None
    return settings, overrides


def make_plan(
    request: Request, model: "Checkpoint | Models", device: "torch.device", restorer: Path | None = None
) -> "Plan":
    """The plan for a request with a model on a device; restorer: the server's. Raises UserError."""
    from optim.accelerate import plan_for_device

    settings, overrides = requested_settings(request, model, restorer)
    return plan_for_device(device, model.resolution, settings, request.level, request.batch, **overrides)


def expect(job: Job, speeds: Speeds, speed_key: str, settings: "Settings") -> None:
    """Set the time that a job will take by earlier ones; each of its faces takes as long."""
    painted = job.frames // painted_step(job.rate, settings.paint)
    estimate = speeds.estimate(speed_key, settings, painted * len(job.request.faces))
    job.expected_seconds = estimate.seconds if estimate else None


def run_job(
    job: Job,
    models: "Models",
    plan: "Plan",
    monitor: "Monitor",
    speeds: Speeds,
    speed_key: str,
    workers: "RayWorkers | None" = None,
    where: str = "",
    prepared: PreparedFilms | None = None,
    before_painting: Callable[[], None] = lambda: None,
) -> None:
    """Run a job with models that are prepared for its plan, and set its output, report, advice and messages.

    speeds: records the time that it took, under `speed_key`; workers: paint in place of the models, see `lipsync`;
    where: said after what is painted, as " on 2 GPUs"; prepared: what earlier jobs have found of their films;
    before_painting: waits until the models have their weights and are accelerated. Raises Cancelled, UserError,
    `pipeline.StopEarly` where nothing was finished yet, and whatever else goes wrong.
    """
    from latentsync.pipeline import Hooks, lipsync
    from latentsync.prepared.film import PreparedFilm
    from optim.accelerate import oom_handler
    from optim.doctor import advise_report
    from optim.hardware import nvml_index

    request = job.request
    people = len(request.faces)
    check_cancel(job)
    job.doing = "looking at the files"
    step_downs: list[str] = []
    step = painted_step(job.rate, plan.settings.paint)
    if painting := describe_painting(job.rate, step):
        where += f", {painting.removeprefix('painted at ')}"
        sentence = f"The film is {painting}; those between are composed."
        job.messages += [sentence] if sentence not in job.messages else []  # a resumed job has it
    messages = len(job.messages)

    def on_step_down(change: str) -> None:
        step_downs.append(change)
        monitor.mark(change)

    def run(film: "Film | None") -> "Report":
        job.faces_known = isinstance(film, PreparedFilm)
        preview = Preview(job)
        hooks = Hooks(
            on_progress=Progress(job, None if workers else plan.settings.steps * people, monitor, where),
            on_frame=preview,
            on_wait=lambda: check_cancel(job),
            on_out_of_memory=None if workers else oom_handler(models, plan, job.messages.append, on_step_down),
            before_painting=get_ready,
        )
        try:
            return lipsync(
                request.video,
                request.audio,
                job.planned_output,
                models,
                plan.settings,
                hooks,
                video_track=request.video_track,
                audio_track=request.audio_track,
                other_voices=[other.audio for other in request.others],
                sound=request.sound,
                workers=workers,
                film=film,
            )
        finally:
            preview.close()

    monitor.mark(plan.level.name)
    began, known = time.monotonic(), False
    check = partial(check_cancel, job)
    with ExitStack() as stack:
        stack.enter_context(interruptible(models, check, NETWORKS[:1]))

        @cache
        def get_ready() -> None:
            before_painting()
            stack.enter_context(interruptible(models, check, NETWORKS[1:]))

        if prepared is None:
            report = run(None)
        else:
            report, known = prepared.run(job, models, plan.settings, run, encodes=workers is None, on_wait=check)
    seconds = time.monotonic() - began - report.waiting.get("models", 0.0)  # as no later job loads them
    undisturbed = not step_downs if workers is None else len(job.messages) == messages  # they say what they lack
    if undisturbed and not (known or report.ended_early or report.resumed_from or report.turns):
        speeds.record(speed_key, plan.settings, report.frames // step * people, seconds)
    gpu = None
    if models.device.type == "cuda" and (history := last_seconds(monitor.snapshot(), seconds)):
        gpu = history.gpu(nvml_index(models.device))
    job.advice = [asdict(advice) for advice in advise_report(report, plan, step_downs, gpu)]
    job.messages.extend([*report.remarks, *([KNOWN] if known else [])])
    position = {"level": plan.level.name, "position": plan.level.position}
    job.report = report.as_dict() | position | {"step_downs": step_downs}
    if request.restore and plan.settings.restore:  # visitors need not know where it lies
        job.report["settings"]["restore"] = Path(plan.settings.restore).name
    if workers is not None:
        job.report["workers"] = workers.summary()
    job.output = job.planned_output
    monitor.mark("done")


def run_alone(request: Request, output: Path, model: str) -> dict[str, Any]:
    """Run a whole job in one call, where a GPU is lent to one function at a time, in a process of its own.

    model: as on the command line. Returns the report. The run shows no progress and cannot be cancelled. Raises
    UserError.
    """
    from latentsync.checkpoints.find import resolve_model
    from latentsync.checkpoints.load import load_models
    from latentsync.options import choose_device
    from latentsync.pipeline import Hooks, lipsync
    from optim.accelerate import accelerate, oom_handler

    device = choose_device("auto")
    models = load_models(resolve_model(model, device), device)
    plan = make_plan(request, models, device)
    accelerate(models, plan)
    # In one piece: no later job finds the segments of this one, as each has a folder of its own.
    report = lipsync(
        request.video,
        request.audio,
        output,
        models,
        plan.settings,
        Hooks(on_out_of_memory=oom_handler(models, plan)),
        segment_frames=None,
        video_track=request.video_track,
        audio_track=request.audio_track,
        other_voices=[other.audio for other in request.others],
        sound=request.sound,
    )
    return report.as_dict() | {"level": plan.level.name, "position": plan.level.position, "step_downs": []}


def check_cancel(job: Job) -> None:
    """If a job is to end, raise Cancelled, or `pipeline.StopEarly` to keep what is finished."""
    if job.cancel_requested.is_set():
        from latentsync.pipeline import StopEarly

        raise StopEarly if job.keep_finished else Cancelled


@contextmanager
def interruptible(models: "Models", check: Callable[[], None], names: Sequence[str] = NETWORKS) -> Iterator[None]:
    """On a processor, call `check` also within passes, which may take many seconds; what it raises ends the pass.

    names: of the networks. A GPU does not need that: the pipeline never runs far ahead of it. A compiled network is
    left alone.
    """
    from optim.compilation import is_compiled

    hooks = []
    for network in [getattr(models, name) for name in names] if models.device.type == "cpu" else []:
        if network is not models.unet or not is_compiled(network):
            hooks += [module.register_forward_pre_hook(lambda *_: check()) for module in network.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Progress:
    """The pipeline's hook on_progress: updates the job, and ends the run when it is cancelled.

    steps: of denoising, None where they are not seen; where: said after what is painted.
    """

    def __init__(self, job: Job, steps: int | None, monitor: "Monitor", where: str = ""):
        self._job, self._steps, self._monitor, self._where = job, steps, monitor, where
        self._steps_taken = 0  # since the last finished frame

    def __call__(self, stage: str, done: int, total: int) -> None:
        job, now = self._job, time.time()
        check_cancel(job)
        if stage == SPEAKERS:
            job.doing = f"finding who speaks, {100 * done // total} %"
            return
        if not job.progress and stage == "mouths":  # before any face: what earlier runs have finished
            job.resumed_from = done
            job.messages.append(f"Resumed after {clock(done, job.rate)} of {clock(total, job.rate)}.")
        span = job.stage_spans().setdefault(stage, [now - (job.started or now), 0.0])
        span[1] = now - (job.started or now)
        if stage not in job.progress:
            self._monitor.mark(stage)
        if stage == "mouths":
            job.doing = f"painting mouths{self._where}"
            if self._steps is not None:
                # A call without a new frame is a denoising step. Decoding follows the last one.
                self._steps_taken = self._steps_taken + 1 if done == job.progress.get(stage, 0) else 0
                fraction = min(self._steps_taken / (self._steps + 1), 1.0)
                job.partial_frames = min(fraction * WINDOW, total - done)
        elif stage == "faces" and "mouths" not in job.progress:
            job.doing = "reading the faces, which an earlier job has found" if job.faces_known else "finding faces"
        job.progress[stage] = done


def out_of_memory(machine: Machine, checkpoint: "Checkpoint | None") -> tuple[str, dict[str, Any] | None]:
    """The sentence for a run that did not fit into memory, and the remedy; checkpoint: of the model that ran.

    The run has tried the smallest batches of every level by then.
    """
    sentence = f"The memory of {machine.device_name} is not enough for this, even in the smallest pieces: "
    present = [model for model in machine.models if model["present"]]
    smaller = [model for model in present if checkpoint and model["resolution"] < checkpoint.resolution]
    if not smaller:
        return sentence + "close other programs that use it.", None
    name = max(smaller, key=lambda model: model["resolution"])["name"]
    remedy = {"label": f"Run again with {name}", "settings": {"model": name}}
    return sentence + "close other programs that use it, or take a smaller model.", remedy
