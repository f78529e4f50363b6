"""What the result takes from its video besides the picture: title, chapters and subtitles, and the sound's language.

All other metadata, such as where, when and with which device a file was recorded, is left out.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from latentsync.media.info import AudioInfo, VideoInfo
from latentsync.media.metadata import clean_text, escape, parse_metadata
from latentsync.media.process import PROBE_LIMITS, SCAN_LIMITS, file_url, input_arguments
from latentsync.media.watchdog import OnWait, run_to_end

TEXT_SUBTITLES = {"subrip", "ass", "ssa", "mov_text", "webvtt", "text"}  # can be converted to one another
# Subtitles that are copied to Matroska: those with a style, and those that are pictures.
COPIED_TO_MATROSKA = {"subrip", "ass", "hdmv_pgs_subtitle", "dvd_subtitle", "dvb_subtitle"}
# QuickTime files hold numbers for languages. These are the languages for whose numbers ffmpeg uses other names than
# ISO 639-2; languages without a number are left out of such files.
QUICKTIME_LANGUAGES = {
    "fre": "fra", "deu": "ger", "nld": "dut", "swe": "sve", "ell": "gre", "isl": "ice", "zho": "chi", "gle": "iri",
    "sqi": "alb", "rum": "ron", "cze": "ces", "slo": "slk", "mkd": "mac",
}  # fmt: skip
MAX_CHAPTERS = 1000
MAX_SUBTITLES = 32  # streams
MAX_SUBTITLE_BYTES = 256 << 20  # of all streams together
MAX_TITLE_LENGTH = 200  # characters


@dataclass(frozen=True)
class Chapter:
    start: float  # seconds of the result
    end: float
    title: str


@dataclass(frozen=True)
class Tags:
    """Metadata of a file that may be passed on: titles of one line, languages like "deu"."""

    title: str
    streams: tuple[dict[str, str], ...]  # "title" and "language" of each
    chapters: tuple[Chapter, ...]


NO_TAGS = Tags("", (), ())


@dataclass(frozen=True)
class Extras:
    """Metadata and subtitles for the result, in temporary files."""

    title: str = ""
    language: str = ""  # of the sound
    chapters: Path | None = None  # in ffmpeg's `ffmetadata` format
    subtitles: Path | None = None  # in the result's container
    streams: dict[int, dict[str, str]] = field(default_factory=dict)  # those of that file: "title" and "language"
    remarks: tuple[str, ...] = ()  # sentences for the user about what was left out

    def options(self, inputs: int) -> tuple[list[str], list[str]]:
        """ffmpeg's options for inputs after the first `inputs` ones, and for its output."""
        for_inputs: list[str] = []
        for_output = ["-map_metadata:g", "-1", "-map_metadata:s", "-1"]
        if self.subtitles:
            demuxer = "matroska" if self.subtitles.suffix == ".mkv" else "mov"
            for_inputs += ["-f", demuxer, "-protocol_whitelist", "file", "-i", file_url(self.subtitles)]
            for position, (number, tags) in enumerate(self.streams.items()):
                for_output += ["-map", f"{inputs}:s:{number}", f"-c:s:{position}", "copy"]
                for key, value in tags.items():
                    for_output += [f"-metadata:s:s:{position}", f"{key}={value}"]
            inputs += 1
        if self.chapters:
            for_inputs += ["-f", "ffmetadata", "-protocol_whitelist", "file", "-i", file_url(self.chapters)]
        for_output += ["-map_chapters", str(inputs) if self.chapters else "-1"]
        for_output += ["-metadata", f"title={self.title}"] if self.title else []
        for_output += ["-metadata:s:a:0", f"language={self.language}"] if self.language else []
        return for_inputs, for_output


