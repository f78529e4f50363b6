"""How far more GPUs help, on paper: the dispatch of `workers` simulated with measured stage times.

    python -m optim.cluster.scaling

A film of ten minutes in 1080p. The driver's stages have as many cores as help them: two to decode, MAX_LANDMARKERS to
follow, ENCODER_CORES for x264. Groups go to workers as in `workers.RayWorkers`: QUEUED for each, AHEAD times as many
held, results in order. The first eight GPUs are in the driver's machine, the others behind its link.
"""

import heapq
import random
from collections import deque
from dataclasses import dataclass

from latentsync.landmarks import MAX_LANDMARKERS
from latentsync.settings import WINDOW

FRAMES = 15_000
QUEUED, AHEAD = 3, 2  # as in `actor` and `workers`, whose import needs Ray
LOCAL_GPUS = 8
LINK = 1.25e9  # bytes a second: 10 Gbit/s, each way
SPREAD = 0.02  # of painting times, to either side
# Seconds of a core a frame of 1080p, on the two cores of an AMD EPYC that the other figures of a processor are from.
DECODE, FOLLOW, CROP, ENCODE = 0.010, 0.028, 0.005, 0.112
MAIN_THREAD = 0.0012  # packing and unpacking
ENCODER_CORES = 16  # more threads do not make x264 faster at this size
FRONT = max(DECODE / 2, FOLLOW / MAX_LANDMARKERS, CROP)  # seconds a frame: these three work at the same time
BACK = ENCODE / ENCODER_CORES


@dataclass(frozen=True)
class Case:
    """A row: seconds a window and windows a pass of docs/speed.md (one H100), bytes a frame to a worker and back."""

    name: str
    window: float
    windows: int
    up: float
    down: float = 1.4e6


CASES = (
    Case("512 px, conservative", 1.972, 1, 2.3e6),
    Case("512 px, balanced", 0.978, 1, 2.3e6),
    Case("512 px, aggressive", 0.585, 1, 2.3e6),
    Case("256 px, conservative", 0.464, 2, 1.7e6),
    Case("256 px, balanced", 0.226, 3, 1.7e6),
    Case("256 px, aggressive", 0.135, 4, 1.7e6),
)


def frames_per_second(case: Case, gpus: int, front: float = FRONT, back: float = BACK, link: float = LINK) -> float:
    """Simulated throughput; front, back: seconds a frame of the driver's stages before and after the workers."""
    rng = random.Random(0)  # noqa: S311
    frames = WINDOW * case.windows
    held: deque[float] = deque()  # when each group that is held was written, in order
    free = [(0.0, worker) for worker in range(gpus)]  # when a worker can start its next group
    inbox = {worker: deque([0.0] * QUEUED) for worker in range(gpus)}  # when each of its places is free
    ready = sent = received = written = 0.0
    done: list[float] = []
    heapq.heapify(free)
    for _ in range(FRAMES // frames):
        if len(held) == AHEAD * QUEUED * gpus:
            ready = max(ready, held.popleft())
        ready += max(front, MAIN_THREAD) * frames
        idle, worker = heapq.heappop(free)
        at = max(ready, inbox[worker].popleft())
        if worker >= LOCAL_GPUS:
            at = sent = max(sent, at) + case.up * frames / link
        end = max(at, idle) + case.window * case.windows * rng.uniform(1 - SPREAD, 1 + SPREAD)
        heapq.heappush(free, (end, worker))
        inbox[worker].append(end)
        if worker >= LOCAL_GPUS:
            end = received = max(received, end) + case.down * frames / link
        done.append(end)
        written = max(written, end) + back * frames
        held.append(written)
    return FRAMES / written


def main() -> None:
    counts = (1, 2, 4, 8, 16, 64)
    print("frames a second      ", *(f"{count:>6}" for count in counts), "  limit")
    for case in CASES:
        rates = [frames_per_second(case, count) for count in counts]
        print(f"{case.name:21}", *(f"{rate:6.0f}" for rate in rates), f" {min(1 / FRONT, 1 / BACK):.0f}")
    print("without the driver's limits (only the link of 10 Gbit/s)")
    for case in CASES:
        rates = [frames_per_second(case, count, front=0, back=0) for count in counts]
        print(f"{case.name:21}", *(f"{rate:6.0f}" for rate in rates))


if __name__ == "__main__":
    main()
