"""Which hosts and web origins belong to this server, and the other rules that the HTTP guard enforces."""

import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from latentsync.errors import UserError
from optim.serving.login import Throttle

NO_FRAMES = ("'none'",)
SPACE_FRAMES = ("'self'", "https://huggingface.co", "https://*.hf.space")  # sites that may frame a Space


@dataclass
class Policy:
    """The hosts and origins of the server, and callbacks that check requests.

    Hosts may be added while the server runs, since the name of a share link is only known late.
    """

    names: set[str] = field(default_factory=lambda: {"localhost"})  # lower case, without a port
    any_address: bool = False  # accept every IP address as a host, not only loopback ones
    origins: set[str] = field(default_factory=set)  # NAME or NAME:PORT that a browser sees in front of a proxy
    frames: tuple[str, ...] = NO_FRAMES  # of `frame-ancestors`
    is_upload: Callable[[str], bool] = lambda _: False  # whether a path is an uploaded file
    # Arguments: the endpoint's name (None: the body has its number), the body, and whether the body holds arguments by
    # name instead of guard.CALL_FIELDS. Raises UserError, or KeyError for an unknown endpoint.
    check_call: Callable[[str | None, dict[str, Any], bool], None] = lambda *_: None
    logged_in: Callable[[Scope], bool] = lambda _: True
    throttle: Throttle | None = None  # of logins

    def add(self, host: str) -> None:
        """Accept a host NAME or NAME:PORT; the port only matters for origins behind a proxy. Raises UserError."""
        name, _ = split_host(host)
        if not name:
            raise UserError(f"'{host}' is no host: give a name or an address, as gpu.example or gpu.example:8443.")
        self.names.add(name)
        self.origins.add(host.lower())

    def allows(self, name: str) -> bool:
        """Whether a host, without its port, is this server.

        DNS rebinding needs a name, so an IP address is safe. A server on a network may be reached by any address, for
        example through a mapped port of a container.
        """
        address = as_address(name)
        return name in self.names or (address is not None and (self.any_address or address.is_loopback))

    def is_own_origin(self, origin: str, headers: Headers) -> bool:
        """Whether an origin, or a page's address, is this server as the browser that sent `headers` reached it."""
        try:
            parts = urlsplit(origin)
            port = parts.port
        except ValueError:
            return False
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return False  # including "null"
        default_port = {"http": 80, "https": 443}[parts.scheme]
        requested = headers.get("host", ""), headers.get("x-forwarded-host", "").split(",")[0].strip()
        for name, host_port in map(split_host, [*requested, *self.origins]):
            if name and (name, host_port or default_port) == (parts.hostname.rstrip("."), port or default_port):
                return True
        return False


def policy_for(
    server_name: str | None, hosts: list[str], environment: dict[str, str], root_path: str | None = None
) -> Policy:
    """Build the policy of a server.

    server_name, root_path: as Gradio takes them; hosts: further ones, NAME or NAME:PORT; environment: has the names of
    a Hugging Face Space. Raises UserError.
    """
    policy = Policy()
    name, _ = split_host(server_name or "localhost")
    address = as_address(name) if name else None
    if name and (address.is_loopback if address else name == "localhost"):
        policy.names.add(name)
    else:
        policy.any_address = True
        machine = socket.gethostname().lower()
        short = machine.split(".")[0]
        policy.names |= {machine, short, f"{short}.local"} | ({name} if name else set())
    for host in hosts:
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
    """Split NAME[:PORT] into the lower-case name, IPv6 without brackets, and the port; (None, None) if invalid."""
    if as_address(host) is not None:  # an IPv6 address without brackets
        return host.lower(), None
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::([0-9]{1,5}))?", host, re.ASCII)
    if not match:
        return None, None
    return match[1].strip("[]").rstrip(".").lower() or None, int(match[2]) if match[2] else None


def as_address(name: str) -> IPv4Address | IPv6Address | None:
    """Parse an IP address; None if `name` is none."""
    try:
        return ip_address(name)
    except ValueError:
        return None
