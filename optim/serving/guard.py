"""ASGI middleware that checks every request before the page's server sees it.

A server on a private address trusts everyone who reaches it, so other websites must not reach it through a visitor's
browser. The guard refuses foreign host names (DNS rebinding), requests from pages of other origins, and framing. Of
Gradio's interface it exposes only what the page and `gradio_client` use. Gradio receives JSON that the guard has parsed
and checked: finite numbers, valid text, and only uploaded files, because Gradio would fetch a URL given as a path.
"""

import asyncio
import json
import logging
import math
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentsync.errors import UserError
from optim.serving.login import Throttle
from optim.serving.policy import NO_FRAMES, Policy, as_address, split_host

log = logging.getLogger(__name__)

API = "/gradio_api/"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# Parts of Gradio's interface that the page and gradio_client use. The rest (proxying, recordings through ffmpeg,
# streams, deep links, editing, monitoring) is closed.
READABLE = frozenset(
    (
        "info",
        "openapi.json",
        "queue",
        "call",
        "heartbeat",
        "startup-events",
        "login_check",
        "token",
        "user",
        "app_id",
        "upload_progress",
        "theme.css",
    )
)
WRITABLE = frozenset(("run", "api", "call", "queue", "cancel", "reset", "upload", "mcp"))
CALLS = ("run", "api", "call")  # followed by an endpoint's name
CALL_FIELDS = ("data", "session_hash", "fn_index", "trigger_id", "event_data", "simple_format")  # of a call's body
MAX_BODY = 2**20  # bytes of a body that is not an upload
MAX_DEPTH = 32  # levels of nesting in its JSON
BODY_TIMEOUT = 30.0  # seconds without a byte of the body


class Refusal(Exception):
    """A request that is refused with an HTTP status, one sentence, and response headers."""

    def __init__(self, status: int, message: str, **headers: str):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


