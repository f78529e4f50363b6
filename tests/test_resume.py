"""Long jobs: what a run that is killed leaves, how the next one goes on, and what length costs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pytest
import torch
from clips import ffmpeg, make_sound
from conftest import SIDE, one_person, portrait, save_video
from filelock import FileLock

from latentsync import STAGES, aligning, painting, pipeline
from latentsync.__main__ import main
from latentsync.errors import UserError
from latentsync.faces import Face, track_faces
from latentsync.media import VideoWriter, probe_audio, probe_video, read_frames, segments
from latentsync.painting import Painter
from latentsync.pipeline import Hooks, StopEarly, lipsync
from latentsync.progress import ProgressBars, ProgressLines
from latentsync.settings import Settings
from latentsync.vae import encode_conditioning

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SEGMENT = 20  # frames, in place of a minute's
FRAMES = 68  # three segments, and a fourth that is shorter; five windows
X264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", 12)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Longer than the sound; for a while nobody is in the picture."""
    frames = [portrait(t) for t in range(FRAMES + 4)]
    frames[24:29] = [np.full((SIDE, SIDE, 3), 90, np.uint8)] * 5
    return save_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames, *X264)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return make_sound(tmp_path_factory.mktemp("sound") / "sound.wav", seconds=FRAMES / 25)


@pytest.fixture(scope="module")
def faces(clip) -> list[Face | None]:
    return [face for _, face in track_faces(read_frames(probe_video(clip)))][:FRAMES]


@pytest.fixture
def followed(clip, faces, monkeypatch) -> Path:
    """The clip, whose faces are known, which saves most of the time."""
    monkeypatch.setattr(aligning, "track_people", one_person(lambda frames, **_: zip(frames, faces, strict=False)))
    return clip


def hashes(path: Path) -> list[str]:
    """Of every decoded frame, and of all of the sound."""
    shown = ffmpeg("-i", path, "-map", "0:v", "-f", "framemd5", "-").decode().splitlines()
    heard = ffmpeg("-i", path, "-map", "0:a", "-f", "md5", "-").decode().splitlines()
    return [line.split(",")[-1].strip() for line in (*shown, *heard) if not line.startswith("#")]


class Stop(Exception):
    pass


def interrupted(*run, at: int = 50) -> list[str]:
    """End a run at the frame `at`, in the third segment unless another one is given; returns what it said."""
    said, written = [], []
    write = VideoWriter.write

    def stopping(self, frame):
        written.append(frame)
        if len(written) == at:
            raise Stop
        write(self, frame)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Stop):
        patched.setattr(VideoWriter, "write", stopping)
        lipsync(*run, Hooks(on_message=said.append), segment_frames=SEGMENT)
    return said


def work_folders(folder: Path) -> list[Path]:
    return list(folder.glob(".latentsync-*"))


# Killed


# The command line, with short segments, that ends itself where it is asked to.
DRIVER = f"""
import os, signal, sys
from functools import partial
from latentsync import __main__ as command_line, media, painting, pipeline

where, arguments = sys.argv[1], sys.argv[2:]
pipeline.lipsync = partial(pipeline.lipsync, segment_frames={SEGMENT})

def kill_at(owner, name, wanted):
    real = getattr(owner, name)
    def killing(*given):
        if wanted(*given):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)
    setattr(owner, name, killing)

calls = []
def number(n):
    return lambda *_: calls.append(0) or len(calls) == n

if where == "denoising":  # the second step of the fourth window
    kill_at(painting.Painter, "on_denoising_step", number(8))
elif where == "encoding":  # in the third segment
    kill_at(media.VideoWriter, "write", number(50))
elif where == "final move":
    kill_at(os, "replace", lambda old, new: str(new).endswith("out.mp4"))
command_line.leave(command_line.main(arguments))
"""


