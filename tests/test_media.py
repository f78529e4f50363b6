"""Media in and out: what users bring, what they get, and the sentences for what cannot be used."""

import itertools
import os
import shutil
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest
from clips import ffmpeg, make_rotated_video, make_sound, make_vfr_video, make_video

from latentsync import FPS
from latentsync.errors import UserError
from latentsync.media import (
    VideoWriter,
    check_output,
    probe_audio,
    probe_video,
    read_audio,
    read_frames,
    read_frames_looped,
)
from latentsync.media.probe import STILL_PIXELS

X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")
RAW_RGB = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-")


def frames_of(path, **kwargs) -> np.ndarray:
    return np.stack(list(read_frames(probe_video(path), **kwargs)))


def ffmpeg_children() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [c for c in children if "ffmpeg" in c.name() and c.status() != psutil.STATUS_ZOMBIE]


def decoded_samples(path, rate: int, channels: int) -> np.ndarray:
    data = ffmpeg("-i", f"file:{path}", "-map", "0:a:0", "-f", "s16le", "-ar", rate, "-ac", channels, "-")
    return np.frombuffer(data, np.int16).reshape(-1, channels)


@pytest.mark.parametrize("fps", ["15", "24", "30000/1001", "60"])
def test_every_rate_becomes_25_frames_a_second(tmp_path, fps):
    # Grey level says the time: 8 bits over 2 s.
    path = tmp_path / "clip.mkv"
    clock = f"nullsrc=s=64x64:r={fps}:d=2,format=gray,geq=lum='clip(T*100+20,0,255)'"
    ffmpeg("-f", "lavfi", "-i", clock, "-c:v", "ffv1", "-pix_fmt", "gray", path)
    info = probe_video(path)
    frames = frames_of(path)
    assert len(frames) == info.n_frames == 50
    assert info.duration == pytest.approx(2, abs=0.02)
    assert info.fps == pytest.approx(float(Fraction(fps)), rel=0.01)
    shown = (frames[:, 32, 32, 0] - 20.0) / 100
    off = np.abs(shown - np.arange(50) / FPS)
    assert off.max() < 0.5 / Fraction(fps) + 0.5 / FPS + 0.011  # never further than the nearest frame


def test_frames_of_25_fps_pass_one_to_one(tmp_path):
    path = make_video(tmp_path / "a.mp4")
    raw = ffmpeg("-i", path, "-pix_fmt", "gray", "-f", "rawvideo", "-")
    grey = np.frombuffer(raw, np.uint8).reshape(50, 120, 160).astype(float)
    frames = frames_of(path)
    assert frames.shape == (50, 120, 160, 3)
    luma = frames @ [0.299, 0.587, 0.114]
    nearest = [np.abs(grey - (16 + f * 219 / 255)).mean(axis=(1, 2)).argmin() for f in luma]
    assert nearest == list(range(50))


@pytest.mark.parametrize("kind", ["bframes", "vfr", "rotated", "hevc", "offset", "transport"])
def test_start_gives_the_same_frames_as_decoding_from_the_beginning(tmp_path, kind):
    path = tmp_path / "clip.mp4"
    if kind == "vfr":
        make_vfr_video(path)
    elif kind == "rotated":
        make_rotated_video(path, seconds=6)
    elif kind == "hevc":
        make_video(path, "-c:v", "libx265", "-preset", "ultrafast", "-x265-params",
                   "log-level=none:keyint=25:open-gop=1", seconds=6)  # fmt: skip
    elif kind == "offset":
        path = tmp_path / "clip.mkv"
        make_video(path, *X264, "-g", "30", "-output_ts_offset", "5.123", fps="30000/1001", seconds=6)
    elif kind == "transport":
        path = make_video(tmp_path / "clip.ts", *X264, "-g", "30", seconds=6, sound="sine")
    else:
        make_video(path, "-c:v", "libx264", "-bf", "3", "-g", "40", seconds=6, fps=24)
    info = probe_video(path)
    whole = frames_of(path)
    assert len(whole) == info.n_frames
    for start in (1, 24, 51, 77, 100, 131, len(whole) - 1):
        part = frames_of(path, start=start, count=6)
        assert np.array_equal(part, whole[start : start + 6]), start


