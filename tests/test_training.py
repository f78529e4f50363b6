"""Training sees and hears what inference does, goes on where it stopped, and ends in a checkpoint that loads."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from clips import ffmpeg, make_sound
from conftest import portrait, save_video
from diffusers import AutoencoderKL
from torch import nn

from latentsync.alignment import fixed_mask
from latentsync.audio import SAMPLE_RATE, audio_chunks, log_powers, mel_segments
from latentsync.checkpoints.find import DEMO_FOLDER, resolve_model
from latentsync.checkpoints.load import load_models
from latentsync.checkpoints.tensors import read_tensors
from latentsync.corpus import (
    CORNERS,
    INNER_LOWER,
    INNER_UPPER,
    MARGIN,
    MEL_PER_FRAME,
    RESOLUTION,
    RESTING,
    SIDE,
    is_held_out,
    load_clips,
    resting_ends,
)
from latentsync.errors import UserError
from latentsync.media import read_audio
from latentsync.settings import WINDOW
from latentsync.training import autoencoder, denoiser, listener, restore, voices
from latentsync.training.augmentation import (
    MOUTH_REACH,
    MouthWarp,
    no_augmentation,
    random_augmentation,
    random_blends,
    random_mouth,
    render,
)
from latentsync.training.export import export
from latentsync.training.prepare import prepare
from latentsync.training.sound import (
    BEGINNING_SHARE,
    TRAINED_MEL_RANGE,
    draw_sound,
    draw_windows,
    gather_tokens,
    segment_count,
)
from latentsync.training.state import load_state, load_weights, save_state
from latentsync.unet import UNet, UNetConfig

CPU = torch.device("cpu")
FRAMES = 45


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A face with a changing sound, 1.8 s."""
    folder = tmp_path_factory.mktemp("clip")
    picture = save_video(folder / "picture.mkv", [portrait(t) for t in range(FRAMES)])
    sweep = make_sound(folder / "sound.wav", seconds=FRAMES / 25, source="aevalsrc='0.4*sin(900*t*t)':s=16000")
    ffmpeg("-i", picture, "-i", sweep, "-c:v", "libx264", "-crf", 12, "-c:a", "flac", folder / "clip.mkv")
    return folder / "clip.mkv"


