"""Finding and following a face, on the public-domain portrait that scikit-image carries."""

import itertools
import threading
import time

import cv2
import numpy as np
import pytest
from mediapipe.tasks.python.vision import FaceLandmarker
from skimage.data import astronaut

from latentsync import faces, following, landmarks, shots
from latentsync.errors import UserError
from latentsync.faces import track_faces
from latentsync.following import FADE
from latentsync.landmarks import ALIGNMENT_POINTS, mouth_opening

WIDTH, HEIGHT = 640, 360


@pytest.fixture
def looks(monkeypatch) -> list[tuple[int, ...]]:
    """The rectangles (x0, y0, x1, y1) that are searched for new and lost faces, in order."""
    boxes, detect = [], landmarks.detect

    def recorded(landmarker, frame, box, max_side):
        if max_side == landmarks.TILE_PIXELS:
            boxes.append(box)
        return detect(landmarker, frame, box, max_side)

    monkeypatch.setattr(landmarks, "detect", recorded)
    return boxes


@pytest.fixture(scope="module")
def portrait() -> np.ndarray:
    """Head and shoulders, (260, 240, 3); the face is about 110 pixels high."""
    return np.ascontiguousarray(astronaut()[0:260, 110:350])


def room(shade: int = 100) -> np.ndarray:
    coarse = np.random.default_rng(shade).integers(shade - 40, shade + 40, (9, 16, 3), dtype=np.uint8)
    return cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def put(scene: np.ndarray, portrait: np.ndarray, x: float, y: float, scale: float = 1.0) -> np.ndarray:
    """The scene with the portrait's top left corner at (x, y), which need not be whole."""
    if scale < 1:
        portrait = cv2.GaussianBlur(portrait, (0, 0), 0.4 / scale)
    matrix = np.array([[scale, 0, x], [0, scale, y]], np.float64)
    return cv2.warpAffine(
        portrait, matrix, (WIDTH, HEIGHT), dst=scene.copy(),
        flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_TRANSPARENT,
    )  # fmt: skip


def track(frames: list[np.ndarray]) -> list[faces.Face | None]:
    results = list(track_faces(iter(frames)))
    assert all(out is given for (out, _), given in zip(results, frames, strict=True))
    return [face for _, face in results]


def unsmoothed(face: faces.Face) -> np.ndarray:
    return np.stack([face.landmarks[list(which)].mean(0) for which in ALIGNMENT_POINTS])


def middle(face: faces.Face) -> float:
    return (face.box[0] + face.box[2]) / 2


@pytest.mark.parametrize("speed", [0, 3])
def test_points_tremble_less_and_do_not_lag(portrait, speed):
    noise = np.random.default_rng(0)
    at = [(100 + speed * t, 50) for t in range(30)]
    frames = [put(room(), portrait, x, y).astype(float) for x, y in at]
    frames = [np.clip(f + noise.normal(0, 4, f.shape), 0, 255).astype(np.uint8) for f in frames]
    found = track(frames)
    still = [np.stack([p - place for p, place in zip(points, at, strict=True)]) for points in (
        [unsmoothed(face) for face in found], [face.points for face in found])]  # fmt: skip
    raw, smooth = (np.sqrt((np.diff(points, axis=0) ** 2).mean()) for points in still)
    assert smooth < 0.4 * raw
    assert np.abs(still[1] - still[0]).mean() < 0.3
    assert np.abs((still[1] - still[0]).mean(axis=(0, 1))).max() < 0.05  # a lag of one frame would be `speed`


def test_points_of_a_shaken_face_are_not_smeared(portrait):
    found = track([put(room(), portrait, 150 + 15 * np.sin(2 * np.pi * 3 * t / 25), 50) for t in range(30)])
    assert max(np.abs(face.points - unsmoothed(face)).max() for face in found) < 1


@pytest.mark.parametrize("x, y", [(20, 250), (400, 100)])
def test_a_small_face_is_found(portrait, x, y):
    face = track([put(room(), portrait, x, y, 0.3)] * 2)[0]
    assert x < middle(face) < x + 0.3 * 240
    assert 20 < face.box[3] - face.box[1] < 45


def test_the_largest_face_is_taken(portrait):
    face = track([put(put(room(), portrait, 0, 120, 0.6), portrait, 320, 50)])[0]
    assert middle(face) > 320


