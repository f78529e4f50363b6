"""What the result takes over from its film besides the picture: title, chapters and subtitles, and of its sound the
language. All else that a file says of itself, as where, when and with what it was recorded, stays out."""

import re
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from latentsync import FPS
from latentsync.errors import UserError
from latentsync.media.info import AudioInfo, VideoInfo
from latentsync.media.process import file_url, input_arguments, read_log, run_ffmpeg
from latentsync.media.watchdog import OnWait, Watchdog

TEXT = {"subrip", "ass", "ssa", "mov_text", "webvtt", "text"}  # subtitles that can become another kind of text
# Subtitles that Matroska holds as they are: those with a style, and those that are pictures.
COPIED_TO_MATROSKA = {"subrip", "ass", "hdmv_pgs_subtitle", "dvd_subtitle", "dvb_subtitle"}
MOST_CHAPTERS = 1000
MOST_SUBTITLES = 32  # streams
MOST_SUBTITLE_BYTES = 256 << 20  # of all of them
LONGEST_TITLE = 200  # characters


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
    subtitles: Path | None = None  # in the result's container
    streams: tuple[dict[str, str], ...] = ()  # "title" and "language" of each stream of subtitles
    remarks: tuple[str, ...] = ()  # sentences for the user on what could not be taken over

    def options(self, inputs: int) -> tuple[list[str], list[str]]:
        """ffmpeg's options for its inputs, of which there are `inputs` already, and for its output."""
        before, after = [], ["-map_metadata", "-1"]
        if self.subtitles:
            before += ["-f", "matroska" if self.subtitles.suffix == ".mkv" else "mov", "-protocol_whitelist", "file"]
            before += ["-i", file_url(self.subtitles)]
            after += ["-map", f"{inputs}:s", "-c:s", "copy"]
            for number, tags in enumerate(self.streams):
                for key, value in tags.items():
                    after += [f"-metadata:s:s:{number}", f"{key}={value}"]
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
    chapters, subtitles = name.with_name(f"{name.stem}-chapters.txt"), name.with_stem(f"{name.stem}-subtitles")
    remarks: list[str] = []
    try:
        begins = float(info.start_pts * info.time_base)
        # Frames are rounded to the nearest time on the grid.
        ends = min(info.n_frames / FPS, seconds)
        tags, codecs, program = Tags("", (), ()), (), ""
        if not info.still:
            tags, codecs, program = _describe(info.path, on_wait)
        kept = _in_time(tags.chapters, begins, ends)
        if kept:
            chapters.write_text(_as_ffmetadata(kept), encoding="utf-8")
        wanted = _chosen(codecs, name.suffix)
        if len(wanted) < len(codecs):
            remarks.append(
                f"Subtitles that are pictures, or of an unknown kind, were left out of the {name.suffix} file"
                + ("." if name.suffix == ".mkv" else "; an output that ends in .mkv can hold pictures.")
            )
        streams: tuple[dict[str, str], ...] = ()
        if wanted:
            filled = _extract(info.path, program, wanted, begins, ends, subtitles, on_wait)
            if filled is None:
                remarks.append(f"The subtitles of {info.path} are damaged and were left out.")
                subtitles.unlink(missing_ok=True)
            else:
                streams = tuple(tags.streams[number] for number in filled)
        language = _describe_sound(audio, on_wait).get("language", "")
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


def _describe(path: Path, on_wait: OnWait | None) -> tuple[Tags, tuple[str, ...], str]:
    """Tags of a video, the codecs of its subtitles, and which streams these are chosen from, as ffmpeg writes it.

    Of a broadcast with several programs, the subtitles are those of the picture's. The tags' streams are those of the
    subtitles.
    """
    chosen = "0"
    while True:
        streams = ["-map", "0:V:0", "-map", f"{chosen}:s?", "-c", "copy"]
        found, text = _metadata(path, streams, on_wait)
        tags, codecs = found
        program = _program(text) if chosen == "0" else None
        if program is None:
            return Tags(tags.title, tags.streams[1:], tags.chapters), codecs[1:], chosen
        chosen = f"0:p:{program}"


def _describe_sound(audio: AudioInfo, on_wait: OnWait | None) -> dict[str, str]:
    (tags, _), _ = _metadata(audio.path, ["-map", "0:a:0", "-c", "copy"], on_wait)
    return tags.streams[0] if tags.streams else {}


def _metadata(
    path: Path, streams: list[str], on_wait: OnWait | None
) -> tuple[tuple[Tags, tuple[str, ...]], str]:
    """Tags of a file and of some of its streams, the codecs of these, and ffmpeg's messages; nothing where it fails."""
    with tempfile.TemporaryDirectory(prefix="latentsync-") as folder:
        tags, codecs = Path(folder) / "tags", Path(folder) / "codecs"
        # A limit for the input leaves the chapters as they are; one for the output would cut them.
        arguments = [
            *("-nostats", "-y", "-t", "0.001", *input_arguments(path)),
            *(*streams, "-f", "ffmetadata", file_url(tags), *streams, "-f", "framecrc", file_url(codecs)),
        ]
        with run_ffmpeg(arguments) as (process, log), Watchdog(process) as watchdog:
            failed = watchdog.wait(on_wait) != 0
            text = read_log(log)
        if failed:
            return (Tags("", (), ()), ()), ""
        lines = codecs.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.split()[2] for line in lines if line.startswith("#codec_id ")]
        return (parse_tags(tags.read_text(encoding="utf-8", errors="replace")), tuple(names)), text


