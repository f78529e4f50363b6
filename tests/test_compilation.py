"""A compiled network is the eager one, and a job compiles only where that cannot make it slower."""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config as inductor
from torch._dynamo.utils import counters

from latentsync.checkpoints.load import Models
from latentsync.settings import DeepCache, Settings
from latentsync.unet import UNet, UNetConfig
from latentsync.whisper import AudioEncoder, WhisperDims
from optim import compilation
from optim.accelerate import make_plan, should_compile
from optim.compilation import (
    LONG_JOB,
    compile_unet,
    configure_compilers,
    is_compiled,
    missing_compiler,
    restore_eager,
)
from optim.levels import CONSERVATIVE, find_level, override

BALANCED, AGGRESSIVE = find_level("balanced"), find_level("aggressive")

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
SETTINGS = Settings(cache=DeepCache(2, 0))
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
    vae = SimpleNamespace(config=SimpleNamespace(downscaling=8))
    encoder = AudioEncoder(WhisperDims(n_audio_state=64, n_audio_head=1, n_audio_layer=1))
    return Models("tiny", 8 * SIDE, unet, encoder, vae)


def passes(unet: UNet, frames: int) -> list[torch.Tensor]:
    """A full and a shallow pass of one window."""
    random = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        x = torch.randn(frames, 9, SIDE, SIDE, generator=random).contiguous(memory_format=torch.channels_last)
        audio, timestep = torch.randn(1, frames, 50, 8, generator=random), torch.tensor([500])
        context = unet.encode_audio(audio)
        out, cached = unet.full(x, timestep, context, frames, 0, True)
        return [out, unet.shallow(x, timestep, context, frames, 0, cached, True)]


# ---- when


def planned(level):
    return make_plan(level, SETTINGS, 128, None)


def test_a_level_compiles_long_jobs_without_fused_kernels():
    assert should_compile(planned(AGGRESSIVE), False, LONG_JOB)
    assert not should_compile(planned(AGGRESSIVE), False, LONG_JOB - 1)
    assert not should_compile(planned(AGGRESSIVE), False, None)
    assert not should_compile(planned(AGGRESSIVE), True, LONG_JOB)  # the fused kernels
    assert should_compile(planned(override(AGGRESSIVE, fused=False)), True, LONG_JOB)
    assert not any(should_compile(planned(level), False, LONG_JOB) for level in (CONSERVATIVE, BALANCED))


@pytest.mark.parametrize("asked", [True, False])
def test_an_explicit_choice_goes_before_the_rule(asked):
    plan = planned(override(AGGRESSIVE, compile=asked))
    assert should_compile(plan, True, 25) is should_compile(plan, False, 10 * LONG_JOB) is asked


def test_the_cache_folder_is_the_users_unless_they_set_another(home, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    configure_compilers()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(home / "compiled" / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"


@pytest.mark.parametrize("cores, threads", [(3, "3"), (200, "32")])
def test_inductor_takes_no_more_threads_than_there_are_cores_to_use(monkeypatch, cores, threads):
    monkeypatch.setattr(compilation, "usable_cores", lambda: cores)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")
    compilation.configure_compilers()
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "7", "the user's choice"
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
    compilation.configure_compilers()
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == threads


# ---- the network


def test_failure_leaves_it_eager_with_one_line(models, monkeypatch):
    def fail(*_, **__):
        def run(*_):
            raise RuntimeError("no such compiler\nand much more")

        return run

    expected = passes(models.unet, 16)
    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(compilation, "missing_compiler", lambda _: "")
    lines = []
    assert not compile_unet(models, SETTINGS, lines.append)
    assert len(lines) == 1 and "no such compiler" in lines[0] and "much more" not in lines[0]
    assert not is_compiled(models.unet)
    assert all(torch.equal(a, b) for a, b in zip(passes(models.unet, 16), expected, strict=True))


def test_a_wrong_result_is_turned_down(models, monkeypatch):
    def compiled(function, **_):
        def run(*arguments):
            out = function(*arguments)
            return (out[0] * 1.1, out[1]) if isinstance(out, tuple) else out * 1.1

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(compilation, "missing_compiler", lambda _: "")
    lines = []
    assert not compile_unet(models, SETTINGS, lines.append)
    assert len(lines) == 1 and "off by" in lines[0] and not is_compiled(models.unet)


def test_a_missing_compiler_is_named_before_anything_is_tried(models, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    lines = []
    assert not compile_unet(models, SETTINGS, lines.append)
    assert len(lines) == 1 and "no-such-compiler" in lines[0] and not is_compiled(models.unet)


def graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return counters["stats"]["unique_graphs"]


def test_one_shape_is_compiled_and_nothing_later(models, monkeypatch):
    ran = []

    def backend(graph, _):  # traced as always, but run without C++
        return lambda *inputs: ran.append(None) or graph(*inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(compilation, "missing_compiler", lambda _: "")
    expected = {frames: passes(models.unet, frames) for frames in (16, 5)}
    lines, before = [], graphs()
    assert compile_unet(models, SETTINGS, lines.append), lines
    assert is_compiled(models.unet) and not lines
    made = graphs()
    assert made == before + 2  # a full and a shallow pass
    assert len(ran) == 2 * 2  # what `denoise` passes is what was compiled: none ran eager
    ran.clear()
    for result, wanted in zip(passes(models.unet, 16), expected[16], strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)
    assert len(ran) == 2
    assert all(torch.equal(*pair) for pair in zip(passes(models.unet, 5), expected[5], strict=True))
    assert len(ran) == 2
    torch.set_num_threads(2)  # compiled code is for one number of threads, but this must not compile it anew
    passes(models.unet, 16)
    assert len(ran) == 2 and graphs() == made
    restore_eager(models.unet)
    assert not is_compiled(models.unet)
    torch.set_num_threads(1)
    assert all(torch.equal(*pair) for pair in zip(passes(models.unet, 16), expected[16], strict=True))


@pytest.mark.skipif(bool(missing_compiler("cpu")), reason=missing_compiler("cpu"))
def test_compiled_is_eager(models, monkeypatch):
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
    expected = full_pass()
    lines, before = [], graphs()
    # Starting workers takes longer than the work, as does reading the headers of vector instructions.
    with inductor.patch({"compile_threads": 1, "cpp.simdlen": 1}):
        assert compile_unet(models, Settings(cache=DeepCache(1, 0)), lines.append), lines
    assert graphs() == before + 1 and not lines
    assert is_compiled(models.unet)
    torch.testing.assert_close(full_pass(), expected, rtol=1e-4, atol=1e-4)
