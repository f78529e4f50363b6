"""The comparison of levels: figures of known differences, and a table from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from optim.quality import main, psnr, ssim

EXAMPLE = Path(__file__).parents[1] / "assets" / "example"
HIDDEN = np.zeros((32, 32), bool)
HIDDEN[8:24, 8:24] = True
pytestmark = pytest.mark.usefixtures("one_thread")


def faces(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 200, (2, 32, 32, 3), np.uint8)


def test_only_the_hidden_part_counts():
    ours, theirs = faces(0), faces(0)
    theirs[:, ~HIDDEN] = 0
    assert psnr(ours, theirs, HIDDEN) == float("inf")
    theirs[:, 8:24, 8:24] += 10
    assert psnr(ours, theirs, HIDDEN) == pytest.approx(20 * np.log10(255 / 10))


def test_structural_similarity_is_the_usual_one():
    ours = faces(1)
    theirs = np.clip(ours + np.random.default_rng(2).normal(0, 12, ours.shape), 0, 255).astype(np.uint8)
    grey = [face.astype(np.float64) @ (0.299, 0.587, 0.114) for face in (ours[0], theirs[0])]
    usual = structural_similarity(*grey, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                  full=True)[1][HIDDEN].mean()  # fmt: skip
    assert ssim(ours[:1], theirs[:1], HIDDEN) == pytest.approx(usual, abs=2e-3)
    assert ssim(ours, ours, HIDDEN) == pytest.approx(1)


def test_conservative_equals_the_plain_pipeline_and_other_levels_are_compared_with_it(
    checkpoint, talking, voice, tmp_path, capsys
):
    table = tmp_path / "table.json"
    arguments = [talking, voice, "--model", checkpoint, "--steps", 5, "--levels", "conservative", "aggressive"]
    assert main([*map(str, arguments), "--json", str(table)]) == 0
    conservative, aggressive = json.loads(table.read_text())
    assert conservative["psnr_plain"] >= 50 and conservative["ssim_plain"] > 0.999
    assert conservative["psnr_conservative"] == float("inf") and aggressive["steps"] == 3
    assert 10 < aggressive["psnr_conservative"] < 60 and aggressive["frames"] == 20
    assert "aggressive" in capsys.readouterr().out


def test_of_a_model_with_a_face_of_its_own_the_painted_mouths_are_compared(tmp_path):
    table = tmp_path / "table.json"
    example = [str(EXAMPLE / "face.mp4"), str(EXAMPLE / "speech.wav")]
    short = ["--steps", "5", "--seconds", "0.4", "--levels", "aggressive"]
    assert main([*example, "--model", "demo", *short, "--json", str(table)]) == 0
    _, aggressive = json.loads(table.read_text())
    assert 20 < aggressive["psnr_conservative"] < 80


def test_a_video_without_a_face_is_one_sentence(checkpoint, voice, tmp_path, capsys):
    from clips import make_video

    video = make_video(tmp_path / "card.mp4", seconds=0.4)
    assert main([str(video), str(voice), "--model", str(checkpoint), "--steps", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
