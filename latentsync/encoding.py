"""The end of the chain: finished frames go to the encoder in a thread of their own."""

import numpy as np

from latentsync.hooks import RunHooks
from latentsync.media import VideoWriter
from latentsync.media.segments import SegmentWriter
from latentsync.prefetch import BackgroundConsumer
from latentsync.timing import StageClock
from latentsync.windows import AlignedFrame


class EncodingThread:
    """Writes finished frames in a thread of its own, and reports those that are written. Use it in `closing`.

    counts: what is counted of the written frames, updated in place.
    """

    def __init__(
        self,
        writer: VideoWriter | SegmentWriter,
        depth: int,
        total: int,
        counts: dict[str, int],
        clock: StageClock,
        hooks: RunHooks,
    ):
        self._writer, self._counts, self._clock, self._hooks = writer, counts, clock, hooks
        self._done, self._reported, self._total = writer.frames, 0, total
        self._consumer = BackgroundConsumer(self._write, depth, "writing", hooks.wait, writer.abort)

    def _write(self, item: tuple[np.ndarray, bool, bool]) -> None:
        frame, without_face, recomputed = item
        with self._clock.charge(self._clock.seconds, "writing"):
            self._counts["frames_without_face"] += without_face
            self._counts["frames_computed_again"] += recomputed
            self._writer.write(frame)

    def submit(self, aligned: AlignedFrame) -> None:
        """Hand a frame over as soon as there is room. Raises what writing an earlier one raised."""
        with self._clock.charge(self._clock.waiting, "writing"):
            without_face = aligned.crop is None and not aligned.outside
            self._consumer.submit((aligned.frame, without_face, aligned.recomputed))

    def report(self) -> None:
        """Report the progress of what has been written, and raise what was wrong with it."""
        self._consumer.check()
        while self._reported < self._consumer.completed:
            self._reported += 1
            self._hooks.progress("writing", self._done + self._reported, self._total)

    def finish(self) -> None:
        """Wait until all frames are written."""
        with self._clock.charge(self._clock.waiting, "writing"):
            self._consumer.finish()

    def close(self) -> None:
        self._consumer.close()
