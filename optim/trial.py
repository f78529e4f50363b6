"""The trial of an optimization: its result must agree with the eager one, or the network stays eager.

A trial that a network's kernels have passed on this machine need not be made again: `passed_file`.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from latentsync.checkpoints.releases import home

MAX_ERROR = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-3}  # relative; a wrong result is off by 1


def relative_error(result: Tensor, expected: Tensor) -> float:
    """|result − expected| / |expected|, of tensors on any devices."""
    result, expected = result.cpu().double(), expected.cpu().double()
    return float((result - expected).norm() / expected.norm())


def disagreement(result: Tensor, expected: Tensor, dtype: torch.dtype) -> str:
    """What is wrong with a result that was computed in `dtype`; empty where it agrees with the expected one."""
    error, bound = relative_error(result, expected), MAX_ERROR.get(dtype, 0.0)
    return "" if error <= bound else f"the result is off by {error:.1e} (at most {bound:.0e})"


def one_line(error: Exception) -> str:
    """An exception's kind and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def passed_file(*identity: object) -> Path:
    """The empty file that says that a trial was passed; identity: all that its result depends on, by its repr."""
    return home() / "compiled" / "passed" / hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
