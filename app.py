"""The page: `python app.py` opens it. Inputs and buttons are Gradio's; what moves is drawn by assets/page.js.

Jobs run in `optim.serving.jobs.Worker`, a thread beside the server. torch is not imported before the page is shown.
Every action is an endpoint with a name, for `gradio_client` as for the page's own script (docs/api.md).
"""

import argparse
import atexit
import functools
import html
import inspect
import math
import mimetypes
import os
import re
import secrets
import shutil
import signal
import socket
import sys
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from optim.serving.uploads import Limits, Refused, Uploads, make_folder, remove_orphans

ROOT = Path(__file__).resolve().parent
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # no file and no word leaves the machine
# Uploads lie in a folder of this server alone, and go with it.
OWN_TEMP = None if "GRADIO_TEMP_DIR" in os.environ else str(make_folder())
if OWN_TEMP:
    os.environ["GRADIO_TEMP_DIR"] = OWN_TEMP
    atexit.register(shutil.rmtree, OWN_TEMP, ignore_errors=True)

import anyio  # noqa: E402
import gradio as gr  # noqa: E402
from gradio.data_classes import FileData  # noqa: E402
from gradio.routes import file_upload_statuses  # noqa: E402
from starlette.requests import ClientDisconnect  # noqa: E402
from starlette.requests import Request as WebRequest  # noqa: E402
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response  # noqa: E402
from starlette.routing import Route  # noqa: E402

from latentsync import __version__  # noqa: E402
from latentsync.checkpoints.releases import LICENCES, RELEASES, VAE_REPOSITORY  # noqa: E402
from latentsync.errors import UserError  # noqa: E402
from latentsync.media import probe_audio, probe_video  # noqa: E402
from latentsync.options import between, interrupt_on_signals  # noqa: E402
from optim.serving.guard import Guard, Policy, as_address, is_text, policy_for, shorten, split_host  # noqa: E402
from optim.serving.job import Job, Request  # noqa: E402
from optim.serving.jobs import Worker, log, said, unwritten  # noqa: E402
from optim.serving.limits import NO_LIMITS, SHARED_LIMITS  # noqa: E402
from optim.serving.login import Throttle, checker, parse_accounts, read_accounts  # noqa: E402
from optim.serving.models import Fetcher  # noqa: E402
from optim.serving.preview import first_picture  # noqa: E402
from optim.serving.run import run_alone  # noqa: E402

try:
    import spaces  # Hugging Face's package for ZeroGPU
except ImportError:
    spaces = None

EXAMPLE = (ROOT / "assets" / "example" / "face.mp4", ROOT / "assets" / "example" / "speech.wav")
STOPS = (("Conservative", 0.0), ("Balanced", 0.5), ("Aggressive", 1.0))  # of `optim.levels`, which imports torch
LEVELS = {"auto": 0.0} | {name.lower(): position for name, position in STOPS}  # positions, by what endpoints are given
MODELS = ("auto", "demo", *sorted(RELEASES))
AS_LEVEL = "as the level says"
CACHES = {AS_LEVEL: "level", "off": None, "every 2nd step": 2, "every 3rd step": 3, "every 4th step": 4}
# Names of a request's settings for endpoints, in the order of `Page.settings`.
SETTINGS = ("level", "model", "steps", "seed", "vram_fraction", "batch", "deepcache", "compile", "face", "crf",
            "guidance")  # fmt: skip
SWITCHES = {AS_LEVEL: None, "on": True, "off": False}
FACES = [("the largest", "largest"), ("on the left", "left"), ("on the right", "right"), ("in the centre", "centre")]
QUALITIES = [("highest (CRF 12)", 12), ("high (CRF 16)", 16), ("good (CRF 20)", 20), ("small file (CRF 26)", 26)]
PUBLIC_SECONDS, PUBLIC_UPLOAD, PUBLIC_HOURS = 120.0, "200mb", 24.0  # limits of a public server, unless given
PUBLIC_STORED = 20  # uploads of the largest size that a public server holds before they are jobs
PUBLIC_UNUSED_SECONDS = 3600.0  # until an upload to a public server is deleted that no job has used
GPU_SECONDS = 240  # of ZeroGPU that a job may ask for
# Files that are looked at in the same moment, and requests that may wait for that; polling goes on meanwhile.
PROBES, PROBES_WAITING = 4, 24
CLEANING_SECONDS = 30.0  # between two looks for uploads and results that nobody needs any more


def released(repository: str) -> tuple[str, str, str]:
    """Name, licence and address of a repository's model, for the footer."""
    name, licence = repository.split("/")[1].replace("LatentSync-", "LatentSync "), LICENCES[repository][2]
    return name, licence.split(":")[0], f"https://huggingface.co/{repository}"


CREDITS = (
    ("demo model", "Apache-2.0; trained on GRID, CC BY 4.0", "https://zenodo.org/records/3625687"),
    *(released(RELEASES[name].repository) for name in sorted(RELEASES)),
    ("Whisper tiny", "MIT", "https://github.com/openai/whisper"),
    released(VAE_REPOSITORY),
    (
        "MediaPipe Face Landmarker",
        "Apache-2.0",
        "https://ai.google.dev/edge/mediapipe/solutions/vision/face_landmarker",
    ),
)

HEADER = """
<header id="top">
  <div>
    <h1>LatentSync</h1>
    <p>Give a filmed face new words: a video, a voice, one button. Nothing leaves the machine it runs on.</p>
  </div>
  <button type="button" id="theme" aria-label="Switch between light and dark">Dark</button>
</header>
<section id="offer" aria-label="A better model for this machine" hidden></section>
<section id="fetching" aria-label="Fetching a model" hidden></section>
"""
LIVE = """
<section id="jobs" aria-label="Jobs and results">
  <p id="notice" role="alert"></p>
  <div id="empty">
    <p class="big">The result appears here.</p>
    <p>Drop a video and a voice, leave the slider where it is, and press the button. Or try the example.</p>
  </div>
  <div id="cards"></div>
</section>
<section id="machine" aria-label="This machine, the last two minutes">
  <div class="row"><h2>This machine</h2><span id="load" role="status"></span></div>
  <div id="plot" role="img" aria-label="Use of the machine over the last two minutes"></div>
  <p id="now"></p>
</section>
"""
MODELS_BOX = "<section id='models' aria-label='The released models'>Looking at this machine …</section>"


# ---- what the endpoints do


def own(visitor: str) -> str:
    """A visitor's token, or a new one; short ones could be guessed. Raises UserError."""
    visitor = visitor or ""
    if not isinstance(visitor, str) or not is_text(visitor):
        raise UserError("A visitor's token is text: leave it empty to get one.")
    visitor = visitor.strip()
    if visitor and not 22 <= len(visitor) <= 100:
        raise UserError("A visitor's token has 22 to 100 letters: leave it empty to get one.")
    return visitor or secrets.token_urlsafe(24)


