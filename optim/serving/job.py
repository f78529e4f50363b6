"""A job of the page: what a user requests, how far it is, and what came of it."""

import hashlib
import math
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentsync import STAGES
from latentsync.choice import SAME_FACE, parse_face
from latentsync.errors import UserError
from latentsync.settings import CRF, INFERENCE_STEPS, SEED, WINDOW
from optim.serving.limits import check_option

if TYPE_CHECKING:  # takes a while to load
    import numpy as np

WAITING, RUNNING, DONE, CANCELLED, FAILED = "waiting", "running", "done", "cancelled", "failed"
COMPARED_SECONDS = 300  # of a result that are put beside the original
MAX_OTHERS = 7  # further faces of a job with a voice each; every one takes memory
FILE_FIELDS = ("video", "audio", "others", "sound")  # of `Request`, that are files or belong to them


@dataclass(frozen=True)
class OtherVoice:
    """What another face of a video says."""

    face: str  # see `choice.parse_face`
    audio: Path


@dataclass(frozen=True)
class Request:
    """What a user requests. Ranges are those of the command line; None: what level, model or machine suggest.

    Raises UserError for tracks that are no whole numbers from 1, and where two voices are for one face.
    """

    video: Path
    audio: Path
    level: str = "auto"  # a name, or a number from 0 (quality) to 1 (speed)
    model: str = "auto"
    steps: int = INFERENCE_STEPS
    guidance: float | None = None
    seed: int = SEED
    vram_fraction: float | None = None
    batch: int | None = None
    cache: int | str | None = "level"  # "level", None (off), or an interval
    compile: bool | None = None
    face: str = "largest"
    crf: float = CRF
    silence_gate: bool = True
    fps: str = "source"  # one of `rates.RATES`
    match_colours: bool | None = None
    paint: str | None = None  # one of `rates.PAINTED`; None: as the level says
    restore: float = 0.0  # strength, 0 to 1, of the server's face restorer
    video_track: int | None = None  # from 1; None: the file's own choice
    audio_track: int | None = None
    others: tuple[OtherVoice, ...] = ()  # of further faces, at most MAX_OTHERS
    sound: Path | None = None  # what is heard in the result; None: the voices, mixed

    def __post_init__(self) -> None:
        check_option("The number of the video track", self.video_track, 1, whole=True, optional=True)
        check_option("The number of the sound track", self.audio_track, 1, whole=True, optional=True)
        if len(self.others) > MAX_OTHERS:
            raise UserError(f"{len(self.others) + 1} faces have a voice: give one to {MAX_OTHERS + 1} at most.")
        if self.others and len({parse_face(face) for face in self.faces}) < len(self.faces):
            raise UserError(SAME_FACE)

    @property
    def faces(self) -> tuple[str, ...]:
        """The faces that say a voice, that of `audio` first."""
        return self.face, *(other.face for other in self.others)

    @property
    def files(self) -> tuple[Path, ...]:
        """The video, the voice of each face, and the sound, if there is one."""
        sound = () if self.sound is None else (self.sound,)
        return self.video, self.audio, *(other.audio for other in self.others), *sound

    @property
    def heard(self) -> tuple[Path, ...]:
        """What is heard in the result, mixed: the sound, or the voices."""
        return self.files[1:] if self.sound is None else (self.sound,)

    def with_files(self, files: Sequence[Path]) -> "Request":
        """The same with other `files`, in their order."""
        video, audio, *more = files
        others = tuple(replace(other, audio=path) for other, path in zip(self.others, more, strict=False))
        return replace(self, video=video, audio=audio, others=others, sound=self.sound and more[-1])

    def settings(self) -> dict[str, Any]:
        """All fields but the files and what belongs to them, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if name not in FILE_FIELDS}


@dataclass(eq=False)
class Comparison:
    """The side-by-side video of original and result, while it is made and after."""

    state: str = WAITING  # for another one that is being made
    done: int = 0  # frames
    total: int = 0  # frames; 0: unknown
    error: str | None = None
    cancel: threading.Event = field(default_factory=threading.Event)

    @property
    def unfinished(self) -> bool:
        return self.state in (WAITING, RUNNING)

    def view(self) -> dict[str, Any]:
        """The fields that clients see, ready for JSON."""
        return {"state": self.state, "done": self.done, "total": self.total, "error": self.error}


@dataclass(eq=False)
class Job:
    """A request and its progress. The worker's thread writes it, every thread reads it."""

    request: Request
    owner: str  # who may see it, see `owner_of`
    folder: Path  # of this job alone: its inputs and its results
    names: tuple[str, ...]  # the user's names of `request.files`
    size: tuple[int, int]  # of the video, pixels
    seconds: float  # of what is heard, or of the longest voice
    fps: str = "25"  # frames a second of the result, a fraction: "30000/1001"
    id: str = field(default_factory=lambda: secrets.token_hex(4))
    key: str = field(default_factory=lambda: secrets.token_urlsafe(24))  # gives access to its files
    state: str = WAITING
    created: float = field(default_factory=time.time)
    queued: float = field(default_factory=time.time)  # when it began to wait; the order of the queue
    starts: int = 0  # since a server was closed in order, or a segment was finished
    frames_at_start: int = 0  # that were finished when it was last started
    gpus: int = 0  # that it runs on, or ran on: 0 until then, 1 on a page that uses one device
    started: float | None = None
    ended: float | None = None
    doing: str = "waiting"  # the current activity, in words
    progress: dict[str, int] = field(default_factory=dict)  # finished frames by stage
    resumed_from: int = 0  # frames that earlier runs had finished
    faces_known: bool = False  # from an earlier job with the same film
    partial_frames: float = 0.0  # the share of the current pass that is computed, in frames
    messages: list[str] = field(default_factory=list)
    remarks: int = 0  # number of the first messages that are about the files
    advice: list[dict[str, str]] = field(default_factory=list)
    error: str | None = None
    remedy: dict[str, Any] | None = None  # {"label": …, "settings": {…}} or {"label": …, "focus": "video"}
    report: dict[str, Any] | None = None
    timeline: dict[str, Any] | None = None
    output: Path | None = None  # once it exists
    picture: "np.ndarray | None" = None  # a finished frame, scaled down, uint8 (h, w, 3) RGB
    pictures: int = 0  # that there have been
    playable: int = 0  # seconds of `first` that can be played
    cancel_requested: threading.Event = field(default_factory=threading.Event)
    keep_finished: bool = False  # frames as a result, when it is cancelled
    interrupted: bool = False  # cancelled by the end of the server, not by the visitor
    expected_seconds: float | None = None  # estimated from earlier jobs
    comparison: Comparison | None = None  # with the original, once it is requested

    @property
    def unfinished(self) -> bool:
        return self.state in (WAITING, RUNNING)

    @property
    def frames(self) -> int:
        return math.ceil(self.seconds * self.rate)

    @property
    def rate(self) -> Fraction:
        """Frames a second of the result."""
        return Fraction(self.fps)

    @property
    def first(self) -> Path:
        """The preview video: the first seconds of the result, as far as they are finished."""
        return self.folder / "first.mp4"

    @property
    def planned_output(self) -> Path:
        """Where the result is written."""
        return self.folder / f"{_safe_stem(self.names[0])}-synced.mp4"

    @property
    def compared(self) -> Path:
        """Where the side-by-side video is written."""
        return self.folder / f"{_safe_stem(self.names[0])}-side-by-side.mp4"

    def reset(self) -> None:
        """Put it back to where it waits in its old place, not yet started; finished segments stay on the disk."""
        self.started = self.ended = None
        self.doing, self.error, self.remedy = "waiting", None, None
        self.progress, self.partial_frames, self.resumed_from, self.expected_seconds = {}, 0.0, 0, None
        self.messages = self.messages[: self.remarks]
        self.advice, self.report, self.timeline, self.output = [], None, None, None
        self.picture, self.playable, self.gpus, self.faces_known = None, 0, 0, False
        self.cancel_requested, self.keep_finished, self.interrupted = threading.Event(), False, False

    def set_error(self, error: str, remedy: dict[str, Any] | None = None) -> None:
        """Say why it failed; the worker sets the state when everything else is in place."""
        self.doing, self.error, self.remedy = "failed", error, remedy

    def files(self) -> dict[str, Path]:
        """The videos of this job that its owner can look at, by name."""
        files = {"original": self.request.video}
        if self.output:
            files["result"] = self.output
            if self.comparison and self.comparison.state == DONE:
                files["compared"] = self.compared
        elif self.playable:
            files["first"] = self.first
        return files

    def view(self, place: int | None) -> dict[str, Any]:
        """The job as its owner sees it, ready for JSON; file paths are relative to where the page serves them.

        place: how many jobs must end before it starts, while it waits.
        """
        left, rate = self.seconds_left(), self.frames_per_second()
        stopping = self.state == RUNNING and self.cancel_requested.is_set()
        stopping_text = "stopping; what is finished is kept" if self.keep_finished else "cancelling"
        return {
            "id": self.id,
            "state": self.state,
            "doing": stopping_text if stopping else self.doing,
            "ending": stopping,
            "before": place,
            "gpus": self.gpus,
            "names": self.names[:2],
            "others": [{"face": face, "name": name} for face, name in self._other_names()],
            "sound": self.names[-1] if self.request.sound else None,
            "created": self.created,
            "elapsed": None if self.started is None else round((self.ended or time.time()) - self.started, 1),
            "frames": self.frames,
            "size": self.size,
            "fps": round(float(self.rate), 3),
            "stages": {stage: self.progress.get(stage, 0) for stage in STAGES},
            "faces_known": self.faces_known,
            "mouths": round(self.finished_mouths(), 1),
            "frames_per_second": rate and round(rate, 2),
            "seconds_left": None if left is None else round(left),
            "picture": f"{self.key}/picture?{self.pictures}"
            if self.picture is not None and self.state == RUNNING
            else None,
            "playable": self.playable,
            "files": {name: f"{self.key}/{name}/{path.name}" for name, path in self.files().items()},
            "messages": self.messages,
            "advice": self.advice,
            "error": self.error,
            "remedy": self.remedy,
            "settings": self.request.settings(),
            "report": self.report,
            "timeline": self.timeline if self.report else None,
            "comparison": self.comparison and self.comparison.view(),
            "compared_seconds": min(self.seconds, COMPARED_SECONDS),
        }

    def _other_names(self) -> Iterator[tuple[str, str]]:
        """The further faces, and the user's name of what each says."""
        return zip(self.request.faces[1:], self.names[2:], strict=False)

    def stage_spans(self) -> dict[str, list[float]]:
        """Start and end of each stage, seconds since the start of the run."""
        if self.timeline is None:
            self.timeline = {"stages": {}}
        return self.timeline["stages"]

    def version(self) -> str | None:
        """A word that changes when the view of an ended job changes; None for a job that has not ended."""
        if self.unfinished:
            return None
        comparison = self.comparison and self.comparison.view()  # the key: the addresses of its files
        return hashlib.sha256(f"{self.key} {comparison}".encode()).hexdigest()[:12]

    def finished_mouths(self) -> float:
        """Frames whose mouths are painted, with the computed share of the current pass."""
        return self.progress.get("mouths", 0) + self.partial_frames

    def frames_per_second(self) -> float | None:
        """Speed since the first mouth of this run; None before its first window is done, whose parts say little."""
        span = self.timeline and self.timeline["stages"].get("mouths")
        done = self.finished_mouths() - self.resumed_from
        if not span or done < min(WINDOW, self.frames - self.resumed_from) or done <= 0 or self.started is None:
            return None
        now = self.ended or time.time()
        return done / max(now - self.started - span[0], 1e-3)

    def seconds_left(self) -> float | None:
        """Remaining time by this job's own speed, else by that of earlier jobs; None if neither is known."""
        if self.state != RUNNING or self.started is None:
            return None
        if rate := self.frames_per_second():
            return (self.frames - self.finished_mouths()) / rate
        if self.expected_seconds is not None:
            return max(self.expected_seconds - (time.time() - self.started), 0.0)
        return None


def owner_of(visitor: str) -> str:
    """The hash of a visitor's token, which is stored in place of it, in memory and on the disk."""
    return hashlib.sha256(visitor.encode()).hexdigest()


def _safe_stem(name: str) -> str:
    """A user's file name without its suffix, in characters that every system accepts."""
    stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(name).stem)
    return stem[:60].strip("_") or "video"
