"""The page in a headless Chromium: what a person sees and does, from the first visit to the result."""

import os
import re
import shutil
import time
from base64 import b64encode

import pytest
from clips import ffmpeg, make_sound, make_video
from conftest import SIDE, portrait, save_video
from page_cost import Traffic, drawing
from serving import serve
from test_people import LEFT, ONE, OTHER, RIGHT, scene

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
SHIFT = """window.shift = 0;
new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shift += entry.value;
}).observe({ type: "layout-shift", buffered: true });"""
BOTTOM = "document.querySelector('#start').getBoundingClientRect().bottom"
CLEAR = """() => {
    const words = document.createRange(), button = document.querySelector("#preview").getBoundingClientRect();
    words.selectNodeContents(document.querySelector("#video-note .facts"));
    return [...words.getClientRects()].every((box) => box.right < button.left || box.top > button.bottom);
}"""
EXPECTED = "/clip|first job/.test(document.querySelector('#line').textContent)"
SLOW = 240_000  # milliseconds that something may take on a busy machine


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A face, a voice of a second, a long one that takes a while, and files that cannot be used."""
    folder = tmp_path_factory.mktemp("clips")
    options = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", 12)
    save_video(folder / "talking.mp4", [portrait(t) for t in range(24)], *options)
    ffmpeg("-i", folder / "talking.mp4", "-frames:v", 1, folder / "face.png")
    save_video(folder / "old.avi", [portrait(t) for t in range(24)], "-c:v", "mpeg4", "-q:v", 3)
    make_sound(folder / "short.wav", seconds=0.78)
    make_sound(folder / "long.wav", seconds=40)
    make_sound(folder / "other.wav", seconds=0.38)
    sounds = ("-i", folder / "short.wav", "-i", folder / "other.wav", "-map", "0:a", "-map", "1:a", "-c:a", "aac")
    ffmpeg(*sounds, "-disposition:a:0", "default", "-disposition:a:1", "0", folder / "two.m4a")
    (folder / "text.mp4").write_text("this is not a video\n" * 50)
    make_video(folder / "faceless.mp4", seconds=0.5)
    people = [scene((ONE, (LEFT[0] + t % 4, 10)), (OTHER, (RIGHT[0] - t % 3, 10))) for t in range(12)]
    save_video(folder / "people.mp4", people, *options)
    ffmpeg("-i", folder / "talking.mp4", "-vf", "scale=64:64", folder / "small.mp4")
    ffmpeg("-f", "lavfi", "-i", "anullsrc=r=16000:cl=mono", "-t", 1, folder / "silent.wav")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoint):
    with serve(tmp_path_factory.mktemp("page"), "--model", checkpoint) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def is_fault(message) -> bool:
    """Whether a message of the console is an error, other than that the browser cannot play a sound."""
    return message.type == "error" and not message.text.startswith("Waveform load error")


@pytest.fixture
def visit(chromium, server):
    """Open the page as a new visitor; at the end the console must hold no error."""
    contexts, errors = [], []

    def open_page(width=1280, height=900, theme="light"):
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
        playwright.expect.set_options(timeout=SLOW)
        context.set_default_timeout(SLOW)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text) if is_fault(message) else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.add_init_script(SHIFT)
        page.goto(server.url)
        page.wait_for_function("document.querySelector('#line')?.textContent.includes('steps')")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def give(page, clips, video="talking.mp4", audio="short.wav", expected=True):
    """Drop a video and, where `audio` names one, a recording; wait for the expected time, unless there will be none."""
    page.set_input_files("#video input[type=file]", str(clips / video))
    page.wait_for_selector("#video video")
    if audio:
        page.set_input_files("#audio input[type=file]", str(clips / audio))
    page.wait_for_selector("#video-note .facts")
    if audio and expected:
        page.wait_for_function(EXPECTED)


def start(page):
    page.click("#start")
    page.wait_for_selector(".card")


def state(page, wanted):
    page.wait_for_selector(f".card[data-state={wanted}]")


def elapsed(page) -> float:
    """Seconds that the newest job has run, by the server's clock."""
    return page.evaluate(
        """async () => {
            const answer = await fetch("gradio_api/run/watch", { method: "POST",
                headers: { "Content-Type": "application/json" },
                body: JSON.stringify({ data: [window.lipsync.visitor, 0, null] }) });
            return (await answer.json()).data[0].jobs[0].elapsed;
        }"""
    )


def test_from_the_first_visit_to_the_result_of_the_example(visit):
    page = visit()
    page.click("#advanced > button")
    page.click("#model input")
    page.click("text=demo (128 px)")
    page.fill("#steps input[type=number]", "4")
    page.press("#steps input[type=number]", "Tab")
    page.click("#stop-2")
    page.wait_for_function("/2 steps.*demo/.test(document.querySelector('#line').textContent)")
    page.click("text=Face one")
    page.click("text=Voice one")
    playwright.expect(page.locator("#video-note")).to_contain_text("1 face", timeout=SLOW)
    playwright.expect(page.locator("#audio-note")).to_contain_text("3.8 s", timeout=SLOW)
    playwright.expect(page.locator("#video video")).to_be_visible()
    assert page.locator(".card").count() == 0, "examples run nothing"
    start(page)
    state(page, "done")
    page.wait_for_function("document.querySelector('.made').readyState > 0")
    assert page.evaluate("document.querySelector('.made').duration") > 1
    page.click(".card summary")
    used = page.inner_text(".card .tables")
    assert re.search(r"level\s+aggressive", used) and re.search(r"steps\s+2\b", used) and "mouths" in used
    page.click("text=Show the timeline")
    page.wait_for_selector("#timeline .js-plotly-plot .bars")
    # The page can be set to them again.
    page.click("#stop-0")
    page.click("text=Set the page to its settings")
    page.wait_for_function("document.querySelector('#level input[type=number]').value == '1'")


