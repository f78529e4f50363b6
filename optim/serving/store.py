"""The jobs of a server, in memory and on the disk: the queue, who may see what, and how much a visitor may have."""

import secrets
import shutil
import threading
import time
from collections import deque
from pathlib import Path

from latentsync.errors import UserError
from optim.serving.inputs import stored_bytes, unwritten
from optim.serving.job import FAILED, RUNNING, WAITING, Job, finished_frames, load_jobs, owner_of, save_job
from optim.serving.limits import NO_LIMITS, Limits

KEPT_JOBS = 50  # finished ones that a visitor finds in the list


class JobStore:
    """All jobs, oldest first, and those that wait in the order in which they will run. Safe to use from any thread.

    folder: each job gets a folder of its own in it; queue_size: jobs that may wait; limits: of each visitor.
    """

    def __init__(self, folder: Path, queue_size: int, limits: Limits = NO_LIMITS):
        self.folder, self.queue_size, self.limits = folder, queue_size, limits
        self.lock = threading.Lock()
        self.jobs: dict[str, Job] = {}
        self.waiting: deque[Job] = deque()

    def load(self) -> None:
        """Load the jobs of earlier servers; those that they had not finished wait. Raises UserError."""
        try:
            loaded = {job.id: job for job in load_jobs(self.folder)}
        except OSError as error:
            raise UserError(
                f"The folder of the results '{self.folder}' cannot be read ({unwritten(error)}): give another with "
                "--outputs."
            ) from error
        with self.lock:  # the page may have been used already
            self.jobs = loaded | self.jobs
            waiting = sorted((job for job in loaded.values() if job.state == WAITING), key=lambda job: job.queued)
            self.waiting.extendleft(reversed(waiting))

    # ---- finding

    def find(self, job_id: str, visitor: str) -> Job:
        """A visitor's own job. Raises UserError, the same for another's as for one that does not exist."""
        job = self.jobs.get(job_id)
        if job is None or not same_token(job.owner, owner_of(visitor)):
            raise UserError(f"There is no job '{job_id}' of yours: it may have been removed.")
        return job

    def by_key(self, key: str) -> Job | None:
        """The job whose files a key opens."""
        return next((job for job in self.all() if same_token(job.key, key)), None)

    def all(self) -> list[Job]:
        return list(self.jobs.values())

    def jobs_of(self, visitor: str) -> list[Job]:
        """A visitor's jobs, the newest first: all that have not ended, and KEPT_JOBS that have."""
        own = self._owned_by(owner_of(visitor))[::-1]
        old = [job for job in own if job.state not in (WAITING, RUNNING)][KEPT_JOBS:]
        return [job for job in own if job not in old]

    def _owned_by(self, owner: str) -> list[Job]:
        return [job for job in self.all() if same_token(job.owner, owner)]

    def place(self, job: Job) -> int | None:
        """How many jobs run before a waiting one; None for one that does not wait."""
        with self.lock:
            if job not in self.waiting:
                return None
            return self.waiting.index(job) + any(other.state == RUNNING for other in self.jobs.values())

    def load_counts(self) -> tuple[int, int]:
        """Jobs that run and that wait, of all visitors."""
        with self.lock:
            return sum(job.state == RUNNING for job in self.jobs.values()), len(self.waiting)

    # ---- the queue

    def add(self, job: Job) -> None:
        """Save a new job and put it into the queue. Raises UserError where there is no room for it."""
        save_job(job, WAITING)
        with self.lock:
            self.check_room(job.owner)
            self.jobs[job.id] = job
            self.waiting.append(job)

    def retry(self, job: Job) -> bool:
        """Put a failed job into the queue again if it has finished segments to resume from; whether it has."""
        with self.lock:
            if job.state != FAILED or not finished_frames(job):
                return False
            self.check_room(job.owner, new=False)
            job.reset()
            job.starts, job.queued = 0, time.time()
            save_job(job, WAITING)
            job.state = WAITING
            self.waiting.append(job)
        return True

    def take_next(self) -> Job | None:
        """The next job, which runs from now on; None where none waits."""
        with self.lock:
            job = self.waiting.popleft() if self.waiting else None
            if job:
                job.state, job.started = RUNNING, time.time()
            return job

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
        """Remove the jobs that ended longer ago than that."""
        for job in self.all():
            if job.ended and time.time() - job.ended > 3600 * hours:
                self.remove(job)

    # ---- limits

    def check_room(self, owner: str, new: bool = True) -> None:
        """Raise UserError where the queue is full, or a visitor has as many jobs as they may."""
        if len(self.waiting) >= self.queue_size:
            raise UserError(f"The queue is full, {len(self.waiting)} jobs wait already: try again in a few minutes.")
        states = [job.state for job in self._owned_by(owner)]
        unfinished = states.count(WAITING) + states.count(RUNNING)
        limits = self.limits
        if limits.unfinished and unfinished >= limits.unfinished:
            raise UserError(
                f"You have {unfinished} jobs that wait or run, and this server takes {limits.unfinished} of a "
                "visitor: wait until one has ended, or cancel one."
            )
        if new and limits.kept and len(states) >= limits.kept:
            raise UserError(
                f"You have {len(states)} jobs here, and this server keeps {limits.kept} of a visitor: remove those "
                "that you do not need."
            )

    def check_stored(self, owner: str, new_folder: Path | None = None) -> None:
        """Raise UserError where the files of a visitor's jobs, or of all, take more than they may.

        new_folder: of a job that is being submitted.
        """
        own = "Your files here take {} GB, and this server keeps {} GB of a visitor: remove jobs that you do not need, "
        own += "or give smaller files."
        everyones = "The jobs of this server take {} GB of the {} GB that it keeps: remove jobs that you do not need, "
        everyones += "or try again later."
        for limit, jobs, sentence in (
            (self.limits.stored, self._owned_by(owner), own),
            (self.limits.stored_by_all, self.all(), everyones),
        ):
            folders = [*(job.folder for job in jobs), *([new_folder] if new_folder else [])]
            if limit and (taken := stored_bytes(folders)) > limit:
                raise UserError(sentence.format(f"{taken / 1e9:.3g}", f"{limit / 1e9:.3g}"))


def same_token(ours: str, theirs: str) -> bool:
    """Constant-time comparison."""
    return secrets.compare_digest(ours.encode(), theirs.encode())
