"""Finding checkpoints by name or path, and loading them exactly or not at all.

A checkpoint is a folder:

    latentsync_unet.safetensors or .pt    the U-Net under its released names
    whisper/tiny.safetensors or .pt       an OpenAI-format Whisper, of which the encoder is used
    vae/config.json, vae/diffusion_pytorch_model.safetensors    a diffusers AutoencoderKL
    latentsync.json                       {"resolution": 256, "unet": {…}, "match_colours": false}; the released
                                          models need none
"""

import json
import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from latentsync.errors import UserError
from latentsync.sampling import WINDOW
from latentsync.unet import UNet, UNetConfig
from latentsync.whisper import AudioEncoder, WhisperDims

UNET_NAMES = ("latentsync_unet.safetensors", "latentsync_unet.pt")
WHISPER_NAMES = ("whisper/tiny.safetensors", "whisper/tiny.pt")
VAE_NAMES = ("vae/diffusion_pytorch_model.safetensors",)
VAE_CONFIG = "vae/config.json"
CONFIG = "latentsync.json"
VAE_REPOSITORY = "stabilityai/sd-vae-ft-mse"
DEMO_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "demo"


@dataclass(frozen=True)
class Release:
    """A released model: its hub repository, the side of its face crop, the GPU memory its makers ask for."""

    repository: str
    resolution: int  # pixels
    vram: float  # bytes


RELEASES = {  # the best first
    "latentsync-1.6": Release("ByteDance/LatentSync-1.6", 512, 18e9),
    "latentsync-1.5": Release("ByteDance/LatentSync-1.5", 256, 8e9),
}
NAMES = ("auto", "demo", *sorted(RELEASES))


@dataclass(frozen=True)
class Checkpoint:
    """Where the parts of a model lie."""

    name: str
    resolution: int  # side of the face crop, pixels
    unet_config: UNetConfig
    unet: Path
    whisper: Path
    vae: Path
    vae_config: Path
    match_colours: bool = False  # its autoencoder does not return every tone; see `compositing.match_colours`


@dataclass(frozen=True)
class Models:
    """A loaded checkpoint, ready on its device."""

    name: str
    resolution: int
    unet: UNet
    audio_encoder: AudioEncoder
    vae: AutoencoderKL
    match_colours: bool = False

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype


def home() -> Path:
    """The user's folder for checkpoints: $LATENTSYNC_HOME, else ~/.cache/latentsync."""
    return Path(os.environ.get("LATENTSYNC_HOME") or Path.home() / ".cache" / "latentsync")


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as JSON; fetch the checkpoint again.") from error
    if not isinstance(found, dict):
        raise UserError(f"'{path}' must hold a JSON object; fetch the checkpoint again.")
    return found


def _from_folder(folder: Path, name: str, resolution: int | None = None) -> Checkpoint:
    config = _read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    resolution = config.get("resolution", resolution)
    if resolution is None:
        resolution = next((r.resolution for key, r in RELEASES.items() if folder.name.endswith(key[-3:])), None)
    if not isinstance(resolution, int) or resolution % 64 or not 64 <= resolution <= 1024:
        raise UserError(
            f"'{folder}' does not say which resolution it was trained for: put {{\"resolution\": 256}} (for 1.5) "
            f'or 512 (for 1.6) into \'{folder / CONFIG}\'.'
        )
    found = {}
    for part, names in (
        ("unet", UNET_NAMES),
        ("whisper", WHISPER_NAMES),
        ("vae", VAE_NAMES),
        ("vae_config", (VAE_CONFIG,)),
    ):
        found[part] = _first(folder, names)
        if found[part] is None:
            raise UserError(f"The checkpoint folder '{folder}' lacks {' or '.join(names)}; add that file.")
    try:
        unet_config = UNetConfig.from_dict(config.get("unet", {}))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"'{folder / CONFIG}' asks for a network that this program is not: {error}.") from error
    match_colours = config.get("match_colours", False) is True
    return Checkpoint(
        name=name, resolution=resolution, unet_config=unet_config, match_colours=match_colours, **found
    )