def test_rotation_flag_is_applied(tmp_path):
    path = make_rotated_video(tmp_path / "portrait.mp4", 90)
    info = probe_video(path)
    assert (info.width, info.height) == (120, 160)
    lying = frames_of(make_video(tmp_path / "lying.mp4"), count=1)[0]
    shown = frames_of(path, count=1)[0]
    assert np.abs(shown.astype(int) - np.rot90(lying).astype(int)).mean() < 1


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    path = make_video(tmp_path / "wide.mp4", *X264, "-vf", "setsar=4/3", size="144x108")
    info = probe_video(path)
    assert (info.width, info.height, info.scaled) == (192, 108, True)
    assert frames_of(path, count=1).shape == (1, 108, 192, 3)


def test_odd_sizes_grow_by_a_repeated_line_when_written(tmp_path):
    path = make_video(tmp_path / "odd.mkv", "-c:v", "ffv1", "-vf", "scale=161:121,format=yuv444p", seconds=1)
    info = probe_video(path)
    assert (info.width, info.height) == (161, 121)
    out = tmp_path / "out.mp4"
    with VideoWriter(out, info) as writer:
        for frame in read_frames(info):
            writer.write(frame)
    assert frames_of(out).shape == (25, 122, 162, 3)


@pytest.mark.parametrize(
    "options, depth",
    [
        (("-c:v", "libx264", "-pix_fmt", "yuv420p10le"), 10),
        (("-c:v", "libx265", "-pix_fmt", "yuv420p10le", "-x265-params", "log-level=none"), 10),
        (("-c:v", "prores_ks", "-pix_fmt", "yuv422p10le"), 10),
        (("-c:v", "libvpx-vp9", "-deadline", "realtime", "-pix_fmt", "yuv420p"), 8),
        (("-c:v", "mjpeg", "-q:v", "2", "-pix_fmt", "yuvj420p"), 8),
    ],
)
def test_codecs_and_depths_show_the_same_picture(tmp_path, options, depth):
    path = make_video(tmp_path / "a.mkv", *options, seconds=0.4)
    info = probe_video(path)
    assert info.bit_depth == depth
    ideal = ffmpeg("-f", "lavfi", "-i", "testsrc2=s=160x120:r=25:d=0.4", "-pix_fmt", "rgb24", "-f", "rawvideo", "-")
    ideal = np.frombuffer(ideal, np.uint8).reshape(10, 120, 160, 3)
    assert np.abs(frames_of(path).astype(int) - ideal).mean() < 9


@pytest.mark.parametrize("range_", ["tv", "pc"])
@pytest.mark.parametrize("matrix", ["bt709", "smpte170m", "bt470bg", "bt2020nc"])
def test_colours_survive_the_way_in_and_out(tmp_path, matrix, range_):
    path, out = tmp_path / "in.mkv", tmp_path / "out.mp4"
    y, u, v = 120, 100, 160
    patch = f"color=s=64x64:r=25:d=0.4,format=yuv420p,geq=lum={y}:cb={u}:cr={v}"
    ffmpeg("-f", "lavfi", "-i", f"{patch},setparams=range={range_}:colorspace={matrix}",
           "-c:v", "ffv1", "-color_range", range_, path)  # fmt: skip
    info = probe_video(path)
    assert (info.color_matrix, info.color_range) == (matrix, range_)
    kr, kb = {"bt709": (0.2126, 0.0722), "bt2020nc": (0.2627, 0.0593)}.get(matrix, (0.299, 0.114))
    luma = y / 255 if range_ == "pc" else (y - 16) / 219
    cb, cr = ((c - 128) / (255 if range_ == "pc" else 224) for c in (u, v))
    red, blue = luma + 2 * (1 - kr) * cr, luma + 2 * (1 - kb) * cb
    rgb = np.array([red, (luma - kr * red - kb * blue) / (1 - kr - kb), blue]) * 255
    frame = next(read_frames(info))
    assert np.abs(frame - rgb).max() <= 1

    with VideoWriter(out, info) as writer:
        for frame in read_frames(info):
            writer.write(frame)
    after = probe_video(out)
    assert (after.color_matrix, after.color_range) == (matrix, range_)
    yuv = np.frombuffer(ffmpeg("-i", out, "-frames:v", "1", "-f", "rawvideo", "-"), np.uint8).astype(int)
    assert np.abs(yuv[:4096] - y).max() <= 1
    assert np.abs(yuv[4096:5120] - u).max() <= 1 and np.abs(yuv[5120:] - v).max() <= 1


