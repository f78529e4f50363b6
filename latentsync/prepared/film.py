"""Read a prepared film: `PreparedFilm`. Nothing in the folder is trusted, and no code in it is run."""

import hashlib
import json
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from latentsync import __version__
from latentsync.checkpoints.load import Models
from latentsync.errors import UserError
from latentsync.faces import Face
from latentsync.landmarks import MOUTH_EDGE
from latentsync.media import VideoInfo
from latentsync.paths import hash_files
from latentsync.retarget.geometry import HEAD, mouth_points
from latentsync.settings import Settings

FORMAT = 1  # of the folder; to be raised when following or encoding changes what it finds
CHUNK = 250  # frames a file
MANIFEST = "film.json"
MAX_MANIFEST_BYTES = 8 << 20  # an entry takes 120
MAX_FRAMES = 2_000_000
MAX_HEADER_BYTES = 1 << 16  # of a safetensors file with a few tensors
LOADED = 2  # files of latents that are held at a time
MESH = 478  # points of a face
MIN_SPREAD = 0.5  # pixels of deviation of a face's points; no detected face is smaller
MAX_REACH = 8  # sizes of the picture by which a point may lie outside of it

# What each field of `FilmKey` is called in a sentence.
FIELDS = {
    "format": "the format",
    "program": "the program's version",
    "sha256": "the film's content",
    "bytes": "the film's size in bytes",
    "track": "the video track",
    "width": "the picture's width",
    "height": "the picture's height",
    "rate": "the frame rate",
    "face": "the face to follow",
    "model": "the model",
    "autoencoder": "the model's autoencoder",
    "resolution": "the resolution",
    "dtype": "the dtype",
    "latents": "the shape of the latents",
}


@dataclass(frozen=True)
class FilmKey:
    """All that a prepared film depends on.

    sha256, bytes: of the film's file; rate: frames a second, a fraction; autoencoder: SHA-256 of its weights and
    configuration; latents: shape of a frame's latents, (2c, h, w). The last two are empty for a model with a face of
    its own, which encodes nothing of the film.
    """

    sha256: str
    bytes: int
    track: int
    width: int  # pixels, of the frames
    height: int
    rate: str
    face: str  # see `choice.parse_face`
    model: str
    autoencoder: str
    resolution: int
    dtype: str
    latents: tuple[int, ...]
    format: int = FORMAT
    program: str = __version__

    @property
    def latent_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def film_key(
    info: VideoInfo, settings: Settings, models: Models, on_wait: Callable[[], None] = lambda: None
) -> FilmKey:
    """What a film prepared for a run depends on; info: at the run's rate. Reads the whole file.

    on_wait: called several times a second; what it raises ends the call. Raises UserError where a file cannot be read.
    """
    latents: tuple[int, ...] = ()
    if not models.retargets:
        if not models.vae_files:
            raise UserError("A film can be prepared only for a model that was loaded from files: give a checkpoint.")
        config = models.vae.config
        side = models.resolution // config.downscaling
        latents = 2 * config.latent_channels, side, side
    try:
        film = hash_files([info.path], on_wait)
        autoencoder = models.vae_sha256 if latents else ""
    except OSError as error:
        raise UserError(
            f"'{error.filename}' cannot be read ({error.strerror}): check its rights, or get it again."
        ) from error
    return FilmKey(
        sha256=film,
        bytes=info.path.stat().st_size,
        track=info.track,
        width=info.width,
        height=info.height,
        rate=str(info.rate),
        face=settings.face,
        model=models.name,
        autoencoder=autoencoder,
        resolution=models.resolution,
        dtype=str(models.dtype).removeprefix("torch."),
        latents=latents,
    )


def expected_bytes(key: FilmKey, frames: int) -> int:
    """Bytes that a prepared film of so many frames takes on the disk at most, but for its manifest and headers."""
    faces = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in face_shapes(1).values())
    latents = int(np.prod(key.latents)) * key.latent_dtype.itemsize if key.latents else 0
    return frames * (faces + latents)


def faces_file(chunk: int) -> str:
    return f"faces-{chunk:05}.safetensors"


def latents_file(chunk: int) -> str:
    return f"latents-{chunk:05}.safetensors"


class FilmChanged(UserError):
    """A prepared film, or the film itself, is not as it was when the prepared film was opened."""


class _Damaged(Exception):
    """Says in words what is wrong with a file of the folder."""


