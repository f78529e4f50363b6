"""One job from its start to its end: it is recorded as running, run, and recorded with how it ended."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from latentsync.errors import UserError, is_out_of_memory
from latentsync.media.segments import discard
from optim.serving.curves import last_seconds, thinned_curves
from optim.serving.inputs import with_user_names
from optim.serving.job import CANCELLED, DONE, FAILED, RUNNING, WAITING, Job, Request
from optim.serving.machine import Machine
from optim.serving.records import finished_frames, save_job
from optim.serving.run import Cancelled, out_of_memory
from optim.serving.runners import Runner

if TYPE_CHECKING:  # torch takes seconds to load
    from latentsync.checkpoints.find import Checkpoint
    from optim.monitor import Monitor

log = logging.getLogger(__name__)

FAULT = (
    "Something inside the program failed ({}); its console says where. Your files are unharmed: try again, or with "
    "other settings."
)
GPU_FAILED = (
    "The GPU has failed, and this server cannot use it any more: start the server again. Your files are unharmed, and "
    "the job can be run again then."
)


def execute(
    job: Job,
    machine: Machine,
    runner: Runner,
    find_checkpoint: "Callable[[Request], Checkpoint]",
    monitor: "Monitor",
) -> str:
    """Run a job and record how it ended.

    find_checkpoint: raises UserError where a request's model is not here. Returns the job's last state, for the caller
    to set: whoever sees it then finds everything else in place.
    """
    job.starts, job.frames_at_start = job.starts + 1, finished_frames(job)
    save_job(job, RUNNING)  # the next server finds it so, whatever ends this one
    job.timeline = {"stages": {}}
    state = run_to_end(job, machine, runner, find_checkpoint)
    job.ended = time.time()
    job.playable = 0
    with suppress(OSError):  # its folder may be gone, or the file be open elsewhere on Windows
        job.first.unlink()
    if state == CANCELLED and job.interrupted:
        job.reset()
        job.starts, state = 0, WAITING
    try:
        add_curves(job, monitor)
    except Exception:  # a result without curves is a result
        log.exception("The curves of a job could not be stored")
    try:
        save_job(job, state)
    except Exception:  # the next server then finds it as running, and runs it again
        log.exception("The record of a job could not be written")
    return state


def refuse(job: Job, problem: str) -> str:
    """Record that a job cannot run on this machine, and why; returns its last state."""
    job.set_error(problem)
    job.ended = time.time()
    save_job(job, FAILED)
    return FAILED


def run_to_end(job: Job, machine: Machine, runner: Runner, find_checkpoint: "Callable[[Request], Checkpoint]") -> str:
    """Run a job and say in it how it ended; returns its last state."""
    from latentsync.pipeline import StopEarly

    checkpoint, failed = None, False
    try:
        checkpoint = find_checkpoint(job.request)
        if checkpoint.remark:
            job.messages.append(checkpoint.remark)
        runner.run(job, checkpoint)
        early = bool(job.report and job.report["ended_early"])
        job.doing = "stopped; the finished part is kept" if early else "done"
        return CANCELLED if early else DONE
    except (Cancelled, StopEarly):
        job.doing = "cancelled"
        if not job.interrupted:
            discard(job.planned_output)
        return CANCELLED
    except UserError as error:
        names = dict(zip(job.request.files, job.names, strict=True))
        remedy = {"label": "Choose another video", "focus": "video"} if "shows no face" in str(error) else None
        job.set_error(with_user_names(error, names), remedy)
    except BaseException as error:  # also a SystemExit of a library: it would end the thread without a message
        failed = True
        if isinstance(error, Exception) and is_out_of_memory(error):
            job.set_error(*out_of_memory(machine, checkpoint))
        else:
            log.exception("A job failed")
            job.set_error(FAULT.format(type(error).__name__))
    if failed:  # after the error is gone, whose traceback holds the run's memory
        try:
            runner.unload()
        except RuntimeError:
            log.exception("The GPU has failed")
            job.set_error(GPU_FAILED)
    return FAILED


def add_curves(job: Job, monitor: "Monitor") -> None:
    """Add the machine's curves during a job to its timeline."""
    if job.report is None or job.started is None:
        return
    seconds = time.time() - job.started
    if history := last_seconds(monitor.snapshot(), seconds):
        # A new dict, since the old one may be being sent.
        job.timeline = (job.timeline or {}) | thinned_curves(history, seconds)
