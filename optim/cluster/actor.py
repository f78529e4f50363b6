"""A worker: one process with a device of its own, which holds the models and paints what the driver sends."""

import os
import platform
import queue
import socket
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from latentsync import __version__
from latentsync.checkpoints.download import sha256_of
from latentsync.checkpoints.find import Checkpoint, resolve_model
from latentsync.checkpoints.load import Models
from latentsync.errors import UserError
from latentsync.options import choose_device
from latentsync.painting import Group, Painter, paint_groups
from latentsync.restoring import check_restorer, with_restorer
from latentsync.settings import Settings
from latentsync.several import load_once
from latentsync.windows import Window
from optim.accelerate import Plan, accelerate, details, oom_handler, plan_for_device
from optim.cluster.messages import PaintedGroup, PaintTask, pack_result, unpack

# Groups that a worker is given: one waits, one is painted and, of a GPU, one is on its way to the host.
QUEUED = {"cpu": 2, "cuda": 3}


def versions() -> dict[str, str]:
    """What has to be the same on all machines, for their frames to be alike."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"latentsync": __version__, "torch": torch.__version__, "Python": python}


@dataclass(frozen=True)
class Order:
    """What every worker of a run prepares for.

    model: a name or a folder, see `resolve_model`; kind: of the device, "cpu" or "cuda"; level, batch, overrides: see
    `plan_for_device`; frames: of the job; hashes: SHA-256 of the model's files by their names, None on the driver's own
    machine; token_required: a machine whose Ray lets in anybody is refused; versions: of the driver; threads: of a
    worker on a processor, as many as the single process has, since another number rounds otherwise.
    """

    model: str
    kind: str
    settings: Settings
    level: str
    batch: int | None
    overrides: dict[str, Any]
    frames: int
    hashes: dict[str, str] | None = None
    token_required: bool = False
    versions: dict[str, str] = field(default_factory=versions)
    threads: int = field(default_factory=torch.get_num_threads)


@dataclass(frozen=True)
class PreparedRun:
    """What the painting thread needs for a run. threads: of a processor, None on a GPU."""

    models: Models
    plan: Plan
    threads: int | None


@dataclass(frozen=True)
class Prepared:
    """A worker that is ready. name: its machine and device; details: everything that its plan does, in one line."""

    name: str
    plan: Plan
    details: str


def hashes_of(checkpoint: Checkpoint, restorer: str | None = None) -> dict[str, str]:
    """SHA-256 of a checkpoint's files, and of a restorer's, by their names."""
    files = {path.name: path for path in checkpoint.files}
    if restorer:
        files[f"restorer {Path(restorer).name}"] = Path(restorer)
    return {name: sha256_of(path, f"hashing {name}") for name, path in files.items()}


class Worker:
    """The class of Ray's actors. Its methods are called in several threads; one thread of its own paints.

    So the device has its next group before the one it works on has come back: `paint_groups` finishes a group after it
    has queued the next, as in a single process. A worker may serve one run after another.
    """

    def __init__(self) -> None:
        self._load = load_once()
        self._tasks: queue.SimpleQueue[tuple[PaintTask, Future[PaintedGroup]] | PreparedRun] = queue.SimpleQueue()
        self._started: deque[tuple[PaintTask, list[Window], Future[PaintedGroup]]] = deque()  # of the painting thread
        self._next_run: PreparedRun | None = None
        self._messages: list[str] = []
        # One thread for all runs: what a compiler keeps for a network belongs to the thread that called it first.
        threading.Thread(target=self._paint_runs, name="painting", daemon=True).start()

    def prepare(self, order: Order) -> Prepared:
        """Check this machine, load the models unless they are loaded, and start to wait for a run's tasks.

        Nothing of an earlier run may be waited for. Raises UserError.
        """
        name = socket.gethostname()
        if order.token_required and os.environ.get("RAY_AUTH_MODE") != "token":
            raise UserError(
                f"The Ray of {name} lets in anybody: restart it with RAY_AUTH_MODE=token and the cluster's token."
            )
        for what, version in versions().items():
            if version != order.versions[what]:
                raise UserError(
                    f"{name} has {what} {version}, but the job was started with {order.versions[what]}: install the "
                    "same on both."
                )
        device = choose_device(order.kind)
        if order.kind == "cuda":
            name += f" GPU {os.environ.get('CUDA_VISIBLE_DEVICES', '0')}"
        restorer = order.settings.restore
        try:
            checkpoint = resolve_model(order.model, device)
            if restorer:
                check_restorer(restorer)
        except UserError as error:
            raise UserError(f"On {name}: {error}") from None
        if order.hashes is not None and (found := hashes_of(checkpoint, restorer)) != order.hashes:
            wrong = sorted(file for file in order.hashes if found.get(file) != order.hashes[file])
            raise UserError(
                f"The model '{order.model}' of {name} is another one than here ({', '.join(wrong)}): copy its files "
                "there."
            )
        models, load_weights = self._load(replace(checkpoint, remark=None), device)  # the same files under any name
        load_weights()
        models = with_restorer(models, restorer)
        plan = plan_for_device(device, models.resolution, order.settings, order.level, order.batch, **order.overrides)
        accelerate(models, plan, lambda _: None, order.frames)
        self._tasks.put(PreparedRun(models, plan, order.threads if order.kind == "cpu" else None))
        return Prepared(name, plan, details(plan, device))

    def paint(self, task: PaintTask) -> PaintedGroup:
        """Paint a task after those that came before it; several calls wait here at a time."""
        future: Future[PaintedGroup] = Future()
        self._tasks.put((task, future))
        return future.result()

    def _paint_runs(self) -> None:
        first = self._tasks.get()
        self._next_run = first if isinstance(first, PreparedRun) else None  # it is: tasks come after it
        while (run := self._next_run) is not None:  # set by `_groups`, too
            self._paint_tasks(run.models, run.plan, run.threads)

    def _paint_tasks(self, models: Models, plan: Plan, threads: int | None) -> None:
        """Paint what comes until the next run begins."""
        if threads is not None:
            torch.set_num_threads(threads)  # of this thread
        on_out_of_memory = oom_handler(models, plan, self._messages.append)
        settings, own_face = plan.settings, models.retargets

        def smaller() -> Settings | None:
            nonlocal settings
            fewer = on_out_of_memory()
            settings = fewer or settings
            return fewer

        while True:
            try:
                left = 0
                painter = Painter(models, settings)
                for _ in paint_groups(self._groups(models.resolution), painter, smaller):
                    left = left or self._started[0][0].new_frames
                    left -= 1
                    if not left:
                        _, windows, future = self._started.popleft()
                        messages, self._messages[:] = list(self._messages), []
                        future.set_result(pack_result(windows, models.resolution, own_face, messages))
                return
            except Exception as error:
                while self._started:
                    self._started.popleft()[2].set_exception(error)

    def _groups(self, resolution: int) -> Iterator[Group]:
        """The groups of a run's tasks, as they come; an empty one, to get the last back, where none waits."""
        while True:
            try:
                item = self._tasks.get(block=not self._started)
            except queue.Empty:
                yield []
                continue
            if isinstance(item, PreparedRun):
                self._next_run = item
                return
            task, future = item
            windows = unpack(task, resolution)
            self._started.append((task, windows, future))
            yield list(windows)
