"""The measures: known answers on made-up curves and faces, and a whole run on a tiny checkpoint."""

import json
import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from clips import ffmpeg, make_sound
from conftest import portrait, save_video
from skimage.color import deltaE_ciede2000

from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import load_models
from latentsync.evaluation import judge as judging
from latentsync.evaluation.__main__ import build_parser, main
from latentsync.evaluation.appearance import NEAR, ciede2000, compare_appearance, mouth_hulls
from latentsync.evaluation.clips import SIDE, held_out_clips, track_clip
from latentsync.evaluation.colours import FILMS, colours_table, measure_colours, with_cast
from latentsync.evaluation.dubbing import OtherReferencePainter, reference_frames
from latentsync.evaluation.measures import (
    LAGS,
    border_energy,
    correlation,
    detail,
    flicker,
    is_nearest,
    landmark_distance,
    loudness,
    pauses,
    peak,
)
from latentsync.evaluation.people import PersonMeasures, people_table
from latentsync.evaluation.rates import (
    CASES,
    RateMeasures,
    at_25,
    paint,
    paint_and_filter,
    paint_every_frame,
    rates_table,
)
from latentsync.evaluation.report import Result, pause_variance, summarise, table
from latentsync.painting import Painter
from latentsync.settings import Settings
from latentsync.training.prepare import prepare
from latentsync.windows import AlignedFrame
from optim import evaluation as levels

SAMPLES = 640  # of sound, a frame
CPU = torch.device("cpu")
HIDDEN = np.zeros((64, 64), bool)
HIDDEN[32:56, 16:48] = True
RNG = np.random.default_rng(0)
pytestmark = pytest.mark.usefixtures("one_thread")


def wave(frames: int = 75, late: int = 0, period: float = 20.0) -> np.ndarray:
    """A mouth that opens and closes, `late` frames after another."""
    return np.sin(2 * np.pi * (np.arange(frames) - late) / period)


def test_a_mouth_that_is_late_has_its_peak_at_that_lag():
    for late in (-3, 0, 2):
        best, lag = peak(correlation(wave(late=late), 5 * wave() + 1))
        assert lag == late and best == pytest.approx(1)
    in_step = correlation(wave(late=2), wave())[LAGS == 0][0]
    assert in_step == pytest.approx(np.cos(2 * np.pi * 2 / 20), abs=0.05)


def test_a_still_mouth_has_no_correlation_and_lost_frames_do_not_count():
    assert np.isnan(peak(correlation(np.ones(75), wave()))[0])
    holes = wave(late=1)
    holes[20:40] = np.nan
    assert peak(correlation(holes, wave())) == (pytest.approx(1), 1)
    assert np.isnan(correlation(wave(6), wave(6))).all(), "too few frames"


def test_the_true_track_is_the_nearest_only_where_it_fits_best():
    others = [wave(period=period) for period in (11, 14, 31)]
    assert is_nearest(wave(late=1), [wave(), *others])
    assert not is_nearest(wave(period=14), [wave(), *others])
    assert not is_nearest(np.ones(75), [wave(), *others]), "a still mouth finds nothing"


def test_landmarks_are_compared_in_pixels():
    lips = RNG.random((5, 40, 2))
    moved = lips + (3, 4)
    moved[2] = np.nan  # a face that was lost
    assert landmark_distance(moved, lips) == pytest.approx(5)


def test_loudness_is_in_decibels_over_the_loudest():
    tone = np.sin(np.arange(4 * SAMPLES)).astype(np.float32)
    tone[SAMPLES : 2 * SAMPLES] *= 0.1
    tone[3 * SAMPLES :] = 0
    level = loudness(tone)
    assert level[0] - level[1] == pytest.approx(20, abs=0.2) and level[0] - level[3] == pytest.approx(60, abs=0.2)
    assert np.isfinite(loudness(np.zeros(2 * SAMPLES, np.float32))).all()


