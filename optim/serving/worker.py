"""The thread that runs the jobs of a page, one after the other, and what a page asks of it.

    worker = Worker(Path("outputs"))
    worker.start()
    job = worker.submit(Request(video, audio), visitor)
    worker.cancel(job.id, visitor, keep=True)

Nothing here knows of a page or a server. torch is imported by the worker's thread, so that a page can be shown before.
The model stays loaded between jobs and is unloaded after a while without any.
"""

import gc
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentsync.errors import UserError, is_out_of_memory
from latentsync.media import probe_audio, probe_video
from latentsync.media.segments import discard
from optim.serving.comparison import start_comparison
from optim.serving.curves import NO_CURVES, latest, live, thinned
from optim.serving.estimate import describe_request
from optim.serving.inputs import store_inputs, with_user_names
from optim.serving.job import (
    CANCELLED,
    DONE,
    FAILED,
    RUNNING,
    WAITING,
    Job,
    Request,
    finished_frames,
    owner_of,
    save_job,
)
from optim.serving.limits import NO_LIMITS, Limits, check_option
from optim.serving.machine import Machine, inspect_machine
from optim.serving.models import find_checkpoint, list_models
from optim.serving.run import Cancelled, check_cancel, out_of_memory, run_job
from optim.serving.speeds import Speeds, speed_key
from optim.serving.store import JobStore

if TYPE_CHECKING:  # torch takes seconds to load
    from latentsync.checkpoints.find import Checkpoint
    from latentsync.checkpoints.load import Models
    from optim.monitor import History, Monitor

log = logging.getLogger(__name__)

IDLE_SECONDS = 600.0  # without a job, until the model is unloaded
LIVE_SECONDS = 120.0  # of the curves of the machine
LIVE_INTERVAL = 0.5  # seconds within which everybody gets the same curves
JOIN_SECONDS = 10.0  # that `close` waits for the thread
FAULT = (
    "Something inside the program failed ({}); its console says where. Your files are unharmed: try again, or with "
    "other settings."
)
RunAlone = Callable[[Request, Path, str], dict[str, Any]]  # see `run.run_alone`
GPU_FAILED = (
    "The GPU has failed, and this server cannot use it any more: start the server again. Your files are unharmed, and "
    "the job can be run again then."
)


