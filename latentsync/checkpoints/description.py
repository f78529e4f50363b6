"""Descriptions of networks in JSON files, checked before anything is built from them: sizes, numbers, flags.

`read_description` reads a checkpoint's latentsync.json.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentsync.audio import MEL_RANGE
from latentsync.errors import UserError
from latentsync.settings import GUIDANCE_SCALE
from latentsync.unet import UNetConfig

# Limits of what a description may ask for: enough for every network of this kind, and built at once.
MAX_SIZE = 1 << 16  # of a number: widths, heads, positions
MAX_LAYERS = 64  # of a block, and entries of a list
MAX_DEPTH = 8  # levels of lists and objects
MAX_GUIDANCE, MAX_MEL_RANGE = 100.0, 100.0
REMEDY = "correct it, or fetch the checkpoint again"


@dataclass(kw_only=True)
class Traits:
    """How a model wants to be used; the defaults are those of the released models."""

    match_colours: bool = False  # its autoencoder does not return every tone; see `compositing.match_colours`
    ends_only: bool = False  # it sees only the first and last face of a window; see `sampling`
    guidance_scale: float = GUIDANCE_SCALE  # what suits it, where the user gives none
    mel_range: float = MEL_RANGE  # decades below the loudest sound that its audio encoder was trained on
    speech_level: float | None = None  # dB to which quieter speech is raised for it; see `audio.raise_quiet_speech`


@dataclass(frozen=True)
class Description:
    """What latentsync.json says."""

    resolution: Any  # as it stands there, not checked; None where it is not given
    unet_config: UNetConfig
    traits: Traits
    face: str | None  # name of a picture in the same folder


def read_description(path: Path) -> Description:
    """Read a latentsync.json; where there is none, all is as in the released models. Raises UserError."""
    values = read_json(path) if path.is_file() else {}
    unet = values.get("unet", {})
    check_sizes(unet, path, "unet")
    try:
        unet_config = UNetConfig.from_dict(unet)
    except (ValueError, TypeError, AttributeError) as error:
        problem = str(error)[:200]  # it quotes the file
        raise UserError(f"'{path}' asks for a network that this program is not: {problem}; {REMEDY}.") from error
    face = values.get("face")
    if face is not None and not (isinstance(face, str) and face and Path(face).name == face):
        raise UserError(f"'{path}' has a face that is no name of a file in its folder; {REMEDY}.")
    traits = Traits(
        match_colours=_flag(values, "match_colours", path),
        ends_only=_flag(values, "ends_only", path),
        guidance_scale=positive_number(values, "guidance_scale", GUIDANCE_SCALE, MAX_GUIDANCE, path),
        mel_range=positive_number(values, "mel_range", MEL_RANGE, MAX_MEL_RANGE, path),
        speech_level=_level(values, "speech_level", path),
    )
    return Description(values.get("resolution"), unet_config, traits, face)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises UserError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise UserError(f"'{path}' cannot be read as JSON; fetch the checkpoint again.") from error
    if not isinstance(values, dict):
        raise UserError(f"'{path}' must hold a JSON object; fetch the checkpoint again.")
    return values


def check_sizes(value: Any, path: Path, name: str = "", depth: int = 0) -> None:
    """Check every number in a description of a network, before anything of that size is built.

    value: what JSON can hold; path: the file to name; name: of this value in it. Raises UserError.
    """
    if isinstance(value, Mapping | list | tuple):
        too_large = len(value) > MAX_LAYERS or depth == MAX_DEPTH
    elif isinstance(value, int):
        too_large = not 0 <= value <= (MAX_LAYERS if "layer" in name else MAX_SIZE)
    else:
        too_large = isinstance(value, float) and not abs(value) <= MAX_SIZE  # true of NaN, too
    if too_large:
        raise UserError(f"'{path}' has a {name or 'description'} beyond what a network can have; {REMEDY}.")
    if isinstance(value, Mapping):
        for key, entry in value.items():
            check_sizes(entry, path, str(key)[:40], depth + 1)
    elif isinstance(value, list | tuple):
        for entry in value:
            check_sizes(entry, path, name, depth + 1)


def positive_number(values: Mapping[str, Any], name: str, default: float, maximum: float, path: Path) -> float:
    """A number above 0 and up to `maximum`. Raises UserError."""
    value = values.get(name, default)
    if not _is_number(value) or not 0 < value <= maximum:
        raise UserError(f"'{path}' has a {name} that is no number above 0 and up to {maximum:g}; {REMEDY}.")
    return float(value)


def _level(values: Mapping[str, Any], name: str, path: Path) -> float | None:
    """A sound level of −100 to 0 dB, or None. Raises UserError."""
    value = values.get(name)
    if value is None:
        return None
    if not _is_number(value) or not -100 <= value <= 0:
        raise UserError(f"'{path}' has a {name} that is no number from -100 to 0; {REMEDY}.")
    return float(value)


def _flag(values: Mapping[str, Any], name: str, path: Path) -> bool:
    value = values.get(name, False)
    if not isinstance(value, bool):
        raise UserError(f"'{path}' has a {name} that is neither true nor false; {REMEDY}.")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
