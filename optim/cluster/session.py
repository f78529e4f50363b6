"""Ray on this machine for the time of a job, or a cluster that is there already.

A Ray of this machine alone listens on the loopback address only, and only to whoever knows a token that is drawn for
it; its dashboard is off. Its files lie in a folder of its own, which goes with it; that of a process that was killed
goes when the next one starts.
"""

import ctypes
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from latentsync.errors import UserError
from latentsync.machine import available_memory
from latentsync.paths import is_own_folder

ROOT = Path(__file__).resolve().parents[2]  # of this program
PREFIX = "latentsync-ray-"  # of the names of session folders
STORE_BYTES = 512 * 2**20  # of Ray's object store for each worker: a limit, memory is taken when it is used
STORE_SHARE = 0.3  # of the free memory, at most
MAX_FOLDER = 40  # bytes of a session folder's path: Ray adds 67 for its sockets, whose paths have 107 at most
MISSING = "Several GPUs need Ray, which is not installed: run `pip install -e .[cluster]`, or start with ./launch.sh."
NOT_LINUX = "Several GPUs need Ray, with which this program is tested on Linux only: leave --gpus and --cluster out."


@contextmanager
def local_session(workers: int, gpus: Sequence[int] = ()) -> Iterator[None]:
    """Start Ray on this machine for so many workers; gpus: their numbers, none for workers on the processor.

    Raises UserError where Ray is not installed or does not start.
    """
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": _token(),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # as on those: on the loopback address
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # the pipeline's own limits hold
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    if not gpus:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"  # the workers' threads share the cores, and must not spin
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else None
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[gpu] if names else str(gpu) for gpu in gpus)
    with _folder() as folder:
        # Ray and its workers inherit the variables; what this process starts afterwards, as ffmpeg, has no token.
        with _environment(environment):
            ray = _import_ray()
            with _signals_kept(), _errors_as_sentences("Ray could not be started on this machine"):
                ray.init(
                    address="local",
                    num_cpus=workers,
                    num_gpus=len(gpus),
                    object_store_memory=int(min(STORE_BYTES * workers, STORE_SHARE * available_memory())),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=str(folder),
                )
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def cluster_session(address: str) -> Iterator[None]:
    """Connect to the Ray cluster at an address, of which this machine is a part. Raises UserError.

    Its token is read where Ray looks for it: in RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, or
    ~/.ray/auth_token.
    """
    token_file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not os.environ.get("RAY_AUTH_TOKEN") and not token_file.is_file():
        raise UserError(
            f"The cluster at {address} needs a token, and there is none here: copy that of the cluster to "
            f"'{token_file}', see `ray get-auth-token`."
        )
    if "://" in address:
        raise UserError(f"--cluster {address}: give the address as HOST:PORT, as `ray start --head` prints it.")
    with _environment({"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}):
        ray = _import_ray()
        what = f"The Ray cluster at {address} cannot be used; is it running, and is the token here that of the cluster?"
        with _signals_kept(), _errors_as_sentences(what):
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        try:
            yield
        finally:
            ray.shutdown()


@cache
def _token() -> str:
    """One for each process: Ray reads it once."""
    return secrets.token_hex(32)


def _import_ray():  # noqa: ANN202
    try:
        import ray
    except ImportError:
        raise UserError(MISSING if sys.platform == "linux" else NOT_LINUX) from None
    return ray


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables, which processes that are started meanwhile inherit, and set them back."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep the handler of SIGTERM. `ray.init` replaces it by one that ends the process after 3 seconds.

    Only the main thread may set one in Python; in any other the system's, which calls Python's, is set back.
    """
    handler = signal.getsignal(signal.SIGTERM)
    get, put = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.c_int]
    put.restype, put.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    system_handler = get(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        else:
            put(signal.SIGTERM, system_handler)


@contextmanager
def _errors_as_sentences(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} ({reason})") from error


@contextmanager
def _folder() -> Iterator[Path]:
    """A new folder for a session; those that killed processes left are removed."""
    parent = Path(tempfile.gettempdir())
    if len(os.fsencode(parent)) + len(PREFIX) + 8 > MAX_FOLDER and os.name == "posix":
        parent = Path("/tmp")  # noqa: S108  # Ray's sockets lie below it
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(OSError, Timeout):
            if is_own_folder(path):
                with FileLock(path / "lock", timeout=0):
                    shutil.rmtree(path, ignore_errors=True)
    unlocked = Path(tempfile.mkdtemp(prefix="new-", dir=parent))
    folder = parent / f"{PREFIX}{unlocked.name[4:]}"
    try:
        with FileLock(unlocked / "lock"):
            unlocked.rename(folder)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
