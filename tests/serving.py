"""The page as a process of its own, for tests that talk to it."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent


class Server:
    """A running page: its address, the folder of its outputs, and what it said."""

    def __init__(self, process: subprocess.Popen, port: int, outputs: Path, log: Path, began: float):
        self.process, self.port, self.url = process, port, f"http://127.0.0.1:{port}"
        self.outputs, self.log, self.began = outputs, log, began

    def wait_until_ready(self, seconds: float = 240) -> float:
        """Seconds of the processor that it took until the page was there, whatever else the machine does."""
        while time.monotonic() - self.began < seconds:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if httpx.get(self.url, timeout=5).status_code == 200:
                    spent = psutil.Process(self.process.pid).cpu_times()
                    return spent.user + spent.system
            except httpx.HTTPError:
                time.sleep(0.05)
        raise AssertionError(f"no page after {seconds} s: {self.log.read_text()}")


@contextmanager
def serve(folder: Path, *options: object, port: int | None = None, program: Path = ROOT / "app.py"):
    """Start app.py on a port of the loopback, a free one unless it is given, with its files in `folder`.

    program: what takes the place of app.py.
    """
    if port is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    outputs, log = folder / "outputs", folder / "log"
    arguments = ["--server-port", port, "--outputs", outputs, "--no-open", *options]
    # One thread: small networks are no faster on several, and the tests' own processes want the other core.
    # And no network, nor anything of the Hugging Face cache: the page must do without.
    environment = os.environ | {"LATENTSYNC_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "huggingface"), "PYTHONFAULTHANDLER": "1"}
    with open(log, "w") as out:
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, str(program), *map(str, arguments)],
            stdout=out, stderr=out, env=environment, cwd=folder,
        )  # fmt: skip
    server = Server(process, port, outputs, log, began)
    try:
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=90)  # of which its own waits may take 15 s, and a busy machine the rest
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # it then writes down where each thread was
            process.wait()
            raise AssertionError(f"the server did not end: {log.read_text()}") from None
