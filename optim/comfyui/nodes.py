"""The nodes: what they take and give, and the ids under which they are offered.

The wrapper that most saved workflows are made with has the ids `LatentSyncNode` and `VideoLengthAdjuster`. Where no
other pack has them they are offered here, too, with the wrapper's inputs first, as saved values of widgets are told
apart by their position alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import ComfyAPI, ComfyExtension, InputImpl, io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from nodes import NODE_CLASS_MAPPINGS
from torch import Tensor

from latentsync import FPS
from latentsync.choice import FACES
from latentsync.settings import CRF, GUIDANCE_SCALE, INFERENCE_STEPS, SEED, TRAIN_STEPS
from optim.comfyui.health import health_text
from optim.comfyui.media import LENGTHS, MAX_RATE, fit_length
from optim.comfyui.models import compute_device, fetch_release, find_checkpoint, model_names, register_folder
from optim.comfyui.run import Request, run
from optim.levels import STOPS

CATEGORY = "LatentSync"
OLD_LIP_SYNC, OLD_LENGTH = "LatentSyncNode", "VideoLengthAdjuster"
CONTROL = "control_after_generate"
OLD_WIDGETS = {  # in the order of their saved values; what happens to the seed after a run has a place of its own
    OLD_LIP_SYNC: ("seed", CONTROL, "lips_expression", "inference_steps"),
    OLD_LENGTH: ("mode", "fps", "silent_padding_sec"),
}
MAX_SEED = 2**64 - 1
LATENTSYNC_MODEL = io.Custom("LATENTSYNC_MODEL")  # the name of a checkpoint, a str
LEFT_IN_FILE = (
    "The frames of a VIDEO were left in its file, as nothing was linked to 'images' when it was made: put the node "
    "'Get Video Components' behind the output 'video'."
)


def lip_sync_inputs() -> list[Any]:
    """The wrapper's inputs with its order, ranges and defaults, and ours behind them."""
    return [
        io.MultiType.Input(
            "images",
            types=[io.Image, io.Video],
            tooltip="The frames, as an IMAGE batch or as a VIDEO, which stays in files.",
        ),
        io.Audio.Input("audio", tooltip="The words that the mouth shall say; the result lasts as long."),
        io.Int.Input("seed", default=SEED, min=0, max=MAX_SEED, control_after_generate=True),
        io.Float.Input(
            "lips_expression",
            default=GUIDANCE_SCALE,
            min=1.0,
            max=3.0,
            step=0.1,
            optional=True,
            tooltip="The guidance scale: how strongly the mouth follows the sound.",
        ),
        io.Int.Input(
            "inference_steps",
            default=INFERENCE_STEPS,
            min=1,
            max=TRAIN_STEPS - 1,
            optional=True,
            tooltip="Denoising steps that are requested; faster levels run fewer.",
        ),
        io.Combo.Input(
            "optimization_level",
            options=[*(stop.name for stop in STOPS), "auto"],
            default="auto",
            optional=True,
            tooltip="conservative gives the same result as the plain pipeline; auto suits the card.",
        ),
        io.Float.Input(
            "vram_fraction",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            tooltip="The share of the card's memory to use, from 0.1; 0: the level's own.",
        ),
        io.Combo.Input("face", options=list(FACES), default=FACES[0], optional=True, tooltip="Where several are seen."),
        io.Float.Input(
            "fps",
            default=float(FPS),
            min=1.0,
            max=float(MAX_RATE),
            step=0.01,
            optional=True,
            tooltip="Frames a second of an IMAGE batch; a VIDEO has its own.",
        ),
        io.Float.Input(
            "crf", default=float(CRF), min=0.0, max=51.0, step=1.0, optional=True, tooltip="x264's quality."
        ),
        io.Boolean.Input(
            "silence_gate",
            default=True,
            optional=True,
            tooltip="Between words the model hears silence, so that noise moves no mouth.",
        ),
        io.String.Input("filename_prefix", default="video/LatentSync", optional=True),
        LATENTSYNC_MODEL.Input("model", optional=True, tooltip="Of the node LatentSync Model; without it: auto."),
        io.String.Input(
            "face_point",
            default="",
            optional=True,
            tooltip="A point on the face, X,Y in pixels, with a time in seconds X,Y@SECONDS: in place of 'face'.",
        ),
        io.Audio.Input("other_audio", optional=True, tooltip="What another face says, while 'face' says 'audio'."),
        io.String.Input(
            "other_face",
            default="",
            optional=True,
            tooltip=f"Who says 'other_audio': {', '.join(FACES)}, or a point as in 'face_point'.",
        ),
    ]


