"""Read frames and sound from files: `read_frames`, `read_frames_looped`, `read_audio`."""

import io
import itertools
import os
import subprocess
import threading
import zlib
from array import array
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe

from latentsync import SAMPLE_RATE
from latentsync.errors import UserError
from latentsync.machine import usable_cores
from latentsync.media.colour import (
    RESCALE,
    TO_RGB,
    on_white,
    scale_matrix,
    scale_range,
    to_first_format,
    to_standard_range,
)
from latentsync.media.info import OPACITY_DECODERS, VideoInfo
from latentsync.media.mixing import mix_down
from latentsync.media.probe import ASPECTS, check_sound_length, find_sound, no_samples_error
from latentsync.media.process import (
    PIPE_BYTES,
    SCAN_LIMITS,
    check_exit,
    check_input,
    input_arguments,
    open_pipe,
    read_limits,
    read_log,
    run_ffmpeg,
    with_timeout,
)

DECODER_THREADS = min(4, usable_cores())  # each holds frames in memory
SEGMENT_FRAMES = 32  # held in memory while playing backward ...
SEGMENT_BYTES = 256 << 20  # ... and their maximal size
SEEK_SECONDS = 1.0  # how far to seek before the first frame: covers reordered and leading pictures
# Time-out for a frame, for every second of video that ffmpeg decodes to get there. 100 Mbit/s from a disk of 0.2 MB/s
# would take just that long.
FRAME_SECONDS = 60.0
SEEKABLE = {"mov", "matroska", "webm"}  # demuxers with an index of the key frames


def read_frames(
    info: VideoInfo, start: int = 0, count: int | None = None, cancel: threading.Event | None = None
) -> Generator[np.ndarray, None, None]:
    """Yield frames start, start + 1, ... of the grid of `info.rate`: (height, width, 3) uint8 RGB, new arrays.

    They are counted from the beginning of the part that `info` stands for (`VideoInfo.between`). Every frame of the
    grid is the nearest one of the file. Frame i is the same whatever `start` is. 10-bit values
    are rounded to 8 bits. Interlaced frames are deinterlaced, transparent parts become white. All frames have the
    first one's size: where it changes, later pictures are fitted into it between black bars. HDR becomes BT.709: up to
    `colour.KNEE`, colours are those of a standard range master; brighter ones are compressed. A damaged file yields
    what can be decoded. Raises UserError if that is nothing, or if ffmpeg takes FRAME_SECONDS for a frame. Closing the
    generator ends ffmpeg; setting `cancel` ends both from another thread, whatever they wait for.
    """
    frames = _decode(info, start, count, _first_margin(info), cancel)
    first = next(frames, None)
    if first is None:
        if start == 0 and count != 0:
            raise UserError(f"{info.path} is damaged, no picture can be decoded; get a complete copy.")
        return
    with closing(frames):
        yield first
        del first
        yield from frames


def _first_margin(info: VideoInfo) -> float | None:
    """How many seconds before a frame to seek, where no pass has shown yet which distance suffices."""
    return max(SEEK_SECONDS, 16 / info.fps) if SEEKABLE & set(info.container.split(",")) else None


def _decode(
    info: VideoInfo, start: int, count: int | None, margin: float | None, cancel: threading.Event | None = None
) -> Generator[np.ndarray, None, None]:
    """Decode after seeking to `margin` seconds before frame `start`; None decodes from the beginning."""
    start += info.first
    if info.stop is not None:
        count = max(info.stop - start, 0) if count is None else min(count, max(info.stop - start, 0))
    if count == 0:
        return
    seek: list[str] = []
    skipped = float(start / info.rate)  # seconds of video to decode before the first frame
    if margin is not None:
        seconds = float(info.start_pts * info.time_base) + skipped - margin
        if seconds > margin:  # otherwise reading from the beginning costs no more
            # Timestamps stay those of the whole file, and the fps filter gets the frames before `start`, so that it
            # chooses as it would have done from the beginning.
            seek = ["-copyts", "-start_at_zero", "-noaccurate_seek", "-ss", f"{seconds:.6f}"]
            skipped = margin
    has_decoder = info.transparent and info.codec in OPACITY_DECODERS
    decoder = [f"-c:{info.select}", OPACITY_DECODERS[info.codec]] if has_decoder else []
    # ffmpeg rebuilds a filter graph when the size, the format or the colour tags of the frames change, which loses the
    # frames that its filters hold. So a first graph, whose filters hold none, makes all frames uniform, and the second
    # one, whose filters need several frames at a time, is never rebuilt.
    arguments = [
        *("-loglevel", "error", "-nostats", "-filter_complex_threads", str(DECODER_THREADS)),
        *(*seek, "-threads", str(1 if info.still else DECODER_THREADS), *decoder, *input_arguments(info.path)),
        *("-filter_complex", f"[0:{info.select}]{_uniform_graph(info)}[uniform]"),
        *("-filter_complex", f"[uniform]{_grid_graph(info, start, count)}[grid]"),
        *("-map", "[grid]", "-fps_mode", "passthrough", "-thread_queue_size", "1", "-f", "rawvideo", "pipe:1"),
    ]
    limits = read_limits(info.width, info.height)
    with run_ffmpeg(arguments, stdout=subprocess.PIPE, limits=limits) as (process, log):
        frames = _read_arrays(open_pipe(process.stdout), (info.height, info.width, 4 if info.transparent else 3))
        frames = map(on_white, frames) if info.transparent else frames
        yield from with_timeout(process, frames, info.path, FRAME_SECONDS * (1 + skipped), FRAME_SECONDS, cancel)
        check_exit(process, messages := read_log(log), info.path)
        if "No such filter" in messages:
            raise UserError(
                f"{info.path} is of high dynamic range (HDR), and the ffmpeg {get_ffmpeg_exe()} was built without "
                "what turns it into standard range (zscale): convert the video to SDR first."
            )