def test_a_mouth_that_rests_in_the_pauses_has_no_variance_there():
    loud = np.repeat([0, 1, 0], [20, 40, 20])
    sound = np.repeat(loud, SAMPLES) * np.sin(np.arange(80 * SAMPLES))
    quiet = pauses(loudness(sound))
    assert quiet[:18].all() and quiet[62:].all() and not quiet[18:62].any()
    assert pause_variance(loud * wave(80), sound) == pytest.approx(0)
    assert pause_variance(wave(80), sound) == pytest.approx(1, abs=0.3), "a mouth that chatters on"
    assert np.isnan(pause_variance(wave(80), np.sin(np.arange(80 * SAMPLES)))), "no pause"


def moving_faces(count: int = 12) -> np.ndarray:
    picture = cv2.GaussianBlur(RNG.integers(0, 255, (64, 64 + 2 * count, 3), np.uint8), (0, 0), 4)
    return np.stack([picture[:, i : i + 64] for i in range(count)])


def test_pulsing_patches_flicker_and_only_where_the_face_is_generated():
    real = moving_faces()
    pulsing = real.astype(int)
    pulsing[::2, HIDDEN] += 8
    assert flicker(pulsing.clip(0, 255).astype(np.uint8), HIDDEN) > 2 * flicker(real, HIDDEN)
    outside = real.copy()
    outside[::2, ~HIDDEN] //= 2
    assert flicker(outside, HIDDEN) == flicker(real, HIDDEN)


def test_a_blurred_mouth_has_less_detail():
    real = RNG.integers(0, 255, (3, 64, 64, 3), np.uint8)
    soft = np.stack([cv2.GaussianBlur(face, (0, 0), 1) for face in real])
    assert detail(soft, HIDDEN) < 0.3 * detail(real, HIDDEN)
    inner = cv2.erode(HIDDEN.astype(np.uint8), None) > 0
    assert detail(np.where(HIDDEN[..., None], real, soft), inner) == detail(real, inner)


def test_a_pasted_patch_with_an_edge_has_a_seam_and_a_soft_one_has_none():
    real = moving_faces(4)
    patch = real.astype(float)
    patch[:, HIDDEN] += 25
    assert border_energy(patch.clip(0, 255).astype(np.uint8), HIDDEN) > 2 * border_energy(real, HIDDEN)
    inside = real.copy()
    inside[:, 38:50, 22:42] = 255 - inside[:, 38:50, 22:42]
    assert border_energy(inside, HIDDEN) == pytest.approx(border_energy(real, HIDDEN))


