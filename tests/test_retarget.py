"""Mouth shapes on the film's own pixels: what changes in a frame, which mouth is chosen, memory, and resuming."""

import json
import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from clips import make_sound
from conftest import SIDE, portrait, save_video
from test_resume import X264, hashes, interrupted
from tiny import RESOLUTION

from latentsync import pipeline
from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import load_models
from latentsync.errors import UserError
from latentsync.faces import Face, track_faces
from latentsync.landmarks import face_reader
from latentsync.media import probe_video, read_frames
from latentsync.painting import Painter
from latentsync.pipeline import lipsync
from latentsync.retarget import MouthBank, bank, context_frames, held_frames, mouth_points, retarget, stage
from latentsync.retarget.bank import limit_mouths
from latentsync.retarget.drawing import HULL_OUTSIDE, Layer, draw_mouths, soft_hull
from latentsync.retarget.geometry import (
    CHIN,
    HEAD,
    INNER_LIPS,
    LEFT,
    LIPS,
    OUTER,
    OUTER_LIPS,
    RIGHT,
    head_similarity,
    lip_anchor,
    lip_opening,
    lip_width,
    pixels_per_unit,
    reshape_lips,
    transform,
)
from latentsync.retarget.mouths import Mouth, choose_mouths, cut_patch, measure_mouth
from latentsync.retarget.smoothing import smooth_points
from latentsync.retarget.warping import thin_plate_map
from latentsync.settings import Settings
from latentsync.windows import AlignedFrame, Window

CPU = torch.device("cpu")
COUNT = 60  # frames of the film that is computed with
RATE = Fraction(25)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def still() -> tuple[np.ndarray, np.ndarray]:
    """A portrait, uint8 (2 · SIDE, 2 · SIDE, 3), and the mesh of its face (478, 2)."""
    frame = cv2.resize(portrait(0), (2 * SIDE, 2 * SIDE), interpolation=cv2.INTER_CUBIC)
    ((_, face),) = track_faces(iter([frame]))
    return frame, face.landmarks


def moved(landmarks: np.ndarray, target_opening: float) -> np.ndarray:
    """The mesh with its lips with another opening."""
    points = mouth_points(landmarks)
    head = head_similarity(points)
    lips = transform(head, points[LIPS])
    shaped = lip_anchor(lips) + reshape_lips(lips - lip_anchor(lips), target_opening, lip_width(lips))
    out = landmarks.copy()
    out[[*OUTER_LIPS, *INNER_LIPS]] = transform(cv2.invertAffineTransform(head), shaped)
    return out


def face(landmarks: np.ndarray, **others) -> Face:
    return Face(np.zeros((3, 2)), landmarks, (0, 0, 1, 1), 1.0, **({"first": False} | others))


def film(still, count: int = COUNT) -> list[tuple[np.ndarray, Face]]:
    """A face whose landmarks say something; the frames differ in brightness."""
    frame, landmarks = still
    return [
        (
            np.clip(frame.astype(int) + i % 7, 0, 255).astype(np.uint8),
            face(moved(landmarks, source_opening_at(i)), first=i == 0),
        )
        for i in range(count)
    ]


def source_opening_at(i: int) -> float:
    return 0.06 + 0.05 * np.sin(i * 0.9)


def target_opening_at(i: int) -> float:
    return 0.08 + 0.06 * np.sin(i * 0.6 + 1)


def frames_of(tracked: list[tuple[np.ndarray, Face]], painted: int = 0) -> list[SimpleNamespace]:
    """Frames for `retarget`; the generated faces of those from `painted` on show their own numbers."""
    return [
        SimpleNamespace(
            frame=frame.copy(),
            points=mouth_points(face.landmarks),
            position=i,
            shot=0,
            opacity=face.opacity,
            generated=np.full((8, 8, 3), i, np.uint8) if i >= painted else None,
        )
        for i, (frame, face) in enumerate(tracked)
    ]


