"""Jobs for a page: a queue, and one thread that works on it beside the server.

    worker = Worker(Path("outputs"))
    worker.start()
    job = worker.submit(Request(video, audio), visitor)
    worker.cancel(job.id, visitor, keep=True)

Nothing here knows of a page or a server. torch is imported by the worker's thread, so that a page can be shown before.
The model stays loaded between jobs and is let go after a while without any.
"""

import gc
import math
import os
import secrets
import shutil
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentsync import FPS, STAGES
from latentsync.errors import UserError, is_out_of_memory
from latentsync.media import probe_audio, probe_video
from latentsync.media.segments import discard
from optim.serving.curves import NO_CURVES, latest, live, thinned
from optim.serving.inputs import store_inputs, stored_bytes, unwritten
from optim.serving.job import (
    CANCELLED,
    COMPARED_SECONDS,
    DONE,
    FAILED,
    RUNNING,
    WAITING,
    Comparison,
    Job,
    Request,
    finished_frames,
    kept,
    owner_of,
    write_down,
)
from optim.serving.limits import NO_LIMITS, Limits, check_option
from optim.serving.models import find_checkpoint, list_models, recommended_model
from optim.serving.preview import Preview
from optim.serving.run import Cancelled, Progress, interruptible, log, make_plan, out_of_memory
from optim.serving.speeds import Speeds

if TYPE_CHECKING:  # torch takes seconds to load
    import torch

    from latentsync.checkpoints.find import Checkpoint
    from latentsync.checkpoints.load import Models
    from optim.monitor import History, Monitor

IDLE_SECONDS = 600.0  # without a job, until the model is let go
KEPT_JOBS = 50  # finished ones that a visitor finds in the list
LIVE_SECONDS = 120.0  # of the curves of the machine
FAULT = (
    "Something inside the program failed ({}); its console says where. Your files are unharmed: try again, or with "
    "other settings."
)
GPU_FAILED = (
    "The GPU has failed, and this server cannot use it any more: start the server again. Your files are unharmed, and "
    "the job can be run again then."
)


@dataclass(frozen=True)
class Machine:
    """What the worker found when it looked around."""

    device: str  # torch's name
    device_name: str  # in words
    recommended: float  # level, 0 to 1
    models: tuple[dict[str, Any], ...]  # name, resolution, present, guidance (what suits it), remark
    chosen: str  # the model that `auto` is
    best: str  # the model that suits it, there or not
    why: str  # that one, as a sentence
    advice: tuple[dict[str, str], ...]
    torch: str


