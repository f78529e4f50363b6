"""Training in pieces: what is written at the end of one and read at the start of the next."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentsync.errors import UserError


def save_state(
    path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer | None, step: int, **extra: Any
) -> None:
    """Write weights, optimizer (None: training goes on with a fresh one) and step, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    weights = {name: module.state_dict() for name, module in modules.items()}
    moments = optimizer and optimizer.state_dict()
    torch.save({"weights": weights, "optimizer": moments, "step": step, **extra}, unfinished)
    unfinished.replace(path)


def load_state(path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Read what `save_state` wrote, if it is there; returns the step to continue from."""
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    for name, module in modules.items():
        module.load_state_dict(state["weights"][name])
    if state["optimizer"] is not None:
        optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def load_weights(path: Path, modules: dict[str, nn.Module]) -> dict[str, Any]:
    """Read only the weights of some modules; returns the rest of the file. Raises UserError where there is none."""
    if not path.is_file():
        raise UserError(f"There is no {path}: run the stage '{path.stem}' first, or import a model.")
    state = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    for name, module in modules.items():
        module.load_state_dict(state["weights"][name])
    return {name: value for name, value in state.items() if name not in ("weights", "optimizer")}
