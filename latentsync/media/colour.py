"""Colour between files and RGB frames: matrices, ranges, high dynamic range, opacity."""

import re

import numpy as np

from latentsync.media.info import VideoInfo

# One point of chroma for a 2x2 block on the way in, and their mean on the way out, return the chroma that the
# file had (measured 51 dB on a test card, 36 dB with bicubic both ways).
TO_RGB = "neighbor+accurate_rnd+full_chroma_int"
TO_YUV = "area+accurate_rnd"
RESCALE = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
SCALE_MATRIX = {  # tag of the file -> name that the scale filter takes
    "bt709": "bt709", "fcc": "fcc", "bt470bg": "bt470", "smpte170m": "smpte170m",
    "smpte240m": "smpte240m", "bt2020nc": "bt2020", "bt2020c": "bt2020",
}  # fmt: skip
REFERENCE_WHITE = 203  # cd/m² of HDR that are the white of standard range (ITU-R BT.2408)
KNEE = 0.5  # of linear light, white being 1: darker colours stay as they are, brighter ones are pressed together


def is_rgb(pixel_format: str) -> bool:
    """Whether the pixels carry no YCbCr matrix: RGB, palette or grey."""
    return bool(re.match(r"rgb|bgr|gbr|argb|abgr|0rgb|0bgr|x2rgb|x2bgr|pal8|gray|ya\d|mono", pixel_format))


def scale_matrix(info: VideoInfo) -> str:
    """The scale filter's name of the matrix that belongs to the file; untagged ones as players guess."""
    if info.color_matrix == "gbr" or info.hdr:
        return "bt709"
    long_side, short_side = max(info.width, info.height), min(info.width, info.height)
    guess = "bt709" if long_side >= 1280 or short_side > 576 else "smpte170m"
    return SCALE_MATRIX.get(info.color_matrix, guess)


def scale_range(info: VideoInfo) -> str:
    return "pc" if info.color_range == "pc" and info.color_matrix != "gbr" and not info.hdr else "tv"


def to_standard_range(info: VideoInfo) -> list[str]:
    """Filters from PQ or HLG to BT.709 RGB, through linear light with white at 1."""
    # Where the file is silent, as HDR10 and HLG have it.
    matrix = info.color_matrix if info.color_matrix in SCALE_MATRIX or info.color_matrix == "gbr" else "bt2020nc"
    primaries = "bt2020" if info.color_primaries == "unknown" else info.color_primaries
    range_ = "pc" if info.color_range == "pc" or matrix == "gbr" else "tv"
    return [
        f"setparams=range={range_}:colorspace={matrix}:color_primaries={primaries}:color_trc={info.color_transfer}",
        f"zscale=t=linear:npl={REFERENCE_WHITE}",
        "format=gbrpf32le",
        "zscale=p=bt709",
        f"tonemap=mobius:param={KNEE}:desat=0",
        "zscale=t=bt709:m=gbr:r=full",
        "format=gbrp",
    ]


def on_white(frame: np.ndarray) -> np.ndarray:
    """(h, w, 4) uint8 with opacity → (h, w, 3) uint8: what lies under full transparency is not meant to be seen."""
    colours, opacity = frame[..., :3].astype(np.uint16), frame[..., 3:]
    return ((colours * opacity + 255 * (255 - opacity.astype(np.uint16)) + 127) // 255).astype(np.uint8)
