"""The tools for programs that speak the Model Context Protocol, over a real connection."""

import asyncio
import json
import re
import sys
import time

import httpx
import pytest
from clips import make_sound
from conftest import portrait, save_video
from serving import serve

from latentsync.errors import UserError
from optim.serving import options
from optim.serving.mcp_tools import McpTools, upload_path

TOOLS = {"lipsync", "check_video", "measure", "machine"}
HEADERS = {"Accept": "application/json, text/event-stream"}
LIST = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoint):
    pytest.importorskip("mcp", reason="the package mcp is not installed")
    with serve(tmp_path_factory.mktemp("page"), "--model", checkpoint, "--mcp") as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(scope="module")
def files(server, tmp_path_factory):
    """The paths of a video, a voice and a long voice on the server."""
    folder = tmp_path_factory.mktemp("clips")
    save_video(folder / "talking.mp4", [portrait(t) for t in range(24)], "-c:v", "libx264", "-pix_fmt", "yuv420p")
    make_sound(folder / "short.wav", seconds=0.3)
    make_sound(folder / "long.wav", seconds=30)
    names = ("talking.mp4", "short.wav", "long.wav")
    form = [("files", (name, (folder / name).read_bytes())) for name in names]
    return httpx.post(f"{server.url}/gradio_api/upload", files=form, timeout=60).json()


def with_session(server, use):
    """What `use` returns for a connected session."""
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    async def run():
        async with (
            streamable_http_client(f"{server.url}/gradio_api/mcp") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            return await use(session)

    return asyncio.run(run())


def call(server, name, arguments, **options):
    return with_session(server, lambda session: session.call_tool(name, arguments, **options))


def test_there_are_tools_that_make_a_video_or_read_and_no_others(server):
    tools = with_session(server, lambda session: session.list_tools()).tools
    assert {tool.name for tool in tools} == TOOLS
    assert {tool.name for tool in tools if tool.annotations and tool.annotations.readOnlyHint} == TOOLS - {"lipsync"}
    lipsync = next(tool for tool in tools if tool.name == "lipsync")
    assert lipsync.inputSchema["required"] == ["video", "audio"] and "/gradio_api/upload" in lipsync.description
    assert "progress" not in lipsync.description


def test_a_program_gives_two_uploads_and_gets_the_address_of_the_video(server, files):
    heard = []

    async def hear(done, count, message):
        heard.append((done, count, message))

    arguments = {"video": files[0], "audio": f"{server.url}/gradio_api/file={files[1]}", "steps": 4}
    reply = call(server, "lipsync", arguments, progress_callback=hear)
    assert not reply.isError, reply
    address = reply.content[0].text
    assert address.startswith(f"{server.url}/gradio_api/file=") and address.endswith("-synced.mp4")
    assert len(httpx.get(address).content) > 1000
    assert heard and all(count == 8 and message for _, count, message in heard)


def test_what_only_reads_replies_as_the_endpoints_do(server, files):
    found = call(server, "check_video", {"video": files[0]}).structuredContent
    assert found["width"] == 192 and len(found["faces"]) == 1 and "picture" not in str(found)
    assert call(server, "measure", {"audio": files[1]}).structuredContent["seconds"] == pytest.approx(0.3, abs=0.01)
    assert call(server, "machine", {}).structuredContent["device"] == "cpu"


def test_a_job_whose_caller_goes_away_is_cancelled(server, files):
    async def leave(session):
        heard = asyncio.Event()

        async def hear(*_):
            heard.set()

        arguments = {"video": files[0], "audio": files[2]}
        calling = asyncio.ensure_future(session.call_tool("lipsync", arguments, progress_callback=hear))
        await asyncio.wait_for(heard.wait(), 120)
        calling.cancel()

    def running():
        reply = httpx.post(f"{server.url}/gradio_api/run/watch", json={"data": ["v" * 24, 0]}).json()["data"][0]
        return reply["running"] + reply["waiting"]

    with_session(server, leave)
    end = time.monotonic() + 120
    while running():
        assert time.monotonic() < end, "it runs on"
        time.sleep(0.2)


def test_an_address_is_read_as_the_path_of_an_upload_and_never_fetched():
    assert upload_path("http://127.0.0.1:7860/gradio_api/file=/up/a%20b.wav") == "/up/a b.wav"
    for other in ("/up/a%20b.wav", "http://elsewhere/a.wav", "file:///gradio_api/file=/up/a.wav"):
        assert upload_path(other) == other


@pytest.mark.parametrize("others", [("--share",), ("--server-name", "192.168.1.2"), ("--auth", "anna:a long password")])
def test_the_tools_are_for_programs_of_this_machine(others, tmp_path):
    with pytest.raises(UserError, match="of this machine"):
        options.parse_options(["--mcp", *others], tmp_path)
    assert options.parse_options(["--mcp"], tmp_path).mcp and not options.parse_options([], tmp_path).mcp


def test_without_the_package_the_server_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mcp.server.streamable_http_manager", None)
    with pytest.raises(UserError, match="pip install 'mcp<2'"):
        McpTools(None)


@pytest.mark.parametrize("file", [
    "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/face.mp4", "https://127.0.0.1/gradio_api/file=/etc/passwd",
    "data:video/mp4;base64,AAAA", "", "../../etc/passwd",
])  # fmt: skip
def test_neither_files_of_this_machine_nor_addresses_are_read(server, files, file):
    for name, arguments in (("measure", {"audio": file}), ("lipsync", {"video": files[0], "audio": file})):
        reply = call(server, name, arguments)
        assert reply.isError and re.search("upload it first|There is no voice yet", reply.content[0].text), reply


def test_what_is_wrong_with_a_call_is_one_sentence(server, files):
    for name, arguments, words in (
        ("lipsync", {"video": files[0], "audio": files[1], "level": "best"}, "level"),
        ("measure", {"audio": files[0], "track": 7}, "track|sound"),
        ("lipsync", {"video": files[0]}, "audio"),
        ("remove_model", {"name": "demo"}, "no tool of that name"),
    ):
        reply = call(server, name, arguments)
        assert reply.isError and re.search(words, reply.content[0].text) and "Traceback" not in str(reply), reply


def test_the_guard_is_before_the_tools_as_before_all_else(server):
    url = f"{server.url}/gradio_api/mcp"
    assert httpx.post(url, json=LIST, headers=HEADERS).status_code == 200
    assert httpx.post(url, json=LIST, headers=HEADERS | {"Host": "rebound.example"}).status_code == 403
    assert httpx.post(url, json=LIST, headers=HEADERS | {"Origin": "https://other.example"}).status_code == 403
    assert httpx.post(url, content=b"x" * 2**21, headers=HEADERS).status_code == 413
    assert httpx.post(url, content=b"[1, 2", headers=HEADERS).status_code == 400
    named = json.dumps(LIST | {"params": {"file": {"path": "/etc/passwd"}}})
    assert "was not uploaded" in httpx.post(url, content=named, headers=HEADERS).json()["error"]
    for method in ("GET", "DELETE", "PUT"):
        assert httpx.request(method, url, headers=HEADERS).status_code in (400, 404, 405)
    for path in ("sse", "schema", "messages/"):
        assert httpx.get(f"{url}/{path}", headers=HEADERS).status_code == 404