def _uniform_graph(info: VideoInfo) -> str:
    """Filters that give every frame the first one's size, pixel shape, format and colour tags.

    Pictures of another size are fitted into the first one's, between black bars. No filter here may hold a frame. At
    the end of the file the last frame is repeated twice, at the time at which it ends: the end is not signalled to the
    graph after this one, so that its two filters that wait for a next frame would never output the last one.
    """
    width, height, aspect = info.stored_width, info.stored_height, float(info.pixel_aspect)
    ratio = f"if(between(sar,{float(ASPECTS[0])},{float(ASPECTS[1])}),dar,a)/{aspect!r}"
    # Even, except for the whole side; never 0, which would mean the frame's own size.
    fitted_width = f"min({width},max(2,2*round(({height}*{ratio})/2+0.001)))"
    fitted_height = f"min({height},max(2,2*round(({width}/({ratio}))/2+0.001)))"
    options, to_format = to_first_format(info)
    return ",".join(
        [
            f"setpts=PTS-({info.start_pts}):strip_fps=1",  # without a rate, between graphs the time base stays as it is
            "tpad=stop=2:stop_mode=clone",
            f"scale=eval=frame:interl=-1:w='{fitted_width}':h='{fitted_height}':{options}",
            to_format,
            f"pad=eval=frame:w={width}:h={height}:x=-1:y=-1",
            "setsar=1",
        ]
    )


def _grid_graph(info: VideoInfo, start: int, count: int | None) -> str:
    """Filters from uniform frames to `count` frames of the grid, from frame `start` on, in RGB."""
    end = "" if count is None or info.still else f":end_pts={start + count}"
    color = f":in_color_matrix={scale_matrix(info)}:in_range={scale_range(info)}"
    color = "" if info.color_matrix == "gbr" or info.hdr else color
    return ",".join(
        [
            # Only frames that are marked as interlaced; of these the earlier field is kept, and its time.
            *(
                ("bwdif=mode=send_frame:deint=interlaced", f"fps={info.rate}")
                if not info.still
                else ("trim=end_frame=1",)
            ),
            f"trim=start_{'frame' if info.still else 'pts'}={start}{end}",
            *(to_standard_range(info) if info.hdr else ()),
            f"scale=w={info.width}:h={info.height}:flags={RESCALE if info.scaled else TO_RGB}{color}",
            "format=rgba" if info.transparent else "format=rgb24",
        ]
    )


