"""One job: what is asked for, how far it is, and what of it stays on the disk when the server is gone."""

import hashlib
import json
import math
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from latentsync import FPS, STAGES
from latentsync.media.segments import discard, unfinished
from latentsync.paths import PARTIAL, is_own_file, is_own_folder

WAITING, RUNNING, DONE, CANCELLED, FAILED = "waiting", "running", "done", "cancelled", "failed"
COMPARED_SECONDS = 300  # of a result that are put beside the original
ABOUT = "job.json"  # in a job's folder, what `load_jobs` reads
MOST_STARTS = 2  # of a job, each of which the end of the server ended before a segment was finished
CRASHED = (
    "The server ended unexpectedly both times when it ran this job, which may be the job's fault: let who serves the "
    "page look at its console, and run it again, perhaps with other settings."
)
# Fields of a job in ABOUT; the rest of it is made of the request and of the names of files.
FIELDS = ("id", "owner", "names", "size", "seconds", "created", "queued", "started", "ended", "doing", "progress",
          "messages", "remarks", "advice", "error", "remedy", "report", "timeline", "starts",
          "frames_at_start")  # fmt: skip
NEW_FIELDS = {"queued": 0.0, "starts": 0, "frames_at_start": 0, "remarks": 0}  # which earlier versions have not written


