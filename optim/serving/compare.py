"""Original and result side by side in one video, for whoever is to be shown what has changed."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import cv2
import numpy as np

from latentsync import FPS
from latentsync.errors import UserError
from latentsync.media import COMMENT, probe_audio, probe_video, read_frames, read_frames_looped
from latentsync.media.colour import SCALE_MATRIX
from latentsync.media.writing import AAC_BITRATE, PRESET
from optim.serving.job import COMPARED_SECONDS

MOST_PIXELS = 720  # the shorter side of each half
CRF = 20


def side_by_side(original: Path, result: Path, output: Path, step: Callable[[int, int], None]) -> None:
    """Write the original, forward and backward as the result shows it, left of the result, with the result's sound.

    25 fps, H.264, the first COMPARED_SECONDS; each half is made smaller where its shorter side is over MOST_PIXELS.
    What is held does not grow with the clip. step(frames done, frames in all) is called before every frame; what it
    raises ends the work and leaves an unfinished file behind. Raises UserError where the file cannot be written.
    """
    from moviepy import VideoClip, clips_array  # which takes a second or two

    before, after = probe_video(original), probe_video(result)
    codec = "copy" if probe_audio(result).codec == "aac" else "aac"  # which every player knows, unlike FLAC
    total = min(after.n_frames, COMPARED_SECONDS * FPS)
    scale = min(1.0, MOST_PIXELS / min(before.width, before.height))
    size = tuple(2 * max(1, round(side * scale / 2)) for side in (before.width, before.height))
    # Half a frame more, since moviepy rounds down.
    seconds = (total + 0.5) / FPS
    # Both are read as the pipeline reads: turned upright, at 25 fps, in the colours that their tags name.
    with (
        closing(read_frames_looped(before, total)) as left,
        closing(read_frames(after, count=total)) as right,
    ):
        both = (frame for _, frame in left), right
        halves = [VideoClip(in_order(frames, size), duration=seconds) for frames in both]

        def counted(get_frame: Callable[[float], np.ndarray], t: float) -> np.ndarray:
            step(min(round(t * FPS), total), total)
            return get_frame(t)

        # bg_color: without one moviepy blends the two as if they could be seen through, and is slower.
        array = clips_array([halves], bg_color=(0, 0, 0)).transform(counted)
        tags = after.color_matrix, after.color_primaries, after.color_transfer
        matrix, primaries, transfer = tags if after.color_matrix in SCALE_MATRIX else ("bt709",) * 3
        graph = (
            f"scale=out_color_matrix={SCALE_MATRIX[matrix]}:out_range=tv,format=yuv420p,setsar=1,"
            f"setparams=range=tv:colorspace={matrix}:color_primaries={primaries}:color_trc={transfer}"
        )
        try:
            array.write_videofile(
                str(output), FPS, "libx264", preset=PRESET, audio=str(result), audio_codec=codec, logger=None,
                ffmpeg_params=[
                    "-map", "0:v:0", "-map", "1:a:0", "-b:a", AAC_BITRATE, "-t", f"{total / FPS:.3f}",
                    "-vf", graph, "-crf", str(CRF), "-movflags", "+faststart",
                    "-map_metadata", "-1", "-metadata", f"comment={COMMENT}",
                ],
            )  # fmt: skip
        except OSError as error:
            raise UserError(_unwritten(str(error))) from error
    # moviepy does not look at how ffmpeg ended.
    try:
        whole = probe_video(output).n_frames == total
    except UserError:
        whole = False
    if not whole:
        raise UserError(_unwritten("it was cut short"))


def in_order(frames: Iterator[np.ndarray], size: tuple[int, int]) -> Callable[[float], np.ndarray]:
    """A moviepy frame function over frames that come one after the other at 25 fps, made `size` (width, height)."""
    at, frame = -1, None

    def get_frame(t: float) -> np.ndarray:
        nonlocal at, frame
        while at < round(t * FPS) and (found := next(frames, None)) is not None:
            at, frame = at + 1, found
            if (frame.shape[1], frame.shape[0]) != size:
                frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        return frame

    return get_frame


def _unwritten(why: str) -> str:
    why = why.strip().splitlines()[-1] if why.strip() else "without a message"
    return f"The side-by-side video could not be written ({why}): see whether the disk is full, and try again."