@contextmanager
def collect_extras(
    info: VideoInfo, audio: AudioInfo, seconds: float, output: Path, on_wait: OnWait | None = None
) -> Iterator[Extras]:
    """Collect the extras of a result of a length in seconds, in temporary files that exist during a `with` block.

    output: the result's file, not written yet; the temporary files lie beside it and begin with its stem. A video that
    is played forward and backward has chapters and subtitles the first time only. Extras never make a run fail: what
    cannot be read is left out, with a remark. on_wait: as in `Watchdog.wait`.
    """
    suffix = output.suffix.lower()
    chapters_file = output.with_name(f"{output.stem}-chapters.txt")
    subtitles_file = output.with_stem(f"{output.stem}-subtitles")
    remarks: list[str] = []
    try:
        begin = float(info.start_pts * info.time_base + info.first / info.rate)
        # Frames are rounded to the nearest time on the grid.
        end = min(float(info.n_frames / info.rate), seconds)
        tags, codecs, program = (NO_TAGS, (), "") if info.still else _read_source(info, on_wait)
        chapters = _shift_chapters(tags.chapters, begin, end)
        if chapters:
            chapters_file.write_text(_as_ffmetadata(chapters), encoding="utf-8")
        encoders = _subtitle_encoders(codecs, suffix)
        if len(encoders) < len(codecs):
            remarks.append(
                f"Subtitles that are pictures, or of an unknown kind, were left out of the {suffix} file"
                + ("." if suffix == ".mkv" else "; an output that ends in .mkv can hold pictures.")
            )
        streams: dict[int, dict[str, str]] = {}
        if encoders:
            filled = _extract_subtitles(info.path, program, encoders, begin, end, subtitles_file, on_wait)
            if filled is None:
                remarks.append("The video's subtitles are damaged and were left out.")
            else:
                streams = {i: tags.streams[number] for i, number in enumerate(encoders) if i in filled}
        language = next((_language(track.language) for track in audio.tracks if track.number == audio.track), "")
        if suffix == ".mov":
            language = QUICKTIME_LANGUAGES.get(language, language)
            for stream in streams.values():
                if name := QUICKTIME_LANGUAGES.get(stream.get("language", "")):
                    stream["language"] = name
        yield Extras(
            title=tags.title,
            language=language,
            chapters=chapters_file if chapters else None,
            subtitles=subtitles_file if streams else None,
            streams=streams,
            remarks=tuple(remarks),
        )
    finally:
        for path in (chapters_file, subtitles_file):
            with suppress(OSError):  # the folder may have been removed
                path.unlink()


def _read_source(info: VideoInfo, on_wait: OnWait | None) -> tuple[Tags, tuple[str, ...], str]:
    """Tags of a video and its subtitles, the codecs of these, and ffmpeg's specifier of their program or file.

    Of a broadcast with several programs, the subtitles are those of the program that the picture belongs to.
    """
    source = "0"
    while True:
        streams = ["-map", f"0:{info.select}", "-map", f"{source}:s?", "-c", "copy"]
        tags, codecs, messages = _read_tags_and_codecs(info.path, streams, on_wait)
        program = _program_of(int(info.select), messages) if source == "0" else None
        if program is None:
            return replace(tags, streams=tags.streams[1:]), codecs[1:], source
        source = f"0:p:{program}"


def _read_tags_and_codecs(path: Path, streams: list[str], on_wait: OnWait | None) -> tuple[Tags, tuple[str, ...], str]:
    """Tags of a file and of some of its streams, the codecs of these, and ffmpeg's messages; all empty if it fails."""
    with tempfile.TemporaryDirectory(prefix="latentsync-") as folder:
        tags, codecs = Path(folder) / "tags", Path(folder) / "codecs"
        # A time limit of the input leaves the chapters as they are; one of the output would cut them.
        arguments = [
            *("-nostats", "-y", "-t", "0.001", *input_arguments(path)),
            *(*streams, "-f", "ffmetadata", file_url(tags), *streams, "-f", "framecrc", file_url(codecs)),
        ]
        messages = run_to_end(arguments, PROBE_LIMITS, on_wait)
        if messages is None:
            return NO_TAGS, (), ""
        lines = codecs.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.split()[2] for line in lines if line.startswith("#codec_id ")]
        return _parse_tags(tags.read_text(encoding="utf-8", errors="replace")), tuple(names), messages


def _program_of(stream: int, messages: str) -> int | None:
    """Number of the program that a stream belongs to, from ffmpeg's messages; None if it belongs to none.

    The messages may contain lines that the file made up; the worst result is that other subtitles of it are chosen.
    """
    program = None
    for line in messages.partition("\nStream mapping:")[0].splitlines():
        if heading := re.match(r"  (?:Program (\d{1,9})|No Program)", line):
            program = heading[1]
        elif program and re.match(rf"  Stream #0:{stream}\b", line):
            return int(program)
    return None


def _subtitle_encoders(codecs: tuple[str, ...], suffix: str) -> dict[int, str]:
    """Number → ffmpeg's encoder, or "copy", of the subtitles that a container can hold."""
    encoders = {}
    for number, codec in enumerate(codecs[:MAX_SUBTITLES]):
        if suffix == ".mkv" and codec in COPIED_TO_MATROSKA:
            encoders[number] = "copy"
        elif codec in TEXT_SUBTITLES:
            encoders[number] = "srt" if suffix == ".mkv" else "mov_text"
    return encoders