@dataclass(frozen=True)
class Request:
    """What a user asks for. Ranges are those of the command line; None: what level, model or machine suggest."""

    video: Path
    audio: Path
    level: str = "auto"  # a name, or a number from 0 (quality) to 1 (speed)
    model: str = "auto"
    steps: int = 20
    guidance: float | None = None
    seed: int = 1247
    vram_fraction: float | None = None
    batch: int | None = None
    cache: int | str | None = "level"  # "level", None (off), or an interval
    compile: bool | None = None
    face: str = "largest"
    crf: float = 16
    video_track: int | None = None  # from 1; None: the file's own choice
    audio_track: int | None = None

    def settings(self) -> dict[str, Any]:
        """All but the files, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if name not in ("video", "audio")}


@dataclass(eq=False)
class Comparison:
    """Original and result side by side, while that is made and after."""

    state: str = WAITING  # for another that is being made
    done: int = 0  # frames
    total: int = 0  # frames; 0: not known yet
    error: str | None = None
    cancel: threading.Event = field(default_factory=threading.Event)

    def view(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"state": self.state, "done": self.done, "total": self.total, "error": self.error}


@dataclass(eq=False)
class Job:
    """A request on its way. Written by the worker's thread, read by all."""

    request: Request
    owner: str  # who may see it, see `owner_of`
    folder: Path  # its own: inputs, and what comes out
    names: tuple[str, str]  # the user's names of the two files
    size: tuple[int, int]  # of the video, pixels
    seconds: float  # of sound
    id: str = field(default_factory=lambda: secrets.token_hex(4))
    key: str = field(default_factory=lambda: secrets.token_urlsafe(24))  # opens its files, for who knows it
    state: str = WAITING
    created: float = field(default_factory=time.time)
    queued: float = field(default_factory=time.time)  # when it began to wait; the order of the queue
    starts: int = 0  # since a server ended in order, or a segment was finished
    frames_at_start: int = 0  # that were finished when it was started last
    started: float | None = None
    ended: float | None = None
    doing: str = "waiting"  # in words
    progress: dict[str, int] = field(default_factory=dict)  # frames that each stage has done
    resumed_from: int = 0  # frames that earlier runs had finished
    part: float = 0.0  # of the frames of the pass that is being painted, how many its steps amount to
    messages: list[str] = field(default_factory=list)
    remarks: int = 0  # of the messages, the first ones, which are about the files
    advice: list[dict[str, str]] = field(default_factory=list)
    error: str | None = None
    remedy: dict[str, Any] | None = None  # {"label": …, "settings": {…}} or {"label": …, "focus": "video"}
    report: dict[str, Any] | None = None
    timeline: dict[str, Any] | None = None
    output: Path | None = None
    picture: bytes | None = None  # JPEG, of a frame that is done
    pictures: int = 0
    playable: int = 0  # seconds of `first` that can be played
    cancel_requested: threading.Event = field(default_factory=threading.Event)
    keep: bool = False  # what is finished, when it is cancelled
    interrupted: bool = False  # by the end of the server, not by the visitor
    expected_seconds: float | None = None  # by the speed of earlier jobs
    comparison: Comparison | None = None  # with the original, once it is asked for

    @property
    def frames(self) -> int:
        return math.ceil(self.seconds * FPS)

    @property
    def first(self) -> Path:
        """The first seconds of the result, as far as they are done."""
        return self.folder / "first.mp4"

    @property
    def planned(self) -> Path:
        """Where the result goes."""
        return self.folder / f"{_stem(self.names[0])}-synced.mp4"

    @property
    def compared(self) -> Path:
        """Where original and result go, side by side."""
        return self.folder / f"{_stem(self.names[0])}-side-by-side.mp4"

    def reset(self) -> None:
        """Let it wait in its old place as if it had not been started; what is finished of it stays on the disk."""
        self.started = self.ended = None
        self.doing, self.error, self.remedy = "waiting", None, None
        self.progress, self.part, self.resumed_from, self.expected_seconds = {}, 0.0, 0, None
        self.messages = self.messages[: self.remarks]
        self.advice, self.report, self.timeline, self.output = [], None, None, None
        self.picture, self.playable = None, 0
        self.cancel_requested, self.keep, self.interrupted = threading.Event(), False, False

    def files(self) -> dict[str, Path]:
        """What of this job can be looked at, by name."""
        found = {"original": self.request.video}
        if self.output:
            found["result"] = self.output
            if self.comparison and self.comparison.state == DONE:
                found["compared"] = self.compared
        elif self.playable:
            found["first"] = self.first
        return found

    def view(self, place: int | None) -> dict[str, Any]:
        """What its visitor may know, ready for JSON; paths are relative to where files are served.

        place: how many jobs run before it while it waits.
        """
        left, rate = self.seconds_left(), self.frames_per_second()
        stopping = self.state == RUNNING and self.cancel_requested.is_set()
        stopping_text = "stopping; what is finished is kept" if self.keep else "cancelling"
        return {
            "id": self.id,
            "state": self.state,
            "doing": stopping_text if stopping else self.doing,
            "ending": stopping,
            "before": place,
            "names": self.names,
            "created": self.created,
            "elapsed": None if self.started is None else round((self.ended or time.time()) - self.started, 1),
            "frames": self.frames,
            "size": self.size,
            "stages": {stage: self.progress.get(stage, 0) for stage in STAGES},
            "mouths": round(self.progress.get("mouths", 0) + self.part, 1),
            "frames_per_second": rate and round(rate, 2),
            "seconds_left": None if left is None else round(left),
            "picture": f"{self.key}/picture?{self.pictures}" if self.picture and self.state == RUNNING else None,
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

    def stage_spans(self) -> dict[str, list[float]]:
        """Begin and end of each stage, seconds from the start of the run."""
        if self.timeline is None:
            self.timeline = {"stages": {}}
        return self.timeline["stages"]

    def version(self) -> str | None:
        """A word that changes with what there is to tell of a job that has ended; None for one that has not."""
        if self.state in (WAITING, RUNNING):
            return None
        comparison = self.comparison and self.comparison.view()  # the key: the addresses of its files
        return hashlib.sha256(f"{self.key} {comparison}".encode()).hexdigest()[:12]

    def frames_per_second(self) -> float | None:
        """Of the mouths since the first of them was begun; None before."""
        began = self.timeline["stages"].get("mouths") if self.timeline else None
        done = self.progress.get("mouths", 0) + self.part
        done -= self.resumed_from
        if not began or self.started is None or done <= 0:
            return None
        until = self.ended or time.time()
        return done / max(until - self.started - began[0], 1e-3)

    def seconds_left(self) -> float | None:
        """By this job's own speed, or by that of earlier ones while it has none; None where there is neither."""
        if self.state != RUNNING:
            return None
        rate = self.frames_per_second()
        if rate:
            return (self.frames - self.progress.get("mouths", 0) - self.part) / rate
        if self.expected_seconds is not None and self.started is not None:
            return max(self.expected_seconds - (time.time() - self.started), 0.0)
        return None


def owner_of(visitor: str) -> str:
    """What is kept of a visitor's token, also on the disk: nobody gets the token back from it."""
    return hashlib.sha256(visitor.encode()).hexdigest()


# ---- on the disk


def save_job(job: Job, state: str) -> None:
    """Write down what there is to know of a job, beside its files; a full disk costs the memory of it, not the job."""
    about = {name: getattr(job, name) for name in FIELDS} | {
        "state": state, "settings": job.request.settings(), "server": _this_server(),
        "video": job.request.video.name, "audio": job.request.audio.name, "output": job.output and job.output.name,
    }  # fmt: skip
    with suppress(OSError):
        partial = job.folder / f"{ABOUT}.partial"
        partial.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, job.folder / ABOUT)


