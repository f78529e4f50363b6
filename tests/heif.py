"""HEIF stills for tests: one picture made of tiles, as telephones store theirs."""

import struct
import tempfile
from pathlib import Path

from clips import ffmpeg


def box(kind: bytes, *content: bytes, version: int | None = None, flags: int = 0) -> bytes:
    """A box of an ISO file; with a version it is a full box."""
    head = b"" if version is None else struct.pack(">I", version << 24 | flags)
    body = head + b"".join(content)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def encode_tile(picture: Path, x: int, y: int, side: int) -> tuple[bytes, bytes]:
    """The decoder configuration and the sample of one HEVC tile, cut out of a picture."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tile.mp4"
        ffmpeg(
            *("-i", picture, "-vf", f"crop={side}:{side}:{x}:{y}", "-frames:v", 1, "-pix_fmt", "yuv420p"),
            *("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=error:info=0", "-crf", 4),
            *("-tag:v", "hvc1", path),
        )
        data = path.read_bytes()
    at = data.index(b"hvcC") - 4
    configuration = data[at : at + int.from_bytes(data[at : at + 4], "big")]
    at = data.index(b"mdat") - 4
    return configuration, data[at + 8 : at + int.from_bytes(data[at : at + 4], "big")]


def make_grid(
    path: Path,
    picture: Path,
    columns: int,
    rows: int,
    side: int,
    size: tuple[int, int],
    *,
    turns: int = 0,
    claimed: tuple[int, int] | None = None,
) -> Path:
    """A HEIC file of columns × rows tiles, shown at `size`; `turns` of 90° counterclockwise (irot).

    picture: at least columns·side wide and rows·side high. claimed: the size that the file says, if another.
    """
    tiles = [encode_tile(picture, x * side, y * side, side) for y in range(rows) for x in range(columns)]
    width, height = claimed or size
    grid, count = struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, width, height), len(tiles)
    properties = [
        tiles[0][0],
        box(b"ispe", struct.pack(">II", side, side), version=0),
        box(b"ispe", struct.pack(">II", width, height), version=0),
        box(b"irot", bytes([turns])),
    ]
    shown = [3] + [0x84] * bool(turns)
    entries = struct.pack(">HBB", 1, len(shown), shown[0]) + bytes(shown[1:])
    entries += b"".join(struct.pack(">HBBB", i + 2, 2, 0x81, 2) for i in range(count))
    items = [(1, b"grid", 0), *((i + 2, b"hvc1", 1) for i in range(count))]
    info = [box(b"infe", struct.pack(">HH4s", item, 0, kind), b"\0", version=2, flags=f) for item, kind, f in items]
    head = box(b"ftyp", b"mif1", bytes(4), b"mif1heicmiaf")

    def described(at: int) -> bytes:
        """The meta box, for samples that begin at a place in the file."""
        places, lengths = [], [len(grid), *(len(sample) for _, sample in tiles)]
        for item, length in enumerate(lengths, 1):
            places.append(struct.pack(">HHHII", item, 0, 1, at, length))
            at += length
        return box(
            b"meta",
            box(b"hdlr", bytes(4), b"pict", bytes(13), version=0),
            box(b"pitm", struct.pack(">H", 1), version=0),
            box(b"iloc", b"\x44\0", struct.pack(">H", count + 1), *places, version=0),
            box(b"iinf", struct.pack(">H", count + 1), *info, version=0),
            box(b"iref", box(b"dimg", struct.pack(f">HH{count}H", 1, count, *range(2, count + 2))), version=0),
            box(b"iprp", box(b"ipco", *properties), box(b"ipma", struct.pack(">I", count + 1), entries, version=0)),
            version=0,
        )

    meta = described(len(head) + len(described(0)) + 8)
    path.write_bytes(head + meta + box(b"mdat", grid, *(sample for _, sample in tiles)))
    return path