def _extract_subtitles(
    path: Path,
    source: str,
    encoders: dict[int, str],
    begin: float,
    end: float,
    output: Path,
    on_wait: OnWait | None,
) -> set[int] | None:
    """Write subtitles of a video to a file of their own, on the result's timeline; None if they cannot be read.

    source, encoders: see `_read_source` and `_subtitle_encoders`; begin, end: seconds of the video and of the result.
    The file also gets a picture at time zero, since for ffmpeg a file begins with its first stream. Returns the numbers
    of those streams in the file that are not empty.
    """
    streams = []
    for position, (number, encoder) in enumerate(encoders.items()):
        streams += ["-map", f"{source}:s:{number}", f"-c:s:{position}", encoder]
        streams += [f"-bsf:s:{position}", ending_at(end)]
    extract = [
        *("-loglevel", "error", "-nostats", "-y", "-t", f"{begin + end:.3f}", "-itsoffset", f"{-begin:.6f}"),
        *(*input_arguments(path), "-f", "lavfi", "-i", "color=s=16x16:r=25:d=0.04"),
        *(*streams, "-map", "1:v", "-c:v", "mjpeg", "-map_metadata", "-1", "-map_chapters", "-1", "-t", f"{end:.3f}"),
        *("-fs", str(MAX_SUBTITLE_BYTES), "-f", "matroska" if output.suffix == ".mkv" else "mov", file_url(output)),
    ]
    count = ["-loglevel", "error", "-nostats", "-i", file_url(output), "-map", "0:s", "-c", "copy", "-f", "framecrc"]
    with tempfile.TemporaryDirectory(prefix="latentsync-") as folder:
        packets = Path(folder) / "packets"
        for command in (extract, [*count, file_url(packets)]):
            if run_to_end(command, SCAN_LIMITS, on_wait) is None:
                return None
        lines = packets.read_text(encoding="utf-8", errors="replace").splitlines()
    return {int(line.partition(",")[0]) for line in lines if not line.startswith("#")}


def ending_at(seconds: float) -> str:
    """ffmpeg's bitstream filters that restrict subtitles to the time of the picture, from zero to `seconds`.

    A subtitle before zero would shift all others, and the picture; one that lasts longer would make the file longer.
    """
    return (
        "noise=drop='lt(pts,0)*lte(pts+duration,0)',"
        f"setts=ts='max(PTS,0)':duration='max(0,min(PTS+DURATION,floor({seconds:.3f}/TB))-max(PTS,0))'"
    )


def _shift_chapters(chapters: tuple[Chapter, ...], begin: float, end: float) -> list[Chapter]:
    """Chapters on the result's timeline: `begin` becomes zero; those outside of zero to `end` are left out."""
    shifted = [Chapter(max(0.0, c.start - begin), min(end, c.end - begin), c.title) for c in chapters]
    return [chapter for chapter in shifted if chapter.end > chapter.start]


def _parse_tags(text: str) -> Tags:
    """The metadata that may be passed on, from ffmpeg's `ffmetadata` format."""
    metadata = parse_metadata(text)
    chapters = map(_parse_chapter, metadata.chapters[:MAX_CHAPTERS])
    return Tags(
        clean_text(metadata.file.get("title", ""), MAX_TITLE_LENGTH),
        tuple(map(_stream_tags, metadata.streams)),
        tuple(chapter for chapter in chapters if chapter),
    )


def _stream_tags(values: dict[str, str]) -> dict[str, str]:
    title = clean_text(values.get("title") or values.get("name") or "", MAX_TITLE_LENGTH)
    tags = {"language": _language(values.get("language", "")), "title": title}
    return {key: value for key, value in tags.items() if value}


def _language(text: str) -> str:
    """A language of three letters, which all containers take; "" for anything else."""
    return text.lower() if re.fullmatch("[A-Za-z]{3}", text) and text.lower() != "und" else ""


def _parse_chapter(values: dict[str, str]) -> Chapter | None:
    try:
        numerator, denominator = map(int, values["timebase"].split("/"))
        start, end = (int(values[key]) * numerator / denominator for key in ("start", "end"))
    except (KeyError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return Chapter(start, end, clean_text(values.get("title", ""), MAX_TITLE_LENGTH))


def _as_ffmetadata(chapters: list[Chapter]) -> str:
    lines = [";FFMETADATA1"]
    for chapter in chapters:
        start, end = (round(1000 * seconds) for seconds in (chapter.start, chapter.end))
        lines += ["[CHAPTER]", "TIMEBASE=1/1000", f"START={start}", f"END={end}", f"title={escape(chapter.title)}"]
    return "\n".join(lines) + "\n"
