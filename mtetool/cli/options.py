"""Options that several commands share: one definition each of help, parsing and meaning."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from mtetool.errors import UsageError
from mtetool.guest import Extent, GuestOptions, Memslot
from mtetool.uapi import TAG_MAX
from mtetool.words import quoted

if TYPE_CHECKING:
    # Generic only in click's newest stubs: older releases cannot be subscripted at run time.
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType

_F = TypeVar("_F", bound=Callable[..., Any])

_ADDRESS_END = 1 << 64
_HEX_DIGITS = tuple("0123456789abcdefABCDEF")
# Not int(text, 0): it accepts "1_000", " 12" and digits of other scripts, and refuses "010".
_NUMBER = re.compile(r"(?:0[xX](?P<hex>[0-9a-fA-F]+)|(?P<decimal>[0-9]+))(?P<suffix>[kmgtKMGT]?)")
_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_number(text: str) -> int:
    """Parse `0x40000000`, `4096`, `64K`: decimal or hex, suffixes K M G T (powers of 1024).

    Raises ValueError for anything else, and for 2^64 or more.
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(f"{quoted(text)} is not a number such as 4096, 0x1000, 64K or 1G")
    digits = match["hex"] or match["decimal"]
    # Python refuses to convert very long numbers, and no address is that long.
    value = int(digits[-40:], 16 if match["hex"] else 10) * _SUFFIXES[match["suffix"].upper()]
    if digits[:-40].strip("0") or value >= _ADDRESS_END:
        raise ValueError(f"{quoted(text)} does not fit into 64 bits")
    return value


def parse_size(text: str) -> int:
    """Parse a number of bytes that is not 0. Raises ValueError."""
    value = parse_number(text)
    if value == 0:
        raise ValueError("the size is 0 bytes")
    return value


def parse_range(text: str) -> Extent:
    """Parse `IPA:SIZE`. Raises ValueError."""
    ipa_text, colon, size_text = text.partition(":")
    if not colon:
        raise ValueError(f"{quoted(text)} is not of the form IPA:SIZE, such as 0x40000000:64K")
    found = Extent(parse_number(ipa_text), parse_size(size_text))
    if found.end > _ADDRESS_END:
        raise ValueError(f"{quoted(text)} ends beyond 64 bits")
    return found


def parse_memslot(text: str) -> Memslot:
    """Parse `IPA:SIZE[@ADDRESS][:ro]`; without `ro`, `readonly` is None: unknown.

    `ADDRESS` is where the memory is in the VMM's process. The id is 0. Raises ValueError.
    """
    readonly = text.endswith(":ro")
    range_text, at, address_text = text.removesuffix(":ro").partition("@")
    found = parse_range(range_text)
    address = parse_number(address_text) if at else None
    if address is not None and address + found.size_bytes > _ADDRESS_END:
        raise ValueError(f"{quoted(text)} ends beyond 64 bits")
    return Memslot(0, found.ipa, found.size_bytes, True if readonly else None, host_address=address)


def parse_tag(text: str) -> int:
    """Parse a tag: a hex digit, as tags are shown, or a number, 0 to 15. Raises ValueError."""
    if text in _HEX_DIGITS:
        return int(text, 16)
    value = parse_number(text)
    if value > TAG_MAX or text[-1] in "kmgtKMGT":
        raise ValueError(f"{quoted(text)} is not a tag: 0 to {TAG_MAX}, or a hex digit")
    return value


def parse_move(text: str) -> tuple[int, int]:
    """Parse `OLD=NEW`, two addresses. Raises ValueError."""
    old, equals, new = text.partition("=")
    if not equals:
        raise ValueError(
            f"{quoted(text)} is not of the form OLD=NEW, such as 0x40000000=0x80000000"
        )
    return parse_number(old), parse_number(new)


class Parsed(_ParamType):
    """A parameter type made from a parser that raises ValueError."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse `value`, unless it is parsed already."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def parse_name(text: str) -> str:
    """Return a name that is not empty. Raises ValueError."""
    if not text:
        raise ValueError("the name is empty")
    return text


def parse_file(text: str) -> str:
    """Return the file that an option names, or "-". Raises ValueError for another option."""
    if text.startswith("-") and text != "-":
        raise ValueError(
            f"a file name must follow, but {quoted(text)} looks like an option;"
            f" for a file with that name, write ./{text[:40]}"
        )
    return parse_name(text)


NAME = Parsed("file", parse_name)
FILE = Parsed("file", parse_file)
SIZE = Parsed("size", parse_size)
RANGE = Parsed("ipa:size", parse_range)
MEMSLOT = Parsed("ipa:size", parse_memslot)
TAG = Parsed("tag", parse_tag)


_Completed = Literal["files", "emulated", "guests", "sources"]


def completes(what: _Completed) -> Callable[[click.Context, click.Parameter, str], Any]:
    """Return a `shell_complete` of click for an argument or option."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> Any:
        from mtetool.cli import completing

        return getattr(completing, what)(context, parameter, incomplete)

    return complete


