"""ComfyUI's interface as far as the nodes use it, recorded from version 0.3.64, for machines without ComfyUI.

Names and signatures are ComfyUI's, the few lines behind them are ours. `test_comfyui.py` compares them with a real
ComfyUI where the variable COMFYUI names its folder. `install(folder)` puts the modules where an import finds them, and
returns the recorder of what the nodes told ComfyUI.
"""

import sys
import weakref
from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

MODULES = (
    "comfy", "comfy.model_management", "comfy.model_patcher", "comfy.utils", "comfy_api", "comfy_api.latest",
    "comfy_execution", "comfy_execution.graph_utils", "folder_paths", "nodes",
)  # fmt: skip


class InterruptProcessingException(Exception):
    pass


@dataclass
class Recorder:
    """What the nodes told ComfyUI, and the switches of a test."""

    root: Path
    progress: list[tuple[float, float, Any]] = field(default_factory=list)  # value, total, preview
    interrupt_after: int | None = None  # checks, until the user interrupts
    loaded: list[Any] = field(default_factory=list)  # ComfyUI's list of loaded models: the patchers
    replacements: list[Any] = field(default_factory=list)
    node_ids: dict[str, Any] = field(default_factory=dict)  # NODE_CLASS_MAPPINGS

    def check(self) -> None:
        if self.interrupt_after is not None:
            self.interrupt_after -= 1
            if self.interrupt_after < 0:
                self.interrupt_after = None
                raise InterruptProcessingException

    def load(self, models: list[Any], memory_required: float = 0, force_full_load: bool = False) -> None:
        for model in models:
            if model in self.loaded:
                self.loaded.remove(model)
                model.detach(unpatch_all=False)
            model.partially_load(model.load_device, 1e32, force_patch_weights=False)
            self.loaded.insert(0, model)

    def unload_all(self) -> None:
        while self.loaded:
            model = self.loaded.pop()
            if model.partially_unload(model.offload_device, 1) < 1:
                model.detach(True)


class ModelPatcher:
    def __init__(self, model: torch.nn.Module, load_device: Any, offload_device: Any, size: int = 0):
        self.model, self.load_device, self.offload_device, self.size = model, load_device, offload_device, size
        self.real_model = weakref.ref(model)


class VideoInput:
    pass


class VideoFromFile(VideoInput):
    def __init__(self, file: Any, *, start_time: float = 0, duration: float = 0):
        self._file, self._start, self._duration = file, start_time, duration

    def get_stream_source(self) -> Any:
        return self._file

    def get_duration(self) -> float:
        from latentsync.media import probe_video

        return self._duration or probe_video(self._file).duration - self._start

    def get_dimensions(self) -> tuple[int, int]:
        from latentsync.media import probe_video

        info = probe_video(self._file)
        return info.width, info.height

    def save_to(self, path: str, format: Any = "auto", codec: Any = "auto", metadata: Any = None) -> None:
        from clips import ffmpeg

        ffmpeg("-ss", str(self._start), "-t", str(self._duration), "-i", str(self._file), path)


@dataclass
class VideoFromComponents(VideoInput):
    _components: Any  # with images and frame_rate

    def get_components(self) -> Any:
        return self._components


class Port:
    """An input or output of a node."""

    def __init__(self, io_type: str, id: str | None = None, *, optional: bool = False, **options: Any):
        self.io_type, self.id, self.optional, self.options = io_type, id, optional, options


def io_type(name: str) -> SimpleNamespace:
    return SimpleNamespace(
        Input=lambda id, **options: Port(name, id, **options),
        Output=lambda id=None, **options: Port(name, id, **options),
        io_type=name,
    )


def multi_type_input(id: str, types: list[Any], **options: Any) -> Port:
    return Port(",".join(each.io_type for each in types), id, **options)


class Hidden(str, Enum):
    prompt = "PROMPT"
    unique_id = "UNIQUE_ID"


class FolderType(str, Enum):
    output = "output"


@dataclass
class Schema:
    node_id: str
    display_name: str | None = None
    category: str = "sd"
    description: str = ""
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    hidden: list[Hidden] = field(default_factory=list)
    is_output_node: bool = False


class ComfyNode:
    hidden: Any = None


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None):
        self.args, self.ui = args, ui


@dataclass
class NodeReplace:
    new_node_id: str
    old_node_id: str
    old_widget_ids: list[str] | None = None
    input_mapping: list[dict] | None = None
    output_mapping: list[dict] | None = None


