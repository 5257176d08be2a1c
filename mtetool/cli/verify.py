"""`mtetool verify`: whether a snapshot is sound, and whether a guest has its tags."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from mtetool.backends import open_guest
from mtetool.cli.many import each_of
from mtetool.cli.naming import check_inputs
from mtetool.cli.options import (
    BASE_OPTION,
    EVERY_PAGE_OPTION,
    FILE,
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
from mtetool.cli.render import say, warn
from mtetool.errors import UsageError
from mtetool.guest import GuestOptions

if TYPE_CHECKING:
    from mtetool.flows.verify import VerifyResult


@click.command("verify")
@click.argument(
    "files",
    type=NAME,
    metavar="FILE...",
    shell_complete=completes("files"),
    nargs=-1,
    required=True,
)
@click.option(
    "--against",
    type=FILE,
    metavar="GUEST",
    shell_complete=completes("guests"),
    help="Compare every tag with this guest's.",
)
@BASE_OPTION
@MAP_OPTION
@EVERY_PAGE_OPTION
@with_guest_options
@progress_options
@report_option
def command(
    files: tuple[str, ...],
    against: str | None,
    bases: tuple[str, ...],
    moves: tuple[tuple[int, int], ...],
    every_page: bool,
    guest_options: GuestOptions,
    quiet: bool,
    progress: str,
    output: str,
) -> int:
    """Check every byte of the snapshot FILE (- is standard input), or of several.

    With --against, also compare every tag with a guest's: status 1 when they differ. Status 3
    when the snapshot marks ranges as missing, or some could not be compared.
    """
    check_inputs(
        [*bases, *files],
        [] if against is None else [against],
        instead=lambda guest: f"mtetool verify FILE --against {guest}",
    )
    if len(files) > 1 and (against is not None or bases):
        raise UsageError("--against and --base go with a single FILE")
    if moves and against is None:
        raise UsageError("--map goes with --against")

    def one(file: str) -> tuple[int, dict[str, Any]]:
        started = time.monotonic()
        result = _verify(
            file,
            bases,
            against,
            moves,
            every_page=every_page,
            options=guest_options,
            listed=listed_in(output),
            progress=progress,
        )
        elapsed = time.monotonic() - started
        if result.paused is False and not quiet:
            warn(f"{against} is running: its tags change while they are compared")
        warn_partial(
            (result.checked.missing, "are missing in the snapshot"),
            (result.unreadable, "could not be read"),
            quiet=quiet,
        )
        if output == "json":
            return result.status, _document(file, elapsed, result)
        _tell(file, elapsed, result)
        return result.status, {}

    return each_of(files, one, "mtetool.verify-list/1", as_json=output == "json")


def _verify(
    file: str,
    bases: tuple[str, ...],
    against: str | None,
    moves: tuple[tuple[int, int], ...],
    *,
    every_page: bool,
    options: GuestOptions,
    listed: int | None,
    progress: str,
) -> VerifyResult:
    from mtetool.flows.verify import verify, verify_against
    from mtetool.sources.opening import snapshot_input

    with snapshot_input(file, bases) as snapshot, shown(f"verifying {file}", progress) as update:
        reader = snapshot.reader()
        if against is None:
            return verify(reader, progress=update)
        with open_guest(against, options) as guest:
            return verify_against(
                reader,
                guest,
                against,
                every_page=every_page,
                moves=moves,
                listed=listed,
                progress=update,
            )


def _document(file: str, elapsed: float, result: VerifyResult) -> dict[str, Any]:
    checked = result.checked
    compared = result.against is not None
    return {
        "schema": "mtetool.verify/1",
        "file": file,
        "snapshot_id": checked.header.snapshot_id,
        "sound": True,
        "pieces": checked.n_pieces,
        "held_bytes": checked.held_bytes,
        "stored_bytes": checked.stored_bytes,
        **missing_json("missing", checked.missing),
        "against": result.against,
        "same": not result.differing if compared else None,
        "compared_bytes": result.compared_bytes if compared else None,
        **extents_json("differing", result.differing if compared else None),
        **missing_json("unreadable", result.unreadable if compared else None),
        "elapsed_seconds": round(elapsed, 3),
    }


def _tell(file: str, elapsed: float, result: VerifyResult) -> None:
    checked = result.checked
    say(f"{file}: sound, the tags of {size(checked.held_bytes)}, in {elapsed:.1f} s")
    for line in missing_lines("missing in the snapshot", checked.missing):
        say(line)
    if result.against is None:
        return
    if not result.differing:
        say(f"{result.against}: the same tags in {size(result.compared_bytes)}")
    for line in extent_lines(f"{result.against}: different tags", result.differing):
        say(line)
    for line in missing_lines(f"{result.against}: could not be read", result.unreadable):
        say(line)
