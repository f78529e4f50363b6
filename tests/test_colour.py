"""Colour bars in, through, and out again: a player shows in the result what it shows in the source."""

from pathlib import Path

import numpy as np
import pytest
from clips import ffmpeg, make_sound, make_video

from latentsync.media import HDR_REMARK, VideoInfo, VideoWriter, probe_video, read_frames
from optim.serving.job import Request
from optim.serving.worker import Worker

X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-crf", 4)
FRAMES = 5
MATRICES = {"smpte170m": "smpte170m", "bt470bg": "bt470", "bt709": "bt709", "bt2020nc": "bt2020"}  # tag -> scale's name
TRANSFERS = ["smpte2084", "arib-std-b67"]


def bars(width: int = 320, height: int = 240) -> list:
    """ffmpeg's input: bars of 75 % and a ramp of greys, exact in RGB."""
    source = f"smptehdbars=s={width}x{height}:r=25:d={FRAMES / 25}"
    return ["-f", "lavfi", "-i", f"{source},scale=in_color_matrix=bt709:out_range=pc,format=gbrp"]


def shown(path: Path, info: VideoInfo, matrix: str = "auto") -> np.ndarray:
    """A frame in the middle as a player shows it, (H, W, 3): by the tags of the file, or by the matrix given."""
    graph = f"scale=in_color_matrix={matrix}:flags=accurate_rnd+full_chroma_int,format=rgb24"
    data = ffmpeg("-i", path, "-vf", graph, "-f", "rawvideo", "-")
    return np.frombuffer(data, np.uint8).reshape(-1, info.height, info.width, 3)[FRAMES // 2].astype(int)


def passed_through(path: Path) -> Path:
    """What the program makes of a video when it changes no pixel."""
    info, out = probe_video(path), path.with_name("out.mp4")
    with VideoWriter(out, info) as writer:
        for frame in read_frames(info):
            writer.write(frame)
    return out


def compare(ours: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Mean difference in levels of 255, and PSNR in dB."""
    off = np.abs(ours - wanted)
    return off.mean(), 10 * np.log10(255**2 / (off**2).mean())


def flat(frame: np.ndarray) -> np.ndarray:
    """The middles of the seven upper bars, (7, 3)."""
    middles = frame.shape[1] * (0.125 + 0.75 * (np.arange(7) + 0.5) / 7)
    return frame[frame.shape[0] // 4, middles.astype(int)]


def tags(info: VideoInfo) -> tuple[str, ...]:
    return info.color_matrix, info.color_range, info.color_primaries, info.color_transfer


@pytest.mark.parametrize("range_", ["tv", "pc"])
@pytest.mark.parametrize("tag", MATRICES)
def test_a_player_shows_the_colours_of_the_source(tmp_path, tag, range_):
    path, named = tmp_path / "in.mp4", tag if tag != "bt2020nc" else "bt2020-10"
    primaries = "bt2020" if tag == "bt2020nc" else tag
    graph = (
        f"scale=out_color_matrix={MATRICES[tag]}:out_range={range_}:flags=accurate_rnd,format=yuv420p,"
        f"setparams=range={range_}:colorspace={tag}:color_primaries={primaries}:color_trc={named}"
    )
    ffmpeg(*bars(), "-vf", graph, *X264, path)
    out = passed_through(path)
    before, after = probe_video(path), probe_video(out)
    assert tags(before) == tags(after) and tags(before)[:2] == (tag, range_)
    wanted, ours = shown(path, before), shown(out, after)
    mean, psnr = compare(ours, wanted)
    print(tag, range_, f"mean {mean:.2f} of 255, {psnr:.1f} dB, bars {np.abs(flat(ours) - flat(wanted)).max()}")
    assert mean < 1 and psnr > 40
    assert np.abs(flat(ours) - flat(wanted)).max() <= 2
    ideal = np.frombuffer(ffmpeg(*bars(), "-pix_fmt", "rgb24", "-f", "rawvideo", "-"), np.uint8)
    ideal = ideal.reshape(-1, *ours.shape)[0].astype(int)
    assert np.abs(flat(ours) - flat(ideal)).max() <= 4


@pytest.mark.parametrize("size, guess", [((320, 240), "smpte170m"), ((720, 576), "smpte170m"), ((1280, 720), "bt709")])
def test_a_player_that_has_to_guess_shows_the_colours_of_the_source(tmp_path, size, guess):
    path = tmp_path / "in.mp4"
    graph = (
        f"scale=out_color_matrix={guess}:out_range=tv:flags=accurate_rnd,format=yuv420p,"
        "setparams=range=unknown:colorspace=unknown:color_primaries=unknown:color_trc=unknown"
    )
    ffmpeg(*bars(*size), "-vf", graph, *X264, path)
    out = passed_through(path)
    before, after = probe_video(path), probe_video(out)
    assert tags(before) == tags(after) == ("unknown",) * 4
    mean, psnr = compare(ours := shown(out, after, guess), shown(path, before, guess))
    print(size, f"mean {mean:.2f} of 255, {psnr:.1f} dB")
    assert mean < 1 and psnr > 40
    # And the faces are found, and painted, in the true colours.
    assert np.abs(flat(next(read_frames(before)).astype(int)) - flat(ours)).max() <= 2


def make_hdr(path: Path, transfer: str) -> Path:
    """The bars as a master of standard range looks in HDR: their white is the reference white."""
    graph = (
        "scale=out_color_matrix=bt709:out_range=tv,format=yuv444p,"
        "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709,"
        "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt2020,"
        f"zscale=t={transfer}:m=bt2020nc:r=limited:npl=203,format=yuv420p10le,"
        f"setparams=range=tv:colorspace=bt2020nc:color_primaries=bt2020:color_trc={transfer}"
    )
    ffmpeg(*bars(), "-vf", graph, "-c:v", "libx265", "-crf", 4, "-x265-params", "log-level=none", path)
    return path


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_high_dynamic_range_becomes_standard_range(tmp_path, transfer):
    path = make_hdr(tmp_path / "in.mp4", transfer)
    info = probe_video(path)
    assert info.hdr and info.bit_depth == 10 and info.color_transfer == transfer
    after = probe_video(out := passed_through(path))
    assert not after.hdr and tags(after) == ("bt709", "tv", "bt709", "bt709") and after.bit_depth == 8
    ours = shown(out, after)
    wanted = np.frombuffer(ffmpeg(*bars(), "-pix_fmt", "rgb24", "-f", "rawvideo", "-"), np.uint8)
    wanted = wanted.reshape(-1, *ours.shape)[0].astype(int)
    dark = (wanted.max(axis=2) < 176) & (np.ptp(wanted, axis=2) < 3)  # greys below the knee
    off = np.abs(ours - wanted)[dark]
    print(transfer, f"greys: mean {off.mean():.2f}; bars:", (flat(ours) - flat(wanted)).tolist())
    assert dark.mean() > 0.1 and off.mean() < 2
    off, lit = np.abs(flat(ours) - flat(wanted)), flat(wanted) > 100
    assert off[lit].max() <= 4 and off.max() <= 24, "in the dark, a level of HDR is many of ours"
    white = ours[wanted.min(axis=2) > 250]
    assert 205 < white.mean() < 250, "and what is brighter still has room above it"


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_of_hdr_any_part_reads_as_the_whole(tmp_path, transfer):
    graph = f"format=yuv420p10le,setparams=range=tv:colorspace=bt2020nc:color_primaries=bt2020:color_trc={transfer}"
    path = make_video(tmp_path / "a.mkv", "-vf", graph, "-c:v", "libx264", "-preset", "ultrafast", seconds=4)
    info = probe_video(path)
    whole = list(read_frames(info))
    assert len(whole) == 100
    for frame, wanted in zip(read_frames(info, 70, 5), whole[70:75], strict=True):
        assert np.array_equal(frame, wanted)


@pytest.mark.parametrize("silent", ["color_primaries=unknown:colorspace=unknown", "range=unknown"])
def test_hdr_that_says_little_of_itself_is_taken_for_the_usual_kind(tmp_path, silent):
    path = make_hdr(tmp_path / "in.mkv", "smpte2084")
    ffmpeg("-i", path, "-vf", f"setparams={silent}", "-c:v", "ffv1", tmp_path / "silent.mkv")
    wanted, ours = (next(read_frames(probe_video(p))).astype(int) for p in (path, tmp_path / "silent.mkv"))
    assert np.abs(ours - wanted).max() <= 1


def test_an_ffmpeg_that_cannot_tone_map_is_a_sentence(tmp_path, monkeypatch):
    from latentsync.errors import UserError
    from latentsync.media import reading

    info = probe_video(make_hdr(tmp_path / "in.mp4", "smpte2084"))
    monkeypatch.setattr(reading, "to_standard_range", lambda _: ["zscale_of_another_build"])
    with pytest.raises(UserError, match="in.mp4 is of high dynamic range .* convert the video to SDR first"):
        next(read_frames(info))


def test_the_command_line_says_that_hdr_is_lost(tmp_path, checkpoint, voice, capsys):
    from latentsync.__main__ import main

    path = make_hdr(tmp_path / "in.mp4", "smpte2084")
    assert main([str(path), str(voice), "-o", str(tmp_path / "o.mp4"), "--model", str(checkpoint)]) == 2  # no face
    assert HDR_REMARK in capsys.readouterr().err


def test_a_job_says_that_hdr_becomes_standard_range(tmp_path):
    voice = make_sound(tmp_path / "voice.wav", seconds=1)
    worker = Worker(tmp_path / "outputs")  # not started: the job waits
    job = worker.submit(Request(make_hdr(tmp_path / "in.mp4", "smpte2084"), voice), "m" * 24)
    assert job.messages == [HDR_REMARK]
