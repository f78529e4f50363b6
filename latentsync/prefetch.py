"""Stages that work at the same time, each in a thread of its own, with bounded queues between them.

`ahead` lets a stage run ahead of the one that takes from it, `Behind` lets one follow. Errors come out where the
items would have; closing ends the thread, and what it was reading, before it returns.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
POLL = 0.1  # seconds; on Windows Ctrl-C does not interrupt a longer wait for another thread
GRACE = 1.0  # seconds that an item may still take when its thread is to end, before it is interrupted
OnWait = Callable[[], None]  # called every POLL seconds by a thread that waits for another; may raise to end the wait
END = object()


def close(items: Any) -> None:
    """Close an iterator, if it is of a kind that can be closed."""
    if hasattr(items, "close"):
        items.close()


def ahead(
    items: Iterable[T],
    depth: int,
    name: str,
    on_wait: OnWait | None = None,
    interrupt: Callable[[], None] = lambda: None,
) -> Iterator[T]:
    """The same items, made by a thread called `name` up to `depth` (from 1) of them ahead, and one in its hand.

    The thread starts with the first item that is asked for. What the items raise is raised here, after the items
    before it. Closing this iterator stops the thread as soon as the item in its hand is done, even if nobody takes
    any; it closes `items` itself, and has ended when `close` returns. on_wait: called by the thread that takes items
    while it waits; interrupt: called at the end, to make the item in the other's hand be done soon.
    """
    made: queue.Queue = queue.Queue(depth)
    stop = threading.Event()
    thread = threading.Thread(target=_make, args=(items, made, stop), name=name, daemon=True)
    try:
        thread.start()
        while True:
            try:
                item, error = made.get(timeout=POLL)
            except queue.Empty:
                if on_wait:
                    on_wait()
                continue
            if error is not None:
                raise error
            if item is END:
                return
            yield item
            del item  # not held while waiting for the next
    finally:
        stop.set()
        interrupt()
        _empty(made)  # room for the one item that the thread may be holding out
        _join(thread)


def _make(items: Iterable[T], made: queue.Queue, stop: threading.Event) -> None:
    """What `ahead`'s thread does: put (item, None) for every item, then (END, None) or (END, error)."""
    error: BaseException | None = None
    try:
        try:
            items = iter(items)
            for item in items:
                made.put((item, None))
                del item
                if stop.is_set():
                    return
        finally:
            close(items)
    except BaseException as raised:  # also those that are no Exception: the consumer is to see every one
        error = raised
    finally:
        if not stop.is_set():
            made.put((END, error))


class Behind(Generic[T]):
    """Does `work` on the items it is given in a thread called `name`, in order, up to `depth` (from 1) behind.

    `done` counts the items that are finished. on_wait: called by the thread that hands items over while it waits;
    interrupt: makes `work` end soon, whatever it is waiting for. Use it in `contextlib.closing`.
    """

    def __init__(
        self,
        work: Callable[[T], None],
        depth: int,
        name: str,
        on_wait: OnWait | None = None,
        interrupt: Callable[[], None] = lambda: None,
    ):
        self.done = 0
        self._work, self._on_wait, self._interrupt = work, on_wait, interrupt
        self._given: queue.Queue = queue.Queue(depth)
        self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._follow, name=name, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        try:
            while (item := self._given.get()) is not END and not self._stopped:
                self._work(item)
                del item  # not held while waiting for the next
                self.done += 1
        except BaseException as error:
            self._error = error

    def give(self, item: T) -> None:
        """Hand an item over, as soon as there is room; raises what `work` raised on an earlier one."""
        while True:
            self.check()
            try:
                return self._given.put(item, timeout=POLL)
            except queue.Full:
                if self._on_wait:
                    self._on_wait()

    def check(self) -> None:
        """Raise what `work` has raised, if it has."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until all items are done; raises what `work` raised. No item can be given afterwards."""
        self.give(END)
        _join(self._thread, self._on_wait)
        self.check()

    def close(self) -> None:
        """End the thread, and drop what waits: the item in its hand is finished, or interrupted after GRACE seconds."""
        self._stopped = True
        _empty(self._given)
        self._given.put(END)
        self._thread.join(GRACE)
        while self._thread.is_alive():
            self._interrupt()
            self._thread.join(POLL)


def _empty(items: queue.Queue) -> None:
    try:
        while True:
            items.get_nowait()
    except queue.Empty:
        pass


def _join(thread: threading.Thread, on_wait: OnWait | None = None) -> None:
    while thread.is_alive():
        thread.join(POLL)
        if on_wait:
            on_wait()
