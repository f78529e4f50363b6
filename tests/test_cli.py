"""The command line: what it takes, what it refuses and how, what it leaves behind, what it costs."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import wave
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import ffmpeg, make_sound, make_vfr_video, make_video
from conftest import SIDE, portrait, save_video
from skimage.metrics import peak_signal_noise_ratio as psnr

from latentsync import STAGES
from latentsync.__main__ import main
from latentsync.audio import frame_count
from latentsync.media import probe_audio, probe_video, read_audio, read_frames
from latentsync.progress import ProgressBars, ProgressLines
from latentsync.rates import grid_rate

ROOT = Path(__file__).resolve().parent.parent
X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-crf", 12)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def sync(checkpoint, tmp_path):
    """Run the command line in this process, in one step with the tiny checkpoint; returns its report."""

    def run(video, audio, output="out.mp4", *options) -> dict:
        output, report = tmp_path / output, tmp_path / "report.json"
        arguments = [str(video), str(audio), "-o", str(output), "--model", str(checkpoint), "--steps", "1"]
        assert main([*arguments, "--report", str(report), *options]) == 0
        return json.loads(report.read_text())

    return run


def start(*arguments, cwd=ROOT, **options) -> subprocess.Popen:
    """The command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "latentsync", *map(str, arguments)],
        cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options,
    )  # fmt: skip


def frames_of(path) -> np.ndarray:
    return np.stack(list(read_frames(probe_video(path))))


# What is refused


@pytest.fixture(scope="module")
def bad(tmp_path_factory, talking) -> Path:
    """Files that cannot be used, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "folder.mp4").mkdir()
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is not a video\n" * 50)
    (folder / "text.wav").write_text("this is not a sound\n" * 50)
    data = talking.read_bytes()
    (folder / "no index.mp4").write_bytes(data[: len(data) // 2])
    ffmpeg("-i", talking, "-c", "copy", "-movflags", "+faststart", folder / "half.mp4")
    data = (folder / "half.mp4").read_bytes()
    (folder / "half.mp4").write_bytes(data[: len(data) // 2])
    make_sound(folder / "sound.wav")
    make_sound(folder / "sound.mp4", "-c:a", "aac")
    with wave.open(str(folder / "zero.wav"), "wb") as zero:
        zero.setparams((1, 2, 16000, 0, "NONE", ""))
    make_video(folder / "faceless.mp4", seconds=0.5)
    return folder


def refuse(capfd, arguments: list) -> str:
    """Exit code 2 and one sentence, which is returned."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    *before, sentence = said.err.splitlines()
    assert sentence.endswith(".") and "Traceback" not in said.err
    assert all(line.startswith(("model ", "faces ")) for line in before)  # of a run that had begun
    return sentence


@pytest.mark.parametrize(
    "video, words",
    [
        ("missing.mp4", "no file"), ("folder.mp4", "is a folder"), ("empty.mp4", "is empty"),
        ("text.mp4", "is not a video"), ("no index.mp4", "is cut off"), ("half.mp4", "is cut off"),
        ("sound.wav", "only sound"), ("sound.mp4", "only sound"), ("faceless.mp4", "shows no face"),
    ],
)  # fmt: skip
def test_an_unusable_video_is_refused(bad, voice, checkpoint, tmp_path, capfd, video, words):
    sentence = refuse(capfd, [bad / video, voice, "-o", tmp_path / "out.mp4", "--model", checkpoint, "--steps", 1])
    assert words in sentence and str(bad / video) in sentence
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "audio, words",
    [
        ("missing.wav", "no file"), ("folder.mp4", "is a folder"), ("empty.mp4", "is empty"),
        ("text.wav", "is not a sound"), ("faceless.mp4", "holds no sound"), ("zero.wav", "zero length"),
    ],
)  # fmt: skip
def test_unusable_sound_is_refused(bad, talking, checkpoint, tmp_path, capfd, audio, words):
    sentence = refuse(capfd, [talking, bad / audio, "-o", tmp_path / "out.mp4", "--model", checkpoint])
    assert words in sentence and str(bad / audio) in sentence
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "output, words",
    [
        ("no such folder/out.mp4", "does not exist"), (".", "give the output one of these endings"),
        ("folder.mp4", "is a folder"), ("out.avi", "does not end in"),
        pytest.param(
            "/proc/out.mp4", "cannot be written",
            marks=pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder nobody can write to"),
        ),
    ],
)  # fmt: skip
def test_an_unwritable_output_is_refused_before_any_work(talking, voice, tmp_path, capfd, output, words):
    (tmp_path / "folder.mp4").mkdir()
    sentence = refuse(capfd, [talking, voice, "-o", tmp_path / output])
    assert words in sentence and os.path.dirname(tmp_path / output) in sentence
    assert os.listdir(tmp_path) == ["folder.mp4"]