def short_text(value: Any, what: str) -> str:
    """A visitor's value that must be a short text. Raises UserError."""
    if isinstance(value, str) and len(value) <= 200 and is_text(value):
        return value
    raise UserError(f"The {what} is {shorten(value)}: give a short text.")


def finite(value: Any, what: str) -> float:
    """A visitor's value that must be a number of at least 0, or None for 0. Raises UserError."""
    with suppress(TypeError, ValueError, OverflowError):
        if 0 <= (number := float(value or 0)) < math.inf:
            return number
    raise UserError(f"{what} is {shorten(value)}: give a number.")


def uploaded(file: dict[str, Any] | str | None, kind: str) -> Path:
    """The file that an upload has become; file: its path, or what Gradio knows of it.

    Raises UserError for none, and for what no upload is.
    """
    path = file.get("path") if isinstance(file, dict) else file
    if not path:
        raise UserError(f"There is no {kind} yet: drop one, or record it.")
    if not isinstance(path, str) or not Uploads().holds(path):
        raise UserError(f"This is no uploaded {kind}, or it is gone: upload it first.")
    return Path(os.path.realpath(path))


def asked(models: Sequence[str], video: Path, audio: Path, *settings: Any) -> Request:
    """The request of settings in the order of `Page.settings`; models: the names that are known. Raises UserError."""
    level, model, steps, seed, vram, batch, cache, compiled, face, crf, guidance = settings

    def number(name: str, value: Any, low: float, high: float, kind: type = int, otherwise: str = "") -> Any:
        try:
            if not isinstance(value, bool) and low <= (found := kind(value)) <= high:
                return found
        except (TypeError, ValueError, OverflowError):
            pass
        raise UserError(f"{name} is {shorten(value)}: give a number from {low} to {high}{otherwise}.")

    def one_of(name: str, value: Any, known: Any) -> Any:
        if not isinstance(value, str) or value not in known:
            raise UserError(f"There is no {name} {shorten(value)}: give one of {', '.join(map(str, known))}.")
        return value

    named = level.strip().lower() if isinstance(level, str) else None
    return Request(
        video=video,
        audio=audio,
        level=named if named in LEVELS else str(number("The level", level, 0, 1, float, f", or {', '.join(LEVELS)}")),
        model=one_of("model", model, models),
        steps=number("The number of steps", steps, 1, 200),
        guidance=None if guidance is None else number("The lip strength", guidance, 0, 10, float),
        seed=number("The seed", seed, 0, 2**63 - 1),
        vram_fraction=number("The VRAM fraction", vram, 0.1, 1, float),
        batch=number("The batch", batch, 0, 256) or None,
        cache=CACHES[one_of("DeepCache setting", cache, CACHES)],
        compile=SWITCHES[one_of("compile setting", compiled, SWITCHES)],
        face=one_of("face", face, [value for _, value in FACES]),
        crf=number("The output quality (CRF)", crf, 0, 40, float),
    )


def as_settings(request: dict[str, Any], recommended: float) -> list[Any]:
    """The page's settings for a request's, in the order of `Page.settings`; recommended: where the level `auto` is."""
    level = request["level"]
    return [
        recommended if level == "auto" else LEVELS[level] if level in LEVELS else float(level),
        request["model"], request["steps"], request["seed"],
        request["vram_fraction"] or 0.85, request["batch"] or 0,
        next(words for words, value in CACHES.items() if value == request["cache"]),
        next(words for words, value in SWITCHES.items() if value is request["compile"]),
        request["face"], request["crf"], request["guidance"],
    ]  # fmt: skip


def changed(models: Sequence[str], old: Request, changes: dict[str, Any]) -> dict[str, Any]:
    """The settings of `changes`, checked as those of a new request are; models: the names that are known.

    changes: settings by their names for /submit, or as /watch tells them. Raises UserError.
    """
    form = dict(zip(SETTINGS, as_settings(old.settings(), 0.0), strict=True)) | {"level": old.level}
    neutral = {"vram_fraction": 0.85, "batch": 0}  # what None means
    fields = set()
    for name, value in changes.items():
        fields.add(field := "cache" if name == "deepcache" else name)
        name = "deepcache" if name == "cache" else name
        if name not in form:
            raise UserError(f"There is no setting '{name}' to change: give some of {', '.join(SETTINGS)}.")
        words = {"cache": CACHES, "compile": SWITCHES}.get(field, {})
        value = next((each for each, known in words.items() if type(known) is type(value) and known == value), value)
        form[name] = neutral[name] if value is None and name in neutral else value
    checked = asked(models, old.video, old.audio, *form.values())
    return {field: getattr(checked, field) for field in fields}


def answer(act: Any) -> dict[str, Any]:
    """What `act` returns, or {"error": sentence}."""
    try:
        return act()
    except UserError as error:
        return {"error": str(error)}


def shown(advice: tuple[dict[str, str], ...] | list) -> str:
    """Advice as HTML."""
    if not advice:
        return "<p class='quiet'>Nothing to improve.</p>"
    return "<ul class='advice'>" + "".join(
        f"<li class='{each['severity']}'><b>{each['severity'].capitalize()}</b> {html.escape(each['problem'])} "
        f"<span>{html.escape(each['remedy'])}</span></li>"
        for each in advice
    ) + "</ul>"  # fmt: skip


def footer(worker: Worker) -> str:
    machine = worker.machine
    device = f"{machine.device_name} · torch {machine.torch}" if machine else "looking at this machine …"
    links = " · ".join(f'<a href="{url}" rel="noreferrer">{name}</a>: {licence}' for name, licence, url in CREDITS)
    return (
        f"<footer><p><b>LatentSync {__version__}</b> · {html.escape(device)} · code under Apache-2.0</p>"
        f"<p>{links}</p>"
        "<p>A face and a voice belong to a person. Use this only with the consent of the person shown and of the "
        "person heard; do not use it to deceive, to defame or to pass for someone, and say where you publish a result "
        "that it is synthetic. Every file written here says so in its metadata.</p></footer>"
    )


