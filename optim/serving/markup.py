"""Pieces of the page in HTML: its own files, and what is made of the machine and of the licences."""

import html
from pathlib import Path

from latentsync import __version__
from latentsync.checkpoints.releases import LICENCES, RELEASES, VAE_REPOSITORY
from optim.serving.machine import Machine

ASSETS = Path(__file__).resolve().parents[2] / "assets"


def asset(name: str) -> str:
    """A file of the page's own."""
    return (ASSETS / "page" / name).read_text(encoding="utf-8")


def credit(repository: str) -> tuple[str, str, str]:
    """Name, licence and address of a released model, for the footer."""
    name, licence = repository.split("/")[1].replace("LatentSync-", "LatentSync "), LICENCES[repository][2]
    return name, licence.split(":")[0], f"https://huggingface.co/{repository}"


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


def advice_html(advice: tuple[dict[str, str], ...]) -> str:
    """The doctor's advice as a list."""
    items = (
        f"<li class='{each['severity']}'><b>{each['severity'].capitalize()}</b> {html.escape(each['problem'])} "
        f"<span>{html.escape(each['remedy'])}</span></li>"
        for each in advice
    )
    return f"<ul class='advice'>{''.join(items)}</ul>" if advice else "<p class='quiet'>Nothing to improve.</p>"
