"""The models on this machine, for a page: what there is, what suits it, and fetching another while it is served.

    fetcher = Fetcher(worker, allowed=True)
    fetcher.start("latentsync-1.6")
    fetcher.view()      # how far it is

One thing is fetched or verified at a time, in a thread beside that of the jobs. Nothing here knows of a page.
"""

import secrets
import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from latentsync.checkpoints.releases import RELEASES, folder_of, notice, recommend
from latentsync.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to load
    import torch

    from latentsync.checkpoints.find import Checkpoint
    from optim.hardware import Gpu
    from optim.serving.worker import Worker

RUNNING, DONE, STOPPED, FAILED = "running", "done", "stopped", "failed"
SPEED_SECONDS = 10.0  # over which the speed is taken
SAMPLE_SECONDS = 0.25  # between two points of it
TASKS = ("get", "verify")


# ---- what there is, and what suits


def best_for(gpu: "Gpu | None", lent: bool = False) -> tuple[str, str]:
    """The released model for a GPU, and the reason as a sentence; lent: for a large one that is not here yet.

    One that fits by its makers' word, which `auto` goes by, and by this program's own model of memory.
    """
    from optim.hardware import batch_sizes, recommended_level

    level = recommended_level(gpu)
    needed = {release.resolution: release.vram for release in RELEASES.values()}

    def fits(side: int) -> bool:
        return gpu is not None and gpu.memory_total >= needed[side] and batch_sizes(gpu, side, level).fits

    return recommend(lambda side: lent or fits(side))


def meant(model: str, device: "torch.device", lent: bool = False) -> "Checkpoint":
    """The checkpoint that a name or a folder means; lent: `auto` is the best one that is here, whatever the device.

    Raises UserError where there is none.
    """
    from latentsync.checkpoints.find import find_released, resolve_model

    if lent and model == "auto":
        for name in RELEASES:  # the best first
            if found := find_released(name):
                return found
    return resolve_model(model, device)


def survey(model: str, device: "torch.device", lent: bool = False) -> dict[str, Any]:
    """Fields of `optim.serving.jobs.Machine`: the models there are, what `auto` is, and what is to be said of that one.

    model: what the server was told that `auto` is; lent: see `meant`. Raises UserError where that is not there.
    """
    from latentsync.checkpoints.find import MODEL_NAMES, resolve_model

    chosen = meant(model, device, lent)
    models = []
    for name in [*MODEL_NAMES[1:], *([chosen.name] if chosen.name not in MODEL_NAMES else [])]:
        try:
            found = chosen if name == chosen.name else resolve_model(name, device)
            facts = {"resolution": found.resolution, "guidance": found.guidance_scale, "remark": found.remark}
        except UserError:
            facts = dict.fromkeys(("resolution", "guidance", "remark"))
        models.append({"name": name, "present": facts["resolution"] is not None, **facts})
    return {"models": tuple(models), "chosen": chosen.name}


# ---- fetching


@dataclass
class Task:
    """Something that is done to a released model. Written by the thread that does it, read by all."""

    name: str
    task: str  # one of TASKS
    id: str = field(default_factory=lambda: secrets.token_hex(4))
    state: str = RUNNING
    doing: str = "starting"
    done: int = 0  # bytes
    total: int = 0  # bytes; 0: not known
    error: str | None = None
    ending: threading.Event = field(default_factory=threading.Event)
    _step: str = ""
    _points: deque = field(default_factory=deque)  # seconds and bytes

    def progress(self, done: int, total: int, what: str) -> None:
        """See `latentsync.checkpoints.store.get`."""
        fetched = {part.file for part in RELEASES[self.name].parts}
        lost = what == "waiting for the connection"
        step = "fetching" if lost or what in fetched else what  # the speed goes through all files that are fetched
        now = time.monotonic()
        if step != self._step:
            self._step, self._points = step, deque()
        if not self._points or now - self._points[-1][0] > SAMPLE_SECONDS:
            self._points.append((now, done))
        doing = f"fetching {what}" if what in fetched else what
        self.doing = "the connection is lost; trying again" if lost else doing
        self.done, self.total = done, total

    def speed(self) -> float | None:
        """Bytes a second of late; None while there is too little to tell."""
        now = time.monotonic()
        points = [point for point in list(self._points) if now - point[0] < SPEED_SECONDS]
        if not points or now - points[0][0] < 2 * SAMPLE_SECONDS:
            return None
        return max(self.done - points[0][1], 0) / (now - points[0][0])

    def view(self) -> dict[str, Any]:
        """Ready for JSON."""
        speed = self.speed() if self.state == RUNNING else None
        left = (self.total - self.done) / speed if speed and self.total else None
        return {
            "id": self.id, "name": self.name, "task": self.task, "state": self.state,
            "doing": "stopping" if self.state == RUNNING and self.ending.is_set() else self.doing,
            "done": self.done, "total": self.total, "speed": None if speed is None else round(speed),
            "seconds_left": None if left is None else round(left), "error": self.error,
        }  # fmt: skip


