"""Several workers paint one job: what travels, what is refused, and with Ray the same frames, whoever dies."""

import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from clips import ffmpeg, make_sound
from conftest import portrait, save_video
from left_over import assert_nothing_is_left, shared_memory
from test_people import LEFT, ONE, OTHER, RIGHT, scene
from test_resume import X264, hashes
from tiny import RESOLUTION, WIDTH

from latentsync.checkpoints.find import resolve_model
from latentsync.errors import UserError
from latentsync.machine import usable_cores
from latentsync.painting import Painter, paint_groups
from latentsync.pipeline import lipsync
from latentsync.settings import Settings
from latentsync.windows import AlignedFrame, Window, group_windows, split_windows
from optim.cluster import actor
from optim.cluster.actor import Order, Worker, hashes_of, versions
from optim.cluster.messages import pack, pack_result, unpack, unpack_result
from optim.cluster.options import choose_gpus, whole_number

HAS_RAY = importlib.util.find_spec("ray") is not None  # not imported: Ray reads its settings then
ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
FRAMES = 130  # eight windows and one that is slid back, in two shots
SETTINGS = Settings(steps=2, frames_per_pass=4)  # as the plan of a processor has it
MATRIX = np.array([[0.4, 0.02, -8.0], [-0.02, 0.4, -10.0]])
pytestmark = pytest.mark.usefixtures("one_thread")


def aligned_frames(count: int = FRAMES) -> list[AlignedFrame]:
    """Frames of a clip whose faces are known; every eleventh of the first shot has none."""
    random = np.random.default_rng(0)
    frames = []
    for number in range(count):
        frame = AlignedFrame(portrait(number), torch.from_numpy(random.standard_normal((50, WIDTH), np.float32)))
        if number % 40 != 39:
            frame.crop = random.integers(0, 256, (RESOLUTION, RESOLUTION, 3), np.uint8)
            frame.matrix, frame.opacity, frame.shot = MATRIX + random.normal(size=(2, 3)) / 100, 1.0, number // 60
        frames.append(frame)
    return frames


def groups_of(frames: list[AlignedFrame], windows: int = 1):
    return group_windows(split_windows(frames), windows)


