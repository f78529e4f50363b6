"""The tracks of a file, from structured output of ffmpeg, in which no text of the file can imitate another field."""

import json
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from imageio_ffmpeg import get_ffmpeg_exe

from latentsync.errors import UserError
from latentsync.media.info import Track
from latentsync.media.metadata import clean_text, parse_metadata
from latentsync.media.process import (
    PROBE_LIMITS,
    check_exit,
    input_arguments,
    output_lines,
    read_log,
    run_ffmpeg,
    unreadable_error,
    with_timeout,
)
from latentsync.media.unchanged import while_unchanged

MAX_TEXT_LENGTH = 80  # characters of a title or a language
DISPOSITIONS = "default", "attached_pic"


@dataclass(frozen=True)
class Contents:
    """The tracks of a file."""

    demuxer: str  # ffmpeg's names, comma separated
    video: tuple[Track, ...]  # without cover art
    audio: tuple[Track, ...]
    grouped: bool  # some video streams are tiles of one picture


@while_unchanged
def list_tracks(path: Path, kind: str) -> Contents:
    """List the tracks of a file without decoding them.

    kind: "video" or "sound", for the message. Raises UserError if ffmpeg cannot open the file.
    """
    # The first output has every video and sound stream once. Each of the others has them again, and those with a
    # disposition, or in the first group of streams, a second time. The graph of the run (which stream went to which
    # output) and the outputs' headers are the only sources that no title or name in a file can imitate.
    all_streams = ["-map", "0:v?", "-map", "0:a?"]
    selections = [f"0:disp:{disposition}?" for disposition in DISPOSITIONS] + ["0:g:0?"]
    no_packets = ["-c", "copy", "-frames:v", "0", "-frames:a", "0", "-frames:s", "0", "-frames:d", "0"]
    with tempfile.TemporaryDirectory(prefix="latentsync-probe-") as folder:
        graph, metadata = Path(folder) / "graph.json", Path(folder) / "metadata"
        arguments = [
            *("-loglevel", "error", "-nostats", "-print_graphs_file", str(graph), "-print_graphs_format", "json"),
            *(*input_arguments(path), *all_streams, *no_packets, "-f", "framecrc", "pipe:1"),
            *(*all_streams, *no_packets, "-map_chapters", "-1", "-f", "ffmetadata", str(metadata)),
        ]
        for selection in selections:
            arguments += [*all_streams, "-map", selection, *no_packets, "-f", "null", "-"]
        with run_ffmpeg(arguments, stdout=subprocess.PIPE, limits=PROBE_LIMITS) as (process, log):
            header = b"".join(with_timeout(process, output_lines(process), path))
            messages = read_log(log)
        check_exit(process, messages, path)
        try:
            run = json.loads(graph.read_bytes().decode("utf-8", "replace"))
            metadata_text = metadata.read_bytes().decode("utf-8", "replace") if metadata.exists() else ""
        except (OSError, ValueError):
            run, metadata_text = {}, ""
    if not run.get("inputfiles"):
        if messages.startswith("Unrecognized option 'print_graphs_file'"):  # before it has opened any file
            raise UserError(
                f"The ffmpeg in '{get_ffmpeg_exe()}' is too old: version 8 or later is needed. Run `pip install -U "
                "imageio-ffmpeg`, and unset IMAGEIO_FFMPEG_EXE if you have set it."
            )
        raise unreadable_error(path, messages, kind)
    sources: dict[int, list[int]] = defaultdict(list)  # output → ffmpeg's indices of its streams
    for link in run["streamlinks"]:
        output = link["dest_stream_id"].removeprefix("r_out__").partition("_")[0]  # of "r_out__OUTPUT_STREAM"
        sources[int(output)].append(int(link["source_stream_id"].rpartition("_")[2]))
    default, cover, grouped = (
        {stream for stream, count in Counter(sources[output]).items() if count > 1} for output in (2, 3, 4)
    )
    fields, texts = _header_fields(header), parse_metadata(metadata_text).streams
    tracks: dict[str, list[Track]] = {"video": [], "audio": []}
    for place, index in enumerate(sources[0]):
        stream = fields.get(place, {})
        same_kind = tracks.get(stream.get("media_type", ""))
        if same_kind is None or index in cover:
            continue
        text = texts[place] if place < len(texts) else {}
        width, height = map(int, stream.get("dimensions", "0x0").split("x"))
        same_kind.append(
            Track(
                number=len(same_kind) + 1,
                index=index,
                codec=stream.get("codec_id", "unknown"),
                default=index in default,
                language=clean_text(text.get("language", ""), MAX_TEXT_LENGTH).removeprefix("und"),
                title=clean_text(text.get("title") or text.get("name") or "", MAX_TEXT_LENGTH),
                width=width,
                height=height,
                channels=clean_text(stream.get("channel_layout_name", ""), MAX_TEXT_LENGTH),
            )
        )
    demuxer = run["inputfiles"][0]["demuxer_name"]
    has_tiles = any(track.index in grouped for track in tracks["video"])
    return Contents(demuxer, tuple(tracks["video"]), tuple(tracks["audio"]), has_tiles)


def choose_track(tracks: tuple[Track, ...], number: int | None, path: Path, kind: str) -> Track:
    """The track with a number; None: the first one with the default flag, else the first. Raises UserError.

    kind: "video" or "sound".
    """
    if number is None:
        return next((track for track in tracks if track.default), tracks[0])
    if 1 <= number <= len(tracks):
        return tracks[number - 1]
    count = f"{len(tracks)} {kind} tracks" if len(tracks) > 1 else f"one {kind} track"
    choices = "; ".join(map(str, tracks))
    raise UserError(f"{path} has {count}, and none with the number {number}: choose among {choices}.")


def _header_fields(header: bytes) -> dict[int, dict[str, str]]:
    """Stream number → fields of a framecrc output's header, which has lines like "#codec_id 0: h264"."""
    fields: dict[int, dict[str, str]] = defaultdict(dict)
    for line in header.decode("utf-8", "replace").splitlines():
        if match := re.fullmatch(r"#(\w+) (\d+): (.*)", line):
            fields[int(match[2])][match[1]] = match[3]
    return fields
