"""The nodes for ComfyUI, through its node interface: `recorded_comfy`, and a real one where COMFYUI names it."""

import asyncio
import importlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import recorded_comfy
import torch
from clips import make_sound
from conftest import portrait
from fake_nvml import Card, FakeNvml
from recorded_comfy import InterruptProcessingException, VideoFromFile, components
from scipy.io import wavfile
from test_people import LEFT, ONE, OTHER, RIGHT, scene
from tiny import make_checkpoint

from latentsync.errors import UserError
from latentsync.media import probe_audio, probe_video, read_audio, read_frames

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "assets" / "comfyui"
SECONDS = 0.78


@pytest.fixture
def comfy(monkeypatch, tmp_path, one_thread):
    """ComfyUI's recorded interface, and our modules freshly imported over it."""
    recorder = recorded_comfy.install(monkeypatch, tmp_path)
    for name in [name for name in sys.modules if name.startswith("optim.comfyui.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in "nodes", "run", "models", "media":
        setattr(recorder, name, importlib.import_module(f"optim.comfyui.{name}"))
    yield recorder
    for name in [name for name in sys.modules if name.startswith("optim.comfyui.")]:
        del sys.modules[name]


@pytest.fixture
def tiny(comfy):
    """The pack's nodes by their ids, with a tiny model in ComfyUI's models/latentsync."""
    make_checkpoint(comfy.root / "models" / "latentsync" / "tiny")
    return nodes_of(comfy)


def nodes_of(comfy) -> dict:
    found = asyncio.run(comfy.nodes.Extension().get_node_list())
    return {node.define_schema().node_id: node for node in found}


def execute(node, prompt=None, **inputs):
    """Run a node as ComfyUI does: in inference mode, with what its schema hides."""
    node.hidden = SimpleNamespace(prompt=prompt or {}, unique_id="4")
    with torch.inference_mode():
        return node.execute(**inputs)


def sound(seconds: float = SECONDS, rate: int = 16000) -> dict:
    time = torch.arange(round(seconds * rate)) / rate
    return {"waveform": (0.3 * torch.sin(2 * math.pi * 440 * time))[None, None], "sample_rate": rate}


@pytest.fixture(scope="module")
def faces() -> torch.Tensor:
    """An IMAGE batch of eight frames."""
    return torch.from_numpy(np.stack([portrait(t) for t in range(8)])).float() / 255


FAST = {"seed": 1247, "inference_steps": 2, "model": "tiny", "optimization_level": "conservative"}


def decoded(path: Path) -> np.ndarray:
    return np.stack(list(read_frames(probe_video(path))))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def test_a_video_becomes_a_file_in_the_output_folder_and_its_frames_stay_there(comfy, tiny, talking):
    audio = sound(0.38)
    out = execute(tiny["LatentSyncAccelerated"], images=VideoFromFile(str(talking)), audio=audio, **FAST)
    frames, same_audio, video, path = out.args
    assert Path(path) == comfy.root / "output" / "video" / "LatentSync_00001_.mp4"
    assert out.ui == {"images": [{"filename": "LatentSync_00001_.mp4", "subfolder": "video", "type": "output"}]}
    assert same_audio is audio and video.get_stream_source() == path
    assert probe_video(path).n_frames == 10 and abs(probe_audio(path).duration - 0.38) < 0.03
    assert "Get Video Components" in frames.message
    assert not list((comfy.root / "temp").iterdir())


def test_the_frames_of_a_video_are_returned_where_something_is_linked_to_them(tiny, talking):
    prompt = {"4": {"inputs": {}}, "5": {"inputs": {"images": ["4", 0]}}}
    given = {"images": VideoFromFile(str(talking)), "audio": sound(0.2), **FAST}
    out = execute(tiny["LatentSyncAccelerated"], prompt, **given)
    assert out.args[0].shape == (5, 192, 192, 3) and out.args[0].dtype == torch.float32
    others = {"4": {"inputs": {}}, "5": {"inputs": {"images": ["4", 2], "audio": ["3", 0]}}}
    out = execute(tiny["LatentSyncAccelerated"], others, **given)
    assert not isinstance(out.args[0], torch.Tensor)


def test_images_run_with_the_demo_model_and_come_back_as_frames(comfy, faces):
    node = nodes_of(comfy)["LatentSyncAccelerated"]
    out = execute(node, images=faces, audio=sound(0.12), **{**FAST, "model": "demo", "inference_steps": 1})
    frames, path = out.args[0], out.args[3]
    assert frames.shape == (3, 192, 192, 3) and 0 <= frames.min() and frames.max() <= 1
    written = decoded(path)
    assert len(written) == 3 and psnr(written, frames.mul(255).numpy()) > 35
    # Away from the mouth they are the frames that went in.
    assert torch.equal(frames[:, :40], faces[:3, :40])


@pytest.mark.parametrize("kind", ["VIDEO", "IMAGE"])
def test_the_result_is_that_of_the_command_line(comfy, tiny, talking, faces, kind):
    from optim.__main__ import main

    voice = make_sound(comfy.root / "voice.wav", seconds=0.3)
    rate, samples = wavfile.read(voice)
    audio = {"waveform": torch.from_numpy(samples / 2**15).float()[None, None], "sample_rate": rate}
    video, images = talking, VideoFromFile(str(talking))
    if kind == "IMAGE":
        video, images = comfy.media.write_images(faces, 25, comfy.root / "same frames.mkv", lambda: None), faces
    path = execute(tiny["LatentSyncAccelerated"], images=images, audio=audio, **FAST).args[3]
    expected = comfy.root / "expected.mp4"
    model = comfy.root / "models" / "latentsync" / "tiny"
    options = ["--model", str(model), "--steps", "2", "--guidance", "1.5", "--level", "conservative", "--device", "cpu"]
    assert main([str(video), str(voice), "-o", str(expected), *options]) == 0
    assert np.array_equal(decoded(path), decoded(expected))
    assert np.array_equal(read_audio(path), read_audio(expected))


@pytest.fixture(scope="module")
def people() -> torch.Tensor:
    """An IMAGE batch of two people side by side."""
    frames = [scene((ONE, (LEFT[0] + t % 4, 10)), (OTHER, (RIGHT[0] - t % 3, 10))) for t in range(8)]
    return torch.from_numpy(np.stack(frames)).float() / 255


def painted(before: torch.Tensor, after: torch.Tensor) -> tuple[bool, bool]:
    """Whether the mouths in the left and in the right half are others."""
    change = (before[: len(after)] - after[: len(before)]).abs().mean(-1)
    half = change.shape[-1] // 2
    return bool(change[..., :half].max() > 0.06), bool(change[..., half:].max() > 0.06)


def test_a_point_says_which_face_is_painted(tiny, people):
    out = execute(
        tiny["LatentSyncAccelerated"], images=people, audio=sound(0.2), face_point=f" {RIGHT[0] + 100},90 ", **FAST
    )
    assert painted(people, out.args[0]) == (False, True)


def test_another_face_says_a_sound_of_its_own_and_both_are_heard(tiny, people):
    other = sound(0.32, 44100)
    other["waveform"] = other["waveform"].repeat(1, 2, 1) * torch.linspace(0, 1, other["waveform"].shape[-1])
    names = {"face": "left", "other_face": f"{RIGHT[0] + 100},90"}
    out = execute(tiny["LatentSyncAccelerated"], images=people, audio=sound(0.2), other_audio=other, **names, **FAST)
    frames, audio, _, path = out.args
    assert len(frames) == 8 and painted(people, frames) == (True, True), "as long as the longer sound"
    waveform, rate = audio["waveform"], audio["sample_rate"]
    assert waveform.shape[:2] == (1, 2) and waveform.shape[-1] / rate == pytest.approx(0.32, abs=0.001)
    early, late = waveform[..., : rate // 10].abs().max(), waveform[..., -rate // 20 :].abs().max()
    assert 0.2 < early < 0.6 and 0.2 < late < 0.6, "the first and, after its end, the other"
    written = torch.from_numpy(read_audio(path))
    assert written.abs().max() == pytest.approx(float(waveform.abs().max()), abs=0.05)


def test_an_interruption_of_two_faces_leaves_nothing(comfy, tiny, people):
    before = threading.enumerate()
    for checks in 12, 60:
        comfy.interrupt_after = checks
        with pytest.raises(InterruptProcessingException):
            execute(
                tiny["LatentSyncAccelerated"], images=people, audio=sound(), other_audio=sound(), face="left",
                other_face="right", **FAST,
            )  # fmt: skip
        assert comfy.interrupt_after is None
        assert not [path for path in (comfy.root / "output").rglob("*") if path.is_file()]
        assert not list((comfy.root / "temp").iterdir())
    assert not [thread.name for thread in threading.enumerate() if thread not in before]


def test_a_wrapper_s_node_takes_its_saved_values_by_position(comfy, tiny):
    schema = tiny["LatentSyncNode"].define_schema()
    sockets = {"IMAGE,VIDEO", "AUDIO", "LATENTSYNC_MODEL"}
    assert [port.id for port in schema.inputs][:5] == ["images", "audio", "seed", "lips_expression", "inference_steps"]
    # As the page does it: required inputs first, and a place of its own behind a seed.
    ordered = sorted(schema.inputs, key=lambda port: port.optional)
    widgets = []
    for port in ordered:
        if port.io_type not in sockets:
            widgets += [port.id, *(["control"] if port.options.get("control_after_generate") else [])]
    assert widgets[:4] == ["seed", "control", "lips_expression", "inference_steps"]
    options = {port.id: port.options for port in schema.inputs}
    assert options["seed"]["default"] == 1247
    assert [options["lips_expression"][name] for name in ("default", "min", "max", "step")] == [1.5, 1.0, 3.0, 0.1]
    assert [options["inference_steps"][name] for name in ("default", "min", "max")] == [20, 1, 999]
    assert [port.options["display_name"] for port in schema.outputs][:2] == ["images", "audio"]


@pytest.mark.parametrize("values", [[1247, "randomize", 1.5, 2], [1247, "randomize"]], ids=["newer", "older"])
def test_a_saved_workflow_of_the_wrapper_runs(comfy, tiny, faces, values, monkeypatch):
    monkeypatch.setattr(comfy.run, "find_checkpoint", lambda name, device: comfy.models.find_checkpoint("tiny", device))
    saved = dict(zip(["seed", "control", "lips_expression", "inference_steps"], values, strict=False))
    saved.pop("control")
    if "inference_steps" not in saved:
        original = comfy.run.Settings
        monkeypatch.setattr(comfy.run, "Settings", lambda **kw: original(**{**kw, "steps": kw["steps"] // 10}))
    out = execute(tiny["LatentSyncNode"], images=faces, audio=sound(0.12), **saved)
    assert out.args[0].shape == (3, 192, 192, 3) and Path(out.args[3]).is_file()


def test_ids_of_the_wrapper_are_left_to_another_pack_that_has_them(comfy):
    assert set(nodes_of(comfy)) >= {"LatentSyncNode", "VideoLengthAdjuster"}
    comfy.node_ids["LatentSyncNode"] = object
    assert "LatentSyncNode" not in nodes_of(comfy) and "VideoLengthAdjuster" in nodes_of(comfy)
    asyncio.run(comfy.nodes.Extension().on_load())
    (replacement,) = comfy.replacements
    assert (replacement.old_node_id, replacement.new_node_id) == ("LatentSyncNode", "LatentSyncAccelerated")
    assert [each["new_id"] for each in replacement.input_mapping] == [
        "images", "audio", "seed", "lips_expression", "inference_steps",
    ]  # fmt: skip


def test_progress_grows_to_the_end_with_a_preview_of_each_window(comfy, tiny, talking):
    execute(tiny["LatentSyncAccelerated"], images=VideoFromFile(str(talking)), audio=sound(), **FAST)
    values = [value for value, _, _ in comfy.progress]
    assert values == sorted(values) and values[-1] == 20
    assert {total for _, total, _ in comfy.progress} == {20}
    assert len({value for value in values if 0 < value < 16}) > 1  # within the first window, at its steps
    previews = [preview for *_, preview in comfy.progress if preview is not None]
    assert [preview[1].size for preview in previews] == [(192, 192)] * 2 and previews[0][0] == "JPEG"


def test_an_interruption_ends_the_run_and_leaves_nothing(comfy, tiny, faces):
    before = threading.enumerate()
    # At the first frame that is written, at the next, and while the networks work.
    for checks in 0, 1, 40:
        comfy.interrupt_after = checks
        with pytest.raises(InterruptProcessingException):
            execute(tiny["LatentSyncAccelerated"], images=faces, audio=sound(0.2), **FAST)
        assert comfy.interrupt_after is None
        assert not [path for path in (comfy.root / "output").rglob("*") if path.is_file()]
        assert not list((comfy.root / "temp").iterdir())
    assert not [thread.name for thread in threading.enumerate() if thread not in before]
    out = execute(tiny["LatentSyncAccelerated"], images=faces, audio=sound(0.12), **FAST)
    assert Path(out.args[3]).is_file()


def test_two_runs_load_the_model_once_and_an_unloaded_one_is_loaded_again(comfy, tiny, faces, monkeypatch):
    loads = []
    load = comfy.models.load_models
    monkeypatch.setattr(comfy.models, "load_models", lambda *args: loads.append(args[0].name) or load(*args))
    run = {"images": faces, "audio": sound(0.04), **FAST, "inference_steps": 1}
    execute(tiny["LatentSyncAccelerated"], **run)
    execute(tiny["LatentSyncAccelerated"], **run)
    (patcher,) = comfy.loaded
    assert loads == ["tiny"] and patcher.loaded_size() == patcher.size > 0
    comfy.unload_all()
    assert patcher.loaded_size() == 0 and patcher.models is None
    execute(tiny["LatentSyncAccelerated"], **run)
    assert loads == ["tiny", "tiny"]
    make_checkpoint(comfy.root / "models" / "latentsync" / "other")
    execute(tiny["LatentSyncAccelerated"], **{**run, "model": "other"})
    assert loads[2:] == ["other"] and patcher.models is None


def test_other_nodes_find_torch_as_they_left_it(comfy, tiny, faces):
    torch.set_float32_matmul_precision("highest")
    before = torch.backends.cudnn.allow_tf32
    options = {**FAST, "optimization_level": "balanced"}
    execute(tiny["LatentSyncAccelerated"], images=faces, audio=sound(0.2), **options)
    assert torch.get_float32_matmul_precision() == "highest" and torch.backends.cudnn.allow_tf32 == before


def nothing() -> dict:
    return {"waveform": torch.zeros(1, 2, 0), "sample_rate": 44100}


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"audio": nothing()}, "'audio' holds no sound"),
        ({"audio": None}, "'audio' holds no sound"),
        ({"audio": {"waveform": torch.zeros(1, 1, 9), "sample_rate": 0}}, "sample rate of 0"),
        ({"images": torch.zeros(0, 64, 64, 3)}, r"shape is \(0, 64, 64, 3\)"),
        ({"images": torch.zeros(5, 64, 64)}, "no batch of frames"),
        ({"images": torch.zeros(5, 64, 64, 3)}, "shows no face"),
        ({"images": None}, "'images' is a NoneType"),
        ({"fps": 0.0}, "fps = 0.0"),
        ({"model": "no such"}, "no model 'no such'"),
        ({"model": "latentsync-1.6"}, "not on this machine"),
        ({"face": "upper"}, "no face 'upper'"),
        ({"face_point": "12"}, "no face '12'"),
        ({"face_point": "2,2"}, "shows no face near 2,2"),
        ({"other_face": "right"}, "'other_face' has no 'other_audio'"),
        ({"other_audio": sound(0.2)}, "'other_face' is empty"),
        ({"other_audio": sound(0.2), "other_face": "12"}, "no face '12'"),
        ({"other_audio": sound(0.2), "other_face": "largest"}, "same face was asked for twice"),
        ({"other_audio": nothing(), "other_face": "right"}, "'other_audio' holds no sound"),
        ({"inference_steps": 1000}, "steps = 1000"),
        ({"optimization_level": "warp"}, "warp"),
        ({"vram_fraction": 0.01}, "vram_fraction is 0.01"),
        ({"filename_prefix": "../../elsewhere"}, "another filename_prefix"),
        ({"images": VideoFromFile("/nowhere/at.mp4")}, "There is no file /nowhere/at.mp4"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,  # workers of xdist must agree on the names
)
def test_bad_input_gets_one_sentence(comfy, tiny, faces, change, sentence, monkeypatch):
    monkeypatch.setenv("LATENTSYNC_HOME", str(comfy.root / "home"))
    with pytest.raises(UserError, match=sentence) as error:
        execute(tiny["LatentSyncAccelerated"], **{"images": faces, "audio": sound(0.2), **FAST, **change})
    assert "\n" not in str(error.value)
    assert not [path for path in (comfy.root / "output").rglob("*") if path.is_file()]


def test_frames_are_written_without_loss_in_any_size(comfy):
    images = torch.rand(3, 33, 47, 4, generator=torch.Generator().manual_seed(1))
    path = comfy.media.write_images(images, 25, comfy.root / "frames.mkv", lambda: None)
    assert np.array_equal(decoded(path), np.stack([comfy.media.as_uint8(image) for image in images]))


def test_a_video_keeps_its_file_and_others_get_one(comfy, talking, faces):
    check = lambda: None  # noqa: E731
    whole = comfy.media.write_video(VideoFromFile(str(talking)), comfy.root, check)
    assert whole == talking
    trimmed = comfy.media.write_video(VideoFromFile(str(talking), start_time=0.2, duration=0.4), comfy.root, check)
    assert trimmed.parent == comfy.root and probe_video(trimmed).n_frames == 10
    made = comfy.media.write_video(components(faces, 50), comfy.root, check)
    assert probe_video(made).fps == pytest.approx(50) and probe_video(made).n_frames == 4


@pytest.mark.parametrize(
    "mode, seconds, frames, samples",
    [
        ("normal", 1.0, [0, 1, 2, 3], 12000),
        ("normal", 0.2, [0, 1, 2, 3], 5600),
        ("pingpong", 0.9, [0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3, 3, 2], 11200),
        ("loop_to_audio", 0.9, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1], 11200),
        ("pingpong", 0.1, [0, 1, 2, 3, 3, 2], 4800),
    ],
)
def test_the_length_adjuster_fits_frames_and_sound(comfy, mode, seconds, frames, samples):
    images = torch.arange(4.0)[:, None, None, None].expand(4, 2, 2, 3)
    node = nodes_of(comfy)["VideoLengthAdjuster"]
    out, audio = execute(
        node, images=images, audio=sound(seconds, 8000), mode=mode, fps=10, silent_padding_sec=0.5
    ).args
    assert out[:, 0, 0, 0].tolist() == frames
    assert audio["waveform"].shape == (1, 1, samples) and audio["sample_rate"] == 8000
    assert audio["waveform"][..., round(seconds * 8000) :].abs().sum() == 0


def test_normal_gives_a_shorter_sound_the_silence_that_the_frames_need(comfy):
    images, audio = comfy.media.fit_length(torch.zeros(4, 2, 2, 3), sound(0.2, 8000), "normal", 10, 0.0)
    assert len(images) == 4 and audio["waveform"].shape[-1] == 3200


def test_models_are_found_in_comfyui_s_folders(comfy):
    models = comfy.root / "models" / "latentsync"
    make_checkpoint(models / "mine")
    make_checkpoint(comfy.root / "custom_nodes" / "A-Wrapper" / "checkpoints")
    (comfy.root / "custom_nodes" / "Other").mkdir()
    nodes = nodes_of(comfy)
    options = nodes["LatentSyncModelLoader"].define_schema().inputs[0].options["options"]
    assert options[:2] == ["auto", "demo"] and {"mine", "A-Wrapper/checkpoints"} <= set(options)
    cpu = torch.device("cpu")
    assert comfy.models.find_checkpoint("auto", cpu).unet.parent == models / "mine"
    assert execute(nodes["LatentSyncModelLoader"], model="mine", fetch=False).args == ("mine",)


def test_the_model_node_fetches_a_release_with_progress_and_ends_when_interrupted(comfy, hub):
    node = nodes_of(comfy)["LatentSyncModelLoader"]
    with pytest.raises(UserError, match="not on this machine"):
        execute(node, model="latentsync-1.5", fetch=False)
    comfy.interrupt_after = 1
    with pytest.raises(InterruptProcessingException):
        execute(node, model="latentsync-1.5", fetch=True)
    assert execute(node, model="latentsync-1.5", fetch=True).args == ("latentsync-1.5",)
    assert comfy.progress
    with pytest.raises(UserError, match="'demo' is not fetched"):
        execute(node, model="demo", fetch=True)


def test_the_doctor_describes_the_cards_and_what_to_improve(comfy):
    from optim.comfyui.health import health_text

    lines = health_text(comfy.root / "output", FakeNvml([Card("RTX 4090", slow=0x40)])).splitlines()
    assert lines[0].startswith("RTX 4090, 0.6 of 24.0 GB in use") and "°C" in lines[0]
    assert any("too hot" in line for line in lines)
    node = nodes_of(comfy)["LatentSyncDoctor"]
    assert node.fingerprint_inputs() != node.fingerprint_inputs()  # nothing is reused
    assert "GPU" in execute(node).args[0]


def test_the_pack_is_loaded_as_comfyui_loads_it_without_a_change_of_the_search_path(comfy, monkeypatch):
    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py")
    pack = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(pack)
    extension = asyncio.run(pack.comfy_entrypoint())
    assert sys.path == path and isinstance(extension, recorded_comfy.ComfyExtension)
    monkeypatch.setitem(sys.modules, "latentsync", SimpleNamespace(__file__="/packs/wrapper/latentsync/__init__.py"))
    with pytest.raises(ImportError, match="Another pack has loaded a package named latentsync, '/packs/wrapper"):
        asyncio.run(pack.comfy_entrypoint())


def test_the_example_workflows_fit_the_nodes(comfy):
    """Both forms of the example name our nodes, their inputs in order, and values that they take."""
    nodes = nodes_of(comfy)
    api = json.loads((EXAMPLES / "latentsync_api.json").read_text(encoding="utf-8"))
    page = json.loads((EXAMPLES / "latentsync.json").read_text(encoding="utf-8"))
    ours = {node["class_type"]: node["inputs"] for node in api.values() if node["class_type"] in nodes}
    assert set(ours) == {"LatentSyncAccelerated", "LatentSyncModelLoader"}
    for node_id, inputs in ours.items():
        schema = nodes[node_id].define_schema()
        ports = [port for port in schema.inputs if port.id != "other_audio"]  # nothing is linked to it
        assert set(inputs) == {port.id for port in ports}
        (drawn,) = [node for node in page["nodes"] if node["type"] == node_id]
        places = list(drawn["widgets_values"])
        for port in sorted(ports, key=lambda port: port.optional):
            if port.io_type in ("IMAGE,VIDEO", "AUDIO", "LATENTSYNC_MODEL"):
                assert isinstance(inputs[port.id], list)
                continue
            value = places.pop(0)
            assert value == inputs[port.id], port.id
            assert value in port.options.get("options", [value])
            assert port.options.get("min", value) <= value <= port.options.get("max", value)
            if port.options.get("control_after_generate"):
                assert places.pop(0) in ("fixed", "randomize")
        assert not places


@pytest.fixture(scope="module")
def real_comfyui(tmp_path_factory):
    """A real ComfyUI on the processor, with this repository in custom_nodes: the address of its server and its folder.

    The variable COMFYUI names its source, COMFYUI_PYTHON an interpreter with its packages.
    """
    source = os.environ.get("COMFYUI")
    if not source:
        pytest.skip("the variable COMFYUI does not name the folder of a ComfyUI")
    folder = tmp_path_factory.mktemp("comfyui")
    (folder / "custom_nodes").mkdir()
    (folder / "input").mkdir()
    os.symlink(ROOT, folder / "custom_nodes" / "latentsync")
    shutil.copy(ROOT / "assets" / "example" / "face.mp4", folder / "input")
    make_sound(folder / "input" / "speech.wav", seconds=0.4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), "main.py", "--cpu", "--disable-api-nodes"]
    command += ["--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(folder)]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=source, stdout=log, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            while True:
                assert server.poll() is None, (folder / "log").read_text(errors="replace")
                with suppress(URLError):
                    ask(address, "/system_stats")
                    break
                time.sleep(0.2)
            yield address, folder
        finally:
            server.kill()
            server.wait()


def ask(address: str, path: str, body: dict | None = None):
    data = None if body is None else json.dumps(body).encode()
    request = Request(address + path, data, {"Content-Type": "application/json"})  # noqa: S310 - our own server
    with urlopen(request) as reply:  # noqa: S310
        text = reply.read()
    return json.loads(text) if text else None


def queue_prompt(address: str, prompt: dict) -> str:
    return ask(address, "/prompt", {"prompt": prompt})["prompt_id"]


def history_of(address: str, prompt_id: str) -> dict:
    while True:
        if entry := ask(address, f"/history/{prompt_id}").get(prompt_id):
            return entry
        time.sleep(0.1)


def example(**changes) -> dict:
    prompt = json.loads((EXAMPLES / "latentsync_api.json").read_text(encoding="utf-8"))
    (node,) = [node for node in prompt.values() if node["class_type"] == "LatentSyncAccelerated"]
    node["inputs"] |= {"inference_steps": 1, **changes}
    return prompt


def test_real_comfyui_runs_the_example_to_a_video(real_comfyui):
    address, folder = real_comfyui
    entry = history_of(address, queue_prompt(address, example()))
    assert entry["status"]["status_str"] == "success", entry["status"]
    (saved,) = [file for output in entry["outputs"].values() for file in output["images"]]
    assert probe_video(folder / "output" / saved["subfolder"] / saved["filename"]).n_frames == 10


def test_real_comfyui_runs_a_saved_workflow_of_the_wrapper(real_comfyui):
    address, folder = real_comfyui
    prompt = {
        "1": {"class_type": "LoadVideo", "inputs": {"file": "face.mp4"}},
        "2": {"class_type": "GetVideoComponents", "inputs": {"video": ["1", 0]}},
        "3": {"class_type": "LoadAudio", "inputs": {"audio": "speech.wav"}},
        "4": {
            "class_type": "VideoLengthAdjuster",
            "inputs": {
                "images": ["2", 0], "audio": ["3", 0], "mode": "pingpong", "fps": 25.0, "silent_padding_sec": 0.2
            },
        },
        "5": {"class_type": "LatentSyncNode", "inputs": {"images": ["4", 0], "audio": ["4", 1], "seed": 1247}},
        "6": {"class_type": "CreateVideo", "inputs": {"images": ["5", 0], "audio": ["5", 1], "fps": 25.0}},
        "7": {"class_type": "SaveVideo", "inputs": {
            "video": ["6", 0], "filename_prefix": "old/wrapper", "format": "auto", "codec": "auto",
        }},
    }  # fmt: skip
    prompt["5"]["inputs"] |= {"lips_expression": 1.5, "inference_steps": 1}
    entry = history_of(address, queue_prompt(address, prompt))
    assert entry["status"]["status_str"] == "success", entry["status"]
    (made,) = (folder / "output" / "old").iterdir()
    assert probe_video(made).n_frames == 15


def test_real_comfyui_ends_an_interrupted_run(real_comfyui):
    address, folder = real_comfyui
    before = set((folder / "output").rglob("*.mp4"))
    prompt_id = queue_prompt(address, example(seed=2, inference_steps=999))
    while not ask(address, "/queue")["queue_running"]:
        time.sleep(0.05)
    ask(address, "/interrupt", {})
    entry = history_of(address, prompt_id)
    assert "execution_interrupted" in [kind for kind, _ in entry["status"]["messages"]]
    assert set((folder / "output").rglob("*.mp4")) == before


def test_the_recorded_interface_is_that_of_the_real_comfyui(real_comfyui, monkeypatch, tmp_path):
    """Every name that the nodes use exists in ComfyUI."""
    recorded_comfy.install(monkeypatch, tmp_path)
    names = {}
    for module in recorded_comfy.MODULES:
        for name, value in vars(sys.modules[module]).items():
            if not name.startswith("__") and not isinstance(value, type(sys)):
                members = vars(value) if isinstance(value, SimpleNamespace) else ()
                names[f"{module}:{name}"] = [member for member in members if member != "NodeReplace"]
    script = (
        "import sys, json, importlib, comfy.options; sys.argv = ['', '--cpu']\n"
        "comfy.options.enable_args_parsing()\n"
        "for place, members in json.loads(sys.stdin.read()).items():\n"
        "    module, name = place.split(':'); found = getattr(importlib.import_module(module), name)\n"
        "    for member in members: getattr(found, member)\n"
    )
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    run = subprocess.run(
        [python, "-c", script], cwd=os.environ["COMFYUI"], input=json.dumps(names), text=True, capture_output=True
    )
    assert run.returncode == 0 and len(names) > 15, run.stderr
