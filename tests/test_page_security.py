"""The running page against what is not its visitor: pages of others, addresses, malformed requests, files that stay."""

import json
import os
import secrets
import shutil
import signal
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from clips import make_sound
from conftest import portrait, save_video
from gradio_client import Client, handle_file
from serving import ROOT, serve

from latentsync.errors import UserError
from optim.serving import endpoints
from optim.serving.endpoints import MAX_PROBES, MAX_WAITING_PROBES, Endpoints
from optim.serving.fetcher import Fetcher
from optim.serving.options import wait_for_signal
from optim.serving.uploads import Uploads
from optim.serving.worker import Worker

META = {"_type": "gradio.FileData"}
SLOW = 120  # seconds that anything may take on a busy machine


def wait(condition, what: str):
    end = time.monotonic() + SLOW
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    save_video(folder / "talking.mp4", [portrait(t) for t in range(24)], "-c:v", "libx264", "-pix_fmt", "yuv420p")
    make_sound(folder / "short.wav", seconds=0.3)
    return folder


@contextmanager
def page(folder: Path, checkpoint: Path, *options: object):
    """A page whose uploads lie in `folder`/temp."""
    temp = folder / "temp"
    temp.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temp))
        patch.delenv("GRADIO_TEMP_DIR", raising=False)
        with serve(folder, "--model", checkpoint, *options) as server:
            server.wait_until_ready()
            server.temp = temp
            yield server


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoint):
    with page(tmp_path_factory.mktemp("page"), checkpoint, "--max-upload", "2mb") as server:
        yield server


@pytest.fixture
def quiet(server):
    """What a test makes the server say must hold no traceback."""
    before = len(server.log.read_text())
    yield
    assert "Traceback" not in server.log.read_text()[before:]


def call(server, name: str, *data) -> httpx.Response:
    body = json.dumps({"data": data})
    return httpx.post(f"{server.url}/gradio_api/run/{name}", content=body, timeout=SLOW)


def upload(server, name: str, data: bytes) -> str:
    return httpx.post(f"{server.url}/gradio_api/upload", files={"files": (name, data)}, timeout=SLOW).json()[0]


def stored(server) -> list[Path]:
    files = []
    for folder, _, names in os.walk(server.temp):  # which passes over folders that go meanwhile, unlike rglob
        files += [Path(folder, name) for name in names if name != "server.json"]
    return files


def client_of(server, path: str = "", **options) -> Client:
    return Client(server.url + path, verbose=False, **options)


def submit(client, clips, **settings) -> dict:
    files = {"video": handle_file(clips / "talking.mp4"), "audio": handle_file(clips / "short.wav")}
    reply = client.predict(**files, steps=4, visitor=settings.pop("visitor", ""), **settings, api_name="/submit")
    return reply


def state(client, reply) -> str:
    jobs = client.predict(reply["visitor"], 0, api_name="/watch")["jobs"]
    return next((job["state"] for job in jobs if job["id"] == reply["job"]), "gone")


# ---- addresses


