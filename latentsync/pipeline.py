"""From a video and a voice to the video with the mouth saying the new words.

    frames → faces → windows → latents → faces → frames

Each stage is an iterator that takes from the one before it, so that memory does not grow with the clip. Sound,
decoding, following faces, cutting them out and encoding have a thread each, a bounded number of frames away from the
main one, which drives the device: it finds the faces of the next windows ready, and hands finished frames on without
waiting.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from latentsync import FPS
from latentsync.audio import audio_chunks, frame_count, on_side_stream
from latentsync.checkpoints.load import Models
from latentsync.errors import UserError
from latentsync.faces import Face, lookahead_frames, track_faces
from latentsync.hooks import NO_HOOKS, Hooks, RunHooks, StopEarly
from latentsync.landmarks import face_reader
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
from latentsync.painting import Painter, Workers, paint_groups
from latentsync.prefetch import BackgroundConsumer, close, prefetch
from latentsync.prepared.film import PreparedFilm
from latentsync.prepared.recording import Recorder
from latentsync.retarget import MouthBank, context_frames, held_frames, retarget
from latentsync.settings import WINDOW, Report, Settings
from latentsync.timing import StageClock
from latentsync.windows import AlignedFrame, align_frames, group_windows, split_windows, until_repeated

MAX_CROP_BYTES = 512 * 2**20  # of crops that are stored of a video that is played more than once: 26 s at 512 px
DECODED_FRAMES = 8  # that wait for the face tracker
TRACKED_FRAMES = 8  # that wait for their faces to be cut out
MEMORY_SHARE = 0.8  # of the free main memory, for the frames that are held at a time
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A video and a voice, opened.

    frames: numbered, uint8 (H, W, 3), `rate` a second, writable, `total` of them, and of a longer video some more, by
    which the last faces are found; wav: (samples,) float32 at 16 kHz;
    repeats: the video is shorter than the sound and played forward and backward; second_reading: for a model with a
    face of its own, the frames until they repeat, once more: they are followed up to ten seconds early; cancel: ends
    both from another thread, whatever they wait for.
    """

    frames: Iterator[tuple[int, np.ndarray]]
    wav: Tensor
    total: int
    repeats: bool = False
    second_reading: Iterator[np.ndarray] | None = None
    cancel: Callable[[], None] = lambda: None
    rate: Fraction = Fraction(FPS)


def buffered_crops(settings: Settings) -> int:
    """Aligned frames that wait for the device: those of one pass, and a window more."""
    return (settings.windows_per_pass + 1) * WINDOW


def buffered_results(settings: Settings) -> int:
    """Finished frames that wait for the encoder: all that a pass gives at once."""
    return settings.windows_per_pass * WINDOW


def max_frames(settings: Settings) -> int:
    """Frames in memory at most, whatever the clip's length, besides what decoder, tracker and encoder hold."""
    on_device = 2 * (settings.windows_per_pass + 1) * WINDOW  # a group, the one before it, and their context
    in_transit = 8  # one a thread, on its way from queue to queue
    buffers = DECODED_FRAMES + TRACKED_FRAMES + buffered_crops(settings) + buffered_results(settings)
    return buffers + on_device + in_transit


def fit_memory(settings: Settings, info: VideoInfo, held: int = 0, groups: int = 0) -> Settings:
    """The settings with as many windows a pass, at most, as the free main memory has room for their frames.

    held, groups: frames and groups of windows that are held besides `max_frames`. A frame of 4K is 25 MB, of 8K 100 MB.
    Raises UserError where not even those of one window a pass fit.
    """
    size, free = 3 * info.width * info.height, MEMORY_SHARE * available_memory()
    for windows in range(settings.windows_per_pass, 0, -1):
        fewer = replace(settings, windows_per_pass=windows)
        frames = max_frames(fewer) + held + groups * windows * WINDOW
        if frames * size <= free:
            return fewer
    raise UserError(
        f"'{info.path}' has pictures of {info.width} × {info.height}, and up to {frames} are held at a time: "
        f"{frames * size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB of memory are free. Close other programs, or give "
        "a smaller version of the video."
    )


