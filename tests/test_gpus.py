"""The page on several GPUs: which job gets how many, and that their results are those of one. Processes stand in."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from clips import make_sound
from conftest import save_video
from gradio_client import Client, handle_file
from left_over import assert_nothing_is_left, shared_memory
from serving import serve
from test_people import LEFT, ONE, OTHER, RIGHT, scene
from test_resume import X264

from latentsync.errors import UserError
from latentsync.machine import usable_cores
from latentsync.media import probe_video
from optim.serving import records
from optim.serving.job import CANCELLED, DONE, FAILED, RUNNING, Job, OtherVoice, Request
from optim.serving.machine import at_level, device_text, sharing_text
from optim.serving.options import parse_options
from optim.serving.prepared_films import KNOWN
from optim.serving.store import JobStore
from optim.serving.timeline import timeline_figure
from optim.serving.worker import Worker

ME = "m" * 24
ROOT = Path(__file__).resolve().parent.parent
HAS_RAY = importlib.util.find_spec("ray") is not None  # not imported: Ray reads its settings then
needs_workers = pytest.mark.skipif(
    not HAS_RAY or usable_cores() < 2, reason="two workers need two cores and Ray (pip install -e .[cluster])"
)
pytestmark = pytest.mark.usefixtures("one_thread")


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def ended(worker, job):
    assert worker.wait(job, 240), job
    return job


# ---- which job gets how many


def queue(tmp_path, *seconds: float, gpus: int) -> tuple[JobStore, list[Job]]:
    """A queue with a job for each length of sound."""
    store = JobStore(tmp_path, queue_size=20)
    store.gpus = gpus
    jobs = []
    for number, length in enumerate(seconds):
        folder = tmp_path / str(number)
        folder.mkdir()
        jobs.append(Job(Request(folder / "v", folder / "a"), ME, folder, ("v", "a"), (64, 64), length))
        store.add(jobs[-1])
    return store, jobs


def test_each_job_gets_a_gpu_and_the_next_ones_wait_for_as_many_to_end(tmp_path):
    store, jobs = queue(tmp_path, 10, 90, 10, 90, 10, gpus=3)
    assert [store.place(job) for job in jobs] == [0, 0, 0, 1, 2], "three can start at once"
    assert [store.take_next() for _ in range(4)] == [*jobs[:3], None]
    assert [job.gpus for job in jobs] == [1, 1, 1, 0, 0], "a long one, too, where others wait"
    assert [store.place(job) for job in jobs] == [None, None, None, 1, 2] and store.load_counts() == (3, 2)
    store.end(jobs[1], DONE)
    assert store.take_next() is jobs[3] and jobs[3].gpus == 1 and jobs[3].view(None)["gpus"] == 1
    assert store.place(jobs[4]) == 1


@pytest.mark.parametrize("seconds, expected", [(60, 1), (60.1, 4)])
def test_a_job_of_more_than_a_minute_takes_all_free_gpus_when_no_other_waits(tmp_path, seconds, expected):
    store, [short, job] = queue(tmp_path, 10, seconds, gpus=5)
    assert [store.take_next(), store.take_next()] == [short, job]
    assert (short.gpus, job.gpus) == (1, expected)
    assert store.take_next() is None
    store.end(short, DONE)
    assert job.gpus == expected, "it keeps what it has"


def test_a_thread_that_waits_for_a_gpu_gets_the_job_when_another_ends(tmp_path):
    store, [first, second] = queue(tmp_path, 10, 10, gpus=1)
    assert store.take_next() is first
    taken = []
    thread = threading.Thread(target=lambda: taken.append(store.take_next(60)))
    thread.start()
    store.end(first, DONE)
    thread.join(30)
    assert taken == [second]
    thread = threading.Thread(target=lambda: taken.append(store.take_next(60)))
    thread.start()
    assert store.close() == [second]
    thread.join(30)
    assert taken == [second, None] and not thread.is_alive()


def test_the_rule_and_the_gpus_are_put_in_words(monkeypatch):
    said = "2 GPUs: up to 2 jobs at once; a film over a minute uses all that are free when no other job waits."
    assert sharing_text(2, "cuda") == said
    names = ["Large", "Small", "Large"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: names[number])
    assert device_text(torch.device("cuda", 0), [0, 1, 2]) == "2 × Large, 1 × Small"


def test_a_finished_job_shows_the_curves_of_every_gpu(tmp_path):
    job = Job(Request(Path("v"), Path("a")), ME, tmp_path, ("v", "a"), (64, 64), 9)
    names = [f"GPU {number}{part}" for number in range(8) for part in ("", " memory")]
    job.report, job.timeline = {"frames": 9}, {"stages": {}, "time": [0, 1], "curves": {name: [1, 2] for name in names}}
    lines = [(trace.name, trace.line.color, trace.line.dash) for trace in timeline_figure(job).data]
    assert [name for name, *_ in lines] == names and len({line[1:] for line in lines}) == 16


# ---- the options


@pytest.mark.parametrize("text", ["two", "0,", "", "1;2"])
def test_words_that_are_no_gpus_are_refused_before_the_page_is_served(tmp_path, text):
    with pytest.raises(UserError, match="is not understood: give all, a number, or a list"):
        parse_options(["--gpus", text], tmp_path)


def test_where_gpus_are_lent_none_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    with pytest.raises(UserError, match="leave the option out"):
        parse_options(["--gpus", "2"], tmp_path)


def test_gpus_that_are_not_there_are_said_on_the_page(tmp_path, home):
    worker = Worker(tmp_path, gpus="99999")
    worker.start()
    assert worker.ready.wait(60) and "give 1 to" in worker.problem
    worker.close()


# Serves as app.py does, but no page: runs a job, and says which modules of several GPUs there are, and what went wrong.
SERVE = """
import sys
import app
from pathlib import Path
from optim.serving.job import Request
from optim.serving.options import parse_options
from optim.serving.setup import make_worker

