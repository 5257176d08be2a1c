"""`mtetool dump`: print tags."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from mtetool.cli.naming import check_inputs
from mtetool.cli.options import (
    BASE_OPTION,
    EVERY_PAGE_OPTION,
    NAME,
    RANGE_OPTION,
    SLOT_OPTION,
    TAG,
    Parsed,
    completes,
    output_option,
    parse_number,
    progress_options,
)
from mtetool.cli.options import guest_options as with_guest_options
from mtetool.cli.progress import progress as shown_progress
from mtetool.cli.ranges import size
from mtetool.cli.render import warn
from mtetool.errors import STATUS_OK, STATUS_PARTIAL, UsageError
from mtetool.words import counted

if TYPE_CHECKING:
    from mtetool.cli.rows import Choice
    from mtetool.flows.dump import Wanted
    from mtetool.guest import Extent, GuestOptions, Missing
    from mtetool.sources.source import TagSource
    from mtetool.sources.tally import Tally

_MOST_CONTEXT = 1 << 16


@click.command("dump")
@click.argument("source", type=NAME, metavar="SOURCE", shell_complete=completes("sources"))
@click.option("--granules", "each", is_flag=True, help="A row for each granule (16 bytes).")
@click.option(
    "--at",
    "addresses",
    type=Parsed("address", parse_number),
    multiple=True,
    metavar="ADDR",
    help="What is at an address or tagged pointer.",
)
@click.option(
    "--context",
    type=click.IntRange(0, _MOST_CONTEXT),
    metavar="N",
    help="Granules around --at (32).",
)
@click.option("--virtual", is_flag=True, help="--at takes virtual addresses of a VM.")
@click.option("--vcpu", type=click.IntRange(min=0), metavar="N", help="Those of this vCPU.")
@click.option("--only-tagged", is_flag=True, help="Leave out the tag 0.")
@click.option("--tag", "tags", type=TAG, multiple=True, metavar="N", help="Only this tag.")
@RANGE_OPTION
@SLOT_OPTION
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N rows.")
@click.option("--follow", is_flag=True, help="Read a guest repeatedly; print changes.")
@click.option(
    "--interval",
    type=click.FloatRange(0.05, 86400),
    metavar="SECONDS",
    help="From read to read (1).",
)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N reads.")
@BASE_OPTION
@EVERY_PAGE_OPTION
@with_guest_options
@progress_options
@output_option("jsonl", "raw", "map", "grid", "png", "svg")
def command(
    source: str,
    each: bool,
    addresses: tuple[int, ...],
    context: int | None,
    virtual: bool,
    vcpu: int | None,
    only_tagged: bool,
    tags: tuple[int, ...],
    ranges: tuple[Extent, ...],
    slots: tuple[int, ...],
    limit: int | None,
    follow: bool,
    interval: float | None,
    count: int | None,
    bases: tuple[str, ...],
    every_page: bool,
    guest_options: GuestOptions,
    quiet: bool,
    progress: str,
    output: str,
) -> int:
    """Print the tags of SOURCE (a guest, a snapshot, or -), in runs of equal ones.

    Status 3 when some tags could not be read, 1 when a pointer's tag is not its memory's.
    """
    given = {
        "--granules": each,
        "--at": addresses,
        "--context": context is not None,
        "--virtual": virtual,
        "--vcpu": vcpu is not None,
        "--only-tagged": only_tagged,
        "--tag": tags,
        "--range": ranges,
        "--slot": slots,
        "--limit": limit is not None,
        "--follow": follow,
        "--interval": interval is not None,
        "--count": count is not None,
        "--base": bases,
    }
    _check_together({name for name, value in given.items() if value}, output)
    check_inputs(bases, [source])
    if follow:
        from mtetool.cli.following import follow_guest

        return follow_guest(
            source,
            ranges=ranges,
            slots=slots,
            every_page=every_page,
            options=guest_options,
            interval_seconds=1.0 if interval is None else interval,
            count=count,
            limit=limit,
            quiet=quiet,
            as_lines=output == "jsonl",
        )
    from mtetool.flows.dump import wanted_tags
    from mtetool.sources.opening import open_source
    from mtetool.sources.source import asked

    with open_source(source, guest_options, every_page=every_page, bases=bases) as opened:
        if addresses:
            n_context = 32 if context is None else context
            if virtual:
                from mtetool.cli.virtual import look_at_addresses

                return look_at_addresses(
                    opened, addresses, n_context, vcpu, as_json=output == "json"
                )
            from mtetool.cli.looking import look_at

            return look_at(opened, addresses, n_context, as_json=output == "json")
        extents = asked(opened, ranges, slots)
        choice = _choice(each, wanted_tags(tags, only_tagged=only_tagged), limit)
        missing = _print(opened, extents, choice, progress, output)
    if missing and not quiet:
        where = counted(missing.count, "range")
        warn(f"the tags of {size(missing.size_bytes)} in {where} could not be read")
    return STATUS_PARTIAL if missing else STATUS_OK


def _choice(each: bool, wanted: Wanted | None, limit: int | None) -> Choice:
    from mtetool.cli.rows import Choice

    return Choice(each=each, wanted=wanted, limit=limit)


# Which options the forms of the output, and the options that change everything, leave room for.
_ROWS = {"--granules", "--only-tagged", "--tag", "--range", "--slot", "--base"}
_TOGETHER = {
    "--at": {"--at", "--context", "--base", "--virtual", "--vcpu"},
    "--follow": {"--follow", "--interval", "--count", "--limit", "--range", "--slot"},
    "text": {*_ROWS, "--limit"},
    "jsonl": {*_ROWS, "--limit"},
    "json": _ROWS,
    "raw": {"--range", "--slot", "--base"},
    "map": {"--range", "--slot", "--base"},
    "grid": {"--range", "--slot", "--base"},
    "png": {"--range", "--slot", "--base"},
    "svg": {"--range", "--slot", "--base"},
}
_NEEDS = {
    "--context": "--at",
    "--virtual": "--at",
    "--vcpu": "--virtual",
    "--interval": "--follow",
    "--count": "--follow",
}
_FORMS = {"--at": {"text", "json"}, "--follow": {"text", "jsonl"}}


def _check_together(given: set[str], output: str) -> None:
    """Raise UsageError for options that mean nothing together, and for raw on a terminal."""
    for option, needed in _NEEDS.items():
        if option in given and needed not in given:
            raise UsageError(f"{option} goes with {needed}")
    mode = next((option for option in ("--at", "--follow") if option in given), None)
    if mode and output not in _FORMS[mode]:
        raise UsageError(
            f"{mode} has no output {output}, only {' and '.join(sorted(_FORMS[mode]))}"
        )
    left = sorted(given - _TOGETHER[mode or output])
    if left and output == "raw" and left[0] == "--granules":
        raise UsageError("--granules is for text and json: raw has one byte per granule anyway")
    if left:
        raise UsageError(f"{left[0]} does not go with {mode or f'--output {output}'}")
    if output in ("raw", "png") and sys.stdout.isatty():
        what = "raw tags are" if output == "raw" else "a picture is"
        raise UsageError(f"{what} not for a terminal", hint="write to a pipe, or to a file: > FILE")


def _print(
    source: TagSource, extents: list[Extent], choice: Choice, progress: str, output: str
) -> Tally[Missing]:
    """Print all in the form that was asked for, and return what is missing."""
    from mtetool.cli import rows, views
    from mtetool.cli.screen import screen
    from mtetool.files.output import output_file
    from mtetool.flows.dump import write_raw
    from mtetool.sources.layout import total_bytes
    from mtetool.sources.watching import Watched

    to = screen()
    if output == "text" and to.is_terminal:
        return views.rows_on_terminal(source, extents, choice, to, progress)
    if output == "map":
        return views.print_map(source, extents, to, progress)
    # A bar between the lines on the same terminal would only disturb them.
    mode = "none" if to.is_terminal and progress == "auto" else progress
    with shown_progress(total_bytes(extents), f"dumping {source.name}", mode) as advance:
        watched = Watched(source, advance)
        if output == "raw":
            with output_file("-", force=False) as out:
                return write_raw(watched, extents, out)
        if output in ("png", "svg"):
            from mtetool.cli.picture import draw

            return draw(watched, extents, output)
        if output == "grid":
            return views.print_grid(watched, extents, to)
        if output == "json":
            return rows.print_json_rows(watched, extents, choice)
        if output == "jsonl":
            return rows.print_json_lines(watched, extents, choice)
        return rows.print_text(watched, extents, choice)
