"""Memory and processor cores that this process may use: the machine's, or fewer where its container has limits.

On Linux, control groups (cgroups, version 1 or 2) set these limits. A process belongs to a group, and the limits of
every enclosing group apply to it too. psutil and os.cpu_count ignore them.
"""

import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path("/")  # of proc/self/cgroup and sys/fs/cgroup


def available_memory(root: Path = ROOT) -> int:
    """Bytes of main memory that this process can still take without swapping; 0 where a limit is reached.

    Page cache of a group counts as available, since the kernel drops it before it kills a process.
    """
    free = [limit - used for limit, used in _memory_limits(root)]
    return max(0, min([psutil.virtual_memory().available, *free]))


def total_memory(root: Path = ROOT) -> int:
    """Bytes of main memory of the machine, or of the container where that has less."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _memory_limits(root))])


def peak_memory() -> int:
    """Bytes of the largest amount of memory that this process ever held."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    # Linux; there getrusage also counts what the parent process held when it started this one.
    if match := re.search(r"VmHWM:\s+(\d+) kB", _read(Path("/proc/self/status")) or ""):
        return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def usable_cores(root: Path = ROOT) -> int:
    """Processor cores that this process may keep busy, at least 1; a fraction of a core counts as a whole one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups(root, "cpu"):
        texts: list[str | None] = [*(_read(group / "cpu.max") or "").split()]  # version 2: "QUOTA PERIOD", "max PERIOD"
        texts = texts or [_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")]  # version 1
        quota, period = (_number(text) for text in (*texts, None)[:2])  # µs
        if quota and period and quota > 0 and period > 0:  # version 1 has -1 for no limit
            cores = min(cores, math.ceil(quota / period))
    return max(1, cores)


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be reclaimed) of every group of this process that has a limit."""
    for group in _groups(root, "memory"):
        names = ("memory.max", "memory.high", "memory.limit_in_bytes")  # the last one is version 1's
        limits = [limit for name in names if (limit := _number(_read(group / name))) is not None and limit >= 0]
        used = _number(_read(group / "memory.current") or _read(group / "memory.usage_in_bytes"))
        if not limits or used is None:
            continue
        counts = dict(line.split()[:2] for line in (_read(group / "memory.stat") or "").splitlines() if " " in line)
        # In version 1, sums over the inner groups have names with a prefix.
        prefix = "total_" if "total_inactive_file" in counts else ""
        cache = sum(_number(counts.get(f"{prefix}{name}_file")) or 0 for name in ("inactive", "active"))
        yield min(limits), max(0, used - cache)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups of this process that have limits of a controller, the innermost first."""
    mounts = root / "sys" / "fs" / "cgroup"
    for line in (_read(root / "proc" / "self" / "cgroup") or "").splitlines():
        _, names, path = (*line.split(":", 2), "", "")[:3]
        if names and controller not in names.split(","):
            continue
        mount = mounts
        if names:  # version 1: a hierarchy for each controller, or for a few together
            mount = next((mounts / name for name in (controller, names) if (mounts / name).is_dir()), mounts)
        # In a container the mount is often the container's own group, while the path is still the host's.
        group = Path(path.lstrip("/"))
        folders = [mount / part for part in (group, *group.parents) if part != Path() and ".." not in part.parts]
        yield from (folder for folder in (*folders, mount) if folder.is_dir())


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _number(text: str | None) -> int | None:
    """A whole number; None for "max" and for anything else."""
    try:
        return int(text or "")
    except ValueError:
        return None
