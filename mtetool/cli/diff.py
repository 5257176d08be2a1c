"""`mtetool diff`: where the tags of two sources differ."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from mtetool.backends import is_guest
from mtetool.cli.naming import check_inputs
from mtetool.cli.options import (
    BASE_OPTION,
    EVERY_PAGE_OPTION,
    MAP_OPTION,
    NAME,
    RANGE_OPTION,
    completes,
    output_option,
    progress_options,
)
from mtetool.cli.options import guest_options as with_guest_options
from mtetool.cli.progress import progress as shown_progress
from mtetool.cli.ranges import columns, missing_json, missing_lines, missing_row, size, why
from mtetool.cli.render import note, print_json, print_tail, put, put_bytes, say, table, warn
from mtetool.cli.rows import Between, write_batches
from mtetool.cli.screen import Screen, screen
from mtetool.errors import STATUS_NO, STATUS_OK, STATUS_PARTIAL, UsageError
from mtetool.guest import Extent, GuestOptions
from mtetool.words import counted, printable

if TYPE_CHECKING:
    from mtetool.flows.diff import Difference, DiffTotals, Totals
    from mtetool.flows.row_text import RowText
    from mtetool.guest import Missing
    from mtetool.sources.source import TagSource
    from mtetool.sources.tally import Tally

    Rows = Iterator[Difference | Missing]


@click.command("diff")
@click.argument("a", type=NAME, metavar="A", shell_complete=completes("sources"))
@click.argument("b", type=NAME, metavar="B", shell_complete=completes("sources"))
@click.option("--stat", is_flag=True, help="Only how much differs, and how.")
@click.option("--brief", is_flag=True, help="Only whether they differ; ends at the first range.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N ranges.")
@RANGE_OPTION
@BASE_OPTION
@MAP_OPTION
@EVERY_PAGE_OPTION
@with_guest_options
@progress_options
@output_option("jsonl")
def command(
    a: str,
    b: str,
    stat: bool,
    brief: bool,
    limit: int | None,
    ranges: tuple[Extent, ...],
    bases: tuple[str, ...],
    moves: tuple[tuple[int, int], ...],
    every_page: bool,
    guest_options: GuestOptions,
    quiet: bool,
    progress: str,
    output: str,
) -> int:
    """Show where the tags of A and B (guests, snapshots, or -) differ.

    Each row is address, size, tag in A, tag in B. Memory that only one of them has differs too
    (absent). Status 0 when they are the same, 1 when they differ.
    """
    from mtetool.flows.diff import check_ranges, diff, diff_text, totals
    from mtetool.flows.row_text import RowText
    from mtetool.sources.layout import total_bytes
    from mtetool.sources.opening import open_source
    from mtetool.sources.source import clip
    from mtetool.sources.watching import Watched

    _check_together(stat, brief, limit, output)
    if bases and is_guest(a) and is_guest(b):
        raise UsageError("--base goes with a delta, and both sources are guests")
    check_inputs(bases, [a, b])
    asked = list(ranges)
    with (
        open_source(
            a, guest_options, every_page=every_page, bases=bases, bases_of_another=True
        ) as first,
        open_source(
            b, guest_options, every_page=every_page, bases=bases, bases_of_another=True
        ) as right,
    ):
        left = _moved(first, moves)
        check_ranges(asked, left, right)
        total = sum(total_bytes(clip(source, asked or None)) for source in (left, right))
        # A bar between the rows on the same terminal would only disturb them.
        rows_on_terminal = sys.stdout.isatty() and not (stat or brief)
        mode = "none" if rows_on_terminal and progress == "auto" else progress
        with shown_progress(total, f"comparing {a}", mode) as advance:
            sides = Watched(left, advance), Watched(right, advance)
            if stat:
                counts = totals(*sides, asked or None)
            else:
                out = _Output(a, b, output, limit)
                if brief or limit is not None or out.has_colours:
                    rows = diff(*sides, asked or None)
                    status = out.brief(rows) if brief else out.write(rows)
                else:
                    text = RowText(is_json=output != "text")
                    status = out.write_many(diff_text(*sides, text, asked or None), text)
        if stat:
            return _tell_totals(a, b, counts, output, quiet=quiet)
    if brief:
        out.print_brief()
    _warn_of(out.missing, quiet=quiet)
    return status


def _check_together(stat: bool, brief: bool, limit: int | None, output: str) -> None:
    given = [name for name, on in (("--stat", stat), ("--brief", brief)) if on]
    if limit is not None:
        given.append("--limit")
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} exclude each other")
    if (stat or brief) and output == "jsonl":
        raise UsageError(f"{given[0]} has no output jsonl, only text and json")


def _moved(source: TagSource, moves: Sequence[tuple[int, int]]) -> TagSource:
    from mtetool.flows.relocation import MovedSource, Relocation
    from mtetool.sources.layout import check_aligned
    from mtetool.uapi import GRANULE_BYTES

    if not moves:
        return source
    check_aligned([Extent(new, GRANULE_BYTES) for _, new in moves], GRANULE_BYTES, "granule")
    return MovedSource(source, Relocation(moves, source.memslots))


def _warn_of(missing: Tally[Missing], *, quiet: bool) -> None:
    if missing and not quiet:
        where = counted(missing.count, "range")
        warn(f"the tags of {size(missing.size_bytes)} in {where} could not be compared")


class _Output:
    """Streams rows and counts them: all differences of a big guest may not fit into memory."""

    def __init__(self, a: str, b: str, form: str, limit: int | None) -> None:
        from mtetool.sources.tally import Tally

        self._names = {"a": a, "b": b}
        self._form = form
        self._limit = limit
        self._screen = screen()
        self._count = 0
        self._size_bytes = 0
        self._first: Difference | None = None
        self.missing: Tally[Missing] = Tally()

    @property
    def _status(self) -> int:
        if self._count:
            return STATUS_NO
        return STATUS_PARTIAL if self.missing else STATUS_OK

    def brief(self, rows: Rows) -> int:
        """Look for the first difference, and return the exit status."""
        for row in self._differing(rows):
            self._first = row
            break
        return self._status

    def print_brief(self) -> None:
        """Print whether there is a difference; in text, nothing if there is none."""
        first = self._first
        if self._form == "json":
            print_json(
                {
                    "schema": "mtetool.diff-brief/1",
                    **self._names,
                    "same": first is None,
                    "first_ipa": first.ipa if first else None,
                    "missing_bytes": self.missing.size_bytes,
                }
            )
        elif first is not None:
            say(f"{self._names['a']} and {self._names['b']} differ, first at {first.ipa:#x}")

    def write(self, rows: Rows) -> int:
        """Write all rows, and return the exit status."""
        if self._form == "json":
            self._write_document(rows)
        elif self._form == "jsonl":
            put(self._lines_head())
            self._write_some(self._json_lines(rows))
        else:
            self._write_some(self._text(rows))
        return self._status

    @property
    def has_colours(self) -> bool:
        """Whether the rows have colours."""
        return self._screen.colours

    def write_many(self, found: Iterator[memoryview | Difference | Missing], text: RowText) -> int:
        """As `write`, for what `text` makes rows of; return the exit status."""
        if self._form == "json":
            between = Between()
            put(self._document_head())
            for part in self._parts(found):
                between.put(part)
            self._count_text(text)
            print_tail(self._document_tail())
            return self._status
        if self._form == "jsonl":
            put(self._lines_head())
        for part in self._parts(found):
            put_bytes(part)
        self._count_text(text)
        return self._status

    def _parts(self, found: Iterator[memoryview | Difference | Missing]) -> Iterator[memoryview]:
        """Rows as they are, and those of single ranges."""
        for part in found:
            if isinstance(part, memoryview):
                yield part
                continue
            single: Rows = iter([part])
            if self._form == "text":
                lines = self._text(single)
            elif self._form == "jsonl":
                lines = self._json_lines(single)
            else:
                lines = (json.dumps(row._asdict()) + "\n" for row in self._differing(single))
            yield from (memoryview(line.encode()) for line in lines)

    def _count_text(self, text: RowText) -> None:
        self._count += text.n_rows
        self._size_bytes += text.size_bytes

    def _lines_head(self) -> str:
        return json.dumps({"schema": "mtetool.diff-lines/1", **self._names}) + "\n"

    def _document_head(self) -> str:
        head = {"schema": "mtetool.diff/1", **self._names}
        return json.dumps(head)[:-1] + ', "ranges": [\n'

    def _document_tail(self) -> dict[str, Any]:
        return {
            "same": not self._count,
            "differing_bytes": self._size_bytes,
            "differing_count": self._count,
            **missing_json("missing", self.missing),
        }

    def _write_some(self, lines: Iterator[str]) -> None:
        write_batches(islice(lines, self._limit), "")
        if self._limit is not None and next(lines, None) is not None:
            note(f"only the first {counted(self._limit, 'row')} of more (--limit)")

    def _write_document(self, rows: Rows) -> None:
        put(self._document_head())
        differing = self._differing(rows)
        write_batches((json.dumps(row._asdict()) for row in islice(differing, self._limit)), ",\n")
        for _ in differing:
            pass  # counted, not listed
        print_tail(self._document_tail())

    def _differing(self, rows: Rows) -> Iterator[Difference]:
        for row in self._counted(rows):
            if isinstance(row, tuple):
                yield row

    def _counted(self, rows: Iterable[Difference | Missing]) -> Rows:
        from mtetool.guest import Missing

        for row in rows:
            if isinstance(row, Missing):
                self.missing.add(row)
            else:
                self._count += 1
                self._size_bytes += row.size_bytes
            yield row

    def _text(self, rows: Rows) -> Iterator[str]:
        for row in self._counted(rows):
            if isinstance(row, tuple):
                tags = f"{_tag(row.a, self._screen)}  {_tag(row.b, self._screen)}"
                yield f"{columns(row)}  {tags}\n"
            else:
                yield printable(f"{columns(row)}  not comparable: {why(row)}") + "\n"

    def _json_lines(self, rows: Rows) -> Iterator[str]:
        for row in self._counted(rows):
            if isinstance(row, tuple):
                yield json.dumps(row._asdict()) + "\n"
            else:
                yield json.dumps({"a": None, "b": None, **missing_row(row)}) + "\n"


def _tag(tag: int | None, to: Screen) -> str:
    return "absent" if tag is None else to.tag(tag)


# --- totals ---------------------------------------------------------------------------------


def _tell_totals(a: str, b: str, found: DiffTotals, output: str, *, quiet: bool) -> int:
    total = found.total
    if output == "json":
        slots = [
            {"id": slot.id, "ipa": slot.ipa, "size_bytes": slot.size_bytes, **_totals_json(counts)}
            for slot, counts in found.slots
        ]
        document: dict[str, Any] = {
            "schema": "mtetool.diff-stat/1",
            "a": a,
            "b": b,
            "same": not total.differing_bytes,
            **_totals_json(total),
            "slots": slots,
            **missing_json("missing", found.missing),
        }
        print_json(document)
    else:
        _print_totals(a, b, found)
        _warn_of(found.missing, quiet=quiet)
    if total.differing_bytes:
        return STATUS_NO
    return STATUS_PARTIAL if found.missing else STATUS_OK


def _totals_json(counts: Totals) -> dict[str, int]:
    return {
        "compared_bytes": counts.compared_bytes,
        "differing_bytes": counts.differing_bytes,
        "differing_count": counts.n_ranges,
        "tagged_bytes": counts.tagged_bytes,
        "untagged_bytes": counts.untagged_bytes,
        "retagged_bytes": counts.retagged_bytes,
        "only_a_bytes": counts.only_a_bytes,
        "only_b_bytes": counts.only_b_bytes,
    }


def _print_totals(a: str, b: str, found: DiffTotals) -> None:
    total = found.total
    say(
        f"compared   {size(total.compared_bytes)} of {a} and {b}",
        f"differing  {size(total.differing_bytes)} in {counted(total.n_ranges, 'range')}",
    )
    for name, n_bytes in (
        ("tagged in B only", total.tagged_bytes),
        ("tagged in A only", total.untagged_bytes),
        ("with another tag", total.retagged_bytes),
        ("only in A", total.only_a_bytes),
        ("only in B", total.only_b_bytes),
    ):
        if n_bytes:
            say(f"  {name:<16}  {size(n_bytes)}")
    if len(found.slots) > 1 and total.differing_bytes:
        rows = [
            (slot.id, f"{slot.ipa:#x}", size(counts.differing_bytes), f"{counts.n_ranges:,}")
            for slot, counts in found.slots
        ]
        say(*table(("slot", "ipa", "differing", "ranges"), rows, right=("slot", "ranges")))
    say(*missing_lines("not comparable", found.missing))
