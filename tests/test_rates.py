"""The film keeps its frame rate: found in its timestamps, read, painted and written frame for frame."""

from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from clips import ffmpeg, make_sound
from conftest import SIDE, one_person, portrait
from test_resume import hashes

from latentsync import aligning, audio, faces, following, pipeline
from latentsync.__main__ import make_parser
from latentsync.audio import audio_chunks, frame_count
from latentsync.errors import UserError
from latentsync.media import VideoWriter, probe_video, read_audio, read_frames, read_frames_looped
from latentsync.pipeline import Hooks, lipsync
from latentsync.rates import grid_rate, nominal_rate, parse_rate, scale_frames
from latentsync.retarget.stage import shape_kernel
from latentsync.settings import Settings
from optim.serving import form

CPU = torch.device("cpu")
RATES = ("24000/1001", "24", "25", "30000/1001", "30", "50", "60000/1001", "60")
X264 = ("-c:v", "libx264", "-qp", 0, "-bf", 2, "-g", 12, "-pix_fmt", "yuv444p")
CELL, BITS = 8, 10  # pixels of a cell of a frame's number, and its cells
pytestmark = pytest.mark.usefixtures("one_thread")


def numbered(frame: np.ndarray, number: int) -> np.ndarray:
    """The frame with its number in black and white cells along the top."""
    frame = frame.copy()
    for bit in range(BITS):
        frame[:CELL, bit * CELL : (bit + 1) * CELL] = 255 * (number >> bit & 1)
    return frame


def number_of(frame: np.ndarray) -> int:
    cells = frame[:CELL, : BITS * CELL].reshape(CELL, BITS, CELL, 3).mean((0, 2, 3))
    return sum(1 << bit for bit in range(BITS) if cells[bit] > 127)


def save(path: Path, frames: list[np.ndarray], rate: str, *options: object) -> Path:
    raw = path.with_suffix(".rgb")
    raw.write_bytes(b"".join(frame.tobytes() for frame in frames))
    height, width = frames[0].shape[:2]
    size = ("-s", f"{width}x{height}", "-r", rate)
    ffmpeg("-f", "rawvideo", "-pix_fmt", "rgb24", *size, "-i", raw, *options, path)
    raw.unlink()
    return path