def _from_hub_cache(name: str) -> Checkpoint | None:
    release = RELEASES[name]

    def cached(repository: str, file: str) -> Path | None:
        path = try_to_load_from_cache(repository, file)
        return Path(path) if isinstance(path, str) else None

    unet = cached(release.repository, "latentsync_unet.pt")
    whisper = cached(release.repository, "whisper/tiny.pt")
    vae = cached(VAE_REPOSITORY, "diffusion_pytorch_model.safetensors")
    vae_config = cached(VAE_REPOSITORY, "config.json")
    if not (unet and whisper and vae and vae_config):
        return None
    return Checkpoint(name, release.resolution, UNetConfig(), unet, whisper, vae, vae_config)


def _released(name: str) -> Checkpoint | None:
    """A released model where it is present: in the user's folder, else in the Hugging Face cache."""
    folder = home() / "checkpoints" / name
    if _first(folder, UNET_NAMES):
        return _from_folder(folder, name, RELEASES[name].resolution)
    return _from_hub_cache(name)


def resolve(model: str, device: torch.device) -> Checkpoint:
    """Find the checkpoint that `model` names: `auto`, `demo`, a released name, or a folder.

    `auto` is the best one present whose memory need the device meets, else the demo model.
    Raises UserError where there is none, or where the folder lacks a part.
    """
    if model == "auto":
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        for name, release in RELEASES.items():
            if memory >= release.vram and (found := _released(name)):
                return found
        model = "demo"
    if model == "demo":
        return _from_folder(DEMO_FOLDER, "demo")
    if model in RELEASES:
        if found := _released(model):
            return found
        raise UserError(
            f"The model '{model}' is not on this machine: put latentsync_unet.pt, whisper/tiny.pt and vae/ (of "
            f"{RELEASES[model].repository} and {VAE_REPOSITORY}) into '{home() / 'checkpoints' / model}'."
        )
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _from_folder(folder.resolve(), folder.resolve().name)
    raise UserError(f"There is no model '{model}': give one of {', '.join(NAMES)}, or a checkpoint folder.")


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of a safetensors or torch file (whose code, if it has any, is not run).

    A torch file's outer dictionary is returned as it is, memory-mapped. Raises UserError, naming the file.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        # Only zip files can be mapped; older ones are read whole.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError as error:
        raise UserError(f"The checkpoint file '{path}' is missing; fetch it again.") from error
    except (SafetensorError, RuntimeError, OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"The checkpoint file '{path}' is damaged or incomplete; fetch it again.") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"The checkpoint file '{path}' is damaged, or holds code besides tensors, which is never run; "
            "fetch it again from a source that you trust."
        ) from error
    if not isinstance(found, Mapping):
        raise UserError(f"The checkpoint file '{path}' does not hold named tensors; fetch it again.")
    return dict(found), {}


def load_exactly(module: nn.Module, tensors: Mapping[str, Any], path: Path) -> None:
    """Give `module` (on the meta device or not) the tensors; every name and shape must be there, none over.

    Raises UserError naming the first tensor that is missing, extra or misshaped.
    """
    wanted = module.state_dict()
    wrong = [f"lacks the tensor '{name}'" for name in wanted if name not in tensors]
    wrong += [f"has a tensor '{name}' that this model does not know" for name in tensors if name not in wanted]
    for name, tensor in wanted.items():
        given = tensors.get(name)
        if given is not None and (not isinstance(given, Tensor) or given.shape != tensor.shape):
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            wrong.append(f"has '{name}' of shape {shape} instead of {tuple(tensor.shape)}")
        elif given is not None and not (given.is_floating_point() and given.layout == torch.strided):
            wrong.append(f"has '{name}' as {given.dtype}, {given.layout} instead of plain floating-point numbers")
    if wrong:
        more = f" ({len(wrong) - 1} more differences)" if len(wrong) > 1 else ""
        raise UserError(f"The checkpoint file '{path}' {wrong[0]}{more}; it is of another model or version.")
    module.load_state_dict(dict(tensors), assign=True)


@contextmanager
def _building(path: Path) -> Iterator[None]:
    """On the meta device, build the network whose sizes `path` gives; UserError where they make none."""
    try:
        with torch.device("meta"):
            yield
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, ArithmeticError) as error:
        raise UserError(
            f"The sizes given for '{path}' do not describe a network that can be built; fetch the checkpoint again."
        ) from error