@pytest.fixture(scope="module")
def prepared(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    prepare([("a", clip), ("b", clip)], folder, crf=10)
    return folder


def test_the_training_windows_hear_what_inference_hears(prepared, clip, one_thread):
    data = load_clips(prepared, CPU)
    torch.manual_seed(0)
    encoder = listener.new_encoder().eval()
    rng = np.random.default_rng(0)
    for _ in range(20):  # until the sound of one clip alone is drawn, which is inference's case
        sound = draw_sound(data, rng, 1, augment=False)
        if len(sound.clips[0]) == 1:
            break
    windows = draw_windows(data, sound, rng, 100)
    with torch.no_grad():
        tokens = gather_tokens(encoder(sound.mel), windows.segment, windows.rows)
    heard = torch.stack(list(audio_chunks(encoder, torch.from_numpy(read_audio(clip)), FRAMES, TRAINED_MEL_RANGE)))
    first = int(data.starts[sound.clips[0][0]])
    for window, wanted in zip(tokens, heard[windows.frames - first], strict=True):
        error = float((window - wanted).norm() / wanted.norm())
        shifted = float((window[1:] - wanted[:-1]).norm() / wanted[1:].norm())
        assert error < 0.05 < shifted, "a frame off would be heard"
    begins = windows.frames[:, 0] - first
    assert (int(begins.min()), int(begins.max())) == (0, FRAMES - WINDOW), "from the sound's first frame to its last"
    assert int((begins == 0).sum()) > BEGINNING_SHARE * len(begins)


def test_digital_silence_is_what_the_encoder_knows_for_silence():
    silent = torch.zeros(SAMPLE_RATE)
    quiet = torch.cat(list(mel_segments(silent, mel_range=TRAINED_MEL_RANGE)), dim=1)
    assert float(quiet.abs().max()) == 0.0, "the padding"
    released = torch.cat(list(mel_segments(silent)), dim=1)
    assert float(released.max()) == -1.5, "Whisper's own way, for Whisper"
    loud = torch.from_numpy(np.r_[chirp(0.5), np.zeros(SAMPLE_RATE)].astype(np.float32))
    mel = torch.cat(list(mel_segments(loud, mel_range=TRAINED_MEL_RANGE)), dim=1)
    assert float(mel.min()) == pytest.approx(float(mel.max()) - TRAINED_MEL_RANGE / 4)


def at_rest(data, frames):
    """Whether the mouth rests in each of these frames, by the landmarks."""
    lips = data.lips[torch.from_numpy(frames)]
    gap, width = ((lips[:, a] - lips[:, b]).norm(dim=1) for a, b in ((INNER_UPPER, INNER_LOWER), CORNERS))
    return (gap <= RESTING * width).numpy()


def test_a_mouth_rests_where_silence_is_heard(prepared, monkeypatch):
    """A clip that is at rest in its first 8 and last 5 frames, and loud throughout."""
    monkeypatch.setattr("latentsync.training.sound.change_voices", lambda power, owner: power)
    data = load_clips(prepared, CPU)
    n = int(data.lengths[0])
    opening = torch.full((n,), 5.0)
    opening[:8] = opening[-5:] = 0
    lips = torch.zeros(n, 40, 2)
    lips[:, CORNERS[1], 0], lips[:, INNER_LOWER, 1] = 50, opening
    one = replace(
        data, frames=data.frames[:n], lips=lips, mel=torch.full_like(data.mel[:, : n * MEL_PER_FRAME], 200),
        means=data.means[:1], rest=np.array([resting_ends(lips.numpy())]), starts=np.array([0]),
        lengths=np.array([n]), weights=np.array([1.0]),
    )  # fmt: skip
    assert one.rest.tolist() == [[8, 5]]
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    around = alone = 0
    for _ in range(40):
        sound = draw_sound(one, rng, 2, augment=True)
        for mel, frames, counts, offsets in zip(sound.mel, sound.frames, sound.counts, sound.offsets, strict=True):
            speaks = (mel.mean(0).unflatten(0, (-1, MEL_PER_FRAME)).mean(1) > 1).numpy()
            for count, offset in zip(counts, offsets, strict=True):
                part = slice(offset, offset + count)
                silent = ~speaks[part]
                assert at_rest(one, frames[part][silent]).all()
                assert np.abs(np.diff(frames[part])).max() == 1, "nobody jumps"
                around += 0 < silent.sum() < count
                alone += bool(silent.all())
    assert around > 20 and alone > 5
    windows = draw_windows(one, sound, rng, 50)
    assert bool((windows.frames >= 0).all())


def test_the_reference_is_another_window_of_the_same_clip(prepared):
    data = load_clips(prepared, CPU)
    rng = np.random.default_rng(1)
    windows = draw_windows(data, draw_sound(data, rng, 4, augment=True), rng, 20)
    clip_of = np.repeat(np.arange(len(data.starts)), data.lengths)
    for frames, reference in zip(windows.frames.numpy(), windows.reference.numpy(), strict=True):
        clip = clip_of[frames[0]]
        assert (clip_of[frames] == clip).all() and (clip_of[reference] == clip).all()
        room = max(min(frames) - data.starts[clip], data.starts[clip] + data.lengths[clip] - 1 - max(frames))
        assert frames[0] != reference[0] and (room < WINDOW or not set(frames) & set(reference))


def test_what_is_seen_is_mostly_of_another_moment_than_what_is_heard(prepared):
    data = load_clips(prepared, CPU)
    rng = np.random.default_rng(1)
    torch.manual_seed(0)
    windows = draw_windows(data, draw_sound(data, rng, 4, augment=True), rng, 100)
    shown = denoiser.conditioning_frames(windows)
    elsewhen = (shown != windows.frames[:, [0, -1]]).any(1)
    assert abs(float(elsewhen.float().mean()) - denoiser.OTHER_MOMENT_SHARE) < 0.05
    assert torch.equal(shown[elsewhen], windows.reference[elsewhen][:, [0, -1]])


def test_examples_are_told_of_their_ends_alone(prepared, one_thread):
    data = load_clips(prepared, CPU)
    torch.manual_seed(0)
    pool = denoiser.empty_pool(1, data)
    for part in vars(pool).values():
        part.normal_()
    given = denoiser.draw_examples(data, pool, 1, np.random.default_rng(0), batch=20)
    middle = given.masked.shape[2] // 2
    for part, known in ((given.masked, pool.masked), (given.reference, pool.reference)):
        places = [(part[:, None, :, end] - known[0].float()).flatten(2).norm(dim=2).min(1) for end in (0, -1)]
        whole = places[0].values == 0
        assert float(whole.float().mean()) > 0.7, "some have no reference"
        assert bool((places[1].indices[whole] - places[0].indices[whole] == WINDOW - 1).all())
        between = torch.lerp(part[:, :, 0], part[:, :, -1], middle / (WINDOW - 1))
        assert torch.allclose(part[:, :, middle], between, atol=1e-5)


def test_motion_is_never_given_away_where_sampling_starts(prepared, one_thread):
    data = load_clips(prepared, CPU)
    torch.manual_seed(0)
    pool = denoiser.empty_pool(1, data)
    given = denoiser.draw_examples(data, pool, 1, np.random.default_rng(0), batch=200)
    start, late = given.start > 0, given.timestep >= denoiser.MIN_START_TIMESTEP
    assert abs(float(start.float().mean()) - denoiser.PURE_NOISE_SHARE) < 0.1 and bool(late[start].all())
    one = (given.noise == given.noise[:, :, :1]).flatten(1).all(1)
    assert bool(one[start].all()) and not bool(one[late & ~start].any())
    assert 0 < int(one[~start].sum()) < int((~start).sum())


def test_the_plain_look_is_the_inner_crop(prepared):
    data = load_clips(prepared, CPU)
    frames = data.frames[:4]
    inner = frames[:, :, MARGIN : MARGIN + RESOLUTION, MARGIN : MARGIN + RESOLUTION].float() / 127.5 - 1
    assert float((render(frames, no_augmentation(4, CPU)) - inner).abs().max()) < 1 / 127.5
    torch.manual_seed(0)
    varied = render(frames, random_augmentation(4, CPU))
    assert varied.shape == inner.shape and float((varied - inner).abs().mean()) > 0.02
    assert float(varied.abs().max()) <= 1 + 1e-5


def test_no_look_leaves_the_range_of_tones(prepared):
    data = load_clips(prepared, CPU)
    torch.manual_seed(1)
    frames = data.frames[:1].expand(48, -1, -1, -1)
    varied = render(
        frames, random_augmentation(48, CPU, zoom=0.3, turn=0.4), random_mouth(data.mouths()[:1].expand(48, -1))
    )
    assert varied.shape == (48, 3, RESOLUTION, RESOLUTION) and bool(varied.isfinite().all())
    assert float(varied.abs().max()) <= 1
    assert float(varied.flatten(1).std(1).min()) > 0.05, "a face must stay visible"


def test_a_mouth_warp_moves_the_mouth_and_nothing_else(prepared):
    data = load_clips(prepared, CPU)
    torch.manual_seed(2)
    count = 16
    frames, mouth = data.frames[:1].expand(count, -1, -1, -1), data.mouths()[:1].expand(count, -1)
    plain = render(frames, no_augmentation(count, CPU))
    none = torch.zeros(count)
    still = MouthWarp(mouth, wider=none + 1, higher=none + 1, corners=none, shift=torch.zeros(count, 2))
    assert torch.equal(render(frames, no_augmentation(count, CPU), still), plain)
    # Where the mouth is, and how far it reaches, in pixels of the crop.
    x, y = ((mouth[0, :2] + 1) * SIDE / 2 - 0.5 - MARGIN).tolist()
    half = float(mouth[0, 2]) * SIDE / 2
    assert torch.allclose(torch.tensor([x, y]), data.lips[: data.lengths[0]].mean((0, 1)), atol=0.01)
    rows, columns = torch.meshgrid(torch.arange(RESOLUTION), torch.arange(RESOLUTION), indexing="ij")
    away = ((columns - x) ** 2 + (rows - y) ** 2).sqrt() / half
    assert bool((away[[0, -1]] > MOUTH_REACH).all()) and bool((away[:, [0, -1]] > MOUTH_REACH).all()), "the border"
    moved = (render(frames, no_augmentation(count, CPU), random_mouth(mouth)) - plain).abs().mean(1)
    assert float(moved[:, away > MOUTH_REACH].max()) < 1e-5
    own = moved[:, away < 1].mean(1) > 0.01
    assert count // 2 <= int(own.sum()) < count, "most mouths are changed, some are not"


def test_a_mouth_warp_stretches_and_bends_as_it_says():
    mouth = torch.tensor([[0.1, 0.3, 0.2]])
    none = torch.zeros(1)
    warp = MouthWarp(mouth, wider=none + 1, higher=none + 1, corners=none, shift=torch.zeros(1, 2))
    # Just below the middle, and at the corners of the mouth.
    grid = torch.tensor([[[[0.1, 0.31], [-0.1, 0.3], [0.3, 0.3]]]])
    opened = replace(warp, higher=none + 2).displacement(grid)[0, 0]
    assert torch.allclose(opened[0], torch.tensor([0.0, -0.005]), atol=1e-4), "looked up half as far from the middle"
    smile = replace(warp, corners=none - 0.3).displacement(grid)[0, 0]
    assert float(smile[1, 1]) > 0.01 and torch.allclose(smile[1], smile[2]), "looked up below: both corners rise"
    wide = replace(warp, wider=none + 1.2).displacement(grid)[0, 0]
    assert float(wide[1, 0]) > 0.01 and torch.allclose(wide[1, 0], -wide[2, 0]) and not wide[:, 1].any()


def test_an_expression_never_folds_the_face():
    """Neighbours stay in their order for the wildest of random expressions."""
    torch.manual_seed(3)
    warp = random_mouth(torch.tensor([[0.0, 0.0, 0.3]]).expand(500, -1))
    line = torch.linspace(-1, 1, 65)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)[None]
    places = grid + warp.displacement(grid)
    across, along = places[..., 0].diff(dim=2)[:, 1:], places[..., 1].diff(dim=1)[:, :, 1:]
    slant, lean = places[..., 1].diff(dim=2)[:, 1:], places[..., 0].diff(dim=1)[:, :, 1:]
    assert float((across * along - slant * lean).min()) > 0


