"""Where jobs run: with the model in this process, on a GPU that is lent for each, or on several GPUs of this machine.

A `Runner` runs a job with a checkpoint and sets its output and report. The functions import torch, not the module.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from latentsync.prefetch import in_background
from latentsync.several import load_once
from optim.serving.job import Job, Request
from optim.serving.machine import Machine, at_level, workers_text
from optim.serving.prepared_films import PreparedFilms
from optim.serving.run import check_cancel, expect, make_plan, requested_settings, run_job
from optim.serving.speeds import Speeds, speed_key

if TYPE_CHECKING:  # torch takes seconds to load
    from latentsync.checkpoints.find import Checkpoint
    from latentsync.checkpoints.load import Models
    from optim.monitor import Monitor

RunAlone = Callable[[Request, Path, str], dict[str, Any]]  # see `run.run_alone`


class Runner(Protocol):
    """What runs jobs; several threads may, where there are several GPUs."""

    def run(self, job: Job, checkpoint: "Checkpoint") -> None:
        """Run a job. Raises what `run.run_job` raises."""
        ...

    def unload(self) -> None:
        """Free what is held from job to job. Raises RuntimeError where the GPU has failed."""
        ...


class InProcess:
    """Runs jobs in this process, whose model stays loaded for the next one. One job at a time.

    restorer: a face restorer that jobs may use; prepared: what earlier jobs have found of their films.
    """

    def __init__(
        self,
        machine: Machine,
        monitor: "Monitor",
        speeds: Speeds,
        restorer: Path | None = None,
        prepared: PreparedFilms | None = None,
    ):
        self._machine, self._monitor, self._speeds, self._restorer = machine, monitor, speeds, restorer
        self._prepared = prepared
        self.models: Models | None = None
        self._load = load_once()

    def run(self, job: Job, checkpoint: "Checkpoint") -> None:
        """Only this call holds the model, so that it can be unloaded after it.

        The first job of a model loads it while its faces are found.
        """
        import torch

        from optim.accelerate import accelerate, set_precision

        check_cancel(job)
        models, load_weights = self._outline(job, checkpoint)
        plan = make_plan(job.request, models, models.device, self._restorer)
        key = speed_key(models.name, self._machine, job.request)
        expect(job, self._speeds, key, plan.settings)
        set_precision(plan.level)
        messages: list[str] = []

        def get_ready() -> None:
            load_weights()
            accelerate(models, plan, messages.append, frames=job.frames)

        with in_background(get_ready, "models") as wait_until_ready:

            def before_painting() -> None:
                job.doing = f"getting the model {checkpoint.name} ready"  # loaded, or only set to this level
                wait_until_ready()
                if models.device.type == "cuda":
                    torch.cuda.set_device(models.device)  # of this thread; `accelerate` has run in another one
                job.messages.extend(messages)

            run_job(
                job,
                models,
                plan,
                self._monitor,
                self._speeds,
                key,
                prepared=self._prepared,
                before_painting=before_painting,
            )

    def load(self, job: Job, checkpoint: "Checkpoint") -> "Models":
        """The models of a checkpoint with their weights: the loaded ones, or others in their place."""
        models, load_weights = self._outline(job, checkpoint)
        load_weights()
        return models

    def _outline(self, job: Job, checkpoint: "Checkpoint") -> "tuple[Models, Callable[[], None]]":
        """The models of a checkpoint, and what loads their weights where they are not there yet."""
        import torch

        job.doing = f"getting the model {checkpoint.name} ready"
        self.models = None  # memory may not hold both
        checkpoint = replace(checkpoint, remark=None)  # the same files under any name
        self.models, load_weights = self._load(checkpoint, torch.device(self._machine.device))
        return self.models, load_weights

    def unload(self) -> None:
        """Unload the model. CUDA fails at every call where the GPU has failed."""
        import torch

        self.models, self._load = None, load_once()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class OnLentGpu:
    """Runs each job in one call on a GPU that is lent for it.

    lent: does so, as `run.run_alone`; model: what the server uses for `auto`; machine: as it is at its start.
    """

    def __init__(self, lent: RunAlone, model: str, machine: Machine):
        self._lent, self._model, self._machine = lent, model, machine

    def run(self, job: Job, checkpoint: "Checkpoint") -> None:
        job.doing = "running on a GPU that is lent for it; how far it is cannot be seen here"
        model = name_elsewhere(checkpoint, self._model, self._machine)
        job.report, job.output = self._lent(job.request, job.planned_output, model), job.planned_output

    def unload(self) -> None:
        """Nothing is held."""


class OnGpus:
    """Runs jobs on the GPUs of a machine, each on as many as `Job.gpus` says: several jobs at once, or one on all.

    This process decodes, follows the face and encodes; a Ray worker for each GPU paints. Use it within
    `cluster.session.local_session`. model: what the server uses for `auto`; threads: of a worker on a processor;
    restorer: a face restorer that jobs may use; prepared: what earlier jobs have found of their films.
    """

    def __init__(
        self,
        model: str,
        machine: Machine,
        monitor: "Monitor",
        speeds: Speeds,
        threads: int,
        restorer: Path | None = None,
        prepared: PreparedFilms | None = None,
    ):
        from optim.cluster.workers import SpareWorkers

        self._model, self._machine, self._monitor, self._speeds = model, machine, monitor, speeds
        self._threads, self._restorer, self._prepared, self._spare = threads, restorer, prepared, SpareWorkers()

    def run(self, job: Job, checkpoint: "Checkpoint") -> None:
        import torch

        from latentsync.checkpoints.load import load_outline, working_dtype
        from optim.cluster.actor import Order
        from optim.cluster.workers import RayWorkers

        check_cancel(job)
        device, count = torch.device(self._machine.device), job.gpus
        request = at_level(job.request, self._machine)
        key = speed_key(checkpoint.name, self._machine, request, count)
        expect(job, self._speeds, key, make_plan(request, checkpoint, device, self._restorer).settings)
        settings, overrides = requested_settings(request, checkpoint, self._restorer)
        order = Order(
            model=name_elsewhere(checkpoint, self._model, self._machine),
            kind=device.type,
            settings=settings,
            level=request.level,
            batch=request.batch,
            overrides=overrides,
            frames=job.frames,
            threads=self._threads,
        )
        outline = load_outline(checkpoint, working_dtype(device))
        where = workers_text(count, device.type)
        job.doing = f"getting {where} ready"
        messages = job.messages.append
        resolution, own_face = outline.resolution, outline.retargets
        with RayWorkers(order, count, count, resolution, own_face, messages, self._spare) as workers:
            first = workers.wait_until_ready(on_step=lambda: check_cancel(job))
            messages(first.details)
            place = f" on {where}"
            run_job(job, outline, first.plan, self._monitor, self._speeds, key, workers, place, self._prepared)

    def unload(self) -> None:
        """End the workers that no job uses."""
        self._spare.end()


def name_elsewhere(checkpoint: "Checkpoint", model: str, machine: Machine) -> str:
    """What another process finds a checkpoint by: its name, or the folder that the server uses for `auto`."""
    from latentsync.checkpoints.find import MODEL_NAMES

    if model in MODEL_NAMES or checkpoint.name != machine.chosen:
        return checkpoint.name
    return str(Path(model).expanduser().resolve())