@pytest.fixture
def elsewhere():
    """A server that counts who asks it."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"secret")

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    found.url = f"http://127.0.0.1:{found.server_port}"
    found.asked = asked
    yield found
    found.shutdown()
    found.server_close()


def test_visitors_cannot_make_the_server_use_the_network(server, quiet, elsewhere):
    url = f"{elsewhere.url}/x.mp4"
    public = f"http://public.example:{elsewhere.server_port}/x.mp4"
    rest = [0, "auto", 4, 1, 0.85, 0, "as the level says", "as the level says", "largest", 16, None, ""]
    endpoints = httpx.get(f"{server.url}/config", timeout=SLOW).json()["dependencies"]
    for address in (url, public, url.upper().replace("X.MP4", "x.mp4"), f"//127.0.0.1:{elsewhere.server_port}/x.mp4"):
        file = {"path": address, "url": address, "meta": META}
        for name in ("run/submit", "run/measure", "run/check_video", "api/again", "call/submit", "queue/join"):
            body = {"data": [file, file, *rest], "session_hash": "abc"}
            for number in [each["id"] for each in endpoints] if name == "queue/join" else [None]:
                sent = httpx.post(f"{server.url}/gradio_api/{name}", json=body | {"fn_index": number}, timeout=SLOW)
                assert sent.status_code in (400, 404), (name, sent.text)
        for body in ({"video": file, "audio": file}, {"changes": {"deep": [file]}, "job": "", "visitor": ""}):
            for name in ("submit", "again"):
                sent = httpx.post(f"{server.url}/gradio_api/call/v2/{name}", json=body, timeout=SLOW)
                assert sent.status_code == 400
        encoded = "".join(f"%{byte:02X}" for byte in address.encode())
        for path in (
            f"file={address}",
            f"file={encoded}",
            f"file/{address}",
            f"file=/{address}",
            f"file=%20{address}",
            f"proxy={address}",
            f"proxy={encoded}",
            f"proxy=/{address}",
            f"file={encoded.replace('%', '%25')}",
        ):
            for method in ("GET", "HEAD"):
                found = httpx.request(method, f"{server.url}/gradio_api/{path}", timeout=SLOW)
                assert found.status_code in (400, 403, 404) and b"secret" not in found.content, path
    mine = upload(server, "a.mp4", b"no video")
    found = call(server, "check_video", {"path": mine, "url": url, "meta": META})
    assert "a.mp4" in found.json()["error"]
    assert not elsewhere.asked


def test_a_refused_path_tells_nothing_of_the_folders(server, quiet):
    paths = (server.outputs, server.outputs / "x", Path("/etc/passwd"), server.temp, ROOT / "README.md")
    for path in paths:
        found = httpx.get(f"{server.url}/gradio_api/file={path}", timeout=SLOW)
        assert found.status_code == 404
        sent = call(server, "check_video", {"path": str(path), "meta": META})
        assert sent.status_code == 400
        for text in (found.text, sent.text):
            assert str(server.outputs) not in text and str(server.temp) not in text


# ---- pages of others


def test_a_foreign_page_can_neither_upload_nor_read_nor_remove(server, quiet):
    before = stored(server)
    for headers in (
        {"Origin": "http://evil.example"}, {"Host": "evil.example:7860"}, {"Origin": "null"},
        {"Origin": f"http://localhost:{server.port}"}, {"Sec-Fetch-Site": "same-site"},
        {"X-Forwarded-Host": "evil.example"}, {"Host": "evil.example", "Origin": "http://evil.example"},
    ):  # fmt: skip
        http = httpx.Client(base_url=server.url, headers=headers, timeout=SLOW)
        replies = [
            http.post("/gradio_api/upload", files={"files": ("a.mp4", b"x")}),
            http.post("/gradio_api/run/remove_model", json={"data": ["latentsync-1.5", False]}),
            http.get("/gradio_api/info"),
            http.options("/gradio_api/upload", headers={"Access-Control-Request-Method": "POST"}),
        ]
        for found in replies:
            assert found.status_code == 403 and "access-control-allow-origin" not in found.headers
            assert found.headers["x-frame-options"] == "DENY"
    assert stored(server) == before


def test_behind_a_proxy_with_a_root_path_the_client_goes_on_working(tmp_path, checkpoint, clips):
    with page(tmp_path, checkpoint, "--root-path", "/app", "--allow-host", "gpu.example") as server:
        proxy = {"X-Forwarded-Host": "gpu.example", "X-Forwarded-Proto": "https"}
        http = httpx.Client(base_url=server.url, headers=proxy, timeout=SLOW)
        root = http.get("/config").json()["root"]
        assert root == "https://gpu.example/app"
        origin = {"Origin": "https://gpu.example", "Sec-Fetch-Site": "same-origin"}
        assert http.post("/gradio_api/upload", files={"files": ("a.mp4", b"x")}, headers=origin).status_code == 200
        assert http.get("/config", headers={"X-Forwarded-Host": "evil.example"}).status_code == 403
        client = client_of(server, "/app")
        assert client.predict("v" * 24, 0, api_name="/watch")["jobs"] == []
        assert submit(client, clips)["job"]


# ---- malformed requests

BAD = [
    None, True, -1, 0, 1e300, 2**62, -(2**63), 0.5, "", "x", "\u0000", "ü" * 300, "x" * 5000, "🙂", "nan", "inf",
    "1e999", [], [None], [[[[1]]]], {}, {"a": {"b": [1]}}, {"path": 5}, {"meta": META}, "http://127.0.0.1/",
    "../../etc/passwd", {"url": "x", "meta": META},
]  # fmt: skip
WORSE = ["NaN", "Infinity", "-Infinity", "1e999", '"\\ud800"', '{"\\udc00": 1}', "9" * 40, "9" * 6000, "[" * 2000]


def fits(found: httpx.Response, what: object) -> None:
    """An answer must be a value, a sentence, or a refusal; a gr.Error of Gradio's comes with status 500."""
    answer = found.json() if found.headers.get("content-type", "").startswith("application/json") else None
    sentence = answer.get("error") if isinstance(answer, dict) else None
    assert found.status_code < 500 or (found.status_code == 500 and isinstance(sentence, str)), (what, found.text)
    assert "Traceback" not in found.text and 'File "' not in found.text
    if found.status_code >= 400 and sentence is not None:
        assert len(sentence) < 1000


