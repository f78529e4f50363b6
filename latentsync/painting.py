"""Generates the faces of windows and pastes them into their frames.

painter = Painter(models, settings)
for frame in paint_groups(groups, painter): ...
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from latentsync.alignment import fixed_mask
from latentsync.checkpoints.load import Models
from latentsync.compositing import MATCHED_AREAS, match_colours, merge_faces, paste_faces, paste_rectangle
from latentsync.errors import UserError, is_out_of_memory
from latentsync.sampling import Schedule, ddim_schedule, denoise, initial_noise, interpolate_ends
from latentsync.settings import Settings
from latentsync.vae import decode, encode_conditioning, latent_mask, to_pixels
from latentsync.validation import FALLBACK_DTYPES, broken_faces, in_dtype
from latentsync.windows import AlignedFrame, Window

MAX_QUEUED_STEPS = 3  # denoising steps that the GPU may be behind: shallow ones take it a millisecond
OWN_FACE = -1  # the place of the model's own face among the numbers of a video's frames


class HostCopy:
    """Tensors on their way from the device to the host."""

    def __init__(self, tensors: list[Tensor]):
        """Start to copy; does not synchronise with a GPU."""
        self._event: torch.cuda.Event | None = None
        self._tensors = tensors
        if tensors[0].is_cuda:
            device = tensors[0].device
            self._tensors = [
                torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
                for tensor in tensors
            ]
            self._event = record_event(device)

    def wait(self) -> list[Tensor]:
        """The copies, once they are complete."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


class PendingPass:
    """Windows whose faces the device is generating.

    faces: (n, 3, R, R) in about [-1, 1], merged with the crops, and broken: bool (n,), both of the windows' new frames
    and on the device. The frames must stay as they are until `finish`.
    """

    def __init__(self, windows: list[Window], faces: Tensor, broken: Tensor, own_face: bool):
        self._windows, self._faces, self._broken, self._own_face = windows, faces, broken, own_face
        self._frames = [frame for window in windows for frame in window.new]
        self._copy: HostCopy | None = None

    @torch.inference_mode()
    def queue_paste(self) -> HostCopy:
        """Queue what follows denoising on the device, once: pasting the faces, and the copy to the host."""
        if self._copy is None:
            handed_on = self._own_face or any(frame.lends for frame in self._frames)
            faces = [generated_pixels(self._faces)] if handed_on else []
            pasted = [] if self._own_face else [self._pasted_regions()]
            self._copy = HostCopy([self._broken, *faces, *pasted])
        return self._copy

    def finish(self) -> list[Window]:
        """Wait for the device and put the faces into their frames, in place; to be called once.

        A frame of a model with a face of its own gets it as `generated` instead, for `retarget`; one that lends its
        face gets both. Returns the windows with a broken face, whose frames stay as they were.
        """
        flags, *results = self.queue_paste().wait()
        broken = flags.tolist()
        if not self._own_face:
            for region, part, is_broken in zip(self._regions(), results.pop(), broken, strict=True):
                if not is_broken:
                    region[...] = top_left(part, region).numpy()
        for faces in results:
            for frame, face, is_broken in zip(self._frames, faces, broken, strict=True):
                if not is_broken and (self._own_face or frame.lends):
                    frame.generated = face.numpy().copy()
        flags_left = iter(broken)
        return [window for window in self._windows if [next(flags_left) for _ in window.new][0]]

    @cached_property
    def _rectangles(self) -> list[tuple[int, int, int, int]]:
        side = self._faces.shape[-1]
        return [paste_rectangle(frame.matrix, side, frame.frame.shape) for frame in self._frames]

    def _regions(self) -> list[np.ndarray]:
        """The parts of the frames that change, as views."""
        rectangles = zip(self._frames, self._rectangles, strict=True)
        return [frame.frame[y0:y1, x0:x1] for frame, (x0, y0, x1, y1) in rectangles]

    def _pasted_regions(self) -> Tensor:
        """Those parts with the faces blended in, (n, h, w, 3) on the device, each at the top left: a copy each way."""
        regions = self._regions()
        height, width = (max(region.shape[axis] for region in regions) for axis in (0, 1))
        packed = torch.empty(len(regions), height, width, 3, dtype=torch.uint8, pin_memory=self._faces.is_cuda)
        for part, region in zip(packed, regions, strict=True):
            top_left(part, region).numpy()[...] = region
        on_device = packed.to(self._faces.device, non_blocking=True)
        matrices, opacities = zip(*((frame.matrix, frame.opacity) for frame in self._frames), strict=True)
        paste_faces(on_device, self._faces, matrices, self._rectangles, self._frames[0].frame.shape, opacities)
        return on_device


