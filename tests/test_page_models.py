"""Released models on the page: seen, fetched, stopped and gone on with, by those who may. From a hub on loopback."""

import shutil
import time
from contextlib import contextmanager

import pytest
from gradio_client import Client
from huggingface_hub import constants
from small_release import NAME, UNET

import app
from latentsync.checkpoints import download, store
from latentsync.checkpoints.releases import RELEASES
from latentsync.errors import UserError
from optim.hardware import Gpu
from optim.serving.endpoints import Endpoints
from optim.serving.fetcher import DONE, FAILED, RUNNING, STOPPED, Fetcher
from optim.serving.job import Request
from optim.serving.models import recommended_model
from optim.serving.uploads import Uploads
from optim.serving.worker import Worker

pytestmark = pytest.mark.usefixtures("one_thread")


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


@contextmanager
def looking(folder):
    """A worker that has looked at the machine; it has no jobs to do."""
    worker = Worker(folder / "outputs", device="cpu")
    worker.start()
    try:
        assert worker.ready.wait(60) and worker.machine, worker.problem
        yield worker
    finally:
        worker.close()


@pytest.fixture
def worker(hub, tmp_path):
    with looking(tmp_path) as worker:
        yield worker


@pytest.fixture
def fetcher(worker):
    fetcher = Fetcher(worker, allowed=True)
    yield fetcher
    fetcher.close()


def page_of(fetcher) -> app.Page:
    return app.Page(Endpoints(fetcher.worker, fetcher, Uploads(fetcher.worker.folder / "uploads")))


@contextmanager
def served(fetcher):
    """The page of a fetcher, in this process; gives its address."""
    page = page_of(fetcher)
    try:
        _, url, _ = page.blocks.launch(
            prevent_thread_lock=True, quiet=True, ssr_mode=False, app_kwargs={"routes": app.routes(page.api)},
            theme=app.theme(), head=app.head_html(), allowed_paths=[str(path) for *_, path in app.EXAMPLES],
        )  # fmt: skip
        yield url
    finally:
        page.blocks.close(verbose=False)


def ended(fetcher) -> dict:
    return until(lambda: (seen := fetcher.view())["state"] != RUNNING and seen)


def row(fetcher) -> dict:
    return next(row for row in fetcher.models()["models"] if row["name"] == NAME)


def size() -> int:
    return sum(part.size for part in RELEASES[NAME].parts)


def test_a_client_fetches_a_model_and_it_can_be_chosen_without_a_restart(hub, fetcher):
    hub.rate = 2e6
    with served(fetcher) as url:
        client = Client(url, verbose=False)
        before = client.predict(api_name="/models")
        missing = next(each for each in before["models"] if each["name"] == NAME)
        assert not missing["present"] and missing["to_fetch"] == size()
        assert "a licence" in " ".join(missing["notice"])
        assert before["chosen"] == "demo" and "memory" in before["why"]
        client.predict(name=NAME, api_name="/fetch")
        with pytest.raises(Exception, match="one comes after the other"):
            client.predict(name=NAME, api_name="/fetch")
        seen = []

        def look() -> bool:
            seen.append(client.predict("v" * 24, 0, api_name="/watch")["fetching"])
            return seen[-1]["state"] != RUNNING

        until(look)
        assert seen[-1]["state"] == DONE and seen[-1]["error"] is None
        fetching = [each for each in seen if each["doing"] == f"fetching {UNET}"]
        assert len({each["done"] for each in fetching}) > 1  # how often it is seen depends on the load
        assert {each["total"] for each in fetching} == {size()}
        assert any(each["speed"] and 4e5 < each["speed"] < 4e6 for each in fetching)
        assert any(each["seconds_left"] is not None for each in fetching)
        assert client.predict("v" * 24, 0, api_name="/watch")["models"] > before["version"]
        after = client.predict(api_name="/models")
        found = next(each for each in after["models"] if each["name"] == NAME)
        assert found["present"] and found["converted"] and found["to_fetch"] == 0 and after["chosen"] == NAME
    # `auto` takes it now, and it runs at its own resolution.
    assert f"model {NAME} (64 px)" in fetcher.worker.describe(Request("v", "a"), None)[0]
    assert "demo (128 px)" in fetcher.worker.describe(Request("v", "a", model="demo"), None)[0]
    assert (f"{NAME} (64 px)", NAME) in page_of(fetcher).model_dropdown().choices


