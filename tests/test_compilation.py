"""When compiling pays, what is remembered of it, and that a compiled network is the eager one."""

import os
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config as inductor
from torch._dynamo.utils import counters

from latentsync.checkpoints import Models
from latentsync.sampling import DeepCache
from latentsync.unet import UNet, UNetConfig
from optim import compilation
from optim.compilation import (
    DEFAULTS,
    CompiledUNet,
    Cost,
    Record,
    Shape,
    cache_key,
    compile_network,
    expected_cost,
    job_seconds,
    missing_compiler,
    read_record,
    record_path,
    restore,
    use_cache_folder,
    worth_compiling,
    write_record,
)

CONFIG = UNetConfig(
    in_channels=9,
    block_out_channels=(8,),
    cross_attention=(False,),
    temporal=(False,),
    layers_per_block=1,
    heads=2,
    cross_attention_dim=8,
    norm_num_groups=4,
)
SIDE = 4
SHAPE = Shape(windows=1, side=SIDE, guided=True, cache=DeepCache(2, 0))
LONG = {"frames": 10_000, "steps": 20, "cache": SHAPE.cache, "seconds_a_frame": 100.0}
VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch, one_thread):
    """An empty cache of this test's own."""
    monkeypatch.setenv("LATENTSYNC_HOME", str(tmp_path))
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that the end of the test takes back whatever it sets
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def models() -> Models:
    torch.manual_seed(0)
    unet = UNet(CONFIG).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=(8, 8, 8, 8)))
    return Models("tiny", 8 * SIDE, unet, None, vae)


def passes(unet: UNet, frames: int) -> list[torch.Tensor]:
    """A full and a shallow pass of one window."""
    random = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        x = torch.randn(frames, 9, SIDE, SIDE, generator=random).contiguous(memory_format=torch.channels_last)
        audio, timestep = torch.randn(1, frames, 50, 8, generator=random), torch.tensor([500])
        context = unet.encode_audio(audio)
        out, cached = unet.full(x, timestep, context, frames, 0, True)
        return [out, unet.shallow(x, timestep, context, frames, 0, cached, True)]


# ---- the cost model


def test_a_long_job_is_worth_it_and_a_second_is_not():
    a_frame = 0.5
    assert job_seconds(25, a_frame) == 32 * a_frame  # two windows
    assert not worth_compiling(job_seconds(25, a_frame), 0.12, 100.0)
    assert worth_compiling(job_seconds(25 * 3600, a_frame), 0.12, 100.0)


def test_what_is_saved_must_exceed_the_price_by_the_margin():
    assert not worth_compiling(1000.0, 0.1, 100.0 / compilation.MARGIN * 1.01)
    assert worth_compiling(1000.0, 0.1, 100.0 / compilation.MARGIN * 0.99)
    assert not worth_compiling(1e9, -0.3, 1.0)
    assert not worth_compiling(1e9, compilation.LEAST_SHARE / 2, 1.0)  # noise, however long the job


def test_measured_defaults_are_sane():
    for cost in DEFAULTS.values():
        assert 0 < cost.warm < cost.cold and compilation.LEAST_SHARE < cost.share_saved < 1


def test_a_filled_cache_changes_the_decision(home, monkeypatch):
    monkeypatch.setitem(DEFAULTS, "cpu", Cost(cold=1.0, warm=0.1, share_saved=0.1))
    artifacts = use_cache_folder() / "inductor"
    empty = Record(artifacts=str(artifacts))

    def decision() -> bool:
        cost, share = expected_cost(empty, "cpu", modules=100)
        return worth_compiling(600.0, share, cost)

    assert not decision()  # 60 s to be saved, 100 s to compile
    artifacts.mkdir(parents=True)
    (artifacts / "kernel.so").touch()
    assert decision()  # 10 s
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(home))  # the artifacts are in another folder
    assert not decision()


def test_this_machines_numbers_override_the_defaults():
    assert expected_cost(Record(), "cpu", 100) == (DEFAULTS["cpu"].cold * 100, DEFAULTS["cpu"].share_saved)
    cost, share = expected_cost(Record(eager=2.0, compiled=1.0, cold=7.0), "cpu", 100)
    assert (cost, share) == (7.0, 0.5)
    assert expected_cost(Record(eager=1.0, compiled=1.5), "cpu", 100)[1] == pytest.approx(-0.5)


# ---- the records


