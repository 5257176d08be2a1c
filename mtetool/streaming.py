"""JSON objects with arrays that may be too long for memory: written piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtetool.guest import Extent

# Rows that are joined into one piece: one write per row is ten times slower.
_BATCH_ROWS = 4096


class Rows:
    """The elements of an array, made as they are written; they can be iterated only once."""

    def __init__(self, rows: Iterable[object]) -> None:
        self._rows = iter(rows)

    def __iter__(self) -> Iterator[object]:
        return self._rows


def extent_row(extent: Extent) -> dict[str, int]:
    """Return a range of guest memory in the form that all reports use."""
    return {"ipa": extent.ipa, "size_bytes": extent.size_bytes}


def json_parts(document: Mapping[str, object], indent: int | None = None) -> Iterator[str]:
    """Yield what `json.dumps` makes of an object, in pieces; the first is "{".

    The object's own values can be `Rows`; types that JSON does not know are written as text.
    """
    line = "" if indent is None else "\n" + " " * indent
    between = ", " if indent is None else "," + line
    yield "{"
    before = line
    for key, value in document.items():
        yield f"{before}{json.dumps(key)}: "
        before = between
        if isinstance(value, Rows):
            yield from _array(value, indent, line)
        else:
            yield _dumped(value, indent, line)
    yield "}" if indent is None or not document else "\n}"


def _array(rows: Rows, indent: int | None, line: str) -> Iterator[str]:
    deeper = line + " " * (indent or 0)
    between = ", " if indent is None else "," + deeper
    before = "[" + deeper
    while batch := list(islice(rows, _BATCH_ROWS)):
        yield before + between.join(_dumped(row, indent, deeper) for row in batch)
        before = between
    yield "[]" if before[0] == "[" else line + "]"


def _dumped(value: object, indent: int | None, line: str) -> str:
    text = json.dumps(value, indent=indent, default=str)
    # JSON strings contain no raw newlines: these are between the elements.
    return text if indent is None else text.replace("\n", line)
