"""Training states: saved at the end of a run, continued by the next one."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentsync.errors import UserError
from latentsync.paths import replacing


def save_state(
    path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer | None, step: int, **extra: Any
) -> None:
    """Write weights, optimizer (None: training continues with a new one) and step, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: module.state_dict() for name, module in modules.items()}
    moments = optimizer and optimizer.state_dict()
    with replacing(path) as partial:
        torch.save({"weights": weights, "optimizer": moments, "step": step, **extra}, partial)


def load_state(path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Load a saved state if there is one; returns the step to continue from."""
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    for name, module in modules.items():
        module.load_state_dict(state["weights"][name])
    if state["optimizer"] is not None:
        optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def load_weights(path: Path, modules: dict[str, nn.Module]) -> dict[str, Any]:
    """Load only the weights of some modules; returns the other values. Raises UserError if there is no state."""
    if not path.is_file():
        raise UserError(f"There is no {path}: run the stage '{path.stem}' first, or import a model.")
    state = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    for name, module in modules.items():
        module.load_state_dict(state["weights"][name])
    return {name: value for name, value in state.items() if name not in ("weights", "optimizer")}
