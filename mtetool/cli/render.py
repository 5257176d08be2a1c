"""Results as text and as JSON, on standard output; warnings, on standard error.

Text is for people, not for parsing. It is the same on a terminal and in a pipe: nothing
is wrapped, truncated or read as markup.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO

from mtetool.errors import host_error
from mtetool.words import printable

if TYPE_CHECKING:
    from mtetool.errors import MtetoolError
    from mtetool.guest import GuestInfo


def put(text: str) -> None:
    """Write `text` to standard output as it is. An OSError names the stream (`filename`)."""
    try:
        sys.stdout.write(text)
    except OSError as error:
        error.filename = stream_name(sys.stdout)
        raise


def put_bytes(data: memoryview) -> None:
    """As `put`, for much text that is ASCII."""
    stream = sys.stdout
    raw = getattr(stream, "buffer", None)
    if raw is None:
        put(str(data, "ascii"))
        return
    try:
        stream.flush()
        raw.write(data)
    except OSError as error:
        error.filename = stream_name(stream)
        raise


def stream_name(stream: TextIO) -> str:
    """Return what messages call the stream that a report goes to."""
    return "standard error" if stream is sys.stderr else "standard output"


def beside_vmm(error: MtetoolError) -> str:
    """Return what is printed for an error among a VMM's own output."""
    hint = f"  try: {printable(error.hint)}\n" if error.hint else ""
    return f"mtetool: {printable(error.message)}\n{hint}"


def print_json(document: Mapping[str, object]) -> None:
    """Print one JSON document: a line in a pipe, indented on a terminal. Addresses are integers.

    Its values can be `mtetool.streaming.Rows`.
    """
    from mtetool.streaming import json_parts

    for part in json_parts(document, 2 if sys.stdout.isatty() else None):
        put(part)
    put("\n")


def print_tail(members: Mapping[str, object]) -> None:
    """Print the end of a JSON document whose first members, up to an open array, are printed."""
    from mtetool.streaming import json_parts

    parts = json_parts(members)
    next(parts)
    put("\n], ")
    for part in parts:
        put(part)
    put("\n")


def say(*lines: str) -> None:
    """Print lines of a result for people."""
    put("".join(printable(line) + "\n" for line in lines))


def warn(text: str) -> None:
    """Print a warning; a command with `--quiet` does not call this."""
    sys.stderr.write(f"mtetool: warning: {printable(text)}\n")


def note(text: str) -> None:
    """Say what happens just now, on standard error; not with `--quiet`."""
    sys.stderr.write(f"mtetool: {printable(text)}\n")
    sys.stderr.flush()


@contextmanager
def printing(truth: str, **details: object) -> Iterator[None]:
    """Print a report in this context; `truth` is what holds even if the report is lost.

    Raises HostError, with `truth` and `details`, where the report cannot be printed.
    BrokenPipeError passes: the reader that closed the pipe wanted no report.
    """
    stream = sys.stdout
    try:
        yield
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        what = f"the report cannot be printed to {stream_name(stream)}"
        told = host_error(error, what, **details)
        told.message = f"{told.message}; {truth}"
        told.args = (told.message,)
        raise told from error


@contextmanager
def reporting_on(target: str, status: int) -> Iterator[None]:
    """As `printing`, for a command that wrote a snapshot to `target` and ends with `status`.

    The report goes to standard error where the snapshot went to standard output.
    """
    is_streamed = target == "-"
    truth = "the complete snapshot went to standard output" if is_streamed else ""
    truth = truth or f"the snapshot {target} is complete and kept"
    if status:
        truth += f" (the status would have been {status})"
    path = None if is_streamed else target
    with (
        redirect_stdout(sys.stderr if is_streamed else sys.stdout),
        printing(truth, path=path, kept=True, result_status=status),
    ):
        yield


def table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()
) -> list[str]:
    """Aligned columns: a line for the header and one for each row.

    `right` names the columns that are right-aligned (numbers). None is
    shown as `-`.
    """
    cells = [[_cell(value) for value in row] for row in [header, *rows]]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    to_right = [name in right for name in header]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if right_aligned else cell.ljust(width)
            for cell, width, right_aligned in zip(row, widths, to_right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def _cell(value: object) -> str:
    return "-" if value is None else printable(str(value))


def describe_guest(info: GuestInfo) -> dict[str, Any]:
    """A guest as JSON, the same in every report.

    Keys: source, mte, page_size_bytes, memslots (id, ipa, size_bytes, readonly, kind), vmm, name,
    pid and vcpus; null for what is unknown.
    """
    return {
        "source": info.source,
        "mte": info.mte,
        "page_size_bytes": info.page_size_bytes,
        "memslots": [
            {
                "id": slot.id,
                "ipa": slot.ipa,
                "size_bytes": slot.size_bytes,
                "readonly": slot.readonly,
                "kind": slot.kind,
            }
            for slot in info.memslots
        ],
        "vmm": info.vmm,
        "name": info.name,
        "pid": info.pid,
        "vcpus": info.vcpus,
    }
