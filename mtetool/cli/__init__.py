"""The command line: one file per command, each loaded only when its command is asked for.

A new command needs one new file with the attribute `command`, and one line in COMMANDS.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

import click

from mtetool import __version__

# Start-up time counts, because scripts call mtetool often: the help of the group comes from
# this table, so it loads neither the commands nor what they need.
COMMANDS: dict[str, tuple[str, str]] = {
    "save": ("mtetool.cli.save", "Save the tags of a guest to a snapshot."),
    "restore": ("mtetool.cli.restore", "Write a snapshot's tags into a guest, exactly."),
    "info": ("mtetool.cli.info", "Show what a snapshot holds, without reading its tags."),
    "verify": ("mtetool.cli.verify", "Check a snapshot, and compare it with a guest."),
    "merge": ("mtetool.cli.merge", "Make one snapshot of a base and its deltas."),
    "convert": ("mtetool.cli.convert", "Convert tags to and from the forms of other programs."),
    "dump": ("mtetool.cli.dump", "Print tags, in runs of equal ones or one by one."),
    "diff": ("mtetool.cli.diff", "Show where the tags of two sources differ."),
    "report": ("mtetool.cli.report", "Write a page about tags: layout, statistics, a map."),
    "stats": ("mtetool.cli.stats", "Count tags: how many, how long their runs, how random."),
    "list": ("mtetool.cli.listing", "List the VMs of this host, and whether they have tags."),
    "enable": ("mtetool.cli.enable", "Turn MTE on for a guest, before its first vCPU."),
    "exec": ("mtetool.cli.exec", "Start a VMM whose VM has MTE, in this process."),
    "companion": ("mtetool.cli.companion", "Serve VMMs that may not enable MTE themselves."),
    "relay": ("mtetool.cli.relay", "Relay a live migration of QEMU, with its tags."),
    "probe": ("mtetool.cli.probe", "Report whether this host can copy tags, and if not, why."),
    "emu": ("mtetool.cli.emu", "Make, show and change emulated guests."),
}


class ClosedPipeError(Exception):
    """The reader of the output is gone.

    `click.Command.main` lets no BrokenPipeError out: it ends the process with status 1, even
    where `standalone_mode` is off.
    """


class LazyGroup(click.Group):
    """A group that imports the module of a command only when it is needed."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Parse, and print help or version; raises ClosedPipeError for a BrokenPipeError."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except BrokenPipeError as error:
            raise ClosedPipeError from error

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; raises ClosedPipeError for a BrokenPipeError."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise ClosedPipeError from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module and return its attribute `command`."""
        if cmd_name not in COMMANDS:
            return None
        command = cast(click.Command, import_module(COMMANDS[cmd_name][0]).command)
        _name_page(command, f"mtetool-{cmd_name}(1)")
        return command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in one line, to leave the screen to the commands."""
        formatter.write("Options: --version (show it), -h, --help (this text).\n")
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands in the help; click's own method would load them all."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the last line right below the list: with a line between, it would not fit."""
        formatter.write(f"{self.epilog}\n")


def _name_page(command: click.Command, page: str) -> None:
    """End the help of a command, and of those in a group, with the name of its manual page."""
    command.epilog = f"Manual page: {page}."
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            _name_page(inner, page)


_VERBOSE = "mtetool.verbose"


def _show_version(context: click.Context, given: bool) -> None:
    """Print the version, and with -v the line about this installation; end."""
    verbose = context.meta[_VERBOSE]
    if not given:
        if verbose:
            raise click.UsageError("-v goes with --version only", context)
        return
    click.echo(f"mtetool {__version__}")
    if verbose:
        from mtetool import provenance

        click.echo(provenance.line())
    context.exit()


@click.command(
    "mtetool",
    cls=LazyGroup,
    no_args_is_help=False,  # a missing command is an error like any other
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Manual pages: mtetool(1), and one per command: mtetool-save(1), ...",
)
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    hidden=True,  # --version names it: the help has no line left
    is_eager=True,  # and so known when --version is looked at, wherever it stands
    expose_value=False,
    callback=lambda context, _, given: context.meta.update({_VERBOSE: given}),
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    callback=lambda context, _, given: _show_version(context, given),
    help="Show the version (-v: and where it comes from) and exit.",
)
def group() -> None:
    """Tags (Arm MTE) of a GUEST: kvm:PID, libvirt:DOMAIN, proc:PID, emu:PATH."""
