"""Films of many frames a second of which every second frame is painted, and what lies between."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from clips import make_sound
from conftest import SIDE, portrait
from test_people import LEFT, ONE, OTHER, RIGHT, WIDTH, scene
from test_prepared import key_of
from test_rates import CELL, at_source_rate, number_of, save, talking_film
from test_resume import hashes
from tiny import RESOLUTION

from latentsync import painting
from latentsync.alignment import crop_face, fixed_mask
from latentsync.between import FramesBetween, mean_face, midway_face
from latentsync.compositing import paste_rectangle
from latentsync.errors import UserError
from latentsync.media import read_frames
from latentsync.painting import Painter, paint_groups
from latentsync.pipeline import Hooks, lipsync
from latentsync.prepared.film import PreparedFilm
from latentsync.prepared.recording import Recorder
from latentsync.rates import describe_painting, painted_step
from latentsync.settings import WINDOW, Settings
from latentsync.windows import AlignedFrame
from optim.__main__ import build_parser
from optim.cluster.messages import pack, pack_result, unpack, unpack_result
from optim.serving import form, run
from optim.serving.job import DONE, Request
from optim.serving.one_frame import place_window
from optim.serving.speeds import Speeds

CPU = torch.device("cpu")
MATRIX = np.array([[0.4, 0.02, -8.0], [-0.02, 0.4, -10.0]], np.float32)
SECOND = Settings(steps=1, crf=4, paint="second")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    return talking_film(tmp_path_factory.mktemp("film") / "film.mp4", "60", 68)


def voice_of(frames: int, folder: Path, rate: int = 60) -> Path:
    return make_sound(folder / f"{frames}.wav", seconds=(frames - 0.5) / rate)


def frames_of(path: Path) -> list[np.ndarray]:
    return list(read_frames(at_source_rate(path)))


def aligned(faces: str, shots: str | None = None) -> list[AlignedFrame]:
    """Frames with a face at every "x"; shots: a digit for each."""
    frames = []
    for number, (has_face, shot) in enumerate(zip(faces, shots or "0" * len(faces), strict=True)):
        frame = AlignedFrame(portrait(number), torch.empty(0), position=number, shot=int(shot))
        if has_face == "x":
            frame.crop, frame.matrix, frame.opacity = crop_face(frame.frame, MATRIX, RESOLUTION), MATRIX, 1.0
        frames.append(frame)
    return frames


def passed_by(frames: list[AlignedFrame], own_face: bool = True) -> tuple[str, list[AlignedFrame]]:
    """Which frames are painted ("p"), composed ("c") or have no face ("."), and all of them, in order.

    A painted face is of one grey, five times the frame's number.
    """
    between = FramesBetween(own_face, RESOLUTION, CPU)
    to_paint = list(between.leave_out(frames))
    for frame in to_paint:
        if frame.crop is not None:
            frame.generated = np.full((RESOLUTION, RESOLUTION, 3), 5 * frame.position, np.uint8)
    painted = {id(frame) for frame in to_paint}
    back = list(between.put_back(to_paint))
    return "".join("." if f.crop is None else "p" if id(f) in painted else "c" for f in back), back


# ---- which frames


@pytest.mark.parametrize("rate, step", [("25", 1), ("30", 1), ("45", 1), ("48000/1001", 2), ("50", 2), ("60", 2)])
def test_every_second_frame_is_painted_from_48_a_second_on(rate, step):
    assert painted_step(Fraction(rate), "second") == step
    assert painted_step(Fraction(rate), "every") == painted_step(Fraction(rate), None) == 1


def test_what_is_painted_is_said_in_words():
    assert describe_painting(Fraction(60), 2) == "painted at 30 of 60 frames a second"
    assert describe_painting(Fraction(60000, 1001), 2) == "painted at 29.97 of 59.94 frames a second"
    assert describe_painting(Fraction(30), 1) == ""


def test_another_choice_than_every_or_every_second_is_refused():
    with pytest.raises(UserError, match="give one of every, second"):
        Settings(paint="third")


@pytest.mark.parametrize(
    "faces, shots, expected",
    [
        ("xxxxx", None, "pcpcp"),
        ("xxxxxx", None, "pcpcpc"),
        ("x", None, "p"),
        ("xx.xxx..x.", None, "pc.pcp..p."),
        ("xxxxxx", "000111", "pcppcp"),
        ("xxxxx", "00111", "pcpcp"),
        ("...", None, "..."),
        ("", None, ""),
    ],
)
def test_runs_begin_with_a_painted_frame_and_all_frames_come_back_in_order(faces, shots, expected):
    kinds, back = passed_by(aligned(faces, shots))
    assert kinds == expected
    assert [frame.position for frame in back] == list(range(len(faces)))


def test_a_frame_lies_midway_between_those_beside_it_and_never_beyond_a_cut():
    _, back = passed_by(aligned("xxxxxx.xx", "000111111"))
    greys = [None if frame.generated is None else int(frame.generated.mean()) for frame in back]
    assert greys == [0, 5, 10, 15, 20, 25, None, 35, 35], "the last of a run has the face before it"


# ---- the face between


def test_a_mouth_that_moves_is_not_seen_twice():
    """A bar at two heights: a mean shows both, the face midway shows one in the middle."""
    random = np.random.default_rng(0)
    skin = cv2.GaussianBlur(random.normal(150, 40, (128, 128, 3)), (0, 0), 3).clip(0, 255).astype(np.uint8)

    def face(y: int) -> np.ndarray:
        return cv2.GaussianBlur(cv2.rectangle(skin.copy(), (40, y), (88, y + 12), (20, 10, 30), -1), (0, 0), 1.5)

    before, middle, after = face(60), face(64), face(68)
    errors = [
        np.abs(each(before, after)[50:90, 45:83].astype(int) - middle[50:90, 45:83]).mean()
        for each in (midway_face, mean_face)
    ]
    assert errors[0] < 0.5 * errors[1]
    assert np.array_equal(midway_face(middle, middle), middle)


def test_a_composed_face_is_laid_into_its_own_frame_with_its_own_matrix():
    frames = aligned("xxx")
    frames[1].matrix = MATRIX + np.array([[0, 0, -9], [0, 0, 5]], np.float32)
    frames[1].crop = crop_face(frames[1].frame, frames[1].matrix, RESOLUTION)
    original = frames[1].frame.copy()
    _, back = passed_by(frames, own_face=False)
    result = back[1].frame
    x0, y0, x1, y1 = paste_rectangle(frames[1].matrix, RESOLUTION, original.shape)
    outside = np.ones(original.shape[:2], bool)
    outside[y0:y1, x0:x1] = False
    assert np.array_equal(result[outside], original[outside])
    crop = crop_face(result, frames[1].matrix, RESOLUTION)
    visible = fixed_mask(RESOLUTION) == 1
    inner = cv2.erode((fixed_mask(RESOLUTION) == 0).astype(np.uint8), np.ones((9, 9))) > 0
    assert np.abs(crop[inner].astype(int) - 5).max() <= 2, "the mean of the faces of frames 0 and 2"
    assert np.abs(crop[visible].astype(int) - frames[1].crop[visible]).mean() < 6, "the frame's own"
    assert np.array_equal(back[0].frame, portrait(0)), "that of a painted frame is the painter's"


def test_nothing_is_composed_where_an_earlier_run_has_finished_both_frames_beside():
    between, frames = FramesBetween(False, RESOLUTION, CPU), aligned("xxx")
    back = list(between.put_back(list(between.leave_out(frames))))
    assert all(np.array_equal(frame.frame, portrait(number)) for number, frame in enumerate(back))


# ---- the whole run


def passes_of(monkeypatch) -> list[int]:
    """The frames of every window that is denoised from now on."""
    frames, denoise = [], painting.denoise

    def counted(unet, noise, conditioning, tokens, *others):
        frames.extend([tokens.shape[1]] * len(tokens))
        return denoise(unet, noise, conditioning, tokens, *others)

    monkeypatch.setattr(painting, "denoise", counted)
    return frames


@pytest.mark.parametrize("paint, windows", [("every", 4), ("second", 2), (None, 4)])
def test_half_the_windows_go_through_the_network(models, film, tmp_path, monkeypatch, paint, windows):
    passes, said = passes_of(monkeypatch), []
    settings = replace(SECOND, paint=paint)
    report = lipsync(
        film, voice_of(64, tmp_path), tmp_path / "out.mkv", models, settings, Hooks(on_message=said.append)
    )
    assert passes == [WINDOW] * windows
    assert (report.fps, report.painted_fps, report.frames) == (60, 30 if paint == "second" else 60, 64)
    assert any("painted at 30 of 60 frames a second" in line for line in said) == (paint == "second")


def test_every_frame_keeps_its_place_and_changes_in_its_face_alone(models, film, tmp_path):
    report = lipsync(film, voice_of(45, tmp_path), tmp_path / "out.mkv", models, SECOND)
    source, result = frames_of(film)[:45], frames_of(tmp_path / "out.mkv")
    assert report.frames == 45 and report.frames_without_face == 0
    assert [number_of(frame) for frame in result] == list(range(45))
    outside = np.ones((SIDE + 2 * CELL, SIDE), bool)
    outside[2 * CELL + 20 :, 20:-20] = False
    for before, after in zip(source, result, strict=True):
        change = np.abs(before.astype(int) - after).mean(-1)
        assert change[outside].mean() < 1 < change[~outside].mean()


@pytest.mark.parametrize("frames", [66, 100])  # the second: longer than the film, which is played back
def test_a_resumed_run_gives_the_same(models, film, tmp_path, frames):
    voice = voice_of(frames, tmp_path)
    lipsync(film, voice, tmp_path / "whole.mp4", models, SECOND, segment_frames=16)
    seen: list[np.ndarray] = []

    def stop(frame: np.ndarray) -> None:
        seen.append(frame)
        if len(seen) == 56:
            raise KeyboardInterrupt

    run = (film, voice, tmp_path / "resumed.mp4", models, SECOND)
    with pytest.raises(KeyboardInterrupt):
        lipsync(*run, Hooks(on_frame=stop), segment_frames=16)
    report = lipsync(*run, segment_frames=16)
    assert report.resumed_from >= 16 and report.frames == frames
    assert hashes(tmp_path / "resumed.mp4") == hashes(tmp_path / "whole.mp4")


def test_several_faces_say_their_voices(models, tmp_path):
    pictures = [scene((ONE, (LEFT[0] + t % 4, 10)), (OTHER, (RIGHT[0] - t % 3, 10))) for t in range(24)]
    film = save(tmp_path / "two.mp4", pictures, "60", "-c:v", "libx264", "-qp", 0, "-pix_fmt", "yuv420p")
    settings = replace(SECOND, face="left", other_faces=("right",))
    voices = [
        make_sound(tmp_path / f"{tone}.wav", seconds=0.39, source=f"sine=f={tone}:r=16000") for tone in (330, 880)
    ]
    report = lipsync(film, voices[0], tmp_path / "out.mkv", models, settings, other_voices=voices[1:])
    source, result = frames_of(film), frames_of(tmp_path / "out.mkv")
    assert report.frames == len(result) == len(source) == 24
    for before, after in zip(source, result, strict=True):
        change = np.abs(before.astype(int) - after).mean(-1)
        assert min(change[:, : WIDTH // 2].max(), change[:, WIDTH // 2 :].max()) > 12


def test_a_film_that_is_prepared_gives_the_same(models, film, tmp_path):
    voice, key = voice_of(45, tmp_path), key_of(film, models)
    with Recorder(tmp_path / "folder", key) as recorder:
        lipsync(film, voice, tmp_path / "first.mkv", models, SECOND, film=recorder)
        recorder.finish()
    for settings in SECOND, replace(SECOND, paint="every"):  # of which every second latent is missing
        prepared = PreparedFilm(tmp_path / "folder", key)
        lipsync(film, voice, tmp_path / "prepared.mkv", models, settings, film=prepared)
        lipsync(film, voice, tmp_path / "plain.mkv", models, settings)
        assert hashes(tmp_path / "prepared.mkv") == hashes(tmp_path / "plain.mkv")


class TravellingWorkers:
    """Workers in this process, to which windows travel as to others."""

    kind, name, max_groups = "cpu", "1 × cpu", 2

    def __init__(self, models):
        self.models = models

    def paint_groups(self, groups, on_step, done):
        own_face, side = self.models.retargets, self.models.resolution
        for group in groups:
            if (task := pack(group, side, own_face)) is not None:
                windows = unpack(task, side)
                for _ in paint_groups([list(windows)], Painter(self.models, SECOND)):
                    on_step()
                unpack_result(pack_result(windows, side, own_face, []), group, side, own_face)
            for part in group:
                yield from part.new if hasattr(part, "new") else [part]


@pytest.mark.parametrize("own_face", [False, True])
def test_workers_paint_the_same(models, film, tmp_path, own_face, monkeypatch):
    if own_face:  # painted from the sound alone, and handed on
        models = replace(models, face=cv2.resize(portrait(0), (RESOLUTION, RESOLUTION)))
    voice = voice_of(64, tmp_path)
    lipsync(film, voice, tmp_path / "one.mkv", models, SECOND)
    report = lipsync(film, voice, tmp_path / "workers.mkv", models, SECOND, workers=TravellingWorkers(models))
    assert report.frames == 64 and report.painted_fps == 30
    assert hashes(tmp_path / "workers.mkv") == hashes(tmp_path / "one.mkv")


# ---- the choice


def test_what_is_painted_can_be_chosen_on_the_command_line_and_on_the_page():
    parse = build_parser().parse_args
    assert [parse(["a.mp4", "b.wav", "-o", "c.mp4", *o]).paint for o in ([], ["--paint", "every"])] == [None, "every"]
    setting = next(each for each in form.SETTINGS if each.name == "paint")
    assert [setting.parse(value) for value in (None, "as the level says", "second frame")] == [None, None, "second"]
    assert setting.show("every") == "every frame"
    with pytest.raises(UserError, match="give one of as the level says, every frame, second frame"):
        setting.parse("third frame")


def test_a_job_of_the_page_says_what_is_painted_and_is_expected_to_take_half_as_long(
    worker, film, tmp_path, monkeypatch
):
    speeds, doing = Speeds(tmp_path / "speeds.json"), set()
    monkeypatch.setattr(worker, "speeds", speeds)
    monkeypatch.setattr(worker.runner, "_speeds", speeds)
    progress = run.Progress.__call__

    def watched(self, *arguments):
        progress(self, *arguments)
        doing.add(self._job.doing)

    monkeypatch.setattr(run.Progress, "__call__", watched)
    request = Request(film, voice_of(45, tmp_path), level="aggressive", steps=1)
    job = worker.submit(request, "m" * 24)
    assert worker.wait(job, 300)
    assert job.state == DONE, job.error
    assert "painting mouths, 30 of 60 frames a second" in doing
    assert (job.report["fps"], job.report["painted_fps"], job.report["frames"]) == (60, 30, 45)
    assert sum("painted at 30 of 60 frames a second" in message for message in job.messages) == 1
    ((seconds,),) = [values for works in speeds._seconds.values() for values in works.values()]
    half, whole = (
        worker.describe(replace(request, paint=paint), 100_000 / seconds / 60, 60)[0] for paint in (None, "every")
    )
    assert ", painted at 30 of 60 frames a second;" in half and ", 60 frames a second;" in whole
    hours = [[float(word) for word in line.split() if word.replace(".", "").isdigit()][-1] for line in (half, whole)]
    assert hours[1] == pytest.approx(2 * hours[0], rel=0.02) and hours[0] > 10
    assert ", 25 frames a second;" in worker.describe(request, 10, 25)[0]


def test_a_preview_has_a_whole_window_of_painted_frames(film):
    info = at_source_rate(film)
    assert [place_window(0.5, 16_000, info, step).count for step in (1, 2)] == [WINDOW, 2 * WINDOW]
