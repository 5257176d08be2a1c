"""Count and list ranges for a report: all of them, in bounded memory."""

from __future__ import annotations

import tempfile
import weakref
from array import array
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, Protocol, TypeVar, cast

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IN_MEMORY_ROWS = 1 << 15
"""How many ranges are kept in memory; more go to a file without a name."""

# How many rows are read back at once.
_READ_ROWS = 1 << 12

# A row is the address, the size in bytes, and the number of a range that is otherwise alike.
_ROW_NUMBERS = 3
_ROW_BYTES = 8 * _ROW_NUMBERS


class _Range(Protocol):
    @property
    def ipa(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...


R = TypeVar("R", bound=_Range)


class Tally(Generic[R]):
    """Ranges in the order they came; those that touch and are otherwise equal are joined.

    `count` and `size_bytes` cover all of them, and so does the list that iterating yields, unless
    only the first `listed` are wanted. For a terabyte in which every other granule is wrong, the
    list can fill a disk: where the directory for temporary files has no room, it ends early, and
    `truncated` is true.
    """

    def __init__(self, listed: int | None = None) -> None:
        self.count = 0
        self.size_bytes = 0
        self.truncated = False
        self._listed = listed
        self._last: R | None = None
        # One of each kind: ranges with one reason differ in address and size only.
        self._kinds: list[R] = []
        self._numbers: dict[R, int] = {}
        self._rows = array("Q")
        self._spool: BinaryIO | None = None
        self._spooled_rows = 0

    def __bool__(self) -> bool:
        return self.count > 0

    def __iter__(self) -> Iterator[R]:
        """The listed ranges. Raises OSError where they cannot be read back."""
        at = 0
        while at < self._spooled_rows:
            n_rows = min(_READ_ROWS, self._spooled_rows - at)
            yield from self._items(self._read_back(at, n_rows))
            at += n_rows
        yield from self._items(self._rows)
        if self._last is not None and self._is_listed(self.count - 1):
            yield self._last

    @property
    def items(self) -> list[R]:
        """All listed ranges, in memory."""
        return list(self)

    def first(self, count: int) -> list[R]:
        """The first listed ranges, at most `count`."""
        return [item for _, item in zip(range(count), self, strict=False)]

    def add(self, item: R) -> None:
        """Count a range; it may join the one before."""
        self.size_bytes += item.size_bytes
        last = self._last
        if last is not None and _touch(last, item):
            self._last = _replace(last, size_bytes=last.size_bytes + item.size_bytes)
            return
        self._close_last()
        self._last = item
        self.count += 1

    def extend(self, kind: R, ipas: NDArray[np.int64], sizes: NDArray[np.int64]) -> None:
        """As `add`, for at least 1 range: in order, not touching, otherwise like `kind`."""
        last = len(ipas) - 1
        self.add(_replace(kind, ipa=int(ipas[0]), size_bytes=int(sizes[0])))
        if not last:
            return
        self._close_last()
        for first in range(1, last, IN_MEMORY_ROWS):
            stop = min(first + IN_MEMORY_ROWS, last)
            if self._is_listed(self.count):
                self._keep(self._as_rows(kind, ipas[first:stop], sizes[first:stop]))
            self.count += stop - first
        self.size_bytes += int(sizes[1:].sum())
        self._last = _replace(kind, ipa=int(ipas[last]), size_bytes=int(sizes[last]))
        self.count += 1

    def _is_listed(self, index: int) -> bool:
        return not self.truncated and (self._listed is None or index < self._listed)

    def _close_last(self) -> None:
        """Complete the last range: the next one does not join it."""
        last = self._last
        if last is not None and self._is_listed(self.count - 1):
            self._keep(array("Q", (last.ipa, last.size_bytes, self._number(last))))

    def _as_rows(self, kind: R, ipas: NDArray[np.int64], sizes: NDArray[np.int64]) -> array[int]:
        """Ranges as they are kept; only as many as are still to be listed."""
        import numpy as np

        rows = np.empty((len(ipas), _ROW_NUMBERS), dtype=np.uint64)
        rows[:, 0], rows[:, 1], rows[:, 2] = ipas, sizes, self._number(kind)
        room = None if self._listed is None else self._listed - self.count
        return array("Q", rows[:room].tobytes())

    def _number(self, item: R) -> int:
        kind = _replace(item, ipa=0, size_bytes=1)
        if kind not in self._numbers:
            self._numbers[kind] = len(self._kinds)
            self._kinds.append(kind)
        return self._numbers[kind]

    def _items(self, rows: array[int]) -> Iterator[R]:
        for at in range(0, len(rows), _ROW_NUMBERS):
            ipa, size_bytes, number = rows[at : at + _ROW_NUMBERS]
            yield _replace(self._kinds[number], ipa=ipa, size_bytes=size_bytes)

    # --- what does not fit into memory ------------------------------------------------------

    def _keep(self, rows: array[int]) -> None:
        self._rows += rows
        if len(self._rows) < IN_MEMORY_ROWS * _ROW_NUMBERS:
            return
        try:
            self._write_out()
        except OSError:
            # The work is worth more than its report.
            self.truncated = True

    def _write_out(self) -> None:
        if self._spool is None:
            self._spool = cast(BinaryIO, tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
            weakref.finalize(self, self._spool.close)
        self._spool.seek(self._spooled_rows * _ROW_BYTES)
        data = self._rows.tobytes()
        while data:
            data = data[self._spool.write(data) :]
        self._spooled_rows += len(self._rows) // _ROW_NUMBERS
        self._rows = array("Q")

    def _read_back(self, first: int, n_rows: int) -> array[int]:
        assert self._spool is not None
        self._spool.seek(first * _ROW_BYTES)
        rows = array("Q")
        rows.fromfile(self._spool, n_rows * _ROW_NUMBERS)
        return rows


def _touch(last: R, item: R) -> bool:
    if last.ipa + last.size_bytes != item.ipa:
        return False
    return bool(_replace(item, ipa=last.ipa, size_bytes=last.size_bytes) == last)


def _replace(item: R, **changes: Any) -> R:
    # Every range here is a frozen dataclass, which the type system has no name for.
    return replace(item, **changes)  # type: ignore[type-var]
