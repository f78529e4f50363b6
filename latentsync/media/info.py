"""Properties of video and sound files: plain data."""

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from latentsync import FPS
from latentsync.errors import UserError
from latentsync.rates import grid_rate, show_rate

HDR_TRANSFERS = {"smpte2084", "arib-std-b67"}  # PQ (HDR10, Dolby Vision 8.1) and HLG (Dolby Vision 8.4)
OPACITY_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # codec → decoder that keeps opacity, as the default does not
INTERLACED_REMARK = "The video is interlaced (a frame's odd and even lines show different times); the result is not."
TRANSPARENT_REMARK = "Transparent parts of the picture become white."
HDR_REMARK = "The video is of high dynamic range (HDR); the result is of standard range (SDR)."


def is_transparent(pixel_format: str) -> bool:
    """Whether the pixels of ffmpeg's `pixel_format` have an alpha channel."""
    return bool(re.match(r"rgba|bgra|argb|abgr|gbrap|yuva|ya\d|pal8|ayuv|vuya|uyva", pixel_format))


@dataclass(frozen=True)
class Track:
    """A video or sound track of a file, as the file describes it. Texts are cleaned, and have one line."""

    number: int  # among the file's tracks of its kind, from 1
    index: int  # ffmpeg's, among all streams
    codec: str
    default: bool  # has the flag that tells players to choose it
    language: str = ""  # mostly three letters
    title: str = ""
    width: int = 0  # pixels as stored; 0 for sound
    height: int = 0
    channels: str = ""  # ffmpeg's name of the layout, "" for pictures

    def __str__(self) -> str:
        size = f"{self.width} × {self.height}" if self.width else self.channels
        title = f"“{self.title}”" if self.title else ""
        properties = self.codec, size, self.language, title, "default" if self.default else ""
        return f"{self.number} ({', '.join(filter(None, properties))})"


