"""The jobs of a server: the queue, who may see which job, and how much a visitor may have."""

import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from latentsync.errors import UserError
from latentsync.media.segments import discard
from optim.serving.inputs import disk_problem, stored_bytes
from optim.serving.job import CANCELLED, FAILED, RUNNING, WAITING, Job, owner_of
from optim.serving.limits import NO_LIMITS, VisitorLimits, check_option
from optim.serving.machine import LONG_SECONDS
from optim.serving.records import finished_frames, load_jobs, save_job

MAX_LISTED = 50  # ended jobs in a visitor's list


class JobStore:
    """All jobs, the oldest first, the queue of those that wait, and which of them may run. Any thread may use it.

    folder: each job gets a folder in it; queue_size: jobs that may wait; limits: of each visitor. Raises UserError for
    options out of range. `changed` is notified when a job may have become able to run.
    """

    def __init__(self, folder: Path, queue_size: int, limits: VisitorLimits = NO_LIMITS):
        check_option("The length of the queue", queue_size, 1, whole=True)
        self.folder, self.queue_size, self.limits = folder, queue_size, limits
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.closed = False
        self.gpus = 1  # or the one processor, or processes on it: each runs one job at a time
        self.jobs: dict[str, Job] = {}
        self.waiting: deque[Job] = deque()

    def load(self) -> None:
        """Load the jobs of earlier servers, and queue those that they had not finished. Raises UserError."""
        try:
            loaded = {job.id: job for job in load_jobs(self.folder)}
        except OSError as error:
            raise UserError(
                f"The folder of the results '{self.folder}' cannot be read ({disk_problem(error)}): give another with "
                "--outputs."
            ) from error
        with self.lock:  # the page may have been used already
            self.jobs = loaded | self.jobs
            waiting = sorted((job for job in loaded.values() if job.state == WAITING), key=lambda job: job.queued)
            self.waiting.extendleft(reversed(waiting))
            self.changed.notify_all()

    # ---- finding

    def find(self, job_id: str, visitor: str) -> Job:
        """A visitor's job. Raises UserError, with the same sentence for another's job as for none."""
        job = self.jobs.get(job_id)
        if job is None or not same_token(job.owner, owner_of(visitor)):
            raise UserError(f"There is no job '{job_id}' of yours: it may have been removed.")
        return job

    def by_key(self, key: str) -> Job | None:
        """The job to whose files a key gives access."""
        return next((job for job in self.all() if same_token(job.key, key)), None)

    def all(self) -> list[Job]:
        """The oldest first."""
        return list(self.jobs.values())

    def jobs_of(self, visitor: str) -> list[Job]:
        """A visitor's jobs, the newest first: all that have not ended, and MAX_LISTED that have."""
        jobs = self._owned_by(owner_of(visitor))[::-1]
        unlisted = [job for job in jobs if not job.unfinished][MAX_LISTED:]
        return [job for job in jobs if job not in unlisted]

    def _owned_by(self, owner: str) -> list[Job]:
        return [job for job in self.all() if same_token(job.owner, owner)]

    def place(self, job: Job) -> int | None:
        """How many jobs must end before a waiting one starts; None for one that does not wait."""
        with self.lock:
            if job not in self.waiting:
                return None
            return max(self.waiting.index(job) + 1 - self._free_gpus(), 0)

    def load_counts(self) -> tuple[int, int]:
        """The numbers of running and of waiting jobs, of all visitors."""
        with self.lock:
            return sum(job.state == RUNNING for job in self.jobs.values()), len(self.waiting)

    # ---- the queue

    def add(self, job: Job) -> None:
        """Save a new job and queue it. Raises UserError if there is no room for it."""
        save_job(job, WAITING)
        with self.lock:
            self.check_room(job.owner)
            self.jobs[job.id] = job
            self.waiting.append(job)
            self.changed.notify_all()

    def retry(self, job: Job) -> bool:
        """Queue a failed job again if it has finished segments to resume after; returns whether it has."""
        with self.lock:
            if job.state != FAILED or not finished_frames(job):
                return False
            self.check_room(job.owner, new=False)
            job.reset()
            job.starts, job.queued = 0, time.time()
            save_job(job, WAITING)
            job.state = WAITING
            self.waiting.append(job)
            self.changed.notify_all()
        return True

    def cancel(self, job: Job, keep: bool, can_interrupt: bool = True) -> None:
        """Cancel a waiting job, and ask a running one to end; the first call for a job decides on `keep`.

        keep: leave the finished frames as a result. Raises UserError for a running job unless `can_interrupt`.
        """
        with self.lock:
            if job.state == RUNNING and not can_interrupt:
                raise UserError("This job runs in one call on a GPU that is lent for it: wait until it is done.")
            if not job.cancel_requested.is_set():
                job.keep_finished = keep
                job.cancel_requested.set()
            if job in self.waiting:
                self.waiting.remove(job)
                job.ended, job.doing = time.time(), "cancelled"
                discard(job.planned_output)  # segments of an earlier server
                save_job(job, CANCELLED)
                job.state = CANCELLED

    def move(self, job: Job, earlier: bool) -> None:
        """Let a waiting job change places with its owner's next one before it, or after it if not `earlier`.

        The first or last one stays where it is. Raises UserError for a job that does not wait.
        """
        with self.lock:
            own = [each for each in self.waiting if each.owner == job.owner]
            if job not in own:
                raise UserError("This job does not wait any more: only waiting jobs can be moved.")
            place = own.index(job) + (-1 if earlier else 1)
            if not 0 <= place < len(own):
                return
            other = own[place]
            first, second = self.waiting.index(job), self.waiting.index(other)
            self.waiting[first], self.waiting[second] = other, job
            job.queued, other.queued = other.queued, job.queued
            for each in (job, other):
                save_job(each, WAITING)

    def _free_gpus(self) -> int:
        return self.gpus - sum(job.gpus for job in self.jobs.values() if job.state == RUNNING)

    def take_next(self, timeout: float = 0.0, is_needed: Callable[[], bool] = lambda: False) -> Job | None:
        """Take the next job from the queue, mark it as running, and give it a GPU, or several.

        timeout: seconds to wait for a change where no job can run; is_needed: whether the caller has something else to
        do, see `wake`. None where no job can run after that.
        """
        with self.changed:
            if not (self.waiting and self._free_gpus()) and not self.closed and not is_needed():
                self.changed.wait(timeout)
            free = self._free_gpus()
            if self.closed or not self.waiting or not free:
                return None
            job = self.waiting.popleft()
            job.gpus = free if job.seconds > LONG_SECONDS and not self.waiting else 1
            job.state, job.started = RUNNING, time.time()
            return job

    def wake(self) -> None:
        """Let those return who wait in `take_next`."""
        with self.changed:
            self.changed.notify_all()

    def end(self, job: Job, state: str) -> None:
        """Set the state of a job that ran, once everything else of it is in place; its GPUs are free from now on."""
        with self.changed:
            job.state = state
            self.changed.notify_all()

    def close(self) -> list[Job]:
        """Start no job from now on. Returns those that run."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
            return [job for job in self.jobs.values() if job.state == RUNNING]

    def remove(self, job: Job) -> None:
        """Forget a job and delete its files."""
        with self.lock:
            self.jobs.pop(job.id, None)
            if job in self.waiting:
                self.waiting.remove(job)
        if job.comparison:
            job.comparison.cancel.set()
        shutil.rmtree(job.folder, ignore_errors=True)

    def remove_old(self, hours: float) -> None:
        """Remove the jobs that ended more than that many hours ago."""
        for job in self.all():
            if job.ended and time.time() - job.ended > 3600 * hours:
                self.remove(job)

    # ---- limits

    def check_room(self, owner: str, new: bool = True) -> None:
        """Raise UserError if the queue is full, or a visitor has as many jobs as allowed; new: for one more job."""
        if len(self.waiting) >= self.queue_size:
            raise UserError(f"The queue is full, {len(self.waiting)} jobs wait already: try again in a few minutes.")
        jobs, limits = self._owned_by(owner), self.limits
        unfinished = sum(job.unfinished for job in jobs)
        if limits.unfinished_jobs and unfinished >= limits.unfinished_jobs:
            raise UserError(
                f"You have {unfinished} jobs that wait or run, and this server takes {limits.unfinished_jobs} of a "
                "visitor: wait until one has ended, or cancel one."
            )
        if new and limits.jobs and len(jobs) >= limits.jobs:
            raise UserError(
                f"You have {len(jobs)} jobs here, and this server keeps {limits.jobs} of a visitor: remove those "
                "that you do not need."
            )

    def check_stored(self, owner: str, new_folder: Path | None = None) -> None:
        """Raise UserError if the files of a visitor's jobs, or of all, take more space than allowed.

        new_folder: of a job that is being submitted.
        """
        limits, new = self.limits, [new_folder] if new_folder else []

        def used(jobs: list[Job]) -> int:
            return stored_bytes([*(job.folder for job in jobs), *new])

        if limits.stored_bytes and (taken := used(self._owned_by(owner))) > limits.stored_bytes:
            raise UserError(
                f"Your files here take {gigabytes(taken)}, and this server keeps {gigabytes(limits.stored_bytes)} of a "
                "visitor: remove jobs that you do not need, or give smaller files."
            )
        if limits.total_bytes and (taken := used(self.all())) > limits.total_bytes:
            raise UserError(
                f"The jobs of this server take {gigabytes(taken)} of the {gigabytes(limits.total_bytes)} that it "
                "keeps: remove jobs that you do not need, or try again later."
            )


def same_token(token: str, other: str) -> bool:
    """Constant-time comparison."""
    return secrets.compare_digest(token.encode(), other.encode())


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
