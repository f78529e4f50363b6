"""Advice on what makes this machine slower than it could be: a problem and a remedy each, in a sentence.

    python -m optim.doctor [--resolution 512] [--output FOLDER]

The exit code is 0 if there is nothing to improve, else 1.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pynvml
import torch

from latentsync import FPS
from optim.hardware import GIB, batch_sizes, nvml_gpus, nvml_session, query
from optim.levels import CONSERVATIVE
from optim.monitor import GpuHistory, GpuProcess, other_processes, read_slowdowns
from optim.torch_build import DRIVER

if TYPE_CHECKING:
    from latentsync.settings import Report
    from optim.accelerate import Plan

MAX_OTHER_MEMORY, MAX_OTHER_SHARE = 10**9, 0.05  # bytes and share of a card that others may use: the larger of these
MAX_OTHER_UTILIZATION = 20  # percent of the time in which others may compute
MIN_FREE_DISK = 2 * 10**9  # bytes for outputs
MIN_STEPS = 12
VISIBLE_CACHE_INTERVAL = 5  # the DeepCache interval that begins to show
START_SECONDS = 15.0  # in a shorter run the GPU waits mostly for what is done once
MIN_UTILIZATION = 60  # percent; below it a GPU waits for the rest of the machine
MAX_FACELESS = 0.1  # share of the frames

# NVML's clock event reasons (nvml.h).
HEAT = 0x20 | 0x40  # by software, by hardware
POWER_BRAKE = 0x80
HARDWARE = 0x8  # heat or power; set together with one of the others where the card can tell which
POWER_CAP = 0x4

Severity = Literal["error", "warning", "hint"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "hint")


@dataclass(frozen=True)
class Advice:
    """A problem and its remedy, a sentence each.

    severity: error: it will not work; warning: it is slower or worse than necessary; hint: it may help.
    """

    problem: str
    remedy: str
    severity: Severity


@dataclass(frozen=True)
class GpuFacts:
    """A GPU as NVML reports it, whether or not torch can use it."""

    name: str
    memory_total: int  # bytes
    used_by_others: int = 0  # bytes
    others: tuple[str, ...] = ()  # names of other processes, largest first
    utilization: int = 0  # percent
    slowdowns: int = 0  # NVML's clock event reasons, bits


@dataclass(frozen=True)
class Facts:
    """Everything that the checks look at."""

    gpus: tuple[GpuFacts, ...]
    driver: str | None  # None without NVML
    torch_version: str
    torch_cuda: str | None  # CUDA or ROCm version of this build of torch
    torch_sees_gpu: bool
    resolution: int = 512  # px, of the model
    hardware_scheduling: bool | None = None  # Windows only
    output_folder: str | None = None
    output_free: int | None = None  # bytes


def check_torch(facts: Facts) -> Iterator[Advice]:
    """A GPU that torch cannot use."""
    if facts.torch_sees_gpu:
        return
    if not facts.gpus:
        yield Advice(
            "No NVIDIA GPU was found, so that all work is done on the processor, many times slower.",
            "If this machine has one, install its driver from nvidia.com/drivers and restart.",
            "hint",
        )
    elif facts.torch_cuda is None:
        yield Advice(
            f"There is a {facts.gpus[0].name}, but torch {facts.torch_version} was built without CUDA and cannot use "
            "it.",
            "Start with launch.sh or launch.bat, which install the build that fits the GPU, and see that the variable "
            "LATENTSYNC_TORCH does not ask for another.",
            "error",
        )
    else:
        yield Advice(
            f"There is a {facts.gpus[0].name}, but torch {facts.torch_version} (CUDA {facts.torch_cuda}) cannot use "
            f"it with driver {facts.driver}.",
            "Install the newest driver from nvidia.com/drivers, and see that CUDA_VISIBLE_DEVICES does not hide the "
            "GPU.",
            "error",
        )


def check_driver(facts: Facts) -> Iterator[Advice]:
    """A driver too old for the default build of torch."""
    major = (facts.driver or "").split(".")[0]
    if major.isdigit() and int(major) < DRIVER:
        yield Advice(
            f"The NVIDIA driver {facts.driver} is older than {DRIVER}, which CUDA 13 needs.",
            "Install a newer one from nvidia.com/drivers; the next start installs the build of torch for it.",
            "warning",
        )


def check_memory(facts: Facts) -> Iterator[Advice]:
    """Too little memory for the model on the largest card."""
    if not facts.gpus:
        return
    gpu = max(facts.gpus, key=lambda gpu: gpu.memory_total)
    if batch_sizes(gpu.memory_total, facts.resolution, CONSERVATIVE).fits:
        return
    smaller = facts.resolution > 256 and batch_sizes(gpu.memory_total, 256, CONSERVATIVE).fits
    yield Advice(
        f"{gpu.name} has {gpu.memory_total / GIB:.0f} GB of memory, too little for the {facts.resolution} px model.",
        "Use the 256 px model, --model latentsync-1.5." if smaller else "Use the processor, --device cpu.",
        "error",
    )


def check_others(facts: Facts) -> Iterator[Advice]:
    """Other applications that use a GPU's memory or compute on it."""
    for gpu in facts.gpus:
        names = f" ({', '.join(gpu.others[:3])})" if gpu.others else ""
        if gpu.used_by_others > max(MAX_OTHER_MEMORY, MAX_OTHER_SHARE * gpu.memory_total):
            yield Advice(
                f"Other applications{names} hold {gpu.used_by_others / GIB:.1f} GB of the memory of {gpu.name}.",
                "Close what you do not need: games, browsers with video, other AI programs.",
                "warning",
            )
        elif gpu.utilization > MAX_OTHER_UTILIZATION:
            yield Advice(
                f"Other applications{names} keep {gpu.name} busy for {gpu.utilization} % of the time.",
                "Close them, or wait until they are done.",
                "warning",
            )