def test_own_files_give_a_result_beside_the_original(visit, clips, server):
    page = visit()
    give(page, clips)
    start(page)
    state(page, "done")
    page.wait_for_function("document.querySelector('.made').readyState > 0")
    assert page.evaluate("Math.round(document.querySelector('.made').duration * 25)") == 20
    # This job has shown how fast the machine is; nothing else was touched.
    page.wait_for_function("/(about|to) \\d+ s for this clip/.test(document.querySelector('#line').textContent)")
    playwright.expect(page.locator(".original")).to_be_visible()
    page.select_option(".with", "")
    playwright.expect(page.locator(".original")).to_be_hidden()
    page.select_option(".with", "original")
    page.click(".wipe")
    box = "document.querySelector('.original').getBoundingClientRect()"
    page.fill(".wipe-at input", "20")
    assert page.evaluate(f"{box}.left === {box.replace('original', 'made')}.left"), "one over the other"
    clip = page.evaluate("getComputedStyle(document.querySelector('.pair.over .other video')).clipPath")
    assert "80%" in clip or "20%" in clip
    assert page.evaluate("document.querySelector('.original').muted"), "one sound"
    page.click(".wipe")
    with page.expect_download() as download:
        page.click("text='Download'")
    assert download.value.suggested_filename == "talking-synced.mp4" and os.path.getsize(download.value.path()) > 1000
    page.click("text=Make a side-by-side video")
    with page.expect_download() as download:
        page.click("a:text-is('Download side by side')")
    assert download.value.suggested_filename == "talking-side-by-side.mp4"
    asked = []
    assert re.search(r"conservative · .*20\d\d", page.inner_text(".card .made-with"))
    page.once("dialog", lambda box: (asked.append(box.message), box.dismiss()))
    page.click("text=Remove >> visible=true")
    page.evaluate("window.lipsync.refresh().then(window.lipsync.refresh)")  # the second begins when the box is gone
    assert page.locator(".card").count() == 1 and "Delete talking-synced.mp4" in asked[0]
    page.once("dialog", lambda box: box.accept())
    page.click("text=Remove >> visible=true")
    page.wait_for_selector(".card", state="detached")


def test_of_several_sounds_in_a_file_one_can_be_chosen(visit, clips):
    page = visit()
    playwright.expect(page.locator("#audio-track")).to_be_hidden()
    give(page, clips, audio="two.m4a")
    playwright.expect(page.locator("#audio-track input")).to_have_value(re.compile(r"^1 \(aac"), timeout=SLOW)
    page.click("#audio-track input")
    page.click("#audio-track [role=option]:has-text('2 (aac')")
    start(page)
    state(page, "done")
    page.wait_for_function("document.querySelector('.made').readyState > 0")
    assert page.evaluate("Math.round(document.querySelector('.made').duration * 25)") in (10, 11)  # AAC has priming
    page.click("#audio [aria-label='Clear']")
    playwright.expect(page.locator("#audio-track")).to_be_hidden(timeout=SLOW)


def test_the_slider_changes_the_line_and_the_settings_that_are_used(visit, clips):
    page = visit()
    give(page, clips)
    before = page.inner_text("#line")
    page.wait_for_selector("#stop-0[aria-pressed=true]")  # what is recommended
    page.click("#stop-1")
    page.wait_for_selector("#stop-1[aria-pressed=true]")
    assert page.locator("#stops [aria-pressed=true]").count() == 1
    page.wait_for_function("document.querySelector('#line').textContent.includes('16 steps')")
    assert page.inner_text("#line") != before and "every other one reuses" in page.inner_text("#line")
    page.click("#advanced > button")
    assert "DeepCache every 2 steps" in page.inner_text("#details")
    start(page)
    state(page, "done")
    page.click(".card summary")
    assert re.search(r"level\s+balanced", page.inner_text(".card .tables"))
    assert page.get_attribute("#level input[type=range]", "aria-valuetext") == "0.5: balanced"
    page.press("#level input[type=range]", "ArrowRight")
    page.wait_for_function("document.querySelector('#line').textContent.includes('etween balanced')")
    assert page.locator("#stops [aria-pressed=true]").count() == 0


def test_a_job_shows_progress_survives_a_reload_and_is_cancelled_within_a_second(visit, clips):
    page = visit()
    give(page, clips, audio="long.wav")
    start(page)
    state(page, "running")
    page.wait_for_function("document.querySelector('.card .rate').textContent.includes('frames/s')")
    page.wait_for_function("document.querySelector('.card img').src.includes('picture')")
    page.wait_for_function("document.querySelector('.card img').naturalWidth > 0")
    page.reload()
    state(page, "running")
    page.wait_for_selector(".card video:not([hidden])")  # the first seconds can be played
    page.evaluate("void document.querySelector('.card figure video').play()")
    page.wait_for_function("document.querySelector('.card figure video').currentTime > 0.1")
    before, seen = elapsed(page), time.monotonic()
    with page.expect_response("**/run/cancel"):
        page.click("text=Cancel")
    told = time.monotonic()
    state(page, "cancelled")
    # By the server's own clock, as far as it ran on after it was told: what the browser takes is the machine's affair.
    assert elapsed(page) - before - (told - seen) < 3


def test_a_cancelled_job_may_keep_what_is_finished(visit, clips):
    page = visit()
    give(page, clips, audio="long.wav")
    start(page)
    page.wait_for_function("+document.querySelector('.card .stage:nth-child(3) output').textContent.split('/')[0] > 25")
    page.click("text=Stop and keep what is finished")
    state(page, "cancelled")
    page.wait_for_function("document.querySelector('.made').readyState > 0")
    assert 1 < page.evaluate("document.querySelector('.made').duration") < 35
    assert page.inner_text(".card .state") == "Part kept"


def test_two_visitors_see_their_own_jobs_and_the_queue_s_length(visit, clips):
    first, second = visit(), visit()
    give(first, clips, audio="long.wav")
    start(first)
    state(first, "running")
    second.wait_for_function("document.querySelector('#load').textContent.includes('1 running')")
    assert second.locator(".card").count() == 0
    give(second, clips)
    start(second)
    state(second, "waiting")
    assert "1 job comes before" in second.inner_text(".card")
    assert second.locator(".card").count() == first.locator(".card").count() == 1
    first.click("text=Cancel")
    state(first, "cancelled")
    state(second, "done")
    assert second.locator(".card").count() == first.locator(".card").count() == 1


def test_a_tab_goes_on_with_the_server_that_comes_after(chromium, clips, checkpoint, tmp_path):
    with serve(tmp_path, "--model", checkpoint) as before:
        before.wait_until_ready()
        page = chromium.new_page()
        page.set_default_timeout(SLOW)
        page.goto(before.url)
        page.wait_for_function("document.querySelector('#line')?.textContent.includes('steps')")
        page.click("#stop-1")
        give(page, clips)
        start(page)
        state(page, "done")
        # Its curves are longer than those of the next server at first.
        page.wait_for_function("Number(document.querySelector('#plot').dataset.points) > 5")
        page.evaluate("window.unchanged = true")
    with serve(tmp_path, "--model", checkpoint, port=before.port) as after:
        after.wait_until_ready()
        page.wait_for_function("document.querySelector('#start-note').textContent.includes('add them again')")
        state(page, "done")
        page.wait_for_function("document.querySelector('.made').readyState > 0")  # by its new address
        points = page.evaluate("Number(document.querySelector('#plot').dataset.points)")
        page.wait_for_function(f"Number(document.querySelector('#plot').dataset.points) > {points}")
        assert page.input_value("#level input[type=number]") == "0.5" and page.evaluate("window.unchanged")
        assert page.locator("#video video").count() == 0
        page.wait_for_function(f"!{EXPECTED}")
        give(page, clips)
        page.click("#start")
        page.wait_for_function("document.querySelectorAll('.card[data-state=done]').length == 2")
        assert page.inner_text("#notice") == page.inner_text("#start-note") == ""
    page.close()