class EncodingThread:
    """Writes finished frames in a thread of its own, and reports those that are written. Use it in `closing`.

    counts: what is counted of the written frames, updated in place.
    """

    def __init__(
        self,
        writer: VideoWriter | SegmentWriter,
        depth: int,
        total: int,
        counts: dict[str, int],
        clock: StageClock,
        hooks: RunHooks,
    ):
        self._writer, self._counts, self._clock, self._hooks = writer, counts, clock, hooks
        self._done, self._reported, self._total = writer.frames, 0, total
        self._consumer = BackgroundConsumer(self._write, depth, "writing", hooks.wait, writer.abort)

    def _write(self, item: tuple[np.ndarray, bool, bool]) -> None:
        frame, without_face, recomputed = item
        with self._clock.charge(self._clock.seconds, "writing"):
            self._counts["frames_without_face"] += without_face
            self._counts["frames_computed_again"] += recomputed
            self._writer.write(frame)

    def submit(self, aligned: AlignedFrame) -> None:
        """Hand a frame over as soon as there is room. Raises what writing an earlier one raised."""
        with self._clock.charge(self._clock.waiting, "writing"):
            self._consumer.submit((aligned.frame, aligned.crop is None, aligned.recomputed))

    def report(self) -> None:
        """Report the progress of what has been written, and raise what was wrong with it."""
        self._consumer.check()
        while self._reported < self._consumer.completed:
            self._reported += 1
            self._hooks.progress("writing", self._done + self._reported, self._total)

    def finish(self) -> None:
        """Wait until all frames are written."""
        with self._clock.charge(self._clock.waiting, "writing"):
            self._consumer.finish()

    def close(self) -> None:
        self._consumer.close()


