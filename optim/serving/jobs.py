"""Jobs for a page: a queue, and one thread that works on it beside the server.

    worker = Worker(Path("outputs"))
    worker.start()
    job = worker.submit(Request(video, audio), visitor)
    worker.cancel(job.id, visitor, keep=True)

Nothing here knows of a page or a server. torch is imported by the worker's thread, so that a page can be shown before.
The model stays loaded between jobs and is let go after a while without any.
"""

import errno
import gc
import math
import os
import secrets
import shutil
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentsync import FPS, STAGES
from latentsync.errors import UserError, short_of_memory
from latentsync.media import probe_audio, probe_video
from optim.serving.curves import NO_CURVES, latest, live, thinned
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
    kept,
    owner_of,
    write_down,
)
from optim.serving.preview import Preview
from optim.serving.speeds import Speeds
from optim.serving.stock import best_for, meant, survey

if TYPE_CHECKING:  # torch takes seconds to load
    import torch

    from latentsync.checkpoints import Checkpoint, Models
    from optim.accelerate import Plan
    from optim.monitor import History, Monitor

IDLE_SECONDS = 600.0  # without a job, until the model is let go
KEPT_JOBS = 50  # finished ones that a visitor finds in the list
LIVE_SECONDS = 120.0  # of the curves of the machine
GPU_FAILED = (
    "The GPU has failed, and this server cannot use it any more: start the server again. Your files are unharmed, and "
    "the job can be run again then."
)


class Cancelled(Exception):
    """Raised inside a run that is to end and leave nothing."""


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
    from optim.hardware import processor_name

    return f"{processor_name()}, {os.cpu_count()} cores"


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
    from latentsync.pipeline import Settings
    from latentsync.sampling import DeepCache
    from optim.accelerate import plan_as_asked

    asked = Settings.suiting(
        model, request.guidance, steps=request.steps, seed=request.seed, crf=request.crf, face=request.face
    )
    overrides: dict[str, Any] = {"vram_fraction": request.vram_fraction, "compile": request.compile}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if request.cache != "level":
        overrides["cache"] = request.cache and DeepCache(request.cache, 0)
    return plan_as_asked(device, model.resolution, asked, request.level, request.batch, **overrides)


def run_alone(request: Request, output: Path, model: str) -> dict[str, Any]:
    """All of a job in one call, for places that lend a GPU to one function at a time, in a process of its own.

    model: as on the command line. Returns the report. Nobody can follow it, or end it. Raises UserError.
    """
    from latentsync.checkpoints import load_models, resolve
    from latentsync.options import choose_device
    from latentsync.pipeline import lipsync
    from optim.accelerate import accelerate, reliever

    device = choose_device("auto")
    models = load_models(resolve(model, device), device)
    plan = make_plan(request, models, device)
    accelerate(models, plan, log)
    relieve = reliever(models, plan, log)
    # In one piece: no later job finds the segments of this one, as each has a folder of its own.
    report = lipsync(request.video, request.audio, output, models, plan.settings, relieve=relieve, segment_frames=None)
    return report.as_dict() | {"level": plan.level.name, "position": plan.level.position, "step_downs": []}


