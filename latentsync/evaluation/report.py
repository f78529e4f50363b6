"""From clips to measures: dub them, measure each, and summarise them by person."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latentsync import SAMPLE_RATE
from latentsync.alignment import fixed_mask
from latentsync.checkpoints.load import Models
from latentsync.corpus import HELD_OUT_SPEAKERS
from latentsync.evaluation.clips import MAX_TRACKS, SIDE, Clip, FaceTrack, track_clip
from latentsync.evaluation.dubbing import dub, reference_frames
from latentsync.evaluation.judge import MAX_OFFSET, Check, Judge, check, judge_clip, sync_score
from latentsync.evaluation.measures import (
    border_energy,
    correlation,
    detail,
    flicker,
    is_nearest,
    landmark_distance,
    loudness,
    pauses,
    peak,
    psnr,
    ssim,
)
from latentsync.settings import Settings

SILENCE = 2.0  # seconds of silence that every clip is dubbed with
MIN_PAUSE = 5  # frames, to measure a variance
HIDDEN = fixed_mask(SIDE) < 0.5
WHOLE = np.ones_like(HIDDEN)

# Rows of the table of groups: key, label, format.
TABLE = (
    ("clips", "clips", "{:d}"),
    ("psnr", "self-dub: PSNR of the generated region, dB", "{:.1f}"),
    ("ssim", "self-dub: SSIM of the generated region", "{:.3f}"),
    ("ssim_crop", "self-dub: SSIM of the crop", "{:.3f}"),
    ("lmd", "self-dub: LMD, px of a 256 crop", "{:.2f}"),
    ("lmd_kept", "self-dub: LMD if the reference's mouth were kept", "{:.2f}"),
    ("correlation", "cross-dub: correlation of generated and true opening", "{:.2f}"),
    ("lag", "cross-dub: lag of its peak, frames (late: positive)", "{:+d}"),
    ("mismatched", "cross-dub: correlation with other clips' openings", "{:.2f}"),
    ("loudness", "cross-dub: correlation of loudness and true opening", "{:.2f}"),
    ("nearest", "cross-dub: the true track is the nearest", "{:.0%}"),
    ("tracks", "cross-dub: of how many tracks", "{:.1f}"),
    ("judge_confidence", "judge: confidence", "{:.2f}"),
    ("judge_real", "judge: confidence in the real clips of that sound", "{:.2f}"),
    ("judge_undubbed", "judge: confidence in the clips before they were dubbed", "{:.2f}"),
    ("judge_in_step", "judge: found in step", "{:.0%}"),
    ("silent_variance", "silence: variance of the opening, over that of speech", "{:.2f}"),
    ("pause_variance", "pauses: variance of the opening, over that of speech", "{:.2f}"),
    ("pause_variance_real", "pauses: the same of the real clips", "{:.2f}"),
    ("sharpness", "detail over the real clip's, self-dub", "{:.2f}"),
    ("flicker", "flicker over the real clip's, self-dub", "{:.2f}"),
    ("flicker_cross", "flicker over the real clip's, cross-dub", "{:.2f}"),
    ("seam", "seam over the real clip's, self-dub", "{:.2f}"),
    ("seam_cross", "seam over the real clip's, cross-dub", "{:.2f}"),
    ("seconds_per_frame", "seconds a frame of generating", "{:.3f}"),
)


@dataclass
class Result:
    """Names and measures of a clip, and the faces (reference, generated, truth) of both dubs for the contact sheet."""

    speaker: str
    name: str
    voice: str
    measures: dict = field(default_factory=dict)
    faces: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=dict)


def ratio(value: float, real: float) -> float:
    """value / real, NaN if real is 0."""
    return value / real if real > 0 else np.nan


def pause_variance(opening: np.ndarray, wav: np.ndarray) -> float:
    """Variance of the opening in the pauses of the sound over that in its speech; NaN if there are no pauses."""
    quiet = pauses(loudness(wav))[: len(opening)]
    opening = opening[: len(quiet)]
    if min(quiet.sum(), (~quiet).sum()) < MIN_PAUSE:
        return np.nan
    return ratio(float(np.nanvar(opening[quiet])), float(np.nanvar(opening[~quiet])))


def steadiness(result: FaceTrack, source: FaceTrack) -> tuple[float, float]:
    """Flicker and seam of the generated region, over those of the real clip."""
    crops, real = result.crops, source.crops[: len(result.crops)]
    return (
        ratio(flicker(crops, HIDDEN), flicker(real, HIDDEN)),
        ratio(border_energy(crops, HIDDEN), border_energy(real, HIDDEN)),
    )


def measure_self_dub(clip: Clip, models: Models, settings: Settings, out: Result) -> None:
    """Dub the clip with its own sound, its reference half a clip away."""
    result = track_clip(dub(clip, clip.wav, models, settings, own_sound=True), clip.track.faces)
    n = len(result.crops)
    true, lips = clip.track.crops[:n], clip.track.lips[:n]
    flickering, seam = steadiness(result, clip.track)
    out.measures |= {
        "psnr": psnr(result.crops, true, HIDDEN),
        "ssim": ssim(result.crops, true, HIDDEN),
        "ssim_crop": ssim(result.crops, true, WHOLE),
        "lmd": landmark_distance(result.lips, lips),
        "lmd_kept": landmark_distance(lips[reference_frames(n)], lips),
        "sharpness": ratio(detail(result.crops, HIDDEN), detail(true, HIDDEN)),
        "flicker": flickering,
        "seam": seam,
    }
    out.faces["its own sound"] = (true[reference_frames(n)], result.crops, true)


def measure_cross_dub(
    clip: Clip,
    other: Clip,
    tracks: list[np.ndarray],
    models: Models,
    settings: Settings,
    judge: Judge | None,
    out: Result,
) -> FaceTrack:
    """Dub the clip with another's sound; tracks: true mouth openings of other clips of that voice."""
    started = time.perf_counter()
    frames = dub(clip, other.wav, models, settings)
    seconds = time.perf_counter() - started
    result = track_clip(frames, clip.track.faces)
    flickering, seam = steadiness(result, clip.track)
    others = [correlation(result.opening, track) for track in tracks]
    out.measures |= {
        "correlation": correlation(result.opening, other.track.opening),
        "mismatched": nan_mean(others) if others else np.full_like(correlation(result.opening, result.opening), np.nan),
        "loudness": correlation(loudness(other.wav), other.track.opening),
        "nearest": is_nearest(result.opening, [other.track.opening, *tracks]) if tracks else np.nan,
        "tracks": len(tracks) + 1,
        "pause_variance": pause_variance(result.opening, other.wav),
        "pause_variance_real": pause_variance(other.track.opening, other.wav),
        "flicker_cross": flickering,
        "seam_cross": seam,
        "seconds_per_frame": seconds / len(frames),
    }
    if judge is not None:
        score = sync_score(judge_clip(judge, result.crops, other.wav))
        out.measures |= {
            "judge_confidence": score.confidence,
            "judge_offset": score.offset,
            "judge_in_step": abs(score.offset) <= MAX_OFFSET,
            "judge_real": sync_score(judge_clip(judge, other.track.crops, other.wav)).confidence,
            "judge_undubbed": sync_score(judge_clip(judge, clip.track.crops, other.wav)).confidence,
        }
    truth = other.track.crops[: len(result.crops)]
    out.faces[f"the sound of {other.speaker}/{other.name}"] = (clip.track.crops[: len(truth)], result.crops, truth)
    return result