def top_left(part: Tensor, region: np.ndarray) -> Tensor:
    """The part's first rows and columns, as many as a region has."""
    return part[: region.shape[0], : region.shape[1]]


def generated_pixels(faces: Tensor) -> Tensor:
    """Faces (n, 3, R, R) in about [-1, 1] → uint8 (n, R, R, 3)."""
    pixels = (faces.float() * 127.5 + 127.5).round_().clamp_(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def record_event(device: torch.device) -> torch.cuda.Event:
    """An event behind all work that has been queued on the current stream."""
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


class Latents(Protocol):
    """Latents of a film's faces that outlive the run, see `latentsync.prepared`."""

    def latents(self, number: int) -> Tensor | None:
        """Those of the masked and of the whole face of a frame, (2c, h, w), if they are known."""
        ...

    def add_latents(self, numbers: list[int], copy: HostCopy) -> None:
        """Take those of n frames, (n, 2c, h, w)."""
        ...


class Painter:
    """Generates the faces of windows; holds all that stays the same from window to window.

    on_step is called at every denoising step; what it raises stops the run. film: latents of its faces, kept from run
    to run. On a processor every face is encoded alone, so that its latents do not depend on those beside it, which
    would change their last bits. Raises UserError for a DeepCache branch that the model does not have.
    """

    def __init__(
        self,
        models: Models,
        settings: Settings,
        on_step: Callable[[], None] | None = None,
        film: Latents | None = None,
    ):
        self.models, self.settings, self.on_step, self.film = models, settings, on_step, film
        branches = 3 * len(models.unet.config.block_out_channels)
        if settings.cache and settings.cache.branch >= branches:
            raise UserError(
                f"The model '{models.name}' has no DeepCache branch {settings.cache.branch}: give one from 0 to "
                f"{branches - 1}."
            )
        device, dtype = models.device, models.dtype
        self.on_gpu = device.type == "cuda"
        self.encoded_together = settings.frames_per_pass if self.on_gpu else 1  # frames; costs a processor 3 %
        self.max_pending = int(self.on_gpu)  # groups that the device may still be working on
        self.step_events: deque[torch.cuda.Event] = deque()  # the ends of the steps that were queued last
        self.unpasted: PendingPass | None = None  # the pass before the one that is being denoised
        self.conditioning: dict[int, Tensor] = {}  # by the number of a frame that is shown more than once
        mask = fixed_mask(models.resolution)
        self.mask = torch.from_numpy(mask.copy()).to(device, dtype)
        self.face = None if models.face is None else torch.from_numpy(models.face).to(device)  # painted for all frames
        rows, columns = np.nonzero(mask < 1)
        self.masked = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
        self.schedule: Schedule = ddim_schedule(settings.steps)
        vae = models.vae.config
        side = models.resolution // vae.downscaling
        self.noise = initial_noise(settings.seed, vae.latent_channels, side, side, device, dtype)

    @torch.inference_mode()
    def paint(self, windows: list[Window]) -> PendingPass:
        """Queue the generation of the faces of windows of one length on the device."""
        models, settings = self.models, self.settings
        b, f = len(windows), len(windows[0].frames)
        frames = [frame for window in windows for frame in window.frames]
        crops = self.stack_crops(frames)
        tokens = self.copy_to_device(torch.stack([frame.tokens for frame in frames])).to(models.dtype)
        latents = denoise(
            models.unet,
            self.noise,
            self.conditioning_for(windows, crops).transpose(1, 2),
            tokens.unflatten(0, (b, f)),
            self.schedule,
            settings.guidance_scale,
            settings.cache,
            self.on_denoising_step,
        )

        def without_context(values: Tensor) -> Tensor:
            """Those of the windows' new frames. By slices, as index lists synchronise with the GPU."""
            return torch.cat([values[i * f + window.context : i * f + f] for i, window in enumerate(windows)])

        latents, crops = without_context(latents.transpose(1, 2).flatten(0, 1)), without_context(crops)
        generated = torch.cat([decode(models.vae, part) for part in latents.split(settings.frames_per_pass)])
        predicted_noise = self.schedule.predicted_noise(latents, self.noise[:, :, 0])
        broken = broken_faces(predicted_noise, generated, self.masked)
        if models.match_colours if settings.match_colours is None else settings.match_colours:
            # A model that asks for it is one with an autoencoder whose own pictures were compared pixel by pixel.
            areas = None if models.match_colours else MATCHED_AREAS
            generated = match_colours(generated, crops, self.mask, areas)
        faces = merge_faces(generated, crops, self.mask)
        if models.restorer is not None:
            faces = models.restorer.restore(faces, crops, self.mask, settings.restore_strength, self.on_step)
        counts = [len(window.new) for window in windows]
        broken = torch.cat([part.any().expand(len(part)) for part in broken.split(counts)])
        # Pasting is many small kernels, for which the GPU would wait if it had nothing else to do. So they are queued
        # behind the first step of the next pass, or when they are needed.
        self.unpasted = PendingPass(windows, faces, broken, own_face=self.face is not None)
        return self.unpasted

    def finish(self, pending: PendingPass) -> list[Window]:
        """Put the faces of a pass into their frames; returns the windows with a broken face."""
        broken = pending.finish()
        if self.unpasted is pending:  # it holds the frames
            self.unpasted = None
        return broken

    @torch.inference_mode()
    def skip(self, windows: list[Window]) -> None:
        """Pass over windows whose frames an earlier run has finished.

        Costs something only in a video that is played again: the conditioning of its faces is encoded as it would be
        if they were painted, so that later windows get the same, to the bit.
        """
        frames = [frame for window in windows for frame in window.frames]
        if self.face is None and any(frame.source is not None for frame in frames):
            self.conditioning_for(windows, self.stack_crops(frames))

    def stack_crops(self, frames: list[AlignedFrame]) -> Tensor:
        """What is painted on: uint8 (n, R, R, 3), the frames' faces or, for each of them, the model's own."""
        if self.face is not None:
            return self.face.expand(len(frames), *self.face.shape)
        return self.copy_to_device(torch.from_numpy(np.stack([frame.crop for frame in frames])))

    def conditioning_for(self, windows: list[Window], crops: Tensor) -> Tensor:
        """The network's input besides the noise, for b windows of f faces: (b, f, 1 + 2c, h, w).

        crops: uint8 (b·f, R, R, 3). A model with `ends_only` has only the ends of each window encoded.
        """
        b, f = len(windows), len(windows[0].frames)
        if self.face is not None:
            if OWN_FACE not in self.conditioning:
                pixels = to_pixels(self.face[None], self.models.dtype)
                self.conditioning[OWN_FACE] = encode_conditioning(self.models.vae, pixels, self.mask)[0]
            return self.conditioning[OWN_FACE].expand(b, f, *self.conditioning[OWN_FACE].shape)
        if not self.models.ends_only:
            frames = [frame for window in windows for frame in window.frames]
            return self.cached_conditioning(frames, crops).unflatten(0, (b, f))
        crops = crops.unflatten(0, (b, f))
        ends = [frame for window in windows for frame in (window.frames[0], window.frames[-1])]
        encoded = self.cached_conditioning(ends, torch.stack([crops[:, 0], crops[:, -1]], 1).flatten(0, 1))
        first, last = encoded.unflatten(0, (b, 2)).unbind(1)
        return interpolate_ends(first, last, f)

    def cached_conditioning(self, frames: list[AlignedFrame], crops: Tensor) -> Tensor:
        """Conditioning of n faces, (n, 1 + 2c, h, w); of a frame that is shown more than once it is encoded once."""
        known = [one for frame in frames if (one := self.known_conditioning(frame)) is not None]
        if len(known) == len(frames):
            return torch.stack(known)
        encoded = torch.cat(
            [
                encode_conditioning(self.models.vae, to_pixels(part, self.models.dtype), self.mask)
                for part in crops.split(self.encoded_together)
            ]
        )
        for frame, one in zip(frames, encoded, strict=True):
            if frame.source is not None:
                self.conditioning[frame.source] = one
        if self.film is not None:
            self.film.add_latents([frame.number for frame in frames], HostCopy([encoded[:, 1:].contiguous()]))
        return encoded

    def known_conditioning(self, frame: AlignedFrame) -> Tensor | None:
        """The conditioning (1 + 2c, h, w) of a face that was encoded before, in this run or for its film."""
        if frame.source in self.conditioning:
            return self.conditioning[frame.source]
        latents = None if self.film is None else self.film.latents(frame.number)
        if latents is None:
            return None
        latents = self.copy_to_device(latents)
        return torch.cat([latent_mask(self.mask, latents.shape[-1])[None], latents])

    def copy_to_device(self, values: Tensor) -> Tensor:
        """Copy a tensor of the host to the device asynchronously."""
        if self.on_gpu:
            values = values.pin_memory()  # PyTorch keeps it until it has been read
        return values.to(self.models.device, non_blocking=True)

    def queue_paste(self) -> None:
        """Queue the pasting of the last pass, unless that has been done."""
        if self.unpasted:
            self.unpasted.queue_paste()
            self.unpasted = None

    def on_denoising_step(self, _: int) -> None:
        """Queue the pasting of the pass before; wait for the GPU where it is MAX_QUEUED_STEPS behind.

        Without that limit a run could not be stopped within a window.
        """
        self.queue_paste()
        if self.on_gpu:
            self.step_events.append(record_event(self.models.device))
            if len(self.step_events) > MAX_QUEUED_STEPS:
                self.step_events.popleft().synchronize()
        if self.on_step:
            self.on_step()


Group = list[Window | AlignedFrame]


class Workers(Protocol):
    """Other processes that paint groups of windows: `paint_groups` on several devices at once.

    kind: of their devices, "cpu" or "cuda"; name: theirs in a report, such as "2 × cpu"; max_groups: held at a time, of
    each call of `paint_groups`. For several people there is a call each, and one takes its frames from another.
    """

    kind: str
    name: str
    max_groups: int

    def paint_groups(self, groups: Iterable[Group], on_step: Callable[[], None], done: int) -> Iterator[AlignedFrame]:
        """The function `paint_groups`; on_step: called several times a second, what it raises stops the run."""
        ...


def paint_groups(
    groups: Iterable[Group],
    painter: Painter,
    on_out_of_memory: Callable[[], Settings | None] | None = None,
    done: int = 0,
) -> Iterator[AlignedFrame]:
    """Paint every window of every group; yields the finished frames in order, each once.

    Groups that lie wholly within the first `done` frames, which an earlier run has finished, are skipped and their
    frames stay as they are.

    A group is finished after the device has been given the work of the painter's `max_pending` next ones, but the first
    that is painted at once, so that there is something to see. Where memory runs out, on_out_of_memory() returns
    settings that need less, until they suffice or it returns None. Windows with broken faces are painted again in a
    wider dtype. Raises UserError where that does not help.
    """
    pending: deque[tuple[Group, list[PendingPass]]] = deque()

    def finish_oldest() -> Iterator[AlignedFrame]:
        group, passes = pending.popleft()
        if broken := [window for one in passes for window in painter.finish(one)]:
            repaint(broken, painter)
        for part in group:
            if isinstance(part, Window):
                yield from part.new
            else:
                yield part

    frames, is_first = 0, True
    for group in groups:
        frames += sum(len(part.new) if isinstance(part, Window) else 1 for part in group)
        while True:
            out_of_memory = None
            try:
                passes = submit(group, painter, skip=frames <= done)
                if is_first:
                    painter.queue_paste()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                # Without its frames, which hold the tensors that did not fit.
                out_of_memory = error.with_traceback(None)
            if out_of_memory is None:
                break
            while pending:  # finishing what was queued before frees its memory
                yield from finish_oldest()
            if painter.on_gpu:
                torch.cuda.empty_cache()
            settings = on_out_of_memory() if on_out_of_memory else None
            if settings is None:
                raise out_of_memory
            painter = Painter(painter.models, settings, painter.on_step, painter.film)
        pending.append((group, passes))
        # A first pass keeps the host busy for longer than the device, so that waiting for it costs little.
        if len(pending) > painter.max_pending or is_first:
            yield from finish_oldest()
        is_first = is_first and not passes
    while pending:
        yield from finish_oldest()


def submit(group: Group, painter: Painter, skip: bool) -> list[PendingPass]:
    """Give the windows of a group to the device, in passes of windows of one length; skip: an earlier run has
    finished them."""
    by_length: dict[int, list[Window]] = {}
    for part in group:
        if isinstance(part, Window):
            by_length.setdefault(len(part.frames), []).append(part)
    size = painter.settings.windows_per_pass
    passes = [alike[i : i + size] for alike in by_length.values() for i in range(0, len(alike), size)]
    if skip:
        for windows in passes:
            painter.skip(windows)
        return []
    return [painter.paint(windows) for windows in passes]


def repaint(windows: list[Window], painter: Painter) -> None:
    """Paint windows with broken faces in a dtype with a wider range than the painter's, one by one.

    That is float32 or, where memory does not suffice for it, bfloat16. Raises UserError where faces are broken again.
    """
    left, tried = deque(windows), [painter.models.dtype]
    settings = replace(painter.settings, windows_per_pass=1, frames_per_pass=1)
    for dtype in FALLBACK_DTYPES.get(painter.models.dtype, ()):
        if painter.on_gpu:
            torch.cuda.empty_cache()
        wide = None
        try:
            wide = Painter(in_dtype(painter.models, dtype), settings, painter.on_step)
            while left and not wide.finish(wide.paint([left[0]])):
                for frame in left.popleft().new:
                    frame.recomputed = True
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
