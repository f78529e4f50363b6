"""Colour between files and RGB frames: matrices, ranges, high dynamic range, opacity."""

import re

import numpy as np

from latentsync.media.info import VideoInfo, is_transparent

# Reading repeats the chroma sample of a 2x2 block, and writing averages the block, so that the chroma of the file comes
# back (measured 51 dB on a test card, 36 dB with bicubic both ways).
TO_RGB = "neighbor+accurate_rnd+full_chroma_int"
TO_YUV = "area+accurate_rnd"
RESCALE = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
SCALE_MATRIX = {  # tag of the file -> name that the scale filter takes
    "bt709": "bt709", "fcc": "fcc", "bt470bg": "bt470", "smpte170m": "smpte170m",
    "smpte240m": "smpte240m", "bt2020nc": "bt2020", "bt2020c": "bt2020",
}  # fmt: skip
PLANAR_LAYOUTS = {  # pixel format -> planar one of the same values
    "nv12": "yuv420p", "nv21": "yuv420p", "nv16": "yuv422p", "nv24": "yuv444p", "nv42": "yuv444p",
    "yuyv422": "yuv422p", "uyvy422": "yuv422p", "yvyu422": "yuv422p", "monow": "gray", "monob": "gray",
    "vuya": "yuva444p", "ayuv": "yuva444p", "uyva": "yuva444p", "ayuv64le": "yuva444p16le",
}  # fmt: skip
REFERENCE_WHITE = 203  # cd/m² of HDR that are the white of standard range (ITU-R BT.2408)
KNEE = 0.5  # linear light, white being 1: darker colours stay as they are, brighter ones are compressed


def is_rgb(pixel_format: str) -> bool:
    """Whether the pixels carry no YCbCr matrix: RGB, palette or grey."""
    return bool(re.match(r"rgb|bgr|gbr|argb|abgr|0rgb|0bgr|x2rgb|x2bgr|pal8|gray|ya\d|mono", pixel_format))


def planar_format(pixel_format: str) -> str:
    """The planar format that holds the values of a pixel format, for filters that take no other.

    YCbCr with the usual subsampling, planar RGB and grey stay as they are. Palettes, packed RGB and packed YCbCr are
    only rearranged; rare formats are converted to one of at least their depth.
    """
    name = re.sub(r"be$", "le", pixel_format).replace("yuvj", "yuv")
    if re.fullmatch(r"(yuva?4(20|22|44)p|yuv4(10|11|40)p|gbra?p|gray)((9|1[0246])le)?", name):
        return name
    if name in PLANAR_LAYOUTS:
        return PLANAR_LAYOUTS[name]
    deep = bool(re.search(r"9le|1[0246]le|48le|64le|f32le|f16le|x2|10", name))
    if is_transparent(name):
        return "gbrap16le" if deep else "gbrap"
    if is_rgb(name):
        return "gbrp16le" if deep else "gbrp"
    return "yuv444p16le" if deep else "yuv444p"


def scale_matrix(info: VideoInfo) -> str:
    """The scale filter's name of the file's matrix; without a tag, what players assume for its size."""
    if info.color_matrix == "gbr" or info.hdr:
        return "bt709"
    long_side, short_side = max(info.width, info.height), min(info.width, info.height)
    guess = "bt709" if long_side >= 1280 or short_side > 576 else "smpte170m"
    return SCALE_MATRIX.get(info.color_matrix, info.assumed_matrix or guess)


def scale_range(info: VideoInfo) -> str:
    """The scale filter's name of the file's range: "pc" (full) or "tv" (limited)."""
    return "pc" if info.color_range == "pc" and info.color_matrix != "gbr" and not info.hdr else "tv"


def to_first_format(info: VideoInfo) -> tuple[str, str]:
    """Options of the scale filter, and the filters after it, that give all frames the first one's format and colours.

    Frames with the first one's properties pass unchanged.
    """
    target, flags = planar_format(info.pixel_format), RESCALE
    block = 4 if target in {"yuv410p", "yuv411p"} else 2
    if info.stored_width % block or info.stored_height % block:
        # The pad filter needs whole chroma blocks: repeat the chroma for every pixel.
        target, changed = re.subn(r"4(10|11|20|22|40)p", "444p", target)
        flags = TO_RGB if changed and not info.scaled else RESCALE
    if target.startswith("g"):  # RGB and grey have no matrix
        tags = f"range={info.color_range if info.color_range in {'tv', 'pc'} else 'unknown'}"
        tags += f":colorspace={'unknown' if target.startswith('gray') else 'gbr'}"
        options = f"flags={flags}"
    else:
        matrix = SCALE_MATRIX.get(info.color_matrix, "bt2020") if info.hdr else scale_matrix(info)
        range_ = "pc" if info.color_range == "pc" else "tv"
        options = f"flags={flags}:out_color_matrix={matrix}:out_range={range_}"
        # swscale assumes BT.601 for frames without a tag. Where another matrix was assumed for the first frame, tags of
        # later frames are ignored.
        tagged = info.color_matrix in SCALE_MATRIX
        options += "" if tagged or matrix == "smpte170m" else f":in_color_matrix={matrix}"
        tags = f"range={range_}:colorspace={info.color_matrix if tagged else 'unknown'}"
    return options, f"format={target},setparams={tags}:color_primaries=unknown:color_trc=unknown"


def to_standard_range(info: VideoInfo) -> list[str]:
    """Filters from PQ or HLG to BT.709 RGB, through linear light with white at 1."""
    # Where the file has no tags, those of HDR10 and HLG are assumed.
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
    """(h, w, 4) uint8 RGBA → (h, w, 3) uint8 RGB on white, whatever colours transparent pixels have."""
    colours, opacity = frame[..., :3].astype(np.uint16), frame[..., 3:]
    return ((colours * opacity + 255 * (255 - opacity.astype(np.uint16)) + 127) // 255).astype(np.uint8)
