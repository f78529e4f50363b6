"""One frame painted before a job: what model, level and face will give at a time of the voice.

The model paints windows of 16 frames, so a window around that time is painted, and its middle is shown.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentsync import SAMPLE_RATE
from latentsync.errors import UserError, is_out_of_memory
from latentsync.media import VideoInfo, probe_video, read_audio, read_frames, read_frames_looped
from latentsync.rates import painted_step
from latentsync.settings import WINDOW, Settings
from optim.serving.inputs import with_user_names
from optim.serving.job import Job, Request, owner_of
from optim.serving.look import data_uri
from optim.serving.machine import Machine
from optim.serving.preview import resized
from optim.serving.run import Cancelled, check_cancel, interruptible, make_plan
from optim.serving.speeds import Estimate, Speeds, speed_key

if TYPE_CHECKING:  # torch takes seconds to load
    import numpy as np

    from latentsync.checkpoints.load import Models

MAX_WAITING = 4  # of all visitors
MAX_SECONDS = 60.0  # that one may take on a processor to be offered
PICTURE_SIDE = 720  # of the pictures' shorter side, pixels, at most
JOBS_FIRST = "A job runs, or waits: a preview is painted when there is none."
NEWER = "A newer preview took the place of this one."
TOO_MANY = "Other visitors wait for a preview: try again in a minute."
NO_MEMORY = "The memory of this machine is not enough for a preview with these settings."
NO_FACE = "No face that can be used is seen at {at:.1f} s: choose another time with the player."


@dataclass(eq=False)
class OneFrame:
    """A preview that a visitor waits for.

    job: what a job of these files would be, of no queue and with no folder; at: seconds of the voice, None for its
    middle; reply: see `paint`; error: a sentence, in place of it.
    """

    job: Job
    at: float | None
    done: threading.Event = field(default_factory=threading.Event)
    reply: dict[str, Any] | None = None
    error: str | None = None

    def cancel(self) -> None:
        self.job.cancel_requested.set()


class Previews:
    """The previews that wait, and those that are painted. Any thread may add one; the threads of the jobs paint.

    are_jobs: whether a job runs or waits, which goes first, or the server ends; wake: wakes the threads; restorer: the
    server's face restorer.
    """

    def __init__(self, are_jobs: Callable[[], bool], wake: Callable[[], None], restorer: Path | None = None):
        self._are_jobs, self._wake, self._restorer = are_jobs, wake, restorer
        self._lock = threading.Lock()
        self._waiting: deque[OneFrame] = deque()
        self._painting: list[OneFrame] = []

    def add(self, request: Request, visitor: str, at: float | None = None) -> OneFrame:
        """Queue a preview in place of the visitor's earlier one. Raises UserError while there are jobs."""
        owner = owner_of(visitor)
        names = request.video.name, request.audio.name
        frame = OneFrame(Job(request, owner, Path(), names, (0, 0), 0.0), at)
        with self._lock:
            if self._are_jobs():
                raise UserError(JOBS_FIRST)
            pending = [each for each in (*self._waiting, *self._painting) if not each.job.cancel_requested.is_set()]
            own = [each for each in pending if each.job.owner == owner]
            if len(pending) - len(own) >= MAX_WAITING:
                raise UserError(TOO_MANY)
            for each in own:
                each.cancel()
            self._waiting.append(frame)
        self._wake()
        return frame

    def are_waiting(self) -> bool:
        return bool(self._waiting)

    def paint_all(self, load: Callable[[Job], "Models"], machine: Machine, speeds: Speeds) -> int:
        """Paint those that wait, in the caller's thread; returns how many. load: the models of a job."""
        count = 0
        while frame := self._take():
            count += 1
            try:
                self._paint(frame, load, machine, speeds)
            finally:
                with self._lock:
                    self._painting.remove(frame)
                if frame.reply is None and frame.error is None:
                    frame.error = "Something inside the program failed; its console says where."
                frame.done.set()
        return count

    def _take(self) -> OneFrame | None:
        with self._lock:
            if not self._waiting:
                return None
            self._painting.append(frame := self._waiting.popleft())
            return frame

    def _paint(self, frame: OneFrame, load: Callable[[Job], "Models"], machine: Machine, speeds: Speeds) -> None:
        def check() -> None:
            if self._are_jobs():
                frame.cancel()
            check_cancel(frame.job)

        request, names = frame.job.request, frame.job.names
        try:
            check()
            models = load(frame.job)
            key = speed_key(models.name, machine, request)
            frame.reply = paint(frame, models, speeds, key, check, self._restorer)
        except Cancelled:
            frame.error = JOBS_FIRST if self._are_jobs() else NEWER
        except UserError as error:
            frame.error = with_user_names(error, {request.video: names[0], request.audio: names[1]})
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            frame.error = NO_MEMORY


