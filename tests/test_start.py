"""What a run imports: packages that take seconds to load and that no run needs stay out."""

import importlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from latentsync.options import import_early

ROOT = Path(__file__).resolve().parent.parent
SLOW = (
    "diffusers", "transformers", "peft", "scipy", "sympy", "torch._dynamo", "torch._inductor", "gradio", "plotly",
    "matplotlib", "sounddevice", "moviepy", "huggingface_hub", "triton",
)  # fmt: skip

RUN = """
import sys
from optim.__main__ import main
code = main(sys.argv[2:])
imported = [name for name in sys.argv[1].split(",") if name in sys.modules]
print(code, *imported)
"""


def test_a_run_from_file_to_file_imports_no_slow_package_that_it_does_not_need(checkpoint, talking, voice, tmp_path):
    options = ["--model", str(checkpoint), "--steps", "1", "--device", "cpu", "-o", str(tmp_path / "out.mp4")]
    command = [sys.executable, "-c", RUN, ",".join(SLOW), str(talking), str(voice), *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.stdout.splitlines()[-1].split() == ["0"], result.stdout + result.stderr


PLOT = """
import sys
from latentsync.mediapipe_vision import deferred
with deferred("matplotlib", "matplotlib.pyplot"):
    import matplotlib.pyplot as placeholder
print("matplotlib" in sys.modules, callable(placeholder.plot), "matplotlib.pyplot" in sys.modules)
"""


def test_a_package_left_out_of_an_import_is_imported_when_something_uses_it():
    pytest.importorskip("matplotlib", reason="MediaPipe no longer brings it")
    result = subprocess.run([sys.executable, "-c", PLOT], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.stdout.split() == ["False", "True", "True"], result.stdout + result.stderr


def test_what_is_wrong_with_an_early_import_is_raised_where_the_module_is_needed(tmp_path, monkeypatch):
    (tmp_path / "broken_early.py").write_text("raise ImportError('a library is missing')\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_early("broken_early")
    for thread in threading.enumerate():
        if thread.name == "imports":
            thread.join()
    with pytest.raises(ImportError, match="a library is missing"):
        importlib.import_module("broken_early")
