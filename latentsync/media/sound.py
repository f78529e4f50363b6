"""The sound of a file that is written: copied, stored without loss, or as AAC."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import zip_longest
from pathlib import Path

from latentsync.media.info import AudioInfo
from latentsync.media.process import PROBE_MEMORY, Limits, file_url, input_arguments, read_log, run_ffmpeg
from latentsync.media.watchdog import OnWait, Watchdog

SUFFIXES = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
COPIED_AUDIO = {  # codecs that a container holds as they are
    "mp4": {"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac"},
    "mov": {"aac", "mp3", "ac3", "eac3", "alac",
            "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be", "pcm_s32le", "pcm_f32le"},
    "matroska": {"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac", "vorbis", "dts", "mp2", "truehd",
                 "wavpack", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le"},
}  # fmt: skip
PLAYED_EVERYWHERE = {"LC", "HE-AAC", "HE-AACv2"}  # ffmpeg's names of the kinds of AAC that every player decodes
AAC_CHANNEL_BITRATE = 128_000  # bits a second: no listener hears the difference
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)  # of samples
MOST_CHANNELS = 8  # of AAC, FLAC and ALAC
LEAST_SAMPLES = 16  # that FLAC can write
MOST_SHIFT = 0.005  # seconds by which copied sound may lie elsewhere than decoded
LIMITS = Limits(PROBE_MEMORY)  # as of any look at a whole file, but for what a copy of it takes on the disk
Frame = tuple[float, float, str]  # time and duration, in seconds, and checksum
MOST_PADDING = 0.1  # seconds by which one of the two may be longer: samples that only fill its last packet


def sound_options(
    audio: AudioInfo, path: Path, copy_audio: bool, on_wait: OnWait | None = None
) -> tuple[list[str], list[str]]:
    """ffmpeg's options for the sound of `path`, a file still to be written: of its second input, and of its output.

    MP4 and MOV get AAC, which every player knows, unless copy_audio; else the sound stays what it is, to the bit: it is
    copied or, where the container does not hold it or its times would become others, stored without loss. The sound's
    first sample is at time zero, and each at the time that `read_audio` has it. on_wait: as in `Watchdog.wait`.
    """
    container = SUFFIXES[path.suffix.lower()]
    exact = copy_audio or container == "matroska"
    copied = COPIED_AUDIO[container] if exact else {"aac"}
    if audio.codec in copied and _can_be_copied(audio, path, PLAYED_EVERYWHERE if not exact else None, on_wait):
        return [*_moved_to_zero(audio), *input_arguments(audio.path)], ["-map", f"1:{audio.select}", "-c:a", "copy"]
    lossless = exact and audio.channels <= MOST_CHANNELS
    encoded = _lossless(audio, container) if lossless else _aac(audio)
    return input_arguments(audio.path), ["-map", f"1:{audio.select}", *encoded]


def _moved_to_zero(audio: AudioInfo) -> list[str]:
    """An option for an input: a stream that begins later than its file begins with the first frame, as decoded."""
    return ["-itsoffset", f"{-audio.start:.6f}"]


def _lossless(audio: AudioInfo, container: str) -> list[str]:
    filters = _as_decoded()
    if audio.duration * audio.sample_rate < LEAST_SAMPLES:
        filters += f",asetnsamples={LEAST_SAMPLES}"
    codec, planar = ("alac", "p") if container == "mov" else ("flac", "")
    deep = audio.sample_format.rstrip("p") not in {"u8", "s16"}
    return ["-af", filters, "-c:a", codec, "-sample_fmt", f"{'s32' if deep else 's16'}{planar}"]


def _aac(audio: AudioInfo) -> list[str]:
    channels, mixed = (audio.channels, []) if audio.channels <= MOST_CHANNELS else (2, ["-ac", "2"])
    rate = next((rate for rate in AAC_RATES if rate >= audio.sample_rate), AAC_RATES[-1])
    return [
        *("-af", _as_decoded(rate), *mixed, "-c:a", "aac", "-profile:a", "aac_low"),
        *("-b:a", str(channels * AAC_CHANNEL_BITRATE)),
    ]


def _as_decoded(rate: int | None = None) -> str:
    """ffmpeg's filters that place samples as `read_audio` does: gaps become silence, and the first one is at zero."""
    return f"aresample={f'{rate}:' if rate else ''}async=1,asetpts=N/SR/TB"


