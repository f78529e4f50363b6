"""Memory and processor cores that this process may use: the machine's, or less where its container has limits.

On Linux control groups (cgroups) set these limits, in one of two versions. A process is in a group, and the limits of
every enclosing group hold for it too. psutil and os.cpu_count know nothing of them.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path("/")  # below it lie proc/self/cgroup and sys/fs/cgroup


def available_memory(root: Path = ROOT) -> int:
    """Bytes of main memory that this process can still take without swapping; 0 where a limit is reached.

    Page cache of a group counts as available, since the kernel gives it up before it ends a process.
    """
    free = [limit - used for limit, used in _memory(root)]
    return max(0, min([psutil.virtual_memory().available, *free]))


def total_memory(root: Path = ROOT) -> int:
    """Bytes of main memory of the machine, or of the container where that has less."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _memory(root))])


def usable_cores(root: Path = ROOT) -> int:
    """Processor cores that this process may keep busy, at least 1; a share of a core counts as a whole one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups(root, "cpu"):
        maximum = (_read(group / "cpu.max") or "").split()  # version 2: "QUOTA PERIOD" in µs, or "max PERIOD"
        quota = maximum or [_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")]  # version 1
        limit, period = (_number(text) for text in (*quota, None)[:2])
        if limit and period and limit > 0 and period > 0:  # -1 is none
            cores = min(cores, math.ceil(limit / period))
    return max(1, cores)


def _memory(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be reclaimed) of every group of this process that has a limit."""
    for group in _groups(root, "memory"):
        names = ("memory.max", "memory.high", "memory.limit_in_bytes")  # the last one is version 1's
        limits = [limit for name in names if (limit := _number(_read(group / name))) is not None and limit >= 0]
        used = _number(_read(group / "memory.current") or _read(group / "memory.usage_in_bytes"))
        if not limits or used is None:
            continue
        counts = dict(line.split()[:2] for line in (_read(group / "memory.stat") or "").splitlines() if " " in line)
        # Version 1 has sums over the groups inside under names of their own.
        prefix = "total_" if "total_inactive_file" in counts else ""
        cache = sum(_number(counts.get(f"{prefix}{name}_file")) or 0 for name in ("inactive", "active"))
        yield min(limits), max(0, used - cache)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups of this process that a controller has limits in, the innermost first."""
    mounts = root / "sys" / "fs" / "cgroup"
    for line in (_read(root / "proc" / "self" / "cgroup") or "").splitlines():
        _, names, path = (*line.split(":", 2), "", "")[:3]
        if names and controller not in names.split(","):
            continue
        mount = mounts
        if names:  # version 1: a hierarchy for each controller, or for a few together
            mount = next((mounts / name for name in (controller, names) if (mounts / name).is_dir()), mounts)
        # In a container the mount is often the container's own group, while the path is still the host's.
        inner = Path(path.lstrip("/"))
        own = [mount / part for part in (inner, *inner.parents) if part != Path() and ".." not in part.parts]
        yield from (folder for folder in (*own, mount) if folder.is_dir())


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _number(text: str | None) -> int | None:
    """A whole number; None for "max" and for anything else."""
    try:
        return int(text)
    except (TypeError, ValueError):
        return None
