"""Memory and cores within the limits of a container, from trees of files as Linux shows them."""

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from latentsync import machine
from latentsync.machine import available_memory, total_memory, usable_cores
from latentsync.options import choose_device

MIB, GIB = 2**20, 2**30
UNLIMITED_V1 = 9223372036854771712  # what version 1 shows where there is no limit


@pytest.fixture(autouse=True)
def large_machine(monkeypatch):
    """64 GiB, of which 48 are available, and 32 cores."""
    memory = SimpleNamespace(total=64 * GIB, available=48 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)), raising=False)


def tree(root: Path, membership: str, files: dict[str, object]) -> Path:
    """A root folder with proc/self/cgroup, and files below sys/fs/cgroup."""
    for name, text in {"proc/self/cgroup": membership, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_a_machine_without_control_groups_is_taken_whole(tmp_path):
    assert (available_memory(tmp_path), total_memory(tmp_path), usable_cores(tmp_path)) == (48 * GIB, 64 * GIB, 32)


def test_limits_of_version_2_hold_without_the_page_cache(tmp_path):
    stat = f"anon {2 * GIB}\nfile {GIB}\ninactive_file {768 * MIB}\nactive_file {256 * MIB}\nshmem 0"
    root = tree(tmp_path, "0::/", {
        "memory.max": 8 * GIB, "memory.high": "max", "memory.current": 3 * GIB, "memory.stat": stat,
        "cpu.max": "200000 100000",
    })  # fmt: skip
    assert total_memory(root) == 8 * GIB and available_memory(root) == 6 * GIB and usable_cores(root) == 2


def test_limits_of_version_1_hold_for_all_groups_inside(tmp_path):
    stat = f"inactive_file 5\nactive_file 5\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}"
    root = tree(tmp_path, "9:memory:/\n3:cpu,cpuacct:/\n0::/", {
        "memory/memory.limit_in_bytes": 4 * GIB, "memory/memory.usage_in_bytes": 3 * GIB, "memory/memory.stat": stat,
        "cpu,cpuacct/cpu.cfs_quota_us": 350000, "cpu,cpuacct/cpu.cfs_period_us": 100000,
    })  # fmt: skip
    assert total_memory(root) == 4 * GIB and available_memory(root) == 3 * GIB and usable_cores(root) == 4


def test_no_limit_is_none_in_both_versions(tmp_path):
    v2 = {"memory.max": "max", "memory.current": GIB, "memory.stat": "", "cpu.max": "max 100000"}
    v1 = {
        "memory/memory.limit_in_bytes": UNLIMITED_V1, "memory/memory.usage_in_bytes": GIB,
        "cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000,
    }  # fmt: skip
    for name, membership, files in (("v2", "0::/", v2), ("v1", "2:memory:/\n1:cpu:/", v1)):
        root = tree(tmp_path / name, membership, files)
        assert (available_memory(root), total_memory(root), usable_cores(root)) == (48 * GIB, 64 * GIB, 32), name


def test_the_tightest_of_the_enclosing_groups_counts(tmp_path):
    root = tree(tmp_path, "0::/machine.slice/job.scope", {
        "machine.slice/memory.max": 2 * GIB, "machine.slice/memory.current": GIB,
        "machine.slice/cpu.max": "50000 100000",
        "machine.slice/job.scope/memory.max": 6 * GIB, "machine.slice/job.scope/memory.high": 5 * GIB,
        "machine.slice/job.scope/memory.current": 512 * MIB, "machine.slice/job.scope/cpu.max": "400000 100000",
    })  # fmt: skip
    assert available_memory(root) == GIB and total_memory(root) == 2 * GIB
    assert usable_cores(root) == 1, "half a core is one"


def test_a_container_sees_its_own_group_at_the_mount_whatever_the_host_calls_it(tmp_path):
    """As in Docker without a namespace for control groups, and with a path that leads out of one."""
    for name, path in (("docker", "/docker/0123456789ab"), ("above", "/../../other")):
        files = {"memory.max": GIB, "memory.current": 256 * MIB, "cpu.max": "300000 100000"}
        root = tree(tmp_path / name, f"0::{path}", files)
        assert available_memory(root) == 768 * MIB and usable_cores(root) == 3, name


def test_a_group_that_has_used_up_its_memory_has_none_left(tmp_path):
    root = tree(tmp_path, "0::/", {"memory.max": GIB, "memory.current": GIB + 4096, "memory.stat": "inactive_file 0"})
    assert available_memory(root) == 0


@pytest.mark.parametrize("junk", ["", "nonsense", "-5", "1 2 3 4", "\0", "9" * 5000])
def test_files_of_odd_content_are_no_limit_and_no_error(tmp_path, junk):
    root = tree(tmp_path, f"0::/\n{junk}\n:::", dict.fromkeys(
        ("memory.max", "memory.current", "memory.stat", "cpu.max"), junk
    ))  # fmt: skip
    assert available_memory(root) == 48 * GIB and 1 <= usable_cores(root) <= 32


def test_torch_takes_no_more_threads_than_there_are_cores_to_use(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        monkeypatch.setattr("latentsync.options.usable_cores", lambda: 3)
        choose_device("cpu")
        assert torch.get_num_threads() == 3
        monkeypatch.setattr("latentsync.options.usable_cores", lambda: 16)
        choose_device("cpu")
        assert torch.get_num_threads() == 3, "whoever asked for fewer gets fewer"
    finally:
        torch.set_num_threads(before)


def test_nothing_else_asks_the_machine_itself():
    """Memory and cores have one home."""
    root = Path(machine.__file__).resolve().parent.parent
    words = ("virtual_memory(", "cpu_count(", "sched_getaffinity(")
    files = [root / "app.py", *(root / "latentsync").rglob("*.py"), *(root / "optim").rglob("*.py")]
    asking = {path.name for path in files if any(word in path.read_text(encoding="utf-8") for word in words)}
    assert asking == {"machine.py"}
