"""The records of jobs on the disk, with which the next server finds and resumes them."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentsync.errors import UserError
from latentsync.media.segments import discard, unfinished
from latentsync.paths import PARTIAL, is_own_file, is_own_folder, replacing
from latentsync.rates import parse_rate
from optim.serving.inputs import PREPARED
from optim.serving.job import CANCELLED, DONE, FAILED, RUNNING, WAITING, Comparison, Job, OtherVoice, Request

RECORD = "job.json"  # in a job's folder
MAX_STARTS = 2  # of a job, each ended by a crash of the server before a segment was finished
CRASHED = (
    "The server ended unexpectedly both times when it ran this job, which may be the job's fault: let who serves the "
    "page look at its console, and run it again, perhaps with other settings."
)
NUMBER = int | float
# Fields of a job that are saved, and their types; the rest follows from the request and from the names of files.
FIELDS: dict[str, Any] = {
    "id": str,
    "owner": str,
    "names": list,
    "size": list,
    "seconds": NUMBER,
    "fps": str,
    "created": NUMBER,
    "queued": NUMBER,
    "started": NUMBER | None,
    "ended": NUMBER | None,
    "doing": str,
    "progress": dict,
    "messages": list,
    "remarks": int,
    "advice": list,
    "error": str | None,
    "remedy": dict | None,
    "report": dict | None,
    "timeline": dict | None,
    "starts": int,
    "frames_at_start": int,
    "gpus": int,
}
# Earlier versions did not save them.
ADDED_FIELDS: dict[str, Any] = {
    "queued": 0.0, "starts": 0, "frames_at_start": 0, "remarks": 0, "fps": "25", "gpus": 1,
}  # fmt: skip


def save_job(job: Job, state: str) -> None:
    """Save a job's record, with that state, beside its files. A full disk costs the record, not the job."""
    record = {name: getattr(job, name) for name in FIELDS} | {
        "state": state,
        "settings": job.request.settings(),
        "server": _this_process(),
        "video": job.request.video.name,
        "audio": job.request.audio.name,
        "others": [{"face": other.face, "audio": other.audio.name} for other in job.request.others],
        "sound": job.request.sound and job.request.sound.name,
        "output": job.output and job.output.name,
    }
    with suppress(OSError), replacing(job.folder / RECORD) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load_jobs(folder: Path) -> Iterator[Job]:
    """Load the jobs that earlier servers left in their outputs, the oldest first.

    A job that waited still waits. One that ran waits, too, to resume after its finished segments, but has failed if it
    may have crashed the server: after MAX_STARTS starts without a segment. Without its inputs it is removed. Folders
    without a valid record or with a result missing are left alone, and so are those of a server that still runs, links,
    and folders of other users. Raises OSError where `folder` cannot be read.
    """
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        # Records of another program, or damaged ones.
        invalid = OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, UserError
        with suppress(*invalid):
            if not is_own_folder(place) or not is_own_file(place / RECORD):
                continue
            record = json.loads((place / RECORD).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
            if not _is_running(record["server"]) and (job := _restore(place, record)):
                yield job


def finished_frames(job: Job) -> int:
    """Frames in the segments that earlier runs of a job have finished."""
    return max((work.frames for work in unfinished(job.planned_output)), default=0)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _restore(folder: Path, record: dict[str, Any]) -> Job | None:
    """The job of a record, or None if files of it are missing. Raises for records that are not valid."""

    def stored(name: str) -> Path:
        return folder / Path(name).name

    files = {
        "video": stored(record["video"]),
        "audio": stored(record["audio"]),
        # Earlier versions had one voice.
        "others": tuple(OtherVoice(each["face"], stored(each["audio"])) for each in record.get("others", ())),
        "sound": stored(record["sound"]) if record.get("sound") else None,
    }
    job = Job(Request(**record["settings"] | files), folder=folder, **_parse_fields(record))
    if len(job.names) != len(job.request.files):
        raise TypeError("every file has a name")
    job.state = record["state"]
    has_inputs = all(map(is_own_file, job.request.files))
    _remove_partial_files(job)
    if job.unfinished:
        if not has_inputs:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        _queue_again(job)
        return job
    if job.state in (DONE, CANCELLED):
        discard(job.planned_output)
    if record["output"]:
        job.output = folder / Path(record["output"]).name
        if job.compared.is_file():
            job.comparison = Comparison(DONE)
    return job if has_inputs and (job.output is None or job.output.is_file()) else None


def _parse_fields(record: dict[str, Any]) -> dict[str, Any]:
    """FIELDS of a record. Raises TypeError for those that would fail only later, in whatever shows the job."""
    record = ADDED_FIELDS | record
    for name, kind in FIELDS.items():
        if not isinstance(record[name], kind):
            raise TypeError(f"{name} is {record[name]!r}")
    names, size = tuple(record["names"]), tuple(record["size"])
    if len(size) != 2 or not all(isinstance(name, str) for name in names):
        raise TypeError("size is a pair, and names are texts")
    if parse_rate(record["fps"]) is None:
        raise TypeError(f"fps is {record['fps']!r}")
    return {name: record[name] for name in FIELDS} | {"names": names, "size": size}


def _remove_partial_files(job: Job) -> None:
    """Remove what the end of the server left unfinished: previews, records, videos, prepared films; no segments."""
    partial_files = [path for path in job.folder.glob(f"{PARTIAL}*") if is_own_file(path)]
    for path in (job.first, *job.folder.glob("*.partial*"), *partial_files):
        path.unlink(missing_ok=True)
    for path in (job.folder / PREPARED).glob(f"{PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def _queue_again(job: Job) -> None:
    """Let a job that an earlier server had not finished wait, or fail."""
    ran = job.state == RUNNING
    finished = finished_frames(job)
    if ran and finished > job.frames_at_start:
        job.starts = 1
    job.reset()
    job.frames_at_start = finished
    job.state = WAITING
    if ran and job.starts >= MAX_STARTS:
        job.set_error(CRASHED)
        job.state, job.ended = FAILED, time.time()
    save_job(job, job.state)  # with this server as its owner


def _this_process() -> dict[str, float]:
    import psutil

    return {"pid": os.getpid(), "began": psutil.Process().create_time()}


def _is_running(server: dict[str, Any]) -> bool:
    """Whether a server's process still runs; its time of start tells it from another one with the same number."""
    import psutil

    try:
        return abs(psutil.Process(server["pid"]).create_time() - server["began"]) < 1
    except psutil.Error:
        return False
