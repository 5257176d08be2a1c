"""`mtetool companion`: the service that VMMs ask for MTE."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtetool.cli.options import Parsed, completes, parse_file
from mtetool.cli.render import beside_vmm, put
from mtetool.companion.client import SOCKET
from mtetool.companion.installing import NAMES

if TYPE_CHECKING:
    import socket


@click.command("companion")
@click.option(
    "--socket",
    "path",
    type=Parsed("file", lambda text: Path(parse_file(text))),
    default=SOCKET,
    shell_complete=completes("files"),
    metavar="PATH",
    help=f"Where to listen (default {SOCKET}), unless systemd says where.",
)
@click.option(
    "--show",
    type=click.Choice(NAMES),
    help="Print a file to install, and end: the emulator wrapper, a systemd unit, AppArmor rules.",
)
def command(path: Path, show: str | None) -> None:
    """Serve VMMs that have not the right to get MTE themselves, as under libvirt.

    Run as root. A VMM's wrapper asks the service before it becomes the VMM; the service then
    watches the start, enables MTE as the VM is created, and lets go.
    """
    if show is not None:
        from mtetool.companion.installing import text_of

        put(text_of(show))
        return
    from mtetool.companion.listening import listener
    from mtetool.companion.service import Service
    from mtetool.companion.serving import serve

    def served(connection: socket.socket) -> None:
        serve(connection, beside_vmm)

    Service(listener(path), served).run()
