"""Frames of files whose pictures change on the way, of interlaced and of transparent video: each frame is the one of
its time, and it is the same whether it is read forward, backward, or from any frame on."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from clips import ffmpeg, make_rotated_video, make_vfr_video, make_video

from latentsync import FPS
from latentsync.errors import UserError
from latentsync.media import VideoWriter, probe_video, read_frames, read_frames_looped, reading
from latentsync.media.colour import planar_format
from latentsync.media.info import INTERLACED_REMARK, TRANSPARENT_REMARK

CASES = Path(__file__).parents[2] / "shared/cases"
X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-crf", 4, "-pix_fmt", "yuv420p")
X265 = ("-c:v", "libx265", "-preset", "ultrafast", "-crf", 4, "-x265-params", "log-level=none", "-pix_fmt", "yuv420p")
VP8 = ("-c:v", "libvpx", "-deadline", "realtime", "-b:v", "4M", "-pix_fmt", "yuv420p")
VP9 = ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-crf", 4, "-b:v", 0, "-pix_fmt", "yuv420p")
MPEG2 = ("-c:v", "mpeg2video", "-q:v", 2, "-pix_fmt", "yuv420p")
MJPEG = ("-c:v", "mjpeg", "-q:v", 2, "-pix_fmt", "yuvj420p")
FIELDS = ("-flags", "+ildct+ilme")
FULL_RANGE = ("-vf", "scale=out_range=pc", "-color_range", "pc")
BASE, SLOPE = 40, 80  # grey level of a clock at 0 s, and what it grows by in a second
CLOCK_ERROR = 0.03  # seconds: two levels and a half, for what encoders and colours round


def clock(path: Path, *options: object, start=0.0, seconds=2.4, size="64x48", fps: object = 25, filters="null") -> Path:
    """A picture whose grey level says the time since `start`, with a moving pattern on its left quarter."""
    level = f"if(lt(X,W/4),p(X,Y),{BASE}+{SLOPE}*(T+{start}))"
    ffmpeg(
        *("-f", "lavfi", "-i", f"testsrc2=s={size}:r={fps}:d={seconds},format=gray,geq='{level}',{filters}"),
        *("-color_range", "tv", *options, path),
    )
    return path


def clock_times(frames: list[np.ndarray]) -> np.ndarray:
    """Seconds that frames of a `clock` show."""
    height, width = frames[0].shape[:2]
    # Of many pixels, since encoders round each differently.
    middles = [frame[height // 3 : 2 * height // 3, width // 2 : 3 * width // 4].mean() for frame in frames]
    return (np.array(middles) - BASE) / SLOPE


def concatenate(path: Path, *parts: Path) -> Path:
    """The packets of several files, one after the other, in one."""
    listing = path.with_suffix(".txt")
    listing.write_text("".join(f"file '{part.absolute()}'\n" for part in parts))
    ffmpeg("-f", "concat", "-safe", 0, "-i", listing, "-c", "copy", path)
    return path


def changing(path: Path, codec=X264, second=(), first=(), sizes=("64x48", "64x48"), fps: object = 25) -> Path:
    """A clock of 2.4 s whose middle third has other properties: options `second` and the second of `sizes`."""
    part = {".mov": ".mkv"}.get(path.suffix, path.suffix)
    return concatenate(path, *(
        clock(path.with_name(f"{path.stem}{i}{part}"), *codec, *(first, second)[i % 2],
              start=0.8 * i, seconds=0.8, size=sizes[i % 2], fps=fps)
        for i in range(3)
    ))  # fmt: skip


def rotated_and_changing(path: Path) -> Path:
    lying = changing(path.with_suffix(".mkv"), sizes=("64x48", "96x72"))
    ffmpeg("-display_rotation", 90, "-i", lying, "-c", "copy", path)
    return path


def interlaced(path: Path, *options: object, fields: object = 50, first="top") -> Path:
    """A clock of 2.4 s that is stored as so many fields a second."""
    graph = f"format=yuv420p,tinterlace=interleave_{first}"
    return clock(path, *options, *FIELDS, fps=fields, filters=graph)


def discontinuous(path: Path, offset: float) -> Path:
    """Two recordings of 1.2 s, one behind the other, the second with timestamps from `offset` seconds on."""
    parts = [
        clock(path.with_name(f"{i}.ts"), *X264, "-output_ts_offset", i * offset, start=1.2 * i, seconds=1.2)
        for i in range(2)
    ]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def trimmed(path: Path) -> Path:
    """A part of a video without encoding: its edit list begins in the middle of a group of pictures."""
    whole = clock(path.with_name("whole.mp4"), "-c:v", "libx264", "-crf", 4, "-bf", 3, "-g", 12, "-pix_fmt", "yuv420p",
                  start=-0.48, seconds=2.88)  # fmt: skip
    ffmpeg("-ss", 0.48, "-i", whole, "-c", "copy", path)
    return path


def transparent(path: Path, *options: object) -> Path:
    """A moving pattern with a left half that is fully transparent."""
    planes = {"r": "r(X,Y)", "g": "g(X,Y)", "b": "b(X,Y)", "a": "255*gte(X,W/2)"}
    graph = "format=rgba,geq=" + ":".join(f"{name}='{value}'" for name, value in planes.items())
    ffmpeg("-f", "lavfi", "-i", f"testsrc2=s=96x64:r=25:d=2.4,{graph}", *options, path)
    return path


CLOCKS = {  # files of a clock of 2.4 s
    "size.ts": lambda path: changing(path, sizes=("64x48", "96x72")),
    "size.mkv": lambda path: changing(path, sizes=("64x48", "32x24")),
    "aspect.mkv": lambda path: changing(path, sizes=("48x64", "64x48"), fps="30000/1001"),
    "size at 60 fps.ts": lambda path: changing(path, sizes=("64x48", "96x72"), fps=60),
    "size vp8.webm": lambda path: changing(path, VP8, sizes=("64x48", "128x96")),
    "size vp9.webm": lambda path: changing(path, VP9, sizes=("128x96", "64x48")),
    "size jpeg.avi": lambda path: changing(path, MJPEG, sizes=("64x48", "128x96")),
    "size and rotation.mov": rotated_and_changing,
    "range hevc.ts": lambda path: changing(path, X265, FULL_RANGE),
    "range vp9.webm": lambda path: changing(path, VP9, FULL_RANGE),
    "matrix.mkv": lambda path: changing(path, X264, ("-colorspace", "smpte170m"), ("-colorspace", "bt709")),
    "more bits.mkv": lambda path: changing(path, X264, ("-pix_fmt", "yuv444p10le")),
    "fewer bits.mkv": lambda path: changing(path, X264, (), ("-pix_fmt", "yuv422p10le")),
    "wide pixels.ts": lambda path: changing(path, X264, *[("-vf", "setsar=4/3")] * 2, sizes=("64x48", "96x72")),
    "interlaced.ts": lambda path: interlaced(path, *X264),
    "interlaced.mpg": lambda path: interlaced(path, *MPEG2),
    "interlaced bottom first.mkv": lambda path: interlaced(path, *X264, "-x264-params", "bff=1", first="bottom"),
    "interlaced 29.97.mov": lambda path: interlaced(path, *X264, fields="60000/1001"),
    "interlaced in the middle.mkv": lambda path: changing(path, X264, FIELDS),
    "leap forward.ts": lambda path: discontinuous(path, 100),
    "leap backward.ts": lambda path: discontinuous(path, -0.9),
    "edit list.mp4": trimmed,
    "b-pyramid.mp4": lambda path: clock(path, "-c:v", "libx264", "-crf", 4, "-bf", 5, "-g", 30, "-pix_fmt", "yuv420p",
                                        "-x264-params", "b-pyramid=normal:b-adapt=0"),
}  # fmt: skip
OTHERS = {
    "vfr.mp4": lambda path: make_vfr_video(path, seconds=4),
    "rotated.mp4": lambda path: make_rotated_video(path, 270),
    "gap.ts": lambda path: discontinuous(path, 4),
    "telecine.mpg": lambda path: make_video(path, "-vf", "telecine=pattern=23", *MPEG2, *FIELDS, fps="24000/1001"),
    "transparent vp8.webm": lambda path: transparent(path, *VP8, "-auto-alt-ref", 0, "-g", 20, "-pix_fmt", "yuva420p"),
    "transparent vp9.webm": lambda path: transparent(path, *VP9, "-g", 20, "-pix_fmt", "yuva420p"),
    "transparent prores.mov": lambda path: transparent(path, "-c:v", "prores_ks", "-pix_fmt", "yuva444p10le"),
}


@pytest.mark.parametrize("name", [*CLOCKS, *OTHERS])
def test_frames_are_the_same_forward_backward_and_from_any_frame_on(tmp_path, name):
    info = probe_video((CLOCKS | OTHERS)[name](tmp_path / name))
    whole = list(read_frames(info))
    n = len(whole)
    assert n == pytest.approx(info.n_frames, abs=1)  # some containers do not say how long the last frame lasts
    if name in CLOCKS:
        assert n == pytest.approx(2.4 * FPS, abs=1)
        off = np.abs(clock_times(whole) - np.arange(n) / FPS)
        assert off.max() < 0.5 / info.fps + CLOCK_ERROR  # the nearest frame of the file
    for start in (1, n // 2, n - 4):
        part = list(read_frames(info, start, 6))
        assert len(part) == len(whole[start : start + 6])
        assert all(map(np.array_equal, part, whole[start:])), start
    looped = list(read_frames_looped(info, 2 * n + 2))
    assert [i for i, _ in looped] == [*range(n), *range(n)[::-1], 0, 1]
    assert all(np.array_equal(frame, whole[i]) for i, frame in looped)


@pytest.mark.skipif(not CASES.exists(), reason="needs the folder shared/cases beside the repository")
def test_flashes_stay_in_their_places_where_the_size_changes_again_and_again():
    info = probe_video(CASES / "webrtc.mkv")
    for frames in (list(read_frames(info)), [frame for _, frame in read_frames_looped(info, 100)][:49:-1]):
        light = np.array([frame.mean() for frame in frames])
        assert np.flatnonzero(light > light.mean() + 4).tolist() == [13, 14, 38, 39]  # 0.52 and 1.52 s


def square(path: Path, size: str) -> Path:
    """A white square of 24 pixels in the middle of a grey picture."""
    level = "if(lt(abs(X-W/2+0.5),12)*lt(abs(Y-H/2+0.5),12),235,126)"
    graph = f"geq=lum='{level}':cb=128:cr=128,setparams=range=tv"
    ffmpeg("-f", "lavfi", "-i", f"color=s={size}:r=25:d=0.4,format=yuv420p,{graph}", *X264, path)
    return path


@pytest.mark.parametrize(
    "size, scale, bars", [("96x96", 2 / 3, (16, 0)), ("96x288", 1 / 3, (0, 16)), ("32x48", 2, (0, 0))]
)
def test_a_picture_of_another_shape_is_fitted_between_black_bars(tmp_path, size, scale, bars):
    path = concatenate(tmp_path / "a.ts", square(tmp_path / "0.ts", "64x96"), square(tmp_path / "1.ts", size))
    frames = list(read_frames(probe_video(path)))
    assert len(frames) == 20 and {frame.shape for frame in frames} == {(96, 64, 3)}
    for frame, share, (top, left) in ((frames[5], 1, (0, 0)), (frames[15], scale, bars)):
        light = frame.mean(axis=2)
        assert abs((light[48] > 192).sum() - 24 * share) <= 2 and abs((light[:, 32] > 192).sum() - 24 * share) <= 2
        picture = light[top : 96 - top, left : 64 - left]
        assert picture[3:-3, 3:-3].min() > 110
        assert light.sum() - picture.sum() < 5 * (light.size - picture.size) + 1


def test_colours_stay_where_their_tags_change(tmp_path):
    def part(name: str, matrix: str, tag: str, range_: str) -> Path:
        graph = f"scale=out_color_matrix={matrix}:out_range={range_}:flags=accurate_rnd,format=yuv420p"
        ffmpeg("-f", "lavfi", "-i", f"color=0x40a060:s=64x48:r=25:d=0.4,format=gbrp,{graph}",
               *X264, "-colorspace", tag, "-color_range", range_, tmp_path / name)  # fmt: skip
        return tmp_path / name

    first = part("0.mkv", "bt709", "bt709", "tv")
    second = part("1.mkv", "smpte170m", "smpte170m", "pc")
    for i, parts in enumerate(itertools.permutations((first, second))):
        info = probe_video(concatenate(tmp_path / f"whole{i}.mkv", *parts))
        frames = list(read_frames(info))
        assert len(frames) == 20
        for frame in frames:
            assert np.abs(frame.astype(int) - (0x40, 0xA0, 0x60)).max() <= 3


@pytest.mark.parametrize("size", ["161x121", "162x121", "163x120"])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv411p", "yuv444p", "gbrp", "gray"])
def test_odd_sizes_keep_every_pixel(tmp_path, pixel_format, size):
    path = make_video(tmp_path / "a.mkv", "-c:v", "ffv1", "-pix_fmt", pixel_format, size=size, seconds=0.08)
    info = probe_video(path)
    graph = "" if pixel_format in {"gbrp", "gray"} else ":in_color_matrix=smpte170m:in_range=tv"
    graph = f"scale=flags=neighbor+accurate_rnd+full_chroma_int{graph},format=rgb24"
    exact = ffmpeg("-i", path, "-vf", graph, "-f", "rawvideo", "-")
    assert np.stack(list(read_frames(info))).tobytes() == exact


def test_rare_formats_have_a_planar_one_of_their_kind():
    for name, planar in {
        "yuvj420p": "yuv420p", "yuv420p10be": "yuv420p10le", "gray16be": "gray16le", "nv12": "yuv420p",
        "uyvy422": "yuv422p", "rgb24": "gbrp", "rgb48be": "gbrp16le", "pal8": "gbrap", "bgra": "gbrap",
        "rgba64le": "gbrap16le", "ya8": "gbrap", "p010le": "yuv444p16le", "yuva444p12le": "yuva444p12le",
    }.items():  # fmt: skip
        assert planar_format(name) == planar


TRANSPARENT = {name: make for name, make in OTHERS.items() if name.startswith("transparent")} | {
    "qtrle.mov": lambda path: transparent(path, "-c:v", "qtrle"),
    "png.mov": lambda path: transparent(path, "-c:v", "png"),
    "still.png": lambda path: transparent(path, "-frames:v", 1),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_transparent_becomes_white_and_the_user_is_told(tmp_path, name):
    info = probe_video(TRANSPARENT[name](tmp_path / name))
    assert info.transparent and TRANSPARENT_REMARK in info.remarks
    frame = list(read_frames(info))[-1].astype(int)
    assert frame[:, :40].min() >= 250
    pattern = np.frombuffer(ffmpeg("-f", "lavfi", "-i", "testsrc2=s=96x64:r=25:d=2.4", "-pix_fmt", "rgb24",
                                   "-f", "rawvideo", "-"), np.uint8).reshape(-1, 64, 96, 3)  # fmt: skip
    assert np.abs(frame - pattern[0 if info.still else -1])[:, 52:].mean() < 12


@pytest.mark.parametrize("codec, name", [(VP8, "vp8"), (VP9, "vp9"), (X264, "h264")])
def test_a_false_flag_of_transparency_changes_nothing(tmp_path, codec, name):
    honest = make_video(tmp_path / "honest.mkv", *codec, seconds=0.4)
    forged = tmp_path / "forged.mkv"
    ffmpeg("-i", honest, "-c", "copy", "-metadata:s:v", "alpha_mode=1", forged)
    infos = [probe_video(path) for path in (honest, forged)]
    assert not any(info.transparent or info.remarks for info in infos)
    assert all(map(np.array_equal, *map(read_frames, infos)))


def moving_bar(path: Path, *options: object, filters: str) -> Path:
    """A bar that moves 400 pixels a second, 8 pixels from field to field, its left edge at 20 pixels at 0 s."""
    graph = f"geq=lum='235*between(X-20-400*T,0,40)+16':cb=128:cr=128,format=yuv420p,{filters}"
    ffmpeg("-f", "lavfi", "-i", f"color=s=320x96:r=50:d=0.6,format=yuv420p,{graph}", *options, path)
    return path


@pytest.mark.parametrize("first", ["top", "bottom"])
@pytest.mark.parametrize("codec", [X264, MPEG2, ("-c:v", "ffv1", "-field_order", "tt")])
def test_interlaced_video_is_deinterlaced_without_a_shift_in_time(tmp_path, codec, first):
    codec = (*codec[:3], {"top": "tt", "bottom": "bb"}[first]) if codec[1] == "ffv1" else (*codec, *FIELDS)
    path = moving_bar(tmp_path / "a.mkv", *codec, filters=f"tinterlace=interleave_{first}")
    info = probe_video(path)
    assert info.interlaced and INTERLACED_REMARK in info.remarks
    frames = list(read_frames(info))
    assert len(frames) == info.n_frames == 15
    for i, frame in enumerate(frames[1:], 1):
        lines = frame[8:-8].mean(axis=2) > 128
        left = lines.argmax(axis=1)
        assert np.abs(left - (20 + 400 * i / FPS)).max() <= 2  # the other field's is 8 pixels further
    with VideoWriter(tmp_path / "out.mp4", info) as writer:
        for frame in frames:
            writer.write(frame)
    assert not probe_video(tmp_path / "out.mp4").interlaced


def test_progressive_frames_are_left_alone_whatever_moves_in_them(tmp_path):
    path = moving_bar(tmp_path / "a.mkv", "-c:v", "ffv1", filters="tinterlace=interleave_top,setfield=prog")
    info = probe_video(path)
    assert not info.interlaced and info.remarks == ()
    lines = [frame[8:-8].mean(axis=2) > 128 for frame in read_frames(info)]
    assert all(7 <= np.ptp(line.argmax(axis=1)) <= 9 for line in lines)


def test_a_file_that_gives_fewer_frames_at_a_second_reading_is_a_sentence(tmp_path, monkeypatch):
    info = probe_video(make_video(tmp_path / "a.ts", *X264, seconds=2))
    frames = read_frames_looped(info, 100)
    for _ in range(50):
        next(frames)
    decode = reading._decode
    monkeypatch.setattr(reading, "_decode", lambda *args: itertools.islice(decode(*args), 3))
    with pytest.raises(UserError, match="a.ts gives fewer frames"):
        next(frames)
