"""The thread that runs the jobs of the page, one after the other, and what the page can do with them.

    worker = Worker(Path("outputs"))
    worker.start()
    job = worker.submit(Request(video, audio), visitor)
    worker.cancel(job.id, visitor, keep=True)

Nothing here knows of a page or a server. The thread imports torch, so that the page can be shown before it is loaded.
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
from optim.serving.curves import NO_CURVES, curves_since, last_seconds, thinned_curves
from optim.serving.estimate import describe_preview, describe_request
from optim.serving.inputs import store_inputs, with_user_names
from optim.serving.job import CANCELLED, DONE, FAILED, RUNNING, WAITING, Job, Request, owner_of
from optim.serving.limits import NO_LIMITS, VisitorLimits, check_option
from optim.serving.machine import Machine, inspect_machine
from optim.serving.models import find_checkpoint, list_models
from optim.serving.one_frame import Previews
from optim.serving.records import finished_frames, save_job
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
LIVE_INTERVAL = 0.5  # seconds for which a snapshot of the curves serves all visitors
JOIN_SECONDS = 10.0  # that `close` waits for the thread
FAULT = (
    "Something inside the program failed ({}); its console says where. Your files are unharmed: try again, or with "
    "other settings."
)
GPU_FAILED = (
    "The GPU has failed, and this server cannot use it any more: start the server again. Your files are unharmed, and "
    "the job can be run again then."
)
RunAlone = Callable[[Request, Path, str], dict[str, Any]]  # see `run.run_alone`


class Worker:
    """The queue of jobs and the thread that works on it.

    folder, queue_size, limits: see `JobStore`; max_seconds: of sound, None for any length; model, device: what `auto`
    means, as on the command line; idle_seconds: without a job, until the model is unloaded; keep_hours: after which
    ended jobs and their files are removed, None for never; lent: runs a job on a GPU that is lent for it, as
    `run.run_alone` does. Raises UserError for options out of range.

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
    ):
        check_option("The most seconds of sound", max_seconds, 0.01, optional=True)
        check_option("The seconds until the model is unloaded", idle_seconds, 0)
        check_option("The hours that results are kept", keep_hours, 1e-9, optional=True)
        self.store = JobStore(folder, queue_size, limits)
        self.folder, self.max_seconds = folder, max_seconds
        self.model, self.device_name = model, device
        self.idle_seconds, self.keep_hours, self.lent = idle_seconds, keep_hours, lent
        self.server = secrets.token_hex(6)  # identifies this server among others at the same address
        self.machine: Machine | None = None
        self.problem: str | None = None  # why there is no machine
        self.ready = threading.Event()  # set when there is a machine or a problem
        self.monitor: Monitor | None = None
        self.speeds: Speeds | None = None
        self._wake = threading.Event()
        self._closed = threading.Event()
        self.previews = Previews(lambda: self._closed.is_set() or any(self.store.load_counts()), self._wake.set)
        self._history: tuple[float, History] | None = None  # of the last LIVE_SECONDS, and when it was taken
        self._history_lock = threading.Lock()
        self._models: Models | None = None
        self._loaded: Checkpoint | None = None  # of `_models`
        self._checkpoint: Checkpoint | None = None  # of the running job
        self._idle_since = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)

    # ---- for every thread

    def start(self) -> None:
        """Load the jobs of earlier servers and start the thread. Raises UserError if they cannot be read."""
        self.store.load()
        self._thread.start()

    def close(self) -> None:
        """End the thread. The next server resumes the running job, and runs those that wait."""
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
        """Take ownership of the files of a request, probe them, and queue the job.

        The job's folder gets links to the files, see `inputs.store_inputs`: they must not be changed in place
        afterwards, but their own names may be removed at once. names: the user's names of the files. Raises UserError
        for files that cannot be used, sound that is too long, a full queue or disk, and at a visitor's limits.
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
                info = probe_video(video, request.video_track).at_choice(request.fps)
                # No more of the sound is decoded than it may last.
                sound = probe_audio(audio, request.audio_track, max_seconds=self.max_seconds)
            except UserError as error:
                raise UserError(with_user_names(error, {video: names[0], audio: names[1]})) from None
            request = replace(request, video=video, audio=audio)
            job = Job(request, owner, folder, names, (info.width, info.height), sound.duration, str(info.rate))
            job.messages += info.remarks
            job.remarks = len(job.messages)
            self.store.add(job)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._wake.set()
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

    def describe(self, request: Request, seconds: float | None, video_fps: float | None = None) -> tuple[str, str]:
        """What a request means on this machine, in one line, and in detail.

        seconds, video_fps: of its sound and its video, None if unknown. Waits until the machine has been inspected.
        Raises UserError.
        """
        self.ready.wait()
        if self.machine is None or self.speeds is None:
            raise UserError(self.problem or "")
        checkpoint = self._find_checkpoint(request)
        lent = self.lent is not None
        return describe_request(request, checkpoint, self.machine, self.speeds, seconds, video_fps, lent)

    def describe_preview(self, request: Request) -> str | None:
        """How long one frame of a request takes, "" if unknown; None where it is not offered. Raises UserError."""
        if self.machine is None or self.speeds is None or self.lent:
            return None
        return describe_preview(request, self._find_checkpoint(request), self.machine, self.speeds)

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
        """Start the monitor and inspect the machine. Raises UserError, and whatever else goes wrong."""
        from latentsync.checkpoints.releases import home
        from optim.monitor import Monitor

        self.speeds = Speeds(home() / "speeds.json")
        self.monitor = Monitor(rate=1.0, seconds=3600).start()
        self.machine = inspect_machine(self.folder, self.model, self.device_name, self.lent is not None)

    def _work_once(self) -> None:
        """Run the next job, or wait for one."""
        if self.keep_hours is not None:
            self.store.remove_old(self.keep_hours)
        self._wake.clear()  # before looking for a job, so that no call is missed
        if self.machine and self.speeds and self.previews.paint_all(self._load, self.machine, self.speeds):
            self._idle_since = time.monotonic()
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
            if job.state == RUNNING:  # recording its end has failed, too
                job.set_error(FAULT.format("see there"))
                job.ended, job.state = time.time(), FAILED
            self._idle_since = time.monotonic()

    def _perform(self, job: Job) -> None:
        """Run a job and record how it ended."""
        job.starts, job.frames_at_start = job.starts + 1, finished_frames(job)
        save_job(job, RUNNING)  # the next server finds it so, whatever ends this one
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
            job.state = state  # last: whoever sees it finds everything else in place

    def _run(self, job: Job) -> str:
        """Run a job and say in it how it ended; returns its final state."""
        from latentsync.pipeline import StopEarly

        self._checkpoint = None
        failed = False
        try:
            if self.machine is None or self.monitor is None or self.speeds is None:
                raise UserError(self.problem or "This machine cannot be used.")
            if self.lent:
                self._run_lent(job, self.lent)
            else:
                self._run_here(job, self.machine, self.monitor, self.speeds)
            early = bool(job.report and job.report["ended_early"])
            job.doing = "stopped; the finished part is kept" if early else "done"
            return CANCELLED if early else DONE
        except (Cancelled, StopEarly):
            job.doing = "cancelled"
            if not job.interrupted:
                discard(job.planned_output)
            return CANCELLED
        except UserError as error:
            names = {job.request.video: job.names[0], job.request.audio: job.names[1]}
            remedy = {"label": "Choose another video", "focus": "video"} if "shows no face" in str(error) else None
            job.set_error(with_user_names(error, names), remedy)
        except BaseException as error:  # also a SystemExit of a library: it would end the thread without a message
            failed = True
            if self.machine is not None and isinstance(error, Exception) and is_out_of_memory(error):
                job.set_error(*out_of_memory(self.machine, self._checkpoint))
            else:
                log.exception("A job failed")
                job.set_error(FAULT.format(type(error).__name__))
        if failed and not self.lent:  # after the error is gone, whose traceback holds the run's memory
            try:
                self._unload()
            except RuntimeError:
                log.exception("The GPU has failed")
                job.set_error(GPU_FAILED)
        return FAILED

    @property
    def _inspected(self) -> Machine:
        """The machine. Raises UserError if there is none."""
        if self.machine is None:
            raise UserError(self.problem or "This machine cannot be used.")
        return self.machine

    def _run_here(self, job: Job, machine: Machine, monitor: "Monitor", speeds: Speeds) -> None:
        """Run a job with the model in this process; only this call holds it, so that it can be unloaded after it."""
        check_cancel(job)
        models = self._load(job)
        check_cancel(job)
        run_job(job, models, monitor, speeds, speed_key(models.name, machine))

    def _run_lent(self, job: Job, lent: RunAlone) -> None:
        job.doing = "running on a GPU that is lent for it; how far it is cannot be seen here"
        self._checkpoint = self._find_checkpoint(job.request)
        name = self._checkpoint.name
        model = name if self.model == "auto" or name != self._inspected.chosen else self.model
        job.report, job.output = lent(job.request, job.planned_output, model), job.planned_output

    def _find_checkpoint(self, request: Request) -> "Checkpoint":
        """The model of a request, as it is on this machine now. Raises UserError."""
        import torch

        configured = request.model in ("auto", self._inspected.chosen) and self.model != "auto"  # maybe a folder
        name = self.model if configured else request.model
        return find_checkpoint(name, torch.device(self._inspected.device), self.lent is not None)

    def _load(self, job: Job) -> "Models":
        """The models of a job: the loaded ones, or others in their place."""
        import torch

        from latentsync.checkpoints.load import load_models

        checkpoint = self._checkpoint = self._find_checkpoint(job.request)
        if checkpoint.remark:
            job.messages.append(checkpoint.remark)
            checkpoint = replace(checkpoint, remark=None)  # the same files under any name
        if self._models is None or self._loaded != checkpoint:
            self._unload()
            job.doing = f"loading the model {checkpoint.name}"
            self._models, self._loaded = load_models(checkpoint, torch.device(self._inspected.device)), checkpoint
        return self._models

    def _unload(self) -> None:
        """Unload the model. Raises RuntimeError if the GPU has failed, as CUDA then does at every call."""
        import torch

        self._models = self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _save_timeline(self, job: Job) -> None:
        """Add the machine's curves during a job to its timeline."""
        if self.monitor is None or job.report is None or job.started is None:
            return
        seconds = time.time() - job.started
        if history := last_seconds(self.monitor.snapshot(), seconds):
            # A new dict, since the old one may be being sent.
            job.timeline = (job.timeline or {}) | thinned_curves(history, seconds)