def test_a_renewed_look_changes_its_slot_alone(prepared, one_thread):
    data = load_clips(prepared, CPU)
    few = replace(data, frames=data.frames[:4], lips=data.lips[:4], starts=np.array([0, 2]), lengths=np.array([2, 2]))
    torch.manual_seed(4)
    vae = AutoencoderKL.from_config(autoencoder.CONFIG).eval()
    mask = torch.from_numpy(fixed_mask(RESOLUTION).copy())
    pool = denoiser.empty_pool(3, few)
    for k in range(3):
        denoiser.encode_rendering(pool, k, vae, few, np.random.default_rng(0), mask, scale=1.0)
    before = replace(pool, **{name: part.clone() for name, part in vars(pool).items()})
    denoiser.encode_rendering(pool, 1, vae, few, np.random.default_rng(0), mask, scale=1.0)
    for name, part in vars(pool).items():
        same = [torch.equal(part[k], vars(before)[name][k]) for k in range(3)]
        assert same == [True, False, True], name
    assert not torch.equal(pool.target, pool.masked) and not torch.equal(pool.target, pool.reference)


def test_lips_lie_on_the_mouth_of_the_crop(prepared):
    data = load_clips(prepared, CPU)
    x, y = data.lips.mean((0, 1)).tolist()
    assert abs(x - RESOLUTION / 2) < 8 and 0.5 < y / RESOLUTION < 0.7