class PreparedFilm:
    """A prepared film, checked as a whole when it is opened; any number of processes may read it.

    Raises UserError, with what differs, for a folder of another film, model, setting or format, and for one that is
    damaged or no prepared film.
    """

    def __init__(self, folder: str | os.PathLike, key: FilmKey, on_wait: Callable[[], None] = lambda: None):
        self.folder, self._key = Path(folder), key
        self._latents: OrderedDict[int, dict[int, Tensor]] = OrderedDict()  # by chunk, those used last
        try:
            manifest = self._read_manifest()
            self._check_key(manifest.get("key"))
            self.frames, self.whole, self._files = self._parse(manifest)
            for chunk in range(self.chunks):
                self._read_faces(chunk)
                if latents_file(chunk) in self._files:
                    self._read_latents(chunk)
                on_wait()
        except _Damaged as problem:
            raise UserError(
                f"'{self.folder}' cannot be used as a prepared film ({problem}): prepare the film again with "
                "`latentsync prepare`."
            ) from None

    @property
    def chunks(self) -> int:
        return -(-self.frames // CHUNK)

    def covers(self, total: int) -> bool:
        """Whether it has the faces of a run of `total` frames."""
        return self.whole or self.frames >= total

    def follow(
        self, frames: Iterator[np.ndarray], track: Callable[..., object], total: int
    ) -> Iterator[tuple[np.ndarray, Face | None]]:
        """The first `total` frames with their faces; nothing is tracked. Raises FilmChanged if the film is longer."""
        faces = self.faces()
        for number, frame in enumerate(islice(frames, total)):  # no frame more, for which nobody would wait
            if number == self.frames:
                raise FilmChanged(
                    f"The film has more frames than when '{self.folder}' was prepared: prepare it again with "
                    "`latentsync prepare`."
                )
            yield frame, next(faces)

    def faces(self) -> Iterator[Face | None]:
        """The face of every frame, None where none is usable. Raises FilmChanged where a file has changed meanwhile."""
        for chunk in range(self.chunks):
            try:
                yield from self._read_faces(chunk)
            except _Damaged as problem:
                raise FilmChanged(
                    f"'{self.folder}' has changed while it was used ({problem}): start the run again."
                ) from None

    def latents(self, number: int) -> Tensor | None:
        """Latents (2c, h, w) of a frame's masked and of its whole face; None where they are not stored, or gone."""
        chunk = number // CHUNK
        if chunk not in self._latents:
            if latents_file(chunk) not in self._files:
                return None
            try:
                self._latents[chunk] = self._read_latents(chunk)
            except _Damaged:  # since it was opened: the frames are encoded anew, to the same numbers
                self._latents[chunk] = {}
            while len(self._latents) > LOADED:
                self._latents.popitem(last=False)
        self._latents.move_to_end(chunk)
        return self._latents[chunk].get(number)

    def add_latents(self, numbers: list[int], latents: Any) -> None:
        """Nothing is added to a prepared film."""

    # ---- reading and checking

    def _read_manifest(self) -> dict[str, Any]:
        try:
            if not stat.S_ISDIR(os.lstat(self.folder).st_mode):
                raise _Damaged("it is no folder, or a link")
            values = json.loads(_read_regular(self.folder / MANIFEST, MAX_MANIFEST_BYTES))
        except OSError as error:
            raise _Damaged(f"{MANIFEST} cannot be read, {error.strerror}") from None
        except (ValueError, RecursionError):
            raise _Damaged(f"{MANIFEST} is not JSON") from None
        if not isinstance(values, dict):
            raise _Damaged(f"{MANIFEST} holds no object")
        return values

    def _check_key(self, stored: object) -> None:
        """Raise UserError with the first field that differs."""
        if not isinstance(stored, dict):
            raise _Damaged(f"{MANIFEST} does not say what was prepared")
        for name, what in FIELDS.items():
            wanted = json.loads(json.dumps(getattr(self._key, name)))
            value = stored.get(name)
            if type(value) is not type(wanted) or value != wanted:
                shown = f"{what} is {_short(value)} there and {_short(wanted)} here"
                raise UserError(
                    f"'{self.folder}' was prepared for something else ({shown}): prepare this film with `latentsync "
                    "prepare`, or leave --prepared out."
                )

    def _parse(self, manifest: dict[str, Any]) -> tuple[int, bool, dict[str, tuple[int, str]]]:
        frames, whole, entries = (manifest.get(name) for name in ("frames", "whole", "files"))
        if type(frames) is not int or not 1 <= frames <= MAX_FRAMES or type(whole) is not bool:
            raise _Damaged(f"{MANIFEST} has no plausible number of frames")
        chunks = range(-(-frames // CHUNK))
        required = {faces_file(chunk) for chunk in chunks}
        allowed = required | ({latents_file(chunk) for chunk in chunks} if self._key.latents else set())
        if not isinstance(entries, dict) or not required <= entries.keys() <= allowed:
            raise _Damaged(f"{MANIFEST} does not list the files of {frames} frames")
        files = {}
        for name, entry in entries.items():
            whole_entry = isinstance(entry, list) and len(entry) == 2
            if not whole_entry or type(entry[0]) is not int or type(entry[1]) is not str:
                raise _Damaged(f"{MANIFEST} does not say what {name} holds")
            files[name] = entry[0], entry[1]
        return frames, whole, files

    def _load(self, name: str, limit: int) -> dict[str, Tensor]:
        """The tensors of a listed file of at most `limit` bytes of numbers."""
        size, sha256 = self._files[name]
        try:
            data = _read_regular(self.folder / name, limit + MAX_HEADER_BYTES)
            if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
                raise _Damaged(f"{name} is not as it was written")
            return load(data)
        except OSError as error:
            raise _Damaged(f"{name} cannot be read, {error.strerror or 'it is too large'}") from None
        except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError):
            raise _Damaged(f"{name} is no safetensors file") from None

    def _read_faces(self, chunk: int) -> list[Face | None]:
        n = min(CHUNK, self.frames - chunk * CHUNK)
        shapes = face_shapes(n)
        limit = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes.values())
        name = faces_file(chunk)
        tensors = self._load(name, limit)
        if {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()} != shapes:
            raise _Damaged(f"{name} has tensors of other names, shapes or types")
        arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
        usable, key = arrays["usable"], self._key
        picture = np.array((key.width, key.height))
        for index in np.flatnonzero(usable):
            landmarks, points = arrays["landmarks"][index], arrays["points"][index]
            mouth = landmarks[list(MOUTH_EDGE)]
            plausible = (
                np.isfinite(points).all()
                and np.isfinite(landmarks).all()
                and (np.abs(points) <= MAX_REACH * picture).all()
                and (np.abs(landmarks) <= MAX_REACH * picture).all()
                and (mouth >= 0).all()
                and (mouth <= picture - 1).all()
                and points.std() >= MIN_SPREAD
                and mouth_points(landmarks)[HEAD].std(0).max() >= MIN_SPREAD
                and np.array_equal(arrays["box"][index], [*landmarks.min(0), *landmarks.max(0)])
                and 0 < arrays["opacity"][index] <= 1
                and 0 <= arrays["shot"][index] <= self.frames
            )
            if not plausible:
                raise _Damaged(f"{name} has a face that cannot be one, at frame {chunk * CHUNK + index}")
        return [
            Face(
                points=arrays["points"][i],
                landmarks=arrays["landmarks"][i],
                box=tuple(arrays["box"][i].tolist()),
                opacity=float(arrays["opacity"][i]),
                first=bool(arrays["first"][i]),
                shot=int(arrays["shot"][i]),
            )
            if usable[i]
            else None
            for i in range(n)
        ]

    def _read_latents(self, chunk: int) -> dict[int, Tensor]:
        key, name, first = self._key, latents_file(chunk), chunk * CHUNK
        n = min(CHUNK, self.frames - first)
        limit = n * (4 + int(np.prod(key.latents)) * key.latent_dtype.itemsize)
        tensors = self._load(name, limit)
        numbers, latents = tensors.get("frames"), tensors.get("latents")
        if (
            len(tensors) != 2
            or numbers is None
            or latents is None
            or numbers.dtype != torch.int32
            or numbers.dim() != 1
        ):
            raise _Damaged(f"{name} has tensors of other names, shapes or types")
        if latents.dtype != key.latent_dtype or tuple(latents.shape) != (len(numbers), *key.latents):
            raise _Damaged(f"{name} has latents of another shape or type")
        listed = numbers.tolist()
        if listed != sorted(set(listed)) or not all(first <= number < first + n for number in listed):
            raise _Damaged(f"{name} has frames of another part of the film")
        if not latents.isfinite().all():
            raise _Damaged(f"{name} has numbers that are not finite")
        return dict(zip(listed, latents, strict=True))


def face_shapes(n: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the tensors of n faces; those of a frame without a usable one are 0."""
    double, flag = torch.float64, torch.bool
    return {
        "points": ((n, 3, 2), double),
        "landmarks": ((n, MESH, 2), double),
        "box": ((n, 4), double),
        "opacity": ((n,), double),
        "first": ((n,), flag),
        "shot": ((n,), torch.int64),
        "usable": ((n,), flag),
    }


def _read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file, not of a link to one. Raises OSError, also for more than `limit` bytes."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(0, "it is a link or no file")
    # Neither a link nor a pipe that has taken the name meanwhile is followed or waited for.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(0, "it is too large")
    return data


def _short(value: object) -> str:
    """A value of film.json in a sentence: it may be anything."""
    text = "".join(letter for letter in str(value) if letter.isprintable())
    return f"'{text[:12]}…'" if len(text) > 40 else f"'{text}'"
