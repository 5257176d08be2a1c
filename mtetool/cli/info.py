"""`mtetool info`: what a snapshot says about itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mtetool.cli.many import each_of
from mtetool.cli.naming import check_inputs
from mtetool.cli.options import NAME, completes, report_option
from mtetool.cli.ranges import extent_rows, missing_json, missing_lines, size
from mtetool.cli.render import describe_guest, put, say, table
from mtetool.errors import STATUS_OK
from mtetool.guest import GuestInfo, Memslot
from mtetool.sources.tally import Tally
from mtetool.words import counted

if TYPE_CHECKING:
    from mtetool.guest import Missing
    from mtetool.snapshot.model import Summary

_CONSISTENT = {True: "yes", False: "no, the guest ran during the save", None: "unknown"}


@click.command("info")
@click.argument(
    "files",
    type=NAME,
    metavar="FILE...",
    shell_complete=completes("files"),
    nargs=-1,
    required=True,
)
@report_option
def command(files: tuple[str, ...], output: str) -> int:
    """Show what the snapshot FILE (- is standard input) holds, or each of several.

    The tags are not decompressed; to check that they are sound, use mtetool verify.
    """
    from mtetool.snapshot.summary import read_summary

    check_inputs(files, instead=_describe)
    is_first = True

    def one(file: str) -> tuple[int, dict[str, Any]]:
        nonlocal is_first
        summary = read_summary(file)
        missing: Tally[Missing] = Tally()
        for item in summary.missing:
            missing.add(item)
        if output == "json":
            return STATUS_OK, _document(file, summary, missing)
        if not is_first:
            put("\n")
        is_first = False
        _tell(file, summary, missing)
        return STATUS_OK, {}

    return each_of(files, one, "mtetool.info-list/1", as_json=output == "json")


def _describe(guest: str) -> str:
    kind, _, rest = guest.partition(":")
    return f"mtetool emu show {rest}" if kind == "emu" else f"mtetool list, or mtetool dump {guest}"


def _guest(summary: Summary) -> GuestInfo:
    header = summary.header
    return GuestInfo(
        source=header.source,
        mte=True,  # Tags were read from it.
        page_size_bytes=header.page_size_bytes,
        memslots=header.memslots,
        vmm=header.vmm,
        name=header.name,
    )


def _document(file: str, summary: Summary, missing: Tally[Missing]) -> dict[str, Any]:
    header, footer = summary.header, summary.footer
    return {
        "schema": "mtetool.info/1",
        "file": file,
        "file_bytes": summary.file_bytes,
        "snapshot_id": header.snapshot_id,
        "base_id": header.base_id,
        "created_utc": header.created_utc,
        "tool": header.tool,
        "kernel": header.kernel,
        "machine": header.machine,
        **describe_guest(_guest(summary)),
        "scope": extent_rows(header.scope),
        "consistent": footer.consistent,
        "paused": header.paused,
        "records": footer.records,
        "held_bytes": footer.granules * 16,
        "tagged_bytes": None if header.base_id else footer.tagged_granules * 16,
        "tagged_pages": None if header.base_id else footer.tagged_pages,
        "changed_bytes": None if footer.changed_granules is None else footer.changed_granules * 16,
        **missing_json("missing", missing),
    }


def _tell(file: str, summary: Summary, missing: Tally[Missing]) -> None:
    header, footer = summary.header, summary.footer
    held = footer.granules * 16
    tagged = f"{size(footer.tagged_granules * 16)} in {counted(footer.tagged_pages, 'page')}"
    changed = "unknown"
    if footer.changed_granules is not None:
        changed = f"{size(footer.changed_granules * 16)} since the base"
    rows = [
        ("file", file),
        ("size", None if summary.file_bytes is None else size(summary.file_bytes)),
        ("id", header.snapshot_id),
        ("base", header.base_id),
        ("created", header.created_utc),
        ("by", f"{header.tool}, Linux {header.kernel} {header.machine}"),
        ("source", header.source),
        ("vmm", header.vmm),
        ("name", header.name),
        ("page size", size(header.page_size_bytes)),
        ("consistent", _CONSISTENT[footer.consistent]),
        ("memory", f"{size(held)} in {counted(footer.records, 'record')}"),
        ("changed", changed) if header.base_id else ("tagged", tagged),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        if value is not None:
            say(f"{name:<{width}}  {value}")
    say("memslots:" if header.memslots else "memslots: unknown")
    if header.memslots:
        slots = [_slot_row(slot) for slot in header.memslots]
        say(*table(("  id", "ipa", "size", "kind", "access"), slots, right=("  id",)))
    for line in missing_lines("missing", missing):
        say(line)


def _slot_row(slot: Memslot) -> tuple[object, ...]:
    access = {True: "read-only", False: "read-write", None: "unknown"}[slot.readonly]
    return slot.id, f"{slot.ipa:#x}", size(slot.size_bytes), slot.kind, access
