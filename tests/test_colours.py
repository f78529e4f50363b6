"""Colours of the painted part: when they are matched, to what, and that nothing changes where they are not."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import portrait

from latentsync.__main__ import make_parser
from latentsync.alignment import fixed_mask
from latentsync.compositing import MATCHED_AREAS, match_colours, merge_faces
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
def paint(models):
    """A function from settings to the finished frames (n, H, W, 3)."""

    def run(models=models, **settings) -> np.ndarray:
        source = Source(enumerate(portrait(t) for t in range(FRAMES)), torch.zeros(FRAMES * 640), FRAMES)
        painted = generate_frames(source, models, Settings(steps=2, **settings), StageClock())
        return np.stack([aligned.frame for aligned in painted])

    return run


def face(flat: bool = False, side: int = SIDE) -> torch.Tensor:
    """Something like a face crop: soft patches of many colours, or one colour: uint8 (1, side, side, 3)."""
    if flat:
        return torch.full((1, side, side, 3), 90, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(1, 3, 6, 6, generator=generator)
    smooth = F.interpolate(patches, (side, side), mode="bicubic").clamp(0, 1)
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
    for choice, wanted in ((None, [None, True, True]), (True, [True] * 3), (False, [False] * 3)):
        plans = [make_plan(stop, Settings(match_colours=choice), 64, None) for stop in STOPS]
        assert [plan.settings.match_colours for plan in plans] == wanted


def test_the_choice_comes_from_the_command_line_and_the_page():
    def chosen(*options: str) -> str | None:
        return make_parser().parse_args(["a.mp4", "b.wav", "-o", "c.mp4", *options]).match_colours

    assert chosen() is None and chosen("--match-colours", "off") == "off"
    setting = next(each for each in form.SETTINGS if each.name == "match_colours")
    for value, field in (("on", True), ("off", False), (form.AS_LEVEL, None), (None, None)):
        assert setting.parse(value) is field and setting.parse(setting.show(field)) is field
    with pytest.raises(UserError, match="as the level says, on, off"):
        setting.parse("maybe")


def hidden_difference(generated: torch.Tensor, crops: torch.Tensor, mask: torch.Tensor) -> float:
    """CIEDE2000 between the mean colours of the painted part, merged, and of the original."""
    merged = merge_faces(generated.float(), crops, mask.float())[0].permute(1, 2, 0)
    hidden = mask < 0.5
    return ciede2000(*(lab(pixels[hidden].mean(0)) for pixels in ((merged + 1) * 127.5, crops[0].float())))


def lab(colour: torch.Tensor) -> np.ndarray:
    """A colour (3,), RGB to 255, in CIELAB."""
    return cv2.cvtColor((colour / 255).numpy().astype(np.float32)[None, None], cv2.COLOR_RGB2Lab)[0, 0]


def with_cast(pixels: torch.Tensor) -> torch.Tensor:
    gain, offset = torch.tensor([1.08, 0.97, 0.92]), torch.tensor([0.04, -0.03, 0.05])
    return pixels * gain[:, None, None] + offset[:, None, None]


@pytest.mark.parametrize("areas", [None, MATCHED_AREAS])
@pytest.mark.parametrize("flat", [False, True], ids=["many colours", "one colour"])
def test_a_cast_of_the_painted_face_does_not_reach_the_frame(flat, areas):
    crops, mask = face(flat), torch.from_numpy(fixed_mask(SIDE).copy())
    cast = with_cast(to_pixels(crops, torch.float32))
    matched = match_colours(cast, crops, mask, areas)
    assert hidden_difference(matched, crops, mask) < 0.1 * hidden_difference(cast, crops, mask)


def test_half_precision_matches_large_faces_too():
    """The mask of a face of 512 px has more visible pixels than float16 can count."""
    crops, mask = face(side=512), torch.from_numpy(fixed_mask(512).copy())
    cast = with_cast(to_pixels(crops, torch.float32))
    matched = match_colours(cast.half(), crops, mask.half(), MATCHED_AREAS)
    assert matched.dtype == torch.float16
    assert hidden_difference(matched, crops, mask) < 0.1 * hidden_difference(cast, crops, mask)


def test_a_face_without_a_cast_stays_as_it_is():
    crops, mask = face(), torch.from_numpy(fixed_mask(SIDE).copy())
    generated = to_pixels(crops, torch.float32)
    assert float((match_colours(generated, crops, mask, MATCHED_AREAS) - generated).abs().max()) < 1 / 127.5


def test_noise_of_the_film_does_not_pass_for_colour():
    """A painted face has less noise. Of a pale film, matching pixel by pixel would take that for paleness."""
    side = 256
    many_colours, mask = face(side=side).float(), torch.from_numpy(fixed_mask(side).copy())
    grey = many_colours.mean(-1, keepdim=True)
    clean = grey + 0.05 * (many_colours - grey)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)) * 24
    noisy = (clean + noise).round().clamp(0, 255).to(torch.uint8)
    painted = F.avg_pool2d(to_pixels(noisy, torch.float32), 3, stride=1, padding=1, count_include_pad=False)
    painted = torch.where(mask < 0.5, with_cast(painted), painted)  # more colour than there is to compare
    by_pixel, by_area = (match_colours(painted, noisy, mask, areas) for areas in (None, MATCHED_AREAS))
    before, worse, after = (hidden_difference(result, noisy, mask) for result in (painted, by_pixel, by_area))
    assert after < before + 0.5 and after < worse


def test_a_cast_of_the_painted_part_alone_is_not_seen_and_not_made_worse():
    crops, mask = face(), torch.from_numpy(fixed_mask(SIDE).copy())
    generated = to_pixels(crops, torch.float32)
    cast = torch.where(mask < 0.5, generated + 0.1, generated)
    moved = (match_colours(cast, crops, mask, MATCHED_AREAS) - cast).abs()
    assert float(moved.mean()) < 1 / 127.5
