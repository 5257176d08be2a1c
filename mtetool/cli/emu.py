"""`mtetool emu`: make, show and change emulated guests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, NamedTuple

import click

from mtetool.cli.faults import fault_option, faults_json, say_faults
from mtetool.cli.options import (
    RANGE_OPTION,
    SIZE,
    SLOT_OPTION,
    Parsed,
    completes,
    parse_memslot,
    parse_name,
    parse_range,
    parse_tag,
    progress_options,
    report_option,
)
from mtetool.cli.progress import progress as progress_shown
from mtetool.cli.ranges import size
from mtetool.cli.render import describe_guest, print_json, printing, say, table
from mtetool.emulator.behaviours import Behaviour
from mtetool.errors import InterruptedWorkError, SignalError, UsageError
from mtetool.guest import Extent, Memslot
from mtetool.uapi import PAGE_SIZES
from mtetool.words import counted, quoted

if TYPE_CHECKING:
    from mtetool.backends.emu.guest import EmulatedGuest
    from mtetool.backends.emu.owner import Owner
    from mtetool.faults.model import Fault
    from mtetool.guest import GuestInfo

# Where the memory of QEMU's machine `virt` begins.
_MEMORY_IPA = 0x40000000
_MEMORY_BYTES = 1 << 30
_PAGE_SIZES = {f"{size >> 10}K": size for size in PAGE_SIZES}
# From mtetool.backends.emu.patterns, named here so that the help does not load numpy.
_PATTERNS = ("zero", "sparse", "heap", "kernel", "random")


class _Setting(NamedTuple):
    extent: Extent
    tag: int


class _Slot(NamedTuple):
    memslot: Memslot
    hugetlb: bool


def _parse_slot(text: str) -> _Slot:
    hugetlb = text.endswith(":huge")
    slot = parse_memslot(text.removesuffix(":huge"))
    if slot.host_address is not None:
        raise ValueError(f"{text!r} has an address in a process, but an emulated guest has none")
    if slot.readonly:
        return _Slot(replace(slot, kind="rom"), hugetlb)
    return _Slot(replace(slot, readonly=False), hugetlb)


def _parse_behaviour(text: str) -> Behaviour:
    try:
        return Behaviour(text)
    except ValueError:
        names = ", ".join(behaviour.value for behaviour in Behaviour)
        raise ValueError(f"{quoted(text)} is not a known behaviour: {names}") from None


def _parse_setting(text: str) -> _Setting:
    range_text, equals, tag_text = text.partition("=")
    if not equals:
        raise ValueError(f"{quoted(text)} is not of the form IPA:SIZE=TAG, such as 0x40000000:64=5")
    return _Setting(parse_range(range_text), parse_tag(tag_text))


def _path(text: str) -> str:
    return parse_name(text.removeprefix("emu:"))


_PATH = Parsed("path", _path)
_seed = click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=1,
    metavar="N",
    help="The pattern's seed: the same seed gives the same tags (default 1).",
)


@click.group("emu", no_args_is_help=False)
def command() -> None:
    """Make, show and change emulated guests: tag memory in a file, for trying things out.

    PATH can also be written emu:PATH, as in the other commands.
    """


@command.command("create", short_help="Make an emulated guest in a new file.")
@click.argument("path", type=_PATH, shell_complete=completes("emulated"))
@click.option("--memory", type=SIZE, metavar="SIZE", help="One memslot at 0x40000000 (default 1G).")
@click.option(
    "--slot",
    "slots",
    type=Parsed("ipa:size[:ro][:huge]", _parse_slot),
    multiple=True,
    metavar="IPA:SIZE[:ro][:huge]",
    help="A memslot, read-only with :ro, hugetlb memory with :huge (repeatable).",
)
@click.option(
    "--page-size",
    type=click.Choice(list(_PAGE_SIZES), case_sensitive=False),
    default="4K",
    metavar="4K|16K|64K",
    help="The guest's pages (default 4K).",
)
@click.option(
    "--fill", type=click.Choice(_PATTERNS), default="zero", help="Its tags (default zero)."
)
@_seed
@click.option("--no-mte", is_flag=True, help="Leave MTE off, as in a VM without it.")
@click.option(
    "--vcpus",
    type=click.IntRange(0, 4096),
    default=1,
    metavar="N",
    help="Its number of vCPUs (default 1); MTE can be enabled only with 0.",
)
@click.option(
    "--kernel-behaviour",
    "behaviours",
    type=Parsed("behaviour", _parse_behaviour),
    multiple=True,
    metavar="NAME",
    help="How its kernel differs from others, such as hugetlb-tags (repeatable).",
)
@fault_option
@click.option("--force", is_flag=True, help="Overwrite PATH if it exists.")
@progress_options
@report_option
def create(
    path: str,
    memory: int | None,
    slots: tuple[_Slot, ...],
    page_size: str,
    fill: str,
    seed: int,
    no_mte: bool,
    vcpus: int,
    behaviours: tuple[Behaviour, ...],
    faults: tuple[Fault, ...],
    force: bool,
    quiet: bool,
    progress: str,
    output: str,
) -> None:
    """Make an emulated guest in the file PATH; only tags that are not 0 take space there."""
    if memory is not None and slots:
        raise UsageError("--memory and --slot exclude each other")
    if no_mte and fill != "zero":
        raise UsageError("--no-mte and --fill exclude each other: without MTE there are no tags")
    from mtetool.backends.emu.guest import create_emulated

    wanted = slots or (_Slot(Memslot(0, _MEMORY_IPA, memory or _MEMORY_BYTES), False),)
    numbered = [replace(slot.memslot, id=index) for index, slot in enumerate(wanted)]

    def fill_it(owner: Owner) -> None:
        if fill != "zero":
            _fill(owner, fill, seed, progress)

    create_emulated(
        path,
        page_size_bytes=_PAGE_SIZES[page_size.upper()],
        memslots=numbered,
        mte=not no_mte,
        vcpus=vcpus,
        hugetlb=[index for index, slot in enumerate(wanted) if slot.hugetlb],
        behaviours=behaviours,
        force=force,
        fill=fill_it,
        faults=faults,
    )
    if output == "json":
        with printing(f"the guest emu:{path} was created and is kept", path=path, kept=True):
            _show(path, output, "mtetool.emu-create/1")


@command.command("show", short_help="Show an emulated guest.")
@click.argument("path", type=_PATH, shell_complete=completes("emulated"))
@report_option
def show(path: str, output: str) -> None:
    """Show an emulated guest: its memslots, page size, whether MTE is on, and its faults."""
    _show(path, output, "mtetool.emu-show/1")


@command.command("fault", short_help="Show or change the faults to rehearse.")
@click.argument("path", type=_PATH, shell_complete=completes("emulated"))
@fault_option
@click.option("--clear", is_flag=True, help="Remove all faults; a guest that vanished is back.")
@report_option
def fault(path: str, faults: tuple[Fault, ...], clear: bool, output: str) -> None:
    """Show the faults of an emulated guest and how often each fired.

    With --fault, the new faults replace the old ones, and all counts start again.
    """
    if faults and clear:
        raise UsageError("--fault and --clear exclude each other")
    with _opened(path) as guest:
        if faults or clear:
            guest.owner.set_faults(faults)
        has = guest.owner.faults()
    changed = "has the new faults" if faults or clear else "is unchanged"
    with printing(f"the guest emu:{path} {changed}"):
        if output == "json":
            source = f"emu:{path}"
            print_json({"schema": "mtetool.emu-fault/1", "source": source, **faults_json(has)})
        elif has.ordered:
            say_faults(has)
        else:
            say("no faults")


@command.command("set", short_help="Give a range one tag.")
@click.argument("path", type=_PATH, shell_complete=completes("emulated"))
@click.argument("setting", type=Parsed("ipa:size=tag", _parse_setting), metavar="IPA:SIZE=TAG")
@report_option
def set_(path: str, setting: _Setting, output: str) -> None:
    """Give all granules (16 bytes) of a range one tag, even in read-only memory."""
    ipa, size_bytes = setting.extent.ipa, setting.extent.size_bytes
    with _opened(path) as guest:
        guest.owner.set_tag(ipa, size_bytes, setting.tag)
    if output == "json":
        document = {
            "schema": "mtetool.emu-set/1",
            "source": f"emu:{path}",
            "ipa": ipa,
            "size_bytes": size_bytes,
            "tag": setting.tag,
        }
        with printing(f"the guest emu:{path} has the tags"):
            print_json(document)


@command.command("fill", short_help="Give memslots the tags of a pattern.")
@click.argument("path", type=_PATH, shell_complete=completes("emulated"))
@click.argument("pattern", type=click.Choice(_PATTERNS), metavar="PATTERN")
@_seed
@SLOT_OPTION
@RANGE_OPTION
@progress_options
@report_option
def fill(
    path: str,
    pattern: str,
    seed: int,
    slots: tuple[int, ...],
    ranges: tuple[Extent, ...],
    quiet: bool,
    progress: str,
    output: str,
) -> None:
    """Give memslots the tags of PATTERN: zero, sparse, heap, kernel or random."""
    if slots and ranges:
        raise UsageError("--slot and --range exclude each other")
    with _opened(path) as guest:
        _fill(
            guest.owner, pattern, seed, progress, slots=slots or None, ranges=ranges, in_place=True
        )
    if output == "json":
        document = {
            "schema": "mtetool.emu-fill/1",
            "source": f"emu:{path}",
            "pattern": pattern,
            "seed": seed,
            "slots": list(slots) or None,
            "ranges": [asdict(found) for found in ranges] or None,
        }
        with printing(f"the guest emu:{path} has the tags"):
            print_json(document)


def _opened(path: str) -> EmulatedGuest:
    from mtetool.backends.emu.guest import open_emulated
    from mtetool.files.output import keep_standard_output_off
    from mtetool.guest import GuestOptions

    keep_standard_output_off([path])
    return open_emulated(path, GuestOptions())


def _fill(
    owner: Owner,
    pattern: str,
    seed: int,
    mode: str,
    *,
    slots: Sequence[int] | None = None,
    ranges: Sequence[Extent] = (),
    in_place: bool = False,
) -> None:
    chosen = [slot for slot in owner.memslots if slots is None or slot.id in slots]
    total = sum(filled.size_bytes for filled in ranges or chosen)
    filled_bytes = 0
    with progress_shown(total, pattern, mode) as advance:

        def count(n_bytes: int) -> None:
            nonlocal filled_bytes
            filled_bytes += n_bytes
            advance(n_bytes)

        try:
            owner.fill(pattern, seed, slots, ranges=ranges, advance=count)
        except SignalError as caught:
            if in_place:  # otherwise no file is left
                caught.word = InterruptedWorkError(
                    f"the tags of {size(filled_bytes)} of {size(total)} were written",
                    caught.number,
                    hint="fill the guest again, or create it again",
                )
            raise


def _show(path: str, output: str, schema: str) -> None:
    with _opened(path) as guest:
        info, faults = guest.info(), guest.owner.faults()
        behaviours = sorted(behaviour.value for behaviour in guest.behaviours)
    if output == "json":
        described = {**describe_guest(info), "kernel_behaviours": behaviours}
        print_json({"schema": schema, **described, **faults_json(faults)})
    else:
        _say_guest(info)
        if behaviours:
            say(f"kernel: {', '.join(behaviours)}")
        say_faults(faults)


def _say_guest(info: GuestInfo) -> None:
    say(
        f"{info.source}: MTE {'on' if info.mte else 'off'}, {counted(info.vcpus or 0, 'vCPU')},"
        f" pages of {size(info.page_size_bytes)}"
    )
    rows = [
        (slot.id, f"{slot.ipa:#x}", size(slot.size_bytes), "ro" if slot.readonly else "rw")
        for slot in info.memslots
    ]
    say(*table(("slot", "ipa", "size", "access"), rows, right=("slot", "ipa")))
