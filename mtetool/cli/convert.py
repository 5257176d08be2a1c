"""`mtetool convert`: tags in the forms of other programs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, get_args

import click

from mtetool.backends import is_guest
from mtetool.cli.naming import check_inputs
from mtetool.cli.options import (
    BASE_OPTION,
    EVERY_PAGE_OPTION,
    FILE,
    NAME,
    RANGE_OPTION,
    SIZE,
    completes,
    progress_options,
    report_option,
    snapshot_target,
)
from mtetool.cli.options import guest_options as with_guest_options
from mtetool.cli.progress import shown
from mtetool.cli.ranges import missing_json, missing_lines, size, warn_partial
from mtetool.cli.render import print_json, reporting_on, say
from mtetool.errors import SourceError, UsageError, file_error
from mtetool.guest import Extent, GuestOptions
from mtetool.uapi import PAGE_SIZES
from mtetool.words import counted

if TYPE_CHECKING:
    from mtetool.flows.convert import ConvertResult
    from mtetool.formats.opening import Opened, Wanted
    from mtetool.sources.pieces import Progress

_FORMS = ("mtesnap", "core", "migration", "raw", "packed", "gdb")
_TO = ("mtesnap", "core", "raw", "packed", "parquet")
_WITHOUT_PLACES = ("raw", "packed", "gdb")


@click.command("convert")
@click.argument(
    "sources",
    type=NAME,
    metavar="SOURCE...",
    shell_complete=completes("sources"),
    nargs=-1,
    required=True,
)
@click.option("--from", "form", type=click.Choice(_FORMS), help="The form of SOURCE, if not clear.")
@click.option("--to", type=click.Choice(_TO), default="mtesnap", help="The new form (mtesnap).")
@click.option(
    "-o",
    "--out",
    type=FILE,
    metavar="FILE",
    shell_complete=completes("files"),
    help="Where the result goes; - is standard output. For parquet also DIRECTORY/.",
)
@click.option("--force", is_flag=True, help="Overwrite FILE if it exists.")
@click.option(
    "--merge",
    "dump",
    type=FILE,
    metavar="FILE",
    shell_complete=completes("files"),
    help="For --to core: the memory, written by QEMU's dump-guest-memory.",
)
@click.option(
    "--page-size",
    "page_size_bytes",
    type=SIZE,
    default="4K",
    metavar="SIZE",
    help="The guest's pages, where SOURCE does not say (4K).",
)
@RANGE_OPTION
@BASE_OPTION
@EVERY_PAGE_OPTION
@with_guest_options
@progress_options
@report_option
def command(
    sources: tuple[str, ...],
    form: str | None,
    to: str,
    out: str | None,
    force: bool,
    dump: str | None,
    page_size_bytes: int,
    ranges: tuple[Extent, ...],
    bases: tuple[str, ...],
    every_page: bool,
    guest_options: GuestOptions,
    quiet: bool,
    progress: str,
    output: str,
) -> int:
    """Convert tags: SOURCE is a snapshot, a core file, a migration of QEMU to a file, bare tags.

    With --from gdb, it is HOST:PORT or the socket of QEMU's gdb stub. Only --to parquet takes
    several. Status 3 when some tags are missing.
    """
    if page_size_bytes not in PAGE_SIZES:
        raise UsageError("--page-size is 4K, 16K or 64K")
    _check(sources, form, to, out, dump)
    files = [*([dump] if dump else []), *bases]
    inputs = check_inputs(files, [] if form == "gdb" else sources)
    wanted = replace(
        _wanted(form, ranges, page_size_bytes, guest_options, every_page=every_page),
        bases=bases,
        bases_of_another=len(sources) > 1,
    )
    # Bare tags are in the ranges; those of anything else are chosen by them.
    within = () if form in _WITHOUT_PLACES and not guest_options.memslots else ranges
    target = _target(out, to)
    started = time.monotonic()
    with shown("converting", progress) as update:
        if to == "parquet":
            result = _tables(sources, wanted, within, target, inputs, update, force=force)
        else:
            with _out(target, inputs, force=force) as stream:
                result = _one(sources[0], wanted, within, to, dump, stream, update)
    elapsed = time.monotonic() - started
    warn_partial((result.missing, "are missing in the result"), quiet=quiet)
    with reporting_on(target, result.status):
        if output == "json":
            print_json(_document(sources, to, target, elapsed, result))
        elif target != "-" or not quiet:
            _tell(sources, target, elapsed, result)
    return result.status


def _check(
    sources: Sequence[str], form: str | None, to: str, out: str | None, dump: str | None
) -> None:
    if len(sources) > 1 and to != "parquet":
        raise UsageError(
            f"{len(sources)} sources were named, and a {to} file has the tags of one",
            hint="convert one at a time; snapshots with deltas are merged by mtetool merge",
        )
    if dump and to != "core":
        raise UsageError("--merge adds memory to a core: it needs --to core")
    for source in sources if form != "gdb" else ():
        if is_guest(source) and to in ("mtesnap", "core") and not os.path.lexists(source):
            raise SourceError(
                f"{source} is a guest, and --to {to} needs tags that do not change meanwhile",
                hint=f"save them first: mtetool save {source} -o FILE",
            )
    if out is None and to == "parquet":
        raise UsageError("--to parquet needs -o FILE, or -o DIRECTORY/")


def _wanted(
    form: str | None,
    ranges: tuple[Extent, ...],
    page_size_bytes: int,
    options: GuestOptions,
    *,
    every_page: bool,
) -> Wanted:
    from mtetool.formats.opening import InputForm, Wanted

    slots = tuple(Extent(slot.ipa, slot.size_bytes) for slot in options.memslots)
    known = next((known for known in get_args(InputForm) if known == form), None)
    return Wanted(known, slots or ranges, page_size_bytes, options, every_page)


def _target(out: str | None, to: str) -> str:
    if to == "parquet":
        assert out is not None
        return out
    return snapshot_target(out)


@contextmanager
def _out(target: str, inputs: Sequence[str], *, force: bool) -> Iterator[BinaryIO]:
    from mtetool.files.output import output_file

    with output_file(target, force=force, inputs=inputs) as stream:
        yield stream


def _one(
    source: str,
    wanted: Wanted,
    ranges: Sequence[Extent],
    to: str,
    dump: str | None,
    stream: BinaryIO,
    progress: Progress,
) -> ConvertResult:
    from mtetool.flows import convert
    from mtetool.flows.dump import write_raw
    from mtetool.formats.core_output import open_dump
    from mtetool.formats.opening import open_input
    from mtetool.snapshot.summary import opened as opened_file

    with open_input(source, wanted) as opened, ExitStack() as stack:
        extents = convert.chosen(opened, ranges)
        if to == "core":
            elf = open_dump(stack.enter_context(opened_file(dump)), dump) if dump else None
            return convert.to_core(opened, extents, stream, dump=elf, progress=progress)
        if to == "packed":
            return convert.to_packed(opened, extents, stream, progress=progress)
        if to == "raw":
            return convert.result_of(extents, write_raw(opened.tags, extents, stream))
        return convert.to_snapshot(opened, extents, stream, progress=progress)


def _tables(
    sources: Sequence[str],
    wanted: Wanted,
    ranges: Sequence[Extent],
    target: str,
    inputs: Sequence[str],
    progress: Progress,
    *,
    force: bool,
) -> ConvertResult:
    """Write all sources into one table, or each into a file of its own below a directory."""
    from mtetool.flows import convert
    from mtetool.formats.opening import open_input
    from mtetool.formats.tables import TableWriter, need_pyarrow

    need_pyarrow()
    results = []
    in_parts = target.endswith("/") or Path(target).is_dir()
    with ExitStack() as stack:
        table = None
        if not in_parts:
            table = stack.enter_context(
                TableWriter(stack.enter_context(_out(target, inputs, force=force)))
            )
        for source in sources:
            with open_input(source, wanted) as opened, ExitStack() as inner:
                extents = convert.chosen(opened, ranges)
                into = table or inner.enter_context(
                    _part(target, opened, inputs, inner, force=force)
                )
                results.append(convert.to_table(opened, extents, into, progress=progress))
    return convert.together(results)


def _part(
    directory: str, opened: Opened, inputs: Sequence[str], stack: ExitStack, *, force: bool
) -> Any:
    """The table of one snapshot in a partitioned set, in a directory that is made for it."""
    from mtetool.flows.convert import whose
    from mtetool.formats.tables import TableWriter

    saved = whose(opened)
    parent = Path(directory, saved.partition)
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise file_error(error, str(parent)) from error
    path = str(parent / saved.file)
    return TableWriter(stack.enter_context(_out(path, inputs, force=force)), partitioned=True)


def _document(
    sources: Sequence[str], to: str, target: str, elapsed: float, result: ConvertResult
) -> dict[str, Any]:
    return {
        "schema": "mtetool.convert/1",
        "sources": list(sources),
        "to": to,
        "file": None if target == "-" else target,
        "snapshot_id": result.snapshot_id,
        "converted_bytes": result.converted_bytes,
        "rows": result.n_rows,
        **missing_json("missing", result.missing),
        "elapsed_seconds": round(elapsed, 3),
    }


def _tell(sources: Sequence[str], target: str, elapsed: float, result: ConvertResult) -> None:
    name = "standard output" if target == "-" else target
    what = sources[0] if len(sources) == 1 else counted(len(sources), "source")
    held = size(result.converted_bytes)
    say(f"converted {what} into {name}: the tags of {held}, in {elapsed:.1f} s")
    if result.n_rows is not None:
        say(f"the table has {counted(result.n_rows, 'row')}")
    for line in missing_lines("missing", result.missing):
        say(line)
