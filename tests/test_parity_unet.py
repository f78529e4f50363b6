"""The U-Net and its loops against the reference's own numbers on random weights."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from latentsync.sampling import ddim_schedule, denoise
from latentsync.settings import DeepCache
from latentsync.unet import UNet, UNetConfig

HERE = Path(__file__).parent / "parity"
PARITY_DIR = Path(os.environ.get("PARITY_DIR", HERE))
FILES = sorted(PARITY_DIR.glob("unet_*.safetensors"))
pytestmark = pytest.mark.usefixtures("one_thread")
BOUND = 5e-6


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_there_are_numbers_to_compare_with():
    assert FILES, f"no unet_*.safetensors in {PARITY_DIR}"


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def case(request):
    with safe_open(request.param, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    unet = UNet(UNetConfig.from_dict(json.loads(metadata["config"])))
    weights = {name.removeprefix("unet."): t for name, t in tensors.items() if name.startswith("unet.")}
    unet.load_state_dict(weights)
    unet = unet.eval().to(memory_format=torch.channels_last)
    return unet, tensors, int(metadata["steps"]), float(metadata["guidance_scale"])


@torch.inference_mode()
def test_single_pass_equals_the_reference(case):
    unet, tensors, _, _ = case
    passes = [name for name in tensors if name.startswith("out.t")]
    assert passes
    for name in passes:
        timestep = torch.tensor([int(name.removeprefix("out.t"))])
        out = unet(tensors["in.sample"], timestep, tensors["in.audio"])
        assert relative_error(out, tensors[name]) <= BOUND


def test_guided_loop_equals_the_reference(case):
    unet, tensors, steps, guidance = case
    schedule = ddim_schedule(steps)
    assert list(schedule.timesteps) == tensors["loop.timesteps"].tolist()
    inputs = tensors["loop.latents0"], tensors["loop.cond"], tensors["loop.audio"]
    out = denoise(unet, *inputs, schedule, guidance)
    assert relative_error(out, tensors["loop.out"]) <= BOUND


def test_deepcache_loops_equal_the_package_on_the_reference(case):
    unet, tensors, steps, guidance = case
    names = [name for name in tensors if name.startswith("loop.deepcache.")]
    assert names
    inputs = tensors["loop.latents0"], tensors["loop.cond"], tensors["loop.audio"]
    for name in names:
        interval, branch = name.split(".")[2][1:].split("b")
        cache = DeepCache(int(interval), int(branch))
        out = denoise(unet, *inputs, ddim_schedule(steps), guidance, cache)
        assert relative_error(out, tensors[name]) <= BOUND, name


def test_full_size_configuration_has_the_released_names_and_shapes():
    released = json.loads((HERE / "unet_full_state_dict.json").read_text())
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(released["config"]))
    ours = {name: list(t.shape) for name, t in unet.state_dict().items()}
    assert ours == released["tensors"]
    assert sum(p.numel() for p in unet.parameters()) == released["parameters"]
    assert unet.config == UNetConfig(), "the defaults are the released sizes"