def counting(path: Path, rate: str, count: int, *options: object) -> Path:
    grey = np.full((16, BITS * CELL, 3), 90, np.uint8)
    return save(path, [numbered(grey, number) for number in range(count)], rate, *options)


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR of uint8 values."""
    return 10 * np.log10(255**2 / max(((a.astype(float) - b) ** 2).mean(), 1e-9))


def at_source_rate(path: Path):
    info = probe_video(path)
    return info.at(grid_rate(info.nominal_rate, "source"))


# ---- the rate of a file


@pytest.mark.parametrize("base", ["1/90000", "1/1000", "1/600", "1/12800"])
@pytest.mark.parametrize("rate", RATES)
def test_a_constant_rate_is_found_whatever_the_time_base(rate, base):
    ticks = [round(number / Fraction(rate) / Fraction(base)) for number in range(600)]
    assert nominal_rate(np.array(ticks[::-1]) + 77, Fraction(base)) == Fraction(rate)


@pytest.mark.parametrize("rate", RATES)
def test_the_rate_of_a_short_film_is_found_though_its_times_are_rounded_to_milliseconds(rate):
    ticks = [round(1000 * number / Fraction(rate)) for number in range(20)]
    assert nominal_rate(np.array(ticks), Fraction(1, 1000)) == Fraction(rate)


def test_an_unusual_constant_rate_keeps_every_frame():
    ticks = np.array([round(number / Fraction("29.7") * 90_000) for number in range(900)])
    rate = nominal_rate(ticks, Fraction(1, 90_000))
    assert len({round(tick * rate / 90_000) for tick in ticks.tolist()}) == 900


def test_the_recording_of_a_phone_that_drops_and_delays_frames_is_on_its_nominal_grid():
    random = np.random.default_rng(3)
    kept = np.delete(np.arange(900), [40, 41, 300, 555, 700, 701, 702, 800, 850])  # 29.7 a second on average
    ticks = (kept * 3000 + random.normal(0, 250, len(kept))).astype(np.int64)
    assert nominal_rate(ticks, Fraction(1, 90_000)) == 30
    assert len(np.unique(np.round(ticks / 3000))) == len(kept), "no frame is lost"


def test_frames_that_sometimes_come_faster_have_a_finer_grid():
    slow = np.repeat([6, 6, 6, 3, 3], 60).cumsum() * 1000  # sixtieths of a second: mostly ten frames, then twenty
    assert nominal_rate(slow * 10, Fraction(1, 600_000)) % 20 == 0


@pytest.mark.parametrize("ticks", [[], [5], [5, 5], [0, 10**15], list(range(100))])
def test_without_a_plausible_rate_it_is_25(ticks):
    assert nominal_rate(np.array(ticks, np.int64), Fraction(1, 90_000)) == 25


@pytest.mark.parametrize(
    "nominal, rate",
    [
        ("24000/1001", "24000/1001"),
        ("60", "60"),
        ("120", "60"),
        ("240", "60"),
        ("100", "50"),
        ("90", "45"),
        ("15", "30"),
    ],
)
def test_high_rates_are_divided_and_low_ones_multiplied(nominal, rate):
    assert grid_rate(Fraction(nominal), "source") == Fraction(rate)
    assert grid_rate(Fraction(nominal), "25") == 25


@pytest.mark.parametrize("text", ["0", "-5", "1/0", "nan", "inf", "1e9", "", "x", None, 25, "9" * 50])
def test_a_rate_of_a_file_that_is_no_rate_is_refused(text):
    assert parse_rate(text) is None


# ---- frames and sound


@pytest.mark.parametrize(
    "rate, suffix", [*((rate, ".mp4") for rate in RATES), *((rate, ".mkv") for rate in RATES[::3])]
)
def test_every_frame_is_read_once_in_order_and_written_at_its_time(tmp_path, rate, suffix):
    path = counting(tmp_path / f"in{suffix}", rate, 70, *X264)
    info = at_source_rate(path)
    assert (info.rate, info.n_frames, info.remarks) == (Fraction(rate), 70, ())
    frames = list(read_frames(info))
    assert [number_of(frame) for frame in frames] == list(range(70))
    assert [number_of(frame) for frame in read_frames(info, start=50, count=9)] == list(range(50, 59))
    with VideoWriter(tmp_path / f"out{suffix}", info, None, 1) as writer:
        for frame in frames:
            writer.write(frame)
    again = at_source_rate(tmp_path / f"out{suffix}")
    assert [number_of(frame) for frame in read_frames(again)] == list(range(70)) and again.rate == info.rate


@pytest.mark.parametrize("rate", ["24000/1001", "60"])
def test_a_short_film_is_played_forward_and_backward_at_its_rate(tmp_path, rate):
    info = at_source_rate(counting(tmp_path / "in.mp4", rate, 70, *X264))
    indices = [*range(70), *range(69, -1, -1), *range(10)]
    looped = list(read_frames_looped(info, 150))
    assert [index for index, _ in looped] == [number_of(frame) for _, frame in looped] == indices


def test_of_a_film_with_120_a_second_every_second_frame_is_kept_and_the_user_is_told(tmp_path):
    info = at_source_rate(counting(tmp_path / "in.mp4", "120", 120, *X264))
    assert info.remarks == ("The video has 120 frames a second, the result 60.",)
    steps = np.diff([number_of(frame) for frame in read_frames(info)])
    assert len(steps) == 59 and (steps == 2).all()


def test_of_a_film_with_12_a_second_every_frame_is_shown_twice(tmp_path):
    info = at_source_rate(counting(tmp_path / "in.mp4", "12", 12, *X264))
    assert "12 frames a second, the result 24" in info.remarks[0]
    assert [number_of(frame) for frame in read_frames(info)] == [number // 2 for number in range(24)]


@pytest.mark.parametrize("rate", RATES)
def test_a_frame_hears_the_sound_of_its_time(rate, monkeypatch):
    rate = Fraction(rate)
    rows = torch.arange(100.0)[:, None, None]  # each is its own number: 2 s
    monkeypatch.setattr(audio, "feature_segments", lambda *_: iter(rows.split(30)))
    wav = torch.zeros(2 * 16_000)
    total = frame_count(len(wav), rate)
    heard = torch.stack(list(audio_chunks(None, wav, total, rate=rate))).squeeze(-1)
    assert total == -(-2 * rate // 1)
    centres = heard[:, audio.ROWS_BEFORE]
    times = torch.arange(total) * float(50 / rate)
    assert (centres - times.clamp(max=99)).abs().max() <= 0.501
    if rate == 25:
        assert centres.tolist() == [2.0 * i for i in range(50)]


# ---- what means time


def test_the_constants_of_the_method_are_those_of_25_a_second_and_last_as_long_at_others():
    at_25, at_50 = (following.Timing.at(Fraction(rate)) for rate in (25, 50))
    assert at_25 == following.Timing(
        following.PATIENCE,
        following.SEARCH_WAITS,
        following.DRIFT,
        following.FADE,
        following.SMOOTHING,
        following.SMOOTHING_SIGMA,
    )
    assert (at_50.patience, at_50.fade, at_50.drift) == (2 * at_25.patience, 2 * at_25.fade, at_25.drift / 2)
    assert [scale_frames(5, Fraction(rate)) for rate in RATES] == [5, 5, 5, 6, 6, 10, 12, 12]


@pytest.mark.parametrize("rate", RATES)
def test_shapes_are_smoothed_over_the_same_time(rate):
    kernel = shape_kernel(Fraction(rate))
    places = np.arange(len(kernel)) - len(kernel) // 2
    width = np.sqrt((kernel * places**2).sum()) / float(Fraction(rate))
    assert kernel.sum() == pytest.approx(1) and np.allclose(kernel, kernel[::-1])
    if Fraction(rate) == 25:
        assert kernel.tolist() == [0.25, 0.5, 0.25]
    assert width == pytest.approx(np.sqrt(0.5) / 25, rel=0.2)


# ---- the whole run


def talking_film(path: Path, rate: str, count: int) -> Path:
    """A face at the bottom of a picture whose frames carry their number."""
    per_frame = 25 / float(Fraction(rate))
    frames = []
    for number in range(count):
        still = portrait(round(number * per_frame))
        still = cv2.copyMakeBorder(still, 2 * CELL, 0, 0, 0, cv2.BORDER_CONSTANT, value=(90, 90, 90))
        frames.append(numbered(still, number))
    return save(path, frames, rate, "-c:v", "libx264", "-qp", 0, "-pix_fmt", "yuv420p")


@pytest.mark.parametrize("rate", ["24000/1001", "30", "60"])
def test_a_run_changes_only_the_face_of_every_frame_of_the_film(models, tmp_path, rate):
    count = 20
    film = talking_film(tmp_path / "film.mp4", rate, count)
    sound = make_sound(tmp_path / "voice.wav", seconds=(count - 0.5) / float(Fraction(rate)))
    report = lipsync(film, sound, tmp_path / "out.mkv", models, Settings(steps=1, crf=4))
    assert report.fps == round(float(Fraction(rate)), 3)
    total = frame_count(len(read_audio(sound)), Fraction(rate))
    assert report.frames == total == count and report.frames_without_face == 0
    source, result = (list(read_frames(at_source_rate(path))) for path in (film, tmp_path / "out.mkv"))
    assert at_source_rate(tmp_path / "out.mkv").rate == Fraction(rate)
    assert [number_of(frame) for frame in result] == [number_of(frame) for frame in source] == list(range(count))
    outside = np.ones((SIDE + 2 * CELL, SIDE), bool)
    outside[2 * CELL + 20 :, 20:-20] = False  # the face, wherever its mask lies
    assert min(decibels(a[outside], b[outside]) for a, b in zip(source, result, strict=True)) >= 45
    assert max(np.abs(a.astype(int) - b)[~outside].mean() for a, b in zip(source, result, strict=True)) > 1, "painted"


def test_25_is_what_the_reference_does(models, tmp_path):
    film = talking_film(tmp_path / "film.mp4", "50", 20)
    sound = make_sound(tmp_path / "voice.wav", seconds=0.39)
    report = lipsync(film, sound, tmp_path / "out.mkv", models, Settings(steps=1, crf=4, fps="25"))
    result = [number_of(frame) for frame in read_frames(at_source_rate(tmp_path / "out.mkv"))]
    assert (report.fps, report.frames, result) == (25, 10, [number_of(f) for f in read_frames(probe_video(film))])


@pytest.mark.parametrize("rate", ["30", "60"])
def test_a_resumed_run_gives_the_same_at_every_rate(models, tmp_path, rate, monkeypatch):
    count = 34
    film = talking_film(tmp_path / "film.mp4", rate, count)
    sound = make_sound(tmp_path / "voice.wav", seconds=count / float(Fraction(rate)))
    followed = list(faces.track_faces(read_frames(at_source_rate(film)), rate=Fraction(rate)))
    monkeypatch.setattr(
        aligning, "track_people", one_person(lambda frames, **_: zip(frames, (f for _, f in followed), strict=False))
    )
    settings, said = Settings(steps=1, crf=8), []
    lipsync(film, sound, tmp_path / "whole.mp4", models, settings, segment_frames=16)
    seen = []

    def stop(frame):
        seen.append(frame)
        if len(seen) == 33:  # in the third segment
            raise KeyboardInterrupt

    run = (film, sound, tmp_path / "resumed.mp4", models, settings)
    with pytest.raises(KeyboardInterrupt):
        lipsync(*run, Hooks(on_frame=stop, on_message=said.append), segment_frames=16)
    report = lipsync(*run, Hooks(on_message=said.append), segment_frames=16)
    assert report.resumed_from in (16, 32) and any(line.startswith("resuming at 0:0") for line in said)
    assert hashes(tmp_path / "resumed.mp4") == hashes(tmp_path / "whole.mp4")
    identities = [pipeline.job_identity(models, Settings(fps=fps), "cpu", 16, None, None) for fps in ("source", "25")]
    assert identities[0] != identities[1], "another rate is another job"


# ---- the choice


def test_the_rate_can_be_chosen_on_the_command_line_and_by_settings():
    parse = make_parser().parse_args
    assert [parse(["a.mp4", "b.wav", "-o", "c.mp4", *o]).fps for o in ([], ["--fps", "25"])] == ["source", "25"]
    with pytest.raises(SystemExit):
        parse(["a.mp4", "b.wav", "-o", "c.mp4", "--fps", "30"])
    with pytest.raises(UserError, match="no frame rate '30' to choose: give one of source, 25"):
        Settings(fps="30")


def test_the_rate_can_be_chosen_on_the_page():
    setting = next(each for each in form.SETTINGS if each.name == "fps")
    assert [setting.parse(value) for value in (None, "source", "25")] == ["source", "source", "25"]
    with pytest.raises(UserError, match="no frame rate '60': give one of source, 25"):
        setting.parse("60")