def test_no_malformed_value_of_any_endpoint_ends_in_a_traceback(server, quiet):
    config = httpx.get(f"{server.url}/config", timeout=SLOW).json()
    http = httpx.Client(base_url=server.url, timeout=SLOW)
    http.get("/gradio_api/info")
    for dependency in config["dependencies"]:
        name, count = dependency["api_name"], len(dependency["inputs"])
        if not dependency["backend_fn"]:
            found = http.post("/gradio_api/run/predict", json={"data": [None] * count, "fn_index": dependency["id"]})
            assert found.status_code == 404
            continue
        if name in ("stop_fetching", "example", "submit") and count == 0:
            continue
        for position in range(count):
            for bad in BAD:
                data = [None] * count
                data[position] = bad
                found = http.post("/gradio_api/run/predict", json={"data": data, "fn_index": dependency["id"]})
                fits(found, (name, position, bad))
        for data in ([], [None] * (count + 1), None, 5, {"a": 1}, "x"):
            for body in ({"data": data, "fn_index": dependency["id"]}, {"data": data, "event_data": data}):
                fits(http.post(f"/gradio_api/run/{name}", json=body), (name, data))
    for event in (None, 5, {}, {"settings": 5}, {"settings": {"level": []}}, {"settings": {"level": "x"}}, [1]):
        for dependency in config["dependencies"]:
            if dependency["backend_fn"] and not dependency["inputs"]:
                body = {"data": [], "fn_index": dependency["id"], "event_data": event, "trigger_id": 10**15}
                fits(http.post("/gradio_api/run/predict", json=body), (dependency["api_name"], event))


@pytest.mark.parametrize("bad", WORSE, ids=lambda bad: bad[:12])
def test_no_json_that_is_none_ends_in_a_traceback(server, quiet, bad):
    http = httpx.Client(base_url=server.url, timeout=SLOW)
    for path in ("run/watch", "run/describe", "api/cancel", "call/again", "call/v2/remove", "queue/join", "cancel"):
        found = http.post(f"/gradio_api/{path}", content=f'{{"data": [{bad}, {bad}, {bad}], "fn_index": {bad}}}')
        assert found.status_code == 400 and found.json()["error"].endswith("."), (path, found.text)


