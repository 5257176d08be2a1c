"""`mtetool merge`: make one snapshot of a base and its deltas."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from mtetool.cli.naming import check_inputs
from mtetool.cli.options import (
    FILE,
    NAME,
    completes,
    progress_options,
    report_option,
    snapshot_target,
)
from mtetool.cli.progress import shown
from mtetool.cli.ranges import missing_json, missing_lines, size, warn_partial
from mtetool.cli.render import print_json, reporting_on, say
from mtetool.words import counted

if TYPE_CHECKING:
    from mtetool.flows.merge import MergeResult


@click.command("merge")
@click.argument(
    "files",
    type=NAME,
    metavar="BASE [DELTA]...",
    shell_complete=completes("files"),
    nargs=-1,
    required=True,
)
@click.option(
    "-o",
    "--out",
    type=FILE,
    metavar="FILE",
    shell_complete=completes("files"),
    help="Where the result goes; - is standard output.",
)
@click.option(
    "--fill",
    "fills",
    type=FILE,
    multiple=True,
    shell_complete=completes("files"),
    metavar="FILE",
    help="Take what is missing from this snapshot (repeatable: the best first).",
)
@click.option("--force", is_flag=True, help="Overwrite FILE if it exists.")
@click.option("--jobs", type=click.IntRange(1, 256), metavar="N", help="Threads that encode.")
@click.option(
    "--level", type=click.IntRange(1, 19), default=1, metavar="N", help="The zstd level (1)."
)
@progress_options
@report_option
def command(
    files: tuple[str, ...],
    out: str | None,
    fills: tuple[str, ...],
    force: bool,
    jobs: int | None,
    level: int,
    quiet: bool,
    progress: str,
    output: str,
) -> int:
    """Make one snapshot of BASE and the DELTAs to it, in the order in which they were saved.

    Deltas alone give a delta to the same base; BASE alone gives the same snapshot, rewritten.
    With --fill, gaps of a partial snapshot come from others. Status 3 when ranges are missing.
    """
    from mtetool.files.output import output_file
    from mtetool.flows.merge import merge
    from mtetool.sources.layers import open_layers

    target = snapshot_target(out)
    inputs = check_inputs([*files, *fills])
    started = time.monotonic()
    with (
        ExitStack() as stack,
        open_layers(files) as layers,
        output_file(target, force=force, inputs=inputs, may_replace_inputs=True) as stream,
        shown("merging", progress) as update,
    ):
        filling = [stack.enter_context(open_layers([fill])) for fill in fills]
        result = merge(layers, stream, fills=filling, level=level, jobs=jobs, progress=update)
    elapsed = time.monotonic() - started
    warn_partial((result.checked.missing, "are missing in the result"), quiet=quiet)
    with reporting_on(target, result.status):
        if output == "json":
            print_json(_document(files, fills, target, elapsed, result))
        elif target != "-" or not quiet:
            _tell(files, target, elapsed, result)
    return result.status


def _document(
    files: tuple[str, ...],
    fills: tuple[str, ...],
    target: str,
    elapsed: float,
    result: MergeResult,
) -> dict[str, Any]:
    return {
        "schema": "mtetool.merge/1",
        "files": list(files),
        "fills": list(fills),
        "filled_bytes": result.filled_bytes,
        "file": None if target == "-" else target,
        "snapshot_id": result.header.snapshot_id,
        "base_id": result.header.base_id,
        "held_bytes": result.checked.held_bytes,
        **missing_json("missing", result.checked.missing),
        "elapsed_seconds": round(elapsed, 3),
    }


def _tell(files: tuple[str, ...], target: str, elapsed: float, result: MergeResult) -> None:
    name = "standard output" if target == "-" else target
    held = size(result.checked.held_bytes)
    merged = f"merged {counted(len(files), 'snapshot')} into {name}"
    say(f"{merged}: the tags of {held}, in {elapsed:.1f} s")
    if result.header.base_id is not None:
        say(f"it is a delta to the snapshot {result.header.base_id}")
    if result.filled_bytes:
        say(f"filled: {size(result.filled_bytes)}; the snapshot has a new id, as no other is equal")
    for line in missing_lines("missing", result.checked.missing):
        say(line)