@pytest.fixture(scope="module")
def expected(models) -> np.ndarray:
    """What a single process paints."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    painted = list(paint_groups(groups_of(aligned_frames()), Painter(models, SETTINGS)))
    torch.set_num_threads(threads)
    assert len(painted) == FRAMES
    return np.stack([frame.frame for frame in painted])


def make_order(checkpoint, **changes) -> Order:
    values = {
        "model": str(checkpoint), "hashes": None, "versions": versions(), "kind": "cpu", "threads": 1,
        "settings": SETTINGS, "level": "conservative", "batch": None, "overrides": {"fused": False}, "frames": FRAMES,
        "token_required": False,
    }  # fmt: skip
    return Order(**(values | changes))


# Without Ray


@pytest.mark.parametrize(
    "text, present, numbers",
    [("all", 3, [0, 1, 2]), ("2", 3, [0, 1]), ("0,2", 3, [0, 2]), ("2,0", 3, [2, 0]), ("2", 0, [0, 1]), ("1", 8, [0])],
)
def test_gpus_are_chosen_by_number_or_by_count(text, present, numbers):
    assert choose_gpus(text, present, cores=4) == numbers


@pytest.mark.parametrize(
    "text, present, words",
    [
        ("all", 0, "no GPU"), ("5", 4, "1 to 4"), ("0", 4, "1 to 4"), ("-1", 4, "1 to 4"), ("0,4", 4, "0 to 3"),
        ("1,1", 4, "each once"), ("two", 4, "not understood"), ("0,", 4, "not understood"), ("0,1", 0, "no GPU"),
        ("9", 0, "8 cores"),
    ],
)  # fmt: skip
def test_gpus_that_are_not_there_are_refused_with_a_sentence(text, present, words):
    with pytest.raises(UserError, match=words):
        choose_gpus(text, present, cores=8)


@pytest.mark.parametrize("text", ["0", "0,1", "-1", "two", ""])
def test_a_cluster_takes_a_number_of_gpus(text):
    assert whole_number("3") == 3
    with pytest.raises(UserError, match="a number from 1"):
        whole_number(text)


@pytest.mark.parametrize("windows", [1, 3])
def test_windows_that_have_travelled_are_painted_to_the_same_bits(models, expected, windows):
    frames = aligned_frames()
    for group in groups_of(frames, windows):
        if (task := pack(group, RESOLUTION, own_face=False)) is None:
            continue
        for array in (task.tokens, task.crops, task.matrices, task.regions):
            array.flags.writeable = False  # as Ray hands them out
        received = unpack(task, RESOLUTION)
        painted = list(paint_groups([list(received)], Painter(models, SETTINGS)))
        assert len(painted) == task.new_frames
        unpack_result(pack_result(received, RESOLUTION, False, []), group, RESOLUTION, own_face=False)
    assert np.array_equal(np.stack([frame.frame for frame in frames]), expected)


def test_a_worker_paints_several_tasks_at_once_in_their_order(checkpoint, expected):
    worker = Worker()
    worker.prepare(make_order(checkpoint))
    frames = aligned_frames()
    groups = list(groups_of(frames))
    tasks = [(group, task) for group in groups if (task := pack(group, RESOLUTION, False)) is not None]
    results = {}
    threads = [
        threading.Thread(target=lambda i=i, task=task: results.update({i: worker.paint(task)}))
        for i, (_, task) in enumerate(tasks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (group, _) in enumerate(tasks):
        unpack_result(results[i], group, RESOLUTION, own_face=False)
    assert np.array_equal(np.stack([frame.frame for frame in frames]), expected)


def test_a_task_that_fails_ends_with_its_error_and_the_next_is_painted(checkpoint, models):
    worker = Worker()
    worker.prepare(make_order(checkpoint))
    (group, *_) = groups_of(aligned_frames())
    good = pack(group, RESOLUTION, own_face=False)
    bad = pack(group, RESOLUTION, own_face=False)
    object.__setattr__(bad, "tokens", bad.tokens[:, :, :-1].copy())
    with pytest.raises(RuntimeError):
        worker.paint(bad)
    assert worker.paint(good).recomputed == [False] * good.new_frames


def test_a_worker_with_other_versions_other_files_or_an_open_ray_is_refused(checkpoint, models, monkeypatch):
    hashes = hashes_of(resolve_model(str(checkpoint), CPU))
    Worker().prepare(make_order(checkpoint, hashes=hashes))
    other = hashes | {"latentsync_unet.safetensors": "0" * 64}
    with pytest.raises(UserError, match=r"another one than here \(latentsync_unet.safetensors\)"):
        Worker().prepare(make_order(checkpoint, hashes=other))
    with pytest.raises(UserError, match="torch .* was started with 0.1"):
        Worker().prepare(make_order(checkpoint, versions=versions() | {"torch": "0.1"}))
    with pytest.raises(UserError, match=f"On {actor.socket.gethostname()}: There is no model 'elsewhere'"):
        Worker().prepare(make_order(checkpoint, model="elsewhere"))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(UserError, match="lets in anybody"):
        Worker().prepare(make_order(checkpoint, token_required=True))


def start_command(code: str, *arguments: object, **variables: str) -> subprocess.Popen:
    """A process that runs `code` with the accelerated command line's `main`, and ARGUMENTS for it."""
    program = f"import sys\nfrom optim.__main__ import main\nARGUMENTS = sys.argv[1:]\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])} | variables,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_command(code: str, *arguments: object) -> subprocess.CompletedProcess:
    with start_command(code, *arguments) as process:
        output, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def test_one_device_needs_no_ray(checkpoint, talking, voice, tmp_path):
    """Without the options, and with --gpus 1, which is the same."""
    options = (talking, voice, "-o", tmp_path / "out.mp4", "--model", checkpoint, "--steps", 1, "--device", "cpu")
    loaded = "print('loaded:', [name for name in sys.modules if name == 'ray' or name == 'optim.cluster.workers'])"
    run = run_command(f"assert main(ARGUMENTS) == main([*ARGUMENTS, '--gpus', '1']) == 0\n{loaded}", *options)
    assert run.returncode == 0 and "loaded: []" in run.stdout, run.stderr


def test_where_ray_is_missing_a_sentence_says_how_to_get_it(checkpoint, talking, voice, tmp_path):
    options = (talking, voice, "-o", tmp_path / "out.mp4", "--model", checkpoint, "--device", "cpu", "--gpus", 2)
    run = run_command("sys.modules['ray'] = None\nsys.exit(main(ARGUMENTS))", *options)
    if usable_cores() < 2:
        assert run.returncode == 2 and "give 1 to 1" in run.stderr
    else:
        assert run.returncode == 2 and "pip install -e .[cluster]" in run.stderr and "Traceback" not in run.stderr
    assert os.listdir(tmp_path) == []


