"""Small test clips, made with the ffmpeg that imageio-ffmpeg carries."""

import subprocess
from pathlib import Path

from imageio_ffmpeg import get_ffmpeg_exe


def ffmpeg(*arguments: object) -> bytes:
    """Run ffmpeg and return what it wrote to standard output; its message is the error."""
    command = [get_ffmpeg_exe(), "-nostdin", "-v", "error", "-y", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True)
    assert result.returncode == 0, result.stderr.decode(errors="replace")
    return result.stdout


def make_video(
    path: Path, *options: object, size="160x120", fps: object = 25, seconds: float = 2, sound: str = ""
) -> Path:
    """A counting test card. `options` are ffmpeg output options, `sound` a lavfi source such as "sine"."""
    ffmpeg(
        *("-f", "lavfi", "-i", f"testsrc2=s={size}:r={fps}:d={seconds}"),
        *(("-f", "lavfi", "-i", f"{sound}=d={seconds}") if sound else ()),
        *(options or ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")),
        f"file:{path.absolute()}",
    )
    return path


def make_vfr_video(path: Path, seconds: float = 6) -> Path:
    """Variable frame rate with B-frames, open GOPs and pauses of up to a second."""
    keep = "select='not(mod(n,7))+lt(mod(n,50),20)'"
    ffmpeg(
        *("-f", "lavfi", "-i", f"testsrc2=s=160x120:r=30:d={seconds}", "-vf", keep, "-fps_mode", "vfr"),
        *("-c:v", "libx264", "-pix_fmt", "yuv420p", "-bf", "3", "-g", "20", "-x264-params", "open-gop=1"),
        f"file:{path.absolute()}",
    )
    return path


def make_rotated_video(path: Path, degrees: int = 90, size="160x120", seconds: float = 2) -> Path:
    """Stored lying, shown upright by its rotation flag, as telephones record."""
    lying = make_video(path.with_name(f"lying{path.suffix}"), size=size, seconds=seconds)
    ffmpeg("-display_rotation", degrees, "-i", lying, "-c", "copy", f"file:{path.absolute()}")
    lying.unlink()
    return path


def make_sound(path: Path, *options: object, source="sine=f=440:r=16000", seconds: float = 2) -> Path:
    """A sound file from a lavfi source; `options` are ffmpeg output options."""
    ffmpeg("-f", "lavfi", "-i", f"{source}:d={seconds}", *options, f"file:{path.absolute()}")
    return path


def ffmpeg_messages(*arguments: object) -> str:
    """Run ffmpeg and return all of its messages, however it ends."""
    command = [get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-y", "-loglevel", "debug", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=60).stderr.decode(errors="replace")