def reader(landmarks: np.ndarray):
    """In place of the landmarker: the target opening of the face whose number the picture shows."""
    return lambda picture: moved(landmarks, target_opening_at(int(picture[0, 0, 0])))


def cut_mouth(frame: np.ndarray, points: np.ndarray, position: int) -> Mouth:
    return measure_mouth(cut_patch(frame, points), points, position)


def collected(frames) -> MouthBank:
    mouths = MouthBank()
    list(mouths.collect(frames))
    return mouths


def run(still, frames, painted: int = 0) -> list[np.ndarray]:
    results = retarget(iter(frames_of(frames, painted)), collected(frames), reader(still[1]))
    return [result.frame for result in results]


def test_beyond_the_hull_of_lips_and_chin_every_pixel_stays(still):
    frames = film(still)
    for (before, seen), after in zip(frames, run(still, frames), strict=True):
        points = mouth_points(seen.landmarks)
        scale = pixels_per_unit(head_similarity(points))
        # Lips that open further reach a little lower than those that are there.
        hull = soft_hull(np.vstack([points[OUTER], points[[CHIN]]]), before.shape[:2], scale)
        outside = cv2.erode((hull == 0).astype(np.uint8), np.ones((9, 9))) > 0
        assert np.array_equal(before[outside], after[outside])
        assert not np.array_equal(before, after)


@pytest.mark.parametrize("target", [0.02, 0.05, 0.15])
def test_a_mouth_opens_as_far_as_the_target(target):
    """As the landmarker sees it, on a face that no landmarks were given for."""
    frame = cv2.resize(portrait(3), (3 * SIDE, 3 * SIDE), interpolation=cv2.INTER_CUBIC)
    with face_reader() as read:
        points = mouth_points(read(frame))
        head = head_similarity(points)
        mouth = cut_mouth(frame, points, 0)
        lips = transform(head, points[LIPS])
        goal = transform(
            cv2.invertAffineTransform(head), lip_anchor(lips) + reshape_lips(mouth.lips, target, lip_width(lips))
        )
        layer = Layer(mouth, goal, 1.0, 0.0)
        draw_mouths(frame, points, pixels_per_unit(head), [layer])
        shown = mouth_points(read(frame))
    assert lip_opening(transform(head_similarity(shown), shown[LIPS])) == pytest.approx(target, abs=0.025)


def test_reshaped_lips_have_the_opening_and_the_width_and_never_cross(still):
    points = mouth_points(still[1])
    lips = transform(head_similarity(points), points[LIPS])
    for target in (0.0, 0.03, 0.2):
        shaped = reshape_lips(lips, target, 0.5)
        assert lip_opening(shaped) == pytest.approx(max(target, 0.004), abs=0.01)
        assert lip_width(shaped) == pytest.approx(0.5, abs=0.01)
        assert (shaped[39:30:-1, 1] >= shaped[21:30, 1]).all()
        assert np.allclose(shaped[[LEFT, RIGHT], 1], lips[[LEFT, RIGHT], 1])


def test_a_face_in_the_frame_it_was_filmed_in_stays_nearly_as_it_is(still):
    frame, landmarks = still
    after = frame.copy()
    points = mouth_points(landmarks)
    layer = Layer(cut_mouth(frame, points, 0), points[LIPS].astype(float), 1.0, 0.0)
    draw_mouths(after, points, pixels_per_unit(head_similarity(points)), [layer])
    assert np.abs(after.astype(int) - frame).mean() < 0.2
    untouched = frame.copy()
    draw_mouths(untouched, points, 100.0, [layer], opacity=0.0)
    assert np.array_equal(untouched, frame)


def test_a_patch_takes_on_the_light_of_the_frame_that_it_is_laid_into(still):
    frame, landmarks = still
    points = mouth_points(landmarks)
    mouth = cut_mouth((frame * 0.8).astype(np.uint8), points, 0)
    after = frame.copy()
    layer = Layer(mouth, points[LIPS].astype(float), 1.0, 0.0)
    draw_mouths(after, points, pixels_per_unit(head_similarity(points)), [layer])
    changed = (after != frame).any(-1)
    assert np.abs(after[changed].astype(float).mean(0) - frame[changed].mean(0)).max() < 4


