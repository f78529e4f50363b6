"""Face restorers: what they change, what a file may hold, and that nothing changes without one.

spandrel is an optional package: a stand-in with its interface loads a network of one convolution.
"""

import importlib
import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import portrait
from safetensors.torch import save_file
from torch import Tensor, nn

from app import Page
from latentsync.__main__ import main, make_parser
from latentsync.alignment import fixed_mask
from latentsync.checkpoints.find import resolve_model
from latentsync.compositing import merge_faces
from latentsync.errors import UserError
from latentsync.pipeline import Hooks, Source, generate_frames, lipsync
from latentsync.restoring import SIDE, load_restorer, with_restorer
from latentsync.settings import Settings
from latentsync.timing import StageClock
from optim.__main__ import build_parser
from optim.cluster import actor
from optim.cluster.actor import Order, hashes_of
from optim.job_list import input_files, read_list
from optim.serving.endpoints import Endpoints
from optim.serving.fetcher import Fetcher
from optim.serving.form import SETTINGS
from optim.serving.job import DONE, Request
from optim.serving.options import parse_options
from optim.serving.uploads import Uploads
from optim.serving.worker import Worker

CPU = torch.device("cpu")
FRAMES = 16
FILTER = 21  # pixels, the side of the stand-in's filter
pytestmark = pytest.mark.usefixtures("one_thread")


class OneConvolution(nn.Module):
    """A filter for every colour: as GFPGAN, it takes (1, 3, 512, 512) in [-1, 1] and returns a tuple."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        self.mix = nn.Conv2d(3, 3, FILTER, padding=FILTER // 2, padding_mode="replicate", groups=3)
        self.load_state_dict({name: tensor for name, tensor in tensors.items() if name.startswith("mix.")})

    def forward(self, faces: Tensor, return_rgb: bool, randomize_noise: bool) -> tuple[Tensor, list]:
        assert faces.shape == (1, 3, SIDE, SIDE) and not return_rgb and not randomize_noise
        assert faces.min() >= -1 and faces.max() <= 1
        return self.mix(faces), []


class ModelLoader:
    def __init__(self, device: torch.device):
        assert device == CPU

    def load_from_state_dict(self, contents: dict) -> SimpleNamespace:
        tensors = contents.get("params_ema", contents)
        kind = "GFPGAN" if "toRGB.0.weight" in tensors else "ESRGAN"
        return SimpleNamespace(model=OneConvolution(tensors), architecture=SimpleNamespace(id=kind))


@pytest.fixture(autouse=True)
def spandrel(monkeypatch):
    module = ModuleType("spandrel")
    module.ModelLoader = ModelLoader
    monkeypatch.setitem(sys.modules, "spandrel", module)


def tensors_of(gain: float = 1.0, offset: float = 0.0, blur: bool = False) -> dict[str, Tensor]:
    weight = torch.full((3, 1, FILTER, FILTER), gain / FILTER**2 * blur)
    weight[..., FILTER // 2, FILTER // 2] += gain * (not blur)
    return {"mix.weight": weight, "mix.bias": torch.full((3,), offset), "toRGB.0.weight": torch.zeros(1)}


def save_restorer(path: Path, **change: float) -> Path:
    save_file(tensors_of(**change), path)
    return path


@pytest.fixture
def blurring(tmp_path) -> Path:
    """A restorer that nobody would want."""
    return save_restorer(tmp_path / "blurring.safetensors", blur=True)


def faces_and_crops(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Painted faces (2, 3, side, side), the film's, and the mask."""
    generator = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(2, 3, 5, 5, generator=generator), (side, side), mode="bicubic").clamp(0, 1)
    crops = (smooth * 160 + 50).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    mask = torch.from_numpy(fixed_mask(side).copy())
    painted = crops.permute(0, 3, 1, 2) / 127.5 - 1
    painted = painted + 0.2 * torch.sin(torch.arange(side) / 3)[None, None, None]
    return merge_faces(painted, crops, mask), crops, mask


@pytest.mark.parametrize("side", [64, 256, 512])
def test_only_what_is_painted_changes_and_by_the_strength(blurring, side):
    restorer = load_restorer(blurring, CPU)
    faces, crops, mask = faces_and_crops(side)
    half, full = (restorer.restore(faces, crops, mask, strength) for strength in (0.5, 1.0))
    for restored in half, full:
        assert torch.equal(restored[..., mask == 1], faces[..., mask == 1])
    changed = (full - faces)[..., mask == 0]
    assert changed.abs().mean() > 1 / 127.5
    torch.testing.assert_close((half - faces)[..., mask == 0], changed / 2, atol=1e-5, rtol=0)
    assert torch.equal(restorer.restore(faces, crops, mask, 0.0), faces)
    assert restorer.faces == 6 and restorer.seconds_per_face() > 0


