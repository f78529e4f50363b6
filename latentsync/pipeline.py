"""From a video and a voice to the video with the mouth saying the new words.

    frames → faces → windows → latents → faces → frames

Each stage is an iterator that takes from the one before it, so that what is held does not grow with the clip.
Sound, decoding, following faces, cutting them out and encoding have a thread each, a bounded number of frames away from
the main one, which drives the device: it finds the faces of the next windows ready, and hands finished frames on
without waiting.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import chain, islice
from math import inf
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latentsync.alignment import crop_face, estimate_matrix, fixed_mask
from latentsync.audio import audio_chunks, frame_count
from latentsync.checkpoints.find import Checkpoint
from latentsync.checkpoints.load import Models
from latentsync.compositing import match_colours, merge_faces, paste_into_rectangle, pasted_rectangle
from latentsync.errors import UserError, is_out_of_memory
from latentsync.faces import Face, face_reader, track_faces
from latentsync.machine import available_memory
from latentsync.media import (
    VideoInfo,
    VideoWriter,
    check_output,
    probe_video,
    read_audio,
    read_frames,
    read_frames_looped,
)
from latentsync.media.segments import SEGMENT_FRAMES, SegmentWriter, clean, unfinished, work_folder
from latentsync.prefetch import Behind, OnWait, ahead, close
from latentsync.retarget import CHUNK, CONTEXT, HELD_FRAMES, MouthBank, mouth_points, retarget
from latentsync.sampling import Schedule, between_ends, ddim_schedule, initial_noise
from latentsync.settings import CRF, FACES, GUIDANCE_SCALE, INFERENCE_STEPS, SEED, TRAIN_STEPS, WINDOW, DeepCache
from latentsync.vae import condition, decode, to_pixels
from latentsync.validation import WIDER, unusable, widened

KNOWN_BYTES = 512 * 2**20  # of crops that are kept of a video that is shown more than once: 26 s at 512 px
DECODED_AHEAD = 8  # frames that wait for the face tracker
TRACKED_AHEAD = 8  # frames that wait for their faces to be cut out
HELD_SHARE = 0.8  # of the free main memory, for the frames that are held at a time
STEPS_AHEAD = 3  # denoising steps that the GPU may be behind: shallow ones take it a millisecond
OWN_FACE = -1  # the place of the model's own face among the frames of a video
END = object()

Progress = Callable[[str, int, int], None]


class Enough(Exception):
    """For a callback of `lipsync` to raise: end the run here, and keep what is finished as a video of its own."""


@dataclass(frozen=True)
class Settings:
    """What a run is asked for."""

    steps: int = INFERENCE_STEPS  # 1 to 999
    guidance_scale: float = GUIDANCE_SCALE  # 1 (off) to 3 are useful
    seed: int = SEED
    windows_per_pass: int = 1  # windows that go through the U-Net together, from 1
    frames_per_pass: int = 16  # frames that go through the autoencoder together, from 1
    cache: DeepCache | None = None
    crf: float = CRF  # x264's, of the output
    face: str = "largest"  # one of `faces.WHICH`

    def __post_init__(self) -> None:
        if self.face not in FACES:
            raise UserError(f"There is no face '{self.face}' to choose: give one of {', '.join(FACES)}.")
        for name, most in ("steps", TRAIN_STEPS - 1), ("windows_per_pass", inf), ("frames_per_pass", inf):
            if not 1 <= getattr(self, name) <= most:
                upto = "" if most == inf else f" to {most}"
                raise UserError(f"{name} = {getattr(self, name)} is not possible: give a number from 1{upto}.")

    @classmethod
    def suiting(cls, model: Checkpoint | Models, guidance_scale: float | None = None, **others: object) -> "Settings":
        """Settings for a model, with the guidance scale that suits it where none is asked for. Raises UserError."""
        return cls(guidance_scale=model.guidance_scale if guidance_scale is None else guidance_scale, **others)

    @property
    def shots_ahead(self) -> int:
        """Shots with their faces that wait for the device: those of one pass, and a window more."""
        return (self.windows_per_pass + 1) * WINDOW

    @property
    def frames_behind(self) -> int:
        """Finished frames that wait for the encoder: all that a pass gives at once."""
        return self.windows_per_pass * WINDOW

    @property
    def most_frames(self) -> int:
        """Frames in memory at most, whatever the clip's length, besides what decoder, tracker and encoder hold."""
        held = 2 * (self.windows_per_pass + 1) * WINDOW  # the group on the device, the one before it, their context
        hands = 8  # one a thread, on its way from queue to queue
        return DECODED_AHEAD + TRACKED_AHEAD + self.shots_ahead + held + self.frames_behind + hands


