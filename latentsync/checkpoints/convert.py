"""Convert a released U-Net, a float32 pickle, to float16 safetensors: half the size, and mapped straight from disk."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from latentsync.checkpoints.download import Progress, check_cancel, no_progress
from latentsync.checkpoints.tensors import in_groups
from latentsync.errors import UserError
from latentsync.paths import replacing

MAX_HALF = 65520  # from here on, float16 rounds to infinity
ALIGNMENT = 8  # bytes, of the data in a safetensors file


def convert(
    read: Callable[[], Mapping[str, Tensor]],
    target: Path,
    metadata: Mapping[str, str],
    progress: Progress = no_progress,
    cancel: Event | None = None,
) -> str:
    """Write the tensors that `read` maps from a file as float16 safetensors; returns the new file's SHA-256.

    Written tensor by tensor under another name, read back through the safetensors library and compared, then renamed,
    so that `target` is whole or not there. Needs little memory, see `in_groups`. Raises UserError where a number
    does not fit into float16 or the disk fails.
    """
    try:
        with replacing(target) as partial:
            digest = _write(read, partial, metadata, target.name, progress, cancel)
            _compare(read, partial, target.name, progress, cancel)
    except OSError as error:
        raise UserError(
            f"'{target}' cannot be written ({error.strerror or error}): make room on that disk, or set "
            "LATENTSYNC_HOME to another folder."
        ) from error
    return digest


def to_half(name: str, tensor: Tensor) -> Tensor:
    """Round to float16. Raises UserError where a number is too large for that, or NaN."""
    low, high = tensor.aminmax()
    if not max(-low, high) < MAX_HALF:  # so written, it is also true of NaN
        raise UserError(f"The tensor '{name}' holds numbers that float16 cannot; it cannot be converted.")
    return tensor.to(torch.float16)


def _write(
    read: Callable[[], Mapping[str, Tensor]],
    path: Path,
    metadata: Mapping[str, str],
    name: str,
    progress: Progress,
    cancel: Event | None,
) -> str:
    """Write the safetensors format: the header's length, the header in JSON, the numbers of all tensors in its order.

    The library's own function writes only what is in memory as a whole.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, tensor in read().items():
        begin, end = end, end + 2 * tensor.numel()
        header[key] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(data: Any) -> None:  # bytes or an array of them
            digest.update(data)
            file.write(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for done, tensors in in_groups(read):
            for key, tensor in tensors.items():
                check_cancel(cancel)
                put(to_half(key, tensor).reshape(-1).view(torch.uint8).numpy())
            progress(done // 2, end, f"converting to {name}")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _compare(
    read: Callable[[], Mapping[str, Tensor]], path: Path, name: str, progress: Progress, cancel: Event | None
) -> None:
    total = path.stat().st_size
    for done, tensors in in_groups(read):
        with safe_open(path, "pt") as written:
            for key, tensor in tensors.items():
                check_cancel(cancel)
                if not _same_bits(written.get_tensor(key), tensor.to(torch.float16)):
                    raise UserError(f"'{path}' does not come back from the disk as it was written; check the disk.")
        progress(done // 2, total, f"checking {name}")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two float16 tensors are equal; as integers the comparison is several times as fast on a processor."""
    return one.dtype == other.dtype and torch.equal(one.view(torch.int16), other.view(torch.int16))