class Page:
    """The Blocks, and the endpoints under their names."""

    def __init__(self, worker: Worker, fetcher: Fetcher):
        self.worker, self.fetcher, self.uploads = worker, fetcher, Uploads()
        self._probing = anyio.CapacityLimiter(PROBES)
        self._probes_here = 0  # that run or wait
        with gr.Blocks(title="LatentSync", analytics_enabled=False, delete_cache=(3600, 86400)) as self.blocks:
            self._build()

    def _build(self) -> None:
        gr.HTML(HEADER)
        with gr.Row(elem_id="columns", equal_height=False):
            with gr.Column(scale=5, min_width=320, elem_id="inputs"):
                self._inputs()
                self._advanced()
            with gr.Column(scale=7, min_width=320, elem_id="outputs"):
                script = (ROOT / "assets" / "page.js").read_text(encoding="utf-8")
                live = gr.HTML(LIVE, js_on_load=script, elem_id="live")
                with gr.Accordion("Doctor: what would make this machine faster", open=False, elem_id="doctor"):
                    advice = gr.HTML("<p class='quiet'>Looking at this machine …</p>")
        foot = gr.HTML(footer(self.worker))
        self._listen(live, advice, foot)

    def _inputs(self) -> None:
        self.video = gr.Video(
            label="Video or picture of a face", sources=["upload", "webcam"], elem_id="video", include_audio=True,
            webcam_options=gr.WebcamOptions(mirror=False),
        )  # fmt: skip
        self.audio = gr.Audio(
            label="Voice", sources=["upload", "microphone"], type="filepath", elem_id="audio",
        )  # fmt: skip
        with gr.Column(elem_id="speed", variant="panel"):
            self.level = gr.Slider(
                0, 1, value=0, step=0.05, label="Quality or speed", elem_id="level",
                info="From as good as it gets (0) to as fast as it gets (1).",
            )  # fmt: skip
            with gr.Row(elem_id="stops"):
                self.stops = [
                    gr.Button(name, size="sm", elem_id=f"stop-{i}", min_width=60) for i, (name, _) in enumerate(STOPS)
                ]
            self.line = gr.HTML(
                "<p id='line' role='status'>Looking at this machine …</p>", elem_id="line-box", padding=False
            )
        self.start = gr.Button("Lip-sync", variant="primary", size="lg", elem_id="start")
        self.example = gr.Button("Try it with the example", size="md", elem_id="example")

    def _advanced(self) -> None:
        with gr.Accordion("Advanced", open=False, elem_id="advanced"):
            self.model = gr.Dropdown(list(MODELS), value="auto", label="Model", elem_id="model")
            gr.HTML(MODELS_BOX, padding=False)
            with gr.Row():
                self.steps = gr.Slider(
                    4, 60, value=20, step=1, label="Inference steps", elem_id="steps",
                    info="The level runs its share of them.",
                )  # fmt: skip
                self.guidance = gr.Slider(
                    1, 3, value=1.5, step=0.1, label="Lip strength (guidance)", elem_id="guidance",
                    info="How strongly the voice drives the mouth; 1 is fastest.",
                )  # fmt: skip
            with gr.Row():
                self.face = gr.Dropdown(
                    FACES, value="largest", label="Which face", info="Where several are seen.", elem_id="face"
                )
                self.crf = gr.Dropdown(
                    QUALITIES, value=16, label="Output quality", info="Smaller numbers are larger files.", elem_id="crf"
                )
            with gr.Row():
                self.seed = gr.Number(1247, precision=0, label="Seed", minimum=0, elem_id="seed")
                self.batch = gr.Number(
                    0, precision=0, label="Batch", minimum=0, maximum=256, elem_id="batch",
                    info="Frames a pass; 0: what fits.",
                )  # fmt: skip
            with gr.Row():
                self.cache = gr.Dropdown(list(CACHES), value=AS_LEVEL, label="DeepCache", elem_id="cache")
                self.compile = gr.Dropdown(
                    list(SWITCHES), value=AS_LEVEL, label="Compile", elem_id="compile",
                    info="Of use in long jobs where there is neither a GPU nor a second core.",
                )  # fmt: skip
            self.vram = gr.Slider(
                0.1, 1, value=0.85, step=0.05, label="VRAM fraction", elem_id="vram",
                info="Share of the GPU's memory that may be used.",
            )  # fmt: skip
            self.details = gr.HTML("<p id='details'></p>", elem_id="details-box", padding=False)
        self.settings = [
            self.level, self.model, self.steps, self.seed, self.vram, self.batch, self.cache, self.compile,
            self.face, self.crf, self.guidance,
        ]  # fmt: skip

    def _listen(self, live: gr.HTML, advice: gr.HTML, foot: gr.HTML) -> None:
        visitor = gr.Textbox(visible=False, label="visitor", value="")
        seconds = gr.Number(visible=False, label="seconds")
        reply = gr.JSON(visible=False, label="reply")
        job, keep = gr.Textbox(visible=False, label="job"), gr.Checkbox(visible=False, label="keep")
        changes = gr.JSON(visible=False, label="settings")
        since = gr.Number(visible=False, label="since", value=0)
        known = gr.JSON(visible=False, label="known")
        file = gr.File(visible=False, label="file")
        # Values come as they were sent, to functions that refuse wrong ones with a sentence, as Gradio would not.
        quiet = {"queue": False, "show_progress": "hidden", "preprocess": False}
        as_visitor = "(...given) => [...given.slice(0, -1), window.lipsync.visitor]"
        submitting = {
            "fn": self._probes(self.submit), "inputs": [self.video, self.audio, *self.settings, visitor],
            "outputs": reply, "js": as_visitor, "api_visibility": "private", "api_name": "press", **quiet,
        }  # fmt: skip
        told = {"fn": None, "inputs": reply, "outputs": None, "js": "(reply) => window.lipsync.told(reply)"}
        self.start.click(**submitting).then(**told)
        self.example.click(
            lambda: tuple(map(str, EXAMPLE)), None, [self.video, self.audio], **quiet, api_name="example"
        ).then(**submitting).then(**told)

        meaning = {
            "fn": self._waits(self.describe), "inputs": [*self.settings, seconds],
            "outputs": [self.line, self.details], "api_visibility": "private", "api_name": "meaning", **quiet,
        }  # fmt: skip
        gr.on([setting.change for setting in self.settings], **meaning, trigger_mode="always_last")
        self.audio.change(self._probes(self.measure), self.audio, [seconds, reply], **quiet, api_name="measure").then(
            **told
        ).then(**meaning)
        self.video.change(self._probes(self.check_video), self.video, reply, **quiet, api_name="check_video").then(
            **told
        )
        for button, (_, position) in zip(self.stops, STOPS, strict=True):
            button.click(None, None, self.level, js=f"() => {position}")
        positions = [position for _, position in STOPS]
        choosing = {
            "fn": None, "inputs": self.level, "outputs": None,
            "js": f"(level) => window.lipsync?.chosen({positions}.indexOf(level))",
        }  # fmt: skip
        self.level.change(**choosing)
        self.model.input(self.strength, self.model, self.guidance, **quiet, api_visibility="private")
        live.select(self.take_settings, None, self.settings, **quiet, api_visibility="private")
        # The page's script says so when there is another model, and when a job has shown how fast this machine is.
        live.input(self.choices, None, self.model, **quiet, api_visibility="private").then(**meaning)
        live.submit(**meaning)
        if OWN_TEMP:  # the uploads went with the server before, see page.js
            files = [self.video, self.audio]
            live.clear(None, files, files, js="(...files) => window.lipsync.lost(files)")

        self.blocks.load(
            self._waits(self.greet), None, [*self.stops, self.level, self.model, self.guidance, advice, foot], **quiet,
            api_visibility="private",
        ).then(**choosing).then(**meaning)  # fmt: skip

        # The page always says how strong; who asks by an endpoint may leave that to the model.
        guidance = gr.Number(visible=False, label="guidance")
        settings = [*self.settings[:-1], guidance]
        self._endpoint(self._probes(self.submit), [self.video, self.audio, *settings, visitor], reply, "submit")
        self._endpoint(self._waits(self.describe), [*settings, seconds], [self.line, self.details], "describe")
        self._endpoint(self.watch, [visitor, since, known], reply, "watch")
        self._endpoint(self.cancel, [job, keep, visitor], reply, "cancel")
        self._endpoint(self.again, [job, changes, visitor], reply, "again")
        self._endpoint(self.remove, [job, visitor], reply, "remove")
        compared = gr.Checkbox(False, visible=False, label="compared")
        self._endpoint(self.compare, [job, visitor], reply, "compare")
        self._endpoint(self.result, [job, visitor, compared], file, "result")
        self._endpoint(self._waits(self.about), [], reply, "machine")
        name, task = gr.Textbox(visible=False, label="name"), gr.Textbox("get", visible=False, label="task")
        pickle_only = gr.Checkbox(visible=False, label="pickle_only")
        self._endpoint(self._waits(self.models), [], reply, "models")
        self._endpoint(self.fetch, [name, task], reply, "fetch")
        self._endpoint(self.stop_fetching, [], reply, "stop_fetching")
        self._endpoint(self.remove_model, [name, pickle_only], reply, "remove_model")

    @staticmethod
    def _endpoint(fn: Any, inputs: list, outputs: Any, name: str) -> None:
        gr.Button(visible=False).click(
            fn, inputs, outputs, api_name=name, queue=False, show_progress="hidden", preprocess=False
        )

    def _waits(self, fn: Callable) -> Callable:
        """A function that is not called before the machine was looked at; until then it holds no thread."""

        @functools.wraps(fn)
        async def call(*given: Any) -> Any:
            while not self.worker.ready.is_set():
                await anyio.sleep(0.05)
            return await anyio.to_thread.run_sync(fn, *given)

        return call

    def _probes(self, fn: Callable) -> Callable:
        """A function that looks at files: few run at once, and who waits for them holds no thread."""

        @functools.wraps(fn)
        async def call(*given: Any) -> Any:
            if self._probes_here >= PROBES + PROBES_WAITING:
                busy = {"error": "This server looks at as many files as it can now: try again in a minute."}
                return (None, busy) if fn == self.measure else busy
            self._probes_here += 1
            try:
                return await anyio.to_thread.run_sync(fn, *given, limiter=self._probing)
            finally:
                self._probes_here -= 1

        return call

    @functools.cached_property
    def _api(self) -> dict[str, Any]:
        """The endpoints that everybody may call, by name, as /gradio_api/info has them."""
        return self.blocks.get_api_info()["named_endpoints"]

    def check_call(self, name: str | None, body: dict[str, Any], by_name: bool = False) -> None:
        """Refuse a call that Gradio would answer with a traceback: of no function, with too few or unfit arguments.

        name: the endpoint's, None: its number is in the body; by_name: the body holds the arguments by their names.
        Raises UserError, and KeyError for an unknown endpoint.
        """
        number = body.get("fn_index") if not by_name else None
        if number is None:
            found = next((fn for fn in self.blocks.fns.values() if name is not None and fn.api_name == name), None)
        else:
            found = self.blocks.fns.get(number) if isinstance(number, int) else None
        if found is None or found.fn is None:
            raise KeyError(name if number is None else number)
        parameters = list(inspect.signature(found.fn).parameters.values())[: len(found.inputs)]
        if by_name:
            known = self._api[f"/{name}"]["parameters"]
            if unknown := set(body) - {each["parameter_name"] for each in known}:
                raise UserError(
                    f"There is no argument {shorten(min(unknown))} of /{name}: /gradio_api/info lists them."
                )
            if missing := [
                each["parameter_name"] for each in known
                if not each["parameter_has_default"] and each["parameter_name"] not in body
            ]:  # fmt: skip
                raise UserError(f"The argument '{missing[0]}' of /{name} is missing: give it.")
            data = [body.get(parameter.name) for parameter in parameters]
        else:
            data = body.get("data")
            if not isinstance(data, list) or len(data) > len(parameters):
                raise UserError(f"The data are no list of {len(parameters)} arguments: /gradio_api/info lists them.")
            if missing := [p.name for p in parameters[len(data) :] if p.default is p.empty]:
                raise UserError(f"The argument '{missing[0]}' is missing in the data: give it.")
            data += [parameter.default for parameter in parameters[len(data) :]]
            short_text(body.get("session_hash") or "", "session_hash")
        for component, value in zip(found.inputs, data, strict=True):
            if isinstance(component, (gr.Video, gr.Audio, gr.File)) and value is not None:
                try:
                    file = FileData.model_validate(value, context={"validate_meta": True})
                except ValueError:
                    file = None
                if file is None or file.is_stream:
                    raise UserError(f"The {component.label or 'file'} is no uploaded file: upload it first.")

    def _models(self) -> tuple[str, ...]:
        machine = self.worker.machine
        return *MODELS, *([machine.chosen] if machine else [])

    def _asked(self, *given: Any) -> Request:
        return asked(self._models(), *given)

    # ---- endpoints

    def submit(
        self, video, audio, level, model, steps, seed, vram_fraction, batch, deepcache, compile, face, crf,
        guidance=None, visitor="",
    ) -> dict[str, Any]:  # fmt: skip
        """Put a job into the queue: {"job", "visitor", "error"}. An empty visitor gets a token, to ask with later."""

        def act() -> dict[str, Any]:
            who = own(visitor)
            files = uploaded(video, "video"), uploaded(audio, "voice")
            settings = level, model, steps, seed, vram_fraction, batch, deepcache, compile, face, crf, guidance
            job = self.worker.submit(self._asked(*files, *settings), who)  # it has names of its own for them now
            for path in files:
                self.uploads.use(path, job.key)
            return {"job": job.id, "visitor": who, "error": None}

        return answer(act)

    def watch(self, visitor: str, since: float = 0.0, known: dict[str, str] | None = None) -> dict[str, Any]:
        """A visitor's jobs, the length of the queue, the machine's curves after the time `since`, and what is fetched.

        known: "version" of jobs by "id", as they were told before: where it is the same, nothing else of a job is told.
        server: another one after the server was started again, when `since` and the addresses of files mean nothing.
        models: a number that changes when /models has something new to say; None before the machine was looked at.
        measured: one that changes when /describe may know better how long a job takes.
        """

        def act() -> dict[str, Any]:
            versions, after = known or {}, finite(since, "The time since when")
            if not isinstance(versions, dict):
                raise UserError(f"The versions that are known are {shorten(known)}: give them by the jobs' ids.")
            running, waiting = self.worker.load()
            jobs = []
            for job in self.worker.jobs_of(own(visitor)):
                told = {"id": job.id, "version": job.version()}
                if told["version"] is None or told["version"] != versions.get(job.id):
                    told |= self.worker.view(job)
                jobs.append(told)
            return {
                "server": self.worker.server,
                "jobs": jobs, "running": running, "waiting": waiting, "live": self.worker.live(after),
                "models": self.fetcher.version if self.worker.ready.is_set() else None,
                "fetching": self.fetcher.view(), "measured": self.worker.speeds.jobs if self.worker.speeds else 0,
            }  # fmt: skip

        return answer(act)

    def cancel(self, job: str, keep: bool, visitor: str) -> dict[str, Any]:
        """End a job; keep: what is finished of it stays as a result."""

        def act() -> dict[str, Any]:
            return {"job": self.worker.cancel(short_text(job, "job"), own(visitor), bool(keep)).id, "error": None}

        return answer(act)

    def again(self, job: str, changes: dict | None, visitor: str) -> dict[str, Any]:
        """The files of a job of one's own once more, with some settings changed, as {"level": "balanced"}."""

        def act() -> dict[str, Any]:
            if changes is not None and not isinstance(changes, dict):
                raise UserError(f"The changes are {shorten(changes)}: give settings by their names.")
            old = self.worker.find(short_text(job, "job"), own(visitor))
            new = self.worker.again(job, visitor, **changed(self._models(), old.request, changes or {}))
            return {"job": new.id, "visitor": visitor, "error": None}

        return answer(act)

    def remove(self, job: str, visitor: str) -> dict[str, Any]:
        """Forget a job that has ended, and delete its files."""

        def act() -> dict[str, Any]:
            self.worker.remove(short_text(job, "job"), own(visitor))
            self.uploads.forget(self.has_job)
            return {"removed": job, "error": None}

        return answer(act)

    def has_job(self, key: str) -> bool:
        """Whether there is a job whose files that key opens."""
        return self.worker.by_key(key) is not None

    def compare(self, job: str, visitor: str) -> dict[str, Any]:
        """Put original and result side by side, in the background; /watch says how far it is, /cancel ends it."""

        def act() -> dict[str, Any]:
            found = self.worker.compare(short_text(job, "job"), own(visitor))
            return {"job": found.id, "comparison": found.comparison.view(), "error": None}

        return answer(act)

    def result(self, job: str, visitor: str, compared: bool = False) -> str:
        """The finished video of a job of one's own, as a file; compared: beside the original, see /compare."""
        try:
            found = self.worker.find(short_text(job, "job"), own(visitor))
            if found.output is None:
                raise UserError("There is no result yet: watch the job until it is done.")
            path = found.files().get("compared") if compared else found.output
            if path is None:
                raise UserError("There is no side-by-side video yet: ask for it by /compare, and watch until it is.")
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        try:
            return str(self.uploads.offer(path, found.key))
        except OSError as error:
            log(f"A result cannot be given away: {error}")
            sentence = (
                f"'{path.name}' cannot be given away ({unwritten(error)}): let who serves the page look at the folder "
                "for temporary files, which GRADIO_TEMP_DIR names."
                if path.is_file()
                else f"'{path.name}' is not on this server any more: run the job again."
            )
            raise gr.Error(sentence, print_exception=False) from None

    def describe(
        self, level, model, steps, seed, vram_fraction, batch, deepcache, compile, face, crf, guidance=None,
        seconds=None,
    ) -> tuple[str, str]:  # fmt: skip
        """What settings mean on this machine, in one line of HTML, and in detail; seconds: of sound, if it is known."""

        def act() -> dict[str, Any]:
            settings = level, model, steps, seed, vram_fraction, batch, deepcache, compile, face, crf, guidance
            length = finite(seconds, "The length of the sound")
            return {"said": self.worker.describe(self._asked(Path(), Path(), *settings), length or None)}

        found = answer(act)
        kind = "problem" if "error" in found else ""
        line, details = found.get("said") or (found["error"], "")
        return (
            f"<p id='line' role='status' class='{kind}'>{html.escape(line)}</p>",
            f"<p id='details'>{html.escape(details and 'In detail: ' + details)}</p>",
        )

    def measure(self, audio: dict[str, Any] | str | None) -> tuple[float | None, dict[str, Any]]:
        """The seconds of a sound, or the sentence that says what is wrong with it."""
        if not audio:
            return None, {}
        seconds = None

        def act() -> dict[str, Any]:
            nonlocal seconds
            path = uploaded(audio, "voice")
            try:
                seconds = probe_audio(path, max_seconds=self.worker.max_seconds).duration  # no more of it is decoded
            except UserError as error:
                raise UserError(said(error, {path: path.name})) from None
            return {"checked": "audio"}

        found = answer(act)
        return seconds, found

    def check_video(self, video: dict[str, Any] | str | None) -> dict[str, Any]:
        """The first frame of a video as a data URI, since browsers know few formats, or the sentence that says what is
        wrong with it."""
        if not video:
            return {}

        def act() -> dict[str, Any]:
            path = uploaded(video, "video")
            try:
                picture = first_picture(probe_video(path))
            except UserError as error:
                raise UserError(said(error, {path: path.name})) from None
            return {"checked": "video", "picture": f"data:image/jpeg;base64,{b64encode(picture).decode()}"}

        return answer(act)

    def about(self) -> dict[str, Any]:
        """What this machine is, its models and the doctor's advice; waits until it has been looked at."""
        self.worker.ready.wait()
        found = asdict(self.worker.machine) if self.worker.machine else {"error": self.worker.problem}
        return found | {"queue_size": self.worker.queue_size, "max_seconds": self.worker.max_seconds}

    def models(self) -> dict[str, Any]:
        """The released models: what is here, what would be fetched under which licences, and which suits the machine.

        Waits until the machine has been looked at.
        """
        return answer(self.fetcher.models)

    def fetch(self, name: str, task: str = "get") -> dict[str, Any]:
        """Fetch a model, go on with it, or verify it (task: "verify"); /watch says how far it is."""

        def act() -> dict[str, Any]:
            self.fetcher.check_allowed()
            name_, task_ = short_text(name, "model"), short_text(task or "get", "task")
            return {"fetching": self.fetcher.start(name_, task_).view(), "error": None}

        return answer(act)

    def stop_fetching(self) -> dict[str, Any]:
        """End it; what was fetched is kept, and /fetch goes on from there."""

        def act() -> dict[str, Any]:
            self.fetcher.check_allowed()
            self.fetcher.stop()
            return {"fetching": self.fetcher.view(), "error": None}

        return answer(act)

    def remove_model(self, name: str, pickle_only: bool = False) -> dict[str, Any]:
        """Remove a model, or only the original of its U-Net once that is converted: {"removed": bytes}."""

        def act() -> dict[str, Any]:
            self.fetcher.check_allowed()
            return {"removed": self.fetcher.remove(short_text(name, "model"), bool(pickle_only)), "error": None}

        return answer(act)

    def choices(self) -> Any:
        """The models to choose from, as they are now."""
        machine = self.worker.machine
        if machine is None:
            return gr.skip()
        found = [(f"auto: the best that runs here ({machine.chosen})", "auto")]
        for model in machine.models:
            where = f"{model['resolution']} px" if model["present"] else "not on this machine"
            found.append((f"{model['name']} ({where})", model["name"]))
        return gr.Dropdown(choices=found)

    def strength(self, model: str) -> Any:
        """The lip strength that suits a model, for the slider."""
        machine = self.worker.machine
        name = machine.chosen if machine and model == "auto" else model
        found = [each["guidance"] for each in machine.models if each["name"] == name] if machine else []
        return found[0] if found and found[0] else gr.skip()

    def greet(self) -> tuple:
        """What is only known once the machine has been looked at."""
        self.worker.ready.wait()
        machine = self.worker.machine
        if machine is None:
            problem = f"<p class='problem'>{html.escape(self.worker.problem or '')}</p>"
            return (*[gr.skip()] * 6, problem, footer(self.worker))
        with suppress(UserError):  # the folder of --model may be gone; jobs say so
            self.worker.look_for_models()  # files may have been put there by hand
            machine = self.worker.machine
        best = machine.recommended
        stops = [gr.Button(elem_classes=["best"]) if position == best else gr.skip() for _, position in STOPS]
        return (*stops, best, self.choices(), self.strength("auto"), shown(machine.advice), footer(self.worker))

    def take_settings(self, event: gr.EventData) -> list[Any]:
        """Set the page to the settings of a job."""
        machine = self.worker.machine
        try:
            found = event._data["settings"]
            settings = as_settings(found, machine.recommended if machine else 0.0)
            if found["guidance"] is None:
                settings[-1] = self.strength(found["model"])
        except (TypeError, ValueError, KeyError, StopIteration):  # sent by something else than the page
            raise gr.Error("These are no settings of a job.", print_exception=False) from None
        return settings