# With Ray


@pytest.fixture(scope="module")
def session():
    """A Ray of this machine with two places for workers."""
    if not HAS_RAY:
        pytest.skip("Ray is not installed (pip install -e .[cluster])")
    from optim.cluster.session import local_session

    before = set(psutil.Process().children(recursive=True))
    with local_session(2):
        assert "RAY_AUTH_TOKEN" not in os.environ, "what is started later does not get it"
        processes = set(psutil.Process().children(recursive=True)) - before
        yield processes
    gone, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive


@pytest.fixture
def workers(session, checkpoint):
    from optim.cluster.workers import RayWorkers

    with RayWorkers(make_order(checkpoint), 2, 2, RESOLUTION, False, lambda line: None) as members:
        yield members


def process_of(member) -> psutil.Process:
    import ray

    return psutil.Process(ray.get(member.actor.__ray_call__.remote(lambda self: os.getpid())))


def painting_processes(process: psutil.Process) -> list[psutil.Process]:
    """The workers of a driver that have begun to load their model."""
    found = []
    with suppress(psutil.Error):
        for child in process.children(recursive=True):
            with suppress(psutil.Error):
                if child.name().startswith("ray::Worker") or child.cmdline()[:1] == ["ray::Worker"]:
                    found.append(child)
    return found


def paint(workers, on_step=lambda: None, done: int = 0) -> np.ndarray:
    frames = list(workers.paint_groups(groups_of(aligned_frames()), on_step, done))
    assert len(frames) == FRAMES
    return np.stack([frame.frame for frame in frames])


def test_two_workers_paint_what_one_process_paints(workers, expected):
    workers.wait_until_ready()
    assert np.array_equal(paint(workers), expected)
    with_faces = [group for group in groups_of(aligned_frames()) if any(isinstance(part, Window) for part in group)]
    assert sum(entry["groups"] for entry in workers.summary()) == len(with_faces)
    painted = paint(workers, done=50)  # of an earlier run: the groups within the first 50 frames stay as they are
    assert np.array_equal(painted[48:], expected[48:]) and not np.array_equal(painted[:48], expected[:48])


@pytest.mark.parametrize("film, speaking", [("crossing", False), ("side by side", False), ("side by side", True)])
def test_several_faces_are_painted_as_one_process_paints_them(workers, models, tmp_path, monkeypatch, film, speaking):
    """Also where the mouths of two people overlap, where a film is played again, and where they speak in turn."""
    crossed = LEFT[0] + (RIGHT[0] - LEFT[0]) * np.linspace(0, 1, 34)
    places = zip(crossed, crossed[::-1], strict=True) if film == "crossing" else [(LEFT[0], RIGHT[0])] * 34
    frames = [scene((OTHER, (int(other), 10)), (ONE, (int(one), 10))) for one, other in places]
    save_video(tmp_path / "film.mp4", frames, *X264)
    long, short = (make_sound(tmp_path / f"{number}.wav", seconds=number / 25) for number in (70, 50))
    if speaking:
        make_sound(tmp_path / "own.wav", seconds=34 / 25)
        ffmpeg("-i", tmp_path / "film.mp4", "-i", tmp_path / "own.wav", "-c:v", "copy", tmp_path / "talk.mp4")
        monkeypatch.setattr("latentsync.turns.who_speaks", lambda judge, mouths, wav: np.repeat([0, 1], 17))
        run = (tmp_path / "talk.mp4", long)
        settings, voices = replace(SETTINGS, face="speaking"), []
    else:
        run = (tmp_path / "film.mp4", long)
        settings, voices = replace(SETTINGS, face="left", other_faces=("right",)), [short]
    lipsync(*run, tmp_path / "one.mkv", models, settings, other_voices=voices)
    workers.wait_until_ready(2)
    report = lipsync(*run, tmp_path / "many.mkv", models, settings, other_voices=voices, workers=workers)
    assert report.frames == 70 and report.device == "2 × cpu"
    assert hashes(tmp_path / "many.mkv") == hashes(tmp_path / "one.mkv")
    assert all(entry["groups"] for entry in workers.summary())