def slowdown_advice(name: str, slowdowns: int) -> Iterator[Advice]:
    """Advice on clocks lowered by heat or power; slowdowns: NVML's clock event reasons, bits."""
    if slowdowns & HEAT:
        yield Advice(
            f"{name} lowers its clocks because it is too hot.",
            "Clear dust and air vents, give the fans a steeper curve, or lower the power limit a little.",
            "warning",
        )
    elif slowdowns & (POWER_BRAKE | HARDWARE):
        yield Advice(
            f"{name} is slowed down by its hardware, for want of power or for heat.",
            "Check its power cables and the power supply, and plug a laptop in.",
            "warning",
        )
    elif slowdowns & POWER_CAP:
        yield Advice(
            f"{name} runs at its power limit.",
            "That is usual under full load; a higher limit (nvidia-smi -pl, or the maker's tool) makes it faster.",
            "hint",
        )


def check_slowdowns(facts: Facts) -> Iterator[Advice]:
    """Thermal and power throttling at this moment."""
    for gpu in facts.gpus:
        yield from slowdown_advice(gpu.name, gpu.slowdowns)


def check_scheduling(facts: Facts) -> Iterator[Advice]:
    """Windows' hardware-accelerated GPU scheduling."""
    if facts.hardware_scheduling and facts.gpus:
        yield Advice(
            "Windows' hardware-accelerated GPU scheduling is on, which slows down computing on many machines.",
            "Try without: Settings, System, Display, Graphics, Default graphics settings; then restart.",
            "hint",
        )


def check_disk(facts: Facts) -> Iterator[Advice]:
    """Disk space for outputs."""
    if facts.output_free is not None and facts.output_free < MIN_FREE_DISK:
        yield Advice(
            f"Only {facts.output_free / 1e9:.1f} GB are free for outputs in '{facts.output_folder}'.",
            "Free some space, or write to another disk.",
            "warning",
        )


CHECKS = (check_torch, check_driver, check_memory, check_others, check_slowdowns, check_scheduling, check_disk)


