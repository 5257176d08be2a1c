"""`mtetool diff`: where the tags of two sources differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import click

from mtetool.cli.naming import check_inputs
from mtetool.cli.options import (
    EVERY_PAGE_OPTION,
    NAME,
    RANGE_OPTION,
    completes,
    quiet_option,
    report_option,
)
from mtetool.cli.options import guest_options as with_guest_options
from mtetool.cli.ranges import columns, missing_json, size, why
from mtetool.cli.render import print_tail, put, warn
from mtetool.errors import STATUS_NO, STATUS_OK, STATUS_PARTIAL
from mtetool.guest import Extent, GuestOptions
from mtetool.words import counted, printable

if TYPE_CHECKING:
    from mtetool.flows.diff import Difference
    from mtetool.guest import Missing

_BATCH_ROWS = 4096


@click.command("diff")
@click.argument("a", type=NAME, metavar="A", shell_complete=completes("sources"))
@click.argument("b", type=NAME, metavar="B", shell_complete=completes("sources"))
@RANGE_OPTION
@EVERY_PAGE_OPTION
@with_guest_options
@quiet_option
@report_option
def command(
    a: str,
    b: str,
    ranges: tuple[Extent, ...],
    every_page: bool,
    guest_options: GuestOptions,
    quiet: bool,
    output: str,
) -> int:
    """Show where the tags of A and B (guests, snapshots, or -) differ.

    Each row is address, size, tag in A, tag in B. Memory that only one of them has differs too
    (absent). Status 0 when they are the same, 1 when they differ.
    """
    from mtetool.flows.diff import check_ranges, diff
    from mtetool.sources.opening import open_source

    check_inputs(sources=[a, b])
    asked = list(ranges)
    with (
        open_source(a, guest_options, every_page=every_page) as left,
        open_source(b, guest_options, every_page=every_page) as right,
    ):
        check_ranges(asked, left, right)
        out = _Output(a, b, as_json=output == "json")
        status = out.write(diff(left, right, asked or None))
    if out.missing and not quiet:
        where = counted(out.missing.count, "range")
        warn(f"the tags of {size(out.missing.size_bytes)} in {where} could not be compared")
    return status


class _Output:
    """Streams rows and counts them: all differences of a big guest may not fit into memory."""

    def __init__(self, a: str, b: str, *, as_json: bool) -> None:
        from mtetool.sources.tally import Tally

        self._names = {"a": a, "b": b}
        self._as_json = as_json
        self._count = 0
        self._size_bytes = 0
        self.missing: Tally[Missing] = Tally()

    def write(self, rows: Iterator[Difference | Missing]) -> int:
        """Write all rows, and return the exit status."""
        between = ",\n" if self._as_json else ""
        if self._as_json:
            head = {"schema": "mtetool.diff/1", **self._names}
            put(json.dumps(head)[:-1] + ', "ranges": [\n')
        parts = self._parts(rows)
        before = ""
        while batch := list(islice(parts, _BATCH_ROWS)):
            put(before + between.join(batch))
            before = between
        if self._as_json:
            tail = {
                "same": not self._count,
                "differing_bytes": self._size_bytes,
                "differing_count": self._count,
                **missing_json("missing", self.missing),
            }
            print_tail(tail)
        if self._count:
            return STATUS_NO
        return STATUS_PARTIAL if self.missing else STATUS_OK

    def _parts(self, rows: Iterator[Difference | Missing]) -> Iterator[str]:
        from mtetool.guest import Missing

        for row in rows:
            if isinstance(row, Missing):
                self.missing.add(row)
                if not self._as_json:
                    yield printable(f"{columns(row)}  not comparable: {why(row)}") + "\n"
                continue
            self._count += 1
            self._size_bytes += row.size_bytes
            if self._as_json:
                yield json.dumps(row._asdict())
            else:
                yield f"{columns(row)}  {_tag(row.a)}  {_tag(row.b)}\n"


def _tag(tag: int | None) -> str:
    return "absent" if tag is None else f"{tag:x}"
