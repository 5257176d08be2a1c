"""Runs of equal tags as rows of Parquet files, for DuckDB, Spark, pandas and the like.

pyarrow is needed, which is not a dependency of mtetool but of its extra `parquet`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import ModuleType
from typing import Any
from urllib.parse import quote

import numpy as np

from mtetool.errors import UsageError
from mtetool.files.sink import Sink
from mtetool.guest import Extent, Memslot, Missing
from mtetool.sources.copying import Copied
from mtetool.sources.layout import common, without
from mtetool.sources.pieces import Progress, no_progress
from mtetool.sources.source import TagSource
from mtetool.sources.tally import Tally
from mtetool.tags import as_array, runs
from mtetool.uapi import GRANULE_BYTES

ROW_GROUP_ROWS = 1 << 18
"""Rows that are kept in memory, and written together."""

# Granules that are turned into rows at once.
_BLOCK_GRANULES = 1 << 18
_NO_TAG = 0xFF
_UNKNOWN_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, slots=True)
class Saved:
    """Which snapshot the rows are from: its guest, its id, and when it was saved, if known."""

    guest: str | None
    snapshot: str
    saved: datetime | None

    @property
    def partition(self) -> str:
        """The directory of its rows in a partitioned set, as Hive names them."""
        guest = _UNKNOWN_PARTITION if not self.guest else quote(self.guest, safe="")
        # A dot alone, or two, would be another directory.
        guest = guest.replace(".", "%2E") if not guest.strip(".") else guest
        day = self.saved.strftime("%Y-%m-%d") if self.saved else _UNKNOWN_PARTITION
        return f"guest={guest[:200]}/day={day}"

    @property
    def file(self) -> str:
        """The name of its file there."""
        return f"{quote(self.snapshot, safe='')[:200]}.parquet"


def saved_at(text: str) -> datetime | None:
    """Parse a snapshot's time of creation; None where it is not one."""
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None