@pytest.mark.parametrize("side", [256, 512])
def test_a_restorer_that_changes_nothing_leaves_the_face_in_its_place(tmp_path, side):
    restorer = load_restorer(save_restorer(tmp_path / "same.safetensors"), CPU)
    faces, crops, mask = faces_and_crops(side)
    smooth = F.interpolate(F.avg_pool2d(faces, 8), (side, side), mode="bicubic")
    difference = (restorer.restore(smooth, crops, mask, 1.0) - smooth)[..., mask == 0].abs()
    assert difference.mean() < 1 / 127.5


def test_a_colour_cast_of_the_restorer_is_taken_back(tmp_path):
    restorer = load_restorer(save_restorer(tmp_path / "cast.safetensors", gain=0.8, offset=0.1), CPU)
    faces, crops, mask = faces_and_crops(256)
    whole = crops.permute(0, 3, 1, 2) / 127.5 - 1  # the mouth as it was: nothing but the cast is there to see
    difference = (restorer.restore(whole, crops, mask, 1.0) - whole)[..., mask == 0].abs()
    assert difference.mean() < 1 / 127.5


def test_numbers_that_are_not_finite_leave_the_face_as_it_was(tmp_path):
    restorer = load_restorer(save_restorer(tmp_path / "broken.safetensors", gain=float("nan")), CPU)
    faces, crops, mask = faces_and_crops(64)
    assert torch.equal(restorer.restore(faces, crops, mask, 1.0), faces)


def test_a_face_does_not_depend_on_those_restored_with_it(blurring):
    restorer = load_restorer(blurring, CPU)
    faces, crops, mask = faces_and_crops(64)
    together = restorer.restore(faces, crops, mask, 1.0)
    alone = torch.cat([restorer.restore(faces[i : i + 1], crops[i : i + 1], mask, 1.0) for i in range(2)])
    assert torch.equal(together, alone)


# Files


def test_a_torch_file_is_read_without_running_what_it_holds(tmp_path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "net.pth"
    torch.save({"params_ema": tensors_of()}, path)
    assert load_restorer(path, CPU).name == "GFPGAN"
    for data in (pickle.dumps(Code()), pickle.dumps({"params_ema": Code()})):
        path.write_bytes(data)
        with pytest.raises(UserError, match="net.pth"):
            load_restorer(path, CPU)
    torch.save({"params_ema": Code()}, path)
    with pytest.raises(UserError, match="code besides tensors"):
        load_restorer(path, CPU)
    assert not (tmp_path / "ran").exists()


def test_files_that_hold_no_restorer_are_refused_with_a_sentence(tmp_path):
    def refused(name: str, words: str) -> None:
        with pytest.raises(UserError, match=words) as caught:
            load_restorer(tmp_path / name, CPU)
        assert name in str(caught.value)

    refused("none.pth", "no file")
    refused("net.onnx", "does not end in .safetensors or .pth")
    (tmp_path / "empty.pth").touch()
    refused("empty.pth", "empty")
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 1000)
    refused("noise.safetensors", "damaged")
    save_file({name: tensor for name, tensor in tensors_of().items() if "mix" in name}, tmp_path / "x4.safetensors")
    refused("x4.safetensors", "ESRGAN, no face restorer")
    save_file({"toRGB.0.weight": torch.zeros(1)}, tmp_path / "half.safetensors")
    refused("half.safetensors", "no network that can be used")
    torch.save({"params": {"huge": torch.zeros(1).expand(1 << 40)}}, tmp_path / "huge.pth")
    refused("huge.pth", "larger than the file")