def test_what_is_changed_while_no_server_answers_is_kept_and_takes_effect(chromium, checkpoint, tmp_path):
    with serve(tmp_path, "--model", checkpoint) as before:
        before.wait_until_ready()
        page = chromium.new_page()
        page.set_default_timeout(SLOW)
        page.goto(before.url)
        page.wait_for_function("document.querySelector('#line')?.textContent.includes('20 steps')")
        page.evaluate("window.unchanged = true")
    page.wait_for_function("document.querySelector('#load').textContent.includes('does not answer')")
    assert "does not answer" in page.inner_text("#notice")
    page.click("#stop-2")
    page.click("#start")
    page.wait_for_function("document.querySelector('#start-note').textContent.includes('did not answer')")
    with serve(tmp_path, "--model", checkpoint, port=before.port) as after:
        after.wait_until_ready()
        page.wait_for_function("document.querySelector('#line').textContent.includes('12 steps')")
        assert page.input_value("#level input[type=number]") == "1" and page.evaluate("window.unchanged")
        assert page.locator(".card").count() == 0, "no job was sent a second time"
    page.close()


def test_a_drawing_library_that_did_not_come_is_asked_for_again(chromium, server):
    page, refused, words = chromium.new_page(), [], []

    def refuse(route):
        if len(refused) == 2:
            return route.continue_()
        refused.append(route.request.url)
        route.abort()

    page.route("**/plotly.min.js", refuse)
    page.expose_function("heard", lambda said: words.append(said))
    page.add_init_script("setInterval(() => window.heard(document.querySelector('#load')?.textContent || ''), 100)")
    page.goto(server.url)
    page.wait_for_selector("#plot .trace", state="attached", timeout=SLOW)
    assert len(refused) == 2 and any("No job" in each for each in words)
    assert not any("does not answer" in each for each in words)
    page.close()


def test_what_cannot_be_used_gets_its_sentence_where_it_was_given(visit, clips):
    page = visit()
    page.click("#start")
    page.wait_for_function("document.querySelector('#start-note').textContent.includes('There is no video yet')")
    give(page, clips, video="faceless.mp4", expected=False)
    playwright.expect(page.locator("#video-note")).to_contain_text("No face was found")
    playwright.expect(page.locator("#audio-note .facts")).to_be_visible()
    page.evaluate("window.lipsync.describe()")
    page.wait_for_timeout(1000)
    assert not page.evaluate(EXPECTED), "how long a job takes that will fail"
    start(page)
    state(page, "failed")
    assert "'faceless.mp4' shows no face" in page.inner_text(".card .error")
    page.click("text=Choose another video")
    page.wait_for_function("document.activeElement.closest('#video') && !document.querySelector('#video video')")
    playwright.expect(page.locator("#video-note")).to_have_text(re.compile(r"^\s*$"), timeout=SLOW)
    page.set_input_files("#video input[type=file]", str(clips / "text.mp4"))
    playwright.expect(page.locator("#video-note .problem")).to_contain_text("text.mp4", timeout=SLOW)
    assert "is not a video that ffmpeg can read" in page.inner_text("#video-note")
    page.click("#start")
    playwright.expect(page.locator("#start-note")).to_contain_text("see the note at the file", timeout=SLOW)
    assert page.locator("#inputs :text('that ffmpeg can read')").count() == 1, "said once"
    page.click("#video [aria-label='Clear']")
    playwright.expect(page.locator("#video-note")).to_be_hidden(timeout=SLOW)


@pytest.mark.parametrize("size", [(1440, 900), (1024, 768), (390, 844)])
def test_everything_needed_is_in_view_and_stays_in_its_place(visit, clips, size):
    page = visit(*size)
    assert page.evaluate(BOTTOM) <= size[1]
    assert page.evaluate("window.shift") <= 0.05, "layout shift"
    give(page, clips, video="small.mp4", audio="silent.wav", expected=False)
    page.wait_for_selector("#video-note .warning")
    page.wait_for_selector("#audio-note .warning")
    assert page.evaluate(BOTTOM) <= size[1], "also when the files are there, and warnings"
    page.click("#video [aria-label='Clear']")
    page.click("#audio [aria-label='Clear']")
    give(page, clips)
    start(page)
    page.wait_for_function(
        "() => { const box = document.querySelector('.card')?.getBoundingClientRect();"
        " return box && box.top >= -1 && box.top < innerHeight - 100; }"
    )
    state(page, "done")


def test_on_a_low_screen_the_button_stays_in_reach_and_hides_nothing_for_good(visit, clips):
    page = visit(390, 560)
    give(page, clips, video="small.mp4", audio="silent.wav", expected=False)
    page.wait_for_selector("#video-note .warning")
    place = "document.querySelector('#line-box').getBoundingClientRect().top"
    assert page.evaluate(BOTTOM) <= 560 < page.evaluate(place), "while its place is below the view"
    page.focus("#stop-1")
    page.keyboard.press("Tab")
    focused = "document.activeElement.getBoundingClientRect().bottom"
    assert page.evaluate(focused) <= page.evaluate("document.querySelector('#start').getBoundingClientRect().top")
    page.evaluate("document.querySelector('#line-box').scrollIntoView({ block: 'center' })")
    assert page.evaluate(BOTTOM) <= page.evaluate(place), "in its place, once that is in view"


def test_a_double_click_is_one_job_and_a_start_during_the_upload_is_remembered(visit, clips):
    page = visit()
    page.set_input_files("#video input[type=file]", str(clips / "talking.mp4"))
    page.wait_for_selector("#video video")
    held = []
    page.route("**/gradio_api/upload*", lambda route: held.append(route))
    page.set_input_files("#audio input[type=file]", str(clips / "short.wav"))
    while not held:
        page.wait_for_timeout(50)
    page.click("#start")
    assert "as soon as your file is uploaded" in page.inner_text("#start-note")
    assert page.locator(".card").count() == 0
    held[0].continue_()
    state(page, "done")
    assert page.locator(".card").count() == 1
    page.dblclick("#start")
    page.wait_for_function("document.querySelectorAll('.card[data-state=done]').length == 2")
    page.evaluate("window.lipsync.refresh().then(window.lipsync.refresh)")
    assert page.locator(".card").count() == 2


