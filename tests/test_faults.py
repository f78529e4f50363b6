"""Numbers that go wrong: noticed in their window, computed again in a wider type, and never written as a mouth."""

import numpy as np
import pytest
import torch
from conftest import portrait

from latentsync import painting
from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import load_models
from latentsync.errors import UserError
from latentsync.painting import Painter
from latentsync.pipeline import Source, generate_frames, lipsync
from latentsync.sampling import denoise
from latentsync.settings import Settings
from latentsync.timing import StageClock
from latentsync.unet import UNet
from latentsync.validation import broken_faces, in_dtype
from latentsync.windows import AlignedFrame
from optim.graphs import capture
from optim.lean import make_lean

CPU = torch.device("cpu")
FRAMES = 24  # a window and a slid-back second, of which 8 frames are new
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def models(checkpoint):
    return load_models(resolve_model(str(checkpoint), CPU), CPU, torch.float32)


@pytest.fixture
def half(checkpoint):
    return load_models(resolve_model(str(checkpoint), CPU), CPU, torch.float16)


@pytest.fixture
def narrow(models, monkeypatch):
    """Models in float32, with float64 as what is wider: on a processor far faster than half precision."""
    monkeypatch.setitem(painting.FALLBACK_DTYPES, torch.float32, (torch.float64, torch.bfloat16))
    return models


@pytest.fixture(scope="module")
def wav():
    return 0.1 * torch.randn(FRAMES * 640, generator=torch.Generator().manual_seed(0))


def run(models, wav, **settings) -> list[AlignedFrame]:
    frames = (portrait(t) for t in range(FRAMES))
    return list(
        generate_frames(Source(enumerate(frames), wav, FRAMES), models, Settings(steps=1, **settings), StageClock())
    )


def stacked(shots: list[AlignedFrame]) -> np.ndarray:
    return np.stack([shot.frame for shot in shots])


def overflow(models):
    """Give the network a first layer whose sums float16 cannot hold; the norm after it makes good for its size."""
    weight = models.unet.conv_in.weight
    weight.copy_(weight.float() * 20_000 / weight.float().abs().max())
    return models


def spoil(models, monkeypatch, spoilt) -> list:
    """Let denoising give NaN in the passes whose number is in `spoilt`; returns (dtype, windows) of every pass."""
    passes = []

    def spoiling(unet, noise, condition, *rest):
        passes.append((condition.dtype, len(condition)))
        latents = denoise(unet, noise, condition, *rest)
        if len(passes) - 1 in spoilt:
            latents[-1, :, -1, 2, 2] = torch.nan  # one number of the last frame
        return latents

    monkeypatch.setattr(painting, "denoise", spoiling)
    return passes


def test_a_network_that_overflows_in_half_precision_is_run_in_float32(half, wav):
    overflow(half)
    shots = run(half, wav, windows_per_pass=2)
    assert all(shot.recomputed for shot in shots)
    wanted = run(in_dtype(half, torch.float32), wav, frames_per_pass=1)
    assert not any(shot.recomputed for shot in wanted)
    assert np.array_equal(stacked(shots), stacked(wanted))


@pytest.mark.parametrize("behind", [0, 1])
def test_only_the_window_that_went_wrong_is_computed_again(narrow, wav, monkeypatch, behind):
    wanted = run(narrow, wav)
    given = Painter.__init__

    def delayed(self, *args):
        given(self, *args)
        self.max_pending = behind  # as on a GPU

    monkeypatch.setattr(Painter, "__init__", delayed)
    passes = spoil(narrow, monkeypatch, {0})
    shots = run(narrow, wav)
    assert sorted(str(dtype) for dtype, _ in passes) == ["torch.float32", "torch.float32", "torch.float64"]
    assert [i for i, shot in enumerate(shots) if shot.recomputed] == list(range(16))
    for i, (ours, theirs) in enumerate(zip(shots, wanted, strict=True)):
        if i < 16:
            assert np.abs(ours.frame.astype(int) - theirs.frame).max() <= 1
        else:
            assert np.array_equal(ours.frame, theirs.frame)


def test_of_a_pass_of_several_windows_the_others_are_kept(narrow, wav, monkeypatch):
    passes = spoil(narrow, monkeypatch, {0})
    shots = run(narrow, wav, windows_per_pass=2)
    assert passes == [(torch.float32, 2), (torch.float64, 1)]
    assert [i for i, shot in enumerate(shots) if shot.recomputed] == list(range(16, 24))


