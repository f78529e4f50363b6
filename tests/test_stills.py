"""Pictures in every container: what is a still, which of a file's pictures it is, and how large it may be."""

from pathlib import Path

import numpy as np
import pytest
from clips import ffmpeg, make_video
from heif import make_grid

from latentsync.errors import UserError
from latentsync.media import probe, probe_video, read_frames, read_frames_looped
from latentsync.media.probe import STILL_PIXELS
from latentsync.media.signatures import picture_demuxer


def make_picture(path: Path, source: str = "testsrc=s=384x256", *options: object) -> Path:
    ffmpeg("-f", "lavfi", "-i", source, "-frames:v", 1, "-update", 1, *options, path)
    return path


def pixels(path: Path) -> np.ndarray:
    """The only frame, (height, width, 3) int."""
    (frame,) = read_frames(probe_video(path))
    return frame.astype(int)


def make_animation(path: Path, *options: object) -> Path:
    return make_video(path, *options, size="64x48", seconds=0.4)


@pytest.mark.parametrize("turns", range(4))
def test_a_still_made_of_tiles_is_the_whole_picture_upright(tmp_path, turns):
    picture = make_picture(tmp_path / "picture.png")
    path = make_grid(tmp_path / "a.heic", picture, 3, 2, 128, (350, 230), turns=turns)
    whole = np.rot90(pixels(picture)[:230, :350], turns)
    info = probe_video(path)
    assert (info.height, info.width) == whole.shape[:2] and (info.still, info.n_frames, info.remarks) == (True, 1, ())
    assert np.abs(pixels(path) - whole).mean() < 4
    assert [i for i, _ in read_frames_looped(info, 3)] == [0, 0, 0]
    assert path.rename(tmp_path / "photo") and np.abs(pixels(tmp_path / "photo") - whole).mean() < 4


def test_so_large_a_still_of_tiles_is_made_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "STILL_PIXELS", 200 * 150)
    picture = make_picture(tmp_path / "picture.png")
    path = make_grid(tmp_path / "a.heic", picture, 3, 2, 128, (320, 240))
    info = probe_video(path)
    assert 0.95 * 200 * 150 < info.width * info.height <= 200 * 150 and STILL_PIXELS == 4096 * 2304
    assert f"{info.width} × {info.height}" in info.remarks[0] and pixels(path).shape == (info.height, info.width, 3)


@pytest.mark.parametrize("claimed", [(65000, 65000), (8300, 8300), (0, 0), (2**16 - 1, 1)])
def test_a_size_that_the_tiles_do_not_have_is_a_sentence(tmp_path, claimed):
    picture = make_picture(tmp_path / "picture.png")
    path = make_grid(tmp_path / "a.heic", picture, 2, 2, 128, (256, 256), claimed=claimed)
    with pytest.raises(UserError, match="a.heic .*(damaged|pixels|not a video)"):
        list(read_frames(probe_video(path)))


def test_a_still_in_an_iso_file_is_one_frame_and_a_sequence_is_a_video(tmp_path):
    still = make_picture(tmp_path / "still.avif", "testsrc2=s=320x240", "-c:v", "libaom-av1", "-cpu-used", 8)
    moving = make_animation(tmp_path / "moving.avif", "-c:v", "libaom-av1", "-cpu-used", 8)
    large = make_picture(tmp_path / "large.avif", "color=s=4400x2400", "-c:v", "libsvtav1", "-preset", 12)
    for path, frames, is_still in ((still, 1, True), (moving, 10, False), (large, 1, True)):
        info = probe_video(path)
        assert (info.n_frames, info.still, len(list(read_frames(info)))) == (frames, is_still, frames), path
    assert probe_video(large).remarks and not probe_video(still).remarks


SECOND = "color=blue:s=64x48"


@pytest.mark.parametrize("second", [SECOND, "color=blue:s=96x64"], ids=["smaller", "of the same size"])
@pytest.mark.parametrize("name", ["a.jfif", "a.jpe", "a.jpg", "a.mpo", "photo", "photo.bin", "a.mp4"])
def test_a_picture_is_the_first_of_its_file(tmp_path, name, second):
    pictures = [make_picture(tmp_path / f"{i}.jpg", source) for i, source in enumerate(("color=red:s=96x64", second))]
    path = tmp_path / name
    path.write_bytes(b"".join(picture.read_bytes() for picture in pictures))
    info = probe_video(path)
    assert (info.width, info.height, info.still, info.n_frames) == (96, 64, True, 1)
    assert pixels(path)[32, 48].argmax() == 0


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tiff"])
def test_so_is_every_other_kind(tmp_path, suffix):
    pictures = [make_picture(tmp_path / f"{i}.{suffix}", s) for i, s in enumerate(("color=red:s=96x64", SECOND))]
    path = tmp_path / "photo"
    path.write_bytes(b"".join(picture.read_bytes() for picture in pictures))
    info = probe_video(path)
    assert (info.width, info.height, info.still) == (96, 64, True) and pixels(path)[32, 48].argmax() == 0


@pytest.mark.parametrize("name", ["a.mjpeg", "a.mjpg", "a", "a.bin"])
def test_raw_motion_jpeg_is_a_video(tmp_path, name):
    path = make_animation(tmp_path / "source.mjpeg", "-c:v", "mjpeg")
    info = probe_video(path.rename(tmp_path / name))
    assert (info.still, info.n_frames, len(list(read_frames(info)))) == (False, 10, 10)


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.gif", ("-c:v", "gif")), ("a.png", ("-f", "apng")), ("a.apng", ("-f", "apng")),
        ("a.webp", ("-c:v", "libwebp_anim", "-pix_fmt", "yuv420p")),
    ],
)  # fmt: skip
def test_an_animation_is_a_video_and_a_single_picture_of_its_kind_a_still(tmp_path, name, options):
    moving = probe_video(make_animation(tmp_path / name, *options))
    assert (moving.still, moving.n_frames, len(list(read_frames(moving)))) == (False, 10, 10)
    single = probe_video(make_picture(tmp_path / f"one{name[1:]}", SECOND, *options))
    assert (single.still, single.n_frames, len(list(read_frames(single)))) == (True, 1, 1)


def test_names_do_not_decide_what_a_picture_is(tmp_path):
    for suffix, demuxer in [("png", "png_pipe"), ("jpg", "jpeg_pipe"), ("gif", "gif"), ("webp", "webp_pipe")]:
        path = make_picture(tmp_path / f"a.{suffix}").rename(tmp_path / "a.mov")
        assert picture_demuxer(path) == demuxer
        assert (probe_video(path).still, pixels(path).shape) == (True, (256, 384, 3))
    assert picture_demuxer(make_animation(tmp_path / "clip.png", "-f", "mp4")) is None
    assert probe_video(tmp_path / "clip.png").n_frames == 10
