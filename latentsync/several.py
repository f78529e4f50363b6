"""Several jobs of one command: they share the loaded models."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # these import torch, which takes seconds
    import torch

    from latentsync.checkpoints.find import Checkpoint
    from latentsync.checkpoints.load import Models

LoadModels = Callable[["Checkpoint", "torch.device"], "Models"]


def load_once() -> LoadModels:
    """A `load_models` that returns the last models again while checkpoint and device stay the same."""
    kept: list[tuple[Checkpoint, torch.device, Models]] = []

    def load(checkpoint: "Checkpoint", device: "torch.device") -> "Models":
        import gc

        from torch.cuda import empty_cache

        from latentsync.checkpoints.load import load_models

        if not kept or kept[0][:2] != (checkpoint, device):
            if kept:  # memory may not hold both
                kept.clear()
                gc.collect()
                if device.type == "cuda":
                    empty_cache()
            kept.append((checkpoint, device, load_models(checkpoint, device)))
        return kept[0][2]

    return load