@dataclass
class ExecutionBlocker:
    message: str | None


class ComfyExtension:
    async def on_load(self) -> None:
        pass


def install(monkeypatch: Any, root: Path) -> Recorder:
    """Put the modules where an import finds them, with folders under `root`, as long as `monkeypatch` holds."""
    recorder = Recorder(root)
    made = {name: ModuleType(name) for name in MODULES}
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)

    def fill(name: str, **members: Any) -> None:
        for member, value in members.items():
            setattr(made[name], member, value)

    class ProgressBar:
        def __init__(self, total: float, node_id: str | None = None):
            self.total = total

        def update_absolute(self, value: float, total: float | None = None, preview: Any = None) -> None:
            self.total = self.total if total is None else total
            recorder.check()
            recorder.progress.append((value, self.total, preview))

    class ComfyAPI:
        class node_replacement:  # noqa: N801 - ComfyUI's name
            @staticmethod
            async def register(node_replace: NodeReplace) -> None:
                recorder.replacements.append(node_replace)

    folders: dict[str, list[str]] = {"custom_nodes": [str(root / "custom_nodes")]}

    def add_model_folder_path(folder_name: str, full_folder_path: str, is_default: bool = False) -> None:
        if full_folder_path not in folders.setdefault(folder_name, []):
            folders[folder_name].append(full_folder_path)

    def get_save_image_path(filename_prefix: str, output_dir: str) -> tuple[str, str, int, str, str]:
        folder = (Path(output_dir) / filename_prefix).parent
        if not folder.resolve().is_relative_to(Path(output_dir).resolve()):
            raise Exception("Saving image outside the output folder is not allowed.")
        folder.mkdir(parents=True, exist_ok=True)
        name = Path(filename_prefix).name
        counter = 1 + len(list(folder.glob(f"{name}_*")))
        return str(folder), name, counter, str(folder.relative_to(output_dir)), filename_prefix

    fill(
        "comfy.model_management",
        InterruptProcessingException=InterruptProcessingException,
        throw_exception_if_processing_interrupted=recorder.check,
        get_torch_device=lambda: torch.device("cpu"),
        load_models_gpu=recorder.load,
        unload_all_models=recorder.unload_all,
        module_size=lambda module: sum(tensor.nbytes for tensor in module.state_dict().values()),
    )
    fill("comfy.model_patcher", ModelPatcher=ModelPatcher)
    fill("comfy.utils", ProgressBar=ProgressBar)
    types = {
        name.title(): io_type(name)
        for name in ("IMAGE", "VIDEO", "AUDIO", "INT", "FLOAT", "COMBO", "BOOLEAN", "STRING")
    }
    io = SimpleNamespace(
        **types,
        AnyType=io_type("*"),
        MultiType=SimpleNamespace(Input=multi_type_input),
        Custom=io_type,
        Hidden=Hidden,
        FolderType=FolderType,
        Schema=Schema,
        ComfyNode=ComfyNode,
        NodeOutput=NodeOutput,
        NodeReplace=NodeReplace,
    )
    ui = SimpleNamespace(
        SavedResult=lambda filename, subfolder, type: {"filename": filename, "subfolder": subfolder, "type": type},
        PreviewVideo=lambda values: {"images": values},
        PreviewText=lambda value: {"text": value},
    )
    fill(
        "comfy_api.latest",
        ComfyAPI=ComfyAPI,
        ComfyExtension=ComfyExtension,
        Input=SimpleNamespace(Video=VideoInput),
        InputImpl=SimpleNamespace(VideoFromFile=VideoFromFile, VideoFromComponents=VideoFromComponents),
        io=io,
        ui=ui,
    )
    fill("comfy_execution.graph_utils", ExecutionBlocker=ExecutionBlocker)
    fill(
        "folder_paths",
        models_dir=str(root / "models"),
        add_model_folder_path=add_model_folder_path,
        get_folder_paths=lambda folder_name: list(folders[folder_name]),
        get_output_directory=lambda: str(root / "output"),
        get_temp_directory=lambda: str(root / "temp"),
        get_save_image_path=get_save_image_path,
    )
    fill("nodes", NODE_CLASS_MAPPINGS=recorder.node_ids)
    return recorder


def components(images: torch.Tensor, fps: float) -> VideoFromComponents:
    """A VIDEO that is made of tensors, as of the node Create Video."""
    return VideoFromComponents(SimpleNamespace(images=images, frame_rate=Fraction(fps)))