@pytest.mark.parametrize("tries", [3, pytest.param(20, marks=pytest.mark.full_size)])
def test_a_worker_that_is_killed_at_any_moment_changes_nothing(session, checkpoint, expected, tries):
    """One that paints, waits, or starts in the place of an earlier one, within the time of a run left alone."""
    from optim.cluster.workers import RayWorkers

    random, killed, shared = np.random.default_rng(tries), [], shared_memory()
    with RayWorkers(make_order(checkpoint), 2, 2, RESOLUTION, False, lambda line: None) as workers:
        workers.wait_until_ready(2)
        began = time.monotonic()
        assert np.array_equal(paint(workers), expected)
        span = time.monotonic() - began
        while len(killed) < tries:
            workers.wait_until_ready()
            moment, began, before = random.uniform(0, span), time.monotonic(), len(killed)

            def on_step(moment=moment, began=began, before=before):
                if len(killed) > before or time.monotonic() - began < moment:
                    return
                if victims := painting_processes(psutil.Process()):
                    victims[random.integers(len(victims))].send_signal(signal.SIGKILL)
                    killed.append(f"{moment:.1f} s, {len(victims)} alive")

            assert np.array_equal(paint(workers, on_step), expected), killed
            print(f"killed after {killed[-1:]} of {span:.1f} s; {len(killed)} of {tries}", flush=True)
        lost = sum(member.lost for member in workers.members)
    gone, alive = psutil.wait_procs(painting_processes(psutil.Process()), timeout=60)
    assert not alive and shared_memory() <= shared and tries - 2 <= lost <= tries, (lost, killed)


def test_a_worker_that_hangs_counts_as_lost_after_a_time_that_follows_from_the_groups(workers, expected):
    from optim.cluster.workers import FIRST_GROUP_SECONDS, MIN_GROUP_SECONDS

    assert workers.group_seconds() == FIRST_GROUP_SECONDS["cpu"], "nobody knows yet how long a group takes"
    workers.wait_until_ready(2)
    victim = workers.members[0]
    process = process_of(victim)

    def on_step():
        if victim.groups and not victim.lost:
            process.suspend()
            if workers._slowest and workers._works(victim):
                victim.working_since -= 2 * workers.group_seconds()  # as if it had stood still for so long

    assert np.array_equal(paint(workers, on_step), expected)
    assert victim.lost and "has returned nothing for" in workers._problem
    psutil.wait_procs([process], timeout=60)
    assert not process.is_running(), "it is killed, and holds no GPU any more"
    workers._slowest = 100.0
    assert workers.group_seconds() == 2000.0 > MIN_GROUP_SECONDS
    workers._slowest = 1.0
    assert workers.group_seconds() == MIN_GROUP_SECONDS


class Stop(Exception):
    """Of a hook that ends a run."""


def stop():
    raise Stop


def test_waiting_for_workers_can_be_ended(session, checkpoint):
    from optim.cluster.workers import RayWorkers

    with pytest.raises(Stop), RayWorkers(make_order(checkpoint), 2, 2, RESOLUTION, False, print) as workers:
        workers.wait_until_ready(on_step=stop)
    assert not any(member.prepared for member in workers.members)


