"""Colours of the painted part: when they are matched, to what, and that nothing changes where they are not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import portrait

from latentsync.__main__ import make_parser
from latentsync.alignment import fixed_mask
from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import load_models
from latentsync.compositing import match_colours, merge_faces
from latentsync.errors import UserError
from latentsync.evaluation.appearance import ciede2000
from latentsync.pipeline import Source, generate_frames
from latentsync.settings import Settings
from latentsync.timing import StageClock
from latentsync.vae import to_pixels
from optim.accelerate import make_plan
from optim.levels import STOPS
from optim.serving import form

CPU = torch.device("cpu")
FRAMES, SIDE = 16, 64
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(checkpoint):
    return load_models(resolve_model(str(checkpoint), CPU), CPU, torch.float32)


@pytest.fixture(scope="module")
def paint(models):
    """A function from settings to the finished frames (n, H, W, 3)."""

    def run(models=models, **settings) -> np.ndarray:
        source = Source(enumerate(portrait(t) for t in range(FRAMES)), torch.zeros(FRAMES * 640), FRAMES)
        painted = generate_frames(source, models, Settings(steps=2, **settings), StageClock())
        return np.stack([aligned.frame for aligned in painted])

    return run


def face(flat: bool = False) -> torch.Tensor:
    """Something like a face crop: soft patches of many colours, or one colour: uint8 (1, SIDE, SIDE, 3)."""
    if flat:
        return torch.full((1, SIDE, SIDE, 3), 90, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(1, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(patches, (SIDE, SIDE), mode="bicubic").clamp(0, 1)
    return (smooth * 160 + 50).round().to(torch.uint8).permute(0, 2, 3, 1)


def test_a_released_model_paints_as_before_until_matching_is_switched_on(paint):
    as_before, off, on = paint(), paint(match_colours=False), paint(match_colours=True)
    assert np.array_equal(as_before, off), "to the bit"
    assert not np.array_equal(as_before, on)


def test_a_model_that_asks_for_matching_gets_it_until_it_is_switched_off(paint, models):
    asking = replace(models, match_colours=True)
    as_before, on, off = (paint(asking, match_colours=choice) for choice in (None, True, False))
    assert np.array_equal(as_before, on) and not np.array_equal(as_before, off)


def test_levels_match_colours_from_balanced_up_and_leave_a_choice_alone():
    chosen = {choice: [make_plan(stop, Settings(match_colours=choice), 64, None).settings.match_colours for stop in STOPS]
              for choice in (None, True, False)}  # fmt: skip
    assert chosen == {None: [None, True, True], True: [True] * 3, False: [False] * 3}


def test_the_choice_comes_from_the_command_line_and_the_page():
    def chosen(*options: str) -> str | None:
        return make_parser().parse_args(["a.mp4", "b.wav", "-o", "c.mp4", *options]).match_colours

    assert chosen() is None and chosen("--match-colours", "off") == "off"
    setting = next(each for each in form.SETTINGS if each.name == "match_colours")
    for value, field in (("on", True), ("off", False), (form.AS_LEVEL, None), (None, None)):
        assert setting.parse(value) is field and setting.parse(setting.show(field)) is field
    with pytest.raises(UserError, match="as the level says, on, off"):
        setting.parse("maybe")


@pytest.mark.parametrize("flat", [False, True], ids=["many colours", "one colour"])
def test_a_cast_of_the_painted_face_does_not_reach_the_frame(flat):
    crops, mask = face(flat), torch.from_numpy(fixed_mask(SIDE).copy())
    gain, offset = torch.tensor([1.08, 0.97, 0.92]), torch.tensor([0.04, -0.03, 0.05])
    cast = to_pixels(crops, torch.float32) * gain[:, None, None] + offset[:, None, None]

    def difference(generated: torch.Tensor) -> float:
        merged = merge_faces(generated, crops, mask)[0].permute(1, 2, 0)
        ours, theirs = (merged + 1) * 127.5, crops[0].float()
        hidden = mask < 0.5
        return ciede2000(*(pixels[hidden].mean(0).numpy() / 2.55 for pixels in (ours, theirs)))

    assert difference(match_colours(cast, crops, mask)) < 0.1 * difference(cast)


def test_a_face_without_a_cast_stays_as_it_is():
    crops, mask = face(), torch.from_numpy(fixed_mask(SIDE).copy())
    generated = to_pixels(crops, torch.float32)
    assert float((match_colours(generated, crops, mask) - generated).abs().max()) < 1 / 127.5


def test_a_cast_of_the_painted_part_alone_cannot_be_seen_and_changes_nothing_else():
    """Matching compares what is visible; it must do no harm where that shows nothing."""
    crops, mask = face(), torch.from_numpy(fixed_mask(SIDE).copy())
    generated = to_pixels(crops, torch.float32)
    cast = torch.where(mask < 0.5, generated + 0.1, generated)
    moved = (match_colours(cast, crops, mask) - cast).abs()
    assert float(moved.mean()) < 1 / 127.5