def advise(facts: Facts) -> list[Advice]:
    """All advice on a machine, the most serious first."""
    return _by_severity([advice for check in CHECKS for advice in check(facts)])


@dataclass(frozen=True)
class RunFacts:
    """A finished run."""

    frames: int
    seconds: float
    resolution: int  # px
    steps: int  # that were run
    device: str  # as torch names it: cpu, cuda:0
    position: float = 0.0  # of the level on its slider
    cache_interval: int = 1  # 1: no DeepCache
    frames_without_face: int = 0
    utilization: float | None = None  # percent, mean while generating
    slowdowns: int = 0  # NVML's clock event reasons during the run, bits
    step_downs: tuple[str, ...] = ()  # what was given up when memory ran out


def slow_advice(run: RunFacts) -> Iterator[Advice]:
    """Advice for a run that was slower than real time."""
    speed = run.frames / max(run.seconds, 1e-9)
    if speed >= FPS:
        return
    if run.device == "cpu":
        ways = ["on a machine with an NVIDIA GPU"]
        ways += ["with the 256 px model"] if run.resolution > 256 else []
        ways += ["at a faster level"] if run.position < 1 else []
        yield Advice(
            f"The run made {speed:.2g} frames a second on the processor.", f"Run it {', or '.join(ways)}.", "warning"
        )
        return
    yield from slowdown_advice("The GPU", run.slowdowns)
    if run.utilization is not None and run.utilization < MIN_UTILIZATION:
        if run.seconds < START_SECONDS:
            return
        yield Advice(
            f"The GPU worked only {run.utilization:.0f} % of the time and waited for the processor or the disk.",
            "Close other programs that keep the processor busy, and keep the files on a local disk.",
            "hint",
        )
    elif run.position < 1:
        yield Advice(
            f"The run made {speed:.2g} frames a second, and there are faster levels.",
            "Move the slider towards speed (--level aggressive).",
            "hint",
        )


def memory_advice(run: RunFacts) -> Iterator[Advice]:
    """Advice for a run that ran out of memory and continued with less."""
    if run.step_downs:
        other = " or use the 256 px model" if run.resolution > 256 else ""
        yield Advice(
            f"The GPU's memory ran short, and the run went on with less: {', '.join(run.step_downs)}.",
            f"Close other programs that use the GPU{other}.",
            "warning",
        )


def quality_advice(run: RunFacts) -> Iterator[Advice]:
    """Advice for a run whose result may look worse than necessary."""
    if run.steps < MIN_STEPS:
        yield Advice(
            f"{run.steps} steps are few, and the mouth may look rough.",
            f"Ask for more steps, or choose a level nearer to quality: {MIN_STEPS} to 15 are the fewest to recommend.",
            "warning",
        )
    if run.cache_interval >= VISIBLE_CACHE_INTERVAL:
        yield Advice(
            f"Only one step in {run.cache_interval} was worked out in full, which blurs the mouth.",
            "Choose a smaller DeepCache interval, or a level nearer to quality.",
            "warning",
        )
    if run.frames_without_face > MAX_FACELESS * run.frames:
        yield Advice(
            f"{run.frames_without_face} of {run.frames} frames show no usable face and were left as they are.",
            "Use a video in which the face is seen from the front, well lit, with the whole mouth in the picture.",
            "warning",
        )


def advise_run(run: RunFacts) -> list[Advice]:
    """All advice on a finished run, the most serious first."""
    return _by_severity([*slow_advice(run), *memory_advice(run), *quality_advice(run)])