def test_no_malformed_request_ends_in_a_traceback(server, quiet):
    http = httpx.Client(base_url=server.url, timeout=SLOW)
    mine = upload(server, "a.wav", b"x" * 100)
    for method, path, options in (
        ("POST", "run/nothing", {"json": {"data": []}}), ("POST", "call/v2/nothing", {"json": {}}),
        ("POST", "call/v2/submit", {"json": {"nothing": 1}}), ("POST", "queue/join", {"json": {"data": []}}),
        ("POST", "queue/join", {"json": {"data": [], "fn_index": 10**6, "session_hash": "x"}}),
        ("POST", "queue/join", {"json": {"data": [], "fn_index": "x", "session_hash": ["x"]}}),
        ("POST", "run/watch", {"json": {"data": ["v" * 24, 0, None], "session_hash": "x" * 10_000}}),
        ("POST", "run/watch", {"json": {"data": ["v" * 24, -5, {"x": [1]}]}}), ("POST", "run/watch", {"json": {}}),
        ("POST", "cancel", {"json": {"session_hash": 5}}), ("POST", "cancel", {"json": {}}),
        ("POST", "reset", {"json": {}}),
        ("GET", "queue/data", {"params": {"session_hash": "unknown"}}), ("GET", "queue/data", {}),
        ("GET", "call/watch/unknown", {}), ("GET", "upload_progress", {}), ("GET", "info", {"params": {"x": "%ff"}}),
        ("POST", "upload", {"content": b"x"}), ("POST", "upload", {"json": {}}),
        ("POST", "upload", {"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}),
        ("POST", "upload", {"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}}),
        ("POST", "upload", {"files": {"files": ("x" * 5000, b"x")}}), ("POST", "upload", {"files": {"other": b"x"}}),
        ("POST", "upload", {"data": {"files": "x"}}), ("PUT", "upload", {}), ("DELETE", "run/watch", {}),
        *(("GET", f"file={mine}", {"headers": {"Range": each}}) for each in (
            "bytes=1-2-3", "bytes=²-³", "bytes=-", "bytes=9-1", "bytes=999-", "bytes=a-b", "x", "bytes=0-1,5-6,9-")),
    ):  # fmt: skip
        headers = {name: value.encode() for name, value in options.pop("headers", {}).items()}
        found = http.request(method, f"/gradio_api/{path}", headers=headers, **options)
        fits(found, (method, path))
        # A failure of an endpoint is status 500 with a sentence.
        assert found.status_code != 500 or found.json()["error"].endswith("."), (method, path, found.text)


@pytest.mark.parametrize(
    "options, environment",
    [
        (["--max-seconds", "nan"], {}), (["--max-seconds", "-1"], {}), (["--max-seconds", "inf"], {}),
        (["--queue-size", "-3"], {}), (["--queue-size", "1.5"], {}), (["--server-port", "99999"], {}),
        (["--server-port", "0"], {}), (["--max-upload", "abc"], {}), (["--max-upload", "0"], {}),
        (["--max-upload", "-5mb"], {}), (["--keep-hours", "-1"], {}), (["--keep-hours", "nan"], {}),
        (["--idle-minutes", "nan"], {}), (["--idle-minutes", "-1"], {}), ([], {"GRADIO_SERVER_PORT": "abc"}),
        (["--allow-host", "http://x/"], {}), ([], {"LATENTSYNC_ALLOW_HOST": "a b"}), (["--auth", "anna"], {}),
        ([], {"LATENTSYNC_AUTH": "anna"}), (["--auth-file", "/nonexistent/file"], {}), (["--nonsense"], {}),
    ],
    ids=str,
)  # fmt: skip
def test_an_option_without_sense_is_one_sentence_and_code_2(options, environment, monkeypatch, capsys, tmp_path):
    import app

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(app, "Page", lambda *_: pytest.fail("it must not be served"))
    try:
        code = app.main([*options, "--outputs", str(tmp_path)])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err.strip()
    assert code == 2 and said and "\n" not in said and said.endswith((".", "--help.")), said


# ---- files


def test_an_aborted_upload_leaves_nothing_and_stops_nobody(server, quiet):
    before = stored(server)
    for declared in (1_500_000, 900_000):
        with socket.create_connection(("127.0.0.1", server.port)) as sent:
            sent.sendall(
                b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: %d\r\n\r\n" % declared
                + b'--x\r\nContent-Disposition: form-data; name="files"; filename="cut.mp4"\r\n\r\n' + b"y" * 500_000
            )  # fmt: skip
            wait(lambda: any(path.name == "cut.mp4" for path in stored(server)), "the upload must be under way")
        wait(lambda: stored(server) == before, "the rest must go")
    path = Path(upload(server, "whole.mp4", b"z" * 1000))
    assert path.read_bytes() == b"z" * 1000
    assert httpx.post(f"{server.url}/gradio_api/upload", files={"files": ("b", b"0" * 2_200_000)}).status_code == 413


def test_upload_and_result_go_with_their_job(server, quiet, clips):
    client = client_of(server)
    before = set(stored(server))
    reply = submit(client, clips)
    wait(lambda: state(client, reply) == "done", "the job must be done")
    mine = reply["job"], reply["visitor"]
    client.predict(*mine, api_name="/result")
    files = [path for path in set(stored(server)) - before]
    assert {path.name for path in files} >= {"talking.mp4", "short.wav", "talking-synced.mp4"}
    served = [f"{server.url}/gradio_api/file={path}" for path in files]
    assert all(httpx.get(url, timeout=SLOW).status_code == 200 for url in served)
    client.predict(*mine, api_name="/remove")
    assert all(httpx.get(url, timeout=SLOW).status_code == 404 for url in served)
    assert not [path for path in files if path.exists()]


def test_an_upload_can_be_used_twice_and_is_stored_once(server, quiet, clips):
    paths = [upload(server, name, (clips / name).read_bytes()) for name in ("talking.mp4", "short.wav")]
    files = [{"path": path, "meta": META} for path in paths]
    as_level = "as the level says"
    rest = [0, "auto", 4, 1, 0.85, 0, as_level, as_level, "largest", 16, None, "on", "source", as_level, 0, as_level]
    visitor = secrets.token_urlsafe(24)
    jobs = [call(server, "submit", *files, *rest, visitor).json()["data"][0] for _ in range(2)]
    client = client_of(server)
    for job in jobs:
        wait(lambda job=job: state(client, job) == "done", "both must be done")
    call(server, "remove", jobs[0]["job"], visitor)
    assert all(Path(path).is_file() for path in paths)
    call(server, "remove", jobs[1]["job"], visitor)
    assert not any(Path(path).exists() for path in paths)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signals on this system")
@pytest.mark.parametrize("name", ["SIGHUP", "SIGQUIT", "SIGTERM"])
def test_the_folder_of_uploads_goes_with_the_server_and_after_it(name, tmp_path, checkpoint):
    with page(tmp_path, checkpoint) as server:
        upload(server, "a.mp4", b"x")
        assert stored(server)
        server.process.send_signal(getattr(signal, name))
        assert server.process.wait(SLOW) == 0
    assert not list(server.temp.glob("latentsync-page-*"))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal on this system")
def test_a_killed_server_s_folder_is_removed_by_the_next_one(tmp_path, checkpoint):
    with page(tmp_path, checkpoint) as server:
        killed = Path(upload(server, "a.mp4", b"x"))
        server.process.kill()
        server.process.wait()
    assert killed.is_file()
    with page(tmp_path, checkpoint) as server:
        assert not killed.exists() and Path(upload(server, "a.mp4", b"x")).is_file()


# ---- one visitor does not stop the page for all


def test_polling_and_files_go_on_while_previews_wait(tmp_path, monkeypatch):
    import app

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    worker = Worker(tmp_path / "outputs")
    worker.ready.set()
    held, entered = threading.Event(), threading.Semaphore(0)

    def stuck(*_):
        entered.release()
        held.wait(SLOW)
        raise UserError("This is no video.")

    monkeypatch.setattr(endpoints, "probe_video", stuck)
    api = Endpoints(worker, Fetcher(worker, False), Uploads(tmp_path))
    built = app.Page(api)
    policy = app.policy_for(None, [], {})
    policy.check_call = app.CallCheck(built.blocks)
    guard = app.guarded(api, policy)
    _, url, _ = built.blocks.launch(
        prevent_thread_lock=True, quiet=True, ssr_mode=False,
        app_kwargs={"routes": app.routes(api), "lifespan": guard},
    )  # fmt: skip
    try:
        http = httpx.Client(base_url=url, timeout=SLOW)
        mine = http.post("/gradio_api/upload", files={"files": ("a.mp4", b"x")}).json()[0]
        replies = []

        def look():
            sent = httpx.post(
                f"{url}gradio_api/run/check_video", json={"data": [{"path": mine, "meta": META}]}, timeout=SLOW
            )
            replies.append(sent.json()["error"])

        threads = [threading.Thread(target=look) for _ in range(60)]
        for thread in threads:
            thread.start()
        for _ in range(MAX_PROBES):
            assert entered.acquire(timeout=SLOW)
        wait(lambda: len(replies) >= 60 - MAX_PROBES - MAX_WAITING_PROBES, "those beyond the limit must be refused")
        assert set(replies) == {"This server looks at as many files as it can now: try again in a minute."}
        for _ in range(3):  # with none of the probes at its end
            assert http.post("/gradio_api/run/watch", json={"data": ["v" * 24]}).json()["data"][0]["jobs"] == []
            assert http.get("/lipsync/plotly.min.js").status_code == 200 and http.get("/").status_code == 200
            assert http.get(f"/gradio_api/file={mine}").content == b"x"
        assert not entered.acquire(blocking=False), "no more than the limit at once"
        held.set()
        for thread in threads:
            thread.join(SLOW)
        assert replies.count("This is no video.") == MAX_PROBES + MAX_WAITING_PROBES
    finally:
        held.set()
        built.blocks.close(verbose=False)


# ---- a real browser

ATTACK = """async (target) => {
    const found = {};
    const attempt = async (name, act) => { try { found[name] = await act(); } catch { found[name] = "refused"; } };
    const json = (data) => ({ method: "POST", headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ data }), credentials: "include" });
    const form = new FormData();
    form.append("files", new File(["evil"], "evil.mp4"));
    await attempt("upload", async () =>
        (await fetch(`${target}/gradio_api/upload`, { method: "POST", body: form })).status);
    await fetch(`${target}/gradio_api/upload`, { method: "POST", body: form, mode: "no-cors" }).catch(() => {});
    await attempt("remove", async () =>
        (await fetch(`${target}/gradio_api/run/remove_model`, json(["latentsync-1.5", false]))).status);
    await attempt("simple", async () => (await fetch(`${target}/gradio_api/run/remove_model`, { method: "POST",
        body: JSON.stringify({ data: ["latentsync-1.5", false] }), mode: "no-cors" })).status);
    await attempt("read", async () => (await fetch(`${target}/config`)).status);
    await attempt("picture", () => new Promise((done) => {
        const image = new Image();
        image.onload = () => done("seen");
        image.onerror = () => done("refused");
        image.src = `${target}/favicon.ico`;
    }));
    await attempt("frame", () => new Promise((done) => {
        const frame = document.createElement("iframe");
        frame.onload = () => done(frame.contentDocument ? "empty" : "an error page or the page");
        frame.src = target;
        document.body.append(frame);
    }));
    return found;
}"""


def test_a_foreign_page_in_a_real_browser_gets_nowhere(server, quiet):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = "chromium", "chromium-browser", "google-chrome"
    if not (chromium := next(filter(None, map(shutil.which, names)), None)):
        pytest.skip("there is no Chromium on this machine")

    class Evil(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><body>evil</body>")

        def log_message(self, *_):
            pass

    evil = ThreadingHTTPServer(("127.0.0.1", 0), Evil)
    threading.Thread(target=evil.serve_forever, daemon=True).start()
    before = stored(server)
    try:
        with playwright.sync_playwright() as driver:
            rules = "--host-resolver-rules=MAP evil.example 127.0.0.1"
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", rules])
            tab = browser.new_page()
            tab.set_default_timeout(1000 * SLOW)
            for host in ("127.0.0.1", "localhost", "evil.example"):
                tab.goto(f"http://{host}:{evil.server_port}/")
                for target in (server.url, f"http://localhost:{server.port}", f"http://evil.example:{server.port}"):
                    found = tab.evaluate(ATTACK, target)
                    frame = tab.frames[-1]
                    assert found.pop("simple") in (0, "refused")  # it may be sent; it may not be obeyed or read
                    assert found.pop("frame") != "empty" and "LatentSync" not in frame.content()
                    assert set(found.values()) == {"refused"}, (host, target, found)
            # A foreign name that has become this machine's: the browser takes it for one origin.
            assert tab.goto(f"http://evil.example:{server.port}/").status == 403
            found = tab.evaluate(ATTACK, f"http://evil.example:{server.port}")
            assert {found["upload"], found["remove"], found["read"]} == {403} and found["picture"] == "refused"
            browser.close()
    finally:
        evil.shutdown()
        evil.server_close()
    assert stored(server) == before


def test_a_sound_is_looked_at_for_as_long_as_the_page_takes_it(tmp_path, monkeypatch, clips):
    asked = []

    def probe(path, track, **options):
        asked.append(options)
        raise UserError(f"The sound in {path} lasts too long.")

    monkeypatch.setattr(endpoints, "probe_audio", probe)
    worker = Worker(tmp_path, max_seconds=30)
    with pytest.raises(UserError, match="'short.wav' lasts too long"):
        Endpoints(worker, Fetcher(worker, False), Uploads(clips)).measure(str(clips / "short.wav"))
    assert asked == [{"max_seconds": 30}]


def test_the_share_link_s_host_is_answered(tmp_path, monkeypatch):
    import app

    policies, offered = [], []

    class Launched:
        def __init__(self, api, _):
            self.blocks = self._queue = self
            self.api = api

        def launch(self, **options):
            offered.append(options)
            return None, "http://127.0.0.1:7860", "https://0a1b.gradio.live"

        def close(self, **_):
            pass

    def stop(*_):
        raise KeyboardInterrupt  # as Ctrl-C once it is served

    monkeypatch.setattr(app, "Page", Launched)
    monkeypatch.setattr(app, "guarded", lambda _, policy, tools: policies.append(policy))
    monkeypatch.setattr(app, "wait_for_signal", stop)
    monkeypatch.setattr(Worker, "start", lambda _: None)
    assert app.main(["--share", "--outputs", str(tmp_path)]) == 0
    assert policies[0].allows("0a1b.gradio.live") and not policies[0].allows("ffff.gradio.live")
    assert policies[0].throttle and callable(offered[0]["auth"]) and offered[0]["max_file_size"] == 200 * 2**20


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to threads on this system")
def test_a_signal_that_another_thread_gets_ends_the_server_all_the_same():
    class Ended(Exception):
        pass

    def end(*_):
        raise Ended

    wakes = (signal.SIGUSR1, end), (signal.SIGALRM, lambda *_: None)  # the alarm, for a main thread that sleeps on
    before = {number: signal.signal(number, act) for number, act in wakes}
    go = threading.Event()

    def receive() -> None:
        go.wait()
        time.sleep(0.2)  # the main thread waits by then; if not, it notices the signal anyway
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    thread = threading.Thread(target=receive)
    thread.start()
    try:
        began = time.monotonic()
        signal.alarm(SLOW)
        with pytest.raises(Ended):
            go.set()
            wait_for_signal()
        assert time.monotonic() - began < SLOW / 2
    finally:
        signal.alarm(0)
        thread.join()
        for number, act in before.items():
            signal.signal(number, act)
