"""Stages in threads of their own: order, errors, stopping, and that they really overlap."""

import gc
import threading
import time
from contextlib import closing

import pytest

from latentsync.prefetch import BackgroundConsumer, prefetch


class Broken(Exception):
    pass


@pytest.fixture(autouse=True)
def no_thread_stays():
    before = threading.enumerate()
    yield
    assert threading.enumerate() == before


def until(true) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def numbers(count, taken=None, closed=None, error=None):
    """0 … count - 1; notes what has been taken and in which thread it ended."""
    try:
        for i in range(count):
            if taken is not None:
                taken.append(i)
            yield i
        if error is not None:
            raise error
    finally:
        if closed is not None:
            closed.append(threading.current_thread().name)


@pytest.mark.parametrize("depth", [1, 3, 200])
def test_items_come_complete_and_in_order(depth):
    assert list(prefetch(range(100), depth, "numbers")) == list(range(100))
    assert list(prefetch(prefetch(numbers(100), depth, "one"), depth, "two")) == list(range(100))
    assert list(prefetch([], depth, "nothing")) == []
    assert list(prefetch([None, False], depth, "empty items")) == [None, False]


@pytest.mark.parametrize("depth", [1, 4])
def test_the_producer_is_as_far_ahead_as_it_may_be(depth):
    taken = []
    with closing(prefetch(numbers(100, taken), depth, "numbers")) as items:
        assert next(items) == 0
        until(lambda: len(taken) == depth + 2)  # one is out, `depth` wait, and one is in its hand
        time.sleep(0.05)
        assert len(taken) == depth + 2


def test_what_the_producer_raises_comes_after_the_items_before_it():
    closed, seen = [], []
    with pytest.raises(Broken):
        for item in prefetch(prefetch(numbers(5, closed=closed, error=Broken()), 2, "inner"), 8, "outer"):
            seen.append(item)
    assert seen == [0, 1, 2, 3, 4] and closed == ["inner"]


def test_items_that_cannot_be_iterated_are_an_error_of_the_consumers():
    with pytest.raises(TypeError):
        next(prefetch(7, 1, "seven"))


@pytest.mark.parametrize("depth", [1, 5])
def test_closing_stops_a_blocked_producer_in_its_own_thread(depth):
    taken, closed = [], []
    items = prefetch(numbers(10**9, taken, closed), depth, "numbers")
    next(items)
    until(lambda: len(taken) == depth + 2)
    began = time.monotonic()
    items.close()
    assert time.monotonic() - began < 10  # next to nothing on an idle machine
    assert closed == ["numbers"]
    assert len(taken) == depth + 2


def test_closing_reaches_through_a_chain_of_threads():
    closed = []

    def outer():
        with closing(prefetch(numbers(10**9, closed=closed), 2, "inner")) as items:
            yield from items

    items = prefetch(outer(), 2, "outer")
    next(items)
    items.close()
    assert closed == ["inner"]


def test_an_abandoned_consumer_stops_the_producer():
    closed = []
    for item in prefetch(numbers(10**9, closed=closed), 2, "numbers"):
        if item == 3:
            break
    del item
    gc.collect()
    assert closed == ["numbers"]


def test_a_consumer_that_fails_stops_the_producer():
    closed = []
    with pytest.raises(Broken), closing(prefetch(numbers(10**9, closed=closed), 2, "numbers")) as items:
        for item in items:
            if item == 3:
                raise Broken
    assert closed == ["numbers"]


def test_nothing_is_started_before_the_first_item_is_wanted():
    taken = []
    before = threading.enumerate()
    items = prefetch(numbers(3, taken), 2, "numbers")
    assert threading.enumerate() == before and taken == []
    items.close()
    assert list(items) == [] and taken == []


def test_work_is_done_in_order_behind():
    done = []
    with closing(BackgroundConsumer(done.append, 3, "work")) as work:
        for i in range(100):
            work.submit(i)
            assert i - 5 < work.completed <= i + 1
        work.finish()
        assert done == list(range(100)) and work.completed == 100


def test_what_the_work_raises_reaches_whoever_gives():
    def fail(item):
        if item == 3:
            raise Broken

    with pytest.raises(Broken), closing(BackgroundConsumer(fail, 2, "work")) as work:
        for i in range(100):
            work.submit(i)
    assert work.completed == 3 and i <= 6


@pytest.mark.parametrize("ask", ["check", "finish"])
def test_what_the_last_work_raises_is_not_lost(ask):
    def fail(item):
        raise Broken

    with closing(BackgroundConsumer(fail, 2, "work")) as work:
        work.submit(0)
        until(lambda: not work._thread.is_alive())
        with pytest.raises(Broken):
            getattr(work, ask)()


def test_closing_drops_what_waits():
    begun, go_on = threading.Event(), threading.Event()
    done = []

    def slow(item):
        begun.set()
        go_on.wait(10)
        done.append(item)

    with closing(BackgroundConsumer(slow, 3, "work")) as work:
        for i in range(4):
            work.submit(i)
        begun.wait(10)
        timer = threading.Timer(0.05, go_on.set)
        timer.start()
    timer.join()
    assert done == [0]


def test_stages_overlap():
    """Three meet at every item from the third on, each with another one in its hand."""
    at_once = threading.Barrier(3)

    def meet(item: int, first: int) -> int:
        if first <= item < first + 28:
            at_once.wait(60)
        return item

    with closing(BackgroundConsumer(lambda item: meet(item, 0), 4, "third")) as third:
        for item in prefetch((meet(item, 2) for item in range(30)), 4, "first"):
            third.submit(meet(item, 1))
        third.finish()
    assert third.completed == 30