def test_correlations_are_averaged_at_every_lag_before_their_peak_is_taken():
    results = [
        Result("s1", "", "", {
            "correlation": correlation(wave(late=late), wave()), "lmd": late, "nearest": late > 0,
            "opening_silent": 1.0, "opening_spoken": 4.0 + late,
        })
        for late in (0, 2)
    ]  # fmt: skip
    means = summarise(results)
    assert means["lag"] == 1 and means["correlation"] < 1 and means["lmd"] == 1 and means["nearest"] == 0.5
    assert means["silent_variance"] == 1 / 5
    assert "50%" in table({"s1": means}) and "+1" in table({"s1": means})


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Two clips, of 18 and 20 frames, of a person who is held out, and one of someone else."""
    folder = tmp_path_factory.mktemp("people")
    for speaker, name, frames in (("s3", "one", 18), ("s3", "two", 20), ("other", "three", 18)):
        (folder / speaker).mkdir(exist_ok=True)
        picture = save_video(folder / f"{name}.mkv", [portrait(t) for t in range(frames)])
        source = f"aevalsrc='0.4*sin({900 + frames}*t*t)':s=16000"
        sound = make_sound(folder / f"{name}.wav", seconds=frames / 25, source=source)
        ffmpeg(
            "-i", picture, "-i", sound, "-c:v", "libx264", "-crf", 12, "-c:a", "aac", folder / speaker / f"{name}.mp4"
        )
    return folder


def test_only_clips_that_training_holds_out_are_measured(people, capsys, tmp_path):
    assert {speaker: [path.stem for path in paths] for speaker, paths in held_out_clips(people, None).items()} == {
        "s3": ["one", "two"]
    }
    assert main(["clips", str(people), str(tmp_path), "--speakers", "other"]) == 2
    assert main(["clips", str(tmp_path), str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_clips_are_dubbed_and_measured_and_shown(people, checkpoint, tmp_path, capsys):
    arguments = [
        "clips",
        people,
        tmp_path / "out",
        "--model",
        checkpoint,
        "--steps",
        2,
        "--limit",
        1,
        "--device",
        "cpu",
    ]
    assert main([*map(str, arguments), "--judge", str(tmp_path / "none")]) == 0
    report = json.loads((tmp_path / "out" / "measures.json").read_text())
    group, (clip,) = report["groups"]["s3"], report["clips"]
    assert (clip["speaker"], clip["name"], clip["voice"]) == ("s3", "one", "s3/two")
    assert report["settings"]["steps"] == 2 and report["judge"] is None and group["clips"] == 1 and group["tracks"] == 2
    # A tiny network with random weights paints anything but a face.
    assert group["psnr"] < 30 and group["ssim"] < group["ssim_crop"] < 0.99
    assert group["lmd_kept"] > 0 and len(clip["correlation"]) == len(LAGS)
    printed = capsys.readouterr()
    assert "SSIM of the crop" in printed.out and "no judge" in printed.err
    sheet = cv2.imread(str(tmp_path / "out" / "s3.png"))
    assert sheet.shape == (2 * (24 + 3 * 160), 8 * 160, 3)


def test_a_result_is_aligned_as_its_source(talking):
    frames = np.stack([portrait(t) for t in range(14)])
    track = track_clip(frames)
    assert track.crops.shape == (14, 256, 256, 3) and track.lips.shape == (14, 40, 2)
    x, y = np.nanmean(track.lips, axis=(0, 1)) / 256
    assert abs(x - 0.5) < 0.06 and 0.5 < y < 0.7
    faded = (0.5 * frames).astype(np.uint8)
    again = track_clip(faded, track.faces)
    assert np.abs(again.crops.astype(int) - 0.5 * track.crops).max() < 4, "the same pixels"
    assert landmark_distance(again.lips, track.lips) < 4


def test_the_reference_of_a_self_dub_is_another_moment(checkpoint):
    assert list(reference_frames(5)) == [2, 3, 4, 0, 1]
    assert min(abs(reference_frames(74) - np.arange(74))) == 37

    models = load_models(resolve_model(str(checkpoint), CPU), CPU, torch.float32)
    crops = RNG.integers(0, 255, (3, models.resolution, models.resolution, 3), np.uint8)
    shots = [AlignedFrame(None, None, crop, source=i) for i, crop in enumerate(crops)]
    here, there = [shots[0], shots[2]], [shots[2], shots[1]]
    plain = Painter(models, Settings())
    own, reference = (
        plain.cached_conditioning(some, torch.from_numpy(np.stack([shot.crop for shot in some])))
        for some in (here, there)
    )
    painter = OtherReferencePainter(models, Settings(), [shots[2], shots[0], shots[1]])
    mixed = painter.cached_conditioning(here, torch.from_numpy(crops[[0, 2]]))
    masked = 1 + models.vae.config.latent_channels
    assert torch.equal(mixed[:, :masked], own[:, :masked]) and torch.equal(mixed[:, masked:], reference[:, masked:])
    assert not torch.equal(mixed, own)


def test_the_strip_shows_frames_and_sound(talking, voice, tmp_path, capsys):
    picture = tmp_path / "strip.png"
    assert main(["strip", str(talking), str(voice), str(talking), str(picture)]) == 0
    strip = cv2.imread(str(picture))
    assert strip.shape == (2 * 160 + 60, 8 * 160, 3) and strip[330:].min() < 100
    assert np.array_equal(strip[:160], strip[160:320])
    assert main(["strip", str(talking), str(voice), str(talking), str(tmp_path / "strip.jpg")]) == 2
    assert "strip.jpg" in capsys.readouterr().err


def test_one_video_is_described(people, tmp_path, capsys):
    assert main(["video", str(people / "s3" / "two.mp4"), "--judge", str(tmp_path / "none")]) == 0
    out = capsys.readouterr().out
    assert "20 of 20" in out and "correlation with loudness" in out


def signals(clips: int = 6, frames: int = 60) -> tuple[list, list]:
    """Embeddings of mouths and of sounds that belong together."""
    sounds = [torch.nn.functional.normalize(torch.randn(frames, 16), dim=1) for _ in range(clips)]
    return sounds, [torch.nn.functional.normalize(sound + 0.1 * torch.randn(frames, 16), dim=1) for sound in sounds]


def test_the_judge_tells_how_late_a_picture_is():
    torch.manual_seed(0)
    (sound,), (mouth,) = signals(1)
    close = mouth @ sound.T
    assert judging.sync_score(close).offset == 0
    assert judging.sync_score(mouth[:-4] @ sound[4:].T).offset == 4, "what is seen was heard four frames before"
    assert judging.sync_score(close, shift=6).offset == 6
    assert judging.sync_score(close).confidence > 0.5
    assert np.isnan(judging.sync_score(close[:0]).confidence), "nothing to judge by"


def test_a_judge_must_find_real_clips_in_step_before_it_may_judge():
    torch.manual_seed(0)
    sounds, mouths = signals()
    true = [mouth @ sound.T for mouth, sound in zip(mouths, sounds, strict=True)]
    others = [mouth @ sounds[i - 1].T for i, mouth in enumerate(mouths)]
    good = judging.check(true, others)
    assert good.passed and good.in_step == good.shifted == 1 and "may judge" in good.summary()
    assert not judging.check(others, true).passed
    slow = [mouth[3:] @ sound[:-3].T for mouth, sound in zip(mouths, sounds, strict=True)]
    assert not judging.check(slow, others).passed, "out of step by three frames"


def test_the_judge_sees_the_mouth_in_crops_of_any_side():
    side = 256
    y, x = np.mgrid[:side, :side] / side
    crop = np.repeat((255 * x * y)[..., None], 3, axis=2).astype(np.uint8)
    left, top, right, bottom = judging.MOUTH
    patch = judging.mouth_patches(crop[None])[0][judging.JITTER : -judging.JITTER, judging.JITTER : -judging.JITTER]
    assert patch.shape == judging.PATCH
    wanted = 255 * np.outer(np.linspace(top, bottom, 41)[:-1] + 0.007, np.linspace(left, right, 49)[:-1] + 0.0075)
    assert np.abs(patch - wanted).max() < 3
    smaller = cv2.resize(crop, (128, 128), interpolation=cv2.INTER_AREA)
    padded = cv2.copyMakeBorder(smaller, 16, 16, 16, 16, cv2.BORDER_REPLICATE)
    inner = judging.mouth_patches(padded[None], 16 / 128)[0][4:-4, 4:-4]
    assert np.abs(inner.astype(int) - patch).max() <= 3


def test_the_judge_trains_and_is_loaded_again(people, tmp_path, capsys):
    folder = tmp_path / "clips"
    clip = people / "s3" / "two.mp4"
    long = folder / "long.mp4"
    folder.mkdir()
    ffmpeg("-stream_loop", 2, "-i", clip, "-c", "copy", long)
    prepare([("a", long), ("s3", long)], tmp_path / "prepared", crf=18)
    weights = tmp_path / "judge.safetensors"
    assert (
        main(["judge", str(tmp_path / "prepared"), "--seconds", "0", "--output", str(weights), "--device", "cpu"]) == 0
    )
    assert weights.stat().st_size < 3e6 and "real clips in step" in capsys.readouterr().out
    judge = judging.load_judge(weights, CPU)
    crops, wav = RNG.integers(0, 255, (9, 256, 256, 3), np.uint8), RNG.random(10 * SAMPLES).astype(np.float32)
    close = judging.judge_clip(judge, crops, wav)
    assert judging.judge_clip(judge, crops[:2], wav).shape == (0, 6)
    assert close.shape == (5, 6) and bool((close.abs() <= 1.001).all())


def test_a_level_gives_the_settings_that_are_measured(checkpoint):
    models = load_models(resolve_model(str(checkpoint), CPU), CPU, torch.float32)
    for options, steps, cache in (
        (["--level", "aggressive"], 12, (3, 0)),
        (["--deepcache", "2,1"], 20, (2, 1)),
        (["--level", "aggressive", "--deepcache", "off"], 12, None),
    ):
        args = build_parser("evaluate", levels.add_options).parse_args(["clips", "CLIPS", "OUT", *options])
        _, settings = levels.prepare(args, models, Settings(args.steps))
        assert settings.steps == steps
        assert cache == (settings.cache and (settings.cache.interval, settings.cache.branch))


# Appearance: what a result keeps of a person.


def mouths_of(n: int, side: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Textured faces (n, side, side, 3), and the points (n, 4, 2) of a square hull in their lower half."""
    faces = np.random.default_rng(0).integers(60, 200, (n, side, side, 3), np.uint8)
    square = np.array([(24, 38), (40, 38), (40, 50), (24, 50)], float)
    return faces, np.tile(square, (n, 1, 1))


