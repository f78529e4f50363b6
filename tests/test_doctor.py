"""What the doctor says, and when it says nothing."""

import re
from dataclasses import replace

import pynvml
import pytest
from fake_nvml import GIB, Card, FakeCuda, FakeNvml

from optim import doctor
from optim.doctor import DRIVER, Advice, Facts, GpuFacts, RunFacts, advise, advise_run, read_facts

GPU = GpuFacts("RTX 4090", 24 * GIB)
WELL = Facts(gpus=(GPU,), driver="580.94", torch_version="2.13.0", torch_cuda="13.0", torch_sees_gpu=True)
RUN = RunFacts(frames=100, seconds=20, resolution=512, steps=16, device="cuda:0", position=1.0, utilization=97)


def with_gpu(**changes) -> Facts:
    return replace(WELL, gpus=(replace(GPU, **changes),))


def test_a_machine_in_good_order_gets_no_advice():
    assert advise(WELL) == []
    assert advise(replace(WELL, hardware_scheduling=False, output_folder="out", output_free=10**11)) == []
    assert advise(with_gpu(used_by_others=GIB // 2, others=("Xorg",), utilization=3)) == []


@pytest.mark.parametrize(
    "facts, severity, problem, remedy",
    [
        (replace(WELL, driver="537.58"), "warning", "537.58 is older than 580", "newer one"),
        (replace(WELL, torch_cuda=None, torch_sees_gpu=False), "error", "built without CUDA", "launch.sh"),
        (replace(WELL, torch_sees_gpu=False), "error", "CUDA 13.0.*driver 580.94", "newest driver"),
        (replace(WELL, gpus=(), driver=None, torch_sees_gpu=False), "hint", "No NVIDIA GPU", "driver"),
        (with_gpu(used_by_others=6 * GIB, others=("game",)), "warning", r"\(game\) hold 6.0 GB", "Close"),
        (with_gpu(utilization=80), "warning", "busy for 80 %", "Close"),
        (with_gpu(slowdowns=0x40 | 0x8), "warning", "too hot", "dust"),
        (with_gpu(slowdowns=0x80), "warning", "want of power", "cables"),
        (with_gpu(slowdowns=0x4), "hint", "power limit", "higher limit"),
        (with_gpu(memory_total=6 * GIB), "error", "6 GB.*512 px", "256 px"),
        (with_gpu(memory_total=2 * GIB), "error", "2 GB.*512 px", "processor"),
        (replace(WELL, hardware_scheduling=True), "hint", "GPU scheduling is on", "restart"),
        (replace(WELL, output_folder="out", output_free=10**9), "warning", "1.0 GB are free.*'out'", "another disk"),
    ],
)  # fmt: skip
def test_each_fault_gets_one_advice_with_its_remedy(facts, severity, problem, remedy):
    (advice,) = advise(facts)
    assert advice.severity == severity
    assert re.search(problem, advice.problem) and re.search(remedy, advice.remedy)
    assert advice.problem.endswith(".") and advice.remedy.endswith(".")


def test_slowdowns_of_no_consequence_are_passed_over():
    assert advise(with_gpu(slowdowns=pynvml.nvmlClocksEventReasonGpuIdle)) == []
    assert doctor.HEAT == pynvml.nvmlClocksEventReasonSwThermalSlowdown | pynvml.nvmlClocksEventReasonHwThermalSlowdown
    assert doctor.POWER_BRAKE == pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown
    assert doctor.HARDWARE == pynvml.nvmlClocksEventReasonHwSlowdown
    assert doctor.POWER_CAP == pynvml.nvmlClocksEventReasonSwPowerCap


def test_the_largest_card_counts_and_the_model_decides_what_is_too_little():
    assert advise(replace(WELL, gpus=(GPU, GpuFacts("GT 1030", 2 * GIB)))) == []
    assert advise(replace(with_gpu(memory_total=6 * GIB), resolution=256)) == []


def test_the_most_serious_comes_first():
    bad = replace(with_gpu(slowdowns=0x4, memory_total=2 * GIB), driver="500.1")
    assert [advice.severity for advice in advise(bad)] == ["error", "warning", "hint"]


def test_facts_are_read_from_nvml():
    card = Card(used=5 * GIB, processes=[(2**22 + 1, 4 * GIB)], slow=0x20)
    facts = read_facts(256, ".", FakeNvml([card]), FakeCuda([card]))
    assert facts.gpus == (GpuFacts("RTX 4090", card.total, 4 * GIB, (f"process {2**22 + 1}",), 5, 0x20),)
    assert facts.driver == "560.94" and facts.torch_sees_gpu and facts.output_free > 0
    card.processes = [(2**22 + 1, None)]  # Windows
    assert read_facts(256, None, FakeNvml([card]), FakeCuda([card])).gpus[0].used_by_others == 5 * GIB
    assert read_facts(256, None, FakeNvml(readable=False), FakeCuda()).gpus == ()


@pytest.mark.parametrize(
    "facts, code, last", [(WELL, 0, "nothing to improve"), (replace(WELL, driver="1.0"), 1, str(DRIVER))]
)
def test_the_command_prints_advice_and_exits_with_0_only_without_any(facts, code, last, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "read_facts", lambda *_: facts)
    assert doctor.main([]) == code
    assert last in capsys.readouterr().out.splitlines()[-1]


def test_a_good_run_gets_no_advice():
    assert advise_run(RUN) == []
    assert advise_run(replace(RUN, seconds=2, utilization=10, position=0, slowdowns=0x20)) == []  # faster than it plays
    assert advise_run(replace(RUN, seconds=10, utilization=30)) == []  # most of it was the start


@pytest.mark.parametrize(
    "change, problem, remedy",
    [
        ({"device": "cpu"}, "on the processor", "NVIDIA GPU, or with the 256 px model."),
        ({"device": "cpu", "resolution": 128}, "on the processor", "NVIDIA GPU."),
        ({"device": "cpu", "resolution": 128, "position": 0.5}, "on the processor", "GPU, or at a faster level."),
        ({"slowdowns": 0x20}, "too hot", "dust"),
        ({"utilization": 30}, "only 30 %", "Close other programs"),
        ({"position": 0.5}, "5 frames a second", "--level"),
        ({"step_downs": ("10 frames a pass", "tiling")}, "10 frames a pass, tiling", "256 px"),
        ({"steps": 8}, "8 steps", "12 to 15"),
        ({"cache_interval": 6}, "one step in 6", "interval"),
        ({"frames_without_face": 30}, "30 of 100", "from the front"),
    ],
)
def test_each_weakness_of_a_run_gets_one_advice(change, problem, remedy):
    advice = advise_run(replace(RUN, **change))
    assert len(advice) == 1 and isinstance(advice[0], Advice)
    assert problem in advice[0].problem and remedy in advice[0].remedy
