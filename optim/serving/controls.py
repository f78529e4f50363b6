"""Gradio's components for settings and for the tracks of a file."""

from typing import Any

import gradio as gr

from optim.serving.form import Dropdown, Setting, Slider


def control(setting: Setting) -> Any:
    """The Gradio component of a setting."""
    kind = setting.control
    common = {"value": setting.default, "label": setting.label, "elem_id": setting.name, "info": setting.info or None}
    if isinstance(kind, Slider):
        return gr.Slider(kind.low, kind.high, step=kind.step, **common)
    if isinstance(kind, Dropdown):
        return gr.Dropdown(list(kind.choices), allow_custom_value=kind.others, **common)
    return gr.Number(precision=0, minimum=kind.low, maximum=kind.high, **common)


def track_dropdown(reply: dict[str, Any]) -> Any:
    """The choice of a file's track, shown where there are several; reply: of `check_video` or `measure`."""
    choices = [(each["label"], each["number"]) for each in reply.get("tracks", [])]
    several = len(choices) > 1
    return gr.Dropdown(choices, value=reply["track"] if several else None, visible=several)
