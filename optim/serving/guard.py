"""The HTTP guard: what a request must fulfil before the page's server sees it. Pure ASGI.

A server on a private address trusts whoever reaches it, so a web page that its user visits must not reach it through
the user's browser. The guard refuses host names that are not the server's own (a foreign name that resolves to this
machine is DNS rebinding), requests that pages of other origins send, and framing. It lets only those parts of Gradio's
interface through that the page and `gradio_client` need, and hands Gradio JSON that it has checked itself: finite
numbers, valid text, and no files but uploaded ones, as Gradio would fetch an address in place of a path.
"""

import asyncio
import json
import math
import re
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentsync.errors import UserError
from optim.serving.login import Throttle

API = "/gradio_api/"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# Parts of Gradio's interface that the page and gradio_client use. The others (proxying, recordings through ffmpeg,
# streams, deep links, editing, monitoring) would be reachable for nothing.
READABLE = frozenset((
    "info", "openapi.json", "queue", "call", "heartbeat", "startup-events", "login_check", "token", "user", "app_id",
    "upload_progress", "theme.css",
))  # fmt: skip
WRITABLE = frozenset(("run", "api", "call", "queue", "cancel", "reset", "upload"))
CALLS = ("run", "api", "call")  # followed by an endpoint's name
CALL_FIELDS = ("data", "session_hash", "fn_index", "trigger_id", "event_data", "simple_format")  # of a call's body
# Bytes of a body that is no upload, and levels of nesting in it.
MAX_BODY, MAX_DEPTH = 2**20, 32
BODY_SECONDS = 30.0  # without a byte of such a body
SPACE_FRAMES = ("'self'", "https://huggingface.co", "https://*.hf.space")  # who may show a Space in a frame


class Refusal(Exception):
    """A request that is answered with a status and one sentence instead of being passed on."""

    def __init__(self, status: int, sentence: str, **headers: str):
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, headers


@dataclass
class Policy:
    """Which hosts are the server's own, and what it takes from requests.

    Hosts may be added while it serves, as the name of a share link is known late.
    """

    names: set[str] = field(default_factory=lambda: {"localhost"})  # lower case, without a port
    any_address: bool = False  # an address as host, besides those of the loopback
    origins: set[str] = field(default_factory=set)  # NAME or NAME:PORT, which a proxy shows in place of the host
    frames: tuple[str, ...] = ("'none'",)  # of `frame-ancestors`
    # Whether a path is that of an uploaded file.
    is_upload: Callable[[str], bool] = lambda _: False
    # Takes the endpoint's name (None: its number is in the body), the body of CALL_FIELDS, or of arguments by name.
    # Raises UserError, and KeyError for an unknown endpoint.
    check_call: Callable[[str | None, dict[str, Any], bool], None] = lambda *_: None
    logged_in: Callable[[Scope], bool] = lambda _: True
    throttle: Throttle | None = None  # of logins

    def add(self, host: str) -> None:
        """Allow a host, as NAME or NAME:PORT; a port only matters to a proxy's page. Raises UserError."""
        name, _ = split_host(host)
        if not name:
            raise UserError(f"'{host}' is no host: give a name or an address, as gpu.example or gpu.example:8443.")
        self.names.add(name)
        self.origins.add(host.lower())

    def allows(self, name: str) -> bool:
        """Whether a host, without its port, is this server.

        An address in place of a name cannot be rebound by anybody; a server in a network may have any, as behind the
        port that a container maps.
        """
        address = as_address(name)
        return name in self.names or (address is not None and (self.any_address or address.is_loopback))


def policy_for(
    server_name: str | None, allowed: list[str], environment: dict[str, str], root_path: str | None = None
) -> Policy:
    """The policy of a server: `server_name` as Gradio takes it, further hosts (NAME[:PORT]), and the environment, for
    the names of a Space. Raises UserError."""
    policy = Policy()
    name, _ = split_host(server_name or "localhost")
    address = as_address(name) if name else None
    if name and (address.is_loopback if address else name == "localhost"):
        policy.names.add(name)
    else:
        own = socket.gethostname().lower()
        policy.any_address = True
        policy.names |= {own, own.split(".")[0], f"{own.split('.')[0]}.local"} | ({name} if name else set())
    for host in allowed:
        policy.add(host)
    if root_path and (host := urlsplit(root_path).netloc):
        policy.add(host)
    if "SPACE_ID" in environment or "SPACE_HOST" in environment:
        policy.frames = SPACE_FRAMES
        policy.any_address = True
        names = environment.get("SPACE_HOST", "").split(",")
        if space := environment.get("SPACE_ID"):
            names.append(re.sub(r"[^a-z0-9]+", "-", space.lower()) + ".hf.space")
        for host in filter(None, map(str.strip, names)):
            policy.add(host)
    return policy


