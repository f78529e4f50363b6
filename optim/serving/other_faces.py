"""The page's fields for further faces of a video, each with a voice of its own: `OtherFaces`.

What is chosen for the first voice is the setting "face". A face is known by what a look at the video tells of it, the
"names" by which it can be chosen, so that "the largest" and "on the left" may turn out to be the same one.
"""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from latentsync.choice import parse_face
from latentsync.errors import UserError
from optim.serving.endpoints import ONE_JOB
from optim.serving.form import FACE_LABELS, MAX_FACE, parse_who
from optim.serving.markup import audio_note, face_buttons

ORDINALS = ("first", "second", "third", "fourth")  # the voices that the page has fields for
INTRODUCTION = """<p class='quiet'>One job, in which each face says its own recording. The voice above is said by the
face that you click below the video.</p>"""
HEARD = "<p class='quiet'>The result has all voices, mixed, or the sound that you give here, as a mix with music:</p>"
FACE_CLICK = """element.addEventListener("click", ({ target }) => {
  const face = target.closest("[data-face]")?.dataset.face;
  if (face) trigger("select", { face });
});
window.lipsync?.markFaces();"""
NO_FACE_SAID = "Say which face says the {} voice: click it, or name it."
SAME_FACE = "The {} and the {} voice are for the same face: choose another one."
TOO_FEW = (
    "There are {} voices, and the first second of this video shows {}. A voice whose face is not found is heard, but "
    "nobody says it."
)
DESCRIBE: dict[str, Any] = {"fn": None, "js": "() => window.lipsync.describe()"}  # asks what the settings mean
LOOKING = "(file) => file ? `<p class='quiet'>Listening to this file …</p>` : ''"


@dataclass(frozen=True)
class Voice:
    """The fields of a further face."""

    box: gr.Column
    audio: gr.Audio
    note: gr.HTML
    thumbnails: gr.HTML
    face: gr.Dropdown
    seconds: gr.Number  # of its sound, hidden


def chosen_face(event: gr.EventData) -> Any:
    """The face that was clicked, for a dropdown."""
    face = event._data.get("face") if isinstance(event._data, dict) else None
    return face if isinstance(face, str) and 0 < len(face) <= MAX_FACE else gr.skip()


