"""`mtetool exec`: start a VMM whose VM has MTE, in mtetool's own process."""

from __future__ import annotations

import sys

import click

from mtetool.errors import MtetoolError
from mtetool.words import printable


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.option(
    "--vm",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Which VM gets MTE, counted in order of creation (default 1).",
)
@click.option(
    "--wait",
    "seconds",
    type=click.FloatRange(min=0, min_open=True, max=1e6),
    default=60.0,
    metavar="SECONDS",
    help="How long to wait for that VM (default 60).",
)
@click.option(
    "--require/--no-require",
    "required",
    default=True,
    help="Refuse a VM without MTE (the default), or accept one.",
)
@click.option(
    "--every-call", is_flag=True, help="Watch every system call: slower, but misses nothing."
)
@click.argument("words", metavar="-- VMM [ARG]...", nargs=-1, required=True, type=click.UNPROCESSED)
def command(
    vm: int, seconds: float, required: bool, every_call: bool, words: tuple[str, ...]
) -> None:
    """Become the program VMM, and enable MTE for its VM as it is created.

    This is for a VMM that cannot do so itself. The VMM keeps mtetool's PID. The status is the
    VMM's, or 2 or 4 when it could not be started.
    """
    from mtetool.backends.kvm.starting import Wish
    from mtetool.flows.exec import exec_vmm

    sys.stdout.flush()
    exec_vmm(list(words), Wish(vm, seconds, required, every_call, _text))


def _text(error: MtetoolError) -> str:
    """Return what is printed for an error, beside the VMM's own output."""
    hint = f"  try: {printable(error.hint)}\n" if error.hint else ""
    return f"mtetool: {printable(error.message)}\n{hint}"
