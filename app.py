"""The page: `python app.py` opens it. Inputs and buttons are Gradio's; assets/page/*.js draws what moves.

Jobs run in the thread of `optim.serving.worker.Worker`. torch is not imported before the page is shown. Every action is
an endpoint with a name (`optim.serving.endpoints`), for `gradio_client` as for the page's own scripts (docs/api.md).
"""

import functools
import html
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr

from latentsync.errors import UserError
from latentsync.options import interrupt_on_signals, log_to_stderr
from optim.levels import STOPS
from optim.serving.calls import CallCheck
from optim.serving.endpoints import BUSY, Endpoints
from optim.serving.fetcher import Fetcher
from optim.serving.form import NAMES, SETTINGS, Dropdown, Setting, Slider, page_values, parse_settings
from optim.serving.limits import NO_LIMITS, SHARED_LIMITS
from optim.serving.login import Throttle, password_checker
from optim.serving.markup import ASSETS, advice_html, asset, footer_html
from optim.serving.options import bracketed, has_desktop, parse_options, wait_for_signal
from optim.serving.policy import Policy, policy_for
from optim.serving.routes import guarded, routes
from optim.serving.run import run_alone
from optim.serving.uploads import Limits, Uploads, make_folder, remove_orphans
from optim.serving.worker import Worker

ROOT = Path(__file__).resolve().parent
EXAMPLE = (ASSETS / "example" / "face.mp4", ASSETS / "example" / "speech.wav")
# The page's scripts, which share one scope: Gradio runs them as the body of one function.
SCRIPTS = ("basics", "server", "plots", "result", "cards", "models", "uploads", "theme", "main")
PUBLIC_STORED = 20  # uploads of the largest size that a public server holds before they are jobs
PUBLIC_UNUSED_SECONDS = 3600.0  # until an upload to a public server is deleted that no job has used
GPU_SECONDS = 240  # of ZeroGPU that a job may ask for


def control(setting: Setting) -> Any:
    """The Gradio component of a setting."""
    kind = setting.control
    common = {"value": setting.default, "label": setting.label, "elem_id": setting.name, "info": setting.info or None}
    if isinstance(kind, Slider):
        return gr.Slider(kind.low, kind.high, step=kind.step, **common)
    if isinstance(kind, Dropdown):
        return gr.Dropdown(list(kind.choices), **common)
    return gr.Number(precision=0, minimum=kind.low, maximum=kind.high, **common)


def track_dropdown(reply: dict[str, Any]) -> Any:
    """The choice of a file's track, shown where there are several; reply: of `check_video` or `measure`."""
    choices = [(each["label"], each["number"]) for each in reply.get("tracks", [])]
    several = len(choices) > 1
    return gr.Dropdown(choices, value=reply["track"] if several else None, visible=several)


def raises_gradio_error(fn: Callable) -> Callable:
    """Let a function raise Gradio's error, which the page and clients show, in place of UserError."""

    @functools.wraps(fn)
    def call(*args: Any) -> Any:
        try:
            return fn(*args)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return call


