"""What this machine is: its device, the models on it, and what suits it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optim.serving.models import list_models, recommended_model

if TYPE_CHECKING:  # torch takes seconds to load
    import torch


@dataclass(frozen=True)
class Machine:
    """What the worker knows of its machine."""

    device: str  # torch's name
    device_name: str  # for people
    recommended: float  # level, 0 to 1
    models: tuple[dict[str, Any], ...]  # name, resolution, present, guidance (what suits it), remark
    chosen: str  # the model that `auto` is
    best: str  # the released model that suits the machine, whether it is here or not
    why: str  # the reason, as a sentence
    advice: tuple[dict[str, str], ...]
    torch: str  # its version


def inspect_machine(folder: Path, model: str, device_name: str, lent: bool) -> Machine:
    """Inspect the machine, which imports torch. Raises UserError if it cannot be used.

    folder: of the results, created if missing; model, device_name: as on the command line; lent: a GPU is lent to
    each job, and none is here.
    """
    import torch

    from latentsync.options import choose_device
    from optim.doctor import advise, read_facts
    from optim.hardware import gpu_of, recommended_level

    device = torch.device("cpu") if lent else choose_device(device_name)
    gpu = gpu_of(device)
    best, why = recommended_model(gpu, lent)
    models = list_models(model, device, lent)
    resolution = next(each["resolution"] for each in models["models"] if each["name"] == models["chosen"])
    folder.mkdir(parents=True, exist_ok=True)
    advice = advise(read_facts(resolution, folder))
    return Machine(
        device=str(device),
        device_name="a GPU lent for each job" if lent else device_text(device),
        recommended=recommended_level(gpu).position,
        best=best,
        why=why,
        advice=tuple(asdict(each) for each in advice),
        torch=torch.__version__,
        **models,
    )


def device_text(device: "torch.device") -> str:
    """The name of a device's hardware."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    from latentsync.machine import usable_cores
    from optim.hardware import processor_name

    return f"{processor_name()}, {usable_cores()} cores"
