"""A released model of a megabyte or so, and a hub on loopback that has it."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from hub import Hub, serving
from huggingface_hub import close_session, constants
from safetensors.torch import load_file

from latentsync.checkpoints import download
from latentsync.checkpoints.releases import LICENCES, RELEASES, Part, Release, folder_of

NAME = "latentsync-1.5"
UNET = "latentsync_unet.pt"
COMMIT = "1" * 40


def write_originals(checkpoint: Path, folder: Path) -> Path:
    """The tiny checkpoint with the names and in the formats of a release."""
    (folder / "whisper").mkdir()
    (folder / "vae").mkdir()
    torch.save({"global_step": 1, "state_dict": load_file(checkpoint / "latentsync_unet.safetensors")}, folder / UNET)
    heard = load_file(checkpoint / "whisper/tiny.safetensors")
    torch.save({"dims": tiny.DIMS, "model_state_dict": heard}, folder / "whisper/tiny.pt")
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        (folder / "vae" / file).write_bytes((checkpoint / "vae" / file).read_bytes())
    return folder


def release_of(folder: Path, repository: str) -> Release:
    def part(repository: str, file: str, place: str) -> Part:
        data = (folder / place).read_bytes()
        return Part(repository, COMMIT, file, place, len(data), hashlib.sha256(data).hexdigest())

    vae = [part("them/vae", file, f"vae/{file}") for file in ("config.json", "diffusion_pytorch_model.safetensors")]
    own = [part(repository, file, file) for file in ("whisper/tiny.pt", UNET)]
    return Release(repository, tiny.RESOLUTION, 0, (*vae, *own))


@contextmanager
def small_release(originals: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with one small release, under a released name; a user's folder and cache, both empty."""
    release = release_of(originals, "us/LatentSync-1.5")
    monkeypatch.setitem(RELEASES, NAME, release)
    monkeypatch.setitem(LICENCES, release.repository, ("LatentSync 1.5", "us", "a licence"))
    monkeypatch.setitem(LICENCES, "them/vae", ("an autoencoder", "them", "another licence"))
    monkeypatch.setenv("LATENTSYNC_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 60)
    monkeypatch.setattr(download, "PAUSES", (0.02, 0.02))
    monkeypatch.setattr(download, "CHUNK", 1 << 16)
    card = tmp_path / "card.md"
    card.write_text("---\nlicense: openrail++\n---\n")
    files = {(part.repository, COMMIT, part.file): originals / part.place for part in release.parts}
    files[(release.repository, COMMIT, "README.md")] = card
    # Where the tiny U-Net's sizes come from; a release needs no such file.
    folder_of(NAME).mkdir(parents=True)
    sizes = {"resolution": tiny.RESOLUTION, "unet": tiny.UNET}
    (folder_of(NAME) / "latentsync.json").write_text(json.dumps(sizes))
    with serving(Hub(files)) as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        template = found.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield found
        close_session()
