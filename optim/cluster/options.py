"""The options --gpus and --cluster; no Ray, and torch only once the GPUs are counted."""

import argparse
from typing import TYPE_CHECKING

from latentsync.errors import UserError
from latentsync.machine import usable_cores

if TYPE_CHECKING:  # torch takes seconds to load
    import torch


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpus",
        metavar="all|N|0,2",
        help="paint on several GPUs of this machine: all, so many, or those with these numbers; without GPUs, on so "
        "many processes (needs the packages of `pip install -e .[cluster]`)",
    )
    parser.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="paint on the GPUs of the Ray cluster at this address, of which this machine is a part; --gpus N: at most "
        "so many",
    )


def whole_number(text: str) -> int:
    """The number of workers that --gpus gives for a cluster. Raises UserError."""
    if not text.isdecimal() or not int(text):
        raise UserError(f"--gpus {text}: with --cluster give all, or a number from 1.")
    return int(text)


def workers_here(text: str, device_name: str, device: "torch.device") -> list[int]:
    """The numbers of this machine's GPUs that --gpus names, or of workers on its processor. Raises UserError.

    device_name: as --device has it; device: what that is.
    """
    import torch

    if device_name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--gpus names the GPUs: leave --device {device_name} out.")
    return choose_gpus(text, torch.cuda.device_count() if device.type == "cuda" else 0, usable_cores())


def gpu_numbers(text: str) -> list[int]:
    """The numbers in --gpus, none for `all`. Raises UserError for a word that it cannot be."""
    try:
        return [] if text == "all" else [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--gpus {text} is not understood: give all, a number, or a list, as 0,2.") from None


def choose_gpus(text: str, present: int, cores: int) -> list[int]:
    """The numbers of the GPUs that --gpus names; where none is present, those of as many workers on the processor.

    present: GPUs of this machine; cores: of its processor. Raises UserError.
    """
    kind, most = ("GPU", present) if present else ("core", cores)
    if text == "all":
        if not present:
            raise UserError("--gpus all: no GPU can be used on this machine. Leave the option out, or try --gpus 2.")
        return list(range(present))
    numbers = gpu_numbers(text)
    if len(numbers) == 1:
        if not 1 <= numbers[0] <= most:
            raise UserError(f"--gpus {text}: this machine has {most} {kind}{'s' * (most != 1)}; give 1 to {most}.")
        return list(range(numbers[0]))
    wrong = [number for number in numbers if not 0 <= number < present]
    if wrong or len(set(numbers)) < len(numbers):
        raise UserError(
            f"--gpus {text}: this machine's GPUs have the numbers 0 to {present - 1}; name each once."
            if present
            else f"--gpus {text}: no GPU can be used on this machine; give a number of workers, as 2."
        )
    return numbers