def test_the_cache_folder_is_the_users_unless_they_set_another(home, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    assert use_cache_folder() == home / "compiled"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(home / "compiled" / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"


def test_another_version_network_or_shape_is_another_key(models, monkeypatch):
    keys = [cache_key(models, SHAPE)]
    assert cache_key(models, SHAPE) == keys[0]
    keys += [cache_key(models, replace(SHAPE, **change)) for change in (
        {"windows": 2}, {"side": 8}, {"guided": False}, {"cache": None}, {"cache": DeepCache(3, 0)},
    )]  # fmt: skip
    models.unet.config = replace(CONFIG, heads=4)
    keys.append(cache_key(models, SHAPE))
    models.unet.config = CONFIG
    monkeypatch.setattr(compilation.torch, "__version__", "2.0.0")
    keys.append(cache_key(models, SHAPE))
    assert len(set(keys)) == len(keys)


def test_records_come_back_and_damaged_ones_are_none():
    record = Record(eager=2.0, compiled=1.5, cold=30.0, artifacts="there")
    write_record("key", record)
    assert read_record("key") == record
    for text in ("{", '{"unknown": 1}', "[]"):
        record_path("key").write_text(text)
        assert read_record("key") == Record()


# ---- the network


def test_a_short_job_leaves_the_network_alone_and_says_nothing(models, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    said = []
    assert not compile_network(models, frames=25, steps=20, say=said.append)
    assert not compile_network(models, frames=25, steps=20, seconds_a_frame=0.5, say=said.append)
    monkeypatch.setattr(compilation, "_round", lambda *_: (None, 0.005))
    assert not compile_network(models, frames=10_000, steps=20, say=said.append)  # tried for its time: too quick
    assert type(models.unet) is UNet and not said


def test_failure_leaves_it_eager_with_one_line_and_is_remembered(models, monkeypatch):
    def fail(*_, **__):
        def run(*_):
            raise RuntimeError("no such compiler\nand much more")

        return run

    expected = passes(models.unet, 16)
    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(compilation, "missing_compiler", lambda _: None)
    said = []
    assert not compile_network(models, **LONG, say=said.append)
    assert len(said) == 1 and "no such compiler" in said[0] and "much more" not in said[0]
    assert type(models.unet) is UNet and not hasattr(models.unet, "compiled")
    assert all(torch.equal(a, b) for a, b in zip(passes(models.unet, 16), expected, strict=True))
    assert not compile_network(models, **LONG, say=said.append)
    assert len(said) == 1


@pytest.mark.parametrize(("factor", "word"), [(1.1, "off by"), (1.0, "gains nothing")])
def test_a_wrong_or_slow_result_is_turned_down(models, monkeypatch, factor, word):
    def compiled(function, **_):
        def run(*arguments):
            out = function(*arguments)
            return (out[0] * factor, out[1]) if isinstance(out, tuple) else out * factor

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(compilation, "LEAST_SHARE", 0.05)
    rounds = iter([1.0, 1.0, 9.0, 0.99, 0.99])  # eager twice, the compiler, compiled twice
    whole = compilation._round
    monkeypatch.setattr(compilation, "_round", lambda *given: (whole(*given)[0], next(rounds)))
    monkeypatch.setattr(compilation, "missing_compiler", lambda _: None)
    said = []
    assert not compile_network(models, **LONG, say=said.append)
    assert len(said) == 1 and word in said[0] and type(models.unet) is UNet
    record = read_record(cache_key(models, SHAPE))
    assert (record.eager, record.compiled, record.cold) == (1.0, 0.99, pytest.approx(9.0 - 0.99))
    assert not compile_network(models, **LONG, say=said.append) and len(said) == 1


def test_no_compiler_is_said_before_anything_is_tried(models, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    said = []
    assert not compile_network(models, **LONG, say=said.append)
    assert len(said) == 1 and "no-such-compiler" in said[0] and type(models.unet) is UNet


@pytest.fixture
def eager_is_slower(monkeypatch):
    """So small a network gains nothing: have it taken all the same."""
    monkeypatch.setattr(compilation, "LEAST_SHARE", float("-inf"))
    monkeypatch.setattr(compilation, "worth_compiling", lambda *_: True)


def graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return counters["stats"]["unique_graphs"]


def test_one_shape_is_compiled_and_nothing_later(models, monkeypatch, eager_is_slower):
    ran = []

    def backend(graph, _):  # traced as always, but run without C++
        return lambda *given: ran.append(None) or graph(*given)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(compilation, "missing_compiler", lambda _: None)
    expected = {frames: passes(models.unet, frames) for frames in (16, 5)}
    said, before = [], graphs()
    assert compile_network(models, **LONG, say=said.append), said
    assert type(models.unet) is CompiledUNet and not said
    made = graphs()
    assert made == before + 2  # a full and a shallow pass
    assert len(ran) == 2 * (1 + compilation.TRIALS)  # what `denoise` passes is what was compiled: none ran eager
    ran.clear()
    for found, wanted in zip(passes(models.unet, 16), expected[16], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert len(ran) == 2
    assert all(torch.equal(*pair) for pair in zip(passes(models.unet, 5), expected[5], strict=True))
    assert len(ran) == 2
    torch.set_num_threads(2)  # compiled code is for one number of threads, but this must not compile it anew
    passes(models.unet, 16)
    assert len(ran) == 2 and graphs() == made
    restore(models)
    assert type(models.unet) is UNet
    torch.set_num_threads(1)
    assert all(torch.equal(*pair) for pair in zip(passes(models.unet, 16), expected[16], strict=True))


@pytest.mark.skipif(missing_compiler("cpu") is not None, reason=str(missing_compiler("cpu")))
def test_compiled_is_eager(models, monkeypatch, eager_is_slower):
    def full(unet, x, timestep, context, frames, branch=None, guided=False):
        # A network of these lines takes seconds to compile, the whole one minutes.
        out = unet.conv_out(unet.conv_norm_out(unet.conv_in(x), frames))
        return torch.cat([out, 2 * out]), x

    @torch.inference_mode()
    def full_pass():
        x = torch.randn(16, 9, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
        x = x.contiguous(memory_format=torch.channels_last)
        context = models.unet.encode_audio(torch.ones(1, 16, 50, 8))
        return models.unet.full(x, torch.tensor([500]), context, 16, 0, True)[0]

    monkeypatch.setattr(UNet, "full", full)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # starting workers takes longer than the work
    monkeypatch.setattr(inductor.cpp, "simdlen", 1)  # as does reading the headers of vector instructions
    expected = full_pass()
    said, before = [], graphs()
    assert compile_network(models, **LONG | {"cache": DeepCache(1, 0)}, say=said.append), said
    assert graphs() == before + 1 and not said
    assert type(models.unet) is CompiledUNet
    torch.testing.assert_close(full_pass(), expected, rtol=1e-4, atol=1e-4)
    record = read_record(cache_key(models, replace(SHAPE, cache=DeepCache(1, 0))))
    assert record.filled and record.cold > 0 and record.eager > 0 and record.compiled > 0
