"""The page's endpoints: jobs by `gradio_client`, and what a visitor must not be able to do."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from clips import ffmpeg, make_sound
from conftest import portrait, save_video
from gradio_client import Client, handle_file
from serving import ROOT, serve

from latentsync.errors import UserError
from latentsync.media import COMMENT, probe_video
from optim.levels import find_level
from optim.serving import form, options
from optim.serving.endpoints import Endpoints
from optim.serving.fetcher import Fetcher
from optim.serving.job import Job, Request, owner_of
from optim.serving.uploads import Uploads
from optim.serving.worker import Worker

LOGIN = ("anna", "a long password")
UPLOAD_LIMIT = 2_000_000  # bytes


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    save_video(folder / "talking.mp4", [portrait(t) for t in range(24)], "-c:v", "libx264", "-pix_fmt", "yuv420p")
    make_sound(folder / "short.wav", seconds=0.3)
    make_sound(folder / "long.wav", seconds=28)
    make_sound(folder / "too long.wav", seconds=31)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoint):
    """As with --share, but on the loopback: a login, a limit to lengths and uploads, and a queue of nine."""
    options = ("--auth", ":".join(LOGIN), "--max-seconds", 30, "--max-upload", f"{UPLOAD_LIMIT}b", "--queue-size", 9)
    with serve(tmp_path_factory.mktemp("page"), "--model", checkpoint, *options) as server:
        server.seconds_until_ready = server.wait_until_ready()
        yield server


def connect(server) -> Client:
    return Client(server.url, auth=LOGIN, verbose=False)


def submit(client, clips, audio="short.wav", visitor="", **settings) -> dict:
    files = {"video": handle_file(clips / "talking.mp4"), "audio": handle_file(clips / audio)}
    return client.predict(**files, visitor=visitor, steps=4, **settings, api_name="/submit")


def job(client, reply) -> dict:
    seen = client.predict(reply["visitor"], 0, api_name="/watch")
    return next(job for job in seen["jobs"] if job["id"] == reply["job"])


def until(client, reply, *states, seconds=300) -> dict:
    began = time.monotonic()
    while (seen := job(client, reply))["state"] not in states:
        assert time.monotonic() - began < seconds, seen
        time.sleep(0.1)
    return seen


def browser(server) -> httpx.Client:
    """A logged-in visitor without any job."""
    visitor = httpx.Client(base_url=server.url, timeout=30)
    assert visitor.post("/login", data=dict(zip(("username", "password"), LOGIN, strict=True))).status_code == 200
    return visitor


def test_the_page_is_there_before_torch_is_and_within_seconds(server):
    assert server.seconds_until_ready < 8
    code = (
        "import app, sys; from optim.serving import uploads, worker; w = worker.Worker(app.Path('x')); "
        "app.Page(app.Endpoints(w, app.Fetcher(w, True), uploads.Uploads(app.Path('x')))); "
        "print('torch' in sys.modules, 'cv2' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout.split() == ["False", "False"], said.stderr


def test_a_client_gets_a_preview_of_a_frame_and_what_is_wrong_with_a_request_is_said(server, clips):
    client = connect(server)
    files = {"video": handle_file(clips / "talking.mp4"), "audio": handle_file(clips / "short.wav")}
    seen = client.predict(**files, level=1, steps=4, at=0.2, api_name="/preview")
    assert (seen["at"], seen["level"]) == (0.2, "aggressive")
    assert all(seen[name].startswith("data:image/jpeg;base64,") for name in ("painted", "original"))
    described = client.predict(level=1, steps=4, api_name="/describe")
    assert re.fullmatch(r"(about \d+|\d+ to \d+) s", described["preview"]), "it has shown how long it takes"
    with pytest.raises(Exception, match="The time of the preview is"):
        client.predict(**files, at=-1, api_name="/preview")
    files["audio"] = handle_file(clips / "too long.wav")
    with pytest.raises(Exception, match="30 s"):
        client.predict(**files, api_name="/preview")


def test_a_client_runs_a_job_follows_it_and_cancels_another(server, clips, tmp_path):
    client = connect(server)
    parameters = client.view_api(return_format="dict")["named_endpoints"]["/submit"]["parameters"]
    assert {"name": "guidance", "default": None} in [
        {"name": each["parameter_name"], "default": each["parameter_default"]} for each in parameters
    ], "who does not say how strong gets what suits the model"
    first = submit(client, clips)
    other = submit(client, clips, "long.wav", first["visitor"])
    done = until(client, first, "done")
    assert done["stages"] == {"faces": 8, "mouths": 8, "writing": 8} and done["report"]["frames"] == 8
    running = until(client, other, "running")
    while not running["mouths"]:
        running = job(client, other)
    running = job(client, other)
    seen = time.monotonic()
    client.predict(other["job"], False, other["visitor"], api_name="/cancel")
    told = time.monotonic()
    ended = until(client, other, "cancelled")
    # By the server's own clock, as far as it ran on after it was told: the way there and back is the machine's affair.
    assert ended["elapsed"] - running["elapsed"] - (told - seen) < 3
    path = client.predict(first["job"], first["visitor"], api_name="/result")
    assert probe_video(path).n_frames == 8
    assert COMMENT.encode() in Path(path).read_bytes()
    assert "steps" in client.predict(seconds=1, api_name="/describe")["line"]
    assert client.predict(api_name="/machine")["max_seconds"] == 30


def test_results_are_compared_and_found_again_after_the_server_was_killed(tmp_path, checkpoint, clips, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))  # the killed one cannot remove its own
    with serve(tmp_path, "--model", checkpoint) as server:
        server.wait_until_ready()
        client = Client(server.url, verbose=False)
        done = submit(client, clips)
        until(client, done, "done")
        mine = done["job"], done["visitor"]
        with pytest.raises(Exception, match="no side-by-side video yet"):
            client.predict(*mine, True, api_name="/result")
        assert client.predict(*mine, api_name="/compare")["comparison"]["state"] in ("waiting", "running")
        while (comparison := job(client, done)["comparison"])["state"] in ("waiting", "running"):
            time.sleep(0.1)
        assert comparison == {"state": "done", "done": 7, "total": 8, "error": None}
        assert probe_video(client.predict(*mine, True, api_name="/result")).width == 2 * 192
        with pytest.raises(Exception, match="no job"):
            client.predict(done["job"], secrets.token_urlsafe(24), api_name="/compare")
        before = client.predict(done["visitor"], 0, api_name="/watch")["server"]
        assert client.predict(done["visitor"], 0, api_name="/watch")["server"] == before
        cut = submit(client, clips, "long.wav", done["visitor"])
        until(client, cut, "running")
        server.process.kill()
        server.process.wait()
    with serve(tmp_path, "--model", checkpoint) as server:
        server.wait_until_ready()
        client = Client(server.url, verbose=False)
        found, lost = job(client, done), job(client, cut)
        assert client.predict(done["visitor"], 0, api_name="/watch")["server"] != before
        assert found["state"] == "done" and set(found["files"]) == {"original", "result", "compared"}
        assert httpx.get(f"{server.url}/lipsync/{found['files']['result']}").status_code == 200
        assert lost["state"] in ("waiting", "running") and lost["error"] is None, "it goes on by itself"
        again = client.predict(cut["job"], {"steps": 2, "deepcache": "off"}, cut["visitor"], api_name="/again")
        client.predict(cut["job"], False, cut["visitor"], api_name="/cancel")
        settings = until(client, again, "running")["settings"]
        assert (settings["steps"], settings["cache"], settings["level"]) == (2, None, lost["settings"]["level"])
        with pytest.raises(Exception, match="no setting 'costs' to change: give some of level, model, steps"):
            client.predict(cut["job"], {"costs": 2}, cut["visitor"], api_name="/again")


EXAMPLE_OF_DOCS = """
from gradio_client import Client, handle_file

