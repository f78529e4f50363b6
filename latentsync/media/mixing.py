"""Mix stereo down to the mono sound that a listener hears: `mix_down`.

The sum of two channels is silent where one of them is inverted, hollow where they differ in phase, and at half its
amplitude where only one of them speaks. There the louder channel is used instead.
"""

from collections.abc import Iterable, Iterator

import numpy as np

BLOCKS_PER_SECOND = 50  # a block has one weight
PIECE_BLOCKS = 1500  # mixed at a time: 30 s
REACH_BLOCKS = 25  # half a second on either side that a decision looks at: pauses between words change nothing
# Power of the sum relative to the louder channel: 0.5 (uncorrelated) to 1 (identical) in stereo, 0.25 where one channel
# is silent. From SUM on only the sum is used, up to CHANNEL only the louder channel.
SUM, CHANNEL = 0.4, 0.28
LOUDER = 2.0  # the other channel is used once it has this many times the power


def mix_down(chunks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Mix sound down to mono, bit for bit as ffmpeg does wherever the sum of the channels loses nothing.

    chunks: float32 (n, 3): left, right, and the sum as ffmpeg weights it, at `rate` Hz; finite, of any lengths.
    Yields float32 (n,) in pieces that do not depend on the lengths of the chunks. Weights change linearly over a block.
    """
    kernel = np.hanning(2 * REACH_BLOCKS + 3)[1:-1]
    block = rate // BLOCKS_PER_SECOND
    earlier = np.zeros((REACH_BLOCKS, 3))
    last: np.ndarray | None = None  # weights of the block before
    side = 0
    piece, power = np.empty((0, 3), np.float32), np.empty((0, 3))
    for following in _pieces(chunks, PIECE_BLOCKS * block):
        next_power = _block_power(following, block)
        if len(piece):
            later = np.zeros((REACH_BLOCKS, 3))
            later[: len(next_power)] = next_power[:REACH_BLOCKS]
            around = np.concatenate([earlier, power, later])
            smooth = np.stack([np.convolve(channel, kernel, "valid") for channel in around.T], 1)
            weights, side = _weights(smooth, side)
            start = np.concatenate([weights[:1] if last is None else last, weights[:-1]])
            yield _mix(piece, start, weights, block)
            earlier, last = around[len(power) : len(power) + REACH_BLOCKS], weights[-1:]
        piece, power = following, next_power


def _pieces(chunks: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """The samples in pieces of `length`, the last one shorter, then an empty one."""
    waiting: list[np.ndarray] = []
    count = 0
    for chunk in chunks:
        waiting.append(chunk)
        count += len(chunk)
        if count >= length:
            joined = np.concatenate(waiting)
            for start in range(0, count - length + 1, length):
                yield joined[start : start + length]
            waiting = [joined[count // length * length :]]
            count = len(waiting[0])
    if count:
        yield np.concatenate(waiting)
    yield np.empty((0, 3), np.float32)


def _block_power(samples: np.ndarray, block: int) -> np.ndarray:
    """Energy of every block of samples (n, 3), the last one shorter: (blocks, 3)."""
    starts = np.arange(0, len(samples), block)
    return np.add.reduceat(samples.astype(np.float64) ** 2, starts) if len(starts) else np.empty((0, 3))


def _weights(power: np.ndarray, side: int) -> tuple[np.ndarray, int]:
    """Weights (blocks, 2) of left and right against the sum, and the channel in use at the end (0 or 1).

    power: (blocks, 3); side: the channel in use before.
    """
    loudest = power[:, :2].max(1)
    share = np.divide(power[:, 2], loudest, out=np.ones(len(power)), where=loudest > 0)
    weight = np.clip((SUM - share) / (SUM - CHANNEL), 0, 1)
    weights = np.zeros((len(power), 2))
    for i, channels in enumerate(power[:, :2]):
        if channels[1 - side] > LOUDER * channels[side]:
            side = 1 - side
        weights[i, side] = weight[i]
    return weights, side


def _mix(samples: np.ndarray, start: np.ndarray, end: np.ndarray, block: int) -> np.ndarray:
    """Mix samples (n, 3) to mono, with weights (blocks, 2) of left and right at the start and end of every block."""
    mono = samples[:, 2].copy()
    rise = np.linspace(0, 1, block, endpoint=False, dtype=np.float32)[:, None]
    for i in np.flatnonzero((start + end).any(1)):
        here = slice(i * block, (i + 1) * block)
        weights = (start[i] + (end[i] - start[i]) * rise[: len(mono[here])]).astype(np.float32)
        mono[here] += (weights * (samples[here, :2] - samples[here, 2:])).sum(1)
    return mono
