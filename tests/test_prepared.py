"""Prepared films: the same result as without them, to the bit, and folders that are not what they say."""

import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import ffmpeg, make_sound
from conftest import SIDE, portrait, save_video
from safetensors.torch import load_file, save
from test_resume import SEGMENT, X264, hashes, interrupted

from latentsync import aligning, faces, painting, pipeline
from latentsync.__main__ import main as sync
from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import load_models
from latentsync.errors import UserError
from latentsync.faces import lookahead_frames, track_faces
from latentsync.hooks import Hooks
from latentsync.media import VideoWriter, probe_video, read_frames
from latentsync.pipeline import lipsync
from latentsync.prepared import film as film_module
from latentsync.prepared.__main__ import main as prepare
from latentsync.prepared.film import MANIFEST, PreparedFilm, faces_file, film_key, latents_file
from latentsync.prepared.making import prepare_film
from latentsync.prepared.recording import Recorder
from latentsync.settings import Settings

CPU = torch.device("cpu")
FRAMES = 60
GAP = range(24, 29)  # nobody is in the picture
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(checkpoint):
    return load_models(resolve_model(str(checkpoint), CPU), CPU)


@pytest.fixture(scope="module")
def demo():
    return load_models(resolve_model("demo", CPU), CPU)


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """A face, nobody, the face again, and a cut to the face elsewhere."""
    frames = [portrait(t) for t in range(FRAMES)]
    frames[GAP.start : GAP.stop] = [np.full((SIDE, SIDE, 3), 90, np.uint8)] * len(GAP)
    frames[44:] = [255 - np.ascontiguousarray(frame[:, ::-1]) // 3 for frame in frames[44:]]
    return save_video(tmp_path_factory.mktemp("film") / "film.mp4", frames, *X264)


@pytest.fixture(scope="module")
def prepared(video, models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "folder"
    torch.set_num_threads(1)
    prepare_film(video, folder, models, Settings())
    return folder


def key_of(video: Path, models, settings=None):
    settings = settings or Settings()
    return film_key(probe_video(video).at_choice(settings.fps), settings, models)


def sound_of(frames: int, folder: Path) -> Path:
    return make_sound(folder / f"{frames}.wav", seconds=frames / 25)


def forbid(monkeypatch, what=("track_people", "encode_conditioning")) -> None:
    def never(*_, **__):
        raise AssertionError("a prepared film is neither followed nor encoded")

    for name in what:
        for module in (aligning, faces) if name == "track_people" else (painting,):
            monkeypatch.setattr(module, name, never)


# The same result


@pytest.mark.parametrize("end", [10, 22, 25, 31, 43, 46, 59])
def test_a_face_does_not_depend_on_where_the_sound_ends(video, end):
    info = probe_video(video)
    ahead = lookahead_frames(info.rate)
    whole = list(islice((face for _, face in track_faces(read_frames(info))), end))
    part = list(islice((face for _, face in track_faces(read_frames(info, count=end + ahead))), end))
    for one, other in zip(whole, part, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert np.array_equal(one.points, other.points) and np.array_equal(one.landmarks, other.landmarks)
            assert (one.opacity, one.first, one.shot, one.box) == (other.opacity, other.first, other.shot, other.box)


def test_more_frames_a_second_are_looked_at_ahead_for_as_long_a_time():
    assert lookahead_frames(Fraction(50)) > lookahead_frames(Fraction(25)) >= 10


BATCHES = {"frames_per_pass": 4, "windows_per_pass": 2}


@pytest.mark.parametrize(
    ("frames", "batches"), [(7, {}), (31, {}), (46, BATCHES), (FRAMES, {}), (FRAMES + 33, {}), (FRAMES + 33, BATCHES)]
)
def test_the_result_is_the_one_without_it_to_the_bit(video, models, prepared, tmp_path, monkeypatch, frames, batches):
    settings, sound = Settings(steps=1, **batches), sound_of(frames, tmp_path)
    plain = lipsync(video, sound, tmp_path / "plain.mkv", models, settings)
    forbid(monkeypatch)
    report = lipsync(
        video, sound, tmp_path / "out.mkv", models, settings, film=PreparedFilm(prepared, key_of(video, models))
    )
    assert report.frames == plain.frames == frames and report.frames_without_face == plain.frames_without_face
    assert hashes(tmp_path / "out.mkv") == hashes(tmp_path / "plain.mkv")


@pytest.mark.parametrize("frames", [31, FRAMES + 20])
def test_so_is_that_of_a_model_with_a_face_of_its_own(demo, tmp_path, monkeypatch, frames):
    video = Path(__file__).resolve().parent.parent / "assets" / "example" / "face.mp4"
    short = save_video(tmp_path / "film.mp4", list(read_frames(probe_video(video), count=FRAMES)), *X264)
    settings, sound = Settings(steps=1), sound_of(frames, tmp_path)
    lipsync(short, sound, tmp_path / "plain.mkv", demo, settings)
    prepare_film(short, tmp_path / "folder", demo, settings)
    assert sorted(os.listdir(tmp_path / "folder")) == [faces_file(0), MANIFEST], "nothing of the film is encoded"
    forbid(monkeypatch, ["track_people"])
    film = PreparedFilm(tmp_path / "folder", key_of(short, demo))
    lipsync(short, sound, tmp_path / "out.mkv", demo, settings, film=film)
    assert hashes(tmp_path / "out.mkv") == hashes(tmp_path / "plain.mkv")


@pytest.mark.parametrize("frames", [56, FRAMES + 33])
def test_a_run_that_is_resumed_with_it_has_the_same_result(video, models, prepared, tmp_path, frames):
    settings, sound = Settings(steps=1), sound_of(frames, tmp_path)
    lipsync(video, sound, tmp_path / "plain.mkv", models, settings, segment_frames=SEGMENT)
    run = (video, sound, tmp_path / "out.mkv", models, settings)
    interrupted(*run)
    film = PreparedFilm(prepared, key_of(video, models))
    assert lipsync(*run, segment_frames=SEGMENT, film=film).resumed_from == 40
    assert hashes(tmp_path / "out.mkv") == hashes(tmp_path / "plain.mkv")


def test_the_same_frames_give_the_same_segment_whenever_they_come(video, models, tmp_path):
    """With a thread of its own that looks ahead, x264 encodes one in ten of these otherwise."""
    painted: list[np.ndarray] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(VideoWriter, "write", lambda _, frame: painted.append(frame.copy()))
        lipsync(video, sound_of(56, tmp_path), tmp_path / "out.mkv", models, Settings(steps=1))
    segment = painted[SEGMENT : 2 * SEGMENT]

    def stream(number: int) -> bytes:
        chance, path = random.Random(number), tmp_path / f"{number}.mkv"
        pause = chance.randrange(1, SEGMENT)
        with VideoWriter(path, probe_video(video)) as writer:
            for place, frame in enumerate(segment):
                if place == pause or chance.random() < 0.05:
                    time.sleep(0.3 * chance.random())
                writer.write(frame)
        return ffmpeg("-i", path, "-map", "0:v", "-c", "copy", "-f", "h264", "-")

    with ThreadPoolExecutor(6) as threads:
        assert len(set(threads.map(stream, range(100)))) == 1


def test_files_of_few_frames_are_read_as_one_of_many(video, models, prepared, tmp_path, monkeypatch):
    """Chunks of a long film; the last window slides back across their border."""
    for module in ("film", "recording"):
        monkeypatch.setattr(f"latentsync.prepared.{module}.CHUNK", 17)
    prepare_film(video, tmp_path / "folder", models, Settings())
    assert (tmp_path / "folder" / faces_file(3)).is_file() and (tmp_path / "folder" / latents_file(3)).is_file()
    chunked = PreparedFilm(tmp_path / "folder", key_of(video, models))
    faces, latents = list(chunked.faces()), [chunked.latents(number) for number in (*range(60), *range(59, -1, -1))]
    monkeypatch.undo()
    whole = PreparedFilm(prepared, key_of(video, models))
    for face, other, number in zip(faces, whole.faces(), range(FRAMES), strict=True):
        assert (face is None) == (other is None) == (latents[number] is None) == (number in GAP)
        if face is not None and other is not None:
            assert np.array_equal(face.landmarks, other.landmarks) and face.shot == other.shot
            assert torch.equal(latents[number], whole.latents(number))
            assert torch.equal(latents[number], latents[2 * FRAMES - 1 - number])


@pytest.mark.parametrize("frames", [31, FRAMES, FRAMES + 20])
def test_a_run_leaves_what_the_next_one_with_the_film_needs(video, models, tmp_path, monkeypatch, frames):
    settings, sound, key = Settings(steps=1), sound_of(frames, tmp_path), key_of(video, models)
    with Recorder(tmp_path / "folder", key) as recorder:
        lipsync(video, sound, tmp_path / "first.mkv", models, settings, film=recorder)
        recorder.finish()
    forbid(monkeypatch)
    film = PreparedFilm(tmp_path / "folder", key)
    assert film.covers(frames) and film.covers(FRAMES + 100) == (frames >= FRAMES)
    lipsync(video, sound, tmp_path / "second.mkv", models, settings, film=film)
    assert hashes(tmp_path / "first.mkv") == hashes(tmp_path / "second.mkv")


@pytest.mark.parametrize("known", [True, False], ids=["with a prepared film", "while one is recorded"])
def test_a_run_ends_well_while_a_frame_behind_its_last_one_is_still_read(
    video, models, prepared, tmp_path, monkeypatch, known
):
    """The thread that follows faces waits for that frame, when the one that cuts them out has all of its own."""
    sound, read, numbers = sound_of(20, tmp_path), pipeline.read_frames_looped, []

    def read_slowly(*arguments, **options):
        for number, frame in enumerate(read(*arguments, **options), 1):
            if number > 20:
                time.sleep(0.5)
            numbers.append(number)
            yield frame

    monkeypatch.setattr(pipeline, "read_frames_looped", read_slowly)
    key = key_of(video, models)
    with Recorder(tmp_path / "film", key) as recorder:
        film = PreparedFilm(prepared, key) if known else recorder
        report = lipsync(video, sound, tmp_path / "out.mp4", models, Settings(steps=1), film=film)
    assert report.frames == 20 and max(numbers) >= 20


def test_one_of_a_part_of_the_film_is_not_used_for_more(video, models, tmp_path):
    settings, key = Settings(steps=1), key_of(video, models)
    with Recorder(tmp_path / "folder", key) as recorder:
        lipsync(video, sound_of(20, tmp_path), tmp_path / "first.mkv", models, settings, film=recorder)
        recorder.finish()
    sound, film = sound_of(40, tmp_path), PreparedFilm(tmp_path / "folder", key)
    lipsync(video, sound, tmp_path / "out.mkv", models, settings, film=film)
    lipsync(video, sound, tmp_path / "plain.mkv", models, settings)
    assert hashes(tmp_path / "out.mkv") == hashes(tmp_path / "plain.mkv")


def test_latents_that_go_during_a_run_are_computed_again(video, models, prepared, tmp_path):
    copy = copied(prepared, tmp_path)
    film = PreparedFilm(copy, key_of(video, models))
    (copy / latents_file(0)).unlink()
    settings, sound = Settings(steps=1), sound_of(31, tmp_path)
    lipsync(video, sound, tmp_path / "out.mkv", models, settings, film=film)
    lipsync(video, sound, tmp_path / "plain.mkv", models, settings)
    assert hashes(tmp_path / "out.mkv") == hashes(tmp_path / "plain.mkv")


# Refused


def copied(prepared: Path, folder: Path) -> Path:
    copy = folder / "copy"
    copy.mkdir()
    for path in prepared.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("sha256", "0" * 64, "the film's content"),
        ("track", 2, "the video track"),
        ("rate", "50", "the frame rate is '25' there and '50' here"),
        ("face", "left", "the face to follow is 'largest' there and 'left' here"),
        ("model", "latentsync-1.6", "the model"),
        ("autoencoder", "0" * 64, "the model's autoencoder"),
        ("resolution", 512, "the resolution"),
        ("dtype", "float16", "the dtype"),
        ("format", 2, "the format"),
        ("program", "9", "the program's version"),
    ],
)
def test_what_differs_is_said_in_one_sentence(video, models, prepared, field, value, words):
    with pytest.raises(UserError) as refused:
        PreparedFilm(prepared, replace(key_of(video, models), **{field: value}))
    assert words in str(refused.value) and str(prepared) in str(refused.value)


def rewrite(folder: Path, name: str, **tensors: torch.Tensor | None) -> None:
    """Change tensors of a file, with the right hash."""
    contents = {key: value for key, value in (load_file(folder / name) | tensors).items() if value is not None}
    relist(folder, name, save(contents))


def relist(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = [len(data), sha256(data).hexdigest()]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def edit(folder: Path, **fields: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text()) | fields
    (folder / MANIFEST).write_text(json.dumps(manifest))


def linked(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")


def piped(path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    path.unlink()
    os.mkfifo(path)


def flipped(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)


def first_face(folder: Path, name: str, value: float) -> torch.Tensor:
    tensor = load_file(folder / faces_file(0))[name].clone()
    tensor[0] = value
    return tensor


FACES, LATENTS = faces_file(0), latents_file(0)
DAMAGES = {
    "no manifest": lambda f: (f / MANIFEST).unlink(),
    "empty manifest": lambda f: (f / MANIFEST).write_text(""),
    "a list": lambda f: (f / MANIFEST).write_text("[]"),
    "nested": lambda f: (f / MANIFEST).write_text("[" * 100_000),
    "no UTF-8": lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe{}"),
    "huge manifest": lambda f: (f / MANIFEST).write_text(" " * (film_module.MAX_MANIFEST_BYTES + 1)),
    "no key": lambda f: edit(f, key=None),
    "no frames": lambda f: edit(f, frames=0),
    "frames as text": lambda f: edit(f, frames="60"),
    "more frames": lambda f: edit(f, frames=61),
    "absurdly many": lambda f: edit(f, frames=10**12),
    "another file": lambda f: edit(f, files={"../../etc/passwd": [1, "0"]}),
    "entries of text": lambda f: edit(f, files={FACES: "x"}),
    "no faces": lambda f: (f / FACES).unlink(),
    "no latents": lambda f: (f / LATENTS).unlink(),
    "truncated": lambda f: (f / FACES).write_bytes((f / FACES).read_bytes()[:-8]),
    "truncated and listed": lambda f: relist(f, LATENTS, (f / LATENTS).read_bytes()[:-8]),
    "no safetensors": lambda f: relist(f, FACES, b"\x80\x04cos\nsystem\n(S'false'\ntR."),
    "a flipped bit": lambda f: flipped(f, LATENTS),
    "linked faces": lambda f: linked(f, FACES),
    "linked manifest": lambda f: linked(f, MANIFEST),
    "a pipe": lambda f: piped(f / FACES),
    "a folder": lambda f: ((f / FACES).unlink(), (f / FACES).mkdir()),
    "a tensor less": lambda f: rewrite(f, FACES, shot=None),
    "another shape": lambda f: rewrite(f, FACES, points=torch.zeros(60, 4, 2, dtype=torch.float64)),
    "another type": lambda f: rewrite(f, FACES, points=torch.zeros(60, 3, 2)),
    "points NaN": lambda f: rewrite(f, FACES, points=first_face(f, "points", float("nan"))),
    "one point": lambda f: rewrite(f, FACES, points=first_face(f, "points", 7.0)),
    "a face of one point": lambda f: rewrite(
        f, FACES, landmarks=first_face(f, "landmarks", 9.0), box=first_face(f, "box", 9.0)
    ),
    "far away": lambda f: rewrite(f, FACES, points=first_face(f, "points", 1e300)),
    "another box": lambda f: rewrite(f, FACES, box=first_face(f, "box", 3.0)),
    "opacity": lambda f: rewrite(f, FACES, opacity=first_face(f, "opacity", 2.0)),
    "latents NaN": lambda f: rewrite(f, LATENTS, latents=torch.full_like(load_file(f / LATENTS)["latents"], torch.nan)),
    "latents of half": lambda f: rewrite(f, LATENTS, latents=load_file(f / LATENTS)["latents"].half()),
    "fewer latents": lambda f: rewrite(f, LATENTS, latents=load_file(f / LATENTS)["latents"][1:]),
    "other frames": lambda f: rewrite(f, LATENTS, frames=load_file(f / LATENTS)["frames"] + 1000),
    "frames twice": lambda f: rewrite(f, LATENTS, frames=load_file(f / LATENTS)["frames"] * 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_hostile_folder_is_one_sentence(video, models, prepared, tmp_path, damage):
    folder = copied(prepared, tmp_path)
    DAMAGES[damage](folder)
    with pytest.raises(UserError) as refused:
        PreparedFilm(folder, key_of(video, models))
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_that_is_a_link_or_not_there_is_refused(video, models, prepared, tmp_path):
    (tmp_path / "link").symlink_to(prepared)
    for name in ("link", "none"):
        with pytest.raises(UserError, match=name):
            PreparedFilm(tmp_path / name, key_of(video, models))


# Written whole or not at all


def test_an_ended_preparation_leaves_nothing(video, models, tmp_path):
    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if done == 30:
            raise Stop

    with pytest.raises(Stop):
        prepare_film(video, tmp_path / "folder", models, Settings(), Hooks(on_progress=stop))
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_stays_as_it_is(video, models, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="exists already"):
        prepare_film(video, tmp_path / "folder", models, Settings())
    assert os.listdir(tmp_path) == ["folder"] and not os.listdir(tmp_path / "folder")


def test_a_film_without_a_face_is_a_sentence_and_leaves_nothing(models, tmp_path):
    grey = save_video(tmp_path / "grey.mp4", [np.full((SIDE, SIDE, 3), 90, np.uint8)] * 5, *X264)
    with pytest.raises(UserError, match="no face"):
        prepare_film(grey, tmp_path / "folder", models, Settings())
    assert os.listdir(tmp_path) == ["grey.mp4"]


def test_a_full_disk_ends_the_recording_and_not_the_run(video, models, tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    with Recorder(tmp_path / "folder", key_of(video, models)) as recorder, monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        lipsync(video, sound_of(20, tmp_path), tmp_path / "out.mkv", models, Settings(steps=1), film=recorder)
        with pytest.raises(UserError, match="No space left"):
            recorder.finish()
    assert (tmp_path / "out.mkv").is_file() and sorted(os.listdir(tmp_path)) == ["20.wav", "out.mkv"]


def test_a_reader_is_not_disturbed_by_a_writer_of_the_same_film(video, models, prepared, tmp_path):
    with Recorder(tmp_path / "folder", key_of(video, models)) as recorder:
        with closing(recorder.follow(read_frames(probe_video(video)), track_faces, FRAMES)) as tracked:
            next(tracked)
            with pytest.raises(UserError):  # it is not there yet
                PreparedFilm(tmp_path / "folder", key_of(video, models))
            assert sum(face is not None for face in PreparedFilm(prepared, key_of(video, models)).faces()) == 55


# The command line


def test_the_command_line_prepares_and_uses_a_film(video, checkpoint, tmp_path, monkeypatch, capsys):
    folder, sound = tmp_path / "folder", sound_of(31, tmp_path)
    model = ("--model", str(checkpoint), "--device", "cpu")
    assert prepare([str(video), "-o", str(folder), *model]) == 0
    assert capsys.readouterr().out.strip() == str(folder)
    run = [str(video), str(sound), "--steps", "1", *model]
    assert sync([*run, "-o", str(tmp_path / "plain.mkv")]) == 0
    forbid(monkeypatch)
    assert sync([*run, "-o", str(tmp_path / "out.mkv"), "--prepared", str(folder)]) == 0
    assert hashes(tmp_path / "out.mkv") == hashes(tmp_path / "plain.mkv")
    capsys.readouterr()
    assert sync([*run, "-o", str(tmp_path / "left.mkv"), "--prepared", str(folder), "--face", "left"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "the face to follow is 'largest' there and 'left' here" in said and not (tmp_path / "left.mkv").exists()
    assert prepare([str(video), "-o", str(folder), *model]) == 2
    assert "exists already" in capsys.readouterr().err