def advise_report(
    report: "Report", plan: "Plan", step_downs: Sequence[str] = (), gpu: GpuHistory | None = None
) -> list[Advice]:
    """All advice on a run, from its report and plan; gpu: the GPU that it ran on, during the run."""
    cache = plan.settings.cache
    utilization, slowdowns = None, 0
    if gpu and np.isfinite(gpu.utilization).any():
        utilization = float(np.nanmean(gpu.utilization))
        for bits in gpu.slowdowns[np.isfinite(gpu.slowdowns)]:
            slowdowns |= int(bits)
    return advise_run(
        RunFacts(
            frames=report.frames,
            seconds=report.total_seconds,
            resolution=report.resolution,
            steps=plan.settings.steps,
            device=report.device,
            position=plan.level.position,
            cache_interval=cache.interval if cache else 1,
            frames_without_face=report.frames_without_face,
            utilization=utilization,
            slowdowns=slowdowns,
            step_downs=tuple(step_downs),
        )
    )


def _by_severity(advice: list[Advice]) -> list[Advice]:
    return sorted(advice, key=lambda one: SEVERITIES.index(one.severity))


def read_facts(
    resolution: int = 512, output_folder: str | Path | None = None, nvml: Any = pynvml, cuda: Any = torch.cuda
) -> Facts:
    """The facts of this machine; to be called while this process does not use the GPU.

    nvml, cuda: pynvml and torch.cuda or substitutes.
    """
    driver, gpus = None, []
    processes = other_processes(nvml)
    with nvml_session(nvml) as session:
        if session is not None:
            driver = query(session, "nvmlSystemGetDriverVersion")
            for index, handle in nvml_gpus(session):
                gpus.append(_read_gpu(session, handle, [p for p in processes if p.gpu == index]))
    return Facts(
        gpus=tuple(gpus),
        driver=driver,
        torch_version=torch.__version__,
        torch_cuda=torch.version.cuda or torch.version.hip,
        torch_sees_gpu=bool(cuda.is_available()),
        resolution=resolution,
        hardware_scheduling=read_hardware_scheduling(),
        output_folder=None if output_folder is None else str(output_folder),
        output_free=None if output_folder is None else shutil.disk_usage(output_folder).free,
    )


def _read_gpu(nvml: Any, handle: Any, others: list[GpuProcess]) -> GpuFacts:
    memory = query(nvml, "nvmlDeviceGetMemoryInfo", handle)
    load = query(nvml, "nvmlDeviceGetUtilizationRates", handle)
    used = sum(process.memory or 0 for process in others)
    if memory is not None and any(process.memory is None for process in others):
        used = memory.used  # Windows reports only the sum
    return GpuFacts(
        name=query(nvml, "nvmlDeviceGetName", handle) or "GPU",
        memory_total=memory.total if memory else 0,
        used_by_others=used,
        others=tuple(dict.fromkeys(process.name for process in others)),
        utilization=load.gpu if load else 0,
        slowdowns=read_slowdowns(nvml, handle) or 0,
    )


def read_hardware_scheduling() -> bool | None:
    """Whether hardware-accelerated GPU scheduling is on in Windows; None where there is no such setting."""
    if sys.platform != "win32":
        return None
    import winreg

    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"SYSTEM\CurrentControlSet\Control\GraphicsDrivers") as key:
            return winreg.QueryValueEx(key, "HwSchMode")[0] == 2  # 1: off
    except OSError:
        return None


def main(arguments: list[str] | None = None, prog: str = "python -m optim.doctor") -> int:
    """Print the advice; returns the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description="What would make this machine faster.")
    parser.add_argument("--resolution", type=int, choices=(256, 512), default=512, help="of the model (default 512)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="also check the free space there")
    args = parser.parse_args(arguments)
    if args.output and not args.output.is_dir():
        parser.error(f"there is no folder '{args.output}'")
    facts = read_facts(args.resolution, args.output)
    names = ", ".join(f"{gpu.name} ({gpu.memory_total / GIB:.0f} GB)" for gpu in facts.gpus) or "none"
    print(f"GPU: {names}; driver: {facts.driver or 'none'}; torch {facts.torch_version}")
    advice = advise(facts)
    for one in advice:
        print(f"{one.severity}: {one.problem} {one.remedy}")
    if not advice:
        print("nothing to improve")
    return 1 if advice else 0


if __name__ == "__main__":
    sys.exit(main())