@dataclass
class Report:
    """What a run did."""

    settings: Settings
    model: str
    resolution: int
    device: str
    dtype: str
    frames: int = 0
    resumed_from: int = 0  # frames that earlier runs of the same job had finished
    frames_without_face: int = 0
    frames_computed_again: int = 0  # in a wider type, see `latentsync.validation`
    ended_early: bool = False  # by `Enough`
    remarks: list[str] = field(default_factory=list)  # sentences for the user on what was left out
    seconds: dict[str, float] = field(default_factory=dict)  # each stage was busy; they overlap
    waiting: dict[str, float] = field(default_factory=dict)  # seconds that others waited for this stage's thread
    total_seconds: float = 0.0

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass
class Shot:
    """One frame on its way through the pipeline.

    frame: uint8 (H, W, 3), changed in place when its face is put back; tokens: audio (50, d);
    crop: uint8 (R, R, 3), None without a usable face; matrix (2, 3) and opacity: how it goes back;
    source: the frame's number in a video that is shown more than once, else None; again: painted in a wider type;
    scene: `Face.scene`, the number of the stretch between two cuts that the frame lies in; position: the frame's
    number; points: `mouth_points` of the face; generated: uint8 (R, R, 3), the model's own face as it was painted.
    """

    frame: np.ndarray
    tokens: Tensor
    crop: np.ndarray | None = None
    matrix: np.ndarray | None = None
    opacity: float = 0.0
    source: int | None = None
    again: bool = False
    scene: int = 0
    position: int = 0
    points: np.ndarray | None = None
    generated: np.ndarray | None = None


@dataclass(frozen=True)
class Window:
    """Consecutive shots with a face; the first `done` of them only lend context and have been painted before."""

    shots: list[Shot]
    done: int = 0

    @property
    def new(self) -> list[Shot]:
        return self.shots[self.done :]


def first_time(frames: Iterator[tuple[int, np.ndarray]], again: list[tuple[int, np.ndarray]]) -> Iterator[np.ndarray]:
    """The frames until their video comes again; the frame with which it does goes into `again`.

    frames: numbered as in the video.
    """
    for position, (number, frame) in enumerate(frames):
        if number < position:
            again.append((number, frame))
            return
        yield frame


def align(
    tracked: Iterable[tuple[np.ndarray, Face | None]],
    tokens: Iterator[Tensor],
    resolution: int,
    most: int | None = None,
    again: Iterable[tuple[int, np.ndarray]] = (),
) -> Iterator[Shot]:
    """Cut out the face of every frame; tokens: the audio of each frame, in step.

    again: numbered frames that follow, of a video that has been seen whole: their faces are those of the first time,
    and of the first `most` frames what was cut out, too. None: nothing is kept for them.
    """
    known: list[Shot] = []  # of the first time, without their frames
    bias = None
    count = 0
    for frame, face in tracked:
        shot = Shot(frame, next(tokens), position=count)
        count += 1
        if face is None:
            bias = None
        else:
            shot.matrix, bias = estimate_matrix(face.points, resolution, None if face.first else bias)
            shot.crop = crop_face(frame, shot.matrix, resolution)
            shot.opacity, shot.scene = face.opacity, face.scene
            shot.points = mouth_points(face.landmarks)
        if most is not None:
            keeps = len(known) < most
            shot.source = len(known) if keeps else None
            known.append(replace(shot, frame=None, tokens=None, crop=shot.crop if keeps else None))
        yield shot
    for position, (number, frame) in enumerate(again, count):
        shot = replace(known[number], frame=frame, tokens=next(tokens), position=position)
        if shot.matrix is not None and shot.crop is None:
            shot.crop = crop_face(frame, shot.matrix, resolution)
        yield shot


def windows(shots: Iterable[Shot]) -> Iterator[Window | Shot]:
    """Cut runs of shots with a face into windows; shots without one come through between them, in order.

    A run ends at a frame without a face and at a cut. Its last window is slid back so that it is full: norms and
    temporal attention see every frame of a window, so a padded one would change the real frames, and one that held
    two scenes would mix their colours. A run shorter than a window is one at its true length.
    """
    painted: list[Shot] = []  # the run's last window, for context
    waiting: list[Shot] = []

    def rest() -> Iterator[Window]:
        if waiting:
            lent = painted[len(painted) - (WINDOW - len(waiting)) :] if painted else []
            yield Window(lent + waiting, len(lent))

    for shot in shots:
        if shot.crop is None:
            yield from rest()
            painted, waiting = [], []
            yield shot
            continue
        if (waiting or painted) and (waiting or painted)[-1].scene != shot.scene:
            yield from rest()
            painted, waiting = [], []
        waiting.append(shot)
        if len(waiting) == WINDOW:
            yield Window(waiting)
            painted, waiting = waiting, []
    yield from rest()


