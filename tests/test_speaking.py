"""Only who speaks is painted: who it is, when, and in a whole run."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import ffmpeg, make_sound
from test_people import LEFT, ONE, OTHER, RIGHT, scene

from latentsync import SPEAKERS, turns
from latentsync.__main__ import make_parser
from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import load_models
from latentsync.errors import UserError
from latentsync.evaluation import __main__ as evaluation
from latentsync.evaluation.conversations import LISTENERS, converse, draw, read_sentence, write_film
from latentsync.hooks import NO_HOOKS, Hooks, RunHooks, StopEarly
from latentsync.media import probe_video, read_audio, read_frames
from latentsync.people import everyone_in
from latentsync.pipeline import lipsync
from latentsync.prepared.making import prepare_film
from latentsync.progress import ProgressBars, ProgressLines
from latentsync.settings import Settings
from latentsync.speaking import decide, on_grid, speech_odds
from latentsync.turns import find_turns, make_turns
from optim.serving.form import SETTINGS, Dropdown, parse_who

CPU = torch.device("cpu")
GRID = Path(__file__).resolve().parents[2] / "shared" / "data" / "grid"
FRAMES = 60  # of `film`
pytestmark = pytest.mark.usefixtures("one_thread")


def say(path: Path, frames: list[np.ndarray], sound: str = "sine=f=300:r=16000") -> Path:
    """A film of 25 frames a second with a sound of its own."""
    wav = make_sound(path.with_suffix(".wav"), seconds=len(frames) / 25, source=sound)
    write_film(path, np.stack(frames), read_audio(wav))
    return path


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Two people side by side, who move a little."""
    frames = [scene((ONE, (LEFT[0] + t % 4, 10)), (OTHER, (RIGHT[0] - t % 3, 10))) for t in range(FRAMES)]
    return say(tmp_path_factory.mktemp("speaking") / "two.mp4", frames)


@pytest.fixture(scope="module")
def voice(tmp_path_factory):
    return make_sound(tmp_path_factory.mktemp("voice") / "voice.wav", seconds=FRAMES / 25, source="sine=f=440:r=16000")


@pytest.fixture
def speakers(monkeypatch):
    """Let these speak, in place of whom the judge finds: the number of a person for every frame."""

    def let(*parts: tuple[int, int]) -> None:
        speaker = np.concatenate([np.full(count, who) for who, count in parts])
        monkeypatch.setattr(turns, "who_speaks", lambda judge, mouths, wav: speaker[: len(mouths[0])])

    return let


def differences(film: Path, output: Path) -> np.ndarray:
    """By how much the left and the right half of each frame differ from the film's, (n, 2), in grey levels at most."""
    before, after = (np.stack(list(read_frames(probe_video(path)))).astype(int) for path in (film, output))
    difference = np.abs(before - after).mean(-1)
    half = difference.shape[2] // 2
    return np.stack([difference[..., :half].max((1, 2)), difference[..., half:].max((1, 2))], 1)


# ---- who speaks


def odds_of(*parts: tuple[tuple[float, ...], int]) -> np.ndarray:
    return np.concatenate([np.repeat(np.array(odds)[:, None], count, 1) for odds, count in parts], axis=1)


def test_the_likeliest_person_speaks_and_nobody_in_a_pause():
    odds = odds_of(((4.0, -4.0), 50), ((-1.0, -1.0), 30), ((-4.0, 4.0), 50))
    speech = np.repeat([True, False, True], [50, 30, 50])
    assert np.array_equal(decide(odds, speech), np.repeat([0, -1, 1], [50, 30, 50]))


def test_a_short_pause_belongs_to_the_turn_and_a_moment_of_doubt_ends_none():
    odds = odds_of(((4.0, -4.0), 50), ((0.5, 1.5), 4), ((4.0, -4.0), 50))
    speech = np.ones(104, bool)
    speech[20:25] = False
    assert (decide(odds, speech) == 0).all()


