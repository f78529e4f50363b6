"""Part of a film, and a voice that is laid into a longer one: which frames are shown and painted, and what is heard."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import ffmpeg, make_sound
from conftest import SIDE, one_person, portrait
from test_cli import refuse
from test_rates import CELL, decibels, number_of, numbered, save
from test_resume import SEGMENT, hashes, interrupted
from test_sync import offsets, rises

from latentsync import aligning
from latentsync.__main__ import main
from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import load_models
from latentsync.errors import UserError
from latentsync.faces import track_faces
from latentsync.media import probe_audio, probe_video, read_audio, read_frames, read_frames_looped
from latentsync.options import clock_time
from latentsync.pipeline import Hooks, StopEarly, lipsync
from latentsync.settings import Settings

CPU = torch.device("cpu")
X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-crf", 8, "-g", 12)
RATES = ("25", "30000/1001")
FLASH = 5  # frames
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=RATES)
def film(request, tmp_path_factory) -> tuple[Path, Fraction]:
    """Four seconds of a face with its frames numbered along the top; at every second a corner flashes, and a beep of
    880 Hz sounds in stereo."""
    rate = Fraction(request.param)
    count, folder = int(4 * rate), tmp_path_factory.mktemp("film")
    frames = []
    for number in range(count):
        frame = numbered(portrait(number), number)
        second = round(number / rate)
        shown = 0 <= number - round(second * rate) < FLASH
        frame[-16:, :16] = 255 if shown else 0
        frames.append(frame)
    silent = save(folder / "silent.mp4", frames, request.param, *X264)
    beep = "0.5*sin(880*2*PI*t)*lt(mod(t,1),0.2)"
    beeps = f"aevalsrc='{beep}|{beep}':s=48000:d={float(count / rate)}"
    ffmpeg("-i", silent, "-f", "lavfi", "-i", beeps, "-c:v", "copy", "-c:a", "aac", "-b:a", "256k", folder / "film.mp4")
    return folder / "film.mp4", rate


def at_rate(path: Path, rate: Fraction):
    return probe_video(path).at(rate)


def frames_of(path: Path, rate: Fraction) -> list[np.ndarray]:
    return list(read_frames(at_rate(path, rate)))


# ---- times


@pytest.mark.parametrize("text, seconds", [("12", 12), ("12.25", 12.25), ("1:15.5", 75.5), ("0:01:15.5", 75.5)])
def test_times_are_seconds_or_a_clocks(text, seconds):
    assert clock_time(text) == seconds


@pytest.mark.parametrize("option", ["--from", "--to", "--at"])
@pytest.mark.parametrize("text", ["x", "-1", "nan", "inf", "1:", ":1", "1:2:3:4", "1e3", "١"])
def test_what_is_no_time_is_refused(capsys, option, text):
    with pytest.raises(SystemExit) as caught:
        main(["a.mp4", "b.wav", "-o", "c.mp4", f"{option}={text}"])
    assert caught.value.code == 2 and option in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{"start": -1.0}, {"end": float("nan")}, {"at": float("inf")}, {"at_sound": "x"}])
def test_settings_refuse_impossible_times(settings):
    with pytest.raises(UserError):
        Settings(**settings)


@pytest.mark.parametrize(
    "options, words",
    [
        (("--from", "4"), "lasts 0.96 s"), (("--from", "0.5", "--to", "0.5"), "has no frame"),
        (("--at", "1"), "lasts 0.96 s"), (("--from", "0.8", "--at", "0.5"), "from --from on"),
    ],
)  # fmt: skip
def test_a_time_outside_of_the_film_is_refused(talking, voice, tmp_path, capfd, options, words):
    assert words in refuse(capfd, [talking, voice, "-o", tmp_path / "o.mp4", *options])


@pytest.mark.parametrize("options", [("--from", "1"), ("--to", "1"), ("--at", "0")])
def test_a_picture_has_no_times(talking, voice, tmp_path, capfd, options):
    ffmpeg("-i", talking, "-frames:v", 1, tmp_path / "a.png")
    assert "is a picture" in refuse(capfd, [tmp_path / "a.png", voice, "-o", tmp_path / "o.mp4", *options])


# ---- part of a film


def test_a_part_has_the_frames_that_the_film_has_there(film):
    path, rate = film
    info, whole = at_rate(path, rate), frames_of(path, rate)
    for start, end in ((0.0, 1.0), (1.2, 2.5), (2.0, None), (3.0, 99.0), (0.04, 0.08)):
        part = info.between(start, end)
        first = round(start * rate)
        stop = len(whole) if end is None or end > 4 else round(end * rate)
        found = list(read_frames(part))
        assert [number_of(frame) for frame in found] == list(range(first, stop)) and part.n_frames == len(found)
        assert all((one == other).all() for one, other in zip(found, whole[first:stop], strict=True))


@pytest.mark.parametrize("limit", [4, 100])
def test_a_part_is_played_forward_and_backward(film, monkeypatch, limit):
    monkeypatch.setattr("latentsync.media.reading.SEGMENT_FRAMES", limit)
    path, rate = film
    part = at_rate(path, rate).between(1.0, 1.5)
    first, n = round(rate), round(1.5 * rate) - round(rate)
    forward = list(range(first, first + n))
    shown = [number_of(frame) for _, frame in read_frames_looped(part, 3 * n)]
    assert shown == forward + forward[::-1] + forward


def test_a_part_gives_the_result_of_a_film_that_was_cut_before(film, models, voice, tmp_path):
    path, rate = film
    first, stop = round(1.0 * rate), round(1.4 * rate)
    frames = frames_of(path, rate)[first:stop]
    cut = save(tmp_path / "cut.mkv", frames, str(rate), "-c:v", "ffv1", "-pix_fmt", "bgr0")
    part = Settings(steps=1, start=1.0, end=1.4)
    report = lipsync(path, voice, tmp_path / "part.mkv", models, part)
    lipsync(cut, voice, tmp_path / "out.mkv", models, Settings(steps=1))
    found, wanted = (frames_of(tmp_path / name, rate) for name in ("part.mkv", "out.mkv"))
    assert len(found) == len(wanted) == report.frames
    # The two encoders get other colours: the film's matrix, and RGB.
    assert min(map(decibels, found, wanted)) > 33
    assert [number_of(frame) for frame in found] == [number_of(frame) for frame in wanted]


# ---- a voice laid into a film


@pytest.fixture(scope="module")
def beep(tmp_path_factory) -> Path:
    """0.8 s, which begin with a beep of 0.2 s at 440 Hz, mono."""
    source = "aevalsrc='0.5*sin(440*2*PI*t)*lt(t,0.2)':s=16000"
    return make_sound(tmp_path_factory.mktemp("beep") / "beep.wav", source=source, seconds=0.8)


def tone(samples: np.ndarray, hertz: float, rate: int = 16_000) -> np.ndarray:
    """How loud a tone is, every millisecond, relative to an amplitude of 0.5."""
    wave = samples * np.exp(-2j * np.pi * hertz * np.arange(len(samples)) / rate)
    window = np.ones(rate // 50) / (rate // 50)
    return np.abs(np.convolve(wave, window, "same"))[:: rate // 1000] * 4


def starts(level: np.ndarray) -> np.ndarray:
    """Seconds at which a level that is given every millisecond goes up through a half, also from the first on."""
    high = np.concatenate([[False], level > 0.5])
    return np.flatnonzero(high[1:] & ~high[:-1]) / 1000


@pytest.mark.parametrize("segment", [None, 40], ids=["in one piece", "in segments"])
def test_a_laid_voice_is_heard_where_it_is_said_and_the_film_stays_around_it(film, beep, models, tmp_path, segment):
    path, rate = film
    output = tmp_path / "out.mp4"
    progress: list[tuple[str, int, int]] = []
    report = lipsync(
        path, beep, output, models, Settings(steps=1, at=1.52),
        Hooks(on_progress=lambda *step: progress.append(step)), segment_frames=segment,
    )  # fmt: skip
    before, after = frames_of(path, rate), frames_of(output, rate)
    first, count = round(1.52 * rate), -(-int(0.8 * 16000) * rate // 16000)
    assert report.frames == len(after) == len(before) and report.frames_without_face == 0
    assert [number_of(frame) for frame in after] == list(range(len(before)))
    quality = np.array([decibels(one[CELL:-16], other[CELL:-16]) for one, other in zip(before, after, strict=True)])
    said = np.zeros(len(before), bool)
    said[first : first + count] = True
    assert quality[~said].min() > quality[said][6:-6].max() and quality[~said].min() > 36
    assert {total for _, _, total in progress} == {len(before)} and ("writing", len(before), len(before)) in progress
    start, end = offsets(output)
    assert abs(start) <= 0.010 and abs(end) <= 0.010 + 1 / rate
    # The film's beeps at 0, 1 and 3 s, that at 2 s lies within the voice; the voice's own at its first frame.
    sound = read_audio(output)
    heard, said_at = starts(tone(sound, 880)), starts(tone(sound, 440))
    assert np.abs(heard - [0, 1, 3]).max() <= 0.010
    assert len(said_at) == 1 and abs(said_at[0] - first / float(rate)) <= 0.010
    flashes = rises(np.array([frame[-12:-4, 4:12].mean() / 255 for frame in after]), float(rate))
    assert np.abs(np.delete(flashes, 2) - heard).max() <= 1 / (2 * rate) + 0.010
    assert probe_audio(output).channels == 2 and not list(tmp_path.glob(".*"))


def test_a_laid_voice_can_be_mixed_with_the_films_sound(film, beep, models, tmp_path):
    path, rate = film
    lipsync(path, beep, tmp_path / "out.mkv", models, Settings(steps=1, at=1.52, at_sound="mix"))
    sound = read_audio(tmp_path / "out.mkv")
    assert np.abs(starts(tone(sound, 880)) - [0, 1, 2, 3]).max() <= 0.010
    level = tone(sound, 440)
    assert 0.9 < level[round(1000 * 1.62)] < 1.1, "as loud as the recording"


def test_a_voice_that_runs_past_the_end_is_cut_there(film, beep, checkpoint, tmp_path, capsys):
    path, rate = film
    report = tmp_path / "report.json"
    arguments = [str(path), str(beep), "-o", str(tmp_path / "out.mp4"), "--model", str(checkpoint), "--steps", "1"]
    assert main([*arguments, "--from", "0:02", "--at", "1.5", "--report", str(report)]) == 0
    assert "runs past the end of the film" in capsys.readouterr().err
    found = json.loads(report.read_text())
    count = int(4 * rate) - round(2 * rate)
    assert found["frames"] == count and len(found["remarks"]) == 1
    assert [number_of(frame) for frame in frames_of(tmp_path / "out.mp4", rate)] == list(
        range(round(2 * rate), int(4 * rate))
    )
    sound = read_audio(tmp_path / "out.mp4")
    assert np.abs(starts(tone(sound, 880)) - [0, 1]).max() <= 0.010 + 1 / (2 * rate)  # of the part's first frame
    assert np.abs(starts(tone(sound, 440)) - round(1.5 * rate) / float(rate)).max() <= 0.010


def test_no_face_is_looked_for_outside_of_the_voice(film, beep, models, tmp_path, monkeypatch):
    path, rate = film
    searched = []

    def watched(frames, **options):
        for frame, face in track_faces(frames, **options):
            searched.append(number_of(frame))
            yield frame, face

    monkeypatch.setattr(aligning, "track_people", one_person(watched))
    lipsync(path, beep, tmp_path / "out.mp4", models, Settings(steps=1, at=2.0, fps="25"))
    assert len(searched) == 20 and abs(searched[0] - 2 * rate) <= 1


def test_a_film_without_sound_is_silent_around_the_voice(film, beep, models, tmp_path):
    path, rate = film
    ffmpeg("-i", path, "-an", "-c", "copy", tmp_path / "silent.mp4")
    lipsync(tmp_path / "silent.mp4", beep, tmp_path / "out.mp4", models, Settings(steps=1, at=1.0))
    sound = read_audio(tmp_path / "out.mp4")
    assert len(starts(tone(sound, 440))) == 1 and np.abs(sound[:14_000]).max() < 1e-3
    assert abs(probe_audio(tmp_path / "out.mp4").duration - int(4 * rate) / rate) <= 0.05


@pytest.mark.parametrize("rate", ["25", "30000/1001"])
def test_the_demo_models_mouths_are_shown_within_the_voice_alone(beep, tmp_path, rate):
    film = save(tmp_path / "film.mp4", [numbered(portrait(number), number) for number in range(50)], rate, *X264)
    demo = load_models(resolve_model("demo", CPU), CPU)
    report = lipsync(film, beep, tmp_path / "out.mp4", demo, Settings.suiting(demo, steps=2, at=0.6))
    before, after = frames_of(film, Fraction(rate)), frames_of(tmp_path / "out.mp4", Fraction(rate))
    assert report.frames == len(after) == 50 and report.frames_without_face == 0
    assert [number_of(frame) for frame in after] == list(range(50))
    first, count = round(0.6 * Fraction(rate)), -(-int(0.8 * 16000) * Fraction(rate) // 16000)
    quality = [decibels(one[CELL:], other[CELL:]) for one, other in zip(before, after, strict=True)]
    outside = quality[:first] + quality[first + count :]
    assert min(outside) > 36 and np.median(quality[first + 6 : first + count - 6]) < min(outside)


def test_an_interrupted_laying_goes_on_to_the_same_result(film, beep, models, tmp_path):
    path, rate = film
    settings = Settings(steps=1, at=1.0)
    lipsync(path, beep, tmp_path / "whole.mkv", models, settings, segment_frames=SEGMENT)
    run = (path, beep, tmp_path / "out.mkv", models, settings)
    interrupted(*run)
    report = lipsync(*run, segment_frames=SEGMENT)
    assert report.resumed_from == 40 and report.frames == int(4 * rate)
    assert hashes(tmp_path / "out.mkv") == hashes(tmp_path / "whole.mkv")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_laying_that_is_cancelled_leaves_nothing_and_one_that_ends_early_keeps_what_is_done(
    film, beep, models, tmp_path
):
    path, _ = film

    def stop_with(error):
        def on_progress(stage, done, total):
            if stage == "writing" and done == 40:
                raise error

        return Hooks(on_progress=on_progress)

    run = (path, beep, tmp_path / "out.mp4", models, Settings(steps=1, at=1.0))
    with pytest.raises(KeyboardInterrupt):
        lipsync(*run, stop_with(KeyboardInterrupt))
    assert not list(tmp_path.iterdir())
    report = lipsync(*run, stop_with(StopEarly))
    assert report.ended_early and report.frames >= 40
    assert len(list(tmp_path.iterdir())) == 1


def test_a_film_that_shows_no_face_where_the_voice_is_laid_is_refused(film, beep, models, tmp_path):
    path, rate = film
    frames = [frame if number < 2 * rate else np.full((SIDE, SIDE, 3), 90, np.uint8)
              for number, frame in enumerate(frames_of(path, rate))]  # fmt: skip
    clip = save(tmp_path / "leaves.mp4", frames, str(rate), *X264)
    with pytest.raises(UserError, match="shows no face"):
        lipsync(clip, beep, tmp_path / "out.mp4", models, Settings(steps=1, at=2.5))
