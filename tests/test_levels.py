"""The levels, the slider and the overriding of settings."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from latentsync.errors import UserError
from latentsync.settings import DeepCache
from optim.levels import CONSERVATIVE, SETTINGS, STOPS, find_level, level_at, override, steps_for

BALANCED, AGGRESSIVE = find_level("balanced"), find_level("aggressive")

ROOT = Path(__file__).resolve().parent.parent
POSITIONS = [i / 100 for i in range(101)]


def test_named_stops_lie_at_the_ends_and_the_middle_of_the_slider():
    assert [level_at(p) for p in (0, 0.5, 1)] == [CONSERVATIVE, BALANCED, AGGRESSIVE]
    assert [find_level(stop.name.upper()) for stop in STOPS] == list(STOPS)
    assert find_level("0.5") is BALANCED


def test_levels_are_known_without_torch():
    """A page and --help show them before torch is loaded, which takes seconds."""
    code = "import sys, optim.levels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_conservative_leaves_the_result_as_it_is():
    assert CONSERVATIVE.cache is None and not CONSERVATIVE.tf32 and not CONSERVATIVE.compile
    assert all(steps_for(CONSERVATIVE, asked) == asked for asked in range(1, 101))


def test_a_fifth_and_two_fifths_of_the_steps_are_saved():
    assert [steps_for(stop, 20) for stop in STOPS] == [20, 16, 12]
    assert [steps_for(stop, 1) for stop in STOPS] == [1, 1, 1]
    assert [steps_for(override(CONSERVATIVE, step_share=0.5), asked) for asked in (4, 5, 6, 7)] == [2, 3, 3, 4]


def test_steps_fall_and_cache_intervals_grow_along_the_slider():
    levels = [level_at(p) for p in POSITIONS]
    steps = [steps_for(level, 50) for level in levels]
    intervals = [level.cache.interval if level.cache else 1 for level in levels]
    assert steps == sorted(steps, reverse=True) and len(set(steps)) == 21  # 50 to 30, none left out
    assert intervals == sorted(intervals) and set(intervals) == {1, 2, 3}
    assert steps_for(level_at(0.25), 20) == 18 and level_at(0.25).cache == DeepCache(2, 0)


def test_between_stops_only_steps_and_cache_differ_from_the_stop_below():
    for position in POSITIONS:
        level = level_at(position)
        below = [stop for stop in STOPS if stop.position <= position][-1]
        level_like_below = replace(level, name=below.name, position=below.position, step_share=below.step_share)
        assert replace(level_like_below, cache=below.cache) == below


@pytest.mark.parametrize("position", [-0.01, 1.01, float("nan")])
def test_positions_off_the_slider_are_refused(position):
    with pytest.raises(UserError, match="from 0"):
        level_at(position)


@pytest.mark.parametrize("text", ["fast", "", "2", "nan"])
def test_levels_that_do_not_exist_are_refused(text):
    with pytest.raises(UserError, match="from 0"):
        find_level(text)


OTHER_VALUES = {
    "step_share": 0.3, "cache": DeepCache(2, 1), "tf32": True, "compile": True, "graphs": False, "fused": False,
    "vae_tiling": False, "match_colours": True, "paint": "second", "batch_share": 0.1, "vram_fraction": 0.75,
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_can_be_overridden_alone(setting):
    changed = override(CONSERVATIVE, **{setting: OTHER_VALUES[setting]})
    assert getattr(changed, setting) == OTHER_VALUES[setting]
    assert replace(changed, **{setting: getattr(CONSERVATIVE, setting)}) == CONSERVATIVE != changed


@pytest.mark.parametrize(
    "setting, value",
    [
        ("match_colours", None), ("step_share", 0), ("step_share", 1.1), ("batch_share", True),
        ("vram_fraction", float("nan")), ("vram_fraction", "0.8"), ("tf32", 1), ("cache", (3, 0)),
        ("cache", DeepCache(3, 12)), ("paint", "third"), ("name", "mine"), ("turbo", True),
    ],
)  # fmt: skip
def test_overrides_out_of_range_are_refused_by_name(setting, value):
    with pytest.raises(UserError, match=setting):
        override(BALANCED, **{setting: value})


@pytest.mark.parametrize("interval, branch", [(0, 0), (3, -1)])
def test_a_cache_that_names_no_pass_is_refused(interval, branch):
    with pytest.raises(UserError, match="interval from 1"):
        DeepCache(interval, branch)