# ---- files


def served_as(path: Path) -> tuple[str, str]:
    """Media type and disposition of a job's file, whose ending is of a user's choice.

    Only what a browser plays or shows as a picture is given inline; a page, or an SVG, would run scripts in ours.
    """
    kind, packed = mimetypes.guess_type(path.name)
    if kind and not packed and re.fullmatch(r"(video|audio|image)/[\w.-]+", kind):  # no +xml
        return kind, "inline"
    return "application/octet-stream", "attachment"


def logged_in(request: WebRequest) -> bool:
    """Whether a request comes from somebody who has logged in, or the page asks for no login."""
    app = request.app
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return app.auth is None or any(app.tokens.get(request.cookies.get(name)) is not None for name in names)


def routes(worker: Worker, uploads: Uploads | None = None) -> list[Route]:
    """Results, previews and the library that draws, and what is done here in place of Gradio: taking and serving
    uploads, which it would leave behind, and answering /watch, which costs it many times more."""
    uploads = uploads or Uploads()
    watching = anyio.CapacityLimiter(4)  # threads of their own: whatever else goes on, the page moves
    headers = {
        "Cache-Control": "private, no-store",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox; default-src 'none'",  # of the file, if it is opened as a page
    }

    def give(path: Path) -> Response:
        kind, disposition = served_as(path)
        return FileResponse(
            path, headers=headers, media_type=kind, filename=path.name, content_disposition_type=disposition
        )

    def job_file(request: WebRequest) -> Response:
        """A file of a job, for who knows its key; no name that is asked for ever becomes a path."""
        job: Job | None = worker.by_key(request.path_params["key"]) if logged_in(request) else None
        path = job and job.files().get(request.path_params["name"])
        if not path or not path.is_file() or path.is_symlink():
            return PlainTextResponse("There is no such file.", 404)
        return give(path)

    def picture(request: WebRequest) -> Response:
        job = worker.by_key(request.path_params["key"]) if logged_in(request) else None
        if job is None or job.picture is None:
            return PlainTextResponse("There is no such picture.", 404)
        return Response(job.picture, media_type="image/jpeg", headers=headers)

    def plotly(_: WebRequest) -> Response:
        from importlib.util import find_spec

        path = Path(find_spec("plotly").origin).parent / "package_data" / "plotly.min.js"
        return FileResponse(path, headers={"Cache-Control": "public, max-age=604800"})

    def file(request: WebRequest) -> Response:
        """An upload, a result or the example, for who knows its path; nothing else of this machine, or of another."""
        if not logged_in(request):
            return PlainTextResponse("Log in first.", 401)
        uploads.forget(lambda key: worker.by_key(key) is not None)
        if not uploads.holds(path := request.path_params["path"]):
            return PlainTextResponse("There is no such file.", 404)
        return give(Path(os.path.realpath(path)))

    async def upload(request: WebRequest) -> Response:
        """Store files; answers with their paths, as Gradio does."""
        if not logged_in(request):
            return JSONResponse({"detail": "Log in first."}, 401, {"Connection": "close"})
        progress_id, length = request.query_params.get("upload_id"), request.headers.get("content-length", "")

        def progress(name: str, part: bytes) -> None:
            file_upload_statuses.append(progress_id, name, part)

        if progress_id:
            file_upload_statuses.track(progress_id)
        try:
            declared = int(length) if length.isascii() and length.isdigit() else None
            paths = await uploads.receive(
                request.headers.get("content-type"), declared, request.stream(),
                request.client.host if request.client else "", progress if progress_id else None,
            )  # fmt: skip
            return JSONResponse([str(path) for path in paths])
        except Refused as refusal:
            return PlainTextResponse(str(refusal), refusal.status, {"Connection": "close"})
        except ClientDisconnect:
            return PlainTextResponse("The upload was given up.", 400)
        finally:
            if progress_id:
                file_upload_statuses.set_done(progress_id)

    async def watch(request: WebRequest) -> Response:
        """The endpoint /watch, as Gradio would answer it."""
        if not logged_in(request):
            return JSONResponse({"detail": "Log in first."}, 401)
        act = next(fn.fn for fn in request.app.get_blocks().fns.values() if fn.api_name == "watch")
        try:
            data = (await request.json())["data"]
        except (ValueError, TypeError, KeyError, RecursionError):
            data = None
        if not isinstance(data, list) or not 1 <= len(data) <= 3:
            return JSONResponse({"error": "Give the data: a visitor, a time, and the versions that are known."}, 400)
        found = await anyio.to_thread.run_sync(act, *data, limiter=watching)
        return JSONResponse({"data": [found], "is_generating": False})

    return [
        Route("/lipsync/plotly.min.js", plotly),
        Route("/lipsync/{key}/picture", picture),
        Route("/lipsync/{key}/{name}/{file}", job_file),
        Route("/gradio_api/file={path:path}", file),
        Route("/gradio_api/file/{path:path}", file),
        Route("/gradio_api/upload", upload, methods=["POST"]),
        Route("/gradio_api/run/watch", watch, methods=["POST"]),
    ]