client = Client(URL, auth=LOGIN)
video = client.predict(
    video=handle_file(FACE),
    audio=handle_file(VOICE),
    level="balanced",  # or conservative, aggressive, auto, or a number from 0 (quality) to 1 (speed)
    steps=4,
    api_name="/lipsync",
)
"""


def test_one_call_waits_for_the_video_and_tells_its_progress(server, clips):
    names = {"URL": server.url, "LOGIN": LOGIN, "FACE": clips / "talking.mp4", "VOICE": clips / "short.wav"}
    exec(EXAMPLE_OF_DOCS, names)  # noqa: S102
    assert probe_video(names["video"]).n_frames == 8
    client = connect(server)
    files = {"video": handle_file(clips / "talking.mp4"), "audio": handle_file(clips / "long.wav")}
    job = client.submit(**files, steps=4, api_name="/lipsync")
    while not (progress := job.status().progress_data):
        assert not job.done(), job.exception()
        time.sleep(0.05)
    assert progress[0].length == 700 and progress[0].unit == "frames"
    job.cancel()
    with pytest.raises(Exception, match="lasts more than 30 s"):
        client.predict(files["video"], handle_file(clips / "too long.wav"), api_name="/lipsync")


CALLER = """import sys
from gradio_client import Client, handle_file

