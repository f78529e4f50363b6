"""HTTP routes of the page beside Gradio's, and in place of some of them: files, uploads, and the poll of /watch.

Gradio would leave uploads behind, and answering /watch costs it many times more.
"""

import functools
import logging
import mimetypes
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import anyio
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, request_response
from starlette.types import Receive, Scope, Send

from latentsync.errors import UserError
from latentsync.media import probe_video
from optim.serving.endpoints import Endpoints
from optim.serving.guard import Guard, Refusal, route_path
from optim.serving.job import Job
from optim.serving.mcp_tools import PATH, McpTools
from optim.serving.policy import Policy
from optim.serving.preview import as_webp, thumbnail

log = logging.getLogger(__name__)

CLEANING_SECONDS = 30.0  # between two removals of uploads and results that nobody needs any more
HEADERS = {
    "Cache-Control": "private, no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox; default-src 'none'",  # of the file, if it is opened as a page
}


def media_type(path: Path) -> tuple[str, str]:
    """Media type and disposition of a job's file, whose ending is of a user's choice.

    Only what a browser plays or shows as a picture is given inline; a page, or an SVG, would run scripts in ours.
    """
    kind, packed = mimetypes.guess_type(path.name)
    if kind and not packed and re.fullmatch(r"(video|audio|image)/[\w.-]+", kind):  # no +xml
        return kind, "inline"
    return "application/octet-stream", "attachment"


def file_response(path: Path) -> Response:
    kind, disposition = media_type(path)
    return FileResponse(
        path, headers=HEADERS, media_type=kind, filename=path.name, content_disposition_type=disposition
    )


def logged_in(request: Request) -> bool:
    """Whether a request comes from somebody who has logged in, or the page asks for no login."""
    app = request.app
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return app.auth is None or any(app.tokens.get(request.cookies.get(name)) is not None for name in names)


def slow_clock() -> list[Route]:
    """A route for Gradio's script that shows waits, in which their clock moves once a second.

    Gradio's moves with every frame of the screen, and that of the page's own loading never ends (in 6.31): it takes a
    tenth of a core as long as the page is open. The page shows none of them.
    """
    folder = distribution("gradio").locate_file("gradio/templates/frontend/assets")
    return [
        Route(f"/assets/{path.name}", functools.partial(_with_slow_clock, path))
        for path in Path(str(folder)).glob("statustracker-*.js")
    ]


def _with_slow_clock(path: Path, _: Request) -> Response:
    script = path.read_text(encoding="utf-8").replace("window.requestAnimationFrame", "(show=>setTimeout(show,1000))")
    return Response(script, media_type="text/javascript", headers={"Cache-Control": "public, max-age=604800"})


