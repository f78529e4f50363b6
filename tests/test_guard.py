"""What the HTTP guard lets through: hosts, origins, files, sizes and values; and how logins are slowed down."""

import asyncio
import json
import re

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from latentsync.errors import UserError
from optim.serving.guard import Guard, visitor_address
from optim.serving.login import FREE_FAILURES, MAX_WAIT, Throttle, parse_accounts, password_checker, read_accounts
from optim.serving.policy import Policy, policy_for

EVERYWHERE = "0.0.0.0"  # noqa: S104 (no server binds to it here)
FILE = {"_type": "gradio.FileData"}


def site(policy: Policy, *, received: list | None = None) -> TestClient:
    """A server behind the guard that answers everything, and remembers what came through."""
    received = [] if received is None else received

    async def echo(request: Request) -> JSONResponse:
        received.append((request.method, request.url.path, await request.body()))
        return JSONResponse({"ok": True}, headers={"Vary": "Origin"})

    methods = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"]
    app = Starlette(routes=[Route("/{path:path}", echo, methods=methods)])
    return TestClient(Guard(app, policy), base_url="http://127.0.0.1:7860")


# ---- hosts


@pytest.mark.parametrize(
    "server_name, options, environment, right, wrong",
    [
        (
            None, [], {},
            ["localhost", "LOCALHOST:7860", "localhost.:80", "127.0.0.1:7861", "127.8.9.1", "[::1]:7860"],
            ["evil.example", "evil.example:7860", "localhost.evil.example", "192.168.1.5:7860", "0.0.0.0:7860",
             "127.0.0.1.evil.example", "[2001:db8::1]", "", "a b", "localhost@evil.example", "localhost:99999999",
             "user-space.hf.space"],
        ),
        ("192.168.1.5", [], {}, ["192.168.1.5:7860", "localhost:7860"], ["evil.example", "192.168.1.5.evil.example"]),
        ("box.example", [], {}, ["box.example:7860", "BOX.example", "10.1.2.3:7860"], ["evil.example", "example"]),
        (EVERYWHERE, [], {}, ["192.168.1.5:7860", "localhost", "[fe80::1]:7860"], ["evil.example"]),
        ("::", [], {}, ["[2001:db8::1]:7860", "[::]:7860", "127.0.0.1"], ["evil.example"]),
        (None, ["gpu.example", "other.example:8443"], {}, ["gpu.example", "gpu.example:1234", "other.example"],
         ["evil.example", "sub.gpu.example"]),
        (EVERYWHERE, [], {"SPACE_ID": "User/My_space", "SPACE_HOST": "user-my-space.hf.space,own.example"},
         ["user-my-space.hf.space", "own.example", "10.0.0.7:7860"], ["evil.hf.space", "evil.example"]),
    ],
)  # fmt: skip
def test_only_the_hosts_that_are_meant_are_answered(server_name, options, environment, right, wrong):
    client = site(policy_for(server_name, options, environment))
    for host in right:
        assert client.get("/", headers={"Host": host}).status_code == 200, host
    for host in wrong:
        for method in ("GET", "POST", "OPTIONS"):
            found = client.request(method, "/gradio_api/upload", headers={"Host": host})
            assert found.status_code in (400, 403), (host, method)
    assert "--allow-host evil" in client.get("/", headers={"Host": "evil.example", "Accept": "*/*"}).text


def test_the_name_of_the_machine_is_its_own_in_a_network(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "Studio.example")
    client = site(policy_for(EVERYWHERE, [], {}))
    for host in ("studio.example:7860", "studio:7860", "studio.local"):
        assert client.get("/", headers={"Host": host}).status_code == 200
    assert site(policy_for(None, [], {})).get("/", headers={"Host": "studio:7860"}).status_code == 403


def test_a_proxy_s_host_is_taken_only_where_it_was_named():
    told = {"Host": "127.0.0.1:7860", "X-Forwarded-Host": "gpu.example"}
    assert site(policy_for(None, [], {})).get("/", headers=told).status_code == 403
    for policy in (policy_for(None, ["gpu.example"], {}), policy_for(None, [], {}, "https://gpu.example/app")):
        client = site(policy)
        assert client.get("/", headers=told).status_code == 200
        assert client.post("/x", headers=told | {"Origin": "https://gpu.example"}).status_code == 200
        rewritten = {"Host": "127.0.0.1:7860", "Origin": "https://gpu.example", "Sec-Fetch-Site": "same-origin"}
        assert client.post("/x", headers=rewritten).status_code == 200, "a proxy that does not tell its name"
        for origin in ("https://evil.example", "https://gpu.example:9000", "http://127.0.0.1:9000"):
            assert client.post("/x", headers=told | {"Origin": origin}).status_code == 403
    named = site(policy_for(None, ["gpu.example:8443"], {}))
    assert named.post("/x", headers=told | {"Origin": "https://gpu.example:8443"}).status_code == 200
    with pytest.raises(UserError, match="no host"):
        policy_for(None, ["https://gpu.example/"], {})