def test_a_missing_inside_is_drawn_there_and_nowhere_else(still):
    frame, landmarks = still
    closed = moved(landmarks, 0.0)
    points = mouth_points(closed)
    scale = pixels_per_unit(head_similarity(points))
    goal = mouth_points(moved(landmarks, 0.2))[LIPS].astype(float)
    shown = []
    for missing in (0.0, 1.0):
        after = frame.copy()
        draw_mouths(after, points, scale, [Layer(cut_mouth(frame, points, 0), goal, 1.0, missing)])
        shown.append(after.astype(int))
    differs = np.abs(shown[1] - shown[0]).max(-1) > 8
    inside = np.zeros(frame.shape[:2], np.uint8)
    cv2.fillPoly(inside, [np.round(goal[20:]).astype(np.int32)], 1)
    assert differs[inside > 0].mean() > 0.5
    assert not differs[cv2.dilate(inside, np.ones((5, 5))) == 0].any()


def test_a_warp_maps_every_point_to_its_value():
    random = np.random.default_rng(0)
    points = random.uniform(10, 90, (20, 2))
    values = points + random.normal(0, 3, points.shape)
    warp = thin_plate_map(points, values, (100, 100), 80.0)
    mapped = cv2.remap(warp, points[:, 0].astype(np.float32), points[:, 1].astype(np.float32), cv2.INTER_LINEAR)
    assert np.abs(mapped.reshape(-1, 2) - values).max() < 1


def test_a_path_takes_mouths_like_the_targets_and_keeps_the_order_of_the_film(still):
    mouths = tuple(cut_mouth(frame, mouth_points(seen.landmarks), i) for i, (frame, seen) in enumerate(film(still)))
    features = np.stack([mouth.features for mouth in mouths])
    assert np.array_equal(choose_mouths(mouths, features), np.arange(COUNT))
    turned = features[::-1].copy()
    turned[:, 0] += 0.01
    assert (np.abs(np.diff(choose_mouths(mouths, turned))) <= 1).all()
    wide = np.tile(features[[int(features[:, 0].argmax())]], (8, 1))
    assert features[choose_mouths(mouths, wide), 0].min() > features[:, 0].mean()


def test_a_bank_is_bounded_in_number_and_in_bytes_and_keeps_different_mouths(still, monkeypatch):
    frames = film(still)
    size = cut_mouth(frames[0][0], mouth_points(frames[0][1].landmarks), 0).pixels.nbytes
    for limits in ({"MAX_MOUTHS": 12}, {"MAX_BYTES": int(12.5 * size)}):
        with monkeypatch.context() as patched:
            for name, value in limits.items():
                patched.setattr(bank, name, value)
            mouths = collected(frames).mouths_for(0)
        assert 10 <= len(mouths) <= 13
        openings = [mouth.features[0] for mouth in mouths]
        assert max(openings) - min(openings) > 0.08
    alone = [cut_mouth(frames[0][0], mouth_points(frames[0][1].landmarks), 0)]
    monkeypatch.setattr(bank, "MAX_BYTES", 1)
    limit_mouths(alone)
    assert len(alone) == 1


def test_frames_use_mouths_up_to_the_end_of_their_chunk_and_beyond_the_film_all(still, monkeypatch):
    monkeypatch.setattr(bank, "CHUNK", 20)
    mouths = collected(film(still, 50))
    for position, count in ((0, 20), (19, 20), (20, 40), (45, 50), (1000, 50)):
        assert [mouth.position for mouth in mouths.mouths_for(position)] == list(range(count))