def routes(api: Endpoints, tools: McpTools | None = None) -> list[Route]:
    """The routes for a page with the endpoints `api`, to go before Gradio's own."""
    from gradio.routes import file_upload_statuses

    worker, uploads = api.worker, api.uploads
    watching = anyio.CapacityLimiter(4)  # threads of their own: whatever else goes on, the page moves

    def job_of(request: Request) -> Job | None:
        return worker.store.by_key(request.path_params["key"]) if logged_in(request) else None

    def job_file(request: Request) -> Response:
        """A file of a job, for who knows its key; no name in a request ever becomes a path."""
        job = job_of(request)
        path = job and job.files().get(request.path_params["name"])
        if not path or not path.is_file() or path.is_symlink():
            return PlainTextResponse("There is no such file.", 404)
        return file_response(path)

    def picture(request: Request) -> Response:
        job = job_of(request)
        frame = None if job is None else job.picture
        if frame is None:
            return PlainTextResponse("There is no such picture.", 404)
        return Response(as_webp(frame), media_type="image/webp", headers=HEADERS)

    def original_picture(request: Request) -> Response:
        """The first frame of a job's video: browsers know few formats."""
        job = job_of(request)
        if job is None:
            return PlainTextResponse("There is no such picture.", 404)
        try:
            picture = thumbnail(probe_video(job.request.video, job.request.video_track))
        except UserError:
            return PlainTextResponse("There is no such picture.", 404)
        return Response(picture, media_type="image/jpeg", headers=HEADERS)

    def plotly(_: Request) -> Response:
        path = distribution("plotly").locate_file("plotly/package_data/plotly.min.js")
        return FileResponse(str(path), headers={"Cache-Control": "public, max-age=604800"})

    def file(request: Request) -> Response:
        """An upload, a result or the example, for who knows its path; nothing else of this machine, or of another."""
        if not logged_in(request):
            return PlainTextResponse("Log in first.", 401)
        uploads.forget(api.has_job)
        if not uploads.holds(path := request.path_params["path"]):
            return PlainTextResponse("There is no such file.", 404)
        return file_response(Path(os.path.realpath(path)))

    async def upload(request: Request) -> Response:
        """Store files; replies with their paths, as Gradio does."""
        if not logged_in(request):
            return JSONResponse({"detail": "Log in first."}, 401, {"Connection": "close"})
        progress_id, length = request.query_params.get("upload_id"), request.headers.get("content-length", "")

        def progress(name: str, part: bytes) -> None:
            file_upload_statuses.append(progress_id, name, part)

        if progress_id:
            file_upload_statuses.track(progress_id)
        try:
            paths = await uploads.receive(
                request.headers.get("content-type"),
                int(length) if length.isascii() and length.isdigit() else None,
                request.stream(),
                request.client.host if request.client else "",
                progress if progress_id else None,
            )
            return JSONResponse([str(path) for path in paths])
        except Refusal as refusal:
            return PlainTextResponse(str(refusal), refusal.status, {"Connection": "close"})
        except ClientDisconnect:
            return PlainTextResponse("The upload was given up.", 400)
        finally:
            if progress_id:
                file_upload_statuses.set_done(progress_id)

    async def watch(request: Request) -> Response:
        """The endpoint /watch, as Gradio would answer it."""
        if not logged_in(request):
            return JSONResponse({"detail": "Log in first."}, 401)
        try:
            data = (await request.json())["data"]
        except (ValueError, TypeError, KeyError, RecursionError):
            data = None
        if not isinstance(data, list) or not 1 <= len(data) <= 3:
            return JSONResponse({"error": "Give the data: a visitor, a time, and the versions that are known."}, 400)
        try:
            reply = await anyio.to_thread.run_sync(api.watch, *data, limiter=watching)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 500)  # as Gradio answers an endpoint's error
        return JSONResponse({"data": [reply], "is_generating": False})

    return [
        *slow_clock(),
        Route("/lipsync/plotly.min.js", plotly),
        Route("/lipsync/{key}/picture", picture),
        Route("/lipsync/{key}/first-frame", original_picture),
        Route("/lipsync/{key}/{name}/{file}", job_file),
        Route("/gradio_api/file={path:path}", file),
        Route("/gradio_api/file/{path:path}", file),
        Route("/gradio_api/upload", upload, methods=["POST"]),
        # Gradio's server compresses larger replies only.
        Route("/gradio_api/run/watch", GZipMiddleware(request_response(watch)), methods=["POST"]),
        *([Route(PATH, tools, methods=["POST"]), Route(f"{PATH}/", tools, methods=["POST"])] if tools else []),
    ]


def guarded(api: Endpoints, policy: Policy, tools: McpTools | None = None) -> Callable:
    """The server's lifespan: the guard is around all of it, and uploads are cleaned up while it lasts."""

    @asynccontextmanager
    async def lifespan(server: Any) -> AsyncIterator[None]:
        policy.is_upload = api.uploads.holds
        policy.logged_in = lambda scope: logged_in(Request({**scope, "app": server}))
        inner = server.middleware_stack
        zipped = GZipMiddleware(inner)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            """Compress the page itself, which Gradio sends as it is; it compresses all else."""
            is_page = scope["type"] == "http" and route_path(scope) in ("", "/")
            await (zipped if is_page else inner)(scope, receive, send)

        server.middleware_stack = Guard(app, policy)

        async def clean() -> None:
            while True:
                await anyio.sleep(CLEANING_SECONDS)
                try:
                    await anyio.to_thread.run_sync(api.uploads.forget, api.has_job)
                    await anyio.to_thread.run_sync(api.uploads.sweep)
                except OSError as error:
                    log.warning("Old uploads cannot be removed: %s", error)

        async with tools.run() if tools else nullcontext(), anyio.create_task_group() as tasks:
            tasks.start_soon(clean)
            yield
            tasks.cancel_scope.cancel()

    return lifespan