def test_untagged_files_stay_untagged(tmp_path):
    info = probe_video(make_video(tmp_path / "a.mp4", seconds=0.4))
    with VideoWriter(tmp_path / "b.mp4", info) as writer:
        for frame in read_frames(info):
            writer.write(frame)
    after = probe_video(tmp_path / "b.mp4")
    assert info.color_matrix == after.color_matrix == "unknown"
    assert info.color_range == after.color_range


def test_picture_outside_the_face_keeps_its_chroma(tmp_path):
    """In and out without the encoder's loss changes the test card's samples by little more than rounding."""
    path = make_video(tmp_path / "a.mp4", seconds=0.4)
    info = probe_video(path)
    with VideoWriter(tmp_path / "b.mp4", info, crf=0) as writer:
        for frame in read_frames(info):
            writer.write(frame)
    before, after = (
        np.frombuffer(ffmpeg("-i", p, "-f", "rawvideo", "-pix_fmt", "yuv420p", "-"), np.uint8).astype(float)
        for p in (path, tmp_path / "b.mp4")
    )
    assert 10 * np.log10(255**2 / ((before - after) ** 2).mean()) > 45


@pytest.mark.parametrize("seconds", [0.4, 3])
def test_loop_plays_forward_backward_with_the_turning_frame_twice(tmp_path, seconds):
    path = make_video(tmp_path / "a.mp4", "-c:v", "libx264", "-bf", "3", "-pix_fmt", "yuv420p", seconds=seconds)
    whole = frames_of(path)
    n = len(whole)
    expected = [*range(n), *range(n)[::-1], *range(n), *range(n)[::-1]][: 3 * n + 5]
    seen = []
    for i, frame in read_frames_looped(probe_video(path), len(expected)):
        assert np.array_equal(frame, whole[i])
        frame[:] = 0  # frames are the caller's own
        seen.append(i)
    assert seen == expected
    assert not ffmpeg_children()


@pytest.mark.parametrize("name", ["vfr.mp4", "stream.ts"])
def test_loop_is_exact_where_seeking_is_hard(tmp_path, name):
    path = tmp_path / name
    if name == "vfr.mp4":
        make_vfr_video(path)
    else:
        make_video(path, *X264, "-g", "40", seconds=4)
    whole = frames_of(path)
    back = list(itertools.islice(read_frames_looped(probe_video(path), 2 * len(whole)), len(whole), None))
    assert [i for i, _ in back] == list(range(len(whole)))[::-1]
    assert all(np.array_equal(frame, whole[i]) for i, frame in back)


def test_loop_stops_at_the_count_asked_for(tmp_path):
    info = probe_video(make_video(tmp_path / "a.mp4"))
    for count in (0, 1, 49, 50, 51):
        assert len(list(read_frames_looped(info, count))) == count


def test_still_picture_is_a_video_of_one_frame(tmp_path):
    path = tmp_path / "50%03d.png"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x48", "-frames:v", "1", "-update", "1", tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    os.rename(tmp_path / "a.png", path)
    info = probe_video(path)
    assert info.n_frames == 1
    frames = list(read_frames_looped(info, 5))
    assert [i for i, _ in frames] == [0] * 5
    exact = np.frombuffer(ffmpeg("-i", f"file:{tmp_path / 'b.png'}", *RAW_RGB), np.uint8)
    assert np.array_equal(frames[4][1].ravel(), exact)


def test_closing_early_leaves_no_process(tmp_path):
    info = probe_video(make_video(tmp_path / "a.mp4", size="640x480", seconds=4))
    for frames in (read_frames(info), read_frames_looped(info, 1000)):
        next(frames)
        assert ffmpeg_children()
        frames.close()
        assert not ffmpeg_children()
    for position in (30, 99, 101, 130, 201, 230):  # forward, backward and second forward pass
        frames = read_frames_looped(info, 1000)
        next(itertools.islice(frames, position, None))
        frames.close()
        assert not ffmpeg_children()


