"""Films of people who cross: what is drawn, what is known of it, and a whole run on a tiny checkpoint."""

import numpy as np
import pytest
from clips import ffmpeg, make_sound
from conftest import portrait, save_video

from latentsync.evaluation import __main__ as command_line
from latentsync.evaluation import crossing
from latentsync.evaluation.conversations import SIDE_HEIGHT, SIDE_WIDTH
from latentsync.evaluation.measures import SAMPLES
from latentsync.media import probe_video

FRAMES = 18  # of a clip
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def clips(tmp_path):
    """A clip of each of two people whom training holds out, and two of a third, in folders of their names."""
    picture = save_video(tmp_path / "picture.mkv", [portrait(number) for number in range(FRAMES)])
    for speaker, pitch in (("s3", 500), ("s7", 700), ("s31", 900), ("s31", 1100)):
        sound = make_sound(tmp_path / f"{pitch}.wav", seconds=FRAMES / 25, source=f"sine=f={pitch}:r=16000")
        (tmp_path / "clips" / speaker).mkdir(parents=True, exist_ok=True)
        path = tmp_path / "clips" / speaker / f"{pitch}.mp4"
        ffmpeg("-i", picture, "-i", sound, "-c:v", "libx264", "-crf", 12, "-c:a", "aac", path)
    return tmp_path / "clips"


def actor(shade: int) -> crossing.Actor:
    """Somebody of one grey level."""
    alpha = np.zeros((SIDE_HEIGHT, SIDE_WIDTH, 1), np.float32)
    alpha[60:, 120:240] = 1
    frames = np.full((crossing.FRAMES, SIDE_HEIGHT, SIDE_WIDTH, 3), shade, np.uint8)
    return crossing.Actor("somebody", frames, alpha, (130.0, 80.0, 100.0, 120.0), np.zeros(crossing.FRAMES))


def test_it_is_known_who_is_seen_whole_in_every_scene():
    people = [actor(201), actor(202)]
    seen = {scene: crossing.draw(people, scene) for scene in crossing.SCENES}
    for frames, _, (front, behind) in seen.values():
        assert frames.shape == (crossing.FRAMES, SIDE_HEIGHT, crossing.WIDTH, 3)
        assert front.all() and behind[0]
    behind = {scene: whole[1] for scene, (_, _, whole) in seen.items()}
    assert behind["apart"].all() and not behind["one leaves"][-1]
    assert behind["cross"][[0, -1]].all() and not behind["cross"][crossing.FRAMES // 2]
    frames, lefts, _ = seen["cross"]
    for number in 0, crossing.FRAMES // 2:
        assert (frames[number, 150, lefts[0, number] + 180] == 201).all()
    assert (frames[0, 150, lefts[1, 0] + 180] == 202).all()
    frames, lefts, whole = seen["one half covered"]
    middle = crossing.FRAMES // 2
    face = frames[middle, 150, lefts[1, middle] + 130 : lefts[1, middle] + 230, 0]
    assert 0.3 < (face == 202).mean() < 0.7 and whole[1, [0, -1]].all()


def test_the_second_voice_is_as_unlike_the_first_as_can_be():
    sound = np.repeat(np.arange(crossing.FRAMES), SAMPLES).astype(np.float32)
    voice = crossing.Voice(sound, np.sin(np.arange(crossing.FRAMES) * 2 * np.pi / 20))
    other = crossing.least_alike(voice, voice)
    assert abs(crossing.correlation_in_step(voice.opening, other.opening)) < 0.02
    late = int(other.wav[0])  # sound and mouth go together
    assert np.array_equal(other.opening, np.roll(voice.opening, -late))
    assert np.array_equal(other.wav, np.roll(sound, -late * SAMPLES))


def test_the_table_of_crossing_has_means_and_the_range_of_every_scene():
    measures = [
        crossing.CrossingMeasures("cross", film, whose, own, -0.1, 0.25, 90, 100)
        for film, own in (("a", 0.6), ("b", 0.8))
        for whose in ("in front", "behind")
    ]
    lines = crossing.crossing_table(measures).splitlines()
    row = "| 2, cross | in front | 0.70 (0.60 to 0.80) | -0.10 (-0.10 to -0.10) | 0.25 (0.25 to 0.25) | 180 of 200 |"
    assert len(lines) == 4 and lines[2] == row


def test_people_who_cross_are_dubbed_and_measured(clips, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(crossing, "SCENES", {"apart": crossing.SCENES["apart"]})
    monkeypatch.setattr(crossing, "FRAMES", FRAMES)
    options = [
        "--voice",
        "s31",
        "--speakers",
        "s3",
        "s7",
        "--pairs",
        1,
        "--steps",
        1,
        "--model",
        checkpoint,
        "--device",
        "cpu",
    ]
    arguments = [str(part) for part in ("crossing", clips, tmp_path / "out", *options)]
    assert command_line.main(arguments) == 2, "two clips are no two voices of two sentences"
    assert "name another --voice" in capsys.readouterr().err
    monkeypatch.setattr(command_line, "SENTENCES", 1)
    assert command_line.main(arguments) == 0
    assert "| 1, apart | behind |" in (tmp_path / "out" / "crossing.md").read_text()
    assert f"{FRAMES} of {FRAMES} |" in capsys.readouterr().out
    assert probe_video(tmp_path / "out" / "apart-s3-and-s7-synced.mp4").n_frames == FRAMES


def test_people_who_cross_are_two(clips, tmp_path, capsys):
    assert command_line.main(["crossing", str(clips), str(tmp_path / "out"), "--speakers", "s3"]) == 2
    assert "give two people or more" in capsys.readouterr().err