def test_waiting_for_a_bank_ends_with_the_bank_or_the_error(still, monkeypatch):
    monkeypatch.setattr(bank, "CHUNK", 20)
    frames = film(still, 30)

    def damaged():
        yield from frames[:25]
        raise UserError("The film is damaged.")

    mouths = MouthBank()
    faces, waiting = mouths.collect(damaged()), threading.Event()
    got = []

    def wait():
        waiting.set()
        got.append(len(mouths.mouths_for(0)))

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    waiting.wait()
    with pytest.raises(UserError, match="damaged"):
        list(faces)
    thread.join(60)
    assert got == [20]
    with pytest.raises(UserError, match="damaged"):
        mouths.mouths_for(25)


def test_the_result_is_deterministic_and_the_same_when_resumed(still):
    frames = film(still)
    whole = run(still, frames)
    assert all(map(np.array_equal, whole, run(still, frames)))
    for done in (20, 33, 48, 59):
        resumed = run(still, frames, painted=max(done - context_frames(RATE), 0))
        assert all(map(np.array_equal, whole[done:], resumed[done:]))


def test_frames_come_in_order_few_wait_and_gaps_and_cuts_end_a_run(still):
    frames = film(still)
    shots = frames_of(frames)
    shots[10].points = shots[10].generated = None
    for frame in shots[30:]:
        frame.shot = 1
    taken = 0

    def counted():
        nonlocal taken
        for shot in shots:
            taken += 1
            yield shot

    for i, shot in enumerate(retarget(counted(), collected(frames), reader(still[1]))):
        assert shot.position == i
        assert taken - i <= held_frames(RATE)
    assert np.array_equal(shots[10].frame, frames[10][0])


def test_a_frame_without_a_generated_face_or_with_an_unreadable_one_stays_as_it_is(still):
    frames = film(still, 40)
    shots = frames_of(frames)
    shots[5].generated = None
    blind = {7, 8}

    def read(picture):
        return None if int(picture[0, 0, 0]) in blind else reader(still[1])(picture)

    after = [shot.frame for shot in retarget(iter(shots), collected(frames), read)]
    assert np.array_equal(after[5], frames[5][0])
    assert not np.array_equal(after[6], frames[6][0])
    none = [shot.frame for shot in retarget(iter(frames_of(frames)), collected(frames), lambda _: None)]
    assert all(np.array_equal(one, frame) for one, (frame, _) in zip(none, frames, strict=True))


@pytest.mark.parametrize("rate, steps", [(25, [0.5]), (30, [0.5]), (60, [2 / 3, 1 / 3])])
def test_jumps_are_faded_over_the_same_time_at_every_rate(still, rate, steps):
    run = stage._Run(MouthBank(), stage.Horizon.at(Fraction(rate)))
    mouths = [cut_mouth(f, mouth_points(seen.landmarks), i) for i, (f, seen) in enumerate(film(still, 44))]
    weights = [[weight for _, weight in run.blend(mouth)] for mouth in [mouths[0], mouths[1], *mouths[40:44]]]
    faded = [pytest.approx([share, 1 - share]) for share in steps]
    assert weights == [[1], [1], *faded, *[[1]] * (4 - len(steps))]


@pytest.mark.parametrize("rate", [30, 48, 60])
def test_a_mouth_of_a_film_with_many_frames_a_second_does_not_tremble(rate):
    """Neighbours are nearly equal: one is shown on, though two in turn would move more."""
    features = np.array([0.2, 0.5, 0, 0, 100, 5]) + 0.002 * np.arange(30)[:, None] * (1, 1, 1, 1, 0, 0)
    mouths = [SimpleNamespace(position=i, features=row) for i, row in enumerate(features)]
    path = choose_mouths(mouths, np.stack([features[10]] * 60), Fraction(rate))
    assert path.tolist() == [10] * 60


