"""Steps that threads decode ahead come in their order, and so do errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from mtetool.sources.ahead import MOST_RESULTS, ahead


def later(value: int, seconds: float = 0.0) -> Callable[[], int]:
    def function() -> int:
        time.sleep(seconds)
        return value

    return function


Item = int | Callable[[], int]


def failing() -> int:
    raise ValueError("in a thread")


def run(items: list[Item]) -> Iterator[int]:
    return ahead(iter(items))


def test_the_order_is_kept() -> None:
    items = [later(0, 0.05), 1, later(2), later(3, 0.02), 4, 5, later(6)]
    assert list(ahead(iter(items))) == list(range(7))


def test_an_error_of_a_function_comes_in_its_turn() -> None:
    found = run([later(0), failing, later(2)])
    assert next(found) == 0
    with pytest.raises(ValueError, match="in a thread"):
        next(found)


def test_an_error_of_the_items_comes_after_those_before_it() -> None:
    def items() -> Iterator[int | Callable[[], int]]:
        yield later(0)
        yield 1
        raise OSError("damaged")

    found: Iterator[int] = ahead(items())
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(OSError, match="damaged"):
        next(found)


def test_few_results_wait() -> None:
    made = 0

    def count() -> int:
        nonlocal made
        made += 1
        return made

    found = run([count] * 100)
    next(found)
    time.sleep(0.05)
    assert made <= 4
    found.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_without_threads_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    assert list(run([later(0), 1, later(2)])) == [0, 1, 2]
    found = run([later(0), failing])
    assert next(found) == 0
    with pytest.raises(ValueError, match="in a thread"):
        next(found)


def test_a_single_function_needs_no_thread() -> None:
    here: list[str] = []

    def note() -> int:
        here.append(threading.current_thread().name)
        return 1

    assert list(run([0, note, 2])) == [0, 1, 2]
    assert here == [threading.current_thread().name]
    assert list(run([note, note, note])) == [1, 1, 1]
    assert here[1].startswith("decode")


def test_as_many_results_are_in_use_as_is_said() -> None:
    """A room that is used in turn is never taken while its last result is needed."""
    rooms = [-1] * MOST_RESULTS
    made = 0

    def fill(room: int, value: int) -> int:
        time.sleep(0.001 * (value % 3))
        rooms[room] = value
        return room

    def items() -> Iterator[int | Callable[[], int]]:
        nonlocal made
        for value in range(60):
            made += 1
            yield partial(fill, value % MOST_RESULTS, value)

    found: Iterator[int] = ahead(items())
    for value, room in enumerate(found):
        assert rooms[room] == value
        time.sleep(0.002)
        assert rooms[room] == value, "another result was written over this one"
    assert made == 60


def test_a_thread_that_cannot_be_started_beside_one_that_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pool keeps what it has no thread for, and may still do it; but nothing is done twice."""
    submit = ThreadPoolExecutor.submit
    calls = [0] * 20

    def fail_after(self: ThreadPoolExecutor, function: Callable[[], None]) -> None:
        submit(self, function)
        raise RuntimeError("can't start new thread")

    def count(number: int) -> int:
        calls[number] += 1
        time.sleep(0.001)
        return number

    monkeypatch.setattr(ThreadPoolExecutor, "submit", fail_after)
    assert list(run([partial(count, number) for number in range(20)])) == list(range(20))
    assert calls == [1] * 20
