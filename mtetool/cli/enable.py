"""`mtetool enable`: turn MTE on, from outside."""

from __future__ import annotations

import click

from mtetool.backends import open_guest
from mtetool.cli.options import NAME, completes, report_option
from mtetool.cli.options import guest_options as with_guest_options
from mtetool.cli.render import print_json, printing, say
from mtetool.guest import GuestOptions


@click.command("enable")
@click.argument("guest", type=NAME, metavar="GUEST", shell_complete=completes("guests"))
@with_guest_options
@report_option
def command(guest: str, guest_options: GuestOptions, output: str) -> None:
    """Turn MTE on for GUEST (kvm:PID, libvirt:DOMAIN), before its first vCPU.

    Start QEMU with -preconfig, run this, then continue with x-exit-preconfig. The status
    is 0 even if MTE was already on.
    """
    from mtetool.flows.enable import enable

    with open_guest(guest, guest_options) as opened:
        changed = enable(opened)
    with printing(f"MTE is on in {guest}"):
        if output == "json":
            row = {"source": guest, "mte": True, "changed": changed}
            print_json({"schema": "mtetool.enable/1", **row})
        else:
            say(f"{guest}: MTE {'enabled' if changed else 'was already on'}")