def test_a_result_is_run_again_at_another_level_and_laid_over_the_first(visit, clips):
    page = visit()
    give(page, clips)
    start(page)
    state(page, "done")
    page.click(".again button:text-is('aggressive')")
    page.wait_for_function("document.querySelectorAll('.card[data-state=done]').length == 2")
    assert page.locator(".card .made-with").first.inner_text().startswith("aggressive · ")
    assert page.locator(".card .doing").first.inner_text().endswith("with the faces found before")
    page.click("#advanced > button")
    page.fill("#steps input[type=number]", "10")
    page.press("#steps input[type=number]", "Tab")
    page.locator(".rerun").first.click()
    page.wait_for_function("document.querySelectorAll('.card[data-state=done]').length == 3")
    newest = page.locator(".card").first
    newest.locator("summary").click()
    assert re.search(r"steps\s+10\b", newest.locator(".tables").inner_text())
    newest.locator(".with").focus()
    newest.locator(".with").select_option(index=2)
    newest.locator(".wipe").click()
    assert newest.locator(".original").get_attribute("src").endswith("talking-synced.mp4")


def test_several_voices_are_a_job_each_and_waiting_ones_are_moved_and_removed(visit, clips):
    page = visit()
    give(page, clips, audio="long.wav")
    start(page)
    state(page, "running")
    page.click("#more > button")
    page.set_input_files("#more input[type=file]", [str(clips / "short.wav"), str(clips / "other.wav")])
    page.wait_for_selector("#more-voices :text('other')")
    page.click("#audio [aria-label='Clear']")
    page.wait_for_timeout(1100)  # two clicks within a second are one
    page.click("#start")
    page.wait_for_function("document.querySelectorAll('.card[data-state=waiting]').length == 2")
    tops = "(state) => [...document.querySelectorAll(`.card[data-state=${state}]`)].map((card) => card.offsetTop)"
    assert max(page.evaluate(tops, "running")) < min(page.evaluate(tops, "waiting")), "as they will run"
    names = page.locator(".card[data-state=waiting] h2")
    waiting = "[...document.querySelectorAll('.card[data-state=waiting]')]"
    seen = f"() => {waiting}.sort((a, b) => a.style.order - b.style.order)"
    assert {names.nth(i).inner_text() for i in range(2)} == {"talking.mp4 + short.wav", "talking.mp4 + other.wav"}
    page.click(".earlier:visible")
    page.wait_for_function(f"({seen})()[0].textContent.includes('other.wav')")
    page.click(".card[data-state=waiting]:has-text('short.wav') .drop")
    page.wait_for_selector(".card:has-text('short.wav')", state="detached")
    page.click(".cancel:visible")
    page.wait_for_selector(".card[data-state=done]:has-text('other.wav')")


def test_settings_are_kept_by_the_browser(visit):
    page = visit()
    page.click("#stop-2")
    page.click("#advanced > button")
    page.fill("#steps input[type=number]", "10")
    page.press("#steps input[type=number]", "Tab")
    page.wait_for_function("document.querySelector('#line').textContent.includes('6 steps')")
    page.reload()
    page.wait_for_function("document.querySelector('#line')?.textContent.includes('6 steps')")
    page.wait_for_selector("#stop-2[aria-pressed=true]")


@pytest.mark.parametrize("kept", [False, True])
def test_settings_that_are_changed_while_the_page_loads_stay(chromium, server, kept):
    page, held = chromium.new_page(), []
    page.set_default_timeout(SLOW)
    page.goto(server.url)
    page.wait_for_function("document.querySelector('#line')?.textContent.includes('20 steps')")
    if kept:
        page.click("#stop-1")
        page.click("#advanced > button")
        page.fill("#steps input[type=number]", "10")
        page.press("#steps input[type=number]", "Tab")
        page.wait_for_function("document.querySelector('#line').textContent.includes(': 8 steps')")

    def hold(route):  # what asks for the settings to begin with, by those that were kept
        asks = (route.request.post_data or "").startswith(('{"data":[null],', '{"data":[['))
        held.append(route) if asks else route.continue_()

    page.route("**/run/predict", hold)
    page.reload()
    page.wait_for_selector("html[data-complete]")
    while not held:
        page.wait_for_timeout(50)
    page.click("#stop-2")
    page.wait_for_function("document.querySelector('#level input[type=number]').value == '1'")
    held[0].continue_()
    wanted = "6 steps" if kept else "12 steps"  # what was not changed is as it was kept
    page.wait_for_selector("#stop-0.best")  # of the reply
    page.wait_for_function(f"document.querySelector('#line').textContent.includes('{wanted}')")
    assert page.input_value("#level input[type=number]") == "1"
    page.close()


def give_faces(page, clips, folder, count):
    """Drop a picture that shows the same face so many times, in a row."""
    picture, inputs = folder / "faces.png", [option for _ in range(count) for option in ("-i", clips / "face.png")]
    ffmpeg(*inputs, "-filter_complex", f"hstack={count}", picture)
    page.set_input_files("#video input[type=file]", str(picture))
    page.wait_for_function(f"document.querySelectorAll('#video-note [data-face]').length == {count}")


def test_one_frame_is_painted_before_the_job_where_the_player_stands(visit, clips):
    page = visit()
    playwright.expect(page.locator("#preview")).to_be_hidden()
    give(page, clips)
    start(page)
    state(page, "done")  # which has shown how long a frame takes
    playwright.expect(page.locator("#preview")).to_have_text(re.compile(r"one frame \((about\s\d+|\d+\sto\s\d+)\ss\)"))
    for width in (390, 1024, 1440):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate(CLEAR), "no word is under the button"
    page.click("#preview")
    page.wait_for_selector("#one-frame img >> nth=1")
    assert "at 0.4 s, conservative" in page.inner_text("#one-frame"), "the middle"
    sizes = page.evaluate("[...document.querySelectorAll('#one-frame img')].map((each) => each.naturalWidth)")
    assert sizes == [SIDE, SIDE] and page.locator(".card").count() == 1
    page.evaluate("document.querySelector('#audio audio').currentTime = 0.2")
    page.click("#stop-2")
    page.wait_for_selector("#stop-2[aria-pressed=true]")
    page.click("#preview")
    playwright.expect(page.locator("#one-frame")).to_contain_text("at 0.2 s, aggressive")
    page.click("text=Close")
    playwright.expect(page.locator("#preview-box")).to_be_hidden()
    page.click("#preview")
    page.wait_for_selector("#one-frame img")
    page.click("#video [aria-label='Clear']")
    playwright.expect(page.locator("#preview")).to_be_hidden()
    playwright.expect(page.locator("#one-frame")).to_be_hidden()


def test_a_preview_waits_for_no_job(visit, clips):
    page, other = visit(), visit()
    give(page, clips)
    start(page)
    state(page, "done")
    give(other, clips, audio="long.wav")
    start(other)
    state(other, "running")
    page.click("#preview")
    playwright.expect(page.locator("#one-frame .problem")).to_contain_text("A job runs")
    other.click("text=Cancel")
    state(other, "cancelled")


