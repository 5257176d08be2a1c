"""`mtetool dump`: print tags."""

from __future__ import annotations

import json
import sys
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
    output_option,
    quiet_option,
)
from mtetool.cli.options import guest_options as with_guest_options
from mtetool.cli.ranges import columns, extent_rows, missing_json, size, why
from mtetool.cli.render import print_tail, put, warn
from mtetool.errors import STATUS_OK, STATUS_PARTIAL, UsageError
from mtetool.guest import GuestOptions
from mtetool.words import counted, printable

if TYPE_CHECKING:
    from mtetool.flows.dump import Run
    from mtetool.guest import Extent, Missing
    from mtetool.sources.tally import Tally

    Rows = Iterator[Run | Missing]

# Rows that are written at once: one write per row is ten times slower.
_BATCH_ROWS = 4096


@click.command("dump")
@click.argument("source", type=NAME, metavar="SOURCE", shell_complete=completes("sources"))
@click.option("--granules", "each", is_flag=True, help="A row for each granule (16 bytes).")
@RANGE_OPTION
@EVERY_PAGE_OPTION
@with_guest_options
@quiet_option
@output_option("raw")
def command(
    source: str,
    each: bool,
    ranges: tuple[Extent, ...],
    every_page: bool,
    guest_options: GuestOptions,
    quiet: bool,
    output: str,
) -> int:
    """Print the tags of SOURCE (a guest, a snapshot, or -), in runs of equal ones.

    raw is one byte per granule, slots in order of address, and 0xff for what cannot be read.
    Status 3 when some tags could not be read.
    """
    from mtetool.files.output import output_file
    from mtetool.flows.dump import granules, tag_runs, write_raw
    from mtetool.sources.opening import open_source
    from mtetool.sources.source import asked

    if output == "raw" and sys.stdout.isatty():
        raise UsageError(
            "raw tags are not for a terminal", hint="write to a pipe, or to a file: > FILE"
        )
    if output == "raw" and each:
        raise UsageError("--granules is for text and json: raw has one byte per granule anyway")
    check_inputs(sources=[source])
    with open_source(source, guest_options, every_page=every_page) as opened:
        extents = asked(opened, list(ranges))
        if output == "raw":
            with output_file("-", force=False) as out:
                missing = write_raw(opened, extents, out)
        else:
            rows = granules(opened, extents) if each else tag_runs(opened, extents)
            if output == "json":
                missing = _json(source, opened.page_size_bytes, extents, rows, each=each)
            else:
                missing = _text(rows, each=each)
    if missing and not quiet:
        where = counted(missing.count, "range")
        warn(f"the tags of {size(missing.size_bytes)} in {where} could not be read")
    return STATUS_PARTIAL if missing else STATUS_OK


def _text(rows: Rows, *, each: bool) -> Tally[Missing]:
    """Stream rows as text, and return what was missing."""
    from mtetool.guest import Missing
    from mtetool.sources.tally import Tally

    missing: Tally[Missing] = Tally()

    def lines() -> Iterator[str]:
        for row in rows:
            if isinstance(row, Missing):
                missing.add(row)
                yield printable(f"{columns(row)}  missing: {why(row)}") + "\n"
            elif each:
                yield f"{row.ipa:>#14x}  {row.tag:x}\n"
            else:
                yield f"{columns(row)}  {row.tag:x}\n"

    _write_batches(lines(), "")
    return missing


def _json(
    source: str, page_size_bytes: int, extents: list[Extent], rows: Rows, *, each: bool
) -> Tally[Missing]:
    """Stream one JSON object: a guest's rows may not fit into memory."""
    from mtetool.guest import Missing
    from mtetool.sources.tally import Tally

    missing: Tally[Missing] = Tally()

    def items() -> Iterator[str]:
        for row in rows:
            if isinstance(row, Missing):
                missing.add(row)
            elif each:
                yield f'{{"ipa": {row.ipa}, "tag": {row.tag}}}'
            else:
                yield f'{{"ipa": {row.ipa}, "size_bytes": {row.size_bytes}, "tag": {row.tag}}}'

    head = {
        "schema": "mtetool.dump/1",
        "source": source,
        "page_size_bytes": page_size_bytes,
        "scope": extent_rows(extents),
        "runs" if each else "granules": None,
    }
    put(json.dumps(head)[:-1] + f', "{"granules" if each else "runs"}": [\n')
    _write_batches(items(), ",\n")
    print_tail(missing_json("missing", missing))
    return missing


def _write_batches(parts: Iterator[str], between: str) -> None:
    before = ""
    while batch := list(islice(parts, _BATCH_ROWS)):
        put(before + between.join(batch))
        before = between
