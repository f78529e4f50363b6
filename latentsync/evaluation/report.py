"""From clips to measures: dub them, measure every one, and put people together."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from latentsync import SAMPLE_RATE
from latentsync.alignment import fixed_mask
from latentsync.checkpoints.load import Models
from latentsync.corpus import HELD_OUT_SPEAKERS
from latentsync.evaluation.clips import SIDE, TRACKS, Clip, Seen, look
from latentsync.evaluation.dubbing import dub, elsewhere
from latentsync.evaluation.judge import MOST_OFF, Check, Judge, check, judge_clip, verdict
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

SILENCE = 2.0  # seconds of silent sound that every clip is dubbed with
LEAST_PAUSE = 5  # frames; in fewer there is no variance to speak of
HIDDEN = fixed_mask(SIDE) < 0.5
WHOLE = np.ones_like(HIDDEN)

# What is said of a group: key, label, format.
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
    """One clip's: names, measures, and the faces (reference, generated, truth) of both dubs for the contact sheet."""

    speaker: str
    name: str
    voice: str
    measures: dict = field(default_factory=dict)
    faces: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=dict)


def ratio(value: float, real: float) -> float:
    return value / real if real > 0 else np.nan


def pause_variance(opening: np.ndarray, wav: np.ndarray) -> float:
    """Variance of the opening in the pauses of the sound over that in its speech; NaN without pauses."""
    quiet = pauses(loudness(wav))[: len(opening)]
    opening = opening[: len(quiet)]
    if min(quiet.sum(), (~quiet).sum()) < LEAST_PAUSE:
        return np.nan
    return ratio(float(np.nanvar(opening[quiet])), float(np.nanvar(opening[~quiet])))


def steadiness(result: Seen, source: Seen) -> tuple[float, float]:
    """Flicker and seam of the generated region, over those of the real clip."""
    pair = result.crops, source.crops[: len(result.crops)]
    return ratio(*(flicker(crops, HIDDEN) for crops in pair)), ratio(*(border_energy(crops, HIDDEN) for crops in pair))


def measure_self_dub(clip: Clip, models: Models, settings: Settings, out: Result) -> None:
    """The clip with its own sound, its reference half a clip away."""
    result = look(dub(clip, clip.wav, models, settings, own=True), clip.seen.faces)
    n = len(result.crops)
    true, lips = clip.seen.crops[:n], clip.seen.lips[:n]
    flickering, seam = steadiness(result, clip.seen)
    out.measures |= {
        "psnr": psnr(result.crops, true, HIDDEN),
        "ssim": ssim(result.crops, true, HIDDEN),
        "ssim_crop": ssim(result.crops, true, WHOLE),
        "lmd": landmark_distance(result.lips, lips),
        "lmd_kept": landmark_distance(lips[elsewhere(n)], lips),
        "sharpness": ratio(detail(result.crops, HIDDEN), detail(true, HIDDEN)),
        "flicker": flickering,
        "seam": seam,
    }
    out.faces["its own sound"] = (true[elsewhere(n)], result.crops, true)


def measure_cross_dub(
    clip: Clip,
    other: Clip,
    tracks: list[np.ndarray],
    models: Models,
    settings: Settings,
    judge: Judge | None,
    out: Result,
) -> Seen:
    """The clip with another's sound; tracks: true openings of other clips of that voice."""
    began = time.perf_counter()
    frames = dub(clip, other.wav, models, settings)
    seconds = time.perf_counter() - began
    result = look(frames, clip.seen.faces)
    flickering, seam = steadiness(result, clip.seen)
    others = [correlation(result.opening, track) for track in tracks]
    out.measures |= {
        "correlation": correlation(result.opening, other.seen.opening),
        "mismatched": nan_mean(others) if others else np.full_like(correlation(result.opening, result.opening), np.nan),
        "loudness": correlation(loudness(other.wav), other.seen.opening),
        "nearest": is_nearest(result.opening, [other.seen.opening, *tracks]) if tracks else np.nan,
        "tracks": len(tracks) + 1,
        "pause_variance": pause_variance(result.opening, other.wav),
        "pause_variance_real": pause_variance(other.seen.opening, other.wav),
        "flicker_cross": flickering,
        "seam_cross": seam,
        "seconds_per_frame": seconds / len(frames),
    }
    if judge is not None:
        found = verdict(judge_clip(judge, result.crops, other.wav))
        out.measures |= {
            "judge_confidence": found.confidence,
            "judge_offset": found.offset,
            "judge_in_step": abs(found.offset) <= MOST_OFF,
            "judge_real": verdict(judge_clip(judge, other.seen.crops, other.wav)).confidence,
            "judge_undubbed": verdict(judge_clip(judge, clip.seen.crops, other.wav)).confidence,
        }
    truth = other.seen.crops[: len(result.crops)]
    out.faces[f"the sound of {other.speaker}/{other.name}"] = (clip.seen.crops[: len(truth)], result.crops, truth)
    return result


