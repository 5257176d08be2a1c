"""`mtetool relay`: a live migration of QEMU, with its tags."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from mtetool.cli import relay_file
from mtetool.cli.options import (
    NAME,
    Parsed,
    completes,
    parse_file,
    progress_options,
    report_option,
)
from mtetool.cli.options import guest_options as with_guest_options
from mtetool.cli.progress import shown
from mtetool.cli.ranges import size
from mtetool.cli.render import note, print_json, printing, put, say
from mtetool.guest import GuestOptions
from mtetool.words import counted

if TYPE_CHECKING:
    from mtetool.relay.address import Address
    from mtetool.relay.report import Report

_F = TypeVar("_F", bound=Callable[..., Any])
_CONNECT_SECONDS = 60.0
_INSTALLED = {
    "service": "mtetool-relay@.service",
    "socket": "mtetool-relay@.socket",
    "tmpfiles": "tmpfiles",
    "apparmor": "domains",
}
_UNIT = 4096  # the bar counts bytes, and QEMU pages of that size


def _show(context: click.Context, _: click.Parameter, name: str | None) -> None:
    """Print a file to install, and end."""
    if name is not None:
        from mtetool.files.installed import installed

        put(installed("mtetool.relay", _INSTALLED[name]))
        context.exit()


@click.group("relay", no_args_is_help=False)
def command() -> None:
    """Relay a live migration of QEMU from host to host, with its tags.

    One relay runs on each host. QEMU migrates to the source's, and the destination's QEMU waits
    for its own. The guest runs meanwhile, and starts at the destination with every tag.
    """


command.add_command(relay_file.save)
command.add_command(relay_file.load)
command.add_command(relay_file.stand_in)


def _options(function: _F) -> _F:
    for option in reversed(
        (
            click.option(
                "--guest",
                type=NAME,
                metavar="GUEST",
                shell_complete=completes("guests"),
                help="The guest (default: that of the QEMU at the other end of the socket).",
            ),
            click.option(
                "--tls-creds",
                type=Parsed("file", lambda text: Path(parse_file(text))),
                metavar="DIR",
                shell_complete=completes("files"),
                help="The directory of the certificates (default: QEMU's or libvirt's).",
            ),
            click.option(
                "--tls-hostname",
                metavar="NAME",
                help="The name in the other host's certificate, if it is not its address.",
            ),
            with_guest_options,
            progress_options,
            report_option,
        )
    ):
        function = option(function)
    return function


@command.command("source")
@click.option(
    "--from", "incoming", required=True, metavar="ADDRESS", help="Where QEMU migrates to."
)
@click.option(
    "--to", "outgoing", required=True, metavar="ADDRESS", help="Where the other relay is."
)
@click.option(
    "--listen-first",
    is_flag=True,
    help="Let QEMU connect before the destination is ready, as libvirt needs it.",
)
@click.option(
    "--show",
    type=click.Choice(tuple(_INSTALLED)),
    is_eager=True,
    expose_value=False,
    callback=_show,
    help="Print a file to install on a host with libvirt, and end.",
)
@_options
def source(incoming: str, outgoing: str, **options: Any) -> int:
    """Relay QEMU's migration to the destination, with the tags of all pages that pass."""
    from mtetool.relay.address import Side, parse

    qemu, peer = parse(incoming, Side.QEMU), parse(outgoing, Side.RELAY)
    return _relay("source", qemu, peer, **options)


@command.command("destination")
@click.option(
    "--from", "incoming", required=True, metavar="ADDRESS", help="Where the other relay is."
)
@click.option(
    "--to", "outgoing", required=True, metavar="ADDRESS", help="Where QEMU waits for the migration."
)
@_options
def destination(incoming: str, outgoing: str, **options: Any) -> int:
    """Pass a migration on to QEMU, which starts when all tags are in place."""
    from mtetool.relay.address import Side, parse

    peer, qemu = parse(incoming, Side.RELAY), parse(outgoing, Side.QEMU)
    return _relay("destination", qemu, peer, **options)


def _relay(
    role: Literal["source", "destination"],
    qemu: Address,
    peer: Address,
    *,
    guest: str | None,
    tls_creds: Path | None,
    tls_hostname: str | None,
    guest_options: GuestOptions,
    quiet: bool,
    progress: str,
    output: str,
    listen_first: bool = False,
) -> int:
    from mtetool.relay.address import StandardStreams
    from mtetool.relay.channels import Opening
    from mtetool.relay.guests import Wanted
    from mtetool.relay.report import News
    from mtetool.relay.running import Relay

    wanted = Wanted(guest, guest_options)
    wanted.check()
    latest: list[Report] = []
    with shown("relaying", progress, lambda: _details(latest)) as update:

        def count(report: Report) -> None:
            latest[:] = [report]
            if report.stream_pages is not None and report.memory_pages:
                update(report.stream_pages * _UNIT, report.memory_pages * _UNIT)
            else:
                update(report.stream_bytes, None)

        news = News(note if not quiet else lambda text: None, count)
        opening = Opening(
            retry_seconds=_CONNECT_SECONDS,
            tls_creds=tls_creds,
            tls_hostname=tls_hostname,
            on_listening=lambda name: news.say(f"waiting at {name}"),
            on_refused=lambda error: news.say(error.message),
        )
        report = Relay(role, qemu, peer, wanted, opening, news, listen_first).run()
    # Standard output may be the way to the other relay.
    beside = isinstance(peer, StandardStreams)
    with (
        redirect_stdout(sys.stderr if beside else sys.stdout),
        printing("the migration is complete"),
    ):
        if output == "json":
            print_json({"schema": "mtetool.relay/1", **relay_file.document(report)})
        elif not quiet:
            _tell(report)
    return 0


def _details(latest: list[Report]) -> dict[str, object]:
    """What progress shows besides the memory that has passed."""
    if not latest:
        return {"stage": ""}
    report = latest[0]
    keys = ("stream_bytes", "rounds", "tag_pages", "tag_bytes")
    return {"stage": report.stage, **{key: getattr(report, key) for key in keys}}


def _tell(report: Report) -> None:
    say(f"relayed {report.guest} in {report.elapsed_seconds:.1f} s; the other host: {report.peer}")
    pages = "" if report.stream_pages is None else f", {counted(report.stream_pages, 'page')}"
    say(f"QEMU's stream: {size(report.stream_bytes)}{pages}")
    tags = f"{counted(report.tag_pages, 'page')}, {size(report.tag_bytes)}"
    say(f"tags: {tags} in {counted(report.rounds, 'round')}")
    if report.held_seconds is not None:
        last = "" if report.last_pages is None else f" of {counted(report.last_pages, 'last page')}"
        say(f"the end of the stream waited {report.held_seconds:.3f} s for the tags{last}")