def device_words(device: "torch.device") -> str:
    """The device's own name."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    from latentsync.machine import usable_cores
    from optim.hardware import processor_name

    return f"{processor_name()}, {usable_cores()} cores"


class Worker:
    """The queue and the thread.

    folder: each job gets a folder of its own in it; queue_size: jobs that may wait; max_seconds: of sound, None for
    any length; model, device: what `auto` means, as on the command line; keep_hours: after which finished jobs and
    their files are removed, None for never; lent: does what `run.run_alone` does, where a GPU is only lent to it;
    limits: of each visitor. Raises UserError for options out of range.

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
        lent: Callable[[Request, Path, str], dict[str, Any]] | None = None,
        limits: Limits = NO_LIMITS,
    ):
        check_option("The length of the queue", queue_size, 1, whole=True)
        check_option("The most seconds of sound", max_seconds, 0.01, optional=True)
        check_option("The seconds until the model is unloaded", idle_seconds, 0)
        check_option("The hours that results are kept", keep_hours, 1e-9, optional=True)
        self.folder, self.queue_size, self.max_seconds = folder, queue_size, max_seconds
        self.model, self.device_name = model, device
        self.idle_seconds, self.keep_hours = idle_seconds, keep_hours
        self.lent, self.limits = lent, limits
        self.server = secrets.token_hex(6)  # names this one among those that come after each other at an address
        self.machine: Machine | None = None
        self.problem: str | None = None  # why there is none
        self.ready = threading.Event()  # set when one of the two is there
        self.monitor: Monitor | None = None
        self.speeds: Speeds | None = None
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}  # the oldest first
        self._waiting: deque[Job] = deque()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._recent: tuple[float, History] | None = None  # the machine's curves, and when they were taken
        self._models: Models | None = None
        self._loaded: Checkpoint | None = None
        self._ran: Checkpoint | None = None  # by the job that runs, or was to be
        self._comparing = threading.Lock()  # one comparison at a time, whoever asks
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)

    # ---- for every thread

    def start(self) -> None:
        """Find the jobs of earlier servers again, and begin to work; those that they had not finished go on.

        Raises UserError where they cannot be read.
        """
        try:
            found = {job.id: job for job in kept(self.folder)}
        except OSError as error:
            raise UserError(
                f"The folder of the results '{self.folder}' cannot be read ({unwritten(error)}): give another with "
                "--outputs."
            ) from error
        with self._lock:  # the page may have been used already
            self._jobs = found | self._jobs
            waiting = sorted((job for job in found.values() if job.state == WAITING), key=lambda job: job.queued)
            self._waiting.extendleft(reversed(waiting))
        self._thread.start()

    def close(self) -> None:
        """End the thread. The next server goes on with the job that runs, and with those that wait."""
        self._closed.set()
        for job in list(self._jobs.values()):
            if job.state == RUNNING and not job.ending.is_set():
                job.interrupted = True
                job.ending.set()
            if job.comparison:
                job.comparison.ending.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        if self.monitor:
            self.monitor.stop()

    def submit(self, request: Request, visitor: str, names: tuple[str, str] | None = None) -> Job:
        """Take ownership of the files of a request, look at them, and put the job into the queue.

        The job's folder gets names of its own for the files, see `inputs.store_inputs`: they must not be changed in
        place afterwards, and the names they had may go at once. names: what the user calls the files. Raises UserError
        for files that cannot be used, a sound that is too long, a full queue or disk, and at a visitor's limits.
        """
        owner = owner_of(visitor)
        self._check_room(owner)
        self._check_stored(owner)
        names = names or (request.video.name, request.audio.name)
        folder = self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(8)}"
        try:
            video, audio = store_inputs(request, names, folder, list(self._jobs.values()))
            self._check_stored(owner, folder)
            try:
                info = probe_video(video)
                seconds = probe_audio(audio, max_seconds=self.max_seconds).duration  # no more of it is decoded
            except UserError as error:
                raise UserError(said(error, {video: names[0], audio: names[1]})) from None
            fields = request.settings() | {"video": video, "audio": audio}
            size = info.width, info.height
            job = Job(Request(**fields), owner, folder, names, size, seconds)
            job.messages += info.remarks
            job.remarks = len(job.messages)
            write_down(job, WAITING)
            with self._lock:
                self._check_room(owner)
                self._jobs[job.id] = job
                self._waiting.append(job)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._wake.set()
        return job

    def again(self, job_id: str, visitor: str, **changes: Any) -> Job:
        """The same files with some settings changed: a new job, or a failed one that goes on after what it finished.

        Raises UserError, also for settings that there are not.
        """
        job = self.find(job_id, visitor)
        if unknown := changes.keys() - job.request.settings().keys():
            raise UserError(
                f"There is no setting '{min(unknown)}' to change: give some of {', '.join(job.request.settings())}."
            )
        request = replace(job.request, **changes)
        if request == job.request and self._retry(job):
            return job
        return self.submit(request, visitor, job.names)

    def _retry(self, job: Job) -> bool:
        """Put a failed job into the queue again, if it has finished segments to go on after; whether it has."""
        with self._lock:
            if job.state != FAILED or not finished_frames(job):
                return False
            self._check_room(job.owner, kept_too=False)
            job.rewind()
            job.starts, job.queued = 0, time.time()
            write_down(job, WAITING)
            job.state = WAITING
            self._waiting.append(job)
        self._wake.set()
        return True

    def _check_room(self, owner: str, kept_too: bool = True) -> None:
        """Raise UserError where the queue is full, or a visitor has as many jobs as they may."""
        if len(self._waiting) >= self.queue_size:
            raise UserError(f"The queue is full, {len(self._waiting)} jobs wait already: try again in a few minutes.")
        own = [job.state for job in list(self._jobs.values()) if _same(job.owner, owner)]
        unfinished_jobs = own.count(WAITING) + own.count(RUNNING)
        limits = self.limits
        if limits.unfinished and unfinished_jobs >= limits.unfinished:
            raise UserError(
                f"You have {unfinished_jobs} jobs that wait or run, and this server takes {limits.unfinished} of a "
                "visitor: wait until one has ended, or cancel one."
            )
        if kept_too and limits.kept and len(own) >= limits.kept:
            raise UserError(
                f"You have {len(own)} jobs here, and this server keeps {limits.kept} of a visitor: remove those that "
                "you do not need."
            )

    def _check_stored(self, owner: str, new: Path | None = None) -> None:
        """Raise UserError where the files of a visitor's jobs, or of all, take more than they may.

        new: folder of a job that is to come.
        """
        everything = list(self._jobs.values())
        own = [job for job in everything if _same(job.owner, owner)]
        for limit, jobs, sentence in (
            (self.limits.stored, own, "Your files here take {} GB, and this server keeps {} GB of a visitor: remove "
             "jobs that you do not need, or give smaller files."),
            (self.limits.stored_by_all, everything, "The jobs of this server take {} GB of the {} GB that it keeps: "
             "remove jobs that you do not need, or try again later."),
        ):  # fmt: skip
            folders = [*(job.folder for job in jobs), *([new] if new else [])]
            if limit and (taken := stored_bytes(folders)) > limit:
                raise UserError(sentence.format(f"{taken / 1e9:.3g}", f"{limit / 1e9:.3g}"))

    def view(self, job: Job) -> dict[str, Any]:
        """What a visitor may know of a job of theirs, ready for JSON; paths are relative to where files are served."""
        left, rate = job.seconds_left(), job.frames_per_second()
        ending = job.state == RUNNING and job.ending.is_set()
        words = "stopping; what is finished is kept" if job.keep else "cancelling"
        return {
            "id": job.id,
            "state": job.state,
            "doing": words if ending else job.doing,
            "ending": ending,
            "before": self.place(job),
            "names": job.names,
            "created": job.created,
            "elapsed": None if job.started is None else round((job.ended or time.time()) - job.started, 1),
            "frames": job.frames,
            "size": job.size,
            "stages": {stage: job.progress.get(stage, 0) for stage in STAGES},
            "mouths": round(job.progress.get("mouths", 0) + job.part, 1),
            "frames_per_second": rate and round(rate, 2),
            "seconds_left": None if left is None else round(left),
            "picture": f"{job.key}/picture?{job.pictures}" if job.picture and job.state == RUNNING else None,
            "playable": job.playable,
            "files": {name: f"{job.key}/{name}/{path.name}" for name, path in job.files().items()},
            "messages": job.messages,
            "advice": job.advice,
            "error": job.error,
            "remedy": job.remedy,
            "settings": job.request.settings(),
            "report": job.report,
            "timeline": job.timeline if job.report else None,
            "comparison": job.comparison and job.comparison.view(),
            "compared_seconds": min(job.seconds, COMPARED_SECONDS),
        }

    def live(self, since: float = 0.0) -> dict[str, Any]:
        """The machine's curves after the time `since`, seconds of the monitor, and no more than two minutes of it."""
        if self.monitor is None:
            return NO_CURVES
        now = time.monotonic()
        with self._lock:
            if self._recent is None or now - self._recent[0] > 0.5:  # for all who look within it
                self._recent = now, self.monitor.snapshot(LIVE_SECONDS)
            history = self._recent[1]
        return live(history, since)

    def find(self, job_id: str, visitor: str) -> Job:
        """A visitor's own job. Raises UserError, the same for another's as for one that there is not."""
        job = self._jobs.get(job_id)
        if job is None or not _same(job.owner, owner_of(visitor)):
            raise UserError(f"There is no job '{job_id}' of yours: it may have been removed.")
        return job

    def by_key(self, key: str) -> Job | None:
        """The job that a key opens."""
        return next((job for job in list(self._jobs.values()) if _same(job.key, key)), None)

    def jobs_of(self, visitor: str) -> list[Job]:
        """A visitor's jobs, the newest first: all that have not ended, and KEPT_JOBS that have."""
        owner = owner_of(visitor)
        own = [job for job in reversed(list(self._jobs.values())) if _same(job.owner, owner)]
        old = [job for job in own if job.state not in (WAITING, RUNNING)][KEPT_JOBS:]
        return [job for job in own if job not in old]

    def place(self, job: Job) -> int | None:
        """How many jobs come before one that waits; None for one that does not."""
        with self._lock:
            if job not in self._waiting:
                return None
            return self._waiting.index(job) + any(other.state == RUNNING for other in self._jobs.values())

    def load(self) -> tuple[int, int]:
        """Jobs that run and that wait, of all visitors."""
        with self._lock:
            return sum(job.state == RUNNING for job in self._jobs.values()), len(self._waiting)

    def cancel(self, job_id: str, visitor: str, keep: bool = False) -> Job:
        """End a job, or the comparison of one that has ended; keep: leave what is finished as a result.

        What was said first holds: who cancels after "keep" does not lose what is kept, and a run that is being dropped
        cannot be kept any more. Raises UserError for another's job, and for one that runs on a GPU that is lent.
        """
        job = self.find(job_id, visitor)
        if job.comparison:
            job.comparison.ending.set()
        with self._lock:
            if self.lent and job.state == RUNNING:
                raise UserError("This job runs in one call on a GPU that is lent for it: wait until it is done.")
            if not job.ending.is_set():
                job.keep = keep
                job.ending.set()
            if job in self._waiting:
                self._waiting.remove(job)
                job.ended, job.doing = time.time(), "cancelled"
                discard(job.planned)  # what an earlier server had finished
                write_down(job, CANCELLED)
                job.state = CANCELLED
        return job

    def compare(self, job_id: str, visitor: str) -> Job:
        """Begin to put original and result side by side, once; `cancel` ends it. Raises UserError."""
        job = self.find(job_id, visitor)
        if job.output is None:
            raise UserError("There is no result yet to put beside the original: watch the job until it is done.")
        with self._lock:
            if job.comparison is None or job.comparison.state not in (WAITING, RUNNING, DONE):
                job.comparison = Comparison()
                threading.Thread(target=self._compare, args=(job, job.comparison), name="compare", daemon=True).start()
        return job

    def _compare(self, job: Job, comparison: Comparison) -> None:
        """Make a comparison to whatever end; raises nothing."""

        def step(done: int, total: int) -> None:
            if comparison.ending.is_set():
                raise Cancelled
            comparison.done, comparison.total = done, total

        partial = job.compared.with_suffix(".partial.mp4")
        try:
            from optim.serving.compare import side_by_side

            while not self._comparing.acquire(timeout=0.2):  # another is being made
                step(0, 0)
            try:
                step(0, 0)
                comparison.state = RUNNING
                side_by_side(job.request.video, job.output, partial, step, comparison.ending)
            finally:
                self._comparing.release()
            os.replace(partial, job.compared)
            comparison.state = DONE
        except Cancelled:
            comparison.state = CANCELLED
        except UserError as error:
            comparison.error = said(error, {job.request.video: job.names[0], job.output: job.output.name})
            comparison.state = FAILED
        except Exception as error:
            traceback.print_exc()
            comparison.error = (
                f"The side-by-side video could not be made ({type(error).__name__}); the console says where. The "
                "result itself is unharmed."
            )
            comparison.state = FAILED
        finally:
            partial.unlink(missing_ok=True)
            if job.id not in self._jobs:  # it was removed meanwhile
                shutil.rmtree(job.folder, ignore_errors=True)

    def remove(self, job_id: str, visitor: str) -> None:
        """Forget a job and delete its files. Raises UserError for another's, or one that has not ended."""
        job = self.find(job_id, visitor)
        if job.state in (WAITING, RUNNING):
            raise UserError("This job has not ended yet: cancel it first.")
        self._forget(job)

    def _forget(self, job: Job) -> None:
        with self._lock:
            self._jobs.pop(job.id, None)
            if job in self._waiting:
                self._waiting.remove(job)
        if job.comparison:
            job.comparison.ending.set()
        shutil.rmtree(job.folder, ignore_errors=True)

    def describe(self, request: Request, seconds: float | None) -> tuple[str, str]:
        """What a request means on this machine, in one line, and the same in detail.

        seconds: of its sound, None where there is none yet. Waits for the worker to have looked at the machine.
        Raises UserError.
        """
        self.ready.wait()
        import torch

        if self.machine is None:
            raise UserError(self.problem or "")
        from optim.accelerate import details, summary

        device = torch.device(self.machine.device)
        checkpoint = self._checkpoint(request)
        plan = make_plan(request, checkpoint, device)
        line = details(plan, device) + "."
        words = f"{summary(plan, device)}, model {checkpoint.name} ({checkpoint.resolution} px)"
        if self.lent:  # the plan is for the processor that is here, and only its level and steps hold there
            return f"{words}, on {self.machine.device_name}.", line
        if seconds is None:
            return words + ".", line
        frames = math.ceil(seconds * FPS)
        found = self.speeds.estimate(self._where(checkpoint), plan.settings, frames)
        if found is None:
            return words + "; how long it takes here is not known before the first job.", line
        estimate, measured = found
        return f"{words}; {'about' if measured else 'roughly'} {spoken(estimate)} for this clip.", line

    def wait(self, job: Job, timeout: float) -> bool:
        """Whether a job has ended within that many seconds."""
        until = time.monotonic() + timeout
        while job.state in (WAITING, RUNNING) and time.monotonic() < until:
            time.sleep(0.05)
        return job.state not in (WAITING, RUNNING)

    # ---- for the worker's thread

    def _work(self) -> None:
        try:
            self._look()
        except UserError as error:
            self.problem = str(error)
        except Exception as error:
            traceback.print_exc()
            self.problem = f"The machine could not be looked at ({type(error).__name__}: {error}): see the console."
        if self.problem:
            log(self.problem)
        self.ready.set()
        self._idle_since = time.monotonic()
        while not self._closed.is_set():
            try:
                self._work_once()
            except BaseException:  # whatever it is, the next job may do better
                traceback.print_exc()
                self._closed.wait(1.0)

    def _work_once(self) -> None:
        """Run the next job, or wait for one."""
        self._sweep()
        with self._lock:
            job = self._waiting.popleft() if self._waiting else None
            if job:
                job.state, job.started = RUNNING, time.time()
            else:
                self._wake.clear()
        if job and self._closed.is_set():  # `close` has not seen that it runs
            job.interrupted = True
            job.ending.set()
        if job is None:
            self._wake.wait(timeout=max(1.0, min(self.idle_seconds, 60.0)))
            if self._models is not None and time.monotonic() - self._idle_since > self.idle_seconds:
                self._unload()
            return
        try:
            self._perform(job)
        finally:
            if job.state == RUNNING:  # what follows a job's end has failed, too
                self._fail(job, FAULT.format("see there"), None)
                job.ended, job.state = time.time(), FAILED
            self._idle_since = time.monotonic()

    def _sweep(self) -> None:
        """Remove what is too old to be kept."""
        if self.keep_hours is None:
            return
        for job in list(self._jobs.values()):
            if job.ended and time.time() - job.ended > 3600 * self.keep_hours:
                self._forget(job)

    def _look(self) -> None:
        import torch

        from latentsync.checkpoints.releases import home
        from latentsync.options import choose_device
        from optim.doctor import advise, read_facts
        from optim.hardware import gpu_of, recommended_level
        from optim.monitor import Monitor

        self.speeds = Speeds(home() / "speeds.json")
        self.monitor = Monitor(rate=1.0, seconds=3600).start()
        device = torch.device("cpu") if self.lent else choose_device(self.device_name)
        gpu = gpu_of(device)
        best, why = recommended_model(gpu, self.lent is not None)
        found = list_models(self.model, device, self.lent is not None)
        side = next(model["resolution"] for model in found["models"] if model["name"] == found["chosen"])
        self.folder.mkdir(parents=True, exist_ok=True)
        advice = advise(read_facts(side, self.folder))
        self.machine = Machine(
            device=str(device),
            device_name="a GPU lent for each job" if self.lent else device_words(device),
            recommended=recommended_level(gpu).position,
            **found,
            best=best,
            why=why,
            advice=tuple(asdict(each) for each in advice),
            torch=torch.__version__,
        )

    def look_for_models(self) -> None:
        """See anew which models there are and what `auto` is, as one may have been fetched, or removed."""
        if self.machine is None:
            return
        import torch

        found = list_models(self.model, torch.device(self.machine.device), self.lent is not None)
        self.machine = replace(self.machine, **found)

    def _checkpoint(self, request: Request) -> "Checkpoint":
        """The model of a request, as it is on this machine now. Raises UserError."""
        import torch

        own = request.model == self.machine.chosen and self.model != "auto"  # the folder that the server was given
        name = self.model if own or request.model == "auto" else request.model
        return find_checkpoint(name, torch.device(self.machine.device), self.lent is not None)

    def _where(self, checkpoint: "Checkpoint") -> str:
        return f"{checkpoint.name}, {self.machine.device_name}"

    def _load(self, request: Request, job: Job) -> "Models":
        """The models of a request: those at hand, or loaded in their place."""
        import torch

        from latentsync.checkpoints.load import load_models

        device = torch.device(self.machine.device)
        checkpoint = self._ran = self._checkpoint(request)
        if checkpoint.remark:
            job.messages.append(checkpoint.remark)
            checkpoint = replace(checkpoint, remark=None)  # the same files, however they were asked for
        if self._models is None or self._loaded != checkpoint:
            self._unload()
            job.doing = f"loading the model {checkpoint.name}"
            self._models, self._loaded = load_models(checkpoint, device), checkpoint
        return self._models

    def _unload(self) -> None:
        """Let the model go. Raises RuntimeError where the GPU has failed for good, as CUDA does at every call then."""
        import torch

        self._models = self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _perform(self, job: Job) -> None:
        """Run a job to whatever end."""
        from latentsync.pipeline import StopEarly

        job.starts, job.frames_at_start = job.starts + 1, finished_frames(job)
        write_down(job, RUNNING)  # whatever ends the server from here on, the next one finds it so
        job.timeline = {"stages": {}}
        self._ran = None
        state, broken = FAILED, False
        try:
            if self.machine is None:
                raise UserError(self.problem or "This machine cannot be used.")
            self._run_lent(job) if self.lent else self._run(job)
            state = CANCELLED if job.report and job.report["ended_early"] else DONE
            job.doing = "stopped; the finished part is kept" if state == CANCELLED else "done"
        except (Cancelled, StopEarly):
            state, job.doing = CANCELLED, "cancelled"
            if not job.interrupted:
                discard(job.planned)
        except UserError as error:
            names = {job.request.video: job.names[0], job.request.audio: job.names[1]}
            remedy = {"label": "Choose another video", "focus": "video"} if "shows no face" in str(error) else None
            self._fail(job, said(error, names), remedy)
        except BaseException as error:  # also a SystemExit of a library: it ends a thread without a word
            broken = True
            if is_out_of_memory(error):
                self._fail(job, *out_of_memory(self.machine, self._ran))
            else:
                traceback.print_exc()
                self._fail(job, FAULT.format(type(error).__name__), None)
        if broken and not self.lent:  # not before the error is gone, whose traceback holds what the run had in memory
            try:
                self._unload()
            except RuntimeError:
                traceback.print_exc()
                self._fail(job, GPU_FAILED, None)
        job.ended = time.time()
        job.playable = 0
        with suppress(OSError):  # its folder may be gone, or the file be open elsewhere on Windows
            job.first.unlink()
        if state == CANCELLED and job.interrupted:
            job.rewind()
            job.starts, state = 0, WAITING
        try:
            self._keep_timeline(job)
        except Exception:  # a result without curves is a result
            traceback.print_exc()
        try:
            write_down(job, state)
        finally:
            job.state = state  # the last thing: whoever sees it finds all else as it is to stay

    def _fail(self, job: Job, error: str, remedy: dict | None) -> None:
        job.doing, job.error, job.remedy = "failed", error, remedy

    def _run_lent(self, job: Job) -> None:
        job.doing = "running on a GPU that is lent for it; how far it is cannot be seen here"
        output = job.planned
        self._ran = self._checkpoint(job.request)
        name = self._ran.name
        model = name if self.model == "auto" or name != self.machine.chosen else self.model
        job.report, job.output = self.lent(job.request, output, model), output

    def _run(self, job: Job) -> None:
        from latentsync.pipeline import Hooks, StopEarly, lipsync
        from optim.accelerate import accelerate, oom_handler
        from optim.doctor import advise_report
        from optim.hardware import nvml_index

        request = job.request

        def check() -> None:
            if job.ending.is_set():
                raise StopEarly if job.keep else Cancelled

        check()
        models = self._load(request, job)
        check()
        plan = make_plan(request, models, models.device)
        found = self.speeds.estimate(self._where(self._loaded), plan.settings, job.frames)
        job.expected = found[0] if found else None
        job.doing = "preparing the networks"
        accelerate(models, plan, job.messages.append, frames=job.frames)
        check()
        job.doing = "looking at the files"
        step_downs: list[str] = []

        def stepped_down(words: str) -> None:
            step_downs.append(words)
            self.monitor.mark(words)

        relieve = oom_handler(models, plan, job.messages.append, stepped_down)
        progress = Progress(job, plan.settings.steps, self.monitor, check)
        output = job.planned
        preview = Preview(job)
        self.monitor.mark(plan.level.name)
        began = time.monotonic()
        try:
            with interruptible(models, check):
                report = lipsync(
                    request.video,
                    request.audio,
                    output,
                    models,
                    plan.settings,
                    Hooks(on_progress=progress, on_frame=preview, on_wait=check, on_out_of_memory=relieve),
                )
        finally:
            preview.close()
        if not report.ended_early and not step_downs and not report.resumed_from:
            self.speeds.record(self._where(self._loaded), plan.settings, report.frames, time.monotonic() - began)
        gpu = None
        if models.device.type == "cuda" and (history := latest(self.monitor.snapshot(), time.monotonic() - began)):
            gpu = history.gpu(nvml_index(models.device))
        job.advice = [asdict(each) for each in advise_report(report, plan, step_downs, gpu)]
        job.messages.extend(report.remarks)
        job.report = report.as_dict() | {"level": plan.level.name, "position": plan.level.position}
        job.report["step_downs"] = step_downs
        job.output = output
        self.monitor.mark("done")

    def _history(self, job: Job) -> "History | None":
        """The machine since the job started."""
        return latest(self.monitor.snapshot(), time.time() - job.started)

    def _keep_timeline(self, job: Job) -> None:
        """The curves of the job's time beside its stages."""
        if self.monitor is None or job.report is None or (history := self._history(job)) is None:
            return
        job.timeline = job.timeline | thinned(history, time.time() - job.started)  # the old one may be being given away


def said(error: UserError, names: dict[Path, str]) -> str:
    """An error's sentence with the user's names of files in place of ours."""
    text = str(error)
    for path, name in names.items():
        for ours in (f"'{path}'", str(path)):
            text = text.replace(ours, f"'{name}'")
    return text


def spoken(seconds: float) -> str:
    """A duration as one says it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def _same(ours: str, given: str) -> bool:
    """Compared so that the time it takes tells nothing."""
    return secrets.compare_digest(ours.encode(), given.encode())
