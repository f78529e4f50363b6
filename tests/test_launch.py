"""launch.sh with a stand-in for Python that writes down what it is asked; nothing is installed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASH = shutil.which("bash")

pytestmark = pytest.mark.skipif(os.name == "nt" or BASH is None, reason="launch.sh needs bash")

FAKE_PYTHON = f"""#!{BASH}
printf '%s\\n' "$*" >>"$CALLS"
case "$*" in
    *"import ensurepip"*) echo "$FAKE_KIND" ;;
    *"sys.version_info[:2]"*) echo "(3, 11)" ;;
    *"-m venv "*) mkdir -p "${{!#}}/bin"; cp "$0" "${{!#}}/bin/python" ;;
    *torch_build.py) [ -n "$FAKE_TORCH" ] && echo "$FAKE_TORCH" || exec {sys.executable!r} -S "$@" ;;  # -S: no torch
    *download.pytorch.org*) exit "${{FAKE_TORCH_STATUS:-0}}" ;;
    *"-m pip install"*"-r "*) exit "${{FAKE_PIP_STATUS:-0}}" ;;
    *"-m pip install"*" -e "*) cp "${{!#}}/latentsync" "${{0%/*}}/latentsync" ;;
    "-m pytest"*) [ -z "$TRITON_INTERPRET" ] || exit "$FAKE_KERNELS_STATUS"; exit "$FAKE_TESTS_STATUS" ;;