def test_several_faces_are_shown_and_a_click_follows_one(visit, clips, tmp_path):
    page = visit()
    give_faces(page, clips, tmp_path, 2)
    page.click("#video-note [data-face] >> nth=1")
    page.wait_for_selector(
        "#video-note [data-face=right][aria-pressed=true], #video-note [data-face=largest][aria-pressed=true]"
    )
    assert page.locator("#video-note [aria-pressed=true]").count() == 1


def test_a_face_that_no_word_names_is_followed_by_a_point(visit, clips, tmp_path):
    page = visit()
    # Of four that are equally large, the first is the largest, and one in the middle is that in the centre.
    give_faces(page, clips, tmp_path, 4)
    page.click("#video-note [data-face*=',']")
    page.wait_for_selector("#video-note [data-face*=','][aria-pressed=true]")
    page.set_input_files("#audio input[type=file]", str(clips / "short.wav"))
    start(page)
    state(page, "done")
    page.click("#video [aria-label='Clear']")
    page.set_input_files("#video input[type=file]", str(clips / "face.png"))
    page.click("#advanced > button")
    playwright.expect(page.locator("#face input")).to_have_value("the largest")


def give_people(page, clips):
    """Drop the video of two people and a voice, and open the fields of other faces."""
    give(page, clips, video="people.mp4")
    page.wait_for_function("document.querySelectorAll('#video-note [data-face]').length == 2")
    page.click("#others > button")
    page.wait_for_selector("#faces-1 [aria-pressed=true]")


def take_few_steps(page):
    page.click("#advanced > button")
    page.fill("#steps input[type=number]", "4")
    page.press("#steps input[type=number]", "Tab")
    page.wait_for_function("/: 4 steps/.test(document.querySelector('#line').textContent)")


def marked(page, field) -> list[bool]:
    """Which thumbnail of a field is marked, from the left."""
    return page.locator(f"{field} [data-face]").evaluate_all("all => all.map((each) => each.ariaPressed === 'true')")


def until_marked(page, field, wanted):
    page.wait_for_selector(f"{field} [data-face]:nth-child({wanted.index(True) + 1})[aria-pressed=true]")
    assert marked(page, field) == wanted


def test_two_people_say_a_recording_each_in_one_job(visit, clips):
    page = visit()
    give_people(page, clips)
    assert "Another one can speak, too" in page.inner_text("#video-note")
    assert marked(page, "#faces-1") == [not mark for mark in marked(page, "#video-note")], "whoever is left"
    page.click("#video-note [data-face] >> nth=1")
    until_marked(page, "#video-note", [False, True])
    until_marked(page, "#faces-1", [True, False])
    # The time that is expected counts this voice.
    with page.expect_request(lambda request: "0.38" in (request.post_data or "")):
        page.set_input_files("#voice-1 input[type=file]", str(clips / "other.wav"))
    playwright.expect(page.locator("#other-1")).to_contain_text("0.4 s")
    page.wait_for_selector("#other-2 #voice-2")  # the next one may have a voice, too
    take_few_steps(page)
    start(page)
    state(page, "done")
    assert page.inner_text(".card h2") == "people.mp4 + short.wav + other.wav"
    page.wait_for_function("document.querySelector('.made').readyState > 0")
    assert page.evaluate("Math.round(document.querySelector('.made').duration * 25)") == 20, "as the longer voice"
    page.click(".card summary")
    said = re.search(r"faces and voices\s+(\w+): short.wav, (\w+): other.wav", page.inner_text(".card .tables"))
    assert said and set(said.groups()) in ({"right", "largest"}, {"largest", "left"})
    # With the settings of the page, and its faces, whatever the page's face is now.
    page.click("#video-note [data-face] >> nth=0")
    until_marked(page, "#video-note", [True, False])
    page.locator(".rerun").first.click()
    page.wait_for_function("document.querySelectorAll('.card[data-state=done]').length == 2")
    newest = page.locator(".card").first
    newest.locator("summary").click()
    assert said.group() in newest.locator(".tables").inner_text().replace("\xa0", " ")


def test_voices_that_do_not_fit_their_faces_get_a_sentence_at_their_fields(visit, clips):
    page = visit()
    give_people(page, clips)
    note = page.locator("#others-note")
    page.set_input_files("#voice-1 input[type=file]", str(clips / "other.wav"))
    taken = marked(page, "#video-note").index(True)
    page.click(f"#faces-1 [data-face] >> nth={taken}")
    playwright.expect(note).to_contain_text("The first and the second voice are for the same face")
    page.click("#start")
    page.wait_for_function("document.querySelector('#start-note').textContent.includes('for the same face')")
    assert page.locator(".card").count() == 0
    page.click(f"#faces-1 [data-face] >> nth={1 - taken}")
    playwright.expect(page.locator("#others-note p")).to_have_count(0)
    page.set_input_files("#voice-2 input[type=file]", str(clips / "short.wav"))
    playwright.expect(note).to_contain_text("Say which face says the third voice")
    playwright.expect(note).to_contain_text("There are 3 voices, and the first second of this video shows 2 faces")
    page.click("#voice-2 [aria-label='Clear']")
    playwright.expect(page.locator("#others-note p")).to_have_count(0)
    page.click("#more > button")
    page.set_input_files("#more input[type=file]", [str(clips / "short.wav")])
    playwright.expect(note).to_contain_text("is a job for each voice")
    page.wait_for_timeout(1100)  # two clicks within a second are one
    page.click("#start")
    page.wait_for_function("document.querySelector('#start-note').textContent.includes('clear one of them')")
    page.click("#more-voices [aria-label='Clear']")
    playwright.expect(page.locator("#others-note p")).to_have_count(0)
    page.click("#voice-1 [aria-label='Clear']")
    page.set_input_files("#voice-1 input[type=file]", str(clips / "text.mp4"))
    playwright.expect(page.locator("#other-1 .problem")).to_contain_text("text.mp4")
    # Another video has other faces.
    page.click("#video [aria-label='Clear']")
    page.set_input_files("#video input[type=file]", str(clips / "talking.mp4"))
    playwright.expect(page.locator("#video-note")).to_contain_text("1 face")
    playwright.expect(note).to_contain_text("Say which face says the second voice")
    playwright.expect(note).to_contain_text("shows 1 face.")
    assert page.locator("#faces-1 [data-face]").count() == 0