def split_host(host: str) -> tuple[str | None, int | None]:
    """The name of a host in lower case, an IPv6 address without brackets, and its port; (None, None) for no host."""
    if as_address(host) is not None:  # an IPv6 address without brackets
        return host.lower(), None
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::([0-9]{1,5}))?", host, re.ASCII)
    if not found:
        return None, None
    return found[1].strip("[]").rstrip(".").lower() or None, int(found[2]) if found[2] else None


def as_address(name: str) -> IPv4Address | IPv6Address | None:
    """A host's address, if it is one."""
    try:
        return ip_address(name)
    except ValueError:
        return None


class Guard:
    """ASGI middleware around the whole server, its other middleware included."""

    def __init__(self, app: ASGIApp, policy: Policy):
        self.app, self.policy = app, policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers, path, web = Headers(scope=scope), route_path(scope), scope["type"] == "http"
        method = scope["method"] if web else "GET"
        started = False

        async def framed(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._add_headers(MutableHeaders(scope=message))
            await send(message)

        try:
            check_host(headers, self.policy)
            check_origin(method, path, headers, self.policy, web)
            if web:
                check_path(method, path)
                receive = await self._checked_body(scope, path, receive)
            drop_header(scope, b"x-gradio-server")  # of Gradio's own front server, which is not used
            if web and method == "POST" and path.rstrip("/") == "/login" and self.policy.throttle:
                await self._login(self.policy.throttle, scope, receive, framed)
            else:
                await self.app(scope, receive, framed)
        except Refusal as refusal:
            if not web:
                await send({"type": "websocket.close", "code": 1008, "reason": refusal.sentence[:100]})
            elif not started:
                await refused(refusal, method, path)(scope, receive, framed)
        except Exception as error:
            if started and isinstance(error.__cause__ or error, HTTPException):  # a stream of Gradio's that ends so
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            traceback.print_exc(file=sys.stderr)
            if web and not started:
                sentence = "Something inside the program failed; its console says where."
                await refused(Refusal(500, sentence), method, path)(scope, receive, framed)

    def _add_headers(self, headers: MutableHeaders) -> None:
        headers.setdefault("Content-Security-Policy", f"frame-ancestors {' '.join(self.policy.frames)}")
        if self.policy.frames == ("'none'",):
            headers["X-Frame-Options"] = "DENY"
        headers.setdefault("Referrer-Policy", "same-origin")  # addresses of results are secrets

    async def _checked_body(self, scope: Scope, path: str, receive: Receive) -> Receive:
        """What gives the body of a request again, checked; that of an upload is left to who stores it."""
        if scope["method"] in SAFE_METHODS or path.rstrip("/") == f"{API}upload":
            return receive
        if path.startswith(API) and not self.policy.logged_in(scope):
            raise Refusal(401, "Log in first.", Connection="close")
        body = await read_body(Headers(scope=scope), receive)
        if path.startswith(API):
            body = self._checked_json(path, body)
            for name in (b"content-length", b"content-type", b"transfer-encoding", b"content-encoding"):
                drop_header(scope, name)
            scope["headers"] += [
                (b"content-length", str(len(body)).encode()), (b"content-type", b"application/json"),
            ]  # fmt: skip
        pending = [body]

        async def again() -> Message:
            if pending:
                return {"type": "http.request", "body": pending.pop(), "more_body": False}
            return await receive()

        return again

    def _checked_json(self, path: str, body: bytes) -> bytes:
        """JSON of the values that were checked: Gradio gets no other."""
        parts = path.removeprefix(API).strip("/").split("/")
        try:
            found = parse_json(body)
            check_values(found, self.policy.is_upload)
            if not isinstance(found, dict):
                raise UserError("The request is no JSON object: send one, as the README shows.")
            if parts[0] in CALLS or parts == ["queue", "join"]:
                by_name = parts[:2] == ["call", "v2"]
                name = parts[-1] if parts[0] in CALLS else None
                if not by_name:
                    found = {field: found[field] for field in CALL_FIELDS if field in found}
                    if parts[0] == "call":  # it goes by the name alone
                        found.pop("fn_index", None)
                self.policy.check_call(name, found, by_name)
        except KeyError as error:
            raise Refusal(404, f"There is no endpoint {shorten(error.args[0])}: /gradio_api/info lists them.") from None
        except UserError as error:
            raise Refusal(400, str(error)) from None
        return json.dumps(found).encode()

    async def _login(self, throttle: Throttle, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a login on when it is its turn, and remember how it ended."""
        address = visitor_address(scope)
        if (seconds := throttle.seconds_to_wait(address)) > 0:
            seconds = math.ceil(seconds)
            sentence = f"Too many wrong passwords came from your address: try again in {seconds} s."
            raise Refusal(429, sentence, **{"Retry-After": str(seconds)})

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                throttle.record(address, message["status"] < 400)
            await send(message)

        async with throttle.attempt(address):
            await self.app(scope, receive, noted)


# ---- the checks, each of which raises Refusal


def check_host(headers: Headers, policy: Policy) -> None:
    """The names by which a request reached the server must be its own, also those that a proxy tells of."""
    hosts = headers.getlist("host")
    forwarded = [value.split(",")[0].strip() for value in headers.getlist("x-forwarded-host")]
    if len(hosts) != 1 or len(forwarded) > 1:
        raise Refusal(400, "The request names no host, or several.")
    for host in hosts + forwarded:
        name, _ = split_host(host)
        if name is None:
            raise Refusal(400, "The request names no host that can be understood.")
        if not policy.allows(name):
            raise Refusal(
                403,
                f"This server does not know itself by the name '{name[:100]}': open it by its own, or let who started "
                f"it add --allow-host {name[:100]}.",
            )


def check_origin(method: str, path: str, headers: Headers, policy: Policy, web: bool = True) -> None:
    """A request must come from the server's own page, or from no page at all.

    Pages of others may link to the page; whatever else they ask for is refused, reading too, as some of Gradio's GET
    requests change something.
    """
    origins, site = headers.getlist("origin"), headers.get("sec-fetch-site")
    private = method not in SAFE_METHODS or path.startswith(API) or path.rstrip("/") == "/logout"
    if origins:
        foreign = not all(is_own_origin(origin, headers, policy) for origin in origins)
    elif "sec-fetch-site" in headers:
        foreign = site not in ("none", "same-origin")
    else:  # no page at all, or that of a browser which sends nothing better
        foreign = private and "referer" in headers and not is_own_origin(headers["referer"], headers, policy)
    if not foreign:
        return
    navigates = headers.get("sec-fetch-mode") == "navigate"
    may_frame = policy.frames != ("'none'",)
    if web and method != "OPTIONS" and not origins and not private and (navigates or may_frame):
        return
    page = origins[0] if origins else "another site"
    raise Refusal(
        403,
        f"The page of {shorten(page)} may not use this server: open the server's own page. Behind a proxy, let who "
        "started it add --allow-host NAME:PORT, as the browser's address line shows them.",
    )


def is_own_origin(origin: str, headers: Headers, policy: Policy) -> bool:
    """Whether an origin, or an address of a page, is the one that the browser opened."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return False  # "null", too
    default = {"http": 80, "https": 443}[parts.scheme]
    own = (parts.hostname.rstrip("."), port or default)
    for host in (headers.get("host", ""), headers.get("x-forwarded-host", "").split(",")[0].strip()):
        name, number = split_host(host)
        if name and (name, number or default) == own:
            return True
    return any((name, number or default) == own for name, number in map(split_host, policy.origins))


def check_path(method: str, path: str) -> None:
    """Only parts of Gradio's interface that are in use can be reached, and only by the methods that they have."""
    if path == API.rstrip("/") or not path.startswith(API):
        if method in (*SAFE_METHODS, "POST"):
            return
        raise Refusal(405, f"There is nothing here for {shorten(method)}.")
    first = path.removeprefix(API).split("/")[0]
    known = first in READABLE or first.startswith("file=") if method in ("GET", "HEAD") else first in WRITABLE
    if method == "OPTIONS":
        known = True
    if not known:
        raise Refusal(404, "There is nothing of that name here.")


def parse_json(body: bytes) -> Any:
    """Strict JSON. Raises UserError."""

    def refuse(name: str) -> None:
        raise UserError(f"The request holds {name}, which is no number: send a finite one.")

    try:
        return json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError):  # with UnicodeDecodeError, and integers of thousands of digits
        raise UserError("The request is no JSON that can be understood.") from None


def check_values(value: Any, is_upload: Callable[[str], bool]) -> None:
    """Refuse what cannot be computed with or written, and files that were not uploaded; addresses of files are removed.

    A dictionary with a path is what Gradio takes for a file; it needs no address beside the path. Raises UserError.
    """
    stack = [(value, 0)]
    while stack:
        found, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise UserError("The request is nested too deeply.")
        if isinstance(found, str) and not is_text(found):
            raise UserError("The request holds text that is no valid Unicode.")
        if isinstance(found, float) and not math.isfinite(found):
            raise UserError("The request holds an infinite number: send a finite one.")
        if isinstance(found, int) and not -(2**63) <= found < 2**63:
            raise UserError("The request holds a whole number of more than 64 bits: send a smaller one.")
        if isinstance(found, dict):
            if "path" in found:
                if not isinstance(found["path"], str) or not is_text(found["path"]) or not is_upload(found["path"]):
                    raise UserError("The request names a file that was not uploaded, or is gone: upload it first.")
                found.pop("url", None)
            stack += [(each, depth + 1) for pair in found.items() for each in pair]
        elif isinstance(found, list):
            stack += [(each, depth + 1) for each in found]


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8, which half of a surrogate pair cannot."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


# ---- small things


async def read_body(headers: Headers, receive: Receive, limit: int = MAX_BODY) -> bytes:
    """A request's whole body, of `limit` bytes at most. Raises Refusal."""
    declared = headers.get("content-length", "0")
    too_large = Refusal(413, f"The request is larger than {limit} bytes.", Connection="close")
    if not declared.isascii() or not declared.isdigit() or len(declared) > 15 or int(declared) > limit:
        raise too_large
    body = bytearray()
    while True:
        try:
            message = await asyncio.wait_for(receive(), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise Refusal(408, "The request did not come to its end.", Connection="close") from None
        if message["type"] == "http.disconnect":
            raise Refusal(400, "The request did not come to its end.", Connection="close")
        body += message.get("body", b"")
        if len(body) > limit:
            raise too_large
        if not message.get("more_body"):
            return bytes(body)


def refused(refusal: Refusal, method: str, path: str) -> Response:
    """The answer to a request that is not passed on; its body is not waited for."""
    headers = {"Connection": "close", "Cache-Control": "no-store"} | refusal.headers
    if method in SAFE_METHODS and not path.startswith(API):  # a person reads it
        return PlainTextResponse(refusal.sentence, refusal.status, headers)
    return JSONResponse({"error": refusal.sentence, "detail": refusal.sentence}, refusal.status, headers)


def route_path(scope: Scope) -> str:
    """A request's path below the server's root path, as Starlette's router takes it."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def visitor_address(scope: Scope) -> str:
    """The address of who sent a request, by which logins are counted.

    All visitors of a proxy that does not tell of theirs have its own; who sits at the machine is told from them by the
    host, so that guesses through the proxy never keep the owner out.
    """
    address, headers = scope["client"][0] if scope.get("client") else "", Headers(scope=scope)
    peer, host = as_address(address), split_host(headers.get("host", ""))[0] or ""
    name = as_address(host)
    forwarded = any(header.startswith(("x-forwarded-", "forwarded")) for header in headers)
    at_home = peer is not None and peer.is_loopback and (host == "localhost" or (name and name.is_loopback))
    return "this machine" if at_home and not forwarded else address


def drop_header(scope: Scope, name: bytes) -> None:
    scope["headers"] = [pair for pair in scope["headers"] if pair[0].lower() != name]


def shorten(value: Any, length: int = 60) -> str:
    """A value of a request as it is shown in a sentence: printable, and not long."""
    shown = repr(value) if isinstance(value, str) else ascii(value)
    return shown if len(shown) <= length else f"{shown[: length - 1]}…"