def guarded(page: Page, policy: Policy) -> Callable:
    """The part of the server's life that puts the guard around all of it, and cleans up while it lasts."""

    @asynccontextmanager
    async def lifespan(server: Any) -> AsyncIterator[None]:
        policy.is_upload, policy.check_call = page.uploads.holds, page.check_call
        policy.logged_in = lambda scope: logged_in(WebRequest(scope | {"app": server}))
        server.middleware_stack = Guard(server.middleware_stack, policy)

        async def clean() -> None:
            while True:
                await anyio.sleep(CLEANING_SECONDS)
                try:
                    await anyio.to_thread.run_sync(page.uploads.forget, page.has_job)
                    await anyio.to_thread.run_sync(page.uploads.sweep)
                except OSError as error:
                    log(f"Old uploads cannot be removed: {error}")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(clean)
            yield
            tasks.cancel_scope.cancel()

    return lifespan


# ---- serving


def theme() -> gr.themes.Base:
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal, neutral_hue=gr.themes.colors.slate, radius_size=gr.themes.sizes.radius_md,
        font=sans, font_mono=["ui-monospace", "Consolas", "monospace"],
    ).set(
        body_background_fill="#f5f7f8", body_background_fill_dark="#0f1417",
        block_background_fill="#ffffff", block_background_fill_dark="#171e22",
        block_border_color="#dfe5e8", block_border_color_dark="#28323a",
        button_secondary_background_fill="#ffffff", button_secondary_background_fill_dark="#1d262b",
        button_secondary_background_fill_hover="#eef3f4", button_secondary_background_fill_hover_dark="#243038",
        button_secondary_border_color="#d5dde1", button_secondary_border_color_dark="#33404a",
        button_secondary_text_color="#17212b", button_secondary_text_color_dark="#e8eef1",
        button_border_width="1px", input_background_fill="#f5f7f8", input_background_fill_dark="#10171a",
        block_label_background_fill="transparent", block_label_background_fill_dark="transparent",
        button_primary_background_fill="#0f766e", button_primary_background_fill_dark="#14897f",
        button_primary_background_fill_hover="#0b5f59", button_primary_background_fill_hover_dark="#17a093",
        button_primary_text_color="#ffffff", button_primary_text_color_dark="#ffffff",
        slider_color="#0f766e", slider_color_dark="#2bb3a6",
    )  # fmt: skip