class Guard:
    """ASGI middleware around the whole server, including its other middleware."""

    def __init__(self, app: ASGIApp, policy: Policy):
        self.app, self.policy = app, policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        is_http = scope["type"] == "http"
        headers, path = Headers(scope=scope), route_path(scope)
        method = scope["method"] if is_http else "GET"
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._add_headers(MutableHeaders(scope=message))
            await send(message)

        try:
            check_host(headers, self.policy)
            check_origin(method, path, headers, self.policy, is_http)
            if is_http:
                check_path(method, path)
                receive = await self._checked_body(scope, path, receive)
            drop_headers(scope, b"x-gradio-server")  # set by Gradio's Node server, which is not used
            if is_http and method == "POST" and path.rstrip("/") == "/login" and self.policy.throttle:
                await self._login(self.policy.throttle, scope, receive, send_with_headers)
            else:
                await self.app(scope, receive, send_with_headers)
        except Refusal as refusal:
            if not is_http:
                await send({"type": "websocket.close", "code": 1008, "reason": refusal.message[:100]})
            elif not started:
                await as_response(refusal, method, path)(scope, receive, send_with_headers)
        except Exception as error:
            if started and isinstance(error.__cause__ or error, HTTPException):  # some streams of Gradio end like this
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            log.exception("A request failed:")
            if is_http and not started:
                failure = Refusal(500, "Something inside the program failed; the server's console says where.")
                await as_response(failure, method, path)(scope, receive, send_with_headers)

    def _add_headers(self, headers: MutableHeaders) -> None:
        headers.setdefault("Content-Security-Policy", f"frame-ancestors {' '.join(self.policy.frames)}")
        if self.policy.frames == NO_FRAMES:
            headers["X-Frame-Options"] = "DENY"
        headers.setdefault("Referrer-Policy", "same-origin")  # URLs of results are secret

    async def _checked_body(self, scope: Scope, path: str, receive: Receive) -> Receive:
        """Read and check a request's body; return a `receive` that replays it.

        The body of an upload is left unread: the upload route stores it. Raises Refusal.
        """
        if scope["method"] in SAFE_METHODS or path.rstrip("/") == f"{API}upload":
            return receive
        if path.startswith(API) and not self.policy.logged_in(scope):
            raise Refusal(401, "Log in first.", Connection="close")
        body = await read_body(Headers(scope=scope), receive)
        if path.startswith(API):
            body = self._checked_json(path, body)
            drop_headers(scope, b"content-length", b"content-type", b"transfer-encoding", b"content-encoding")
            scope["headers"].append((b"content-length", str(len(body)).encode()))
            scope["headers"].append((b"content-type", b"application/json"))
        pending = [body]

        async def replay() -> Message:
            if pending:
                return {"type": "http.request", "body": pending.pop(), "more_body": False}
            return await receive()

        return replay

    def _checked_json(self, path: str, body: bytes) -> bytes:
        """Parse and check the body of a request to Gradio, and serialize the checked values. Raises Refusal."""
        parts = path.removeprefix(API).strip("/").split("/")
        try:
            request = parse_json(body)
            check_values(request, self.policy.is_upload)
            if not isinstance(request, dict):
                raise UserError("The request is not a JSON object: send one, as the README shows.")
            if parts[0] in CALLS or parts == ["queue", "join"]:
                by_name = parts[:2] == ["call", "v2"]
                endpoint = parts[-1] if parts[0] in CALLS else None
                if not by_name:
                    request = {field: request[field] for field in CALL_FIELDS if field in request}
                    if parts[0] == "call":  # the name alone selects the endpoint
                        request.pop("fn_index", None)
                self.policy.check_call(endpoint, request, by_name)
        except KeyError as error:
            raise Refusal(404, f"There is no endpoint {shorten(error.args[0])}: /gradio_api/info lists them.") from None
        except UserError as error:
            raise Refusal(400, str(error)) from None
        return json.dumps(request).encode()

    async def _login(self, throttle: Throttle, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a login on unless its address has to wait, and record the outcome. Raises Refusal."""
        address = visitor_address(scope)
        if (wait := throttle.seconds_to_wait(address)) > 0:
            seconds = math.ceil(wait)
            message = f"Too many wrong passwords came from your address: try again in {seconds} s."
            raise Refusal(429, message, **{"Retry-After": str(seconds)})

        async def record_outcome(message: Message) -> None:
            if message["type"] == "http.response.start":
                throttle.record(address, message["status"] < 400)
            await send(message)

        async with throttle.attempt(address):
            await self.app(scope, receive, record_outcome)


# ---- checks of the host, the origin and the path, which raise Refusal


def check_host(headers: Headers, policy: Policy) -> None:
    """Refuse a request whose host, also one forwarded by a proxy, is not this server."""
    hosts = headers.getlist("host")
    forwarded = [value.split(",")[0].strip() for value in headers.getlist("x-forwarded-host")]
    if len(hosts) != 1 or len(forwarded) > 1:
        raise Refusal(400, "The request names no host, or several.")
    for host in hosts + forwarded:
        name, _ = split_host(host)
        if name is None:
            raise Refusal(400, "The request's host is invalid.")
        if not policy.allows(name):
            raise Refusal(
                403,
                f"This server is not known as '{name[:100]}': open it under its own name, or ask whoever started it to "
                f"add --allow-host {name[:100]}.",
            )


def check_origin(method: str, path: str, headers: Headers, policy: Policy, is_http: bool) -> None:
    """Refuse a request that a page of another origin sends. Requests without a page, as of programs, pass.

    Other pages may link to this one. Everything else is refused, reading too, because some GET requests of Gradio
    change state.
    """
    origins, site = headers.getlist("origin"), headers.get("sec-fetch-site")
    private = method not in SAFE_METHODS or path.startswith(API) or path.rstrip("/") == "/logout"
    if origins:
        foreign = not all(policy.is_own_origin(origin, headers) for origin in origins)
    elif site is not None:
        foreign = site not in ("none", "same-origin")
    else:  # no browser, or an old one that sends nothing better than a referer
        foreign = private and "referer" in headers and not policy.is_own_origin(headers["referer"], headers)
    if not foreign:
        return
    is_link = headers.get("sec-fetch-mode") == "navigate" or policy.frames != NO_FRAMES
    if is_http and method != "OPTIONS" and not origins and not private and is_link:
        return
    page = origins[0] if origins else "another site"
    raise Refusal(
        403,
        f"The page of {shorten(page)} may not use this server: open the server's own page. Behind a proxy, ask whoever "
        "started it to add --allow-host NAME:PORT, as the browser's address bar shows them.",
    )


def check_path(method: str, path: str) -> None:
    """Refuse methods and parts of Gradio's interface that are not in use."""
    if path == API.rstrip("/") or not path.startswith(API):
        if method in (*SAFE_METHODS, "POST"):
            return
        raise Refusal(405, f"The method {shorten(method)} is not supported here.")
    part = path.removeprefix(API).split("/")[0]
    if method in ("GET", "HEAD"):
        is_open = part in READABLE or part.startswith("file=")
    else:
        is_open = method == "OPTIONS" or part in WRITABLE
    if not is_open:
        raise Refusal(404, "There is nothing of that name here.")


# ---- checks of the body, which raise UserError


def parse_json(body: bytes) -> Any:
    """Parse strict JSON: NaN and Infinity are errors. Raises UserError."""

    def refuse_constant(name: str) -> None:
        raise UserError(f"The request holds {name}, which is no number: send a finite one.")

    try:
        return json.loads(body, parse_constant=refuse_constant)
    except (ValueError, RecursionError):  # ValueError includes bad UTF-8 and integers of thousands of digits
        raise UserError("The request is not valid JSON.") from None


def check_values(value: Any, is_upload: Callable[[str], bool]) -> None:
    """Check numbers, text and files in parsed JSON, and remove the URLs of files. Raises UserError.

    Gradio takes every dictionary with a "path" for a file; the path must be an upload, and needs no "url" beside it.
    """
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise UserError("The request is nested too deeply.")
        if isinstance(item, str) and not is_text(item):
            raise UserError("The request holds text that is not valid Unicode.")
        if isinstance(item, float) and not math.isfinite(item):
            raise UserError("The request holds an infinite number: send a finite one.")
        if isinstance(item, int) and not -(2**63) <= item < 2**63:
            raise UserError("The request holds an integer of more than 64 bits: send a smaller one.")
        if isinstance(item, dict):
            if "path" in item:
                if not isinstance(item["path"], str) or not is_text(item["path"]) or not is_upload(item["path"]):
                    raise UserError("The request names a file that was not uploaded, or is gone: upload it first.")
                item.pop("url", None)
            stack += [(child, depth + 1) for pair in item.items() for child in pair]
        elif isinstance(item, list):
            stack += [(child, depth + 1) for child in item]


def is_text(text: str) -> bool:
    """Whether a string can be encoded as UTF-8; one with half of a surrogate pair cannot."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


# ---- requests and responses


async def read_body(headers: Headers, receive: Receive) -> bytes:
    """Read a request's whole body, at most MAX_BODY bytes. Raises Refusal."""
    declared = headers.get("content-length", "0")
    too_large = Refusal(413, f"The request is larger than {MAX_BODY} bytes.", Connection="close")
    if not declared.isascii() or not declared.isdigit() or len(declared) > 15 or int(declared) > MAX_BODY:
        raise too_large
    body = bytearray()
    while True:
        try:
            message = await asyncio.wait_for(receive(), BODY_TIMEOUT)
        except asyncio.TimeoutError:
            raise Refusal(408, "The request was not completed in time.", Connection="close") from None
        if message["type"] == "http.disconnect":
            raise Refusal(400, "The request was not completed.", Connection="close")
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise too_large
        if not message.get("more_body"):
            return bytes(body)


def as_response(refusal: Refusal, method: str, path: str) -> Response:
    """Turn a refusal into a response, plain text for a person or JSON for a program, that closes the connection."""
    headers = {"Connection": "close", "Cache-Control": "no-store"} | refusal.headers
    if method in SAFE_METHODS and not path.startswith(API):
        return PlainTextResponse(refusal.message, refusal.status, headers)
    return JSONResponse({"error": refusal.message, "detail": refusal.message}, refusal.status, headers)


def route_path(scope: Scope) -> str:
    """A request's path below the server's root path, as Starlette's router computes it."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def visitor_address(scope: Scope) -> str:
    """The address by which the logins of a request's sender are counted.

    Behind a proxy that forwards no addresses, all visitors share the proxy's. A loopback request to a loopback host
    counts as "this machine" instead, so that guesses through a proxy never lock out the owner.
    """
    address, headers = scope["client"][0] if scope.get("client") else "", Headers(scope=scope)
    peer, host = as_address(address), split_host(headers.get("host", ""))[0] or ""
    host_address = as_address(host)
    forwarded = any(name.startswith(("x-forwarded-", "forwarded")) for name in headers)
    to_loopback = host == "localhost" or (host_address is not None and host_address.is_loopback)
    is_local = peer is not None and peer.is_loopback and to_loopback and not forwarded
    return "this machine" if is_local else address


def drop_headers(scope: Scope, *names: bytes) -> None:
    """Remove request headers; names in lower case."""
    scope["headers"] = [pair for pair in scope["headers"] if pair[0].lower() not in names]


def shorten(value: Any, length: int = 60) -> str:
    """Quote a value of a request for an error message: printable, at most `length` characters."""
    text = repr(value) if isinstance(value, str) else ascii(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"