def test_a_share_link_is_answered_once_it_is_known():
    policy = policy_for(None, [], {})
    client, link = site(policy), {"Host": "0a1b.gradio.live", "Origin": "https://0a1b.gradio.live"}
    assert client.post("/x", headers=link).status_code == 403
    policy.add("0a1b.gradio.live")
    assert client.post("/x", headers=link).status_code == 200
    assert client.post("/x", headers=link | {"Origin": "https://ffff.gradio.live"}).status_code == 403


# ---- pages of others

FOREIGN = [
    {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:8000"},
    {"Origin": "http://localhost:7860"}, {"Origin": "file://"}, {"Origin": "http://127.0.0.1:7860.evil.example"},
    {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Referer": "https://evil.example/x"},
    {"Origin": "http://127.0.0.1:7860@evil.example"}, {"Origin": "http://[bad"},
]  # fmt: skip
OWN = [{}, {"Origin": "http://127.0.0.1:7860"}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"},
       {"Referer": "http://127.0.0.1:7860/?x"}]  # fmt: skip


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_a_page_of_another_origin_changes_nothing_and_reads_nothing(headers):
    received = []
    client = site(policy_for(None, [], {}), received=received)
    for method, path in (
        ("POST", "/gradio_api/upload"), ("POST", "/gradio_api/run/remove_model"), ("POST", "/login"),
        ("GET", "/gradio_api/queue/data"), ("GET", "/gradio_api/heartbeat/x"), ("GET", "/logout"), ("DELETE", "/x"),
        ("GET", "/gradio_api/file=/tmp/x"),
    ):  # fmt: skip
        found = client.request(method, path, headers=headers | {"Sec-Fetch-Mode": "navigate"})
        assert found.status_code == 403, (method, path)
        assert not [name for name in found.headers if name.startswith("access-control-")]
    if "Referer" not in headers:  # of a link, as a page sends it before it opens another
        asked = {"Access-Control-Request-Method": "POST"}
        assert client.options("/gradio_api/upload", headers=headers | asked).status_code == 403
        assert client.get("/lipsync/key/picture", headers=headers | {"Sec-Fetch-Mode": "no-cors"}).status_code == 403
    assert not received


@pytest.mark.parametrize("headers", OWN, ids=str)
def test_the_own_page_and_programs_are_let_through(headers):
    client = site(policy_for(None, [], {}))
    for method, path in (("POST", "/gradio_api/upload"), ("GET", "/gradio_api/info"), ("POST", "/login"), ("GET", "/")):
        assert client.request(method, path, headers=headers).status_code == 200


def test_a_link_of_another_site_opens_the_page():
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    client = site(policy_for(None, [], {}))
    assert client.get("/", headers=link).status_code == 200
    assert client.get("/gradio_api/file=/x", headers=link).status_code == 403


def test_nobody_frames_the_page_but_the_site_of_a_space():
    found = site(policy_for(None, [], {})).get("/").headers
    assert found["content-security-policy"] == "frame-ancestors 'none'" and found["x-frame-options"] == "DENY"
    space = site(policy_for(None, [], {"SPACE_HOST": "a-b.hf.space"})).get("/", headers={"Host": "a-b.hf.space"})
    assert (
        "frame-ancestors 'self' https://huggingface.co https://*.hf.space" in space.headers["content-security-policy"]
    )
    assert "x-frame-options" not in space.headers


def test_an_upload_of_another_site_is_refused_before_its_body_is_read():
    async def scenario() -> tuple[int, int]:
        read, statuses = 0, []

        async def receive() -> dict:
            nonlocal read
            read += 1
            return {"type": "http.request", "body": b"x", "more_body": True}

        async def send(message: dict) -> None:
            statuses.append(message.get("status"))

        scope = {
            "type": "http", "method": "POST", "path": "/gradio_api/upload", "root_path": "", "client": ("1.1.1.1", 1),
            "headers": [(b"host", b"localhost"), (b"origin", b"https://evil.example")],
        }  # fmt: skip
        await Guard(Starlette(), policy_for(None, [], {}))(scope, receive, send)
        return statuses[0], read

    assert asyncio.run(scenario()) == (403, 0)


def test_a_websocket_of_another_site_is_refused():
    messages = []

    async def run(headers: list) -> str:
        async def app(scope, receive, send) -> None:
            await send({"type": "websocket.accept"})

        async def send(message: dict) -> None:
            messages.append(message["type"])

        scope = {"type": "websocket", "path": "/queue/join", "headers": headers, "client": ("127.0.0.1", 1)}
        await Guard(app, policy_for(None, [], {}))(scope, None, send)
        return messages[-1]

    own = [(b"host", b"localhost:7860"), (b"origin", b"http://localhost:7860")]
    assert asyncio.run(run(own)) == "websocket.accept"
    for headers in (own[:1] + [(b"origin", b"http://evil.example")], [(b"host", b"evil.example")]):
        assert asyncio.run(run(headers)) == "websocket.close"


# ---- paths, bodies and values


@pytest.mark.parametrize(
    "path",
    ["proxy=http://evil.example/x", "proxy=https%3A%2F%2Fevil.example", "deep_link", "process_recording",
     "component_server", "stream/x/0/1/playlist.m3u8", "vibe-edit", "run-history/connect", "custom_component/a/b/c/d",
     "monitoring", "dev/reload", "file/http://evil.example"],
)  # fmt: skip
def test_parts_of_gradio_that_nobody_uses_are_closed(path):
    received = []
    client = site(policy_for(None, [], {}), received=received)
    assert client.get(f"/gradio_api/{path}").status_code == 404
    assert client.post(f"/gradio_api/{path}", json={}).status_code == 404
    assert not received


def test_gradio_gets_what_was_checked_and_nothing_else():
    received, calls = [], []
    policy = policy_for(None, [], {})
    policy.is_upload = lambda path: path == "/srv/uploads/mine.mp4"
    policy.check_call = lambda name, body, by_name: calls.append((name, body, by_name))
    client = site(policy, received=received)
    file = {"path": "/srv/uploads/mine.mp4", "url": "http://127.0.0.1:9/secret", "meta": FILE}
    body = {"data": [file, {"deep": [file]}], "fn_index": 3, "batched": True, "event_id": "x"}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 200
    clean = {"path": "/srv/uploads/mine.mp4", "meta": FILE}
    assert json.loads(received[-1][2]) == {"data": [clean, {"deep": [clean]}], "fn_index": 3}
    assert client.post("/gradio_api/call/submit", json=body).status_code == 200
    assert calls[-1][0] == "submit" and "fn_index" not in calls[-1][1]
    assert client.post("/gradio_api/call/v2/submit", json={"video": file}).status_code == 200
    assert calls[-1] == ("submit", {"video": clean}, True)
    twice = b'{"data": [{"path": "/srv/uploads/mine.mp4", "path": "http://127.0.0.1/", "meta": {}}]}'
    assert client.post("/gradio_api/run/submit", content=twice).status_code == 400
    count = len(received)
    for path in ("http://127.0.0.1/", "HTTPS://x", "ftp://x", "//host/share", "/etc/passwd", "", None, 5, ["x"]):
        for place in ([{"path": path}], [{"a": [{"path": path, "meta": FILE}]}]):
            for endpoint in ("run/again", "api/again", "queue/join", "call/again", "cancel"):
                assert client.post(f"/gradio_api/{endpoint}", json={"data": place}).status_code == 400
        assert client.post("/gradio_api/call/v2/again", json={"x": {"path": path}}).status_code == 400
    assert len(received) == count


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"5", b'{"data": [NaN]}', b'{"data": [-Infinity]}', b'{"data": [1e999]}',
     b'{"data": ["\\ud800"]}', b'{"\\udfff": []}', b'{"data": [%s]}' % (b"9" * 30), b'{"data": [%s]}' % (b"9" * 5000),
     b"[" * 100_000, b'{"data": %s}' % (b"[" * 50 + b"]" * 50), b"\xff\xfe{}", b'{"data": [-9223372036854775809]}'],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
def test_json_that_cannot_be_computed_with_is_refused_with_a_sentence(body):
    received = []
    client = site(policy_for(None, [], {}), received=received)
    for path in ("run/watch", "queue/join", "call/v2/x", "reset"):
        found = client.post(f"/gradio_api/{path}", content=body)
        assert found.status_code == 400 and re.fullmatch(r"[A-Z][^\n]*\.", found.json()["error"]), found.text
    assert not received


def test_a_body_is_bounded_whether_it_says_its_size_or_not():
    client = site(policy_for(None, [], {}))
    assert client.post("/gradio_api/run/x", content=b" " * (2**20 + 1)).status_code == 413
    assert client.post("/login", content=(b" " * 2**16 for _ in range(20))).status_code == 413
    assert client.post("/login", content=b"x", headers={"Content-Length": "-1"}).status_code == 413


def test_who_has_not_logged_in_learns_nothing_of_the_endpoints():
    received = []
    policy = policy_for(None, [], {})
    policy.logged_in = lambda _: False
    client = site(policy, received=received)
    for path in ("run/watch", "run/unknown", "upload", "queue/join", "cancel"):
        expected = 200 if path == "upload" else 401  # its route asks for the login itself
        assert client.post(f"/gradio_api/{path}", content=b"{").status_code == expected
    assert len(received) == 1


def test_a_fault_of_the_program_is_one_sentence_to_the_visitor(caplog):
    def fail(_: Request) -> PlainTextResponse:
        raise RuntimeError("/secret/folder")

    client = TestClient(Guard(Starlette(routes=[Route("/", fail)]), Policy()), base_url="http://localhost")
    found = client.get("/")
    assert found.status_code == 500 and "secret" not in found.text and "secret" in caplog.text


# ---- logins


def test_guessing_is_slowed_for_the_guesser_and_nobody_is_locked_out():
    now = [1000.0]
    throttle = Throttle(clock=lambda: now[0])
    for _ in range(FREE_FAILURES):
        assert throttle.seconds_to_wait("guesser") == 0
        throttle.record("guesser", False)
    waits = []
    for _ in range(12):
        waits.append(throttle.seconds_to_wait("guesser"))
        now[0] += waits[-1]
        assert throttle.seconds_to_wait("guesser") == 0
        throttle.record("guesser", False)
    assert waits[:4] == [1, 2, 4, 8] and max(waits) == MAX_WAIT
    assert throttle.seconds_to_wait("owner") == 0
    now[0] += 2 * MAX_WAIT
    throttle.record("guesser", True)
    assert throttle.seconds_to_wait("guesser") == 0, "the right password ends it"


def test_guessing_from_many_addresses_delays_every_login_a_little():
    now = [0.0]
    throttle = Throttle(clock=lambda: now[0])
    assert throttle.delay() == 0
    for i in range(1000):
        throttle.record(f"address {i}", False)
    assert 1 <= throttle.delay() <= 5 and throttle.seconds_to_wait("owner") == 0
    now[0] += 61
    assert throttle.delay() == 0


def test_the_server_refuses_a_login_that_comes_too_soon():
    policy, tried = policy_for(None, [], {}), []
    policy.throttle = Throttle(clock=lambda: 0.0)

    def form(word: str) -> dict[str, str]:
        return {"password": word}

    async def login(request: Request) -> PlainTextResponse:
        tried.append((await request.form())["password"])
        return PlainTextResponse("", 200 if tried[-1] == "right" else 400)

    app = Starlette(routes=[Route("/login", login, methods=["POST"])])
    client = TestClient(Guard(app, policy), base_url="http://localhost")
    for _ in range(FREE_FAILURES):
        assert client.post("/login", data=form("wrong")).status_code == 400
    found = client.post("/login", data=form("right"))
    assert found.status_code == 429 and found.headers["retry-after"] == "1" and "again in 1 s" in found.json()["error"]
    assert len(tried) == FREE_FAILURES


def test_guesses_through_a_proxy_do_not_keep_out_who_sits_at_the_machine():
    def scope(address: str, **headers: str) -> dict:
        pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        return {"type": "http", "client": (address, 1), "headers": pairs}

    at_home = visitor_address(scope("127.0.0.1", host="localhost:7860"))
    assert at_home == visitor_address(scope("::1", host="[::1]:7860"))
    for other in (
        scope("127.0.0.1", host="gpu.example"), scope("127.0.0.1", host="localhost", x_forwarded_host="gpu.example"),
        scope("9.9.9.9", host="localhost:7860"), scope("127.0.0.1", host="1.2.3.4"),
    ):  # fmt: skip
        assert visitor_address(other) == other["client"][0] != at_home
    assert visitor_address({"type": "http", "client": None, "headers": []}) == ""


def test_passwords_come_from_files_and_are_compared_whole(tmp_path):
    file = tmp_path / "logins"
    file.write_text("anna:a long, password\n\nben:b:c\r\n", encoding="utf-8")
    assert read_accounts(file) == [("anna", "a long, password"), ("ben", "b:c")]
    assert parse_accounts("a:b:c,d:e", "--auth") == [("a", "b:c"), ("d", "e")]
    right = password_checker(read_accounts(file))
    assert right("anna", "a long, password") and right("ben", "b:c")
    for name, password in (("anna", "b:c"), ("anna", ""), ("", ""), ("anna", "a long, passwor"), ("\ud800", "ä")):
        assert not right(name, password)
    for text in ("anna", "anna:", ":x", "", "a:b,c"):
        with pytest.raises(UserError, match="NAME:PASSWORD"):
            parse_accounts(text, "--auth")
    file.write_bytes(b"\xff\xfe")
    for path in (file, tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match="--auth-file"):
            read_accounts(path)
