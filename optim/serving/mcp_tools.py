"""Tools for programs that speak the Model Context Protocol (MCP): /gradio_api/mcp, with --mcp (docs/api.md).

Gradio's own MCP server is not used: it offers every endpoint, and fetches files from addresses that callers name. Here
a file is an upload, and the guard checks every request as it does all others.
"""

import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import anyio
from starlette.types import Receive, Scope, Send

from latentsync import __version__
from latentsync.errors import UserError
from latentsync.settings import INFERENCE_STEPS, SEED
from optim.serving.endpoints import Endpoints

if TYPE_CHECKING:
    from mcp.server.lowlevel import Server

log = logging.getLogger(__name__)

PATH = "/gradio_api/mcp"
FILE = "/gradio_api/file="
FAULT = "Something inside the program failed; the server's console says where."
HOW_TO_UPLOAD = (
    "Files: POST them to /gradio_api/upload of this server first, as the form field 'files'; it replies with their "
    "paths."
)


class McpTools:
    """The tools as an ASGI application; `run` must be entered while it serves. Raises UserError without the package."""

    def __init__(self, api: Endpoints):
        try:
            from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
        except ImportError:
            raise UserError("--mcp needs a package that is not here: install it with pip install 'mcp<2'.") from None
        # Without sessions: nothing of a caller stays, and a request ends with its connection.
        self._manager = StreamableHTTPSessionManager(app=make_server(api), json_response=False, stateless=True)

    def run(self) -> AbstractAsyncContextManager[None]:
        return self._manager.run()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._manager.handle_request(scope, receive, send)


def make_server(api: Endpoints) -> "Server":
    """The MCP server with its tools: /lipsync, and endpoints that only read."""
    from mcp import types
    from mcp.server.fastmcp.tools import Tool
    from mcp.server.lowlevel import Server

    server: Server = Server("LatentSync", version=__version__, instructions=HOW_TO_UPLOAD)

    async def lipsync(
        video: str,
        audio: str,
        level: float | str = "auto",
        model: str = "auto",
        steps: int = INFERENCE_STEPS,
        seed: int = SEED,
        face: str = "largest",
    ) -> list[types.TextContent]:
        settings: dict[str, Any] = {"level": level, "model": model, "steps": steps, "seed": seed, "face": face}
        async with anyio.create_task_group() as tasks:
            files = upload_path(video), upload_path(audio)
            path = await outside_group(api.lipsync(*files, **settings, progress=report_to(tasks)))
        if isinstance(path, UserError):
            raise path
        return [types.TextContent(type="text", text=f"{root_url()}{FILE}{quote(str(path))}")]

    async def check_video(video: str, track: int | None = None) -> dict[str, Any]:
        """Length, rate, size, faces, warnings and tracks of an uploaded video, without pictures."""
        reply = await api.probing(api.check_video)(upload_path(video), track)
        faces = [{name: value for name, value in face.items() if name != "picture"} for face in reply["faces"]]
        return {name: value for name, value in reply.items() if name != "picture"} | {"faces": faces}

    async def measure(audio: str, track: int | None = None) -> dict[str, Any]:
        """Seconds, warnings and tracks of an uploaded sound."""
        return await api.probing(api.measure)(upload_path(audio), track)

    async def machine() -> dict[str, Any]:
        """What the machine is on which this runs, its models, and advice."""
        return await api.when_ready(api.machine)()

    def report_to(tasks: anyio.abc.TaskGroup) -> Callable[..., None] | None:
        """A function for `Endpoints.lipsync` that tells the caller how far the job is; None where it did not ask."""
        context = server.request_context
        token = context.meta.progressToken if context.meta else None
        if token is None:
            return None
        sent: list[Any] = []

        def report(done_and_all: tuple[int, int], desc: str, unit: str) -> None:
            if sent != (now := [done_and_all, desc]):
                sent[:] = now
                done, count = done_and_all
                request = str(context.request_id)
                tasks.start_soon(context.session.send_progress_notification, token, done, count, desc, request)

        return report

    def root_url() -> str:
        from gradio.route_utils import get_root_url

        request: Any = server.request_context.request
        return get_root_url(request, PATH, request.scope.get("root_path"))

    described = Tool.from_function(lipsync, description=f"{first_paragraph(api.lipsync)} {HOW_TO_UPLOAD}")
    reading = [Tool.from_function(check_video), Tool.from_function(measure), Tool.from_function(machine)]
    tools = {tool.name: tool for tool in (described, *reading)}

    @server.list_tools()
    async def list_tools() -> list[types.Tool]:
        reads = types.ToolAnnotations(readOnlyHint=True)
        return [
            types.Tool(
                name=name,
                description=tool.description,
                inputSchema=tool.parameters,
                annotations=None if tool is described else reads,
            )
            for name, tool in tools.items()
        ]

    @server.call_tool()
    async def call_tool(name: str, arguments: dict[str, Any]) -> Any:
        if name not in tools:
            raise ValueError(f"There is no tool of that name: there are {', '.join(tools)}.")
        try:
            return await tools[name].run(arguments)
        except Exception as error:
            cause = error.__cause__ or error
            if isinstance(cause, UserError):
                raise ValueError(str(cause)) from None
            log.exception("A tool failed:")
            raise ValueError(FAULT) from None

    return server


async def outside_group(result: Awaitable[Any]) -> Any:
    """The result, or the UserError that came in its place: a task group would raise it within a group of errors."""
    try:
        return await result
    except UserError as error:
        return error


def upload_path(file: str) -> str:
    """The path of an upload, which is given as such or by its address here. Nothing is fetched from an address."""
    is_address = file.startswith(("http://", "https://")) and FILE in file
    return unquote(file.partition(FILE)[2]) if is_address else file


def first_paragraph(fn: Callable) -> str:
    """What a client needs of a docstring: up to the parameters that are not its own."""
    return " ".join((fn.__doc__ or "").partition("progress:")[0].split())
