"""Several people of one film: who is meant, who is followed, and a voice for each."""

from dataclasses import replace
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch
from clips import make_sound
from conftest import save_video
from skimage.data import astronaut
from test_cli import refuse

from latentsync.choice import FacePoint, parse_face
from latentsync.errors import UserError
from latentsync.faces import track_people
from latentsync.following import FaceFollower, Person, Timing
from latentsync.hooks import NO_HOOKS, Hooks
from latentsync.landmarks import LandmarkerPool, face_reader, open_pool
from latentsync.lookahead import LookaheadFrames
from latentsync.looks import ALIKE, look_difference, look_of
from latentsync.media import probe_audio, probe_video, read_audio, read_frames
from latentsync.media.voices import mix_voices
from latentsync.people import everyone_in, find_people
from latentsync.pipeline import lipsync
from latentsync.settings import Settings
from latentsync.shots import CutDetector

CPU = torch.device("cpu")
WIDTH, HEIGHT = 480, 240
LEFT, RIGHT = (20, 10), (260, 10)  # upper left corners of the two people
ONE = np.ascontiguousarray(astronaut()[0:230, 115:315])  # public domain, from scikit-image
OTHER = np.ascontiguousarray(np.clip(cv2.flip(ONE, 1)[..., ::-1] * 0.55 + 10, 0, 255).astype(np.uint8))
RELATIVE = np.clip(cv2.flip(ONE, 1) * np.array([0.75, 0.85, 1.0]), 0, 255).astype(np.uint8)  # looks much like ONE
pytestmark = pytest.mark.usefixtures("one_thread")


def scene(*people: tuple[np.ndarray, tuple[int, int]], shade: int = 100) -> np.ndarray:
    """A picture of people at places; later ones stand before earlier ones."""
    coarse = np.random.default_rng(shade).integers(shade - 40, shade + 40, (9, 16, 3), dtype=np.uint8)
    picture = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    for person, (x, y) in people:
        x0, x1 = max(x, 0), min(x + person.shape[1], WIDTH)
        if x0 < x1:
            picture[y : y + person.shape[0], x0:x1] = person[:, x0 - x : x1 - x]
    return picture


def middles(frames: list[np.ndarray], *people: Person) -> np.ndarray:
    """Horizontal places of the faces (frames, people), NaN where none is found."""
    found = track_people(iter(frames), people, 1)
    return np.array(
        [[np.nan if face is None else (face.box[0] + face.box[2]) / 2 for face in faces] for _, faces in found]
    )


