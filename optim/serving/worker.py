"""The threads that run the jobs of the page, one for each GPU, and what the page can do with the jobs.

    worker = Worker(Path("outputs"))
    worker.start()
    job = worker.submit(Request(video, audio), visitor)
    worker.cancel(job.id, visitor, keep=True)

Nothing here knows of a page or a server. A thread imports torch, so that the page can be shown before it is loaded.
What a job is run with stays loaded between jobs and is unloaded after a while without any (`runners`).
"""

import logging
import math
import secrets
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentsync.errors import UserError
from latentsync.media import probe_audio, probe_video
from optim.serving.comparison import start_comparison
from optim.serving.curves import NO_CURVES, curves_since
from optim.serving.estimate import describe_preview, describe_request
from optim.serving.execution import FAULT, execute, refuse
from optim.serving.inputs import store_inputs, with_user_names
from optim.serving.job import CANCELLED, FAILED, WAITING, Job, Request, owner_of
from optim.serving.limits import NO_LIMITS, VisitorLimits, check_option
from optim.serving.machine import Machine, at_level, inspect_machine, shared_gpus
from optim.serving.models import find_checkpoint, list_models
from optim.serving.one_frame import Previews
from optim.serving.prepared_films import PreparedFilms
from optim.serving.run import NO_RESTORER, make_plan
from optim.serving.runners import InProcess, OnGpus, OnLentGpu, RunAlone, Runner
from optim.serving.speeds import Speeds
from optim.serving.store import JobStore

if TYPE_CHECKING:  # torch takes seconds to load
    from latentsync.checkpoints.find import Checkpoint
    from optim.monitor import History, Monitor

log = logging.getLogger(__name__)

IDLE_SECONDS = 600.0  # without a job, until the model is unloaded
LIVE_SECONDS = 120.0  # of the curves of the machine
LIVE_INTERVAL = 0.5  # seconds for which a snapshot of the curves serves all visitors
JOIN_SECONDS = 10.0  # that `close` waits for the threads
SESSION_SECONDS = 20.0  # besides, for the workers of several GPUs