def _read_arrays(pipe: io.FileIO, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """New uint8 arrays, as long as the pipe fills them."""
    array = np.empty(shape, np.uint8)
    while _fill(pipe, array):
        yield array
        array = np.empty(shape, np.uint8)


def _fill(pipe: io.FileIO, array: np.ndarray) -> bool:
    view = array.data.cast("B")
    position = 0
    while position < len(view):
        count = pipe.readinto(view[position:])
        if not count:
            return False
        position += count
    return True


def read_frames_looped(
    info: VideoInfo, count: int, cancel: threading.Event | None = None, ahead: int = 0
) -> Generator[tuple[int, np.ndarray], None, None]:
    """Yield `count` pairs (source index, frame), forward, backward and so on: 0..n-1, n-1..0, 0..n-1, ...

    The frames are those of `read_frames`, new arrays; n is how many can be decoded. Backward passes seek to short
    segments, so that no more than SEGMENT_FRAMES, or SEGMENT_BYTES, are in memory. The first pass records a checksum of
    every frame; a segment that does not match is decoded again from further back. cancel: as in `read_frames`.
    ahead: frames that may follow the last one, where the first pass has them.
    """
    if count <= 0:
        return
    limit = min(SEGMENT_FRAMES, max(8, SEGMENT_BYTES // (info.width * info.height * 3)))
    sums = array("L")
    clip: list[np.ndarray] = []  # all frames of a short clip or still picture, otherwise empty
    with closing(read_frames(info, cancel=cancel)) as frames:
        for i, frame in enumerate(frames):
            sums.append(_checksum(frame))
            if i < limit and info.n_frames <= limit:
                clip.append(frame.copy())
            elif i == limit:
                clip.clear()
            yield i, frame
            if i + 1 == count + ahead:
                return
    n = len(sums)
    if n >= count:
        return
    margin = max(SEEK_SECONDS, 16 / info.fps)
    margins: list[float | None] = [margin, 10 * margin, None]
    left = count - n
    for direction in itertools.cycle((-1, 1)):
        if clip:
            pairs = ((i, clip[i].copy()) for i in range(n)[::direction])
        elif direction > 0:
            pairs = _forward(info, n, cancel)
        else:
            pairs = _backward(info, sums, limit, margins, cancel)
        with closing(pairs):
            yield from itertools.islice(pairs, left)
        left -= n
        if left <= 0:
            return


def _forward(info: VideoInfo, n: int, cancel: threading.Event | None) -> Generator[tuple[int, np.ndarray], None, None]:
    with closing(_decode(info, 0, n, _first_margin(info) if info.first else None, cancel)) as frames:
        yield from enumerate(frames)


def _backward(
    info: VideoInfo, sums: array, limit: int, margins: list[float | None], cancel: threading.Event | None
) -> Generator[tuple[int, np.ndarray], None, None]:
    """Frames n-1 ... 0, segment by segment. Seek distances that were too short are removed from `margins`."""
    for end in range(len(sums), 0, -limit):
        start = max(0, end - limit)
        while True:
            segment = list(_decode(info, start, end - start, margins[0], cancel))
            if margins[0] is None or array("L", map(_checksum, segment)) == sums[start:end]:
                break
            margins.pop(0)
        if len(segment) != end - start:
            raise UserError(
                f"{info.path} gives fewer frames than when it was first read, it has changed or is damaged; "
                "get a complete copy and start again."
            )
        for i in range(end - 1, start - 1, -1):
            yield i, segment.pop()


def _checksum(frame: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(frame[::8]).data)


def read_audio(path: str | os.PathLike, rate: int = SAMPLE_RATE, track: int | None = None) -> np.ndarray:
    """A whole sound track of a file: (samples,) float32 mono in [-1, 1] at `rate` Hz.

    track: its number, from 1; None: the first one with the default flag, else the first. The array begins with the
    track's first sample; gaps in its timestamps are silence. Channels are mixed by `mix_down`. Raises UserError for
    files that cannot be used.
    """
    path = Path(path)
    check_input(path, "sound")
    _, chosen = find_sound(path, track)
    # rematrix_maxval: weights add up to at most 1, as for 16-bit output; otherwise two equal channels would clip.
    resample = f"aresample={rate}:async=1:osf=flt:rematrix_maxval=1:ochl="
    # amerge orders channels by position: left, right, centre, which is the mono sum.
    graph = f"asplit[a][b];[a]{resample}stereo[pair];[b]{resample}mono[sum];[pair][sum]amerge"
    arguments = [
        *("-loglevel", "error", "-nostats", *input_arguments(path), "-map", f"0:{chosen.index}", "-af", graph),
        *("-c:a", "pcm_f32le", "-f", "f32le", "pipe:1"),
    ]
    data = bytearray()
    with run_ffmpeg(arguments, stdout=subprocess.PIPE, limits=SCAN_LIMITS) as (process, log):
        pipe = open_pipe(process.stdout)
        chunks = with_timeout(process, iter(lambda: pipe.read(PIPE_BYTES), b""), path)
        for samples in mix_down(_stereo_and_sum(chunks, path, rate), rate):
            data += samples.tobytes()
        check_exit(process, read_log(log), path)
    if not data:
        raise no_samples_error(path)
    return np.frombuffer(data, np.float32)


def _stereo_and_sum(chunks: Iterable[bytes], path: Path, rate: int) -> Iterator[np.ndarray]:
    """Samples (n, 3) in [-1, 1] from the bytes of float32 frames. Raises UserError if the sound is too long."""
    data, frames = b"", 0
    for chunk in chunks:
        data += chunk
        whole = len(data) // 12 * 12  # bytes of complete frames
        samples = np.frombuffer(data[:whole], np.float32).reshape(-1, 3)
        data = data[whole:]
        frames += len(samples)
        check_sound_length(path, frames / rate)
        # A NaN, which a float WAV may hold, would spoil everything that the audio encoder takes with it.
        yield np.clip(np.nan_to_num(samples), -1, 1)