class Page:
    """The Blocks, and the endpoints under their names.

    uploads_stay: whether uploads outlive this server, as in a folder that GRADIO_TEMP_DIR names.
    """

    def __init__(self, api: Endpoints, uploads_stay: bool = True):
        self.api, self.worker = api, api.worker
        self._controls: dict[str, Any] = {}
        with gr.Blocks(title="LatentSync", analytics_enabled=False, delete_cache=(3600, 86400)) as self.blocks:
            gr.HTML(asset("header.html"))
            with gr.Row(elem_id="columns", equal_height=False):
                with gr.Column(scale=5, min_width=320, elem_id="inputs"):
                    self._build_inputs()
                    self._build_advanced()
                with gr.Column(scale=7, min_width=320, elem_id="outputs"):
                    scripts = "\n".join(asset(f"{name}.js") for name in SCRIPTS)
                    self.live = gr.HTML(asset("live.html"), js_on_load=scripts, elem_id="live")
                    with gr.Accordion("Doctor: what would make this machine faster", open=False, elem_id="doctor"):
                        self.advice = gr.HTML("<p class='quiet'>Looking at this machine …</p>")
            self.footer = gr.HTML(footer_html(None))
            self.settings = [self._controls[name] for name in NAMES]
            self._wire(uploads_stay)

    # ---- components

    def _add(self, name: str) -> Any:
        """Place the control of a setting here."""
        self._controls[name] = control(SETTINGS[NAMES.index(name)])
        return self._controls[name]

    def _build_inputs(self) -> None:
        self.video = gr.Video(
            label="Video or picture of a face",
            sources=["upload", "webcam"],
            elem_id="video",
            include_audio=True,
            webcam_options=gr.WebcamOptions(mirror=False),
        )
        self.video_track = gr.Dropdown([], label="Video track", visible=False, elem_id="video-track")
        self.audio = gr.Audio(label="Voice", sources=["upload", "microphone"], type="filepath", elem_id="audio")
        self.audio_track = gr.Dropdown([], label="Sound track", visible=False, elem_id="audio-track")
        with gr.Column(elem_id="speed", variant="panel"):
            self.level = self._add("level")
            with gr.Row(elem_id="stops"):
                self.stops = [
                    gr.Button(stop.name.capitalize(), size="sm", elem_id=f"stop-{i}", min_width=60)
                    for i, stop in enumerate(STOPS)
                ]
            line = "<p id='line' role='status'>Looking at this machine …</p>"
            self.line = gr.HTML(line, elem_id="line-box", padding=False)
        self.start = gr.Button("Lip-sync", variant="primary", size="lg", elem_id="start")
        self.example = gr.Button("Try it with the example", size="md", elem_id="example")

    def _build_advanced(self) -> None:
        with gr.Accordion("Advanced", open=False, elem_id="advanced"):
            self.model = self._add("model")
            gr.HTML(asset("models.html"), padding=False)
            for names in (
                ("steps", "guidance"),
                ("face", "crf"),
                ("seed", "batch"),
                ("deepcache", "compile"),
                ("fps", "silence_gate"),
                ("vram_fraction",),
            ):
                with gr.Row():
                    for name in names:
                        self._add(name)
            self.details = gr.HTML("<p id='details'></p>", elem_id="details-box", padding=False)

    # ---- events

    def _wire(self, uploads_stay: bool) -> None:
        api, settings, tracks = self.api, self.settings, [self.video_track, self.audio_track]
        visitor = gr.Textbox("", visible=False, label="visitor")
        job, name = (gr.Textbox(visible=False, label=label) for label in ("job", "name"))
        seconds, video_fps, video_track, audio_track, guidance = (
            gr.Number(visible=False, label=label)
            for label in ("seconds", "video_fps", "video_track", "audio_track", "guidance")
        )
        since = gr.Number(visible=False, label="since", value=0)
        reply, changes, known = (gr.JSON(visible=False, label=label) for label in ("reply", "settings", "known"))
        keep, compared, pickle_only = (
            gr.Checkbox(visible=False, label=label) for label in ("keep", "compared", "pickle_only")
        )
        task = gr.Textbox("get", visible=False, label="task")
        file = gr.File(visible=False, label="file")

        # Values come as they were sent, to functions that refuse wrong ones with a sentence, as Gradio would not.
        plain: dict[str, Any] = {"queue": False, "show_progress": "hidden", "preprocess": False}
        private = plain | {"api_visibility": "private"}
        submit, describe = api.probing(api.submit), api.when_ready(api.describe)
        measure, check_video = api.probing(api.measure, (None, BUSY)), api.probing(api.check_video)

        async def look_at_audio(audio: Any, track: Any = None) -> tuple:
            length, reply = await measure(audio, track)
            return length, reply, track_dropdown(reply)

        async def look_at_video(video: Any, track: Any = None) -> tuple:
            reply = await check_video(video, track)
            return reply.get("fps"), reply, track_dropdown(reply)

        show_reply = {"fn": None, "inputs": reply, "js": "(reply) => window.lipsync.onReply(reply)"}
        mark_stop = {
            "fn": None,
            "inputs": self.level,
            "js": f"(level) => window.lipsync?.markStop({[stop.position for stop in STOPS]}.indexOf(level))",
        }
        show_meaning = {
            "fn": describe,
            "inputs": [*settings, seconds, video_fps],
            "outputs": [self.line, self.details],
            "api_name": "meaning",
            **private,
        }
        inputs = [self.video, self.audio, *settings, visitor, *tracks]
        start = {
            "fn": submit,
            "inputs": inputs,
            "outputs": reply,
            "api_name": "press",
            "js": f"(...values) => {{ values[{inputs.index(visitor)}] = window.lipsync.visitor; return values; }}",
            **private,
        }
        self.start.click(**start).then(**show_reply)
        example = self.example.click(lambda: tuple(map(str, EXAMPLE)), None, inputs[:2], **plain, api_name="example")
        example.then(**start).then(**show_reply)

        # A new file has tracks of its own: the number of an old one's must not be sent with it.
        gr.on([self.video.change, self.example.click], None, None, self.video_track, js="() => null")
        gr.on([self.audio.change, self.example.click], None, None, self.audio_track, js="() => null")
        seen_audio = {"fn": look_at_audio, "outputs": [seconds, reply, self.audio_track], **private}
        seen_video = {"fn": look_at_video, "outputs": [video_fps, reply, self.video_track], **private}
        sound = [self.audio, self.audio_track]
        self.audio.change(inputs=self.audio, **seen_audio).then(**show_reply).then(**show_meaning)
        self.audio_track.input(inputs=sound, **seen_audio).then(**show_reply).then(**show_meaning)
        film = [self.video, self.video_track]
        self.video.change(inputs=self.video, **seen_video).then(**show_reply).then(**show_meaning)
        self.video_track.input(inputs=film, **seen_video).then(**show_reply).then(**show_meaning)

        gr.on([setting.change for setting in settings], **show_meaning, trigger_mode="always_last")
        self.level.change(**mark_stop)
        for button, stop in zip(self.stops, STOPS, strict=True):
            button.click(None, None, self.level, js=f"() => {stop.position}")
        self.model.input(self.guidance_of, self.model, self._controls["guidance"], **private)

        # Events of the page's scripts: there is another model; a job has shown how fast this machine is; the settings
        # of a job are to be shown; another server runs, and the uploads went with the one before.
        self.live.input(self.model_dropdown, None, self.model, **private).then(**show_meaning)
        self.live.submit(**show_meaning)
        self.live.select(self.show_settings, None, settings, **private)
        if not uploads_stay:
            self.live.clear(None, inputs[:2], inputs[:2], js="(...files) => window.lipsync.dropFiles(files)")
        loaded = [*self.stops, self.level, self.model, self._controls["guidance"], self.advice, self.footer]
        self.blocks.load(api.when_ready(self.on_load), None, loaded, **private).then(**mark_stop).then(**show_meaning)

        # The page always says how strong the lips are; who calls an endpoint may leave that to the model.
        by_name = [guidance if name == "guidance" else self._controls[name] for name in NAMES]
        endpoints: dict[str, tuple[Callable, list, Any]] = {
            "submit": (submit, [*inputs[:2], *by_name, visitor, video_track, audio_track], reply),
            "describe": (describe, [*by_name, seconds, video_fps], [self.line, self.details]),
            "measure": (measure, [self.audio, audio_track], [seconds, reply]),
            "check_video": (check_video, [self.video, video_track], reply),
            "watch": (api.watch, [visitor, since, known], reply),
            "cancel": (api.cancel, [job, keep, visitor], reply),
            "again": (api.again, [job, changes, visitor], reply),
            "remove": (api.remove, [job, visitor], reply),
            "compare": (api.compare, [job, visitor], reply),
            "result": (raises_gradio_error(api.result), [job, visitor, compared], file),
            "machine": (api.when_ready(api.machine), [], reply),
            "models": (api.when_ready(api.models), [], reply),
            "fetch": (api.fetch, [name, task], reply),
            "stop_fetching": (api.stop_fetching, [], reply),
            "remove_model": (api.remove_model, [name, pickle_only], reply),
        }
        for api_name, (fn, parameters, outputs) in endpoints.items():
            gr.Button(visible=False).click(fn, parameters, outputs, api_name=api_name, **plain)

    # ---- what only the page asks for

    def on_load(self) -> tuple:
        """What is only known once the machine has been looked at."""
        with suppress(UserError):  # the folder of --model may be gone; jobs say so
            self.worker.find_models()  # files may have been put there by hand
        machine = self.worker.machine
        if machine is None:
            problem = f"<p class='problem'>{html.escape(self.worker.problem or '')}</p>"
            return (*[gr.skip()] * (len(STOPS) + 3), problem, footer_html(None))
        best = machine.recommended
        stops = [gr.Button(elem_classes=["best"]) if stop.position == best else gr.skip() for stop in STOPS]
        model, guidance = self.model_dropdown(), self.guidance_of("auto")
        return (*stops, best, model, guidance, advice_html(machine.advice), footer_html(machine))

    def model_dropdown(self) -> Any:
        """The models to choose from, as they are now."""
        machine = self.worker.machine
        if machine is None:
            return gr.skip()
        choices = [(f"auto: the best that runs here ({machine.chosen})", "auto")]
        for model in machine.models:
            where = f"{model['resolution']} px" if model["present"] else "not on this machine"
            choices.append((f"{model['name']} ({where})", model["name"]))
        return gr.Dropdown(choices=choices)

    def guidance_of(self, model: str) -> Any:
        """The lip strength that suits a model, for the slider."""
        machine = self.worker.machine
        name = machine.chosen if machine and model == "auto" else model
        models = machine.models if machine else ()
        return next((each["guidance"] for each in models if each["name"] == name), None) or gr.skip()

    @raises_gradio_error
    def show_settings(self, event: gr.EventData) -> list[Any]:
        """Set the page to the settings of a job."""
        machine = self.worker.machine
        try:
            fields = event._data["settings"]
            values = page_values(fields, machine.recommended if machine else 0.0)
            parse_settings(values, self.api.models_to_choose)
        except (TypeError, ValueError, KeyError):  # sent by something else than the page
            raise UserError("These are no settings of a job.") from None
        if values["guidance"] is None:
            values["guidance"] = self.guidance_of(values["model"])
        return list(values.values())


