"""What a run is asked for, and what it reports: every default in one place, without torch.

Command lines, the page and the pipeline take their numbers from here.
"""

from dataclasses import asdict, dataclass, field
from math import inf, isfinite
from typing import Any, Protocol

from latentsync.choice import FACES, SPEAKING, parse_face
from latentsync.errors import UserError
from latentsync.rates import PAINTED, RATES

TRAIN_STEPS = 1000  # of the diffusion process (LatentSync)
WINDOW = 16  # frames that the network was trained to see together (LatentSync)
INFERENCE_STEPS = 20  # 12 to 50 are useful
GUIDANCE_SCALE = 1.5  # of the released models; 1 (off) to 3 are useful
SEED = 1247  # LatentSync's
CRF = 16  # x264 quality that the eye cannot tell from the source
SOUNDS = ("replace", "mix")  # what the voice does to the film's own sound where it is laid into it


@dataclass(frozen=True)
class DeepCache:
    """Full passes at every `interval`-th step, shallow ones of `branch` between them (the package's terms).

    Not `guided`, shallow passes are computed with the audio alone, and what guidance added in the last full pass is
    added again: half their work. Raises UserError for numbers that name no such pass.
    """

    interval: int = 3  # from 1
    branch: int = 0  # from 0 to 3 · levels − 1
    guided: bool = True

    def __post_init__(self) -> None:
        if self.interval < 1 or self.branch < 0:
            raise UserError(f"{self} is not possible: give an interval from 1 and a branch from 0.")


class HasGuidanceScale(Protocol):
    """A checkpoint, or the models loaded from it."""

    @property
    def guidance_scale(self) -> float: ...


@dataclass(frozen=True)
class Settings:
    """What a run is asked for. Raises UserError for values out of range."""

    steps: int = INFERENCE_STEPS  # 1 to 999
    guidance_scale: float = GUIDANCE_SCALE
    seed: int = SEED
    windows_per_pass: int = 1  # windows that go through the U-Net together, from 1
    frames_per_pass: int = 16  # frames that go through the autoencoder together, from 1
    cache: DeepCache | None = None
    crf: float = CRF  # x264's, of the output
    face: str = FACES[0]  # see `choice.parse_face`
    other_faces: tuple[str, ...] = ()  # further ones, each with a voice of its own
    fps: str = "source"  # one of RATES, the frame rate of the result
    paint: str | None = None  # one of `rates.PAINTED`, see `rates.painted_step`; None: every frame
    silence_gate: bool = True  # between words the model hears silence, see `latentsync.silence`
    start: float = 0.0  # seconds of the film at which the part begins that is used ...
    end: float | None = None  # ... and at which it ends; None: with the film
    at: float | None = None  # seconds of that part at which the voice is laid into it; None: the voice is all of it
    at_sound: str = "replace"  # one of SOUNDS, with `at`
    restore: str | None = None  # file of a face restorer, see `latentsync.restoring`
    restore_strength: float = 1.0  # of what it changes, 0 (nothing) to 1
    match_colours: bool | None = None  # see `compositing.match_colours`; None: as the model's description says

    def __post_init__(self) -> None:
        for face in (self.face, *self.other_faces):
            parse_face(face)
        if self.other_faces and SPEAKING in (self.face, *self.other_faces):
            raise UserError(f"'{SPEAKING}' is for one voice: leave the other faces out.")
        if self.fps not in RATES:
            raise UserError(f"There is no frame rate '{self.fps}' to choose: give one of {', '.join(RATES)}.")
        if self.paint is not None and self.paint not in PAINTED:
            raise UserError(f"There is no '{self.paint}' frame to paint: give one of {', '.join(PAINTED)}.")
        if self.at_sound not in SOUNDS:
            raise UserError(f"There is no '{self.at_sound}' for sounds: give one of {', '.join(SOUNDS)}.")
        for time in (self.start, self.end, self.at):
            if time is not None and not (isfinite(time) and time >= 0):
                raise UserError(f"{time} is no time in a film: give seconds from 0.")
        if not 0 <= self.restore_strength <= 1:
            raise UserError(f"restore_strength = {self.restore_strength} is not possible: give a number from 0 to 1.")
        for name, most in ("steps", TRAIN_STEPS - 1), ("windows_per_pass", inf), ("frames_per_pass", inf):
            if not 1 <= getattr(self, name) <= most:
                upto = "" if most == inf else f" to {most}"
                raise UserError(f"{name} = {getattr(self, name)} is not possible: give a number from 1{upto}.")

    @classmethod
    def suiting(cls, model: HasGuidanceScale, guidance_scale: float | None = None, **others: Any) -> "Settings":
        """Settings for a model, with the guidance scale that suits it unless another is given. Raises UserError."""
        return cls(guidance_scale=model.guidance_scale if guidance_scale is None else guidance_scale, **others)


@dataclass
class Report:
    """What a run did."""

    settings: Settings
    model: str
    resolution: int  # pixels, the side of the aligned face
    device: str
    dtype: str
    fps: float = 0.0  # frames a second of the result
    painted_fps: float = 0.0  # of which so many went through the networks; the others lie between two of them
    frames: int = 0
    resumed_from: int = 0  # frames that earlier runs of the same job had finished
    frames_without_face: int = 0
    frames_computed_again: int = 0  # in a wider dtype, see `latentsync.validation`
    ended_early: bool = False  # by `pipeline.StopEarly`
    restore_seconds: float = 0.0  # of the device for each frame, of a restorer in this process
    remarks: list[str] = field(default_factory=list)  # sentences for the user on what was left out
    # With the face `speaking`: who was painted when, as {"face": a point on it, "from": seconds, "to": seconds}.
    turns: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # each stage was busy; they overlap
    waiting: dict[str, float] = field(default_factory=dict)  # seconds that other threads waited for a stage
    total_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)