def need_pyarrow() -> ModuleType:
    """Import pyarrow. Raises UsageError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            f"Parquet needs the Python library pyarrow, which is not here: {error}",
            hint="install it where mtetool is: pip install 'mtetool[parquet]'",
        ) from error
    return pyarrow  # type: ignore[no-any-return]


@dataclass
class _Rows:
    """Rows that are not written yet; the last may still grow."""

    slots: list[int] = field(default_factory=list)
    ipas: list[np.ndarray[Any, Any]] = field(default_factory=list)
    sizes: list[np.ndarray[Any, Any]] = field(default_factory=list)
    tags: list[np.ndarray[Any, Any]] = field(default_factory=list)
    count: int = 0

    def add(self, slot: int, ipa: int, starts: Any, lengths: Any, tags: Any) -> None:
        """Add runs of one slot, which may continue the last one."""
        ipas = starts.astype(np.uint64) * np.uint64(GRANULE_BYTES) + np.uint64(ipa)
        sizes = lengths.astype(np.int64) * GRANULE_BYTES
        if self._continues(slot, int(ipas[0]), int(tags[0])):
            self.sizes[-1][-1] += sizes[0]
            ipas, sizes, tags = ipas[1:], sizes[1:], tags[1:]
        if len(ipas):
            self.slots.append(slot)
            self.ipas.append(ipas)
            self.sizes.append(sizes)
            self.tags.append(tags.copy())
            self.count += len(ipas)

    def _continues(self, slot: int, ipa: int, tag: int) -> bool:
        if not self.count or self.slots[-1] != slot or int(self.tags[-1][-1]) != tag:
            return False
        return int(self.ipas[-1][-1]) + int(self.sizes[-1][-1]) == ipa

    def all_but_last(self) -> _Rows:
        """Take the rows that cannot grow any more, and keep the last."""
        taken = _Rows(self.slots, self.ipas, self.sizes, self.tags, self.count - 1)
        self.slots = self.slots[-1:]
        for name in ("ipas", "sizes", "tags"):
            parts = getattr(taken, name)
            setattr(self, name, [parts[-1][-1:].copy()])
            setattr(taken, name, [*parts[:-1], parts[-1][:-1]])
        self.count = 1
        return taken

    def columns(self) -> tuple[Any, Any, Any, Any]:
        """The rows as columns: slots, addresses, sizes, tags."""
        lengths = [len(part) for part in self.ipas]
        return (
            np.repeat(np.array(self.slots, dtype=np.int64), lengths),
            np.concatenate(self.ipas),
            np.concatenate(self.sizes),
            np.concatenate(self.tags),
        )


class TableWriter:
    """Writes rows of any number of snapshots into one file; a context manager.

    `partitioned` leaves out the columns that stand in the names of directories. Memory holds one
    group of rows. Errors of `out` pass through.
    """

    def __init__(self, out: Sink, *, partitioned: bool = False) -> None:
        self._arrow = need_pyarrow()
        self._partitioned = partitioned
        arrow = self._arrow
        fields = [
            ("snapshot", arrow.dictionary(arrow.int32(), arrow.string())),
            ("saved", arrow.timestamp("s", tz="UTC")),
            ("slot", arrow.int64()),
            ("ipa", arrow.uint64()),
            ("size_bytes", arrow.int64()),
            ("tag", arrow.uint8()),
        ]
        if not partitioned:
            fields.insert(0, ("guest", arrow.dictionary(arrow.int32(), arrow.string())))
        self._schema = arrow.schema(fields)
        self._position = _Position(out)
        self._file = arrow.parquet.ParquetWriter(
            self._position, self._schema, compression="zstd", write_statistics=True
        )
        self.n_rows = 0

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            # Arrow writes the end of a file that was not closed, whenever that is freed.
            self._position.drop()
        self._file.close()

    def add(
        self,
        source: TagSource,
        extents: Sequence[Extent],
        slots: Sequence[Memslot],
        saved: Saved,
        *,
        progress: Progress = no_progress,
    ) -> Tally[Missing]:
        """Write the runs of a source, by slot; missing tags are null. Return those ranges."""
        missing: Tally[Missing] = Tally()
        rows = _Rows()
        done = 0
        total = sum(extent.size_bytes for extent in extents)
        for slot, part in _by_slot(extents, slots):
            for step in source.read([part]):
                if isinstance(step, Missing):
                    missing.add(step)
                for ipa, starts, lengths, tags in _runs(step):
                    rows.add(slot, ipa, starts, lengths, tags)
                    if rows.count > ROW_GROUP_ROWS:
                        self._write(rows.all_but_last(), saved)
                done += step.size_bytes
                progress(done, total)
        if rows.count:
            self._write(rows, saved)
        return missing

    def _write(self, rows: _Rows, saved: Saved) -> None:
        arrow = self._arrow
        slots, ipas, sizes, tags = rows.columns()
        columns = [
            self._constant(saved.snapshot, len(ipas)),
            arrow.repeat(arrow.scalar(saved.saved, arrow.timestamp("s", tz="UTC")), len(ipas)),
            arrow.array(slots, mask=slots < 0),
            arrow.array(ipas),
            arrow.array(sizes),
            arrow.array(tags, mask=tags == _NO_TAG),
        ]
        if not self._partitioned:
            columns.insert(0, self._constant(saved.guest, len(ipas)))
        self._file.write_table(arrow.Table.from_arrays(columns, schema=self._schema))
        self.n_rows += len(ipas)

    def _constant(self, text: str | None, count: int) -> Any:
        arrow = self._arrow
        indices = arrow.array(np.zeros(count, dtype=np.int32), mask=np.full(count, text is None))
        values = arrow.array([text or ""], type=arrow.string())
        return arrow.DictionaryArray.from_arrays(indices, values)


class _Position(io.RawIOBase):
    """A sink as the file that pyarrow wants, which asks for its position."""

    def __init__(self, out: Sink) -> None:
        self._out: Sink | None = out
        self._at = 0

    def drop(self) -> None:
        """Take everything that still comes, and write nothing."""
        self._out = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        if self._out is not None:
            self._out.write(view)
        self._at += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._at


def _by_slot(extents: Sequence[Extent], slots: Sequence[Memslot]) -> Iterator[tuple[int, Extent]]:
    """The extents in order of address, cut at slots; -1 is for memory of no slot."""
    found = [
        (part.ipa, slot.id, part)
        for slot in slots
        for part in common([Extent(slot.ipa, slot.size_bytes)], extents)
    ]
    held = [Extent(slot.ipa, slot.size_bytes) for slot in slots]
    found += [(part.ipa, -1, part) for part in without(extents, held)]
    for _, number, part in sorted(found, key=lambda item: item[0]):
        yield number, part


def _runs(step: Any) -> Iterator[tuple[int, Any, Any, Any]]:
    if not isinstance(step, Copied):
        tag = _NO_TAG if isinstance(step, Missing) else step.tag
        one = np.array([tag], dtype=np.uint8)
        length = np.array([step.size_bytes // GRANULE_BYTES])
        yield step.ipa, np.zeros(1, dtype=np.intp), length, one
        return
    for block in range(0, len(step.tags), _BLOCK_GRANULES):
        part = as_array(step.tags[block : block + _BLOCK_GRANULES])
        yield step.ipa + block * GRANULE_BYTES, *runs(part)