def test_a_person_that_stays_keeps_everything():
    faces, points = mouths_of(4)
    measures = compare_appearance(faces, faces, points, points)
    assert measures.pop("flicker_levels") > 0
    assert measures == {"outside": math.inf, "detail": 1, "colour": 0, "seam": 1, "flicker": 1}


def test_what_changes_inside_the_hull_is_told_from_what_changes_beside_it():
    faces, points = mouths_of(4)
    hulls = mouth_hulls(points, 64, NEAR * 64 / 256)
    inside = faces.copy()
    inside[hulls] = np.clip(inside[hulls].astype(int) + (30, 0, 0), 0, 255)
    measures = compare_appearance(inside, faces, points, points)
    assert measures["outside"] == math.inf
    assert measures["colour"] > 3
    below = np.zeros_like(hulls)
    below[:, 32:] = True
    beside = faces.copy()
    beside[below & ~hulls] += 5
    assert compare_appearance(beside, faces, points, points)["outside"] == pytest.approx(20 * math.log10(255 / 5))
    above = faces.copy()
    above[:, :32] = 0
    assert compare_appearance(above, faces, points, points)["outside"] == math.inf


def test_a_blurred_mouth_keeps_less_detail():
    faces, points = mouths_of(4)
    soft = np.stack([cv2.GaussianBlur(face, (0, 0), 2) for face in faces])
    assert compare_appearance(soft, faces, points, points)["detail"] < 0.3


