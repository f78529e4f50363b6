"""Finding checkpoints by name or path, and loading them exactly or not at all.

A checkpoint is a folder:

    latentsync_unet.safetensors or .pt    the U-Net under its released names
    whisper/tiny.safetensors or .pt       an OpenAI-format Whisper, of which the encoder is used
    vae/config.json, vae/diffusion_pytorch_model.safetensors    a diffusers AutoencoderKL
    latentsync.json                       {"resolution": 256, "unet": {…}, "match_colours": false, "ends_only": false,
                                          "guidance_scale": 1.5, "mel_range": 8, "speech_level": null};
                                          the released models need none
    the picture that latentsync.json names as "face", if any

All but the last may also lie in its folder `checkpoints`, as the reference and its ComfyUI wrappers have it, and the
autoencoder in the Hugging Face cache.
"""

import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import compress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from latentsync.audio import MEL_RANGE
from latentsync.checkpoints.convert import SOURCE, in_groups
from latentsync.checkpoints.download import found_here
from latentsync.checkpoints.releases import RELEASES, VAE_PARTS, VAE_REPOSITORY, folder_of, released_as
from latentsync.errors import UserError
from latentsync.sampling import denoise
from latentsync.settings import GUIDANCE_SCALE, WINDOW
from latentsync.unet import UNet, UNetConfig
from latentsync.whisper import AudioEncoder, WhisperDims

UNET_NAMES = ("latentsync_unet.safetensors", "latentsync_unet.pt")
WHISPER_NAMES = ("whisper/tiny.safetensors", "whisper/tiny.pt")
VAE_NAMES = ("vae/diffusion_pytorch_model.safetensors",)
VAE_CONFIG = "vae/config.json"
VAE_FOLDERS = ("vae", "sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse")
CONFIG = "latentsync.json"
DEMO_FOLDER = Path(__file__).resolve().parents[2] / "assets" / "demo"


# Limits of what a description may ask for: enough for every network of this kind, and built at once.
MOST_SIZE = 1 << 16  # of a number: widths, heads, positions
MOST_LAYERS = 64  # of a block, and entries of a list
MOST_NESTED = 8  # levels of lists and objects
MOST_GUIDANCE, MOST_DECADES = 100.0, 100.0
VAE_SCALE, VAE_SIDE = 0.18215, 32  # what diffusers takes where a configuration does not say
# What a damaged pickle may raise, besides its own errors.
DAMAGED = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError)
REMEDY = "correct it, or fetch the checkpoint again"

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
    ends_only: bool = False  # it sees a window's first and last faces alone; see `sampling.interpolate_ends`
    guidance_scale: float = GUIDANCE_SCALE  # what suits it, where nothing else is asked for
    mel_range: float = MEL_RANGE  # decades under the loudest sound that its audio encoder has learnt to hear
    speech_level: float | None = None  # dB to which quieter speech is raised for it; see `audio.raise_quiet_speech`
    face: Path | None = None  # picture of the face that it paints instead of the film's; see `retarget`
    remark: str | None = None  # a sentence for the user, where something about the files is not as expected

    @property
    def files(self) -> tuple[Path, ...]:
        files = self.unet, self.whisper, self.vae, self.vae_config, self.face
        return tuple(file for file in files if file is not None)


@dataclass
class Models:
    """A loaded checkpoint, ready on its device."""

    name: str
    resolution: int
    unet: UNet
    audio_encoder: AudioEncoder
    vae: AutoencoderKL
    match_colours: bool = False
    ends_only: bool = False
    guidance_scale: float = GUIDANCE_SCALE
    mel_range: float = MEL_RANGE
    speech_level: float | None = None
    face: np.ndarray | None = None  # uint8 (R, R, 3), aligned: what it paints instead of the film's; see `retarget`
    files: tuple[Path, ...] = ()  # that it was loaded from
    denoise: Callable[..., Tensor] = denoise  # or what does the same faster

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype


def _first(folders: Iterable[Path], names: Iterable[str]) -> Path | None:
    return next((path for folder in folders for name in names if (path := folder / name).is_file()), None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # nested without end
        raise UserError(f"'{path}' cannot be read as JSON; fetch the checkpoint again.") from error
    if not isinstance(found, dict):
        raise UserError(f"'{path}' must hold a JSON object; fetch the checkpoint again.")
    return found


def _check_sizes(sizes: Any, path: Path, name: str = "", depth: int = 0) -> None:
    """Check every number in a description of a network, before anything of that size is built.

    sizes: what JSON can hold; path: the file to name; name: of this value in it. Raises UserError.
    """
    if isinstance(sizes, Mapping | list | tuple):
        problem = len(sizes) > MOST_LAYERS or depth == MOST_NESTED
    elif isinstance(sizes, int):
        problem = not 0 <= sizes <= (MOST_LAYERS if "layer" in name else MOST_SIZE)
    else:
        problem = isinstance(sizes, float) and not abs(sizes) <= MOST_SIZE  # nor is it with what is no number
    if problem:
        raise UserError(f"'{path}' has a {name or 'description'} beyond what a network can have; {REMEDY}.")
    if isinstance(sizes, Mapping):
        for key, value in sizes.items():
            _check_sizes(value, path, str(key)[:40], depth + 1)
    elif isinstance(sizes, list | tuple):
        for value in sizes:
            _check_sizes(value, path, name, depth + 1)


def _number(config: Mapping[str, Any], name: str, default: float, most: float, path: Path) -> float:
    """A number above 0 and up to `most` of a configuration. Raises UserError."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise UserError(f"'{path}' has a {name} that is no number above 0 and up to {most:g}; {REMEDY}.")
    return float(value)


def _level(config: Mapping[str, Any], name: str, path: Path) -> float | None:
    """A level of sound, −100 to 0 dB, None where there is none. Raises UserError."""
    value = config.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 0:
        raise UserError(f"'{path}' has a {name} that is no number from -100 to 0; {REMEDY}.")
    return float(value)


def _flag(config: Mapping[str, Any], name: str, path: Path) -> bool:
    value = config.get(name, False)
    if not isinstance(value, bool):
        raise UserError(f"'{path}' has a {name} that is neither true nor false; {REMEDY}.")
    return value


def recognise(unet: Path) -> str | None:
    """The release that a U-Net is of, by the size of its pickle or by what the conversion noted; None: not known."""
    try:
        if unet.suffix != ".safetensors":
            return released_as(size=unet.stat().st_size)
        with safe_open(unet, "pt") as file:
            return released_as(sha256=(file.metadata() or {}).get(SOURCE))
    except (SafetensorError, OSError):  # said better when it is loaded
        return None


def _named(folder: Path) -> int | None:
    """The resolution of the release that a folder is called after, or that the hub's config.json in it names."""
    names = [folder.name.lower()]
    for config in (folder / "config.json", folder / "checkpoints" / "config.json"):
        if config.is_file():
            names.append(str(_read_json(config).get("Name", "")).lower())
    return next((r.resolution for key, r in RELEASES.items() if any(name.endswith(key[-3:]) for name in names)), None)


def _resolution(folder: Path, unet: Path, stated: Any, expected: int | None) -> tuple[int, str | None]:
    """The side of the face crop that a U-Net is for, and a remark; stated: by latentsync.json, expected: by its place.

    The wrong one gives blur, without an error: a known file decides, then what is stated, then the name of the folder.
    """
    release = recognise(unet)
    if release:
        resolution = RELEASES[release].resolution
        other = next((r for r in (stated, expected, _named(folder)) if r is not None), resolution)
        remark = f"'{unet}' is the U-Net of {release}, so it is run at {resolution} px, not at {other}."
        return resolution, remark if other != resolution else None
    resolution, remark = stated, None
    if resolution is None and (resolution := expected or _named(folder)):
        other = next(r.resolution for r in RELEASES.values() if r.resolution != resolution)
        remark = (
            f"'{unet}' is none of the released files that this program knows; it is run at {resolution} px, and if the "
            f"mouth is blurred, it was made for another side: put {{\"resolution\": {other}}} into '{folder / CONFIG}'."
        )
    if not isinstance(resolution, int) or resolution % 64 or not 64 <= resolution <= 1024:
        raise UserError(
            f"'{folder}' does not say which resolution it was trained for: put {{\"resolution\": 256}} (for 1.5) "
            f"or 512 (for 1.6) into '{folder / CONFIG}'."
        )
    return resolution, remark


def _from_folder(folder: Path, name: str, expected: int | None = None) -> Checkpoint:
    """The checkpoint in a folder; expected: its resolution, if the place of the folder tells."""
    config = _read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    roots = (folder, folder / "checkpoints")
    places = [root / place for root in roots for place in VAE_FOLDERS if (root / place).is_dir()]
    vae = _first(places, (Path(VAE_NAMES[0]).name,))
    vae_config = _first(places, (Path(VAE_CONFIG).name,))
    if not places:
        vae_config, vae = (found_here(part) for part in VAE_PARTS)
    found = {"unet": _first(roots, UNET_NAMES), "whisper": _first(roots, WHISPER_NAMES), "vae": vae}
    found["vae_config"] = vae_config
    for part, names in zip(found, (UNET_NAMES, WHISPER_NAMES, VAE_NAMES, (VAE_CONFIG,)), strict=True):
        if found[part] is None:
            raise UserError(f"The checkpoint folder '{folder}' lacks {' or '.join(names)}; add that file.")
    resolution, remark = _resolution(folder, found["unet"], config.get("resolution"), expected)
    path = folder / CONFIG
    _check_sizes(config.get("unet", {}), path, "unet")
    try:
        unet_config = UNetConfig.from_dict(config.get("unet", {}))
    except (ValueError, TypeError, AttributeError) as error:
        problem = str(error)[:200]  # it quotes the file
        raise UserError(f"'{path}' asks for a network that this program is not: {problem}; {REMEDY}.") from error
    face = config.get("face")
    if face is not None and not (isinstance(face, str) and face and Path(face).name == face):
        raise UserError(f"'{path}' has a face that is no name of a file in its folder; {REMEDY}.")
    return Checkpoint(
        name=name,
        resolution=resolution,
        unet_config=unet_config,
        match_colours=_flag(config, "match_colours", path),
        ends_only=_flag(config, "ends_only", path),
        guidance_scale=_number(config, "guidance_scale", GUIDANCE_SCALE, MOST_GUIDANCE, path),
        mel_range=_number(config, "mel_range", MEL_RANGE, MOST_DECADES, path),
        speech_level=_level(config, "speech_level", path),
        face=folder / face if face else None,
        remark=remark,
        **found,
    )


def _from_hub_cache(name: str) -> Checkpoint | None:
    release = RELEASES[name]
    found = {part.place: found_here(part) for part in release.parts}
    if None in found.values():
        return None
    unet, whisper = found[release.unet.place], found[WHISPER_NAMES[1]]
    return Checkpoint(name, release.resolution, UNetConfig(), unet, whisper, found[VAE_NAMES[0]], found[VAE_CONFIG])


def resolve_released(name: str) -> Checkpoint | None:
    """A released model where it is present: in the user's folder, else in the Hugging Face cache."""
    folder = folder_of(name)
    if _first([folder], UNET_NAMES):
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
            if memory >= release.vram and (found := resolve_released(name)):
                return found
        demo = _from_folder(DEMO_FOLDER, "demo")
        return replace(
            demo,
            remark="This is the small demo model; `python -m latentsync.checkpoints list` shows the released ones.",
        )
    if model == "demo":
        return _from_folder(DEMO_FOLDER, "demo")
    if model in RELEASES:
        if found := resolve_released(model):
            return found
        raise UserError(
            f"The model '{model}' is not on this machine: run `python -m latentsync.checkpoints get {model}`, or put "
            f"latentsync_unet.pt, whisper/tiny.pt and vae/ (of {RELEASES[model].repository} and {VAE_REPOSITORY}) into "
            f"'{folder_of(model)}'."
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
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))  # noqa: TID251
    except FileNotFoundError as error:
        raise UserError(f"The checkpoint file '{path}' is missing; fetch it again.") from error
    except (SafetensorError, zipfile.BadZipFile, *DAMAGED) as error:
        raise UserError(f"The checkpoint file '{path}' is damaged or incomplete; fetch it again.") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"The checkpoint file '{path}' is damaged, or holds code besides tensors, which is never run; "
            "fetch it again from a source that you trust."
        ) from error
    if not isinstance(found, Mapping):
        raise UserError(f"The checkpoint file '{path}' does not hold named tensors; fetch it again.")
    return dict(found), {}