class Fetcher:
    """Fetches, verifies and removes released models beside the worker, and tells it when there is another.

    allowed: whether visitors may; who serves the page always may, with `start`.
    """

    def __init__(self, worker: "Worker", allowed: bool):
        self.worker, self.allowed = worker, allowed
        self.version = 0  # goes up when what is on this machine may have changed
        self._lock = threading.Lock()
        self._task: Task | None = None
        self._thread: threading.Thread | None = None

    def check_allowed(self) -> None:
        """Raise UserError where visitors may not change the models."""
        if not self.allowed:
            raise UserError(
                "Visitors of this server cannot fetch or remove models: who serves it starts it with --allow-download."
            )

    def start(self, name: str, task: str = "get") -> Task:
        """Begin to fetch a model, or to go on with it, or to verify it. Raises UserError, also while another runs."""
        _check_known(name)
        if task not in TASKS:
            raise UserError(f"There is nothing called '{task}' to do with a model: give one of {', '.join(TASKS)}.")
        with self._lock:
            self._check_idle()
            self._task = found = Task(name, task)
            self._thread = threading.Thread(target=self._run, args=(found,), name="fetching", daemon=True)
            self._thread.start()
        return found

    def stop(self) -> None:
        """End what runs; what was fetched is kept."""
        if self._task is not None:
            self._task.ending.set()

    def remove(self, name: str, pickle_only: bool = False) -> int:
        """Remove a model, or only the original of a converted U-Net; returns bytes removed. Raises UserError."""
        _check_known(name)
        from latentsync.checkpoints import store

        with self._lock:
            self._check_idle()
            removed = store.remove(name, pickle_only)
        self.look()
        return removed

    def look(self) -> None:
        """See anew which models there are, as files may have come by hand, too."""
        self.worker.find_models()
        self.version += 1

    def view(self) -> dict[str, Any] | None:
        """The task that runs or was the last, for any visitor; a failure's sentence names folders of this machine."""
        task = self._task
        found = task and task.view()
        if found and found["error"] and not self.allowed:
            found["error"] = "The server's console says what went wrong."
        return found

    def models(self) -> dict[str, Any]:
        """The released models, the best first, and which one suits this machine. Waits for the worker to have looked.

        Raises UserError where this machine cannot be used.
        """
        self.worker.ready.wait()
        from huggingface_hub import constants

        from latentsync.checkpoints.store import stored

        machine = self.worker.machine
        if machine is None:
            raise UserError(self.worker.problem or "")
        remarks = {model["name"]: model["remark"] for model in machine.models}
        rows = []
        for name, release in RELEASES.items():
            found = stored(name)
            rows.append({
                "name": name, "title": name.replace("latentsync-", "LatentSync "), "resolution": release.resolution,
                "present": found.where is not None, "converted": found.converted, "size": found.size,
                "to_fetch": found.to_fetch, "pickle": found.pickle, "notice": notice(name).splitlines(),
                "remark": remarks.get(name), "folder": str(folder_of(name)) if self.allowed else None,
            })  # fmt: skip
        return {
            "models": rows, "recommended": machine.best, "why": machine.why, "chosen": machine.chosen,
            "remark": remarks.get(machine.chosen), "allowed": self.allowed, "offline": constants.HF_HUB_OFFLINE,
            "version": self.version,
        }  # fmt: skip

    def close(self) -> None:
        self.stop()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _check_idle(self) -> None:
        if self._task is not None and self._task.state == RUNNING:
            verb = "fetched" if self._task.task == "get" else "verified"
            raise UserError(f"{self._task.name} is being {verb} now, and one comes after the other: wait, or stop it.")

    def _run(self, task: Task) -> None:
        """Do the task to whatever end; raises nothing."""
        task.doing = "looking at this machine"
        self.worker.ready.wait()
        try:
            from latentsync.checkpoints import store
            from latentsync.checkpoints.download import Cancelled

            try:
                if task.task == "get":
                    store.get(task.name, task.progress, task.ending)
                    doing = f"{task.name} is on this machine"
                elif wrong := store.verify(task.name, task.progress, task.ending):
                    raise UserError(" ".join(wrong))
                else:
                    doing = f"all files of {task.name} are as they should be"
                self.look()
                task.doing, task.state = doing, DONE
            except Cancelled as error:
                task.doing = str(error) if task.task == "get" else "stopped"
                self.look()
                task.state = STOPPED
        except UserError as error:
            self._fail(task, str(error))
        except Exception as error:
            traceback.print_exc()
            self._fail(
                task,
                f"Something inside the program failed ({type(error).__name__}); its console says where. What was "
                "fetched is kept: try again.",
            )

    def _fail(self, task: Task, error: str) -> None:
        print(error, file=sys.stderr, flush=True)
        task.error, task.doing, task.state = error, "failed", FAILED
        self.version += 1


def _check_known(name: str) -> None:
    if name not in RELEASES:
        raise UserError(f"There is no released model '{name}': give one of {', '.join(RELEASES)}.")