def measure_silence(clip: Clip, spoken: FaceTrack, models: Models, settings: Settings, out: Result) -> None:
    """Dub the clip with silence; spoken: its dub with another's sound."""
    silence = np.zeros(round(SILENCE * SAMPLE_RATE), np.float32)
    silent = track_clip(dub(clip, silence, models, settings), clip.track.faces)
    out.measures |= {"opening_silent": np.nanvar(silent.opening), "opening_spoken": np.nanvar(spoken.opening)}


def measure_clips(
    clips: dict[str, list[Clip]], limit: int | None, models: Models, settings: Settings, judge: Judge | None
) -> Iterator[Result]:
    """Measure up to `limit` clips of every speaker, each dubbed with the sound of the speaker's next one.

    A speaker with only one clip gets the sound of the next speaker.
    """
    everyone = [clip for of_speaker in clips.values() for clip in of_speaker]
    for of_speaker in clips.values():
        for clip in of_speaker[:limit]:
            candidates = of_speaker if len(of_speaker) > 1 else everyone
            other = candidates[(candidates.index(clip) + 1) % len(candidates)]
            tracks = [real.track.opening for real in clips[other.speaker] if real is not other][: MAX_TRACKS - 1]
            out = Result(clip.speaker, clip.name, f"{other.speaker}/{other.name}")
            measure_self_dub(clip, models, settings, out)
            spoken = measure_cross_dub(clip, other, tracks, models, settings, judge, out)
            measure_silence(clip, spoken, models, settings, out)
            yield out


