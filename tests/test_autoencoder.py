"""The autoencoder is diffusers' own, to the bit."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from latentsync.autoencoder import Autoencoder, AutoencoderConfig
from latentsync.checkpoints.find import DEMO_FOLDER

SMALL = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [8, 16, 24],
    "norm_num_groups": 4,
    "sample_size": 32,
}
CONFIGS = {
    "plain": SMALL,
    "deep": SMALL | {"layers_per_block": 2, "latent_channels": 8, "scaling_factor": 0.5},
    "without attention": SMALL | {"mid_block_add_attention": False},
    "without quantisation": SMALL | {"use_quant_conv": False, "use_post_quant_conv": False},
    "one level": SMALL | {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"],
                          "block_out_channels": [8]},
}  # fmt: skip


def pair(config: dict) -> tuple[Autoencoder, AutoencoderKL]:
    torch.manual_seed(0)
    theirs = AutoencoderKL.from_config(config).eval().requires_grad_(False)
    ours = Autoencoder(AutoencoderConfig.from_dict(config)).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    return tuple(vae.to(memory_format=torch.channels_last) for vae in (ours, theirs))


def check_equal(ours: Autoencoder, theirs: AutoencoderKL, pixels: torch.Tensor) -> None:
    latents = theirs.encode(pixels).latent_dist.mode()
    assert torch.equal(ours.encode(pixels), latents)
    assert torch.equal(ours.decode(latents), theirs.decode(latents).sample)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_equals_diffusers_to_the_bit(name):
    pixels = torch.rand(3, 3, 32, 32).to(memory_format=torch.channels_last) * 2 - 1
    check_equal(*pair(CONFIGS[name]), pixels)


def test_blocks_and_their_widths_must_be_as_many():
    with pytest.raises(ValueError, match="lengths"):
        AutoencoderConfig.from_dict(SMALL | {"block_out_channels": [8, 8]})


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (80, 72)], ids=str)
def test_in_tiles_it_equals_diffusers_to_the_bit(size):
    ours, theirs = pair(SMALL)
    ours.use_tiling = True
    theirs.enable_tiling()
    check_equal(ours, theirs, torch.rand(2, 3, *size) * 2 - 1)


def test_with_the_demo_models_weights_it_equals_diffusers_to_the_bit():
    config = json.loads((DEMO_FOLDER / "vae" / "config.json").read_text())
    weights = load_file(DEMO_FOLDER / "vae" / "diffusion_pytorch_model.safetensors")
    ours, theirs = pair(config)
    for vae in (ours, theirs):
        vae.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    check_equal(ours, theirs, torch.rand(2, 3, 128, 128) * 2 - 1)


@pytest.mark.parametrize(
    "change",
    [{"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, {"up_block_types": ["Other"] * 3}, {"act_fn": "gelu"}],
    ids=str,
)
def test_other_kinds_of_blocks_are_refused(change):
    with pytest.raises(ValueError, match="only"):
        AutoencoderConfig.from_dict(SMALL | change)


def test_what_is_no_size_in_a_configuration_is_ignored():
    extra = {"_class_name": "AutoencoderKL", "force_upcast": True, "latents_mean": None, "act_fn": "silu"}
    assert AutoencoderConfig.from_dict(SMALL | extra) == AutoencoderConfig.from_dict(SMALL)