def test_a_voice_from_outside_the_picture_is_nobody_s():
    assert (decide(np.full((2, 100), -2.0), np.ones(100, bool)) == -1).all()


def test_a_person_who_is_not_seen_does_not_speak():
    assert (decide(np.full((1, 50), np.nan), np.ones(50, bool)) == -1).all()
    assert len(decide(np.empty((1, 0)), np.empty(0, bool))) == 0


def test_only_a_mouth_in_step_with_the_sound_speaks():
    rng = np.random.default_rng(0)
    sounds = rng.standard_normal((200, 96)).astype(np.float32)
    sounds /= np.linalg.norm(sounds, axis=1, keepdims=True)
    late = np.roll(sounds, 6, axis=0)
    unseen = sounds.astype(np.float16).copy()
    unseen[50:150] = np.nan
    own, shifted, gone = (speech_odds(mouths.astype(np.float16), sounds) for mouths in (sounds, late, unseen))
    assert (own[20:180] > 0).all() and (shifted[20:180] < 0).all()
    assert np.isnan(gone[95:105]).all() and (gone[:40] > 0).all()


@pytest.mark.parametrize("rate", [Fraction(20), Fraction(24000, 1001), Fraction(25), Fraction(30), Fraction(60)])
def test_frames_of_any_rate_lie_on_the_grid(rate):
    frames = [(np.array(number), ()) for number in range(int(4 * rate))]
    times = np.array([float(int(frame) / rate) for frame, _ in on_grid(frames, rate)])
    assert np.abs(times - np.arange(len(times)) / 25).max() <= float(0.5 / rate) + 1e-9
    assert len(times) == pytest.approx(100, abs=2)


# ---- who is painted


def test_a_mouth_comes_and_goes_where_nobody_speaks(film):
    sighted = everyone_in(read_frames(probe_video(film)), Fraction(25))
    speaker = np.repeat([-1, 0, -1, 1, 0], [20, 30, 4, 20, 20])
    made = make_turns([], sighted, speaker, Fraction(25), 94)
    assert np.array_equal(made.speaker[20:50], np.zeros(30)) and (made.opacity[20:50] == 1).all()
    rising = made.opacity[15:20]
    assert (made.speaker[15:20] == 0).all() and (np.diff(rising) > 0).all() and made.speaker[14] == -1
    assert set(made.speaker[50:54].tolist()) <= {0, 1} and made.speaker[54] == 1 and made.speaker[74] == 0
    assert [(turn["from"], turn["to"]) for turn in made.summary] == [(0.8, 2.0), (2.16, 2.96), (2.96, 3.76)]
    assert made.is_silent(0) and made.is_silent(1000) and not made.is_silent(30)


def test_turns_last_as_long_at_another_rate(film):
    sighted = everyone_in(read_frames(probe_video(film)), Fraction(25))
    made = make_turns([], sighted, np.repeat([-1, 0, -1], [25, 50, 25]), Fraction(50), 200)
    whole = np.flatnonzero((made.speaker == 0) & (made.opacity == 1))
    assert (whole[0], whole[-1]) == pytest.approx((50, 149), abs=1)


def test_everybody_in_a_film_is_found_once_also_after_a_cut():
    both = scene((ONE, LEFT), (OTHER, RIGHT))
    cut = scene((OTHER, LEFT), shade=160)
    found = everyone_in([both] * 30 + [cut] * 40, Fraction(25))
    assert [(person.number, person.first.centre[0] < 240) for person in found] == [(0, True), (0, False)]
    assert found[1].sightings > found[0].sightings
    assert everyone_in([scene()] * 30, Fraction(25)) == []


