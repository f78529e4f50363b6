"""A released U-Net, a float32 pickle, once to float16 safetensors: half the size, and mapped straight from the disk."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Event

import torch
from safetensors import safe_open
from torch import Tensor

from latentsync.checkpoints.download import Progress, check_cancel, no_progress
from latentsync.errors import UserError

GROUP = 256 << 20  # bytes of a file that are mapped in memory at a time
SOURCE = "source_sha256"  # in the metadata of a converted file: the hash of the pickle that it was made of
LARGEST = 65520  # from here on, float16 rounds to infinity
ALIGNMENT = 8  # bytes, of the data in a safetensors file


def in_groups(read: Callable[[], Mapping[str, Tensor]], most: float = GROUP) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The tensors that `read` maps from a file, about `most` bytes of them at a time, with the bytes so far.

    Every group is mapped anew: what has been read of a mapping counts as this process's memory until it is let go.
    The tensors of a group must not be kept.
    """
    sizes = {name: tensor.nbytes for name, tensor in read().items()}
    done, names, size = 0, [], 0
    for position, name in enumerate(sizes, 1):
        names.append(name)
        size += sizes[name]
        if size >= most or position == len(sizes):
            tensors = read()
            done += size
            yield done, {name: tensors[name] for name in names}
            del tensors
            names, size = [], 0


def convert(
    read: Callable[[], Mapping[str, Tensor]],
    target: Path,
    metadata: Mapping[str, str],
    progress: Progress = no_progress,
    cancel: Event | None = None,
) -> str:
    """Write the tensors that `read` maps from a file as float16 safetensors; returns the new file's SHA-256.

    Written tensor by tensor under another name, read back through the safetensors library and compared, then renamed,
    so that `target` is whole or not there. Little memory is taken, see `in_groups`. Raises UserError where a number
    does not fit into float16 or the disk fails.
    """
    temporary = target.with_name(f"{target.name}.{os.getpid()}.converting")
    try:
        digest = _write(read, temporary, metadata, target.name, progress, cancel)
        _compare(read, temporary, target.name, progress, cancel)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(
            f"'{target}' cannot be written ({error.strerror or error}): make room on that disk, or set "
            "LATENTSYNC_HOME to another folder."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def half(name: str, tensor: Tensor) -> Tensor:
    """Rounded to float16. Raises UserError where a number is too large for that."""
    low, high = tensor.aminmax()
    if not max(-low, high) < LARGEST:  # nor is it with numbers that are none
        raise UserError(f"The tensor '{name}' holds numbers that float16 cannot; it cannot be converted.")
    return tensor.to(torch.float16)


def _write(read, path: Path, metadata: Mapping[str, str], name: str, progress: Progress, cancel: Event | None) -> str:
    """The safetensors format: the length of the header, the header in JSON, the numbers of all tensors in its order.

    The library writes only what is in memory as a whole.
    """
    header, end = {"__metadata__": dict(metadata)}, 0
    for key, tensor in read().items():
        begin, end = end, end + 2 * tensor.numel()
        header[key] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(data) -> None:
            digest.update(data)
            file.write(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for done, tensors in in_groups(read):
            for key, tensor in tensors.items():
                check_cancel(cancel)
                put(half(key, tensor).reshape(-1).view(torch.uint8).numpy())
            progress(done // 2, end, f"converting to {name}")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _compare(read, path: Path, name: str, progress: Progress, cancel: Event | None) -> None:
    total = path.stat().st_size
    for done, tensors in in_groups(read):
        with safe_open(path, "pt") as written:
            for key, tensor in tensors.items():
                check_cancel(cancel)
                if not _same_bits(written.get_tensor(key), tensor.to(torch.float16)):
                    raise UserError(f"'{path}' does not come back from the disk as it was written; check the disk.")
        progress(done // 2, total, f"checking {name}")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Compared as whole numbers, which is several times as fast on a processor as comparing float16."""
    return one.dtype == other.dtype and torch.equal(one.view(torch.int16), other.view(torch.int16))
