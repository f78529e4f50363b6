"""The command line of the page's server: options, who may log in, which limits follow, and how it is ended."""

import argparse
import os
import re
import secrets
import signal
import socket
import sys
from ipaddress import IPv6Address
from pathlib import Path
from typing import NoReturn

from latentsync import __version__
from latentsync.checkpoints.releases import RELEASES
from latentsync.errors import UserError
from latentsync.options import between
from optim.cluster.options import gpu_numbers
from optim.serving.login import parse_accounts, read_accounts
from optim.serving.policy import as_address, split_host

PUBLIC_SECONDS, PUBLIC_UPLOAD, PUBLIC_HOURS = 120.0, "200mb", 24.0  # limits of a public server, unless given

PREPARED_GB = 4.0  # of prepared films: 20 minutes of film at 512 px on a processor, 40 on a GPU


class Parser(argparse.ArgumentParser):
    """One that says what is wrong with an option in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message[0].upper()}{message[1:]}: see --help.\n")


def byte_size(text: str) -> int:
    """Convert a size as 500mb to bytes. Raises ArgumentTypeError."""
    match = re.fullmatch(r"([0-9]{1,12})\s*(b|kb|mb|gb|tb)?", text.strip().lower(), re.ASCII)
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no size, as 500mb or 2gb are")
    return int(match[1]) * 1024 ** ("b", "kb", "mb", "gb", "tb").index(match[2] or "b")


def host(text: str) -> str:
    """Check a host, as gpu.example or gpu.example:8443. Raises ArgumentTypeError."""
    if split_host(text)[0] is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no host, as gpu.example or gpu.example:8443 are")
    return text


def make_parser(outputs: Path, prog: str) -> argparse.ArgumentParser:
    """The parser of the options; outputs: the default folder of the results."""

    def env(name: str) -> str | None:
        return os.environ.get(name) or None

    parser = Parser(prog=prog, description="Open the page.")
    add = parser.add_argument
    share = (env("GRADIO_SHARE") or "").lower() in ("1", "true", "yes")
    port, jobs, amount = between(int, 1, 65535), between(int, 1, 10_000), between(float, 0, 1e6)
    add("--share", action="store_true", default=share, help="a public link; asks for a login, see --auth")
    add(
        "--auth",
        metavar="NAME:PASSWORD[,…]",
        help="who may log in; lists of processes show it, see --auth-file; with --share and neither, one is made up",
    )
    add(
        "--auth-file",
        type=Path,
        metavar="FILE",
        help="who may log in, a line NAME:PASSWORD each; the variable LATENTSYNC_AUTH takes NAME:PASSWORD, too",
    )
    add("--no-auth", action="store_true", help="no login, even with --share")
    add("--server-name", default=env("GRADIO_SERVER_NAME"), help="default 127.0.0.1")
    add("--server-port", type=port, default=env("GRADIO_SERVER_PORT"), metavar="PORT", help="default: from 7860 on")
    add("--root-path", default=env("GRADIO_ROOT_PATH"), help="where a proxy has the page")
    add(
        "--allow-host",
        type=host,
        action="append",
        metavar="NAME[:PORT]",
        help="another name of this server, as that of a proxy in front of it; can be given several times (or the "
        "variable LATENTSYNC_ALLOW_HOST, with commas)",
    )
    add("--queue-size", type=jobs, default=20, metavar="JOBS", help="that may wait (default 20)")
    seconds = f"of sound a job ({PUBLIC_SECONDS:.0f} with --share)"
    add("--max-seconds", type=between(float, 0.1, 1e6), metavar="S", help=seconds)
    add("--max-upload", type=byte_size, metavar="SIZE", help=f"of a file, as 500mb ({PUBLIC_UPLOAD} with --share)")
    add("--keep-hours", type=amount, metavar="H", help=f"then results are deleted ({PUBLIC_HOURS:.0f} with --share)")
    add(
        "--prepared-cache",
        type=amount,
        default=PREPARED_GB,
        metavar="GB",
        help="of the faces of films that jobs keep for the next one with the same film (default %(default)g, 0: none)",
    )
    add("--outputs", type=Path, default=outputs, metavar="FOLDER", help="of the results")
    add("--model", default="auto", help="what 'auto' means on the page: a name, or a checkpoint folder")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    add(
        "--restore",
        type=Path,
        metavar="FILE",
        help="a face restorer that jobs may use, .safetensors or .pth of GFPGAN or RestoreFormer (needs the packages "
        "of `pip install -e .[restore]`)",
    )
    add(
        "--gpus",
        metavar="all|N|0,2",
        help="use several GPUs of this machine, each for a job, or all for one: all, so many, or those with these "
        "numbers; without GPUs, so many processes (needs the packages of `pip install -e .[cluster]`)",
    )
    add(
        "--get",
        metavar="NAME",
        default=env("LATENTSYNC_GET"),
        help="fetch this released model while the page is served, unless it is there (or the variable LATENTSYNC_GET)",
    )
    add(
        "--allow-download",
        action="store_true",
        help="let visitors fetch and remove models, even with --share, or without a login beyond this machine",
    )
    add("--idle-minutes", type=amount, default=10, metavar="M", help="until the model is unloaded (default 10)")
    add(
        "--mcp",
        action="store_true",
        help="tools for programs that speak the Model Context Protocol, at /gradio_api/mcp; on this machine only",
    )
    add("--no-open", action="store_true", help="do not open the page in a browser")
    add("--version", action="version", version=__version__)
    return parser


def parse_options(arguments: list[str] | None, outputs: Path, prog: str = "app.py") -> argparse.Namespace:
    """The options, and what follows from them. Raises UserError; ends the process where argparse finds a mistake.

    Besides the options there are: `accounts`, (name, password) or None without a login; `hosts`, all that are allowed;
    `public`, on the internet; `shared`, with strangers, who have limits then.
    """
    options = make_parser(outputs, prog).parse_args(arguments)
    options.accounts = accounts(options)
    extra = os.environ.get("LATENTSYNC_ALLOW_HOST", "").split(",")
    options.hosts = [*(options.allow_host or []), *(name.strip() for name in extra if name)]
    if options.get and options.get not in RELEASES:
        raise UserError(f"There is no model '{options.get}' to fetch: give --get one of {', '.join(RELEASES)}.")
    if options.restore:
        from latentsync.restoring import check_restorer  # imports torch

        check_restorer(options.restore)
    if options.gpus is not None:
        gpu_numbers(options.gpus)
        if "SPACES_ZERO_GPU" in os.environ:
            raise UserError("--gpus: ZeroGPU lends a GPU to each job by itself; leave the option out.")
    options.public = options.share or "SPACE_ID" in os.environ
    options.shared = options.public or (options.accounts is None and not on_loopback(options.server_name))
    if options.mcp and (options.shared or options.accounts or not on_loopback(options.server_name)):
        raise UserError("--mcp is for programs of this machine: leave out --share, --server-name and a login.")
    options.allow_download = options.allow_download or not options.shared
    if options.public:
        limits = {"max_seconds": PUBLIC_SECONDS, "max_upload": byte_size(PUBLIC_UPLOAD), "keep_hours": PUBLIC_HOURS}
        for name, limit in limits.items():
            if getattr(options, name) is None:
                setattr(options, name, limit)
    return options


def accounts(options: argparse.Namespace) -> list[tuple[str, str]] | None:
    """Names and passwords; made up for a public link, unless a login is refused explicitly. Raises UserError."""
    if options.no_auth:
        return None
    if options.auth:
        return parse_accounts(options.auth, "--auth")
    if options.auth_file:
        return read_accounts(options.auth_file)
    if (variable := os.environ.get("LATENTSYNC_AUTH")) is not None:
        return parse_accounts(variable, "The variable LATENTSYNC_AUTH")
    if options.share:
        login = ("lipsync", secrets.token_urlsafe(9))
        print(f"Log in as '{login[0]}', password '{login[1]}' (--auth sets another, --no-auth none).", flush=True)
        return [login]
    return None


def on_loopback(name: str | None) -> bool:
    """Whether a server of that name can be reached from its own machine alone."""
    address = as_address((name or "").strip("[]"))
    return name in (None, "localhost") or (address is not None and address.is_loopback)


def bracketed(name: str | None) -> str | None:
    """A server's name as it stands in addresses of pages: IPv6 in brackets."""
    return f"[{name}]" if name and isinstance(as_address(name), IPv6Address) else name


def has_desktop() -> bool:
    """Whether a browser that is opened here is likely to be seen."""
    if sys.platform in ("win32", "darwin"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")) and "SSH_CONNECTION" not in os.environ


def wait_for_signal() -> None:
    """Wait for a signal that has a handler, and run that. To be called in the main thread.

    The system may deliver a signal to another thread, and the main thread, which alone runs handlers, would sleep on.
    So it waits for what Python writes to a socket in whichever thread a signal arrives.
    """
    receiver, sender = socket.socketpair()
    with receiver, sender:
        sender.setblocking(False)
        before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        try:
            receiver.recv(1)
        finally:
            signal.set_wakeup_fd(before)