# ---- serving


@contextmanager
def upload_folder() -> Iterator[tuple[Path, bool]]:
    """The folder of uploads, and whether it stays: GRADIO_TEMP_DIR, or one of this server alone that goes with it."""
    if "GRADIO_TEMP_DIR" in os.environ:
        yield Path(os.environ["GRADIO_TEMP_DIR"]), True
        return
    remove_orphans()
    folder = make_folder()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    try:
        yield folder, False
    finally:
        del os.environ["GRADIO_TEMP_DIR"]
        shutil.rmtree(folder, ignore_errors=True)


def lent_gpu() -> Callable | None:
    """`run_alone` on a GPU that Hugging Face's ZeroGPU lends for each call; None elsewhere."""
    if "SPACES_ZERO_GPU" not in os.environ:
        return None
    try:
        import spaces
    except ImportError:
        return None
    return spaces.GPU(duration=GPU_SECONDS)(run_alone)


def make_worker(options: Namespace) -> Worker:
    return Worker(
        options.outputs.absolute(),
        options.queue_size,
        options.max_seconds,
        options.model,
        options.device,
        60 * options.idle_minutes,
        options.keep_hours,
        lent_gpu(),
        SHARED_LIMITS if options.shared else NO_LIMITS,
    )


def make_uploads(folder: Path, options: Namespace) -> Uploads:
    largest = options.max_upload
    if not options.shared:
        return Uploads(folder, Limits(largest))
    return Uploads(folder, Limits(largest, 16, 8, largest and PUBLIC_STORED * largest, PUBLIC_UNUSED_SECONDS))


