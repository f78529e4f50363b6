"""The sampler in the background, on fake GPUs and on this machine's processor."""

import os
import time

import numpy as np
import psutil
import pytest
from fake_nvml import GIB, Card, FakeNvml, card_of

from optim.monitor import SERIES, Monitor, other_processes, read_series
from optim.serving.curves import curves_since

NO_GPU = FakeNvml(readable=False)


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_processor_and_memory_are_sampled_where_there_is_no_gpu():
    with Monitor(rate=10, nvml=NO_GPU) as monitor:
        wait_for(lambda: len(monitor.snapshot().time) >= 4)
    history = monitor.snapshot()
    assert history.gpus == ()
    assert np.all((history.cpu >= 0) & (history.cpu <= 100))
    assert np.all((history.ram_used > 0) & (history.ram_used < history.ram_total))
    assert np.all(np.diff(history.time) > 0)


def test_the_last_seconds_are_to_be_had_alone():
    with Monitor(rate=10, nvml=NO_GPU) as monitor:
        wait_for(lambda: len(monitor.snapshot().time) >= 5)
    whole, last = monitor.snapshot(), monitor.snapshot(seconds=0.3)
    assert np.array_equal(last.time, whole.time[-3:]) and len(last.cpu) == 3


def test_every_gpu_is_sampled_in_its_units():
    nvml = FakeNvml([Card(used=3 * GIB, slow=0x40), card_of(8)])
    with Monitor(rate=10, nvml=nvml) as monitor:
        wait_for(lambda: len(monitor.snapshot().time) >= 2)
    first, second = monitor.snapshot().gpus
    assert (first.name, first.memory_total, second.index) == ("RTX 4090", nvml.cards[0].total, 1)
    last = [first.utilization, first.memory_used, first.power, first.temperature, first.sm_clock, first.slowdowns]
    assert [series[-1] for series in last] == [5, 3 * GIB, 123.4, 61, 2520, 0x40]
    assert nvml.sessions == 0


def test_a_page_shows_power_temperature_and_clock_of_the_newest_sample():
    class NoPowerMeter(FakeNvml):
        def nvmlDeviceGetPowerUsage(self, card):
            raise self.NVMLError("Not Supported")

    with Monitor(rate=10, nvml=FakeNvml([Card()])) as monitor, Monitor(nvml=NoPowerMeter([Card()])) as other:
        wait_for(lambda: len(monitor.snapshot().time) and len(other.snapshot().time))
    assert curves_since(monitor.snapshot())["sensors"] == {"GPU": [123, 61, 2520]}
    assert curves_since(other.snapshot())["sensors"] == {"GPU": [None, 61, 2520]}


def test_a_gpu_that_is_lost_and_comes_back_leaves_a_gap():
    card = Card()
    with Monitor(rate=10, nvml=FakeNvml([card, card_of(8)])) as monitor:
        for lost in (False, True, False):
            card.lost = lost
            seen = len(monitor.snapshot().time)
            wait_for(lambda seen=seen: len(monitor.snapshot().time) >= seen + 3)
    lost, other = (np.isnan(gpu.power) for gpu in monitor.snapshot().gpus)
    assert lost.any() and not lost[0] and not lost[-1] and not other.any()


def test_a_question_a_card_does_not_know_costs_only_its_own_series():
    class NoPowerMeter(FakeNvml):
        def nvmlDeviceGetPowerUsage(self, card):
            raise self.NVMLError("Not Supported")

    series = read_series(NoPowerMeter([Card()]), Card())
    assert len(series) == SERIES and np.isnan(series[2]) and np.isfinite(np.delete(series, 2)).all()


def test_the_ring_forgets_the_oldest():
    with Monitor(rate=10, seconds=0.3, nvml=NO_GPU) as monitor:
        wait_for(lambda: len(monitor.snapshot().time) == 3)
        first = monitor.snapshot().time[0]
        wait_for(lambda: monitor.snapshot().time[0] > first)
        assert len(monitor.snapshot().time) == 3


def test_marks_stand_on_the_same_clock_as_samples():
    with Monitor(rate=10, nvml=NO_GPU) as monitor:
        wait_for(lambda: len(monitor.snapshot().time) >= 1)
        monitor.mark("denoise")
        wait_for(lambda: len(monitor.snapshot().time) >= 3)
    history = monitor.snapshot()
    ((at, text),) = history.marks
    assert text == "denoise" and history.time[0] <= at < history.time[-1]


def test_stop_ends_sampling_at_once_and_keeps_the_history():
    monitor = Monitor(rate=0.1, nvml=NO_GPU).start()
    began = time.monotonic()
    monitor.stop()
    assert time.monotonic() - began < 8 and len(monitor.snapshot().time) == 0
    monitor.stop()


@pytest.mark.parametrize("rate", [0, 11, float("nan")])
def test_rates_that_make_no_sense_are_refused(rate):
    with pytest.raises(ValueError, match="give 0.1 to 10"):
        Monitor(rate=rate, nvml=NO_GPU)


def test_sampling_at_2_hz_costs_under_1_percent_of_a_core():
    began = time.process_time()
    for _ in range(50):
        psutil.cpu_percent()
        psutil.virtual_memory()
        read_series(FakeNvml(), Card())
    assert (time.process_time() - began) / 50 * 2 < 0.01


def test_other_processes_are_named_once_and_this_one_is_not():
    parent, absent = os.getppid(), 2**22 + 1  # beyond what Linux gives out
    card = Card(processes=[(absent, None), (os.getpid(), GIB), (parent, 2 * GIB)])
    found = other_processes(FakeNvml([card_of(8), card]))
    assert [(p.gpu, p.pid, p.memory) for p in found] == [(1, parent, 2 * GIB), (1, absent, None)]
    assert found[0].name == psutil.Process(parent).name() and found[1].name == f"process {absent}"
    assert other_processes(NO_GPU) == []