def test_a_larger_newcomer_does_not_take_over(portrait):
    alone = put(room(), portrait, 20, 120, 0.7)
    found = track([alone] * 5 + [put(alone, portrait, 300, 20, 1.2)] * 10)
    assert all(middle(face) < 200 for face in found)


def test_another_face_does_not_take_over_at_once_when_the_followed_one_leaves(portrait):
    both = put(put(room(), portrait, 350, 50), portrait, 20, 120, 0.6)
    left = put(room(), portrait, 20, 120, 0.6)
    found = track([both] * 4 + [left] * (following.PATIENCE + 10))
    assert all(middle(face) > 350 for face in found[:4])
    assert not any(found[4 : following.PATIENCE - 3])
    assert middle(found[-1]) < 200


def test_after_a_cut_the_largest_face_is_taken_at_once_and_in_full(portrait):
    before = put(room(60), portrait, 20, 20, 0.7)
    after = put(put(room(160), portrait, 10, 150, 0.5), portrait, 320, 50)
    found = track([before] * 4 + [after] * 4)
    assert [middle(face) > 320 for face in found] == [False] * 4 + [True] * 4
    assert [face.first for face in found] == [True, False, False, False] * 2
    assert all(face.opacity == 1 for face in found)


def test_a_lost_face_is_looked_for_only_where_it_can_be(portrait, looks):
    def frames():
        yield from [put(room(), portrait, 80, 60, 0.3)] * 2
        looks.clear()
        yield from [room()] * 6

    face = next(face for _, face in list(track_faces(frames(), landmarkers=1)))
    low, high = np.array(face.box[:2]), np.array(face.box[2:])
    reach = following.NEAR + 6 * following.DRIFT  # in the second search
    side = HEIGHT // 4
    within, touching = (
        {
            (x, y, x + side, y + side)
            for x in landmarks.tile_starts(WIDTH, side)
            for y in landmarks.tile_starts(HEIGHT, side)
            if np.abs(np.array([x, y]) + side / 2 - (low + high) / 2).max() < side / 2 + sizes * (high - low).max()
        }
        for sizes in (reach, reach + 0.6)
    )
    assert within <= {look for look in looks if look[2] - look[0] == side} <= touching
    assert len(touching) < 0.5 * len(landmarks.tile_starts(WIDTH, side)) * len(landmarks.tile_starts(HEIGHT, side))


def test_a_large_lost_face_is_not_looked_for_in_tiles_that_it_would_not_fit_into(portrait, looks):
    track([put(room(), portrait, 200, 20, 1.3)] + [room()] * 3)
    assert looks and min(right - left for left, _, right, _ in looks[1:]) > 1.3 * 100


def test_a_small_lost_face_is_found_again_some_way_off(portrait):
    there, back = put(room(), portrait, 200, 60, 0.3), put(room(), portrait, 235, 80, 0.3)
    found = track([there] * 4 + [room()] * 8 + [back] * 8)
    assert [face is not None for face in found] == [True] * 4 + [False] * 8 + [True] * 8


def test_a_flash_is_no_cut(portrait):
    scene = put(room(), portrait, 200, 50)
    flash = (scene * 0.4 + 150).astype(np.uint8)
    assert [face.first for face in track([scene, scene, flash, scene])] == [True, False, False, False]


def other(portrait: np.ndarray) -> np.ndarray:
    """Another person in the same place: looking the other way, in other colours."""
    return np.ascontiguousarray(255 - (255 - portrait[:, ::-1, ::-1]) * 0.6).astype(np.uint8)


def scenes(frames: list[np.ndarray]) -> list[int]:
    found = track(frames)
    assert all(found), "a frame without a face proves nothing"
    assert all(face.first == (i == 0 or face.shot != found[i - 1].shot) for i, face in enumerate(found))
    return [face.shot for face in found]


@pytest.mark.parametrize("lengths", [[9, 9], [9, 2, 9], [3, 9, 4, 3]])
def test_a_cut_is_found_though_much_of_the_room_and_the_place_of_the_face_stay(portrait, lengths):
    elsewhere = room()
    elsewhere[:, :160] = room(140)[:, :160]
    views = [(room(), portrait), (elsewhere, other(portrait))]
    wanted = [scene for scene, length in enumerate(lengths) for _ in range(length)]
    frames = [
        put(here, person, 200 + 0.5 * t, 20, 1.3) for t, (here, person) in enumerate(views[n % 2] for n in wanted)
    ]
    assert not any(shots.is_clear_cut(*map(shots.thumbnail, pair)) for pair in itertools.pairwise(frames))
    assert scenes(frames) == wanted


