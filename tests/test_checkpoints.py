"""Checkpoints load exactly or are refused in one sentence that names the file, and the tensor where one is wrong."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from latentsync.checkpoints import RELEASES, load_models, resolve
from latentsync.errors import UserError

CPU = torch.device("cpu")
UNET, WHISPER = "latentsync_unet.safetensors", "whisper/tiny.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "mine"))


def load(folder: Path):
    return load_models(resolve(str(folder), CPU), CPU, torch.float32)


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and str(folder) in message
    return message


def edit(path: Path, change) -> None:
    """Apply `change` to the tensors of a safetensors file, in place."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"dims": json.dumps(tiny.DIMS)})


def as_torch_file(folder: Path, change=None, **options) -> Path:
    """Replace the U-Net by a torch file, as the released models have it."""
    tensors = load_file(folder / UNET)
    (folder / UNET).unlink()
    if change:
        change(tensors)
    path = folder / "latentsync_unet.pt"
    torch.save({"global_step": 1, "state_dict": tensors}, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_and_safetensors_files_load_alike(checkpoint, folder, zipped):
    as_torch_file(folder, _use_new_zipfile_serialization=zipped)
    wanted, found = (load(path).unet.state_dict() for path in (checkpoint, folder))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("file", [UNET, WHISPER, VAE])
@pytest.mark.parametrize("share", [0.5, 0])
def test_half_a_file_is_refused(folder, file, share):
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[: int(len(data) * share)])
    assert str(folder / file) in refusal(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_half_a_torch_file_is_refused(folder, zipped):
    path = as_torch_file(folder, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"'{path}' is damaged" in refusal(folder)


@pytest.mark.parametrize(
    "file, name",
    [
        (UNET, "mid_block.resnets.0.conv1.weight"),
        (WHISPER, "encoder.blocks.0.attn.query.weight"),
        (VAE, "decoder.conv_in.bias"),
    ],
)
def test_wrong_tensors_are_named(folder, file, name):
    shown = name.removeprefix("encoder.") if file == WHISPER else name

    edit(folder / file, lambda tensors: tensors.update({name: tensors[name][:3].clone()}))
    assert f"'{shown}' of shape (3" in refusal(folder) and str(folder / file) in refusal(folder)

    edit(folder / file, lambda tensors: tensors.pop(name))
    assert f"lacks the tensor '{shown}'" in refusal(folder)


def test_an_extra_tensor_is_named(folder):
    edit(folder / UNET, lambda tensors: tensors.update(extra=torch.zeros(1)))
    assert "a tensor 'extra' that this model does not know" in refusal(folder)


def test_numbers_of_the_wrong_kind_are_refused(folder):
    as_torch_file(folder, lambda tensors: tensors.update({"conv_in.bias": tensors["conv_in.bias"].int()}))
    assert "'conv_in.bias' as torch.int32" in refusal(folder)


class Bomb:
    """What runs code when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("file", ["latentsync_unet.pt", "whisper/tiny.pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(folder, tmp_path, file, zipped):
    (folder / file).with_suffix(".safetensors").unlink()
    trace = tmp_path / "the code ran"
    torch.save({"state_dict": Bomb(trace)}, folder / file, _use_new_zipfile_serialization=zipped)
    assert "holds code" in refusal(folder)
    assert not trace.exists()
    torch.load(folder / file, weights_only=False)
    assert trace.exists()  # the bomb was live


@pytest.mark.parametrize(
    "unet",
    [
        {"block_out_channels": [33, 33]}, {"block_out_channels": "ab"}, {"norm_num_groups": 7},
        {"attention_head_dim": 3}, {"attention_head_dim": 0}, {"layers_per_block": "1"}, {"act_fn": "relu"},
        {"motion_module_kwargs": {"num_attention_heads": 5}}, {"motion_module_kwargs": None}, [],
    ],
)  # fmt: skip
def test_sizes_of_no_possible_unet_are_refused(folder, unet):
    unet = {**tiny.UNET, **unet} if unet else unet
    (folder / "latentsync.json").write_text(json.dumps({"resolution": 64, "unet": unet}))
    refusal(folder)


@pytest.mark.parametrize("vae", [{"block_out_channels": [8, 8]}, {"norm_num_groups": 7}, {"act_fn": "nope"}])
def test_sizes_of_no_possible_autoencoder_are_refused(folder, vae):
    (folder / "vae/config.json").write_text(json.dumps({**tiny.VAE, **vae}))
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("dims", ["{", "[1]", json.dumps({**tiny.DIMS, "n_audio_state": -4})])
def test_sizes_of_no_possible_audio_encoder_are_refused(folder, dims):
    save_file(load_file(folder / WHISPER), folder / WHISPER, {"dims": dims})
    assert WHISPER in refusal(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"resolution": "big"}', '{"resolution": 100}', "{}"])
def test_a_broken_configuration_is_refused(folder, text):
    (folder / "latentsync.json").write_text(text)
    assert "latentsync.json" in refusal(folder)


@pytest.mark.parametrize("file", [UNET, WHISPER, VAE, "vae/config.json"])
def test_a_missing_part_is_named(folder, file):
    (folder / file).unlink()
    assert file in refusal(folder)


def test_parts_of_different_models_are_refused(folder):
    sizes = {**tiny.UNET, "cross_attention_dim": 64}
    (folder / "latentsync.json").write_text(json.dumps({"resolution": 64, "unet": sizes}))
    with torch.device("meta"):
        names = tiny.UNet(tiny.UNetConfig.from_dict(sizes)).state_dict()
    save_file({name: torch.zeros(tensor.shape) for name, tensor in names.items()}, folder / UNET)
    assert "do not belong together" in refusal(folder)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="no model 'nonsense'.*auto.*demo.*latentsync-1.5.*latentsync-1.6"):
        resolve("nonsense", CPU)


def test_a_released_model_that_is_absent_says_what_to_fetch_and_where(monkeypatch, tmp_path):
    monkeypatch.setenv("LATENTSYNC_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        resolve("latentsync-1.6", CPU)
    assert RELEASES["latentsync-1.6"].repository in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_released_model_is_found_in_the_users_folder(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("LATENTSYNC_HOME", str(tmp_path))
    shutil.copytree(checkpoint, tmp_path / "checkpoints" / "latentsync-1.5")
    found = resolve("latentsync-1.5", CPU)
    assert found.name == "latentsync-1.5" and found.unet.is_relative_to(tmp_path)


def test_auto_takes_the_demo_model_without_a_gpu(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("LATENTSYNC_HOME", str(tmp_path))
    shutil.copytree(checkpoint, tmp_path / "checkpoints" / "latentsync-1.6")  # needs more than this machine has
    monkeypatch.setattr("latentsync.checkpoints.DEMO_FOLDER", checkpoint)
    assert resolve("auto", CPU).name == "demo"
