"""Read and write video and sound, through pipes to the ffmpeg that comes with imageio-ffmpeg.

Frames are 8-bit RGB on a constant grid, `VideoInfo.rate` a second whatever the file holds, and are written in the YCbCr
matrix and range of their source; high dynamic range (HDR) becomes standard range. Sound is read as 16 kHz mono for the
model; the result gets the original recording. Nothing here holds more than a few dozen frames.
"""

from latentsync.media.info import HDR_REMARK, AudioInfo, VideoInfo
from latentsync.media.probe import probe_audio, probe_video
from latentsync.media.reading import read_audio, read_frames, read_frames_looped
from latentsync.media.voices import mix_voices
from latentsync.media.writing import COMMENT, VideoWriter, check_output, join_segments

__all__ = [
    "COMMENT",
    "HDR_REMARK",
    "AudioInfo",
    "VideoInfo",
    "VideoWriter",
    "check_output",
    "join_segments",
    "mix_voices",
    "probe_audio",
    "probe_video",
    "read_audio",
    "read_frames",
    "read_frames_looped",
]
