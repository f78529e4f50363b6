"""Recognize pictures and playlists by their first bytes, where ffmpeg would rely on the file's name."""

import mmap
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

HEAD_BYTES = 4096
MAX_CHUNKS = 1000  # of a PNG file before its pixels
MAX_BOXES = 100_000  # of an ISO file (MP4, MOV, HEIC) at its top level
ISO_BOXES = {b"ftyp", b"mdat", b"moov", b"wide", b"free", b"skip", b"styp", b"moof", b"sidx", b"meta", b"uuid"}
ISO_PICTURE_BRANDS = {b"mif1", b"mif2", b"msf1", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"avif", b"avis"}
JPEG_NAMES = {".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo"}  # one picture, though others may follow it in the file
MJPEG_NAMES = {".mjpeg", ".mjpg"}
MJPEG_FRAMES = 3  # pictures of one size, back to back, that make a file with another name a video
PLAYLIST = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:#EXTM3U|ffconcat|\[playlist\]|v=0\r?\n|"
    rb"(?:<\?xml[^>]*>\s*|<!--.*?-->\s*)*<(?:MPD|smil|asx)\b)",
    re.DOTALL | re.IGNORECASE,
)
# JPEG markers that a length follows: all but stuffed bytes, restarts, fill bytes, start and end.
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
JPEG_FRAME_HEADERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


def picture_demuxer(path: Path) -> str | None:
    """ffmpeg's demuxer of a picture or an animation, by the first bytes of the file; None for other files.

    A JPEG file is its first picture, whatever follows it, unless it is a raw MJPEG video.
    """
    head = read_head(path)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "apng" if _is_animated_png(path) else "png_pipe"
    if head.startswith(b"\xff\xd8\xff"):
        return "mjpeg" if _is_jpeg_video(path) else "jpeg_pipe"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        animated = head[12:16] == b"VP8X" and len(head) > 20 and head[20] & 2
        return "webp_anim" if animated else "webp_pipe"
    if head[:6] in {b"GIF87a", b"GIF89a"}:
        return "gif"
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return "bmp_pipe"
    if head[:4] in {b"II*\0", b"MM\0*"}:
        return "tiff_pipe"
    return None


def is_playlist(path: Path) -> bool:
    """Whether the file is a playlist, which only names other files."""
    return bool(PLAYLIST.match(read_head(path)))


def is_iso_picture(path: Path) -> bool:
    """Whether this is an ISO file with a brand of pictures or sequences of them: HEIF, HEIC or AVIF."""
    head = read_head(path)
    if head[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4))}
    return bool(brands & ISO_PICTURE_BRANDS)


def lacks_index(path: Path) -> bool:
    """Whether this is an ISO file without the index that locates its samples."""
    kinds = [kind for kind, _ in _iso_boxes(path)]
    return bool(kinds) and kinds[0] in ISO_BOXES and not {b"moov", b"meta"} & set(kinds)


def lacks_end(path: Path) -> bool:
    """Whether an ISO file without fragments ends before the end of its last box."""
    size, boxes = os.path.getsize(path), list(_iso_boxes(path))
    kinds = {kind for kind, _ in boxes}
    return bool(boxes) and boxes[0][0] in ISO_BOXES and b"moof" not in kinds and boxes[-1][1] > size


def _iso_boxes(path: Path) -> Iterator[tuple[bytes, int]]:
    """Type and end of each top-level box of an ISO file; the last may end after the end of the file."""
    with open(path, "rb") as file:
        at, size = 0, file.seek(0, 2)
        for _ in range(MAX_BOXES):
            if at + 8 > size:
                return
            file.seek(at)
            length, kind = struct.unpack(">I4s", file.read(8))
            if length == 1:
                length = int.from_bytes(file.read(8), "big")
            at = size if length == 0 else at + max(length, 8)
            yield kind, at


def read_head(path: Path) -> bytes:
    """The first HEAD_BYTES of the file; empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""


def _is_animated_png(path: Path) -> bool:
    """Whether a chunk of animation control precedes the pixels."""
    with open(path, "rb") as file:
        file.seek(8)
        for _ in range(MAX_CHUNKS):
            length, kind = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
            if kind in {b"acTL", b"IDAT", b"\0\0\0\0"}:
                return kind == b"acTL"
            file.seek(length + 4, 1)
    return False


def _is_jpeg_video(path: Path) -> bool:
    """Whether the file holds pictures of one size back to back, and does not have the name of a picture."""
    suffix = path.suffix.lower()
    if suffix in JPEG_NAMES:
        return False
    minimum = 2 if suffix in MJPEG_NAMES else MJPEG_FRAMES
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        sizes = []
        for size in _jpeg_sizes(data):
            sizes.append(size)
            if len(set(sizes)) > 1 or len(sizes) == minimum:
                break
    return len(sizes) == minimum and len(set(sizes)) == 1


def _jpeg_sizes(data: mmap.mmap) -> Iterator[bytes]:
    """Yield height and width, as four bytes, of each whole JPEG picture at the beginning of the data, back to back."""
    at = 0
    while data[at : at + 3] == b"\xff\xd8\xff":
        at, size = at + 2, b""
        while marker := JPEG_MARKER.search(data, at):
            kind, at = data[marker.start() + 1], marker.end()
            if kind == 0xD8:
                return  # a picture begins before the previous one has ended
            if kind == 0xD9:
                break
            if kind in JPEG_FRAME_HEADERS:
                size = data[at + 3 : at + 7]
            at += int.from_bytes(data[at : at + 2], "big")
        else:
            return
        yield size
