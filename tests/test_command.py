"""The console script `latentsync` and its commands."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from optim.cli import COMMANDS, main, usage

ROOT = Path(__file__).resolve().parent.parent


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["latentsync", *arguments])
    return main()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_its_options_under_its_own_name(command, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_code:
        run(monkeypatch, command, "--help")
    assert exit_code.value.code == 0
    assert f"usage: latentsync {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_without_a_command_the_commands_are_listed(arguments, monkeypatch, capsys):
    assert run(monkeypatch, *arguments) == 0
    out = capsys.readouterr().out
    assert out.strip() == usage() and all(command in out for command in COMMANDS)


def test_a_command_that_does_not_exist_is_one_sentence(monkeypatch, capsys):
    assert run(monkeypatch, "snyc", "a.mp4") == 2
    assert capsys.readouterr().err.startswith("There is no command 'snyc'.\n")


def test_a_bad_input_of_a_command_is_one_sentence_and_exit_code_2(monkeypatch, capsys, tmp_path):
    assert (
        run(monkeypatch, "sync", str(tmp_path / "no.mp4"), str(tmp_path / "no.wav"), "-o", str(tmp_path / "o.mp4")) == 2
    )
    assert "no.mp4" in capsys.readouterr().err


def test_the_list_of_commands_comes_without_torch():
    code = "import sys, optim.cli; print('torch' in sys.modules or 'gradio' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "False"


def test_the_console_script_is_declared():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]["latentsync"]
    module, _, function = declared.partition(":")
    assert getattr(importlib.import_module(module), function) is main
