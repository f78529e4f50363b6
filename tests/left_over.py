"""What processes leave behind that a test has started with a folder of their own for temporary files."""

from contextlib import suppress
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108


def processes_of(folder: Path) -> list[psutil.Process]:
    """The running processes whose TMPDIR is that folder, but Ray's two agents: they end by themselves, and after a
    SIGKILL of the driver only when they have tried for a minute to report that."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("TMPDIR") == str(folder) and "Agent" not in process.name():
                found.append(process)
    return found


def shared_memory() -> set[Path]:
    """The object stores of Ray that lie in the machine's shared memory."""
    return set(SHARED_MEMORY.glob("*plasma*"))


def assert_nothing_is_left(folder: Path, shared: set[Path], files: bool = True) -> None:
    """shared: `shared_memory()` of before; files: our temporary files, too, which a killed driver cannot remove."""
    gone, alive = psutil.wait_procs(processes_of(folder), timeout=60)
    assert not alive and shared_memory() <= shared
    if files:
        left = [
            path.name for path in folder.iterdir() if path.name != "gradio"
        ]  # which keeps a folder of its own there
        assert not left, left
