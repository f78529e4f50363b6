"""What the endpoints of the page do: plain values in, JSON out; failures are raised (docs/api.md).

Of Gradio nothing is known here but its type for files.
"""

import functools
import inspect
import logging
import os
import secrets
import typing
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

import anyio
from gradio import FileData

from latentsync.errors import UserError
from latentsync.media import AudioInfo, VideoInfo, probe_audio, probe_video
from latentsync.rates import parse_rate
from latentsync.settings import INFERENCE_STEPS, SEED
from optim.serving import form
from optim.serving.fetcher import Fetcher
from optim.serving.guard import is_text, shorten
from optim.serving.inputs import disk_problem, with_user_names
from optim.serving.job import MAX_OTHERS, Job, OtherVoice, Request
from optim.serving.look import listen_to, look_at
from optim.serving.uploads import Uploads
from optim.serving.worker import Worker

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25  # between two looks at a job that a caller waits for
# Fields of a job that never change.
FIXED = ("settings", "names", "created", "size", "fps", "frames", "compared_seconds")
# Files that are probed at once, and requests that may wait for that; everything else goes on meanwhile.
MAX_PROBES, MAX_WAITING_PROBES = 4, 24
ONE_JOB = (
    "'More voices for this video' is a job for each voice, 'Another face in this video' one job for all: clear one of "
    "them."
)
BUSY = "This server looks at as many files as it can now: try again in a minute."
DEMO_HINT = " Demo model: it moves the mouth with pictures of the mouth that are in the video."
FETCH_HINT = " For a newly painted mouth fetch {}, under Advanced."


class OtherFace(TypedDict):
    """Another face of a video, and what it says, as clients give them."""

    face: str
    audio: FileData


def as_reply(fn: Callable[..., Awaitable[dict[str, Any]]]) -> Callable[..., Awaitable[dict[str, Any]]]:
    """Let a function return {"error": sentence} in place of raising UserError, for the page's own scripts."""

    @functools.wraps(fn)
    async def reply(*args: Any) -> dict[str, Any]:
        try:
            return await fn(*args)
        except UserError as error:
            return {"error": str(error)}

    return reply


def takes_settings(fn: Callable) -> Callable:
    """Give a method each of `form.SETTINGS` as a parameter of its own, in the place of `settings`, a dict of them."""
    signature = inspect.signature(fn)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = dict(signature.parameters)
    before = list(parameters).index("settings")
    del parameters["settings"]
    settings = [
        inspect.Parameter(
            setting.name, kind, default=None if setting.optional else setting.default, annotation=form.hint_of(setting)
        )
        for setting in form.SETTINGS
    ]
    others = list(parameters.values())
    expanded = signature.replace(parameters=[*others[:before], *settings, *others[before:]])
    hints = {name: hint for name, hint in typing.get_type_hints(fn).items() if name != "settings"}

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = expanded.bind(*args, **kwargs)
        bound.apply_defaults()
        values = bound.arguments
        return fn(settings={name: values.pop(name) for name in form.NAMES}, **values)

    expanding: Any = call
    expanding.__signature__ = expanded
    expanding.__annotations__ = hints | {setting.name: form.hint_of(setting) for setting in form.SETTINGS}
    return expanding


def with_signature_of(fn: Callable) -> Callable[[Any], Any]:
    """Give a wrapper of a bound method its name, docstring and parameters; `functools.wraps` would add `self`."""

    def decorate(wrapper: Any) -> Any:
        functools.update_wrapper(wrapper, fn)
        wrapper.__signature__ = inspect.signature(fn)
        return wrapper

    return decorate


def visitor_token(token: Any) -> str:
    """Check a visitor's token, or make one for an empty one. Raises UserError: short tokens could be guessed."""
    token = token or ""
    if not isinstance(token, str) or not is_text(token):
        raise UserError("A visitor's token is text: leave it empty to get one.")
    token = token.strip()
    if token and not 22 <= len(token) <= 100:
        raise UserError("A visitor's token has 22 to 100 letters: leave it empty to get one.")
    return token or secrets.token_urlsafe(24)


