"""`mtetool stats`: what the tags of a source look like, in numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mtetool.cli.naming import check_inputs
from mtetool.cli.options import (
    BASE_OPTION,
    EVERY_PAGE_OPTION,
    NAME,
    RANGE_OPTION,
    SLOT_OPTION,
    completes,
    progress_options,
    report_option,
)
from mtetool.cli.options import guest_options as with_guest_options
from mtetool.cli.progress import shown
from mtetool.cli.ranges import extent_rows, missing_json, missing_lines, size, warn_partial
from mtetool.cli.render import print_json, put, say, table
from mtetool.errors import STATUS_OK, STATUS_PARTIAL
from mtetool.guest import Extent, GuestOptions

if TYPE_CHECKING:
    from mtetool.flows.stats import Statistics
    from mtetool.sources.source import TagSource


@click.command("stats")
@click.argument("source", type=NAME, metavar="SOURCE", shell_complete=completes("sources"))
@RANGE_OPTION
@SLOT_OPTION
@BASE_OPTION
@EVERY_PAGE_OPTION
@with_guest_options
@progress_options
@report_option
def command(
    source: str,
    ranges: tuple[Extent, ...],
    slots: tuple[int, ...],
    bases: tuple[str, ...],
    every_page: bool,
    guest_options: GuestOptions,
    quiet: bool,
    progress: str,
    output: str,
) -> int:
    """Count the tags of SOURCE (a guest, a snapshot, or -): how many, how long, how random.

    Status 3 when some tags could not be read.
    """
    from mtetool.flows.stats import statistics
    from mtetool.sources.opening import open_source
    from mtetool.sources.source import asked

    check_inputs(bases, [source])
    with (
        open_source(source, guest_options, every_page=every_page, bases=bases) as opened,
        shown(f"counting {source}", progress) as update,
    ):
        extents = asked(opened, ranges, slots)
        found = statistics(opened, extents, progress=update)
    if output == "json":
        print_json(_document(opened, extents, found))
    else:
        _tell(opened, found)
    warn_partial((found.missing, "could not be read"), quiet=quiet)
    return STATUS_PARTIAL if found.missing else STATUS_OK


def _document(source: TagSource, extents: list[Extent], found: Statistics) -> dict[str, Any]:
    from mtetool.cli.counts import counts_json

    return {
        "schema": "mtetool.stats/1",
        "source": source.name,
        "page_size_bytes": source.page_size_bytes,
        "scope": extent_rows(extents),
        **counts_json(found.total),
        "slots": [
            {"id": slot.id, "ipa": slot.ipa, "size_bytes": slot.size_bytes, **counts_json(counts)}
            for slot, counts in found.slots
        ],
        **missing_json("missing", found.missing),
    }


def _tell(source: TagSource, found: Statistics) -> None:
    from mtetool.cli.counts import head_lines, length_lines, quality_lines, tag_lines
    from mtetool.cli.screen import screen

    to = screen()
    say(f"source   {source.name}", *head_lines(found.total))
    for part in (
        list(quality_lines(found.total)),
        list(tag_lines(found.total, to)),
        list(length_lines(found.total, to)),
    ):
        if part:
            put("\n" + "".join(f"{line}\n" for line in part))
    if len(found.slots) > 1:
        put("\n")
        rows = [
            (
                slot.id,
                f"{slot.ipa:#x}",
                size(counts.size_bytes),
                *(_shown(share) for share in (counts.tagged_share, counts.collision_share)),
                None if counts.run_entropy_bits is None else f"{counts.run_entropy_bits:.3f}",
                f"{counts.tagged_runs:,}",
            )
            for slot, counts in found.slots
        ]
        names = ("slot", "ipa", "size", "tagged", "equal by chance", "run entropy", "tagged runs")
        say(*table(names, rows, right=("slot", "run entropy", "tagged runs")))
    say(*missing_lines("could not be read", found.missing))


def _shown(share: float | None) -> str | None:
    return None if share is None else f"{share * 100:.2f} %"