if __name__ == "__main__":
    outputs, model, video, voice, *options = sys.argv[1:]
    worker = make_worker(parse_options([*options, "--model", model, "--device", "cpu"], Path(outputs)))
    worker.start()
    job = worker.submit(Request(Path(video), Path(voice), steps=1), "m" * 24)
    worker.wait(job, 240)
    print([name for name in sys.modules if name == "ray" or name.startswith("optim.cluster.workers")], job.state)
    print(worker.problem)
    worker.close()
"""


def run_served(code, *arguments, **variables) -> subprocess.CompletedProcess:
    environment = (
        os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
        | variables
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize("options", [(), ("--gpus", "1")])
def test_a_page_on_one_device_loads_no_ray(checkpoint, talking, voice, tmp_path, home, options):
    run = run_served(SERVE, tmp_path / "outputs", checkpoint, talking, voice, *options)
    assert run.stdout.splitlines() == ["[] done", "None"], run.stderr


@pytest.mark.skipif(usable_cores() < 2, reason="two workers need two cores")
def test_where_ray_is_missing_the_page_says_how_to_get_it(checkpoint, talking, voice, tmp_path, home):
    missing = f"import sys\nsys.modules['ray'] = None\n{SERVE}"
    run = run_served(missing, tmp_path / "outputs", checkpoint, talking, voice, "--gpus", 2)
    assert run.stdout.splitlines()[0].endswith(" failed") and "need Ray" in run.stdout, run.stderr
    assert "Traceback" not in run.stderr


# ---- two processes


@pytest.fixture(scope="module")
def worker(tmp_path_factory, checkpoint, home):
    worker = Worker(tmp_path_factory.mktemp("outputs"), model=str(checkpoint), device="cpu", gpus="2")
    worker.start()
    assert worker.ready.wait(120) and worker.machine, worker.problem
    yield worker
    processes = psutil.Process().children(recursive=True)
    worker.close()
    assert not worker._thread.is_alive(), "Ray has ended"
    gone, alive = psutil.wait_procs(processes, timeout=60)
    assert not [process for process in alive if "Agent" not in process.name()]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    lengths = {"short": 1.6, "other": 2.0, "long": 30}
    return {name: make_sound(folder / f"{name}.wav", seconds=seconds) for name, seconds in lengths.items()}


@pytest.fixture(scope="module")
def two_people(tmp_path_factory) -> Path:
    frames = [scene((ONE, (LEFT[0] + t % 4, 10)), (OTHER, (RIGHT[0] - t % 3, 10))) for t in range(20)]
    return save_video(tmp_path_factory.mktemp("people") / "two.mp4", frames, *X264)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, checkpoint, home, talking, two_people, sounds):
    """The results of a page on one device, by the name of their sound."""
    worker = Worker(tmp_path_factory.mktemp("alone"), model=str(checkpoint), device="cpu")
    worker.start()
    jobs = {name: worker.submit(request(talking, sounds[name]), ME) for name in ("short", "other")}
    jobs["two people"] = worker.submit(of_two(two_people, sounds), ME)
    for job in jobs.values():
        assert ended(worker, job).state == DONE, job.error
    worker.close()
    return {name: job.output.read_bytes() for name, job in jobs.items()}


def request(talking, sound, **settings) -> Request:
    return Request(talking, sound, **{"steps": 2} | settings)


def of_two(two_people, sounds) -> Request:
    return request(two_people, sounds["short"], face="left", others=(OtherVoice("right", sounds["other"]),))


@needs_workers
def test_two_jobs_run_at_once_and_give_what_each_gives_alone(worker, alone, talking, sounds):
    jobs = {name: worker.submit(request(talking, sounds[name]), ME) for name in ("short", "other")}
    until(lambda: all(job.state == RUNNING for job in jobs.values()))
    assert [job.gpus for job in jobs.values()] == [1, 1]
    for name, job in jobs.items():
        assert ended(worker, job).state == DONE, job.error
        assert job.output.read_bytes() == alone[name]
        assert job.report["device"] == "1 × cpu" and len(job.report["workers"]) == 1
    assert max(job.started for job in jobs.values()) < min(job.ended for job in jobs.values())
    view = jobs["short"].view(None)
    assert view["gpus"] == 1 and view["timeline"]["curves"] and json.loads(json.dumps(view))["report"]["workers"]
    line, *_ = worker.describe(jobs["short"].request, 10, 25)
    assert "on 1 process; " in line and line.endswith(" for this clip."), line
    assert "on 2 processes; how long it takes here is not known" in worker.describe(jobs["short"].request, 61)[0]


@needs_workers
def test_a_job_of_several_faces_gives_what_one_process_gives(worker, alone, two_people, sounds):
    job = ended(worker, worker.submit(of_two(two_people, sounds), ME))
    assert job.state == DONE and len(job.report["workers"]) == 1, job.error
    assert job.output.read_bytes() == alone["two people"]
    assert "on 1 process; " in worker.describe(job.request, 2.0, 25, people=2)[0]


@needs_workers
def test_several_gpus_start_from_the_faces_that_an_earlier_job_found(worker, alone, talking, sounds, monkeypatch):
    monkeypatch.setattr(worker.prepared, "_max_bytes", 10**9)
    first, second = (ended(worker, worker.submit(request(talking, sounds["other"]), ME)) for _ in range(2))
    assert KNOWN in second.messages and KNOWN not in first.messages
    assert first.output.read_bytes() == second.output.read_bytes() == alone["other"]
    for job in (first, second):
        (entry,) = (job.folder / "prepared").iterdir()
        assert sorted(os.listdir(entry)) == ["faces-00000.safetensors", "film.json"], "the workers encode"
        worker.remove(job.id, ME)


@needs_workers
def test_a_long_job_runs_on_both_and_gives_what_one_gives(worker, alone, talking, sounds, monkeypatch):
    monkeypatch.setattr("optim.serving.store.LONG_SECONDS", 1.0)
    job, seen = worker.submit(request(talking, sounds["other"]), ME), set()
    while job.unfinished:
        seen.add(job.doing)
        time.sleep(0.01)
    assert job.state == DONE, job.error
    assert job.gpus == 2 and job.report["device"] == "2 × cpu" and "painting mouths on 2 processes" in seen
    assert job.output.read_bytes() == alone["other"]
    assert job.partial_frames == 0, "steps of other processes are not seen, and not made up"


@needs_workers
def test_cancelling_one_job_leaves_the_other_and_one_that_starts_can_be_cancelled(worker, alone, talking, sounds):
    long, kept = (worker.submit(request(talking, sounds["long"]), ME) for _ in range(2))
    until(lambda: kept.progress.get("writing", 0) > 3)
    short = worker.submit(request(talking, sounds["short"]), ME)
    assert short.state == "waiting" and worker.store.place(short) == 1
    worker.cancel(long.id, ME)
    assert ended(worker, long).state == CANCELLED and kept.state == RUNNING
    until(lambda: short.doing.startswith("getting 1 process ready"))
    other = worker.submit(request(talking, sounds["other"]), ME)
    worker.cancel(short.id, ME)
    assert ended(worker, short).state == CANCELLED and short.output is None
    assert sorted(os.listdir(short.folder)) == ["job.json", "video.mp4", "voice.wav"]
    assert ended(worker, other).output.read_bytes() == alone["other"] and kept.state == RUNNING
    worker.cancel(kept.id, ME, keep=True)
    assert ended(worker, kept).state == CANCELLED
    assert probe_video(kept.output).n_frames == kept.report["frames"] > 3


@needs_workers
def test_a_worker_that_is_lost_is_replaced_and_the_job_says_so(worker, alone, talking, sounds):
    job = worker.submit(request(talking, sounds["short"]), ME)
    until(lambda: job.doing.startswith("painting"))
    for victim in ray_workers():  # one that no job uses, too
        victim.send_signal(signal.SIGKILL)
    assert ended(worker, job).state == DONE, job.error
    assert job.output.read_bytes() == alone["short"] and any("was lost" in line for line in job.messages)


@needs_workers
def test_a_model_that_is_missing_is_said_and_the_gpus_are_free_again(worker, talking, sounds):
    job = ended(worker, worker.submit(request(talking, sounds["short"], model="latentsync-1.6"), ME))
    assert job.state == FAILED and "latentsync-1.6" in job.error and worker.store.load_counts() == (0, 0)
    assert worker.store._free_gpus() == 2


@needs_workers
def test_the_level_auto_is_the_smallest_gpu_s(worker, talking, sounds):
    several = replace(worker.machine, recommended=1.0)
    assert at_level(request(talking, sounds["short"]), several).level == "1.0"
    assert at_level(request(talking, sounds["short"], level="0.5"), several).level == "0.5"
    assert at_level(request(talking, sounds["short"]), replace(several, gpus=1)).level == "auto"


@needs_workers
def test_the_next_job_takes_the_workers_of_the_one_before_until_they_have_been_idle_for_long(
    worker, alone, talking, sounds, monkeypatch
):
    before = [ended(worker, worker.submit(request(talking, sounds["short"]), ME)) for _ in range(2)]
    processes = {process.pid for process in ray_workers()}
    other = ended(worker, worker.submit(request(talking, sounds["other"], level="1.0", steps=3), ME))
    assert other.state == DONE and {process.pid for process in ray_workers()} == processes
    after = ended(worker, worker.submit(request(talking, sounds["other"]), ME))
    assert {process.pid for process in ray_workers()} == processes and len(processes) <= 2
    assert {job.output.read_bytes() for job in before} == {alone["short"]}
    assert after.output.read_bytes() == alone["other"], "nothing of the job between stays"
    monkeypatch.setattr(worker, "idle_seconds", 0.1)
    with worker.store.changed:
        worker.store.changed.notify_all()
    until(lambda: not ray_workers())
    monkeypatch.undo()
    assert ended(worker, worker.submit(request(talking, sounds["short"]), ME)).output.read_bytes() == alone["short"]


def ray_workers() -> list[psutil.Process]:
    """The painting processes of this process' Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.name().startswith("ray::Worker") or "ray::Worker" in " ".join(process.cmdline()):
                found.append(process)
    return found


