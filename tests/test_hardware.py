"""GPUs as they are read, the level for each, and what goes through them at once: all with fake cards."""

import pynvml
import pytest
import torch
from fake_nvml import GIB, MIB, Card, FakeCuda, FakeNvml, card_of

from optim.hardware import RELEASED, Gpu, batch_sizes, nvml_index, read_gpus, recommended_level
from optim.levels import CONSERVATIVE, STOPS, find_level, override

BALANCED, AGGRESSIVE = find_level("balanced"), find_level("aggressive")
SIZES = (6, 8, 12, 16, 24, 48, 80)
RESOLUTIONS = (256, 512)


def read(card: Card) -> Gpu:
    return read_gpus(FakeNvml([card]), FakeCuda([card]))[0]


def test_without_a_gpu_there_is_none_and_quality_is_kept():
    assert read_gpus(FakeNvml([Card()]), FakeCuda()) == []
    assert read_gpus(FakeNvml(readable=False), FakeCuda()) == []
    assert recommended_level(None) is CONSERVATIVE


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_read_as_such():
    assert read_gpus() == []


def test_the_stand_in_answers_only_what_nvml_is_asked():
    assert all(hasattr(pynvml, name) for name in dir(FakeNvml) if name.lower().startswith("nvml"))


def test_a_card_is_read_from_nvml_and_torch():
    card = Card(used=4 * GIB)
    card.reserved = GIB
    nvml = FakeNvml([card])
    gpu = read_gpus(nvml, FakeCuda([card]))[0]
    assert gpu == Gpu(0, "RTX 4090", 24564 * MIB, 24564 * MIB - 3 * GIB, (8, 9), "560.94")
    assert nvml.sessions == 0


@pytest.mark.parametrize("knows_uuid", [True, False])
def test_torch_devices_are_found_in_nvml_whatever_their_order(knows_uuid):
    small, hidden, large = card_of(8), Card("hidden", uuid="bb-2", bus=2), Card("large", 80 * GIB, GIB, "cc-3", 0x1F)
    gpus = read_gpus(FakeNvml([small, hidden, large]), FakeCuda([large, small], knows_uuid))
    assert [(gpu.index, gpu.name, gpu.memory_total // GIB) for gpu in gpus] == [(0, "large", 80), (1, "8 GB card", 8)]
    assert gpus[0].memory_free == 79 * GIB


def test_without_nvml_torch_tells_what_it_knows():
    card = Card()
    for nvml in (FakeNvml(readable=False), FakeNvml([])):
        gpu = read_gpus(nvml, FakeCuda([card]))[0]
        assert (gpu.memory_total, gpu.memory_free) == (card.cuda_total, card.cuda_total - 10**9)
        assert recommended_level(gpu) is AGGRESSIVE
    lost = Card()
    lost.lost = True
    assert read(lost).memory_total == lost.cuda_total


def test_torch_devices_have_a_number_of_nvmls():
    small, large = card_of(8), Card("large", 80 * GIB, GIB, "cc-3", 0x1F)
    nvml, cuda = FakeNvml([small, large]), FakeCuda([large, small])
    assert [nvml_index(torch.device("cuda", i), nvml, cuda) for i in (0, 1)] == [1, 0]
    assert nvml_index(torch.device("cuda", 1), FakeNvml(readable=False), cuda) == 1
    assert nvml.sessions == 0


def test_a_slice_of_a_card_has_only_its_own_memory():
    card = Card("H100 MIG 1g.10gb", 80 * GIB, GIB)
    card.cuda_total = int(9.5 * GIB)
    gpu = read(card)
    assert gpu.memory_total == card.cuda_total and recommended_level(gpu) is CONSERVATIVE


@pytest.mark.parametrize(
    "mib, level",
    [
        (6144, CONSERVATIVE), (8188, CONSERVATIVE), (10240, CONSERVATIVE), (11264, CONSERVATIVE),
        (12282, BALANCED), (12288, BALANCED), (12036, BALANCED),  # 12 GB, the last as torch tells it
        (11514, BALANCED),  # 12 GB with error correction
        (15360, BALANCED), (16376, BALANCED), (20475, BALANCED), (22528, BALANCED),
        (23028, AGGRESSIVE), (24217, AGGRESSIVE), (24564, AGGRESSIVE), (49140, AGGRESSIVE), (81559, AGGRESSIVE),
    ],
)  # fmt: skip
def test_the_level_follows_from_the_memory_a_card_is_sold_with(mib, level):
    assert recommended_level(read(Card(total=mib * MIB, used=0))) is level


def test_an_rtx_4090_takes_20_frames_a_pass_at_512_px():
    gpu = read(Card())
    assert batch_sizes(gpu, 512, recommended_level(gpu)).frames == 20
    assert batch_sizes(24564 * MIB, 512, AGGRESSIVE).frames == 20


@pytest.mark.parametrize("level", STOPS, ids=lambda level: level.name)
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_batches_fit_and_grow_with_the_card(level, resolution):
    before = None
    for gib in range(SIZES[0], SIZES[-1] + 1):
        sizes = batch_sizes(gib * GIB, resolution, level)
        assert sizes.planned == (
            RELEASED.weights
            + RELEASED.fixed
            + sizes.windows * RELEASED.window_at(resolution)
            + sizes.frames * RELEASED.frame_at(256 if sizes.tiling else resolution)
        )
        assert sizes.allowed == int(0.85 * gib * GIB)
        assert sizes.fits or (gib, resolution) == (6, 512)
        if before:
            assert sizes.frames >= before.frames and sizes.windows >= before.windows
            assert not (sizes.tiling and not before.tiling)
        before = sizes


@pytest.mark.parametrize("gib", SIZES)
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_batches_grow_with_the_level_and_shrink_with_the_resolution(gib, resolution):
    by_level = [batch_sizes(gib * GIB, resolution, level) for level in STOPS]
    assert [s.frames for s in by_level] == sorted(s.frames for s in by_level)
    assert [s.windows for s in by_level] == sorted(s.windows for s in by_level)
    for level in STOPS:
        small, large = (batch_sizes(gib * GIB, r, level) for r in RESOLUTIONS)
        assert small.frames >= large.frames and small.windows >= large.windows


def test_the_largest_card_takes_no_more_than_is_of_use():
    assert batch_sizes(10**13, 512, AGGRESSIVE).frames == 20
    assert batch_sizes(10**13, 64, AGGRESSIVE).frames == 80


def test_the_vae_tiles_only_when_one_frame_does_not_fit():
    need = RELEASED.weights + RELEASED.fixed + RELEASED.window_at(512)
    just = int((need + RELEASED.frame_at(512)) / 0.95 / 0.85) + 10
    assert not batch_sizes(just, 512, CONSERVATIVE).tiling
    tight = batch_sizes(just - 10**8, 512, CONSERVATIVE)
    assert tight.tiling and tight.frames == tight.windows == 1 and tight.fits
    assert not batch_sizes(just - 10**8, 512, override(CONSERVATIVE, vae_tiling=False)).tiling
    assert not batch_sizes(2 * GIB, 512, CONSERVATIVE).fits


def test_memory_that_others_hold_is_left_to_them():
    free, taken = (read(Card(used=used)) for used in (GIB, 16 * GIB))
    assert batch_sizes(taken, 512, AGGRESSIVE).frames < batch_sizes(free, 512, AGGRESSIVE).frames
    assert batch_sizes(taken, 512, AGGRESSIVE).planned <= taken.memory_free
