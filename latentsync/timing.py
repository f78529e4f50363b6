"""How long each stage of a chain of iterators works, and how long others wait for it."""

import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from latentsync.prefetch import close

T = TypeVar("T")
END = object()


class StageClock:
    """Seconds that each stage of a chain of iterators was busy, and that other threads waited for it.

    A stage's time is its own, without that of the stages inside it and without waiting. Stages may run in several
    threads, but each in one at a time.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        # The tracker waits for "reading"; cutting out for "faces" and "sound"; the device for "crops" and "writing".
        self.waiting: dict[str, float] = {}
        self._thread = threading.local()  # .inner: seconds charged since the innermost open charge began

    @contextmanager
    def charge(self, account: dict[str, float], stage: str) -> Iterator[None]:
        """Charge the time of the block, less what was charged within it, to the stage; `account`: one of the two."""
        outer, self._thread.inner = getattr(self._thread, "inner", 0.0), 0.0
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            account[stage] = account.get(stage, 0.0) + spent - self._thread.inner
            self._thread.inner = outer + spent

    def time(self, items: Iterable[T], stage: str) -> Generator[T, None, None]:
        """Pass the items on; making them is the work of `stage`. Closing this closes them."""
        return self._charged(items, self.seconds, stage)

    def wait(self, items: Iterable[T], stage: str) -> Generator[T, None, None]:
        """Pass the items on, which `stage` makes in another thread."""
        return self._charged(items, self.waiting, stage)

    def _charged(self, items: Iterable[T], account: dict[str, float], stage: str) -> Generator[T, None, None]:
        items = iter(items)
        try:
            while True:
                with self.charge(account, stage):
                    item = next(items, END)
                if item is END:
                    return
                yield item  # type: ignore[misc]  # mypy does not tell END from the items
                del item
        finally:
            close(items)
