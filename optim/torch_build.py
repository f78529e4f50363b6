"""Which build of torch fits this machine's GPU and driver.

The launchers run this file by its path, before any package is installed: it uses the standard library alone.

    python -I optim/torch_build.py

prints one line: the build to use, the installed build, and the reason for the choice. Builds have the name in their
version: `cpu`, `cu126`, `cu130`; `default` is the one of the configured package index, and `none` means no torch. The
environment variable LATENTSYNC_TORCH overrides the choice with the build that it names.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

DRIVER = 580  # the oldest NVIDIA driver that runs CUDA 13, on Linux and Windows
# The oldest that runs CUDA 12.6, by CUDA's minor version compatibility (12.6 itself came with 560).
OLDEST_DRIVER = {"win32": 528}
OLDEST_DRIVER_ON_LINUX = 525
CUDA_13, CUDA_12 = "cu130", "cu126"
# CUDA 13 has no code for GPUs before Turing, torch's build for CUDA 12.6 none for those after Hopper.
FIRST_CAPABILITY, LAST_CAPABILITY = (7, 5), (9, 0)
QUERY_SECONDS = 20
VARIABLE = "LATENTSYNC_TORCH"

Gpu = tuple[int, tuple[int, int]]  # the driver's major version, the compute capability


def parse_gpu(text: str) -> Gpu | None:
    """The first GPU in nvidia-smi's output of driver_version,compute_cap; None without one."""
    match = re.search(r"^\s*(\d+)\.[\d.]*\s*,\s*(\d+)\.(\d+)\s*$", text, re.MULTILINE)
    return match and (int(match[1]), (int(match[2]), int(match[3])))


def query_gpu() -> Gpu | None:
    """The first GPU that nvidia-smi lists; None without one, or where the driver does not respond."""
    command = ["nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=QUERY_SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_gpu(process.stdout) if process.returncode == 0 else None


def installed_build() -> str:
    """The installed build of torch; `none` without torch."""
    try:
        _, _, local = version("torch").partition("+")
    except PackageNotFoundError:
        return "none"
    return local or "default"


def choose_build(gpu: Gpu | None, platform: str, installed: str) -> tuple[str, str]:
    """The build for a GPU on a platform (of sys.platform), and the reason, a phrase without a full stop.

    installed: the installed build, or `none`. Without a GPU it stays, whatever it is: every build runs on the
    processor, and a GPU may be hidden only for a while, as after an update of its driver.
    """
    windows = platform == "win32"
    # PyPI's build for Windows is for the processor, the one for Linux is for CUDA 13.
    newest, processor = (CUDA_13, "default") if windows else ("default", "cpu")
    if gpu is None:
        return (processor if installed == "none" else installed), "no NVIDIA GPU with a working driver was found"
    driver, capability = gpu
    oldest = OLDEST_DRIVER.get(platform, OLDEST_DRIVER_ON_LINUX)
    update = f"install driver {DRIVER} or newer from nvidia.com/drivers, and start again"
    if driver < oldest:
        return processor, f"the NVIDIA driver {driver} is older than {oldest}; to use the GPU, {update}"
    if capability < FIRST_CAPABILITY:
        return CUDA_12, "the GPU is from before Turing, for which CUDA 13 has no code"
    if driver >= DRIVER:
        return newest, f"the NVIDIA driver {driver} runs CUDA 13"
    if capability > LAST_CAPABILITY:
        return processor, f"this GPU needs CUDA 13, which the NVIDIA driver {driver} does not run; to use it, {update}"
    return CUDA_12, f"the NVIDIA driver {driver} is older than {DRIVER}, which CUDA 13 needs"


def main() -> int:
    installed, requested = installed_build(), os.environ.get(VARIABLE, "")
    if requested and not re.fullmatch(r"[a-z0-9.]+", requested):
        sentence = f"{VARIABLE}={requested!r} is no build of torch: set default, cpu, cu126 or cu130, or unset it."
        print(sentence, file=sys.stderr)
        return 2
    if requested:
        build, reason = requested, f"{VARIABLE} asks for it"
    else:
        build, reason = choose_build(query_gpu(), sys.platform, installed)
    print(build, installed, reason)
    return 0


if __name__ == "__main__":
    sys.exit(main())