def batches(parts: Iterable[Window | Shot], size: int) -> Iterator[list[Window | Shot]]:
    """Group parts, in order, so that a group holds up to `size` windows and not many more frames than they do."""
    group: list[Window | Shot] = []
    count = frames = 0
    for part in parts:
        group.append(part)
        count += isinstance(part, Window)
        frames += len(part.shots) if isinstance(part, Window) else 1
        if count == size or frames >= size * WINDOW:
            yield group
            group, count, frames = [], 0, 0
    if group:
        yield group


class Painter:
    """Generates the faces of windows: all that stays the same from window to window.

    on_step is called at every denoising step; what it raises stops the run. Raises UserError for a DeepCache branch
    that the model has not.
    """

    def __init__(self, models: Models, settings: Settings, on_step: Callable[[], None] | None = None):
        self.models, self.settings, self.on_step = models, settings, on_step
        branches = 3 * len(models.unet.config.block_out_channels)
        if settings.cache and settings.cache.branch >= branches:
            raise UserError(
                f"DeepCache's branch {settings.cache.branch} is none of the model '{models.name}': give one from 0 to "
                f"{branches - 1}."
            )
        device, dtype = models.device, models.dtype
        self.on_gpu = device.type == "cuda"
        self.groups_behind = int(self.on_gpu)  # groups that the device may still be working on
        self.steps: deque[torch.cuda.Event] = deque()  # the ends of the last steps that were given to the GPU
        self.unpasted: Callable[[], object] | None = None  # pastes the faces of the last pass
        self.conditions: dict[int, Tensor] = {}  # of the frames of a video that is shown more than once
        mask = fixed_mask(models.resolution)
        self.mask = torch.from_numpy(mask.copy()).to(device, dtype)
        self.face = None if models.face is None else torch.from_numpy(models.face).to(device)  # painted for all shots
        rows, columns = np.nonzero(mask < 1)
        self.hidden = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
        self.schedule: Schedule = ddim_schedule(settings.steps)
        vae = models.vae.config
        side = models.resolution // 2 ** (len(vae.block_out_channels) - 1)
        self.noise = initial_noise(settings.seed, vae.latent_channels, side, side, device, dtype)

    @torch.inference_mode()
    def paint(self, windows: list[Window]) -> Callable[[], list[Window]]:
        """Generate the mouths of windows of one length: give the device all that is to be done.

        The function that is returned waits for the device and puts the faces into their frames, in place; it is
        called once. Until then the shots must stay as they are. It returns the windows with an unusable face, whose
        frames it leaves as they were.
        """
        models, settings = self.models, self.settings
        b, f = len(windows), len(windows[0].shots)
        shots = [shot for window in windows for shot in window.shots]
        crops = self.crops(shots)
        tokens = self.upload(torch.stack([shot.tokens for shot in shots])).to(models.dtype)
        latents = models.denoise(
            models.unet,
            self.noise,
            self.told(windows, crops).transpose(1, 2),
            tokens.unflatten(0, (b, f)),
            self.schedule,
            settings.guidance_scale,
            settings.cache,
            self.step_given,
        )

        def new(values: Tensor) -> Tensor:
            """Those of the frames that have not been painted before. By slices: index lists wait for the GPU."""
            return torch.cat([values[i * f + window.done : i * f + f] for i, window in enumerate(windows)])

        latents, crops = new(latents.transpose(1, 2).flatten(0, 1)), new(crops)
        generated = torch.cat([decode(models.vae, some) for some in latents.split(settings.frames_per_pass)])
        bad = unusable(self.schedule.predicted(latents, self.noise[:, :, 0]), generated, self.hidden)
        if models.match_colours:
            generated = match_colours(generated, crops, self.mask)
        faces = merge_faces(generated, crops, self.mask)
        counts = [f - window.done for window in windows]
        bad = torch.cat([part.any().expand(len(part)) for part in bad.split(counts)])
        # Pasting is many small kernels, for which the GPU would wait if it had nothing else to do. So they are queued
        # behind the first step of the next pass, or when they are needed.
        put = self.paste if self.face is None else self.keep
        paste = cache(torch.inference_mode()(lambda: put(faces, [s for w in windows for s in w.new], bad)))
        self.unpasted = paste

        def finish() -> list[Window]:
            flags = iter(paste()())
            if self.unpasted is paste:  # it holds the frames
                self.unpasted = None
            return [w for w, count in zip(windows, counts, strict=True) if [next(flags) for _ in range(count)][0]]

        return finish

    @torch.inference_mode()
    def pass_over(self, windows: list[Window]) -> None:
        """Instead of painting windows whose frames an earlier run has finished.

        Only a video that comes again costs anything the first time: what the network is told of its faces is encoded as
        it would be if they were painted, so that later windows get the same, to the bit.
        """
        shots = [shot for window in windows for shot in window.shots]
        if self.face is None and any(shot.source is not None for shot in shots):
            self.told(windows, self.crops(shots))

    def crops(self, shots: list[Shot]) -> Tensor:
        """What is to be painted on: uint8 (n, R, R, 3), the shots' faces or, for each of them, the model's own."""
        if self.face is not None:
            return self.face.expand(len(shots), *self.face.shape)
        return self.upload(torch.from_numpy(np.stack([shot.crop for shot in shots])))

    def told(self, windows: list[Window], crops: Tensor) -> Tensor:
        """What the network is told of b windows of f faces besides the noise, (b, f, 1 + 2c, h, w).

        crops: uint8 (b·f, R, R, 3). Where the ends of a window say it all, only they are encoded.
        """
        b, f = len(windows), len(windows[0].shots)
        if self.face is not None:
            if OWN_FACE not in self.conditions:
                pixels = to_pixels(self.face[None], self.models.dtype)
                self.conditions[OWN_FACE] = condition(self.models.vae, pixels, self.mask)[0]
            return self.conditions[OWN_FACE].expand(b, f, *self.conditions[OWN_FACE].shape)
        if not self.models.ends_only:
            return self.condition([shot for window in windows for shot in window.shots], crops).unflatten(0, (b, f))
        crops = crops.unflatten(0, (b, f))
        ends = [shot for window in windows for shot in (window.shots[0], window.shots[-1])]
        given = self.condition(ends, torch.stack([crops[:, 0], crops[:, -1]], 1).flatten(0, 1)).unflatten(0, (b, 2))
        return between_ends(given[:, 0], given[:, 1], f)

    def condition(self, shots: list[Shot], crops: Tensor) -> Tensor:
        """What the network is told of n faces besides the noise, (n, 1 + 2c, h, w), encoded once for each source."""
        sources = [shot.source for shot in shots]
        if all(source in self.conditions for source in sources):
            return torch.stack([self.conditions[source] for source in sources])
        given = torch.cat([
            condition(self.models.vae, to_pixels(some, self.models.dtype), self.mask)
            for some in crops.split(self.settings.frames_per_pass)
        ])  # fmt: skip
        self.conditions.update((source, one) for source, one in zip(sources, given, strict=True) if source is not None)
        return given

    def paste(self, faces: Tensor, shots: list[Shot], bad: Tensor) -> Callable[[], list[bool]]:
        """Blend faces (n, 3, R, R) into the frames of n shots: on the device, and on the host when called.

        Only the parts of the frames that change travel, all in one piece each way. bad: bool (n,), faces that are to
        be left out; the function that is returned gives them to the host.
        """
        rectangles = [pasted_rectangle(shot.matrix, faces.shape[-1], shot.frame.shape) for shot in shots]
        regions = [shot.frame[y0:y1, x0:x1] for shot, (x0, y0, x1, y1) in zip(shots, rectangles, strict=True)]
        sizes = [region.size for region in regions]

        def cut(packed: Tensor) -> list[Tensor]:
            return [part.view(r.shape) for part, r in zip(packed.split(sizes), regions, strict=True)]

        packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=self.on_gpu)
        for part, region in zip(cut(packed), regions, strict=True):
            part.numpy()[...] = region
        on_device = packed.to(self.models.device, non_blocking=True)
        for part, face, shot, rectangle in zip(cut(on_device), faces, shots, rectangles, strict=True):
            if part.numel():
                paste_into_rectangle(part, face, shot.matrix, rectangle, shot.frame.shape, shot.opacity)
        pasted, ready = on_device, None
        if self.on_gpu:
            known = torch.empty_like(bad, device="cpu", pin_memory=True)
            bad = known.copy_(bad, non_blocking=True)
            pasted = torch.empty_like(packed, pin_memory=True)
            pasted.copy_(on_device, non_blocking=True)
            ready = self.event()

        def complete() -> list[bool]:
            if ready is not None:
                ready.synchronize()
            for region, part, left_out in zip(regions, cut(pasted), flags := bad.tolist(), strict=True):
                if not left_out:
                    region[...] = part.numpy()
            return flags

        return complete

    def keep(self, faces: Tensor, shots: list[Shot], bad: Tensor) -> Callable[[], list[bool]]:
        """As `paste`, but give the faces (n, 3, R, R) to their shots as `generated`, for `retarget`."""
        pixels = (faces.float() * 127.5 + 127.5).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        ready = None
        if self.on_gpu:
            pixels, bad = (
                torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
                for values in (pixels.contiguous(), bad)
            )
            ready = self.event()

        def complete() -> list[bool]:
            if ready is not None:
                ready.synchronize()
            for shot, face, left_out in zip(shots, pixels, flags := bad.tolist(), strict=True):
                if not left_out:
                    shot.generated = face.numpy().copy()
            return flags

        return complete

    def upload(self, values: Tensor) -> Tensor:
        """Values of the host on the device, without waiting for what it is doing."""
        if self.on_gpu:
            values = values.pin_memory()  # kept by PyTorch until it has been read
        return values.to(self.models.device, non_blocking=True)

    def event(self) -> torch.cuda.Event:
        """Where the GPU will be when it has done what it was given so far."""
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self.models.device))
        return event

    def step_given(self, _: int) -> None:
        """Paste what the pass before left, and stay STEPS_AHEAD of the GPU and no more, or a run could not be stopped
        before its window ends."""
        if self.unpasted:
            self.unpasted()
            self.unpasted = None
        if self.on_gpu:
            self.steps.append(self.event())
            if len(self.steps) > STEPS_AHEAD:
                self.steps.popleft().synchronize()
        if self.on_step:
            self.on_step()


