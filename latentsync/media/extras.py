"""What the result takes over from its film besides the picture: title, chapters and subtitles, and of its sound the
language. All else that a file says of itself, as where, when and with what it was recorded, stays out."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from latentsync import FPS
from latentsync.media.info import AudioInfo, VideoInfo
from latentsync.media.metadata import clean_text, escape, parse_metadata
from latentsync.media.process import PROBE_LIMITS, SCAN_LIMITS, file_url, input_arguments, read_log, run_ffmpeg
from latentsync.media.watchdog import OnWait, Watchdog

TEXT = {"subrip", "ass", "ssa", "mov_text", "webvtt", "text"}  # subtitles that can become another kind of text
# Subtitles that Matroska holds as they are: those with a style, and those that are pictures.
COPIED_TO_MATROSKA = {"subrip", "ass", "hdmv_pgs_subtitle", "dvd_subtitle", "dvb_subtitle"}
# QuickTime's files number the languages, and these are ffmpeg's names for those of the numbers that ISO 639-2 calls
# otherwise; what has no number is left out there.
QUICKTIME_LANGUAGES = {
    "fre": "fra", "deu": "ger", "nld": "dut", "swe": "sve", "ell": "gre", "isl": "ice", "zho": "chi", "gle": "iri",
    "sqi": "alb", "rum": "ron", "cze": "ces", "slo": "slk", "mkd": "mac",
}  # fmt: skip
MAX_CHAPTERS = 1000
MAX_SUBTITLES = 32  # streams
MAX_SUBTITLE_BYTES = 256 << 20  # of all of them
MAX_TITLE_LENGTH = 200  # characters


@dataclass(frozen=True)
class Chapter:
    start: float  # seconds of the result
    end: float
    title: str


@dataclass(frozen=True)
class Tags:
    """What a file says of itself, as far as it may be passed on: titles of one line, languages like "deu"."""

    title: str
    streams: tuple[dict[str, str], ...]  # "title" and "language" of each
    chapters: tuple[Chapter, ...]


@dataclass(frozen=True)
class Extras:
    """What goes into the result, in files that are the result's own."""

    title: str = ""
    language: str = ""  # of the sound
    chapters: Path | None = None  # in ffmpeg's own format
    subtitles: Path | None = None  # in the result's container, of which it has the ending
    streams: dict[int, dict[str, str]] = field(default_factory=dict)  # those in that file: "title" and "language"
    remarks: tuple[str, ...] = ()  # sentences for the user on what could not be taken over

    def options(self, inputs: int) -> tuple[list[str], list[str]]:
        """ffmpeg's options for its inputs, of which there are `inputs` already, and for its output."""
        before, after = [], ["-map_metadata:g", "-1", "-map_metadata:s", "-1"]
        if self.subtitles:
            before += ["-f", "matroska" if self.subtitles.suffix == ".mkv" else "mov", "-protocol_whitelist", "file"]
            before += ["-i", file_url(self.subtitles)]
            for place, (number, tags) in enumerate(self.streams.items()):
                after += ["-map", f"{inputs}:s:{number}", f"-c:s:{place}", "copy"]
                for key, value in tags.items():
                    after += [f"-metadata:s:s:{place}", f"{key}={value}"]
            inputs += 1
        if self.chapters:
            before += ["-f", "ffmetadata", "-protocol_whitelist", "file", "-i", file_url(self.chapters)]
        after += ["-map_chapters", str(inputs) if self.chapters else "-1"]
        after += ["-metadata", f"title={self.title}"] if self.title else []
        after += ["-metadata:s:a:0", f"language={self.language}"] if self.language else []
        return before, after


