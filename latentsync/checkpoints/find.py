"""Find checkpoints by name or path: `resolve_model`.

A checkpoint is a folder:

    latentsync_unet.safetensors or .pt    the U-Net under its released names
    whisper/tiny.safetensors or .pt       an OpenAI-format Whisper, of which the encoder is used
    vae/config.json, vae/diffusion_pytorch_model.safetensors    a diffusers AutoencoderKL
    latentsync.json                       {"resolution": 256, "unet": {…}, "match_colours": false, "ends_only": false,
                                          "guidance_scale": 1.5, "mel_range": 8, "speech_level": null};
                                          the released models need none
    the picture that latentsync.json names as "face", if any

All but the last two may also lie in its subfolder `checkpoints`, as the reference and its ComfyUI wrappers have it, and
the autoencoder in the Hugging Face cache.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from latentsync.checkpoints.description import Traits, read_description, read_json
from latentsync.checkpoints.releases import RELEASES, VAE_PARTS, VAE_REPOSITORY, folder_of, released_as
from latentsync.errors import UserError
from latentsync.unet import UNetConfig

UNET_NAMES = ("latentsync_unet.safetensors", "latentsync_unet.pt")
WHISPER_NAMES = ("whisper/tiny.safetensors", "whisper/tiny.pt")
VAE_NAMES = ("vae/diffusion_pytorch_model.safetensors",)
VAE_CONFIG = "vae/config.json"
VAE_FOLDERS = ("vae", "sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse")
CONFIG = "latentsync.json"
DEMO_FOLDER = Path(__file__).resolve().parents[2] / "assets" / "demo"
SOURCE_HASH = "source_sha256"  # in the metadata of a converted U-Net: the hash of the pickle that it was made from
MODEL_NAMES = ("auto", "demo", *sorted(RELEASES))


@dataclass(kw_only=True)
class Checkpoint(Traits):
    """Where the parts of a model lie."""

    name: str
    resolution: int  # side of the face crop, pixels
    unet_config: UNetConfig
    unet: Path
    whisper: Path
    vae: Path
    vae_config: Path
    face: Path | None = None  # picture of the face that it paints instead of the film's; see `retarget`
    remark: str | None = None  # a sentence for the user, where something about the files is not as expected

    @property
    def files(self) -> tuple[Path, ...]:
        files = self.unet, self.whisper, self.vae, self.vae_config, self.face
        return tuple(file for file in files if file is not None)


def resolve_model(model: str, device: torch.device) -> Checkpoint:
    """Find the checkpoint that `model` names: `auto`, `demo`, a released name, or a folder.

    `auto` is the best one present whose memory need the device meets, else the demo model.
    Raises UserError where there is none, or where the folder lacks a part.
    """
    if model == "auto":
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        for name, release in RELEASES.items():
            if memory >= release.vram and (checkpoint := find_released(name)):
                return checkpoint
        return replace(
            _from_folder(DEMO_FOLDER, "demo"),
            remark="This is the small demo model; `python -m latentsync.checkpoints list` shows the released ones.",
        )
    if model == "demo":
        return _from_folder(DEMO_FOLDER, "demo")
    if model in RELEASES:
        if checkpoint := find_released(model):
            return checkpoint
        raise UserError(
            f"The model '{model}' is not on this machine: run `python -m latentsync.checkpoints get {model}`, or put "
            f"latentsync_unet.pt, whisper/tiny.pt and vae/ (of {RELEASES[model].repository} and {VAE_REPOSITORY}) into "
            f"'{folder_of(model)}'."
        )
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _from_folder(folder.resolve(), folder.resolve().name)
    raise UserError(f"There is no model '{model}': give one of {', '.join(MODEL_NAMES)}, or a checkpoint folder.")


def find_released(name: str) -> Checkpoint | None:
    """A released model where it is present: in the user's folder, else in the Hugging Face cache."""
    folder = folder_of(name)
    if _first([folder], UNET_NAMES):
        return _from_folder(folder, name, RELEASES[name].resolution)
    return _from_hub_cache(name)


def release_of(unet: Path) -> str | None:
    """The release that a U-Net is of, by the size of its pickle or by the hash in a converted file; None: unknown."""
    try:
        if unet.suffix != ".safetensors":
            return released_as(size=unet.stat().st_size)
        with safe_open(unet, "pt") as file:
            return released_as(sha256=(file.metadata() or {}).get(SOURCE_HASH))
    except (SafetensorError, OSError):  # loading it gives the better message
        return None