def paint(
    groups: Iterable[list[Window | Shot]],
    painter: Painter,
    relieve: Callable[[], Settings | None] | None = None,
    done: int = 0,
) -> Iterator[Shot]:
    """Paint every window of every group; yields the finished shots in order, each once.

    Groups that only have the first `done` frames, which an earlier run has finished, are passed over, their shots as
    they are.

    A group is finished when the device has been given what the painter's `groups_behind` next ones need. Where its
    memory runs out, `relieve` is asked for settings that need less, until they suffice or there are none. Windows whose
    faces are unusable are painted again in a wider type. Raises UserError where that does not help.
    """
    given: deque[tuple[list[Window | Shot], list[Callable[[], list[Window]]]]] = deque()

    def finished() -> Iterator[Shot]:
        group, completions = given.popleft()
        if again := [window for complete in completions for window in complete()]:
            paint_again(again, painter)
        for part in group:
            if isinstance(part, Window):
                yield from part.new
            else:
                yield part

    def given_to_device(group: list[Window | Shot], over: bool) -> list[Callable[[], list[Window]]]:
        by_length: dict[int, list[Window]] = {}
        for part in group:
            if isinstance(part, Window):
                by_length.setdefault(len(part.shots), []).append(part)
        size = painter.settings.windows_per_pass
        passes = [alike[i : i + size] for alike in by_length.values() for i in range(0, len(alike), size)]
        if over:
            for some in passes:
                painter.pass_over(some)
            return []
        return [painter.paint(some) for some in passes]

    frames = 0
    for group in groups:
        frames += sum(len(part.new) if isinstance(part, Window) else 1 for part in group)
        while True:
            too_much = None
            try:
                completions = given_to_device(group, frames <= done)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                # Without its frames, which hold the tensors that did not fit.
                too_much = error.with_traceback(None)
            if too_much is None:
                break
            while given:  # what was queued before it frees its memory
                yield from finished()
            if painter.on_gpu:
                torch.cuda.empty_cache()
            settings = relieve() if relieve else None
            if settings is None:
                raise too_much
            painter = Painter(painter.models, settings, painter.on_step)
        given.append((group, completions))
        if len(given) > painter.groups_behind:
            yield from finished()
    while given:
        yield from finished()


