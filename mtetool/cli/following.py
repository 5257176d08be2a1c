"""`mtetool dump --follow`: what changes in a live guest."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from mtetool.backends import is_guest, open_guest
from mtetool.cli.ranges import columns, extent_rows, size
from mtetool.cli.render import note, put, warn
from mtetool.cli.rows import write_batches
from mtetool.cli.screen import Screen, screen
from mtetool.errors import STATUS_OK, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtetool.flows.diff import Difference
    from mtetool.flows.following import Round
    from mtetool.guest import Extent, GuestOptions


def follow_guest(
    source: str,
    *,
    ranges: Sequence[Extent],
    slots: Sequence[int],
    every_page: bool,
    options: GuestOptions,
    interval_seconds: float,
    count: int | None,
    limit: int | None,
    quiet: bool,
    as_lines: bool,
) -> int:
    """Print what changed from each read of a guest to the next, until a signal ends it."""
    from mtetool.flows.following import follow

    if not is_guest(source):
        raise UsageError(f"--follow reads a live guest, and {source} is not one")
    to = screen()
    rounds = follow(
        partial(open_guest, source, options),
        ranges=ranges,
        slots=slots,
        every_page=every_page,
        interval_seconds=interval_seconds,
        count=count,
    )
    first = next(rounds)
    if as_lines:
        head = {
            "schema": "mtetool.follow-lines/1",
            "source": source,
            "interval_seconds": interval_seconds,
            "scope": extent_rows(first.extents),
        }
        put(json.dumps(head) + "\n")
    if not quiet:
        _say_first(source, first, interval_seconds)
    for found in rounds:
        lines = _json_lines(found) if as_lines else _text_lines(found, to)
        write_batches(islice(lines, limit), "")
        left = sum(1 for _ in lines)
        if left and not quiet:
            note(f"{left:,} more changes were not printed (--limit)")
        sys.stdout.flush()  # so that the reader of a pipe sees each round at once
    return STATUS_OK


def _say_first(source: str, first: Round, interval_seconds: float) -> None:
    n_bytes = sum(extent.size_bytes for extent in first.extents)
    note(f"following the tags of {size(n_bytes)} of {source}, every {interval_seconds:g} s")
    if first.missing_bytes:
        warn(f"the tags of {size(first.missing_bytes)} cannot be read, and are not followed")


def _text_lines(found: Round, to: Screen) -> Iterator[str]:
    clock = time.strftime("%H:%M:%S", time.localtime(found.time))
    for change in found.changes:
        yield f"{clock}  {columns(change)}  {_tag(change.a, to)}  {_tag(change.b, to)}\n"


def _tag(tag: int | None, to: Screen) -> str:
    return "absent" if tag is None else to.tag(tag)


def _json_lines(found: Round) -> Iterator[str]:
    for change in found.changes:
        row: Difference = change
        yield json.dumps({"time": round(found.time, 3), **row._asdict()}) + "\n"
