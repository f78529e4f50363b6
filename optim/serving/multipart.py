"""Parse a multipart form and write its files, bounded in number and size."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from python_multipart.multipart import MultipartParser, parse_options_header

from optim.serving.guard import Refusal

MAX_FILES = 4  # of one request
MAX_NAME_BYTES = 200  # of a file name; file systems take 255

Progress = Callable[[str, bytes], None]  # called with the name of a file and its next bytes


class MultipartForm:
    """Callbacks of a multipart parser that write a form's files into a folder. Fields that are not files are ignored.

    Raises Refusal for more than MAX_FILES files, or more than `max_file` bytes of one.
    """

    def __init__(self, place: Path, boundary: bytes, max_file: int | None, progress: Progress | None):
        self._place, self._max_file, self._progress = place, max_file, progress
        self._header, self._value, self._disposition = b"", b"", b""
        self._file: IO[bytes] | None = None  # the one that is being received
        self._size = 0
        self._pending: list[tuple[IO[bytes], bytes]] = []  # to be written
        self.pending_bytes = 0
        self._received: list[IO[bytes]] = []  # to be closed once they are written
        self._ended = False
        self.paths: list[Path] = []
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    def parse(self, chunk: bytes) -> None:
        """Parse the next bytes of the body. Raises MultipartParseError, Refusal and OSError."""
        self._parser.write(chunk)

    def write(self) -> None:
        """Write the pending bytes. Raises OSError."""
        for file, data in self._pending:
            file.write(data)
        self._pending.clear()
        self.pending_bytes = 0
        for file in self._received:
            file.close()
        self._received.clear()

    def finish(self) -> list[Path]:
        """Return the paths of the files. Raises Refusal if the body was cut short or holds no file."""
        self._parser.finalize()
        if not self._ended:
            raise Refusal(400, "The upload did not come to its end: send it again.")
        if not self.paths:
            raise Refusal(400, "The upload holds no file: choose one.")
        return self.paths

    def close(self) -> None:
        for file in (self._file, *self._received):
            if file is not None:
                with suppress(OSError):
                    file.close()

    # ---- the parser's callbacks

    def _on_part_begin(self) -> None:
        self._disposition, self._file, self._size = b"", None, 0

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"filename" not in options:
            return
        if len(self.paths) >= MAX_FILES:
            raise Refusal(400, f"The upload holds more than {MAX_FILES} files: send them one by one.")
        name = file_name(options[b"filename"].decode("utf-8", "replace"))
        place = self._place if not self.paths else self._place / str(len(self.paths))
        place.mkdir(exist_ok=True, mode=0o700)
        self._file = open(place / name, "xb")  # closed in `write` or `close`
        self.paths.append(place / name)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is None:
            return
        part = data[start:end]
        self._size += len(part)
        if self._max_file is not None and self._size > self._max_file:
            raise too_large(self._max_file)
        self._pending.append((self._file, part))
        self.pending_bytes += len(part)
        if self._progress:
            self._progress(self.paths[-1].name, part)

    def _on_part_end(self) -> None:
        if self._file is not None:
            self._received.append(self._file)
            self._file = None

    def _on_end(self) -> None:
        self._ended = True


def file_name(name: str) -> str:
    """Turn a visitor's file name into one that every system accepts: the last part, without special characters."""
    name = name.replace("\\", "/").split("/")[-1]
    name = "".join(c if c.isprintable() and c not in '<>:"/\\|?*\ufffd' else "_" for c in name).strip(" .")
    stem, dot, extension = name.rpartition(".")
    if dot and len(extension) <= 10:
        while len(f"{stem}.{extension}".encode()) > MAX_NAME_BYTES:
            stem = stem[:-1]
        name = f"{stem}.{extension}"
    while len(name.encode()) > MAX_NAME_BYTES:
        name = name[:-1]
    return name or "file"


def too_large(limit: int) -> Refusal:
    """Refuse a file of more than `limit` bytes."""
    return Refusal(413, f"The file is larger than {limit / 1e6:.4g} MB, which is the maximum allowed size here.")
