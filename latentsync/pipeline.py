"""From a video and a voice to the video with the mouth saying the new words.

    frames → faces → windows → latents → faces → frames

Each stage is an iterator that takes from the one before it, so that memory does not grow with the clip. Sound,
decoding, following faces, cutting them out and encoding have a thread each, a bounded number of frames away from the
main one, which drives the device: it finds the faces of the next windows ready, and hands finished frames on without
waiting.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from latentsync.aligning import DECODED_FRAMES, TRACKED_FRAMES, FaceQueue, Source, read_aligned, tokens_of
from latentsync.between import FramesBetween
from latentsync.checkpoints.load import Models
from latentsync.choice import SPEAKING
from latentsync.encoding import EncodingThread
from latentsync.errors import UserError
from latentsync.faces import lookahead_frames, no_face_error
from latentsync.following import Person
from latentsync.hooks import NO_HOOKS, Hooks, RunHooks, StopEarly
from latentsync.landmarks import face_reader
from latentsync.machine import available_memory
from latentsync.media import (
    VideoInfo,
    VideoWriter,
    check_output,
    mix_voices,
    probe_audio,
    probe_video,
    read_audio,
    read_frames,
    read_frames_looped,
)
from latentsync.media.laying import laid_sound
from latentsync.media.segments import SEGMENT_FRAMES, SegmentWriter, clean, unfinished, work_folder
from latentsync.painting import Group, Painter, Workers, paint_groups
from latentsync.people import MAX_PEOPLE, find_people, unsaid_voices
from latentsync.placing import Placement, place_voice, whole_film
from latentsync.prefetch import prefetch
from latentsync.prepared.film import PreparedFilm
from latentsync.prepared.recording import Recorder
from latentsync.rates import describe_painting, painted_step
from latentsync.restoring import check_restorable, with_restorer
from latentsync.retarget import MouthBank, context_frames, held_frames, retarget
from latentsync.settings import WINDOW, Report, Settings
from latentsync.timing import StageClock
from latentsync.turns import find_turns
from latentsync.windows import AlignedFrame, group_windows, split_windows

MEMORY_SHARE = 0.8  # of the free main memory, for the frames that are held at a time


def buffered_crops(settings: Settings, step: int = 1) -> int:
    """Aligned frames that wait for the device: those of one pass, and a window more; step: of `rates.painted_step`."""
    return (settings.windows_per_pass + 1) * WINDOW * step


def buffered_results(settings: Settings, step: int = 1) -> int:
    """Finished frames that wait for the encoder: all that a pass gives at once."""
    return settings.windows_per_pass * WINDOW * step


def max_frames(settings: Settings, step: int = 1) -> int:
    """Frames in memory at most, whatever the clip's length, besides what decoder, tracker and encoder hold."""
    on_device = 2 * (settings.windows_per_pass + 1) * WINDOW * step  # a group, the one before it, and their context
    in_transit = 8  # one a thread, on its way from queue to queue
    buffers = DECODED_FRAMES + TRACKED_FRAMES + buffered_crops(settings, step) + buffered_results(settings, step)
    return buffers + on_device + in_transit


