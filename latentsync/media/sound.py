"""The sound of the result: copied, stored losslessly, or encoded as AAC: `sound_options`."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import zip_longest
from pathlib import Path

from latentsync.media.info import AudioInfo
from latentsync.media.process import PROBE_MEMORY, Limits, file_url, input_arguments, read_log, run_ffmpeg
from latentsync.media.watchdog import OnWait, Watchdog, run_to_end

SUFFIXES = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
COPIED_AUDIO = {  # codecs that are copied into a container
    "mp4": {"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac"},
    "mov": {"aac", "mp3", "ac3", "eac3", "alac",
            "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be", "pcm_s32le", "pcm_f32le"},
    "matroska": {"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac", "vorbis", "dts", "mp2", "truehd",
                 "wavpack", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le"},
}  # fmt: skip
COMMON_AAC_PROFILES = {"LC", "HE-AAC", "HE-AACv2"}  # ffmpeg's names; every player decodes them
AAC_CHANNEL_BITRATE = 128_000  # bits per second: transparent to the ear
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)  # Hz
MAX_CHANNELS = 8  # of AAC, FLAC and ALAC
MIN_SAMPLES = 16  # that FLAC can write
MAX_SHIFT = 0.005  # seconds by which the times of copied and of decoded sound may differ
MAX_PADDING = 0.1  # seconds by which either may be longer: samples that only pad its last packet
LIMITS = Limits(PROBE_MEMORY)  # as for scanning a whole file, but a copy may take any space on the disk
Frame = tuple[float, float, str]  # time and duration in seconds, and checksum


def sound_options(
    audio: AudioInfo, path: Path, copy_audio: bool, on_wait: OnWait | None = None
) -> tuple[list[str], list[str]]:
    """ffmpeg's options for the second input, the sound, and for the output `path`, which is not written yet.

    MP4 and MOV get AAC, which every player knows, unless copy_audio; otherwise the sound is kept bit for bit: copied
    or, if the container cannot hold it or would change its times, stored losslessly. The first sample is at time zero,
    and every sample at the time that it has in `read_audio`. on_wait: as in `Watchdog.wait`.
    """
    container = SUFFIXES[path.suffix.lower()]
    exact = copy_audio or container == "matroska"
    copied = COPIED_AUDIO[container] if exact else {"aac"}
    if audio.codec in copied and _can_be_copied(audio, path, COMMON_AAC_PROFILES if not exact else None, on_wait):
        return [*_shifted_to_zero(audio), *input_arguments(audio.path)], ["-map", f"1:{audio.select}", "-c:a", "copy"]
    lossless = exact and audio.channels <= MAX_CHANNELS
    encoding = _lossless(audio, container) if lossless else _aac(audio)
    return input_arguments(audio.path), ["-map", f"1:{audio.select}", *encoding]


def _shifted_to_zero(audio: AudioInfo) -> list[str]:
    """Input option that makes a stream begin with the first frame, even if it begins later in its file."""
    return ["-itsoffset", f"{-audio.start:.6f}"]


def _lossless(audio: AudioInfo, container: str) -> list[str]:
    filters = timing_filters()
    if audio.duration * audio.sample_rate < MIN_SAMPLES:
        filters += f",asetnsamples={MIN_SAMPLES}"
    codec, planar = ("alac", "p") if container == "mov" else ("flac", "")
    deep = audio.sample_format.rstrip("p") not in {"u8", "s16"}
    return ["-af", filters, "-c:a", codec, "-sample_fmt", f"{'s32' if deep else 's16'}{planar}"]


def _aac(audio: AudioInfo) -> list[str]:
    to_stereo = audio.channels > MAX_CHANNELS
    channels = 2 if to_stereo else audio.channels
    rate = next((rate for rate in AAC_RATES if rate >= audio.sample_rate), AAC_RATES[-1])
    return [
        *("-af", timing_filters(rate), *(("-ac", "2") if to_stereo else ())),
        *("-c:a", "aac", "-profile:a", "aac_low", "-b:a", str(channels * AAC_CHANNEL_BITRATE)),
    ]


def timing_filters(rate: int | None = None) -> str:
    """ffmpeg's filters that time samples as `read_audio` does: gaps become silence, and the first one is at zero."""
    return f"aresample={f'{rate}:' if rate else ''}async=1,asetpts=N/SR/TB"


