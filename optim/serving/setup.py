"""What a server is made of, by its options: the worker, and the folder of uploads."""

import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from optim.serving.limits import NO_LIMITS, SHARED_LIMITS
from optim.serving.run import run_alone
from optim.serving.uploads import Limits, Uploads, make_folder, remove_orphans
from optim.serving.worker import Worker

PUBLIC_STORED = 20  # uploads of the largest size that a public server holds before they are jobs
PUBLIC_UNUSED_SECONDS = 3600.0  # until an upload to a public server is deleted that no job has used
GPU_SECONDS = 240  # of ZeroGPU that a job may ask for


@contextmanager
def upload_folder() -> Iterator[tuple[Path, bool]]:
    """The folder of uploads, and whether it stays: GRADIO_TEMP_DIR, or one of this server alone that goes with it."""
    if "GRADIO_TEMP_DIR" in os.environ:
        yield Path(os.environ["GRADIO_TEMP_DIR"]), True
        return
    remove_orphans()
    folder = make_folder()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    try:
        yield folder, False
    finally:
        del os.environ["GRADIO_TEMP_DIR"]
        shutil.rmtree(folder, ignore_errors=True)


def lent_gpu() -> Callable | None:
    """`run_alone` on a GPU that Hugging Face's ZeroGPU lends for each call; None elsewhere."""
    if "SPACES_ZERO_GPU" not in os.environ:
        return None
    try:
        import spaces
    except ImportError:
        return None
    return spaces.GPU(duration=GPU_SECONDS)(run_alone)


def make_worker(options: Namespace) -> Worker:
    return Worker(
        options.outputs.absolute(),
        queue_size=options.queue_size,
        max_seconds=options.max_seconds,
        model=options.model,
        device=options.device,
        idle_seconds=60 * options.idle_minutes,
        keep_hours=options.keep_hours,
        lent=lent_gpu(),
        restorer=options.restore and options.restore.absolute(),
        limits=SHARED_LIMITS if options.shared else NO_LIMITS,
        gpus=options.gpus,
        prepared_bytes=int(options.prepared_cache * 10**9),
        # Without strangers and logins all visitors are one person, in several browsers.
        shared=options.shared or options.accounts is not None,
    )


def make_uploads(folder: Path, options: Namespace) -> Uploads:
    largest = options.max_upload
    if not options.shared:
        return Uploads(folder, Limits(largest))
    limits = Limits(
        max_file=largest,
        at_once=16,
        at_once_from=8,
        max_stored=largest and PUBLIC_STORED * largest,
        unused_seconds=PUBLIC_UNUSED_SECONDS,
    )
    return Uploads(folder, limits)