def _track_remarks(kind: str, number: int, tracks: tuple[Track, ...]) -> tuple[str, ...]:
    """A sentence about which track is used, if there are several."""
    if len(tracks) < 2:
        return ()
    return (f"The file has {len(tracks)} {kind} tracks, number {number} is used: {'; '.join(map(str, tracks))}.",)


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video, from `probe_video`. Sizes are those of the frames that `read_frames` yields."""

    path: Path
    width: int  # as displayed: rotated, square pixels
    height: int
    fps: float  # mean rate of the file
    duration: float  # seconds of picture
    color_range: str  # "tv" (limited) or "pc" (full), "unknown" if not in the file
    color_matrix: str  # ffmpeg's names, "gbr" for RGB files, "unknown" if not in the file
    color_primaries: str
    color_transfer: str
    pixel_format: str  # ffmpeg's name
    bit_depth: int
    codec: str
    container: str  # ffmpeg's demuxer names, comma separated
    still: bool  # a picture, not a video
    stored_width: int  # of the file's first frame, rotated, in its own pixels
    stored_height: int
    pixel_aspect: Fraction  # width of its pixels over their height; 1 where the file gives no plausible one
    scaled: bool  # frames are rescaled: the pixels are not square, or a picture has too many
    interlaced: bool  # its first frame consists of two fields
    start_pts: int  # timestamp of the first frame in units of time_base, after ffmpeg's shift to zero
    time_base: Fraction  # seconds
    select: str = "V:0"  # ffmpeg's specifier of the stream or group of tiles to read, without the file's number
    track: int = 1  # number of the track to read
    tracks: tuple[Track, ...] = ()  # all that can be chosen; empty for a picture
    nominal_rate: Fraction = Fraction(FPS)  # frames a second of the file, see `rates.nominal_rate`
    rate: Fraction = Fraction(FPS)  # frames a second that are read from it, and written of it
    first: int = 0  # frame at `rate` with which the part begins that is read
    assumed_matrix: str = ""  # where the file names none; ffmpeg's name, "" for what players assume for its size
    stop: int | None = None  # frame before which it ends; None: the end of the file

    def at(self, rate: Fraction) -> "VideoInfo":
        """The same video, read at another rate."""
        return replace(self, rate=rate)

    def at_choice(self, fps: str) -> "VideoInfo":
        """The same video, read at the rate of a run; fps: one of `rates.RATES`."""
        return self.at(grid_rate(self.nominal_rate, fps))

    def between(self, start: float = 0.0, end: float | None = None) -> "VideoInfo":
        """The part from `start` to `end` seconds, as if it had been cut out of the video: its frames, at `rate`, are
        those nearest to these times, the last one excluded.

        A later end than the video's is its end. Raises UserError where no frame is left.
        """
        first, last = round(start * self.rate), self.first + self.n_frames
        stop = None if end is None else round(end * self.rate)
        if not first and stop is None:
            return self
        if self.still:
            raise UserError(f"{self.path} is a picture and has no parts; leave --from and --to out.")
        if first >= last:
            raise UserError(
                f"{self.path} lasts {float(last / self.rate):.2f} s, and the part would begin at {start:g} s; give an "
                "earlier time with --from."
            )
        if stop is not None and stop <= first:
            raise UserError(f"The part of {self.path} from {start:g} to {end:g} s has no frame; give a later --to.")
        return replace(self, first=first, stop=None if stop is None or stop >= last else stop)

    def frame_at(self, time: float) -> int:
        """The frame that is nearest to a time in seconds, at which a voice is laid into the video, or into its part.

        Raises UserError where there is none.
        """
        if self.still:
            raise UserError(f"{self.path} is a picture, into which no voice can be laid; leave --at out.")
        if (frame := round(time * self.rate)) >= self.n_frames:
            part = "the part from --from on" if self.first else "it"
            raise UserError(
                f"The voice would begin {time:g} s into {self.path}, but {part} lasts "
                f"{float(self.n_frames / self.rate):.2f} s; give an earlier time with --at."
            )
        return frame

    @property
    def n_frames(self) -> int:
        """Frames to expect at `rate`, of the part that is read; decoding may yield others."""
        whole = max(1, int(self.duration * float(self.rate) + 0.5))
        return max(1, (whole if self.stop is None else self.stop) - self.first)

    @property
    def hdr(self) -> bool:
        """Whether the file is of high dynamic range. Its frames are not: they are BT.709."""
        return self.color_transfer in HDR_TRANSFERS

    @property
    def transparent(self) -> bool:
        """Whether the file's pixels have an alpha channel. Its frames have none: they are put on white."""
        return is_transparent(self.pixel_format)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences for the user about how the result differs from the file."""
        shrunk = f"So large a picture is made smaller: the result has {self.width} × {self.height} pixels."
        # 25 a second is what the user chose, or the same.
        resampled = not self.still and self.rate not in (self.nominal_rate, FPS)
        rates = f"The video has {show_rate(self.nominal_rate)} frames a second, the result {show_rate(self.rate)}."
        remarks = {
            rates: resampled,
            HDR_REMARK: self.hdr,
            INTERLACED_REMARK: self.interlaced,
            TRANSPARENT_REMARK: self.transparent,
            shrunk: self.still and self.scaled,
        }
        texts = tuple(remark for remark, applies in remarks.items() if applies)
        return texts + _track_remarks("video", self.track, self.tracks)


@dataclass(frozen=True)
class AudioInfo:
    """Properties of a sound track of a file, from `probe_audio`."""

    path: Path
    codec: str
    sample_rate: int
    channels: int
    sample_format: str  # of the decoder, ffmpeg's name: "s16", "fltp", ...
    duration: float  # seconds, counted in decoded samples
    start: float  # seconds from the start of the file to the first sample
    select: str = "a:0"  # ffmpeg's specifier of the stream, without the file's number
    track: int = 1  # number of the track
    tracks: tuple[Track, ...] = ()  # all that can be chosen

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences for the user about which track is used."""
        return _track_remarks("sound", self.track, self.tracks)