def _check_heads(widths: Iterable[int], heads: int) -> None:
    if any(width % heads for width in widths):
        raise ValueError(f"{heads} heads cannot share the width evenly")


def load_unet(path: Path, config: UNetConfig) -> UNet:
    """The U-Net of a safetensors file, or of a torch file {"state_dict": …}, in the file's precision."""
    tensors, _ = read_tensors(path)
    tensors = tensors.get("state_dict", tensors)
    if not isinstance(tensors, Mapping):
        raise UserError(f"The checkpoint file '{path}' does not hold named tensors; fetch it again.")
    with _building(path):
        widths = config.block_out_channels
        _check_heads([*compress(widths, config.cross_attention), widths[-1]], config.heads)
        _check_heads(compress(widths, config.temporal), config.temporal_heads)
        unet = UNet(config)
    load_exactly(unet, tensors, path)
    return unet.eval()


def load_audio_encoder(path: Path) -> AudioEncoder:
    """The encoder of an OpenAI-format Whisper (torch file, or safetensors with the dims as metadata), float32."""
    tensors, metadata = read_tensors(path)
    try:
        dims = json.loads(metadata["dims"]) if "dims" in metadata else tensors.get("dims")
        tensors = tensors.get("model_state_dict", tensors)
        dims = WhisperDims(**{field.name: int(dims[field.name]) for field in fields(WhisperDims)})
        tensors = {
            name.removeprefix("encoder."): tensor.float()
            for name, tensor in tensors.items()
            if name.startswith("encoder.")
        }
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"'{path}' is not a Whisper file in OpenAI's format; fetch it again.") from error
    with _building(path):
        _check_heads((dims.n_audio_state,), dims.n_audio_head)
        encoder = AudioEncoder(dims)
    load_exactly(encoder, tensors, path)
    return encoder.eval()


def load_vae(path: Path, config_path: Path) -> AutoencoderKL:
    """The autoencoder of a diffusers folder, also of one written before diffusers renamed its attention."""
    renamed = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    tensors, _ = read_tensors(path)
    for name in [name for name in tensors if ".attentions." in name]:
        new = name
        for old_part, new_part in renamed.items():
            new = new.replace(old_part, new_part)
        tensors[new] = tensors.pop(name)
    config = _read_json(config_path)
    with _building(config_path):
        vae = AutoencoderKL.from_config(config)
    load_exactly(vae, tensors, path)
    return vae.eval()


def load_models(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Models:
    """Load all three networks onto the device, convolutions channels-last.

    The audio encoder stays float32, which costs little and keeps its features the reference's. Raises UserError
    where a file is damaged or does not fit.
    """
    unet = load_unet(checkpoint.unet, checkpoint.unet_config)
    vae = load_vae(checkpoint.vae, checkpoint.vae_config)
    latents = vae.config.latent_channels
    config = checkpoint.unet_config
    if (config.in_channels, config.out_channels) != (3 * latents + 1, latents):
        raise UserError(f"'{checkpoint.unet}' and '{checkpoint.vae}' do not belong together; fetch both again.")
    if vae.config.shift_factor:
        raise UserError(f"'{checkpoint.vae_config}' shifts its latents, which LatentSync does not; use its own VAE.")
    if any(config.temporal) and config.temporal_max_len < WINDOW:
        raise UserError(f"'{checkpoint.unet}' takes {config.temporal_max_len} frames, but a window has {WINDOW}.")
    encoder = load_audio_encoder(checkpoint.whisper)
    if encoder.dims.n_audio_state != config.cross_attention_dim:
        raise UserError(f"'{checkpoint.unet}' and '{checkpoint.whisper}' do not belong together; fetch both again.")
    for module in (unet, vae):
        # diffusers' own `to` warns of modules to be kept in float32 even where there are none.
        nn.Module.to(module.requires_grad_(False), device, dtype, memory_format=torch.channels_last)
    encoder = encoder.requires_grad_(False).to(device)
    return Models(checkpoint.name, checkpoint.resolution, unet, encoder, vae, checkpoint.match_colours)
