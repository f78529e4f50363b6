"""A request described in words: its plan on this machine, and how long it will take."""

import math
from fractions import Fraction
from typing import TYPE_CHECKING

from latentsync import FPS
from latentsync.rates import describe_painting, grid_rate, painted_step, show_rate
from optim.serving.job import Request
from optim.serving.machine import LONG_SECONDS, Machine, workers_text
from optim.serving.one_frame import MAX_SECONDS, preview_time
from optim.serving.speeds import Speeds, speed_key

if TYPE_CHECKING:  # torch takes seconds to load
    from latentsync.checkpoints.find import Checkpoint
    from optim.accelerate import Plan


def describe_request(
    request: Request,
    checkpoint: "Checkpoint",
    plan: "Plan",
    machine: Machine,
    speeds: Speeds,
    seconds: float | None,
    video_fps: float | None,
    lent: bool,
    people: int = 1,
) -> tuple[str, str]:
    """What a request means, in one line, and its plan in detail.

    seconds, video_fps: of the sound and the video, None if unknown; lent: the job will run on a lent GPU;
    people: who are painted in every frame.
    """
    import torch

    from optim.accelerate import details, summary

    device = torch.device(machine.device)
    line = f"{summary(plan, device)}, model {checkpoint.name} ({checkpoint.resolution} px)"
    in_detail = f"{details(plan, device)}{f', faces restored by {request.restore:g}' if request.restore else ''}."
    rate = grid_rate(Fraction(video_fps or FPS).limit_denominator(1001), request.fps)
    step = painted_step(rate, plan.settings.paint)
    if video_fps is not None:
        line += f", {describe_painting(rate, step) or f'{show_rate(rate)} frames a second'}"
    if lent:  # the plan is for the processor that is here; only its level and steps hold on the lent GPU
        return f"{line}, on {machine.device_name}.", in_detail
    if seconds is None:
        return f"{line}.", in_detail
    gpus = machine.gpus if seconds > LONG_SECONDS else 1  # where no other job runs or waits
    if machine.gpus > 1:
        line += f", on {workers_text(gpus, device.type)}"
    frames = people * math.ceil(seconds * rate / step)
    estimate = speeds.estimate(speed_key(checkpoint.name, machine, request, gpus), plan.settings, frames)
    if estimate is None:
        return f"{line}; how long it takes here is not known before the first job.", in_detail
    return f"{line}; {range_text(estimate.low, estimate.high)} for this clip.", in_detail


def describe_preview(
    request: Request, checkpoint: "Checkpoint", plan: "Plan", machine: Machine, speeds: Speeds
) -> str | None:
    """How long a preview of one frame takes, as "12 to 18 s", "" if unknown.

    None where it is not offered: on a processor that is not known to paint it within MAX_SECONDS.
    """
    estimate = preview_time(speed_key(checkpoint.name, machine, request), plan.settings, speeds)
    if machine.device == "cpu" and (estimate is None or estimate.seconds > MAX_SECONDS):
        return None
    return range_text(estimate.low, estimate.high) if estimate else ""


def range_text(low: float, high: float) -> str:
    """A range of durations, or one where both ends read alike."""
    first, last = duration_text(low), duration_text(high)
    if last.endswith(" min") and 45 <= low < 90:  # as duration_text has seconds
        first = "1 min"
    if first == last:
        return f"about {last}"
    number, unit = first.split()
    return f"{number if last.endswith(f' {unit}') else first} to {last}"


def duration_text(seconds: float) -> str:
    """A duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