class Parser(argparse.ArgumentParser):
    """One that says what is wrong with an option in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message[0].upper()}{message[1:]}: see --help.\n")


def byte_size(text: str) -> int:
    """Bytes of a size as 500mb. Raises ArgumentTypeError."""
    found = re.fullmatch(r"([0-9]{1,12})\s*(b|kb|mb|gb|tb)?", text.strip().lower(), re.ASCII)
    if not found or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no size, as 500mb or 2gb are")
    return int(found[1]) * 1024 ** ("b", "kb", "mb", "gb", "tb").index(found[2] or "b")


def host(text: str) -> str:
    """A host, as gpu.example or gpu.example:8443. Raises ArgumentTypeError."""
    if split_host(text)[0] is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no host, as gpu.example or gpu.example:8443 are")
    return text


def parser() -> argparse.ArgumentParser:
    def from_environment(name: str) -> str | None:
        return os.environ.get(name) or None

    yes = (from_environment("GRADIO_SHARE") or "").lower() in ("1", "true", "yes")
    found = Parser(prog="app.py", description="Open the page.")
    found.add_argument("--share", action="store_true", default=yes, help="a public link; asks for a login, see --auth")
    found.add_argument(
        "--auth", metavar="NAME:PASSWORD[,…]", help="who may log in, which lists of processes show: see --auth-file; "
        "with --share and without either, a login is made up",
    )  # fmt: skip
    found.add_argument(
        "--auth-file", type=Path, metavar="FILE", help="who may log in, a line NAME:PASSWORD each; the variable "
        "LATENTSYNC_AUTH takes NAME:PASSWORD, too",
    )  # fmt: skip
    found.add_argument("--no-auth", action="store_true", help="no login, even with --share")
    found.add_argument("--server-name", default=from_environment("GRADIO_SERVER_NAME"), help="default 127.0.0.1")
    found.add_argument(
        "--server-port", type=between(int, 1, 65535), default=from_environment("GRADIO_SERVER_PORT"), metavar="PORT",
        help="default: from 7860 on",
    )  # fmt: skip
    found.add_argument("--root-path", default=from_environment("GRADIO_ROOT_PATH"), help="where a proxy has the page")
    found.add_argument(
        "--allow-host", type=host, action="append", metavar="NAME[:PORT]", help="another name of this server, as that "
        "of a proxy in front of it; can be given several times (or the variable LATENTSYNC_ALLOW_HOST, with commas)",
    )  # fmt: skip
    found.add_argument(
        "--queue-size", type=between(int, 1, 10_000), default=20, metavar="JOBS", help="that may wait (default 20)"
    )
    found.add_argument(
        "--max-seconds", type=between(float, 0.1, 1e6), metavar="S",
        help=f"of sound a job ({PUBLIC_SECONDS:.0f} with --share)",
    )  # fmt: skip
    found.add_argument(
        "--max-upload", type=byte_size, metavar="SIZE", help=f"of a file, as 500mb ({PUBLIC_UPLOAD} with --share)"
    )
    found.add_argument(
        "--keep-hours", type=between(float, 0, 1e6), metavar="H",
        help=f"then results are deleted ({PUBLIC_HOURS:.0f} with --share)",
    )  # fmt: skip
    found.add_argument("--outputs", type=Path, default=ROOT / "outputs", metavar="FOLDER", help="of the results")
    found.add_argument("--model", default="auto", help="what 'auto' means on the page: a name, or a checkpoint folder")
    found.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    found.add_argument(
        "--get", metavar="NAME", default=from_environment("LATENTSYNC_GET"),
        help="fetch this released model while the page is served, unless it is there (or the variable LATENTSYNC_GET)",
    )  # fmt: skip
    found.add_argument(
        "--allow-download",
        action="store_true",
        help="let visitors fetch and remove models, even with --share, or without a login beyond this machine",
    )
    found.add_argument(
        "--idle-minutes", type=between(float, 0, 1e6), default=10, metavar="M",
        help="until the model is unloaded (default 10)",
    )  # fmt: skip
    found.add_argument("--no-open", action="store_true", help="do not open the page in a browser")
    found.add_argument("--version", action="version", version=__version__)
    return found


def has_desktop() -> bool:
    """Whether a browser that is opened here is likely to be seen."""
    if sys.platform in ("win32", "darwin"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")) and "SSH_CONNECTION" not in os.environ


def on_loopback(name: str | None) -> bool:
    """Whether a server of that name can be reached from its own machine alone."""
    address = as_address((name or "").strip("[]"))
    return name in (None, "localhost") or (address is not None and address.is_loopback)


def wait_for_signal() -> None:
    """Wait for a signal that has a handler, and let that run.

    The system may give a signal to another thread, and the main thread, which alone runs handlers, would sleep on. So
    it waits for what Python writes to a socket in whichever thread a signal arrives. To be called in the main thread.
    """
    receiver, sender = socket.socketpair()
    with receiver, sender:
        sender.setblocking(False)
        before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        try:
            receiver.recv(1)
        finally:
            signal.set_wakeup_fd(before)


def bracketed(name: str | None) -> str | None:
    """A name to serve at as addresses of pages have it: IPv6 in brackets."""
    return f"[{name}]" if name and isinstance(as_address(name), IPv6Address) else name


def logins(args: argparse.Namespace, public: bool) -> list[tuple[str, str]] | None:
    """Names and passwords; made up for a public link, unless a login is refused explicitly. Raises UserError."""
    if args.no_auth:
        return None
    if args.auth:
        return parse_accounts(args.auth, "--auth")
    if args.auth_file:
        return read_accounts(args.auth_file)
    if (found := os.environ.get("LATENTSYNC_AUTH")) is not None:
        return parse_accounts(found, "The variable LATENTSYNC_AUTH")
    if public:
        login = ("lipsync", secrets.token_urlsafe(9))
        print(f"Log in as '{login[0]}', password '{login[1]}' (--auth sets another, --no-auth none).", flush=True)
        return [login]
    return None


def main(arguments: list[str] | None = None) -> int:
    """Serve the page until interrupted; returns the exit code."""
    args = parser().parse_args(arguments)
    public = args.share or "SPACE_ID" in os.environ
    on_zero_gpu = spaces is not None and "SPACES_ZERO_GPU" in os.environ

    def unless_given(value: Any, otherwise: Any) -> Any:
        return value if value is not None else otherwise if public else None

    try:
        auth = logins(args, args.share)
        allowed = [*(args.allow_host or []), *filter(None, os.environ.get("LATENTSYNC_ALLOW_HOST", "").split(","))]
        policy = policy_for(args.server_name, [each.strip() for each in allowed], dict(os.environ), args.root_path)
        if args.get and args.get not in RELEASES:
            raise UserError(f"There is no model '{args.get}' to fetch: give --get one of {', '.join(RELEASES)}.")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    open_to_all = auth is None and not on_loopback(args.server_name)
    if open_to_all and not public:
        print(
            f"Whoever reaches {args.server_name} in the network can use this page without a login: --auth sets one, "
            "--max-seconds, --max-upload and --keep-hours set limits. Models are fetched with --get, or with "
            "--allow-download by anybody.",
            flush=True,
        )
    worker = Worker(
        args.outputs.absolute(),
        args.queue_size,
        unless_given(args.max_seconds, PUBLIC_SECONDS),
        args.model,
        args.device,
        60 * args.idle_minutes,
        unless_given(args.keep_hours, PUBLIC_HOURS),
        spaces.GPU(duration=GPU_SECONDS)(run_alone) if on_zero_gpu else None,
        SHARED_LIMITS if public or open_to_all else NO_LIMITS,
    )
    fetcher = Fetcher(worker, args.allow_download or not (public or open_to_all))
    most = unless_given(args.max_upload, byte_size(PUBLIC_UPLOAD))
    limits = Limits(most)
    if public or open_to_all:
        limits = Limits(most, 16, 8, most and PUBLIC_STORED * most, PUBLIC_UNUSED_SECONDS)
    page = Page(worker, fetcher)
    page.uploads = uploads = Uploads(limits=limits)
    policy.throttle = Throttle() if auth else None
    remove_orphans()

    interrupt_on_signals()  # so that a server that is ended by one cleans up as an interrupted one does
    try:
        launched = page.blocks.launch(
            share=args.share, auth=checker(auth) if auth else None, server_name=bracketed(args.server_name),
            server_port=args.server_port, root_path=args.root_path, max_file_size=most, enable_monitoring=False,
            allowed_paths=[str(path) for path in EXAMPLE], blocked_paths=[str(args.outputs.absolute())],
            app_kwargs={"routes": routes(worker, uploads), "lifespan": guarded(page, policy)},
            theme=theme(), css_paths=[ROOT / "assets" / "page.css"], footer_links=["api"], run_history=False,
            inbrowser=not args.no_open and has_desktop(), prevent_thread_lock=True, show_error=True, ssr_mode=False,
        )  # fmt: skip
        if args.share and launched[2]:
            policy.add(urlsplit(launched[2]).netloc)
        # As Gradio has it on Windows; its loop of 1 ms elsewhere takes 5 % of a core from the jobs.
        page.blocks._queue.sleep_when_free = 0.05
        try:
            worker.start()
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
        if args.get:
            fetcher.start(args.get)
        wait_for_signal()
        return 0
    except KeyboardInterrupt:  # the way to end a server
        return 0
    except OSError as error:
        print(f"The page cannot be served ({error}): name another port with --server-port.", file=sys.stderr)
        return 2
    finally:
        fetcher.close()
        worker.close()
        page.blocks.close(verbose=False)
        if OWN_TEMP:
            shutil.rmtree(OWN_TEMP, ignore_errors=True)


if __name__ == "__main__":
    from latentsync.__main__ import leave

    leave(main())
