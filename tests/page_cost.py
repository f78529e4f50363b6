"""What a tab costs while a job runs: `python tests/page_cost.py [FILM]`. The tests count with it, too.

The job is a stand-in, which computes nothing: so the browser has the machine to itself. It shows frames of its film.
Beside the page stands an empty tab of the same browser, whose cost is not the page's.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from serving import ROOT, serve

RATE = 8.0  # frames a second of the stand-in
SECONDS = 30.0  # of each measurement
# What a tab draws, by the names of Chromium's trace events.
EVENTS = ("FireAnimationFrame", "UpdateLayoutTree", "Layout", "Paint", "RasterTask")


def steady_job(job: Any) -> None:
    """Run a job as `InProcess.run` does, but paint nothing: finish frames at an even pace, and show pictures."""
    from latentsync.media import probe_video, read_frames
    from optim.serving.preview import PICTURE_INTERVAL, preview_picture, resized
    from optim.serving.run import check_cancel

    frames = [resized(frame) for frame in read_frames(probe_video(job.request.video), count=24)]
    began, shown = time.monotonic(), 0.0
    job.doing, job.timeline = "painting mouths", {"stages": {"mouths": [0.0, 0.0]}, "marks": []}
    while (now := time.monotonic() - began) * RATE < job.frames:
        check_cancel(job)
        done = now * RATE
        job.progress = {"faces": min(job.frames, int(2 * done)), "mouths": int(done), "writing": max(0, int(done) - 8)}
        job.partial_frames = done % 1
        if now - shown >= PICTURE_INTERVAL:
            job.picture = preview_picture(frames[int(done) % len(frames)])
            job.pictures, shown = job.pictures + 1, now
        time.sleep(0.1)


class Traffic:
    """Bytes of a page's requests and replies, with their headers, as HTTP/1.1 writes them, by the part of the URL.

    page: of Playwright.
    """

    def __init__(self, page: Any):
        self.bytes: Counter = Counter()
        self.requests: Counter = Counter()
        page.on("requestfinished", self._add)

    def _add(self, request: Any) -> None:
        name = "picture" if "/picture?" in request.url else request.url.split("?")[0].rsplit("/", 1)[-1]
        sizes = request.sizes()
        self.requests[name] += 1
        self.bytes[name] += sum(sizes.values())


def processes() -> dict[str, list[psutil.Process]]:
    """This process's browser, by the kinds of its processes."""
    kinds: dict[str, list[psutil.Process]] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if "chrom" not in " ".join(line[:1]):
            continue
        kind = next((part.partition("=")[2] for part in line if part.startswith("--type=")), "browser")
        service = next((part.rsplit(".", 1)[-1] for part in line if part.startswith("--utility-sub-type=")), "")
        kinds.setdefault(service or kind, []).append(process)
    return kinds


def cpu_seconds() -> Counter:
    """Seconds of a core that each kind of process has taken so far."""
    spent: Counter = Counter()
    for kind, found in processes().items():
        for process in found:
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue
            spent[kind] += times.user + times.system
    return spent


def shares(seconds: float, wait: Any) -> dict[str, float]:
    """Percent of a core that each kind of process takes in that time; wait: lets it pass, in seconds."""
    before, began = cpu_seconds(), time.monotonic()
    wait(seconds)
    after, passed = cpu_seconds(), time.monotonic() - began
    return {kind: round(100 * (after[kind] - before[kind]) / passed, 2) for kind in sorted(after)}


def drawing(browser: Any, page: Any, seconds: float) -> Counter:
    """How many of EVENTS there are in that time, in all tabs of the browser."""
    browser.start_tracing(page=page, categories=["devtools.timeline"])
    page.wait_for_timeout(1000 * seconds)
    return Counter(
        event["name"] for event in json.loads(browser.stop_tracing())["traceEvents"] if event["name"] in EVENTS
    )


def measure(film: Path | None, seconds: float, hidden: list[str]) -> None:
    """Print what an empty tab and the page take; hidden: selectors of parts to leave out, one after the other.

    film: of the job; by default a drawn face, whose pictures are smaller than those of a film.
    """
    from clips import make_sound
    from conftest import portrait, save_video
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as name, sync_playwright() as driver:
        folder = Path(name)
        face = film or save_video(
            folder / "face.mp4", [portrait(t) for t in range(24)], "-c:v", "libx264", "-pix_fmt", "yuv420p"
        )
        voice = make_sound(folder / "voice.wav", seconds=600)
        with serve(folder / "page", "--model", "demo", program=Path(__file__)) as server:
            server.wait_until_ready()
            browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
            empty = browser.new_page(viewport={"width": 1440, "height": 900})
            wait = lambda amount: empty.wait_for_timeout(1000 * amount)  # noqa: E731
            wait(3)
            print("empty tab:", shares(seconds, wait))
            page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
            page.goto(server.url)
            page.wait_for_function("document.querySelector('#line')?.textContent.includes('steps')")
            page.set_input_files("#video input[type=file]", str(face))
            page.set_input_files("#audio input[type=file]", str(voice))
            page.wait_for_selector("#video-note p")
            page.wait_for_selector("#audio-note .facts")
            page.click("#start")
            page.wait_for_selector(".card .newest:not([hidden])")
            wait(6)
            for selector in ["", *hidden]:
                if selector:
                    page.add_style_tag(content=f"{selector} {{ display: none !important; }}")
                    wait(2)
                began, traffic = time.monotonic(), Traffic(page)
                spent = shares(seconds, wait)
                passed = time.monotonic() - began
                print(f"page{selector and f' without {selector}'}:", spent, "sum", round(sum(spent.values()), 2))
                print(
                    "  kB/s:",
                    {name: round(count / passed / 1000, 3) for name, count in traffic.bytes.items()},
                    "requests/s:",
                    {name: round(n / passed, 2) for name, n in traffic.requests.items()},
                )
                drawn = drawing(browser, page, seconds / 3)
                print("  a second:", {name: round(3 * count / seconds, 1) for name, count in drawn.items()})
            browser.close()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if "--server-port" in sys.argv:  # started by `serve`
        import app
        from optim.serving.runners import InProcess

        InProcess.run = lambda self, job, checkpoint: steady_job(job)  # type: ignore[method-assign]
        sys.exit(app.main(sys.argv[1:]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("film", type=Path, nargs="?")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument(
        "--hide", nargs="*", default=[], help="CSS selectors of parts to leave out, one after the other"
    )
    options = parser.parse_args()
    measure(options.film, options.seconds, options.hide)