def test_a_sound_is_heard_in_place_of_the_voices_of_two_people(visit, clips):
    page = visit()
    give_people(page, clips)
    page.set_input_files("#voice-1 input[type=file]", str(clips / "other.wav"))
    page.set_input_files("#sound input[type=file]", str(clips / "other.wav"))
    playwright.expect(page.locator("#sound-note")).to_contain_text("0.4 s")
    take_few_steps(page)
    start(page)
    state(page, "done")
    page.wait_for_function("document.querySelector('.made').readyState > 0")
    assert page.evaluate("Math.round(document.querySelector('.made').duration * 25)") == 10, "as long as the sound"
    page.click(".card summary")
    assert re.search(r"sound of the result\s+other.wav", page.inner_text(".card .tables"))


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_fields_of_other_faces_fit_and_can_be_used_by_everybody(visit, clips, width, theme):
    page = visit(width, theme=theme)
    give_people(page, clips)
    if width == 1440:
        assert page.evaluate("document.querySelector('#start').getBoundingClientRect().bottom") <= 900
    page.set_input_files("#voice-1 input[type=file]", str(clips / "other.wav"))
    page.wait_for_selector("#voice-2")
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = page.evaluate(
        """() => [...document.querySelectorAll("#others :is(p, label, input, button, .faces)")].filter((node) =>
            node.offsetParent && node.scrollWidth > node.clientWidth + 1
        ).map((node) => node.outerHTML.slice(0, 120))"""
    )
    assert cut == []
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    found = [each for each in axe.Axe().run(page).response["violations"] if each["impact"] in ("serious", "critical")]
    assert found == [], [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found]


def test_progress_is_seen_outside_the_page(visit, clips):
    page = visit()
    give(page, clips, audio="long.wav")
    icon = page.get_attribute("link[rel=icon]", "href")
    start(page)
    state(page, "running")
    page.wait_for_function("/^\\d+ % · LatentSync$/.test(document.title)")
    assert page.get_attribute("link[rel=icon]", "href") != icon
    page.click("text=Cancel")
    state(page, "cancelled")
    page.wait_for_function("document.title == 'LatentSync'")
    assert page.get_attribute("link[rel=icon]", "href") == icon


def test_a_video_that_the_browser_cannot_show_is_seen_by_its_first_frame_and_is_no_error(visit, clips):
    page = visit()
    page.set_input_files("#video input[type=file]", str(clips / "old.avi"))
    page.wait_for_selector("#video video[poster^='data:image/jpeg']")
    page.wait_for_function("document.querySelector('#video video').error")
    size = page.evaluate(
        "async () => { const seen = new Image(); seen.src = document.querySelector('#video video').poster;"
        " await seen.decode(); return [seen.width, seen.height]; }"
    )
    assert size == [SIDE, SIDE]
    page.wait_for_timeout(1000)  # for Gradio's own opinion of it
    assert page.locator(".toast-body, .problem").count() == 0
    page.set_input_files("#audio input[type=file]", str(clips / "short.wav"))
    start(page)
    state(page, "done")
    page.wait_for_selector(".card figcaption:has-text('First frame of the original')")
    assert page.locator(".card .original[poster$='first-frame']:not([src])").count() == 1


COLOURS = """async () => {
    const video = document.querySelector("#video video"), poster = new Image();
    poster.src = video.poster;
    await poster.decode();
    const context = document.createElement("canvas").getContext("2d");
    return [poster, video].map((each) => {
        context.drawImage(each, 0, 0, 8, 8);
        return [...context.getImageData(4, 4, 1, 1).data.slice(0, 3)];
    });
}"""


@pytest.mark.parametrize("size", ["480x854", "1024x600", "320x240"])
def test_the_picture_of_a_video_without_a_colour_matrix_has_the_colours_with_which_it_plays(visit, tmp_path, size):
    page = visit()
    plane = ("-f", "lavfi", "-i", f"color=0xc83c28:s={size}:d=1", "-vf", "format=yuv420p,setparams=colorspace=unknown")
    ffmpeg(*plane, "-c:v", "libx264", "-crf", 8, tmp_path / "plane.mp4")
    page.set_input_files("#video input[type=file]", str(tmp_path / "plane.mp4"))
    page.wait_for_selector("#video video[poster^='data:image/jpeg']")
    page.wait_for_function("document.querySelector('#video video').readyState >= 2")
    pictured, played = page.evaluate(COLOURS)
    assert max(abs(a - b) for a, b in zip(pictured, played, strict=True)) <= 6, (pictured, played)


def test_a_picture_is_dropped_or_chosen_where_a_video_goes_and_speaks(visit, clips):
    page = visit()
    chosen = "document.querySelector('#video input[type=file]')"
    page.click("#video")
    assert "image/*" in page.evaluate(f"{chosen}.accept")
    page.evaluate(
        """async (data) => {
            const given = new DataTransfer();
            given.items.add(new File([await (await fetch(data)).blob()], "my face.png", { type: "image/png" }));
            const where = document.querySelector("#video input[type=file]").parentElement;
            where.dispatchEvent(new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: given }));
        }""",
        f"data:image/png;base64,{b64encode((clips / 'face.png').read_bytes()).decode()}",
    )
    page.wait_for_selector("#video video[poster^='data:image/jpeg']")
    playwright.expect(page.locator("#video-note .facts")).to_have_text(f"a picture · {SIDE} × {SIDE} · 1 face")
    page.hover("#video video")
    seen = page.locator("#video :is(.controls, .error, [aria-label*='Trim'], [aria-label='Clear']):visible")
    playwright.expect(seen).to_have_count(1)  # it is to be taken out, and neither played nor cut
    page.set_input_files("#audio input[type=file]", str(clips / "short.wav"))
    start(page)
    state(page, "done")
    page.wait_for_selector(".card figcaption:text-is('Original, a picture')")
    assert page.locator(".card .original[poster$='first-frame']").count() == 1
    assert page.locator(".toast-body, .problem").count() == 0


def test_a_picture_that_is_looked_at_is_no_error_meanwhile(visit, clips):
    page = visit()
    page.evaluate(
        """() => { window.errors = 0; const look = () => {
            errors += [...document.querySelectorAll("#video .error")].some((each) => each.checkVisibility());
            requestAnimationFrame(look); }; look(); }"""
    )
    page.set_input_files("#video input[type=file]", str(clips / "face.png"))
    page.wait_for_function("document.querySelector('#video video')?.error")
    page.wait_for_selector("#video-note .facts")
    assert page.evaluate("errors") == 0
    page.click("#video [aria-label='Clear']")
    page.set_input_files("#video input[type=file]", str(clips / "talking.mp4"))
    page.wait_for_selector("#video-note .facts:has-text('frames/s')")
    page.hover("#video video")
    playwright.expect(page.locator("#video .controls").first).to_be_visible()


def test_the_page_stays_in_view_when_files_are_given_and_taken_back(visit, clips):
    page = visit()
    page.evaluate(
        """() => { window.hiddenFrames = 0; const look = () => {
            hiddenFrames += getComputedStyle(document.querySelector("#start")).visibility !== "visible";
            requestAnimationFrame(look); }; look(); }"""
    )
    give(page, clips)
    page.click("#video [aria-label='Clear']")
    page.click("#video .source-selection button >> nth=1")  # the webcam, whose field takes no file
    page.wait_for_timeout(300)
    assert page.evaluate("hiddenFrames") == 0


