"""`mtetool restore`: write a snapshot's tags into a guest."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from mtetool.backends import is_guest, open_guest
from mtetool.cli.naming import check_inputs
from mtetool.cli.options import (
    BASE_OPTION,
    MAP_OPTION,
    NAME,
    completes,
    progress_options,
    report_option,
)
from mtetool.cli.options import guest_options as with_guest_options
from mtetool.cli.progress import shown
from mtetool.cli.ranges import (
    extent_lines,
    extents_json,
    listed_in,
    missing_json,
    missing_lines,
    size,
    warn_partial,
)
from mtetool.cli.render import print_json, printing, say, warn
from mtetool.guest import GuestOptions

if TYPE_CHECKING:
    from mtetool.flows.restore import RestoreResult


@click.command("restore")
@click.argument("file", type=NAME, metavar="FILE", shell_complete=completes("files"))
@click.argument("guest", type=NAME, metavar="GUEST", shell_complete=completes("guests"))
@click.option(
    "--verify/--no-verify", default=True, help="Read back what was written (on by default)."
)
@click.option("--dry-run", is_flag=True, help="Check and compare; write nothing.")
@click.option("--every-page", is_flag=True, help="Also write where the guest has no tags.")
@MAP_OPTION
@BASE_OPTION
@with_guest_options
@progress_options
@report_option
def command(
    file: str,
    guest: str,
    verify: bool,
    dry_run: bool,
    every_page: bool,
    moves: tuple[tuple[int, int], ...],
    bases: tuple[str, ...],
    guest_options: GuestOptions,
    quiet: bool,
    progress: str,
    output: str,
) -> int:
    """Write the tags of snapshot FILE (- is standard input) into GUEST, exactly.

    A file is checked as a whole before anything is written. Read-only slots are only compared.
    Status 3 when some pages did not get their tags; the report shows which, and why.
    """
    from mtetool.flows.restore import RestoreOptions, restore
    from mtetool.sources.opening import snapshot_input

    def swapped(named: str) -> str:
        if named == file and not is_guest(guest):
            return f"the snapshot comes first: mtetool restore {guest} {file}"
        return f"make a snapshot of it: mtetool save {named} -o FILE"

    check_inputs([*bases, file], [guest], instead=swapped)
    started = time.monotonic()
    with (
        snapshot_input(file, bases) as snapshot,
        open_guest(guest, guest_options) as opened,
        shown(f"restoring {guest}", progress) as update,
    ):
        result = restore(
            snapshot.reader,
            opened,
            RestoreOptions(verify, dry_run, every_page, moves, listed_in(output)),
            again=snapshot.seekable,
            progress=update,
        )
    elapsed = time.monotonic() - started
    if result.paused is False and not quiet:
        warn(f"{guest} is running: it may have changed tags meanwhile; pause it first")
    warn_partial(
        (result.missing, "are not in the snapshot"),
        (result.refused, "could not be written or read"),
        (result.readonly_differing, "differ in read-only memory"),
        (result.verify_differing, "read back differently"),
        stopped=result.stopped,
        quiet=quiet,
    )
    done = f"nothing was written to {guest}" if dry_run else f"the tags were written to {guest}"
    with printing(f"{done}: the status would have been {result.status}"):
        if output == "json":
            print_json(_document(file, guest, verify, elapsed, result))
        else:
            _tell(file, guest, elapsed, result)
    return result.status


def _document(
    file: str, guest: str, verify: bool, elapsed: float, result: RestoreResult
) -> dict[str, Any]:
    return {
        "schema": "mtetool.restore/1",
        "file": file,
        "source": guest,
        "snapshot_id": result.header.snapshot_id,
        "dry_run": result.dry_run,
        "verify": verify and not result.dry_run,
        "restored_bytes": result.restored_bytes,
        "restored_up_to": result.restored_up_to,
        "verified_bytes": result.verified_bytes,
        "readonly_bytes": result.readonly_bytes,
        **missing_json("missing", result.missing),
        **missing_json("refused", result.refused),
        **extents_json("readonly_differing", result.readonly_differing),
        **extents_json("verify_differing", result.verify_differing),
        **extents_json("changes", result.changes if result.dry_run else None),
        "stopped": result.stopped,
        "copy_seconds": round(result.copy_seconds, 4),
        "elapsed_seconds": round(elapsed, 3),
    }


def _tell(file: str, guest: str, elapsed: float, result: RestoreResult) -> None:
    if result.dry_run:
        say(f"nothing was written to {guest}: a dry run of {file}, {elapsed:.1f} s")
        if not result.changes:
            say("no tag would change")
        _say_all(extent_lines("would change", result.changes))
    else:
        restored, verified = size(result.restored_bytes), size(result.verified_bytes)
        say(f"restored the tags of {restored} of {guest} from {file}, in {elapsed:.1f} s")
        if result.verified_bytes:
            say(f"read back: {verified}")
    if result.readonly_bytes:
        say(f"read-only memory, compared only: {size(result.readonly_bytes)}")
    _say_all(extent_lines("read-only memory differs", result.readonly_differing))
    _say_all(missing_lines("not in the snapshot, left as it was", result.missing))
    _say_all(missing_lines("could not be written or read", result.refused))
    _say_all(extent_lines("read back differently", result.verify_differing))
    if result.stopped is not None:
        say(f"stopped before the end: {result.stopped}")


def _say_all(lines: list[str]) -> None:
    for line in lines:
        say(line)
