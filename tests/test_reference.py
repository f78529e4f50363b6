"""Two implementations written apart must agree: optim.benchmark.reference and latentsync's networks and loops.

The plain side runs diffusers' scheduler step by step, the DeepCache package's own hooks and transformers' Whisper.
"""

import json
import os
import random
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import WhisperConfig
from transformers.audio_utils import mel_filter_bank
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from latentsync.audio import audio_chunks, frame_count, mel_segments
from latentsync.checkpoints.load import load_audio_encoder
from latentsync.sampling import cumulative_alphas, ddim_schedule, denoise
from latentsync.settings import DeepCache
from latentsync.unet import UNet, UNetConfig, fold_frames
from optim.benchmark.reference import PlainUNet, deepcache, denoise_window, make_pipe

PARITY_DIR = Path(os.environ.get("PARITY_DIR", Path(__file__).parent / "parity"))
UNET_FILES = sorted(PARITY_DIR.glob("unet_*.safetensors"))
WHISPER = sorted(PARITY_DIR.glob("audio_*.pt"))[0]
BOUND = 5e-6
# Float64 rounds to 2e-16. A group norm whose values hardly differ multiplies that by up to 1/√(its eps of 1e-5) = 316,
# and these networks have dozens in a row, so what is left at the end depends on the order in which a processor adds:
# 2e-13 to 1e-12 on three of them. A single step in float32 makes 1e-8, another computation 1e-6 and more.
DOUBLE = 1e-10
TOKENS = 50

pytestmark = pytest.mark.usefixtures("one_thread")


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a.double() - b.double()).norm() / b.double().norm())


