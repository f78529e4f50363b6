"""Metadata of a file in ffmpeg's `ffmetadata` format, in which no value can imitate another field."""

import re
import unicodedata
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Metadata:
    """Values of a file, of its streams and of its chapters, by their lowercase names; not cleaned."""

    file: dict[str, str] = field(default_factory=dict)
    streams: list[dict[str, str]] = field(default_factory=list)
    chapters: list[dict[str, str]] = field(default_factory=list)


def parse_metadata(text: str) -> Metadata:
    """Read ffmpeg's `ffmetadata` format."""
    metadata = Metadata()
    section = metadata.file
    # A record ends at a line break without a backslash before it.
    for record in re.findall(r"(?:[^\\\n]|\\.)+", text, re.DOTALL):
        if record == "[STREAM]":
            metadata.streams.append(section := {})
        elif record == "[CHAPTER]":
            metadata.chapters.append(section := {})
        elif pair := re.fullmatch(r"((?:[^\\=]|\\.)*)=(.*)", record, re.DOTALL):
            key, value = (re.sub(r"\\(.)", r"\1", part, flags=re.DOTALL) for part in pair.groups())
            section.setdefault(key.lower(), value)  # of two equal names, ffmpeg's own comes first
    return metadata


def escape(text: str) -> str:
    """Escape a text of one line as a value in ffmpeg's `ffmetadata` format."""
    return re.sub(r"([=;#\\])", r"\\\1", text)


def clean_text(text: str, length: int) -> str:
    """Make a file's text fit for one line: without control characters, at most `length` characters."""
    text = "".join(" " if unicodedata.category(char).startswith(("C", "Z")) else char for char in text)
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
