"""Cuts of a video: where a new shot begins, judged by small thumbnails of the frames.

cuts = CutDetector()
for frame in frames:
    cuts.add(frame)
    if cuts.is_clear_cut(): ...
    if cuts.is_cut(cuts.last - cuts.reach): ...
"""

from collections import deque
from itertools import islice

import cv2
import numpy as np

BLOCKS = 8  # blocks along a side of a thumbnail, and pixels along a side of a block
REACH = 5  # frames at 25 a second to either side that `is_cut` looks at
HISTORY = 22  # thumbnails: those of the frames whose shot is not settled; twice the reach more are held
FLAT = 2.0  # grey levels of deviation; a block with less has no texture to compare
MIN_CORRELATION = 0.5  # of grey values of the same picture; with less it is a different one
MAX_SAME = 0.25  # share of the blocks that may stay the same picture at a clear cut
MIN_DIFFERENT = 0.3  # share of the blocks with texture that differ after a cut; a flash leaves more of them alike
MIN_CHANGE = 2.5  # grey levels by which a cut changes the picture, apart from brightness and contrast
MIN_RATIO = 3.5  # change at a cut over that between other frames near it: motion lasts, a cut does not
MAX_RETURN = 0.5  # of the change at a cut: a picture that comes back nearer than that was hidden by a flash


class CutDetector:
    """Thumbnails of the last frames, and how much each frame differs from the one before it.

    reach: frames to either side that `is_cut` looks at.
    """

    def __init__(self, reach: int = REACH) -> None:
        self.reach = reach
        self.last = -1  # number of the newest frame, from 0
        self._thumbnails: deque[np.ndarray] = deque(maxlen=HISTORY + 2 * reach)
        self._changes: deque[float] = deque(maxlen=HISTORY + 2 * reach)

    def add(self, frame: np.ndarray) -> None:
        """Take the next frame, uint8 RGB (H, W, 3)."""
        self.last += 1
        self._thumbnails.append(thumbnail(frame))
        self._changes.append(change(*self._newest_pair()))

    def is_clear_cut(self) -> bool:
        """Whether a new shot certainly begins with the newest frame."""
        return is_clear_cut(*self._newest_pair())

    def changed_blocks(self) -> int:
        """Blocks of the newest frame that show another picture than in the frame before it."""
        return int(differing_blocks(*self._newest_pair()).sum())

    def is_cut(self, number: int) -> bool:
        """Whether a new shot begins with frame `number`, judged by up to `reach` frames to either side.

        Unlike `is_clear_cut` it also finds cuts between similar pictures, as of one camera. A cut changes the picture
        once, while motion lasts, and after a flash the picture from before it returns. If it is clearly another picture
        it may return, too, and another cut may be near, but not in the very next frame.
        """
        index = number - self.last + len(self._changes) - 1
        first = max(index - self.reach, 0)
        thumbnails = list(islice(self._thumbnails, first, index + self.reach + 1))
        changes = list(islice(self._changes, first, index + self.reach + 1))
        index -= first
        at_cut = changes.pop(index)
        if at_cut < MIN_CHANGE:
            return False
        old, new = thumbnails[:index], thumbnails[index:]
        spread = np.stack([old[-1].std(1), new[0].std(1)])
        different = (spread.min(0) > FLAT) & (correlation(old[-1], new[0]) <= MIN_CORRELATION)
        if different.sum() > MIN_DIFFERENT * (spread.max(0) > FLAT).sum():
            before = max(index - 1, 0)
            adjacent, farther = changes[before : index + 1], sorted(changes[:before] + changes[index + 1 :])
            return at_cut > MIN_RATIO * max(adjacent + farther[:-1], default=0.0)
        returns = [change(old[-1], later) for later in new[1:]] + [change(earlier, new[0]) for earlier in old[:-1]]
        return at_cut > MIN_RATIO * max(changes, default=0.0) and at_cut < min(returns, default=np.inf) / MAX_RETURN

    def _newest_pair(self) -> tuple[np.ndarray, np.ndarray]:
        """The thumbnails of the frame before the newest one and of the newest; the first frame is its own before."""
        return self._thumbnails[max(len(self._thumbnails) - 2, 0)], self._thumbnails[-1]


def thumbnail(frame: np.ndarray) -> np.ndarray:
    """The frame's grey values in blocks: (BLOCKS**2, BLOCKS**2) float32, one block per row."""
    step = max(1, min(frame.shape[:2]) // 256)
    side = BLOCKS * BLOCKS
    small = cv2.resize(frame[::step, ::step, 1], (side, side), interpolation=cv2.INTER_AREA)
    small = small.astype(np.float32)
    return small.reshape(BLOCKS, BLOCKS, BLOCKS, BLOCKS).swapaxes(1, 2).reshape(side, side)


def is_clear_cut(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether two thumbnails are of different shots: neither the whole picture nor most of the blocks correlate.

    Brightness and contrast do not matter, so a flash is no cut; nor is a person who steps in, since the other blocks
    stay as they were.
    """
    if correlation(before.reshape(1, -1), after.reshape(1, -1))[0] > MIN_CORRELATION:
        return False
    different = differing_blocks(before, after)
    return len(different) > 0 and bool(different.mean() > 1 - MAX_SAME)


def change(before: np.ndarray, after: np.ndarray) -> float:
    """Mean difference of two thumbnails in grey levels, apart from brightness and, up to a factor of 4, contrast."""
    before, after = before - before.mean(), after - after.mean()
    gain = np.clip((before * after).mean() / max((before**2).mean(), FLAT**2), 0.25, 4)
    return float(np.abs(after - gain * before).mean())


def differing_blocks(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Which of the blocks with texture in one of two thumbnails show another picture, bool."""
    textured = np.maximum(before.std(1), after.std(1)) > FLAT
    return correlation(before, after)[textured] <= MIN_CORRELATION


def correlation(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The correlation of each two rows, about 0 if one of them is flat."""
    before, after = (blocks - blocks.mean(1, keepdims=True) for blocks in (before, after))
    spread = np.maximum(before.std(1), FLAT) * np.maximum(after.std(1), FLAT)
    return (before * after).mean(1) / spread