def lipsync(
    video: str | Path,
    audio: str | Path,
    output: str | Path,
    models: Models,
    settings: Settings | None = None,
    hooks: Hooks = NO_HOOKS,
    segment_frames: int | None = SEGMENT_FRAMES,
    copy_audio: bool = False,
    video_track: int | None = None,
    audio_track: int | None = None,
    workers: Workers | None = None,
    film: PreparedFilm | Recorder | None = None,
) -> Report:
    """Write `output`: the video with its mouth saying the audio.

    It lasts as long as the sound, at the frame rate of `Settings.fps`; a shorter video is played forward and backward.
    Whatever ends a run early, no part of the output is left, and no thread; but after `StopEarly` the finished frames
    are, with their sound. copy_audio: keep the sound bit for bit in any container, see `latentsync.media.sound`.
    video_track, audio_track: numbers of tracks, see `probe_video` and `probe_audio`.
    workers: paint the faces in place of `models`, which may then be without weights, see `load_outline`.
    film: the video's faces and their latents, from an earlier run or for a later one, see `latentsync.prepared`; not
    used where it has too few frames. Workers encode the faces themselves.

    A job of more than `segment_frames` is written in segments of as many, see `media.segments`. Whatever ends it early,
    but `StopEarly`, the same call resumes after the last finished one, to the same result. It finds the faces of
    earlier frames once more, but neither paints them nor gives them to on_frame. None: in one piece.
    Raises UserError where the files cannot be used, the video's frames do not fit into memory, or it never shows a
    usable face.
    """
    began = time.perf_counter()
    output = check_output(output, (video, audio, *models.files))
    settings = settings or Settings()
    info = probe_video(video, video_track).at_choice(settings.fps)
    held = held_frames(info.rate) if models.retargets else 0
    settings = fit_memory(settings, info, held, 0 if workers is None else workers.max_groups)
    device, kind = (str(models.device), models.device.type) if workers is None else (workers.name, workers.kind)
    clock = StageClock()
    with clock.charge(clock.seconds, "sound"):
        wav = torch.from_numpy(read_audio(audio, track=audio_track))
    total = frame_count(len(wav), info.rate)
    dtype = str(models.dtype).removeprefix("torch.")
    report = Report(settings, models.name, models.resolution, device, dtype, round(float(info.rate), 3))
    cancel = threading.Event()
    ahead = lookahead_frames(info.rate)  # so that no face depends on where the sound ends
    if film is not None and not film.covers(total):
        film = None
    source = Source(
        read_frames_looped(info, total, cancel, ahead=0 if models.retargets else ahead),
        wav,
        total,
        repeats=total > info.n_frames,
        second_reading=read_frames(info, count=total + ahead, cancel=cancel) if models.retargets else None,
        cancel=cancel.set,
        rate=info.rate,
    )
    counts = {"frames_without_face": 0, "frames_computed_again": 0}  # of the frames that are written
    run_hooks = RunHooks(hooks)
    folder: Path | None = None
    writer: VideoWriter | SegmentWriter
    # A resumed job must have the same models; those that were not loaded from files cannot be compared.
    if segment_frames and total > segment_frames and models.files:
        identity = job_identity(models, settings, kind, segment_frames, video_track, audio_track)
        folder = work_folder(output, (video, audio, *models.files), identity)
        clean(output, folder)
        writer = SegmentWriter(
            output,
            info,
            audio,
            settings.crf,
            folder=folder,
            total=total,
            segment_frames=segment_frames,
            counts=counts,
            on_message=hooks.on_message,
            copy_audio=copy_audio,
            audio_track=audio_track,
            on_wait=run_hooks.wait,
        )
    else:
        clean(output)
        writer = VideoWriter(
            output, info, audio, settings.crf, copy_audio=copy_audio, audio_track=audio_track, on_wait=run_hooks.wait
        )
    for other in unfinished(output):
        if other.folder != folder:
            hooks.on_message(other.describe())

    with (
        writer,
        closing(EncodingThread(writer, buffered_results(settings), total, counts, clock, run_hooks)) as encoding,
        closing(
            generate_frames(
                source,
                models,
                settings,
                clock,
                run_hooks,
                encoding.report,
                hooks.on_out_of_memory,
                writer.frames,
                workers,
                film,
            )
        ) as frames,
    ):
        done = report.frames = report.resumed_from = writer.frames
        try:
            if done:
                run_hooks.progress("mouths", done, total)
                run_hooks.progress("writing", done, total)
            for aligned in islice(frames, done, None) if done < total else ():
                encoding.submit(aligned)
                report.frames += 1
                run_hooks.frame(aligned.frame)
                encoding.report()
            run_hooks.frames_complete = True
        except StopEarly:
            if not report.frames:
                raise
            frames.close()  # frees what is being painted, while the encoder catches up
            report.ended_early = writer.cut = report.frames < total
            run_hooks.silence()
        encoding.finish()
        with suppress(StopEarly):  # there is nothing left to end early
            encoding.report()
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


def job_identity(
    models: Models,
    settings: Settings,
    kind: str,
    segment_frames: int,
    video_track: int | None,
    audio_track: int | None,
) -> dict[str, object]:
    """All that decides a job's result besides its files, ready for JSON: a job with another one is not resumed.

    kind: of the device that paints, "cpu" or "cuda".
    """
    # What goes through the device at once is no part of it: that follows from the memory that is free.
    return asdict(replace(settings, windows_per_pass=1, frames_per_pass=1)) | {
        "segment": segment_frames,
        "device": kind,
        "dtype": str(models.dtype).removeprefix("torch."),
        "model": models.name,
        "resolution": models.resolution,
        "mel_range": models.mel_range,
        "speech_level": models.speech_level,
        "match_colours": models.match_colours,
        "ends_only": models.ends_only,
        "video_track": video_track,
        "audio_track": audio_track,
    }