def _can_be_copied(audio: AudioInfo, path: Path, profiles: set[str] | None, on_wait: OnWait | None) -> bool:
    """Whether the sound's packets play in the container of `path` as they do when the sound itself is decoded.

    Times of packets are not those of samples where recordings were joined, or where the decoder leaves out samples
    that the container says nothing of. So the packets are copied into a small file beside `path`, and both are decoded:
    every sample must be the same, at the same time, with no gap that only some players fill. profiles: those that will
    do, None: any.
    """
    trial = path.with_stem(f"{path.stem}-sound")
    # The picture's time is what the sound's is compared with.
    picture = ["-f", "lavfi", "-i", "color=s=16x16:r=25:d=1"]
    arguments = [
        *("-loglevel", "error", "-nostats", "-y", *picture, *_moved_to_zero(audio), *input_arguments(audio.path)),
        *("-map", "0:v:0", "-c:v", "libx264", "-preset", "ultrafast", "-bf", "3"),
        *("-map", f"1:{audio.select}", "-c:a", "copy", "-map_metadata", "-1", "-map_chapters", "-1"),
        *("-f", SUFFIXES[path.suffix.lower()], file_url(trial)),
    ]
    try:
        with run_ffmpeg(arguments, limits=LIMITS) as (process, _), Watchdog(process) as watchdog:
            if watchdog.wait(on_wait) != 0:
                return False
        return _sounds_alike(audio, trial, profiles, on_wait)
    finally:
        with suppress(OSError):  # the folder may be gone
            trial.unlink()


def _sounds_alike(source: AudioInfo, copy: Path, profiles: set[str] | None, on_wait: OnWait | None) -> bool:
    with tempfile.TemporaryDirectory(prefix="latentsync-") as folder:
        original, copied, picture = (Path(folder) / name for name in ("original", "copied", "picture"))
        decode = ["-c:a", "pcm_s16le", "-f", "framecrc"]
        looks = (
            [*input_arguments(source.path), "-map", f"0:{source.select}", *decode, str(original)],
            [
                *("-copyts", "-i", file_url(copy), "-map", "0:a:0", *decode, str(copied)),
                *("-map", "0:v:0", "-c:v", "copy", "-f", "framecrc", str(picture)),
            ],
        )
        with ExitStack() as stack:  # both at the same time
            runs = [stack.enter_context(run_ffmpeg(["-nostats", *look], limits=LIMITS)) for look in looks]
            watchdogs = [stack.enter_context(Watchdog(process)) for process, _ in runs]
            if any([watchdog.wait(on_wait) != 0 for watchdog in watchdogs]):
                return False
            log = read_log(runs[1][1])
        # Of our own file, which holds no words of others.
        profile = re.search(r"^  Stream #0:1.*?: Audio: \w+ \(([\w-]+)\)", log, re.MULTILINE)
        if profiles is not None and (not profile or profile[1] not in profiles):
            return False
        zero = min((time for time, _, _ in _frames(picture)), default=None)
        return zero is not None and _alike(_frames(original), _frames(copied), zero, source.codec.startswith("pcm_"))


def _alike(original: Iterator[Frame], copied: Iterator[Frame], zero: float, raw: bool) -> bool:
    """Whether decoded frames are the same, those of the copy at the same times after `zero`, and without gaps.

    raw: the sound is not compressed, so that containers cut its packets anew.
    """
    begins: list[float | None] = [None, zero]
    positions, agreed, alike = [0.0, 0.0], 0.0, True  # seconds of samples of both so far, and while they were alike
    for pair in _matched(original, copied):
        for side, frame in enumerate(pair):
            if frame:
                begins[side] = frame[0] if begins[side] is None else begins[side]
                if abs(frame[0] - begins[side] - positions[side]) > MOST_SHIFT:
                    return False
                positions[side] += frame[1]
        if raw:
            agreed = min(positions)
        elif pair[0] or positions[0]:  # not before the first of the original
            alike = alike and None not in pair and pair[0][1:] == pair[1][1:]
            agreed = min(positions) if alike else agreed
    return 0 < agreed >= max(positions) - MOST_PADDING


def _matched(original: Iterator[Frame], copied: Iterator[Frame]) -> Iterator[tuple[Frame | None, Frame | None]]:
    """The frames of both, one by one; None where one has ended, or where the copy begins with a few samples more.

    These few are left of those that a decoder leaves out, where a container rounds their number to milliseconds.
    """
    one, other = next(original, None), next(copied, None)
    if one and other and one[1:] != other[1:] and other[1] < min(one[1], MOST_SHIFT):
        yield None, other
        other = next(copied, None)
    yield one, other
    yield from zip_longest(original, copied)


def _frames(listed: Path) -> Iterator[Frame]:
    """What ffmpeg's framecrc format lists."""
    base = 0.0  # seconds of a unit of time
    with open(listed, encoding="ascii") as lines:
        for line in lines:
            if line.startswith("#tb 0:"):
                above, below = map(int, line.split()[2].split("/"))
                base = above / below
            elif not line.startswith("#"):
                _, _, pts, duration, _, checksum, *_ = line.split(",")
                yield int(pts) * base, int(duration) * base, checksum.strip()