# A server on two processes with segments of five frames, which ends itself in the middle of a job.
KILLED = """
import sys
from pathlib import Path
from killing import kill_at, write_in_segments
from optim.serving import store
from optim.serving.job import Request
from optim.serving.worker import Worker

if __name__ == "__main__":
    outputs, model, video, voice, frames = *map(Path, sys.argv[1:5]), int(sys.argv[5])
    store.LONG_SECONDS = 1.0
    write_in_segments(5)
    kill_at(frames)
    worker = Worker(outputs, model=str(model), device="cpu", gpus="2")
    worker.start()
    if str(video) != ".":
        worker.submit(Request(video, voice, steps=2), "m" * 24)
    [job] = worker.store.all()
    worker.wait(job, 240)
    print(job.state, job.gpus, job.report and job.report["resumed_from"], job.error)
    worker.close()
"""


@needs_workers
@pytest.mark.skipif(sys.platform != "linux", reason="looks for what Linux shows of processes and shared memory")
def test_the_next_server_resumes_on_both_what_a_killed_one_had_begun(
    checkpoint, talking, sounds, tmp_path, temporary, home, monkeypatch
):
    shared = shared_memory()
    killed = run_served(KILLED, tmp_path / "outputs", checkpoint, talking, sounds["other"], 18)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert_nothing_is_left(temporary, shared, files=False)
    [folder] = (tmp_path / "outputs").iterdir()
    assert json.loads((folder / "job.json").read_text())["state"] == RUNNING
    again = run_served(KILLED, tmp_path / "outputs", checkpoint, ".", ".", 10**6)
    assert again.stdout.split()[:3] == ["done", "2", "15"], again.stdout + again.stderr
    assert_nothing_is_left(temporary, shared)
    monkeypatch.setattr(records, "_is_running", lambda _: False)
    [job] = records.load_jobs(tmp_path / "outputs")
    assert job.gpus == 2 and probe_video(job.output).n_frames == 50