@pytest.mark.parametrize("which", [0, 1])
def test_an_output_that_is_an_input_is_refused(talking, voice, tmp_path, capfd, which):
    inputs = [shutil.copy(talking, tmp_path / "a.mp4"), shutil.copy(talking, tmp_path / "b.mp4")]
    ffmpeg("-i", talking, "-i", voice, "-c:v", "copy", inputs[1])
    before = Path(inputs[which]).read_bytes()
    assert "would be overwritten" in refuse(capfd, [*inputs, "-o", inputs[which]])
    assert Path(inputs[which]).read_bytes() == before


@pytest.mark.parametrize(
    "report, words", [("nowhere/r.json", "does not exist"), (".", "is a folder"), ("out.mp4", "would be overwritten")]
)
def test_an_unwritable_report_is_refused_before_any_work(talking, voice, tmp_path, capfd, report, words):
    assert words in refuse(capfd, [talking, voice, "-o", tmp_path / "out.mp4", "--report", tmp_path / report])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("link", [os.link, os.symlink])
@pytest.mark.parametrize(
    "option, which", [*product(("--report", "-o"), ("video", "sound", "model")), ("--report", "output")]
)
def test_no_file_of_a_run_is_overwritten_under_another_name(
    talking, voice, checkpoint, tmp_path, capfd, option, which, link
):
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    files = {
        "video": tmp_path / "a.mp4", "sound": tmp_path / "a.wav", "output": tmp_path / "earlier.mp4",
        "model": model / "vae" / "config.json",
    }  # fmt: skip
    for source, name in ((talking, "video"), (voice, "sound"), (talking, "output")):
        shutil.copy(source, files[name])
    before, other = files[which].read_bytes(), tmp_path / f"other{'.mp4' if option == '-o' else '.json'}"
    link(files[which], other)
    outputs = {"-o": files["output"], "--report": tmp_path / "report.json"} | {option: other}
    arguments = [files["video"], files["sound"], "--model", model, "--steps", 1]
    sentence = refuse(capfd, [*arguments, *(part for pair in outputs.items() for part in pair)])
    assert f"'{other}'" in sentence and f"'{files[which]}'" in sentence and "would be overwritten" in sentence
    assert files[which].read_bytes() == before and (option == "--report" or not outputs["--report"].exists())


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps pipes and devices elsewhere")
@pytest.mark.parametrize("option", ["--report", "-o"])
def test_a_pipe_or_a_device_is_no_output_and_no_report(talking, voice, tmp_path, capfd, option):
    """Opening a pipe that nobody reads would block for ever."""
    pipe, device, socket_ = (tmp_path / f"{name}.mp4" for name in ("pipe", "device", "socket"))
    os.mkfifo(pipe)
    device.symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(socket_))  # such names are short
        for path in (pipe, device, socket_):
            outputs = {"-o": tmp_path / "out.mp4"} | {option: path}
            sentence = refuse(capfd, [talking, voice, *(part for pair in outputs.items() for part in pair)])
            assert f"'{path}' is a pipe or a device" in sentence


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta", ""])
def test_an_unknown_device_is_refused(talking, voice, tmp_path, capfd, device):
    sentence = refuse(capfd, [talking, voice, "-o", tmp_path / "out.mp4", "--device", device])
    assert f"'{device}'" in sentence and "--device cpu" in sentence


def test_an_unknown_model_is_refused(talking, voice, tmp_path, capfd):
    sentence = refuse(capfd, [talking, voice, "-o", tmp_path / "out.mp4", "--model", "latentsync-9"])
    assert "'latentsync-9'" in sentence and "demo" in sentence
    assert os.listdir(tmp_path) == []


