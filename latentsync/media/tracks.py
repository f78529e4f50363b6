"""The tracks of a file, from ffmpeg's structured output, in which nothing that a file says passes for another field."""

import json
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from latentsync.errors import UserError
from latentsync.media.info import Track
from latentsync.media.metadata import clean_text, parse_metadata
from latentsync.media.process import (
    PROBE_LIMITS,
    check_ended,
    input_arguments,
    read_log,
    run_ffmpeg,
    unreadable,
    with_watchdog,
)

TEXT_LENGTH = 80  # characters of a title or a language that are shown
KINDS: dict[str, Literal["video", "audio"]] = {"v": "video", "a": "audio"}
DISPOSITIONS = "default", "attached_pic"


@dataclass(frozen=True)
class Contents:
    """What a file holds."""

    demuxer: str  # ffmpeg's names, comma separated
    video: tuple[Track, ...]  # without cover art
    audio: tuple[Track, ...]
    grouped: bool  # some video streams are parts of one picture


def list_tracks(path: Path, kind: str) -> Contents:
    """List the tracks of a file without decoding them.

    kind: "video" or "sound", for the sentence. Raises UserError where ffmpeg cannot open the file.
    """
    # The first output lists every stream of pictures and sound once. Each of the others lists them again, and those
    # with a disposition, or in the first group of streams, a second time: the graph of the run (which stream went to
    # which output) and the outputs' headers are the only sources that no title or name of a file can imitate.
    every = ["-map", "0:v?", "-map", "0:a?"]
    marks = [f"0:disp:{disposition}?" for disposition in DISPOSITIONS] + ["0:g:0?"]
    nothing = ["-c", "copy", "-frames:v", "0", "-frames:a", "0", "-frames:s", "0", "-frames:d", "0"]
    with tempfile.TemporaryDirectory(prefix="latentsync-probe-") as folder:
        graph, texts = Path(folder) / "graph.json", Path(folder) / "texts"
        arguments = [
            *("-loglevel", "error", "-nostats", "-print_graphs_file", str(graph), "-print_graphs_format", "json"),
            *(*input_arguments(path), *every, *nothing, "-f", "framecrc", "pipe:1"),
            *(*every, *nothing, "-map_chapters", "-1", "-f", "ffmetadata", str(texts)),
        ]
        for mark in marks:
            arguments += [*every, "-map", mark, *nothing, "-f", "null", "-"]
        with run_ffmpeg(arguments, stdout=subprocess.PIPE, limits=PROBE_LIMITS) as (process, log):
            with open(process.stdout.fileno(), "rb", closefd=False) as lines:
                header = b"".join(with_watchdog(process, lines, path))
            messages = read_log(log)
        check_ended(process, messages, path)
        try:
            run = json.loads(graph.read_bytes().decode("utf-8", "replace"))
            sections = texts.read_bytes().decode("utf-8", "replace") if texts.exists() else ""
        except (OSError, ValueError):
            run, sections = {}, ""
    if not run.get("inputfiles"):
        raise UserError(unreadable(path, messages, kind))
    sources: dict[int, list[int]] = defaultdict(list)  # output -> ffmpeg's indices of its streams
    for link in run["streamlinks"]:
        output = re.fullmatch(r"r_out__(\d+)_\d+", link["dest_stream_id"])
        sources[int(output[1])].append(int(link["source_stream_id"].rpartition("_")[2]))
    default, cover, grouped = (
        {stream for stream, count in Counter(sources[output]).items() if count > 1} for output in (2, 3, 4)
    )
    fields, texts = _header_fields(header), parse_metadata(sections).streams
    tracks: dict[str, list[Track]] = {"video": [], "audio": []}
    for place, index in enumerate(sources[0]):
        stream = fields.get(place, {})
        of_kind = tracks.get(stream.get("media_type", ""))
        if of_kind is None or index in cover:
            continue
        said = texts[place] if place < len(texts) else {}
        width, height = map(int, stream.get("dimensions", "0x0").split("x"))
        of_kind.append(
            Track(
                number=len(of_kind) + 1,
                index=index,
                codec=stream.get("codec_id", "unknown"),
                default=index in default,
                language=clean_text(said.get("language", ""), TEXT_LENGTH).removeprefix("und"),
                title=clean_text(said.get("title") or said.get("name") or "", TEXT_LENGTH),
                width=width,
                height=height,
                channels=clean_text(stream.get("channel_layout_name", ""), TEXT_LENGTH),
            )
        )
    demuxer = run["inputfiles"][0]["demuxer_name"]
    in_group = any(track.index in grouped for track in tracks["video"])
    return Contents(demuxer, tuple(tracks["video"]), tuple(tracks["audio"]), in_group)


def choose_track(tracks: tuple[Track, ...], number: int | None, path: Path, kind: str) -> Track:
    """The track of that number, or the first with the default flag, or the first. Raises UserError.

    kind: "video" or "sound".
    """
    if number is None:
        return next((track for track in tracks if track.default), tracks[0])
    if 1 <= number <= len(tracks):
        return tracks[number - 1]
    many = f"{len(tracks)} {kind} tracks" if len(tracks) > 1 else f"one {kind} track"
    listed = "; ".join(map(str, tracks))
    raise UserError(f"{path} has {many}, and none with the number {number}: choose among {listed}.")


def _header_fields(header: bytes) -> dict[int, dict[str, str]]:
    """Of every stream of a framecrc output, the fields of its header: "#codec_id 0: h264" and the like."""
    fields: dict[int, dict[str, str]] = defaultdict(dict)
    for line in header.decode("utf-8", "replace").splitlines():
        if match := re.fullmatch(r"#(\w+) (\d+): (.*)", line):
            fields[int(match[2])][match[1]] = match[3]
    return fields