@needs_workers
@pytest.mark.skipif(sys.platform != "linux", reason="looks for what Linux shows of processes and shared memory")
def test_a_served_page_says_how_jobs_share_its_gpus_runs_two_and_leaves_nothing(
    checkpoint, talking, sounds, tmp_path, temporary
):
    shared = shared_memory()
    with serve(tmp_path / "page", "--model", checkpoint, "--device", "cpu", "--gpus", 2) as server:
        server.wait_until_ready()
        client = Client(server.url, verbose=False)
        assert client.predict(api_name="/machine")["gpus"] == 2
        files = {"video": handle_file(talking), "audio": handle_file(sounds["other"])}
        first = client.predict(**files, steps=4, api_name="/submit")
        client.predict(**files, visitor=first["visitor"], steps=4, api_name="/submit")
        seen = client.predict(first["visitor"], 0, api_name="/watch")
        assert seen["sharing"].startswith("2 processes: up to 2 jobs at once; a film over a minute")
        until(lambda: client.predict(first["visitor"], 0, api_name="/watch")["running"] == 2)
        until(lambda: not client.predict(first["visitor"], 0, api_name="/watch")["running"], seconds=300)
        jobs = client.predict(first["visitor"], 0, api_name="/watch")["jobs"]
        assert [(job["state"], job["gpus"]) for job in jobs] == [(DONE, 1), (DONE, 1)], jobs
        client.predict(**files, visitor=first["visitor"], steps=4, api_name="/submit")
        until(lambda: client.predict(first["visitor"], 0, api_name="/watch")["jobs"][0]["stages"]["faces"])
    said = server.log.read_text()
    assert server.process.returncode == 0 and "Traceback" not in said and "SIGTERM" not in said, "ended as without Ray"
    assert_nothing_is_left(temporary, shared)