def measure_silence(clip: Clip, spoken: Seen, models: Models, settings: Settings, out: Result) -> None:
    """The clip with no sound at all, beside the one that speaks."""
    silent = look(dub(clip, np.zeros(round(SILENCE * SAMPLE_RATE), np.float32), models, settings), clip.seen.faces)
    out.measures |= {"opening_silent": np.nanvar(silent.opening), "opening_spoken": np.nanvar(spoken.opening)}


def measure(
    clips: dict[str, list[Clip]], limit: int | None, models: Models, settings: Settings, judge: Judge | None
) -> Iterator[Result]:
    """Up to `limit` clips of every speaker, each with the sound of the speaker's next one.

    Who has one clip only gets the sound of the next person who is there.
    """
    everyone = [clip for own in clips.values() for clip in own]
    for own in clips.values():
        for i, clip in enumerate(own[:limit]):
            other = own[(i + 1) % len(own)] if len(own) > 1 else everyone[(everyone.index(clip) + 1) % len(everyone)]
            tracks = [each.seen.opening for each in clips[other.speaker] if each is not other][: TRACKS - 1]
            out = Result(clip.speaker, clip.name, f"{other.speaker}/{other.name}")
            measure_self_dub(clip, models, settings, out)
            spoken = measure_cross_dub(clip, other, tracks, models, settings, judge, out)
            measure_silence(clip, spoken, models, settings, out)
            yield out


def check_on(judge: Judge, clips: dict[str, list[Clip]]) -> Check:
    """The judge's check on these real clips, each also with the sound of the next one."""
    everyone = [clip for own in clips.values() for clip in own]
    beside = [*everyone[1:], everyone[0]]
    return check(
        [judge_clip(judge, clip.seen.crops, clip.wav) for clip in everyone],
        [judge_clip(judge, a.seen.crops, b.wav) for a, b in zip(everyone, beside, strict=True) if a is not b],
    )


def nan_mean(values: list) -> np.ndarray:
    """Mean over the first axis of what is known; NaN where nothing is."""
    values = np.asarray(values, float)
    known = np.isfinite(values)
    return np.where(known.any(0), np.where(known, values, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan)


def summary(results: list[Result]) -> dict:
    """The measures of a group: means over its clips; correlations are averaged lag by lag before the peak is taken."""
    out: dict = {"clips": len(results)}
    for key, _, _ in TABLE:
        values = [result.measures[key] for result in results if key in result.measures]
        if values:
            mean = nan_mean(values)
            out[key], lag = peak(mean) if mean.ndim else (float(mean), None)
            if key == "correlation":
                out["lag"] = lag
    # Of the means: a clip that hardly speaks would have a ratio of its own that says little.
    silent, spoken = (
        nan_mean([result.measures[f"opening_{how}"] for result in results]) for how in ("silent", "spoken")
    )
    return out | {"silent_variance": ratio(float(silent), float(spoken))}


def groups(results: list[Result]) -> dict[str, dict]:
    """A summary of every speaker, of all people that training knows, and of all it has never seen."""
    by: dict[str, list[Result]] = {}
    for result in results:
        by.setdefault(result.speaker, []).append(result)
    unseen = [result for result in results if result.speaker in HELD_OUT_SPEAKERS]
    known = [result for result in results if result.speaker not in HELD_OUT_SPEAKERS]
    for name, of, people in (
        ("known", known, set(by) - set(HELD_OUT_SPEAKERS)),
        ("unseen", unseen, set(by) & set(HELD_OUT_SPEAKERS)),
    ):
        if len(people) > 1:
            by[name] = of
    return {name: summary(of) for name, of in by.items()}


def table(found: dict[str, dict]) -> str:
    """Measures down, groups across, in Markdown."""
    rows = [["", *found]]
    for key, label, form in TABLE:
        values = [group.get(key) for group in found.values()]
        if any(value is not None for value in values):
            rows.append([label, *("–" if v is None or v != v else form.format(v) for v in values)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def plain(value):
    """Numbers and arrays of measures as JSON takes them; what is not known is null."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return round(value, 5) if np.isfinite(value) else None
    return value
