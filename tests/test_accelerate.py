"""From a level to a plan, from a plan to networks, and down again when memory runs out."""

import json
from dataclasses import replace

import pytest
import torch
from fake_nvml import card_of
from test_hardware import read

from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import load_models
from latentsync.layers import FeedForward
from latentsync.rates import PAINTED
from latentsync.settings import Settings
from optim import __main__ as command_line
from optim.accelerate import (
    PROCESSOR_BATCH,
    SAFE_VRAM_FRACTION,
    accelerate,
    details,
    make_plan,
    oom_handler,
    step_down,
)
from optim.fused import FAST
from optim.hardware import recommended_level
from optim.lean import SLICE, LeanFeedForward, LeanVaeResnetBlock, make_lean
from optim.levels import CONSERVATIVE, STOPS, find_level, override
from optim.swap import restore_classes

BALANCED, AGGRESSIVE = find_level("balanced"), find_level("aggressive")
CPU = torch.device("cpu")
CARDS = (6, 8, 12, 16, 24, 48, 80)  # GB
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def models(checkpoint):
    return load_models(resolve_model(str(checkpoint), CPU), CPU, torch.float32)


def plan_for(gib: int, level=None, resolution: int = 512):
    gpu = read(card_of(gib))
    return make_plan(level or recommended_level(gpu), Settings(), resolution, gpu)


def test_the_plan_takes_steps_and_cache_from_the_level_and_the_rest_from_what_is_asked():
    asked = Settings(steps=30, guidance_scale=2.0, seed=7, crf=20, match_colours=False, paint="every")
    for level, steps in ((CONSERVATIVE, 30), (BALANCED, 24), (AGGRESSIVE, 18)):
        settings = make_plan(level, asked, 512, None).settings
        assert (settings.steps, settings.cache) == (steps, level.cache)
        assert settings.frames_per_pass == PROCESSOR_BATCH.frames
        assert replace(settings, steps=30, cache=None, frames_per_pass=16) == asked


def test_aggressive_paints_every_second_frame_of_fast_films_unless_it_is_told_otherwise_and_says_so():
    for level in STOPS:
        plan = make_plan(level, Settings(), 512, None)
        assert plan.settings.paint == ("second" if level is AGGRESSIVE else "every")
        words = "every second frame painted from 48 a second on"
        assert (words in details(plan, CPU)) == (level is AGGRESSIVE)
        for paint in PAINTED:
            assert make_plan(level, Settings(paint=paint), 512, None).settings.paint == paint


@pytest.mark.parametrize("gib", CARDS)
def test_batches_of_the_plan_are_those_of_the_card(gib):
    plan = plan_for(gib)
    assert plan.settings.frames_per_pass == plan.batch.frames
    assert plan.settings.windows_per_pass == plan.batch.windows
    assert plan.batch.fits or gib == 6
    if gib == 24:
        assert plan.settings.frames_per_pass == 20 and plan.level is AGGRESSIVE


def test_on_the_processor_every_level_runs_and_the_network_stays_what_it_was(models):
    before = [type(module) for module in make_lean(models.unet).modules()]
    for level in STOPS:
        plan, lines = make_plan(level, Settings(), models.resolution, None), []
        assert accelerate(models, plan, lines.append) is models and plan.batch == PROCESSOR_BATCH
        assert [type(module) for module in models.unet.modules()] == before
        (line,) = lines
        assert line.startswith(level.name) and f"{plan.settings.steps} steps" in line and "\n" not in line
        assert ("DeepCache" in line) == (level.cache is not None)


def test_no_kernel_is_used_on_the_processor(models, caplog):
    accelerate(models, make_plan(AGGRESSIVE, Settings(), models.resolution, None), lambda _: None)
    kinds = {type(module) for network in (models.unet, models.vae) for module in network.modules()}
    assert not kinds & set(FAST.values()) and not caplog.records