class LatentSync(io.ComfyNode):
    """IMAGE or VIDEO, and AUDIO → the video with its mouth saying the sound."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentSyncAccelerated",
            display_name="LatentSync",
            category=CATEGORY,
            description="Make the mouth in a video say the words of a recording.",
            inputs=lip_sync_inputs(),
            outputs=[
                io.Image.Output(display_name="images"),
                io.Audio.Output(display_name="audio"),
                io.Video.Output(display_name="video"),
                io.String.Output(display_name="path"),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        images: Any,
        audio: Mapping[str, Any],
        seed: int,
        lips_expression: float = GUIDANCE_SCALE,
        inference_steps: int = INFERENCE_STEPS,
        optimization_level: str = "auto",
        vram_fraction: float = 0.0,
        face: str = FACES[0],
        fps: float = FPS,
        crf: float = CRF,
        silence_gate: bool = True,
        filename_prefix: str = "video/LatentSync",
        model: str = "auto",
        face_point: str = "",
        other_audio: Mapping[str, Any] | None = None,
        other_face: str = "",
    ) -> io.NodeOutput:
        result = run(
            Request(
                source=images,
                audio=audio,
                model=model,
                level=optimization_level,
                seed=seed,
                guidance_scale=lips_expression,
                steps=inference_steps,
                vram_fraction=vram_fraction,
                fps=fps,
                face=face_point.strip() or face,
                crf=crf,
                silence_gate=silence_gate,
                filename_prefix=filename_prefix,
                other_face=other_face.strip(),
                other_audio=other_audio,
                keep_frames=isinstance(images, Tensor) or cls._is_linked(output=0),
            )
        )
        saved = ui.SavedResult(result.path.name, result.subfolder, io.FolderType.output)
        return io.NodeOutput(
            ExecutionBlocker(LEFT_IN_FILE) if result.frames is None else result.frames,
            result.audio,
            InputImpl.VideoFromFile(str(result.path)),
            str(result.path),
            ui=ui.PreviewVideo([saved]),
        )

    @classmethod
    def _is_linked(cls, output: int) -> bool:
        """Whether a node of the workflow takes this output of this one."""
        prompt, link = cls.hidden.prompt or {}, [cls.hidden.unique_id, output]
        return any(link in (node.get("inputs") or {}).values() for node in prompt.values())


class VideoLengthAdjuster(io.ComfyNode):
    """Frames and a sound of different lengths → both of one length."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentSyncVideoLength",
            display_name="Video Length Adjuster",
            category=CATEGORY,
            description="Fit the length of a batch of frames to a sound.",
            inputs=[
                io.Image.Input("images"),
                io.Audio.Input("audio"),
                io.Combo.Input(
                    "mode",
                    options=list(LENGTHS),
                    default="normal",
                    tooltip="normal keeps all frames; the others play them as long as the sound lasts: forward and "
                    "backward, or from the first on again",
                ),
                io.Float.Input("fps", default=float(FPS), min=1.0, max=120.0, step=0.01),
                io.Float.Input(
                    "silent_padding_sec",
                    default=0.5,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Seconds of silence at the end of the sound.",
                ),
            ],
            outputs=[io.Image.Output(display_name="images"), io.Audio.Output(display_name="audio")],
        )

    @classmethod
    def execute(
        cls, images: Tensor, audio: Mapping[str, Any], mode: str, fps: float, silent_padding_sec: float
    ) -> io.NodeOutput:
        return io.NodeOutput(*fit_length(images, audio, mode, fps, silent_padding_sec))