def paint(
    frame: OneFrame,
    models: "Models",
    speeds: Speeds,
    key: str,
    check: Callable[[], None],
    restorer: Path | None = None,
) -> dict[str, Any]:
    """Paint a window of 16 frames; returns the reply of /preview.

    painted, original: pictures as data URIs; at: seconds of the voice; seconds: that it took; level: its name. key: of
    the model in `speeds`; check: called while it works, and ends it by what it raises; restorer: the server's. Raises
    UserError.
    """
    import torch

    from latentsync.faces import lookahead_frames
    from latentsync.hooks import Hooks, RunHooks
    from latentsync.people import find_people
    from latentsync.pipeline import Source, fit_memory, generate_frames
    from latentsync.restoring import with_restorer
    from latentsync.timing import StageClock
    from optim.accelerate import accelerate, oom_handler

    began, request = time.monotonic(), frame.job.request
    plan = make_plan(request, models, models.device, restorer)
    accelerate(models, plan, lambda _: None, frames=WINDOW)
    models = with_restorer(models, plan.settings.restore)
    check()
    info = probe_video(request.video, request.video_track).at_choice(request.fps)
    settings = fit_memory(plan.settings, info)
    wav = read_audio(request.audio, track=request.audio_track)
    check()
    place = place_window(frame.at, len(wav), info, painted_step(info.rate, settings.paint))
    part = info.between(float(place.film / info.rate))
    cancel, ahead = threading.Event(), lookahead_frames(info.rate)
    originals: list[np.ndarray] = []

    def read() -> Iterator[tuple[int, "np.ndarray"]]:
        pictures = read_frames_looped(part, place.count, cancel, ahead=0 if models.retargets else ahead)
        with closing(pictures):
            for index, (number, picture) in enumerate(pictures):
                if index == place.shown:
                    originals.append(picture.copy())  # it is painted in place
                yield number, picture

    source = Source(
        read(),
        torch.from_numpy(wav[place.samples(info)]),
        place.count,
        repeats=place.count > part.n_frames,
        second_reading=read_frames(part, 0, place.count + ahead, cancel) if models.retargets else None,
        cancel=cancel.set,
        rate=info.rate,
        person=find_people(info, settings, cancel)[0],
    )
    hooks = RunHooks(Hooks(on_progress=lambda *_: check(), on_wait=check))
    finished = generate_frames(
        source, models, settings, StageClock(), hooks, on_out_of_memory=oom_handler(models, plan)
    )
    with interruptible(models, check), closing(finished):
        shown = list(finished)[place.shown]
    at = float((place.first + place.shown) / info.rate)
    if shown.crop is None:
        raise UserError(NO_FACE.format(at=at))
    seconds = time.monotonic() - began
    speeds.record(preview_key(key), settings, 1, seconds)
    return {
        "painted": data_uri(resized(shown.frame, PICTURE_SIDE)),
        "original": data_uri(resized(originals[0], PICTURE_SIDE)),
        "at": round(at, 2),
        "seconds": round(seconds, 1),
        "level": plan.level.name,
    }


@dataclass(frozen=True)
class Window:
    """Frames of a voice that are painted.

    first: the first of them; count: a window's at most; shown: the one among them that is shown; film: the film's frame
    at which they begin.
    """

    first: int
    count: int
    shown: int
    film: int

    def samples(self, info: VideoInfo) -> slice:
        """Those of the voice at 16 kHz, and a second more, by which the sound encoder knows what follows."""
        frame = SAMPLE_RATE / info.rate
        return slice(round(self.first * frame), round((self.first + self.count) * frame) + SAMPLE_RATE)


def place_window(at: float | None, samples: int, info: VideoInfo, step: int = 1) -> Window:
    """The window around a time of a voice of so many samples at 16 kHz, and where the film is then.

    at: seconds, None for the middle; one behind the end is the end. A film that is shorter than the voice is played
    forward and backward; a window of its way back is painted forward around the same picture. step: of
    `rates.painted_step`; a window has as many times more frames.
    """
    from latentsync.audio import frame_count

    total = frame_count(samples, info.rate)
    count = min(WINDOW * step, total)
    middle = total // 2 if at is None else min(int(min(at, samples / SAMPLE_RATE) * info.rate), total - 1)
    first = min(max(middle - count // 2, 0), total - count)
    turn = middle % (2 * info.n_frames)
    picture = min(turn, 2 * info.n_frames - 1 - turn)
    return Window(first, count, middle - first, 0 if info.still else max(picture - (middle - first), 0))


def preview_key(key: str) -> str:
    """The key in `Speeds` of previews with a model on a machine, whose own key is given."""
    return f"{key}, one frame"


def preview_time(key: str, settings: Settings, speeds: Speeds) -> Estimate | None:
    """How long a preview takes: by earlier ones, else by what jobs took for as many frames; None if unknown."""
    return speeds.estimate(preview_key(key), settings, 1) or speeds.estimate(key, settings, WINDOW)
