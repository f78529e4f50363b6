"""What the command lines share: option types, logging, signals, the choice of a device."""

import argparse
import importlib
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from latentsync.choice import parse_face
from latentsync.errors import UserError
from latentsync.machine import usable_cores

if TYPE_CHECKING:  # takes seconds to load
    import torch


def between(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    """A type for argparse: an int or float, as `kind` says, from `low` to `high`."""

    def number(text: str) -> float:
        if low <= (value := kind(text)) <= high:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")

    return number


def clock_time(text: str) -> float:
    """A type for argparse: a time in a film, in seconds, from "75.5", "1:15.5" or "0:01:15.5"."""
    if not re.fullmatch(r"(\d{1,3}:)?(\d{1,3}:)?\d{1,6}(\.\d{1,9})?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text} is no time, as 75.5, 1:15.5 or 0:01:15.5")
    return sum(float(part) * 60**power for power, part in enumerate(reversed(text.split(":"))))


def face_name(text: str) -> str:
    """A type for argparse: what names a face, see `choice.parse_face`."""
    try:
        parse_face(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def exit_code(work: Callable[[], int], stopped: Callable[[], str]) -> int:
    """Do a command's work; returns its exit code, or 2 for what the user can put right, or 130 when interrupted.

    Errors, and the sentence of `stopped`, go to stderr. Signals that end a process interrupt the work.
    """
    interrupt_on_signals()
    log_to_stderr()
    try:
        return work()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(stopped(), file=sys.stderr)
        return 130


def log_to_stderr(level: int = logging.INFO) -> None:
    """Print what the packages log on stderr, one line for each message; without this call they are silent."""
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("latentsync", "optim"):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        if not logger.handlers:
            logger.addHandler(handler)


class _StderrHandler(logging.Handler):
    """Unlike logging's own, this one writes to what sys.stderr is at the time of the message."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def import_early(*modules: str) -> None:
    """Import modules in a thread, one after the other, while the caller does something else.

    The import statement that needs one of them waits for it, and raises what is wrong with it.
    """

    def import_all() -> None:
        for module in modules:
            with suppress(Exception):
                importlib.import_module(module)

    threading.Thread(target=import_all, name="imports", daemon=True).start()


def interrupt_on_signals() -> None:
    """Make every signal that asks a process to end raise KeyboardInterrupt, as Ctrl-C does, so that it cleans up.

    These are SIGTERM, SIGQUIT, SIGHUP and, on Windows, SIGBREAK; only the first one counts. SIGHUP means that the
    terminal is gone: what is written to it from then on is dropped. A signal that is ignored, as under nohup, stays
    ignored. Call this in the main thread.
    """
    interrupted = False
    terminals = [stream for stream in (1, 2) if os.isatty(stream)]  # asked now: isatty is false once a terminal is gone

    def interrupt(number: int, frame: object) -> None:
        nonlocal interrupted
        if number == getattr(signal, "SIGHUP", None):
            null = os.open(os.devnull, os.O_WRONLY)
            for stream in terminals:
                os.dup2(null, stream)
            os.close(null)
        if not interrupted:  # a second signal must not interrupt the cleaning up
            interrupted = True
            raise KeyboardInterrupt

    for name in ("SIGTERM", "SIGQUIT", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def choose_device(name: str) -> "torch.device":
    """The torch device for a `--device` option; `auto` is the GPU if there is one. Raises UserError.

    Also limits torch's threads to the cores that this process may use. By default torch starts one for every core of
    the machine, too many in a container that has fewer.
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
