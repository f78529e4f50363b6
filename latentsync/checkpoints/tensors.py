"""Tensors of checkpoint files: read without running code, loaded into a network exactly or not at all.

Files are memory-mapped and read a group of tensors at a time, so that main memory never holds one whole.
"""

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from latentsync.errors import UserError

# Of a file that are mapped in memory at a time. Mapping it anew takes 0.05 s for the thousand tensors of the U-Net.
GROUP_BYTES = 1 << 30
# What a damaged pickle may raise, besides its own errors.
DAMAGED = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError)

ReadTensors = Callable[[], dict[str, Tensor]]  # maps the tensors of a file anew at every call


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of a safetensors or torch file (whose code, if it has any, is not run).

    A torch file's outer dictionary is returned as it is, memory-mapped. Raises UserError, naming the file.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        # Only zip files can be mapped; older ones are read whole.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))  # noqa: TID251
    except FileNotFoundError as error:
        raise UserError(f"The checkpoint file '{path}' is missing; fetch it again.") from error
    except (SafetensorError, zipfile.BadZipFile, *DAMAGED) as error:
        raise UserError(f"The checkpoint file '{path}' is damaged or incomplete; fetch it again.") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"The checkpoint file '{path}' is damaged, or holds code besides tensors, which is never run; "
            "fetch it again from a source that you trust."
        ) from error
    if not isinstance(tensors, Mapping):
        raise _not_named_tensors(path)
    return dict(tensors), {}


def reader(path: Path, pick: Callable[[dict[str, Any]], Any] = lambda tensors: tensors) -> ReadTensors:
    """A function that reads the tensors of a file; `pick` selects them from what the file holds.

    Safetensors and zipped torch files are mapped anew at every call; other files cannot be mapped and are read whole,
    once, here. Raises UserError, as the function does.
    """

    def read() -> dict[str, Tensor]:
        tensors = pick(read_tensors(path)[0])
        if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
            raise _not_named_tensors(path)
        return dict(tensors)

    if path.suffix == ".safetensors" or zipfile.is_zipfile(path):
        return read
    whole = read()
    return lambda: whole


def unet_reader(path: Path) -> ReadTensors:
    """`reader` for the U-Net of a safetensors file, or of a torch file {"state_dict": …}."""
    return reader(path, lambda tensors: tensors.get("state_dict", tensors))


def in_groups(
    read: Callable[[], Mapping[str, Tensor]],
    max_bytes: float = GROUP_BYTES,
    *,
    tensors: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield (bytes so far, tensors) of a file, about `max_bytes` of them at a time; tensors: a mapping that is there.

    Every further group is mapped anew by `read`: pages that were read from a mapping count as this process's memory
    until the mapping is closed. The tensors of a group must not outlive it.
    """
    tensors = read() if tensors is None else tensors
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    done, names, size = 0, [], 0
    for position, name in enumerate(sizes, 1):
        names.append(name)
        size += sizes[name]
        if size >= max_bytes or position == len(sizes):
            done += size
            yield done, {name: tensors[name] for name in names}
            tensors, names, size = {}, [], 0
            if position < len(sizes):
                tensors = read()


def load_exactly(
    module: nn.Module,
    read: Callable[[], Mapping[str, Any]],
    path: Path,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Load the tensors that `read` maps from `path` into `module`, which is on the meta device: all of them, no others.

    They go to the device, there channels-last and in `dtype` (None: that of the file), a group at a time. Raises
    UserError naming the first tensor that is missing, extra, misshaped or not finite.
    """
    tensors = read()
    _check_names_and_shapes(module, tensors, path)
    groups = in_groups(read, tensors=tensors)
    del tensors
    loaded: dict[str, Tensor] = {}
    for _, group in groups:
        moved = {name: _to_device(tensor, device, dtype) for name, tensor in group.items()}
        _check_finite(moved, path)
        loaded |= moved
        del group, moved
    module.load_state_dict(loaded, assign=True)


def _check_names_and_shapes(module: nn.Module, tensors: Mapping[str, Any], path: Path) -> None:
    """Raise UserError for the first tensor that the module lacks, or has in another shape, or does not have."""
    expected = module.state_dict()
    problems = [f"lacks the tensor '{name}'" for name in expected if name not in tensors]
    problems += [f"has a tensor {name!r:.80} that this model does not know" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        tensor, shape = tensors[name], tuple(expected[name].shape)
        if not isinstance(tensor, Tensor):
            problems.append(f"has '{name}' as {type(tensor).__name__} instead of a tensor")
        elif not (tensor.is_floating_point() and tensor.layout == torch.strided) or tensor.is_meta or tensor.is_nested:
            kind = "without numbers" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
            problems.append(f"has '{name}' as {kind} instead of plain floating-point numbers")
        elif tensor.shape != shape:
            problems.append(f"has '{name}' of shape {tuple(tensor.shape)} instead of {shape}")
    if problems:
        more = f" ({len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise UserError(f"The checkpoint file '{path}' {problems[0]}{more}; it is of another model or version.")


def _check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError naming the first tensor with a number that is NaN, or too large for its type."""
    filled = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    if not _are_finite(list(filled.values())):
        name = next(name for name, tensor in filled.items() if not _are_finite([tensor]))
        kind = str(tensors[name].dtype).removeprefix("torch.")
        raise UserError(
            f"The checkpoint file '{path}' holds numbers in '{name}' that are not finite as {kind}; fetch it again."
        )


def _are_finite(tensors: list[Tensor]) -> bool:
    """Whether all numbers of these tensors, which are on one device, are finite."""
    if all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors):
        # By NumPy: PyTorch shares each of a thousand reductions among all cores, and on a busy machine waits for them.
        values = (tensor.numpy() for tensor in tensors)
        return all(bool(np.isfinite(each.min()) and np.isfinite(each.max())) for each in values)
    # The largest magnitude is infinite or NaN where a number is; on a GPU a few kernels find that of all tensors.
    return bool(torch.nn.utils.get_total_norm(tensors, torch.inf).isfinite())


def _to_device(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    layout = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
    return tensor.to(device).to(dtype=dtype, memory_format=layout)  # converted on the device, not in main memory


def _not_named_tensors(path: Path) -> UserError:
    return UserError(f"The checkpoint file '{path}' does not hold named tensors; fetch it again.")