def paint_again(windows: list[Window], painter: Painter) -> None:
    """Paint windows in a type with a wider range than the painter's, one by one and in little memory.

    That is float32 or, where memory does not suffice for it, bfloat16. Raises UserError where faces are unusable again.
    """
    left, tried = deque(windows), [painter.models.dtype]
    settings = replace(painter.settings, windows_per_pass=1, frames_per_pass=1)
    for dtype in WIDER.get(painter.models.dtype, ()):
        if painter.on_gpu:
            torch.cuda.empty_cache()
        wide = None
        try:
            wide = Painter(widened(painter.models, dtype), settings, painter.on_step)
            while left and not wide.paint([left[0]])():
                window = left.popleft()
                for shot in window.new:
                    shot.again = True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            continue
        if not left:
            return
        tried.append(dtype)
        break
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in tried)
    raise UserError(
        f"The model '{painter.models.name}' gives no usable picture of a mouth, computed in {names}: check its files "
        "with `python -m latentsync.checkpoints verify`, close other programs that use the GPU, or take another model."
    )


def beside(items: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The items, which lie on the host. On a GPU they are made in a stream of their own, with a thread that takes them:
    waiting for one is not waiting for the denoising."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    while True:
        with torch.cuda.stream(stream):  # of None: as it is
            item = next(items, END)
        if item is END:
            return
        yield item


def fitting(settings: Settings, info: VideoInfo, held: int = 0) -> Settings:
    """The settings, with so many windows a pass that the frames held at a time fit into the main memory that is free.

    held: frames that are held besides `Settings.most_frames`. A frame of 4K is 25 MB, of 8K 100 MB. Raises UserError
    where not even those of one window a pass fit.
    """
    size, free = 3 * info.width * info.height, HELD_SHARE * available_memory()
    for windows in range(settings.windows_per_pass, 0, -1):
        fewer = replace(settings, windows_per_pass=windows)
        most = fewer.most_frames + held
        if most * size <= free:
            return fewer
    raise UserError(
        f"'{info.path}' has pictures of {info.width} × {info.height}, of which up to {most} are held at a "
        f"time: {most * size / 1e9:.1f} GB, and only {free / 1e9:.1f} GB of memory can be had. Close "
        "other programs, or give a smaller version of the video."
    )


class StageClock:
    """Seconds that each stage of a chain of iterators was busy, and that other threads waited for it.

    A stage's time is its own, without that of the stages inside it and without waiting. Stages may run in several
    threads, but each in one at a time.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        # The tracker waits for "reading"; cutting out for "faces" and "sound"; the device for "crops" and "writing".
        self.waiting: dict[str, float] = {}
        self._thread = threading.local()  # .inner: seconds charged since the innermost open charge began

    @contextmanager
    def charge(self, account: dict[str, float], stage: str) -> Iterator[None]:
        """Charge the time of the block, less what was charged within it, to the stage; `account`: one of the two."""
        outer, self._thread.inner = getattr(self._thread, "inner", 0.0), 0.0
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            account[stage] = account.get(stage, 0.0) + spent - self._thread.inner
            self._thread.inner = outer + spent

    def time(self, items: Iterable, stage: str) -> Iterator:
        """Pass the items on; making them is the work of `stage`. Closing this closes them."""
        return self._charged(items, self.seconds, stage)

    def wait(self, items: Iterable, stage: str) -> Iterator:
        """Pass the items on, which `stage` makes in another thread."""
        return self._charged(items, self.waiting, stage)

    def _charged(self, items: Iterable, account: dict[str, float], stage: str) -> Iterator:
        items = iter(items)
        try:
            while True:
                with self.charge(account, stage):
                    item = next(items, END)
                if item is END:
                    return
                yield item
                del item
        finally:
            close(items)


def lipsync(
    video: str | Path,
    audio: str | Path,
    output: str | Path,
    models: Models,
    settings: Settings | None = None,
    on_progress: Progress | None = None,
    relieve: Callable[[], Settings | None] | None = None,
    on_frame: Callable[[np.ndarray], None] | None = None,
    on_wait: OnWait | None = None,
    say: Callable[[str], None] = lambda _: None,
    segment_frames: int | None = SEGMENT_FRAMES,
    copy_audio: bool = False,
    video_track: int | None = None,
    audio_track: int | None = None,
) -> Report:
    """Write `output`: the video with its mouth saying the audio.

    It lasts as long as the sound, ceil(seconds × 25) frames; a shorter video is played forward and backward.
    on_progress(stage, frames done, frames in all) is called as the stages of `latentsync.STAGES` advance, and at every
    denoising step, in the caller's thread; what it raises stops the run. So does what on_wait() raises, which is called
    several times a second while that thread waits for others or for ffmpeg. relieve() is called when the device's
    memory ran out, and gives settings to go on with that need less, or None to give up. on_frame(frame) is called with
    every finished frame, uint8 (H, W, 3), in order and in the caller's thread; it must not change it. Whatever ends a
    run early, no part of the output is left, and no thread; but after `Enough` the finished frames are, with their
    sound.
    copy_audio: keep the sound bit for bit in any container, see `latentsync.media.sound`.
    video_track, audio_track: numbers of tracks, see `probe_video` and `probe_audio`.

    A job of more than `segment_frames` is written in segments of as many, see `media.segments`. Whatever ends it
    early, but `Enough`, the same call goes on after the last finished one, to the same result; say(line) tells so. It
    finds the faces of earlier frames once more, but neither paints them nor gives them to on_frame. None: in one piece.
    Raises UserError where the files cannot be used, the video's frames do not fit into memory, or it never shows a
    usable face.
    """
    settings = settings or Settings()
    began = time.perf_counter()
    output = check_output(output, (video, audio, *models.files))
    info = probe_video(video, video_track)
    settings = fitting(settings, info, 0 if models.face is None else HELD_FRAMES)
    clock = StageClock()
    with clock.charge(clock.seconds, "sound"):
        wav = torch.from_numpy(read_audio(audio, track=audio_track))
    total = frame_count(len(wav))
    report = Report(
        settings, models.name, models.resolution, str(models.device), str(models.dtype).removeprefix("torch.")
    )
    stop_reading = threading.Event()
    frames, looped = read_frames_looped(info, total, stop_reading), total > info.n_frames
    counts = {"frames_without_face": 0, "frames_computed_again": 0}  # of what is written
    complete = False  # all frames have been handed to the writer

    def wait() -> None:
        nonlocal on_wait
        if on_wait:
            try:
                on_wait()
            except Enough:
                if not complete:
                    raise
                on_wait = None  # there is nothing to end early any more

    # Models that were not loaded from files cannot be known again.
    if segment_frames and total > segment_frames and models.files:
        # How much goes through the device at once is not part of the job, as it follows from the memory that is free.
        asked = asdict(replace(settings, windows_per_pass=1, frames_per_pass=1))
        asked |= {"segment": segment_frames, "device": models.device.type, "dtype": report.dtype}
        asked |= {"model": models.name, "resolution": models.resolution, "mel_range": models.mel_range}
        asked |= {"speech_level": models.speech_level}
        asked |= {"match_colours": models.match_colours, "ends_only": models.ends_only}
        asked |= {"video_track": video_track, "audio_track": audio_track}
        folder = work_folder(output, (video, audio, *models.files), asked)
        clean(output, folder)
        writer = SegmentWriter(
            output, info, audio, settings.crf,
            folder=folder, total=total, segment_frames=segment_frames, counts=counts, say=say,
            copy_audio=copy_audio, audio_track=audio_track, on_wait=wait,
        )  # fmt: skip
    else:
        folder = None
        clean(output)
        writer = VideoWriter(
            output, info, audio, settings.crf, copy_audio=copy_audio, audio_track=audio_track, on_wait=wait
        )
    for other in unfinished(output):
        if other.folder != folder:
            say(other.describe())
    written = 0

    def progress(stage: str, done: int, total: int) -> None:
        """Tell also what has been written meanwhile, and raise what was wrong with it."""
        tell_written()
        if on_progress:
            on_progress(stage, done, total)

    def tell_written() -> None:
        nonlocal written
        writing.check()
        while written < writing.done:
            written += 1
            if on_progress:
                on_progress("writing", done + written, total)

    def write(item: tuple[np.ndarray, bool, bool]) -> None:
        frame, faceless, again = item
        with clock.charge(clock.seconds, "writing"):
            counts["frames_without_face"] += faceless
            counts["frames_computed_again"] += again
            writer.write(frame)

    with (
        writer,
        closing(Behind(write, settings.frames_behind, "writing", wait, writer.abort)) as writing,
        closing(
            generate(
                frames,
                wav,
                models,
                settings,
                total,
                looped,
                clock,
                progress,
                relieve,
                writer.frames,
                film=None if models.face is None else read_frames(info, count=total, cancel=stop_reading),
                on_wait=wait,
                stop_reading=stop_reading.set,
            )  # fmt: skip
        ) as shots,
    ):
        done = report.frames = report.resumed_from = writer.frames
        try:
            if on_progress and done:
                on_progress("mouths", done, total)
                on_progress("writing", done, total)
            for shot in islice(shots, done, None) if done < total else ():
                with clock.charge(clock.waiting, "writing"):
                    writing.give((shot.frame, shot.crop is None, shot.again))
                report.frames += 1
                if on_frame:
                    on_frame(shot.frame)
                tell_written()
            complete = True
        except Enough:
            if not report.frames:
                raise
            shots.close()  # lets go of what is under way, while the encoder catches up
            report.ended_early = writer.cut = report.frames < total
            on_progress = on_wait = None
        with clock.charge(clock.waiting, "writing"):
            writing.finish()
        with suppress(Enough):  # there is nothing left to end early
            tell_written()
        report.frames_without_face = counts["frames_without_face"]
        report.frames_computed_again = counts["frames_computed_again"]
        if report.frames_without_face == report.frames and not report.ended_early:
            if isinstance(writer, SegmentWriter):
                writer.keep = False
            raise UserError(
                f"'{video}' shows no face that can be used: use a video in which the speaker's face is seen from "
                "the front, with the whole mouth in the picture."
            )
    report.remarks = list(writer.remarks)
    report.seconds, report.waiting = (
        {stage: round(seconds, 3) for stage, seconds in account.items()} for account in (clock.seconds, clock.waiting)
    )
    report.total_seconds = round(time.perf_counter() - began, 3)
    return report


def generate(
    frames: Iterator[tuple[int, np.ndarray]],
    wav: Tensor,
    models: Models,
    settings: Settings,
    total: int,
    looped: bool,
    clock: StageClock,
    on_progress: Progress | None = None,
    relieve: Callable[[], Settings | None] | None = None,
    done: int = 0,
    film: Iterator[np.ndarray] | None = None,
    on_wait: OnWait | None = None,
    stop_reading: Callable[[], None] = lambda: None,
) -> Iterator[Shot]:
    """The chain of stages between decoding and encoding: finished shots, in order.

    frames: numbered, uint8 (H, W, 3) at 25 fps, writable; they are made, and closed, in a thread of their own;
    wav: (samples,) float32 at 16 kHz; total: frames to expect; looped: whether they come again; done: of the first
    frames, whose mouths need not be painted; film: for a model with a face of its own, the frames until they come
    again, a second time: they are followed up to CHUNK frames ahead; on_wait: called several times a second by the
    thread that takes the shots while it waits for others; stop_reading: ends `frames` and `film` from another thread,
    whatever they wait for. Close it, if it is not taken to the end.
    Between `frames` and what it yields are `settings.most_frames` and the tracker's at most.
    """
    painted = 0

    def watched(shots: Iterable[Shot], stage: str, after: int = 0) -> Iterator[Shot]:
        for number, shot in enumerate(shots, 1):
            if on_progress and number > after:
                on_progress(stage, number, total)
            yield shot

    def still_painting() -> None:
        if on_progress:
            on_progress("mouths", max(painted, done), total)

    def aligned() -> Iterator[Shot]:
        most = KNOWN_BYTES // (3 * models.resolution**2) if looped else None
        again: list[tuple[int, np.ndarray]] = []
        chunks = audio_chunks(models.audio_encoder, wav, total, models.mel_range, models.speech_level)
        heard = clock.time(beside(chunks, models.device), "sound")
        with (
            closing(ahead(heard, TRACKED_AHEAD, "sound")) as tokens,
            closing(ahead(clock.time(frames, "reading"), DECODED_AHEAD, "reading")) as decoded,
        ):
            shown = clock.wait(decoded, "reading")
            if bank is None:
                followed, depth = track_faces(first_time(shown, again), which=settings.face), TRACKED_AHEAD
            else:
                followed, depth = bank.collect(track_faces(film, which=settings.face)), CHUNK
            with closing(ahead(clock.time(followed, "faces"), depth, "faces")) as tracked:
                faces, tokens = clock.wait(tracked, "faces"), clock.wait(tokens, "sound")
                if bank is not None:
                    faces = zip(first_time(shown, again), faces, strict=False)
                yield from clock.time(align(faces, tokens, models.resolution, most, chain(again, shown)), "crops")

    def finished(groups: Iterable[list[Window | Shot]], read_face: Callable | None) -> Iterator[Shot]:
        if bank is None:
            return clock.time(paint(groups, painter, relieve, done), "mouths")
        shots = clock.time(paint(groups, painter, relieve, done - CONTEXT), "mouths")
        return clock.time(retarget(shots, bank, read_face), "retarget")

    bank = None if film is None else MouthBank()
    painter = Painter(models, settings, still_painting)
    with closing(ahead(aligned(), settings.shots_ahead, "crops", on_wait, stop_reading)) as found:
        groups = batches(windows(watched(clock.wait(found, "crops"), "faces")), settings.windows_per_pass)
        with nullcontext() if bank is None else face_reader() as read_face:
            for shot in watched(finished(groups, read_face), "mouths", done):
                painted += 1
                yield shot
