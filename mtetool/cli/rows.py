"""The rows of `dump` as text, as one JSON document, and as a line of JSON each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from mtetool.cli.ranges import columns, extent_rows, missing_json, missing_row, why
from mtetool.cli.render import note, print_tail, put, put_bytes
from mtetool.cli.screen import Screen
from mtetool.flows.dump import granules, tag_runs
from mtetool.flows.row_text import RowText
from mtetool.guest import Missing
from mtetool.sources.tally import Tally
from mtetool.words import printable

if TYPE_CHECKING:
    from mtetool.flows.dump import Run, Wanted
    from mtetool.guest import Extent
    from mtetool.sources.source import TagSource

# Rows that are written at once: one write per row is ten times slower.
_BATCH_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Choice:
    """Which rows: of granules, or of runs; of which tags (None: all), and how many (None: all)."""

    each: bool = False
    wanted: Wanted | None = None
    limit: int | None = None

    def rows(self, source: TagSource, extents: list[Extent]) -> Iterator[Run | Missing]:
        """All of them, whatever the limit."""
        make = granules if self.each else tag_runs
        return make(source, extents, self.wanted)


def print_text(source: TagSource, extents: list[Extent], choice: Choice) -> Tally[Missing]:
    """Stream rows as text, and return what was missing."""
    if choice.limit is None:
        return _print_many(source, extents, choice, is_json=False)
    missing: Tally[Missing] = Tally()
    rows = _counted(choice.rows(source, extents), missing)
    lines = text_lines(islice(rows, choice.limit), choice, Screen())
    write_batches(lines, "")
    _say_if_cut(rows, choice)
    return missing


def text_lines(rows: Iterable[Run | Missing], choice: Choice, screen: Screen) -> Iterator[str]:
    """Rows as lines of text."""
    tags = [screen.tag(tag) for tag in range(16)]  # there can be many millions of rows
    for row in rows:
        if isinstance(row, Missing):
            yield _missing_line(row)
        elif choice.each:
            yield f"{row.ipa:>#14x}  {tags[row.tag]}\n"
        else:
            yield f"{columns(row)}  {tags[row.tag]}\n"


def _missing_line(row: Missing) -> str:
    return printable(f"{columns(row)}  missing: {why(row)}") + "\n"


def _missing_json_line(row: Missing) -> str:
    return json.dumps({"tag": None, **missing_row(row)}) + "\n"


def _print_many(
    source: TagSource, extents: list[Extent], choice: Choice, *, is_json: bool
) -> Tally[Missing]:
    """Stream all rows, each on a line, without a step of Python for each."""
    missing: Tally[Missing] = Tally()
    text = RowText(is_json=is_json, each=choice.each, wanted=choice.wanted)
    for step in source.read(extents):
        if isinstance(step, Missing):
            missing.add(step)
            for part in text.end():
                put_bytes(part)
            put(_missing_json_line(step) if is_json else _missing_line(step))
            continue
        for part in text.add(step):
            put_bytes(part)
    for part in text.end():
        put_bytes(part)
    return missing


class Between:
    """Writes rows that each end with a newline as the elements of an array."""

    def __init__(self) -> None:
        self._before = ""

    def put(self, part: memoryview) -> None:
        """Write some rows; the newline after the last is written before the next."""
        rows = str(part[:-1], "ascii").replace("\n", ",\n")
        put(self._before + rows)
        self._before = ",\n"


def print_json_lines(source: TagSource, extents: list[Extent], choice: Choice) -> Tally[Missing]:
    """Stream a line of JSON for each row, after one with the schema; return what was missing."""
    missing: Tally[Missing] = Tally()
    head = _head("mtetool.dump-lines/1", source, extents)
    put(json.dumps(head) + "\n")
    if choice.limit is None:
        return _print_many(source, extents, choice, is_json=True)
    rows = _counted(choice.rows(source, extents), missing)

    def lines() -> Iterator[str]:
        for row in islice(rows, choice.limit):
            if isinstance(row, Missing):
                yield _missing_json_line(row)
            else:
                yield _row(row, choice) + "\n"

    write_batches(lines(), "")
    _say_if_cut(rows, choice)
    return missing


def print_json_rows(source: TagSource, extents: list[Extent], choice: Choice) -> Tally[Missing]:
    """Stream one JSON object: a guest's rows may not fit into memory."""
    missing: Tally[Missing] = Tally()
    name, other = ("granules", "runs") if choice.each else ("runs", "granules")
    head = {**_head("mtetool.dump/1", source, extents), other: None}
    put(json.dumps(head)[:-1] + f', "{name}": [\n')
    text = RowText(is_json=True, each=choice.each, wanted=choice.wanted)
    between = Between()
    for step in source.read(extents):
        if isinstance(step, Missing):
            missing.add(step)
            continue
        for part in text.add(step):
            between.put(part)
    for part in text.end():
        between.put(part)
    print_tail(missing_json("missing", missing))
    return missing


def _head(schema: str, source: TagSource, extents: list[Extent]) -> dict[str, Any]:
    return {
        "schema": schema,
        "source": source.name,
        "page_size_bytes": source.page_size_bytes,
        "scope": extent_rows(extents),
    }


def _row(row: Run, choice: Choice) -> str:
    if choice.each:
        return f'{{"ipa": {row.ipa}, "tag": {row.tag}}}'
    return f'{{"ipa": {row.ipa}, "size_bytes": {row.size_bytes}, "tag": {row.tag}}}'


def _counted(rows: Iterable[Run | Missing], missing: Tally[Missing]) -> Iterator[Run | Missing]:
    for row in rows:
        if isinstance(row, Missing):
            missing.add(row)
        yield row


def _say_if_cut(rows: Iterator[Run | Missing], choice: Choice) -> None:
    if choice.limit is not None and next(rows, None) is not None:
        note(f"only the first {choice.limit:,} rows were printed (--limit)")


def write_batches(parts: Iterator[str], between: str) -> None:
    """Write many short texts, with few writes."""
    before = ""
    while batch := list(islice(parts, _BATCH_ROWS)):
        put(before + between.join(batch))
        before = between