@pytest.mark.parametrize("field, name, words", [
    ("video", "IMG_2041.MOV", "1 face"), ("video", "clip", "1 face"), ("video", "short.wav", "holds no picture"),
    ("audio", "IMG_2041.MOV", "2.0 s"), ("audio", "note.caf", "is silent"), ("audio", "text.mp4", "text.mp4"),
])  # fmt: skip
def test_a_file_of_any_type_is_looked_at_whatever_the_browser_takes_it_for(visit, clips, tmp_path, field, name, words):
    """A phone's IMG_2041.MOV has no type in some browsers, and Gradio's fields ignore what has none that they know."""
    sound = ("-f", "lavfi", "-i", "anullsrc=r=16000:cl=mono", "-t", 2)
    given = tmp_path / name
    if name == "note.caf":
        ffmpeg(*sound, given)
    elif (clips / name).exists():
        shutil.copy(clips / name, given)
    else:
        tone = ("-f", "lavfi", "-i", "sine=300:duration=2")
        ffmpeg("-i", clips / "talking.mp4", *tone, "-c:v", "copy", "-c:a", "aac", "-f", "mov", given)
    page = visit()
    page.click("#start")
    page.wait_for_function("document.querySelector('#start-note').textContent.includes('There is no')")
    page.set_input_files(f"#{field} input[type=file]", str(given))
    playwright.expect(page.locator(f"#{field}-note")).to_contain_text(words, timeout=SLOW)
    assert page.inner_text("#start-note") == "", "what was said of the empty form"


def test_a_file_that_is_dropped_replaces_the_one_before_and_never_the_page(visit, clips):
    page = visit()
    page.set_input_files("#video input[type=file]", str(clips / "talking.mp4"))
    playwright.expect(page.locator("#video-note")).to_contain_text("frames/s", timeout=SLOW)
    drop = """async ([where, data]) => {
        const given = new DataTransfer();
        given.items.add(new File([await (await fetch(data)).blob()], "other.png", { type: "image/png" }));
        const event = new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: given });
        document.querySelector(where).dispatchEvent(event);
        return event.defaultPrevented;
    }"""
    picture = f"data:image/png;base64,{b64encode((clips / 'face.png').read_bytes()).decode()}"
    assert page.evaluate(drop, ["#live", picture]), "the browser would open it"
    playwright.expect(page.locator("#start-note")).to_contain_text("Drop a video on the upper field", timeout=SLOW)
    assert page.evaluate(drop, ["#video video", picture])
    playwright.expect(page.locator("#video-note")).not_to_contain_text("frames/s", timeout=SLOW)
    playwright.expect(page.locator("#video-note")).to_contain_text("1 face", timeout=SLOW)


def test_the_curves_get_a_point_every_second_and_do_not_flicker(visit):
    page = visit()
    page.wait_for_selector("#plot .trace", state="attached")
    points = "Number(document.querySelector('#plot').dataset.points)"
    page.evaluate("document.querySelector('#plot svg').dataset.kept = 'yes'")
    # The drawing library took its time, in which points gathered; a busy server may be late with some, never early.
    page.evaluate("window.lipsync.refresh().then(window.lipsync.refresh)")
    before, began = page.evaluate(points), time.monotonic()
    page.wait_for_function(f"{points} >= {before + 8}")
    assert page.evaluate(points) - before <= time.monotonic() - began + 3
    assert page.evaluate("document.querySelector('#plot svg').dataset.kept") == "yes"  # the same drawing, not a new one
    assert page.locator("#plot .trace").count() >= 2


@pytest.mark.parametrize("count, width", [(2, 390), (8, 1440), (8, 1024)])
def test_the_curves_of_every_gpu_are_drawn_and_jobs_sharing_them_is_explained(chromium, server, count, width):
    page = chromium.new_page(viewport={"width": width, "height": 900})

    def with_gpus(route):
        reply = route.fetch()
        body = reply.json()
        live, names = body["data"][0]["live"], [f"GPU {i}{part}" for i in range(count) for part in ("", " memory")]
        live["curves"] = {name: [10.0 * i + 5] * len(live["time"]) for i, name in enumerate(names[:10])} | {
            name: [50.0] * len(live["time"]) for name in names[10:]
        }
        live["memory"] = {f"GPU {i}": 80 * 2**30 for i in range(count)}
        body["data"][0]["sharing"] = f"{count} GPUs: up to {count} jobs at once."
        route.fulfill(response=reply, json=body)

    page.route("**/gradio_api/run/watch", with_gpus)
    page.goto(server.url)
    page.wait_for_function(
        f"document.querySelectorAll('#plot .scatterlayer .trace').length === {2 * count}", timeout=SLOW
    )
    styles = page.eval_on_selector_all(
        "#plot .scatterlayer .js-line", "lines => lines.map((each) => each.getAttribute('style'))"
    )
    assert len(styles) == 2 * count == len(set(styles)), "each can be told from the others"
    height = page.evaluate("document.querySelector('#plot')._fullLayout._size.h")  # of what the curves are drawn in
    legend, box = (page.locator(selector).bounding_box() for selector in ("#plot .legend", "#plot"))
    assert height >= 80 and legend["y"] >= box["y"] - 1, (height, legend, box)
    assert legend["x"] + legend["width"] <= box["x"] + box["width"] + 1
    assert page.locator("#now").inner_text().count("memory") == count
    assert page.locator("#sharing").inner_text() == f"{count} GPUs: up to {count} jobs at once."
    page.unroute_all(behavior="ignoreErrors")
    page.close()


def test_a_poll_while_a_job_runs_is_less_than_a_kilobyte(visit, clips):
    page = visit()
    give(page, clips, audio="long.wav")
    start(page)
    page.wait_for_selector(".card .newest:not([hidden])")
    sizes = []
    while len(sizes) < 3:
        with page.expect_request_finished(lambda request: request.url.endswith("/run/watch")) as seen:
            pass
        points = seen.value.response().json()["data"][0]["live"]["time"]
        if len(points) > 4:  # on a loaded machine a poll may come late, with all that was measured meanwhile
            continue
        size = seen.value.sizes()
        sizes.append(size["responseBodySize"] + size["responseHeadersSize"])
    assert max(sizes) < 1000
    page.click("text=Cancel")
    state(page, "cancelled")


