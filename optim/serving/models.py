"""The models that a server can use: which are present, what `auto` means, and which one suits the machine."""

from typing import TYPE_CHECKING, Any

from latentsync.checkpoints.releases import RELEASES, recommend
from latentsync.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to load
    import torch

    from latentsync.checkpoints.find import Checkpoint
    from optim.hardware import Gpu


def recommended_model(gpu: "Gpu | None", lent: bool = False) -> tuple[str, str]:
    """The released model that suits a GPU, and the reason as a sentence.

    The model fits if the GPU has the memory that its makers state, which `auto` requires too, and that our own estimate
    yields. lent: jobs get a large GPU each (ZeroGPU), so every model fits.
    """
    from optim.hardware import batch_sizes, recommended_level

    level = recommended_level(gpu)
    required = {release.resolution: release.vram for release in RELEASES.values()}

    def fits(resolution: int) -> bool:
        return gpu is not None and gpu.memory_total >= required[resolution] and batch_sizes(gpu, resolution, level).fits

    return recommend(lambda resolution: lent or fits(resolution))


def find_checkpoint(model: str, device: "torch.device", lent: bool = False) -> "Checkpoint":
    """Find the checkpoint that a name or a folder means, as `resolve_model` does.

    lent: jobs get a large GPU each, so `auto` is the best model present whatever the device. Raises UserError.
    """
    from latentsync.checkpoints.find import find_released, resolve_model

    if lent and model == "auto":
        for name in RELEASES:  # the best first
            if checkpoint := find_released(name):
                return checkpoint
    return resolve_model(model, device)


def list_models(model: str, device: "torch.device", lent: bool = False) -> dict[str, Any]:
    """The fields `models` (a dict for each model that can be chosen) and `chosen` (what `auto` means) of a `Machine`.

    model: what the server uses for `auto`; lent: see `find_checkpoint`. Raises UserError if that model is missing.
    """
    from latentsync.checkpoints.find import MODEL_NAMES, resolve_model

    chosen = find_checkpoint(model, device, lent)
    names = [name for name in MODEL_NAMES if name != "auto"]
    models = []
    for name in names if chosen.name in names else [*names, chosen.name]:
        try:
            checkpoint = chosen if name == chosen.name else resolve_model(name, device)
        except UserError:
            checkpoint = None
        models.append(
            {
                "name": name,
                "present": checkpoint is not None,
                "resolution": checkpoint and checkpoint.resolution,
                "guidance": checkpoint and checkpoint.guidance_scale,
                "remark": checkpoint and checkpoint.remark,
            }
        )
    return {"models": tuple(models), "chosen": chosen.name}
