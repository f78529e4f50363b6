"""Which build of torch fits this machine's GPU and driver.

The launchers run this file by its path, before any package is installed: it uses the standard library alone.

    python -I optim/torch_build.py

prints one line: the build to use, the build that this Python has, and the reason for the choice. Builds are called
as in the version that they carry: `cpu`, `cu126`, `cu130`; `default` is the one of the configured package index.
`none` stands for no torch. The environment variable LATENTSYNC_TORCH names a build and overrules the choice.
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
    """The first GPU in what nvidia-smi prints as driver_version,compute_cap; None where it shows none."""
    found = re.search(r"^\s*(\d+)\.[\d.]*\s*,\s*(\d+)\.(\d+)\s*$", text, re.MULTILINE)
    return found and (int(found[1]), (int(found[2]), int(found[3])))


def query_gpu() -> Gpu | None:
    """The first GPU that nvidia-smi shows; None without one, or where its driver does not answer."""
    command = ["nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=QUERY_SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_gpu(answer.stdout) if answer.returncode == 0 else None


def installed_build() -> str:
    """The build of torch that this Python has; `none` without torch."""
    try:
        _, _, local = version("torch").partition("+")
    except PackageNotFoundError:
        return "none"
    return local or "default"


def choose_build(gpu: Gpu | None, platform: str, installed: str) -> tuple[str, str]:
    """The build for a GPU on a platform (of sys.platform), and the reason, a phrase without a full stop.

    installed: the build that is there, or `none`. Where no GPU is found it stays, whatever it is: every build runs on
    the processor, and a GPU may be hidden for a while only, as after an update of its driver.
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
    installed, wish = installed_build(), os.environ.get(VARIABLE, "")
    if wish and not re.fullmatch(r"[a-z0-9.]+", wish):
        sentence = f"{VARIABLE}={wish!r} is no build of torch: set default, cpu, cu126 or cu130, or unset it."
        print(sentence, file=sys.stderr)
        return 2
    build, reason = (wish, f"{VARIABLE} asks for it") if wish else choose_build(query_gpu(), sys.platform, installed)
    print(build, installed, reason)
    return 0


if __name__ == "__main__":
    sys.exit(main())
