"""The Hugging Face hub on loopback, as far as its client asks for files: resolve addresses, metadata, redirects to
another host for large files, ranges, tokens; and everything that can go wrong with it.
"""

import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

BLOCK = 1 << 16
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
SMALL = 2000  # bytes; larger files are kept elsewhere, as those in Git LFS are


@dataclass
class Request:
    host: str  # "hub" or "store"
    method: str
    file: str  # or the path, where it asks for no file
    begin: int | None  # of a range
    token: str | None
    status: int = 0
    sent: int = 0  # bytes


@dataclass
class Hub:
    """files: path on disk by (repository, revision, name). The lists of faults are used up from the front."""

    files: dict[tuple[str, str, str], Path]
    endpoint: str = ""
    store: str = ""
    requests: list[Request] = field(default_factory=list)
    # Each for one request for a large file's bytes: a status; "cut", "stall" or a "short" answer after some bytes;
    # "wrong" bytes; "whole" in spite of a range.
    faults: list[tuple] = field(default_factory=list)
    refuse: int | None = None  # a status for everything that is asked of the hub itself
    token: str | None = None  # that is asked for
    rate: float | None = None  # bytes a second
    announced: dict[str, str] = field(default_factory=dict)  # another hash than the true one, by name

    def sent(self, name: str) -> list[Request]:
        """The requests for the bytes of a large file."""
        return [r for r in self.requests if (r.host, r.method, r.file) == ("store", "GET", name)]


def _hash(path: Path) -> str:
    data = path.read_bytes()
    if len(data) > SMALL:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()  # as git does


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, headers: dict[str, object], body: bytes = b"") -> None:
        self.request_seen.status = status
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        try:
            self.handle_request()
        except (BrokenPipeError, ConnectionResetError):  # the client went away, as it may
            self.close_connection = True

    def note(self, host: str, file: str) -> None:
        begin = self.headers.get("Range")
        begin = int(begin.removeprefix("bytes=").split("-")[0]) if begin else None
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.request_seen = Request(host, self.command, file, begin, token)
        self.hub.requests.append(self.request_seen)


class _HubHandler(_Handler):
    def handle_request(self) -> None:
        self.note("hub", self.path)
        if not (found := RESOLVE.fullmatch(self.path)):
            return self.answer(404, {})
        hub, key = self.hub, found.groups()
        file = self.request_seen.file = key[2]
        if hub.refuse:
            return self.answer(hub.refuse, {})
        if hub.token and self.request_seen.token != hub.token:
            return self.answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        if key not in hub.files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        path = hub.files[key]
        size, etag = path.stat().st_size, f'"{hub.announced.get(file) or _hash(path)}"'
        headers = {"X-Repo-Commit": key[1], "ETag": etag, "Accept-Ranges": "bytes"}
        if size <= SMALL:
            return self.answer(200, {**headers, "Content-Length": size}, path.read_bytes())
        location = f"{hub.store}/{'/'.join(key)}"
        self.answer(302, {**headers, "X-Linked-Etag": etag, "X-Linked-Size": size, "Location": location})


class _StoreHandler(_Handler):
    def handle_request(self) -> None:
        owner, repository, revision, file = self.path.strip("/").split("/", 3)
        self.note("store", file)
        path = self.hub.files[(f"{owner}/{repository}", revision, file)]
        size, (fault, *limit) = path.stat().st_size, self.hub.faults.pop(0) if self.hub.faults else ("none",)
        if isinstance(fault, int):
            return self.answer(fault, {})
        begin = 0 if fault == "whole" else self.request_seen.begin or 0
        self.request_seen.status = 206 if begin else 200
        self.send_response(self.request_seen.status)
        self.send_header("Content-Length", str(limit[0] if fault == "short" else size - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{size - 1}/{size}")
        self.end_headers()
        end = begin + limit[0] if limit else size
        with path.open("rb") as data:
            data.seek(begin)
            while (at := data.tell()) < end:
                block = data.read(min(BLOCK, end - at))
                if fault == "wrong":
                    block = bytes(len(block))
                self.wfile.write(block)
                self.request_seen.sent += len(block)
                if self.hub.rate:
                    time.sleep(len(block) / self.hub.rate)
        if fault == "stall":
            self.wfile.flush()
            time.sleep(limit[1])
        if end < size:
            self.close_connection = True


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve on two ports of loopback while the context lasts."""
    servers = []
    for kind in (_HubHandler, _StoreHandler):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (kind,), {"hub": hub}))
        server.daemon_threads = True
        server.block_on_close = False
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
    hub.endpoint = f"http://127.0.0.1:{servers[0].server_port}"
    hub.store = f"http://localhost:{servers[1].server_port}"  # another host, as far as the client can tell
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