@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_without_the_packages_a_sentence_says_how_to_get_them(tmp_path, monkeypatch, error):
    class Missing:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "spandrel":
                raise error("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "spandrel")
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(UserError, match=r"pip install -e \.\[restore\]"):
        load_restorer(save_restorer(tmp_path / "net.safetensors"), CPU)


# Runs


def test_a_film_without_a_restorer_stays_as_it_is_and_one_with_it_changes(models, blurring):
    def run(models=models) -> np.ndarray:
        source = Source(enumerate(portrait(t) for t in range(FRAMES)), torch.zeros(FRAMES * 640), FRAMES)
        return np.stack([aligned.frame for aligned in generate_frames(source, models, Settings(steps=2), StageClock())])

    plain, restored = run(), run(replace(models, restorer=load_restorer(blurring, CPU)))
    assert np.array_equal(plain, run())
    assert not np.array_equal(plain, restored)


def test_a_restorer_is_read_once_for_the_jobs_of_loaded_models_and_again_when_its_file_has_changed(models, tmp_path):
    path = save_restorer(tmp_path / "net.safetensors")
    first, second = (with_restorer(models, path).restorer for _ in range(2))
    assert first._network is second._network and first is not second, "each run counts its own faces"
    save_restorer(tmp_path / "other.safetensors", blur=True).replace(path)
    third = with_restorer(models, path).restorer
    assert third._network is not first._network and len(models.restorers) == 1
    assert with_restorer(models, None).restorer is None


def test_the_command_line_restores_and_reports_what_it_costs(checkpoint, talking, voice, blurring, tmp_path):
    assert make_parser().parse_args(["a.mp4", "b.wav", "-o", "c.mp4"]).restore is None
    command = [str(talking), str(voice), "--model", str(checkpoint), "--device", "cpu", "--steps", "1"]
    reports = []
    for name, options in ("plain", ()), ("restored", ("--restore", str(blurring), "--restore-strength", "0.5")):
        report = tmp_path / f"{name}.json"
        assert main([*command, "-o", str(tmp_path / f"{name}.mp4"), "--report", str(report), *options]) == 0
        reports.append(json.loads(report.read_text()))
    plain, restored = reports
    assert (plain["settings"]["restore"], plain["restore_seconds"]) == (None, 0)
    assert (restored["settings"]["restore"], restored["settings"]["restore_strength"]) == (str(blurring), 0.5)
    assert restored["restore_seconds"] > 0
    assert (tmp_path / "plain.mp4").read_bytes() != (tmp_path / "restored.mp4").read_bytes()


def test_the_result_is_not_written_over_the_restorer(checkpoint, talking, voice, tmp_path, capsys):
    mine = save_restorer(tmp_path / "mine.safetensors")
    (tmp_path / "out.mp4").hardlink_to(mine)
    command = [str(talking), str(voice), "--model", str(checkpoint), "-o", str(tmp_path / "out.mp4")]
    assert main([*command, "--restore", str(mine)]) == 2
    assert "mine.safetensors" in capsys.readouterr().err


def test_an_interrupted_run_resumes_with_the_same_restorer_only(models, talking, voice, blurring, tmp_path):
    def run(strength: float = 1.0, stop: bool = False) -> int:
        def on_progress(stage: str, done: int, total: int) -> None:
            if stop and stage == "writing" and done > 12:
                raise KeyboardInterrupt

        settings = Settings(steps=1, restore=str(blurring), restore_strength=strength)
        hooks = Hooks(on_progress=on_progress)
        output = tmp_path / "out.mp4"
        return lipsync(talking, voice, output, models, settings, hooks, segment_frames=10).resumed_from

    with pytest.raises(KeyboardInterrupt):
        run(stop=True)
    assert run(strength=0.5) == 0
    with pytest.raises(KeyboardInterrupt):
        run(stop=True)
    save_restorer(blurring, gain=0.5)
    assert run() == 0
    with pytest.raises(KeyboardInterrupt):
        run(stop=True)
    assert run() > 0


def test_a_model_that_shows_the_films_own_pixels_takes_no_restorer(models, talking, voice, blurring, tmp_path):
    own = replace(models, face=np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(UserError, match="need no restorer"):
        lipsync(talking, voice, tmp_path / "out.mp4", own, Settings(restore=str(blurring)))


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_is_a_number_from_0_to_1(strength):
    with pytest.raises(UserError, match="restore_strength"):
        Settings(restore_strength=strength)


# Workers, lists and the page


def test_a_worker_restores_as_the_single_process_does_and_only_with_the_same_file(checkpoint, blurring, monkeypatch):
    hashes = hashes_of(resolve_model(str(checkpoint), CPU), str(blurring))
    settings = Settings(steps=1, restore=str(blurring))
    order = Order(str(checkpoint), "cpu", settings, "conservative", None, {"fused": False}, 16, hashes, threads=1)
    used = []
    monkeypatch.setattr(actor, "accelerate", lambda models, *_: used.append(models))
    worker = actor.Worker()
    assert worker.prepare(order).plan.settings.restore == str(blurring)
    assert used[0].restorer.name == "GFPGAN"
    plain = replace(order, settings=Settings(steps=1), hashes=None)
    worker.prepare(plain)
    assert used[1].restorer is None, "the next run is asked again"
    save_restorer(blurring, gain=0.5)
    with pytest.raises(UserError, match="restorer blurring.safetensors"):
        worker.prepare(order)
    blurring.unlink()
    with pytest.raises(UserError, match="On .*There is no file"):
        worker.prepare(order)


def test_a_row_of_a_list_names_a_restorer_beside_it(tmp_path):
    row = {"video": "a.mp4", "audio": "a.wav", "output": "o.mp4", "restore": "net.pth", "restore-strength": 0.5}
    (tmp_path / "list.jsonl").write_text(json.dumps(row))
    [found] = read_list(tmp_path / "list.jsonl", build_parser)
    assert (found.args.restore, found.args.restore_strength) == (str(tmp_path / "net.pth"), 0.5)
    assert str(tmp_path / "net.pth") in input_files(found.args)


def test_visitors_choose_a_strength_and_only_where_the_server_has_a_restorer(
    checkpoint, talking, voice, blurring, tmp_path, monkeypatch
):
    monkeypatch.setenv("LATENTSYNC_HOME", str(tmp_path / "home"))
    request = Request(talking, voice, steps=1, restore=0.5)
    with pytest.raises(UserError, match="no face restorer"):
        Worker(tmp_path / "without").submit(request, "m" * 24)
    worker = Worker(tmp_path / "with", model=str(checkpoint), device="cpu", restorer=blurring)
    worker.start()
    try:
        assert worker.ready.wait(120) and worker.machine, worker.problem
        job = worker.submit(request, "m" * 24)
        assert worker.wait(job, 120) and job.state == DONE, job.error
        settings = job.report["settings"]
        assert (settings["restore"], settings["restore_strength"]) == (blurring.name, 0.5)
        assert job.report["restore_seconds"] > 0
        assert str(blurring.parent) not in json.dumps(job.view(None))
        line, details, _ = worker.describe(request, 10)
        assert details.endswith(", faces restored by 0.5.") and "for this clip" in line
        line, details, _ = worker.describe(replace(request, restore=0.0), 10)
        assert "restored" not in details and "not known before the first job" in line
        with pytest.raises(UserError, match="need no restorer"):
            worker.describe(replace(request, model="demo"), 10)
    finally:
        worker.close()


def test_a_server_that_cannot_restore_does_not_start(tmp_path):
    with pytest.raises(UserError, match="no file"):
        parse_options(["--restore", str(tmp_path / "none.pth")], tmp_path)
    net = save_restorer(tmp_path / "net.safetensors")
    assert parse_options(["--restore", str(net)], tmp_path).restore == net


@pytest.mark.parametrize("value", [-0.1, 1.1, "much", [], True])
def test_a_strength_from_a_visitor_is_checked(value):
    setting = next(each for each in SETTINGS if each.name == "restore")
    assert setting.parse(None) == 0 and setting.parse(0.25) == 0.25
    with pytest.raises(UserError, match="strength of restoring"):
        setting.parse(value)


@pytest.mark.parametrize("has", [False, True])
def test_the_page_shows_the_strength_only_where_the_server_has_a_restorer(tmp_path, blurring, has):
    worker = Worker(tmp_path / "outputs", restorer=blurring if has else None)
    page = Page(Endpoints(worker, Fetcher(worker, True), Uploads(tmp_path / "uploads")))
    [slider] = [part for part in page.blocks.config["components"] if part["props"].get("elem_id") == "restore"]
    assert slider["props"]["visible"] is has


def test_the_real_spandrel_loads_a_network_of_random_weights(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "spandrel")
    try:
        importlib.import_module("spandrel")
        from spandrel.architectures.RestoreFormer import RestoreFormer
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"spandrel cannot be imported here: {error}")
    torch.manual_seed(0)
    network = RestoreFormer(
        n_embed=64, embed_dim=32, ch=32, ch_mult=(1, 1, 1, 1, 1, 1), num_res_blocks=1, z_channels=32
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()}, tmp_path / "net.safetensors"
    )
    restorer = load_restorer(tmp_path / "net.safetensors", CPU)
    faces, crops, mask = faces_and_crops(64)
    assert restorer.name == "RestoreFormer"
    assert restorer.restore(faces, crops, mask, 1.0).isfinite().all()
