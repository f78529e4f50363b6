"""Write a prepared film while its frames pass: `Recorder`."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from latentsync.errors import UserError
from latentsync.faces import Face
from latentsync.paths import PARTIAL
from latentsync.prefetch import close
from latentsync.prepared.film import CHUNK, MANIFEST, FilmKey, face_shapes, faces_file, latents_file


class Copy(Protocol):
    """Tensors on their way to the host, see `painting.HostCopy`."""

    def wait(self) -> list[Tensor]: ...


class Recorder:
    """Records faces and latents into a new folder, which appears, whole, at `finish`; use it in `with`.

    No more than CHUNK frames of either are held. A disk that is full ends the recording, not the run that is recorded.
    Raises UserError where the folder exists or cannot be made.
    """

    def __init__(self, folder: str | os.PathLike, key: FilmKey):
        self.folder, self._key = Path(folder), key
        self._partial = self.folder.absolute().parent / f"{PARTIAL}{uuid.uuid4().hex[:12]}"
        self._faces: list[Face | None] = []  # of the frames that are not written yet; of the thread that follows
        self._frames = 0  # whose faces were recorded
        self._whole = False
        self._latents: dict[int, dict[int, Tensor]] = {}  # by chunk, not written yet; of the thread that encodes
        self._latent_chunks: set[int] = set()  # written
        self._copies: list[tuple[list[int], Copy]] = []  # may still be on their way from the device
        self._files: dict[str, tuple[int, str]] = {}
        self._error: OSError | None = None

    def __enter__(self) -> "Recorder":
        try:
            if os.path.lexists(self.folder):
                raise UserError(f"'{self.folder}' exists already: remove it, or give another name.")
            os.mkdir(self._partial, 0o700)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"The folder '{self.folder}' cannot be made ({reason}): give another name.") from error
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)

    def covers(self, total: int) -> bool:
        """It takes what comes."""
        return True

    def follow(
        self, frames: Iterator[np.ndarray], track: Callable[..., Iterator[tuple[np.ndarray, Face | None]]], total: int
    ) -> Generator[tuple[np.ndarray, Face | None], None, None]:
        """The first `total` frames with their faces, by `track(frames)`, recorded."""
        tracked = iter(track(frames))
        try:
            item = next(tracked, None)
            for _ in range(total):
                if item is None:
                    break
                self._add_face(item[1])
                following = next(tracked, None)
                self._whole = following is None
                yield item
                item = following
        finally:
            close(tracked)

    def latents(self, number: int) -> Tensor | None:
        """Nothing is read back: the frames are encoded."""
        return None

    def add_latents(self, numbers: list[int], copy: Copy) -> None:
        """Record latents of frames; copy: of one tensor (n, 2c, h, w), which the next call or `finish` waits for."""
        self._take_copies()
        self._copies.append((numbers, copy))

    def finish(self) -> None:
        """Write what is left and give the folder its name, when no thread records any more. Raises UserError."""
        self._take_copies()
        if self._faces:
            self._write_faces()
        for chunk in sorted(self._latents):
            self._write_latents(chunk)
        try:
            if self._error is not None:
                raise self._error
            contents = {"key": asdict(self._key), "frames": self._frames, "whole": self._whole, "files": self._files}
            (self._partial / MANIFEST).write_text(json.dumps(contents), encoding="utf-8")
            if os.path.lexists(self.folder):
                raise FileExistsError(0, "it exists already")
            os.rename(self._partial, self.folder)
        except OSError as error:
            raise UserError(
                f"'{self.folder}' cannot be written ({error.strerror or error}): free some space, or give another name."
            ) from error

    def _add_face(self, face: Face | None) -> None:
        self._faces.append(face)
        self._frames += 1
        if len(self._faces) == CHUNK:
            self._write_faces()

    def _write_faces(self) -> None:
        shapes = face_shapes(len(self._faces))
        tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
        for index, face in enumerate(self._faces):
            if face is not None:
                tensors["usable"][index] = True
                tensors["points"][index] = torch.from_numpy(face.points)
                tensors["landmarks"][index] = torch.from_numpy(face.landmarks)
                tensors["box"][index] = torch.tensor(face.box, dtype=torch.float64)
                tensors["opacity"][index], tensors["first"][index] = face.opacity, face.first
                tensors["shot"][index] = face.shot
        self._write(faces_file((self._frames - 1) // CHUNK), tensors)
        self._faces = []

    def _take_copies(self) -> None:
        while self._copies:
            numbers, copy = self._copies.pop(0)
            (latents,) = copy.wait()
            for number, one in zip(numbers, latents, strict=True):
                chunk = number // CHUNK
                if chunk not in self._latent_chunks:  # else lent as context by a frame that is written
                    self._latents.setdefault(chunk, {}).setdefault(number, one.clone())
        for chunk in sorted(self._latents)[:-2]:  # the last window may slide back into the chunk before
            self._write_latents(chunk)

    def _write_latents(self, chunk: int) -> None:
        latents = self._latents.pop(chunk)
        numbers = sorted(latents)
        tensors = {
            "frames": torch.tensor(numbers, dtype=torch.int32),
            "latents": torch.stack([latents[number] for number in numbers]),
        }
        self._write(latents_file(chunk), tensors)
        self._latent_chunks.add(chunk)

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        if self._error is not None:
            return
        data = save(tensors)
        try:
            (self._partial / name).write_bytes(data)
        except OSError as error:
            self._error = error
            return
        self._files[name] = len(data), hashlib.sha256(data).hexdigest()