esac
"""

# What pip makes of the project's command, for a stand-in that shows what it is given.
REPORT_ARGUMENTS = f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.getcwd(), sys.argv[1:]]))\n"


class Copy:
    """A copy of the launcher in a folder with an awkward name, and only fake Pythons on the PATH."""

    def __init__(self, folder: Path):
        self.root = folder / "it's a copy"
        self.tools = folder / "tools"
        self.calls_file = folder / "calls"
        (self.root / "optim").mkdir(parents=True)
        self.tools.mkdir()
        (self.root / "latentsync").write_text(REPORT_ARGUMENTS)
        (self.root / "latentsync").chmod(0o755)
        (self.root / "requirements.exact.txt").write_text("torch==2.13.0\n")
        (self.root / "requirements.cluster.txt").write_text("ray==2.60.0\n")
        (self.root / "requirements.restore.txt").write_text("spandrel==0.4.2\ntorchvision==0.28.0\n")
        shutil.copy(ROOT / "launch.sh", self.root)
        (self.root / "tests").mkdir()
        (self.root / "tests" / "requirements.txt").write_text("pytest==9.2.0\n")
        shutil.copy(ROOT / "optim" / "torch_build.py", self.root / "optim")
        for tool in ("cat", "cp", "dirname", "mkdir", "readlink", "rm", "sed"):
            os.symlink(shutil.which(tool), self.tools / tool)

    def add_python(self, name: str) -> None:
        (self.tools / name).write_text(FAKE_PYTHON)
        (self.tools / name).chmod(0o755)

    def add_gpu(self, driver: str, capability: str = "8.9") -> None:
        """A stand-in for nvidia-smi that shows one GPU."""
        smi = self.tools / "nvidia-smi"
        smi.write_text(f"#!{BASH}\necho '{driver}, {capability}'\n")
        smi.chmod(0o755)

    def start(self, *arguments: str, script: Path | None = None, cwd: Path | None = None, **variables: str):
        environment = {"PATH": str(self.tools), "CALLS": str(self.calls_file), "FAKE_KIND": "usable"}
        self.calls_file.write_text("")
        return subprocess.run(
            [BASH, str(script or self.root / "launch.sh"), *arguments],
            capture_output=True,
            text=True,
            cwd=cwd or self.root,
            env=environment | variables,
            timeout=60,
        )

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()

    def installs(self) -> list[str]:
        """The calls of pip for a list of packages; the one for their hashes, before it, is left out."""
        calls = [call for call in self.calls() if "pip install" in call and "-r " in call]
        return [call for call in calls if "--require-hashes" not in call]

    def torch_installs(self) -> list[str]:
        """What is installed from pytorch.org: the index and the packages."""
        return [call.partition("--extra-index-url ")[2] for call in self.calls() if "--extra-index-url" in call]


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


@pytest.fixture
def with_python(copy):
    copy.add_python("python3")
    return copy


def test_scripts_parse():
    for script in ("launch.sh", ".ci/run"):
        subprocess.run([BASH, "-n", str(ROOT / script)], check=True)
        assert os.access(ROOT / script, os.X_OK), f"{script} is not executable"


def test_help_lists_the_commands_and_installs_nothing(copy):
    result = copy.start("help")
    assert result.returncode == 0
    for command in ("demo", "sync VIDEO AUDIO", "test"):
        assert command in result.stdout
    assert not (copy.root / ".venv").exists()


def test_unknown_command_is_named(copy):
    result = copy.start("snyc", "a.mp4")
    assert result.returncode == 2
    assert "snyc" in result.stderr


def test_the_page_gets_its_options(with_python):
    assert with_python.start("--share", "--server-port", "80").returncode == 0
    assert with_python.calls()[-1].endswith("app.py --share --server-port 80")


def test_no_python_is_one_sentence(copy):
    result = copy.start("sync")
    assert result.returncode == 2
    assert "No 64-bit Python 3.10 to 3.13 was found" in result.stderr
    assert result.stderr.count("\n") == 1


def test_python_without_venv_names_the_package(with_python):
    result = with_python.start("sync", FAKE_KIND="no venv")
    assert result.returncode == 2
    assert "python3-venv" in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_unsuitable_python_named_by_the_user_is_refused(with_python):
    result = with_python.start("sync", PYTHON="/nowhere/python")
    assert result.returncode == 2
    assert "PYTHON=/nowhere/python" in result.stderr


def test_a_python_on_the_path_that_does_not_run_is_passed_over(with_python):
    (with_python.tools / "python3.13").write_text(f"#!{BASH}\nexit 127\n")
    (with_python.tools / "python3.13").chmod(0o755)
    assert with_python.start("sync").returncode == 0


def test_second_start_installs_nothing_until_the_requirements_change(with_python):
    assert with_python.start("sync").returncode == 0
    assert len(with_python.installs()) == 1
    assert with_python.start("sync").returncode == 0
    assert with_python.installs() == []
    (with_python.root / "requirements.exact.txt").write_text("torch==2.14.0\n")
    assert with_python.start("sync").returncode == 0
    assert len(with_python.installs()) == 1


@pytest.mark.parametrize("option", ["--gpus", "--gpus=all", "--cluster"])
def test_the_packages_for_several_gpus_are_installed_when_an_option_first_asks_for_them(with_python, option):
    assert with_python.start("sync", "a.mp4", "--", option).returncode == 0
    assert len(with_python.installs()) == 1
    assert with_python.start("sync", "a.mp4", option, "2").returncode == 0
    [call] = with_python.installs()
    assert call.endswith("requirements.cluster.txt")
    assert with_python.start("demo", option, "2").returncode == 0 and with_python.installs() == []
    assert with_python.start(option, "2").returncode == 0 and with_python.calls()[-1].endswith(f"app.py {option} 2")


def test_the_page_gets_the_packages_for_several_gpus(with_python):
    assert with_python.start("--gpus", "all").returncode == 0
    assert [call.rpartition("/")[2] for call in with_python.installs()] == [
        "requirements.exact.txt", "requirements.cluster.txt",
    ]  # fmt: skip


def test_on_windows_the_same_options_install_the_same_packages():
    """By its text: the script runs nowhere else."""
    text = (ROOT / "launch.bat").read_text(encoding="utf-8")
    for label, program in (("app", "app.py"), ("sync", "latentsync.exe"), ("demo", "latentsync.exe")):
        _, found, command = text.partition(f"\n:{label}\n")
        before, runs, _ = command.partition(program)
        steps = [line for line in before.splitlines() if line.startswith(("call", "if errorlevel"))]
        assert found and runs and steps == [
            "call :install", "if errorlevel 1 goto stop", "call :install_cluster", "if errorlevel 1 goto stop",
            "call :install_restore", "if errorlevel 1 goto stop",
        ]  # fmt: skip
    arguments = text.partition("\n:next_argument\n")[2].partition("\n:dispatch\n")[0]
    assert re.findall(r'"%~1"=="(--\w+)" set "(\w+)=1"', arguments) == [
        ("--gpus", "CLUSTER"), ("--cluster", "CLUSTER"), ("--restore", "RESTORE"),
    ]  # fmt: skip
    assert '"%~1"=="--" goto dispatch' in arguments and "shift /1" in arguments
    install = text.partition("\n:install_cluster\n")[2].partition("\nexit /b 0\n\n")[0]
    assert install.startswith("if not defined CLUSTER exit /b 0") and '-r "%ROOT%\\requirements.cluster.txt"' in install


@pytest.mark.parametrize("option", ["--restore", "--restore=net.pth"])
def test_the_packages_for_restorers_are_installed_when_an_option_first_asks_for_them(with_python, option):
    assert with_python.start("sync", "a.mp4", "--restore-strength", "1", "--", option).returncode == 0
    assert len(with_python.installs()) == 1
    assert with_python.start("sync", "a.mp4", option, "net.pth").returncode == 0
    [call] = with_python.installs()
    assert call.endswith("requirements.restore.txt")
    for command in ("demo",), ("sync",), ():
        assert with_python.start(*command, option, "net.pth").returncode == 0 and with_python.installs() == []
    assert with_python.start("sync", option, "net.pth", "--gpus", "2").returncode == 0
    assert [call.rpartition("/")[2] for call in with_python.installs()] == ["requirements.cluster.txt"]


def test_torchvision_is_of_the_build_of_torch(with_python):
    assert with_python.start("sync", "--restore", "net.pth", LATENTSYNC_TORCH="cpu").returncode == 0
    index = "https://download.pytorch.org/whl/cpu"
    assert with_python.torch_installs() == [f"{index} torch==2.13.0+cpu", f"{index} torchvision==0.28.0+cpu"]


def test_a_folder_that_was_moved_is_installed_again(with_python):
    with_python.start("sync")
    with_python.root = with_python.root.rename(with_python.root.with_name("moved"))
    assert with_python.start("sync", "a").returncode == 0
    assert len(with_python.installs()) == 1 and with_python.start("sync").returncode == 0
    assert with_python.installs() == []


def test_a_failed_install_is_said_and_repeated(with_python):
    result = with_python.start("sync", FAKE_PIP_STATUS="1")
    assert result.returncode == 2
    assert "Installing the packages failed" in result.stderr
    assert result.stdout == ""
    assert with_python.start("sync").returncode == 0
    assert len(with_python.installs()) == 1


def test_sync_keeps_the_folder_and_every_argument(with_python, tmp_path):
    odd = ["a b.mp4", 'it\'s "it".wav', "-o", "", "--", "-x.mp4", "$HOME*", "日本語.mp4", "a\nb", "\\ %s"]
    stand = tmp_path / "where the user stands"
    stand.mkdir()
    result = with_python.start("sync", *odd, cwd=stand)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [str(stand), ["sync", *odd]]


def test_demo_uses_the_bundled_example_and_says_where_the_result_is(with_python):
    result = with_python.start("demo", "--steps", "5")
    assert result.returncode == 0, result.stderr
    command, video, audio, *options = json.loads(result.stdout)[1]
    assert command == "sync"
    for path in (video, audio):
        assert (ROOT / Path(path).relative_to(with_python.root)).is_file()
    assert options == ["-o", str(with_python.root / "outputs/demo.mp4"), "--model", "demo", "--steps", "5"]
    assert "outputs/demo.mp4" in result.stderr


def test_a_link_to_the_script_finds_its_folder(with_python, tmp_path):
    os.symlink(with_python.root / "launch.sh", tmp_path / "lipsync")
    result = with_python.start("sync", "a", script=tmp_path / "lipsync", cwd=tmp_path)
    assert json.loads(result.stdout)[1] == ["sync", "a"]


def audited(folder: Path, report: str, log: str = "") -> tuple[int, str]:
    (folder / "report").write_text(report)
    (folder / "log").write_text(log)
    command = [sys.executable, str(ROOT / ".ci" / "audit.py"), str(folder / "report"), str(folder / "log")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return result.returncode, result.stdout


def test_the_audit_says_what_it_did_not_audit(tmp_path):
    clean, unknown = {"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "not on PyPI"}
    bad = {"name": "c", "version": "2", "vulns": [{"id": "CVE-1"}]}

    def report(*packages: dict) -> str:
        return json.dumps({"dependencies": packages, "fixes": []})

    assert audited(tmp_path, report(clean)) == (0, "Known vulnerabilities: 0 of 1 audited packages have one.\n")
    code, text = audited(tmp_path, report(unknown, clean, unknown))
    assert code == 0 and "0 of 1 audited" in text and "NOT AUDITED: 2 of 3 pinned packages (b, b)" in text
    code, text = audited(tmp_path, report(unknown))
    assert code == 0 and "0 of 0 audited" in text and "NOT AUDITED: 1 of 1" in text
    code, text = audited(tmp_path, report(clean, bad, unknown))
    assert code == 1 and "c 2: CVE-1" in text and "NOT AUDITED: 1" in text
    for nothing in ("", "{", "[]"):
        code, text = audited(tmp_path, nothing, "first\nno connection\n")
        assert code == 0 and text.startswith("NOT AUDITED") and "no connection" in text and "vulnerabilit" not in text


INDEX = "https://download.pytorch.org/whl"


@pytest.mark.parametrize(
    "gpu, from_pytorch_org, words",
    [
        (None, [f"{INDEX}/cpu torch==2.13.0+cpu"], "the cpu build, as no NVIDIA GPU"),
        (("535.216.03",), [f"{INDEX}/cu126 torch==2.13.0+cu126"], "the cu126 build, as the NVIDIA driver 535"),
        (("580.65.06",), [], "the default build, as the NVIDIA driver 580"),
    ],
)
def test_the_build_of_torch_follows_from_the_driver_and_the_reason_is_said(with_python, gpu, from_pytorch_org, words):
    if gpu:
        with_python.add_gpu(*gpu)
    result = with_python.start("sync")
    assert result.returncode == 0, result.stderr
    assert with_python.torch_installs() == from_pytorch_org
    assert all("--no-deps" in call for call in with_python.calls() if "--extra-index-url" in call)
    assert all("index" not in call for call in with_python.installs()), "all else comes from the configured index"
    assert [line for line in result.stderr.splitlines() if words in line]


def test_a_new_driver_changes_the_build_and_a_driver_that_is_away_does_not(with_python):
    assert with_python.start("sync", FAKE_TORCH="cu126 none old driver").returncode == 0
    assert with_python.start("sync", FAKE_TORCH="cu126 cu126 no GPU was found").returncode == 0
    assert with_python.installs() == []
    assert with_python.start("sync", FAKE_TORCH="default cu126 new driver").returncode == 0
    assert [call for call in with_python.calls() if "pip uninstall" in call and call.endswith(" torch")]
    assert with_python.torch_installs() == [] and len(with_python.installs()) == 1


def test_without_pytorch_org_the_default_build_is_installed_and_that_is_said(with_python):
    result = with_python.start("sync", FAKE_TORCH_STATUS="1")
    assert result.returncode == 0 and len(with_python.installs()) == 1
    assert "torch's cpu build cannot be had" in result.stderr


def test_the_user_may_name_the_build(with_python):
    with_python.add_gpu("580.65.06")
    assert with_python.start("sync", LATENTSYNC_TORCH="cpu").returncode == 0
    assert with_python.torch_installs() == [f"{INDEX}/cpu torch==2.13.0+cpu"]
    result = with_python.start("sync", LATENTSYNC_TORCH="../simple")
    assert result.returncode == 2 and "LATENTSYNC_TORCH" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "tests, kernels, code", [(0, 0, 0), (0, 5, 0), (5, 0, 0), (5, 5, 5), (1, 0, 1), (0, 1, 1), (1, 5, 1), (5, 2, 2)]
)
def test_both_runs_of_the_tests_get_the_options_and_either_can_fail_the_command(with_python, tests, kernels, code):
    result = with_python.start("test", "-k", "a or b", FAKE_TESTS_STATUS=str(tests), FAKE_KERNELS_STATUS=str(kernels))
    assert result.returncode == code, result.stderr
    runs = [call for call in with_python.calls() if call.startswith("-m pytest")]
    assert len(runs) == 2 and all(run.endswith("-k a or b") for run in runs)
    assert f"exit code {tests if tests != 5 or kernels == 5 else 0}" in result.stderr


def test_the_pinned_packages_are_installed_by_their_hashes_before_the_rest(with_python):
    assert with_python.start("sync").returncode == 0
    by_hash, rest = [call for call in with_python.calls() if "pip install" in call and "-r " in call]
    assert "--no-deps --require-hashes" in by_hash and by_hash.endswith("requirements.hashes.txt")
    assert rest.endswith("requirements.exact.txt") and "--require-hashes" not in rest
    result = with_python.start("sync", FAKE_TORCH="default cpu another driver", FAKE_PIP_STATUS="1")
    assert result.returncode == 2 and with_python.installs() == [], "nothing is installed after a hash that is wrong"


def test_every_pinned_package_but_torch_has_hashes():
    from packaging.requirements import Requirement

    pins = [line for line in (ROOT / "requirements.exact.txt").read_text().splitlines() if not line.startswith("#")]
    text = (ROOT / "requirements.hashes.txt").read_text()
    entries = re.findall(r"^(\S.*?)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, re.MULTILINE)
    assert len(entries) == sum(not line.startswith(("#", " ")) for line in text.splitlines())

    def chosen(lines: list[str], python: str, system: str) -> set[tuple[str, str]]:
        here = {"python_version": python, "python_full_version": f"{python}.5"}
        here |= {"platform_system": system, "sys_platform": {"Windows": "win32", "Linux": "linux"}[system]}
        wanted = map(Requirement, lines)
        kept = [r for r in wanted if not r.marker or r.marker.evaluate(here)]
        return {(r.name.lower().replace("_", "-"), str(r.specifier)) for r in kept if r.name != "torch"}

    for python in ("3.10", "3.11", "3.12", "3.13"):
        for system in ("Linux", "Windows"):
            found = chosen([entry for entry, _ in entries], python, system)
            assert found == chosen(pins, python, system) and len(found) > 15


def test_requirements_name_one_version_for_every_python():
    from packaging.requirements import Requirement

    for python in ("3.10", "3.11", "3.12", "3.13"):
        for file in (
            "requirements.exact.txt",
            "requirements.cluster.txt",
            "requirements.restore.txt",
            "tests/requirements.txt",
        ):
            lines = (ROOT / file).read_text().splitlines()
            wanted = [Requirement(line) for line in lines if not line.startswith("#")]
            for system in ("Linux", "Windows"):
                here = {"python_version": python, "platform_system": system}
                names = [r.name for r in wanted if not r.marker or r.marker.evaluate(here)]
                of_another = {r.name for r in wanted if "platform_system" in str(r.marker)} - set(names)
                assert len(names) == len(set(names)) == len({r.name for r in wanted} - of_another)


def test_the_ranges_for_comfyui_leave_its_packages_alone_and_hold_the_tested_versions():
    from packaging.requirements import Requirement

    def read(name: str) -> list[Requirement]:
        return [Requirement(line) for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]

    exact = {(r.name, str(r.marker)): next(iter(r.specifier)).version for r in read("requirements.exact.txt")}
    for wanted in read("requirements.txt"):
        assert {each.operator for each in wanted.specifier} == {">="}, f"{wanted} would replace what ComfyUI has"
        tested = [version for (name, _), version in exact.items() if name == wanted.name]
        assert all(version in wanted.specifier for version in tested)
    assert not {"opencv-python", "opencv-contrib-python", "gradio", "diffusers"} & {
        r.name for r in read("requirements.txt")
    }