def load_jobs(folder: Path) -> Iterator[Job]:
    """The jobs that an earlier server left in its outputs, the oldest first.

    One that waited still waits. One that ran waits, too, to resume after its finished segments, but has failed if it
    may be what ended the server: after MOST_STARTS starts without a segment. Without its inputs it is removed. A folder
    that holds no such job, or lacks a file of it, is left alone, and so are those of a server that still runs, links,
    and folders of other users.
    """
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        # Another program's, or damaged.
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            if not is_own_folder(place) or not is_own_file(place / ABOUT):
                continue
            about = json.loads((place / ABOUT).read_text(encoding="utf-8"), parse_constant=_refuse)
            if _still_runs(about["server"]):
                continue
            if job := _restored(place, about):
                yield job


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _restored(folder: Path, about: dict[str, Any]) -> Job | None:
    video, audio = (folder / Path(about[name]).name for name in ("video", "audio"))
    fields = {name: about.get(name, NEW_FIELDS[name]) if name in NEW_FIELDS else about[name] for name in FIELDS}
    fields |= {"names": tuple(about["names"]), "size": tuple(about["size"])}
    _check_types(fields)
    job = Job(Request(**about["settings"] | {"video": video, "audio": audio}), folder=folder, **fields)
    job.state, whole = about["state"], is_own_file(video) and is_own_file(audio)
    unfinished_files = (path for path in folder.glob(f"{PARTIAL}*") if is_own_file(path))  # of `media.VideoWriter`
    for left in (job.first, *folder.glob("*.partial*"), *unfinished_files):
        left.unlink(missing_ok=True)
    if job.state in (WAITING, RUNNING):
        if not whole:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        _queue_again(job)
    elif about["output"]:
        job.output = folder / Path(about["output"]).name
        whole = whole and job.output.is_file()
        if job.compared.is_file():
            job.comparison = Comparison(DONE)
    if job.state in (DONE, CANCELLED):
        discard(job.planned)
    return job if whole else None


def _queue_again(job: Job) -> None:
    """Let a job that an earlier server had not finished wait, or fail."""
    ran = job.state == RUNNING
    finished = finished_frames(job)
    if ran and finished > job.frames_at_start:
        job.starts = 1
    job.reset()
    job.frames_at_start = finished
    if ran and job.starts >= MOST_STARTS:
        job.state, job.doing, job.error, job.ended = FAILED, "failed", CRASHED, time.time()
    else:
        job.state = WAITING
    save_job(job, job.state)  # it is this server's now


def finished_frames(job: Job) -> int:
    """Frames in the segments that earlier runs of a job have finished."""
    return max((each.frames for each in unfinished(job.planned)), default=0)


def _check_types(fields: dict[str, Any]) -> None:
    """Raise TypeError for fields of ABOUT that would only fail later, in whatever shows the job."""
    for name, kinds in {
        "id": str, "owner": str, "doing": str, "messages": list, "advice": list, "progress": dict,
        "error": str | None, "remedy": dict | None, "report": dict | None, "timeline": dict | None,
        "seconds": int | float, "created": int | float, "queued": int | float,
        "started": int | float | None, "ended": int | float | None,
        "starts": int, "frames_at_start": int, "remarks": int,
    }.items():  # fmt: skip
        if not isinstance(fields[name], kinds):
            raise TypeError(f"{name} is {fields[name]!r}")
    if [len(fields["names"]), len(fields["size"])] != [2, 2] or not all(isinstance(n, str) for n in fields["names"]):
        raise TypeError("names and size are pairs")


def _this_server() -> dict[str, float]:
    import psutil

    return {"pid": os.getpid(), "began": psutil.Process().create_time()}


def _still_runs(server: dict[str, float]) -> bool:
    """Whether a process is there that began at the same moment: a number alone may have gone to another."""
    import psutil

    try:
        return abs(psutil.Process(server["pid"]).create_time() - server["began"]) < 1
    except psutil.Error:
        return False


def _stem(name: str) -> str:
    """A user's file name without its ending, of letters that every system takes."""
    kept = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(name).stem)
    return kept[:60].strip("_") or "video"
