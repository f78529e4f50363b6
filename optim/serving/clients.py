"""The endpoints as Gradio's clients call them: typed by the hints of their functions (docs/api.md)."""

import functools
import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import gradio as gr
from gradio import FileData
from gradio.context import LocalContext

from latentsync.errors import UserError
from optim.serving.endpoints import Endpoints
from optim.serving.preview_endpoint import preview_endpoint

OWN = ("progress", "is_gone")  # parameters of endpoints that clients do not give


def wire_clients(api: Endpoints, blocks: gr.Blocks) -> None:
    """Give the Blocks that are being built an endpoint for each function that clients may call."""
    fns = {
        "submit": api.probing(api.submit),
        "describe": api.when_ready(api.describe),
        "measure": api.probing(api.measure),
        "check_video": api.probing(api.check_video),
        "preview": preview_endpoint(api),
        "machine": api.when_ready(api.machine),
        "models": api.when_ready(api.models),
    }
    jobs, models = "watch cancel again move remove compare result", "fetch stop_fetching remove_model"
    for name, fn in (fns | {name: getattr(api, name) for name in f"{jobs} {models}".split()}).items():
        gr.api(for_clients(fn, blocks), api_name=name, queue=False)
    gr.api(for_clients(api.lipsync, blocks), api_name="lipsync", concurrency_limit=None)
    # Gradio takes a function to track progress by a parameter, which `gr.api` would show to clients.
    next(fn for fn in blocks.fns.values() if fn.api_name == "lipsync").tracks_progress = True


def for_clients(fn: Callable, blocks: gr.Blocks) -> Callable:
    """Make a method of `Endpoints` a function for `gr.api`, which reads its signature.

    A UserError is raised as Gradio's error, which clients raise; a path is returned as a file; OWN parameters are not
    the client's: `progress` is Gradio's, `is_gone` see `caller_is_gone`.
    """
    signature = inspect.signature(fn)
    parameters = [each for name, each in signature.parameters.items() if name not in OWN]
    returned = FileData if signature.return_annotation is Path else signature.return_annotation

    @functools.wraps(fn)
    async def call(*args: Any) -> Any:
        own = {"progress": gr.Progress, "is_gone": lambda: caller_is_gone(blocks)}
        extra = {name: make() for name, make in own.items() if name in signature.parameters}
        try:
            if inspect.iscoroutinefunction(fn):
                reply = await fn(*args, **extra)
            else:
                reply = await anyio.to_thread.run_sync(functools.partial(fn, *args, **extra))
                if inspect.isawaitable(reply):  # of a function that `takes_settings`
                    reply = await reply
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return FileData(path=str(reply)).model_dump() if isinstance(reply, Path) else reply

    function: Any = call
    hints = {name: hint for name, hint in fn.__annotations__.items() if name not in OWN}
    function.__annotations__ = hints | {"return": returned}
    function.__signature__ = signature.replace(parameters=parameters, return_annotation=returned)
    return function


def caller_is_gone(blocks: gr.Blocks) -> Callable[[], Awaitable[bool]]:
    """A function that says whether the client of the present call has disconnected; Gradio lets the call run on."""
    event, request = LocalContext.event_id.get(None), LocalContext.request.get(None)

    async def is_gone() -> bool:
        if event is None:  # a plain request, without Gradio's queue
            return request is not None and await request.request.is_disconnected()
        queued = [each for events in blocks._queue.active_jobs for each in events or ()]
        return not any(each._id == event and each.alive for each in queued)

    return is_gone