def test_a_cut_between_two_takes_of_one_person_is_found_and_points_are_not_smoothed_across_it(portrait):
    frames = [put(room(), portrait, 200 + (20 * (t >= 8)), 50) for t in range(16)]
    assert scenes(frames) == [0] * 8 + [1] * 8
    assert max(np.abs(face.points - unsmoothed(face)).max() for face in track(frames)) < 0.5


def still(portrait: np.ndarray) -> list[np.ndarray]:
    return [put(room(), portrait, 200, 50)] * 24


def flashes(portrait: np.ndarray, *at: int) -> list[np.ndarray]:
    """Half of the picture is white, and the rest of it brighter, in these frames."""
    frames = [frame.astype(np.float32) for frame in still(portrait)]
    for t in at:
        frames[t] = frames[t] * 0.6 + np.linspace(0, 400, WIDTH, dtype=np.float32)[:, None]
    return [np.clip(frame, 0, 255).astype(np.uint8) for frame in frames]


def dimmed(portrait: np.ndarray, light: np.ndarray) -> list[np.ndarray]:
    return [(frame * share).astype(np.uint8) for frame, share in zip(still(portrait), light, strict=True)]


def panned(portrait: np.ndarray, offsets: np.ndarray) -> list[np.ndarray]:
    wide = np.concatenate([room(), room(120), room(140)], 1)
    return [put(wide[:, round(x) : round(x) + WIDTH].copy(), portrait, 200 - x / 4, 50) for x in offsets]


