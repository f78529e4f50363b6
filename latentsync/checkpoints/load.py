"""Load a checkpoint's networks: `load_models`, or in two steps `load_outline` and `load_weights`."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import compress
from pathlib import Path

import cv2
import numpy as np
import torch

from latentsync.autoencoder import Autoencoder, AutoencoderConfig
from latentsync.checkpoints.description import MAX_SIZE, Traits, check_sizes, positive_number, read_json
from latentsync.checkpoints.find import Checkpoint
from latentsync.checkpoints.tensors import DAMAGED, ReadTensors, load_exactly, read_tensors, reader, unet_reader
from latentsync.errors import UserError
from latentsync.paths import hash_files
from latentsync.restoring import Restorer
from latentsync.settings import WINDOW
from latentsync.unet import UNet
from latentsync.whisper import AudioEncoder, WhisperDims

CPU = torch.device("cpu")
VAE_SCALE, VAE_SIDE = 0.18215, 32  # diffusers' defaults, where a configuration gives none
# Names of attention weights in diffusers: before it renamed them → now.
RENAMED_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass
class Models(Traits):
    """A loaded checkpoint, ready on its device."""

    name: str
    resolution: int  # side of the face crop, pixels
    unet: UNet
    audio_encoder: AudioEncoder
    vae: Autoencoder
    face: np.ndarray | None = None  # uint8 (R, R, 3), aligned: what it paints instead of the film's; see `retarget`
    files: tuple[Path, ...] = ()  # that it was loaded from
    restorer: Restorer | None = None  # that painted faces go through
    # Restorers that were loaded for them, by file, kept as long as the models are.
    restorers: dict[tuple[Path, int, int], Restorer] = field(default_factory=dict)
    vae_files: tuple[Path, ...] = ()  # of these, the autoencoder's weights and configuration

    @cached_property
    def vae_sha256(self) -> str:
        """SHA-256 of the autoencoder's files, which are read once. Raises OSError with the file's name."""
        return hash_files(self.vae_files)

    @property
    def retargets(self) -> bool:
        """Whether it paints mouths on a face of its own, whose shapes are then shown with the film's pixels."""
        return self.face is not None

    @property
    def device(self) -> torch.device:
        return self.audio_encoder.conv1.weight.device  # the first of the networks to be there

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype


def load_models(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None = None) -> Models:
    """Load all three networks onto the device, convolutions channels-last; main memory never holds a file whole.

    dtype: of U-Net and autoencoder, that of `working_dtype` unless given. The audio encoder stays float32, which costs
    little and keeps its features the reference's. Raises UserError where a file is damaged or does not fit.
    """
    models = load_outline(checkpoint, dtype or working_dtype(device), device)
    load_weights(models, checkpoint)
    return models


def load_outline(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device = CPU) -> Models:
    """The models of a checkpoint without the weights of U-Net and autoencoder, for which other processes paint, or
    `load_weights` is called.

    The audio encoder is whole and on the device; U-Net and autoencoder, of that dtype, are on the meta device. Raises
    UserError where a file is damaged or does not fit.
    """
    unet = _build_unet(checkpoint).to(dtype)
    vae = _build_vae(checkpoint).to(dtype)
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
        module.eval().requires_grad_(False)
    return Models(
        name=checkpoint.name,
        resolution=checkpoint.resolution,
        unet=unet,
        audio_encoder=encoder,
        vae=vae,
        face=None if checkpoint.face is None else load_face(checkpoint.face, checkpoint.resolution),
        files=checkpoint.files,
        vae_files=(checkpoint.vae, checkpoint.vae_config),
        **{trait.name: getattr(checkpoint, trait.name) for trait in fields(Traits)},
    )


