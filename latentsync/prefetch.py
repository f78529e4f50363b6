"""Stages that work at the same time, each in a thread of its own, with bounded queues between them.

`prefetch` lets a stage work ahead of its consumer, `BackgroundConsumer` lets one work behind its producer. Errors come
out where the items would have; closing ends the thread, and what it was reading, before it returns. `in_background`
runs a single piece of work beside the stages.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.1  # on Windows Ctrl-C does not interrupt a longer wait for another thread
GRACE_SECONDS = 1.0  # that an item may still take when its thread is to end, before it is interrupted
OnWait = Callable[[], None]  # called every POLL_SECONDS by a thread that waits for another; may raise to end the wait
END = object()


def close(items: Any) -> None:
    """Close an iterator, if it is of a kind that can be closed."""
    if hasattr(items, "close"):
        items.close()


def prefetch(
    items: Iterable[T],
    depth: int,
    name: str,
    on_wait: OnWait | None = None,
    interrupt: Callable[[], None] = lambda: None,
) -> Generator[T, None, None]:
    """The same items, made by a thread called `name` up to `depth` (from 1) of them early, plus the one it is making.

    The thread starts when the first item is requested. What the items raise is raised here, after the items before it.
    Closing this iterator stops the thread as soon as its current item is done, even if nobody takes any; it closes
    `items` itself, and has ended when `close` returns. on_wait: called by the consumer's thread while it waits;
    interrupt: called at the end, to make the current item be done soon.
    """
    buffer: queue.Queue = queue.Queue(depth)
    stop = threading.Event()
    thread = threading.Thread(target=_produce, args=(items, buffer, stop), name=name, daemon=True)
    try:
        thread.start()
        while True:
            try:
                item, error = buffer.get(timeout=POLL_SECONDS)
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
        _empty(buffer)  # makes room for the one item that the thread may be waiting to hand over
        _join(thread)


def _produce(items: Iterable[T], buffer: queue.Queue, stop: threading.Event) -> None:
    """The thread of `prefetch`: puts (item, None) for every item, then (END, None) or (END, error)."""
    error: BaseException | None = None
    try:
        try:
            items = iter(items)
            for item in items:
                buffer.put((item, None))
                del item
                if stop.is_set():
                    return
        finally:
            close(items)
    except BaseException as raised:  # the consumer is to see every error, also those that are no Exception
        error = raised
    finally:
        if not stop.is_set():
            buffer.put((END, error))


class BackgroundConsumer(Generic[T]):
    """Calls `work` with each submitted item in a thread called `name`, in order, up to `depth` (from 1) items behind.

    `completed` counts the finished items. on_wait: called by the submitting thread while it waits; interrupt: makes
    `work` end soon, whatever it is waiting for. Use it in `contextlib.closing`.
    """

    def __init__(
        self,
        work: Callable[[T], None],
        depth: int,
        name: str,
        on_wait: OnWait | None = None,
        interrupt: Callable[[], None] = lambda: None,
    ):
        self.completed = 0
        self._work, self._on_wait, self._interrupt = work, on_wait, interrupt
        self._queue: queue.Queue = queue.Queue(depth)
        self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._consume, name=name, daemon=True)
        self._thread.start()

    def _consume(self) -> None:
        try:
            while (item := self._queue.get()) is not END and not self._stopped:
                self._work(item)
                del item  # not held while waiting for the next
                self.completed += 1
        except BaseException as error:
            self._error = error

    def submit(self, item: T) -> None:
        """Hand an item over as soon as there is room; raises what `work` raised on an earlier one."""
        self._put(item)

    def check(self) -> None:
        """Raise what `work` has raised, if it has."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until all items are done; raises what `work` raised. No item can be submitted afterwards."""
        self._put(END)
        _join(self._thread, self._on_wait)
        self.check()

    def close(self) -> None:
        """End the thread and drop the waiting items; the current one is finished, or interrupted after a while."""
        self._stopped = True
        _empty(self._queue)
        self._queue.put(END)
        self._thread.join(GRACE_SECONDS)
        while self._thread.is_alive():
            self._interrupt()
            self._thread.join(POLL_SECONDS)

    def _put(self, item: object) -> None:
        while True:
            self.check()
            try:
                return self._queue.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                if self._on_wait:
                    self._on_wait()


def _empty(items: queue.Queue) -> None:
    try:
        while True:
            items.get_nowait()
    except queue.Empty:
        pass


def _join(thread: threading.Thread, on_wait: OnWait | None = None) -> None:
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        if on_wait:
            on_wait()


@contextmanager
def in_background(work: Callable[[], None], name: str) -> Iterator[Callable[[], None]]:
    """Run `work` in a thread called `name`; yields a function that waits for its end and raises what it has raised.

    The end of the block waits, too, since the work may use what exists no longer afterwards; but not where the user
    interrupts it.
    """
    ended: Future[None] = Future()

    def run() -> None:
        try:
            work()
            ended.set_result(None)
        except BaseException as error:
            ended.set_exception(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()

    def wait() -> None:
        _join(thread)
        ended.result()

    try:
        yield wait
    except Exception:
        with suppress(Exception):
            wait()
        raise
    wait()
