"""Fetch, verify and remove released models while the page is served.

    fetcher = Fetcher(worker, allowed=True)
    fetcher.start("latentsync-1.6")
    fetcher.view()      # its progress

One task runs at a time, in a thread of its own, not that of the jobs.
"""

import logging
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from latentsync.checkpoints.releases import RELEASES, folder_of, notice
from latentsync.errors import UserError
from optim.serving.worker import Worker

log = logging.getLogger(__name__)

RUNNING, DONE, STOPPED, FAILED = "running", "done", "stopped", "failed"
SPEED_SECONDS = 10.0  # over which the speed is averaged
SAMPLE_SECONDS = 0.25  # between two of its samples
TASKS = ("get", "verify")


@dataclass
class Task:
    """Fetching or verifying a released model. Its thread writes the fields, any thread may read them."""

    name: str
    task: str  # one of TASKS
    id: str = field(default_factory=lambda: secrets.token_hex(4))
    state: str = RUNNING
    doing: str = "starting"
    done: int = 0  # bytes
    total: int = 0  # bytes; 0 if unknown
    error: str | None = None
    cancel: threading.Event = field(default_factory=threading.Event)
    _step: str = ""
    _samples: deque[tuple[float, int]] = field(default_factory=deque)  # seconds, bytes

    def progress(self, done: int, total: int, what: str) -> None:
        """The progress callback of `latentsync.checkpoints.store.get`."""
        is_file = what in {part.file for part in RELEASES[self.name].parts}
        is_waiting = what == "waiting for the connection"
        step = "fetching" if is_file or is_waiting else what  # the speed is one over all files
        now = time.monotonic()
        if step != self._step:
            self._step, self._samples = step, deque()
        if not self._samples or now - self._samples[-1][0] > SAMPLE_SECONDS:
            self._samples.append((now, done))
        if is_waiting:
            self.doing = "the connection is lost; trying again"
        else:
            self.doing = f"fetching {what}" if is_file else what
        self.done, self.total = done, total

    def speed(self) -> float | None:
        """Bytes per second over the last SPEED_SECONDS; None with too few samples."""
        now = time.monotonic()
        samples = [sample for sample in list(self._samples) if now - sample[0] < SPEED_SECONDS]
        if not samples or now - samples[0][0] < 2 * SAMPLE_SECONDS:
            return None
        began, done = samples[0]
        return max(self.done - done, 0) / (now - began)

    def view(self) -> dict[str, Any]:
        """The task as JSON-ready values."""
        is_running = self.state == RUNNING
        speed = self.speed() if is_running else None
        seconds_left = (self.total - self.done) / speed if speed and self.total else None
        return {
            "id": self.id,
            "name": self.name,
            "task": self.task,
            "state": self.state,
            "doing": "stopping" if is_running and self.cancel.is_set() else self.doing,
            "done": self.done,
            "total": self.total,
            "speed": None if speed is None else round(speed),
            "seconds_left": None if seconds_left is None else round(seconds_left),
            "error": self.error,
        }