def load_weights(models: Models, checkpoint: Checkpoint) -> None:
    """Load the weights of U-Net and autoencoder that a `load_outline` lacks, onto the device of its audio encoder.

    Raises UserError where a file is damaged or does not fit.
    """
    device, dtype = models.device, models.dtype
    read = unet_reader(checkpoint.unet)
    try:
        load_exactly(models.unet, read, checkpoint.unet, device, dtype)
    except UserError:
        if any(checkpoint.unet_config.temporal) and not any("motion_modules" in name for name in read()):
            raise UserError(
                f"'{checkpoint.unet}' has no temporal layers, as the U-Net of LatentSync 1.0; this program runs 1.5 "
                "and 1.6: fetch one of them with `python -m latentsync.checkpoints get`."
            ) from None
        raise
    load_exactly(models.vae, _vae_reader(checkpoint.vae), checkpoint.vae, device, dtype)


def working_dtype(device: torch.device) -> torch.dtype:
    """The dtype of U-Net and autoencoder on a device: half precision on a GPU, as in the reference."""
    return torch.float16 if device.type == "cuda" else torch.float32


def _build_unet(checkpoint: Checkpoint) -> UNet:
    config = checkpoint.unet_config
    with _building(checkpoint.unet):
        widths = config.block_out_channels
        _check_heads([*compress(widths, config.cross_attention), widths[-1]], config.heads)
        _check_heads(compress(widths, config.temporal), config.temporal_heads)
        return UNet(config)


def load_audio_encoder(path: Path, device: torch.device | None = None) -> AudioEncoder:
    """The encoder of an OpenAI-format Whisper (torch file, or safetensors with the dims as metadata), float32."""
    contents, metadata = read_tensors(path)
    try:
        values = json.loads(metadata["dims"]) if "dims" in metadata else contents["dims"]
        sizes = {field.name: int(values[field.name]) for field in fields(WhisperDims)}
        tensors = {
            name.removeprefix("encoder."): tensor
            for name, tensor in contents.get("model_state_dict", contents).items()
            if name.startswith("encoder.")
        }
    except DAMAGED as error:
        raise UserError(f"'{path}' is not a Whisper file in OpenAI's format; fetch it again.") from error
    check_sizes(sizes, path)
    dims = WhisperDims(**sizes)
    with _building(path):
        _check_heads([dims.n_audio_state], dims.n_audio_head)
        encoder = AudioEncoder(dims)
    load_exactly(encoder, lambda: tensors, path, device, torch.float32)
    return encoder.eval()


def _build_vae(checkpoint: Checkpoint) -> Autoencoder:
    config = read_json(checkpoint.vae_config)
    check_sizes(config, checkpoint.vae_config)
    for name, default in (("scaling_factor", VAE_SCALE), ("sample_size", VAE_SIDE)):
        positive_number(config, name, default, MAX_SIZE, checkpoint.vae_config)
    with _building(checkpoint.vae_config):
        return Autoencoder(AutoencoderConfig.from_dict(config))


def _vae_reader(path: Path) -> ReadTensors:
    """`reader` for the autoencoder of a diffusers folder, also of one written before diffusers renamed its attention.

    Raises UserError where the file holds only half of one.
    """

    def renamed(name: str) -> str:
        for old, new in RENAMED_ATTENTION.items() if ".attentions." in name else ():
            name = name.replace(old, new)
        return name

    read = reader(path, lambda tensors: {renamed(name): tensor for name, tensor in tensors.items()})
    halves = {name.partition(".")[0] for name in read()} & {"encoder", "decoder"}
    if len(halves) == 1:
        raise UserError(
            f"'{path}' holds an autoencoder's {halves.pop()} alone: write both halves into one file, as docs/models.md "
            "shows."
        )
    return read


def load_face(path: Path, resolution: int) -> np.ndarray:
    """The picture of an aligned face, uint8 RGB (R, R, 3). Raises UserError where it is not of that size."""
    try:
        picture = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error):
        picture = None
    if picture is None or picture.shape != (resolution, resolution, 3):
        raise UserError(f"'{path}' is no picture of {resolution} × {resolution} pixels; fetch the checkpoint again.")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)  # OpenCV reads RGB by itself only since 4.11


@contextmanager
def _building(path: Path) -> Iterator[None]:
    """On the meta device, build the network whose sizes `path` gives. Raises UserError where it cannot be built."""
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