def _check_exactly(module: nn.Module, tensors: Mapping[str, Any], path: Path) -> None:
    """Every tensor of `module` must be there, in its shape, and none over.

    Raises UserError naming the first tensor that is missing, extra or misshaped.
    """
    wanted = module.state_dict()
    wrong = [f"lacks the tensor '{name}'" for name in wanted if name not in tensors]
    wrong += [f"has a tensor {name!r:.80} that this model does not know" for name in tensors if name not in wanted]
    for name in wanted.keys() & tensors.keys():
        found, shape = tensors[name], tuple(wanted[name].shape)
        if not isinstance(found, Tensor):
            wrong.append(f"has '{name}' as {type(found).__name__} instead of a tensor")
        elif not (found.is_floating_point() and found.layout == torch.strided) or found.is_meta or found.is_nested:
            kind = "without numbers" if found.is_meta else f"{found.dtype}, {found.layout}"
            wrong.append(f"has '{name}' as {kind} instead of plain floating-point numbers")
        elif found.shape != shape:
            wrong.append(f"has '{name}' of shape {tuple(found.shape)} instead of {shape}")
    if wrong:
        more = f" ({len(wrong) - 1} more differences)" if len(wrong) > 1 else ""
        raise UserError(f"The checkpoint file '{path}' {wrong[0]}{more}; it is of another model or version.")


