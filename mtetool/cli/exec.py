"""`mtetool exec`: start a VMM whose VM has MTE, in mtetool's own process."""

from __future__ import annotations

import sys

import click

from mtetool.cli.options import Parsed, completes, parse_file
from mtetool.cli.render import beside_vmm
from mtetool.companion.client import SOCKET


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
@click.option(
    "--companion",
    type=Parsed("file", parse_file),
    default=SOCKET,
    shell_complete=completes("files"),
    metavar="SOCKET",
    help=f"The companion service, asked without CAP_SYS_PTRACE (default {SOCKET}).",
)
@click.argument("words", metavar="-- VMM [ARG]...", nargs=-1, required=True, type=click.UNPROCESSED)
def command(
    vm: int,
    seconds: float,
    required: bool,
    every_call: bool,
    companion: str,
    words: tuple[str, ...],
) -> None:
    """Become the program VMM, and enable MTE for its VM as it is created.

    This is for a VMM that cannot do so itself. The VMM keeps mtetool's PID. The status is the
    VMM's, or 2 or 4 when it could not be started.
    """
    from mtetool.backends.kvm.starting import Wish
    from mtetool.flows.exec import exec_vmm

    sys.stdout.flush()
    exec_vmm(list(words), Wish(vm, seconds, required, every_call, beside_vmm), companion)
