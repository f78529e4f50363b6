"""The released models are fetched whole, once, from wherever they are; whatever goes wrong is one sentence, and what
was fetched is kept. Small files in the released layout, from a hub on loopback, by the real client.
"""

import _thread
import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from hub import Hub, serving
from huggingface_hub import constants
from safetensors.torch import load_file
from small_release import COMMIT, NAME, UNET, release_of

from latentsync.checkpoints import __main__ as command_line
from latentsync.checkpoints import download, store
from latentsync.checkpoints.download import Cancelled
from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import load_models
from latentsync.checkpoints.releases import RELEASES, folder_of
from latentsync.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        store.get(NAME, *arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def unet_size() -> int:
    return RELEASES[NAME].unet.size


def partial() -> int:
    """Bytes of the U-Net that an unfinished download has brought."""
    path = download.partial_path(folder_of(NAME) / UNET, RELEASES[NAME].unet)
    return path.stat().st_size if path.exists() else 0


def test_a_release_is_fetched_converted_and_loads_as_its_original(hub, originals):
    seen = []
    folder = store.get(NAME, lambda *progress: seen.append(progress))
    found = resolve_model(NAME, CPU)
    assert found.unet == folder / "latentsync_unet.safetensors" and found.remark is None
    wanted = torch.load(originals / UNET, weights_only=True)["state_dict"]
    converted = load_file(found.unet)
    assert converted.keys() == wanted.keys()
    assert all(torch.equal(converted[name], tensor.half()) for name, tensor in wanted.items())
    loaded = load_models(found, CPU, torch.float32).unet.state_dict()
    assert all(torch.equal(loaded[name], tensor.half().float()) for name, tensor in wanted.items())
    assert not list(folder.rglob("*.incomplete")) and store.verify(NAME) == []
    total = sum(part.size for part in RELEASES[NAME].parts)
    fetched = [(done, all_) for done, all_, what in seen if what == UNET]
    assert fetched and all(done <= all_ == total for done, all_ in fetched)
    assert [done for done, _ in fetched] == sorted(done for done, _ in fetched)


def test_licences_are_said_before_and_kept_beside_the_files(hub):
    folder = store.get(NAME)
    text = (folder / store.LICENCE).read_text()
    assert text == store.notice(NAME) + "\n"
    assert all(word in text for word in ("a licence", "another licence", "Whisper", "us/LatentSync-1.5"))
    assert "openrail++" in (folder / "licences/us--LatentSync-1.5.md").read_text()


def test_a_second_time_nothing_is_fetched(hub):
    store.get(NAME)
    before = [r for r in hub.requests if r.file != "README.md"]
    store.get(NAME)
    assert [r for r in hub.requests if r.file != "README.md"] == before


def test_the_pickle_goes_on_request_and_nothing_misses_it(hub):
    folder = store.get(NAME, keep_pickle=False)
    assert not (folder / UNET).exists() and resolve_model(NAME, CPU).unet.exists()
    sent = len(hub.sent(UNET))
    store.get(NAME)
    assert len(hub.sent(UNET)) == sent and store.verify(NAME) == []
    assert store.stored(NAME).to_fetch == 0 and store.stored(NAME).converted


def test_remove_takes_the_pickle_or_all_that_was_fetched_and_nothing_else(hub):
    folder = store.get(NAME)
    assert store.stored(NAME).pickle == unet_size()
    assert store.remove(NAME, pickle_only=True) == unet_size()
    (folder / "whisper" / "mine").touch()
    assert store.remove(NAME) > 0
    assert {p.name for p in folder.rglob("*") if p.is_file()} == {"mine", "latentsync.json"}


def test_a_pickle_that_is_not_converted_is_not_removed(hub, originals):
    (folder_of(NAME) / UNET).write_bytes((originals / UNET).read_bytes())
    with pytest.raises(UserError, match="is needed"):
        store.remove(NAME, pickle_only=True)


def test_a_broken_connection_goes_on_from_where_it_broke(hub):
    third = unet_size() // 3
    hub.faults = [("none",), ("none",), ("cut", third), (500,), (503,), ("cut", third)]
    store.get(NAME)
    # The autoencoder and the audio encoder come first.
    begins = [r.begin for r in hub.sent(UNET)]
    assert begins[0] is None and begins[1] == begins[2] == begins[3] >= third - download.CHUNK
    assert begins[4] >= 2 * (third - download.CHUNK) and len(begins) == 5
    assert store.verify(NAME) == []


def test_a_server_without_ranges_sends_everything_again(hub):
    hub.faults = [("none",), ("none",), ("cut", unet_size() // 2), ("whole",)]
    store.get(NAME)
    assert store.verify(NAME) == []


def test_answers_that_end_too_early_are_not_asked_for_for_ever(hub):
    hub.faults = [("none",), ("none",), ("short", 1000), *[("short", 0)] * 3]
    assert "too early" in refusal()
    assert partial() == 1000


def test_a_slow_connection_that_stalls_is_taken_up_again(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hub.rate = 4e7
    hub.faults = [("none",), ("none",), ("stall", unet_size() // 2, 120)]
    began = time.monotonic()
    store.get(NAME)
    assert time.monotonic() - began < 60  # it did not wait for the stalled one
    assert hub.sent(UNET)[-1].begin >= unet_size() // 2 - download.CHUNK


def test_a_connection_that_stays_away_is_one_sentence_and_loses_nothing(hub):
    hub.faults = [("none",), ("none",), ("cut", unet_size() // 2), *[(502,)] * 3]
    message = refusal()
    assert "502" in message and "is kept" in message and UNET in message
    assert partial() >= unet_size() // 2 - download.CHUNK
    store.get(NAME)
    assert hub.sent(UNET)[-1].begin > 0


def test_no_connection_at_all_is_one_sentence(hub, monkeypatch):
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    assert "cannot be fetched" in refusal()


def test_cancelling_a_stalled_download_is_answered_at_once_and_it_goes_on_later(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 120)
    hub.faults = [("none",), ("none",), ("stall", unet_size() // 2, 120)]
    cancel, answered = Event(), []

    def work() -> None:
        try:
            store.get(NAME, cancel=cancel)
        except Cancelled:
            answered.append(time.monotonic())

    thread = Thread(target=work)
    thread.start()
    while partial() < unet_size() // 2 - download.CHUNK:
        time.sleep(0.01)
    began = time.monotonic()
    cancel.set()
    thread.join()
    assert answered and answered[0] - began < 20  # a second on an idle machine
    store.get(NAME)
    assert hub.sent(UNET)[1].begin > 0 and store.verify(NAME) == []


def test_what_arrives_damaged_is_not_kept(hub):
    hub.faults = [("none",), ("none",), ("wrong",)]
    message = refusal()
    assert "hash" in message and UNET in message
    assert not partial() and not (folder_of(NAME) / UNET).exists()
    store.get(NAME)


def test_another_file_of_that_name_is_refused_before_it_is_fetched(hub):
    hub.announced[UNET] = "0" * 64
    assert "another file than the released one" in refusal()
    assert not hub.sent(UNET)


@pytest.mark.parametrize(
    "status, words", [(404, "has no"), (401, "token"), (403, "accept its terms"), (400, "refuses")]
)
def test_a_refusal_of_the_hub_says_what_to_do(hub, status, words):
    hub.refuse = status
    assert words in refusal()
    assert len([r for r in hub.requests if r.file != "README.md"]) == 1  # it does not insist


def test_the_token_goes_to_the_hub_and_to_nobody_else(hub, monkeypatch):
    hub.token = "hf_secret"  # noqa: S105
    assert "token" in refusal()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    store.get(NAME)
    assert {r.token for r in hub.requests if r.host == "store"} == {None}


def test_a_small_disk_is_said_before_anything_is_fetched(hub, monkeypatch):
    usage = namedtuple("usage", "total used free")
    total = sum(part.size for part in RELEASES[NAME].parts) + unet_size() // 2 + download.DISK_MARGIN
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage(0, 0, total - 1))
    message = refusal()
    assert "free" in message and str(folder_of(NAME)) in message and not hub.requests
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage(0, 0, total))
    store.get(NAME)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_up_is_one_sentence(hub, monkeypatch):
    monkeypatch.setattr(download, "partial_path", lambda path, part: Path("/dev/full"))
    monkeypatch.setattr(download, "_check_metadata", lambda *_: None)
    assert "No space left" in refusal()


def test_offline_with_nothing_here_says_how_to_get_it(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal()
    assert not hub.requests
    assert resolve_model("auto", CPU).name == "demo" and "checkpoints list" in resolve_model("auto", CPU).remark


def fill_cache(originals: Path) -> None:
    """As huggingface_hub would have."""
    for part in RELEASES[NAME].parts:
        folder = Path(constants.HF_HUB_CACHE) / f"models--{part.repository.replace('/', '--')}"
        path = folder / "snapshots" / COMMIT / part.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((originals / part.place).read_bytes())
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(COMMIT)


def test_offline_the_hugging_face_cache_is_enough(hub, originals, monkeypatch):
    fill_cache(originals)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model(NAME, CPU).unet.is_relative_to(constants.HF_HUB_CACHE)
    store.get(NAME)
    assert resolve_model(NAME, CPU).unet.is_relative_to(folder_of(NAME)) and not hub.requests
    assert store.verify(NAME) == []


@pytest.mark.parametrize("damage", ["bytes", "size"])
def test_a_damaged_file_of_the_cache_is_fetched_instead(hub, originals, damage):
    fill_cache(originals)
    [path] = Path(constants.HF_HUB_CACHE).rglob(UNET)
    path.write_bytes(bytes(unet_size()) if damage == "bytes" else b"short")
    store.get(NAME)
    assert len(hub.sent(UNET)) == 1 and store.verify(NAME) == []


@pytest.mark.parametrize("layout", ["ours", "the reference's"])
def test_files_of_a_folder_are_taken_instead_of_fetched(hub, originals, tmp_path, layout):
    if layout != "ours":
        shutil.copytree(originals, tmp_path / "reference" / "checkpoints")
        (tmp_path / "reference" / "checkpoints" / "vae").rename(tmp_path / "reference" / "vae")
    store.get(NAME, sources=[originals if layout == "ours" else tmp_path / "reference"])
    assert {r.file for r in hub.requests} <= {"README.md"} and store.verify(NAME) == []
    store.remove(NAME)
    assert release_of(originals, "us/LatentSync-1.5") == RELEASES[NAME]  # they are still there


def test_what_killed_processes_left_goes_with_the_next_get(hub, originals):
    left = [folder_of(NAME) / ".latentsync-1.safetensors", folder_of(NAME) / "vae/.latentsync-2.json"]
    left.append(download.partial_path(folder_of(NAME) / UNET, RELEASES[NAME].unet))
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    store.get(NAME, sources=[originals])
    assert not any(path.exists() for path in left)


def test_a_folder_that_is_not_there_is_said(hub, tmp_path):
    assert "does not exist" in refusal(sources=[tmp_path / "nowhere"])


def test_a_file_that_the_user_put_there_is_never_overwritten(hub):
    for name, words in ((UNET, "move it away"), ("latentsync_unet.safetensors", "was not made from")):
        path = folder_of(NAME) / name
        path.write_bytes(b"mine")
        assert words in refusal() and path.read_bytes() == b"mine"
        path.unlink()


def test_verify_names_what_is_missing_and_what_is_damaged(hub):
    folder = store.get(NAME)
    (folder / "vae/config.json").unlink()
    for file in ("whisper/tiny.pt", "latentsync_unet.safetensors"):
        data = bytearray((folder / file).read_bytes())
        data[-1] ^= 1
        (folder / file).write_bytes(data)
    missing, damaged, converted = store.verify(NAME)
    assert "config.json' is missing" in missing and "tiny.pt" in damaged and "as it was converted" in converted


@pytest.mark.parametrize("sums", [b"", b"\xff\xfe\0", b"\n\n", b"x" * 10**6, None])
def test_a_list_of_hashes_that_is_damaged_or_gone_is_a_sentence(hub, sums):
    folder = store.get(NAME)
    (folder / store.SUMS).unlink()
    if sums is not None:
        (folder / store.SUMS).write_bytes(sums)
    (sentence,) = store.verify(NAME)
    assert "as it was converted" in sentence and str(folder) in sentence


def test_numbers_that_float16_cannot_hold_are_not_converted(hub, originals, tmp_path, monkeypatch):
    other = tmp_path / "others"
    for part in RELEASES[NAME].parts:
        (other / part.place).parent.mkdir(parents=True, exist_ok=True)
        (other / part.place).write_bytes((originals / part.place).read_bytes())
    state = torch.load(originals / UNET, weights_only=True)
    state["state_dict"]["conv_in.bias"][0] = 1e6
    torch.save(state, other / UNET)
    monkeypatch.setitem(RELEASES, NAME, release_of(other, "us/LatentSync-1.5"))
    assert "conv_in.bias" in refusal(sources=[other])
    assert [p.name for p in folder_of(NAME).glob("*unet*")] == [UNET]  # nothing half done


SCRIPT = """
import pickle, sys
from pathlib import Path
from latentsync.checkpoints import download
from latentsync.errors import UserError
from latentsync.checkpoints.releases import RELEASES, folder_of
RELEASES[sys.argv[2]] = pickle.loads(Path(sys.argv[1]).read_bytes())
folder = folder_of(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
download.CHUNK = 1 << 16
try:
    with download.folder_lock(folder, download.no_progress, None):
        download.fetch(sys.argv[2])
except UserError as error:
    sys.exit(str(error))
"""


def start(hub, tmp_path, **variables) -> subprocess.Popen:
    """Another process that fetches the release; it learns of the hub by HF_ENDPOINT."""
    (tmp_path / "release").write_bytes(pickle.dumps(RELEASES[NAME]))
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "release"), NAME],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, **variables},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_download_is_continued_by_the_next_process(hub, tmp_path):
    hub.rate = 2e6
    process = start(hub, tmp_path)
    while partial() < 4 * download.CHUNK:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.kill()
    process.wait()
    there = partial()
    hub.rate = None
    process = start(hub, tmp_path)
    assert process.communicate()[1] == "" and process.returncode == 0
    assert hub.sent(UNET)[1].begin == there
    store.get(NAME)
    assert store.verify(NAME) == []


def test_two_processes_at_once_fetch_it_once(hub, tmp_path):
    hub.rate = 2e7
    processes = [start(hub, tmp_path) for _ in range(2)]
    assert [process.communicate()[1] for process in processes] == ["", ""]
    assert len(hub.sent(UNET)) == 1 and store.stored(NAME).to_fetch == 0


def test_a_proxy_is_asked_for_what_the_hub_has(hub, tmp_path):
    proxies = {name: hub.endpoint for name in ("HTTP_PROXY", "http_proxy")} | {"NO_PROXY": "", "no_proxy": ""}
    process = start(hub, tmp_path, **proxies, HF_ENDPOINT="http://the-hub.invalid")
    process.communicate()
    assert process.returncode and hub.requests[-1].file.startswith("http://the-hub.invalid/")


def test_an_interrupted_command_keeps_what_was_fetched(hub, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    hub.faults = [("none",), ("none",), ("stall", unet_size() // 2, 120)]

    def interrupt() -> None:
        while partial() < unet_size() // 2 - download.CHUNK:
            time.sleep(0.01)
        _thread.interrupt_main()

    Thread(target=interrupt, daemon=True).start()
    assert command_line.main(["get", NAME]) == 130
    assert "is kept" in capsys.readouterr().err and partial() >= unet_size() // 2 - download.CHUNK


def test_the_command_says_what_is_here_and_exits_with_2_when_it_cannot_go_on(hub, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert command_line.main(["list"]) == 0
    out = capsys.readouterr().out
    assert "not here" in out and "a licence" in out
    hub.refuse = 401
    assert command_line.main(["get", NAME]) == 2
    assert "token" in capsys.readouterr().err
    hub.refuse = None
    assert command_line.main(["get", NAME, "--remove-pickle"]) == 0
    captured = capsys.readouterr()
    assert "ready" in captured.out and "a licence" in captured.err
    assert command_line.main(["verify", NAME]) == 0
    (folder_of(NAME) / "vae/config.json").unlink()
    assert command_line.main(["verify", NAME]) == 2
    assert command_line.main(["remove", NAME]) == 0


VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
WHISPER = {"n_mels": 80, "n_audio_ctx": 1500, "n_audio_state": 384, "n_audio_head": 6, "n_audio_layer": 4}

STEPS = """
import json, pickle, sys, time
from pathlib import Path
import torch
from latentsync.checkpoints import store, tensors
from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import load_models
from latentsync.machine import peak_memory
from latentsync.checkpoints.releases import LICENCES, RELEASES, folder_of

release, name, step = pickle.loads(Path(sys.argv[1]).read_bytes()), sys.argv[2], sys.argv[3]
RELEASES[name] = release
LICENCES.update({part.repository: ("", "", "") for part in release.parts})
before, began, parts = peak_memory(), time.monotonic(), {}
if step == "get":
    last, kind = began, "fetching"
    def progress(done, total, what):
        global last, kind
        now = time.monotonic()
        parts[kind] = parts.get(kind, 0) + now - last
        last, kind = now, what if what.startswith(("checking", "converting")) else "fetching"
    store.get(name, progress)
else:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":  # a GPU's part is played by somebody who reads every number and keeps none
        def read(tensor, device, dtype):
            tensor.sum()
            return tensor.to("meta", dtype)
        tensors._to_device = read
    else:
        torch.zeros(1, device=device)
        before, began = peak_memory(), time.monotonic()
    found = resolve_model(name, torch.device("cpu"))
    assert found.unet.suffix == step and found.remark is None, found
    models = load_models(found, device, torch.float16)
    if device.type == "cuda":
        torch.cuda.synchronize()
        parts["GPU GB"] = torch.cuda.max_memory_allocated() / 1e9
parts["seconds"] = time.monotonic() - began
print(json.dumps({"step": step, "peak GB": peak_memory() / 1e9, "before GB": before / 1e9, **parts}))
"""


def write_full_size(folder: Path) -> None:
    """Random weights with the names, shapes and formats of a release, 5.4 GB."""
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    from latentsync.whisper import AudioEncoder, WhisperDims

    shapes = json.loads((ROOT / "tests/parity/unet_full_state_dict.json").read_text())["tensors"]
    (folder / "whisper").mkdir(parents=True)
    (folder / "vae").mkdir()
    torch.save({"global_step": 1, "state_dict": {name: torch.randn(s) for name, s in shapes.items()}}, folder / UNET)
    heard = {f"encoder.{name}": tensor for name, tensor in AudioEncoder(WhisperDims(**WHISPER)).state_dict().items()}
    heard["decoder.token_embedding.weight"] = torch.randn(51865, 384)
    heard = {name: tensor.half() for name, tensor in heard.items()}
    torch.save({"dims": WHISPER, "model_state_dict": heard}, folder / "whisper/tiny.pt")
    save_file(AutoencoderKL.from_config(VAE).state_dict(), folder / "vae/diffusion_pytorch_model.safetensors")
    (folder / "vae/config.json").write_text(json.dumps(VAE))


@pytest.mark.full_size
@pytest.mark.parametrize("name", ["latentsync-1.6", "latentsync-1.5"])
def test_full_size_weights_are_fetched_converted_and_loaded_in_little_memory(name, tmp_path, capsys, request):
    request.addfinalizer(lambda: shutil.rmtree(tmp_path))
    write_full_size(tmp_path / "originals")
    release = release_of(tmp_path / "originals", f"us/{name}")
    release = dataclasses.replace(release, resolution=RELEASES[name].resolution)
    files = {(part.repository, COMMIT, part.file): tmp_path / "originals" / part.place for part in release.parts}
    (tmp_path / "release").write_bytes(pickle.dumps(release))
    folder = tmp_path / "home" / "checkpoints" / name

    def run(step: str) -> dict:
        command = [sys.executable, "-c", STEPS, str(tmp_path / "release"), name, step]
        variables = {"HF_ENDPOINT": found.endpoint, "LATENTSYNC_HOME": str(tmp_path / "home")}
        variables |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with capsys.disabled():
            print(done.stdout)
        return json.loads(done.stdout)

    announced = {part.file: part.sha256 for part in release.parts}  # hashing them takes longer than the client waits
    with serving(Hub(files, announced=announced)) as found:
        assert run("get")["peak GB"] < 3.5
    loads = [run(".safetensors")]
    (folder / "latentsync_unet.safetensors").rename(tmp_path / "away")
    loads.append(run(".pt"))
    for load in loads:
        assert load["peak GB"] - load["before GB"] < 0.5
        assert load["peak GB"] < 1 or torch.cuda.is_available()  # CUDA's libraries take main memory of their own
