"""`mtetool save`: save a guest's tags to a snapshot."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import click

from mtetool.backends import open_files, open_guest
from mtetool.cli.naming import check_inputs
from mtetool.cli.options import (
    EVERY_PAGE_OPTION,
    FILE,
    NAME,
    RANGE_OPTION,
    SIZE,
    SLOT_OPTION,
    completes,
    progress_options,
    report_option,
    snapshot_target,
)
from mtetool.cli.options import guest_options as with_guest_options
from mtetool.cli.progress import shown
from mtetool.cli.ranges import (
    extent_rows,
    missing_json,
    missing_lines,
    size,
    slot_rows,
    warn_partial,
)
from mtetool.cli.render import print_json, reporting_on, say, warn
from mtetool.guest import Extent, GuestOptions

if TYPE_CHECKING:
    from mtetool.flows.save import SaveResult
    from mtetool.sources.layers import Layers

_CONSISTENT = {
    True: "yes, the guest stood still",
    False: "no, the guest ran meanwhile",
    None: "unknown, mtetool could not see whether the guest ran",
}


@click.command("save")
@click.argument("guest", type=NAME, metavar="GUEST", shell_complete=completes("guests"))
@click.option(
    "-o",
    "--out",
    type=FILE,
    metavar="FILE",
    shell_complete=completes("files"),
    help="Where the snapshot goes; - is standard output.",
)
@click.option("--force", is_flag=True, help="Overwrite FILE if it exists.")
@RANGE_OPTION
@SLOT_OPTION
@click.option(
    "--partial",
    type=click.Choice(["keep", "fail"]),
    help="Where some pages cannot be read: keep the rest (default), or fail.",
)
@click.option("--freeze", is_flag=True, help="Stop the guest's vCPUs while tags are read.")
@click.option(
    "--spool", type=SIZE, metavar="SIZE", help="Keep up to SIZE in memory until tags are read."
)
@click.option(
    "--base",
    "bases",
    type=FILE,
    multiple=True,
    shell_complete=completes("files"),
    metavar="FILE",
    help="Save what has changed since (repeatable: the oldest first).",
)
@EVERY_PAGE_OPTION
@click.option("--jobs", type=click.IntRange(1, 256), metavar="N", help="Threads that compress.")
@click.option(
    "--level", type=click.IntRange(1, 19), default=1, metavar="N", help="The zstd level (1)."
)
@with_guest_options
@progress_options
@report_option
def command(
    guest: str,
    out: str | None,
    force: bool,
    ranges: tuple[Extent, ...],
    slots: tuple[int, ...],
    partial: Literal["keep", "fail"] | None,
    freeze: bool,
    spool: int | None,
    bases: tuple[str, ...],
    every_page: bool,
    jobs: int | None,
    level: int,
    guest_options: GuestOptions,
    quiet: bool,
    progress: str,
    output: str,
) -> int:
    """Save the tags of GUEST to a snapshot.

    Pause the guest first, or use --freeze: the tags of a running guest change while they are
    read. Without -o the snapshot goes to standard output. Status 3 when some pages could not be
    read.
    """
    # Load everything before looking at the guest: it may be paused, and waiting.
    from mtetool.files.output import output_file
    from mtetool.flows.save import SaveOptions, save

    target = snapshot_target(out)
    inputs = [*check_inputs(bases, [guest]), *open_files(guest)]
    options = SaveOptions(
        ranges=ranges,
        slots=slots,
        partial=partial,
        freeze=freeze,
        spool_bytes=spool,
        every_page=every_page,
        level=level,
        jobs=jobs,
    )
    started = time.monotonic()
    with (
        _opened(bases) if bases else nullcontext() as base,
        output_file(target, force=force, inputs=inputs) as stream,
        open_guest(guest, guest_options) as opened,
        shown(f"saving {guest}", progress) as update,
    ):
        result = save(opened, stream, options, base=base, progress=update)
    elapsed = time.monotonic() - started
    if result.consistent is False and not quiet:
        warn(
            f"{guest} ran during the save: the snapshot mixes tags of different moments;"
            " pause the guest first (virsh suspend, stop in QEMU's monitor; a process: kill -STOP),"
            " or use --freeze"
        )
    warn_partial((result.missing, "could not be read"), stopped=result.lost, quiet=quiet)
    with reporting_on(target, result.status):
        if output == "json":
            print_json(_document(guest, target, elapsed, result))
        elif target != "-" or not quiet:
            _tell(guest, target, elapsed, result)
    return result.status


def _opened(bases: Sequence[str]) -> AbstractContextManager[Layers]:
    """Open the base of a delta, together with the deltas that apply to it."""
    from mtetool.sources.layers import open_layers

    return open_layers(bases)


def _document(guest: str, target: str, elapsed: float, result: SaveResult) -> dict[str, Any]:
    frozen = result.frozen_seconds
    return {
        "schema": "mtetool.save/1",
        "source": guest,
        "file": None if target == "-" else target,
        "file_bytes": result.written_bytes,
        "snapshot_id": result.header.snapshot_id,
        "base_id": result.header.base_id,
        "page_size_bytes": result.header.page_size_bytes,
        "scope": extent_rows(result.scope),
        "saved_bytes": result.saved_bytes,
        "uniform_bytes": result.uniform_bytes,
        "changed_bytes": result.changed_bytes,
        "skipped_memslots": slot_rows(result.skipped),
        **missing_json("missing", result.missing),
        "consistent": result.consistent,
        "lost": result.lost,
        "frozen_seconds": None if frozen is None else round(frozen, 3),
        "spool_overflowed": result.spool_overflowed,
        "copy_seconds": round(result.copy_seconds, 4),
        "elapsed_seconds": round(elapsed, 3),
    }


def _tell(guest: str, target: str, elapsed: float, result: SaveResult) -> None:
    from mtetool.sources.layout import UNREACHABLE

    name = "standard output" if target == "-" else target
    say(f"saved the tags of {size(result.saved_bytes)} of {guest} to {name}")
    say(f"snapshot: {size(result.written_bytes)}, in {elapsed:.1f} s")
    if result.changed_bytes is not None:
        say(
            f"it is a delta to the snapshot {result.header.base_id}:"
            f" the tags of {size(result.changed_bytes)} have changed"
        )
    say(f"consistent: {_CONSISTENT[result.consistent]}")
    if result.frozen_seconds is not None:
        say(f"the guest stood still for {result.frozen_seconds:.3f} s")
    if result.spool_overflowed:
        say("the snapshot outgrew --spool: the guest waited for the output too")
    for slot in result.skipped:
        say(f"left out: slot {slot.id} at {slot.ipa:#x}, {size(slot.size_bytes)}: {UNREACHABLE}")
    for line in missing_lines("missing", result.missing):
        say(line)
    if result.lost is not None:
        say(f"the guest was lost half-way: {result.lost}")