def test_what_one_plan_did_to_the_networks_the_next_one_undoes(models):
    networks = models.unet, models.vae
    plain = [type(module) for network in networks for module in network.modules()]
    for fused in (True, False):
        plan = make_plan(override(CONSERVATIVE, fused=fused), Settings(), models.resolution, None)
        accelerate(models, plan, lambda _: None)
        kinds = [type(module) for network in networks for module in network.modules()]
        assert (kinds == plain) is not fused


def test_a_lean_autoencoder_gives_the_same_to_the_bit_and_is_taken_back(models):
    vae = models.vae
    faces, latents = torch.randn(3, 3, 64, 64), torch.randn(3, 4, 8, 8)
    plain = [type(module) for module in vae.modules()]
    with torch.inference_mode():
        wanted = vae.encode(faces), vae.decode(latents)
        assert {type(module) for module in make_lean(vae).modules()} - set(plain) == {LeanVaeResnetBlock}
        ours = vae.encode(faces), vae.decode(latents)
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
    assert [type(module) for module in restore_classes(vae).modules()] == plain


@pytest.mark.parametrize("tokens", [SLICE // 2, SLICE, 2 * SLICE + 3])
def test_a_lean_feed_forward_gives_the_same_and_is_taken_back(models, tokens):
    unet = models.unet
    part = next(module for module in unet.modules() if type(module) is FeedForward)
    x = torch.randn(2, tokens, part.net[2].out_features)
    with torch.inference_mode():
        wanted = part(x)
        assert type(next(m for m in make_lean(unet).modules() if m is part)) is LeanFeedForward
        # Products of other sizes may be added up in another order: float32 rounds to 1e-7, outputs are about 0.1.
        torch.testing.assert_close(part(x), wanted, rtol=1e-5, atol=1e-6)
    part(x.requires_grad_()).sum().backward()
    assert x.grad.abs().sum() > 0, "it can still be trained"
    restore_classes(unet)
    assert type(part) is FeedForward


def test_tiling_and_tf32_follow_the_plan_and_are_taken_back(models):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    plan = make_plan(AGGRESSIVE, Settings(), 64, None)
    try:
        accelerate(models, replace(plan, batch=replace(plan.batch, tiling=True)), lambda _: None)
        assert models.vae.use_tiling and torch.get_float32_matmul_precision() == "high"
        accelerate(models, make_plan(CONSERVATIVE, Settings(), 64, None), lambda _: None)
        assert not models.vae.use_tiling and torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_a_job_as_the_one_before_keeps_its_graphs_and_any_other_frees_them(models, monkeypatch):
    monkeypatch.setattr(type(models), "device", torch.device("cuda"))  # the networks stay on the processor
    monkeypatch.setattr("torch.cuda.set_device", lambda _: None)
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", lambda *_: None)
    fused = []
    monkeypatch.setattr("optim.fused.fuse", fused.append)

    def graphs_of(plan):
        accelerate(models, plan, lambda _: None, frames=96)
        return getattr(models.unet, "graphs", None)

    plan = plan_for(24, AGGRESSIVE)
    first = graphs_of(plan)
    others = replace(plan.settings, steps=plan.settings.steps + 1, seed=1, crf=20)
    now_free = replace(plan.batch, allowed=plan.batch.allowed - 1)
    assert graphs_of(replace(plan, settings=others, batch=now_free)) is first and len(fused) == 2
    assert "forward" in vars(models.vae.encoder)
    smaller = graphs_of(step_down(plan)[0])
    assert smaller is not None and "forward" not in vars(models.vae.encoder)
    unguided = graphs_of(replace(plan, settings=replace(plan.settings, guidance_scale=1.0)))
    assert graphs_of(plan_for(24, replace(AGGRESSIVE, graphs=False))) is None
    again = graphs_of(plan)
    assert len({id(graphs) for graphs in (first, smaller, unguided, again)}) == 4 and len(fused) == 10


def test_memory_is_given_up_in_the_stated_order_until_nothing_is_left():
    plan, given_up = plan_for(24, resolution=256), []
    while (smaller := step_down(plan)) is not None:
        old, (plan, words) = plan, smaller
        given_up.append(words)
        assert plan.settings.steps == old.settings.steps, "the user's quality is not given up unasked"
        settings = plan.settings
        assert (settings.frames_per_pass, settings.windows_per_pass) == (plan.batch.frames, plan.batch.windows)
        assert len(given_up) < 20
    order = ["a pass", "tiles", "graphs", str(SAFE_VRAM_FRACTION), "DeepCache"]
    places = [[i for i, words in enumerate(given_up) if word in words] for word in order]
    assert all(places) and places == sorted(places) and sum(map(len, places)) == len(given_up)
    assert plan.level.vram_fraction == SAFE_VRAM_FRACTION and not plan.level.graphs and plan.batch.tiling
    assert plan.batch.frames == plan.batch.windows == 1 and plan.settings.cache is None


def test_stepping_down_gives_a_message_each_time_and_ends(models):
    messages, step_downs, given = [], [], []
    plan = make_plan(BALANCED, Settings(), 64, None)
    on_out_of_memory = oom_handler(models, plan, messages.append, step_downs.append)
    while (settings := on_out_of_memory()) is not None:
        given.append(settings)
    assert len(given) == len(messages) == len(step_downs) > 3 and models.vae.use_tiling
    assert all(line.startswith("The GPU's memory ran short") for line in messages)
    assert on_out_of_memory() is None


# The command line


@pytest.mark.parametrize(
    "options, level, steps", [((), "conservative", 5), (("--level", "aggressive"), "aggressive", 3)]
)
def test_the_fast_command_line_runs_at_a_level(checkpoint, talking, voice, tmp_path, capsys, options, level, steps):
    report = tmp_path / "report.json"
    arguments = [talking, voice, "-o", tmp_path / "out.mp4", "--model", checkpoint, "--steps", 5, "--report", report]
    code = command_line.main([*map(str, arguments), *options])
    assert code == 0 and (tmp_path / "out.mp4").is_file()
    found = json.loads(report.read_text())
    assert found["level"] == level and found["step_downs"] == [] and found["settings"]["steps"] == steps
    said = capsys.readouterr().err
    assert f"{level}: {steps} steps" in said and "frames a second on the processor" in said


def test_every_setting_of_a_level_can_be_set_on_its_own(checkpoint, talking, voice, tmp_path):
    report = tmp_path / "report.json"
    arguments = [talking, voice, "-o", tmp_path / "out.mp4", "--model", checkpoint, "--steps", 4, "--report", report]
    options = "--level 1 --deepcache 2,1 --step-share 0.5 --batch 3 --vram-fraction 0.5 --no-graphs --no-tf32".split()
    assert command_line.main([*map(str, arguments), *options]) == 0
    settings = json.loads(report.read_text())["settings"]
    assert (settings["steps"], settings["frames_per_pass"]) == (2, 3)
    assert settings["cache"] == {"interval": 2, "branch": 1, "guided": True}


@pytest.mark.parametrize(
    "options, words",
    [
        (("--level", "fast"), "There is no level 'fast'"),
        (("--level", "1.5"), "from 0"),
        (("--deepcache", "a lot"), "--deepcache a lot is not understood"),
        (("--deepcache", "0"), "interval from 1"),
        (("--deepcache", "3,12"), "branch from 0 to 11"),
    ],
)
def test_levels_and_settings_that_make_no_sense_are_one_sentence(
    checkpoint, talking, voice, tmp_path, capsys, options, words
):
    arguments = [talking, voice, "-o", tmp_path / "out.mp4", "--model", checkpoint, *options]
    assert command_line.main([*map(str, arguments)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert words in said[-1] and not (tmp_path / "out.mp4").exists()