def test_a_tab_draws_little_while_a_job_runs_and_gets_less_than_a_kilobyte_a_second(chromium, visit, clips):
    """Nothing moves with the screen's frames, as Gradio's clock of its own loading would.

    This is the first minute, in which a tab asks most often. Pictures count apart: they come ever less often.
    """
    page = visit()
    give(page, clips, audio="long.wav")
    start(page)
    page.wait_for_selector(".card .newest:not([hidden])")
    page.wait_for_selector("#plot .trace", state="attached")
    traffic, began, seconds = Traffic(page), time.monotonic(), 12
    drawn = drawing(chromium, page, seconds)
    passed = time.monotonic() - began
    assert page.evaluate("document.getAnimations().length") == 0
    assert drawn["FireAnimationFrame"] <= seconds and drawn["UpdateLayoutTree"] <= 10 * seconds, drawn
    # Whole polls: one that began before may end in this time, so the first is left out.
    polls, size = traffic.requests["watch"], traffic.bytes["watch"]
    assert polls >= 2 and (polls - 1) * size / polls < 1000 * passed, traffic.bytes
    assert set(traffic.requests) <= {"watch", "picture", "first.mp4"}, traffic.requests
    page.click("text=Cancel")
    state(page, "cancelled")


LATE = """window.late = 0;
const ask = window.fetch.bind(window);
window.fetch = async (what, how) => {
    const reply = await ask(what, how);
    if (String(how?.body).includes("as the level says") && window.late > 0) {
        window.late -= 1;
        await new Promise((resolve) => setTimeout(resolve, 6000));
    }
    return reply;
};"""


def test_an_answer_that_comes_late_does_not_take_the_place_of_a_newer_one(visit, clips):
    """The expected time was missing until something changed."""
    page = visit()
    page.add_init_script(LATE)
    page.reload()
    page.wait_for_function("document.querySelector('#line')?.textContent.includes('steps')")
    page.evaluate("window.late = 1")
    page.click("#stop-2")
    give(page, clips)
    page.wait_for_timeout(7000)
    assert page.evaluate(EXPECTED), page.inner_text("#line")
    assert page.evaluate("window.late") == 0


TURNS = """const every = window.setInterval.bind(window), ask = window.fetch.bind(window);
window.polls = 0;
window.setInterval = (act, pause) => (String(act).includes("changesSoon") ? (window.turn = act, 0) : every(act, pause));
window.fetch = (what, how) => { window.polls += String(what).endsWith("/run/watch"); return ask(what, how); };"""


def test_the_longer_a_job_runs_the_fewer_polls_and_pictures_come_unasked(visit, clips):
    page = visit()
    give(page, clips, audio="long.wav")
    start(page)
    page.wait_for_selector(".card .newest:not([hidden])")
    ages, shown = [], []

    def older(route):  # by ten seconds with every poll, each with another picture
        reply = route.fetch()
        body = reply.json()
        job = body["data"][0]["jobs"][0]
        ages.append(10 * len(ages) + 10)
        job |= {"elapsed": ages[-1], "seconds_left": 1000, "picture": f"{job['picture'].split('?')[0]}?{ages[-1]}"}
        route.fulfill(response=reply, json=body)

    page.add_init_script(TURNS)
    page.route("**/run/watch", older)
    page.on("request", lambda request: "/picture?" in request.url and shown.append(int(request.url.split("?")[1])))
    page.reload()
    state(page, "running")
    page.evaluate("async () => { for (let i = 0; i < 40; i += 1) await window.lipsync.refresh(); }")
    wanted = [10, 30, 80, 200, 320]
    assert ages[-1] >= 400 and shown[: len(wanted)] == wanted, shown
    assert all(after - before >= 120 for before, after in zip(shown[3:], shown[4:], strict=False)), shown
    before = len(shown)
    with page.expect_request("**/picture?*"):
        page.click(".newest button")  # who wants to see more gets it at once
    assert len(shown) == before + 1
    turns = """async () => { const before = polls; for (let i = 0; i < 20; i += 1) {
        window.turn(); await new Promise((resolve) => setTimeout(resolve, 100)); } return polls - before; }"""
    assert 1 <= page.evaluate(turns) <= 10, "after a minute, every second time"
    page.unroute_all(behavior="wait")
    with page.expect_response("**/run/cancel"):
        page.click("text=Cancel")


def test_the_meters_of_a_gpu_are_read_under_the_curves(visit):
    page = visit()

    def with_gpu(route):
        reply = route.fetch()
        body = reply.json()
        body["data"][0]["live"]["sensors"] = {"GPU 0": [312, 71, 1980], "GPU 1": [None, 40, None], "GPU 2": [None] * 3}
        route.fulfill(response=reply, json=body)

    page.route("**/run/watch", with_gpu)
    playwright.expect(page.locator("#now")).to_contain_text("GPU 0 312 W, 71 °C, 1980 MHz · GPU 1 40 °C")
    assert "GPU 2" not in page.inner_text("#now")
    page.unroute_all(behavior="wait")


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_scrolls_sideways(visit, clips, width, theme):
    page = visit(width, theme=theme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.click("#advanced > button")
    page.click("#doctor > button")
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    page.click("#theme")
    assert page.evaluate("document.body.classList.contains('dark')") == (theme != "dark")


def test_every_control_has_a_name_and_can_be_reached_by_keyboard(visit):
    page = visit()
    page.click("#advanced > button")
    nameless = page.evaluate("""() =>
        [...document.querySelectorAll('button, input:not([type=file]), video, progress')].filter((node) =>
            node.offsetParent && !(node.innerText || node.ariaLabel || node.labels?.length || node.title
                || node.getAttribute('aria-labelledby') || node.placeholder)
        ).map((node) => node.outerHTML.slice(0, 120))""")
    assert nameless == []
    page.focus("#start")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent.trim()") == "Face one"
    shared = page.locator("[aria-label*='hare' i], [title*='hare' i]").count()
    assert shared == 0, "nothing is offered that uploads a face or a voice to a public place"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_any_state(visit, clips, theme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page, found = visit(theme=theme), []

    def check(what):
        page.evaluate("window.lipsync.refresh().then(window.lipsync.refresh)")
        for violation in axe.Axe().run(page).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                found.append((what, violation["id"], [node["html"][:200] for node in violation["nodes"]]))

    check("first visit")
    page.click("#advanced > button")
    page.wait_for_selector("#models article")
    check("advanced")
    page.click("#advanced > button")
    give(page, clips, audio="long.wav")
    start(page)
    page.wait_for_selector(".card .newest:not([hidden])")
    check("running")
    page.click("text=Stop and keep what is finished")
    page.wait_for_selector(".card .made")
    page.click(".card summary")
    page.click("text=Show the timeline")
    page.wait_for_selector("#timeline .js-plotly-plot")
    check("finished")
    page.click("#video [aria-label='Clear']")
    give(page, clips, video="faceless.mp4", audio=None)
    page.click("#start")
    state(page, "failed")
    check("failed")
    assert found == [], "\n".join(map(str, found))
