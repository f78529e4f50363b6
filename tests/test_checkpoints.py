"""Checkpoints load exactly or are refused in one sentence that names the file, and the tensor where one is wrong."""

import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import load_models
from latentsync.checkpoints.releases import LICENCES, RELEASES, VAE_PARTS, recommend
from latentsync.checkpoints.tensors import in_groups
from latentsync.errors import UserError

CPU = torch.device("cpu")
UNET, WHISPER = "latentsync_unet.safetensors", "whisper/tiny.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "mine"))


def load(folder: Path):
    return load_models(resolve_model(str(folder), CPU), CPU, torch.float32)


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


@pytest.mark.parametrize(
    "file, name",
    [(UNET, "conv_in.weight"), (WHISPER, "encoder.blocks.0.attn.query.weight"), (VAE, "decoder.conv_in.bias")],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(folder, file, name, value):
    edit(folder / file, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    assert f"'{name.removeprefix('encoder.')}' that are not finite" in refusal(folder)


def test_weights_too_large_for_half_precision_are_refused_only_there(folder):
    edit(folder / UNET, lambda tensors: tensors["conv_in.weight"].view(-1)[:1].fill_(1e5))
    load(folder)
    with pytest.raises(UserError, match=r"latentsync_unet.*'conv_in.weight' that are not finite as float16"):
        load_models(resolve_model(str(folder), CPU), CPU, torch.float16)


def lie(path: Path, change) -> None:
    """Apply `change` to the header of a safetensors file and leave the numbers behind it as they are."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    text = json.dumps(header).encode() if changed is None else changed
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def last(header: dict) -> dict:
    return max((entry for name, entry in header.items() if name[0] != "_"), key=lambda entry: entry["data_offsets"])


LIES = {
    "more numbers than there are": lambda h: last(h)["data_offsets"].__setitem__(1, 1 << 40),
    "numbers before the first": lambda h: last(h)["data_offsets"].__setitem__(0, -8),
    "numbers of another tensor": lambda h: last(h).update(data_offsets=[0, 4]),
    "a shape without end": lambda h: last(h).update(shape=[1 << 40, 1 << 40]),
    "a type that there is not": lambda h: last(h).update(dtype="F1"),
    "a wider type": lambda h: last(h).update(dtype="F64"),
    "no JSON": lambda h: b"{" * 100,
    "a list": lambda h: b"[]",
    "nested without end": lambda h: b"[" * 100_000 + b"]" * 100_000,
}


@pytest.mark.parametrize("file", [UNET, WHISPER, VAE])
@pytest.mark.parametrize("kind", LIES)
def test_a_lying_header_is_refused(folder, file, kind):
    lie(folder / file, LIES[kind])
    assert str(folder / file) in refusal(folder)


@pytest.mark.parametrize("length", [0, 7, 1 << 30, (1 << 63) - 1, (1 << 64) - 1])
def test_a_header_of_an_absurd_length_is_refused(folder, length):
    data = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(length.to_bytes(8, "little") + data[8:])
    assert str(folder / UNET) in refusal(folder)


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


NONSENSE = [None, -1, 10**30, 1e308, math.nan, math.inf, "x", [], [1], {"a": 1}]


def configure(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["guidance_scale", "mel_range", "match_colours", "ends_only", "unet"])
def test_values_of_another_kind_or_beyond_reason_are_refused(folder, name):
    for value in NONSENSE:
        configure(folder / "latentsync.json", **{name: value})
        assert len(refusal(folder)) < 300 + 2 * len(str(folder)), value


@pytest.mark.parametrize("name", ["layers_per_block", "norm_num_groups", "attention_head_dim", "block_out_channels"])
def test_sizes_beyond_reason_are_refused_before_anything_is_built(folder, name):
    """10**9 layers would fill the memory; a negative number of groups divides every width."""
    for value in (10**9, -1, 1e308, math.nan, "x", {"a": 1}):
        configure(folder / "latentsync.json", unet=tiny.UNET | {name: [value, value] if "out" in name else value})
        assert "latentsync" in refusal(folder)


@pytest.mark.parametrize(
    "vae",
    [
        {"layers_per_block": 10**6}, {"layers_per_block": -1}, {"block_out_channels": [8, 8, 16, 10**30]},
        {"act_fn": None}, {"act_fn": [1]}, {"down_block_types": [1]}, {"up_block_types": {"a": 1}},
        {"scaling_factor": math.nan}, {"scaling_factor": "x"}, {"scaling_factor": 0}, {"scaling_factor": None},
        {"sample_size": [1]}, {"sample_size": -1}, {"norm_num_groups": -1}, {"latent_channels": 10**12},
    ],
)  # fmt: skip
def test_odd_values_of_an_autoencoder_are_refused(folder, vae):
    configure(folder / "vae/config.json", **vae)
    assert "vae" in refusal(folder)


@pytest.mark.parametrize("file", ["latentsync.json", "vae/config.json"])
@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"\0", b"NaN", b'{"resolution": 64' + b"0" * 5000 + b"}"]
)
def test_json_that_is_none_or_has_no_end_is_refused(folder, file, text):
    (folder / file).write_bytes(text)
    assert file in refusal(folder)


DIMS = json.dumps(tiny.DIMS)


@pytest.mark.parametrize(
    "dims",
    ["[" * 100_000, "null", "9" * 5000, *(DIMS.replace("1500", size) for size in ("1e999", "NaN", "-1", "1000000000"))],
    ids=lambda text: text[:20],
)
def test_odd_sizes_of_an_audio_encoder_are_refused(folder, dims):
    save_file(load_file(folder / WHISPER), folder / WHISPER, {"dims": dims})
    assert WHISPER in refusal(folder)


def odd_torch_files(tensors: dict) -> dict:
    """Torch files of odd structure, made of the tensors of a network."""
    name = next(iter(tensors))
    tensor = tensors[name]
    other = {
        "nothing": None, "a dictionary": {}, "a word": "x", "a number": 3, "whole numbers": tensor.to(torch.int8),
        "truth values": tensor.bool(), "complex numbers": tensor.to(torch.complex64), "no numbers": tensor.to("meta"),
        "a sparse tensor": tensor.to_sparse(), "another shape": tensor[..., :1],
        "tensors of several sizes": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    }  # fmt: skip
    files = {kind: tensors | {name: value} for kind, value in other.items()}
    files |= {"a number as name": tensors | {3: tensor}, "numbers as names": {3: tensor}, "a pair": {(1, 2): tensor}}
    return files | {"a list": [1], "a tensor": tensor, "none": None, "text": "abc", "empty": {}}


KINDS = list(odd_torch_files({"a": torch.ones(2, 2)}))


@pytest.mark.parametrize("kind", KINDS)
def test_torch_files_of_odd_structure_are_refused(folder, kind):
    tensors = {"latentsync_unet.pt": load_file(folder / UNET), "whisper/tiny.pt": load_file(folder / WHISPER)}
    for file in tensors:
        whole, odd = (folder / file).with_suffix(".safetensors"), odd_torch_files(tensors[file])[kind]
        for content in ({"state_dict": odd, "model_state_dict": odd, "dims": tiny.DIMS}, odd):
            torch.save(content, folder / file)
            whole.rename(aside := whole.with_suffix(".aside"))
            assert file in refusal(folder)
            aside.rename(whole)
            (folder / file).unlink()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"PK\x03\x04" + bytes(100), b"\x80\x02.", b"\x80\x02N.", b"\x80\x02" + b"]" * 100_000 + b".",
        b"\x80\x02X\xff\xff\xff\x7f", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f", b"<html>" * 50, bytes(1000),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n",
    ],
    ids=range(10),
)  # fmt: skip
def test_bytes_that_are_no_checkpoint_are_refused(folder, data):
    for file in (UNET, VAE):
        saved = (folder / file).read_bytes()
        (folder / file).write_bytes(data)
        assert file in refusal(folder)
        (folder / file).write_bytes(saved)
    for file in ("latentsync_unet.pt", "whisper/tiny.pt"):
        (folder / file).with_suffix(".safetensors").rename(folder / "aside")
        (folder / file).write_bytes(data)
        assert file in refusal(folder)
        (folder / "aside").rename((folder / file).with_suffix(".safetensors"))
        (folder / file).unlink()


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
        resolve_model("nonsense", CPU)


def test_a_released_model_that_is_absent_says_what_to_fetch_and_where(monkeypatch, tmp_path):
    monkeypatch.setenv("LATENTSYNC_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        resolve_model("latentsync-1.6", CPU)
    assert RELEASES["latentsync-1.6"].repository in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_released_model_is_found_in_the_users_folder(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("LATENTSYNC_HOME", str(tmp_path))
    shutil.copytree(checkpoint, tmp_path / "checkpoints" / "latentsync-1.5")
    found = resolve_model("latentsync-1.5", CPU)
    assert found.name == "latentsync-1.5" and found.unet.is_relative_to(tmp_path)


def test_auto_takes_the_demo_model_without_a_gpu(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("LATENTSYNC_HOME", str(tmp_path))
    shutil.copytree(checkpoint, tmp_path / "checkpoints" / "latentsync-1.6")  # needs more than this machine has
    monkeypatch.setattr("latentsync.checkpoints.find.DEMO_FOLDER", checkpoint)
    assert resolve_model("auto", CPU).name == "demo"


def arrange(folder: Path, checkpoint: Path, vae: str = "vae") -> None:
    """The tiny checkpoint in another layout, without latentsync.json, its U-Net as a pickle."""
    (folder / "whisper").mkdir(parents=True)
    torch.save({"global_step": 1, "state_dict": load_file(checkpoint / UNET)}, folder / "latentsync_unet.pt")
    shutil.copy(checkpoint / WHISPER, folder / "whisper")
    shutil.copytree(checkpoint / "vae", folder / vae)


@pytest.mark.parametrize("inner", ["", "checkpoints"])
@pytest.mark.parametrize("vae", ["vae", "sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse"])
def test_layouts_of_the_reference_and_its_wrappers_are_found(checkpoint, tmp_path, inner, vae):
    arrange(tmp_path / "LatentSync-1.5" / inner, checkpoint, vae)
    found = resolve_model(str(tmp_path / "LatentSync-1.5"), CPU)
    assert found.resolution == 256 and found.vae.parent == tmp_path / "LatentSync-1.5" / inner / vae


def test_the_autoencoder_that_the_reference_left_in_the_cache_is_found(checkpoint, monkeypatch, tmp_path):
    arrange(tmp_path / "reference-1.6" / "checkpoints", checkpoint)
    shutil.rmtree(tmp_path / "reference-1.6" / "checkpoints" / "vae")
    with pytest.raises(UserError, match="lacks vae/"):
        resolve_model(str(tmp_path / "reference-1.6"), CPU)
    parts = []
    for part in VAE_PARTS:
        cached = tmp_path / "models--stabilityai--sd-vae-ft-mse" / "snapshots" / part.revision / part.file
        cached.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkpoint / part.place, cached)
        parts.append(replace(part, size=cached.stat().st_size))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("latentsync.checkpoints.find.VAE_PARTS", parts)
    found = resolve_model(str(tmp_path / "reference-1.6"), CPU)
    assert found.vae.is_file() and found.vae_config.is_file() and found.resolution == 512


def test_a_file_that_is_not_known_is_run_as_its_folder_says_with_a_remark(checkpoint, tmp_path):
    folder = tmp_path / "mine-1.6"
    arrange(folder, checkpoint)
    remark = resolve_model(str(folder), CPU).remark
    assert (
        "none of the released files" in remark and "512 px" in remark and str(folder / "latentsync_unet.pt") in remark
    )
    assert remark.endswith(".") and "\n" not in remark
    (folder / "config.json").write_text('{"Name": "LatentSync-1.5"}')  # the hub's own; the folder's name goes on first
    assert resolve_model(str(folder.rename(tmp_path / "mine")), CPU).resolution == 256


@pytest.mark.parametrize("place", ["wrongly named 1.6", "wrong latentsync.json", "right"])
def test_a_known_file_is_run_at_its_own_resolution_wherever_it_lies(checkpoint, monkeypatch, tmp_path, place):
    folder = tmp_path / ("LatentSync-1.6" if place == "wrongly named 1.6" else "mine")
    arrange(folder, checkpoint)
    if place == "wrong latentsync.json":
        (folder / "latentsync.json").write_text('{"resolution": 512}')
    release = RELEASES["latentsync-1.5"]
    unet = replace(release.unet, size=(folder / "latentsync_unet.pt").stat().st_size)
    monkeypatch.setitem(RELEASES, "latentsync-1.5", replace(release, parts=(*release.parts[:-1], unet)))
    found = resolve_model(str(folder), CPU)
    assert found.resolution == 256
    assert found.remark is None if place == "right" else "is the U-Net of latentsync-1.5" in found.remark


def test_the_model_before_the_temporal_layers_is_named(folder):
    as_torch_file(folder, lambda t: [t.pop(name) for name in list(t) if "motion_modules" in name])
    assert "LatentSync 1.0" in refusal(folder) and "1.6" in refusal(folder)


def test_loading_maps_a_little_of_a_file_at_a_time(checkpoint, monkeypatch):
    """Every group is from a mapping of its own, and none is larger than a group and its last tensor."""
    monkeypatch.setattr(in_groups, "__defaults__", (200_000,))
    wanted = load_file(checkpoint / UNET)
    groups = list(in_groups(lambda: load_file(checkpoint / UNET)))
    largest = max(tensor.nbytes for tensor in wanted.values())
    assert len(groups) > 5
    assert all(sum(tensor.nbytes for tensor in group.values()) < 200_000 + largest for _, group in groups)
    assert [name for _, group in groups for name in group] == list(wanted)
    assert groups[-1][0] == sum(tensor.nbytes for tensor in wanted.values())
    loaded = load(checkpoint).unet.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    "most, name, word", [(0, "demo", "memory"), (256, "latentsync-1.5", "512"), (512, "latentsync-1.6", "512")]
)
def test_the_model_is_chosen_by_memory_with_a_reason(most, name, word):
    chosen, reason = recommend(lambda side: side <= most)
    assert chosen == name and word in reason and reason.endswith(".")


def test_what_is_known_of_the_releases_is_consistent():
    names = json.loads((Path(__file__).parent / "parity/unet_full_state_dict.json").read_text())["tensors"]
    numbers = sum(math.prod(shape) for shape in names.values())
    for release in RELEASES.values():
        assert 0 < release.unet.size - 4 * numbers < 1e6  # a float32 pickle of these tensors
        assert all(len(part.sha256) == 64 and len(part.revision) == 40 for part in release.parts)
        assert {part.repository for part in release.parts} <= LICENCES.keys()
    assert len({release.unet.size for release in RELEASES.values()}) == len(RELEASES)  # so size tells them apart


def test_the_container_copies_and_runs_what_exists():
    root = Path(__file__).resolve().parent.parent
    text = (root / "assets/Dockerfile").read_text()
    lines = [line.split() for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    copied = [path for line in lines if line[0] == "COPY" for path in line[1:-1] if not path.startswith("--")]
    assert {"launch.sh", "app.py", "requirements.exact.txt", "optim", "latentsync", "assets"} <= set(copied)
    assert all((root / path).exists() for path in copied)
    assert [line[-1] for line in lines if line[0] == "FROM"] == ["base", "cpu", "gpu"]
    packages = re.search(r"packages=\((.*?)\)", (root / ".ci/run").read_text())[1].split()
    assert set(packages) - {"chromium"} <= set(text.split())  # what the launcher asks for on Debian; that is for tests
    commands = re.findall(r"\./launch\.sh (\w+)", text)
    assert commands and all(f"    {command})" in (root / "launch.sh").read_text() for command in commands)
    assert [line[1:] for line in lines if line[0] == "CMD"] == [['["./launch.sh"]']]  # which serves the page
    options = (root / "optim/serving/options.py").read_text()
    assert all(f'"{name}"' in options for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "LATENTSYNC_GET"))
    assert all(f"{name}=" in text for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "LATENTSYNC_GET"))


def test_a_checkpoint_says_what_suits_it(folder):
    config = {"resolution": 64, "unet": tiny.UNET, "guidance_scale": 2.25, "mel_range": 5, "speech_level": -21.5}
    config |= {"match_colours": True, "ends_only": True}
    names = ("guidance_scale", "mel_range", "speech_level", "match_colours", "ends_only")
    plain = load(folder)
    released = [1.5, 8.0, None, False, False]
    assert [getattr(plain, name) for name in names] == released, "where nothing is said"
    (folder / "latentsync.json").write_text(json.dumps(config))
    own = load(folder)
    assert [getattr(own, name) for name in names] == [config[name] for name in names]
    (folder / "latentsync.json").write_text(json.dumps(config | {"guidance_scale": "strong"}))
    assert "guidance_scale" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_decoder_of_the_users_own_is_the_one_that_runs(folder, dtype):
    def fine_tune(tensors):
        for name, tensor in tensors.items():
            tensors[name] = (tensor + 0.5 * name.startswith("decoder.")).to(dtype)

    before = load(folder).vae
    edit(folder / VAE, fine_tune)
    after = load(folder).vae
    assert after.decoder.conv_in.weight.dtype == torch.float32, "whatever the file's is"
    assert torch.allclose(after.decoder.conv_in.weight, before.decoder.conv_in.weight + 0.5, atol=0.01)
    assert torch.allclose(after.encoder.conv_in.weight, before.encoder.conv_in.weight, atol=0.01)


@pytest.mark.parametrize("half, other", [("decoder", "encoder"), ("encoder", "decoder")])
def test_half_an_autoencoder_is_refused_with_the_way_to_complete_it(folder, half, other):
    def remove(tensors):
        for name in [name for name in tensors if name.startswith(f"{other}.")]:
            del tensors[name]

    edit(folder / VAE, remove)
    assert re.search(f"an autoencoder's {half} alone: write both halves", refusal(folder))


@pytest.mark.parametrize(
    "change, difference",
    [
        (lambda tensors: tensors.update({"ema.decay": torch.zeros(1)}), "'ema.decay' that this model does not know"),
        (lambda tensors: tensors.pop("decoder.conv_out.bias"), "lacks the tensor 'decoder.conv_out.bias'"),
        (
            lambda tensors: tensors.update({"decoder.conv_out.bias": torch.zeros(5)}),
            r"of shape \(5,\) instead of \(3,\)",
        ),
    ],
    ids=["extra", "missing", "misshapen"],
)
def test_an_autoencoder_with_other_tensors_is_refused_by_the_first_of_them(folder, change, difference):
    edit(folder / VAE, change)
    assert re.search(difference, refusal(folder))