def test_covered_mouths_are_not_taken_and_stay_as_they_are(still):
    frames = film(still, 50)
    hand = (210, 60, 40)
    for i in range(25, 32):
        x, y = mouth_points(frames[i][1].landmarks)[LIPS].mean(0).astype(int)
        cv2.rectangle(frames[i][0], (x - 60, y - 30), (x + 60, y + 60), hand, -1)
    mouths = MouthBank()
    faces = list(mouths.collect(frames))
    assert not {mouth.position for mouth in mouths.mouths_for(0)} & set(range(25, 32))
    opacities = [seen.opacity for seen in faces]
    assert opacities[25:32] == [0] * 7
    assert min(opacities[:21] + opacities[36:]) == 1
    assert all(0 <= b - a <= 0.5 or b < a for a, b in pairwise(opacities[31:36]))


def test_light_that_changes_covers_nothing(still):
    frames = film(still, 50)
    dimmed = [((f * (1 - 0.5 * i / 50)).astype(np.uint8), seen) for i, (f, seen) in enumerate(frames)]
    assert all(seen.opacity == 1 for seen in MouthBank().collect(dimmed))


def test_a_turned_head_lends_no_mouth(still):
    frame, landmarks = still
    turned = landmarks.copy()
    scale = pixels_per_unit(head_similarity(mouth_points(landmarks)))
    turned[[4, 5, 195, 197], 0] += np.array([0.8, 0.6, 0.4, 0.2]) * scale
    mouths = collected([(frame, face(landmarks, first=True)), (frame, face(turned))])
    assert [mouth.position for mouth in mouths.mouths_for(0)] == [0]


# The whole pipeline, with a small network and a face for it to paint.


@pytest.fixture(scope="module")
def with_face(checkpoint, tmp_path_factory):
    """The small checkpoint with a picture of a face."""
    folder = tmp_path_factory.mktemp("own") / "own"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "latentsync.json").read_text())
    (folder / "latentsync.json").write_text(json.dumps(config | {"face": "face.png"}))
    cv2.imwrite(str(folder / "face.png"), cv2.resize(portrait(0), (RESOLUTION, RESOLUTION))[:, :, ::-1])
    return folder


@pytest.fixture
def own_face(with_face, still, monkeypatch):
    """Its models; the opening is read from the brightness of what it paints, as no landmarker finds a mouth there."""

    @contextmanager
    def reading():
        yield lambda picture: moved(still[1], 0.02 + 0.1 * float(picture.mean()) / 255)

    monkeypatch.setattr(pipeline, "face_reader", reading)
    return load_models(resolve_model(str(with_face), CPU), CPU, torch.float32)


