"""The settings of the page, in one table: controls, parameters of endpoints and the checks of both are made from it."""

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from latentsync.checkpoints.releases import RELEASES
from latentsync.choice import CHOICES, FACES, parse_face
from latentsync.errors import UserError
from latentsync.rates import PAINTED, RATES
from latentsync.settings import CRF, GUIDANCE_SCALE, INFERENCE_STEPS, SEED
from optim.levels import STOPS, VRAM_FRACTION
from optim.serving.guard import is_text, shorten
from optim.serving.job import Request

POSITIONS = {stop.name: stop.position for stop in STOPS}  # of the named levels, on the slider
MODELS = ("auto", "demo", *sorted(RELEASES))
AS_LEVEL = "as the level says"
CACHES = {AS_LEVEL: "level", "off": None} | {
    f"every {words} step": n for n, words in ((2, "2nd"), (3, "3rd"), (4, "4th"))
}
SWITCHES = {AS_LEVEL: None, "on": True, "off": False}
PAINT = {AS_LEVEL: None} | {f"{which} frame": which for which in PAINTED}
ON_OFF = {"on": True, "off": False}
MAX_FACE = 40  # characters of what names a face
FACE_LABELS = {
    "largest": "the largest",
    "left": "on the left",
    "right": "on the right",
    "centre": "in the centre",
}
RATE_LABELS = {"source": "as the video", "25": "25 a second"}
TRACKS = {"video_track": "video", "audio_track": "sound"}  # fields of `Request` that belong to its files
QUALITIES = {12: "highest", CRF: "high", 20: "good", 26: "small file"}  # by CRF


def parse_number(value: Any, what: str, low: float, high: float, kind: type = int, otherwise: str = "") -> Any:
    """Convert a visitor's value to a number of `kind`, int or float, from `low` to `high`. Raises UserError."""
    with suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, bool) and low <= (number := kind(value)) <= high:
            return number
    raise UserError(f"{what} is {shorten(value)}: give a number from {low} to {high}{otherwise}.")


def parse_seconds(value: Any, what: str) -> float:
    """Convert a visitor's value to a finite number of at least 0; None is 0. Raises UserError."""
    with suppress(TypeError, ValueError, OverflowError):
        if 0 <= (number := float(value or 0)) < math.inf:
            return number
    raise UserError(f"{what} is {shorten(value)}: give a number.")


def parse_text(value: Any, what: str) -> str:
    """Check that a visitor's value is a short text. Raises UserError."""
    if isinstance(value, str) and len(value) <= 200 and is_text(value):
        return value
    raise UserError(f"The {what} is {shorten(value)}: give a short text.")


def parse_track(value: Any, kind: str) -> int | None:
    """Convert a visitor's value to a track's number, from 1; None or 0: the file's own choice. Raises UserError."""
    return parse_number(value or 0, f"The {kind} track", 0, 999) or None


def parse_choice(value: Any, what: str, choices: Collection[str]) -> str:
    """Check that a visitor's value is one of `choices`. Raises UserError."""
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"There is no {what} {shorten(value)}: give one of {', '.join(choices)}.")
    return value


def parse_who(value: Any) -> str:
    """Check that a visitor's value names a face, see `choice.parse_face`. Raises UserError."""
    if not isinstance(value, str) or len(value) > MAX_FACE:
        raise UserError(
            f"There is no face {shorten(value)}: give one of {', '.join(CHOICES)}, or a point as 512,300@2.4."
        )
    parse_face(value)
    return value


def parse_others(value: Any) -> list[tuple[str, Any]]:
    """Convert a visitor's further voices, dicts of "face" and "audio", to pairs of a face and a file as it was given.

    Raises UserError.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f'The other voices are {shorten(value)}: give a list of {{"face": …, "audio": …}}.')
    for each in value:
        if not isinstance(each, dict) or each.keys() != {"face", "audio"}:
            raise UserError(f'Another voice is {shorten(each)}: give {{"face": …, "audio": …}}.')
    return [(parse_who(each["face"]), each["audio"]) for each in value]


def parse_level(value: Any) -> str:
    """Convert a level's name, or a number from 0 to 1, to the level of a request. Raises UserError."""
    name = value.strip().lower() if isinstance(value, str) else None
    if name == "auto" or name in POSITIONS:
        return str(name)
    return str(parse_number(value, "The level", 0, 1, float, f", or auto, {', '.join(POSITIONS)}"))