def fit_memory(settings: Settings, info: VideoInfo, held: int = 0, groups: int = 0) -> Settings:
    """The settings with as many windows a pass, at most, as the free main memory has room for their frames.

    held, groups: frames and groups of windows that are held besides `max_frames`. A frame of 4K is 25 MB, of 8K 100 MB.
    Raises UserError where not even those of one window a pass fit.
    """
    step = painted_step(info.rate, settings.paint)
    size, free = 3 * info.width * info.height, MEMORY_SHARE * available_memory()
    for windows in range(settings.windows_per_pass, 0, -1):
        fewer = replace(settings, windows_per_pass=windows)
        frames = max_frames(fewer, step) + held + groups * windows * WINDOW * step
        if frames * size <= free:
            return fewer
    raise UserError(
        f"'{info.path}' has pictures of {info.width} × {info.height}, and up to {frames} are held at a time: "
        f"{frames * size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB of memory are free. Close other programs, or give "
        "a smaller version of the video."
    )


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
    other_voices: Sequence[str | Path] = (),
    sound: str | Path | None = None,
    film: PreparedFilm | Recorder | None = None,
) -> Report:
    """Write `output`: the video with its mouth saying the audio.

    other_voices: what `Settings.other_faces` say, a file each; sound: what is heard instead of the voices, which are
    mixed otherwise. The result lasts as long as the sound, at the frame rate of `Settings.fps`; a shorter video is
    played forward and backward. `Settings.start` and `end` take a part of the video, as if it had been cut out before.
    With `Settings.at` the result is all of the video, or of its part, which says the audio from that time on.
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
    settings = settings or Settings()
    voices = (audio, *other_voices)
    if len(other_voices) != len(settings.other_faces):
        raise UserError(f"{1 + len(settings.other_faces)} faces and {len(voices)} voices: give each face a voice.")
    laid_in = settings.at is not None
    if laid_in and (other_voices or sound):
        raise UserError("A voice that is laid into a longer film is the only one, and is heard: leave out the others.")
    if film is not None and (other_voices or laid_in or settings.start or settings.end):
        raise UserError("A prepared film is for one face, and used from its beginning: leave out --prepared.")
    speaking = settings.face == SPEAKING
    if speaking and (laid_in or film is not None):
        raise UserError(
            "Who speaks is found for the whole of a voice: leave out --at and --prepared, or choose a face."
        )
    if settings.restore:
        check_restorable(models)
    inputs = (video, *voices, *(file for file in (sound, settings.restore) if file), *models.files)
    output = check_output(output, inputs)
    if workers is None:
        models = with_restorer(models, settings.restore)
    info = probe_video(video, video_track).at_choice(settings.fps).between(settings.start, settings.end)
    painted = MAX_PEOPLE if speaking else len(voices)
    held = painted * held_frames(info.rate) if models.retargets else 0
    step = painted_step(info.rate, settings.paint)
    held += (painted - 1) * 2 * (settings.windows_per_pass + 1) * WINDOW * step
    settings = fit_memory(settings, info, held, 0 if workers is None else painted * workers.max_groups)
    device, kind = (str(models.device), models.device.type) if workers is None else (workers.name, workers.kind)
    clock = StageClock()
    with clock.charge(clock.seconds, "sound"):
        wavs = [torch.from_numpy(read_audio(voice, track=None if i else audio_track)) for i, voice in enumerate(voices)]
        samples = max(map(len, wavs)) if sound is None else len(read_audio(sound))
    place = place_voice(info, samples, settings.at)
    wavs, total = [fit_length(wav, place.samples) for wav in wavs], place.total
    dtype = str(models.dtype).removeprefix("torch.")
    fps, painted_fps = (round(float(rate), 3) for rate in (info.rate, info.rate / step))
    report = Report(settings, models.name, models.resolution, device, dtype, fps, painted_fps)
    if step > 1:
        hooks.on_message(f"{describe_painting(info.rate, step)}, those between are composed (--paint every paints all)")
    cancel = threading.Event()
    ahead = lookahead_frames(info.rate)  # so that no face depends on where the sound ends
    if film is not None and not film.covers(total):
        film = None
    run_hooks = RunHooks(hooks)
    turns = find_turns(info, min(total, info.n_frames), run_hooks) if speaking else None
    person, *others = find_people(info, settings, cancel) if turns is None else turns.people
    if laid_in:
        read = whole_film(info, total, cancel)
    else:
        read = read_frames_looped(info, total, cancel, ahead=0 if models.retargets else ahead)
    second_reading = read_frames(info, place.first, place.count + ahead, cancel) if models.retargets else None
    source = Source(
        read,
        wavs[0],
        total,
        repeats=total > info.n_frames,
        second_reading=second_reading,
        cancel=cancel.set,
        rate=info.rate,
        person=person,
        others=list(zip(others, wavs[1:] if turns is None else wavs * len(others), strict=True)),
        turns=turns,
        place=place if laid_in else None,
    )
    counts = {"frames_without_face": 0, "frames_computed_again": 0}  # of the frames that are written
    # A resumed job must have the same models; those that were not loaded from files cannot be compared.
    folder: Path | None = None
    if segment_frames and total > segment_frames and models.files:
        identity = job_identity(models, settings, kind, segment_frames, video_track, audio_track)
        folder = work_folder(output, inputs, identity)
    clean(output, folder)
    for other in unfinished(output):
        if other.folder != folder:
            hooks.on_message(other.describe())

    def make_writer(heard: str | Path, track: int | None) -> VideoWriter | SegmentWriter:
        shared: dict[str, Any] = {"copy_audio": copy_audio, "audio_track": track, "on_wait": run_hooks.wait}
        if folder is None or segment_frames is None:
            return VideoWriter(output, info, heard, settings.crf, **shared)
        return SegmentWriter(
            output,
            info,
            heard,
            settings.crf,
            folder=folder,
            total=total,
            segment_frames=segment_frames,
            counts=counts,
            on_message=hooks.on_message,
            **shared,
        )

    with (
        heard_sound(info, voices, sound, audio_track, place, settings, output, run_hooks.wait) as (heard, track),
        make_writer(heard, track) as writer,
        closing(EncodingThread(writer, buffered_results(settings, step), total, counts, clock, run_hooks)) as encoding,
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
        if report.frames_without_face == place.count and not report.ended_early:
            if isinstance(writer, SegmentWriter):
                writer.keep = False
            raise no_face_error(video)
    report.turns = turns.summary if turns else []
    report.remarks = [*writer.remarks, *filter(None, [place.remark, turns.remark if turns else None])]
    if models.restorer is not None:
        report.restore_seconds = round(models.restorer.seconds_per_face(), 4)
    if other_voices and not report.ended_early:
        report.remarks += unsaid_voices(settings, (person, *others))
    report.seconds, report.waiting = (
        {stage: round(seconds, 3) for stage, seconds in account.items()} for account in (clock.seconds, clock.waiting)
    )
    report.total_seconds = round(time.perf_counter() - began, 3)
    return report


def fit_length(wav: Tensor, samples: int) -> Tensor:
    """A waveform with that many samples: cut, or silent at its end."""
    return torch.nn.functional.pad(wav[:samples], (0, max(samples - len(wav), 0)))


@contextmanager
def heard_sound(
    info: VideoInfo,
    voices: Sequence[str | Path],
    sound: str | Path | None,
    audio_track: int | None,
    place: Placement,
    settings: Settings,
    output: Path,
    on_wait: Callable[[], None],
) -> Iterator[tuple[str | Path, int | None]]:
    """The file and track of a result's sound: `sound`, the only voice, all mixed, or the film's with a voice in it."""
    if settings.at is not None:
        voice = probe_audio(voices[0], audio_track)
        with laid_sound(info, voice, place, settings.at_sound, output, on_wait) as laid:
            yield laid, None
    elif sound is not None:
        yield sound, None
    elif len(voices) == 1:
        yield voices[0], audio_track
    else:
        with TemporaryDirectory(prefix="latentsync-") as folder:
            mixed = Path(folder) / "voices.wav"
            mix_voices(
                [probe_audio(voice, None if i else audio_track) for i, voice in enumerate(voices)], mixed, on_wait
            )
            yield mixed, None


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
    painted, step = 0, painted_step(source.rate, settings.paint)
    pasting_device = models.device if workers is None else torch.device("cpu")

    def count(frames: Iterable[AlignedFrame], stage: str, after: int = 0) -> Iterator[AlignedFrame]:
        for number, aligned in enumerate(frames, 1):
            if number > after:
                report_written()
                hooks.progress(stage, number, source.total)
            yield aligned

    def prepared(groups: Iterable[Group]) -> Iterator[Group]:
        """The groups; when the first is there, the models are made ready for it."""
        for number, group in enumerate(groups):
            if not number:
                with clock.charge(clock.waiting, "models"):
                    hooks.before_painting()
            yield group

    def on_step() -> None:
        report_written()
        hooks.progress("mouths", max(painted, done), source.total)

    people = [source.person or Person(settings.face), *(person for person, _ in source.others)]
    banks = [] if source.second_reading is None else [MouthBank(source.rate) for _ in people]
    context = context_frames(source.rate) if banks else 0
    later = [FaceQueue() for _ in source.others]
    with ExitStack() as stack:
        read_face = stack.enter_context(face_reader()) if banks else None
        aligned_frames = read_aligned(source, people, models, settings, banks, later, clock, film)
        crops = stack.enter_context(
            closing(prefetch(aligned_frames, buffered_crops(settings, step), "crops", hooks.wait, source.cancel))
        )

        def paint(aligned: Iterable[AlignedFrame], index: int) -> Iterator[AlignedFrame]:
            """Give the person of that index the mouth that says the voice."""
            between = FramesBetween(models.retargets, models.resolution, pasting_device) if step > 1 else None
            to_paint = aligned if between is None else between.leave_out(aligned)
            groups = prepared(group_windows(split_windows(to_paint), settings.windows_per_pass))
            # The faces of later people are cut out of frames with the mouths of earlier ones, those of context too.
            skipped = max(done - context - (len(later) - index) * (context + 2 * WINDOW * step), 0) // step
            if workers is None:
                frames = paint_groups(groups, Painter(models, settings, on_step, film), on_out_of_memory, skipped)
            else:
                frames = workers.paint_groups(groups, on_step, skipped)
            if between is not None:
                frames = between.put_back(frames)
            frames = clock.time(frames, "mouths")
            if read_face is not None:
                frames = clock.time(retarget(frames, banks[index], read_face, source.rate), "retarget")
            return frames

        frames = paint(count(clock.wait(crops, "crops"), "faces"), 0)
        for index, (queue, (_, wav)) in enumerate(zip(later, source.others, strict=True), 1):
            spoken = prefetch(tokens_of(source, wav, models, settings), TRACKED_FRAMES, "sound")
            tokens = stack.enter_context(closing(spoken))
            aligned_again = queue.align(frames, tokens, models.resolution, source.repeats)
            frames = queue.merge(paint(aligned_again, index))
        for aligned in count(frames, "mouths", done):
            painted += 1
            yield aligned
