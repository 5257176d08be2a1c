"""Tasks that belong together, and the one thread that works for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from mtetool.errors import MtetoolError, RelayLostError

P = ParamSpec("P")
T = TypeVar("T")


async def all_of(
    *coroutines: Coroutine[Any, Any, object], beside: Sequence[Coroutine[Any, Any, None]]
) -> None:
    """Run them at the same time until all are done; if one fails, the others are cancelled.

    Those `beside` them have no end of their own: they are cancelled when the others are done.
    Raises the error that says the most: a lost connection is often only what followed from another.
    """
    try:
        async with asyncio.TaskGroup() as group:
            endless = [group.create_task(coroutine) for coroutine in beside]
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
            await asyncio.wait(tasks)
            for task in endless:
                task.cancel()
    except BaseExceptionGroup as errors:
        raise min(_leaves(errors), key=_rank) from None


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


def _rank(error: BaseException) -> int:
    if not isinstance(error, MtetoolError):
        return 0
    return 2 if isinstance(error, RelayLostError) else 1


class Worker:
    """A thread that makes one call after another."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a call there; return or raise what it does."""
        future = self._pool.submit(function, *args, **kwargs)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Make no further call; the one that is being made is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)