def configuration(seed: int) -> dict:
    """A configuration in the released files' words: small, and unlike those of other seeds."""
    rng = random.Random(seed)
    levels = 3 + seed % 2
    cross = [rng.random() < 0.7 for _ in range(levels)]
    resolutions = [[1, 2, 4, 8], [], rng.sample([1, 2, 4, 8], 2)][seed % 3]
    widths = [rng.choice([32, 64] if 2**i in resolutions else [16, 32, 48]) for i in range(levels)]
    return {
        "in_channels": 13,
        "out_channels": 4,
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock3D" if c else "DownBlock3D" for c in cross],
        "up_block_types": ["CrossAttnUpBlock3D" if c else "UpBlock3D" for c in reversed(cross)],
        "layers_per_block": 1 + seed % 3,
        "attention_head_dim": [1, 2, 8][(seed // 2) % 3],
        "cross_attention_dim": rng.choice([16, 40, 384]),
        "norm_num_groups": [4, 8, 16][(seed // 3) % 3],
        "use_motion_module": seed % 6 != 4,
        "motion_module_resolutions": resolutions,
        "motion_module_kwargs": {
            "num_attention_heads": [8, 1, 2][seed % 3],
            "attention_block_types": ["Temporal_Self"] * rng.choice([1, 2]),
            "temporal_position_encoding_max_len": 24,
        },
    }


def two_networks(config: dict, seed: int) -> tuple[PlainUNet, UNet]:
    """Both implementations with the same weights, none of which is left at one or zero.

    In float64, so that only a different computation, never rounding, can part them.
    """
    torch.manual_seed(seed)
    plain = PlainUNet(config).eval().double()
    for name, tensor in plain.state_dict().items():
        if tensor.ndim == 1:
            tensor.normal_(float("norm" in name and name.endswith("weight")), 0.3)
        elif name.endswith("pe"):
            tensor.add_(torch.randn_like(tensor), alpha=0.1)  # the file's positions count, not computed ones
        elif ".to_" in name:
            tensor.mul_(3)  # attention that picks, and is heard at the output
    ours = UNet(UNetConfig.from_dict(config)).eval().double()
    ours.load_state_dict(plain.state_dict())
    return plain, ours.to(memory_format=torch.channels_last)


def loop_inputs(config: dict, b: int, f: int, h: int, w: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise, condition and audio of b windows of f frames, float64."""
    shapes = (1, 4, 1, h, w), (b, 9, f, h, w), (b, f, TOKENS, config["cross_attention_dim"])
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


@pytest.fixture(scope="module", params=UNET_FILES, ids=lambda path: path.stem)
def case(request):
    with safe_open(request.param, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    unet = PlainUNet(json.loads(metadata["config"])).eval()
    unet.load_state_dict({name.removeprefix("unet."): t for name, t in tensors.items() if name.startswith("unet.")})
    return unet, tensors, int(metadata["steps"]), float(metadata["guidance_scale"])


def test_plain_passes_equal_the_reference(case):
    unet, tensors, _, _ = case
    with torch.inference_mode():
        out = unet(tensors["in.sample"], torch.tensor(481), tensors["in.audio"])
    assert relative_error(out, tensors["out.t481"]) <= BOUND


def test_plain_loops_equal_the_reference(case):
    unet, tensors, steps, guidance = case
    pipe = make_pipe(unet)
    inputs = tensors["loop.latents0"], tensors["loop.cond"], tensors["loop.audio"], steps, guidance
    assert relative_error(denoise_window(pipe, *inputs), tensors["loop.out"]) <= BOUND
    assert pipe.scheduler.timesteps.tolist() == tensors["loop.timesteps"].tolist()
    for interval, branch in ((3, 0), (2, 1)):
        with deepcache(pipe, interval, branch):
            cached = denoise_window(pipe, *inputs)
        assert relative_error(cached, tensors[f"loop.deepcache.i{interval}b{branch}.out"]) <= BOUND


def test_plain_network_has_the_released_names_and_shapes():
    released = json.loads((Path(__file__).parent / "parity" / "unet_full_state_dict.json").read_text())
    with torch.device("meta"):
        unet = PlainUNet(released["config"])
    assert {name: list(t.shape) for name, t in unet.state_dict().items()} == released["tensors"]


@pytest.mark.parametrize("seed", range(12))
@torch.inference_mode()
def test_both_networks_agree_on_any_configuration(seed):
    config = configuration(seed)
    plain, ours = two_networks(config, seed)
    b, f, h, w = [(3, 1, 8, 16), (2, 5, 8, 8), (1, 10, 16, 8), (2, 16, 8, 8), (1, 24, 8, 16)][seed % 5]
    sample = torch.randn(b, 13, f, h, w, dtype=torch.float64)
    audio = torch.randn(b, f, TOKENS, config["cross_attention_dim"], dtype=torch.float64)
    timestep = torch.randint(0, 1000, (b,))
    wanted = plain(sample, timestep, audio)
    assert relative_error(ours(sample, timestep, audio), wanted) <= DOUBLE
    swapped = ours(sample, timestep, audio.flip(0, 1))
    assert relative_error(swapped, wanted) > 1e-6, "whose audio is whose was not tested"


@pytest.mark.parametrize(
    "interval, branch, guidance",
    [(1, 0, 1.5), (1, 0, 1.0), (2, 0, 1.5), (3, 0, 1.5), (3, 0, 1.0), (2, 1, 1.5), (3, 4, 1.5), (5, 7, 1.5)],
)
def test_loops_agree_with_the_deepcache_package(interval, branch, guidance):
    config = configuration(3 + 3 * branch) | {"layers_per_block": 2}
    plain, ours = two_networks(config, branch)
    noise, cond, audio = loop_inputs(config, 2, 3, 8, 8)
    pipe, steps = make_pipe(plain), 6
    middle = []  # full passes alone reach the middle
    plain.mid_block.resnets[0].register_forward_hook(lambda *_: middle.append(1))
    with deepcache(pipe, interval, branch) if interval > 1 else nullcontext():
        each = zip(cond.split(1), audio.split(1), strict=True)
        wanted = torch.cat([denoise_window(pipe, noise, c, a, steps, guidance) for c, a in each])
    assert len(middle) == 2 * -(-steps // interval)
    cache = DeepCache(interval, branch) if interval > 1 else None
    got = denoise(ours, noise, cond, audio, ddim_schedule(steps), guidance, cache)
    assert relative_error(got, wanted) <= BOUND


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_shallow_passes_agree_with_the_package_at_every_branch(layers):
    config = configuration(9) | {"layers_per_block": layers}
    assert len(config["block_out_channels"]) == 4
    plain, ours = two_networks(config, layers)
    inputs = loop_inputs(config, 1, 2, 8, 8)
    pipe = make_pipe(plain)
    for branch in range(12):
        with deepcache(pipe, 2, branch):
            wanted = denoise_window(pipe, *inputs, steps=2, guidance=1)
        got = denoise(ours, *inputs, ddim_schedule(2), 1, DeepCache(2, branch))
        assert relative_error(got, wanted) <= BOUND, branch


@pytest.mark.parametrize("steps", [1, 3, 5, 20, 50, 999])
def test_schedule_equals_diffusers_step_by_step(steps):
    schedule, scheduler = ddim_schedule(steps), make_pipe(None).scheduler
    scheduler.set_timesteps(steps)
    assert list(schedule.timesteps) == scheduler.timesteps.tolist()
    assert torch.equal(cumulative_alphas(), scheduler.alphas_cumprod)
    torch.manual_seed(steps)
    latents, epsilon = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for t, a, b in zip(scheduler.timesteps, schedule.latent_scale, schedule.noise_scale, strict=True):
        wanted = scheduler.step(epsilon, t, latents, eta=0.0).prev_sample
        assert relative_error(a * latents + b * epsilon, wanted) <= BOUND


def whole_clip_mel(wav: torch.Tensor) -> torch.Tensor:
    """Whisper's own way: one centred, reflecting STFT of the whole clip. (samples,) to (80, samples // 160)."""
    power = torch.stft(wav, 400, 160, window=torch.hann_window(400), return_complex=True)[:, :-1].abs() ** 2
    bank = mel_filter_bank(201, 80, 0, 8000, 16000, norm="slaney", mel_scale="slaney")
    mel = (torch.from_numpy(bank).float().T @ power).clamp(min=1e-10).log10()
    return (torch.maximum(mel, mel.max() - 8.0) + 4) / 4


def transformers_encoder(path: Path) -> WhisperEncoder:
    """The encoder of an OpenAI-format file as transformers' Whisper, less its final norm."""
    file = torch.load(path, weights_only=True)
    dims, tensors = file["dims"], file["model_state_dict"]
    config = WhisperConfig(
        d_model=dims["n_audio_state"],
        encoder_layers=dims["n_audio_layer"],
        encoder_attention_heads=dims["n_audio_head"],
        encoder_ffn_dim=4 * dims["n_audio_state"],
    )
    names = {
        "blocks.": "layers.",
        "attn.query": "self_attn.q_proj",
        "attn.key": "self_attn.k_proj",
        "attn.value": "self_attn.v_proj",
        "attn.out": "self_attn.out_proj",
        "attn_ln": "self_attn_layer_norm",
        "mlp_ln": "final_layer_norm",
        "mlp.0": "fc1",
        "mlp.2": "fc2",
        "ln_post": "layer_norm",
        "positional_embedding": "embed_positions.weight",
    }
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("encoder."):
            name = name.removeprefix("encoder.")
            for old, new in names.items():
                name = name.replace(old, new)
            renamed[name] = tensor.float()
    encoder = WhisperEncoder(config).eval()
    encoder.load_state_dict(renamed)
    encoder.layer_norm = torch.nn.Identity()
    return encoder


@torch.inference_mode()
def whole_clip_features(encoder: WhisperEncoder, mel: torch.Tensor) -> torch.Tensor:
    """(80, n) to (rows, layers, width): 30 s segments padded with zeros, then cut to half their mel frames."""
    rows = []
    for segment in mel.split(3000, dim=1):
        n = segment.shape[1]
        states = encoder(F.pad(segment, (0, 3000 - n))[None], output_hidden_states=True).hidden_states
        rows.append(torch.stack(states, dim=2)[0, : n // 2])
    return torch.cat(rows)


@pytest.mark.parametrize("seconds", [0.5, 3.13, 29.99, 30.0, 30.01, 65.3])
def test_sound_in_segments_equals_the_whole_clip_at_once(seconds):
    samples = round(seconds * 16000)
    torch.manual_seed(samples)
    # Loudest near the end and silent in the middle: the clamp needs the whole clip's maximum.
    wav = torch.randn(samples) * torch.linspace(0.001, 0.2, samples)
    wav[samples // 3 : samples // 2] = 0
    mel = whole_clip_mel(wav)
    assert relative_error(torch.cat(list(mel_segments(wav)), dim=1), mel) <= BOUND
    features = whole_clip_features(transformers_encoder(WHISPER), mel)
    frames = frame_count(samples)
    assert frames == -(-samples // 640)
    got = torch.stack(list(audio_chunks(load_audio_encoder(WHISPER), wav, frames)))
    rows = (2 * torch.arange(frames)[:, None] + torch.arange(-4, 6)).clamp(0, len(features) - 1)
    assert len(features) == samples // 160 // 2
    assert float((got - features[rows].flatten(1, 2)).abs().max() / features.std()) <= 1e-4, "a single row"
    assert relative_error(got, features[rows].flatten(1, 2)) <= BOUND


def test_guidance_left_out_of_shallow_passes_is_that_of_the_last_full_one():
    config = configuration(3)
    _, ours = two_networks(config, 0)
    noise, cond, audio = loop_inputs(config, 1, 3, 8, 8)
    schedule, scale = ddim_schedule(5), 2.5
    got = denoise(ours, noise, cond, audio, schedule, scale, DeepCache(2, 0, guided=False))
    latents, given = fold_frames(noise.expand(1, 4, 3, 8, 8)), fold_frames(cond)
    context = ours.encode_audio(audio)
    with torch.inference_mode():
        for i, t in enumerate(schedule.timesteps):
            x, timestep = torch.cat([latents, given], dim=1), torch.tensor([t])
            if i % 2 == 0:
                silent, _ = ours.full(x, timestep, ours.encode_audio(torch.zeros_like(audio)), 3)
                heard, cached = ours.full(x, timestep, context, 3, 0)
                added = (scale - 1) * (heard - silent)
            else:
                heard = ours.shallow(x, timestep, context, 3, 0, cached)
            latents = schedule.latent_scale[i] * latents + schedule.noise_scale[i] * (heard + added)
    assert relative_error(got, latents.unflatten(0, (1, 3)).transpose(1, 2)) <= BOUND
    with_guidance = denoise(ours, noise, cond, audio, schedule, scale, DeepCache(2, 0))
    assert relative_error(got, with_guidance) > 1e-6, "nothing was left out"
