"""The page: `python app.py` opens it. Inputs and buttons are Gradio's; assets/page/*.js draws what moves.

Jobs run in the threads of `optim.serving.worker.Worker`. torch is not imported before the page is shown. Every action
is an endpoint with a name (`optim.serving.endpoints`), for `gradio_client` as for the page's own scripts (docs/api.md).
"""

import html
import json
import os
import sys
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr

from latentsync import FPS
from latentsync.errors import UserError
from latentsync.options import interrupt_on_signals, log_to_stderr
from optim.levels import STOPS
from optim.serving.calls import CallCheck
from optim.serving.clients import wire_clients
from optim.serving.controls import control, track_dropdown
from optim.serving.endpoints import Endpoints, as_reply, visitor_token
from optim.serving.fetcher import Fetcher
from optim.serving.form import NAMES, SETTINGS, page_values, parse_settings, parse_text
from optim.serving.login import Throttle, password_checker
from optim.serving.markup import ASSETS, advice_html, asset, audio_note, footer_html, head_html, video_note
from optim.serving.mcp_tools import McpTools
from optim.serving.options import bracketed, has_desktop, parse_options, wait_for_signal
from optim.serving.other_faces import DESCRIBE, FACE_CLICK, OtherFaces, spoken
from optim.serving.policy import Policy, policy_for
from optim.serving.preview_endpoint import preview_button, wire_preview
from optim.serving.routes import guarded, routes
from optim.serving.setup import make_uploads, make_worker, upload_folder
from optim.serving.timeline import timeline_figure

ROOT = Path(__file__).resolve().parent
EXAMPLE = ASSETS / "example"
# Label and picture of a button, and the field that it fills with a file.
EXAMPLES = (
    ("Face one", EXAMPLE / "face.jpg", "video", EXAMPLE / "face.mp4"),
    ("Face two", EXAMPLE / "portrait-two.jpg", "video", EXAMPLE / "portrait-two.jpg"),
    ("Voice one", None, "audio", EXAMPLE / "speech.wav"),
    ("Voice two", None, "audio", EXAMPLE / "speech-two.wav"),
)
PLAIN: dict[str, Any] = {"queue": False, "show_progress": "hidden", "preprocess": False}
PRIVATE = PLAIN | {"api_visibility": "private"}
WITH_VISITOR = "(...values) => values.with({}, window.lipsync.visitor)"
LOOKING = """(file, ...faces) => [null, file ? "<p class='quiet'>Looking at this file …</p>" : "",
  ...faces.map((face) => /,/.test(face) ? "largest" : face)]"""
# The page's scripts, which share one scope: Gradio runs them as the body of one function.
SCRIPTS = ("basics", "server", "plots", "result", "cards", "outside", "models", "uploads", "one_frame", "theme", "main")


def plain_html(name: str, **options: Any) -> gr.HTML:
    """A file of the page's own, without Gradio's looks for text."""
    return gr.HTML(asset(name), apply_default_css=False, **options)


