"""What several command lines have in common."""

import argparse
import logging
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from latentsync.errors import UserError
from latentsync.machine import usable_cores

if TYPE_CHECKING:  # takes seconds to load
    import torch


def between(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    """A type for argparse: a number of `kind`, int or float, in a range."""

    def number(text: str) -> float:
        if low <= (value := kind(text)) <= high:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")

    return number


def log_to_stderr(level: int = logging.INFO) -> None:
    """Let a program show what the packages log, a line a message, on stderr; a library stays silent without it."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("latentsync", "optim"):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        if not logger.handlers:
            logger.addHandler(handler)


def interrupt_on_signals() -> None:
    """Let every signal that asks a process to end raise KeyboardInterrupt, as Ctrl-C does, so that it cleans up.

    These are SIGTERM, SIGQUIT, SIGHUP and, on Windows, SIGBREAK; only the first one counts. SIGHUP says that the
    terminal is gone: what is written to it from then on is dropped. A signal that is ignored, as by nohup, stays so. To
    be called in the main thread.
    """
    interrupted = False
    terminals = [stream for stream in (1, 2) if os.isatty(stream)]  # one that is gone says that it is none

    def interrupt(number: int, _: object) -> None:
        nonlocal interrupted
        if number == getattr(signal, "SIGHUP", None):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in terminals:
                os.dup2(nowhere, stream)
            os.close(nowhere)
        if not interrupted:  # another one must not interrupt the cleaning up
            interrupted = True
            raise KeyboardInterrupt

    for name in ("SIGTERM", "SIGQUIT", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def choose_device(name: str) -> "torch.device":
    """The torch device of a `--device`; `auto` is the GPU where there is one. Raises UserError.

    From then on torch uses at most as many threads as this process may use cores. By itself it starts one for every
    core of the machine, too many in a container that has fewer.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
        if torch.get_num_threads() > usable_cores():
            torch.set_num_threads(usable_cores())
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"The device '{name}' cannot be used on this machine: try --device cpu.") from error
    return device
