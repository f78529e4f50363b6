"""Lists of jobs: what a row may say, what is refused and how, and that a list that was killed is finished."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clips import make_sound
from filelock import FileLock

from latentsync.checkpoints import load
from latentsync.errors import UserError
from latentsync.media import probe_audio, probe_video
from optim import batch
from optim.__main__ import build_parser
from optim.batch import main, read_done, results_path
from optim.job_list import Row, read_list

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(folder: Path, data: bytes | str, name: str = "list.jsonl") -> list[Row]:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return read_list(path, build_parser)


def row(output: str = "o.mp4", **settings: object) -> str:
    return json.dumps({"video": "a.mp4", "audio": "a.wav", "output": output} | settings) + "\n"


# What a list may be


def test_a_row_of_json_sets_the_options_of_the_command_line(tmp_path):
    [found] = rows_of(
        tmp_path, row(level=0.5, steps=12, crf=20.5, face="left", **{"copy-audio": True, "silence_gate": False})
    )
    args = found.args
    assert (args.video, args.output) == (str(tmp_path / "a.mp4"), str(tmp_path / "o.mp4"))
    assert (args.level, args.steps, args.crf, args.face) == ("0.5", 12, 20.5, ["left"])
    assert args.copy_audio is True and args.silence_gate == "off"


def test_a_row_may_take_a_part_of_a_film_and_lay_the_voice_into_it(tmp_path):
    [found] = rows_of(tmp_path, row(to="0:01:30", at=2, **{"from": 1.5, "at-sound": "mix"}))
    args = vars(found.args)
    assert [args[name] for name in ("from", "to", "at", "at_sound")] == [1.5, 90, 2, "mix"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_of_any_spreadsheet_is_read(tmp_path, delimiter):
    lines = [
        'Video,audio,"output",steps,copy-audio,graphs,', 'a.mp4,"b, ""c"".wav",o.mp4,12,yes,no,', ",,,,,,", "",
        '"two\r\nlines.mp4",b.wav,p.mp4',
    ]  # fmt: skip
    text = "\r\n".join(lines).replace(", ", "§").replace(",", delimiter).replace("§", ", ")
    first, second = rows_of(tmp_path, b"\xef\xbb\xbf" + text.encode(), "list.csv")
    assert first.line == 2 and first.args.audio == str(tmp_path / 'b, "c".wav')
    assert (first.args.steps, first.args.copy_audio, first.args.graphs) == (12, True, False)
    assert second.line == 5 and second.args.video == str(tmp_path / "two\r\nlines.mp4")
    assert second.args.copy_audio is False and second.args.graphs is None


def test_marks_of_windows_and_blank_lines_are_no_part_of_a_list(tmp_path):
    data = b"\xef\xbb\xbf" + row("x.mp4").replace("\n", "\r\n").encode() + b"\r\n  \r\n" + row("b.mp4").encode()
    assert [(found.line, found.error) for found in rows_of(tmp_path, data)] == [(1, None), (4, None)]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names that are not text")
def test_names_may_be_bytes_that_are_no_text(tmp_path):
    [found] = rows_of(tmp_path, b'{"video": "caf\xe9.mp4", "audio": "a.wav", "output": "o.mp4"}')
    assert os.fsencode(found.args.video).endswith(b"/caf\xe9.mp4")


def test_a_folder_of_a_model_is_relative_to_the_list_and_a_name_stays_one(tmp_path):
    (tmp_path / "mine").mkdir()
    found = rows_of(tmp_path, row("x.mp4", model="mine") + row("b.mp4", model="demo") + row("c.mp4", model="other"))
    assert [one.args.model for one in found] == [str(tmp_path / "mine"), "demo", "other"]


def test_a_list_of_ten_thousand_rows_is_read(tmp_path):
    found = rows_of(tmp_path, "".join(row(f"{number}.mp4") for number in range(10_000)))
    assert len(found) == 10_000 and not any(one.error for one in found)


# What is wrong with a row


BAD_ROWS = {
    "{": "not JSON", "# a comment": "not JSON", "[" * 100_000: "not JSON", "1" * 5000: "not JSON",
    "[1]": "is an object", '{"audio": "a.wav"}': "has no video and no output",
    '{"video": "a", "video": "b"}': "stands twice", '{"Video": "a", "video": "b"}': "stands twice",
    row(guidance=float("nan")): "NaN is no number", row(guidance=1e999): "Infinity is no number",
    row(guidance=5).replace("5", "1e999"): "--guidance: inf is not between 0 and 10",
    row(steps=0): "--steps: 0 is not between 1 and 999", row(steps=1.5): "--steps", row(face="top"): "--face",
    row(steps=[1]): "neither text nor a number", row(foo=1): "no setting 'foo'", row(help=1): "no setting 'help'",
    row(version=1): "no setting", row(stepz=1): "no setting", row(step=1): "no setting",
    row(**{"copy-audio": "maybe"}): "give true or false", row("\ud800.mp4"): "no character", row("\0.mp4"): "zero byte",
    row("a.mp4"): "would be overwritten", row("./a.wav"): "would be overwritten",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_row_is_a_sentence_of_that_row_alone(tmp_path, text):
    good, bad, last = rows_of(tmp_path, row("good.mp4") + text.rstrip() + "\n" + row("last.mp4"))
    assert good.error is None and last.error is None
    assert bad.line == 2 and BAD_ROWS[text] in bad.error and bad.error.endswith(".") and bad.args is None


def test_faults_of_a_table_are_sentences_of_their_rows(tmp_path):
    text = "video,audio,output,foo\n# a comment\na,b,c.mp4,1\na,b,d.mp4,,5\n" + 'a,"b"c,e.mp4\na,b,f.mp4\na,"b,g.mp4\n'
    found = rows_of(tmp_path, text, "list.csv")
    words = ["has no audio", "no setting 'foo'", "5 cells", "not CSV", None, "not CSV"]
    assert [one.line for one in found] == [2, 3, 4, 5, 6, 7]
    assert all(one.error is None if word is None else word in one.error for one, word in zip(found, words, strict=True))


def test_the_second_row_with_an_output_is_refused(tmp_path):
    (tmp_path / "sub").mkdir()
    found = rows_of(tmp_path, row("o.mp4") + row("sub/../o.mp4") + row("p.mp4", report="o.mp4") + row("q.mp4"))
    assert [one.error is None for one in found] == [True, False, False, True]
    assert "line 1" in found[1].error and "line 1" in found[2].error


# What is wrong with a list


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("missing.jsonl", None, "no file"), ("list.txt", b"x", ".jsonl, .ndjson, .csv"), ("a.csv", b"", "is empty"),
        ("a.jsonl", b"\n\n", "no rows"), ("a.csv", b"video,audio,output\n", "no rows"),
        ("a.csv", b"a.mp4,a.wav,o.mp4\n", "lacks a column video"),
        ("a.csv", b"video,audio,output,Video\n", "names a column twice"),
        ("a.csv", "video,audio,output\n".encode("utf-16"), "not text in UTF-8"),
    ],
)  # fmt: skip
def test_a_list_that_cannot_be_read_is_one_sentence_and_exit_code_2(tmp_path, capsys, name, data, words):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    assert main([str(tmp_path / name)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and words in said.err and name in said.err
    assert not results_path(tmp_path / name).exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps pipes elsewhere")
def test_a_pipe_is_no_list(tmp_path, capsys):
    """Opening one that nobody writes to would block for ever."""
    os.mkfifo(tmp_path / "list.jsonl")
    assert main([str(tmp_path / "list.jsonl")]) == 2
    assert "not a regular file" in capsys.readouterr().err


def test_a_list_is_worked_on_by_one_run_at_a_time(tmp_path, capsys):
    (tmp_path / "list.jsonl").write_text(row())
    with FileLock(tmp_path / ".list.jsonl.lock"):
        assert main([str(tmp_path / "list.jsonl")]) == 2
    assert "another run" in capsys.readouterr().err


def test_a_file_of_results_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "list.jsonl").write_text(row())
    results_path(tmp_path / "list.jsonl").mkdir()
    assert main([str(tmp_path / "list.jsonl")]) == 2
    assert "results" in capsys.readouterr().err


# What is done


@pytest.fixture
def folder(talking, tmp_path) -> Path:
    """Where a.mp4 and a.wav lie."""
    (tmp_path / "a.mp4").write_bytes(talking.read_bytes())
    make_sound(tmp_path / "a.wav", seconds=0.2)
    return tmp_path


@pytest.fixture
def work(folder, checkpoint, capsys):
    """Run a list of rows with the tiny checkpoint; returns the exit code and the lines on stderr."""

    def run(rows: list[dict[str, object]]) -> tuple[int, list[str]]:
        common = {"video": "a.mp4", "audio": "a.wav", "model": str(checkpoint), "steps": 1, "level": "conservative"}
        (folder / "list.jsonl").write_text("".join(json.dumps(common | one) + "\n" for one in rows))
        capsys.readouterr()
        return main([str(folder / "list.jsonl")]), capsys.readouterr().err.splitlines()

    return run


def summary(done: int, before: int, failed: int, total: int, folder: Path) -> str:
    path = folder / "list.jsonl.results.jsonl"
    return f"{total} rows: {done} done, {before} done before, {failed} failed; see {path}"


def test_rows_share_the_model_and_a_failing_one_does_not_stop_the_rest(work, folder, monkeypatch):
    loaded = []
    load_weights = load.load_weights
    monkeypatch.setattr(load, "load_weights", lambda *given: loaded.append(given) or load_weights(*given))
    make_sound(folder / "b.wav", seconds=0.3)
    code, said = work(
        [
            {"output": "1.mp4"}, {"output": "2.mp4", "video": "none.mp4"}, {"output": "no/3.mp4"},
            {"output": "4.mkv", "audio": "b.wav", "seed": 7, "report": "4.json"}, {"output": "5.mp4", "level": "nine"},
            {"output": "6.mp4", "model": "none"},
        ]
    )  # fmt: skip
    assert code == 1 and len(loaded) == 1
    sentences = [line for line in said if line.startswith("line ")]
    assert [line.partition(":")[0] for line in sentences] == ["line 2", "line 3", "line 5", "line 6"]
    assert "none.mp4" in sentences[0] and "does not exist" in sentences[1] and "'nine'" in sentences[2]
    assert "There is no model 'none'" in sentences[3]
    assert said[-1] == summary(2, 0, 4, 6, folder)
    assert abs(probe_audio(folder / "4.mkv").duration - 0.3) < 0.01 and probe_video(folder / "1.mp4").n_frames == 5
    assert json.loads((folder / "4.json").read_text())["settings"]["seed"] == 7
    entries = [json.loads(line) for line in results_path(folder / "list.jsonl").read_text().splitlines()]
    assert [entry["status"] for entry in entries] == ["done", "failed", "failed", "done", "failed", "failed"]
    assert not list(folder.glob(".*"))


def test_what_is_done_is_skipped_until_the_row_or_a_file_changes_or_the_output_is_gone(work, folder):
    rows = [{"output": f"{number}.mp4"} for number in range(4)]
    assert work(rows)[0] == 0
    code, said = work(rows)
    assert code == 0 and said == [summary(0, 4, 0, 4, folder)]
    (folder / "1.mp4").unlink()
    rows[2]["seed"] = 8
    results = results_path(folder / "list.jsonl")
    results.write_bytes(results.read_bytes() + b'{"status": "done", "output": "0.mp')  # as a power cut leaves it
    rows.append({"output": "4.mp4", "audio": "b.wav"})
    assert [line for line in work(rows)[1] if line.startswith("line")] == [f"line 5: {no_file(folder / 'b.wav')}"]
    make_sound(folder / "b.wav", seconds=0.2)
    assert work(rows)[1][-1] == summary(1, 4, 0, 5, folder)
    make_sound(folder / "b.wav", seconds=0.3)
    del rows[2]["seed"]  # back to what was done before, but that output has been replaced
    assert work(rows)[1][-1] == summary(2, 3, 0, 5, folder)
    assert len(read_done(results)) == 5


def no_file(path: Path) -> str:
    return f"There is no file {path}; check the name of the sound."


def test_a_fault_of_the_program_is_a_sentence_without_a_traceback(work, monkeypatch):
    def fail(*_):
        raise RuntimeError("a\nfault")

    monkeypatch.setattr(batch.plain, "run", fail)
    code, said = work([{"output": "1.mp4"}, {"output": "2.mp4"}])
    sentences = [line for line in said if line.startswith("line")]
    assert code == 1 and len(sentences) == 2 and "RuntimeError: a\\nfault" in sentences[0]


def test_ctrl_c_stops_the_list_and_what_is_done_stays_done(work, folder, monkeypatch):
    run = batch.plain.run

    def stopping(args, *given):
        if args.output.endswith("2.mp4"):
            raise KeyboardInterrupt
        run(args, *given)

    monkeypatch.setattr(batch.plain, "run", stopping)
    rows = [{"output": f"{number}.mp4"} for number in range(1, 5)]
    code, said = work(rows)
    assert code == 130 and "1 done, 0 done before, 0 failed, 3 not begun or not finished" in said[-1]
    monkeypatch.setattr(batch.plain, "run", run)
    assert work(rows)[1][-1] == summary(3, 1, 0, 4, folder)


def test_neither_the_list_nor_the_results_are_overwritten(work, folder):
    rows = [{"output": "1.mp4", "report": "list.jsonl"}, {"output": "2.mp4", "report": "list.jsonl.results.jsonl"}]
    (folder / "link.mp4").symlink_to(folder / "list.jsonl")
    code, said = work([*rows, {"output": "link.mp4"}])
    assert code == 1 and sum("would be overwritten" in line or "is written by line 1" in line for line in said) == 3
    assert (folder / "list.jsonl").read_text().count("\n") == 3


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_a_list_that_is_killed_and_started_again_does_every_good_row_once(folder, checkpoint):
    common = {"video": "a.mp4", "audio": "a.wav", "model": str(checkpoint), "steps": 1, "level": "conservative"}
    rows = [common | {"output": f"{number}.mp4", "seed": number} for number in range(20)]
    rows[3] |= {"video": "missing.mp4"}
    rows[9] |= {"steps": 0}
    rows[15] |= {"output": "0.mp4"}
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    command = [sys.executable, "-m", "optim.batch", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    results = results_path(path)
    deadline = time.monotonic() + 300
    while not results.exists() or results.read_bytes().count(b"\n") < 7:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {name: (folder / name).stat().st_mtime_ns for name in read_done(results)}
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 1
    sentences = [line for line in again.stderr.splitlines() if line.startswith("line ")]
    assert [line.partition(":")[0] for line in sentences] == ["line 4", "line 10", "line 16"]
    entries = [json.loads(line) for line in results.read_text().splitlines()]
    done = [entry["output"] for entry in entries if entry["status"] == "done"]
    assert sorted(done) == sorted(f"{n}.mp4" for n in range(20) if n not in (3, 9, 15))
    assert 6 <= len(before) < 17 and all((folder / name).stat().st_mtime_ns == time for name, time in before.items())
    assert all(probe_video(folder / name).n_frames == 5 for name in done)
    assert not list(folder.glob(".*"))


def test_a_damaged_file_of_results_does_no_harm(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'\xff\n[1]\n{"status": "done"}\n{"status": "done", "output": "a", "row": "1"}\n' + b"[" * 10_000)
    assert read_done(path) == {"a": "1"}


def test_a_list_that_is_no_list_raises_a_user_error(tmp_path):
    with pytest.raises(UserError):
        read_list(tmp_path / "none.jsonl", build_parser)
