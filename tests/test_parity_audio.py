"""Mel, features and audio tokens against the reference's own numbers on random weights."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from latentsync.audio import audio_chunks, feature_segments, frame_count, mel_segments
from latentsync.checkpoints.load import load_audio_encoder

PARITY_DIR = Path(os.environ.get("PARITY_DIR", Path(__file__).parent / "parity"))
FILES = sorted(PARITY_DIR.glob("audio_*.pt"))
pytestmark = pytest.mark.usefixtures("one_thread")
BOUND = 5e-6


def relative_error(a: torch.Tensor, b: np.ndarray) -> float:
    b = torch.from_numpy(np.asarray(b)).double()
    return float((a.double() - b).norm() / b.norm())


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def case(request):
    numbers = np.load(request.param.with_suffix(".npz"))
    return load_audio_encoder(request.param), dict(numbers)


def test_there_are_numbers_to_compare_with():
    assert FILES, f"no audio_*.pt in {PARITY_DIR}"


def test_mel_equals_the_reference(case):
    encoder, numbers = case
    mel = torch.cat(list(mel_segments(torch.from_numpy(numbers["wav"]), encoder.dims.n_mels)), dim=1)
    assert mel.shape == numbers["mel"].shape
    assert relative_error(mel, numbers["mel"]) <= BOUND


def test_features_equal_the_reference(case):
    encoder, numbers = case
    features = torch.cat(list(feature_segments(encoder, torch.from_numpy(numbers["wav"]))))
    assert len(features) == int(numbers["n_features"])
    assert relative_error(features[:: int(numbers["features_step"])], numbers["features"]) <= BOUND


def test_tokens_of_each_frame_equal_the_reference(case):
    encoder, numbers = case
    wav = torch.from_numpy(numbers["wav"])
    chunks = list(audio_chunks(encoder, wav, int(numbers["n_chunks"])))
    for index, wanted in zip(numbers["chunk_index"], numbers["chunks"], strict=True):
        assert relative_error(chunks[index], wanted) <= BOUND, index


def test_long_sound_is_worked_through_in_segments_that_join_without_a_seam():
    encoder = load_audio_encoder(FILES[0])
    wav = 0.1 * torch.randn(16000 * 65, generator=torch.Generator().manual_seed(0))
    rows = torch.cat(list(feature_segments(encoder, wav)))
    assert len(rows) == 65 * 50
    frames = frame_count(len(wav))
    assert frames == 65 * 25
    for i, tokens in enumerate(audio_chunks(encoder, wav, frames)):
        if i in (0, 1, 749, 750, 751, frames - 1):
            centre = i * 2
            wanted = rows[[min(max(r, 0), len(rows) - 1) for r in range(centre - 4, centre + 6)]]
            assert torch.equal(tokens, wanted.flatten(0, 1))


@pytest.mark.parametrize("samples", [1, 100, 399, 401, 700])
def test_a_sound_of_a_few_samples_still_gives_tokens(samples):
    encoder = load_audio_encoder(FILES[0])
    frames = frame_count(samples)
    assert len(list(audio_chunks(encoder, torch.full((samples,), 0.1), frames))) == frames >= 1