def test_held_out_people_and_clips_are_never_trained_on():
    assert all(is_held_out("s31", i, 10) for i in range(10))
    assert [i for i in range(41) if is_held_out("s1", i, 41)] == [0, 20, 40]
    assert not any(is_held_out("s5", i, 2) for i in range(2))


def test_a_state_goes_on_where_it_stopped(tmp_path):
    def fresh():
        layer = nn.Linear(3, 3)
        return layer, torch.optim.AdamW(layer.parameters())

    layer, optimizer = fresh()
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_state(tmp_path / "state.pt", {"layer": layer}, optimizer, 7)
    again, its_optimizer = fresh()
    assert load_state(tmp_path / "missing.pt", {"layer": again}, its_optimizer) == 0
    assert load_state(tmp_path / "state.pt", {"layer": again}, its_optimizer) == 7
    assert torch.equal(again.weight, layer.weight)
    moment = optimizer.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(its_optimizer.state_dict()["state"][0]["exp_avg"], moment)
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_the_listener_trains_and_continues(prepared, tmp_path, one_thread, capsys):
    for steps in (1, 2):
        listener.train(prepared, tmp_path, seconds=0.01, device=CPU, batch=20)
        assert torch.load(tmp_path / "listener.pt", weights_only=True)["step"] == steps