def generate_frames(
    source: Source,
    models: Models,
    settings: Settings,
    clock: StageClock,
    hooks: RunHooks | None = None,
    report_written: Callable[[], None] = lambda: None,
    on_out_of_memory: Callable[[], Settings | None] | None = None,
    done: int = 0,
    workers: Workers | None = None,
    film: PreparedFilm | Recorder | None = None,
) -> Generator[AlignedFrame, None, None]:
    """The chain of stages between decoding and encoding: finished frames, in order.

    report_written: called at every step of progress; done: of the first frames, whose mouths need not be painted. Close
    the iterator, if it is not taken to the end. Between the source's frames and what it yields are `max_frames` and the
    tracker's at most.
    """
    hooks = hooks or RunHooks(Hooks())
    painted = 0

    def count(frames: Iterable[AlignedFrame], stage: str, after: int = 0) -> Iterator[AlignedFrame]:
        for number, aligned in enumerate(frames, 1):
            if number > after:
                report_written()
                hooks.progress(stage, number, source.total)
            yield aligned

    def on_step() -> None:
        report_written()
        hooks.progress("mouths", max(painted, done), source.total)

    bank = None if source.second_reading is None else MouthBank(source.rate)
    aligned_frames = read_aligned(source, models, settings, bank, clock, film)
    with ExitStack() as stack:
        crops = stack.enter_context(
            closing(prefetch(aligned_frames, buffered_crops(settings), "crops", hooks.wait, source.cancel))
        )
        parts = split_windows(count(clock.wait(crops, "crops"), "faces"))
        groups = group_windows(parts, settings.windows_per_pass)
        skipped = done if bank is None else max(done - context_frames(source.rate), 0)
        if workers is None:
            frames = paint_groups(groups, Painter(models, settings, on_step, film), on_out_of_memory, skipped)
        else:
            frames = workers.paint_groups(groups, on_step, skipped)
        frames = clock.time(frames, "mouths")
        if bank is not None:
            frames = clock.time(retarget(frames, bank, stack.enter_context(face_reader()), source.rate), "retarget")
        for aligned in count(frames, "mouths", done):
            painted += 1
            yield aligned


def read_aligned(
    source: Source,
    models: Models,
    settings: Settings,
    bank: MouthBank | None,
    clock: StageClock,
    film: PreparedFilm | Recorder | None = None,
) -> Iterator[AlignedFrame]:
    """The first half of the chain: decode, follow the face, encode the sound, cut out the face.

    bank: collects the mouths of the source's second reading, up to ten seconds early.
    """
    max_crops = MAX_CROP_BYTES // (3 * models.resolution**2) if source.repeats else None
    repeated: list[tuple[int, np.ndarray]] = []
    with ExitStack() as threads:

        def in_thread(items: Iterable[T], stage: str, depth: int) -> Iterator[T]:
            made = threads.enter_context(closing(prefetch(clock.time(items, stage), depth, stage)))
            return clock.wait(made, stage)

        chunks = audio_chunks(
            models.audio_encoder,
            source.wav,
            source.total,
            models.mel_range,
            models.speech_level,
            settings.silence_gate,
            source.rate,
        )
        tokens = in_thread(on_side_stream(chunks, models.device), "sound", TRACKED_FRAMES)
        frames = in_thread(source.frames, "reading", DECODED_FRAMES)
        first_time = until_repeated(frames, repeated)
        tracked: Iterable[tuple[np.ndarray, Face | None]]
        if bank is None or source.second_reading is None:
            followed = follow_face(first_time, source, settings, film)
            tracked = in_thread(followed, "faces", TRACKED_FRAMES)
        else:
            followed = follow_face(source.second_reading, source, settings, film)
            faces = in_thread(bank.collect(followed), "faces", bank.chunk)
            tracked = zip(first_time, faces, strict=False)
        aligned = align_frames(tracked, tokens, models.resolution, max_crops, chain(repeated, frames))
        yield from islice(clock.time(aligned, "crops"), source.total)


def follow_face(
    frames: Iterator[np.ndarray], source: Source, settings: Settings, film: PreparedFilm | Recorder | None
) -> Iterator[tuple[np.ndarray, Face | None]]:
    """The source's first `total` frames with their faces, which the frames after them have helped to find."""

    def track(frames: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, Face | None]]:
        return iter(track_faces(frames, which=settings.face, rate=source.rate))

    if film is not None:
        yield from film.follow(frames, track, source.total)
        return
    tracked = track(frames)
    try:
        yield from islice(tracked, source.total)
    finally:
        close(tracked)
