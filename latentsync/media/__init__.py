"""Media in and out, through pipes to the ffmpeg that imageio-ffmpeg carries.

Pictures come as 8-bit RGB frames on a constant grid of 25 a second, whatever the file holds, and go back to
the YCbCr matrix and range they came from; high dynamic range (HDR) becomes standard range. Sound comes as 16 kHz mono
for the model; the file that is written gets the given sound itself. Nothing here holds more than a few dozen frames.
"""

from latentsync.media.info import HDR_REMARK, AudioInfo, VideoInfo
from latentsync.media.probe import probe_audio, probe_video
from latentsync.media.reading import read_audio, read_frames, read_frames_looped
from latentsync.media.writing import COMMENT, PARTIAL, VideoWriter, check_output, join_segments

__all__ = [
    "COMMENT",
    "HDR_REMARK",
    "PARTIAL",
    "AudioInfo",
    "VideoInfo",
    "VideoWriter",
    "check_output",
    "join_segments",
    "probe_audio",
    "probe_video",
    "read_audio",
    "read_frames",
    "read_frames_looped",
]