class Worker:
    """The queue of jobs and the threads that work on it.

    folder, queue_size, limits: see `JobStore`; max_seconds: of sound, None for any length; model, device: what `auto`
    means, as on the command line; idle_seconds: without a job, until the model is unloaded; keep_hours: after which
    ended jobs and their files are removed, None for never; lent: runs a job on a GPU that is lent for it, as
    `run.run_alone` does; restorer: a face restorer that jobs may use, not on a lent GPU; gpus: that jobs share, as
    --gpus names them, None for one device; prepared_bytes, shared: see `PreparedFilms`, 0 keeps none. Raises UserError
    for options out of range.

    The worker owns every file in the folders of its jobs: they go with `remove`, or after `keep_hours`. Files that a
    job does not need any more go when it ends.
    """

    def __init__(
        self,
        folder: Path,
        queue_size: int = 20,
        max_seconds: float | None = None,
        model: str = "auto",
        device: str = "auto",
        idle_seconds: float = IDLE_SECONDS,
        keep_hours: float | None = None,
        lent: RunAlone | None = None,
        limits: VisitorLimits = NO_LIMITS,
        restorer: Path | None = None,
        gpus: str | None = None,
        prepared_bytes: int = 0,
        shared: bool = False,
    ):
        check_option("The most seconds of sound", max_seconds, 0.01, optional=True)
        check_option("The seconds until the model is unloaded", idle_seconds, 0)
        check_option("The hours that results are kept", keep_hours, 1e-9, optional=True)
        self.store = JobStore(folder, queue_size, limits)
        self.prepared = PreparedFilms(self.store, prepared_bytes, shared)
        self.folder, self.max_seconds = folder, max_seconds
        self.model, self.device_name, self.gpus = model, device, gpus
        self.idle_seconds, self.keep_hours, self.lent = idle_seconds, keep_hours, lent
        self.restorer = None if lent else restorer
        self.server = secrets.token_hex(6)  # identifies this server among others at the same address
        self.machine: Machine | None = None
        self.runner: Runner | None = None
        self.problem: str | None = None  # why there is no machine
        self.ready = threading.Event()  # set when there is a machine or a problem
        self.monitor: Monitor | None = None
        self.speeds: Speeds | None = None
        self._closed = threading.Event()
        self.previews = Previews(
            lambda: self._closed.is_set() or any(self.store.load_counts()), self.store.wake, self.restorer
        )
        self._history: tuple[float, History] | None = None  # of the last LIVE_SECONDS, and when it was taken
        self._history_lock = threading.Lock()
        self._idle_since = time.monotonic()
        self._thread = threading.Thread(target=self._prepare_and_run_jobs, name="jobs", daemon=True)

    # ---- for every thread

    def start(self) -> None:
        """Load the jobs of earlier servers and start the thread. Raises UserError if they cannot be read."""
        self.store.load()
        self._thread.start()

    def close(self) -> None:
        """End the threads. The next server resumes the running jobs, and runs those that wait."""
        self._closed.set()
        for job in self.store.close():
            if not job.cancel_requested.is_set():
                job.interrupted = True
                job.cancel_requested.set()
        for job in self.store.all():
            if job.comparison:
                job.comparison.cancel.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_SECONDS + (SESSION_SECONDS if self.gpus else 0))
        if self.monitor:
            self.monitor.stop()

    def submit(self, request: Request, visitor: str, names: Sequence[str] | None = None) -> Job:
        """Take ownership of the files of a request, probe them, and queue the job.

        The job's folder gets links to the files, see `inputs.store_inputs`: they must not be changed in place
        afterwards, but their own names may be removed at once. names: the user's, of `request.files`. Raises UserError
        for files that cannot be used, sound that is too long, a full queue or disk, and at a visitor's limits.
        """
        if request.restore and self.restorer is None:
            raise UserError(NO_RESTORER)
        owner = owner_of(visitor)
        self.store.check_room(owner)
        self.store.check_stored(owner)
        names = tuple(names or (path.name for path in request.files))
        folder = self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(8)}"
        try:
            request = store_inputs(request, names, folder, self.store.all())
            self.store.check_stored(owner, folder)
            try:
                info = probe_video(request.video, request.video_track).at_choice(request.fps)
                # No more of the sounds is decoded than they may last.
                tracks = [request.audio_track, *[None] * len(request.files)]
                sounds = [
                    probe_audio(path, track, max_seconds=self.max_seconds)
                    for path, track in zip(request.files[1:], tracks, strict=False)
                ]
            except UserError as error:
                raise UserError(with_user_names(error, dict(zip(request.files, names, strict=True)))) from None
            seconds = max(sound.duration for sound in (sounds[-1:] if request.sound else sounds))
            job = Job(request, owner, folder, names, (info.width, info.height), seconds, str(info.rate))
            job.messages += info.remarks
            job.remarks = len(job.messages)
            self.store.add(job)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return job

    def again(self, job_id: str, visitor: str, **changes: Any) -> Job:
        """Run a job's files once more, with some settings changed.

        Returns a new job, or the same one if it failed, nothing is changed, and there are finished segments to resume
        after. Raises UserError, also for unknown settings.
        """
        job = self.store.find(job_id, visitor)
        if unknown := changes.keys() - job.request.settings().keys():
            raise UserError(
                f"There is no setting '{min(unknown)}' to change: give some of {', '.join(job.request.settings())}."
            )
        request = replace(job.request, **changes)
        if request == job.request and self.store.retry(job):
            return job
        return self.submit(request, visitor, job.names)

    def live(self, since: float = 0.0) -> dict[str, Any]:
        """The machine's curves after the time `since`, seconds of the monitor, at most the last LIVE_SECONDS."""
        if self.monitor is None:
            return NO_CURVES
        now = time.monotonic()
        with self._history_lock:
            if self._history is None or now - self._history[0] > LIVE_INTERVAL:
                self._history = now, self.monitor.snapshot(LIVE_SECONDS)
            history = self._history[1]
        return curves_since(history, since)

    def cancel(self, job_id: str, visitor: str, keep: bool = False) -> Job:
        """End a job, or the comparison of one that has ended; keep: leave the finished frames as a result.

        The first call decides: a job that is cancelled with `keep` stays kept, and one without cannot be kept any more.
        Raises UserError for another's job, and for one that runs on a lent GPU.
        """
        job = self.store.find(job_id, visitor)
        if job.comparison:
            job.comparison.cancel.set()
        self.store.cancel(job, keep, can_interrupt=self.lent is None)
        return job

    def compare(self, job_id: str, visitor: str) -> Job:
        """Start making the side-by-side video, unless it is there; `cancel` ends it. Raises UserError."""
        job = self.store.find(job_id, visitor)
        if job.output is None:
            raise UserError("There is no result yet to put beside the original: watch the job until it is done.")
        with self.store.lock:
            if job.comparison is None or job.comparison.state in (CANCELLED, FAILED):
                start_comparison(job, job.output, self.store)
        return job

    def remove(self, job_id: str, visitor: str) -> None:
        """Forget a job and delete its files. Raises UserError for another's, and for one that runs."""
        job = self.store.find(job_id, visitor)
        if job.state == WAITING:
            self.store.cancel(job, keep=False)
        if job.unfinished:  # it has begun meanwhile, or long before
            raise UserError("This job has not ended yet: cancel it first.")
        self.store.remove(job)

    def describe(
        self, request: Request, seconds: float | None, video_fps: float | None = None, people: int = 1
    ) -> tuple[str, str, str | None]:
        """What a request means on this machine, in one line, and in detail, and how long one frame of it takes.

        seconds, video_fps: of its sound and its video, None if unknown; people: who say a voice. Of the frame "" is
        returned if unknown, None where it is not offered. Waits until the machine has been inspected. Raises UserError.
        """
        import torch

        self.ready.wait()
        if self.machine is None or self.speeds is None:
            raise UserError(self.problem or "")
        checkpoint = self._find_checkpoint(request)
        lent = self.lent is not None
        plan = make_plan(at_level(request, self.machine), checkpoint, torch.device(self.machine.device), self.restorer)
        known = request, checkpoint, plan, self.machine, self.speeds
        preview = None if lent or self.gpus is not None else describe_preview(*known)
        return *describe_request(*known, seconds, video_fps, lent, people), preview

    def find_models(self) -> None:
        """Update which models are here and what `auto` means, after one was fetched or removed."""
        if self.machine is None:
            return
        import torch

        models = list_models(self.model, torch.device(self.machine.device), self.lent is not None)
        self.machine = replace(self.machine, **models)

    def wait(self, job: Job, timeout: float) -> bool:
        """Wait for a job to end, at most `timeout` seconds; returns whether it has."""
        until = time.monotonic() + timeout
        while job.unfinished and time.monotonic() < until:
            time.sleep(0.05)
        return not job.unfinished

    # ---- for the threads of the jobs

    def _prepare_and_run_jobs(self) -> None:
        """Inspect the machine, then run jobs, with a thread for each GPU. A Ray session is this thread's."""
        with ExitStack() as stack:
            try:
                self._inspect(stack)
            except UserError as error:
                self.problem = str(error)
            except Exception as error:
                log.exception("The machine could not be inspected")
                self.problem = f"The machine could not be looked at ({type(error).__name__}: {error}): see the console."
            if self.problem:
                log.error(self.problem)
            self.ready.set()
            self._idle_since = time.monotonic()
            others = [
                threading.Thread(target=self._run_jobs, name=f"jobs-{number}", daemon=True)
                for number in range(1, self.store.gpus)
            ]
            for thread in others:
                thread.start()
            self._run_jobs()
            for thread in others:
                thread.join()

    def _inspect(self, stack: ExitStack) -> None:
        """Start the monitor, inspect the machine, and choose where jobs run. Raises UserError, and whatever else goes
        wrong.

        stack: closed when no job runs any more.
        """
        from latentsync.checkpoints.releases import home
        from optim.monitor import Monitor

        self.speeds = Speeds(home() / "speeds.json")
        self.monitor = Monitor(rate=1.0, seconds=3600).start()
        numbers = shared_gpus(self.gpus, self.device_name)
        machine = inspect_machine(self.folder, self.model, self.device_name, self.lent is not None, numbers)
        if self.lent:
            self.runner = OnLentGpu(self.lent, self.model, machine)
        elif numbers:
            import torch

            from optim.cluster.session import local_session

            stack.enter_context(local_session(len(numbers), numbers if machine.device != "cpu" else ()))
            threads = torch.get_num_threads()
            self.runner = OnGpus(self.model, machine, self.monitor, self.speeds, threads, self.restorer, self.prepared)
        else:
            self.runner = InProcess(machine, self.monitor, self.speeds, self.restorer, self.prepared)
        self.store.gpus = machine.gpus
        self.prepared.trim()
        self.machine = machine

    def _run_jobs(self) -> None:
        while not self._closed.is_set():
            try:
                self._run_next_job()
            except BaseException:  # whatever it is, the next job may do better
                log.exception("A job ended in an unexpected way")
                self._closed.wait(1.0)

    def _run_next_job(self) -> None:
        """Run the next job, or wait for one and unload what is idle."""
        if self.keep_hours is not None:
            self.store.remove_old(self.keep_hours)
        runner = self.runner
        if isinstance(runner, InProcess) and self.machine and self.speeds:
            find = self._find_checkpoint
            painted = self.previews.paint_all(
                lambda job: runner.load(job, find(job.request)), self.machine, self.speeds
            )
            if painted:
                self._idle_since = time.monotonic()
        job = self.store.take_next(max(1.0, min(self.idle_seconds, 60.0)), self.previews.are_waiting)
        if job is None:
            idle = time.monotonic() - self._idle_since > self.idle_seconds
            if self.runner and idle and self.store.load_counts() == (0, 0):
                self._idle_since = math.inf  # once is enough
                self.runner.unload()
            return
        state = FAILED
        try:
            if self.runner and self.machine and self.monitor:
                state = execute(job, self.machine, self.runner, self._find_checkpoint, self.monitor)
            else:
                state = refuse(job, self.problem or "This machine cannot be used.")
        except BaseException:  # recording its end has failed
            job.set_error(FAULT.format("see there"))
            job.ended = time.time()
            raise
        finally:
            self._idle_since = time.monotonic()
            self.store.end(job, state)

    def _find_checkpoint(self, request: Request) -> "Checkpoint":
        """The model of a request, as it is on this machine now. Raises UserError."""
        import torch

        if self.machine is None:
            raise UserError(self.problem or "This machine cannot be used.")
        configured = request.model in ("auto", self.machine.chosen) and self.model != "auto"  # maybe a folder
        name = self.model if configured else request.model
        return find_checkpoint(name, torch.device(self.machine.device), self.lent is not None)