def load_exactly(
    module: nn.Module,
    read: Callable[[], Mapping[str, Any]],
    path: Path,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Give `module`, which is on the meta device, the tensors that `read` maps from `path`: exactly its own.

    They go to the device, there channels-last and in `dtype` (None: that of the file), a group at a time: main memory
    never holds the file. Raises UserError naming the first tensor that is missing, extra, misshaped or not finite.
    """
    _check_exactly(module, read(), path)
    for _, group in in_groups(read):
        moved = {name: _to_device(tensor, device, dtype) for name, tensor in group.items()}
        _check_finite(moved, path)
        module.load_state_dict(moved, assign=True, strict=False)
        del group, moved


def _check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises UserError naming the first tensor with a number that is none, or too large for its type."""
    known = {name: torch.stack(tensor.aminmax()).isfinite().all() for name, tensor in tensors.items() if tensor.numel()}
    if known and not torch.stack(list(known.values())).all():  # one wait for the device
        name = next(name for name, finite in known.items() if not finite)
        kind = str(tensors[name].dtype).removeprefix("torch.")
        raise UserError(
            f"The checkpoint file '{path}' holds numbers in '{name}' that are not finite as {kind}; fetch it again."
        )


def _to_device(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    layout = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
    return tensor.to(device).to(dtype=dtype, memory_format=layout)  # converted there, not in main memory


@contextmanager
def _building(path: Path) -> Iterator[None]:
    """On the meta device, build the network whose sizes `path` gives; UserError where they make none."""
    try:
        with torch.device("meta"):
            yield
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise UserError(
            f"The sizes given for '{path}' do not describe a network that can be built; fetch the checkpoint again."
        ) from error


def _check_heads(widths: Iterable[int], heads: int) -> None:
    if any(width % heads for width in widths):
        raise ValueError(f"{heads} heads cannot share the width evenly")


def reader(path: Path, pick: Callable[[dict[str, Any]], Any] = lambda found: found) -> Callable[[], dict[str, Tensor]]:
    """A function that gives the tensors of a file, mapped anew at every call; pick: out of what the file holds.

    Only safetensors and zipped torch files can be mapped; another is read whole, here. Raises UserError, as the
    function does.
    """

    def read() -> dict[str, Tensor]:
        tensors = pick(read_tensors(path)[0])
        if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
            raise UserError(f"The checkpoint file '{path}' does not hold named tensors; fetch it again.")
        return dict(tensors)

    if path.suffix == ".safetensors" or zipfile.is_zipfile(path):
        return read
    whole = read()
    return lambda: whole


def unet_reader(path: Path) -> Callable[[], dict[str, Tensor]]:
    """`reader` for the U-Net of a safetensors file, or of a torch file {"state_dict": …}."""
    return reader(path, lambda found: found.get("state_dict", found))


def load_unet(
    path: Path, config: UNetConfig, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> UNet:
    """The U-Net of a file, on the device, in the file's precision or in `dtype`."""
    read = unet_reader(path)
    with _building(path):
        widths = config.block_out_channels
        _check_heads([*compress(widths, config.cross_attention), widths[-1]], config.heads)
        _check_heads(compress(widths, config.temporal), config.temporal_heads)
        unet = UNet(config)
    if any(config.temporal) and not any("motion_modules" in name for name in read()):
        raise UserError(
            f"'{path}' has no temporal layers, as the U-Net of LatentSync 1.0; this program runs 1.5 and 1.6: fetch "
            "one of them with `python -m latentsync.checkpoints get`."
        )
    load_exactly(unet, read, path, device, dtype)
    return unet.eval()


def load_audio_encoder(path: Path, device: torch.device | None = None) -> AudioEncoder:
    """The encoder of an OpenAI-format Whisper (torch file, or safetensors with the dims as metadata), float32."""
    tensors, metadata = read_tensors(path)
    try:
        dims = json.loads(metadata["dims"]) if "dims" in metadata else tensors.get("dims")
        tensors = dict(tensors.get("model_state_dict", tensors))
        dims = {field.name: int(dims[field.name]) for field in fields(WhisperDims)}
        tensors = {
            name.removeprefix("encoder."): tensor for name, tensor in tensors.items() if name.startswith("encoder.")
        }
    except DAMAGED as error:
        raise UserError(f"'{path}' is not a Whisper file in OpenAI's format; fetch it again.") from error
    _check_sizes(dims, path)
    dims = WhisperDims(**dims)
    with _building(path):
        _check_heads((dims.n_audio_state,), dims.n_audio_head)
        encoder = AudioEncoder(dims)
    load_exactly(encoder, lambda: tensors, path, device, torch.float32)
    return encoder.eval()


def load_vae(
    path: Path, config_path: Path, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> AutoencoderKL:
    """The autoencoder of a diffusers folder, also of one written before diffusers renamed its attention."""
    renamed = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}

    def today(name: str) -> str:
        for old, new in renamed.items() if ".attentions." in name else ():
            name = name.replace(old, new)
        return name

    read = reader(path, lambda found: {today(name): tensor for name, tensor in found.items()})
    config = _read_json(config_path)
    _check_sizes(config, config_path)
    for name, default in (("scaling_factor", VAE_SCALE), ("sample_size", VAE_SIDE)):
        _number(config, name, default, MOST_SIZE, config_path)
    with _building(config_path):
        vae = AutoencoderKL.from_config(config)
    load_exactly(vae, read, path, device, dtype)
    return vae.eval()


def load_face(path: Path, resolution: int) -> np.ndarray:
    """The picture of an aligned face, uint8 RGB (R, R, 3). Raises UserError where it is none of that size."""
    try:
        picture = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR_RGB)
    except (OSError, cv2.error):
        picture = None
    if picture is None or picture.shape != (resolution, resolution, 3):
        raise UserError(f"'{path}' is no picture of {resolution} × {resolution} pixels; fetch the checkpoint again.")
    return picture


def working_dtype(device: torch.device) -> torch.dtype:
    """What U-Net and autoencoder compute in on a device: half precision on a GPU, as the reference does."""
    return torch.float16 if device.type == "cuda" else torch.float32


def load_models(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None = None) -> Models:
    """Load all three networks onto the device, convolutions channels-last; main memory never holds a file whole.

    dtype: of U-Net and autoencoder, that of `working_dtype` unless given. The audio encoder stays float32, which costs
    little and keeps its features the reference's. Raises UserError where a file is damaged or does not fit.
    """
    dtype = dtype or working_dtype(device)
    unet = load_unet(checkpoint.unet, checkpoint.unet_config, device, dtype)
    vae = load_vae(checkpoint.vae, checkpoint.vae_config, device, dtype)
    latents = vae.config.latent_channels
    config = checkpoint.unet_config
    if (config.in_channels, config.out_channels) != (3 * latents + 1, latents):
        raise UserError(f"'{checkpoint.unet}' and '{checkpoint.vae}' do not belong together; fetch both again.")
    if vae.config.shift_factor:
        raise UserError(f"'{checkpoint.vae_config}' shifts its latents, which LatentSync does not; use its own VAE.")
    if any(config.temporal) and config.temporal_max_len < WINDOW:
        raise UserError(f"'{checkpoint.unet}' takes {config.temporal_max_len} frames, but a window has {WINDOW}.")
    encoder = load_audio_encoder(checkpoint.whisper, device)
    if encoder.dims.n_audio_state != config.cross_attention_dim:
        raise UserError(f"'{checkpoint.unet}' and '{checkpoint.whisper}' do not belong together; fetch both again.")
    for module in (unet, vae, encoder):
        module.requires_grad_(False)
    return Models(
        checkpoint.name, checkpoint.resolution, unet, encoder, vae,
        checkpoint.match_colours, checkpoint.ends_only, checkpoint.guidance_scale, checkpoint.mel_range,
        checkpoint.speech_level,
        face=None if checkpoint.face is None else load_face(checkpoint.face, checkpoint.resolution),
        files=checkpoint.files,
    )  # fmt: skip