@contextmanager
def collect_extras(
    info: VideoInfo, audio: AudioInfo, seconds: float, name: Path, on_wait: OnWait | None = None
) -> Iterator[Extras]:
    """Collect what goes along with a result that lasts so many seconds into files beside `name`, for a `with` block.

    name: a file of the result's container that is still to be written; what the block needs begins with its stem. A
    video that is played forward and backward keeps chapters and subtitles for the first time. Nothing in them can
    cost the result: what cannot be read is left out, with a remark. on_wait: as in `Watchdog.wait`.
    """
    suffix = name.suffix.lower()
    chapters, subtitles = name.with_name(f"{name.stem}-chapters.txt"), name.with_stem(f"{name.stem}-subtitles")
    remarks: list[str] = []
    try:
        begins = float(info.start_pts * info.time_base)
        # Frames are rounded to the nearest time on the grid.
        ends = min(info.n_frames / FPS, seconds)
        tags, codecs, program = Tags("", (), ()), (), ""
        if not info.still:
            tags, codecs, program = _describe(info, on_wait)
        kept = _in_time(tags.chapters, begins, ends)
        if kept:
            chapters.write_text(_as_ffmetadata(kept), encoding="utf-8")
        wanted = _chosen(codecs, suffix)
        if len(wanted) < len(codecs):
            remarks.append(
                f"Subtitles that are pictures, or of an unknown kind, were left out of the {suffix} file"
                + ("." if suffix == ".mkv" else "; an output that ends in .mkv can hold pictures.")
            )
        streams: dict[int, dict[str, str]] = {}
        if wanted:
            filled = _extract(info.path, program, wanted, begins, ends, subtitles, on_wait)
            if filled is None:
                remarks.append("The video's subtitles are damaged and were left out.")
            else:
                streams = {place: tags.streams[number] for place, number in enumerate(wanted) if place in filled}
        language = next((_language(track.language) for track in audio.tracks if track.number == audio.track), "")
        if suffix == ".mov":
            language = QUICKTIME_LANGUAGES.get(language, language)
            for stream in streams.values():
                if known := QUICKTIME_LANGUAGES.get(stream.get("language", "")):
                    stream["language"] = known
        yield Extras(
            tags.title,
            language,
            chapters if kept else None,
            subtitles if streams else None,
            streams,
            tuple(remarks),
        )
    finally:
        for path in (chapters, subtitles):
            with suppress(OSError):  # the folder may be gone
                path.unlink()


def _describe(info: VideoInfo, on_wait: OnWait | None) -> tuple[Tags, tuple[str, ...], str]:
    """Tags of a video, the codecs of its subtitles, and which streams these are chosen from, as ffmpeg writes it.

    Of a broadcast with several programs, the subtitles are those of the picture's. The tags' streams are those of the
    subtitles.
    """
    chosen = "0"
    while True:
        streams = ["-map", f"0:{info.select}", "-map", f"{chosen}:s?", "-c", "copy"]
        tags, codecs, messages = _metadata(info.path, streams, on_wait)
        program = _program(messages, int(info.select)) if chosen == "0" else None
        if program is None:
            return Tags(tags.title, tags.streams[1:], tags.chapters), codecs[1:], chosen
        chosen = f"0:p:{program}"


def _metadata(path: Path, streams: list[str], on_wait: OnWait | None) -> tuple[Tags, tuple[str, ...], str]:
    """Tags of a file and of some of its streams, the codecs of these, and ffmpeg's messages; nothing where it fails."""
    with tempfile.TemporaryDirectory(prefix="latentsync-") as folder:
        tags, codecs = Path(folder) / "tags", Path(folder) / "codecs"
        # A limit for the input leaves the chapters as they are; one for the output would cut them.
        arguments = [
            *("-nostats", "-y", "-t", "0.001", *input_arguments(path)),
            *(*streams, "-f", "ffmetadata", file_url(tags), *streams, "-f", "framecrc", file_url(codecs)),
        ]
        with run_ffmpeg(arguments, limits=PROBE_LIMITS) as (process, log), Watchdog(process) as watchdog:
            if watchdog.wait(on_wait) != 0:
                return Tags("", (), ()), (), ""
            messages = read_log(log)
        lines = codecs.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.split()[2] for line in lines if line.startswith("#codec_id ")]
        return _read_tags(tags.read_text(encoding="utf-8", errors="replace")), tuple(names), messages


def _program(messages: str, picture: int) -> int | None:
    """The number of the program that a stream belongs to, from ffmpeg's messages; None where it is in none.

    These may hold lines that the file made up; all that they could bring about is that of its own subtitles others are
    chosen.
    """
    program = None
    for line in messages.partition("\nStream mapping:")[0].splitlines():
        if begin := re.match(r"  (?:Program (\d{1,9})|No Program)", line):
            program = begin[1]
        elif program and re.match(rf"  Stream #0:{picture}\b", line):
            return int(program)
    return None


def _chosen(codecs: tuple[str, ...], suffix: str) -> dict[int, str]:
    """What becomes of the subtitles that a container can hold: number → ffmpeg's name of the encoder, or "copy"."""
    chosen = {}
    for number, codec in enumerate(codecs[:MAX_SUBTITLES]):
        if suffix == ".mkv" and codec in COPIED_TO_MATROSKA:
            chosen[number] = "copy"
        elif codec in TEXT:
            chosen[number] = "srt" if suffix == ".mkv" else "mov_text"
    return chosen


