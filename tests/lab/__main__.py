"""The lab from the command line: `python -m tests.lab run|shell|build`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.lab.images import DEFAULT_KERNEL, DEFAULT_LIBVIRT, KERNELS, LIBVIRTS, images
from tests.lab.machine import (
    CommandTimeoutError,
    Machine,
    MachineLostError,
    report,
    shell,
)
from tests.lab.packages import LabUnavailableError

STATUS_UNAVAILABLE = 2
STATUS_TIMEOUT = 124
STATUS_LOST = 125


def main() -> int:
    """Parse the arguments, run the command, and return the exit status."""
    arguments = _parser().parse_args()
    try:
        return int(arguments.function(arguments))
    except LabUnavailableError as error:
        report(f"lab: {error}")
        return STATUS_UNAVAILABLE
    except CommandTimeoutError as error:
        report(f"lab: {error}")
        return STATUS_TIMEOUT
    except MachineLostError as error:
        report(f"lab: {error}")
        return STATUS_LOST


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab", description="A real arm64 kernel with KVM and MTE, emulated."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function, text in (
        ("run", _run, "run a command on the lab host, and exit with its status"),
        ("shell", _shell, "a prompt on the lab host; `exit` ends it"),
        ("build", _build, "build the images that the lab boots, unless they are cached"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(function=function)
        command.add_argument("--kernel", default=DEFAULT_KERNEL, choices=list(KERNELS))
        command.add_argument(
            "--libvirt",
            default=DEFAULT_LIBVIRT,
            choices=LIBVIRTS,
            help=f"the Debian suite that libvirt comes from ({DEFAULT_LIBVIRT})",
        )
        if name == "build":
            continue
        command.add_argument("--with", dest="with_dir", type=Path, help="directory shown at /with")
        command.add_argument("--memory", default="4G", help="memory of the lab host (4G)")
        if name == "run":
            command.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS")
            command.add_argument("--verbose", "-v", action="store_true", help="print the boot time")
            command.add_argument("argv", nargs="+", metavar="COMMAND")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    out, err = sys.stdout.buffer, sys.stderr.buffer
    with Machine(
        kernel=arguments.kernel,
        libvirt=arguments.libvirt,
        memory=arguments.memory,
        with_dir=_with_dir(arguments),
    ) as machine:
        if arguments.verbose:
            report(f"lab: booted in {machine.boot_seconds:.1f} s")
        status = machine.stream(
            arguments.argv,
            lambda data: (out.write(data), out.flush()),
            lambda data: (err.write(data), err.flush()),
            timeout=arguments.timeout,
        )
    # As a shell reports it: 128 + N for signal N.
    return status if status >= 0 else 128 - status


def _shell(arguments: argparse.Namespace) -> int:
    return shell(arguments.kernel, arguments.libvirt, arguments.memory, _with_dir(arguments))


def _build(arguments: argparse.Namespace) -> int:
    images(arguments.kernel, libvirt=arguments.libvirt)
    return 0


def _with_dir(arguments: argparse.Namespace) -> Path | None:
    directory: Path | None = arguments.with_dir
    if directory is not None and not directory.is_dir():
        raise LabUnavailableError(f"--with {directory}: there is no such directory")
    return directory


if __name__ == "__main__":
    sys.exit(main())
