"""Steps that are decoded in threads, a few ahead of their use."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")

# With more, the others would wait for the user of the tags.
_MOST_JOBS = 2

MOST_RESULTS = _MOST_JOBS + 1
"""How many functions may be at work, or have a result that is in use, when one is called."""


def ahead(items: Iterator[T | Callable[[], T]]) -> Iterator[T]:
    """The items in order; functions among them are called in threads, for their results.

    What `items` or a function raises is raised in its turn. As many results are in memory as there
    are threads, and one. A single function is called without a thread, and so are all where none
    can be started.
    """
    jobs = min(len(os.sched_getaffinity(0)), _MOST_JOBS)
    pending: deque[T | _Result[T]] = deque()
    failed: Exception | None = None
    with ThreadPoolExecutor(jobs, "decode") as pool:
        while failed is None:
            try:
                item = next(items)
            except StopIteration:
                break
            except Exception as error:  # noqa: BLE001 - raised after the items before it
                failed = error
                break
            pending.append(_Result(item) if callable(item) else item)
            waiting = [each for each in pending if isinstance(each, _Result)]
            # The first is begun once there is another.
            for each in waiting if len(waiting) > 1 else ():
                each.begin(pool)
            # What is ready needs no room: only functions are worth being begun early.
            while pending and (len(pending) > jobs or not isinstance(pending[0], _Result)):
                yield _value(pending.popleft())
        while pending:
            yield _value(pending.popleft())
    if failed is not None:
        raise failed


class _Result(Generic[T]):
    """What a function returns or raises; it is called once, here or in a thread."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._future: Future[T] = Future()
        self._taken = threading.Lock()
        self._begun = False

    def begin(self, pool: ThreadPoolExecutor) -> None:
        """Have a thread call it, if there is one."""
        if not self._begun:
            self._begun = True
            # If no other thread can be started, the pool may still let one do it that it has.
            with suppress(RuntimeError):
                pool.submit(self._call)

    def value(self) -> T:
        """Wait for it, or call it now if no thread does."""
        self._call()
        return self._future.result()

    def _call(self) -> None:
        if self._taken.acquire(blocking=False):
            try:
                self._future.set_result(self._function())
            except BaseException as error:  # noqa: BLE001 - raised where the value is wanted
                self._future.set_exception(error)


def _value(item: T | _Result[T]) -> T:
    return item.value() if isinstance(item, _Result) else item