@pytest.mark.parametrize(
    "name",
    [
        "a b.mp4", "it's \"quoted\".mp4", "видео 動画 🎬.mp4", "-dash.mp4", "100%d%05d.mp4", "a:b.mp4",
        "pipe:1.mp4", "[x];(y)&$HOME,=\\.mp4", "new\nline.mp4",
    ],
)  # fmt: skip
def test_any_file_name_works(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.rename(make_video(tmp_path / "a.mp4", seconds=0.4, sound="sine"), name)
    os.mkdir("out")
    info = probe_video(name)
    assert len(list(read_frames(info))) == 10
    assert len(read_audio(name)) > 6000
    with VideoWriter(os.path.join("out", name), info, audio=name) as writer:
        for frame in read_frames(info):
            writer.write(frame)
    assert os.listdir("out") == [name]


@pytest.mark.parametrize("channels", [1, 2])
def test_16_khz_samples_are_read_exactly(tmp_path, channels):
    values = np.random.default_rng(0).integers(-32768, 32768, (16001, channels)).astype("<i2")
    values[:2] = [[-32768], [32767]]
    (tmp_path / "a.raw").write_bytes(values.tobytes())
    ffmpeg("-f", "s16le", "-ar", 16000, "-ac", channels, "-i", tmp_path / "a.raw", tmp_path / "a.wav")
    samples = read_audio(tmp_path / "a.wav")
    assert samples.dtype == np.float32 and samples.flags.c_contiguous
    assert np.array_equal(samples, values.astype(np.float64).mean(axis=1) / 32768)
    assert probe_audio(tmp_path / "a.wav").duration == 16001 / 16000


@pytest.mark.parametrize(
    "name, options, rate, channels",
    [
        ("mono8.wav", ("-ar", 8000), 8000, 1),
        ("surround.wav", ("-ar", 48000, "-ac", 6), 48000, 6),
        ("surround.ac3", ("-ar", 48000, "-ac", 6), 48000, 6),
        ("surround.m4a", ("-ar", 48000, "-ac", 6, "-c:a", "aac"), 48000, 6),
        ("float.wav", ("-ar", 44100, "-c:a", "pcm_f32le"), 44100, 1),
        ("a.mp3", ("-ar", 44100,), 44100, 1),
        ("a.ogg", ("-c:a", "libvorbis", "-ar", 44100), 44100, 1),
        ("a.opus", ("-c:a", "libopus",), 48000, 1),
        ("a.wma", ("-c:a", "wmav2", "-ar", 44100), 44100, 1),
        ("video.mp4", ("-c:a", "aac", "-ar", 44100, "-f", "mp4"), 44100, 1),
    ],
)  # fmt: skip
def test_sound_of_any_kind_is_read(tmp_path, name, options, rate, channels):
    info = probe_audio(make_sound(tmp_path / name, *options))
    assert (info.sample_rate, info.channels) == (rate, channels)
    assert info.duration == pytest.approx(2, abs=0.1)
    samples = read_audio(tmp_path / name)
    assert len(samples) / 16000 == pytest.approx(info.duration, abs=0.002)
    spectrum = np.abs(np.fft.rfft(samples[4000:20000]))
    assert spectrum.argmax() == 440
    assert np.abs(samples).max() <= 1


def write_with_sound(folder, sound, suffix=".mp4", frames=50, copy_audio=False):
    info = probe_video(make_video(folder / "picture.mp4", seconds=0.4))
    out = folder / f"out{suffix}"
    with VideoWriter(out, info, audio=sound, copy_audio=copy_audio) as writer:
        for _, frame in read_frames_looped(info, frames):
            writer.write(frame)
    return out


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("channels, rate", [(1, 16000), (2, 44100), (6, 48000)])
def test_wav_sound_comes_out_sample_for_sample(tmp_path, suffix, channels, rate):
    sound = make_sound(tmp_path / "a.wav", "-ac", channels, source=f"anoisesrc=r={rate}:a=0.5", seconds=1.987)
    out = write_with_sound(tmp_path, sound, suffix, copy_audio=suffix != ".mkv")
    assert np.array_equal(decoded_samples(out, rate, channels), decoded_samples(sound, rate, channels))
    info = probe_audio(out)
    assert info.start == 0 and info.duration == probe_audio(sound).duration
    assert probe_video(out).n_frames == 50


def test_24_bit_sound_keeps_its_bits(tmp_path):
    sound = make_sound(tmp_path / "a.wav", "-c:a", "pcm_s24le", source="anoisesrc=r=48000:a=0.5")
    out = write_with_sound(tmp_path, sound, copy_audio=True)
    a, b = (ffmpeg("-i", p, "-map", "0:a", "-f", "s32le", "-") for p in (sound, out))
    assert a == b


@pytest.mark.parametrize(
    "name, options, codec",
    [
        ("a.wav", (), "flac"),
        ("a.flac", (), "flac"),
        ("a.mp3", (), "mp3"),
        ("a.m4a", ("-c:a", "aac"), "aac"),
        ("a.aac", ("-c:a", "aac"), "aac"),
        ("a.ac3", (), "ac3"),
        ("a.opus", ("-c:a", "libopus"), "opus"),
        ("a.ogg", ("-c:a", "libvorbis"), "flac"),  # MP4 does not hold it as it is
        ("a.wma", ("-c:a", "wmav2"), "flac"),
        ("late.mkv", ("-c:a", "aac", "-output_ts_offset", "0.7"), "aac"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("copy_audio", [True, False])
def test_sound_keeps_its_place_and_codec(tmp_path, name, options, codec, copy_audio):
    click = "aevalsrc='if(between(t,1,1.004),0.9*sin(6000*t),0)':s=48000"
    sound = make_sound(tmp_path / name, *options, source=click)
    out = write_with_sound(tmp_path, sound, copy_audio=copy_audio)
    assert probe_audio(out).codec == (codec if copy_audio else "aac")
    assert probe_audio(out).start == pytest.approx(0, abs=0.001)
    before, after = read_audio(sound), read_audio(out)
    assert len(after) >= min(len(before), 2 * 16000) - 16  # nothing is cut off but the last packet's padding
    assert abs(np.abs(before).argmax() - np.abs(after).argmax()) / 16000 < 0.01
    if name != "late.mkv" and (copy_audio or codec == "aac"):  # copied or lossless: the very samples
        n = min(len(before), len(after))
        assert np.allclose(before[:n], after[:n], atol=1e-4)


def test_sound_that_begins_later_than_its_video_is_moved_to_the_first_frame(tmp_path):
    click = "aevalsrc='if(between(t,0.5,0.504),0.9*sin(6000*t),0)':s=48000:d=1"
    picture = make_video(tmp_path / "p.mp4", seconds=2)
    sound = make_sound(tmp_path / "s.wav", source=click[:-4], seconds=1)
    late = tmp_path / "late.mkv"
    ffmpeg("-i", picture, "-itsoffset", 0.6, "-i", sound, "-c:v", "copy", "-c:a", "libopus", late)
    assert probe_audio(late).start == pytest.approx(0.6, abs=0.02)
    out = write_with_sound(tmp_path, late)
    assert np.abs(read_audio(late)).argmax() / 16000 == pytest.approx(0.5, abs=0.01)
    on_clock = ffmpeg("-i", out, "-af", "aresample=16000:async=1:first_pts=0", "-ac", 1, "-f", "f32le", "-")
    assert np.abs(np.frombuffer(on_clock, np.float32)).argmax() / 16000 == pytest.approx(0.5, abs=0.01)


def test_output_plays_from_the_start_and_says_what_it_is(tmp_path):
    sound = make_sound(tmp_path / "a.wav")
    data = write_with_sound(tmp_path, sound).read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")
    assert b"Synthetic media" in data
    assert sorted(os.listdir(tmp_path)) == ["a.wav", "out.mp4", "picture.mp4"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_abort_leaves_no_file_and_no_process(tmp_path, error):
    info = probe_video(make_video(tmp_path / "a.mp4", sound="sine"))
    out = tmp_path / "out" / "o.mp4"
    out.parent.mkdir()
    out.write_bytes(b"earlier result")
    with pytest.raises(error), VideoWriter(out, info, audio=info.path) as writer:
        for i, frame in enumerate(read_frames(info)):
            writer.write(frame)
            if i == 30:
                raise error
    assert os.listdir(out.parent) == ["o.mp4"] and out.read_bytes() == b"earlier result"
    assert not ffmpeg_children()


def test_encoder_that_dies_is_a_sentence(tmp_path):
    info = probe_video(make_video(tmp_path / "a.mp4", size="640x480"))
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(UserError, match="was ended from outside .SIGKILL. while it wrote"),
        VideoWriter(tmp_path / "out/o.mp4", info) as writer,
    ):
        for frame in read_frames(info):
            writer.write(frame)
            if writer.frames == 5:
                writer._process.kill()
    assert not os.listdir(tmp_path / "out")


def test_truncated_picture_data_behind_a_whole_index_is_noticed(tmp_path):
    path = make_video(tmp_path / "a.mp4", *X264, "-movflags", "+faststart", size="320x240", seconds=4)
    data = path.read_bytes()
    for share in (0.1, 0.5, 0.95):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(UserError, match="cut off"):
            probe_video(path)


def test_a_container_without_an_index_gives_the_part_that_is_there(tmp_path):
    path = make_video(tmp_path / "a.mkv", *X264, size="320x240", seconds=4)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    info = probe_video(path)
    n = len(list(read_frames(info)))
    assert 20 < n < 95
    assert abs(info.n_frames - n) <= 2
    indices = [i for i, _ in read_frames_looped(info, 2 * n)]
    assert indices == [*range(n), *range(n)[::-1]]


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Files that cannot be used, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("bad")
    good = make_video(folder / "good.mp4", *X264, "-movflags", "+faststart", seconds=1).read_bytes()
    late_index = make_video(folder / "silent.mp4", seconds=1).read_bytes()
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is not a video\n" * 50)
    (folder / "noindex.mp4").write_bytes(late_index[: len(late_index) // 2])
    (folder / "nodata.mp4").write_bytes(good[: good.find(b"mdat") + 40])
    make_sound(folder / "sound.wav")
    ffmpeg("-i", folder / "good.mp4", "-i", folder / "sound.wav", "-map", 1, "-c:a", "mp3", folder / "sound.mp3")
    with wave.open(str(folder / "zero.wav"), "wb") as zero:
        zero.setparams((1, 2, 16000, 0, "NONE", ""))
    return folder


@pytest.mark.parametrize(
    "name, words",
    [
        ("missing.mp4", "no file"), ("", "folder"), ("empty.mp4", "empty"), ("text.mp4", "not a video"),
        ("noindex.mp4", "cut off"), ("nodata.mp4", "damaged"),
        ("sound.wav", "only sound"), ("sound.mp3", "only sound"),
    ],
)  # fmt: skip
def test_unusable_video_is_one_clear_sentence(bad, name, words):
    with pytest.raises(UserError, match=words) as caught:
        list(read_frames(probe_video(bad / name)))
    assert str(bad / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, words",
    [
        ("missing.wav", "no file"), ("", "folder"), ("empty.mp4", "empty"), ("text.mp4", "not a sound"),
        ("silent.mp4", "no sound"), ("zero.wav", "no samples"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("use", [read_audio, probe_audio])
def test_unusable_sound_is_one_clear_sentence(bad, use, name, words):
    with pytest.raises(UserError, match=words) as caught:
        use(bad / name)
    assert str(bad / name) in str(caught.value) and "\n" not in str(caught.value)


def test_unwritable_output_is_refused_before_work_begins(bad, tmp_path):
    link = tmp_path / "link.mp4"
    os.symlink(bad / "good.mp4", link)
    for path, words in [
        (tmp_path / "missing" / "o.mp4", "does not exist"),
        (tmp_path / "o.avi", "does not end in"),
        (tmp_path, "does not end in"),
        (link, "is an input"),
    ]:
        with pytest.raises(UserError, match=words):
            check_output(path, (bad / "good.mp4",))
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        check_output(tmp_path / "folder.mp4")
    if os.path.isdir("/proc/self"):
        with pytest.raises(UserError, match="cannot be written"):
            check_output("/proc/self/o.mp4")
    assert check_output(tmp_path / "o.mp4", (bad / "good.mp4",)) == tmp_path / "o.mp4"
    assert not (tmp_path / "o.mp4").exists()


def test_errors_of_ffmpeg_never_stall_a_reader(tmp_path):
    """A damaged file makes more messages than a pipe holds."""
    path = make_video(tmp_path / "a.mkv", *X264, "-g", "5", size="640x480", seconds=6)
    data = bytearray(path.read_bytes())
    noise = np.random.default_rng(0)
    for at in noise.integers(5000, len(data), 3000):
        data[at] ^= 255
    path.write_bytes(data)
    assert sum(1 for _ in read_frames(probe_video(path))) > 0


@pytest.mark.parametrize("probe, kind", [(probe_video, "video"), (probe_audio, "sound")])
def test_a_playlist_is_refused_since_it_names_files_of_others(tmp_path, probe, kind):
    whole = make_video(tmp_path / "whole.mp4", sound="sine")
    stream = make_video(tmp_path / "stream.ts", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:a", "aac", sound="sine")
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\n{stream}\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {whole.name}\n")
    for name in ("list.m3u8", "list.mp4"):
        with pytest.raises(UserError, match="is a playlist"):
            probe(tmp_path / name)


@pytest.mark.parametrize("tags", [(), ("-metadata", "comment=image2video at 1250 fps")], ids=["named", "tagged"])
def test_a_video_is_none_the_less_one_for_the_name_of_its_folder_or_its_tags(tmp_path, tags):
    (tmp_path / "png_pipe").mkdir()
    info = probe_video(make_video(tmp_path / "png_pipe" / "my_pipeline.mp4", *X264, *tags))
    assert (info.n_frames, info.fps, info.still) == (50, 25, False) and info.duration == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "without an ending"])
def test_a_picture_is_a_still_of_one_frame(tmp_path, name):
    picture = tmp_path / f"picture{Path(name).suffix or '.png'}"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=96x64:d=0.04", "-frames:v", 1, picture)
    picture.rename(tmp_path / name)
    info = probe_video(tmp_path / name)
    assert (info.n_frames, info.still, info.remarks) == (1, True, ())


def test_what_lies_under_transparency_becomes_white(tmp_path):
    pixels = np.zeros((64, 96, 4), np.uint8)
    pixels[..., 0] = 255  # red, all of it hidden
    pixels[16:48, 24:72] = (0, 0, 255, 255)
    pixels[20:30, 30:40] = (0, 0, 255, 128)
    raw = tmp_path / "raw"
    raw.write_bytes(pixels.tobytes())
    path = tmp_path / "cut out.png"
    ffmpeg("-f", "rawvideo", "-pix_fmt", "rgba", "-s", "96x64", "-i", raw, "-frames:v", 1, path)
    info = probe_video(path)
    frame = frames_of(path)[0]
    assert info.transparent and frame.shape == (64, 96, 3)
    assert (frame[0, 0] == 255).all() and (frame[40, 60] == (0, 0, 255)).all()
    assert np.abs(frame[25, 35].astype(int) - (127, 127, 255)).max() <= 1
    assert not probe_video(make_video(tmp_path / "opaque.mp4", *X264, seconds=0.2)).transparent


def test_a_picture_of_a_telephone_becomes_one_that_players_show(tmp_path):
    path = tmp_path / "large.jpg"
    ffmpeg("-f", "lavfi", "-i", "color=c=teal:s=8000x6000:d=0.04", "-frames:v", 1, path)
    info = probe_video(path)
    assert info.width * info.height <= STILL_PIXELS and info.width % 2 == info.height % 2 == 0
    assert info.width / info.height == pytest.approx(8 / 6, rel=1e-3)
    assert f"{info.width} × {info.height}" in info.remarks[0]
    assert frames_of(path).shape == (1, info.height, info.width, 3)


def test_samples_that_are_no_numbers_are_silent(tmp_path):
    path, raw = tmp_path / "float.wav", tmp_path / "raw"
    samples = np.full(16000, 0.25, np.float32)
    samples[[100, 200, 300]] = np.nan, np.inf, -np.inf
    raw.write_bytes(samples.tobytes())
    ffmpeg("-f", "f32le", "-ar", 16000, "-ac", 1, "-i", raw, "-c:a", "pcm_f32le", path)
    heard = read_audio(path)
    assert heard[[100, 200, 300]].tolist() == [0, 1, -1]
    assert (np.delete(heard, [100, 200, 300]) == 0.25).all()


@pytest.mark.parametrize("check", [probe_video, probe_audio, read_audio, check_output])
def test_a_name_that_the_disk_refuses_is_a_sentence(tmp_path, check):
    with pytest.raises(UserError, match="name"):
        check(tmp_path / f"{'a' * 300}.mp4")
