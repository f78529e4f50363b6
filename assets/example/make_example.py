"""Make the bundled example again: `face.mp4` (a portrait set in gentle motion) and `speech.wav`.

    .venv/bin/python assets/example/make_example.py [FOLDER]

The portrait is `portrait.png` beside this file; needs the program flite. See SOURCES.md.
"""

import subprocess
import sys
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np

FPS = 25
SECONDS = 3.84
SIDE = 320  # output width and height in pixels
ZOOM = 1.07  # output pixels per pixel of the portrait
OVERSAMPLING = 4  # the portrait is enlarged by this first, so that slow motion is smooth below a pixel

# Places in the 384x384 portrait, (x, y) in pixels.
VIEW_CENTRE = (192.0, 166.0)
NECK = (193.0, 285.0)  # the head sways about this point
HEAD_CENTRE = (191.0, 190.0)
HEAD_RADII = (130.0, 165.0)  # the sway fades out towards this ellipse
EYES = ((159.0, 171.0), (222.0, 170.0))
EYE_RADII = (17.0, 10.0)
EYE_OPENING = 6.0  # height of the open eye; above 0.65 x the radius the warp would fold
BLINKS = (1.3, 3.1)  # seconds
BLINK_HALF_LENGTH = 0.13  # seconds from open to closed

# Of the kind of sentence that the demo model has learnt.
TEXT = "Bin blue at L four please. Set white in A nine again."
VOICE = ("-voice", "slt", "--setf", "duration_stretch=1.15")  # 16 kHz mono


def bump(x: np.ndarray, y: np.ndarray, centre: tuple[float, float], radii: tuple[float, float]) -> np.ndarray:
    """1 at the centre of an ellipse, 0 from its edge on, smooth between."""
    squared_radius = ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2
    return np.clip(1 - squared_radius, 0, 1) ** 2


def source_points(t: float) -> tuple[np.ndarray, np.ndarray]:
    """Where in the portrait each pixel of the frame at `t` seconds lies: x and y, (SIDE, SIDE) each."""
    wave = 2 * np.pi * t / SECONDS
    # The camera: a slow push in, a drift and a slight roll.
    zoom = ZOOM * (1 + 0.02 * np.sin(wave - 1.2))
    roll = np.deg2rad(0.5 * np.sin(wave + 0.4))
    centre = np.add(VIEW_CENTRE, (2.0 * np.sin(wave), 1.0 * np.sin(2 * wave + 0.7)))
    grid = (np.arange(SIDE) - (SIDE - 1) / 2) / zoom
    across, down = np.meshgrid(grid, grid)
    x = centre[0] + np.cos(roll) * across - np.sin(roll) * down
    y = centre[1] + np.sin(roll) * across + np.cos(roll) * down

    # The head: sways about the neck, nods a little; hair and shoulders follow less and less.
    head = bump(x, y, HEAD_CENTRE, HEAD_RADII)
    tilt = np.deg2rad(2.0 * np.sin(1.5 * wave + 0.3) + 0.7 * np.sin(3.5 * wave))
    nod = 1.3 * np.sin(2.5 * wave + 1.0)
    x, y = x + head * tilt * (y - NECK[1]), y - head * (tilt * (x - NECK[0]) + nod)

    # The eyes: a blink draws the upper lid over the eye.
    closed = max(np.clip(1 - abs(t - blink) / BLINK_HALF_LENGTH, 0, 1) for blink in BLINKS)
    closed = closed * closed * (3 - 2 * closed)
    for eye in EYES:
        y = y - closed * EYE_OPENING * bump(x, y, eye, EYE_RADII)
    return x, y


def write_video(path: Path) -> None:
    portrait = cv2.imread(str(Path(__file__).resolve().parent / "portrait.png"))[:, :, ::-1]
    large = cv2.resize(portrait, None, fx=OVERSAMPLING, fy=OVERSAMPLING, interpolation=cv2.INTER_LANCZOS4)
    writer = imageio_ffmpeg.write_frames(
        str(path), (SIDE, SIDE), fps=FPS, codec="libx264", pix_fmt_out="yuv420p", quality=None,
        output_params=[
            "-vf", "scale=out_color_matrix=bt709:out_range=tv",
            "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv",
            "-crf", "18", "-preset", "veryslow", "-movflags", "+faststart",
        ],
    )  # fmt: skip
    writer.send(None)
    for frame in range(round(SECONDS * FPS)):
        x, y = source_points(frame / FPS)
        # Pixel centres at whole numbers, in both pictures.
        x, y = ((axis + 0.5) * OVERSAMPLING - 0.5 for axis in (x, y))
        maps = x.astype(np.float32), y.astype(np.float32)
        picture = cv2.remap(large, *maps, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
        writer.send(np.ascontiguousarray(picture))
    writer.close()


def write_speech(path: Path) -> None:
    subprocess.run(["flite", *VOICE, "-t", TEXT, "-o", str(path)], check=True)  # noqa: S607


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent
    write_video(folder / "face.mp4")
    write_speech(folder / "speech.wav")