def test_ray_listens_on_the_loopback_address_only(session):
    listening = [
        connection.laddr.ip
        for process in session
        if process.is_running()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening and {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}


def test_a_run_that_is_stopped_ends_its_workers(session, checkpoint):
    from optim.cluster.workers import RayWorkers

    with pytest.raises(Stop), RayWorkers(make_order(checkpoint), 2, 2, RESOLUTION, False, print) as workers:
        workers.wait_until_ready()
        processes = [process_of(member) for member in workers.members if member.prepared]
        paint(workers, stop)
    gone, alive = psutil.wait_procs(processes, timeout=60)
    assert gone and not alive


def test_with_no_worker_left_there_is_a_sentence(session, checkpoint):
    from optim.cluster.workers import RayWorkers

    order = make_order(checkpoint, model="elsewhere")
    with RayWorkers(order, 2, 2, RESOLUTION, False, lambda line: None) as workers:
        with pytest.raises(UserError, match="There is no model 'elsewhere'"):
            workers.wait_until_ready()


def test_workers_that_die_at_their_start_are_not_started_for_ever(session, checkpoint, monkeypatch):
    from optim.cluster.workers import MAX_LOSSES, RayWorkers

    with RayWorkers(make_order(checkpoint), 1, 1, RESOLUTION, False, lambda line: None) as workers:
        start = workers._start_workers

        def start_and_kill():
            known = len(workers.members)
            start()
            for member in workers.members[known:]:
                process_of(member).kill()

        monkeypatch.setattr(workers, "_start_workers", start_and_kill)
        with pytest.raises(UserError, match="No worker is left"):
            workers.wait_until_ready()
        assert len(workers.members) == MAX_LOSSES


# The command


SEGMENT = 20  # frames, in place of a minute's
SHORT_SEGMENTS = f"""
from functools import partial
from latentsync import pipeline
pipeline.lipsync = partial(pipeline.lipsync, segment_frames={SEGMENT})
"""
KILLED = f"""{SHORT_SEGMENTS}
from killing import kill_at
kill_at(50)  # in the third segment
main(ARGUMENTS)
"""


@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed (pip install -e .[cluster])")
@pytest.mark.skipif(usable_cores() < 2, reason="two workers need two cores")
@pytest.mark.skipif(sys.platform != "linux", reason="looks for what Linux shows of processes and shared memory")
@pytest.mark.parametrize("tries", [2, pytest.param(20, marks=pytest.mark.full_size)])
def test_a_worker_is_killed_at_random_times_and_the_command_gives_its_result_and_leaves_nothing(
    checkpoint, talking, tmp_path, temporary, tries
):
    """The moment is drawn from the time between the first worker's start and the end of a run that is left alone."""
    sound, folder = make_sound(tmp_path / "sound.wav", seconds=5), tmp_path / "out"
    folder.mkdir()
    options = (talking, sound, "--model", checkpoint, "--steps", 2, "--device", "cpu", "-o")
    alone = run_command("sys.exit(main(ARGUMENTS))", *options, folder / "alone.mp4")
    assert alone.returncode == 0, alone.stderr
    expected, random, span, killed = (folder / "alone.mp4").read_bytes(), np.random.default_rng(tries), None, []
    shared = shared_memory()
    while len(killed) < tries:
        command = start_command("sys.exit(main(ARGUMENTS))", *options, folder / "out.mp4", "--gpus", 2)
        texts: list[str] = []
        said = threading.Thread(
            target=lambda command, texts: texts.extend(command.communicate()), args=(command, texts)
        )
        said.start()
        driver = psutil.Process(command.pid)
        while not (victims := painting_processes(driver)) and command.poll() is None:
            time.sleep(0.02)
        began = time.monotonic()
        moment = None if span is None else began + random.uniform(0, span)
        while moment is not None and command.poll() is None:
            if time.monotonic() > moment and (victims := painting_processes(driver)):
                victim = victims[random.integers(len(victims))]
                with suppress(psutil.NoSuchProcess):
                    doing = victim.name()
                    victim.send_signal(signal.SIGKILL)
                    killed.append((round(time.monotonic() - began, 2), doing))
                break
            time.sleep(0.01)
        said.join()
        if span is None:
            span = time.monotonic() - began
        assert command.returncode == 0, texts
        assert (folder / "out.mp4").read_bytes() == expected, (killed[-1:], texts)
        assert sorted(os.listdir(folder)) == ["alone.mp4", "out.mp4"]
        assert_nothing_is_left(temporary, shared)
    print(f"killed within {span:.1f} s: {killed}")


@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed (pip install -e .[cluster])")
@pytest.mark.skipif(usable_cores() < 2, reason="two workers need two cores")
def test_a_killed_driver_leaves_nothing_and_the_same_command_goes_on(checkpoint, talking, tmp_path, temporary):
    sound = make_sound(tmp_path / "sound.wav", seconds=68 / 25)
    options = (talking, sound, "--model", checkpoint, "--steps", 1, "--device", "cpu", "-o")
    alone = run_command(f"{SHORT_SEGMENTS}\nsys.exit(main(ARGUMENTS))", *options, tmp_path / "alone.mp4")
    assert alone.returncode == 0, alone.stderr
    shared = shared_memory()
    several = (*options, tmp_path / "several.mp4", "--gpus", 2, "--report", tmp_path / "report.json")
    assert run_command(KILLED, *several).returncode == -signal.SIGKILL
    assert_nothing_is_left(temporary, shared, files=False)
    again = run_command(f"{SHORT_SEGMENTS}\nsys.exit(main(ARGUMENTS))", *several)
    assert again.returncode == 0 and "resuming at 0:01" in again.stderr, again.stderr
    assert (tmp_path / "several.mp4").read_bytes() == (tmp_path / "alone.mp4").read_bytes()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["device"] == "2 × cpu" and report["resumed_from"] == 40 and report["workers"]
    assert_nothing_is_left(temporary, shared)  # what the killed one left, too


# A cluster


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Two Ray nodes on addresses of their own, as two machines, with a token: the address; the second's processes."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = Path(tempfile.mkdtemp(prefix="ls-"))  # short, for the paths of Ray's sockets

    def start(name: str, ip: str, *options: str) -> None:
        common = ("--num-cpus=1", "--num-gpus=0", "--disable-usage-stats", f"--temp-dir={folder / name}")
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={ip}", *common, *options]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stdout + run.stderr

    def processes_of(name: str) -> list[psutil.Process]:
        """A node's own processes; they have started all others."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if any(str(folder / name) in part for part in process.cmdline()):
                    found.append(process)
        return found

    def kill(name: str) -> None:
        with suppress(psutil.Error):
            processes = [one for own in processes_of(name) for one in (*own.children(recursive=True), own)]
            for process in processes:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(processes, timeout=60)

    try:
        start("head", "127.0.0.2", "--head", "--port=0", "--include-dashboard=false")
        address = (folder / "head" / "ray_current_cluster").read_text()
        start("other", "127.0.0.3", f"--address={address}")
        yield address, partial(processes_of, "other")
    finally:
        kill("other")
        kill("head")
        shutil.rmtree(folder, ignore_errors=True)


# Waits for both machines, and takes the second away when the first frame has been written; the first arguments are its
# processes.
MACHINE_LOST = """
import psutil
from latentsync.media import VideoWriter
from optim.cluster import workers

processes, ARGUMENTS = [psutil.Process(int(pid)) for pid in ARGUMENTS[0].split(",")], ARGUMENTS[1:]
write, wait = VideoWriter.write, workers.RayWorkers.wait_until_ready

def killing(self, frame):
    while processes:
        process = processes.pop()
        for one in (*process.children(recursive=True), process):
            one.kill()
    write(self, frame)

workers.RayWorkers.wait_until_ready = lambda self: wait(self, 2)
VideoWriter.write = killing
sys.exit(main(ARGUMENTS))
"""


@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed (pip install -e .[cluster])")
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address")
def test_a_job_runs_over_two_machines_and_one_of_them_may_go(cluster, checkpoint, talking, tmp_path):
    address, other = cluster
    sound, report = make_sound(tmp_path / "sound.wav", seconds=8), tmp_path / "report.json"
    options = (talking, sound, "--model", checkpoint, "--steps", 1, "--device", "cpu", "--level", "conservative")
    both = (*options, "--cluster", address, "--report", report, "-o", tmp_path / "both.mp4")
    token = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    refused = start_command("sys.exit(main(ARGUMENTS))", *options, "--cluster", address, "-o", "no.mp4", **token)
    alone = run_command("sys.exit(main(ARGUMENTS))", *options, "-o", tmp_path / "alone.mp4")
    assert alone.returncode == 0, alone.stderr
    run = run_command(MACHINE_LOST, ",".join(str(process.pid) for process in other()), *both)
    assert run.returncode == 0 and "Its windows go to the others." in run.stderr, run.stderr
    assert (tmp_path / "both.mp4").read_bytes() == (tmp_path / "alone.mp4").read_bytes()
    found = json.loads(report.read_text())["workers"]
    assert sorted(worker["lost"] for worker in found) == [False, True]
    _, text = refused.communicate(timeout=300)
    assert refused.returncode == 2 and "is the token here that of the cluster?" in text and "Traceback" not in text


@pytest.mark.parametrize("missing", ["--model", "--level"])
def test_a_cluster_takes_a_model_and_a_level_by_name_and_a_token(checkpoint, talking, voice, tmp_path, missing):
    named = {"--model": str(checkpoint), "--level": "conservative"}
    del named[missing]
    options = (talking, voice, "-o", tmp_path / "out.mp4", "--device", "cpu", "--cluster", "127.0.0.1:6379")
    run = run_command("sys.exit(main(ARGUMENTS))", *options, *(part for pair in named.items() for part in pair))
    assert run.returncode == 2 and f"--cluster: give {missing}, too" in run.stderr