def test_ciede2000_is_that_of_scikit_image():
    some = np.random.default_rng(1)
    for one, other in some.uniform((0, -80, -80), (100, 80, 80), (200, 2, 3)):
        assert ciede2000(one, other) == pytest.approx(float(deltaE_ciede2000(one, other)), abs=1e-6)
    assert ciede2000([50, 0, 0], [50, 0, 0]) == 0


def test_the_table_of_people_has_a_row_for_each_and_their_means():
    row = PersonMeasures("a", "v", math.inf, 1.0, 1.0, 1.0, 1.0, 3.0, correlation=0.8, lag=0, old=0.1)
    other = replace(row, person="b", outside=50.0, correlation=0.6, lag=None)
    lines = people_table([row, other]).splitlines()
    assert len(lines) == 5
    assert "| b | v | 50 |" in lines[3] and "| – |" in lines[3]
    assert lines[4].startswith("| mean |  | 50 | 1.00 | 1.0 | 0.70 |")


# Colours


def patches(count: int = 4) -> np.ndarray:
    """Something like face crops, in gentle motion: uint8 (n, SIDE, SIDE, 3)."""
    picture = cv2.resize(np.random.default_rng(0).integers(60, 190, (12, 12, 3), np.uint8), (SIDE + 20, SIDE + 20))
    return np.stack([picture[t : t + SIDE, 2 * t : 2 * t + SIDE] for t in range(count)])