def test_a_corrupt_checkpoint_is_refused(talking, voice, checkpoint, tmp_path, capfd):
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken")) / "latentsync_unet.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1000])
    sentence = refuse(capfd, [talking, voice, "-o", tmp_path / "out.mp4", "--model", broken.parent])
    assert f"'{broken}' is damaged" in sentence
    assert os.listdir(tmp_path) == ["broken"]


def test_a_failed_run_keeps_the_old_output(bad, voice, checkpoint, tmp_path, capfd):
    (tmp_path / "out.mp4").write_bytes(b"old")
    refuse(capfd, [bad / "faceless.mp4", voice, "-o", tmp_path / "out.mp4", "--model", checkpoint, "--steps", 1])
    assert (tmp_path / "out.mp4").read_bytes() == b"old" and os.listdir(tmp_path) == ["out.mp4"]


def test_a_refusal_is_the_only_thing_said_by_the_process(tmp_path):
    process = start("no such.mp4", "a.wav", "-o", tmp_path / "out.mp4")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == ""
    assert err.count("\n") == 1 and "no such.mp4" in err


@pytest.mark.parametrize(
    "option", [("--steps", "0"), ("--steps", "1000"), ("--steps", "x"), ("--guidance", "-1"), ("--seed", "1.5")]
)
def test_numbers_out_of_range_are_refused(option, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["a.mp4", "b.wav", "-o", "c.mp4", *option])
    assert caught.value.code == 2 and option[0] in capsys.readouterr().err


# What works


def variants(folder: Path, talking: Path) -> dict[str, Path]:
    """The talking face as others bring it."""
    made = {}

    def add(name: str, *options, suffix=".mp4"):
        made[name] = folder / f"{name}{suffix}"
        ffmpeg("-i", talking, *options, made[name])

    for rate in ("15", "24", "30000/1001", "60"):
        add(f"{rate.replace('/', ' over ')} fps", "-r", rate, *X264)
    keep = "fps=50,select='not(mod(n,7))+lt(mod(n,20),9)'"
    add("variable rate", "-vf", keep, "-fps_mode", "vfr", *X264)
    add("odd width", "-vf", f"crop={SIDE - 1}:{SIDE}:0:0:exact=1", "-c:v", "ffv1", "-pix_fmt", "yuv444p", suffix=".mkv")
    add("ten bits", "-c:v", "libx264", "-pix_fmt", "yuv420p10le", "-crf", 12)
    return made


VARIANTS = ("15 fps", "24 fps", "30000 over 1001 fps", "60 fps", "variable rate", "odd width", "ten bits")


@pytest.fixture(scope="module")
def brought(tmp_path_factory, talking) -> dict[str, Path]:
    return variants(tmp_path_factory.mktemp("brought"), talking)


@pytest.mark.parametrize("name", VARIANTS)
def test_videos_of_every_kind_work(sync, brought, voice, tmp_path, name):
    report = sync(brought[name], voice)
    rate = grid_rate(probe_video(brought[name]).nominal_rate, "source")
    info = probe_video(tmp_path / "out.mp4").at(rate)
    assert (info.nominal_rate, info.width, info.height, info.pixel_format) == (rate, SIDE, SIDE, "yuv420p")
    assert report["frames"] == info.n_frames == math.ceil(0.78 * rate) and report["frames_without_face"] == 0


def test_a_telephones_portrait_stays_upright(sync, talking, voice, tmp_path):
    """Stored lying, turned by its flag: the face is found, and is painted where it is seen."""
    ffmpeg("-i", talking, "-vf", f"crop={SIDE}:{SIDE - 32}:0:0,transpose=1", *X264, tmp_path / "lying.mp4")
    ffmpeg("-display_rotation", 90, "-i", tmp_path / "lying.mp4", "-c", "copy", tmp_path / "flagged.mp4")
    report = sync(tmp_path / "flagged.mp4", voice)
    assert report["frames_without_face"] == 0
    made = frames_of(tmp_path / "out.mp4")
    assert made.shape == (20, SIDE - 32, SIDE, 3)
    assert psnr(portrait(0)[:20], made[0][:20]) > 30  # the hair is on top


