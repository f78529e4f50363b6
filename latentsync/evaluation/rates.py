"""Frame rates: the same clips at 25, 30 and 60 frames a second, and several ways to paint them at 60.

The films at other rates than the clip's own are motion-compensated from it (ffmpeg's minterpolate).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from latentsync import FPS
from latentsync.alignment import crop_face, fixed_mask
from latentsync.audio import audio_chunks, frame_count, on_side_stream
from latentsync.between import FramesBetween, show_face
from latentsync.checkpoints.load import Models
from latentsync.evaluation.appearance import NEAR, mouth_hulls
from latentsync.evaluation.clips import Clip, FaceTrack, track_clip
from latentsync.evaluation.measures import correlation, flicker, peak
from latentsync.evaluation.people import hull_points
from latentsync.evaluation.report import nan_mean
from latentsync.landmarks import face_reader
from latentsync.media import probe_video, read_frames
from latentsync.media.process import check_exit, file_url, input_arguments, read_log, run_ffmpeg
from latentsync.painting import Painter, paint_groups
from latentsync.retarget import MouthBank, retarget
from latentsync.settings import Settings
from latentsync.windows import AlignedFrame, align_frames, group_windows, split_windows

Frames = list[AlignedFrame]


def paint_every_frame(frames: Frames, painter: Painter) -> None:
    """Windows of 16 consecutive frames, as the pipeline has them."""
    for _ in paint_groups(group_windows(split_windows(frames), painter.settings.windows_per_pass), painter):
        pass


def paint_in_two_sets(frames: Frames, painter: Painter) -> None:
    """Windows of 16 even frames and windows of 16 odd ones: each lasts as long as at half the rate."""
    for first in 0, 1:
        paint_every_frame(frames[first::2], painter)


def paint_every_second_frame(frames: Frames, painter: Painter) -> None:
    """Windows of 16 even frames; an odd frame is composed of those beside it, see `between`."""
    between = FramesBetween(painter.face is not None, painter.models.resolution, painter.models.device)
    windows = split_windows(between.leave_out(frames))
    for _ in between.put_back(paint_groups(group_windows(windows, painter.settings.windows_per_pass), painter)):
        pass


def paint_and_filter(frames: Frames, painter: Painter) -> None:
    """Every frame, and then the mean of three painted faces, weighted ¼, ½, ¼: as long as a frame at half the rate."""
    paint_every_frame(frames, painter)
    faces = [None if frame.crop is None else painted_face(frame, painter).astype(np.float32) for frame in frames]
    for frame, before, here, after in zip(frames[1:], faces, faces[1:], faces[2:], strict=False):
        if before is not None and here is not None and after is not None:
            show(frame, ((before + 2 * here + after) / 4).round().astype(np.uint8), painter)


def painted_face(frame: AlignedFrame, painter: Painter) -> np.ndarray:
    """The face uint8 (R, R, 3) that was painted for a frame, cut out of it again if it was pasted."""
    if frame.generated is not None:
        return frame.generated
    return crop_face(frame.frame, frame.matrix, painter.models.resolution)


def show(frame: AlignedFrame, face: np.ndarray, painter: Painter) -> None:
    """Give a frame a face uint8 (R, R, 3)."""
    if painter.face is not None:
        frame.generated = face
    else:
        show_face(frame, face, torch.from_numpy(fixed_mask(painter.models.resolution).copy()))


Way = Callable[[Frames, Painter], None]
# Frames a second, the name of a way, the way, and the share of the frames that go through the network.
CASES: tuple[tuple[int, str, Way, float], ...] = (
    (25, "every frame", paint_every_frame, 1.0),
    (30, "every frame", paint_every_frame, 1.0),
    (60, "every frame", paint_every_frame, 1.0),
    (60, "two sets of windows", paint_in_two_sets, 1.0),
    (60, "every second frame", paint_every_second_frame, 0.5),
    (60, "every frame, filtered", paint_and_filter, 1.0),
)


@dataclass(frozen=True)
class RateMeasures:
    """Measures of a clip dubbed in one of the CASES.

    correlations: of the opening with that of the voice's own clip, at the lags of `measures.LAGS`, both at 25 a second;
    flicker, flicker_real: of the mouth in the result and in the film, grey levels a second.
    """

    person: str
    rate: int
    way: str
    correlations: np.ndarray
    flicker: float
    flicker_real: float


def film_at(path: Path, rate: int, folder: Path) -> Path:
    """The film at another frame rate, without sound, motion-compensated and without loss. Raises UserError."""
    output = folder / f"{path.parent.name}-{path.stem}-{rate}.mp4"
    graph = f"minterpolate=fps={rate}:mi_mode=mci:mc_mode=aobmc:me_mode=bidir:vsbmc=1"
    encoding = ["-c:v", "libx264", "-qp", "0", "-preset", "ultrafast", "-an", "-y", file_url(output)]
    with run_ffmpeg([*input_arguments(path), "-vf", graph, *encoding]) as (process, log):
        process.wait()  # as long as it takes: frames are looked for all over the picture
        check_exit(process, read_log(log), path)
    return output


Painted = dict[tuple[str, int, str], list[np.ndarray | None]]  # by a voice's name, a rate and a way


def paint(frames: Frames, way: Way, key: tuple[str, int, str], painter: Painter, known: Painted) -> None:
    """Paint the frames. A model with a face of its own paints the same in every film: `known` has it by `key`."""
    if key not in known or len(known[key]) < len(frames):
        way(frames, painter)
        if painter.face is not None:
            known[key] = [frame.generated for frame in frames]
        return
    for frame, generated in zip(frames, known[key], strict=False):
        frame.generated = generated if frame.crop is not None else None


def dub_at(
    track: FaceTrack, voice: Clip, rate: int, name: str, way: Way, models: Models, settings: Settings, known: Painted
) -> np.ndarray:
    """Dub a film of `rate` frames a second with a voice: uint8 (n, H, W, 3), up to the end of the shorter."""
    wav = voice.wav
    exact = Fraction(rate)
    n = min(len(track.frames), frame_count(len(wav), exact))
    bank = MouthBank(exact)
    faces = track.faces
    if models.retargets:
        faces = list(bank.collect(zip(track.frames, faces, strict=True)))
    traits = models.mel_range, models.speech_level, settings.silence_gate
    chunks = audio_chunks(models.audio_encoder, torch.from_numpy(wav), n, *traits, exact)
    tracked = zip(track.frames[:n].copy(), faces[:n], strict=True)
    frames = list(align_frames(tracked, on_side_stream(chunks, models.device), models.resolution))
    paint(frames, way, (voice.name, rate, name), Painter(models, settings), known)
    if not models.retargets:
        return np.stack([frame.frame for frame in frames])
    with face_reader() as read_face:
        return np.stack([frame.frame for frame in retarget(frames, bank, read_face, exact)])


def at_25(opening: np.ndarray, rate: int) -> np.ndarray:
    """A curve (n,) of `rate` values a second at 25 a second; what is unknown is interpolated."""
    known = np.flatnonzero(np.isfinite(opening))
    times = np.arange(round(len(opening) * FPS / rate)) / FPS
    return np.interp(times, known / rate, opening[known]) if len(known) else np.full(len(times), np.nan)


def measure_rates(
    films: list[tuple[Path, Clip]], folder: Path, models: Models, settings: Settings
) -> Iterator[RateMeasures]:
    """Dub every film with the voice of a clip in all CASES; folder: for the films at other rates. Raises UserError."""
    known: Painted = {}
    for path, voice in films:
        tracks: dict[int, FaceTrack] = {}
        for rate, name, way, _ in CASES:
            if rate not in tracks:
                info = probe_video(path if rate == FPS else film_at(path, rate, folder)).at_choice("source")
                tracks[rate] = track_clip(np.stack(list(read_frames(info))), rate=rate)
            source = tracks[rate]
            result = track_clip(dub_at(source, voice, rate, name, way, models, settings, known), source.faces, rate)
            n = len(result.crops)
            hulls = mouth_hulls(hull_points(source, source)[:n], source.crops.shape[1], NEAR)
            mouth = hulls.mean(0) > 0.5
            yield RateMeasures(
                path.parent.name,
                rate,
                name,
                correlation(at_25(result.opening, rate), voice.track.opening),
                rate * flicker(result.crops, mouth),
                rate * flicker(source.crops[:n], mouth),
            )


def rates_table(measures: list[RateMeasures]) -> str:
    """A row for every one of the CASES that was measured, in Markdown, with means over the films."""
    lines = [
        "| frames a second | painted | films | correlation | at ms | flicker a second | of the film | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rate, name, _, share in CASES:
        rows = [each for each in measures if (each.rate, each.way) == (rate, name)]
        if rows:
            best, lag = peak(nan_mean([each.correlations for each in rows]))
            ours, real = (np.mean([getattr(each, key) for each in rows]) for key in ("flicker", "flicker_real"))
            when = "–" if lag is None else f"{lag * 1000 // FPS:+d}"
            lines.append(
                f"| {rate} | {name} ({share * rate:.0f} a second) | {len(rows)} | {best:.3f} | {when} "
                f"| {ours:.0f} | {real:.0f} | {ours / real:.2f} |"
            )
    return "\n".join(lines)
