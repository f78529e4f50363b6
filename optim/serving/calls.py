"""Checks of calls to the page's endpoints, for what Gradio would answer with a traceback."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.data_classes import FileData

from latentsync.errors import UserError
from optim.serving.form import parse_text
from optim.serving.guard import shorten


class CallCheck:
    """What `guard.Policy.check_call` does for the endpoints of `blocks`."""

    def __init__(self, blocks: gr.Blocks):
        self.blocks = blocks

    @functools.cached_property
    def _api(self) -> dict[str, Any]:
        """The endpoints that everybody may call, by name, as /gradio_api/info has them."""
        return self.blocks.get_api_info()["named_endpoints"]

    def __call__(self, name: str | None, body: dict[str, Any], by_name: bool = False) -> None:
        """Refuse a call of no function, with too few or unfit arguments.

        name: the endpoint's, None: its number is in the body; by_name: the body holds the arguments by their names.
        Raises UserError, and KeyError for an unknown endpoint.
        """
        number = None if by_name else body.get("fn_index")
        fns = self.blocks.fns
        if number is None:
            endpoint = next((fn for fn in fns.values() if name is not None and fn.api_name == name), None)
        else:
            endpoint = fns.get(number) if isinstance(number, int) else None
        if endpoint is None or endpoint.fn is None:
            raise KeyError(name if number is None else number)
        parameters = _parameters(endpoint.fn, len(endpoint.inputs))
        arguments = self._by_name(name, parameters, body) if by_name else self._by_position(parameters, body)
        for component, value in zip(endpoint.inputs, arguments, strict=True):
            if not isinstance(component, (gr.Video, gr.Audio, gr.File)) or value is None:
                continue
            several = isinstance(component, gr.File) and component.file_count != "single" and isinstance(value, list)
            if not all(_is_file(each) for each in (value if several else [value])):
                raise UserError(f"The {component.label or 'file'} is no uploaded file: upload it first.")

    def _by_name(self, name: str | None, parameters: list[inspect.Parameter], body: dict[str, Any]) -> list[Any]:
        documented = {each["parameter_name"]: each for each in self._api[f"/{name}"]["parameters"]}
        if unknown := body.keys() - documented:
            raise UserError(f"There is no argument {shorten(min(unknown))} of /{name}: /gradio_api/info lists them.")
        for argument, each in documented.items():
            if not each["parameter_has_default"] and argument not in body:
                raise UserError(f"The argument '{argument}' of /{name} is missing: give it.")
        return [body.get(parameter.name) for parameter in parameters]

    def _by_position(self, parameters: list[inspect.Parameter], body: dict[str, Any]) -> list[Any]:
        parse_text(body.get("session_hash") or "", "session_hash")
        data = body.get("data")
        if not isinstance(data, list) or len(data) > len(parameters):
            raise UserError(f"The data are no list of {len(parameters)} arguments: /gradio_api/info lists them.")
        for parameter in parameters[len(data) :]:
            if parameter.default is parameter.empty:
                raise UserError(f"The argument '{parameter.name}' is missing in the data: give it.")
            data.append(parameter.default)  # what Gradio gets
        return data


def _parameters(fn: Callable, count: int) -> list[inspect.Parameter]:
    """The parameters of a function that an event's inputs are passed to; one as *values takes all that are left."""
    parameters = [each for each in inspect.signature(fn).parameters.values() if each.annotation is not gr.EventData]
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_POSITIONAL:
        parameters += parameters[-1:] * (count - len(parameters))
    return parameters[:count]


def _is_file(value: Any) -> bool:
    try:
        return not FileData.model_validate(value, context={"validate_meta": True}).is_stream
    except ValueError:
        return False
