"""What a run imports: packages that take seconds to load and that no run needs stay out."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SLOW = ("diffusers", "transformers", "peft", "scipy", "sympy", "torch._dynamo", "torch._inductor", "gradio", "plotly")

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
