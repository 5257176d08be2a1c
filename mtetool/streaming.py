"""JSON objects with arrays that may be too long for memory: written piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtetool.guest import Extent

# What is joined to one piece: one write a row is ten times slower.
_BATCH_ROWS = 4096


class Rows:
    """The elements of an array, made when they are written; gone through once."""

    def __init__(self, rows: Iterable[object]) -> None:
        self._rows = iter(rows)

    def __iter__(self) -> Iterator[object]:
        return self._rows


def extent_row(extent: Extent) -> dict[str, int]:
    """A range of guest memory, as all reports have it."""
    return {"ipa": extent.ipa, "size_bytes": extent.size_bytes}


def json_parts(document: Mapping[str, object], indent: int | None = None) -> Iterator[str]:
    """What `json.dumps` makes of an object, in pieces of which the first is "{".

    Values of the object itself may be `Rows`; what JSON does not know is written as text.
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
    # Strings have no newlines of their own in JSON: these are between the parts.
    return text if indent is None else text.replace("\n", line)
