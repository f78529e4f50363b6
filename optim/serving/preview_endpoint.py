"""The endpoint /preview, and what the page shows of its reply."""

import html
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import gradio as gr
from gradio import FileData

from latentsync.choice import SPEAKING
from latentsync.errors import UserError
from latentsync.media import probe_audio
from optim.serving import form
from optim.serving.endpoints import POLL_SECONDS, Endpoints, takes_settings, visitor_token
from optim.serving.inputs import with_user_names
from optim.serving.job import Request
from optim.serving.one_frame import NEWER


def preview_endpoint(api: Endpoints) -> Callable[..., Awaitable[dict[str, Any]]]:
    """The function of /preview."""

    @takes_settings
    async def preview(
        video: FileData,
        audio: FileData,
        settings: Any,
        at: float | None = None,
        visitor: str = "",
        video_track: int | None = None,
        audio_track: int | None = None,
        is_gone: Callable[[], Awaitable[bool]] | None = None,
    ) -> dict[str, Any]:
        """Paint one frame at `at` seconds of the voice, by default in its middle, and wait for it.

        Replies as `one_frame.paint` says. It takes the place of this visitor's earlier preview; is_gone: whether the
        caller has disconnected. Raises UserError, also while jobs run or wait.
        """
        worker, files = api.worker, (api._uploaded(video, "video"), api._uploaded(audio, "voice"))
        tracks = form.parse_track(video_track, "video"), form.parse_track(audio_track, "sound")
        fields = form.parse_settings(settings, api.models_to_choose)
        if fields["face"] == SPEAKING:
            raise UserError("Who speaks is found in the whole video: choose another face for the preview.")
        seconds = None if at is None else form.parse_seconds(at, "The time of the preview")
        token = visitor_token(visitor)
        while not worker.ready.is_set():
            await anyio.sleep(POLL_SECONDS)
        if worker.machine is None or worker.lent or worker.gpus is not None:
            raise UserError(worker.problem or "Where jobs share several GPUs, or get a lent one, there is no preview.")
        try:
            await api.probing(probe_audio)(files[1], tracks[1], worker.max_seconds)
        except UserError as error:
            raise UserError(with_user_names(error, {files[1]: files[1].name})) from None
        request = Request(*files, **fields, video_track=tracks[0], audio_track=tracks[1])
        frame = worker.previews.add(request, token, seconds)
        try:
            while not frame.done.is_set() and not (is_gone is not None and await is_gone()):
                await anyio.sleep(POLL_SECONDS)
        finally:
            frame.cancel()
        if frame.reply is None:
            raise UserError(frame.error or NEWER)
        return frame.reply

    return preview


def wire_preview(
    api: Endpoints, button: gr.Button, shown: gr.HTML, inputs: list[Any], with_visitor: str, options: dict[str, Any]
) -> None:
    """Let the page's button show a frame.

    inputs: video, voice, a number for the time, visitor, tracks and settings; with_visitor: JavaScript that fills in
    the visitor; options: of the event.
    """
    preview = preview_endpoint(api)

    async def press(
        video: Any, audio: Any, at: Any, visitor: str, video_track: Any, audio_track: Any, *values: Any
    ) -> Any:
        settings = dict(zip(form.NAMES, values, strict=True))
        tracks = {"video_track": video_track, "audio_track": audio_track}
        try:
            return preview_html(await preview(video, audio, **settings, at=at, visitor=visitor, **tracks))
        except UserError as error:  # a newer one shows its own frame
            return gr.skip() if str(error) == NEWER else preview_html({"error": str(error)})

    filled_in = f"(...values) => ({with_visitor})(...values.with(2, window.lipsync.playerTime()))"
    button.click(None, None, shown, js="() => window.lipsync.beginPreview()")
    painted = button.click(press, inputs, shown, js=filled_in, trigger_mode="multiple", **options)
    painted.then(None, js="() => window.lipsync.showPreview()")


def preview_button(time: str | None) -> Any:
    """The page's button; time: see `estimate.describe_preview`."""
    words = "({})".format(time.replace(" ", "\N{NO-BREAK SPACE}")) if time else ""
    return gr.Button(f"Preview one frame {words}".strip(), visible=time is not None)


def preview_html(reply: dict[str, Any]) -> str:
    """The frame beside its original, or the sentence of an error."""
    if "error" in reply:
        return _section("", f"<p class='problem' role='alert'>{html.escape(reply['error'])}</p>")
    facts = f" at {reply['at']:.1f} s, {reply['level']}, painted in {reply['seconds']:.0f} s"
    figures = "".join(
        f"<figure><img src='{reply[name]}' alt='{caption}'><figcaption>{caption}</figcaption></figure>"
        for name, caption in (("original", "Original"), ("painted", "With the new mouth"))
    )
    return _section(facts, f"<div class='pair'>{figures}</div>")


def _section(facts: str, content: str) -> str:
    close = "<button type='button' data-close='one-frame'>Close</button>"
    title = f"<h2>One frame<span class='quiet'>{html.escape(facts)}</span></h2>"
    return (
        f"<section id='one-frame' aria-label='Preview of one frame'><div class='row'>{title}{close}</div>"
        f"{content}</section>"
    )
