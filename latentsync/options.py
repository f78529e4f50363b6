"""What several command lines have in common."""

import argparse
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


def choose_device(name: str) -> "torch.device":
    """The torch device of a `--device`; `auto` is the GPU where there is one. Raises UserError.

    From then on torch uses at most as many threads as this process may use cores. By itself it starts one for every core
    of the machine, too many in a container that has fewer.
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