def test_only_who_speaks_is_painted(film, voice, models, speakers, tmp_path):
    speakers((-1, 8), (0, 12), (-1, 14), (1, 16), (-1, 10))
    report = lipsync(film, voice, tmp_path / "out.mp4", models, Settings(steps=1, crf=0, face="speaking"))
    left, right = differences(film, tmp_path / "out.mp4").T
    assert left[8:20].min() > 12 > 6 >= left[30:].max()
    assert right[34:50].min() > 12 > 6 >= right[:25].max()
    assert max(left[0], right[0], left[27], right[27]) <= 6
    assert report.frames == FRAMES and report.frames_without_face == 0
    assert [(turn["from"], turn["to"]) for turn in report.turns] == [(0.32, 0.8), (1.36, 2.0)]
    assert "for 0.5 s" in report.remarks[-1] and report.turns[0]["face"] in report.remarks[-1]


def test_a_model_with_a_face_of_its_own_leaves_who_is_silent_alone(film, voice, speakers, tmp_path):
    models = load_models(resolve_model("demo", CPU), CPU, torch.float32)
    speakers((0, 16), (-1, 20), (1, 16), (-1, 8))
    report = lipsync(film, voice, tmp_path / "out.mp4", models, Settings(steps=1, crf=0, face="speaking"))
    left, right = differences(film, tmp_path / "out.mp4").T
    assert report.frames == FRAMES and report.frames_without_face == 0
    assert left[22:].max() <= 6 < left[:16].max() and right[:30].max() <= 6 < right[36:52].max()


def test_one_person_alone_is_painted_only_while_speaking(voice, models, speakers, tmp_path):
    frames = [scene((ONE, (LEFT[0] + t % 4, 10))) for t in range(40)]
    film = say(tmp_path / "one.mp4", frames)
    speakers((0, 20), (-1, 20))
    lipsync(film, voice, tmp_path / "out.mp4", models, Settings(steps=1, crf=0, face="speaking", end=1.6))
    before, after = (list(read_frames(probe_video(path))) for path in (film, tmp_path / "out.mp4"))
    changes = [np.abs(one.astype(int) - other).mean(-1).max() for one, other in zip(before, after, strict=False)]
    assert min(changes[:20]) > 12 > 6 >= max(changes[27:40])


def test_a_film_shorter_than_the_voice_and_a_short_one(film, voice, models, speakers, tmp_path):
    speakers((0, 60))
    settings = Settings(steps=1, face="speaking", end=0.2)  # 5 frames, played to and fro
    report = lipsync(film, voice, tmp_path / "out.mp4", models, settings)
    assert report.frames == FRAMES and report.frames_without_face == 0


def test_a_resumed_run_gives_the_same(film, voice, models, speakers, tmp_path):
    speakers((0, 24), (-1, 8), (1, 28))
    settings = Settings(steps=1, face="speaking")

    def run(output, hooks=NO_HOOKS):
        return lipsync(film, voice, tmp_path / output, models, settings, hooks, segment_frames=16)

    run("whole.mp4")

    def stop(stage, done, total):
        if stage == "writing" and done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("out.mp4", Hooks(on_progress=stop))
    assert run("out.mp4").resumed_from in (16, 32, 48)
    frames = (list(read_frames(probe_video(tmp_path / name))) for name in ("whole.mp4", "out.mp4"))
    assert all(np.array_equal(one, other) for one, other in zip(*frames, strict=True))


@pytest.mark.parametrize("error", [KeyboardInterrupt, StopEarly])
def test_it_can_be_cancelled_while_it_finds_who_speaks(film, voice, models, tmp_path, error):
    seen = []

    def stop(stage, done, total):
        seen.append((stage, done, total))
        if done == 70:
            raise error

    with pytest.raises(error):
        lipsync(film, voice, tmp_path / "out.mp4", models, Settings(face="speaking"), Hooks(on_progress=stop))
    assert seen == [(SPEAKERS, done, 2 * FRAMES) for done in range(1, 71)]
    assert list(tmp_path.iterdir()) == []


# ---- what is refused