class Worker:
    """The queue of jobs and the thread that works on it.

    folder, queue_size, limits: see `JobStore`; max_seconds: of sound, None for any length; model, device: what `auto`
    means, as on the command line; keep_hours: after which finished jobs and their files are removed, None for never;
    lent: does what `run.run_alone` does, where a GPU is only lent to it. Raises UserError for options out of range.

    The worker owns every file in the folders of its jobs: they go with `remove`, or after `keep_hours`. What a job does
    not need any more goes when it ends.
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
        limits: Limits = NO_LIMITS,
    ):
        check_option("The length of the queue", queue_size, 1, whole=True)
        check_option("The most seconds of sound", max_seconds, 0.01, optional=True)
        check_option("The seconds until the model is unloaded", idle_seconds, 0)
        check_option("The hours that results are kept", keep_hours, 1e-9, optional=True)
        self.store = JobStore(folder, queue_size, limits)
        self.folder, self.max_seconds = folder, max_seconds
        self.model, self.device_name = model, device
        self.idle_seconds, self.keep_hours, self.lent = idle_seconds, keep_hours, lent
        self.server = secrets.token_hex(6)  # tells this server from those before and after it at the same address
        self.machine: Machine | None = None
        self.problem: str | None = None  # why there is none
        self.ready = threading.Event()  # set when one of the two is there
        self.monitor: Monitor | None = None
        self.speeds: Speeds | None = None
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._history: tuple[float, History] | None = None  # of the last LIVE_SECONDS, and when it was taken
        self._history_lock = threading.Lock()
        self._models: Models | None = None
        self._loaded: Checkpoint | None = None
        self._checkpoint: Checkpoint | None = None  # of the job that runs
        self._idle_since = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)

    # ---- for every thread

    def start(self) -> None:
        """Load the jobs of earlier servers and begin to work. Raises UserError where they cannot be read."""
        self.store.load()
        self._thread.start()

    def close(self) -> None:
        """End the thread. The next server resumes the job that runs, and has those that wait in its queue."""
        self._closed.set()
        for job in self.store.all():
            if job.state == RUNNING:
                self._interrupt(job)
            if job.comparison:
                job.comparison.cancel.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_SECONDS)
        if self.monitor:
            self.monitor.stop()

    def _interrupt(self, job: Job) -> None:
        if not job.cancel_requested.is_set():
            job.interrupted = True
            job.cancel_requested.set()

    def submit(self, request: Request, visitor: str, names: tuple[str, str] | None = None) -> Job:
        """Take ownership of the files of a request, probe them, and put the job into the queue.

        The job's folder gets names of its own for the files, see `inputs.store_inputs`: they must not be changed in
        place afterwards, and the names they had may go at once. names: what the user calls the files. Raises UserError
        for files that cannot be used, a sound that is too long, a full queue or disk, and at a visitor's limits.
        """
        owner = owner_of(visitor)
        self.store.check_room(owner)
        self.store.check_stored(owner)
        names = names or (request.video.name, request.audio.name)
        folder = self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(8)}"
        try:
            video, audio = store_inputs(request, names, folder, self.store.all())
            self.store.check_stored(owner, folder)
            try:
                info = probe_video(video, request.video_track)
                # No more of the sound is decoded than it may last.
                sound = probe_audio(audio, request.audio_track, max_seconds=self.max_seconds)
            except UserError as error:
                raise UserError(with_user_names(error, {video: names[0], audio: names[1]})) from None
            request = replace(request, video=video, audio=audio)
            job = Job(request, owner, folder, names, (info.width, info.height), sound.duration)
            job.messages += info.remarks
            job.remarks = len(job.messages)
            self.store.add(job)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._wake.set()
        return job

    def again(self, job_id: str, visitor: str, **changes: Any) -> Job:
        """The same files with some settings changed: a new job, or a failed one that resumes.

        Raises UserError, also for unknown settings.
        """
        job = self.store.find(job_id, visitor)
        if unknown := changes.keys() - job.request.settings().keys():
            raise UserError(
                f"There is no setting '{min(unknown)}' to change: give some of {', '.join(job.request.settings())}."
            )
        request = replace(job.request, **changes)
        if request == job.request and self.store.retry(job):
            self._wake.set()
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
        return live(history, since)

    def cancel(self, job_id: str, visitor: str, keep: bool = False) -> Job:
        """End a job, or the comparison of one that has ended; keep: leave what is finished as a result.

        The first call decides: a job that is cancelled with `keep` stays kept, and one without cannot be kept any more.
        Raises UserError for another's job, and for one that runs on a lent GPU.
        """
        job = self.store.find(job_id, visitor)
        if job.comparison:
            job.comparison.cancel.set()
        with self.store.lock:
            if self.lent and job.state == RUNNING:
                raise UserError("This job runs in one call on a GPU that is lent for it: wait until it is done.")
            if not job.cancel_requested.is_set():
                job.keep = keep
                job.cancel_requested.set()
            if job in self.store.waiting:
                self.store.waiting.remove(job)
                job.ended, job.doing = time.time(), "cancelled"
                discard(job.planned)  # what an earlier server had finished
                save_job(job, CANCELLED)
                job.state = CANCELLED
        return job

    def compare(self, job_id: str, visitor: str) -> Job:
        """Begin to put original and result side by side, once; `cancel` ends it. Raises UserError."""
        job = self.store.find(job_id, visitor)
        if job.output is None:
            raise UserError("There is no result yet to put beside the original: watch the job until it is done.")
        with self.store.lock:
            if job.comparison is None or job.comparison.state not in (WAITING, RUNNING, DONE):
                start_comparison(job, job.output, self.store)
        return job

    def remove(self, job_id: str, visitor: str) -> None:
        """Forget a job and delete its files. Raises UserError for another's, or one that has not ended."""
        job = self.store.find(job_id, visitor)
        if job.state in (WAITING, RUNNING):
            raise UserError("This job has not ended yet: cancel it first.")
        self.store.remove(job)

    def describe(self, request: Request, seconds: float | None) -> tuple[str, str]:
        """What a request means on this machine, in one line, and the same in detail.

        seconds: of its sound, None where there is none yet. Waits until the machine has been inspected. Raises
        UserError.
        """
        self.ready.wait()
        if self.machine is None or self.speeds is None:
            raise UserError(self.problem or "")
        checkpoint = self._find_checkpoint(request)
        return describe_request(request, checkpoint, self.machine, self.speeds, seconds, self.lent is not None)

    def find_models(self) -> None:
        """Look again which models are here and what `auto` is, as one may have been fetched, or removed."""
        if self.machine is None:
            return
        import torch

        models = list_models(self.model, torch.device(self.machine.device), self.lent is not None)
        self.machine = replace(self.machine, **models)

    def wait(self, job: Job, timeout: float) -> bool:
        """Wait for a job to end, at most that many seconds; whether it has."""
        until = time.monotonic() + timeout
        while job.state in (WAITING, RUNNING) and time.monotonic() < until:
            time.sleep(0.05)
        return job.state not in (WAITING, RUNNING)

    # ---- for the worker's thread

    def _work(self) -> None:
        try:
            self._inspect()
        except UserError as error:
            self.problem = str(error)
        except Exception as error:
            log.exception("The machine could not be inspected")
            self.problem = f"The machine could not be looked at ({type(error).__name__}: {error}): see the console."
        if self.problem:
            log.error(self.problem)
        self.ready.set()
        self._idle_since = time.monotonic()
        while not self._closed.is_set():
            try:
                self._work_once()
            except BaseException:  # whatever it is, the next job may do better
                log.exception("A job ended in an unexpected way")
                self._closed.wait(1.0)

    def _inspect(self) -> None:
        from latentsync.checkpoints.releases import home
        from optim.monitor import Monitor

        self.speeds = Speeds(home() / "speeds.json")
        self.monitor = Monitor(rate=1.0, seconds=3600).start()
        self.machine = inspect_machine(self.folder, self.model, self.device_name, self.lent is not None)

    def _work_once(self) -> None:
        """Run the next job, or wait for one."""
        if self.keep_hours is not None:
            self.store.remove_old(self.keep_hours)
        self._wake.clear()  # before the look at what it stands for, so that none is missed
        job = self.store.take_next()
        if job is None:
            if not self._closed.is_set():
                self._wake.wait(timeout=max(1.0, min(self.idle_seconds, 60.0)))
            if self._models is not None and time.monotonic() - self._idle_since > self.idle_seconds:
                self._unload()
            return
        if self._closed.is_set():  # `close` may not have seen that it runs
            self._interrupt(job)
        try:
            self._perform(job)
        finally:
            if job.state == RUNNING:  # what follows a job's end has failed, too
                self._fail(job, FAULT.format("see there"))
                job.ended, job.state = time.time(), FAILED
            self._idle_since = time.monotonic()

    def _perform(self, job: Job) -> None:
        """Run a job, whatever its end."""
        job.starts, job.frames_at_start = job.starts + 1, finished_frames(job)
        save_job(job, RUNNING)  # whatever ends the server from here on, the next one finds it so
        job.timeline = {"stages": {}}
        state = self._run(job)
        job.ended = time.time()
        job.playable = 0
        with suppress(OSError):  # its folder may be gone, or the file be open elsewhere on Windows
            job.first.unlink()
        if state == CANCELLED and job.interrupted:
            job.reset()
            job.starts, state = 0, WAITING
        try:
            self._save_timeline(job)
        except Exception:  # a result without curves is a result
            log.exception("The curves of a job could not be stored")
        try:
            save_job(job, state)
        finally:
            job.state = state  # the last thing: whoever sees it finds all else as it is to stay

    def _run(self, job: Job) -> str:
        """Run a job and write into it what came of it; returns its final state."""
        from latentsync.pipeline import StopEarly

        self._checkpoint = None
        failed = False
        try:
            if self.machine is None or self.monitor is None or self.speeds is None:
                raise UserError(self.problem or "This machine cannot be used.")
            if self.lent:
                self._run_lent(job, self.lent)
            else:
                check_cancel(job)
                models = self._load(job)
                check_cancel(job)
                run_job(
                    job, models, self.monitor, self.speeds, speed_key(self._find_checkpoint(job.request), self.machine)
                )
            early = bool(job.report and job.report["ended_early"])
            job.doing = "stopped; the finished part is kept" if early else "done"
            return CANCELLED if early else DONE
        except (Cancelled, StopEarly):
            job.doing = "cancelled"
            if not job.interrupted:
                discard(job.planned)
            return CANCELLED
        except UserError as error:
            names = {job.request.video: job.names[0], job.request.audio: job.names[1]}
            remedy = {"label": "Choose another video", "focus": "video"} if "shows no face" in str(error) else None
            self._fail(job, with_user_names(error, names), remedy)
        except BaseException as error:  # also a SystemExit of a library: it would end the thread without a message
            failed = True
            if self.machine is not None and isinstance(error, Exception) and is_out_of_memory(error):
                self._fail(job, *out_of_memory(self.machine, self._checkpoint))
            else:
                log.exception("A job failed")
                self._fail(job, FAULT.format(type(error).__name__))
        if failed and not self.lent:  # not before the error is gone, whose traceback holds what the run had in memory
            try:
                self._unload()
            except RuntimeError:
                log.exception("The GPU has failed")
                self._fail(job, GPU_FAILED)
        return FAILED

    def _fail(self, job: Job, error: str, remedy: dict[str, Any] | None = None) -> None:
        job.doing, job.error, job.remedy = "failed", error, remedy

    @property
    def _inspected(self) -> Machine:
        """The machine, for what is only called when it has been inspected."""
        if self.machine is None:
            raise UserError(self.problem or "This machine cannot be used.")
        return self.machine

    def _run_lent(self, job: Job, lent: RunAlone) -> None:
        job.doing = "running on a GPU that is lent for it; how far it is cannot be seen here"
        self._checkpoint = self._find_checkpoint(job.request)
        name = self._checkpoint.name
        model = name if self.model == "auto" or name != self._inspected.chosen else self.model
        job.report, job.output = lent(job.request, job.planned, model), job.planned

    def _find_checkpoint(self, request: Request) -> "Checkpoint":
        """The model of a request, as it is on this machine now. Raises UserError."""
        import torch

        own = request.model == self._inspected.chosen and self.model != "auto"  # the folder that the server was given
        name = self.model if own or request.model == "auto" else request.model
        return find_checkpoint(name, torch.device(self._inspected.device), self.lent is not None)

    def _load(self, job: Job) -> "Models":
        """The models of a job: those that are loaded, or others in their place."""
        import torch

        from latentsync.checkpoints.load import load_models

        checkpoint = self._checkpoint = self._find_checkpoint(job.request)
        if checkpoint.remark:
            job.messages.append(checkpoint.remark)
            checkpoint = replace(checkpoint, remark=None)  # the same files, however they were named
        if self._models is None or self._loaded != checkpoint:
            self._unload()
            job.doing = f"loading the model {checkpoint.name}"
            self._models, self._loaded = load_models(checkpoint, torch.device(self._inspected.device)), checkpoint
        return self._models

    def _unload(self) -> None:
        """Free the model. Raises RuntimeError where the GPU has failed for good, as CUDA does at every call then."""
        import torch

        self._models = self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _save_timeline(self, job: Job) -> None:
        """Store the machine's curves during a job beside its stages."""
        if self.monitor is None or job.report is None or job.started is None:
            return
        seconds = time.time() - job.started
        if history := latest(self.monitor.snapshot(), seconds):
            job.timeline = (job.timeline or {}) | thinned(history, seconds)  # the old one may be being sent
