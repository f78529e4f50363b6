"""Which files ffmpeg may open, and what is believed of what a file says about itself."""

import os
import random
import struct
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import ffmpeg, ffmpeg_messages, make_sound, make_video

from latentsync import pipeline
from latentsync.__main__ import main
from latentsync.checkpoints.find import resolve_model
from latentsync.checkpoints.load import load_models
from latentsync.errors import UserError
from latentsync.media import VideoWriter, probe, probe_audio, probe_video, read_audio, read_frames
from latentsync.media.segments import work_folder
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
    with closing(write_fragments(path.with_name("first.mp4"), (32, 32), [path])) as writer:
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


FRAME_LINE = "n:   0 pts:      0 pts_time:0 duration:1 fmt:rgb24 cl:left sar:1/1 s:16000x16000 i:T iskey:1 type:I"
FORGERIES = {
    "frame": "pts: 0 fmt:rgb24 sar:1/1 s:16000x16000 i:P",
    "filter": f"x\n[Parsed_showinfo_0 @ 0x5581] {FRAME_LINE}\n[showinfo @ 0x5581] {FRAME_LINE}\n",
    "input": "x\nInput #0, hls, from 'y':\n  Duration: 99:00:00.00, start: 0\n  Stream #0:0: Video: png, 9x9\n",
    "tracks": "x\n  Stream #0:9: Audio: aac, 48000 Hz, stereo, fltp (attached pic) (default)\n[STREAM]\ntitle=y\n",
    "colours": "config in time_base: 1/1 color_range:pc color_space:bt2020nc color_primaries:x color_trc:smpte2084",
    "errors": "moov atom not found\nmax pixel count\nx: partial file\nCannot allocate memory\nNo such filter\n",
}
PLACES = {
    "a.mp4": [("-metadata", "{}"), ("-metadata:s:v", "{}"), ("-metadata:s:a", "{}")],
    "a.mov": [("-metadata", "{}"), ("-metadata:s:v", "{}"), ("-movflags", "use_metadata_tags", "-metadata", "{}")],
    "a.mkv": [("-metadata", "{}"), ("-metadata:s:v", "{}"), ("-metadata:s:a", "{}"), ("-metadata:c:0", "{}")],
}  # fmt: skip
KEYS = "title", "comment", "handler_name", "language", "encoder", "x\nx\r{}"
CHAPTER = ";FFMETADATA1\n[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=400\ntitle=one\n"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Path]:
    """Short videos with sound and a chapter, that say nothing of themselves."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "chapter.txt").write_text(CHAPTER)
    make_video(folder / "source.mkv", *X264, "-c:a", "aac", sound="sine", seconds=0.4)
    sources = "-i", folder / "source.mkv", "-i", folder / "chapter.txt"
    for name in PLACES:
        ffmpeg(*sources, "-map", 0, "-map_chapters", 1, "-map_metadata", -1, "-c", "copy", folder / name)
    return {name: folder / name for name in PLACES}


def described(path: Path) -> list[object]:
    """All that is measured of a file."""
    video, sound = probe_video(path), probe_audio(path)
    frames = sum(int(frame.sum()) for frame in read_frames(video))
    infos = [replace(info, path=Path("x"), track=1, tracks=()) for info in (video, sound)]
    return [*infos, len(video.tracks), len(sound.tracks), frames, len(read_audio(path))]


@pytest.mark.parametrize("forgery", FORGERIES)
@pytest.mark.parametrize("name", PLACES)
def test_what_a_file_says_of_itself_changes_no_measurement(tmp_path, plain, name, forgery):
    text, path = FORGERIES[forgery], tmp_path / name
    options = []
    for *before, place in PLACES[name]:
        for key in KEYS:
            options += [*before, place.format(f"{key.format(text)}={text}")]
    ffmpeg("-i", plain[name], "-map", 0, "-c", "copy", *options, path)
    assert path.read_bytes().count(text.split("\n")[0].encode()) > 1
    assert described(path) == described(plain[name])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize("forgery", ["filter", "input", "errors"])
def test_nor_does_its_name(tmp_path, plain, forgery):
    path = tmp_path / f"{FORGERIES[forgery].replace('/', ':')[-200:]}.mp4"
    path.write_bytes(plain["a.mp4"].read_bytes())
    assert described(path) == described(plain["a.mp4"])


@pytest.mark.parametrize("seed", range(6))
def test_nor_do_pieces_of_such_texts_in_any_order(tmp_path, plain, seed):
    chance = random.Random(seed)
    pieces = [*"\n\r\t\\;=#[]'\"\x1b", *(word for text in FORGERIES.values() for word in text.split())]
    name, options = chance.choice(list(PLACES)), []
    for _ in range(20):
        *before, place = chance.choice(PLACES[name])
        key, text = (" ".join(chance.choices(pieces, k=k)).replace("=", "") for k in (2, 40))
        options += [*before, place.format(f"{chance.choice([*KEYS[:5], key])}={text}")]
    ffmpeg("-i", plain[name], "-map", 0, "-c", "copy", *options, tmp_path / name)
    assert described(tmp_path / name) == described(plain[name])


def test_texts_of_a_file_are_shown_in_one_short_line_as_they_are(tmp_path):
    title = "Ton; #1 = \\[gut]\n\r\x1b[31m\u202e" + "x" * 500
    path = make_sound(tmp_path / "a.mkv", "-metadata:s:a", f"title={title}", "-metadata:s:a", "language=deu")
    (track,) = probe_audio(path).tracks
    assert track.title.startswith("Ton; #1 = \\[gut] ") and track.title.isprintable() and len(track.title) == 80
    assert (track.language, track.codec, track.channels) == ("deu", "vorbis", "mono")
    assert str(track).startswith("1 (vorbis, mono, deu, “Ton; ") and str(track).endswith("x…”)")


def make_tracks(path: Path, *options: object) -> Path:
    """Two videos, of 64 and 96 pixels, and three sounds, of 300, 600 and 900 Hz; `options` set their flags."""
    sources = [f"color=c={colour}:s={side}x48:r=25:d=0.4" for colour, side in (("red", 64), ("blue", 96))]
    sources += [f"sine=f={hertz}:r=16000:d=0.4" for hertz in (300, 600, 900)]
    inputs = [word for source in sources for word in ("-f", "lavfi", "-i", source)]
    maps = [word for i in range(5) for word in ("-map", i)]
    ffmpeg(*inputs, *maps, *X264, "-c:a", "aac", *options, path)
    return path


def pitch(samples: np.ndarray) -> int:
    """The loudest frequency in Hz."""
    return round(np.abs(np.fft.rfft(samples)).argmax() * 16000 / len(samples) / 100) * 100


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.mov", "a.nut"])
def test_the_track_with_the_default_flag_is_used_unless_another_is_named(tmp_path, name):
    flags = [word for i, flag in enumerate((0, "default", 0, "default", 0)) for word in (f"-disposition:{i}", flag)]
    path = make_tracks(tmp_path / name, *flags)
    video, sound = probe_video(path), probe_audio(path)
    assert (video.width, video.track, sound.track) == (96, 2, 2) and pitch(read_audio(path)) == 600
    assert next(read_frames(video))[24, 48].argmax() == 2
    assert [track.default for track in sound.tracks] == [False, True, False]
    assert "has 2 video tracks, number 2 is used: 1 (" in video.remarks[0] and "3 sound tracks" in sound.remarks[0]
    other = probe_video(path, track=1)
    assert (other.width, other.track) == (64, 1) and next(read_frames(other))[24, 32].argmax() == 0
    assert probe_audio(path, track=3).track == 3 and pitch(read_audio(path, track=3)) == 900
    for use, words in [(probe_video, "2 video tracks"), (probe_audio, "3 sound tracks")]:
        for number in (0, 9, -1):
            with pytest.raises(UserError, match=f"has {words}, and none with the number {number}: choose among 1 "):
                use(path, track=number)


def test_without_a_flag_the_first_track_is_used(tmp_path):
    flags = [word for i in range(5) for word in (f"-disposition:{i}", 0)]
    path = make_tracks(tmp_path / "a.mkv", *flags)
    assert (probe_video(path).track, pitch(read_audio(path))) == (1, 300)
    assert (probe_video(make_tracks(tmp_path / "a.ts")).width, pitch(read_audio(tmp_path / "a.ts"))) == (64, 300)


def test_cover_art_is_never_the_video(tmp_path):
    cover = tmp_path / "cover.png"
    ffmpeg("-f", "lavfi", "-i", "color=red:s=640x480", "-frames:v", 1, "-update", 1, cover)
    clip = make_video(tmp_path / "clip.mp4", *X264, "-c:a", "aac", sound="sine", seconds=0.4)
    in_front = "-i", cover, "-i", clip, "-map", 0, "-map", 1, "-disposition:v:0", "attached_pic", "-c", "copy"
    ffmpeg(*in_front, tmp_path / "a.mp4")
    ffmpeg("-i", clip, "-attach", cover, "-metadata:s:t", "mimetype=image/png", "-c", "copy", tmp_path / "a.mkv")
    for name in ("a.mp4", "a.mkv"):
        info = probe_video(tmp_path / name)
        assert (info.width, info.n_frames, len(info.tracks)) == (160, 10, 1), name
    for name in ("song.mp4", "song.mp3", "song.flac"):
        song = "-i", cover, "-i", clip, "-map", 0, "-map", "1:a", "-c:v", "copy", "-disposition:v", "attached_pic"
        ffmpeg(*song, tmp_path / name)
        assert probe_audio(tmp_path / name).track == 1
        with pytest.raises(UserError, match="holds no picture, only sound"):
            probe_video(tmp_path / name)


def test_the_sound_that_is_written_is_that_of_the_track(tmp_path):
    path = make_tracks(tmp_path / "a.mkv", "-disposition:a:1", "default", "-disposition:a:0", 0)
    info = probe_video(path)
    with VideoWriter(tmp_path / "out.mkv", info, path) as writer:
        for frame in read_frames(info):
            writer.write(frame)
    assert pitch(read_audio(tmp_path / "out.mkv")) == 600


def test_the_command_line_takes_the_tracks_that_are_named(tmp_path, talking, checkpoint, capsys):
    path = tmp_path / "both.mkv"
    sounds = [word for hertz in (300, 600) for word in ("-f", "lavfi", "-i", f"sine=f={hertz}:r=16000:d=0.3")]
    ffmpeg("-f", "lavfi", "-i", "color=s=64x48:r=25:d=1", "-i", talking, *sounds, "-map", 0, "-map", 1, "-map", 2,
           "-map", 3, *X264, "-c:a", "aac", "-disposition:0", "default", "-disposition:2", "default", path)  # fmt: skip
    out = tmp_path / "out.mp4"
    arguments = [path, path, "-o", out, "--model", checkpoint, "--steps", 1, "--device", "cpu"]
    assert main([*map(str, arguments), "--video-track", "2", "--audio-track", "2"]) == 0
    assert "has 2 sound tracks, number 2 is used: 1 (" in capsys.readouterr().err
    assert probe_video(out).width == probe_video(talking).width and pitch(read_audio(out)) == 600
    assert main([*map(str, arguments), "--audio-track", "3"]) == 2
    assert "none with the number 3" in capsys.readouterr().err


def test_segments_of_other_tracks_are_not_gone_on_with(tmp_path, talking, voice, checkpoint, monkeypatch):
    class Stop(Exception):
        pass

    folders = []

    def stop(*arguments):
        folders.append(work_folder(*arguments))
        raise Stop

    monkeypatch.setattr(pipeline, "work_folder", stop)
    models = load_models(resolve_model(str(checkpoint), torch.device("cpu")), torch.device("cpu"))
    for tracks in ({}, {"video_track": 1}, {"audio_track": 1}, {}):
        with pytest.raises(Stop):
            pipeline.lipsync(talking, voice, tmp_path / "out.mp4", models, segment_frames=1, **tracks)
    assert folders[0] == folders[3] and len(set(folders)) == 3


@pytest.mark.parametrize(
    "name, kind", [("twotracks.mkv", "sound"), ("twovideos.mkv", "video"), ("grid.heic", "still"), ("u.jfif", "still")]
)
def test_the_cases_give_what_their_owner_expects(name, kind):
    path = Path(__file__).parents[2] / "shared" / "cases" / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    if kind == "sound":
        assert probe_audio(path).track == 2
        return
    info = probe_video(path)
    size = {"grid.heic": (768, 1280)}.get(name, (360, 640))
    assert (info.width, info.height, info.still) == (*size, kind == "still")
    assert len(list(read_frames(info))) == info.n_frames


@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
def test_a_recording_in_fragments_that_was_cut_off_is_used_as_far_as_it_goes(tmp_path, share):
    options = *X264, "-g", 5, "-movflags", "frag_keyframe+empty_moov+default_base_moof"
    path = make_video(tmp_path / "a.mp4", *options, size="320x240", seconds=2)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    info = probe_video(path)
    frames = len(list(read_frames(info)))
    assert 50 * share - 10 < frames < 50 and abs(info.n_frames - frames) <= 1


def test_a_file_is_looked_at_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
    path, runs, run_ffmpeg = make_video(tmp_path / "a.mp4", seconds=0.4), [], probe.run_ffmpeg

    def counted(*arguments, **options):
        runs.append(arguments)
        return run_ffmpeg(*arguments, **options)

    monkeypatch.setattr(probe, "run_ffmpeg", counted)
    info = probe_video(path)
    first = len(runs)
    assert first and probe_video(path) == info and len(runs) == first
    make_video(path, seconds=0.8)
    assert probe_video(path).duration > info.duration and len(runs) > first
    path.write_bytes(b"no video any more")
    for _ in range(2):
        with pytest.raises(UserError, match="a.mp4"):
            probe_video(path)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_an_ffmpeg_that_is_too_old_is_named_instead_of_the_file(tmp_path, monkeypatch):
    video, old = make_video(tmp_path / "a.mp4", seconds=0.2), tmp_path / "ffmpeg"
    old.write_text("#!/bin/sh\necho \"Unrecognized option 'print_graphs_file'.\" >&2\nexit 8\n")
    old.chmod(0o755)
    for module in "process", "tracks":
        monkeypatch.setattr(f"latentsync.media.{module}.get_ffmpeg_exe", lambda: str(old))
    with pytest.raises(UserError, match="too old.*imageio-ffmpeg"):
        probe_video(video)
