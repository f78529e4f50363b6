"""Which build of torch suits which GPU and driver, on Linux and on Windows."""

import re
from pathlib import Path

import pytest

from optim import doctor, torch_build
from optim.torch_build import DRIVER, choose_build, parse_gpu

TURING, PASCAL, BLACKWELL = (7, 5), (6, 1), (12, 0)


@pytest.mark.parametrize(
    "driver, capability, linux, windows",
    [
        (580, TURING, "default", "cu130"),
        (600, BLACKWELL, "default", "cu130"),
        (579, TURING, "cu126", "cu126"),
        (535, (9, 0), "cu126", "cu126"),
        (580, PASCAL, "cu126", "cu126"),
        (570, BLACKWELL, "cpu", "default"),  # no build for CUDA 12.6 has code for it
        (470, TURING, "cpu", "default"),
        (526, TURING, "cu126", "default"),  # CUDA 12 needs 525 on Linux, 528 on Windows
    ],
)
def test_both_systems_choose_alike(driver, capability, linux, windows):
    for platform, build in (("linux", linux), ("win32", windows)):
        chosen, reason = choose_build((driver, capability), platform, "none")
        assert chosen == build and reason and not reason.endswith(".")
        needs_update = driver < DRIVER and chosen in ("cpu", "default")
        assert (f"install driver {DRIVER}" in reason) == needs_update


@pytest.mark.parametrize("platform, build", [("linux", "cpu"), ("win32", "default")])
def test_without_a_gpu_a_new_folder_gets_the_small_build_and_an_old_one_keeps_its_own(platform, build):
    assert choose_build(None, platform, "none")[0] == build
    for installed in ("default", "cpu", "cu126", "rocm6.4"):
        assert choose_build(None, platform, installed)[0] == installed


@pytest.mark.parametrize(
    "text, gpu",
    [
        ("580.65.06, 8.9\n", (580, (8, 9))),
        ("560.94, 12.0\n535.1, 6.1\n", (560, (12, 0))),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", None),
        ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.65, 8.9x", None),
        ("[N/A], [N/A]\n", None), ("", None), ("580.65.06, [N/A]\n", None),
    ],
)  # fmt: skip
def test_what_nvidia_smi_prints_is_read_or_means_no_gpu(text, gpu):
    assert parse_gpu(text) == gpu


def test_the_driver_has_one_home():
    assert doctor.DRIVER is torch_build.DRIVER
    root = Path(__file__).resolve().parent.parent
    for file in ("launch.sh", "launch.bat", "optim/doctor.py", "optim/hardware.py"):
        assert not re.search(rf"\b({DRIVER}|545)\b", (root / file).read_text(encoding="utf-8")), file


def test_the_launchers_can_run_it_with_the_standard_library_alone():
    text = Path(torch_build.__file__).read_text()
    modules = re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)
    assert modules and set(modules) <= {"importlib", "os", "re", "subprocess", "sys"}