def test_matching_takes_a_cast_back_and_the_table_shows_it(checkpoint):
    models = load_models(resolve_model(str(checkpoint), CPU), CPU, torch.float32)
    measures = list(measure_colours(patches(), models))
    assert {(each.film, each.damage) for each in measures} == {
        (film, damage) for film in FILMS for damage in ("everywhere", "in the mask", "autoencoder")
    }
    plain = next(each for each in measures if (each.film, each.damage) == ("as filmed", "everywhere"))
    (off, on), (step_off, step_on) = plain.colour, plain.step
    assert off > 3 and on < 1 and step_off > 4 and step_on < 2
    hidden = next(each for each in measures if (each.film, each.damage) == ("as filmed", "in the mask"))
    assert hidden.colour[1] > 2, "the visible part does not show it"
    lines = colours_table(measures).splitlines()
    assert len(lines) == 2 + len(FILMS) + 1 and all(line.count("|") == 8 for line in lines)
    assert lines[-1].startswith(f"| **mean of {len(FILMS)}**")
    assert f"{off:.1f} → {on:.1f}" in lines[2]


def test_a_cast_is_the_same_for_the_same_seed():
    first, second = (with_cast(patches(), np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first, second) and not np.array_equal(first, patches())


def test_a_folder_without_films_is_said(tmp_path, capsys):
    assert main(["colours", str(tmp_path)]) == 2
    assert "PERSON.mp4" in capsys.readouterr().err


# Frame rates


def rated_frames(count: int) -> list[AlignedFrame]:
    random = np.random.default_rng(0)
    frames = []
    for number in range(count):
        frame = AlignedFrame(portrait(number), torch.from_numpy(random.standard_normal((50, 32), np.float32)))
        frame.crop = random.integers(0, 256, (64, 64, 3), np.uint8)
        frame.matrix, frame.opacity = np.array([[0.4, 0.02, -8.0], [-0.02, 0.4, -10.0]]), 1.0
        frames.append(frame)
    return frames


@pytest.mark.parametrize("way", [way for _, _, way, _ in CASES[2:]])
@pytest.mark.parametrize("own_face", [False, True])
def test_every_way_paints_every_frame(checkpoint, way, own_face):
    models = load_models(resolve_model(str(checkpoint), CPU), CPU, torch.float32)
    if own_face:
        models = replace(models, face=np.full((64, 64, 3), 90, np.uint8))
    frames, known = rated_frames(33), {}
    paint(frames, way, ("voice", 60, "way"), Painter(models, Settings(steps=1)), known)
    if not own_face:
        assert not any(np.array_equal(frame.frame, portrait(number)) for number, frame in enumerate(frames))
        assert not known
        return
    again = rated_frames(20)
    again[3].crop = None
    paint(again, way, ("voice", 60, "way"), Painter(models, Settings(steps=1)), known)
    for number, (first, second) in enumerate(zip(frames, again, strict=False)):
        assert second.generated is None if number == 3 else np.array_equal(first.generated, second.generated)


def test_filtered_faces_are_means_of_three_in_a_row(checkpoint):
    models = load_models(resolve_model(str(checkpoint), CPU), CPU, torch.float32)
    models = replace(models, face=np.full((64, 64, 3), 90, np.uint8))
    plain, filtered = rated_frames(33), rated_frames(33)
    paint_every_frame(plain, Painter(models, Settings(steps=1)))
    paint_and_filter(filtered, Painter(models, Settings(steps=1)))
    before, here, after = (frame.generated.astype(int) for frame in plain[4:7])
    assert np.abs(filtered[5].generated - (before + 2 * here + after) / 4).max() <= 0.5


def test_an_opening_at_60_is_compared_at_25():
    curve = np.sin(np.arange(180) / 60 * 2 * np.pi)
    curve[40:44] = np.nan
    expected = np.sin(np.arange(75) / 25 * 2 * np.pi)
    assert np.abs(at_25(curve, 60) - expected).max() < 0.05
    assert np.isnan(at_25(np.full(60, np.nan), 60)).all()


def test_the_table_of_rates_has_a_row_for_every_case_that_was_measured():
    curve = np.where(LAGS == 1, 0.8, 0.5)
    measures = [RateMeasures(who, rate, way, curve, 100, 80) for who in "ab" for rate, way, *_ in CASES[:3]]
    lines = rates_table(measures).splitlines()
    assert len(lines) == 5 and all(line.count("|") == 9 for line in lines)
    assert "| 60 | every frame (60 a second) | 2 | 0.800 | +40 | 100 | 80 | 1.25 |" in lines
