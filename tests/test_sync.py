"""Sound and picture of a written file lie together, in one piece or joined from segments: measured from its packets,
at its start and at its end."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from clips import ffmpeg

from latentsync import FPS
from latentsync.media import VideoInfo, VideoWriter, probe_video, read_audio, read_frames, read_frames_looped
from latentsync.media.segments import SegmentWriter

MOST = 0.010  # seconds
RATES = ("24", "25", "30000/1001", "60")  # of films that are put on 25 a second
OWN_RATES = ("24000/1001", "24", "25", "30000/1001", "30", "50", "60000/1001", "60")  # that films keep


def clip(path: Path, rate: str, seconds: float) -> Path:
    """Every second, a white flash and a beep of 0.2 s, from the first on."""
    shown = f"color=s=64x64:r={rate}:d={seconds},geq=lum='255*lt(mod(T+0.001,1),0.2)':cb=128:cr=128"
    heard = f"aevalsrc='0.8*sin(880*2*PI*t)*lt(mod(t,1),0.2)':s=48000:d={seconds}"
    ffmpeg(
        *("-f", "lavfi", "-i", shown, "-f", "lavfi", "-i", heard),
        *("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-c:a", "pcm_s16le", path),
    )
    return path


def packets(path: Path, stream: str, codec: str = "copy") -> list[tuple[float, float]]:
    """(pts, duration) in seconds of all packets of a stream, in order of time and as players place them.

    codec: what they are decoded to; without that, the first one of AAC is there, too, which no player plays.
    """
    base, found = Fraction(1), []
    for line in ffmpeg("-i", path, "-map", stream, "-c", codec, "-f", "framecrc", "-").decode().splitlines():
        if line.startswith("#tb 0:"):
            base = Fraction(line.split()[2])
        elif not line.startswith("#"):
            _, _, pts, duration, *_ = line.split(",")
            found.append((float(int(pts) * base), float(int(duration) * base)))
    return sorted(found)


def rises(level: np.ndarray, rate: float) -> np.ndarray:
    """Seconds at which a level goes up through a half."""
    high = level > 0.5
    return np.flatnonzero(high & ~np.roll(high, 1)) / rate


def offsets(path: Path) -> tuple[float, float]:
    """Seconds by which the sound begins, and ends, later than the picture, by their times."""
    shown, heard = packets(path, "0:v:0"), packets(path, "0:a:0", "pcm_s16le")
    return heard[0][0] - shown[0][0], sum(heard[-1]) - sum(shown[-1])


def in_segments(frames: int, seconds: int):
    """A writer of segments of so many frames."""

    def writer(output: Path, info: VideoInfo, source: Path, crf: float) -> SegmentWriter:
        return SegmentWriter(
            output, info, source, crf, folder=output.with_name("segments"), total=math.ceil(info.rate * seconds),
            segment_frames=frames, counts={}, on_message=print,
        )  # fmt: skip

    return writer


def check(
    folder: Path, rate: str, seconds: int, make_writer=VideoWriter, suffix: str = ".mp4", keep_rate: bool = False
) -> None:
    """The source's own frames and sound, through the reader and the writer of the pipeline, at 25 a second or its own
    rate."""
    source, output = clip(folder / "source.mov", rate, seconds), folder / f"out{suffix}"
    info = probe_video(source).at(Fraction(rate if keep_rate else FPS))
    total, fps = math.ceil(info.rate * seconds), float(info.rate)
    with make_writer(output, info, source, 30) as writer:
        for _, frame in read_frames_looped(info, total):
            writer.write(frame)
    shown = [pts for pts, _ in packets(output, "0:v:0")]
    rounding = 1e-3 if keep_rate and suffix == ".mkv" else 1e-6  # Matroska counts milliseconds
    assert np.allclose(shown, np.arange(total) / fps, rtol=0, atol=rounding)
    start, end = offsets(output)
    print(f"{rate} fps, {seconds} s: {1000 * start:+.1f} ms at the start, {1000 * end:+.1f} ms at the end")
    # At other rates the sound may end within the last frame.
    assert abs(start) <= MOST and abs(end) <= MOST + (total / fps - seconds)
    # What is seen and heard: a frame of the source or of the output late at most.
    light = np.array([frame.mean() / 255 for frame in read_frames(probe_video(output).at(info.rate))])
    envelope = np.abs(read_audio(output, 16_000)).reshape(-1, 16).max(1)
    seen = rises(light, fps)
    starts = [max(0, 1000 * second - 500) for second in range(seconds)]  # in the silence before each beep
    heard = np.array([start + np.argmax(envelope[start:] > 0.4) for start in starts]) / 1000
    assert len(seen) == seconds
    assert np.abs(seen - heard).max() <= 1 / fps + 0.002


@pytest.mark.parametrize("rate", RATES)
def test_sound_and_picture_stay_together(tmp_path, rate):
    check(tmp_path, rate, 3)


@pytest.mark.parametrize("rate", OWN_RATES)
def test_sound_and_picture_stay_together_at_the_rate_of_the_film(tmp_path, rate):
    check(tmp_path, rate, 2, keep_rate=True)


@pytest.mark.parametrize("rate, suffix", [("24000/1001", ".mp4"), ("60000/1001", ".mov"), ("60", ".mkv")])
def test_segments_are_joined_without_a_gap_at_the_rate_of_the_film(tmp_path, rate, suffix):
    check(tmp_path, rate, 2, in_segments(17, 2), suffix, keep_rate=True)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("frames", [25, 17, 74])  # three segments, five, and one that has a single frame
def test_segments_are_joined_without_a_gap(tmp_path, frames, suffix):
    check(tmp_path, "25", 3, in_segments(frames, 3), suffix)


@pytest.mark.full_size
@pytest.mark.parametrize("make_writer", [VideoWriter, in_segments(1500, 600)], ids=["in one piece", "in segments"])
@pytest.mark.parametrize("rate", RATES)
def test_sound_and_picture_stay_together_for_ten_minutes(tmp_path, rate, make_writer):
    check(tmp_path, rate, 600, make_writer)