@dataclass(frozen=True)
class Slider:
    low: float
    high: float
    step: float


@dataclass(frozen=True)
class Number:
    low: int
    high: int | None = None


@dataclass(frozen=True)
class Dropdown:
    choices: tuple[tuple[str, Any], ...]  # labels and values
    others: bool = False  # whether another value may be typed


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Setting:
    """A setting of the page and of its endpoints, which call it by the same name."""

    name: str
    label: str
    default: Any  # what the page shows at first
    parse: Callable[[Any], Any]  # from a value of the page or an endpoint to the field of `Request`; raises UserError
    control: Slider | Number | Dropdown  # its range may be smaller than that of `parse`: values that are of use
    info: str = ""  # shown with the control
    field: str = ""  # of `Request`, where its name differs
    show: Callable[[Any], Any] = _same  # from the field of `Request` to what the page shows; leaves other values alone
    hint: Any = None  # type of the parameter of endpoints, where it is not that of the default
    optional: bool = False  # as a parameter of an endpoint: None stands for the default, or for what suits the model


def _number(what: str, low: float, high: float, kind: type = int) -> Callable[[Any], Any]:
    return lambda value: parse_number(value, what, low, high, kind)


def _word(what: str, words: Mapping[str, Any]) -> Callable[[Any], Any]:
    return lambda value: words[parse_choice(value, what, words)]


def _word_for(words: Mapping[str, Any]) -> Callable[[Any], Any]:
    return lambda value: next((word for word, v in words.items() if type(v) is type(value) and v == value), value)


def _or(default: Any) -> Callable[[Any], Any]:
    return lambda value: default if value is None else value


def _labels(values: Collection[str]) -> Dropdown:
    return Dropdown(tuple((value, value) for value in values))


_COMPILE_INFO = "Of use in long jobs where there is neither a GPU nor a second core."
# Not `speaking`, which can be typed: it is right too seldom for people unlike those of the judge's training clips.
_FACES = Dropdown(tuple((FACE_LABELS[face], face) for face in FACES), others=True)
_QUALITIES = Dropdown(tuple((f"{label} (CRF {crf})", crf) for crf, label in QUALITIES.items()))
_RATES = Dropdown(tuple((RATE_LABELS[rate], rate) for rate in RATES))

