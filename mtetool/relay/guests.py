"""The guest of a relay: named by the user, or found by QEMU's socket or pipe, and checked."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING, Literal, Self

from mtetool.backends import open_guest
from mtetool.errors import GuestError, LayoutError, RelayPeerError, SourceError
from mtetool.guest import Extent, Guest, GuestOptions
from mtetool.relay.frames import Frame, Kind
from mtetool.sources.copying import check_has_tags, check_mte_is_on
from mtetool.sources.layout import hex_range, layout_of, merged, without
from mtetool.uapi import PAGE_SIZES
from mtetool.vmm import proc, socket_holders
from mtetool.vmm.descriptors import pipe_holders

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtetool.files.fields import Fields
    from mtetool.relay.channel import Channel

_KINDS = ("kvm", "libvirt", "emu")
_ADDRESS_END = 1 << 52
_CREDENTIALS = Struct("3i")  # struct ucred: pid, uid, gid


@dataclass(frozen=True, slots=True)
class Wanted:
    """The guest that the user named, or None to find it; and what the user said about it."""

    name: str | None
    options: GuestOptions

    def check(self) -> None:
        """Check that it can be a guest of QEMU's. Raises SourceError."""
        if self.name is not None and self.name.partition(":")[0] not in _KINDS:
            raise SourceError(
                f"{self.name} is not a guest that QEMU migrates",
                hint="name it as kvm:PID or libvirt:DOMAIN, or leave it out: QEMU's end shows it",
            )


def open_for(wanted: Wanted, qemu: Channel) -> tuple[str, Guest]:
    """Open the guest whose QEMU holds the other end of the channel; return its name, too.

    Raises GuestError.
    """
    connected = qemu.peer_socket
    if connected is None:
        return _open(wanted, None, qemu.name, "socket")
    # Where the kernel has no diagnosis of unix sockets, it still knows who connected or listened.
    holders = socket_holders.holders(connected) or _maker(connected)
    return _open(wanted, vmms(holders), qemu.name, "socket")


def open_at_pipe(wanted: Wanted, fd: int, *, writes: bool) -> tuple[str, Guest]:
    """As `open_for`, for the QEMU that writes to a pipe of ours, or reads from it.

    Raises GuestError.
    """
    is_pipe = stat.S_ISFIFO(os.fstat(fd).st_mode)
    holders = vmms(pipe_holders(fd, writers=writes)) if is_pipe else None
    return _open(wanted, holders, f"standard {'input' if writes else 'output'}", "pipe")


def _open(
    wanted: Wanted, holders: list[int] | None, end: str, kind: Literal["socket", "pipe"]
) -> tuple[str, Guest]:
    """Open the guest; `holders` are the VMMs at the other end, None if nobody can know."""
    name = wanted.name
    if name is None:
        name = _only(holders, kind)
    guest = open_guest(name, wanted.options)
    # Its description would need the memslots, which a guest without MTE may not tell.
    pid = guest.pid
    if holders and pid is not None and pid not in holders:
        guest.close()
        raise GuestError(
            f"{name} does not hold the other end of {end}: process {holders[0]} does",
            hint=f"name no guest: the {kind} shows whose stream it is",
            pid=pid,
        )
    return name, guest


def vmms(pids: Sequence[int]) -> list[int]:
    """The VMMs with a VM among processes that hold the other end: libvirt may hold it as well."""
    found = []
    for pid in pids:
        with suppress(GuestError):
            if proc.find(pid).vm_fds:
                found.append(pid)
    return found


def _maker(connected: socket.socket) -> list[int]:
    if connected.family != socket.AF_UNIX:
        return []
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, _, _ = _CREDENTIALS.unpack(credentials)
    return [pid] if pid > 0 else []


def _only(holders: Sequence[int] | None, kind: Literal["socket", "pipe"]) -> str:
    if holders and len(holders) == 1:
        return f"kvm:{holders[0]}"
    option = "--guest " if kind == "socket" else ""
    if not holders:
        raise GuestError(
            f"no VMM of this host is seen at the other end of QEMU's {kind}",
            hint=f"name the guest: {option}kvm:PID or {option}libvirt:DOMAIN; run mtetool as root",
        )
    pids = ", ".join(map(str, holders[:8]))
    raise GuestError(
        f"several VMMs hold the other end of QEMU's {kind}: {pids}",
        hint=f"name the guest: {option}kvm:PID",
    )


def ready(guest: Guest, name: str) -> Ready:
    """Attach to a guest. Raises MteOffError, LayoutUnknownError, GuestError."""
    check_mte_is_on(guest)
    guest.prepare()
    layout = layout_of(guest)
    check_has_tags(layout, name)
    return Ready(merged(layout.writable) or layout.taggable, guest.page_size_bytes)


@dataclass(frozen=True, slots=True)
class Ready:
    """What a relay says of its guest once it can copy the guest's tags."""

    memory: list[Extent]
    """The memory that takes tags: ascending, not touching."""
    page_size_bytes: int

    def fields(self) -> dict[str, object]:
        """The map of a READY frame."""
        memory = [[extent.ipa, extent.size_bytes] for extent in self.memory]
        return {"memory": memory, "page_size_bytes": self.page_size_bytes}

    @classmethod
    def of(cls, frame: Frame) -> Self:
        """What the other relay's READY frame says. Raises RelayPeerError."""
        if frame.kind is not Kind.READY:
            raise unexpected(frame)
        with frame.fields() as fields:
            return cls.read(fields)

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """What a map says that `fields` made. Raises DamagedError."""
        page = fields.integer("page_size_bytes", min(PAGE_SIZES), max(PAGE_SIZES))
        memory = [_extent(row) for row in fields.array("memory")]
        if page not in PAGE_SIZES or not memory or None in memory:
            raise fields.wrong("its memory makes no sense")
        return cls(merged(extent for extent in memory if extent), page)


def _extent(row: object) -> Extent | None:
    numbers = row if isinstance(row, list) else []
    if len(numbers) != 2 or any(type(number) is not int for number in numbers):
        return None
    ipa, size_bytes = numbers
    is_sane = 0 <= ipa < _ADDRESS_END and 0 < size_bytes <= _ADDRESS_END
    return Extent(ipa, size_bytes) if is_sane else None


def unexpected(frame: Frame) -> RelayPeerError:
    """The error for a frame whose turn it is not."""
    return RelayPeerError(
        f"the other relay sent a {frame.kind.name} frame, which was not its turn",
        hint="install the same version of mtetool on both hosts",
    )


def check_same_memory(source: Sequence[Extent], destination: Sequence[Extent]) -> None:
    """Check that the destination has all memory of the source. Raises LayoutError."""
    left = without(source, destination)
    if left:
        raise LayoutError(
            f"the guest at the destination has no memory that takes tags at {hex_range(left[0])},"
            " and the one at the source has",
            hint="start the destination's QEMU with the same machine and memory as the source's",
            ipa=left[0].ipa,
        )
