"""Steps that are decoded in threads, a few ahead of their use."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

T = TypeVar("T")

# With more, the others would wait for the user of the tags.
_MOST_JOBS = 2


def ahead(items: Iterator[T | Callable[[], T]]) -> Iterator[T]:
    """The items in their order; those that are functions are called in threads, and their results
    are yielded.

    What `items` or a function raises is raised in its turn. As many results are in memory as there
    are threads, and one. Where no thread can be started, it goes on without.
    """
    jobs = min(len(os.sched_getaffinity(0)), _MOST_JOBS)
    pending: deque[T | Future[T]] = deque()
    failed: Exception | None = None
    with ExitStack() as stack:
        pool: ThreadPoolExecutor | None = None
        while failed is None:
            try:
                item = next(items)
            except StopIteration:
                break
            except Exception as error:  # noqa: BLE001 - raised after the items before it
                failed = error
                break
            if callable(item):
                if pool is None:
                    pool = stack.enter_context(ThreadPoolExecutor(jobs, "decode"))
                pending.append(_submit(pool, item))
            else:
                pending.append(item)
            # Whatever is ready needs no room; only functions are worth being begun early.
            while pending and (len(pending) > jobs or not isinstance(pending[0], Future)):
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())
    if failed is not None:
        raise failed


def _submit(pool: ThreadPoolExecutor, function: Callable[[], T]) -> Future[T]:
    try:
        return pool.submit(function)
    except RuntimeError:
        done: Future[T] = Future()
        try:
            done.set_result(function())
        except Exception as error:  # noqa: BLE001 - raised in its turn
            done.set_exception(error)
        return done


def _result(item: T | Future[T]) -> T:
    return item.result() if isinstance(item, Future) else item