class LatentSyncModel(io.ComfyNode):
    """A model by its name, fetched where it is missing."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentSyncModelLoader",
            display_name="LatentSync Model",
            category=CATEGORY,
            description="Choose the model, and fetch a released one from the Hugging Face hub where it is missing.",
            inputs=[
                io.Combo.Input("model", options=model_names(), default="auto"),
                io.Boolean.Input(
                    "fetch", default=False, tooltip="Fetch a released model that is not on this machine: about 5 GB."
                ),
            ],
            outputs=[LATENTSYNC_MODEL.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model: str, fetch: bool) -> io.NodeOutput:
        if fetch:
            fetch_release(model)
        find_checkpoint(model, compute_device())  # raises the sentence that says what is missing
        return io.NodeOutput(model)


class LatentSyncDoctor(io.ComfyNode):
    """What the GPUs do now, and what makes this machine slower than it could be."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentSyncDoctor",
            display_name="LatentSync GPU Monitor and Doctor",
            category=CATEGORY,
            description="The state of the GPUs, and advice on what would make this machine faster.",
            inputs=[io.AnyType.Input("after", optional=True, tooltip="Run after the node that this comes from.")],
            outputs=[io.String.Output(display_name="text")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return float("nan")  # equal to nothing: the state is read at every run

    @classmethod
    def execute(cls, after: Any = None) -> io.NodeOutput:
        text = health_text(Path(folder_paths.get_output_directory()))
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class LatentSyncNode(LatentSync):
    """LatentSync under the id of the wrapper."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _under_old_id(super().define_schema(), OLD_LIP_SYNC)


class OldVideoLengthAdjuster(VideoLengthAdjuster):
    """Video Length Adjuster under the id of the wrapper."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _under_old_id(super().define_schema(), OLD_LENGTH)


def _under_old_id(schema: io.Schema, node_id: str) -> io.Schema:
    schema.node_id, schema.display_name = node_id, f"{schema.display_name} (of older workflows)"
    return schema


NODES = [LatentSync, VideoLengthAdjuster, LatentSyncModel, LatentSyncDoctor]
OLD_NODES = {OLD_LIP_SYNC: LatentSyncNode, OLD_LENGTH: OldVideoLengthAdjuster}


def replacement(old: str) -> Any:
    """How newer versions of ComfyUI turn a node of the wrapper into ours, where nobody has its id."""
    new = (LatentSync if old == OLD_LIP_SYNC else VideoLengthAdjuster).define_schema()
    inputs = ["images", "audio", *(name for name in OLD_WIDGETS[old] if name != CONTROL)]
    return io.NodeReplace(
        new_node_id=new.node_id,
        old_node_id=old,
        old_widget_ids=list(OLD_WIDGETS[old]),
        input_mapping=[{"new_id": name, "old_id": name} for name in inputs],
        output_mapping=[{"new_idx": i, "old_idx": i} for i in range(2)],  # images, audio
    )


class Extension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def on_load(self) -> None:
        """Where another pack has the ids of the wrapper, register what becomes of its nodes when it is gone."""
        if hasattr(io, "NodeReplace"):  # ComfyUI of 2026
            for old in self._taken():
                await ComfyAPI().node_replacement.register(replacement(old))

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes; those with ids of the wrapper where no pack that was loaded before has these ids."""
        register_folder()
        taken = self._taken()
        return [*NODES, *(node for node_id, node in OLD_NODES.items() if node_id not in taken)]

    @staticmethod
    def _taken() -> list[str]:
        return [node_id for node_id in OLD_NODES if node_id in NODE_CLASS_MAPPINGS]
