"""Alignment, crops and compositing against the reference's own numbers."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from pasting import paste

from latentsync import compositing
from latentsync.alignment import crop_face, crop_size, estimate_matrix, fixed_mask, invert, template
from latentsync.compositing import merge_faces, paste_rectangle

PARITY_DIR = Path(os.environ.get("PARITY_DIR", Path(__file__).parent / "parity"))
FILES = sorted(PARITY_DIR.glob("align_*.npz"))
MAX_SHIFT = 0.02  # pixels at the crop's corners
MIN_PSNR = 50  # dB


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(((a.astype(float) - b.astype(float)) ** 2).mean(), 1e-9)))


def image_of(face: np.ndarray) -> torch.Tensor:
    """(R, R, 3) uint8 to (3, R, R) in [-1, 1]."""
    return torch.from_numpy(face.copy()).permute(2, 0, 1) / 127.5 - 1


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def case(request):
    case = dict(np.load(request.param))
    case["resolution"] = int(case["resolution"])
    return case


def test_there_are_numbers_to_compare_with():
    assert FILES, f"no align_*.npz in {PARITY_DIR}"


def test_template_and_crop_size(case):
    np.testing.assert_allclose(template(case["resolution"]), case["template"], rtol=1e-6)
    assert crop_size(case["resolution"]) == tuple(case["face_size"])


def test_matrices_follow_the_points(case):
    width, height = case["face_size"]
    corners = np.array([[0, 0, 1], [width, 0, 1], [0, height, 1], [width, height, 1]])
    bias = None
    for points, expected in zip(case["points"], case["matrices"], strict=True):
        matrix, bias = estimate_matrix(points, case["resolution"], bias)
        # Both ways: in pixels of the frame and of the crop.
        assert np.abs(corners @ (invert(matrix) - invert(expected)).T).max() < MAX_SHIFT
        at = np.c_[corners @ invert(expected).T, np.ones(4)]
        assert np.abs(at @ (matrix - expected).T).max() < MAX_SHIFT


@pytest.mark.parametrize("which, index", [("first", 0), ("last", -1)])
def test_crops(case, which, index):
    crop = crop_face(case["image"], case["matrices"][index], case["resolution"])
    assert psnr(crop, case[f"crop_{which}"]) > MIN_PSNR


@pytest.mark.parametrize("which, index", [("first", 0), ("last", -1)])
def test_restored_frames(case, which, index):
    frame = torch.from_numpy(case["image"].copy())
    paste(frame, image_of(case[f"crop_{which}"][:, ::-1]), case["matrices"][index])
    expected = case[f"restored_{which}"]
    changed = (expected != case["image"]).any(-1)
    assert psnr(frame.numpy()[changed], expected[changed]) > MIN_PSNR
    rows, columns = np.nonzero(changed)
    outside = np.ones_like(changed)
    outside[max(rows.min() - 4, 0) : rows.max() + 5, max(columns.min() - 4, 0) : columns.max() + 5] = False
    assert (frame.numpy()[outside] == case["image"][outside]).all()


def test_the_mask_is_the_references():
    path = PARITY_DIR / "mask_256.json"
    if not path.exists():
        pytest.skip(f"no {path}")
    expected = np.ones((256, 256), np.float32)
    for row, *runs in json.loads(path.read_text())["rows"]:
        for first, last in runs:
            expected[row, first : last + 1] = 0
    assert (fixed_mask(256) == expected).all()


@pytest.mark.parametrize("resolution", [128, 512])
def test_the_mask_of_another_side_covers_the_same(resolution):
    mask = fixed_mask(resolution)
    assert mask.shape == (resolution, resolution) and mask.dtype == np.float32
    assert mask.min() == 0 and mask.max() == 1
    assert abs(mask.mean() - fixed_mask(256).mean()) < 0.002


@pytest.mark.parametrize("resolution", [128, 256, 512])
@pytest.mark.parametrize("size, degrees, centre", [
    (90, 25, (300, 200)), (330, 0, (480, 350)), (330, -40, (500, 330)), (330, 20, (150, 560)),
])  # fmt: skip
def test_an_unchanged_crop_leaves_the_frame_as_it_was_on_a_smooth_picture(resolution, size, degrees, centre):
    y, x = np.mgrid[0:720, 0:960]
    picture = np.stack([x / 960 * 255, y / 720 * 255, 128 + 90 * np.sin(x / 90) * np.cos(y / 70)], -1)
    picture = picture.astype(np.uint8)
    matrix = similarity(size, degrees, centre, resolution)
    crop = crop_face(picture, matrix, resolution)
    frame = torch.from_numpy(picture.copy())
    paste(frame, image_of(crop), matrix)
    assert np.abs(frame.numpy().astype(int) - picture)[20:-20, 20:-20].max() <= 4


def similarity(size: float, degrees: float, centre: tuple, resolution: int) -> np.ndarray:
    """The matrix of a face whose crop is `size` pixels wide in the frame and turned by `degrees`."""
    width, height = crop_size(resolution)
    angle, scale = np.deg2rad(degrees), width / size
    linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.c_[linear, (width / 2, height / 2) - linear @ centre].astype(np.float32)


def test_both_soft_edges_agree():
    matrix = similarity(300, 15, (480, 360), 256)
    size = crop_size(256)
    warp = compositing.Warp.of([matrix], [(200, 60, 760, 660)], torch.device("cpu"))
    where = warp.coordinates(600, 560)
    closed = compositing._soft_edge(*where, warp, *size)
    kernel = compositing._soft_edge_by_kernel(*where, warp, *size)
    assert (closed - kernel).abs().max() < 0.01
    assert closed.max() == 1 and closed.min() == 0


@pytest.mark.parametrize("centre", [(-500, 300), (2000, 100)])
def test_a_face_outside_the_picture_changes_nothing(centre):
    picture = np.random.default_rng(0).integers(0, 256, (360, 640, 3), dtype=np.uint8)
    matrix = similarity(150, 10, centre, 256)
    assert (crop_face(picture, matrix, 256) == 127).all()
    frame = torch.from_numpy(picture.copy())
    paste(frame, torch.zeros(3, 256, 256), matrix)
    assert (frame.numpy() == picture).all()


def test_opacity_lies_between_the_frame_and_the_full_face():
    picture = np.full((360, 640, 3), 200, np.uint8)
    matrix = similarity(150, 0, (320, 180), 256)
    values = []
    for opacity in (0, 0.5, 1):
        frame = torch.from_numpy(picture.copy())
        paste(frame, torch.full((3, 256, 256), -1.0), matrix, opacity)
        values.append(int(frame[180, 320, 0]))
    assert values == [200, 100, 0]


def test_merging_keeps_what_the_mask_shows():
    crops = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8))
    generated = torch.rand(2, 3, 256, 256) * 2 - 1
    mask = torch.from_numpy(fixed_mask(256).copy())
    merged = merge_faces(generated, crops, mask)
    shown = mask.bool().expand(2, 3, -1, -1)
    original = crops.permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(merged[shown], original[shown])
    torch.testing.assert_close(merged[~shown], generated[~shown])


def test_faces_that_are_pasted_together_come_out_as_alone():
    """As on a GPU: regions of different sizes lie at the top left of equally large ones."""
    random = np.random.default_rng(0)
    picture = random.integers(0, 256, (720, 960, 3), dtype=np.uint8)
    faces = torch.rand(3, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    opacities = [1.0, 0.0, 0.6]
    matrices = [similarity(300, 10, (480, 360), 256), similarity(260, -20, (300, 300), 256)]
    matrices.append(similarity(340, 0, (600, 400), 256))
    rectangles = [paste_rectangle(matrix, 256, picture.shape) for matrix in matrices]
    parts = [picture[y0:y1, x0:x1] for x0, y0, x1, y1 in rectangles]
    height, width = (max(part.shape[axis] for part in parts) for axis in (0, 1))
    together = torch.zeros(3, height, width, 3, dtype=torch.uint8)
    for region, part in zip(together, parts, strict=True):
        region[: len(part), : part.shape[1]] = torch.from_numpy(part)
    compositing._paste(together, faces, matrices, rectangles, opacities, by_kernel=False)
    for region, part, face, matrix, opacity in zip(together, parts, faces, matrices, opacities, strict=True):
        frame = torch.from_numpy(picture.copy())
        paste(frame, face, matrix, opacity)
        x0, y0, x1, y1 = paste_rectangle(matrix, 256, picture.shape)
        difference = (region[: len(part), : part.shape[1]].int() - frame[y0:y1, x0:x1].int()).abs()
        assert difference.max() <= 1
        assert opacity == 0 or not np.array_equal(part, frame[y0:y1, x0:x1].numpy())


@pytest.mark.parametrize("centre", [(480, 360), (20, 360)])
def test_pasting_never_waits_for_the_device(centre):
    # Meta tensors have no values: anything that reads one back would raise.
    frame = torch.empty(720, 960, 3, dtype=torch.uint8, device="meta")
    paste(frame, torch.empty(3, 256, 256, device="meta"), similarity(300, 10, centre, 256))