@pytest.fixture(scope="module")
def undisturbed(models, clip, sound, tmp_path_factory) -> list[str]:
    output = tmp_path_factory.mktemp("undisturbed") / "out.mp4"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    report = lipsync(clip, sound, output, models, Settings(steps=2), segment_frames=SEGMENT)
    torch.set_num_threads(threads)
    assert report.frames == FRAMES and report.resumed_from == 0 and 0 < report.frames_without_face < 10
    assert os.listdir(output.parent) == ["out.mp4"]
    return hashes(output)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
@pytest.mark.parametrize(
    "where, least, most", [("denoising", 20, 40), ("encoding", 40, 40), ("final move", FRAMES, FRAMES)]
)
def test_a_killed_job_goes_on_to_the_same_result(
    clip, sound, checkpoint, undisturbed, tmp_path, monkeypatch, capsys, where, least, most
):
    output, report = tmp_path / "out.mp4", tmp_path / "report.json"
    arguments = [*map(str, (clip, sound, "-o", output, "--model", checkpoint, "--steps", 2, "--report", report))]
    killed = subprocess.run(
        [sys.executable, "-c", DRIVER, where, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=300,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not output.exists() and len(work_folders(tmp_path)) == 1
    painted = []
    paint = Painter.paint
    monkeypatch.setattr(Painter, "paint", lambda self, windows: painted.append(0) or paint(self, windows))
    monkeypatch.setattr(pipeline, "lipsync", partial(lipsync, segment_frames=SEGMENT))
    assert main(arguments) == 0
    found = json.loads(report.read_text())
    assert least <= found["resumed_from"] <= most and found["frames"] == FRAMES
    assert 0 < found["frames_without_face"] < 10
    at = found["resumed_from"] // 25
    assert f"resuming at 0:0{at} of 0:02\n" in capsys.readouterr().err
    # Five windows: 0 to 15, 8 to 23 (slid back), 29 to 44, 45 to 60, 52 to 67 (slid back).
    assert len(painted) == {20: 4, 40: 3, FRAMES: 0}[found["resumed_from"]]
    assert hashes(output) == undisturbed
    assert sorted(os.listdir(tmp_path)) == ["out.mp4", "report.json"]


# Ended otherwise


@pytest.mark.parametrize("settings", [{}, {"windows_per_pass": 2, "frames_per_pass": 3}])
def test_a_looped_video_goes_on_to_the_same_result(models, talking, sound, tmp_path, monkeypatch, settings):
    encoded = []

    def watched(vae, pixels, mask):
        encoded.append([float(face.sum()) for face in pixels])
        return encode_conditioning(vae, pixels, mask)

    monkeypatch.setattr(painting, "encode_conditioning", watched)
    settings = Settings(steps=1, **settings)
    lipsync(talking, sound, tmp_path / "whole.mkv", models, settings, segment_frames=SEGMENT)
    run = (talking, sound, tmp_path / "out.mkv", models, settings)
    wanted = encoded.copy()
    said = interrupted(*run)
    encoded.clear()
    report = lipsync(*run, Hooks(on_message=said.append), segment_frames=SEGMENT)
    assert report.resumed_from == 40
    assert encoded == wanted, "faces that come again are known from the same batches"
    kept, resumed = said
    folder = re.escape(str(tmp_path / ".latentsync-"))
    assert re.fullmatch(
        rf"0:01 of 0:02 are kept in '{folder}\w+-\w+' \(\d\.\d MB\): the same command resumes there", kept
    )
    assert resumed == "resuming at 0:01 of 0:02"
    assert hashes(tmp_path / "out.mkv") == hashes(tmp_path / "whole.mkv")
    assert sorted(os.listdir(tmp_path)) == ["out.mkv", "whole.mkv"]


def test_a_run_that_goes_on_tells_its_own_progress(models, followed, sound, tmp_path):
    run = (followed, sound, tmp_path / "out.mp4", models, Settings(steps=1))
    interrupted(*run)
    told, shown = {}, []
    report = lipsync(
        *run,
        Hooks(on_progress=lambda stage, done, total: told.setdefault(stage, []).append(done), on_frame=shown.append),
        segment_frames=SEGMENT,
    )
    assert len(shown) == FRAMES - 40 and report.frames == FRAMES
    assert told["faces"] == list(range(1, FRAMES + 1))
    assert told["writing"] == list(range(40, FRAMES + 1))
    assert sorted(set(told["mouths"])) == list(range(40, FRAMES + 1)) and told["mouths"] == sorted(told["mouths"])


def test_a_segment_that_is_not_whole_is_made_again(models, followed, sound, undisturbed, tmp_path):
    run = (followed, sound, tmp_path / "out.mp4", models, Settings(steps=2))
    interrupted(*run)
    [folder] = work_folders(tmp_path)
    os.truncate(folder / "00001.mp4", 100)
    assert lipsync(*run, segment_frames=SEGMENT).resumed_from == 20
    assert hashes(tmp_path / "out.mp4") == undisturbed


def test_a_run_that_goes_on_may_have_enough(models, followed, sound, tmp_path):
    run = (followed, sound, tmp_path / "out.mp4", models, Settings(steps=1))
    interrupted(*run)

    def progress(stage, done, total):
        if stage == "writing" and done == 45:
            raise StopEarly

    report = lipsync(*run, Hooks(on_progress=progress), segment_frames=SEGMENT)
    assert report.ended_early and 45 <= report.frames < FRAMES
    assert len(list(read_frames(probe_video(tmp_path / "out.mp4")))) == report.frames
    assert abs(probe_audio(tmp_path / "out.mp4").duration - report.frames / 25) < 0.3
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_nothing_is_left_where_nothing_is_finished(models, followed, sound, tmp_path):
    assert interrupted(followed, sound, tmp_path / "out.mp4", models, Settings(steps=1), at=5) == []
    assert os.listdir(tmp_path) == []


def test_nothing_is_left_of_a_video_without_a_face(models, sound, tmp_path):
    bare = save_video(tmp_path / "bare.mp4", [np.full((64, 64, 3), 90, np.uint8)] * 10, *X264)
    with pytest.raises(UserError, match="shows no face"):
        lipsync(bare, sound, tmp_path / "out.mp4", models, Settings(steps=1), segment_frames=SEGMENT)
    assert os.listdir(tmp_path) == ["bare.mp4"]


def test_an_encoder_that_dies_is_a_sentence_and_costs_no_segment(models, followed, sound, tmp_path, monkeypatch):
    output = tmp_path / "out.mp4"
    run = (followed, sound, output, models, Settings(steps=1))
    enter = VideoWriter.__enter__

    def dying(self):
        enter(self)
        if self.path.stem == "00002":
            self._process.kill()
        return self

    with monkeypatch.context() as patched, pytest.raises(UserError) as caught:
        patched.setattr(VideoWriter, "__enter__", dying)
        lipsync(*run, segment_frames=SEGMENT)
    assert f"while it wrote {output};" in str(caught.value) and "00002" not in str(caught.value)
    assert lipsync(*run, segment_frames=SEGMENT).resumed_from == 40


def test_a_segment_that_is_not_listed_yet_is_made_again(models, followed, sound, undisturbed, tmp_path, monkeypatch):
    run = (followed, sound, tmp_path / "out.mp4", models, Settings(steps=2))
    rename, lists = os.replace, []

    def stopping(old, new):
        lists.append(0) if Path(new).suffix == ".json" else None
        if len(lists) == 3:
            raise Stop
        rename(old, new)

    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(os, "replace", stopping)
        lipsync(*run, segment_frames=SEGMENT)
    [folder] = work_folders(tmp_path)
    assert (folder / "00002.mp4").exists()
    assert lipsync(*run, segment_frames=SEGMENT).resumed_from == 40
    assert hashes(tmp_path / "out.mp4") == undisturbed


# Which job it is


def test_another_job_with_the_same_output_begins_anew_and_leaves_the_segments_of_the_first(
    models, followed, sound, tmp_path
):
    """A mistyped option costs nothing of what is finished."""
    output, first = tmp_path / "out.mp4", Settings(steps=1)
    interrupted(followed, sound, output, models, first)
    [kept] = work_folders(tmp_path)
    for change in ("settings", "input", "weights"):
        settings = replace(first, seed=1) if change == "settings" else first
        changed = {"input": sound, "weights": models.files[0]}.get(change)
        before = changed and os.stat(changed)
        if changed:
            os.utime(changed)
        said = interrupted(followed, sound, output, models, settings, at=5)
        [line] = said
        assert f"0:01 of another job with this output, which was interrupted, are kept in '{kept}'" in line
        assert re.search(r"\(\d\.\d MB\).* 30 days", line)
        assert work_folders(tmp_path) == [kept], change
        if changed:
            os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    short = lipsync(followed, sound, output, models, first, segment_frames=None)  # of any length
    assert short.resumed_from == 0 and sorted(os.listdir(tmp_path)) == sorted([kept.name, "out.mp4"])
    assert lipsync(followed, sound, output, models, first, segment_frames=SEGMENT).resumed_from == 40
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_a_command_can_discard_what_interrupted_runs_have_kept(
    models, followed, sound, checkpoint, tmp_path, monkeypatch, capsys
):
    for seed in (1, 2):
        interrupted(followed, sound, tmp_path / "out.mp4", models, Settings(steps=1, seed=seed), at=25)
    interrupted(followed, sound, tmp_path / "other.mp4", models, Settings(steps=1), at=25)
    assert len(work_folders(tmp_path)) == 3
    locked = next(segments.unfinished(tmp_path / "out.mp4")).folder
    monkeypatch.setattr(pipeline, "lipsync", partial(lipsync, segment_frames=SEGMENT))
    arguments = [*map(str, (followed, sound, "-o", tmp_path / "out.mp4", "--model", checkpoint, "--steps", 1))]
    with FileLock(locked / segments.LOCK):  # of a process that works there
        assert main([*arguments, "--discard-unfinished"]) == 0
    capsys.readouterr()
    others = [each.folder for each in segments.unfinished(tmp_path / "other.mp4")]
    assert len(others) == 1 and sorted(work_folders(tmp_path)) == sorted([locked, *others])


# What must not be trusted


def spoilt(listed: list) -> dict[str, str]:
    """Manifests that are not as they were written, by what is wrong with them: nothing of them holds."""

    def changed(**values) -> str:
        return json.dumps([listed[0] | values, *listed[1:]])

    text = json.dumps(listed)
    return {
        "empty": "", "cut off": text[:-20], "no list": json.dumps({"0": listed[0]}), "null": "null",
        "a number": "1e999", "numbers": "[1, 2]", "lists": json.dumps([[listed[0]]]), "deep": "[" * 100_000,
        "text for a number": changed(frames="20"), "a fraction": changed(frames=20.0), "true": changed(frames=True),
        "NaN": changed(bytes=float("nan")), "infinite": changed(bytes=float("inf")), "negative": changed(frames=-20),
        "too many frames": changed(frames=10**30), "no frame": changed(frames=0), "short": changed(frames=19),
        "counts of text": changed(counts={"frames_without_face": "1", "frames_computed_again": 0}),
        "other counts": changed(counts={"frames": 1}), "no counts": changed(counts=None),
        "more counted than there are": changed(counts={"frames_without_face": 21, "frames_computed_again": 0}),
        "no hash": changed(sha256=None), "another hash": changed(sha256="0" * 64),
        "a key less": json.dumps([{k: v for k, v in listed[0].items() if k != "sha256"}]),
        "a key more": changed(path="/etc/passwd"), "no text": "\udcff\udcfe", "digits": f"[{'9' * 5000}]",
    }  # fmt: skip


def test_a_damaged_manifest_begins_anew(models, followed, sound, tmp_path):
    interrupted(followed, sound, tmp_path / "out.mp4", models, Settings(steps=1))
    [folder] = work_folders(tmp_path)
    manifest, listed = folder / segments.MANIFEST, json.loads((folder / segments.MANIFEST).read_text())
    assert [each["frames"] for each in listed] == [20, 20]
    writer = segments.SegmentWriter(
        tmp_path / "out.mp4", probe_video(followed), sound, folder=folder, total=FRAMES, segment_frames=SEGMENT,
        counts={"frames_without_face": 0, "frames_computed_again": 0}, on_message=print,
    )  # fmt: skip
    assert len(writer._verified_segments()) == 2
    for name, text in spoilt(listed).items():
        manifest.write_bytes(text.encode("utf-8", "surrogateescape"))
        assert writer._verified_segments() == [], name
    manifest.write_text(json.dumps([listed[0], listed[1] | {"frames": None}]))
    assert len(writer._verified_segments()) == 1, "what comes before the damage holds"
    if os.name != "nt":
        manifest.unlink()
        os.mkfifo(manifest)  # reading it would block
        assert writer._verified_segments() == []
    manifest.unlink()
    manifest.write_text('[{"frames": NaN}]')
    run = (followed, sound, tmp_path / "out.mp4", models, Settings(steps=1))
    assert lipsync(*run, segment_frames=SEGMENT).resumed_from == 0 and os.listdir(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize("number, whole", [(0, 0), (1, 20)])
def test_a_segment_with_changed_bytes_of_the_same_size_is_made_again(
    models, followed, sound, undisturbed, tmp_path, number, whole
):
    run = (followed, sound, tmp_path / "out.mp4", models, Settings(steps=2))
    interrupted(*run)
    [folder] = work_folders(tmp_path)
    segment = folder / f"{number:05}.mp4"
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    assert lipsync(*run, segment_frames=SEGMENT).resumed_from == whole
    assert hashes(tmp_path / "out.mp4") == undisturbed


@pytest.fixture
def treasure(tmp_path) -> Path:
    """A folder with files that are nobody else's business."""
    folder = tmp_path / "treasure"
    folder.mkdir()
    for name in ("photo.jpg", segments.LOCK, segments.MANIFEST, "00000.mp4"):
        (folder / name).write_text("irreplaceable")
    return folder


def untouched(folder: Path) -> bool:
    return sorted(os.listdir(folder)) == ["00000.mp4", "lock", "manifest.json", "photo.jpg"] and all(
        path.read_text() == "irreplaceable" for path in folder.iterdir()
    )


def test_a_work_folder_that_is_a_link_is_refused_and_never_followed(models, followed, sound, treasure, tmp_path):
    (out := tmp_path / "out").mkdir()
    run = (followed, sound, out / "out.mp4", models, Settings(steps=1))
    interrupted(*run)
    [folder] = work_folders(out)
    for each in folder.iterdir():
        each.unlink()
    folder.rmdir()
    folder.symlink_to(treasure, target_is_directory=True)
    with pytest.raises(UserError, match="is a link or belongs to another user; remove it"):
        lipsync(*run, segment_frames=SEGMENT)
    segments.discard(out / "out.mp4")
    os.utime(treasure, times=(0, 0))
    segments.clean(out / "out.mp4")
    assert list(segments.unfinished(out / "out.mp4")) == []
    assert folder.is_symlink() and untouched(treasure)


def test_links_inside_a_work_folder_are_removed_and_never_followed(models, followed, sound, treasure, tmp_path):
    (out := tmp_path / "out").mkdir()
    run = (followed, sound, out / "out.mp4", models, Settings(steps=1))
    interrupted(*run)
    [folder] = work_folders(out)
    assert folder.stat().st_mode & 0o777 == 0o700 or os.name == "nt"
    (folder / segments.LOCK).unlink(missing_ok=True)
    (folder / segments.LOCK).symlink_to(treasure / "photo.jpg")
    (folder / "00001.mp4").rename(tmp_path / "moved.mp4")
    (folder / "00001.mp4").symlink_to(tmp_path / "moved.mp4")
    (folder / "everything").symlink_to(treasure, target_is_directory=True)
    (folder / f"{segments.PARTIAL}{segments.MANIFEST}").symlink_to(treasure / "photo.jpg")
    assert lipsync(*run, segment_frames=SEGMENT).resumed_from == 20, "a link is no segment"
    assert os.listdir(out) == ["out.mp4"] and untouched(treasure) and (tmp_path / "moved.mp4").is_file()
    folder.mkdir()
    for name, target in ((segments.LOCK, treasure / "photo.jpg"), ("everything", treasure)):
        (folder / name).symlink_to(target)
    segments.discard(out / "out.mp4")
    assert not folder.exists() and untouched(treasure)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other owners")
def test_a_work_folder_of_another_user_is_refused_and_not_cleaned(models, followed, sound, tmp_path, monkeypatch):
    run = (followed, sound, tmp_path / "out.mp4", models, Settings(steps=1))
    interrupted(*run)
    [folder] = work_folders(tmp_path)
    os.utime(folder, times=(0, 0))
    before = sorted(os.listdir(folder))
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(UserError, match="belongs to another user"):
        lipsync(*run, segment_frames=SEGMENT)
    segments.discard(tmp_path / "out.mp4")
    assert sorted(os.listdir(folder)) == before


def test_smaller_pieces_on_the_device_are_the_same_job(models, followed, sound, tmp_path):
    """They follow from the memory that is free."""
    interrupted(followed, sound, tmp_path / "out.mp4", models, Settings(steps=1, windows_per_pass=2))
    smaller = Settings(steps=1, windows_per_pass=1, frames_per_pass=4)
    assert lipsync(followed, sound, tmp_path / "out.mp4", models, smaller, segment_frames=SEGMENT).resumed_from == 40


def test_leftovers_are_removed_but_not_those_of_the_living(models, followed, sound, talking, voice, tmp_path):
    run = (followed, sound, tmp_path / "out.mp4", models, Settings(steps=1))
    interrupted(*run)
    [kept] = work_folders(tmp_path)
    living, nothing = kept.with_name(f"{kept.name}0"), kept.with_name(f"{kept.name}1")
    names = ("0-old", "0-new", "1.mp4", "2.mp4")
    old, others, half, new = (tmp_path / f".latentsync-{name}" for name in names)
    for folder in (living, nothing, old, others):
        folder.mkdir()
    half.touch(), new.touch()
    os.utime(old, times=(0, time.time() - 31 * segments.DAY))
    os.utime(half, times=(0, time.time() - 2 * segments.DAY))
    with FileLock(living / segments.LOCK):
        lipsync(talking, voice, tmp_path / "out.mp4", models, Settings(steps=1))  # a short job
        left = ["out.mp4", kept.name, living.name, others.name, new.name]
        assert sorted(os.listdir(tmp_path)) == sorted(left)
    os.utime(kept, times=(0, time.time() - 31 * segments.DAY))
    lipsync(talking, voice, tmp_path / "out.mp4", models, Settings(steps=1))
    assert sorted(os.listdir(tmp_path)) == sorted(["out.mp4", others.name, new.name])


def test_a_job_that_is_under_way_is_not_begun_again(models, followed, sound, tmp_path):
    run = (followed, sound, tmp_path / "out.mp4", models, Settings(steps=1))
    refused = []

    def meanwhile(stage, done, total):
        if stage == "writing" and done == 30:
            with pytest.raises(UserError, match="another run") as caught:
                lipsync(*run, segment_frames=SEGMENT)
            refused.append(str(caught.value))

    assert lipsync(*run, Hooks(on_progress=meanwhile), segment_frames=SEGMENT).frames == FRAMES
    assert len(refused) == 1 and os.listdir(tmp_path) == ["out.mp4"]


# What is shown


@pytest.mark.parametrize("kind", [ProgressBars, ProgressLines])
def test_what_an_earlier_run_has_done_says_nothing_of_the_speed(monkeypatch, capsys, kind):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    progress = kind()
    for stage in STAGES[1:]:
        progress(stage, 900, 1000)
    for done in range(901, 951):
        now[0] += 1
        for stage in STAGES[1:]:
            progress(stage, done, 1000)
    progress.close()
    last = re.split("[\r\n]", capsys.readouterr().err.strip())[-1]
    assert "950/1000" in last and re.search(r"00:50 left|, 49 s left", last), last


# What length costs


def on_disk(folder: Path) -> int:
    """Bytes of all files below the folder, some of which may go meanwhile."""
    found = 0
    for path in folder.rglob("*"):
        try:
            found += path.stat().st_size * path.is_file()
        except OSError:
            pass
    return found


def test_the_disk_holds_the_result_twice_at_most(models, followed, sound, tmp_path, monkeypatch):
    output, held = tmp_path / "out.mp4", []
    rename = os.replace

    def watched(old, new):
        held.append(on_disk(tmp_path))
        rename(old, new)

    monkeypatch.setattr(os, "replace", watched)
    lipsync(followed, sound, output, models, Settings(steps=1), segment_frames=SEGMENT)
    assert max(held) == held[-1]  # when the result is whole, and its segments are still there
    size, listed = output.stat().st_size, 20_000  # of segments' own indices, and the lists of them
    assert 1.2 * size < held[-1] < 2 * size + listed


@pytest.mark.full_size
def test_half_an_hour_takes_no_more_memory_than_a_minute(checkpoint, tmp_path):
    seconds, output, report = 1800, tmp_path / "out", tmp_path / "report.json"
    output.mkdir()
    small = [np.ascontiguousarray(portrait(t)[::2, ::2]) for t in range(24)]
    face = save_video(tmp_path / "face.mp4", small, *X264)
    clip, sound = tmp_path / "clip.mp4", make_sound(tmp_path / "sound.wav", seconds=seconds)
    ffmpeg("-stream_loop", -1, "-t", seconds, "-i", face, "-c", "copy", clip)
    command = [
        *(sys.executable, "-m", "latentsync", clip, sound, "-o", output / "out.mp4", "--model", checkpoint),
        *("--steps", 1, "--guidance", 1, "--report", report),
    ]
    began = time.monotonic()
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    seen, watched = [], psutil.Process(process.pid)
    for line in process.stderr:  # every ten seconds
        if found := re.search(r"writing (\d+)/", line):
            spent = watched.cpu_times()
            rss = watched.memory_info().rss
            seen.append((int(found[1]), rss, spent.user + spent.system, on_disk(output)))
    assert process.wait() == 0
    size = (output / "out.mp4").stat().st_size
    found = json.loads(report.read_text())
    assert found["frames"] == 25 * seconds and found["frames_without_face"] == 0
    frames, memory, spent, held = zip(*seen, strict=True)

    def at(minute: int) -> int:
        """The first sample after so many minutes of the result."""
        return next(i for i, done in enumerate(frames) if done >= 1500 * minute)

    def cost(first: int, last: int) -> float:
        """Seconds of the processor a frame, between two minutes."""
        first, last = at(first), at(last)
        return (spent[last] - spent[first]) / (frames[last] - frames[first])

    early, late = median(memory[at(1) : at(3)]), median(memory[at(27) :])
    print(
        f"{time.monotonic() - began:.0f} s; {early / 1e6:.0f} MB after a minute, {late / 1e6:.0f} MB at the end; "
        f"{1000 * cost(1, 6):.1f} ms a frame at first, {1000 * cost(24, 29):.1f} ms at last; "
        f"{max(held) / 1e6:.1f} MB on the disk for {size / 1e6:.1f} MB"
    )
    assert late < 1.05 * early
    assert cost(24, 29) < 1.2 * cost(1, 6)
    assert max(held) < 2 * size