class Worker:
    """The queue and the thread.

    folder: each job gets a folder of its own in it; queue_size: jobs that may wait; max_seconds: of sound, None for
    any length; model, device: what `auto` means, as on the command line; keep_hours: after which finished jobs and
    their files are removed, None for never; lent: does what `run_alone` does, where a GPU is only
    lent to it.
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
    ):
        self.folder, self.queue_size, self.max_seconds = folder, queue_size, max_seconds
        self.model, self.device_name = model, device
        self.idle_seconds, self.keep_hours = idle_seconds, keep_hours
        self.lent = lent
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
        self._closed = False
        self._seen: History | None = None
        self._seen_at = -math.inf
        self._models: Models | None = None
        self._loaded: Checkpoint | None = None
        self._ran: Checkpoint | None = None  # by the job that runs, or was to be
        self._comparing = threading.Lock()  # one comparison at a time, whoever asks
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)

    # ---- for every thread

    def start(self) -> None:
        """Find the jobs of earlier servers again, and begin to work. Raises UserError where they cannot be read."""
        try:
            found = {job.id: job for job in kept(self.folder)}
        except OSError as error:
            raise UserError(
                f"The folder of the results '{self.folder}' cannot be read ({unwritten(error)}): give another with "
                "--outputs."
            ) from error
        with self._lock:  # the page may have been used already
            self._jobs = found | self._jobs
        self._thread.start()

    def close(self) -> None:
        """End the running job and the thread; what waits is dropped."""
        self._closed = True
        for job in list(self._jobs.values()):
            job.ending.set()
            if job.comparison:
                job.comparison.ending.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        if self.monitor:
            self.monitor.stop()

    def submit(self, request: Request, visitor: str, names: tuple[str, str] | None = None) -> Job:
        """Copy the files into a folder of the job's own, look at them, and put the job into the queue.

        names: what the user calls the files. Raises UserError for files that cannot be used, a sound that is too long,
        a full queue, and a full disk.
        """
        self._check_room()
        names = names or (request.video.name, request.audio.name)
        folder = self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(8)}"
        try:
            video, audio = _copied(request, names, folder)
            try:
                info, seconds = probe_video(video), probe_audio(audio).duration
            except UserError as error:
                raise UserError(said(error, {video: names[0], audio: names[1]})) from None
            if self.max_seconds and seconds > self.max_seconds:
                raise UserError(
                    f"'{names[1]}' lasts {seconds:.0f} s, and this server takes {self.max_seconds:.0f} s at most: "
                    "cut it into shorter pieces."
                )
            fields = request.settings() | {"video": video, "audio": audio}
            size = info.width, info.height
            job = Job(Request(**fields), owner_of(visitor), folder, names, size, seconds)
            job.messages += info.remarks
            write_down(job, WAITING)
            with self._lock:
                self._check_room()
                self._jobs[job.id] = job
                self._waiting.append(job)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._wake.set()
        return job

    def again(self, job_id: str, visitor: str, **changes: Any) -> Job:
        """The same files with some settings changed. Raises UserError."""
        job = self.find(job_id, visitor)
        return self.submit(Request(**(vars(job.request) | changes)), visitor, job.names)

    def _check_room(self) -> None:
        if len(self._waiting) >= self.queue_size:
            raise UserError(f"The queue is full, {len(self._waiting)} jobs wait already: try again in a few minutes.")

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
        if now - self._seen_at > 0.5:  # for all who look within it
            self._seen_at, self._seen = now, self.monitor.snapshot(LIVE_SECONDS)
        return live(self._seen, since)

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
        from optim.serving.compare import side_by_side

        def step(done: int, total: int) -> None:
            if comparison.ending.is_set():
                raise Cancelled
            comparison.done, comparison.total = done, total

        partial = job.compared.with_suffix(".partial.mp4")
        try:
            while not self._comparing.acquire(timeout=0.2):  # another is being made
                step(0, 0)
            try:
                step(0, 0)
                comparison.state = RUNNING
                side_by_side(job.request.video, job.output, partial, step)
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
        from optim.accelerate import describe, in_words

        device = torch.device(self.machine.device)
        checkpoint = self._checkpoint(request)
        plan = make_plan(request, checkpoint, device)
        words = f"{in_words(plan, device)}, model {checkpoint.name} ({checkpoint.resolution} px)"
        if self.lent:  # the plan is for the processor that is here, and only its level and steps hold there
            alone = replace(plan, settings=replace(plan.settings, windows_per_pass=1))
            return f"{words}, on {self.machine.device_name}.", f"{describe(alone, device)}."
        details = describe(plan, device) + "."
        if seconds is None:
            return words + ".", details
        frames = math.ceil(seconds * FPS)
        found = self.speeds.estimate(self._where(checkpoint), plan.settings, frames)
        if found is None:
            return words + "; how long it takes here is not known before the first job.", details
        estimate, measured = found
        return f"{words}; {'about' if measured else 'roughly'} {spoken(estimate)} for this clip.", details

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
        idle_since = time.monotonic()
        while not self._closed:
            self._sweep()
            with self._lock:
                job = self._waiting.popleft() if self._waiting else None
                if job:
                    job.state, job.started = RUNNING, time.time()
                else:
                    self._wake.clear()
            if job is None:
                self._wake.wait(timeout=max(1.0, min(self.idle_seconds, 60.0)))
                if self._models is not None and time.monotonic() - idle_since > self.idle_seconds:
                    try:
                        self._unload()
                    except RuntimeError:  # the next job says so
                        traceback.print_exc()
                continue
            try:
                self._perform(job)
            except Exception:  # in what follows a job's end; the next job may do better
                traceback.print_exc()
            idle_since = time.monotonic()

    def _sweep(self) -> None:
        """Remove what is too old to be kept."""
        if self.keep_hours is None:
            return
        for job in list(self._jobs.values()):
            if job.ended and time.time() - job.ended > 3600 * self.keep_hours:
                self._forget(job)

    def _look(self) -> None:
        import torch

        from latentsync.options import choose_device
        from latentsync.releases import home
        from optim.doctor import advise, read_facts
        from optim.hardware import read_gpus, recommended_level
        from optim.monitor import Monitor

        self.speeds = Speeds(home() / "speeds.json")
        self.monitor = Monitor(rate=1.0, seconds=3600).start()
        device = torch.device("cpu") if self.lent else choose_device(self.device_name)
        gpu = read_gpus()[device.index or 0] if device.type == "cuda" else None
        best, why = best_for(gpu, self.lent is not None)
        found = survey(self.model, device, self.lent is not None)
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

        found = survey(self.model, torch.device(self.machine.device), self.lent is not None)
        self.machine = replace(self.machine, **found)

    def _checkpoint(self, request: Request) -> "Checkpoint":
        """The model of a request, as it is on this machine now. Raises UserError."""
        import torch

        own = request.model == self.machine.chosen and self.model != "auto"  # the folder that the server was given
        name = self.model if own or request.model == "auto" else request.model
        return meant(name, torch.device(self.machine.device), self.lent is not None)

    def _where(self, checkpoint: "Checkpoint") -> str:
        return f"{checkpoint.name}, {self.machine.device_name}"

    def _load(self, request: Request, job: Job) -> "Models":
        """The models of a request: those at hand, or loaded in their place."""
        import torch

        from latentsync.checkpoints import load_models

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
        from latentsync.pipeline import Enough

        job.timeline = {"stages": {}}
        self._ran = None
        state, broken = FAILED, False
        try:
            if self.machine is None:
                raise UserError(self.problem or "This machine cannot be used.")
            self._run_lent(job) if self.lent else self._run(job)
            state = CANCELLED if job.report and job.report["ended_early"] else DONE
            job.doing = "stopped; the finished part is kept" if state == CANCELLED else "done"
        except (Cancelled, Enough):
            state, job.doing = CANCELLED, "cancelled"
        except UserError as error:
            names = {job.request.video: job.names[0], job.request.audio: job.names[1]}
            remedy = {"label": "Choose another video", "focus": "video"} if "shows no face" in str(error) else None
            self._fail(job, said(error, names), remedy)
        except Exception as error:
            broken = True
            if short_of_memory(error):
                self._fail(job, *out_of_memory(self.machine, self._ran))
            else:
                traceback.print_exc()
                self._fail(
                    job,
                    f"Something inside the program failed ({type(error).__name__}); its console says where. Your files "
                    "are unharmed: try again, or with other settings.",
                    None,
                )
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
        try:
            self._keep_timeline(job)
        except Exception:  # a result without curves is a result
            traceback.print_exc()
        try:
            if state != CANCELLED or not self._closed:  # what only the server's end ends is found so by the next one
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
        from latentsync.pipeline import Enough, lipsync
        from optim.accelerate import accelerate, reliever
        from optim.doctor import advise_report
        from optim.hardware import nvml_index

        request = job.request

        def check() -> None:
            if job.ending.is_set():
                raise Enough if job.keep else Cancelled

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

        relieve = reliever(models, plan, job.messages.append, stepped_down)
        progress = Progress(job, plan.settings.steps, self.monitor, check)
        output = job.planned
        preview = Preview(job)
        self.monitor.mark(plan.level.name)
        began = time.monotonic()
        try:
            with interruptible(models, check):
                report = lipsync(
                    request.video, request.audio, output, models, plan.settings, progress, relieve, preview,
                    segment_frames=None,  # no later job finds them: each has a folder of its own
                )  # fmt: skip
        finally:
            preview.close()
        if not report.ended_early and not step_downs:
            self.speeds.record(self._where(self._loaded), plan.settings, report.frames, time.monotonic() - began)
        gpu = None
        if models.device.type == "cuda" and (history := latest(self.monitor.snapshot(), time.monotonic() - began)):
            gpu = history.gpu(nvml_index(models.device))
        job.advice = [asdict(each) for each in advise_report(report, plan, step_downs, gpu)]
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


class Progress:
    """What the pipeline calls as it gets on: writes into the job, and ends the run when that is wished."""

    def __init__(self, job: Job, steps: int, monitor: "Monitor", check: Callable[[], None]):
        from latentsync.sampling import WINDOW

        self._job, self._steps, self._monitor, self._check = job, steps, monitor, check
        self._window, self._stepped = WINDOW, 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._check()
        job, now = self._job, time.time()
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


def out_of_memory(machine: Machine, ran: "Checkpoint | None") -> tuple[str, dict | None]:
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


def _copied(request: Request, names: tuple[str, str], folder: Path) -> tuple[Path, Path]:
    """Copies of a request's files, as video and voice, in a new folder. Raises UserError where there can be none."""
    try:
        folder.mkdir(parents=True, mode=0o700)
        video, voice = (
            Path(shutil.copyfile(path, folder / f"{part}{_suffix(name)}", follow_symlinks=True))
            for part, path, name in (("video", request.video, names[0]), ("voice", request.audio, names[1]))
        )
    except OSError as error:
        for path, name in zip((request.video, request.audio), names, strict=True):
            if not path.is_file():
                raise UserError(f"The file '{name}' is not on this server any more: give it again.") from None
        log(f"A job's files cannot be kept: {error}")
        raise UserError(
            f"Your files cannot be kept with the results of this server ({unwritten(error)}): remove jobs that you do "
            "not need, or let who serves the page look at the folder that --outputs names."
        ) from None
    return video, voice


def unwritten(error: OSError) -> str:
    """Why something could not be written, without where: not every visitor is to know the folders of a server."""
    return "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else os.strerror(error.errno or errno.EIO)


def _suffix(name: str) -> str:
    """The ending of a user's file name, if it is one that can do no harm."""
    suffix = Path(name).suffix.lower()
    return suffix if suffix[1:].isalnum() and suffix.isascii() and len(suffix) <= 6 else ""


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