def _extract(
    path: Path,
    chosen: str,
    wanted: dict[int, str],
    begins: float,
    ends: float,
    subtitles: Path,
    on_wait: OnWait | None,
) -> set[int] | None:
    """Write some of a video's subtitles to a file of their own, on the result's timeline, with a picture.

    The picture begins at zero: ffmpeg takes for zero where the first stream of a file begins. begins, ends: seconds of
    the video's and of the result's. Returns the numbers that streams which hold anything have in the file, or None
    where the subtitles cannot be read.
    """
    within = ending_at(ends)
    options = []
    for place, (number, codec) in enumerate(wanted.items()):
        options += ["-map", f"{chosen}:s:{number}", f"-c:s:{place}", codec]
        options += [f"-bsf:s:{place}", within]
    arguments = [
        *("-loglevel", "error", "-nostats", "-y", "-t", f"{begins + ends:.3f}", "-itsoffset", f"{-begins:.6f}"),
        *(*input_arguments(path), "-f", "lavfi", "-i", f"color=s=16x16:r={FPS}:d={1 / FPS}"),
        *(*options, "-map", "1:v", "-c:v", "mjpeg", "-map_metadata", "-1", "-map_chapters", "-1", "-t", f"{ends:.3f}"),
        *("-fs", str(MAX_SUBTITLE_BYTES), "-f", "matroska" if subtitles.suffix == ".mkv" else "mov"),
        file_url(subtitles),
    ]
    counts = [*("-loglevel", "error", "-nostats", "-i", file_url(subtitles), "-map", "0:s", "-c", "copy")]
    with tempfile.TemporaryDirectory(prefix="latentsync-") as folder:
        packets = Path(folder) / "packets"
        for command in (arguments, [*counts, "-f", "framecrc", file_url(packets)]):
            with run_ffmpeg(command, limits=SCAN_LIMITS) as (process, _), Watchdog(process) as watchdog:
                if watchdog.wait(on_wait) != 0:
                    return None
        lines = packets.read_text(encoding="utf-8", errors="replace").splitlines()
    return {int(line.partition(",")[0]) for line in lines if not line.startswith("#")}


def ending_at(seconds: float) -> str:
    """ffmpeg's bitstream filters that let subtitles be shown only between zero and a time, as the picture is.

    One before zero would move all others, and the picture; one that lasts longer would make the file longer.
    """
    return (
        "noise=drop='lt(pts,0)*lte(pts+duration,0)',"
        f"setts=ts='max(PTS,0)':duration='max(0,min(PTS+DURATION,floor({seconds:.3f}/TB))-max(PTS,0))'"
    )


def _in_time(chapters: tuple[Chapter, ...], begins: float, ends: float) -> list[Chapter]:
    """The chapters between two times, and their times from the first of these."""
    moved = [Chapter(max(0.0, c.start - begins), min(ends, c.end - begins), c.title) for c in chapters]
    return [chapter for chapter in moved if chapter.end > chapter.start]


def _read_tags(text: str) -> Tags:
    """What of ffmpeg's `ffmetadata` format may be passed on."""
    metadata = parse_metadata(text)
    return Tags(
        clean_text(metadata.file.get("title", ""), MAX_TITLE_LENGTH),
        tuple(map(_of_stream, metadata.streams)),
        tuple(chapter for chapter in map(_chapter, metadata.chapters[:MAX_CHAPTERS]) if chapter),
    )


def _of_stream(texts: dict[str, str]) -> dict[str, str]:
    title = clean_text(texts.get("title") or texts.get("name") or "", MAX_TITLE_LENGTH)
    kept = {"language": _language(texts.get("language", "")), "title": title}
    return {key: value for key, value in kept.items() if value}


def _language(text: str) -> str:
    """A language as all containers take it, "" where it is none."""
    return text.lower() if re.fullmatch("[A-Za-z]{3}", text) and text.lower() != "und" else ""


def _chapter(texts: dict[str, str]) -> Chapter | None:
    try:
        above, below = map(int, texts["timebase"].split("/"))
        start, end = (int(texts[key]) * above / below for key in ("start", "end"))
    except (KeyError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return Chapter(start, end, clean_text(texts.get("title", ""), MAX_TITLE_LENGTH))


def _as_ffmetadata(chapters: list[Chapter]) -> str:
    lines = [";FFMETADATA1"]
    for chapter in chapters:
        start, end = (round(1000 * seconds) for seconds in (chapter.start, chapter.end))
        lines += ["[CHAPTER]", "TIMEBASE=1/1000", f"START={start}", f"END={end}", f"title={escape(chapter.title)}"]
    return "\n".join(lines) + "\n"
