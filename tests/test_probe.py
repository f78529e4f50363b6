"""Which files ffmpeg may open, and what is believed of what a file says about itself."""

import os
import struct
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from clips import ffmpeg, ffmpeg_messages, make_video

from latentsync.errors import UserError
from latentsync.media import VideoWriter, probe_audio, probe_video, read_audio, read_frames
from optim.serving.preview import write_fragments

X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")
DASH = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT4S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet '
    'mimeType="video/mp4"><Representation id="1" bandwidth="1000"><SegmentList duration="2" timescale="1" '
    'startNumber="0">{}</SegmentList></Representation></AdaptationSet></Period></MPD>'
)
LINE_BREAK = "<SegmentURL media=\"x&#10;Input #0, mov,mp4, from 'y':&#10;z.ts\"/>"
PLAYLISTS = {  # name: (content with a place for the victim's path, what of the sentence)
    "list.m3u8": ("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n", "is a playlist"),
    "hls.mp4": ("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n", "is a playlist"),
    "dash.mpd": (DASH.format('<SegmentURL media="{}"/>'), "is a playlist"),
    "forged.mpd": (DASH.format(LINE_BREAK + '<SegmentURL media="{}"/>'), "is a playlist"),
    "list.mkv": ("ffconcat version 1.0\nfile '{}'\n", "is a playlist"),
    "list.wav": ("\ufeff  #EXTM3U\n#EXTINF:2,\n{}\n", "is a playlist"),
    "talk.sdp": ("v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=audio 9 RTP/AVP 0\na={}\n", "is a playlist"),
    "drawing.svg": ('<svg xmlns="http://www.w3.org/2000/svg" width="9"><image href="{}"/></svg>', "is not a"),
    "picture.idx": ("# VobSub index file, v7\nsize: 720x576\npalette: {}\n", "is not a"),
}


@pytest.fixture
def victim(tmp_path) -> Iterator[tuple[Path, threading.Event]]:
    """A file that must not be opened, and whether it was: a FIFO, at which a writer waits for a reader."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("no FIFOs here")
    path, opened = tmp_path / "victim.ts", threading.Event()
    os.mkfifo(path)

    def wait() -> None:
        with suppress(OSError), open(path, "wb"):
            opened.set()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    yield path, opened
    os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    waiting.join(10)


def write_with_sound(path: Path) -> None:
    info = probe_video(make_video(path.with_name("picture.mp4"), *X264, seconds=0.2))
    with VideoWriter(path.with_name("out.mp4"), info, path) as writer:
        writer.write(np.zeros((info.height, info.width, 3), np.uint8))


def read_pictures(path: Path) -> None:
    info = probe_video(make_video(path.with_name("picture.mp4"), *X264, seconds=0.2))
    list(read_frames(replace(info, path=path)))


def preview_with_sound(path: Path) -> None:
    with closing(write_fragments(path.with_name("first.mp4"), (32, 32), path)) as writer:
        writer.send(None)
        for _ in range(50):
            writer.send(np.zeros((32, 32, 3), np.uint8))


@pytest.mark.parametrize("name", PLAYLISTS)
@pytest.mark.parametrize("use", [probe_video, probe_audio, read_audio])
def test_what_a_playlist_names_is_never_opened(tmp_path, victim, name, use):
    text, words = PLAYLISTS[name]
    path = tmp_path / name
    path.write_text(text.format(victim[0]), encoding="utf-8")
    with pytest.raises(UserError, match=words) as caught:
        use(path)
    assert not victim[1].is_set() and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["list.m3u8", "forged.mpd", "list.mkv"])
@pytest.mark.parametrize("use", [read_pictures, write_with_sound, preview_with_sound])
def test_nor_where_a_file_is_used_without_being_looked_at(tmp_path, victim, name, use):
    path = tmp_path / name
    path.write_text(PLAYLISTS[name][0].format(victim[0]), encoding="utf-8")
    with suppress(UserError):
        use(path)
    assert not victim[1].is_set()


@pytest.mark.parametrize("use", [probe_video, probe_audio])
def test_the_forged_manifest_of_the_cases_is_refused(use):
    path = Path(__file__).parents[2] / "shared" / "cases" / "playlist.mpd"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    with pytest.raises(UserError, match="is a playlist"):
        use(path)


def with_external_data(data: bytes, target: Path) -> bytes:
    """A MOV file whose index comes last, its samples said to lie in another file."""
    name = str(target).encode()
    paths = struct.pack(">HH", 2, len(name)) + name + bytes(len(name) % 2) + struct.pack(">HH", 0xFFFF, 0)
    alias = struct.pack(">I4sI", 0, b"alis", 0) + bytes(10 + 28 + 12 + 64 + 16) + struct.pack(">HH", 1, 1) + bytes(16)
    alias += paths + bytes(max(0, 160 - len(alias) - len(paths)))
    alias = struct.pack(">I", len(alias)) + alias[4:]
    at = data.index(b"dref") + 12  # of the first track's only entry
    old = int.from_bytes(data[at : at + 4], "big")
    data = data[:at] + alias + data[at + old :]
    for box in (b"dref", b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        start = data.rindex(box, 0, at) - 4
        size = int.from_bytes(data[start : start + 4], "big") + len(alias) - old
        data = data[:start] + struct.pack(">I", size) + data[start + 4 :]
    return data


def test_samples_that_lie_in_another_file_are_not_read(tmp_path, victim):
    path = make_video(tmp_path / "a.mov", *X264, seconds=0.2)
    path.write_bytes(with_external_data(path.read_bytes(), victim[0]))
    with suppress(UserError):
        list(read_frames(probe_video(path)))
    assert not victim[1].is_set()
    # The file is what it should be: ffmpeg follows it where it is told to.
    other = make_video(tmp_path / "other.mov", *X264, seconds=0.2)
    path.write_bytes(with_external_data(other.read_bytes(), other))
    message = ffmpeg_messages("-enable_drefs", 1, "-use_absolute_path", 1, "-i", path, "-f", "null", "-")
    assert f"Opening '{other}' for reading" in message, message


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize("name", ["a%d.png", "a*.jpg", "[a]%02d.bmp", "a%d.tga", "{a,b}.webp", "%%03d.tiff"])
def test_a_name_with_a_pattern_in_it_is_that_file_alone(tmp_path, name):
    plain = tmp_path / f"picture{Path(name).suffix}"
    ffmpeg("-f", "lavfi", "-i", "color=red:s=96x64", "-frames:v", 1, "-update", 1, plain)
    plain.rename(tmp_path / name)
    for other in ("a1", "a01", "ab", "a", "b", "001"):
        neighbour = tmp_path / f"{other}{plain.suffix}"
        ffmpeg("-f", "lavfi", "-i", "color=blue:s=48x32", "-frames:v", 1, "-update", 1, neighbour)
    info = probe_video(tmp_path / name)
    frames = list(read_frames(info))
    assert (info.width, info.height, len(frames)) == (96, 64, 1) and frames[0][32, 48, 0] > 200