def main(arguments: list[str] | None = None, prog: str = "app.py") -> int:
    """Serve the page until interrupted; returns the exit code."""
    try:
        options = parse_options(arguments, ROOT / "outputs", prog)
        policy = policy_for(options.server_name, options.hosts, dict(os.environ), options.root_path)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if options.shared and not options.public:
        print(
            f"Whoever reaches {options.server_name} in the network can use this page without a login: --auth sets one, "
            "--max-seconds, --max-upload and --keep-hours set limits. Models are fetched with --get, or with "
            "--allow-download by anybody.",
            flush=True,
        )
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # no file and no word leaves the machine
    with upload_folder() as (folder, uploads_stay):
        worker = make_worker(options)
        fetcher = Fetcher(worker, options.allow_download)
        api = Endpoints(worker, fetcher, make_uploads(folder, options))
        page = Page(api, uploads_stay)
        policy.check_call = CallCheck(page.blocks)
        policy.throttle = Throttle() if options.accounts else None
        interrupt_on_signals()  # so that a server that is ended by one cleans up as an interrupted one does
        try:
            serve(page, options, policy)
            return 0
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
        except KeyboardInterrupt:  # the way to end a server
            return 0
        except OSError as error:
            print(f"The page cannot be served ({error}): name another port with --server-port.", file=sys.stderr)
            return 2
        finally:
            fetcher.close()
            worker.close()
            page.blocks.close(verbose=False)


def serve(page: Page, options: Namespace, policy: Policy) -> None:
    """Serve the page until a signal ends it. Raises UserError, OSError, and what the signal's handler raises."""
    launched = page.blocks.launch(
        share=options.share,
        auth=password_checker(options.accounts) if options.accounts else None,
        server_name=bracketed(options.server_name),
        server_port=options.server_port,
        root_path=options.root_path,
        max_file_size=options.max_upload,
        enable_monitoring=False,
        allowed_paths=[str(path) for path in EXAMPLE],
        blocked_paths=[str(options.outputs.absolute())],
        app_kwargs={"routes": routes(page.api), "lifespan": guarded(page.api, policy)},
        theme=theme(),
        css_paths=[ASSETS / "page.css"],
        footer_links=["api"],
        run_history=False,
        inbrowser=not options.no_open and has_desktop(),
        prevent_thread_lock=True,
        show_error=True,
        ssr_mode=False,
    )
    if options.share and launched[2]:
        policy.add(urlsplit(launched[2]).netloc)
    # As Gradio has it on Windows; its loop of 1 ms elsewhere takes 5 % of a core from the jobs.
    page.blocks._queue.sleep_when_free = 0.05
    page.api.worker.start()
    if options.get:
        page.api.fetcher.start(options.get)
    wait_for_signal()


def theme() -> gr.themes.Base:
    """The fonts and shapes of Gradio's parts; their colours are in page.css."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )


if __name__ == "__main__":
    from latentsync.__main__ import leave

    log_to_stderr()
    leave(main())