client = Client(sys.argv[1], auth=(sys.argv[2], sys.argv[3]), verbose=False)
client.predict(handle_file(sys.argv[4]), handle_file(sys.argv[5]), steps=20, api_name="/lipsync")
"""


def test_a_job_ends_when_the_caller_that_waits_for_it_goes_away(server, clips):
    def states() -> dict[Path, str]:
        return {path: json.loads(path.read_text())["state"] for path in server.outputs.glob("*/job.json")}

    def until_state(wanted: str, before: set[Path]) -> None:
        began = time.monotonic()
        while not [state for path, state in states().items() if path not in before and state == wanted]:
            assert time.monotonic() - began < 300, states()
            time.sleep(0.1)

    files = (str(clips / "talking.mp4"), str(clips / "long.wav"))
    before = set(states())
    caller = subprocess.Popen([sys.executable, "-c", CALLER, server.url, *LOGIN, *files])
    until_state("running", before)
    caller.kill()
    caller.wait()
    until_state("cancelled", before)
    # The same of a plain request, which does not go through the queue.
    visitor, before = browser(server), set(states())
    with open(files[0], "rb") as video, open(files[1], "rb") as audio:
        paths = visitor.post("/gradio_api/upload", files=[("files", video), ("files", audio)]).json()
    given = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in paths]
    with pytest.raises(httpx.TimeoutException):
        visitor.post("/gradio_api/run/lipsync", json={"data": given}, timeout=5)
    visitor.close()
    until_state("cancelled", before)


def test_endpoints_are_documented_with_plain_types_and_take_their_values(server, clips):
    client = connect(server)
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    types = {each["parameter_name"]: each["type"] for each in endpoints["/submit"]["parameters"]}
    assert types["crf"] == {"type": "number"} and types["steps"] == {"type": "integer"}
    assert types["level"] == {"anyOf": [{"type": "number"}, {"type": "string"}]}
    assert endpoints["/lipsync"]["parameters"][0]["parameter_name"] == "video"
    settings = job(client, submit(client, clips, crf=18, level="balanced"))["settings"]
    assert (settings["crf"], settings["level"]) == (18, "balanced")
    assert not re.search("<[a-z]", client.predict(api_name="/describe")["line"]), "no HTML"


def test_a_look_at_a_video_tells_its_faces_and_properties(server, clips):
    seen = connect(server).predict(handle_file(clips / "talking.mp4"), api_name="/check_video")
    assert (seen["duration"], seen["fps"], seen["width"]) == (0.96, 25, 192) and seen["warnings"] == []
    assert [(face["face"], face["usable"]) for face in seen["faces"]] == [("largest", True)]


def test_ten_jobs_at_once_are_all_done_and_more_are_refused(server, clips):
    client = connect(server)
    hold = submit(client, clips, "long.wav")
    until(client, hold, "running")
    replies = [submit(client, clips, visitor=hold["visitor"]) for _ in range(9)]
    with pytest.raises(Exception, match="The queue is full"):
        submit(client, clips, visitor=hold["visitor"])
    client.predict(hold["job"], False, hold["visitor"], api_name="/cancel")
    for reply in replies:
        until(client, reply, "done")
    assert not list(server.outputs.glob("*/first.mp4"))


def test_nothing_is_to_be_had_without_a_login(server, clips):
    stranger = httpx.Client(base_url=server.url)
    client = connect(server)
    reply = submit(client, clips)
    files = until(client, reply, "done")["files"]
    for method, path in (
        ("POST", "/gradio_api/run/submit"), ("POST", "/gradio_api/run/watch"), ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/queue/join"), ("POST", "/gradio_api/call/submit"), ("GET", "/config"),
    ):  # fmt: skip
        found = stranger.request(method, path, **({"json": {"data": []}} if method == "POST" else {}))
        assert found.status_code == 401, path
    assert stranger.get(f"/lipsync/{files['result']}").status_code == 404
    assert browser(server).get(f"/lipsync/{files['result']}").status_code == 200


def test_a_visitor_cannot_read_what_is_not_theirs(server, clips):
    client, visitor = connect(server), browser(server)
    reply = submit(client, clips)
    seen = until(client, reply, "done")
    foreign = secrets.token_urlsafe(24)
    key, name, file = seen["files"]["result"].split("/")
    (result,) = server.outputs.glob(f"*/{file}") if len(list(server.outputs.glob("*"))) == 1 else [
        sorted(server.outputs.glob(f"*/{file}"))[-1]
    ]  # fmt: skip
    link = result.with_name("link.mp4")
    os.symlink("/etc/passwd", link)
    secret = b"root:"
    for path in (
        f"/gradio_api/file={result}", f"/gradio_api/file={result.parent / 'job.json'}", f"/gradio_api/file={link}",
        "/gradio_api/file=/etc/passwd", f"/gradio_api/file={ROOT / 'README.md'}", f"/gradio_api/file={ROOT / 'app.py'}",
        f"/gradio_api/file={server.outputs}/../log", "/gradio_api/file=..%2f..%2fetc%2fpasswd",
        f"/lipsync/{key}/job.json/job.json", f"/lipsync/{key}/../job.json", f"/lipsync/{key}/..%2fjob.json/x",
        f"/lipsync/{key}/link.mp4/link.mp4", f"/lipsync/{foreign}/result/{file}", f"/lipsync//result/{file}",
        f"/lipsync/{key[:-1]}/result/{file}", "/lipsync/..%2f..%2fetc%2fpasswd/result/x",
    ):  # fmt: skip
        found = visitor.get(path)
        assert found.status_code in (400, 403, 404, 405), path
        assert secret not in found.content and b"ftyp" not in found.content[:100]

    def ask(endpoint, *data):
        return visitor.post(f"/gradio_api/run/{endpoint}", json={"data": data})

    # Another's job is as one that there is not.
    for endpoint, data in (("cancel", (False, foreign)), ("again", ({}, foreign)), ("remove", (foreign,))):
        unknown = ask(endpoint, "0" * 8, *data).json()["error"]
        assert ask(endpoint, reply["job"], *data).json()["error"] == unknown.replace("0" * 8, reply["job"])
    assert ask("result", reply["job"], foreign).status_code == 500
    assert ask("watch", foreign, 0, None).json()["data"][0]["jobs"] == []
    assert "22 to 100 letters" in ask("watch", "me", 0, None).json()["error"]

    # Files that were not uploaded, by any of the ways to name one.
    config = visitor.get("/config").json()
    assert any(dependency["api_name"] == "submit" for dependency in config["dependencies"])
    rest = [
        0,
        "auto",
        4,
        1,
        0.85,
        0,
        "as the level says",
        "as the level says",
        "largest",
        16,
        None,
        "on",
        "source",
        foreign,
    ]
    for path in ("/etc/passwd", str(result), str(result.with_name("video.mp4")), "../../../etc/passwd", str(link)):
        given = {"path": path, "meta": {"_type": "gradio.FileData"}}
        found = ask("submit", given, given, *rest)
        assert found.status_code != 200 and found.json()["error"]
    assert ask("watch", foreign, 0, None).json()["data"][0]["jobs"] == []

    # A playlist, by which ffmpeg would read other files.
    for name, words in (("list.mp4", f"ffconcat version 1.0\nfile {result}\n"),
                        ("list.m3u8", f"#EXTM3U\n#EXTINF:9,\n{result}\n#EXT-X-ENDLIST\n")):  # fmt: skip
        sent = visitor.post("/gradio_api/upload", files={"files": (name, words)}).json()[0]
        given = {"path": sent, "meta": {"_type": "gradio.FileData"}}
        assert ask("submit", given, given, *rest).json()["error"]


def test_a_file_that_calls_itself_a_page_is_never_opened_as_one(server, clips, tmp_path):
    client, visitor = connect(server), browser(server)
    for name in ("evil.html", "evil.svg", "plain.mp4"):
        video = shutil.copyfile(clips / "talking.mp4", tmp_path / name)
        files = {"video": handle_file(video), "audio": handle_file(clips / "short.wav")}
        reply = client.predict(**files, steps=4, api_name="/submit")
        found = visitor.get(f"/lipsync/{job(client, reply)['files']['original']}")
        assert found.status_code == 200 and found.headers["x-content-type-options"] == "nosniff"
        assert found.headers["content-security-policy"] == "sandbox; default-src 'none'"
        kind, disposition = found.headers["content-type"], found.headers["content-disposition"].split(";")[0]
        plain = name == "plain.mp4"
        assert (kind, disposition) == (("video/mp4", "inline") if plain else ("application/octet-stream", "attachment"))


def test_the_limits_hold(server, clips):
    client, visitor = connect(server), browser(server)
    with pytest.raises(Exception, match="lasts more than 30 s"):
        submit(client, clips, "too long.wav")
    large = visitor.post("/gradio_api/upload", files={"files": ("large.mp4", b"0" * (UPLOAD_LIMIT + 1000))})
    assert large.status_code == 413
    for name, value in (("level", 2), ("guidance", -1), ("seed", -1), ("batch", 1000), ("vram_fraction", 2)):
        with pytest.raises(Exception, match=str(value)):
            submit(client, clips, **{name: value})


def test_a_job_that_has_ended_is_told_once_unless_there_is_something_new(server, clips):
    client = connect(server)
    reply = submit(client, clips)
    visitor = reply["visitor"]

    def watch(known):
        (seen,) = client.predict(visitor, 0, known, api_name="/watch")["jobs"]
        return seen

    running = watch({reply["job"]: None})
    assert running["state"] and "settings" not in running, "one that runs is told each time, but for what never changes"
    assert watch({})["settings"]
    seen = until(client, reply, "done")
    known = {seen["id"]: seen["version"]}
    assert seen["report"] and watch(known) == {"id": seen["id"], "version": seen["version"]}
    assert watch({seen["id"]: "another"}) == watch({}) == watch(None) == seen
    client.predict(reply["job"], visitor, api_name="/compare")
    while (told := watch(known)).get("comparison", {"state": "running"})["state"] != "done":
        time.sleep(0.1)
    assert told["version"] != seen["version"] and "compared" in told["files"]
    assert watch({told["id"]: told["version"]}).keys() == {"id", "version"}


def test_a_level_is_known_or_refused_at_once_and_can_be_shown_again():
    defaults = {setting.name: setting.default for setting in form.SETTINGS}

    def parsed(level):
        return form.parse_settings(defaults | {"level": level}, form.MODELS)

    for value, position in (("Balanced", 0.5), (" aggressive ", 1.0), ("auto", 0.7), (0.25, 0.25), ("0.25", 0.25)):
        fields = parsed(value)
        assert fields["level"] == "auto" or find_level(fields["level"]).position == position
        assert form.page_values(fields, 0.7)["level"] == position, "as the page's slider has it"
    for value in ("fast", "", "nan", 1.5, None, "-1", []):
        with pytest.raises(UserError, match="The level is .* or auto, conservative, balanced, aggressive"):
            parsed(value)


def test_what_the_page_shows_at_first_are_the_defaults_of_a_request():
    defaults = {setting.name: setting.default for setting in form.SETTINGS}
    suiting = {"level": "auto", "guidance": None, "vram_fraction": None}  # the machine's and the model's
    request = Request(Path("video"), Path("voice"), **form.parse_settings(defaults, form.MODELS) | suiting)
    assert request == Request(Path("video"), Path("voice"))


def test_all_settings_of_a_job_can_be_changed_and_come_back_as_they_were_told():
    old = Request(Path("video"), Path("voice"), level="0.5", steps=30, cache=3, compile=True, face="left")
    other = Request(Path("a"), Path("b"), level="auto", guidance=2.0, batch=8, vram_fraction=0.5, crf=20, seed=3)
    assert form.parse_changes({}, old, form.MODELS) == {}
    assert form.parse_changes(other.settings(), old, form.MODELS) == other.settings(), "as /watch tells them"
    expected = old.settings() | {"vram_fraction": 0.85}
    assert form.parse_changes(old.settings(), other, form.MODELS) == expected
    named = {"level": "Balanced", "deepcache": "every 2nd step", "compile": "off", "batch": 0, "face": "right"}
    fields = {"level": "balanced", "cache": 2, "compile": False, "batch": None, "face": "right"}
    assert form.parse_changes(named, old, form.MODELS) == fields, "as /submit takes them"
    for name, value in (("costs", 1), ("video", "/etc/passwd"), ("", 1)):
        with pytest.raises(UserError, match=f"no setting '{name}' to change"):
            form.parse_changes({name: value}, old, form.MODELS)
    assert form.parse_changes({"face": "12,30@1.5"}, old, form.MODELS) == {"face": "12,30@1.5"}
    wrong = {
        "face": "12",
        "steps": 0,
        "seed": None,
        "cache": 9,
        "compile": 1,
        "model": "none",
        "audio_track": -1,
        "video_track": "x",
    }
    for name, value in [*wrong.items(), ("steps", "x")]:
        with pytest.raises(UserError, match="give"):
            form.parse_changes({name: value}, old, form.MODELS)


def test_a_result_that_cannot_be_given_away_is_said(tmp_path):
    worker = Worker(tmp_path)
    api = Endpoints(worker, Fetcher(worker, True), Uploads(tmp_path / "missing"))
    job = Job(Request(Path("a"), Path("b")), owner_of("v" * 24), tmp_path, ("a.mp4", "b"), (2, 2), 1.0)
    job.output, worker.store.jobs = job.planned_output, {job.id: job}
    with pytest.raises(UserError, match="'a-synced.mp4' is not on this server any more"):
        api.result(job.id, "v" * 24)
    job.output.touch()
    with pytest.raises(UserError, match="'a-synced.mp4' cannot be given away .*GRADIO_TEMP_DIR") as caught:
        api.result(job.id, "v" * 24)
    assert str(tmp_path) not in str(caught.value)


def test_a_file_with_several_tracks_lets_one_be_chosen(server, clips, tmp_path):
    """Two sounds of different lengths in one file: the default is described, and the other one on request."""
    both = tmp_path / "both.mka"
    inputs = ("-i", clips / "short.wav", "-i", clips / "long.wav")
    ffmpeg(*inputs, "-map", "0:a", "-map", "1:a", "-disposition:a:0", "default", "-c", "copy", both)
    client = connect(server)
    reply = client.predict(handle_file(both), api_name="/measure")
    assert 0.2 < reply["seconds"] < 0.4 and reply["track"] == 1
    assert [each["number"] for each in reply["tracks"]] == [1, 2]
    assert all("pcm_s16le" in each["label"] for each in reply["tracks"])
    reply = client.predict(handle_file(both), 2, api_name="/measure")
    assert 27 < reply["seconds"] < 29 and reply["track"] == 2
    with pytest.raises(Exception, match="3"):
        client.predict(handle_file(both), 3, api_name="/measure")
    with pytest.raises(Exception, match="The sound track is 'x'"):
        client.predict(
            video=handle_file(clips / "talking.mp4"), audio=handle_file(both), audio_track="x", api_name="/submit"
        )


def test_a_public_link_asks_for_a_login_unless_it_is_refused(capsys):
    def auth(*arguments):
        return options.parse_options(list(arguments), Path("outputs")).accounts

    ((name, password),) = auth("--share")
    assert re.fullmatch(r"[\w-]{12,}", password) and password in capsys.readouterr().out
    assert auth("--share", "--no-auth") is None and auth() is None
    assert auth("--share", "--auth", "a:b:c,d:e") == [("a", "b:c"), ("d", "e")]
    with pytest.raises(UserError, match="NAME:PASSWORD"):
        auth("--auth", "anna")
