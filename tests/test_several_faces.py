"""Several faces with a voice each in jobs of the page and by its API."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from clips import make_sound
from conftest import save_video
from gradio_client import Client, handle_file
from serving import ROOT, serve
from test_people import LEFT, ONE, OTHER, RIGHT, WIDTH, scene

from latentsync.errors import UserError
from latentsync.media import probe_video, read_audio, read_frames
from optim.serving import form
from optim.serving.job import DONE, MAX_OTHERS, OtherVoice, Request
from optim.serving.run import run_alone
from optim.serving.speeds import Speeds
from optim.serving.worker import Worker

ME = "m" * 24
SLOW = 300  # seconds that a job may take on a busy machine
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two people side by side, a low and a longer high voice, a sound, and a text."""
    folder = tmp_path_factory.mktemp("clips")
    frames = [scene((ONE, (LEFT[0] + t % 4, 10)), (OTHER, (RIGHT[0] - t % 3, 10))) for t in range(10)]
    save_video(folder / "two.mp4", frames, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", 6)
    make_sound(folder / "low.wav", seconds=0.3, source="sine=f=330:r=16000")
    make_sound(folder / "high.wav", seconds=0.4, source="sine=f=880:r=16000")
    make_sound(folder / "music.wav", seconds=0.2, source="sine=f=600:r=16000")
    make_sound(folder / "long.wav", seconds=20)
    (folder / "text.wav").write_text("this is no sound\n" * 50)
    return folder


def request(clips, **changes) -> Request:
    others = (OtherVoice("right", clips / "high.wav"),)
    return Request(clips / "two.mp4", clips / "low.wav", **{"steps": 1, "face": "left", "others": others} | changes)


def painted(before: Path, after: Path) -> tuple[bool, bool]:
    """Whether the left and the right face of a film have another mouth in another one."""
    film, result = (np.stack(list(read_frames(probe_video(path)))).astype(int) for path in (before, after))
    count = min(len(film), len(result))
    change = np.abs(film[:count] - result[:count]).mean(-1)
    return bool(change[..., : WIDTH // 2].max() > 12), bool(change[..., WIDTH // 2 :].max() > 12)


def heard(path: Path) -> set[int]:
    """Which of the tones of `clips` are in a file."""
    wav = read_audio(path)
    spectrum, hertz = np.abs(np.fft.rfft(wav)), np.fft.rfftfreq(len(wav), 1 / 16000)
    peaks = {tone: spectrum[np.abs(hertz - tone) < 8].max() for tone in (330, 600, 880)}
    return {tone for tone, peak in peaks.items() if peak > 0.1 * max(peaks.values())}


def ended(worker, job):
    assert worker.wait(job, SLOW), job
    return job


def test_a_job_gives_every_face_its_voice_and_names_them(worker, clips):
    names = ("film.mp4", "anna.wav", "ben.wav")
    job = ended(worker, worker.submit(request(clips), ME, names))
    assert job.state == DONE, job.error
    assert job.frames == job.report["frames"] == probe_video(job.output).n_frames == 10, "as long as the longest voice"
    assert painted(clips / "two.mp4", job.output) == (True, True)
    assert heard(job.output) == {330, 880}
    view = job.view(None)
    assert view["names"] == ("film.mp4", "anna.wav") and view["sound"] is None
    assert view["others"] == [{"face": "right", "name": "ben.wav"}] and "others" not in view["settings"]
    stored = sorted(os.listdir(job.folder))
    assert stored == sorted(["job.json", job.output.name, "video.mp4", "voice.wav", "voice-2.wav"])


def test_a_sound_is_heard_in_place_of_the_voices_and_the_result_lasts_as_long(worker, clips):
    job = ended(worker, worker.submit(request(clips, sound=clips / "music.wav"), ME))
    assert job.state == DONE, job.error
    assert job.frames == job.report["frames"] == 5 and heard(job.output) == {600}
    assert job.view(None)["sound"] == "music.wav" and job.request.sound.parent == job.folder


def test_the_preview_of_the_first_seconds_has_all_voices(worker, clips, monkeypatch):
    from optim.serving import run

    kept, close = clips / "first.mp4", run.Preview.close

    def keep(preview):
        close(preview)
        shutil.copy(preview._job.first, kept)

    monkeypatch.setattr(run.Preview, "close", keep)
    assert ended(worker, worker.submit(request(clips), ME)).state == DONE
    assert heard(kept) == {330, 880}


def test_a_job_that_runs_again_has_all_its_voices(worker, clips):
    first = ended(worker, worker.submit(request(clips, sound=clips / "music.wav"), ME, ("f.mp4", "a", "b", "c")))
    again = worker.again(first.id, ME, seed=5)
    assert again.names == first.names and again.request.settings()["seed"] == 5
    for mine, theirs in zip(again.request.files, first.request.files, strict=True):
        assert mine.samefile(theirs) and mine.parent == again.folder
    assert ended(worker, again).state == DONE
    with pytest.raises(UserError, match="same face was asked for twice"):
        worker.again(first.id, ME, face="right")
    worker.remove(again.id, ME)
    assert not again.folder.exists() and first.request.others[0].audio.is_file()


def test_a_new_server_finds_all_voices_and_finishes_the_job(clips, checkpoint, tmp_path, monkeypatch, home):
    before = Worker(tmp_path)  # not started: jobs wait
    kept = before.submit(request(clips, sound=clips / "music.wav"), ME, ("f.mp4", "a", "b", "c"))
    lost = before.submit(request(clips), ME)
    old = before.submit(Request(clips / "two.mp4", clips / "low.wav", steps=1), ME)
    lost.request.others[0].audio.unlink()
    record = json.loads((old.folder / "job.json").read_text())
    del record["others"], record["sound"]  # as earlier versions wrote it
    (old.folder / "job.json").write_text(json.dumps(record))
    monkeypatch.setattr("optim.serving.records._is_running", lambda _: False)
    after = Worker(tmp_path, model=str(checkpoint), device="cpu")
    after.start()
    try:
        found = {job.id: job for job in after.store.jobs_of(ME)}
        assert found.keys() == {kept.id, old.id} and not lost.folder.exists(), "a voice is missing"
        assert found[kept.id].request == kept.request and found[kept.id].names == kept.names
        assert ended(after, found[kept.id]).state == DONE and heard(found[kept.id].output) == {600}
        assert ended(after, found[old.id]).state == DONE
    finally:
        after.close()


@pytest.mark.parametrize(
    "change",
    [
        {"others": [{"face": "right", "audio": "../../elsewhere.wav"}]},
        {"others": [{"face": "left", "audio": "voice-2.wav"}]},
        {"others": [{"audio": "voice-2.wav"}]},
        {"others": "right"},
        {"others": []},
        {"sound": "sound.wav"},
        {"names": ["f", "a"]},
    ],
    ids=str,
)
def test_a_record_whose_voices_make_no_sense_is_left_alone(clips, tmp_path, monkeypatch, change):
    job = Worker(tmp_path).submit(request(clips), ME)
    record = json.loads((job.folder / "job.json").read_text()) | {"state": "done", "output": None}
    path = job.folder / "job.json"
    monkeypatch.setattr("optim.serving.records._is_running", lambda _: False)
    path.write_text(json.dumps(record))
    control = Worker(tmp_path)
    control.store.load()
    assert len(control.store.all()) == 1
    path.write_text(json.dumps(record | change))
    after = Worker(tmp_path)
    after.store.load()
    assert after.store.all() == [] and job.folder.is_dir()


def test_a_lent_gpu_gets_all_voices(clips, checkpoint, tmp_path):
    report = run_alone(request(clips), tmp_path / "out.mp4", str(checkpoint))
    assert report["frames"] == 10 and heard(tmp_path / "out.mp4") == {330, 880}
    assert painted(clips / "two.mp4", tmp_path / "out.mp4") == (True, True)


def test_a_voice_that_cannot_be_used_is_refused_by_the_user_s_name_for_it(worker, clips):
    before = set(worker.folder.iterdir())
    broken = (OtherVoice("right", clips / "text.wav"),)
    with pytest.raises(UserError, match="'ben.wav' is not a"):
        worker.submit(request(clips, others=broken), ME, ("film.mp4", "anna.wav", "ben.wav"))
    with pytest.raises(UserError, match="'hum.wav' is not a"):
        worker.submit(request(clips, sound=clips / "text.wav"), ME, ("film.mp4", "anna.wav", "ben.wav", "hum.wav"))
    assert set(worker.folder.iterdir()) == before


def test_every_voice_is_held_to_the_longest_sound(clips, tmp_path):
    worker = Worker(tmp_path, max_seconds=10)
    for files in ({"others": (OtherVoice("right", clips / "long.wav"),)}, {"sound": clips / "long.wav"}):
        with pytest.raises(UserError, match="lasts more than 10 s"):
            worker.submit(request(clips, **files), ME)


def test_a_face_has_one_voice_and_a_job_not_too_many(clips):
    with pytest.raises(UserError, match="same face was asked for twice"):
        request(clips, face="right")
    voice = clips / "low.wav"
    with pytest.raises(UserError, match="same face was asked for twice"):
        request(clips, face="12,30", others=(OtherVoice("12.0,30@0", voice),))
    with pytest.raises(UserError, match=f"give one to {MAX_OTHERS + 1} at most"):
        request(clips, others=tuple(OtherVoice(f"{number},5", voice) for number in range(MAX_OTHERS + 1)))


@pytest.mark.parametrize(
    "value", ["right", 5, {"face": "right"}, [[]], [{"face": "right"}], [{"face": "up", "audio": None}],
              [{"face": "right", "audio": None, "seed": 5}], [{"face": None, "audio": None}]],
    ids=str,
)  # fmt: skip
def test_other_voices_of_another_form_are_refused(value):
    with pytest.raises(UserError, match="give"):
        form.parse_others(value)


def test_two_people_are_expected_to_take_twice_as_long(worker, clips, tmp_path, monkeypatch):
    speeds = Speeds(tmp_path / "speeds.json")
    monkeypatch.setattr(worker, "speeds", speeds)
    monkeypatch.setattr(worker.runner, "_speeds", speeds)
    ended(worker, worker.submit(request(clips), ME))
    assert speeds.jobs == 1
    ((seconds,),) = [values for works in speeds._seconds.values() for values in works.values()]
    one, two = (
        worker.describe(replace(request(clips), others=()), 100_000 / seconds / 25, people=people)[0]
        for people in (1, 2)
    )
    hours = [[float(word) for word in line.split() if word.replace(".", "").isdigit()][-1] for line in (one, two)]
    assert hours[1] == pytest.approx(2 * hours[0], rel=0.02) and hours[0] > 10


# ---- by the API


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoint):
    temp, before = tmp_path_factory.mktemp("uploads"), os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(temp)
    try:
        with serve(tmp_path_factory.mktemp("page"), "--model", checkpoint) as server:
            server.temp = temp
            server.wait_until_ready()
            yield server
    finally:
        del os.environ["GRADIO_TEMP_DIR"]
        if before is not None:
            os.environ["GRADIO_TEMP_DIR"] = before


def watched(client, reply) -> dict:
    jobs = client.predict(reply["visitor"], 0, api_name="/watch")["jobs"]
    return next(job for job in jobs if job["id"] == reply["job"])


def done(client, reply) -> dict:
    began = time.monotonic()
    while (job := watched(client, reply))["state"] in ("waiting", "running"):
        assert time.monotonic() - began < SLOW, job
        time.sleep(0.1)
    assert job["state"] == "done", job
    return job


def test_the_example_of_the_documents_gives_each_of_two_faces_its_voice(server, clips):
    pieces = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").split("```")
    (example,) = [piece.removeprefix("python") for piece in pieces if "others=[" in piece]
    files = {"talk.mp4": "two.mp4", "anna.wav": "low.wav", "ben.wav": "high.wav"}
    names = {
        "client": Client(server.url, verbose=False),
        "handle_file": lambda name: handle_file(clips / files[name]),
    }
    exec(example, names)  # noqa: S102
    result = Path(names["video"])
    assert probe_video(result).n_frames == 10 and heard(result) == {330, 880}
    assert painted(clips / "two.mp4", result) == (True, True)


def test_the_files_of_all_voices_are_kept_for_another_run_and_go_with_the_job(server, clips):
    def voices_uploaded() -> set[Path]:
        return {path for path in server.temp.rglob("*") if path.name in ("high.wav", "music.wav")}

    client = Client(server.url, verbose=False)
    before, jobs = voices_uploaded(), set(server.outputs.glob("*"))
    hints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]["/submit"]["parameters"]
    types = {each["parameter_name"]: each["type"] for each in hints}
    (others,) = [each for each in types["others"]["oneOf"] if each["type"] == "array"]
    assert others["items"]["required"] == ["face", "audio"], "clients are told of the form"
    reply = client.predict(
        video=handle_file(clips / "two.mp4"), audio=handle_file(clips / "low.wav"), level=0, face="left", steps=1,
        others=[{"face": "right", "audio": handle_file(clips / "high.wav")}], sound=handle_file(clips / "music.wav"),
        api_name="/submit",
    )  # fmt: skip
    job = done(client, reply)
    assert (job["names"], job["sound"]) == (["two.mp4", "low.wav"], "music.wav")
    assert job["others"] == [{"face": "right", "name": "high.wav"}]
    again = client.predict(reply["job"], {"seed": 3}, reply["visitor"], api_name="/again")
    assert done(client, again)["others"] == job["others"]
    uploaded = voices_uploaded() - before
    assert {path.name for path in uploaded} == {"high.wav", "music.wav"}
    for each in (reply, again):
        client.predict(each["job"], reply["visitor"], api_name="/remove")
    assert not any(path.exists() for path in uploaded)
    assert set(server.outputs.glob("*")) == jobs


def post(server, name: str, body: dict) -> httpx.Response:
    return httpx.post(f"{server.url}/gradio_api/call/v2/{name}", json=body, timeout=SLOW)


def test_files_within_the_voices_are_held_to_uploads_as_any_other(server, clips):
    def upload(name: str) -> dict:
        with open(clips / name, "rb") as file:
            (path,) = httpx.post(f"{server.url}/gradio_api/upload", files={"files": file}, timeout=SLOW).json()
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    body = {"video": upload("two.mp4"), "audio": upload("low.wav"), "face": "left"}
    log, jobs = len(server.log.read_text()), set(server.outputs.glob("*"))
    for path in ("/etc/passwd", str(clips / "low.wav"), "http://127.0.0.1:9/a.wav", str(server.outputs), "a.wav", 5):
        for file in ({"path": path, "meta": {"_type": "gradio.FileData"}}, {"path": path}, path):
            for voices in ({"others": [{"face": "right", "audio": file}]}, {"sound": file}):
                found = post(server, "submit", body | voices)
                if found.status_code == 200:  # a call that is accepted says its error when its result is read
                    event = found.json()["event_id"]
                    said = httpx.get(f"{server.url}/gradio_api/call/submit/{event}", timeout=SLOW).text
                    assert "event: error" in said and "no uploaded" in said, said
                else:
                    assert found.status_code == 400 and "was not uploaded" in found.json()["error"], found.text
    assert set(server.outputs.glob("*")) == jobs and "Traceback" not in server.log.read_text()[log:]


def test_voices_that_do_not_fit_are_refused_with_a_sentence(server, clips):
    client = Client(server.url, verbose=False)
    film, low, high = (handle_file(clips / name) for name in ("two.mp4", "low.wav", "high.wav"))
    before = set(server.outputs.glob("*"))
    for others, words in (
        ([{"face": "left", "audio": high}], "same face was asked for twice"),
        ([{"face": "right", "audio": high}] * 2, "same face was asked for twice"),
        ([{"face": "upper", "audio": high}], "no face 'upper'"),
        ([{"face": "right"}], "Another voice is"),
        ([{"face": "right", "audio": None}], "There is no voice yet"),
        ("right", "The other voices are"),
        ([{"face": "right", "audio": handle_file(clips / "text.wav")}], "'text.wav' is not a"),
    ):
        for endpoint in ("/submit", "/lipsync"):
            with pytest.raises(Exception, match=words):
                client.predict(video=film, audio=low, face="left", steps=1, others=others, api_name=endpoint)
    assert set(server.outputs.glob("*")) == before
    with pytest.raises(Exception, match="The number of people"):
        client.predict(people=100, api_name="/describe")


# ---- the fields of the page, without a browser


@pytest.fixture(scope="module")
def fields():
    import gradio as gr

    from optim.serving.other_faces import OtherFaces

    with gr.Blocks():
        return OtherFaces(gr.WaveformOptions())


TWO = [["largest", "left", "10,10"], ["right", "90,10"]]  # names of the faces of a look
FILE = {"path": "voice.wav"}


@pytest.mark.parametrize(
    "faces, first, chosen, spread",
    [
        (TWO, "largest", (), ["right", None, None]),
        (TWO, "right", (), ["largest", None, None]),
        (TWO, "90,10", (), ["largest", None, None]),
        (TWO, "right", ("right", None, None), ["largest", None, None]),
        (TWO, "left", ("right", "33,4", None), ["right", "33,4", None]),
        (TWO, "33,4", ("33,4", "33.0,4@0", "left"), ["largest", "right", None]),
        ([*TWO, ["50,10"]], "right", ("right", "50,10", None), ["largest", "50,10", None]),
        ([], "largest", ("left", None, None), ["left", None, None]),
        (None, "largest", (), [None, None, None]),
    ],
)
def test_every_further_voice_gets_the_next_face_that_is_left(fields, faces, first, chosen, spread):
    assert fields.spread(faces, first, *chosen) == spread


def given(*pairs, faces=TWO, sound=None) -> list:
    """Values of the fields for pairs of a file and a face."""
    pairs = [*pairs, *[(None, None)] * (3 - len(pairs))]
    return [faces, *(file for file, _ in pairs), sound, *(face for _, face in pairs)]


def test_voices_are_paired_with_their_faces(fields):
    values = given((FILE, "right"), (None, "left"), (FILE, "50,50"), sound=FILE)
    others, sound = fields.parse("left", *values)
    assert others == [{"face": "right", "audio": FILE}, {"face": "50,50", "audio": FILE}] and sound == FILE
    assert fields.parse("left", *given((None, "left"))) == ([], None), "a face without a voice keeps its own"


@pytest.mark.parametrize(
    "pairs, sentence",
    [
        ([(FILE, None)], "Say which face says the second voice"),
        ([(FILE, "")], "Say which face says the second voice"),
        ([(FILE, "10,10")], "The first and the second voice are for the same face"),
        ([(FILE, "right"), (FILE, "90,10")], "The second and the third voice are for the same face"),
        ([(FILE, "up")], "no face 'up'"),
        ([(FILE, 5)], "no face 5"),
    ],
)
def test_voices_that_do_not_pair_up_get_a_sentence(fields, pairs, sentence):
    with pytest.raises(UserError, match=sentence):
        fields.parse("left", *given(*pairs))
    assert sentence in fields.check("left", None, *given(*pairs))[0].replace("&#x27;", "'")


def test_one_field_more_is_shown_than_has_a_voice(fields):
    def shown(*pairs) -> list[bool]:
        return [box.visible for box in fields.check("left", None, *given(*pairs))[1:]]

    assert shown() == [False, False]
    assert shown((FILE, "right")) == [True, False]
    assert shown((FILE, "right"), (FILE, "50,50")) == [True, True]


def test_more_voices_than_faces_are_warned_of_where_the_video_was_looked_at(fields):
    assert fields.check("left", None, *given((FILE, "right")))[0] == ""
    note = fields.check("left", None, *given((FILE, "right"), (FILE, "50,50")))[0]
    assert "There are 3 voices, and the first second of this video shows 2 faces" in note and "problem" not in note
    assert "shows none" in fields.check("left", None, *given((FILE, "right"), faces=[]))[0]
    assert fields.check("left", None, *given((FILE, "right"), faces=None))[0] == ""


def test_more_voices_and_other_faces_exclude_each_other(fields):
    assert "clear one of them" in fields.check("left", [FILE], *given((FILE, "right")))[0]
    assert fields.check("left", [FILE], *given())[0] == ""


@pytest.mark.parametrize(
    "seconds, expected",
    [((3.0, None, None, None), (3.0, 1)), ((3.0, None, 5.0, 2), (5.0, 3)), ((3.0, 1.0, 5.0, None), (1.0, 2)),
     ((None, None, 5.0), (None, 2)), (("x", "x", "x"), ("x", 1))],
)  # fmt: skip
def test_the_result_lasts_as_long_as_the_longest_voice_or_the_sound(seconds, expected):
    from optim.serving.other_faces import spoken

    assert spoken(*seconds) == expected


def test_values_of_any_kind_give_a_sentence_at_most(fields):
    bad = [
        None,
        True,
        -1,
        1e300,
        "",
        "x" * 500,
        [],
        [None],
        [[[1]]],
        {},
        {"a": [1]},
        {"path": 5},
        [["left"]],
        [5, "left"],
    ]
    for position in range(9):
        for value in bad:
            values = [*given((FILE, "right"), (FILE, "50,50"), sound=FILE), None]
            values[position] = value
            for first in ("left", value):
                assert len(fields.check(first, value, *values)) == 3
                assert len(fields.spread(value, first, *values[5:8])) == 3
                try:
                    fields.parse(first, *values)
                except UserError as error:
                    assert len(str(error)) < 300