UNCUT = {
    "a flash": lambda portrait: flashes(portrait, 8),
    "a flash of three frames": lambda portrait: flashes(portrait, 8, 9, 10),
    "a stroboscope": lambda portrait: flashes(portrait, *range(3, 24, 4)),
    "the light is switched off": lambda portrait: dimmed(portrait, np.repeat([1, 0.4], 12)),
    "the picture fades in": lambda portrait: dimmed(portrait, np.linspace(0.3, 1, 24)),
    "the camera starts to pan": lambda portrait: panned(portrait, np.maximum(np.arange(24) - 8, 0) * 16),
    "the camera is knocked": lambda portrait: panned(portrait, 40.0 * (np.arange(24) == 8)),
    "the person turns up close": lambda portrait: [put(room(), portrait, 150, 20, 1 + t / 60) for t in range(24)],
    "12.5 frames a second": lambda portrait: panned(portrait, np.arange(24) // 2 * 12),
    "5 frames a second": lambda portrait: panned(portrait, np.arange(24) // 5 * 12),
}


@pytest.mark.parametrize("name", UNCUT)
def test_no_cut_is_seen_where_there_is_none(portrait, name):
    assert set(scenes(UNCUT[name](portrait))) == {0}


def test_a_dissolve_is_no_cut(portrait):
    people = still(portrait), still(other(portrait))
    share = np.clip((np.arange(24) - 6) / 12, 0, 1)
    frames = [cv2.addWeighted(a, 1 - s, b, s, 0) for a, b, s in zip(*people, share, strict=True)]
    assert set(scenes(frames)) == {0}


def test_a_face_that_leaves_and_comes_back_fades(portrait):
    here, gone = put(room(), portrait, 200, 50), room()
    found = track([here] * 10 + [gone] * 8 + [here] * 10)
    assert [face is not None for face in found] == [True] * 10 + [False] * 8 + [True] * 10
    rise = [(i + 1) / (FADE + 1) for i in range(FADE)] + [1.0] * (10 - FADE)
    assert [face.opacity for face in found[18:]] == pytest.approx(rise)
    assert [face.opacity for face in found[:10]] == pytest.approx(rise[::-1])
    assert [i for i, face in enumerate(found) if face and face.first] == [0, 18]


def test_a_face_whose_mouth_is_outside_the_picture_is_not_usable(portrait):
    inside = track([put(room(), portrait, 200, 50)])[0]
    lower = HEIGHT - inside.landmarks[landmarks.LOWER_LIP][1] + 50
    assert track([put(room(), portrait, 200, lower + 2)] * 2) == [None, None]


def cut_off(portrait: np.ndarray, x: float, scale: float = 1.0) -> np.ndarray:
    """A room with the portrait so low in it that the mouth, not the nose, is outside the picture."""
    return put(room(), portrait, x, HEIGHT - 130 * scale, scale)


@pytest.mark.parametrize("scale", [0.7, 0.25])  # the smaller one is not seen in the picture as a whole
def test_a_usable_face_is_taken_before_a_larger_one_that_is_not(portrait, scale):
    assert track([cut_off(portrait, 20, 1.5)] * 2) == [None, None]
    found = track([put(cut_off(portrait, 20, 1.5), portrait, 450, 60, scale)] * 3)
    assert all(face is not None and middle(face) > 450 for face in found)


@pytest.mark.parametrize("which, at", [("left", 250), ("right", 460), ("centre", 250)])
def test_the_face_that_was_asked_for_is_a_usable_one(portrait, which, at):
    """The one on the left, which is also the largest, is cut off by the edge."""
    scene = put(put(cut_off(portrait, 0), portrait, 250, 60, 0.6), portrait, 460, 60, 0.6)
    for _, face in track_faces(iter([scene] * 3), which=which):
        assert at < middle(face) < at + 0.6 * portrait.shape[1]


def dipping(portrait: np.ndarray, frames: int) -> list[np.ndarray]:
    """A face that sinks until its mouth is outside the picture, stays so for some frames, and comes up; another beside
    it, a smaller one."""
    height = np.interp(np.arange(frames + 20), [0, 9, frames + 10, frames + 19], [60, 230, 230, 60])
    return [put(put(room(), portrait, 20, y), portrait, 420, 60, 0.8) for y in height]


def test_a_followed_face_is_kept_while_it_is_not_usable_for_a_moment(portrait):
    found = track(dipping(portrait, 12))
    assert found[0] and not any(found[12:20]) and found[-1]
    assert all(middle(face) < 300 for face in found if face)


def test_a_usable_face_takes_the_place_of_one_that_has_long_not_been_usable(portrait):
    found = track(dipping(portrait, following.PATIENCE + 10))
    assert middle(found[0]) < 300 and middle(found[-1]) > 420
    assert not any(found[12 : following.PATIENCE])
    assert all(middle(face) > 420 for face in found[following.PATIENCE + 10 :])


@pytest.mark.parametrize("scale", [0.7, 0.25])
def test_a_usable_face_that_comes_to_one_that_never_was_is_taken_at_once(portrait, scale):
    alone = cut_off(portrait, 20, 1.5)
    found = track([alone] * 8 + [put(alone, portrait, 450, 60, scale)] * 8)
    assert not any(found[:8]) and all(middle(face) > 450 for face in found[8:])


def test_a_face_that_is_not_usable_costs_two_looks_a_frame(portrait, monkeypatch):
    """One that follows it and one for others, between the searches in tiles."""
    looked, detect = [], landmarks.detect
    monkeypatch.setattr(landmarks, "detect", lambda *where: (looked.append(where), detect(*where))[1])

    def frames():
        yield from [cut_off(portrait, 200)] * 6
        looked.clear()
        yield from [cut_off(portrait, 200)] * 9

    assert not any(face for _, face in track_faces(frames(), landmarkers=1))
    assert len(looked) == 2 * 9


def test_a_face_that_its_own_crop_does_not_confirm_hides_no_other(portrait, monkeypatch):
    """As noise that looks like a face from afar, or a face that is usable only so."""
    scene = put(room(), portrait, 400, 80, 0.8)
    ghost = landmarks.Detection(2 * track([scene])[0].landmarks - (790, 130), usable=True)
    detect = landmarks.detect

    def haunted(*where):
        return detect(*where) + ([ghost] if where[-1] == landmarks.TILE_PIXELS else [])

    monkeypatch.setattr(landmarks, "detect", haunted)
    assert all(face is not None and middle(face) > 400 for face in track([scene] * 2))


def test_no_face_gives_none_for_every_frame():
    assert track([room()] * 12) == [None] * 12


def thorough_searches(frames: list[np.ndarray], looks: list) -> list[int]:
    """The numbers of the frames in which more than the picture as a whole is searched."""
    counts = []

    def counted():
        for frame in frames:
            counts.append(len(looks))
            yield frame

    for _ in track_faces(counted(), landmarkers=1):
        pass
    return [i for i, looked in enumerate(np.diff([*counts, len(looks)])) if looked > 1]


def test_searches_in_vain_become_rare(looks):
    assert thorough_searches([room()] * 95, looks) == [0, 5, 15, 40, 65, 90]
    assert len(looks) > 95  # the picture as a whole, in every frame


def test_after_a_cut_searches_begin_anew(looks):
    assert thorough_searches([room()] * 43 + [room()[::-1, ::-1]] * 20, looks) == [0, 5, 15, 40, 43, 48, 58]


def test_when_something_comes_in_searches_begin_anew_but_not_more_often_than_every_fifth_frame(looks):
    scene, slide = room(), room()
    cv2.putText(slide, "Title", (300, 200), cv2.FONT_HERSHEY_SIMPLEX, 3, (250, 250, 250), 9)
    assert thorough_searches([scene] * 50 + [slide] * 20, looks) == [0, 5, 15, 40, 50, 55, 65]
    assert thorough_searches([scene, slide] * 10, looks) == [0, 5, 10, 15]


def test_when_a_face_is_given_up_searches_begin_anew(portrait, looks):
    gone = 6
    frames = [room()] * 3 + [put(room(), portrait, 200, 40)] * (gone - 3) + [room()] * (following.PATIENCE + 17)
    assert [frame - gone for frame in thorough_searches(frames, looks)][-3:] == [25, 30, 40]


def test_when_a_face_that_is_not_usable_is_lost_searches_begin_anew(portrait, looks, monkeypatch):
    scene = cut_off(portrait, 200, 0.3)
    frames = [scene.copy() for _ in range(56)]
    detect = landmarks.detect

    def hidden_for_a_moment(landmarker, frame, *where):
        seen = detect(landmarker, frame, *where)
        return [] if any(frame is hidden for hidden in frames[46:49]) else seen

    monkeypatch.setattr(landmarks, "detect", hidden_for_a_moment)
    assert thorough_searches(frames, looks) == [0, 5, 15, 40, 46, 51]


def test_a_small_face_that_comes_in_late_is_found_at_once(portrait):
    found = track([room()] * 47 + [put(room(), portrait, 400, 100, 0.3)] * 12)
    assert [face is not None for face in found] == [False] * 47 + [True] * 12


def test_a_small_face_that_comes_in_late_and_slowly_is_found_within_a_second(portrait):
    there = put(room(), portrait, 400, 100, 0.3)
    fading = [cv2.addWeighted(there, t / 20, room(), 1 - t / 20, 0) for t in range(20)]
    found = track([room()] * 42 + fading + [there] * 26)
    assert not any(found[:42]) and found[42 + 20 + 25]


def test_no_frames_give_nothing():
    assert track([]) == []


@pytest.mark.parametrize("landmarkers", (1, 4))
def test_few_frames_are_held(portrait, landmarkers):
    taken = 0

    def frames():
        nonlocal taken
        for t in range(40):
            taken += 1
            yield room() if 10 < t < 25 else put(room(), portrait, 200, 50)

    ahead = 0 if landmarkers == 1 else landmarkers  # each of several searches a frame of its own
    for done, _ in enumerate(track_faces(frames(), landmarkers)):
        assert taken - done <= 12 + ahead


def test_mouth_opening_is_small_on_closed_lips_and_grows(portrait):
    mesh = track([put(room(), portrait, 200, 50)])[0].landmarks.copy()
    closed = mouth_opening(mesh)
    mesh[landmarks.LOWER_LIP, 1] += 10
    assert closed < 0.2 < mouth_opening(mesh)


def test_nothing_is_written_to_the_console(portrait, capfd):
    track([put(room(), portrait, 200, 50)])
    assert capfd.readouterr() == ("", "")


def test_a_missing_model_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(landmarks, "MODEL_FILE", tmp_path / "face_landmarker.task")
    with pytest.raises(UserError, match=r"face_landmarker\.task"):
        track([room()])


def test_a_face_that_looks_away_is_not_usable(portrait, monkeypatch):
    frames = [put(room(), portrait, 200, 50)] * 2
    assert all(track(frames))
    monkeypatch.setattr(landmarks, "MIN_FACING", 1.01)  # turns every face into one that looks away
    assert track(frames) == [None, None]


def test_stopping_early_closes_the_landmarker(portrait, monkeypatch):
    closed = []
    close = FaceLandmarker.close
    monkeypatch.setattr(FaceLandmarker, "close", lambda self: (closed.append(True), close(self)))
    tracked = track_faces(iter([put(room(), portrait, 200, 50)] * 20))
    next(tracked)
    assert not closed
    tracked.close()
    assert closed


def test_several_landmarkers_see_what_one_sees(portrait):
    """A face that wanders, is lost, comes back, and a cut: regions that were searched ahead in vain among them."""
    wandering = [put(room(), portrait, 60 + 9 * t, 40 + 2 * t) for t in range(20)]
    away = [room()] * 7
    back = [put(room(), portrait, 200 - 3 * t, 50) for t in range(8)]
    elsewhere = [put(room()[:, ::-1], portrait, 20, 80)] * 4
    assert_same([*wandering, *away, *back, *elsewhere], [1, 3])


def test_several_landmarkers_see_in_tiles_what_one_sees_however_long_each_takes(portrait, monkeypatch):
    """A small face beside a large one that is cut off, another small one of the same size, and neither."""
    large = cut_off(portrait, 20, 1.5)
    both = put(put(large, portrait, 420, 40, 0.25), portrait, 540, 200, 0.25)
    frames = [*[large] * 7, *[both] * 4, *[room()] * 8, *[put(room(), portrait, 440, 50, 0.25)] * 4]
    detect, random = landmarks.detect, np.random.default_rng(0)
    pauses = iter(random.exponential(0.002, 100_000))

    def delayed(*where):
        time.sleep(next(pauses))
        return detect(*where)

    monkeypatch.setattr(landmarks, "detect", delayed)
    assert_same(frames, [1, 2, 4])


def assert_same(frames: list[np.ndarray], landmarkers: list[int]) -> None:
    """Such numbers of landmarkers give the same faces, in some of the frames, to the bit."""
    alone, *others = (list(track_faces(iter(frames), landmarkers=n)) for n in landmarkers)
    for together in others:
        assert len(alone) == len(together) == len(frames)
        for (frame, face), (same_frame, same_face) in zip(alone, together, strict=True):
            assert frame is same_frame and (face is None) == (same_face is None)
            if face:
                assert np.array_equal(face.points, same_face.points) and face.opacity == same_face.opacity
                assert np.array_equal(face.landmarks, same_face.landmarks) and face.first == same_face.first
    assert any(face for _, face in alone) and not all(face for _, face in alone)


def test_what_several_landmarkers_see_is_in_the_order_of_the_tiles(monkeypatch):
    """Equal faces in all tiles: the first one's is taken, though its landmarker is the last to be done."""

    def in_the_middle(_, frame, box, max_side):
        x0, y0, x1, y1 = box
        if max_side == landmarks.TILE_PIXELS and x1 - x0 >= HEIGHT / 2:
            return []
        time.sleep(0.05 if (x0, y0) == (0, 0) else 0.0)
        corners = np.array([(-9, -9), (9, 9)] * 239)
        return [landmarks.Detection(corners + ((x0 + x1) // 2, (y0 + y1) // 2), usable=True)]

    monkeypatch.setattr(landmarks, "detect", in_the_middle)
    (_, alone), (_, together) = (next(track_faces(iter([room()]), landmarkers=n)) for n in (1, 3))
    assert alone.box == together.box == (36, 36, 54, 54)


def test_idle_landmarkers_share_the_tiles(monkeypatch):
    threads, detect = [], landmarks.detect
    monkeypatch.setattr(landmarks, "detect", lambda *where: (threads.append(threading.get_ident()), detect(*where))[1])
    assert not next(track_faces(iter([room()]), landmarkers=2))[1]
    assert threads.count(threading.get_ident()) == 1  # the picture as a whole
    assert len(threads) > 30 and len(set(threads)) == 3


def test_a_still_face_is_searched_once_a_frame(portrait, monkeypatch):
    calls = []
    detect = landmarks.detect
    monkeypatch.setattr(landmarks, "detect", lambda *rest: (calls.append(threading.current_thread()), detect(*rest))[1])
    frames = [put(room(), portrait, 200, 50)] * 12
    assert all(face for _, face in track_faces(iter(frames), landmarkers=2))
    here = threading.current_thread()
    assert len(calls) <= len(frames) + 4 and sum(thread is not here for thread in calls) >= 8


@pytest.mark.parametrize("which, at", [("largest", 220), ("left", 20), ("right", 460), ("centre", 220)])
def test_the_face_that_was_asked_for_is_followed(portrait, which, at):
    scene = put(put(put(room(), portrait, 20, 60, 0.6), portrait, 220, 50), portrait, 460, 60, 0.6)
    width = portrait.shape[1] * (1 if at == 220 else 0.6)
    for _, face in track_faces(iter([scene] * 3), which=which):
        assert at < middle(face) < at + width