def test_a_stopped_download_goes_on_where_it_was(hub, fetcher):
    hub.rate = 5e5
    fetcher.start(NAME)
    until(lambda: fetcher.view()["done"] > size() // 3)
    began = time.monotonic()
    fetcher.stop()
    stopped = ended(fetcher)
    assert time.monotonic() - began < 30 and stopped["state"] == STOPPED and "kept" in stopped["doing"]
    left = row(fetcher)["to_fetch"]
    assert 0 < left < size() and not row(fetcher)["present"]
    hub.rate = None
    fetcher.start(NAME)
    assert ended(fetcher)["state"] == DONE and hub.sent(UNET)[-1].begin > 0


def test_a_lost_connection_is_said_while_it_is_lost(hub, fetcher, monkeypatch):
    monkeypatch.setattr(download, "PAUSES", (1.0,))
    hub.faults = [("none",), ("none",), ("cut", 200_000)]
    fetcher.start(NAME)
    until(lambda: "connection is lost" in fetcher.view()["doing"])
    assert ended(fetcher)["state"] == DONE


def test_a_failure_is_one_sentence_and_the_next_try_is_free(hub, fetcher, monkeypatch):
    hub.refuse = 401
    fetcher.start(NAME)
    failed = ended(fetcher)
    assert failed["state"] == FAILED and "HF_TOKEN" in failed["error"] and "\n" not in failed["error"]
    hub.refuse = None
    usage = shutil.disk_usage("/")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        fetcher.start(NAME)
        assert "free" in ended(fetcher)["error"] and not hub.sent(UNET)
        fetcher.allowed = False  # visitors are not told of folders
        assert fetcher.view()["error"] == "The server's console says what went wrong."
        fetcher.allowed = True
    fetcher.start(NAME)
    assert ended(fetcher)["state"] == DONE


def test_offline_the_demo_model_runs_and_the_page_says_how_to_get_others(hub, fetcher, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = fetcher.models()
    assert found["offline"] and found["chosen"] == "demo" and "latentsync.checkpoints list" in found["remark"]
    assert row(fetcher)["folder"].endswith(NAME)
    fetcher.start(NAME)
    assert "HF_HUB_OFFLINE forbids" in ended(fetcher)["error"] and not hub.requests


def test_a_fetched_model_is_verified_and_removed(hub, fetcher):
    folder = store.get(NAME)
    fetcher.refresh()
    assert fetcher.models()["chosen"] == NAME
    with (folder / "latentsync_unet.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    fetcher.start(NAME, "verify")
    assert "is not as it was converted" in ended(fetcher)["error"]
    assert fetcher.remove(NAME, pickle_only=True) == RELEASES[NAME].unet.size
    assert fetcher.remove(NAME) > 0 and fetcher.models()["chosen"] == "demo"
    with pytest.raises(UserError, match="no released model"):
        fetcher.start("../../etc")


def test_visitors_of_a_public_server_see_the_models_and_cannot_fetch(hub, worker):
    fetcher = Fetcher(worker, allowed=False)
    api = page_of(fetcher).api
    for call in (api.fetch, lambda name: api.fetch(name, "verify"), lambda _: api.stop_fetching(), api.remove_model):
        with pytest.raises(UserError, match="--allow-download"):
            call(NAME)
    assert fetcher.view() is None and not hub.requests
    seen = api.models()
    assert not seen["allowed"] and {each["folder"] for each in seen["models"]} == {None}
    fetcher.start(NAME)  # as --get does
    assert ended(fetcher)["state"] == DONE and row(fetcher)["present"]


@pytest.mark.parametrize(
    "options, allowed, warned",
    [
        ((), True, False),
        (("--share",), False, False),
        (("--share", "--allow-download"), True, False),
        (("--server-name", "192.168.1.5"), False, True),
        (("--server-name", "::", "--allow-download"), True, True),
        (("--server-name", "box.example", "--no-auth"), False, True),
        (("--server-name", "192.168.1.5", "--auth", "anna:secret"), True, False),
        (("--server-name", "127.0.0.2"), True, False),
        (("--server-name", "localhost"), True, False),
        (("--server-name", "::1"), True, False),
    ],
)
def test_only_who_serves_a_page_to_others_opens_downloads_to_them(
    options, allowed, warned, monkeypatch, tmp_path, capsys
):
    made = []
    for name in ("SPACE_ID", "GRADIO_SHARE", "GRADIO_SERVER_NAME"):
        monkeypatch.delenv(name, raising=False)

    class Seen(Exception):
        pass

    def stop(api, _):
        made.append(api.fetcher.allowed)
        raise Seen

    monkeypatch.setattr(app, "Page", stop)
    with pytest.raises(Seen):
        app.main([*options, "--outputs", str(tmp_path)])
    assert made == [allowed]
    assert ("without a login: --auth sets one" in capsys.readouterr().out) == warned


def test_results_that_cannot_be_read_are_not_taken_for_a_port_that_is_in_use(monkeypatch, tmp_path, capsys):
    class Launched:
        def __init__(self, api, _):
            self.blocks = self._queue = self
            self.api = api

        def launch(self, **_):
            pass

        def close(self, **_):
            pass

    def unreadable(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(app, "Page", Launched)
    monkeypatch.setattr("optim.serving.store.load_jobs", unreadable)
    assert app.main(["--outputs", str(tmp_path / "mine")]) == 2
    said = capsys.readouterr().err
    assert "mine' cannot be read (Permission denied)" in said and "--outputs" in said and "port" not in said


def test_a_name_to_get_that_nobody_released_is_refused_before_anything_is_served(monkeypatch, capsys):
    monkeypatch.setenv("LATENTSYNC_GET", "latentsync-9")
    assert app.main([]) == 2 and "latentsync-9" in capsys.readouterr().err


@pytest.mark.parametrize("gib, best", [(None, "demo"), (4, "demo"), (12, "latentsync-1.5"), (24, "latentsync-1.6")])
def test_the_recommended_model_is_one_that_the_memory_holds(gib, best):
    gpu = gib and Gpu(0, "a card", gib * 2**30, gib * 2**30, (8, 6))
    assert recommended_model(gpu)[0] == best
    assert recommended_model(None, lent=True)[0] == "latentsync-1.6"


def test_the_recommended_model_is_fetched_from_the_hint_on_the_page(hub, tmp_path, monkeypatch):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not (chromium := next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)):
        pytest.skip("there is no Chromium on this machine")
    monkeypatch.setattr(
        "optim.serving.machine.recommended_model", lambda *_: (NAME, "LatentSync 1.5, because this is a test.")
    )
    hub.rate = 1e5  # it must still be under way when the page is looked at, on a machine as busy as it may be
    with (
        looking(tmp_path) as worker, served(fetcher := Fetcher(worker, allowed=True)) as url,
        playwright.sync_playwright() as driver,
    ):  # fmt: skip
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 900})
        page.set_default_timeout(240_000)  # milliseconds, on a busy machine
        errors = []
        # The examples' icons lie in the folder of uploads of the process, which other tests here have moved.
        page.on(
            "console",
            lambda message: (
                errors.append(message.text)
                if message.type == "error" and not message.location["url"].endswith(".jpg")
                else None
            ),
        )
        page.goto(url)
        page.wait_for_selector("#offer button")
        assert "because this is a test" in page.inner_text("#offer") and "a licence" in page.inner_text("#offer")
        page.focus("#offer .main")
        page.evaluate("window.lipsync.refresh().then(window.lipsync.refresh)")  # as it does every second
        assert page.evaluate("document.activeElement.matches('#offer .main')"), "what is the same is not made anew"
        page.click("#offer .main")
        page.wait_for_selector("#fetching progress[value]")
        page.wait_for_function("document.querySelector('#fetching').innerText.includes('/s')")
        page.reload()
        page.wait_for_selector("#fetching progress[value]")
        page.click("text=Cancel")
        page.wait_for_selector("#fetching[data-state=stopped]")
        hub.rate = None
        page.click("#fetching button:text-is('Continue')")
        page.wait_for_selector("#fetching[data-state=done]")
        page.click("#advanced > button")
        page.wait_for_selector(f"#models [data-model='{NAME}'][data-present=true]")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.click("#model input")
        page.wait_for_selector(f"text={NAME} (64 px)")
        assert not errors
        browser.close()
        fetcher.close()


def test_the_lip_strength_follows_the_model(tmp_path, checkpoint):
    with looking(tmp_path) as worker:
        own = {model["name"]: model["guidance"] for model in worker.machine.models}
        assert worker.machine.chosen == "demo" and own["demo"] > 1
        page = page_of(Fetcher(worker, allowed=True))
        assert page.guidance_of("auto") == page.guidance_of("demo") == own["demo"]
        assert own["latentsync-1.6"] is None and page.guidance_of("latentsync-1.6") == app.gr.skip()
