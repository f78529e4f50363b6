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

from latentsync import FPS

WAITING, RUNNING, DONE, CANCELLED, FAILED = "waiting", "running", "done", "cancelled", "failed"
COMPARED_SECONDS = 300  # of a result that are put beside the original
ABOUT = "job.json"  # in a job's folder, what `kept` reads
INTERRUPTED = "The server ended before this job did. Its files are still here: run it again."
# What is told of a job as it is in memory; the rest of ABOUT is made of these and of its files' names.
TOLD = ("id", "owner", "names", "size", "seconds", "created", "started", "ended", "doing", "progress", "messages",
        "advice", "error", "remedy", "report", "timeline")  # fmt: skip


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
    ending: threading.Event = field(default_factory=threading.Event)

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
    started: float | None = None
    ended: float | None = None
    doing: str = "waiting"  # in words
    progress: dict[str, int] = field(default_factory=dict)  # frames that each stage has done
    part: float = 0.0  # of the frames of the pass that is being painted, how many its steps amount to
    messages: list[str] = field(default_factory=list)
    advice: list[dict[str, str]] = field(default_factory=list)
    error: str | None = None
    remedy: dict[str, Any] | None = None  # {"label": …, "settings": {…}} or {"label": …, "focus": "video"}
    report: dict[str, Any] | None = None
    timeline: dict[str, Any] | None = None
    output: Path | None = None
    picture: bytes | None = None  # JPEG, of a frame that is done
    pictures: int = 0
    playable: int = 0  # seconds of `first` that can be played
    ending: threading.Event = field(default_factory=threading.Event)
    keep: bool = False  # what is finished, when ending
    expected: float | None = None  # seconds, by earlier jobs
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

    def version(self) -> str | None:
        """A word that changes with what there is to tell of a job that has ended; None for one that has not."""
        if self.state in (WAITING, RUNNING):
            return None
        comparison = self.comparison and self.comparison.view()  # the key: the addresses of its files
        return hashlib.sha256(f"{self.key} {comparison}".encode()).hexdigest()[:12]

    def frames_per_second(self) -> float | None:
        """Of the mouths since the first of them was begun; None before."""
        began = self.timeline and self.timeline["stages"].get("mouths")
        done = self.progress.get("mouths", 0) + self.part
        if not began or not done:
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
        if self.expected is not None:
            return max(self.expected - (time.time() - self.started), 0.0)
        return None


def owner_of(visitor: str) -> str:
    """What is kept of a visitor's token, also on the disk: nobody gets the token back from it."""
    return hashlib.sha256(visitor.encode()).hexdigest()


# ---- on the disk


def write_down(job: Job, state: str) -> None:
    """Write down what there is to know of a job, beside its files; a full disk costs the memory of it, not the job."""
    about = {name: getattr(job, name) for name in TOLD} | {
        "state": state, "settings": job.request.settings(), "server": _this_server(),
        "video": job.request.video.name, "audio": job.request.audio.name, "output": job.output and job.output.name,
    }  # fmt: skip
    with suppress(OSError):
        partial = job.folder / f"{ABOUT}.partial"
        partial.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, job.folder / ABOUT)


def kept(folder: Path) -> Iterator[Job]:
    """The jobs that an earlier server left in its outputs, the oldest first.

    One that it did not finish has failed, with a sentence, if its input is whole, and is removed if it is not. A folder
    that holds no such job, or lacks a file of it, is left alone, and so are those of a server that still runs.
    """
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        if place.is_symlink() or not (place / ABOUT).is_file():
            continue
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # another program's, or damaged
            about = json.loads((place / ABOUT).read_text(encoding="utf-8"))
            if _still_runs(about["server"]):
                continue
            if job := _restored(place, about):
                yield job


def _restored(folder: Path, about: dict[str, Any]) -> Job | None:
    video, audio = (folder / Path(about[name]).name for name in ("video", "audio"))
    told = {name: about[name] for name in TOLD} | {"names": tuple(about["names"]), "size": tuple(about["size"])}
    job = Job(Request(**about["settings"] | {"video": video, "audio": audio}), folder=folder, **told)
    job.state, whole = about["state"], video.is_file() and audio.is_file()
    unfinished = (path for path in folder.glob(".latentsync-*") if path.is_file())  # of `media.VideoWriter`
    for left in (job.first, *folder.glob("*.partial*"), *unfinished):
        left.unlink(missing_ok=True)
    if job.state in (WAITING, RUNNING):
        if not whole:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        job.state, job.doing, job.error, job.ended = FAILED, "failed", INTERRUPTED, time.time()
        write_down(job, job.state)
    elif about["output"]:
        job.output = folder / Path(about["output"]).name
        whole = whole and job.output.is_file()
        if job.compared.is_file():
            job.comparison = Comparison(DONE)
    return job if whole else None


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
