"""The sound of a film into which a voice is laid: `laid_sound`."""

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from latentsync.errors import UserError
from latentsync.media.info import AudioInfo, VideoInfo
from latentsync.media.probe import probe_audio
from latentsync.media.process import PROBE_MEMORY, Limits, file_url, input_arguments
from latentsync.media.sound import MAX_CHANNELS, timing_filters
from latentsync.media.tracks import list_tracks
from latentsync.media.watchdog import OnWait, run_to_end
from latentsync.paths import PARTIAL

if TYPE_CHECKING:
    from latentsync.placing import Placement

RAMP = 0.02  # seconds in which the film's own sound goes and comes, within the time of the voice
MAX_RATE = 192_000  # Hz
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}  # by the number of channels
LIMITS = Limits(PROBE_MEMORY)


@contextmanager
def laid_sound(
    info: VideoInfo,
    voice: AudioInfo,
    place: "Placement",
    mode: str,
    output: Path,
    on_wait: OnWait | None = None,
) -> Iterator[Path]:
    """A file without loss with the sound of a result, beside `output`, which exists during a `with` block.

    It lasts as long as the result, and its first sample is at the first frame's time. Where `place` has it, the voice
    takes the place of the film's own sound or is added to it: mode, one of `settings.SOUNDS`. Elsewhere the film's
    sound stays, and silence where it has none. Raises UserError.
    """
    path = output.absolute().with_name(f"{PARTIAL}{uuid.uuid4().hex[:12]}.flac")
    own = probe_audio(info.path) if list_tracks(info.path, "video").audio else None
    rate = min(max(voice.sample_rate, own.sample_rate if own else 0), MAX_RATE)
    layout = max((_layout(sound) for sound in (voice, own) if sound), key=lambda pair: pair[0])[1]
    frames = place.first, place.first + place.count, place.total
    begin, end, length = (round(number / info.rate * rate) for number in frames)
    common = f"aformat=sample_fmts=fltp:channel_layouts={layout}"
    voice_in = f"{_mono_to_all(voice, layout)}{timing_filters(rate)},{common}"
    parts = [f"[0:{voice.select}]{voice_in},atrim=end_sample={end - begin},adelay={begin}S:all=1[voice]"]
    names = ["[voice]"]
    if own is not None:
        zero = float(info.start_pts * info.time_base + info.first / info.rate)
        film = (
            f"[1:{own.select}]atrim=start={zero:.6f},asetpts=PTS-{zero:.6f}/TB,aresample={rate}:async=1:first_pts=0,"
            f"{common},atrim=end_sample={length}"
        )
        ramp = min(round(RAMP * rate), (end - begin) // 2)
        fades = [f"afade=t=out:ss={begin}:ns={ramp}"] if begin else []
        fades += [f"afade=t=in:ss={end - ramp}:ns={ramp}"] if end < length else []
        if mode == "mix":
            fades = ["anull"]
        if len(fades) == 2:
            film += ",asplit[a][b]"
            parts += [film, f"[a]{fades[0]}[before]", f"[b]{fades[1]}[after]"]
            names += ["[before]", "[after]"]
        elif fades:
            parts.append(f"{film},{fades[0]}[film]")
            names.append("[film]")
    mix = f"amix=inputs={len(names)}:normalize=0:duration=longest," if len(names) > 1 else ""
    parts.append(f"{''.join(names)}{mix}apad=whole_len={length},atrim=end_sample={length}[out]")
    arguments = [
        *("-loglevel", "error", "-nostats", "-y", *input_arguments(voice.path)),
        *(input_arguments(info.path) if own else ()),
        *("-filter_complex", ";".join(parts), "-map", "[out]", "-map_metadata", "-1", "-map_chapters", "-1"),
        *("-c:a", "flac", "-sample_fmt", "s32", "-f", "flac", file_url(path)),
    ]
    try:
        if run_to_end(arguments, LIMITS, on_wait) is None:
            raise UserError(
                f"The voice {voice.path} could not be laid into the sound of {info.path}; free some space beside the "
                "output, or give other files."
            )
        yield path
    finally:
        with suppress(OSError):
            path.unlink()


def _layout(sound: AudioInfo) -> tuple[int, str]:
    """Number of channels of a sound, and ffmpeg's name of their layout, with at most MAX_CHANNELS."""
    if sound.channels > MAX_CHANNELS:
        return 2, "stereo"
    name = next(track.channels for track in sound.tracks if track.number == sound.track)
    if not re.fullmatch(r"[\w.()]+", name):
        name = LAYOUTS.get(sound.channels, "stereo")
    return sound.channels, name


def _mono_to_all(voice: AudioInfo, layout: str) -> str:
    """A filter that keeps the level of a mono voice in stereo, which ffmpeg would lower by 3 dB."""
    return "pan=stereo|c0=c0|c1=c0," if voice.channels == 1 and layout == "stereo" else ""