class Page:
    """The Blocks, and the endpoints under their names.

    uploads_stay: whether uploads outlive this server, as in a folder that GRADIO_TEMP_DIR names.
    """

    def __init__(self, api: Endpoints, uploads_stay: bool = True):
        self.api, self.worker = api, api.worker
        self._controls: dict[str, Any] = {}
        with gr.Blocks(title="LatentSync", analytics_enabled=False, delete_cache=(3600, 86400)) as self.blocks:
            plain_html("header.html")
            with gr.Row(elem_id="columns", equal_height=False):
                with gr.Column(scale=5, min_width=320, elem_id="inputs"):
                    self._build_inputs()
                    self._build_advanced()
                with gr.Column(scale=7, min_width=320, elem_id="outputs"):
                    self.one_frame = gr.HTML("", elem_id="preview-box", apply_default_css=False)
                    scripts = "\n".join(asset(f"{name}.js") for name in SCRIPTS)
                    self.live = plain_html("live.html", js_on_load=scripts, elem_id="live")
                    self.timeline = gr.Plot(visible=False, show_label=False, elem_id="timeline")
                    with gr.Accordion("Doctor: what would make this machine faster", open=False, elem_id="doctor"):
                        self.advice = gr.HTML("<p class='quiet'>Looking at this machine …</p>")
            self.footer = gr.HTML(footer_html(None), apply_default_css=False)
            self.settings = [self._controls[name] for name in NAMES]
            # What this browser keeps of the settings. The key is no secret: nothing in them is.
            self.saved = gr.BrowserState(None, storage_key="latentsync-settings", secret="latentsync")  # noqa: S106
            self._wire_files()
            self._wire_settings()
            self._wire_live(uploads_stay)
            wire_clients(api, self.blocks)

    # ---- components

    def _add(self, name: str) -> Any:
        """Place the control of a setting here."""
        return self._controls.setdefault(name, control(SETTINGS[NAMES.index(name)]))

    def _build_inputs(self) -> None:
        self.video = gr.Video(
            label="Video or picture of a face",
            sources=["upload", "webcam"],
            elem_id="video",
            include_audio=True,
            buttons=[],
            webcam_options=gr.WebcamOptions(mirror=False),
        )
        with gr.Row(elem_id="video-facts", equal_height=False):
            self.video_note = gr.HTML("", elem_id="video-note", js_on_load=FACE_CLICK, apply_default_css=False)
            self.preview = gr.Button("Preview one frame", size="sm", elem_id="preview", visible=False)
        self.video_track = gr.Dropdown([], label="Video track", visible=False, elem_id="video-track")
        # Gradio's own player has times of too little contrast, and a waveform that the keyboard cannot scroll.
        player = gr.WaveformOptions(show_recording_waveform=False)
        sources: list[Any] = ["upload", "microphone"]
        self.audio = gr.Audio(
            label="Voice", sources=sources, type="filepath", elem_id="audio", buttons=[], waveform_options=player
        )
        self.audio_note = gr.HTML("", elem_id="audio-note", apply_default_css=False)
        self.audio_track = gr.Dropdown([], label="Sound track", visible=False, elem_id="audio-track")
        with gr.Column(elem_id="speed", variant="panel"):
            self.level = self._add("level")
            with gr.Row(elem_id="stops"):
                self.stops = [
                    gr.Button(stop.name.capitalize(), size="sm", elem_id=f"stop-{i}", min_width=60)
                    for i, stop in enumerate(STOPS)
                ]
        self.start = gr.Button("Lip-sync", variant="primary", size="lg", elem_id="start")
        line = "<p id='line' role='status'>Looking at this machine …</p>"
        gr.HTML("<p id='start-note' role='status'></p>", apply_default_css=False)
        self.line = gr.HTML(line, elem_id="line-box", apply_default_css=False)
        with gr.Row(elem_id="examples"):
            gr.HTML("<p class='quiet'>Examples:</p>", apply_default_css=False)
            fields, looks = {"video": self.video, "audio": self.audio}, {"size": "sm", "elem_classes": ["example"]}
            self.examples = [
                (gr.Button(label, icon=icon, min_width=60, **looks), fields[kind], path)
                for label, icon, kind, path in EXAMPLES
            ]
        self.others = OtherFaces(player)
        with gr.Accordion("More voices for this video", open=False, elem_id="more"):
            self.more = gr.File(
                label="One job for each of them", file_count="multiple", file_types=["audio", "video"], height=120,
                elem_id="more-voices",
            )  # fmt: skip

    def _build_advanced(self) -> None:
        with gr.Accordion("Advanced", open=False, elem_id="advanced"):
            self.model = self._add("model")
            pairs = "steps guidance", "face crf", "seed batch", "deepcache compile", "fps paint"
            for names in (*pairs, "silence_gate match_colours", "vram_fraction"):
                with gr.Row():
                    for name in names.split():
                        self._add(name)
            self._add("restore").visible = self.worker.restorer is not None
            self.details = gr.HTML("<p id='details'></p>", elem_id="details-box", apply_default_css=False)
            plain_html("models.html")

    # ---- events. Values come as they were sent, to functions that refuse wrong ones with a sentence.

    def _wire_files(self) -> None:
        """The fields of files, their notes, examples, and the start of a job."""
        api, settings = self.api, self.settings
        self.visitor = gr.Textbox("", visible=False, label="visitor")
        self.reply = gr.JSON(visible=False, label="reply")
        self.seconds, self.video_fps = (gr.Number(visible=False, label=label) for label in ("seconds", "video_fps"))
        measure, check_video = as_reply(api.probing(api.measure)), as_reply(api.probing(api.check_video))
        press = as_reply(api.probing(self.press))

        async def look_at_audio(audio: Any, track: Any = None) -> tuple:
            reply = await measure(audio, track) if audio else {}
            return reply.get("seconds"), audio_note(reply), track_dropdown(reply)

        async def look_at_video(video: Any, track: Any = None) -> tuple:
            reply = await check_video(video, track) if video else {}
            rate = (reply["fps"] or FPS) if reply.get("faces") else None  # with no face no time is expected
            return rate, reply, video_note(reply), track_dropdown(reply), *self.others.look(reply)

        # A new file has tracks and faces of its own: an old one's must not be sent with it.
        face = self._controls["face"]
        self.video.change(None, [self.video, face], [self.video_track, self.video_note, face], js=LOOKING)
        self.audio.change(None, self.audio, [self.audio_track, self.audio_note], js=LOOKING)
        seen_audio = {"fn": look_at_audio, "outputs": [self.seconds, self.audio_note, self.audio_track], **PRIVATE}
        looked = [self.video_fps, self.reply, self.video_note, self.video_track, *self.others.looked]
        seen_video = {"fn": look_at_video, "outputs": looked, **PRIVATE}
        self.audio.change(inputs=self.audio, **seen_audio).then(**DESCRIBE)
        self.audio_track.input(inputs=[self.audio, self.audio_track], **seen_audio).then(**DESCRIBE)
        mark_face = {"fn": None, "inputs": face, "js": "(face) => window.lipsync?.markFace(face)"}
        look = self.video.change(inputs=self.video, **seen_video)
        looks = [look, self.video_track.input(inputs=[self.video, self.video_track], **seen_video)]
        self.others.wire(looks, self.video_note, face, self.more, self.live, measure, PRIVATE)
        for seen in looks:
            shown = seen.then(None, self.reply, js="(reply) => window.lipsync.showPicture(reply)")
            shown.then(**mark_face).then(**DESCRIBE)

        for button, field, path in self.examples:
            button.click(path.as_posix, None, field, **PRIVATE)
        inputs = [self.video, self.audio, self.more, self.visitor, self.video_track, self.audio_track]
        inputs += [*self.others.inputs, *settings]
        self.start.click(press, inputs, self.reply, js=WITH_VISITOR.format(3), api_name="press", **PRIVATE).then(
            None, self.reply, js="(reply) => window.lipsync.onStarted(reply)"
        )
        inputs = [self.video, self.audio, self.seconds, self.visitor, self.video_track, self.audio_track, *settings]
        wire_preview(api, self.preview, self.one_frame, inputs, WITH_VISITOR.format(3), PRIVATE)

    def _wire_settings(self) -> None:
        """The slider, its stops, and settings that are kept by the browser."""
        positions = [stop.position for stop in STOPS]
        texts = {str(stop.position): stop.name for stop in STOPS}
        mark = f"(level) => window.lipsync?.markStop({positions}.indexOf(level), level, {json.dumps(texts)})"
        mark_stop = {"fn": None, "inputs": self.level, "js": mark}
        changes = [setting.change for setting in self.settings]
        # In one event, so that no earlier answer comes after a later one; scripts and chains ask for it by `DESCRIBE`.
        gr.on(
            [*changes, self.live.submit],
            self.api.when_ready(self.meaning),
            [*self.settings, self.video_fps, self.seconds, *self.others.lengths],
            [self.line, self.details, self.preview],
            api_name="meaning",
            trigger_mode="always_last",
            **PRIVATE,
        )
        gr.on(changes, None, self.settings, self.saved, js="(...values) => [values]")
        self.level.change(**mark_stop)
        for button, stop in zip(self.stops, STOPS, strict=True):
            button.click(None, None, self.level, js=f"() => {stop.position}")
        self.model.input(self.guidance_of, self.model, self._controls["guidance"], **PRIVATE)
        begin = gr.JSON(visible=False, label="settings to begin with")
        loaded = [*self.stops, begin, self.model, self.advice, self.footer]
        load = self.blocks.load(self.api.when_ready(self.on_load), self.saved, loaded, **PRIVATE)
        settle = f"(begin, ...values) => window.lipsync.settle({list(NAMES)}, begin, values)"
        load.then(None, [begin, *self.settings], self.settings, js=settle).then(**mark_stop).then(**DESCRIBE)

    def _wire_live(self, uploads_stay: bool) -> None:
        """Events of the page's scripts."""
        live, files = self.live, [self.video, self.audio, self.more, *self.others.files]
        # There is another model; the settings of a job are to be shown; a job is to run again with the page's settings;
        # its timeline is to be shown.
        live.input(self.model_dropdown, None, self.model, **PRIVATE).then(**DESCRIBE)
        live.select(self.show_settings, None, self.settings, **PRIVATE)
        live.retry(self.again_with, self.settings, self.reply, **PRIVATE).then(
            None, self.reply, js="(reply) => window.lipsync.onReply(reply)"
        )
        live.expand(self.show_timeline, None, self.timeline, **PRIVATE).then(
            None, js="() => document.querySelector('#timeline')?.scrollIntoView({ block: 'nearest' })"
        )
        if not uploads_stay:  # another server runs, and the uploads went with the one before
            live.clear(None, files, files, js="(...files) => window.lipsync.dropFiles(files)")

    # ---- what only the page asks for

    def press(
        self, video: Any, audio: Any, more: Any, visitor: str, video_track: Any, audio_track: Any, *values: Any
    ) -> dict[str, Any]:
        """Queue a job for each voice, or one for several faces with a voice each."""
        more = more if isinstance(more, list) else []
        voices = [audio, *more] if audio or not more else more
        settings = dict(zip(NAMES, values[-len(NAMES) :], strict=True))
        others = self.others.parse(settings["face"], *values[: -len(NAMES)])
        return self.api.submit_all(
            video, voices, settings, visitor, video_track, audio_track if audio else None, *others
        )

    def meaning(self, *values: Any) -> tuple[str, str, Any]:
        """The line under the button, the details, and the preview's button.

        values: the page's settings, the video's rate and the seconds of each sound.
        """
        settings, rate, seconds = values[: len(NAMES)], values[len(NAMES)], values[len(NAMES) + 1 :]
        try:
            length, people = spoken(*seconds) if rate else (None, 1)
            reply, kind = self.api.describe(*settings, length, rate, people), ""
        except UserError as error:
            reply, kind = {"line": str(error), "details": "", "preview": None}, "problem"
        details = reply["details"] and f"In detail: {reply['details']}"
        return (
            f"<p id='line' role='status' class='{kind}'>{html.escape(reply['line'])}</p>",
            f"<p id='details'>{html.escape(details)}</p>",
            preview_button(reply["preview"]),
        )

    def on_load(self, saved: Any) -> tuple:
        """What is only known once the machine has been looked at; saved: the values of this browser's last visit."""
        with suppress(UserError):  # the folder of --model may be gone; jobs say so
            self.worker.find_models()  # files may have been put there by hand
        machine = self.worker.machine
        if machine is None:
            problem = f"<p class='problem'>{html.escape(self.worker.problem or '')}</p>"
            return (*[gr.skip()] * len(STOPS), [], gr.skip(), problem, footer_html(None))
        best = machine.recommended
        stops = [gr.Button(elem_classes=["best"]) if stop.position == best else gr.skip() for stop in STOPS]
        values: dict[str, Any] = {"level": best, "guidance": self.guidance_of("auto")}
        with suppress(UserError, TypeError, ValueError, KeyError):  # of another version, or of a model that is gone
            fields = parse_settings(dict(zip(NAMES, saved, strict=True)), self.api.models_to_choose)
            values = page_values(fields, best)
        begin = [value if isinstance(value := values.get(name), (str, int, float)) else None for name in NAMES]
        return (*stops, begin, self.model_dropdown(), advice_html(machine.advice), footer_html(machine))

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

    def show_settings(self, event: gr.EventData) -> list[Any]:
        """Set the page to the settings of a job."""
        machine = self.worker.machine
        try:
            fields = event._data["settings"]
            values = page_values(fields, machine.recommended if machine else 0.0)
            parse_settings(values, self.api.models_to_choose)
        except (UserError, TypeError, ValueError, KeyError):  # sent by something else than the page, or a model is gone
            raise gr.Error("These settings of a job cannot be used here any more.", print_exception=False) from None
        if values["guidance"] is None:
            values["guidance"] = self.guidance_of(values["model"])
        return list(values.values())

    def again_with(self, event: gr.EventData, *values: Any) -> dict[str, Any]:
        """Run a job's files again with the page's settings."""
        try:
            job, visitor = self._named_job(event)
            changes = dict(zip(NAMES, values, strict=True))
            if self.worker.store.find(job, visitor).request.others:
                del changes["face"]  # every voice keeps its own
            return self.api.again(job, changes, visitor)
        except UserError as error:
            return {"error": str(error)}

    def _named_job(self, event: gr.EventData) -> tuple[str, str]:
        """The job and the visitor of an event. Raises UserError."""
        data = event._data if isinstance(event._data, dict) else {}
        return parse_text(data.get("job"), "job"), visitor_token(data.get("visitor"))

    def show_timeline(self, event: gr.EventData) -> Any:
        """The timeline of a job, as a figure."""
        try:
            return gr.Plot(timeline_figure(self.worker.store.find(*self._named_job(event))), visible=True)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None


# ---- serving


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
    tools = McpTools(page.api) if options.mcp else None
    launched = page.blocks.launch(
        share=options.share,
        auth=password_checker(options.accounts) if options.accounts else None,
        server_name=bracketed(options.server_name),
        server_port=options.server_port,
        root_path=options.root_path,
        max_file_size=options.max_upload,
        enable_monitoring=False,
        allowed_paths=[str(path) for *_, path in EXAMPLES],
        blocked_paths=[str(options.outputs.absolute())],
        app_kwargs={"routes": routes(page.api, tools), "lifespan": guarded(page.api, policy, tools)},
        mcp_server=False,  # Gradio's own, see mcp_tools
        theme=theme(),
        head=head_html(),
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
