"""Checkpoints in ComfyUI: where they lie, and one loaded at a time, under ComfyUI's management of memory."""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher

from latentsync.checkpoints import store
from latentsync.checkpoints.find import MODEL_NAMES, UNET_NAMES, Checkpoint, find_released, resolve_model
from latentsync.checkpoints.load import Models, load_models
from latentsync.checkpoints.releases import RELEASES
from latentsync.errors import UserError
from optim.hardware import RELEASED, batch_sizes, gpu_of
from optim.levels import Level

log = logging.getLogger(__name__)

FOLDER = "latentsync"  # of ComfyUI's models/
MEBIBYTE = 2**20


def register_folder() -> None:
    """Make models/latentsync a folder of models, to which extra_model_paths.yaml can add others."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def local_checkpoints() -> dict[str, Path]:
    """Checkpoint folders that ComfyUI's folders hold, by the names for the node.

    These are models/latentsync and the folders in it, and what another pack has in custom_nodes/PACK/checkpoints.
    """
    folders: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths(FOLDER)):
        for folder in (root, *_subfolders(root)):
            folders.setdefault(folder.name if folder != root else FOLDER, folder)
    for root in map(Path, folder_paths.get_folder_paths("custom_nodes")):
        for folder in _subfolders(root):
            folders.setdefault(f"{folder.name}/checkpoints", folder / "checkpoints")
    return {name: folder for name, folder in folders.items() if name not in MODEL_NAMES and _holds_unet(folder)}


def _subfolders(root: Path) -> list[Path]:
    return sorted(folder for folder in root.iterdir() if folder.is_dir()) if root.is_dir() else []


def _holds_unet(folder: Path) -> bool:
    return any((place / name).is_file() for place in (folder, folder / "checkpoints") for name in UNET_NAMES)


def model_names() -> list[str]:
    """What the node offers: `auto`, the demo model, the released ones, and those in ComfyUI's folders."""
    return [*MODEL_NAMES, *local_checkpoints()]


def find_checkpoint(name: str, device: torch.device) -> Checkpoint:
    """Find a checkpoint by a name of `model_names`. Raises UserError.

    `auto` is the best released one in the user's folder, else the first in ComfyUI's folders, else the demo model.
    """
    local = local_checkpoints()
    if name == "auto":
        checkpoint = resolve_model("auto", device)
        if checkpoint.name == "demo" and local:
            return resolve_model(str(next(iter(local.values()))), device)
        return checkpoint
    if name in local:
        return resolve_model(str(local[name]), device)
    for root in map(Path, folder_paths.get_folder_paths(FOLDER)):  # a released one that was copied there
        if name in RELEASES and find_released(name) is None and _holds_unet(root / name):
            return resolve_model(str(root / name), device)
    if name not in MODEL_NAMES:
        raise UserError(f"There is no model '{name}': give one of {', '.join(model_names())}.")
    return resolve_model(name, device)


def fetch_release(name: str) -> None:
    """Fetch a released model where it is missing, with ComfyUI's progress bar. Raises UserError, or the interruption.

    An interrupted download is continued the next time.
    """
    if name not in RELEASES:
        raise UserError(
            f"'{name}' is not fetched from anywhere: choose one of {', '.join(RELEASES)}, or switch fetch off."
        )
    bar = comfy.utils.ProgressBar(1)

    def progress(done: int, total: int, what: str) -> None:
        management.throw_exception_if_processing_interrupted()
        if total:
            bar.update_absolute(done // MEBIBYTE, max(1, total // MEBIBYTE))

    store.get(name, progress)


def compute_device() -> torch.device:
    """ComfyUI's device where the pipeline can use it: an NVIDIA GPU, else the processor."""
    device = management.get_torch_device()
    return device if device.type == "cuda" else torch.device("cpu")


class ManagedModels(ModelPatcher):
    """A checkpoint in ComfyUI's list of loaded models. It is loaded whole and unloaded whole.

    Captured graphs hold the addresses of the weights, so that these are never moved; a model that has to leave the card
    is forgotten, and read from its files again when it is needed.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device):
        super().__init__(torch.nn.Module(), device, torch.device("cpu"), size=RELEASED.weights)
        self.checkpoint = checkpoint
        self.models: Models | None = None

    def loaded_size(self) -> int:
        return self.size if self.models else 0

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.models else self.offload_device

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, *_: Any, **__: Any) -> int:
        """Load the checkpoint whole, whatever part of it ComfyUI has room for. Returns the bytes that it takes more."""
        if self.models is not None:
            return 0
        log.info(f"loading {self.checkpoint.name}")
        self.models = load_models(self.checkpoint, self.load_device)
        networks = self.models.unet, self.models.vae, self.models.audio_encoder
        self.size = sum(management.module_size(network) for network in networks)
        return self.size

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, *_: Any, **__: Any) -> int:
        """Free nothing, so that ComfyUI goes on to `detach`."""
        return 0

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        """Unload; not `unpatch_all`: ComfyUI only changes the place in its list."""
        if unpatch_all and self.models is not None:
            self.models = None
            gc.collect()
        return self.model


_current: ManagedModels | None = None  # ComfyUI runs one node at a time


def loaded_models(checkpoint: Checkpoint, level: Level) -> Models:
    """The networks of a checkpoint on the device, once loaded and kept. ComfyUI unloads others as far as necessary.

    Raises UserError where a file is damaged.
    """
    global _current
    device = compute_device()
    if checkpoint.remark:
        log.info(checkpoint.remark)
    checkpoint = replace(checkpoint, remark=None)  # the same files under any name
    if _current is None or _current.checkpoint != checkpoint or _current.load_device != device:
        if _current is not None:
            _current.detach()
        _current = ManagedModels(checkpoint, device)
    gpu = gpu_of(device)
    needed = batch_sizes(gpu.memory_total, checkpoint.resolution, level).planned - RELEASED.weights if gpu else 0
    management.load_models_gpu([_current], memory_required=needed, force_full_load=True)
    if _current.models is None:
        raise RuntimeError("ComfyUI did not load the model")
    return _current.models


@contextmanager
def own_torch_settings() -> Iterator[None]:
    """Undo, at the end of the block, what `accelerate` sets for the whole process: other nodes keep their results."""
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        with torch.inference_mode(False):  # in ComfyUI's, weights could not be used by the pipeline's other threads
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32
        if (device := compute_device()).type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