def test_the_next_type_serves_where_memory_is_short_of_the_widest(narrow, wav, monkeypatch):
    real = painting.in_dtype

    def short_of_memory(models, dtype):
        if dtype == torch.float64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(models, dtype)

    monkeypatch.setattr(painting, "in_dtype", short_of_memory)
    spoiling = spoil(narrow, monkeypatch, {1})
    shots = run(narrow, wav)
    assert [dtype for dtype, _ in spoiling] == [torch.float32, torch.float32, torch.bfloat16]
    assert [i for i, shot in enumerate(shots) if shot.recomputed] == list(range(16, 24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_job_whose_numbers_stay_broken_ends_with_a_sentence_and_keeps_the_old_file(
    checkpoint, talking, voice, tmp_path, monkeypatch, dtype
):
    models = load_models(resolve_model(str(checkpoint), CPU), CPU, dtype)
    spoil(models, monkeypatch, range(100))
    output = tmp_path / "out.mp4"
    output.write_bytes(b"an earlier result")
    with pytest.raises(UserError) as caught:
        lipsync(talking, voice, output, models, Settings(steps=1))
    message = str(caught.value)
    assert "float32" in message and "verify" in message and "\n" not in message and message.endswith(".")
    assert list(tmp_path.iterdir()) == [output] and output.read_bytes() == b"an earlier result"


def test_the_report_counts_what_was_computed_again(narrow, talking, voice, tmp_path, monkeypatch):
    report = lipsync(talking, voice, tmp_path / "out.mp4", narrow, Settings(steps=1))
    assert report.frames_computed_again == 0
    spoil(narrow, monkeypatch, {1})
    report = lipsync(talking, voice, tmp_path / "out.mp4", narrow, Settings(steps=1))
    assert report.frames_computed_again == 4 and report.frames == 20


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_network_that_predicts_the_same_everywhere_is_noticed(models, wav, value):
    models.unet.conv_out.weight.zero_()
    models.unet.conv_out.bias.fill_(value)
    with pytest.raises(UserError, match="no usable picture"):
        run(models, wav)


def change(faces: torch.Tensor, kind: str) -> None:
    """Spoil the second of three faces, or its mouth."""
    if kind in ("nan", "inf"):
        faces[1, 0, 0, 0] = float(kind)  # outside of what is generated
    elif kind == "flat mouth":
        faces[1, :, 8:, 4:12] = 0.3
    elif kind == "far":
        faces[1] *= 20


@pytest.mark.parametrize("kind", ["nan", "inf", "flat mouth", "far"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_no_picture_is_noticed_frame_by_frame(kind, dtype):
    random = torch.Generator().manual_seed(0)
    faces = (torch.rand(3, 3, 16, 16, generator=random) * 2 - 1).to(dtype)
    predicted = torch.randn(3, 4, 2, 2, generator=random)
    hidden = slice(8, 16), slice(4, 12)
    assert broken_faces(predicted, faces, hidden).tolist() == [False] * 3
    change(faces, kind)
    assert broken_faces(predicted, faces, hidden).tolist() == [False, True, False]


def test_the_wider_networks_are_plain_and_the_others_stay_as_they_are(half):
    make_lean(half.vae)
    capture(half.unet)
    half.vae.use_tiling = True
    kinds = [type(module) for network in (half.unet, half.vae) for module in network.modules()]
    wide = in_dtype(half, torch.float32)
    assert type(wide.unet) is UNet and wide.dtype == torch.float32 and wide.vae.use_tiling
    assert not any(module.__module__.startswith("optim") for module in wide.vae.modules())
    assert [type(module) for network in (half.unet, half.vae) for module in network.modules()] == kinds
    for ours, theirs in ((wide.unet, half.unet), (wide.vae, half.vae)):
        assert {p.dtype for p in theirs.parameters()} == {torch.float16}
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value.float())


@pytest.mark.parametrize("steps", [1, 4])
def test_the_demo_model_is_far_from_every_limit(wav, monkeypatch, steps):
    """A right result must never be taken for a broken one."""
    found = []
    real = painting.broken_faces

    def measured(predicted, pixels, hidden):
        mouths = pixels[(..., *hidden)]
        size, deviation = pixels.square().mean().sqrt(), mouths.std(dim=(1, 2, 3)).min()
        found.append((size, deviation, predicted.std(dim=(2, 3)).amax(1).min()))
        return real(predicted, pixels, hidden)

    monkeypatch.setattr(painting, "broken_faces", measured)
    models = load_models(resolve_model("demo", CPU), CPU, torch.float32)
    frames = enumerate(portrait(t) for t in range(3))
    shots = list(generate_frames(Source(frames, wav, 3), models, Settings(steps=steps), StageClock()))
    assert not any(shot.recomputed for shot in shots)
    [(size, deviation, predicted)] = found
    assert size < 1 and deviation > 0.1 and 0.5 < predicted < 2