def test_the_denoiser_trains_and_continues(prepared, tmp_path, one_thread, monkeypatch):
    small = {"block_out_channels": [32, 32, 32], "attention_head_dim": 2, "norm_num_groups": 8}
    monkeypatch.setattr(denoiser, "CONFIG", denoiser.CONFIG | small)
    monkeypatch.setattr(autoencoder, "CONFIG", autoencoder.CONFIG | {"block_out_channels": [16] * 4})
    monkeypatch.setattr(listener, "DIMS", replace(listener.DIMS, n_audio_layer=1))
    monkeypatch.setattr(denoiser, "FIRST_RENDERINGS", 1)
    monkeypatch.setattr(denoiser.lips, "train_reader", partial(denoiser.lips.train_reader, batch=8))
    vae, encoder = AutoencoderKL.from_config(autoencoder.CONFIG), listener.new_encoder()
    save_state(tmp_path / "autoencoder.pt", {"vae": vae}, None, 1, scaling_factor=1.0)
    save_state(tmp_path / "listener.pt", {"encoder": encoder}, None, 1)
    unet = UNet(UNetConfig.from_dict(denoiser.CONFIG))
    average = nn.ModuleDict({"unet": unet, "encoder": encoder})
    save_state(tmp_path / "denoiser.pt", {"unet": unet, "encoder": encoder, "average": average}, None, 6)
    denoiser.train(prepared, tmp_path, seconds=0.01, device=CPU, batch=10)
    state = torch.load(tmp_path / "denoiser.pt", weights_only=True)
    assert state["step"] == 7 and state["optimizer"]["state"]
    before, after = average.state_dict(), state["weights"]["average"]
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    changed = {name.partition(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"unet", "encoder"}


def test_an_export_is_a_checkpoint_that_loads(tmp_path):
    state, folder = tmp_path / "state", tmp_path / "model"
    vae, encoder = AutoencoderKL.from_config(autoencoder.CONFIG), listener.new_encoder()
    unet = UNet(UNetConfig.from_dict(denoiser.CONFIG))
    optimizer = torch.optim.SGD(encoder.parameters())
    save_state(state / "autoencoder.pt", {"vae": vae}, optimizer, 1, scaling_factor=0.5)
    save_state(state / "denoiser.pt", {"average": nn.ModuleDict({"unet": unet, "encoder": encoder})}, optimizer, 1)
    export(state, folder)
    models = load_models(resolve_model(str(folder), CPU), CPU, torch.float32)
    assert models.resolution == RESOLUTION and models.match_colours and models.mel_range == TRAINED_MEL_RANGE
    assert models.vae.config.scaling_factor == 0.5
    assert torch.equal(models.unet.conv_out.weight, unet.conv_out.weight.half().float())
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 40e6


def test_an_imported_model_goes_on_and_is_exported_the_same(tmp_path):
    state, folder = tmp_path / "state", tmp_path / "model"
    restore.restore(DEMO_FOLDER, state)
    encoder, reader = listener.new_encoder(), listener.LipReader()
    optimizer = torch.optim.AdamW([*encoder.parameters(), *reader.parameters()], lr=0.5)
    assert load_state(state / "listener.pt", {"encoder": encoder, "reader": reader}, optimizer) == 0
    assert optimizer.param_groups[0]["lr"] == 0.5 and not optimizer.state, "the optimizer stays as it was made"
    live = torch.load(state / "denoiser.pt", weights_only=True)["weights"]
    assert all(torch.equal(tensor, live["average"]["unet." + name]) for name, tensor in live["unet"].items())
    assert {tensor.dtype for tensor in live["unet"].values()} == {torch.float32}
    export(state, folder)
    for file in (file for file in DEMO_FOLDER.rglob("*") if file.suffix == ".safetensors"):
        wanted, its_metadata = read_tensors(file)
        found, metadata = read_tensors(folder / file.relative_to(DEMO_FOLDER))
        assert metadata == its_metadata and wanted.keys() == found.keys()
        assert all(torch.equal(wanted[name], found[name]) for name in wanted), file
    assert resolve_model(str(folder), CPU).unet_config == resolve_model("demo", CPU).unet_config
    for name in ("latentsync.json", "vae/config.json"):
        assert (folder / name).read_text() == (DEMO_FOLDER / name).read_text()


def test_a_model_of_other_sizes_is_not_imported(checkpoint, tmp_path):
    with pytest.raises(UserError, match="other sizes"):
        restore.restore(checkpoint, tmp_path / "state")
    assert not (tmp_path / "state").exists()


def chirp(seconds: float, low: float = 200.0, high: float = 3000.0) -> np.ndarray:
    """A tone that rises from low to high, with silence of half a second before and after."""
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tone = np.sin(2 * np.pi * (low * t + (high - low) * t**2 / (2 * seconds))) * np.hanning(len(t)) ** 0.1
    return np.pad(tone, SAMPLE_RATE // 2).astype(np.float32)


def test_a_clips_name_is_its_sentence():
    assert voices.sentence("bgiq6p") == "bin green in Q six please"
    assert voices.sentence("swwzzs") == "set white with Z zero soon"
    with pytest.raises(UserError, match="'holiday'"):
        voices.sentence("holiday")


def test_another_voice_is_laid_along_the_clips_own():
    def mel_of(wav: np.ndarray) -> np.ndarray:
        power = torch.cat(list(log_powers(torch.from_numpy(wav), voices.N_MELS)), dim=1).T.numpy()
        return np.clip(np.round((power - voices.MEL_BASE) / voices.MEL_STEP), 0, 255).astype(np.uint8)

    rng = np.random.default_rng(0)
    slow, quick = (chirp(seconds) for seconds in (1.6, 0.9))
    slow = slow + 1e-3 * rng.standard_normal(len(slow)).astype(np.float32)  # a room
    own, other = mel_of(slow), voices.align_voice(mel_of(slow), quick)
    assert other.shape == own.shape
    spoken = voices.speech_part(own * voices.MEL_STEP + voices.MEL_BASE)
    inner = slice(spoken.start + 12, spoken.stop - 12)
    pitch = np.abs(own[inner].argmax(1).astype(int) - other[inner].argmax(1))
    assert np.mean(pitch) < 1.5, "the same tone at the same time"
    unwarped = mel_of(np.pad(quick, (0, len(slow) - len(quick))))
    assert np.mean(np.abs(own[inner].argmax(1).astype(int) - unwarped[inner].argmax(1))) > 10
    quiet = np.r_[other[: spoken.start - 10], other[spoken.stop + 10 :]]
    assert quiet.max() < other[inner].max() - 40, "silent where the clip is silent"


def test_other_voices_are_heard_in_the_clips_time(prepared):
    data = load_clips(prepared, CPU)
    tone = torch.full_like(data.mel, 200)
    both = replace(data, mel=torch.cat([data.mel, tone]))
    rng = np.random.default_rng(0)
    own, other = (draw_sound(both, np.random.default_rng(0), 1, augment=False, own_voice=own) for own in (True, False))
    assert [list(clips) for clips in own.clips] == [list(clips) for clips in other.clips]
    heard = int(other.counts[0].sum()) * MEL_PER_FRAME
    assert float(other.mel[0, :, :heard].std()) == 0 < float(own.mel[0, :, :heard].std())
    assert torch.equal(own.mel[0, :, heard:] == 0, other.mel[0, :, heard:] == 0)
    mixed = [draw_sound(both, rng, 2, augment=True).counts for _ in range(8)]
    assert any((counts < data.lengths.min()).any() for drawn in mixed for counts in drawn), "parts of clips as well"


def test_people_are_blended_by_what_tells_them_apart(prepared):
    data = load_clips(prepared, CPU)
    means = data.means.clone()
    means[0] = 255 - means[0]
    two = replace(data, means=means)
    changes = [random_blends(two, np.random.default_rng(seed)) for seed in range(12)]
    shares = {round(float((change[0] / (means[1] - means[0])).nanmedian()), 3) for change in changes}
    assert 0 in shares and 4 <= len(shares) and max(shares) <= 0.7, "sometimes not at all, never for the most part"
    again = random_blends(data, np.random.default_rng(1))
    assert float(again.abs().max()) < 1, "both clips show the same person"


@pytest.mark.parametrize("windows", [0, 5, 15])
def test_a_batch_that_is_no_whole_number_of_segments_is_refused(windows):
    assert segment_count(20, 10) == 2
    with pytest.raises(UserError, match="multiple of 10"):
        segment_count(windows, 10)


def test_a_stage_without_what_comes_before_it_says_so(tmp_path):
    with pytest.raises(UserError, match=r"autoencoder\.pt.*first"):
        load_weights(tmp_path / "autoencoder.pt", {})
    with pytest.raises(UserError, match="prepare"):
        voices.add_voices(tmp_path, 1)
