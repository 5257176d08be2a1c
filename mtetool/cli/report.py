"""`mtetool report`: tags as a page for a browser."""

from __future__ import annotations

from contextlib import ExitStack

import click

from mtetool.cli.naming import check_inputs
from mtetool.cli.options import (
    BASE_OPTION,
    EVERY_PAGE_OPTION,
    FILE,
    NAME,
    RANGE_OPTION,
    completes,
    quiet_option,
)
from mtetool.cli.options import guest_options as with_guest_options
from mtetool.cli.ranges import size
from mtetool.cli.render import reporting_on, say, warn
from mtetool.errors import STATUS_OK, STATUS_PARTIAL
from mtetool.guest import Extent, GuestOptions


@click.command("report")
@click.argument("source", type=NAME, metavar="SOURCE", shell_complete=completes("sources"))
@click.option(
    "-o",
    "--out",
    type=FILE,
    metavar="FILE",
    required=True,
    shell_complete=completes("files"),
    help="The page; - is standard output.",
)
@click.option("--force", is_flag=True, help="Overwrite FILE if it exists.")
@click.option(
    "--against",
    type=NAME,
    metavar="SOURCE",
    shell_complete=completes("sources"),
    help="Mark where the tags differ from those of another source.",
)
@RANGE_OPTION
@BASE_OPTION
@EVERY_PAGE_OPTION
@with_guest_options
@quiet_option
def command(
    source: str,
    out: str,
    force: bool,
    against: str | None,
    ranges: tuple[Extent, ...],
    bases: tuple[str, ...],
    every_page: bool,
    guest_options: GuestOptions,
    quiet: bool,
) -> int:
    """Write one page of HTML about the tags of SOURCE: layout, statistics, a map to search.

    It needs no network and no other file. Status 3 when some tags are missing.
    """
    from mtetool.files.output import output_file
    from mtetool.flows.report import report
    from mtetool.formats.opening import Wanted, open_input
    from mtetool.sources.source import asked

    inputs = check_inputs(bases, [source, *([against] if against else [])])
    wanted = Wanted(
        options=guest_options,
        every_page=every_page,
        bases=bases,
        bases_of_another=against is not None,
    )
    with ExitStack() as stack:
        opened = stack.enter_context(open_input(source, wanted))
        other = stack.enter_context(open_input(against, wanted)) if against else None
        extents = asked(opened.tags, ranges)
        parts, missing_bytes = report(opened, extents, other)
        with output_file(out, force=force, inputs=inputs) as stream:
            for part in parts:
                stream.write(part.encode("utf-8", "backslashreplace"))
    if missing_bytes and not quiet:
        warn(f"the tags of {size(missing_bytes)} are missing; the map shows where")
    status = STATUS_PARTIAL if missing_bytes else STATUS_OK
    with reporting_on(out, status):
        if not quiet:
            say(f"wrote a report of {source} to {'standard output' if out == '-' else out}")
    return status
