"""Steps that are decoded in threads, a few ahead of their use."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")

# With more, the others would wait for the user of the tags.
_MOST_JOBS = 2


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
            if callable(item):
                # The first is begun once there is another.
                for waiting in pending:
                    if isinstance(waiting, _Result):
                        waiting.begin(pool)
                pending.append(_Result(item))
            else:
                pending.append(item)
            # What is ready needs no room: only functions are worth being begun early.
            while pending and (len(pending) > jobs or not isinstance(pending[0], _Result)):
                yield _value(pending.popleft())
        while pending:
            yield _value(pending.popleft())
    if failed is not None:
        raise failed


class _Result(Generic[T]):
    """What a function returns or raises, here or in a thread."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._future: Future[T] | None = None

    def begin(self, pool: ThreadPoolExecutor) -> None:
        """Have a thread call it, if there is one."""
        if self._future is None:
            with suppress(RuntimeError):
                self._future = pool.submit(self._function)

    def value(self) -> T:
        """Wait for it, or call it now."""
        return self._function() if self._future is None else self._future.result()


def _value(item: T | _Result[T]) -> T:
    return item.value() if isinstance(item, _Result) else item
