"""The voices of several people as one sound: `mix_voices`."""

from collections.abc import Sequence
from pathlib import Path

from latentsync.errors import UserError
from latentsync.media.info import AudioInfo
from latentsync.media.process import PROBE_MEMORY, Limits, file_url, input_arguments
from latentsync.media.sound import timing_filters
from latentsync.media.watchdog import OnWait, run_to_end

RATE = 48_000  # Hz
LIMITS = Limits(PROBE_MEMORY)


def mix_voices(voices: Sequence[AudioInfo], path: Path, on_wait: OnWait | None = None) -> None:
    """Write the sum of voices to `path`, a WAV file of 24 bits: as long as the longest, each at its own loudness.

    Where the sum is louder than full scale, a limiter lowers it. on_wait: as in `Watchdog.wait`. Raises UserError where
    a voice cannot be decoded or the file cannot be written.
    """
    filters = [
        f"[{number}:{voice.select}]{timing_filters(RATE)},aformat=channel_layouts=stereo[v{number}]"
        for number, voice in enumerate(voices)
    ]
    inputs = "".join(f"[v{number}]" for number in range(len(voices)))
    filters.append(
        f"{inputs}amix=inputs={len(voices)}:duration=longest:normalize=0,alimiter=limit=0.98:level=0:latency=1"
    )
    arguments = [
        *("-loglevel", "error", "-nostats", "-y"),
        *(option for voice in voices for option in input_arguments(voice.path)),
        *("-filter_complex", ";".join(filters), "-c:a", "pcm_s24le", "-rf64", "auto", "-f", "wav", file_url(path)),
    ]
    if run_to_end(arguments, LIMITS, on_wait) is None:
        names = ", ".join(f"'{voice.path}'" for voice in voices)
        raise UserError(f"The voices {names} could not be mixed; free some space, or give their sum with --sound.")