def test_a_film_without_sound_is_refused(film, voice, models, tmp_path):
    silent = tmp_path / "silent.mp4"
    ffmpeg("-i", film, "-an", "-c", "copy", silent)
    with pytest.raises(UserError, match="no sound of its own"):
        lipsync(silent, voice, tmp_path / "out.mp4", models, Settings(face="speaking"))


def test_a_film_in_which_nobody_speaks_or_is_seen_is_refused(film, models, speakers, tmp_path):
    speakers((-1, FRAMES))
    with pytest.raises(UserError, match="Nobody is seen speaking"):
        find_turns(probe_video(film), FRAMES, RunHooks(NO_HOOKS))
    empty = say(tmp_path / "empty.mp4", [scene()] * 15)
    with pytest.raises(UserError, match="shows no face"):
        find_turns(probe_video(empty), 15, RunHooks(NO_HOOKS))


def test_what_does_not_go_with_it_is_refused(film, voice, models, tmp_path):
    def run(settings, **options):
        lipsync(film, voice, tmp_path / "out.mp4", models, settings, **options)

    with pytest.raises(UserError, match="leave the other faces out"):
        Settings(face="left", other_faces=("speaking",))
    with pytest.raises(UserError, match="leave out --at and --prepared"):
        run(Settings(face="speaking", at=0.4))
    with pytest.raises(UserError, match="prepared for one face"):
        prepare_film(film, tmp_path / "prepared", models, Settings(face="speaking"))


def test_the_command_line_and_the_page_take_the_word(film, voice, tmp_path):
    args = make_parser().parse_args([str(film), str(voice), "-o", str(tmp_path / "out.mp4"), "--face", "speaking"])
    assert args.face == ["speaking"] and parse_who("speaking") == "speaking"
    face = next(setting for setting in SETTINGS if setting.name == "face")
    assert isinstance(face.control, Dropdown) and face.control.others


def test_progress_shows_the_search_and_then_the_run(capfd):
    for progress in (ProgressBars(), ProgressLines()):
        progress(SPEAKERS, 10, 10)
        progress("faces", 3, 5)
        progress("writing", 2, 5)
        progress.close()
        shown = capfd.readouterr().err
        assert SPEAKERS in shown and "faces" in shown and "writing" in shown


# ---- real clips


@pytest.fixture(scope="module")
def sentences():
    if not GRID.is_dir():
        pytest.skip("the clips of real people are not part of the project")
    clips = [next(iter(sorted((GRID / speaker).glob("*.mp4")))) for speaker in ("s25", "s34")]
    return [[read_sentence(clip)] for clip in clips]


@pytest.mark.parametrize("listeners", LISTENERS)
def test_real_people_are_found_when_they_speak(sentences, listeners, tmp_path):
    script = converse(sentences, 2, listeners, seed=1)
    path = tmp_path / "film.mp4"
    write_film(path, draw(script, listeners != "still", seed=1), script.wav)
    made = find_turns(probe_video(path), len(script.speaker), RunHooks(NO_HOOKS))
    assert len(made.people) == 2
    speaking = script.speaker >= 0
    n = len(made.speaker)
    assert (made.speaker == script.speaker[:n])[speaking[:n]].mean() > 0.9
    silent = np.convolve(speaking, np.ones(41), "same") == 0  # 0.8 s away from all speech
    assert (made.speaker[silent[:n]] == -1).mean() > 0.8


def test_the_measure_writes_a_table(tmp_path, capsys):
    if not GRID.is_dir():
        pytest.skip("the clips of real people are not part of the project")
    options = ["--speakers", "s7", "s25", "s34", "--two", "1", "--three", "0", "--device", "cpu"]
    assert evaluation.main(["speaking", str(GRID), str(tmp_path), *options]) == 0
    scores = json.loads((tmp_path / "speaking.json").read_text())
    assert {score["listeners"] for score in scores} == set(LISTENERS)
    assert "judge of sync" in capsys.readouterr().out
