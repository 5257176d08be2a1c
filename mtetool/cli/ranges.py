"""Tallies of ranges as text and as JSON: one form for all reports."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mtetool.cli.render import warn
from mtetool.errors import errno_name
from mtetool.streaming import Rows, extent_row
from mtetool.words import counted

if TYPE_CHECKING:
    from mtetool.flows.diff import Difference
    from mtetool.flows.dump import Run
    from mtetool.guest import Extent, Memslot, Missing
    from mtetool.sources.tally import Tally

TEXT_ROWS = 20
"""How many ranges are listed for people; the JSON form has them all."""


def listed_in(output: str) -> int | None:
    """Return how many ranges of a kind a report of this form lists; None: all."""
    return None if output == "json" else TEXT_ROWS


def size(n_bytes: int) -> str:
    """Return `64 MiB`, followed by the exact bytes where the short form rounds."""
    value, unit = float(n_bytes), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    if unit == "bytes":
        return counted(n_bytes, "byte")
    if value == int(value):
        return f"{int(value)} {unit}"
    return f"{value:.1f} {unit} ({n_bytes} bytes)"


def missing_json(name: str, tally: Tally[Missing] | None) -> dict[str, Any]:
    """The keys `NAME`, `NAME_count` and `NAME_bytes` of a report; null where there is none."""
    return _counted(name, tally, map(missing_row, tally or ()))


def extents_json(name: str, tally: Tally[Extent] | None) -> dict[str, Any]:
    """The keys `NAME`, `NAME_count` and `NAME_bytes` of a report; null where there is none."""
    return _counted(name, tally, map(extent_row, tally or ()))


def extent_rows(extents: Iterable[Extent]) -> list[dict[str, int]]:
    """Extents as JSON."""
    return [extent_row(extent) for extent in extents]


def missing_row(item: Missing) -> dict[str, Any]:
    """A missing range as JSON."""
    return {
        "ipa": item.ipa,
        "size_bytes": item.size_bytes,
        "errno": errno_name(item.errno) if item.errno else None,
        "reason": item.reason,
    }


def slot_rows(slots: Iterable[Memslot]) -> list[dict[str, Any]]:
    """Memslots as JSON."""
    return [
        {
            "id": slot.id,
            "ipa": slot.ipa,
            "size_bytes": slot.size_bytes,
            "readonly": slot.readonly,
            "kind": slot.kind,
        }
        for slot in slots
    ]


def warn_partial(
    *parts: tuple[Tally[Any] | None, str], stopped: str | None = None, quiet: bool
) -> None:
    """Warn, in one line on standard error, that a command did only part of its work.

    `parts` are ranges and what happened to their tags; `stopped` is why it ended early.
    """
    words = [
        f"the tags of {size(tally.size_bytes)} in {counted(tally.count, 'range')} {became}"
        for tally, became in parts
        if tally
    ]
    words += [stopped] if stopped else []
    if words and not quiet:
        warn(f"partial: {'; '.join(words)}")


def missing_lines(title: str, tally: Tally[Missing]) -> list[str]:
    """Missing ranges, for people; empty where nothing is missing."""
    rows = [f"{_span(item)}  {why(item)}" for item in tally.first(TEXT_ROWS)]
    return _listed(title, tally, rows)


def extent_lines(title: str, tally: Tally[Extent]) -> list[str]:
    """Ranges, for people; empty where there are none."""
    return _listed(title, tally, [_span(item) for item in tally.first(TEXT_ROWS)])


def _counted(name: str, tally: Tally[Any] | None, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    if tally is None:
        return dict.fromkeys((f"{name}_bytes", f"{name}_count", name))
    if tally.truncated:
        warn(
            f"{name!r} does not list all of the {counted(tally.count, 'range')}: the directory for"
            " temporary files is full; use another: TMPDIR=DIRECTORY mtetool ..."
        )
    return {f"{name}_bytes": tally.size_bytes, f"{name}_count": tally.count, name: Rows(rows)}


def _listed(title: str, tally: Tally[Any], rows: list[str]) -> list[str]:
    if not tally:
        return []
    lines = [f"{title}: {counted(tally.count, 'range')}, {size(tally.size_bytes)}"]
    lines += [f"  {row}" for row in rows]
    if tally.count > len(rows):
        lines.append(f"  … and {tally.count - len(rows)} more (--output json lists all)")
    return lines


def _span(item: Extent | Missing) -> str:
    return f"{item.ipa:#x}:{item.size_bytes:#x}"


def columns(item: Extent | Missing | Run | Difference) -> str:
    """Address and size as columns: hexadecimal without leading zeros, as everywhere."""
    return f"{item.ipa:>#14x}  {item.size_bytes:>#12x}"


def why(item: Missing) -> str:
    """Why a range is missing: the errno by name, and the reason."""
    return f"{errno_name(item.errno)}: {item.reason}" if item.errno else item.reason