def check_judge(judge: Judge, clips: dict[str, list[Clip]]) -> Check:
    """Check a judge on real clips, each also with the sound of the next one."""
    everyone = [clip for of_speaker in clips.values() for clip in of_speaker]
    following = [*everyone[1:], everyone[0]]
    return check(
        [judge_clip(judge, clip.track.crops, clip.wav) for clip in everyone],
        [judge_clip(judge, a.track.crops, b.wav) for a, b in zip(everyone, following, strict=True) if a is not b],
    )


def nan_mean(values: list) -> np.ndarray:
    """Mean of the finite values over the first axis; NaN where there are none."""
    array = np.asarray(values, float)
    finite = np.isfinite(array)
    return np.where(finite.any(0), np.where(finite, array, 0).sum(0) / np.maximum(finite.sum(0), 1), np.nan)


def summarise(results: list[Result]) -> dict:
    """Means of a group over its clips; correlations are averaged at every lag before the peak is taken."""
    means: dict = {"clips": len(results)}
    for key, _, _ in TABLE:
        values = [result.measures[key] for result in results if key in result.measures]
        if values:
            mean = nan_mean(values)
            means[key], lag = peak(mean) if mean.ndim else (float(mean), None)
            if key == "correlation":
                means["lag"] = lag
    # The ratio of the means, since the ratio of a clip with little speech is mostly noise.
    silent, spoken = (
        nan_mean([result.measures[f"opening_{how}"] for result in results]) for how in ("silent", "spoken")
    )
    return means | {"silent_variance": ratio(float(silent), float(spoken))}


def summarise_groups(results: list[Result]) -> dict[str, dict]:
    """Summaries of every speaker, of all speakers that training has clips of, and of all it has none of."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.speaker, []).append(result)
    for name, speakers in (
        ("known", set(groups) - set(HELD_OUT_SPEAKERS)),
        ("unseen", set(groups) & set(HELD_OUT_SPEAKERS)),
    ):
        if len(speakers) > 1:
            groups[name] = [result for result in results if result.speaker in speakers]
    return {name: summarise(members) for name, members in groups.items()}


def table(groups: dict[str, dict]) -> str:
    """A Markdown table with a row per measure and a column per group."""
    rows = [["", *groups]]
    for key, label, form in TABLE:
        values = [group.get(key) for group in groups.values()]
        if any(value is not None for value in values):
            rows.append([label, *("–" if v is None or v != v else form.format(v) for v in values)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def as_json(value: Any) -> Any:
    """Convert measures, which may be nested and numpy's, to values that JSON can hold; NaN becomes null."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return as_json(value.tolist())
    if isinstance(value, float):
        return round(value, 5) if np.isfinite(value) else None
    return value
