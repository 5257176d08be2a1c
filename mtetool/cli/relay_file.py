"""`mtetool relay save`, `load`, `filter`: QEMU's stream and the tags in one file."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mtetool.cli.options import NAME, completes, progress_options, report_option
from mtetool.cli.options import guest_options as with_guest_options
from mtetool.cli.progress import shown
from mtetool.cli.ranges import size
from mtetool.cli.render import note, print_json, printing, put, say
from mtetool.errors import HostIoError, UsageError
from mtetool.guest import GuestOptions
from mtetool.words import counted

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

    from mtetool.relay.report import Report
    from mtetool.relay.saving import Source

_UNIT = 4096  # the bar counts bytes, and QEMU pages of that size
_FILES = ("program", "unit", "apparmor")


def _guest(function: Callable[..., int]) -> Callable[..., int]:
    function = with_guest_options(progress_options(report_option(function)))
    return click.argument("guest", type=NAME, required=False, shell_complete=completes("guests"))(
        function
    )


@click.command("save")
@_guest
def save(guest: str | None, guest_options: GuestOptions, **options: Any) -> int:
    """Write QEMU's migration stream and the tags of its guest to one file.

    The stream comes from QEMU through standard input, a pipe; the file goes to standard output.
    GUEST is the guest of the QEMU at the other end of the pipe, unless it is named.
    """
    from mtetool.relay.guests import Wanted
    from mtetool.relay.saving import open_source, wait_for_stream

    wanted = Wanted(guest, guest_options)
    wanted.check()
    fd = _descriptor(sys.stdin, "standard input")
    _check_no_terminal()
    wait_for_stream(fd)
    return _save(fd, open_source(fd, wanted), **options)


def _save(fd: int, source: Source, *, quiet: bool, progress: str, output: str) -> int:
    from mtetool.files.output import output_file
    from mtetool.relay.report import News
    from mtetool.relay.saving import save, settle

    with shown("saving", progress) as update:

        def count(report: Report) -> None:
            if report.stream_pages is not None and report.memory_pages:
                update(report.stream_pages * _UNIT, report.memory_pages * _UNIT)

        news = News(note if not quiet else lambda text: None, count)
        with output_file("-", force=False) as out:
            report = save(fd, out, source, news)
        settle(_descriptor(sys.stdout, "standard output"))
    _print(report, "the whole file went to standard output", output, quiet=quiet)
    return 0


@click.command("load")
@_guest
def load(guest: str | None, guest_options: GuestOptions, **options: Any) -> int:
    """Give a file of `relay save` to a QEMU that waits for it, with all tags.

    The file comes from standard input; the stream goes to QEMU through standard output, a pipe.
    GUEST is the guest of the QEMU at the other end of the pipe, unless it is named.
    """
    from mtetool.relay.guests import Wanted

    fd = _descriptor(sys.stdin, "standard input")
    _check_no_terminal()
    return _load(fd, b"", Wanted(guest, guest_options), **options)


def _load(fd: int, before: bytes, wanted: Any, *, quiet: bool, progress: str, output: str) -> int:
    from mtetool.relay.loading import load
    from mtetool.relay.report import News
    from mtetool.relay.saved import SavedReader

    out = _descriptor(sys.stdout, "standard output")
    with shown("loading", progress) as update:
        news = News(
            note if not quiet else lambda text: None,
            lambda report: update(report.stream_bytes, None),
        )
        report = load(SavedReader(fd, "standard input", before), out, wanted, news)
    _print(report, "QEMU has got everything", output, quiet=quiet)
    return 0


@click.command(
    "filter", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.option(
    "--show",
    type=click.Choice(_FILES),
    help="Print a file to install, and end: the program, a part of a unit, AppArmor rules.",
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="PROGRAM [ARGUMENT]...")
def stand_in(show: str | None, words: tuple[str, ...]) -> int:
    """Stand in for the compressor through which libvirt saves domains.

    PROGRAM is the path of the stand-in itself. A guest with MTE is saved as by `relay save`, and
    its file is restored as by `relay load`. All others are left to the next program of this name
    in PATH, with the same arguments.
    """
    if show is not None:
        from mtetool.files.installed import installed

        put(installed("mtetool.relay", "filter" if show == "program" else show))
        return 0
    if not words:
        raise UsageError("which program it stands in for is missing", hint="see mtetool-relay(1)")
    return _stand_in(words[0], words[1:])


def _stand_in(path: str, arguments: tuple[str, ...]) -> int:
    from mtetool.relay.guests import Wanted
    from mtetool.relay.standing_in import StandIn, begins_with_tags, tagged_source

    standing = StandIn(path, arguments)
    wanted = Wanted(None, GuestOptions())
    how = {"quiet": True, "progress": "none", "output": "text"}
    before = b""
    if standing.task == "compress":
        fd = _descriptor(sys.stdin, "standard input")
        source = tagged_source(fd, wanted)
        if source is not None:
            return _save(fd, source, **how)  # type: ignore[arg-type]
    elif standing.task == "decompress":
        fd = _descriptor(sys.stdin, "standard input")
        is_ours, before = begins_with_tags(fd)
        if is_ours:
            return _load(fd, before, wanted, **how)  # type: ignore[arg-type]
        return standing.decompress(before, fd, _descriptor(sys.stdout, "standard output"))
    standing.become_program()
    return 0


def _descriptor(stream: TextIO | None, name: str) -> int:
    if stream is None:
        raise HostIoError(f"{name} is closed")
    return stream.fileno()


def _check_no_terminal() -> None:
    for stream, what in ((sys.stdin, "comes from"), (sys.stdout, "goes to")):
        if stream is not None and stream.isatty():
            raise UsageError(
                f"a stream of QEMU {what} a pipe or a file, not a terminal",
                hint="see the examples in mtetool-relay(1)",
            )


def document(report: Report) -> dict[str, Any]:
    """The report as JSON has it, without its schema."""
    document = asdict(report)
    del document["stage"]
    for key in ("copy_seconds", "held_seconds", "elapsed_seconds"):
        if document[key] is not None:
            document[key] = round(document[key], 4)
    return document


def _print(report: Report, truth: str, output: str, *, quiet: bool) -> None:
    # Standard output has the file, or the stream.
    with redirect_stdout(sys.stderr), printing(truth):
        if output == "json":
            print_json({"schema": "mtetool.relay/1", **document(report)})
        elif not quiet:
            _tell(report)


def _tell(report: Report) -> None:
    done = "saved" if report.role == "save" else "loaded"
    name = report.guest or "a guest without tags"
    say(f"{done} {name} in {report.elapsed_seconds:.1f} s; the host that saved it: {report.peer}")
    pages = f"tags of {counted(report.tag_pages, 'page')}, {size(report.tag_bytes)}"
    say(
        f"QEMU's stream: {size(report.stream_bytes)}; {pages}; file: {size(report.file_bytes or 0)}"
    )