connect_option = click.option(
    "--connect",
    type=Parsed("uri", parse_name),
    metavar="URI",
    help="The libvirt to ask, by its URI.",
)


def guest_options(command: _F) -> _F:
    """Add the options about guests, as one keyword `guest_options` of type GuestOptions."""

    @functools.wraps(command)
    def with_options(
        *args: Any,
        memslots: tuple[Memslot, ...],
        qmp: Path | None,
        no_monitor: bool,
        connect: str | None,
        **kwargs: Any,
    ) -> Any:
        if qmp and no_monitor:
            raise UsageError("--qmp names a monitor, and --no-monitor says to ask none")
        numbered = tuple(replace(slot, id=index) for index, slot in enumerate(memslots))
        options = GuestOptions(numbered, qmp, connect, use_monitor=not no_monitor)
        return command(*args, guest_options=options, **kwargs)

    memslot = click.option(
        "--memslot",
        "memslots",
        type=MEMSLOT,
        multiple=True,
        metavar="IPA:SIZE[@ADDRESS]",
        help="A memslot of the guest, given by hand (repeatable), and where it is in the VMM.",
    )
    qmp = click.option(
        "--qmp",
        type=Parsed("file", lambda text: Path(parse_file(text))),
        shell_complete=completes("files"),
        metavar="SOCKET",
        help="QEMU's monitor socket, to learn the memslots from.",
    )
    no_monitor = click.option(
        "--no-monitor", is_flag=True, help="Ask the kernel, not QEMU's monitor."
    )
    return memslot(qmp(no_monitor(connect_option(with_options))))  # type: ignore[return-value]


def output_option(*more: str) -> Callable[[_F], _F]:
    """Add `--output text|json…` and its alias `--json`, as the keyword `output`.

    `more` names further forms besides text (the default) and json.
    """

    def alias(context: click.Context, parameter: click.Parameter, given: bool) -> None:
        if given:
            context.params["output"] = "json"

    def decorate(command: _F) -> _F:
        # Eager, so that it is processed before the alias, which overwrites it.
        option = click.option(
            "--output",
            type=click.Choice(["text", "json", *more]),
            default="text",
            is_eager=True,
            help="The form of the report (default text).",
        )
        alias_option = click.option(
            "--json",
            is_flag=True,
            expose_value=False,
            callback=alias,
            help="The same as --output json.",
        )
        return option(alias_option(command))

    return decorate


report_option = output_option()


quiet_option = click.option(
    "-q", "--quiet", is_flag=True, help="Nothing on standard error but errors."
)


def progress_options(command: _F) -> _F:
    """Add `--quiet` and `--progress`, as the keywords `quiet` (bool) and `progress`.

    `progress` is "auto", "json" or "none"; `--quiet` makes it "none".
    """

    @functools.wraps(command)
    def with_options(*args: Any, quiet: bool, progress: str, **kwargs: Any) -> Any:
        mode = "none" if quiet else progress
        return command(*args, quiet=quiet, progress=mode, **kwargs)

    progress = click.option(
        "--progress",
        type=click.Choice(["auto", "json", "none"]),
        default="auto",
        help="A bar on a terminal (auto), a line of JSON a second, or nothing.",
    )
    return quiet_option(progress(with_options))  # type: ignore[return-value]


EVERY_PAGE_OPTION = click.option(
    "--every-page", is_flag=True, help="Also read pages without tags, and allocate them."
)

RANGE_OPTION = click.option(
    "--range", "ranges", type=RANGE, multiple=True, metavar="IPA:SIZE", help="Only this range."
)

SLOT_OPTION = click.option(
    "--slot",
    "slots",
    type=click.IntRange(min=0),
    multiple=True,
    metavar="ID",
    help="Only this memslot.",
)

BASE_OPTION = click.option(
    "--base",
    "bases",
    type=FILE,
    multiple=True,
    shell_complete=completes("files"),
    metavar="FILE",
    help="The base of a delta (repeatable: the oldest first).",
)


MAP_OPTION = click.option(
    "--map",
    "moves",
    type=Parsed("old=new", parse_move),
    multiple=True,
    metavar="OLD=NEW",
    help="The slot at IPA OLD in the first is at NEW in the second.",
)


def snapshot_target(out: str | None) -> str:
    """Return the file that `-o` names: "-" for standard output by any name.

    Raises UsageError for a terminal.
    """
    from mtetool.files.output import names_standard_output

    to_stdout = out is None or names_standard_output(out)
    if to_stdout and sys.stdout is not None and sys.stdout.isatty():
        raise UsageError(
            "a snapshot is binary, but standard output is a terminal",
            hint="name a file with -o FILE, or pipe it",
        )
    return "-" if out is None or to_stdout else out