class OtherFaces:
    """The accordion of the page with the voices of further faces, and the sound that is heard.

    Build it within Blocks, then `wire` it once.
    """

    def __init__(self, player: gr.WaveformOptions) -> None:
        looks: dict[str, Any] = {
            "sources": ["upload", "microphone"],
            "type": "filepath",
            "buttons": [],
            "waveform_options": player,
            "elem_classes": ["voice"],
        }
        with gr.Accordion("Another face in this video", open=False, elem_id="others"):
            gr.HTML(INTRODUCTION, apply_default_css=False)
            self.voices = [self._build_voice(number, looks) for number in range(1, len(ORDINALS))]
            self.note = gr.HTML("", elem_id="others-note", apply_default_css=False)
            gr.HTML(HEARD, apply_default_css=False)
            self.sound = gr.Audio(label="Sound of the result", elem_id="sound", **looks)
            self.sound_note = gr.HTML("", elem_id="sound-note", apply_default_css=False)
        self.sound_seconds = gr.Number(visible=False, label="seconds of the sound")
        self.faces = gr.JSON(visible=False, label="faces")  # names of each that a look at the video has found

    def _build_voice(self, number: int, looks: dict[str, Any]) -> Voice:
        with gr.Column(visible=number == 1, elem_id=f"other-{number}", elem_classes=["other"]) as box:
            return Voice(
                box,
                gr.Audio(label=f"Voice of the {ORDINALS[number]} face", elem_id=f"voice-{number}", **looks),
                gr.HTML("", apply_default_css=False),
                gr.HTML("", elem_id=f"faces-{number}", js_on_load=FACE_CLICK, apply_default_css=False),
                gr.Dropdown(
                    [(FACE_LABELS[name], name) for name in FACE_LABELS],
                    value=None,
                    label="Which face says it",
                    allow_custom_value=True,
                    elem_id=f"face-{number}",
                ),
                gr.Number(visible=False, label="seconds of the voice"),
            )

    @property
    def files(self) -> list[gr.Audio]:
        """The fields that hold files."""
        return [*(voice.audio for voice in self.voices), self.sound]

    @property
    def inputs(self) -> list[Any]:
        """What `parse` takes the values of."""
        return [self.faces, *self.files, *(voice.face for voice in self.voices)]

    @property
    def lengths(self) -> list[Any]:
        """What `spoken` takes the values of."""
        return [self.sound_seconds, *(voice.seconds for voice in self.voices)]

    @property
    def looked(self) -> list[Any]:
        """The outputs of `look`."""
        return [self.faces, *(voice.thumbnails for voice in self.voices)]

    def look(self, reply: dict[str, Any]) -> list[Any]:
        """What the fields show of a reply of /check_video: the faces to choose from."""
        faces = reply.get("faces")
        buttons = face_buttons(faces) if faces and len(faces) > 1 else ""
        return [None if faces is None else [face["names"] for face in faces], *[buttons] * len(self.voices)]

    def wire(
        self,
        looks: Sequence[Any],
        thumbnails: gr.HTML,
        face: gr.Dropdown,
        more: gr.File,
        live: gr.HTML,
        measure: Callable,
        private: dict[str, Any],
    ) -> None:
        """The events of these fields.

        looks: events with the outputs of `look`; thumbnails, face, more: the page's fields for the first face and for
        more voices; live: whose `edit` the page's scripts trigger; measure: see `Endpoints.measure`; private: options
        of all events.
        """

        async def listen(audio: Any) -> tuple:
            reply = await measure(audio, None) if audio else {}
            return reply.get("seconds"), audio_note(reply)

        chosen = [voice.face for voice in self.voices]
        js = "(...faces) => faces.forEach((face, i) => window.lipsync?.markFace(face, `faces-${i + 1}`))"
        mark: dict[str, Any] = {"fn": None, "inputs": chosen, "js": js}
        check = {
            "fn": self.check,
            "inputs": [face, more, *self.inputs],
            "outputs": [self.note, *(voice.box for voice in self.voices[1:])],
            **private,
        }
        fields = [(voice.audio, voice.seconds, voice.note) for voice in self.voices]
        for audio, seconds, note in (*fields, (self.sound, self.sound_seconds, self.sound_note)):
            audio.change(None, audio, note, js=LOOKING)
            heard = audio.change(listen, audio, [seconds, note], **private)
            heard.then(**DESCRIBE)
        for shown, field in ((thumbnails, face), *((voice.thumbnails, voice.face) for voice in self.voices)):
            shown.select(chosen_face, None, field, **private)
        changes = [field.change for field in (*chosen, *(voice.audio for voice in self.voices), more)]
        # In one event, so that no earlier answer comes after a later one.
        gr.on([*changes, live.edit], **check, trigger_mode="always_last")
        again: dict[str, Any] = {"fn": None, "js": "() => window.lipsync.checkFaces()"}
        gr.on([each.change for each in chosen], **mark)
        face.change(None, face, js="(face) => window.lipsync?.markFace(face)")
        spread = {"fn": self.spread, "outputs": chosen, **private}
        for look in looks:  # another video: every voice gets the next face
            look.then(inputs=[self.faces, face], **spread).then(**mark).then(**again)
        # Another face for the first voice: no other keeps that one.
        face.change(inputs=[self.faces, face, *chosen], **spread).then(**mark).then(**again)

    # ---- values come as a browser sent them, or somebody else

    def spread(self, faces: Any, first: Any, *chosen: Any) -> list[Any]:
        """Faces for the further voices: those that were chosen, and in place of none or of a taken one the next."""
        names = _names(faces)
        taken, spread = {_identity(first, names)}, []
        for value, _ in zip((*chosen, *[None] * len(self.voices)), self.voices, strict=False):
            if not value or _identity(value, names) in taken:
                value = next((each[0] for number, each in enumerate(names) if number not in taken), None)
            taken.add(_identity(value, names))
            spread.append(value)
        return spread

    def check(self, first: Any, more: Any, *values: Any) -> list[Any]:
        """What is wrong with the voices, at their fields; and which fields are shown: one more than have a voice."""
        given = self._given(values)
        shown = [gr.Column(visible=bool(audio)) for audio, _ in self._pairs(values)[:-1]]
        sentences = []
        try:
            if given and isinstance(more, list) and more:
                raise UserError(ONE_JOB)
            self.parse(first, *values)
        except UserError as error:
            sentences.append(f"<p class='problem' role='alert'>{html.escape(str(error))}</p>")
        found = len(_names(values[0])) if values else 0
        if given and isinstance(values[0], list) and len(given) >= found:
            faces = f"{found} {'face' if found == 1 else 'faces'}" if found else "none"
            sentences.append(f"<p class='warning'>{TOO_FEW.format(len(given) + 1, faces)}</p>")
        return ["".join(sentences), *shown]

    def parse(self, first: Any, *values: Any) -> tuple[list[dict[str, Any]], Any]:
        """The further faces and the sound, as `Endpoints.submit_all` takes them.

        first: the face of the first voice; values: of `inputs`. Raises UserError for a voice without a face, and where
        two are for the same one.
        """
        names, given = _names(values[0] if values else None), self._given(values)
        known = {_identity(first, names): ORDINALS[0]} if given else {}
        for number, _, face in given:
            if not face:
                raise UserError(NO_FACE_SAID.format(ORDINALS[number]))
            other = known.setdefault(_identity(parse_who(face), names), ORDINALS[number])
            if other != ORDINALS[number]:
                raise UserError(SAME_FACE.format(other, ORDINALS[number]))
        others = [{"face": face, "audio": audio} for _, audio, face in given]
        return others, values[len(self.files)] if len(values) > len(self.files) else None

    def _pairs(self, values: Sequence[Any]) -> list[tuple[Any, Any]]:
        """The file and the face of each further voice, of values of `inputs`."""
        count = len(self.voices)
        padded = [*values, *[None] * (2 * count + 2 - len(values))]
        return list(zip(padded[1 : count + 1], padded[count + 2 : 2 * count + 2], strict=True))

    def _given(self, values: Sequence[Any]) -> list[tuple[int, Any, Any]]:
        """The number, the file and the face of those that have a file."""
        return [(number, audio, face) for number, (audio, face) in enumerate(self._pairs(values), 1) if audio]


def spoken(seconds: Any, sound: Any, *others: Any) -> tuple[Any, int]:
    """The length of the result and the number of people who say a voice, of the seconds of each; None for no file."""
    voices = [each for each in others if isinstance(each, (int, float)) and each > 0]
    people = 1 + len(voices)
    if isinstance(sound, (int, float)) and sound > 0:
        return sound, people
    return (max(seconds, *voices) if voices and isinstance(seconds, (int, float)) else seconds), people


def _names(faces: Any) -> list[list[str]]:
    """The names of each face that a look has found; none for what is no such list."""
    valid = isinstance(faces, list) and all(isinstance(names, list) and names for names in faces)
    return faces if valid and all(isinstance(name, str) for names in faces for name in names) else []


def _identity(face: Any, names: list[list[str]]) -> Any:
    """What two choices of the same face have in common: its number among those that were found, or the point."""
    for number, each in enumerate(names):
        if face in each:
            return number
    try:
        return parse_face(face)
    except (UserError, TypeError):
        return str(face)
