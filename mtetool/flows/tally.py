"""Ranges counted for a report: all of them in the totals, a bounded number by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

LISTED_MAX = 1000


class _Range(Protocol):
    @property
    def ipa(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...


R = TypeVar("R", bound=_Range)


class Tally(Generic[R]):
    """Ranges in the order they came; those that touch and are otherwise equal are joined.

    `items` holds the first `LISTED_MAX` of them, `count` and `size_bytes` speak of all:
    memory stays bounded however broken a guest is.
    """

    def __init__(self) -> None:
        self.items: list[R] = []
        self.count = 0
        self.size_bytes = 0
        self._last: R | None = None

    def __bool__(self) -> bool:
        return self.count > 0

    def add(self, item: R) -> None:
        """Count a range; it may join the one before."""
        self.size_bytes += item.size_bytes
        last = self._last
        if last is not None and _touch(last, item):
            item = _replace(last, size_bytes=last.size_bytes + item.size_bytes)
            self.count -= 1
            if self.count < LISTED_MAX:
                self.items.pop()
        self._last = item
        self.count += 1
        if self.count <= LISTED_MAX:
            self.items.append(item)

    def first(self, count: int) -> list[R]:
        """The first of them, at most `count`."""
        return self.items[:count]

    @property
    def full(self) -> bool:
        """Whether further ranges are counted only."""
        return self.count >= LISTED_MAX

    def count_only(self, count: int, size_bytes: int) -> None:
        """Count ranges that will not be listed; only when `full`."""
        self._last = None
        self.count += count
        self.size_bytes += size_bytes


def _touch(last: R, item: R) -> bool:
    if last.ipa + last.size_bytes != item.ipa:
        return False
    return bool(_replace(item, ipa=last.ipa, size_bytes=last.size_bytes) == last)


def _replace(item: R, **changes: Any) -> R:
    # Every range here is a frozen dataclass, which the type system has no name for.
    return replace(item, **changes)  # type: ignore[type-var]