# In the order of the endpoints' parameters. Which models there are changes while the page is served: `check_model`.
SETTINGS = (
    Setting("level", "Quality or speed", 0, parse_level, Slider(0, 1, 0.1), hint=float | str),
    Setting("model", "Model", "auto", _same, _labels(MODELS)),
    Setting("steps", "Inference steps", INFERENCE_STEPS, _number("The number of steps", 1, 200), Slider(4, 60, 1),
            "More are finer and slower; a faster level runs a part of them."),
    Setting("seed", "Seed", SEED, _number("The seed", 0, 2**63 - 1), Number(0),
            "Another number gives a slightly different mouth."),
    Setting("vram_fraction", "VRAM fraction", VRAM_FRACTION, _number("The VRAM fraction", 0.1, 1, float),
            Slider(0.1, 1, 0.05), "Share of the GPU's memory that may be used.", show=_or(VRAM_FRACTION)),
    Setting("batch", "Batch", 0, lambda value: parse_number(value, "The batch", 0, 256) or None, Number(0, 256),
            "Frames that are painted at once; 0: as many as fit.", show=_or(0)),
    Setting("deepcache", "DeepCache", AS_LEVEL, _word("DeepCache setting", CACHES), _labels(CACHES),
            "Reuses results of the step before: faster, a little less exact.", field="cache", show=_word_for(CACHES)),
    Setting("compile", "Compile", AS_LEVEL, _word("compile setting", SWITCHES), _labels(SWITCHES), _COMPILE_INFO,
            show=_word_for(SWITCHES)),
    Setting("face", "Which face", "largest", parse_who, _FACES,
            "Where several are seen; or a point on it: 512,300, or 512,300@2.4 at 2.4 s."),
    Setting("crf", "Output quality", CRF, _number("The output quality (CRF)", 0, 40, float), _QUALITIES,
            "Smaller numbers are larger files.", hint=float),
    Setting("guidance", "Lip strength (guidance)", GUIDANCE_SCALE,
            lambda value: None if value is None else parse_number(value, "The lip strength", 0, 10, float),
            Slider(1, 3, 0.1), "How strongly the voice drives the mouth; 1 is fastest.",
            hint=float | None, optional=True),
    Setting("silence_gate", "Silence gate", "on", lambda value: value is None or _word("silence gate", ON_OFF)(value),
            _labels(ON_OFF), "Between words the model hears silence, so that noise moves no mouth.",
            show=_word_for(ON_OFF), hint=str | None, optional=True),
    Setting("fps", "Frame rate", "source",
            lambda value: "source" if value is None else parse_choice(value, "frame rate", RATES), _RATES,
            "The video's own, or the 25 a second that the model was trained on.", hint=str | None, optional=True),
    Setting("match_colours", "Match colours", AS_LEVEL,
            lambda value: None if value is None else _word("colour setting", SWITCHES)(value), _labels(SWITCHES),
            "The painted part takes on the colours of the face around it.",
            show=_word_for(SWITCHES), hint=str | None, optional=True),
    Setting("restore", "Restore faces", 0.0,
            lambda value: 0.0 if value is None else parse_number(value, "The strength of restoring", 0, 1, float),
            Slider(0, 1, 0.1), "How much of this server's face restorer is used on the painted part; 0: nothing.",
            hint=float | None, optional=True),
    Setting("paint", "Paint", AS_LEVEL, lambda value: None if value is None else _word("frames to paint", PAINT)(value),
            _labels(PAINT), "From 48 frames a second on, every second one is enough; the others are composed.",
            show=_word_for(PAINT), hint=str | None, optional=True),
)  # fmt: skip
NAMES = tuple(setting.name for setting in SETTINGS)


def hint_of(setting: Setting) -> Any:
    """The type of an endpoint's parameter for a setting."""
    return setting.hint or type(setting.default)


def field_of(setting: Setting) -> str:
    return setting.field or setting.name


def parse_settings(values: Mapping[str, Any], models: Collection[str]) -> dict[str, Any]:
    """Fields of `Request` for values of all SETTINGS by name; models: the names there are. Raises UserError."""
    fields = {field_of(setting): setting.parse(values[setting.name]) for setting in SETTINGS}
    parse_choice(fields["model"], "model", models)
    return fields


def parse_changes(changes: Mapping[str, Any], request: Request, models: Collection[str]) -> dict[str, Any]:
    """Fields of `Request` for some settings, checked as those of a new request are. Raises UserError.

    changes: by the names and with the values of SETTINGS, or by the fields of `Request`, as `request.settings()` has
    them; request: what they change.
    """
    by_name = {setting.name: setting for setting in SETTINGS} | {field_of(setting): setting for setting in SETTINGS}
    fields = {}
    for name, value in changes.items():
        if name in TRACKS:
            fields[name] = parse_track(value, TRACKS[name])
        elif name in by_name:
            setting = by_name[name]
            fields[field_of(setting)] = setting.parse(setting.show(value))
        else:
            raise UserError(f"There is no setting '{name}' to change: give some of {', '.join(NAMES)}.")
    parse_choice(fields.get("model", request.model), "model", models)
    return fields


def page_values(fields: Mapping[str, Any], recommended: float) -> dict[str, Any]:
    """What the page shows for a request's fields, by the names of SETTINGS; recommended: where the level `auto` is."""
    values = {setting.name: setting.show(fields[field_of(setting)]) for setting in SETTINGS}
    level = values["level"]
    values["level"] = recommended if level == "auto" else POSITIONS[level] if level in POSITIONS else float(level)
    return values
