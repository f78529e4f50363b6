"""Frame rates, as exact fractions: that of a file, and that at which a run reads, paints and writes.

nominal_rate: from the timestamps of a file; grid_rate: from that and `--fps`; scale_frames: constants of the method
that mean time are frames at 25 a second.
"""

import math
from fractions import Fraction

import numpy as np

from latentsync import FPS

RATES = ("source", "25")  # of --fps: the video's own rate; what LatentSync was trained on
PAINTED = ("every", "second")  # of --paint: frames of a film with many a second that go through the networks
NTSC = Fraction(1000, 1001)
STANDARD_RATES = (
    *map(Fraction, (10, 12, 15, 20, 24, 25, 30, 48, 50, 60, 90, 100, 120, 240)),
    *(NTSC * rate for rate in (15, 24, 30, 48, 60, 120, 240)),
    Fraction(25, 2),
)
NEAR = Fraction(1, 50)  # share by which the rate of a variable file may differ from its nominal one
MAX_LOST = 0.02  # share of a variable file's frames that may fall on the place of another one
MAX_MULTIPLE = 4  # of the usual rate of a variable file, for those whose frames sometimes come faster
ABSURD = Fraction(1, 10), Fraction(1000)  # rates outside are errors of the file
# Of a run. Fewer frames than the first would make a mouth jump; the second leaves room for inexact clocks at 60.
MIN_RATE, MAX_RATE = 20, 61
MIN_PAINTED = 24 * NTSC  # frames a second that are left where every second one is painted


def nominal_rate(pts: np.ndarray, time_base: Fraction) -> Fraction:
    """The constant rate on whose grid the frames of a file lie, in frames a second.

    pts: (n,) int64, the frames' timestamps in any order, in units of `time_base` seconds. Every frame of a file with a
    constant rate has a place of its own on the grid. A variable rate gives the standard one nearest to the usual step
    between two frames, or a multiple of it, that loses at most MAX_LOST of them. 25 if there is no rate, or an absurd
    one.
    """
    times = np.unique(pts)
    if len(times) < 2 or time_base <= 0:
        return Fraction(FPS)
    times -= times[0]
    steps = np.diff(times)
    usual = np.median(steps)
    usual_steps = steps[np.abs(steps - usual) <= max(1.0, usual / 4)]  # without pauses and bursts
    if len(usual_steps) == 0:  # of two steps the median is between both
        usual_steps = steps
    measured = Fraction(len(usual_steps), int(usual_steps.sum())) / time_base
    if not ABSURD[0] <= measured <= ABSURD[1]:
        return Fraction(FPS)
    own = measured.limit_denominator(1001)
    for candidates in _standard_near(measured), [own]:
        misfits = {rate: _misfit(times, time_base, rate) for rate in candidates}
        best = min(candidates, key=lambda rate: misfits[rate], default=own)
        if misfits.get(best, math.inf) < 1.01:  # timestamps are rounded to the time base, the first one, too
            return best
    for multiple in range(1, MAX_MULTIPLE + 1):
        for rate in _standard_near(measured * multiple):
            if rate <= MAX_RATE and _lost(times, time_base, rate) <= MAX_LOST * len(times):
                return rate
    return next(iter(_standard_near(measured)), own)


def _standard_near(rate: Fraction) -> list[Fraction]:
    near = [standard for standard in STANDARD_RATES if abs(standard / rate - 1) <= NEAR]
    return sorted(near, key=lambda standard: abs(standard - rate))


def _misfit(times: np.ndarray, time_base: Fraction, rate: Fraction) -> float:
    """Units of the time base by which frames are away from their places on a grid, at most; inf if two share one."""
    step = float(1 / (rate * time_base))
    places = np.round(times / step)
    return float(np.abs(times - places * step).max()) if (np.diff(places) > 0).all() else math.inf


def _lost(times: np.ndarray, time_base: Fraction, rate: Fraction) -> int:
    """Frames that share the place of another one on a grid."""
    return len(times) - len(np.unique(np.round(times * float(rate * time_base))))


def grid_rate(nominal: Fraction, choice: str) -> Fraction:
    """The rate of a run on a video of a nominal rate; choice: one of RATES.

    Above MAX_RATE every second, third, … frame is kept; below MIN_RATE every frame is shown several times, each with a
    mouth of its own.
    """
    if choice != "source":
        return Fraction(choice)
    if nominal > MAX_RATE:
        return nominal / math.ceil(nominal / MAX_RATE)
    return nominal * math.ceil(MIN_RATE / nominal) if nominal < MIN_RATE else nominal


def scale_frames(frames: int, rate: Fraction) -> int:
    """How many frames at `rate` last as long as `frames` at 25 a second, at least one."""
    return max(1, round(frames * rate / FPS))


def painted_step(rate: Fraction, paint: str | None) -> int:
    """1 where every frame of a run at `rate` is painted, 2 where every second one is; paint: one of PAINTED, or None.

    Every frame is painted without a choice, and of films of fewer than 2 · MIN_PAINTED frames a second.
    """
    return 2 if paint == "second" and rate >= 2 * MIN_PAINTED else 1


def describe_painting(rate: Fraction, step: int) -> str:
    """What is painted, in words: "painted at 30 of 60 frames a second"; "" where that is every frame."""
    return f"painted at {show_rate(rate / step)} of {show_rate(rate)} frames a second" if step > 1 else ""


def parse_rate(text: object) -> Fraction | None:
    """A rate from its text, as "30000/1001"; None if it is no plausible one."""
    try:
        rate = Fraction(text) if isinstance(text, str) and len(text) < 40 else None
    except (ValueError, ZeroDivisionError):
        return None
    return rate if rate is not None and ABSURD[0] <= rate <= ABSURD[1] else None


def show_rate(rate: Fraction) -> str:
    """A rate in words of a sentence: "29.97"."""
    return f"{float(rate):.5g}"