def _can_be_copied(audio: AudioInfo, path: Path, profiles: set[str] | None, on_wait: OnWait | None) -> bool:
    """Whether the sound's packets, copied to the container of `path`, decode to the same samples at the same times.

    Packet times differ from sample times where recordings were joined, or where the decoder skips samples that the
    container does not declare. So the packets are copied to a small file beside `path`, and both are decoded: every
    sample must be the same, at the same time, without gaps that only some players fill. profiles: accepted ones of AAC;
    None: any.
    """
    trial = path.with_stem(f"{path.stem}-sound")
    # The times of the sound are compared with those of a picture.
    picture = ["-f", "lavfi", "-i", "color=s=16x16:r=25:d=1"]
    arguments = [
        *("-loglevel", "error", "-nostats", "-y", *picture, *_shifted_to_zero(audio), *input_arguments(audio.path)),
        *("-map", "0:v:0", "-c:v", "libx264", "-preset", "ultrafast", "-bf", "3"),
        *("-map", f"1:{audio.select}", "-c:a", "copy", "-map_metadata", "-1", "-map_chapters", "-1"),
        *("-f", SUFFIXES[path.suffix.lower()], file_url(trial)),
    ]
    try:
        return run_to_end(arguments, LIMITS, on_wait) is not None and _sounds_alike(audio, trial, profiles, on_wait)
    finally:
        with suppress(OSError):  # the folder may be gone
            trial.unlink()


def _sounds_alike(source: AudioInfo, copy: Path, profiles: set[str] | None, on_wait: OnWait | None) -> bool:
    with tempfile.TemporaryDirectory(prefix="latentsync-") as folder:
        original, copied, picture = (Path(folder) / name for name in ("original", "copied", "picture"))
        decode = ["-c:a", "pcm_s16le", "-f", "framecrc"]
        commands = (
            [*input_arguments(source.path), "-map", f"0:{source.select}", *decode, str(original)],
            [
                *("-copyts", "-i", file_url(copy), "-map", "0:a:0", *decode, str(copied)),
                *("-map", "0:v:0", "-c:v", "copy", "-f", "framecrc", str(picture)),
            ],
        )
        with ExitStack() as stack:  # both in parallel
            runs = [stack.enter_context(run_ffmpeg(["-nostats", *command], limits=LIMITS)) for command in commands]
            watchdogs = [stack.enter_context(Watchdog(process)) for process, _ in runs]
            if any([watchdog.wait(on_wait) != 0 for watchdog in watchdogs]):
                return False
            log = read_log(runs[1][1])
        # The log is that of our own copy, which has no metadata of the source.
        profile = re.search(r"^  Stream #0:1.*?: Audio: \w+ \(([\w-]+)\)", log, re.MULTILINE)
        if profiles is not None and (not profile or profile[1] not in profiles):
            return False
        zero = min((time for time, _, _ in _read_frames(picture)), default=None)
        is_pcm = source.codec.startswith("pcm_")
        return zero is not None and _frames_alike(_read_frames(original), _read_frames(copied), zero, is_pcm)


def _frames_alike(original: Iterator[Frame], copied: Iterator[Frame], zero: float, is_pcm: bool) -> bool:
    """Whether decoded frames are the same, those of the copy at the same times after `zero`, and without gaps.

    is_pcm: the sound is not compressed, so that containers divide it into packets differently.
    """
    begins: list[float | None] = [None, zero]
    positions = [0.0, 0.0]  # seconds of samples so far, of the original and of the copy
    agreed, alike = 0.0, True  # seconds for which both are alike, and whether they still are
    for pair in _pairs(original, copied):
        for side, frame in enumerate(pair):
            if frame:
                begin = begins[side]
                if begin is None:
                    begin = begins[side] = frame[0]
                if abs(frame[0] - begin - positions[side]) > MAX_SHIFT:
                    return False
                positions[side] += frame[1]
        if is_pcm:
            agreed = min(positions)
        elif pair[0] or positions[0]:  # not before the first frame of the original
            one, other = pair
            alike = alike and one is not None and other is not None and one[1:] == other[1:]
            agreed = min(positions) if alike else agreed
    return 0 < agreed >= max(positions) - MAX_PADDING


def _pairs(original: Iterator[Frame], copied: Iterator[Frame]) -> Iterator[tuple[Frame | None, Frame | None]]:
    """Pairs of frames; None where one of both has ended, or where the copy begins with a few more samples.

    Such samples remain of those that a decoder skips, where a container rounds their number to milliseconds.
    """
    one, other = next(original, None), next(copied, None)
    if one and other and one[1:] != other[1:] and other[1] < min(one[1], MAX_SHIFT):
        yield None, other
        other = next(copied, None)
    yield one, other
    yield from zip_longest(original, copied)


def _read_frames(path: Path) -> Iterator[Frame]:
    """The frames that a file in ffmpeg's framecrc format lists."""
    base = 0.0  # time base in seconds
    with open(path, encoding="ascii") as lines:
        for line in lines:
            if line.startswith("#tb 0:"):
                numerator, denominator = map(int, line.split()[2].split("/"))
                base = numerator / denominator
            elif not line.startswith("#"):
                _, _, pts, duration, _, checksum, *_ = line.split(",")
                yield int(pts) * base, int(duration) * base, checksum.strip()
