"""What several test files share: a checkpoint, a talking face, a voice, and one thread for small networks."""

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from clips import ffmpeg, make_sound
from skimage.data import astronaut
from small_release import small_release, write_originals
from tiny import make_checkpoint

if "PYTEST_XDIST_WORKER" in os.environ:  # every worker has a core, and no more
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that it starts
    torch.set_num_threads(1)

# Triton settles at its import whether it interprets. Without a GPU the kernels are tested in a run of their own,
# with TRITON_INTERPRET=1, in which nothing else is.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_TESTS = ("test_kernels.py", "test_products.py", "test_fused.py")


def belongs_to_other_run(path: Path) -> bool:
    if torch.cuda.is_available() and not INTERPRETED:
        return False
    return (path.name in KERNEL_TESTS) != INTERPRETED


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if collection_path.name.startswith("test_") and belongs_to_other_run(collection_path) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what was named on the command line, too, which cannot be ignored."""
    other = [item for item in items if belongs_to_other_run(item.path)]
    if other:
        config.hook.pytest_deselected(items=other)
        items[:] = [item for item in items if item not in set(other)]


def pytest_report_header() -> str | None:
    if INTERPRETED:
        return f"TRITON_INTERPRET=1: only {', '.join(KERNEL_TESTS)}"
    return None if torch.cuda.is_available() else f"without a GPU, {', '.join(KERNEL_TESTS)} need TRITON_INTERPRET=1"


PASSING_OVER = 0b110  # the bits of CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH in Linux' masks of capabilities


def passes_over_permissions() -> bool:
    """Whether permissions of files do not hold this process, as they do not hold root."""
    if sys.platform != "linux":
        return False
    with open("/proc/self/status") as status:
        mask = next(line.split()[1] for line in status if line.startswith("CapEff:"))
    return bool(int(mask, 16) & PASSING_OVER)


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test marked `permissions` in a process of its own, without root's rights, where this process has them."""
    if pyfuncitem.get_closest_marker("permissions") is None or not passes_over_permissions():
        return None
    if shutil.which("setpriv") is None:
        pytest.skip("permissions do not hold root, and there is no setpriv to give up its rights")
    command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable, "-m", "pytest", "-q"]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider", pyfuncitem.nodeid], cwd=pyfuncitem.config.rootpath, env=variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert run.returncode == 0 and "1 passed" in run.stdout, run.stdout
    return True


SIDE = 192  # pixels of the face clip
FACE_FRAMES = 24


def portrait(t: int) -> np.ndarray:
    """Frame t of a face in gentle motion: uint8 (SIDE, SIDE, 3)."""
    still = cv2.resize(np.ascontiguousarray(astronaut()[:240, 110:350]), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    matrix = np.array([[1, 0, 3 * np.sin(t / 6)], [0, 1, t / 12]])
    return cv2.warpAffine(still, matrix, (SIDE, SIDE), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)


def save_video(path: Path, frames: list[np.ndarray], *options: object) -> Path:
    """Write 25 fps of RGB frames; `options` are ffmpeg output options, lossless if there are none."""
    raw = path.with_suffix(".rgb")
    raw.write_bytes(b"".join(frame.tobytes() for frame in frames))
    height, width = frames[0].shape[:2]
    ffmpeg(
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", 25, "-i", raw),
        *(options or ("-c:v", "ffv1", "-pix_fmt", "bgr0")),
        path,
    )
    raw.unlink()
    return path


@pytest.fixture(scope="session")
def talking(tmp_path_factory) -> Path:
    """About a second of a face that fills most of the picture."""
    path = tmp_path_factory.mktemp("talking") / "talking.mp4"
    options = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", 12)
    return save_video(path, [portrait(t) for t in range(FACE_FRAMES)], *options)


@pytest.fixture(scope="session")
def voice(tmp_path_factory) -> Path:
    """0.78 s of sound: 20 frames, of which the last is half filled."""
    return make_sound(tmp_path_factory.mktemp("voice") / "voice.wav", seconds=0.78)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def models(checkpoint):
    """The networks of the checkpoint on the processor, for tests that leave them as they are."""
    from latentsync.checkpoints.find import resolve_model
    from latentsync.checkpoints.load import load_models

    device = torch.device("cpu")
    return load_models(resolve_model(str(checkpoint), device), device, torch.float32)


@pytest.fixture(scope="session")
def originals(checkpoint, tmp_path_factory) -> Path:
    """The checkpoint with the names and in the formats of a release."""
    return write_originals(checkpoint, tmp_path_factory.mktemp("originals"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An empty user's folder, for all tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTSYNC_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def worker(tmp_path_factory, checkpoint, home):
    """The worker of a page on one device, ready for jobs."""
    with ready_worker(tmp_path_factory.mktemp("outputs"), checkpoint) as worker:
        yield worker


@contextmanager
def ready_worker(folder: Path, checkpoint: Path, **options):
    """A worker of a page that is ready for jobs, and is closed at the end."""
    from optim.serving.worker import Worker

    worker = Worker(folder, model=str(checkpoint), device="cpu", **options)
    with closing(worker):
        worker.start()
        assert worker.ready.wait(60) and worker.machine, worker.problem
        yield worker


@pytest.fixture
def start_worker(tmp_path, checkpoint):
    """Starts workers, by default all on the same outputs: start_worker(folder, **options)."""
    with ExitStack() as stack:
        yield lambda folder="outputs", **options: stack.enter_context(
            ready_worker(tmp_path / folder, checkpoint, **options)
        )


@pytest.fixture
def hub(originals, monkeypatch, tmp_path):
    """A hub with one small release, under a released name; a user's folder and cache, both empty."""
    with small_release(originals, monkeypatch, tmp_path) as found:
        yield found


@pytest.fixture
def one_thread(monkeypatch):
    """Small networks are no faster on several threads, and much slower where others use the processor."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def temporary(monkeypatch):
    """A folder for the temporary files of processes that a test starts, short, for the paths of Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="ls-"))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def one_person(follow):
    """A stand-in for `track_people` from a function like `track_faces`: frames → (frame, face)."""

    def track(frames, people, **options):
        assert len(people) == 1
        return ((frame, (face,)) for frame, face in follow(frames, **options))

    return track
