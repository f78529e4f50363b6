"""Pieces of the page in HTML: its own files, and what is made of the machine and of the licences."""

import html
from pathlib import Path
from typing import Any
from urllib.parse import quote

from latentsync import __version__
from latentsync.checkpoints.releases import LICENCES, RELEASES, VAE_REPOSITORY
from optim.serving.form import FACE_LABELS
from optim.serving.machine import Machine

ASSETS = Path(__file__).resolve().parents[2] / "assets"


def asset(name: str) -> str:
    """A file of the page's own."""
    return (ASSETS / "page" / name).read_text(encoding="utf-8")


def credit(repository: str) -> tuple[str, str, str]:
    """Name, licence and address of a released model, for the footer."""
    name, licence = repository.split("/")[1].replace("LatentSync-", "LatentSync "), LICENCES[repository][2]
    return name, licence.split(":")[0], f"https://huggingface.co/{repository}"


HINT = "Click the face that is to speak. Another one can speak, too: open 'Another face in this video'."
MEDIAPIPE = "https://ai.google.dev/edge/mediapipe/solutions/vision/face_landmarker"
CREDITS = (
    ("demo model", "Apache-2.0; trained on GRID, CC BY 4.0", "https://zenodo.org/records/3625687"),
    *(credit(RELEASES[name].repository) for name in sorted(RELEASES)),
    ("Whisper tiny", "MIT", "https://github.com/openai/whisper"),
    credit(VAE_REPOSITORY),
    ("MediaPipe Face Landmarker", "Apache-2.0", MEDIAPIPE),
    ("ffmpeg", "GPL-3.0-or-later (bundled binary)", "https://ffmpeg.org/legal.html"),
)


def footer_html(machine: Machine | None) -> str:
    """Versions, credits and terms; machine: None until it has been looked at."""
    device = f"{machine.device_name} · torch {machine.torch}" if machine else "looking at this machine …"
    links = (f'<a href="{url}" rel="noreferrer">{name}</a>: {licence}' for name, licence, url in CREDITS)
    return asset("footer.html").format(version=__version__, device=html.escape(device), credits=" · ".join(links))


def head_html() -> str:
    """The page's description, icon and looks. Gradio would rewrite the rules of a style sheet of its own option."""
    icon = quote(asset("icon.svg"))
    description = "Lip-sync: give a filmed face new words, on your own machine."
    return (
        f'<meta name="description" content="{description}"><link rel="icon" href="data:image/svg+xml,{icon}">'
        f"<style>{(ASSETS / 'page.css').read_text(encoding='utf-8')}</style>"
    )


def video_note(look: dict[str, Any]) -> str:
    """What a reply of /check_video says: length, rate and size, the faces to choose from, warnings; or an error."""
    if not look or "error" in look:
        return _problem(look)
    size, still = f"{look['width']} × {look['height']}", look["duration"] is None
    facts = ["a picture", size] if still else [f"{look['duration']:.1f} s", f"{look['fps']:g} frames/s", size]
    found = len(look["faces"])
    facts.append(f"{found} {'face' if found == 1 else 'faces'}" if found else "no face found")
    faces = face_buttons(look["faces"], HINT) if found > 1 else ""
    unbroken = (fact.replace(" ", "\N{NO-BREAK SPACE}") for fact in facts)
    return f"<p class='quiet facts'>{' · '.join(unbroken)}</p>{faces}{_warnings(look)}"


def face_buttons(faces: list[dict[str, Any]], hint: str = "") -> str:
    """Thumbnails of the faces of a look to choose one from, and a hint beside them."""
    return f"<div class='faces'>{''.join(map(_face_button, faces))}{hint and f'<p>{hint}</p>'}</div>"


def _face_button(face: dict[str, Any]) -> str:
    which = face["face"]
    label = f"Follow this face: {FACE_LABELS[which]}" if which in FACE_LABELS else "Follow this face"
    label += "" if face["usable"] else " (turned away, or its mouth is outside the picture)"
    picture = f"<img alt='' src='{face['picture']}'>"
    return f"<button type='button' data-face='{which}' title='{label}' aria-label='{label}'>{picture}</button>"


def audio_note(measured: dict[str, Any]) -> str:
    """What a reply of /measure says: the length of a sound and warnings, or an error."""
    if not measured or "error" in measured:
        return _problem(measured)
    return f"<p class='quiet facts'>{measured['seconds']:.1f} s</p>{_warnings(measured)}"


def _warnings(reply: dict[str, Any]) -> str:
    return "".join(f"<p class='warning'>{html.escape(warning)}</p>" for warning in reply["warnings"])


def _problem(reply: dict[str, Any]) -> str:
    return f"<p class='problem' role='alert'>{html.escape(reply['error'])}</p>" if reply else ""


def advice_html(advice: tuple[dict[str, str], ...]) -> str:
    """The doctor's advice as a list."""
    items = (
        f"<li class='{each['severity']}'><b>{each['severity'].capitalize()}</b> {html.escape(each['problem'])} "
        f"<span>{html.escape(each['remedy'])}</span></li>"
        for each in advice
    )
    return f"<ul class='advice'>{''.join(items)}</ul>" if advice else "<p class='quiet'>Nothing to improve.</p>"
