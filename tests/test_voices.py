"""Several voices for one film on the command line: a result each, in a folder, with one loaded model."""

import shutil
from pathlib import Path

import pytest
from clips import make_sound
from test_cli import refuse

from latentsync import __main__ as command_line
from latentsync.__main__ import main
from latentsync.checkpoints import load
from latentsync.media import probe_audio
from latentsync.several import result_paths
from optim.__main__ import main as fast_main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def arguments(checkpoint, talking, tmp_path) -> list[str]:
    """A film and three voices of 0.2, 0.3 and 0.4 s, of which two have the same name."""
    for number, name in enumerate(("one", "sub/one", "two"), 2):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make_sound(tmp_path / f"{name}.wav", seconds=number / 10)
    voices = [str(tmp_path / f"{name}.wav") for name in ("one", "sub/one", "two")]
    return [str(talking), *voices, "--model", str(checkpoint), "--steps", "1", "-o", str(tmp_path / "out")]


@pytest.mark.parametrize("run", [main, fast_main])
def test_every_voice_gets_a_result_and_the_model_is_loaded_once(arguments, tmp_path, monkeypatch, capsys, run):
    loaded = []
    load_weights = load.load_weights
    monkeypatch.setattr(load, "load_weights", lambda *given: loaded.append(given) or load_weights(*given))
    assert run(arguments) == 0
    results = [tmp_path / "out" / f"talking-{name}.mp4" for name in ("one", "one-2", "two")]
    assert capsys.readouterr().out.split() == [str(path) for path in results]
    assert [round(probe_audio(path).duration, 1) for path in results] == [0.2, 0.3, 0.4]
    assert len(loaded) == 1 and len(list((tmp_path / "out").iterdir())) == 3


def test_a_voice_that_cannot_be_used_does_not_stop_the_others(arguments, tmp_path, capsys):
    (tmp_path / "one.wav").write_bytes(b"no sound")
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert str(tmp_path / "one.wav") in said.err and "Traceback" not in said.err
    assert [Path(line).name for line in said.out.split()] == ["talking-one-2.mp4", "talking-two.mp4"]


def test_an_interruption_keeps_the_finished_results_and_names_the_other(arguments, tmp_path, monkeypatch, capsys):
    run = command_line.run

    def stopping(args, *given):
        if args.output.endswith("-2.mp4"):
            raise KeyboardInterrupt
        run(args, *given)

    monkeypatch.setattr(command_line, "run", stopping)
    assert main(arguments) == 130
    assert f"stopped; {tmp_path / 'out' / 'talking-one-2.mp4'} was not written" in capsys.readouterr().err
    assert (tmp_path / "out" / "talking-one.mp4").exists()


@pytest.mark.parametrize(
    "output, words", [("file", "cannot be made"), ("none/out", "cannot be made"), ("out.mp4", "is a folder")]
)
def test_an_output_that_can_be_no_folder_is_refused(arguments, tmp_path, capfd, output, words):
    (tmp_path / "file").touch()
    sentence = refuse(capfd, [*arguments[:-1], tmp_path / output])
    assert words in sentence and str(tmp_path / output) in sentence


def test_one_report_for_several_results_is_refused(arguments, tmp_path, capfd):
    assert "--report" in refuse(capfd, [*arguments, "--report", tmp_path / "report.json"])
    assert not (tmp_path / "out").exists()


def test_a_result_has_the_name_of_no_input_and_of_no_other_result(tmp_path):
    film, voice = tmp_path / "a.mp4", tmp_path / "a-b.mp4"
    for path in (film, voice):
        path.touch()
    (tmp_path / "a-c.mp4").hardlink_to(film)
    names = ["b.wav", "c.wav", "a-b.mp4", "x/b.wav", "d.wav", "D.wav"]
    paths = result_paths(tmp_path, str(film), [str(tmp_path / name) for name in names])
    wanted = ["a-b-2", "a-c-2", "a-a-b", "a-b-3", "a-d", "a-D-2"]
    assert [path.name for path in paths] == [f"{name}.mp4" for name in wanted]
    (tmp_path / "a-d.mp4").touch()  # an earlier result, which the same command replaces
    assert result_paths(tmp_path, str(film), [str(tmp_path / name) for name in names]) == paths


def test_long_names_give_names_that_a_disk_can_hold(tmp_path):
    long = "声" * 80
    one, other = result_paths(tmp_path, f"{long}.mp4", [f"{long}1.wav", f"{long}2.wav"])
    assert one != other
    for path in (one, other):
        shutil.copy(__file__, path)


def test_one_voice_is_written_to_the_file_that_is_named(arguments, tmp_path):
    film, voice, *_ = arguments
    assert main([film, voice, *arguments[4:-1], str(tmp_path / "out.mp4")]) == 0
    assert (tmp_path / "out.mp4").is_file()
