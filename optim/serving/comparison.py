"""The side-by-side video of a job, made in a thread of its own; one at a time on a server."""

import logging
import os
import shutil
import threading
from pathlib import Path

from latentsync.errors import UserError
from optim.serving.inputs import with_user_names
from optim.serving.job import CANCELLED, DONE, FAILED, RUNNING, Comparison, Job
from optim.serving.run import Cancelled
from optim.serving.store import JobStore

log = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()


def start_comparison(job: Job, result: Path, store: JobStore) -> None:
    """Start making the side-by-side video; `job.comparison` has its progress and cancels it."""
    job.comparison = Comparison()
    thread = threading.Thread(target=_compare, args=(job, job.comparison, result, store), name="compare", daemon=True)
    thread.start()


def _compare(job: Job, comparison: Comparison, result: Path, store: JobStore) -> None:
    """Make a comparison and record how it ended; raises nothing."""

    def on_progress(done: int, total: int) -> None:
        if comparison.cancel.is_set():
            raise Cancelled
        comparison.done, comparison.total = done, total

    partial = job.compared.with_suffix(".partial.mp4")
    state = FAILED
    try:
        from optim.serving.side_by_side import side_by_side

        while not _one_at_a_time.acquire(timeout=0.2):
            on_progress(0, 0)
        try:
            on_progress(0, 0)
            comparison.state = RUNNING
            side_by_side(job.request.video, result, partial, on_progress, comparison.cancel)
        finally:
            _one_at_a_time.release()
        os.replace(partial, job.compared)
        state = DONE
    except Cancelled:
        state = CANCELLED
    except UserError as error:
        names = {job.request.video: job.names[0], result: result.name}
        comparison.error = with_user_names(error, names)
    except Exception as error:
        log.exception("The side-by-side video could not be made")
        comparison.error = (
            f"The side-by-side video could not be made ({type(error).__name__}); the console says where. The "
            "result itself is unharmed."
        )
    finally:
        # The state last: who sees that it has ended finds nothing of it left.
        partial.unlink(missing_ok=True)
        if job.id not in store.jobs:  # it was removed meanwhile
            shutil.rmtree(job.folder, ignore_errors=True)
        comparison.state = state