def _program(text: str) -> int | None:
    """The number of the program that the first picture belongs to; None where there are fewer than two programs."""
    programs: list[tuple[int, set[int]]] = []
    pictures: set[int] = set()
    for line in text.splitlines():
        if begin := re.match(r"  Program (\d+)", line):
            programs.append((int(begin[1]), set()))
        elif line.startswith("  No Program"):
            programs.append((-1, set()))
        elif stream := re.match(r"  Stream #0:(\d+)", line):
            if programs:
                programs[-1][1].add(int(stream[1]))
            if ": Video: " in line and "(attached pic)" not in line:
                pictures.add(int(stream[1]))
        elif line.startswith(("Output #", "Stream mapping:")):
            break
    known = [number for number, _ in programs if number >= 0]
    if len(known) < 2 or not pictures:
        return None
    return next((number for number, streams in programs if min(pictures) in streams and number >= 0), None)


def _chosen(codecs: tuple[str, ...], suffix: str) -> dict[int, str]:
    """What becomes of the subtitles that a container can hold: number → ffmpeg's name of the encoder, or "copy"."""
    chosen = {}
    for number, codec in enumerate(codecs[:MOST_SUBTITLES]):
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
) -> list[int] | None:
    """Write some of a video's subtitles to a file of their own, on the result's timeline.

    A picture in it begins at zero, since ffmpeg lets what it reads begin there.
    begins, ends: seconds of the video's. Returns the numbers of those streams that have any, in order, or None where
    they cannot be read; then the file is to be removed.
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
        *("-fs", str(MOST_SUBTITLE_BYTES), "-f", "matroska" if subtitles.suffix == ".mkv" else "mov"),
        file_url(subtitles),
    ]
    counts = [*("-loglevel", "error", "-nostats", "-i", file_url(subtitles), "-map", "0:s", "-c", "copy")]
    with tempfile.TemporaryDirectory(prefix="latentsync-") as folder:
        packets = Path(folder) / "packets"
        for command in (arguments, [*counts, "-f", "framecrc", file_url(packets)]):
            with run_ffmpeg(command) as (process, _), Watchdog(process) as watchdog:
                if watchdog.wait(on_wait) != 0:
                    return None
        lines = packets.read_text(encoding="utf-8", errors="replace").splitlines()
    filled = {int(line.partition(",")[0]) for line in lines if not line.startswith("#")}
    return [number for place, number in enumerate(wanted) if place in filled]


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
    moved = [
        Chapter(max(0.0, c.start - begins), min(ends, c.end - begins), c.title) for c in chapters[:MOST_CHAPTERS]
    ]
    return [chapter for chapter in moved if chapter.end > chapter.start]


def parse_tags(text: str) -> Tags:
    """Read what ffmpeg's `ffmetadata` format says of a file, its streams and its chapters."""
    found: dict[str, str] = {}
    streams: list[dict[str, str]] = []
    chapters: list[dict[str, str]] = []
    section = found
    # A record ends at a line break that no backslash goes before.
    for record in re.findall(r"(?:[^\\\n]|\\.)+", text, re.DOTALL):
        if record == "[STREAM]":
            streams.append(section := {})
        elif record == "[CHAPTER]":
            chapters.append(section := {})
        elif pair := re.fullmatch(r"((?:[^\\=]|\\.)*)=(.*)", record, re.DOTALL):
            key, value = (re.sub(r"\\(.)", r"\1", part, flags=re.DOTALL) for part in pair.groups())
            section.setdefault(key.lower(), value)  # ffmpeg's own come first
    return Tags(
        clean_title(found.get("title", "")),
        tuple(map(_of_stream, streams)),
        tuple(chapter for chapter in map(_chapter, chapters) if chapter),
    )


def _of_stream(tags: dict[str, str]) -> dict[str, str]:
    language = tags.get("language", "").lower()
    language = language if re.fullmatch(r"[a-z]{3}", language) and language != "und" else ""
    kept = {"language": language, "title": clean_title(tags.get("title", ""))}
    return {key: value for key, value in kept.items() if value}


def _chapter(tags: dict[str, str]) -> Chapter | None:
    try:
        above, below = map(int, tags["timebase"].split("/"))
        start, end = (int(tags[key]) * above / below for key in ("start", "end"))
    except (KeyError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return Chapter(start, end, clean_title(tags.get("title", "")))


def clean_title(text: str) -> str:
    """A title as one line of visible characters, no longer than LONGEST_TITLE."""
    visible = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text)
    return " ".join(visible.split())[:LONGEST_TITLE]


def _as_ffmetadata(chapters: list[Chapter]) -> str:
    lines = [";FFMETADATA1"]
    for chapter in chapters:
        title = re.sub(r"([=;#\\])", r"\\\1", chapter.title)
        start, end = (round(1000 * seconds) for seconds in (chapter.start, chapter.end))
        lines += ["[CHAPTER]", "TIMEBASE=1/1000", f"START={start}", f"END={end}", f"title={title}"]
    return "\n".join(lines) + "\n"