def test_a_model_names_its_face_and_a_wrong_one_is_refused(with_face, tmp_path):
    found = resolve_model(str(with_face), CPU)
    models = load_models(found, CPU, torch.float32)
    assert models.face.shape == (RESOLUTION, RESOLUTION, 3)
    assert found.face in models.files
    (tmp_path / "face.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="face.png' is no picture of 64 × 64"):
        load_models(replace(found, face=tmp_path / "face.png"), CPU, torch.float32)
    with pytest.raises(UserError, match="missing.png"):
        load_models(replace(found, face=tmp_path / "missing.png"), CPU, torch.float32)


def test_released_models_have_no_face(checkpoint):
    assert resolve_model(str(checkpoint), CPU).face is None
    assert resolve_model("demo", CPU).face is not None


def test_the_painted_mouth_depends_on_the_sound_alone(own_face):
    """Whoever is filmed: the same latents, as the model is conditioned on its own face."""
    painter = Painter(own_face, Settings(steps=2))
    some = np.random.default_rng(0)
    painted = []
    for _ in range(2):
        crops = some.integers(0, 256, (16, 64, 64, 3), np.uint8)
        shots = [AlignedFrame(crop.copy(), torch.full((50, 32), i / 16), crop) for i, crop in enumerate(crops)]
        assert painter.finish(painter.paint([Window(shots)])) == []
        painted.append(np.stack([shot.generated for shot in shots]))
    assert np.array_equal(*painted)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_video(tmp_path_factory.mktemp("film") / "film.mp4", [portrait(t) for t in range(72)], *X264)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_sound(tmp_path_factory.mktemp("sound") / "sound.wav", seconds=68 / 25)


def test_a_resumed_run_gives_the_same_film(own_face, clip, sound, tmp_path):
    settings = Settings(steps=2)
    whole = tmp_path / "whole.mp4"
    lipsync(clip, sound, whole, own_face, settings, segment_frames=20)
    resumed = tmp_path / "resumed.mp4"
    interrupted(clip, sound, resumed, own_face, settings, at=50)
    report = lipsync(clip, sound, resumed, own_face, settings, segment_frames=20)
    assert report.resumed_from > 0
    assert hashes(resumed) == hashes(whole)


def test_a_looped_film_and_a_picture_get_mouths(own_face, sound, tmp_path):
    short = save_video(tmp_path / "short.mp4", [portrait(t) for t in range(24)], *X264)
    picture = tmp_path / "picture.png"
    cv2.imwrite(str(picture), portrait(0)[:, :, ::-1])
    for source in (short, picture):
        output = tmp_path / f"{source.stem}_out.mp4"
        report = lipsync(source, sound, output, own_face, Settings(steps=2))
        assert (report.frames, report.frames_without_face) == (68, 0)
        frames = list(read_frames(probe_video(output)))
        assert len(frames) == 68
        upper = np.abs(frames[40][: SIDE // 3].astype(int) - frames[0][: SIDE // 3]).mean()
        assert upper < 12 if source is short else upper < 1  # the picture stands still but for its mouth


def test_released_models_do_not_use_the_stage(checkpoint, clip, sound, tmp_path, monkeypatch):
    models = load_models(resolve_model(str(checkpoint), CPU), CPU, torch.float32)
    monkeypatch.setattr(pipeline, "retarget", lambda *_: pytest.fail("retargeted"))
    monkeypatch.setattr(pipeline, "MouthBank", lambda *_: pytest.fail("collected"))
    report = lipsync(clip, sound, tmp_path / "out.mp4", models, Settings(steps=1))
    assert report.frames == 68


def test_hull_ends_within_the_promised_distance():
    hull = soft_hull(np.array([(80, 80), (120, 80), (100, 120)], float), (200, 200), 100.0)
    far = cv2.distanceTransform((hull < 1).astype(np.uint8), cv2.DIST_L2, 5)
    assert far[hull > 0].max() <= HULL_OUTSIDE * 100 + 1
    assert hull.max() == 1


def test_tremble_is_smoothed_and_fast_motion_stays(still):
    random = np.random.default_rng(0)
    points = mouth_points(still[1])
    scale = pixels_per_unit(head_similarity(points))
    velocity = np.float32((0.02 * scale, 0))
    noise = random.normal(0, 0.002 * scale, (9, *points.shape)).astype(np.float32)
    steady = {k: points + k * velocity + noise[k + 4] for k in range(-4, 5)}
    deviation = np.abs(smooth_points(steady) - points).mean()
    assert deviation < 0.6 * np.abs(noise[4]).mean()
    spoken = {k: points.copy() for k in range(-4, 5)}
    spoken[0][LIPS, 1] += 0.05 * scale
    smoothed = smooth_points(spoken)
    assert np.abs(smoothed[LIPS] - spoken[0][LIPS]).max() < 0.01 * scale
    assert np.allclose(smoothed[HEAD], points[HEAD], atol=1e-3)


def test_points_are_not_smoothed_across_a_cut(still):
    frame, landmarks = still
    shifted = landmarks + (3, 0)
    faces = [face(landmarks, first=i == 0) for i in range(6)] + [face(shifted, first=i == 0) for i in range(6)]
    collected_faces = list(MouthBank().collect([(frame, each) for each in faces]))
    for before, after in zip(faces, collected_faces, strict=True):
        assert np.allclose(before.landmarks, after.landmarks, atol=1e-3)
