"""What this machine is: its device, the models on it, and what suits it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optim.serving.job import Request
from optim.serving.models import list_models, recommended_model

if TYPE_CHECKING:  # torch takes seconds to load
    import torch


LONG_SECONDS = 60.0  # of sound: a longer job takes all GPUs that are free when no other waits


@dataclass(frozen=True)
class Machine:
    """What the worker knows of its machine."""

    device: str  # torch's name; of several GPUs the first
    device_name: str  # for people
    recommended: float  # level, 0 to 1
    models: tuple[dict[str, Any], ...]  # name, resolution, present, guidance (what suits it), remark
    chosen: str  # the model that `auto` is
    best: str  # the released model that suits the machine, whether it is here or not
    why: str  # the reason, as a sentence
    advice: tuple[dict[str, str], ...]
    torch: str  # its version
    gpus: int = 1  # that jobs run on, or processes on the processor in their place
    sharing: str = ""  # how jobs share several, as a sentence


def shared_gpus(gpus: str | None, device_name: str) -> list[int] | None:
    """The numbers of several GPUs that jobs share, or of processes on the processor; None for one device.

    gpus, device_name: as on the command line. Raises UserError.
    """
    if gpus is None:
        return None
    from latentsync.options import choose_device
    from optim.cluster.options import workers_here

    numbers = workers_here(gpus, device_name, choose_device(device_name))
    return numbers if len(numbers) > 1 else None


def inspect_machine(
    folder: Path, model: str, device_name: str, lent: bool, numbers: Sequence[int] | None = None
) -> Machine:
    """Inspect the machine, which imports torch. Raises UserError if it cannot be used.

    folder: of the results, created if missing; model, device_name: as on the command line; lent: a GPU is lent to
    each job, and none is here; numbers: of the GPUs that jobs share, or of processes on the processor; None for one
    device.
    """
    import torch

    from latentsync.options import choose_device
    from optim.doctor import advise, read_facts
    from optim.hardware import gpu_of, level_for_all, recommended_level

    device = torch.device("cpu") if lent else choose_device(device_name)
    shared = numbers if numbers and device.type == "cuda" else ()
    if shared:
        device = torch.device("cuda", shared[0])
    gpu = gpu_of(device)
    best, why = recommended_model(gpu, lent)
    models = list_models(model, device, lent)
    resolution = next(each["resolution"] for each in models["models"] if each["name"] == models["chosen"])
    folder.mkdir(parents=True, exist_ok=True)
    advice = advise(read_facts(resolution, folder))
    return Machine(
        device=str(device),
        device_name="a GPU lent for each job" if lent else device_text(device, shared),
        recommended=(level_for_all(shared) if shared else recommended_level(gpu)).position,
        best=best,
        why=why,
        advice=tuple(asdict(each) for each in advice),
        torch=torch.__version__,
        gpus=len(numbers) if numbers else 1,
        sharing=sharing_text(len(numbers), device.type) if numbers else "",
        **models,
    )


def sharing_text(count: int, kind: str) -> str:
    """How jobs share so many GPUs, or processes on the processor; see `JobStore.take_next`."""
    return (
        f"{workers_text(count, kind)}: up to {count} jobs at once; a film over a minute uses all that are free when no "
        "other job waits."
    )


def workers_text(count: int, kind: str) -> str:
    """So many GPUs, or workers on a processor, in words. kind: "cuda" or "cpu"."""
    name = "GPU" if kind == "cuda" else "process"
    return f"{count} {name}" if count == 1 else f"{count} {name}{'s' if kind == 'cuda' else 'es'}"


def at_level(request: Request, machine: Machine) -> Request:
    """A request with the level that `auto` means where GPUs are shared: the one of the smallest, on any of them."""
    return replace(request, level=str(machine.recommended)) if machine.gpus > 1 and request.level == "auto" else request


def device_text(device: "torch.device", numbers: Sequence[int] = ()) -> str:
    """The name of a device's hardware, or of that of the GPUs with these numbers."""
    if numbers:
        import torch

        names = [torch.cuda.get_device_name(number) for number in numbers]
        return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    from latentsync.machine import usable_cores
    from optim.hardware import processor_name

    return f"{processor_name()}, {usable_cores()} cores"
