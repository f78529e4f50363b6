"""The released models: files with sizes and hashes, licences, and which one suits a machine and a clip.

Imports nothing heavy, so that asking about models does not wait for torch.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Part:
    """One file of a release: its source, its place in the folder of the model, its size and hash."""

    repository: str
    revision: str  # commit
    file: str  # in the repository
    place: str  # in the folder of the model
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Release:
    """A released model: its hub repository, the side of its face crop, the GPU memory its makers ask for."""

    repository: str
    resolution: int  # pixels
    vram: float  # bytes
    parts: tuple[Part, ...]  # the U-Net last: where it is complete, the others are

    @property
    def unet(self) -> Part:
        return self.parts[-1]


# Revisions, sizes and hashes are those that several public records of these repositories agree on (November 2026);
# a file is used only if it has them.
VAE_REPOSITORY = "stabilityai/sd-vae-ft-mse"
VAE_REVISION = "31f26fdeee1355a5c34592e401dd41e45d25a493"
VAE_PARTS = (
    Part(
        VAE_REPOSITORY, VAE_REVISION, "config.json", "vae/config.json", 547,
        "92d3dfb746fca211a2c9e019e285f8597412211728dce3c5bcf4eda0f2d62e7e",
    ),
    Part(
        VAE_REPOSITORY, VAE_REVISION, "diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors", 334_643_276,
        "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    ),
)  # fmt: skip
WHISPER_SHA256 = "65147644a518d12f04e32d6f3b26facc3f8dd46e5390956a9424a650c0ce22b9"  # OpenAI's tiny.pt


def _release(repository: str, revision: str, resolution: int, vram: float, size: int, sha256: str) -> Release:
    whisper = Part(repository, revision, "whisper/tiny.pt", "whisper/tiny.pt", 75_572_083, WHISPER_SHA256)
    unet = Part(repository, revision, "latentsync_unet.pt", "latentsync_unet.pt", size, sha256)
    return Release(repository, resolution, vram, (*VAE_PARTS, whisper, unet))


RELEASES = {  # the best first
    "latentsync-1.6": _release(
        "ByteDance/LatentSync-1.6", "c42c7e6c8e9c213626389fa7d9a3c444b8536353", 512, 18e9, 5_072_222_488,
        "0a478e89eb660f82da4c35dbdde8a5adfb27f99d1b4e50edd03729e1e98316d3",
    ),
    "latentsync-1.5": _release(
        "ByteDance/LatentSync-1.5", "32a20d29aead0498e3e885e90dbbe8027da1b61b", 256, 8e9, 5_072_348_184,
        "6440b49a7ccceff56cdc001f5f17605216337f5bbd66fa360139768926e23f51",
    ),
}  # fmt: skip

OPENRAIL = "OpenRAIL++: free to use, also commercially, but not for the harmful uses that it lists"
LICENCES = {  # by repository: what, its maker, its licence
    "ByteDance/LatentSync-1.6": ("LatentSync 1.6", "ByteDance", OPENRAIL),
    "ByteDance/LatentSync-1.5": ("LatentSync 1.5", "ByteDance", OPENRAIL),
    VAE_REPOSITORY: ("the image autoencoder sd-vae-ft-mse", "Stability AI", "MIT"),
}
WHISPER_LICENCE = "Whisper tiny, the audio encoder, by OpenAI: MIT"


def home() -> Path:
    """The user's folder for checkpoints: $LATENTSYNC_HOME, else ~/.cache/latentsync."""
    return Path(os.environ.get("LATENTSYNC_HOME") or Path.home() / ".cache" / "latentsync")


def folder_of(name: str) -> Path:
    """Where a released model is kept."""
    return home() / "checkpoints" / name


def released_as(sha256: str | None = None, size: int | None = None) -> str | None:
    """The release that a U-Net belongs to, by the hash or the size of its file; None for an unknown one."""
    for name, release in RELEASES.items():
        if sha256 == release.unet.sha256 or size == release.unet.size:
            return name
    return None


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def notice(name: str) -> str:
    """The licences of a released model and the size of its download; several lines."""
    release = RELEASES[name]
    lines = [f"{name}: {gigabytes(sum(part.size for part in release.parts))} from the Hugging Face hub"]
    for repository in dict.fromkeys(part.repository for part in reversed(release.parts)):
        what, maker, licence = LICENCES[repository]
        lines.append(f"  {what}, by {maker}: {licence} (https://huggingface.co/{repository})")
    return "\n".join([*lines, f"  {WHISPER_LICENCE} (a copy in {release.repository})"])


def recommend(fits: Callable[[int], bool]) -> tuple[str, str]:
    """Name of the model that suits a device, and the reason as a sentence.

    fits(side): whether the device has the memory for face crops of that side, in pixels.
    """
    large, small = RELEASES["latentsync-1.6"].resolution, RELEASES["latentsync-1.5"].resolution
    if not fits(small):
        return "demo", "The demo model, because the released ones need a GPU with more memory than this machine has."
    if not fits(large):
        return "latentsync-1.5", f"LatentSync 1.5, because the GPU's memory does not hold the {large} px of 1.6."
    return "latentsync-1.6", f"LatentSync 1.6, because the GPU's memory holds its {large} px, the finest there is."