class Fetcher:
    """Fetches, verifies and removes released models, and lets the worker look for models again afterwards.

    allowed: whether visitors may do so; `check_allowed` says it. The command line calls `start` in any case.
    """

    def __init__(self, worker: Worker, allowed: bool):
        self.worker, self.allowed = worker, allowed
        self.version = 0  # increases when the models on this machine may have changed
        self._lock = threading.Lock()
        self._task: Task | None = None
        self._thread: threading.Thread | None = None

    def check_allowed(self) -> None:
        """Raise UserError if visitors may not change the models."""
        if not self.allowed:
            raise UserError(
                "Visitors of this server cannot fetch or remove models: who serves it starts it with --allow-download."
            )

    def start(self, name: str, task: str = "get") -> Task:
        """Begin to fetch a model, to resume that, or to verify it. Raises UserError, also while a task runs."""
        _check_released(name)
        if task not in TASKS:
            raise UserError(f"There is no task '{task}' for a model: give one of {', '.join(TASKS)}.")
        with self._lock:
            self._check_idle()
            self._task = new = Task(name, task)
            self._thread = threading.Thread(target=self._run, args=(new,), name="fetching", daemon=True)
            self._thread.start()
        return new

    def stop(self) -> None:
        """Cancel the running task; what it has fetched stays."""
        if self._task is not None:
            self._task.cancel.set()

    def remove(self, name: str, pickle_only: bool = False) -> int:
        """Remove a model, or only the original of a converted U-Net; returns bytes removed. Raises UserError."""
        _check_released(name)
        from latentsync.checkpoints import store

        with self._lock:
            self._check_idle()
            removed = store.remove(name, pickle_only)
        self.refresh()
        return removed

    def refresh(self) -> None:
        """Look for models again; files may have been copied by hand, too."""
        self.worker.find_models()
        self.version += 1

    def view(self) -> dict[str, Any] | None:
        """The current or last task as JSON-ready values, without errors, which name folders, if not `allowed`."""
        if self._task is None:
            return None
        view = self._task.view()
        if view["error"] and not self.allowed:
            view["error"] = "The server's console says what went wrong."
        return view

    def models(self) -> dict[str, Any]:
        """The released models, the best first, and which one suits this machine. Waits for the worker to be ready.

        Raises UserError if this machine cannot be used.
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
            local = stored(name)
            rows.append(
                {
                    "name": name,
                    "title": name.replace("latentsync-", "LatentSync "),
                    "resolution": release.resolution,
                    "present": local.where is not None,
                    "converted": local.converted,
                    "size": local.size,
                    "to_fetch": local.to_fetch,
                    "pickle": local.pickle,
                    "notice": notice(name).splitlines(),
                    "remark": remarks.get(name),
                    "folder": str(folder_of(name)) if self.allowed else None,
                }
            )
        return {
            "models": rows,
            "recommended": machine.best,
            "why": machine.why,
            "chosen": machine.chosen,
            "remark": remarks.get(machine.chosen),
            "allowed": self.allowed,
            "offline": constants.HF_HUB_OFFLINE,
            "version": self.version,
        }

    def close(self) -> None:
        """Cancel the running task and wait up to 5 seconds for its end."""
        self.stop()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _check_idle(self) -> None:
        if self._task is not None and self._task.state == RUNNING:
            verb = "fetched" if self._task.task == "get" else "verified"
            raise UserError(f"{self._task.name} is being {verb} now, and one comes after the other: wait, or stop it.")

    def _run(self, task: Task) -> None:
        """Carry out a task; every outcome ends in its `state`."""
        task.doing = "looking at this machine"
        self.worker.ready.wait()
        try:
            from latentsync.checkpoints import store
            from latentsync.checkpoints.download import Cancelled

            try:
                if task.task == "get":
                    store.get(task.name, task.progress, task.cancel)
                    doing, state = f"{task.name} is on this machine", DONE
                elif problems := store.verify(task.name, task.progress, task.cancel):
                    raise UserError(" ".join(problems))
                else:
                    doing, state = f"all files of {task.name} are as they should be", DONE
            except Cancelled as error:
                doing, state = str(error) if task.task == "get" else "stopped", STOPPED
            self.refresh()
            task.doing, task.state = doing, state
        except UserError as error:
            log.error("%s", error)
            self._fail(task, str(error))
        except Exception as error:
            log.exception("Fetching or verifying %s failed:", task.name)
            self._fail(
                task,
                f"Something inside the program failed ({type(error).__name__}); its console says where. What was "
                "fetched is kept: try again.",
            )

    def _fail(self, task: Task, error: str) -> None:
        task.error, task.doing, task.state = error, "failed", FAILED
        self.version += 1


def _check_released(name: str) -> None:
    if name not in RELEASES:
        raise UserError(f"There is no released model '{name}': give one of {', '.join(RELEASES)}.")