def pair() -> tuple[Person, Person]:
    return Person("left", recognised=True), Person("right", recognised=True)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Two people side by side, who move a little, 40 frames."""
    frames = [scene((ONE, (LEFT[0] + t % 4, 10)), (OTHER, (RIGHT[0] - t % 3, 10))) for t in range(40)]
    return save_video(
        tmp_path_factory.mktemp("people") / "two.mp4", frames, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", 6
    )


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voices")
    return (
        make_sound(folder / "low.wav", seconds=1.6, source="sine=f=330:r=16000"),
        make_sound(folder / "high.wav", seconds=1.2, source="sine=f=880:r=16000"),
    )


def test_looks_tell_two_people_apart():
    with face_reader() as read:
        looks = [
            look_of(picture, landmarks)
            for picture in (ONE, OTHER, np.clip(ONE * 0.9, 0, 255).astype(np.uint8))
            if (landmarks := read(picture)) is not None
        ]
    one, other, darker = looks
    assert look_difference(one, darker) < ALIKE < look_difference(one, other)


def test_each_of_two_people_is_followed():
    places = middles([scene((ONE, LEFT), (OTHER, RIGHT))] * 12, *pair())
    assert np.isfinite(places).all()
    assert (places[:, 0] < WIDTH / 2).all() and (places[:, 1] > WIDTH / 2).all()


def test_an_eye_that_is_taken_for_a_face_is_nobody(monkeypatch):
    """It lies farther to the right than the middle of the face that it belongs to."""
    real_all, real, parts = LandmarkerPool.detect_all, LandmarkerPool.detect, []

    def detect_all(self, frame, boxes, *size):
        faces = real_all(self, frame, boxes, *size)
        for face in faces:
            eye = face.centre + (0.25 * face.size, 0)
            parts.append(replace(face, landmarks=eye + 0.3 * (face.landmarks - face.centre)))
        return faces + parts[-len(faces) :] if faces else faces

    def detect(self, frame, box, *size):
        if box[2] - box[0] > 80:
            return real(self, frame, box, *size)
        return [part for part in parts if box[0] < part.centre[0] < box[2] and box[1] < part.centre[1] < box[3]]

    frames = [scene((ONE, LEFT), (OTHER, RIGHT))] * 12
    wanted, everyone = middles(frames, *pair()), everyone_in(frames, Fraction(25))
    monkeypatch.setattr(LandmarkerPool, "detect_all", lambda *given: detect_all(*given)[::-1])
    monkeypatch.setattr(LandmarkerPool, "detect", detect)
    assert np.allclose(middles(frames, *pair()), wanted, atol=2)
    seen = [person.first.centre for person in everyone_in(frames, Fraction(25))]
    assert len(seen) == 2 and np.allclose(seen, [person.first.centre for person in everyone], atol=2)


def test_people_who_cross_keep_their_owner():
    path = np.linspace(0, 1, 50)
    left, right = LEFT[0], RIGHT[0]
    frames = [
        scene((OTHER, (int(right - u * (right - left)), 10)), (ONE, (int(left + u * (right - left)), 10))) for u in path
    ]
    places = middles(frames, *pair())
    front, back = places.T
    assert np.isfinite(front).all() and (np.diff(front) > -5).all()
    assert np.isfinite(back[:10]).all() and np.isfinite(back[-5:]).all(), "found again behind the other"
    assert (back[:10] > WIDTH / 2).all() and (back[-5:] < WIDTH / 2).all()


def passing(front: np.ndarray, back: np.ndarray, walk: np.ndarray) -> list[np.ndarray]:
    """Frames in which the head of `front` passes before `back` from left to right; walk: 0 to 1, the share of the way.

    Only the head covers what is behind it, so both faces are seen side by side, half, and not at all.
    """
    head = cv2.ellipse(np.zeros(front.shape[:2], np.uint8), (110, 123), (55, 68), 0, 0, 360, 1, -1)[..., None]
    frames = []
    for share in walk:
        x, way = int(LEFT[0] + share * (RIGHT[0] - LEFT[0])), int(share * (RIGHT[0] - LEFT[0]))
        picture = scene((back, (RIGHT[0] - way, 10)))
        part = picture[10 : 10 + len(front), x : x + front.shape[1]]
        part[:] = np.where(head, front, part)
        frames.append(picture)
    return frames


def test_a_person_who_is_found_again_was_never_the_one_who_passed_before_them():
    front, back = middles(passing(OTHER, ONE, np.linspace(0, 1, 36)), *pair()).T
    assert np.isfinite(front).all() and np.isfinite(back).sum() > 20
    assert np.nanmin(np.abs(front - back)) > 25, "faces are 92 pixels wide"


@pytest.mark.parametrize("recognised", [False, True])
@pytest.mark.parametrize("passer", [OTHER, RELATIVE], ids=["unlike", "alike"])
def test_one_face_alone_is_not_lost_to_somebody_who_passes_before_it(passer, recognised):
    way = (np.linspace(0, 1, 36) * (RIGHT[0] - LEFT[0])).astype(int)
    frames = [scene((ONE, (RIGHT[0] - x, 10)), (passer, (LEFT[0] + x, 10))) for x in way]
    (places,) = middles(frames, Person("right", recognised=recognised)).T
    assert np.isfinite(places[:8]).all() and np.isfinite(places[-5:]).all()
    assert np.nanmax(np.abs(places - (RIGHT[0] + 110 - way))) < 30, "faces are 92 pixels wide"


def test_nobody_takes_the_place_of_a_person_who_was_pointed_at_and_leaves(tmp_path):
    both, alone = scene((RELATIVE, LEFT), (ONE, RIGHT)), scene((RELATIVE, LEFT))
    film = save_video(tmp_path / "film.mp4", [both] * 10 + [alone] * 45, "-c:v", "libx264", "-crf", 6)
    info = probe_video(film).at_choice("source")
    people = find_people(info, Settings(face=f"{RIGHT[0] + 110},123"))
    places = middles(list(read_frames(info)), *people)[:, 0]
    assert np.isfinite(places[:8]).all() and np.isnan(places[12:]).all()


@pytest.mark.parametrize("unlike, passes", [(0.1, False), (3.0, True)])
def test_who_looks_the_same_as_the_person_is_no_passer(unlike, passes):
    """Of two who look the same, now the one and now the other is nearer to what was seen of them."""
    look = np.full((16, 3), 50.0, np.float32)
    look[:8, 0] += 20.0
    other = look + unlike * np.linspace(-ALIKE, ALIKE, 16, dtype=np.float32)[:, None]
    person = Person(look=look, recognised=True)
    person.add_passer(other)
    with open_pool(1) as pool:
        follower = FaceFollower(LookaheadFrames([], pool), pool, person, CutDetector(), Timing.at(Fraction(25)), 0)
    assert follower.is_passer(other, continued=False) == passes
    assert not follower.is_passer(look, continued=False)


def test_people_are_recognised_after_a_cut():
    before = [scene((ONE, LEFT), (OTHER, RIGHT))] * 14
    after = [scene((ONE, RIGHT), (OTHER, LEFT), shade=180)] * 14
    places = middles(before + after, *pair())
    assert (places[:12, 0] < WIDTH / 2).all() and (places[:12, 1] > WIDTH / 2).all()
    assert (places[-8:, 0] > WIDTH / 2).all() and (places[-8:, 1] < WIDTH / 2).all()


def test_nobody_takes_the_place_of_a_person_who_leaves():
    both, alone = scene((ONE, LEFT), (OTHER, RIGHT)), scene((OTHER, RIGHT))
    places = middles([both] * 10 + [alone] * 40, *pair())
    assert np.isnan(places[-30:, 0]).all() and (places[:, 1] > WIDTH / 2).all()


def test_a_person_who_is_alone_in_the_right_half_is_not_the_left_one():
    places = middles([scene((OTHER, RIGHT))] * 8, *pair())
    assert np.isnan(places[:, 0]).all() and np.isfinite(places[:, 1]).all()


@pytest.mark.parametrize("text, wanted", [("12,30", FacePoint(12, 30)), ("1.5,2@0.25", FacePoint(1.5, 2, 0.25))])
def test_a_face_can_be_named_by_a_point(text, wanted):
    assert parse_face(text) == wanted


@pytest.mark.parametrize(
    "text", ["", "middle", "1", "1,2@", "-1,2", "1,2@-3", "nan,1", "1,2@inf", "1e3,2", "١,٢", "1,2x"]
)
def test_what_names_no_face_is_refused(text):
    with pytest.raises(UserError, match=r"no face '.*' to choose"):
        Settings(face=text) if text else parse_face(text)


@pytest.mark.parametrize("seconds", [0, 1.0])
def test_a_point_finds_the_person_and_follows_it(film, seconds):
    info = probe_video(film)
    (person,) = find_people(info, Settings(face=f"{RIGHT[0] + 100},90@{seconds}"))
    found = [faces[0] for _, faces in track_people(read_frames(info), [person], 1)]
    assert all(face is not None and face.box[0] > WIDTH / 2 for face in found)


@pytest.mark.parametrize(
    "faces, words",
    [
        (("5,235",), "shows no face near 5,235 at 0 s"),
        (("120,90@60",), "has no picture at 60 s"),
        (("120,90", "125,95"), "same face"),
        (("left", "left"), "asked for twice"),
    ],
)
def test_faces_that_are_not_there_are_refused(film, faces, words):
    with pytest.raises(UserError, match=words):
        find_people(probe_video(film), Settings(face=faces[0], other_faces=faces[1:]))


def changed(film, output) -> tuple[float, float]:
    """By how much the left and the right half differ from the film's, in grey levels, at most in a frame."""
    before, after = (np.stack(list(read_frames(probe_video(path)))).astype(int) for path in (film, output))
    difference = np.abs(before[: len(after)] - after[: len(before)]).mean(-1)
    return difference[..., : WIDTH // 2].max(), difference[..., WIDTH // 2 :].max()


def test_only_the_face_that_is_asked_for_is_painted(film, voices, models, tmp_path):
    settings = Settings(steps=1, crf=0, face=f"{RIGHT[0] + 100},90")
    lipsync(film, voices[1], tmp_path / "out.mp4", models, settings)
    left, right = changed(film, tmp_path / "out.mp4")
    assert left <= 4 < 12 < right


def test_every_face_gets_its_voice_and_the_voices_are_mixed(film, voices, models, tmp_path):
    settings = Settings(steps=1, crf=0, face="left", other_faces=("right",))
    report = lipsync(film, voices[0], tmp_path / "out.mp4", models, settings, other_voices=[voices[1]])
    assert report.frames == 40 and report.frames_without_face == 0 and report.remarks == []
    left, right = changed(film, tmp_path / "out.mp4")
    assert left > 12 and right > 12
    # Each face as if it alone had been asked for: the other's voice changes nothing.
    lipsync(film, voices[0], tmp_path / "left.mp4", models, Settings(steps=1, crf=0, face="left"))
    both, alone = (np.stack(list(read_frames(probe_video(tmp_path / name)))) for name in ("out.mp4", "left.mp4"))
    assert np.array_equal(both[:40, :, : WIDTH // 2 - 20], alone[:40, :, : WIDTH // 2 - 20])
    sound = read_audio(tmp_path / "out.mp4")
    assert len(sound) == pytest.approx(1.6 * 16000, abs=700)
    spectrum = np.abs(np.fft.rfft(sound[:16000]))
    assert min(spectrum[325:335].max(), spectrum[875:885].max()) > 20 * np.median(spectrum)


def test_a_voice_whose_face_is_never_shown_is_pointed_out(voices, models, tmp_path):
    alone = save_video(tmp_path / "one.mp4", [scene((OTHER, RIGHT))] * 6, "-c:v", "libx264", "-pix_fmt", "yuv420p")
    settings = Settings(steps=1, face="left", other_faces=("right",))
    report = lipsync(alone, voices[0], tmp_path / "out.mp4", models, settings, other_voices=[voices[1]])
    (remark,) = report.remarks
    assert "No frame shows the face 'left'" in remark and str(tmp_path) not in remark


def test_another_sound_can_be_heard(film, voices, models, tmp_path):
    music = make_sound(tmp_path / "music.wav", seconds=1.0, source="sine=f=600:r=16000")
    report = lipsync(film, voices[0], tmp_path / "out.mp4", models, Settings(steps=1), sound=music)
    assert report.frames == 25
    spectrum = np.abs(np.fft.rfft(read_audio(tmp_path / "out.mp4")[:16000]))
    assert abs(int(spectrum.argmax()) - 600) <= 2


@pytest.mark.parametrize("seconds", [1.6, 2.8])
def test_a_resumed_run_of_two_faces_gives_the_same(film, voices, models, tmp_path, seconds):
    """Also where the film is shorter than the voices, and played backward."""
    long = make_sound(tmp_path / "long.wav", seconds=seconds, source="sine=f=330:r=16000")
    settings = Settings(steps=1, face="left", other_faces=("right",))

    def run(output, hooks=NO_HOOKS):
        return lipsync(
            film, long, tmp_path / output, models, settings, hooks, segment_frames=16, other_voices=[voices[1]]
        )

    whole = run("whole.mp4")

    def stop(stage, done, total):
        if stage == "writing" and done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("out.mp4", Hooks(on_progress=stop))
    resumed = run("out.mp4")
    assert resumed.resumed_from in (16, 32) and resumed.frames == whole.frames == round(25 * seconds)
    frames = (list(read_frames(probe_video(tmp_path / name))) for name in ("whole.mp4", "out.mp4"))
    assert all(np.array_equal(one, other) for one, other in zip(*frames, strict=True))


def test_a_mix_of_loud_voices_does_not_clip(tmp_path):
    loud = [make_sound(tmp_path / f"{i}.wav", seconds=0.5, source="aevalsrc=sin(2*PI*440*t):s=16000") for i in range(3)]
    mix_voices([probe_audio(path) for path in loud], tmp_path / "mixed.wav")
    mixed = read_audio(tmp_path / "mixed.wav")
    assert 0.5 < np.abs(mixed).max() <= 1.0
    assert len(mixed) == pytest.approx(8000, abs=2)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--face", "left", "--face", "right"], "need a recording each"),
        (["--face", "left", "--audio", "{low}"], "were both given"),
    ],
)
def test_options_that_do_not_pair_up_are_refused(film, voices, tmp_path, capfd, options, words):
    options = [option.format(low=voices[0]) for option in options]
    assert words in refuse(capfd, [film, voices[0], "-o", tmp_path / "out.mp4", *options])


def test_a_face_without_a_voice_and_a_film_without_one_are_refused(film, voices, tmp_path, capfd):
    faces = ["--face", "left", "--face", "right", "--audio", voices[0]]
    assert "2 --face and 1 --audio" in refuse(capfd, [film, "-o", tmp_path / "out.mp4", *faces])
    assert "There is no recording" in refuse(capfd, [film, "-o", tmp_path / "out.mp4"])