def test_a_clip_of_variable_rate_without_a_face_is_refused(sync, voice, checkpoint, tmp_path, capfd):
    clip = make_vfr_video(tmp_path / "pauses.mp4", seconds=2)
    refuse(capfd, [clip, voice, "-o", tmp_path / "out.mp4", "--model", checkpoint, "--steps", 1])


SOUNDS = {
    "mono 8k.wav": ("-ac", 1, "-ar", 8000),
    "5.1 48k.m4a": ("-ac", 6, "-ar", 48000, "-c:a", "aac"),
    "5.1 48k.wav": ("-ac", 6, "-ar", 48000),
    "stereo.mp3": ("-ac", 2, "-ar", 44100),
    "voice.ogg": ("-c:a", "libvorbis"),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_sound_of_every_kind_works_and_is_kept(sync, talking, tmp_path, name):
    sound = make_sound(tmp_path / name, *SOUNDS[name], seconds=0.6)
    report = sync(talking, sound, "out.mp4", *(["--copy-audio"] if name.endswith(".wav") else []))
    given, made = probe_audio(sound), probe_audio(tmp_path / "out.mp4")
    assert report["frames"] == len(frames_of(tmp_path / "out.mp4")) == frame_count(len(read_audio(sound)))
    assert (made.channels, made.sample_rate) == (given.channels, given.sample_rate)
    if name.endswith(".wav"):
        assert made.codec == "flac"
        raw = [ffmpeg("-i", path, "-map", "0:a", "-f", "s16le", "-") for path in (sound, tmp_path / "out.mp4")]
        assert raw[0] == raw[1]


@pytest.mark.parametrize(
    "output, options, codec",
    [("out.mp4", (), "aac"), ("out.mp4", ("--copy-audio",), "flac"), ("out.mkv", (), "pcm_s16le")],
)
def test_mp4_has_aac_unless_the_sound_is_to_be_kept(sync, talking, voice, tmp_path, output, options, codec):
    sync(talking, voice, output, *options)
    assert probe_audio(tmp_path / output).codec == codec


@pytest.mark.parametrize("seconds, frames", [(0.01, 1), (0.5, 13), (1.5, 38), (2.0, 50)])
def test_the_video_lasts_as_long_as_the_sound(sync, talking, tmp_path, seconds, frames):
    sound = make_sound(tmp_path / "sound.wav", seconds=seconds)
    assert sync(talking, sound)["frames"] == frames
    assert len(frames_of(tmp_path / "out.mp4")) == frames


def test_a_picture_and_a_video_with_sound_work(sync, talking, voice, tmp_path):
    ffmpeg("-i", talking, "-frames:v", 1, tmp_path / "a 100% face.png")
    ffmpeg("-i", talking, "-i", voice, "-c:v", "copy", "-c:a", "aac", tmp_path / "other.mp4")
    report = sync(tmp_path / "a 100% face.png", tmp_path / "other.mp4")
    assert report["frames"] >= 20 and report["frames_without_face"] == 0


NAMES = ("-o", '-- it\'s "Zoë" 100% 声 видео;$HOME&', "-v:0 [a]#?=\\1,'")


@pytest.mark.parametrize("name", NAMES)
def test_names_may_hold_anything(talking, voice, checkpoint, tmp_path, monkeypatch, capsys, name):
    if os.name == "nt":
        pytest.skip("Windows forbids most of these characters")
    monkeypatch.chdir(tmp_path)
    shutil.copy(talking, f"{name}.mp4")
    shutil.copy(voice, f"{name}.wav")
    arguments = [f"{name}.mp4", f"{name}.wav", "-o", f"{name} out.mp4", "--report", f"{name}.json"]
    assert main([*arguments, "--model", str(checkpoint), "--steps", "1"]) == 0
    assert len(frames_of(f"{name} out.mp4")) == 20
    assert json.loads(Path(f"{name}.json").read_text())["frames"] == 20
    assert Path(capsys.readouterr().out.removesuffix("\n")).name == f"{name} out.mp4"


HIDDEN = range(12, 20)


@pytest.fixture(scope="module")
def peekaboo(tmp_path_factory) -> Path:
    """A face that a board hides for a while, in a wider scene that stays."""
    rng = np.random.default_rng(0)
    wall = np.kron(rng.integers(60, 200, (12, 24, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    frames = []
    for t in range(36):
        frame = wall.copy()
        frame[:, 96 : 96 + SIDE] = portrait(t)
        if t in HIDDEN:
            frame[30:, 110:274] = (120, 110, 100)
        frames.append(frame)
    return save_video(tmp_path_factory.mktemp("peekaboo") / "peekaboo.mkv", frames)


def test_a_face_that_leaves_comes_back_softly(sync, peekaboo, tmp_path, capsys):
    sound = make_sound(tmp_path / "sound.wav", seconds=36 / 25)
    report = sync(peekaboo, sound, "out.mkv")
    assert report["frames"] == 36 and report["frames_without_face"] == len(HIDDEN)
    assert f"{len(HIDDEN)} frames show no usable face" in capsys.readouterr().err
    given, made = frames_of(peekaboo), frames_of(tmp_path / "out.mkv")
    for t in HIDDEN:
        assert psnr(given[t], made[t]) > 36  # only the encoder has touched it
    mouth = np.s_[:, 110:150, 160:225]
    change = np.abs(given[mouth].astype(float) - made[mouth]).mean((1, 2, 3))
    full = change[[0, 1, 2, 3, 30, 31, 32, 33]].mean()
    back = change[HIDDEN.stop : HIDDEN.stop + 6] / full
    away = change[HIDDEN.start - 6 : HIDDEN.start][::-1] / full
    for fade in (back, away):
        assert fade[0] < 0.35 and fade[-1] > 0.8 and (np.diff(fade) > -0.1).all()


def test_the_report_says_what_was_done(sync, talking, voice):
    report = sync(talking, voice, "out.mp4", "--seed", "7", "--guidance", "2")
    assert report["settings"]["seed"] == 7
    assert report["settings"]["guidance_scale"] == 2
    assert report["settings"]["steps"] == 1
    assert (report["model"], report["resolution"], report["device"], report["dtype"]) == ("tiny", 64, "cpu", "float32")
    assert set(report["seconds"]) >= {"sound", "reading", *STAGES}
    assert all(0 < seconds <= report["total_seconds"] for seconds in report["seconds"].values())  # they overlap
    assert set(report["waiting"]) == {"reading", "faces", "sound", "crops", "models", "writing"}
    assert 50e6 < report["peak_memory_bytes"] < 8e9


# What is shown, and stopping


def test_progress_in_a_file_is_plain_lines_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lines = ProgressLines()
    for done in range(1, 101):
        now[0] += 1
        for stage in STAGES:
            lines(stage, done, 100)
    lines.close()
    said = capsys.readouterr().err
    assert said.count("\n") == 11 and not set(said) & set("\r\x1b")
    assert said.splitlines()[0] == "faces 10/100, mouths 9/100, writing 9/100, 0.90 frames/s, 101 s left"
    assert said.splitlines()[-1] == "faces 100/100, mouths 100/100, writing 100/100, 1.00 frames/s, 0 s left"


def test_a_terminal_gets_a_bar_a_stage(capsys):
    bars = ProgressBars()
    for done in range(1, 11):
        for stage in STAGES:
            bars(stage, done, 10)
    bars.close()
    said = capsys.readouterr().err
    for stage in STAGES:
        assert f"{stage:8} 100% |" in said
    assert "frames/s" in said and "left" in said


def test_a_piped_run_says_little_and_warns_of_nothing(talking, voice, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    # Only Linux has names that are not text.
    name = os.fsdecode(b"caf\xe9.mp4") if sys.platform == "linux" else "caf\xe9.mp4"
    shutil.copy(talking, tmp_path / name)
    process = start(name, voice, "-o", f"out {name}", "--model", checkpoint, "--steps", 1, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and (tmp_path / f"out {name}").exists()
    assert out.startswith("out caf\\") and out.count("\n") == 1
    assert len(err.splitlines()) <= 4 and not set(err) & set("\r\x1b")
    assert err.startswith("model tiny, 64 px, on cpu\n") and "writing 20/20" in err


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send Ctrl-C to one process")
@pytest.mark.parametrize(
    "when, number",
    [("generating", "SIGINT"), ("writing", "SIGTERM"), ("writing", "SIGHUP"), ("generating", "SIGQUIT")],
)
def test_a_run_stops_at_once_and_leaves_nothing(talking, checkpoint, tmp_path, when, number):
    sound = make_sound(tmp_path / "long.wav", seconds=600)
    out = tmp_path / "out"
    out.mkdir()
    steps = 900 if when == "generating" else 1
    process = start(talking, sound, "-o", out / "a.mp4", "--model", checkpoint, "--steps", steps)
    assert process.stderr.readline().startswith("model ")
    deadline = time.monotonic() + 60
    if when == "generating":
        time.sleep(2)
    else:
        while not any(path.stat().st_size for path in out.rglob("*.mp4")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
    process.send_signal(getattr(signal, number))
    _, err = process.communicate(timeout=60)  # a second on an idle machine; without the signal it would take minutes
    assert process.returncode == 130
    assert err.splitlines()[-1] == f"stopped; {out / 'a.mp4'} was not written" and "Traceback" not in err
    assert os.listdir(out) == []


@pytest.mark.skipif(sys.platform != "linux", reason="makes a terminal as Linux has it")
def test_a_run_whose_terminal_is_closed_stops_and_leaves_nothing(talking, checkpoint, tmp_path):
    sound = make_sound(tmp_path / "long.wav", seconds=600)
    (out := tmp_path / "out").mkdir()
    ours, terminal = os.openpty()
    code = "import fcntl, runpy, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); sys.argv[0] = 'latentsync'; "
    code += "runpy.run_module('latentsync', run_name='__main__')"
    arguments = [talking, sound, "-o", out / "a.mp4", "--model", checkpoint, "--steps", 1]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, start_new_session=True,
        stdin=terminal, stdout=terminal, stderr=terminal,
    )  # fmt: skip
    os.close(terminal)
    reading = threading.Thread(target=lambda: [None for _ in iter(lambda: drain(ours), b"")], daemon=True)
    reading.start()
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in out.rglob("*.mp4")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.close(ours)
    assert process.wait(timeout=60) == 130
    assert os.listdir(out) == []


def drain(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_a_run_that_ignores_hangups_goes_on(talking, checkpoint, tmp_path):
    """As nohup starts it."""
    sound = make_sound(tmp_path / "sound.wav", seconds=2)
    process = start(
        talking, sound, "-o", tmp_path / "a.mp4", "--model", checkpoint, "--steps", 1,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    assert process.stderr.readline().startswith("model ")
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=120)
    assert process.returncode == 0 and len(frames_of(tmp_path / "a.mp4")) == 50


# What it costs


def test_memory_does_not_grow_with_the_clip(talking, checkpoint, tmp_path):
    peaks = []
    for seconds in (10, 40):
        clip, sound, report = (tmp_path / f"{seconds}{suffix}" for suffix in (".mp4", ".wav", ".json"))
        ffmpeg("-stream_loop", -1, "-t", seconds, "-i", talking, "-c", "copy", clip)
        make_sound(sound, seconds=seconds)
        process = start(
            clip, sound, "-o", tmp_path / "out.mp4", "--model", checkpoint, "--steps", 1, "--guidance", 1,
            "--report", report, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.wait(timeout=300) == 0
        found = json.loads(report.read_text())
        assert found["frames"] == 25 * seconds and found["frames_without_face"] == 0
        peaks.append(found["peak_memory_bytes"])
    print(f"10 s: {peaks[0] / 1e6:.0f} MB, 40 s: {peaks[1] / 1e6:.0f} MB")
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate"),
])  # fmt: skip
def test_memory_that_does_not_hold_the_model_is_a_sentence(
    capfd, talking, voice, tmp_path, checkpoint, monkeypatch, error
):
    def load(*_):
        raise error

    monkeypatch.setattr("latentsync.checkpoints.load.load_weights", load)
    sentence = refuse(capfd, [talking, voice, "-o", tmp_path / "out.mp4", "--model", checkpoint])
    assert "memory" in sentence and "--device cpu" in sentence


def test_a_report_that_cannot_be_written_is_refused_before_the_work(capfd, talking, voice, tmp_path, checkpoint):
    output = tmp_path / "out.mp4"
    arguments = [talking, voice, "-o", output, "--model", checkpoint, "--report", tmp_path / f"{'a' * 300}.json"]
    assert "report" in refuse(capfd, arguments) and not output.exists()