def _from_folder(folder: Path, name: str, expected: int | None = None) -> Checkpoint:
    """The checkpoint in a folder; expected: its resolution, if the place of the folder implies one."""
    roots = (folder, folder / "checkpoints")
    vae_folders = [root / place for root in roots for place in VAE_FOLDERS if (root / place).is_dir()]
    if vae_folders:
        vae, vae_config = (_first(vae_folders, [Path(file).name]) for file in (VAE_NAMES[0], VAE_CONFIG))
    else:
        from latentsync.checkpoints.download import find_local  # imports Hugging Face's client

        vae_config, vae = (find_local(part) for part in VAE_PARTS)

    def required(path: Path | None, names: Iterable[str]) -> Path:
        if path is None:
            raise UserError(f"The checkpoint folder '{folder}' lacks {' or '.join(names)}; add that file.")
        return path

    unet = required(_first(roots, UNET_NAMES), UNET_NAMES)
    whisper = required(_first(roots, WHISPER_NAMES), WHISPER_NAMES)
    vae, vae_config = required(vae, VAE_NAMES), required(vae_config, [VAE_CONFIG])
    description = read_description(folder / CONFIG)
    resolution, remark = _resolution(folder, unet, description.resolution, expected)
    return Checkpoint(
        name=name,
        resolution=resolution,
        unet_config=description.unet_config,
        unet=unet,
        whisper=whisper,
        vae=vae,
        vae_config=vae_config,
        face=folder / description.face if description.face else None,
        remark=remark,
        **vars(description.traits),
    )


def _from_hub_cache(name: str) -> Checkpoint | None:
    from latentsync.checkpoints.download import find_local

    release = RELEASES[name]
    files = {part.place: path for part in release.parts if (path := find_local(part))}
    if len(files) < len(release.parts):
        return None
    return Checkpoint(
        name=name,
        resolution=release.resolution,
        unet_config=UNetConfig(),
        unet=files[release.unet.place],
        whisper=files[WHISPER_NAMES[1]],
        vae=files[VAE_NAMES[0]],
        vae_config=files[VAE_CONFIG],
    )


def _resolution(folder: Path, unet: Path, stated: Any, expected: int | None) -> tuple[int, str | None]:
    """The side of the face crop that a U-Net was trained for, and a remark for the user.

    stated: by latentsync.json; expected: by the place of the folder. A wrong side gives blur without an error: a known
    file decides, then what is stated, then the name of the folder. Raises UserError where nothing does.
    """
    if release := release_of(unet):
        resolution = RELEASES[release].resolution
        other = next((r for r in (stated, expected, _resolution_by_name(folder)) if r is not None), resolution)
        remark = f"'{unet}' is the U-Net of {release}, so it is run at {resolution} px, not at {other}."
        return resolution, remark if other != resolution else None
    if stated is None and (guess := expected or _resolution_by_name(folder)):
        other = next(release.resolution for release in RELEASES.values() if release.resolution != guess)
        return guess, (
            f"'{unet}' is none of the released files that this program knows; it is run at {guess} px, and if the "
            f"mouth is blurred, it was made for another side: put {{\"resolution\": {other}}} into '{folder / CONFIG}'."
        )
    if not isinstance(stated, int) or stated % 64 or not 64 <= stated <= 1024:
        raise UserError(
            f"'{folder}' does not say which resolution it was trained for: put {{\"resolution\": 256}} (for 1.5) "
            f"or 512 (for 1.6) into '{folder / CONFIG}'."
        )
    return stated, None


def _resolution_by_name(folder: Path) -> int | None:
    """The resolution of the release that a folder is called after, or that the hub's config.json in it names."""
    names = [folder.name.lower()]
    for config in (folder / "config.json", folder / "checkpoints" / "config.json"):
        if config.is_file():
            names.append(str(read_json(config).get("Name", "")).lower())
    for release, details in RELEASES.items():
        if any(name.endswith(release[-3:]) for name in names):
            return details.resolution
    return None


def _first(folders: Iterable[Path], names: Iterable[str]) -> Path | None:
    return next((path for folder in folders for name in names if (path := folder / name).is_file()), None)
