"""`mtetool list`: the VMs of this host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mtetool.cli.options import connect_option, quiet_option, report_option
from mtetool.cli.ranges import size
from mtetool.cli.render import describe_guest, print_json, say, table, warn
from mtetool.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mtetool.backends.kvm.listing import ListedVm
    from mtetool.errors import PermissionRefusedError

# By the `reason` of the error; the hint says the rest.
_UNSEEN = {
    "other-user": " of other users",
    "capabilities": " with capabilities that mtetool does not have",
    "not-dumpable": " protected against the same user",
    "user-namespace": " outside mtetool's user namespace",
}
_MTE = {True: "on", False: "off", None: "unknown"}


@click.command("list")
@click.option("--no-attach", is_flag=True, help="Attach to no VMM: show only what /proc says.")
@connect_option
@quiet_option
@report_option
def command(no_attach: bool, connect: str | None, quiet: bool, output: str) -> int:
    """List the VMs of this host: PID, VMM, name, vCPUs, memory, MTE, state, owner.

    mtetool attaches to each VMM for a moment, to ask the kernel whether MTE is on. Facts that
    it cannot find out are shown as unknown, with the reason on standard error.
    """
    from mtetool.backends.kvm.listing import list_vms

    listing = list_vms(attach=not no_attach, connect=connect)
    if not quiet:
        if listing.unnamed is not None:
            warn(f"libvirt's domains are shown by their PIDs: {listing.unnamed.message}")
        for vm in listing.vms:
            if vm.reason is not None:
                warn(f"{vm.info.source}: {vm.reason.message}")
        for line in _unseen(listing.unseen):
            warn(line)
    if output == "json":
        vms = [_document(vm) for vm in listing.vms]
        head = {"schema": "mtetool.list/1", "vms": vms}
        print_json({**head, "unseen_processes": len(listing.unseen)})
        return 0
    header = ("GUEST", "VMM", "NAME", "VCPUS", "MEMORY", "MTE", "STATE", "OWNER")
    say(*table(header, (_row(vm) for vm in listing.vms), right=("VCPUS",)))
    return 0


def _unseen(errors: Iterable[PermissionRefusedError]) -> Iterator[str]:
    """Yield one line for each reason why processes could not be inspected."""
    by_reason: dict[object, list[PermissionRefusedError]] = {}
    for error in errors:
        by_reason.setdefault(error.details.get("reason"), []).append(error)
    for reason, found in by_reason.items():
        subject = counted(len(found), "process", "processes")
        may_be = "a VMM" if len(found) == 1 else "VMMs"
        which = _UNSEEN.get(str(reason), "")
        hint = "run mtetool as root" if reason == "other-user" else found[0].hint
        yield f"{subject}{which} could not be inspected, and may be {may_be}; try: {hint}"


def _row(vm: ListedVm) -> tuple[object, ...]:
    memory = vm.memory_bytes
    return (
        vm.info.source,
        vm.info.vmm,
        vm.info.name,
        vm.info.vcpus,
        None if memory is None else size(memory).partition(" (")[0],
        _MTE[vm.info.mte],
        vm.state,
        vm.owner,
    )


def _document(vm: ListedVm) -> dict[str, Any]:
    reason = vm.reason
    return {
        **describe_guest(vm.info),
        "fd": vm.fd,
        "memory_bytes": vm.memory_bytes,
        "state": vm.state,
        "owner": vm.owner,
        "reason": None if reason is None else {"error": reason.id, "message": reason.message},
    }