def tracks_of(info: AudioInfo | VideoInfo) -> dict[str, Any]:
    """The tracks of a file that can be chosen, and the number of the one that is used."""
    return {"track": info.track, "tracks": [{"number": each.number, "label": str(each)} for each in info.tracks]}


class Endpoints:
    """The endpoints' functions; their parameters have the names that clients give.

    A visitor's files are uploads: paths in the folder of `uploads`, or Gradio's dicts of such a path.
    """

    def __init__(self, worker: Worker, fetcher: Fetcher, uploads: Uploads):
        self.worker, self.fetcher, self.uploads = worker, fetcher, uploads
        self._probes = anyio.CapacityLimiter(MAX_PROBES)
        self._pending_probes = 0  # that run or wait

    # ---- how they are called

    def when_ready(self, fn: Callable) -> Callable[..., Awaitable[Any]]:
        """A function that is called once the machine has been looked at; until then it holds no thread."""

        @with_signature_of(fn)
        async def call(*args: Any) -> Any:
            while not self.worker.ready.is_set():
                await anyio.sleep(0.05)
            return await anyio.to_thread.run_sync(fn, *args)

        return call

    def probing(self, fn: Callable) -> Callable[..., Awaitable[Any]]:
        """A function that probes files: few run at once, waiting ones hold no thread, too many raise UserError."""

        @with_signature_of(fn)
        async def call(*args: Any) -> Any:
            if self._pending_probes >= MAX_PROBES + MAX_WAITING_PROBES:
                raise UserError(BUSY)
            self._pending_probes += 1
            try:
                return await anyio.to_thread.run_sync(fn, *args, limiter=self._probes)
            finally:
                self._pending_probes -= 1

        return call

    # ---- helpers

    @property
    def models_to_choose(self) -> tuple[str, ...]:
        machine = self.worker.machine
        return *form.MODELS, *([machine.chosen] if machine else [])

    def has_job(self, key: str) -> bool:
        """Whether there is a job whose files that key opens."""
        return self.worker.store.by_key(key) is not None

    def _uploaded(self, file: dict[str, Any] | str | None, kind: str) -> Path:
        """The path of an uploaded file. Raises UserError for none, and for what is no upload."""
        path = file.get("path") if isinstance(file, dict) else file
        if not path:
            raise UserError(f"There is no {kind} yet: drop one, or record it.")
        if not isinstance(path, str) or not self.uploads.holds(path):
            raise UserError(f"This is no uploaded {kind}, or it is gone: upload it first.")
        return Path(os.path.realpath(path))

    # ---- jobs

    @takes_settings
    def submit(
        self,
        video: FileData,
        audio: FileData,
        settings: Any,
        visitor: str = "",
        video_track: int | None = None,
        audio_track: int | None = None,
        others: list[OtherFace] | None = None,
        sound: FileData | None = None,
    ) -> dict[str, Any]:
        """Put a job into the queue: {"job", "visitor"}. An empty visitor gets a token, to ask with later.

        video_track, audio_track: numbers from 1, of files with several; without them the files' own choice.
        others: further faces with a voice each, [{"face": "right", "audio": FILE}], while `audio` is that of the
        setting `face`; sound: what is heard, in place of the voices.
        """
        return self.submit_all(video, [audio], settings, visitor, video_track, audio_track, others, sound)

    def submit_all(
        self,
        video: Any,
        voices: Sequence[Any],
        settings: Any,
        visitor: Any,
        video_track: Any = None,
        audio_track: Any = None,
        others: Any = None,
        sound: Any = None,
    ) -> dict[str, Any]:
        """Queue a job for each of several voices with one video; replies as `submit`, for the first one.

        audio_track: of the first voice. Raises UserError; jobs of earlier voices stay in the queue then.
        """
        token = visitor_token(visitor)
        path = self._uploaded(video, "video")
        fields = form.parse_settings(settings, self.models_to_choose)
        fields["video_track"] = form.parse_track(video_track, "video")
        tracks = [form.parse_track(audio_track, "sound"), *[None] * (len(voices) - 1)]
        said = [self._uploaded(voice, "voice") for voice in voices]
        fields["others"] = tuple(
            OtherVoice(face, self._uploaded(file, "voice")) for face, file in form.parse_others(others)
        )
        fields["sound"] = self._uploaded(sound, "sound") if sound else None
        if fields["others"] and len(voices) > 1:
            raise UserError(ONE_JOB)
        jobs: list[Job] = []
        for voice, track in zip(said, tracks, strict=True):
            request = Request(path, voice, **fields, audio_track=track)
            try:
                job = self.worker.submit(request, token)
            except UserError as error:
                if not jobs:
                    raise
                raise UserError(f"{len(jobs)} of {len(voices)} jobs are queued, the next one is not: {error}") from None
            jobs.append(job)  # it has names of its own for the files now
            for file in request.files:
                self.uploads.use(file, job.key)
        return {"job": jobs[0].id, "visitor": token}

    async def lipsync(
        self,
        video: FileData,
        audio: FileData,
        level: float | str = "auto",
        model: str = "auto",
        steps: int = INFERENCE_STEPS,
        seed: int = SEED,
        face: str = "largest",
        others: list[OtherFace] | None = None,
        sound: FileData | None = None,
        progress: Any = None,
        is_gone: Callable[[], Awaitable[bool]] | None = None,
    ) -> Path:
        """Give the face in a video (or a picture) the words of a sound, and return the new video, an MP4 file.

        video: the file with the face; audio: the voice; level: from 0, best, to 1, fastest, or conservative, balanced,
        aggressive, auto; model: auto, demo, or a released one; steps: of denoising; face: largest, left, right,
        centre, or a point on it as 512,300@2.4; others: further faces with a voice each, [{"face": "right", "audio":
        FILE}]; sound: what is heard, in place of the voices.
        progress: called with (finished, all) frames and the current activity; is_gone: whether the caller has
        disconnected. It waits until the video is finished; the job is cancelled where nobody waits for it any more.
        Raises UserError.
        """
        defaults = {setting.name: None if setting.optional else setting.default for setting in form.SETTINGS}
        settings = defaults | {"level": level, "model": model, "steps": steps, "seed": seed, "face": face}
        reply = await self.probing(self.submit_all)(video, [audio], settings, "", None, None, others, sound)
        job = self.worker.store.find(reply["job"], reply["visitor"])
        try:
            while job.unfinished:
                if progress is not None:  # one that has nothing yet is false
                    progress((int(job.finished_mouths()), job.frames), desc=job.doing, unit="frames")
                if is_gone is not None and await is_gone():
                    break
                await anyio.sleep(POLL_SECONDS)
        finally:
            if job.unfinished:
                self.worker.cancel(job.id, reply["visitor"])
        if job.error or not job.output:
            raise UserError(job.error or "The job was cancelled.")
        return self.offer(job, job.output)

    def watch(self, visitor: str, since: float = 0.0, known: dict | None = None) -> dict[str, Any]:
        """A visitor's jobs, the length of the queue, the machine's curves after the time `since`, and what is fetched.

        known: "version" of jobs by "id", from an earlier reply: a job that still has it comes without its other fields,
        and one that has not ended (version None) without the FIXED ones.
        server: changes when the server was started again, after which `since` and the addresses of files are void.
        sharing: how jobs share several GPUs, a sentence, empty on one device.
        models: a number that changes when /models has news; None before the machine was looked at.
        measured: a number that changes when /describe may know better how long a job takes.
        """
        versions, after = known or {}, form.parse_seconds(since, "The time since when")
        if not isinstance(versions, dict):
            raise UserError(f"The versions that are known are {shorten(known)}: give them by the jobs' ids.")
        jobs = []
        for job in self.worker.store.jobs_of(visitor_token(visitor)):
            version = job.version()
            unchanged = version is not None and version == versions.get(job.id)
            view = {} if unchanged else job.view(self.worker.store.place(job))
            if version is None and job.id in versions:
                view = {name: value for name, value in view.items() if name not in FIXED}
            jobs.append({"id": job.id, "version": version} | view)
        running, waiting = self.worker.store.load_counts()
        return {
            "server": self.worker.server,
            "jobs": jobs,
            "running": running,
            "waiting": waiting,
            "sharing": self.worker.machine.sharing if self.worker.machine else "",
            "live": self.worker.live(after),
            "models": self.fetcher.version if self.worker.ready.is_set() else None,
            "fetching": self.fetcher.view(),
            "measured": self.worker.speeds.jobs if self.worker.speeds else 0,
        }

    def cancel(self, job: str, keep: bool, visitor: str) -> dict[str, Any]:
        """End a job; keep: what is finished of it stays as a result."""
        cancelled = self.worker.cancel(form.parse_text(job, "job"), visitor_token(visitor), bool(keep))
        return {"job": cancelled.id}

    def again(self, job: str, changes: dict | None = None, visitor: str = "") -> dict[str, Any]:
        """Run the files of a job of yours again, with some settings changed, as {"level": "balanced"}."""
        if changes is not None and not isinstance(changes, dict):
            raise UserError(f"The changes are {shorten(changes)}: give settings by their names.")
        request = self.worker.store.find(form.parse_text(job, "job"), visitor_token(visitor)).request
        fields = form.parse_changes(changes or {}, request, self.models_to_choose)
        return {"job": self.worker.again(job, visitor, **fields).id, "visitor": visitor}

    def move(self, job: str, earlier: bool, visitor: str) -> dict[str, Any]:
        """Let a waiting job of yours change places with your next one before it, or after it."""
        moved = self.worker.store.find(form.parse_text(job, "job"), visitor_token(visitor))
        self.worker.store.move(moved, bool(earlier))
        return {"job": moved.id}

    def remove(self, job: str, visitor: str) -> dict[str, Any]:
        """Forget a job that waits or has ended, and delete its files."""
        self.worker.remove(form.parse_text(job, "job"), visitor_token(visitor))
        self.uploads.forget(self.has_job)
        return {"removed": job}

    def compare(self, job: str, visitor: str) -> dict[str, Any]:
        """Put original and result side by side, in the background; /watch says how far it is, /cancel ends it."""
        done = self.worker.compare(form.parse_text(job, "job"), visitor_token(visitor))
        return {"job": done.id, "comparison": done.comparison and done.comparison.view()}

    def result(self, job: str, visitor: str, compared: bool = False) -> Path:
        """The finished video of a job of yours, as a file; compared: beside the original, see /compare."""
        done = self.worker.store.find(form.parse_text(job, "job"), visitor_token(visitor))
        if done.output is None:
            raise UserError("There is no result yet: watch the job until it is done.")
        path = done.files().get("compared") if compared else done.output
        if path is None:
            raise UserError("There is no side-by-side video yet: ask for it by /compare, and watch until it is.")
        return self.offer(done, path)

    def offer(self, job: Job, path: Path) -> Path:
        """Make a file of a job one that this server gives away. Raises UserError."""
        try:
            return self.uploads.offer(path, job.key)
        except OSError as error:
            log.warning("A result cannot be given away: %s", error)
            if not path.is_file():
                raise UserError(f"'{path.name}' is not on this server any more: run the job again.") from None
            raise UserError(
                f"'{path.name}' cannot be given away ({disk_problem(error)}): let who serves the page look at the "
                "folder for temporary files, which GRADIO_TEMP_DIR names."
            ) from None

    # ---- before a job

    @takes_settings
    def describe(
        self, settings: Any, seconds: float | None = None, video_fps: float | None = None, people: int = 1
    ) -> dict[str, str | None]:
        """What settings mean on this machine, in one "line", and in "details".

        preview: how long /preview takes, "" if unknown, None where it is not offered.
        seconds, video_fps: of the sound and of the video, where they are known; people: who say a voice.
        """
        people = form.parse_number(people, "The number of people", 1, MAX_OTHERS + 1)
        length = form.parse_seconds(seconds, "The length of the sound") or None
        rate = form.parse_seconds(video_fps, "The video's frame rate")
        request = Request(Path(), Path(), **form.parse_settings(settings, self.models_to_choose))
        line, details, preview = self.worker.describe(request, length, rate if parse_rate(str(rate)) else None, people)
        machine = self.worker.machine
        if machine and "demo" == (machine.chosen if request.model == "auto" else request.model):
            line += DEMO_HINT + (FETCH_HINT.format(machine.best) if machine.best != "demo" else "")
        return {"line": line, "details": details, "preview": preview}

    def measure(self, audio: FileData, audio_track: int | None = None) -> dict[str, Any]:
        """The "seconds" of a sound, "warnings", the "track" that is used, and the "tracks" there are."""
        path, number = self._uploaded(audio, "voice"), form.parse_track(audio_track, "sound")
        try:
            info = probe_audio(path, number, max_seconds=self.worker.max_seconds)  # no more of it is decoded
            warnings = listen_to(info)
        except UserError as error:
            raise UserError(with_user_names(error, {path: path.name})) from None
        return {"checked": "audio", "seconds": info.duration, "warnings": warnings} | tracks_of(info)

    def check_video(self, video: FileData, video_track: int | None = None) -> dict[str, Any]:
        """A look at a video: its first "picture" as a data URI, since browsers know few formats, "duration", "fps",
        size, "faces", "warnings" and "tracks"."""
        path, number = self._uploaded(video, "video"), form.parse_track(video_track, "video")
        try:
            info = probe_video(path, number)
            return {"checked": "video"} | look_at(info) | tracks_of(info)
        except UserError as error:
            raise UserError(with_user_names(error, {path: path.name})) from None

    # ---- the machine and its models

    def machine(self) -> dict[str, Any]:
        """What this machine is, its models and the doctor's advice; waits until it has been looked at."""
        self.worker.ready.wait()
        facts = asdict(self.worker.machine) if self.worker.machine else {"error": self.worker.problem}
        return facts | {"queue_size": self.worker.store.queue_size, "max_seconds": self.worker.max_seconds}

    def models(self) -> dict[str, Any]:
        """The released models: what is here, what would be fetched under which licences, and which suits the machine.

        Waits until the machine has been looked at.
        """
        return self.fetcher.models()

    def fetch(self, name: str, task: str = "get") -> dict[str, Any]:
        """Fetch a model, or resume that, or verify it (task: "verify"); /watch says how far it is."""
        self.fetcher.check_allowed()
        name, task = form.parse_text(name, "model"), form.parse_text(task or "get", "task")
        return {"fetching": self.fetcher.start(name, task).view()}

    def stop_fetching(self) -> dict[str, Any]:
        """End it; what was fetched is kept, and /fetch resumes from there."""
        self.fetcher.check_allowed()
        self.fetcher.stop()
        return {"fetching": self.fetcher.view()}

    def remove_model(self, name: str, pickle_only: bool = False) -> dict[str, Any]:
        """Remove a model, or only the original of its U-Net once that is converted: {"removed": bytes}."""
        self.fetcher.check_allowed()
        return {"removed": self.fetcher.remove(form.parse_text(name, "model"), bool(pickle_only))}
