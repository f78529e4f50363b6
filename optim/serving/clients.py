"""The endpoints as Gradio's clients call them: typed by the hints of their functions (docs/api.md)."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import gradio as gr
from gradio import FileData

from latentsync.errors import UserError
from optim.serving.endpoints import Endpoints


def wire_clients(api: Endpoints, blocks: gr.Blocks) -> None:
    """Give the Blocks that are being built an endpoint for each function that clients may call."""
    fns = {
        "submit": api.probing(api.submit),
        "describe": api.when_ready(api.describe),
        "measure": api.probing(api.measure),
        "check_video": api.probing(api.check_video),
        "machine": api.when_ready(api.machine),
        "models": api.when_ready(api.models),
    }
    jobs, models = "watch cancel again move remove compare result", "fetch stop_fetching remove_model"
    for name, fn in (fns | {name: getattr(api, name) for name in f"{jobs} {models}".split()}).items():
        gr.api(for_clients(fn), api_name=name, queue=False)
    gr.api(for_clients(api.lipsync), api_name="lipsync", concurrency_limit=None)
    # Gradio takes a function to track progress by a parameter, which `gr.api` would show to clients.
    next(fn for fn in blocks.fns.values() if fn.api_name == "lipsync").tracks_progress = True


def for_clients(fn: Callable) -> Callable:
    """Make a method of `Endpoints` a function for `gr.api`, which reads its signature.

    A UserError is raised as Gradio's error, which clients raise; a path is returned as a file; `progress` is Gradio's.
    """
    signature = inspect.signature(fn)
    parameters = [each for name, each in signature.parameters.items() if name != "progress"]
    returned = FileData if signature.return_annotation is Path else signature.return_annotation

    @functools.wraps(fn)
    async def call(*args: Any) -> Any:
        extra = {"progress": gr.Progress()} if "progress" in signature.parameters else {}
        try:
            if inspect.iscoroutinefunction(fn):
                reply = await fn(*args, **extra)
            else:
                reply = await anyio.to_thread.run_sync(functools.partial(fn, *args, **extra))
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return FileData(path=str(reply)).model_dump() if isinstance(reply, Path) else reply

    function: Any = call
    hints = {name: hint for name, hint in fn.__annotations__.items() if name != "progress"}
    function.__annotations__ = hints | {"return": returned}
    function.__signature__ = signature.replace(parameters=parameters, return_annotation=returned)
    return function
