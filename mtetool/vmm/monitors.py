"""The monitor of a QEMU: found where QEMU sees it, and trusted once it is proven to be QEMU's.

The meaning of a path depends on the mount namespace of a process, and a socket outlives the process
that made it: another VM may answer there. Its memory would be taken for the guest's, and tags would
be lost silently.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from mtetool.errors import ForeignMonitorError, LayoutUnknownError
from mtetool.vmm import proc, qemu_options, unix_sockets
from mtetool.vmm.qemu import NAME_LENGTH, Monitor
from mtetool.vmm.qemu_options import SocketAddress
from mtetool.vmm.qmp import GREETING_SECONDS, Conversation, Patience, unusable

# A command line can name thousands.
_MOST_MONITORS = 8
_CONFIG_BYTES = 1 << 20


def open_given(pid: int, path: Path) -> Monitor:
    """Connect to the monitor at a path of our own, if it is proven to be the process's.

    Raises ForeignMonitorError, LayoutUnknownError.
    """
    try:
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise unusable(str(path), error.strerror or str(error)) from error
    return _proven(pid, str(path), _connected(str(path), file), Patience())


def open_found(pid: int) -> Monitor | None:
    """Connect to the first monitor on the process's command line that is proven to be its own.

    None if it names none that listens on a unix socket. Raises LayoutUnknownError with the reason
    for each that fails.
    """
    patience = Patience()
    refusals = []
    for address in _addresses(pid)[:_MOST_MONITORS]:
        try:
            return _proven(pid, str(address), _reached(pid, address), patience)
        except (LayoutUnknownError, ForeignMonitorError) as error:
            refusals.append(error)
    if len(refusals) == 1:
        raise LayoutUnknownError(refusals[0].message, hint=refusals[0].hint) from refusals[0]
    if refusals:
        raise LayoutUnknownError(
            f"none of the monitors of process {pid} can be used:"
            f" {'; '.join(error.message for error in refusals)}",
            hint=refusals[0].hint,
        ) from refusals[0]
    return None


def name_of(pid: int) -> str | None:
    """The guest's name on a QEMU's command line; None if there is none."""
    name = qemu_options.guest_name(proc.command_line(pid), lambda path: _config(pid, path))
    return None if name is None else name[:NAME_LENGTH]


def _addresses(pid: int) -> list[SocketAddress]:
    return qemu_options.monitors(proc.command_line(pid), lambda path: _config(pid, path))


def _config(pid: int, path: str) -> str:
    """The text of a QEMU's `-readconfig` file; empty if it cannot be read."""
    try:
        file = unix_sockets.find(pid, path)
    except OSError:
        return ""
    try:
        return os.fsdecode(unix_sockets.read_regular(file, _CONFIG_BYTES))
    except OSError:
        return ""
    finally:
        os.close(file)


def _reached(pid: int, address: SocketAddress) -> socket.socket:
    where = str(address)
    try:
        if address.abstract:
            name = os.fsencode(address.path)
            return unix_sockets.connect_abstract(name, GREETING_SECONDS, padded=address.padded)
        file = unix_sockets.find(pid, address.path)
    except OSError as error:
        raise unusable(where, error.strerror or str(error)) from error
    return _connected(where, file)


def _connected(where: str, file: int) -> socket.socket:
    try:
        return unix_sockets.connect(file, GREETING_SECONDS)
    except BlockingIOError as error:
        raise unusable(where, "other clients are waiting for it already") from error
    except OSError as error:
        raise unusable(where, error.strerror or "it does not answer") from error
    finally:
        os.close(file)


def _proven(pid: int, where: str, connection: socket.socket, patience: Patience) -> Monitor:
    """The monitor at the other end; one that cannot be this process's is asked nothing."""
    try:
        peer = unix_sockets.peer_of(connection)
        conversation = Conversation(connection, where, patience)
        monitor = Monitor(conversation)
        if peer.pid == pid:
            conversation.open()
        elif not _may_speak_for(peer, pid):
            raise _foreign(pid, where, peer, "")
        else:
            _check_threads(pid, where, peer, conversation)
    except BaseException:
        connection.close()
        raise
    return monitor


def _check_threads(
    pid: int, where: str, peer: unix_sockets.Peer, conversation: Conversation
) -> None:
    """Check that it names threads of the process. Raises ForeignMonitorError."""
    try:
        conversation.open()
        tids = Monitor(conversation).vcpu_threads()
    except LayoutUnknownError as error:
        raise _foreign(pid, where, peer, f"; {error.message}") from error
    if not tids or not tids <= proc.inner_tids(pid):
        raise _foreign(pid, where, peer, "; the vCPU threads it names are another process's")


def _may_speak_for(peer: unix_sockets.Peer, pid: int) -> bool:
    """Whether the peer may be a manager that made the socket for the process.

    libvirt and Kata listen themselves, and hand the socket to QEMU. QEMU then names its threads by
    their ids in its own PID namespace, which are the same in many containers: so the peer must be
    in that namespace too. Thread ids are not secret: so it must be root, or the process's own user.
    """
    with suppress(OSError):
        own, others = (os.stat(f"/proc/{each}/ns/pid") for each in (pid, peer.pid))  # noqa: PTH116
        return os.path.samestat(own, others) and peer.uid in (0, proc.uid_of(pid))
    return False


def _foreign(pid: int, where: str, peer: unix_sockets.Peer, more: str) -> ForeignMonitorError:
    who = f"process {peer.pid} ({proc.program(peer.pid)})" if peer.pid else "a hidden process"
    return ForeignMonitorError(
        f"the monitor at {where} is not proven to belong to process {pid}: {who} listens there"
        f"{more}",
        hint="leave --qmp out: mtetool then finds the VM's own monitor or asks the kernel;"
        " list the VMs: mtetool list",
        pid=pid,
        path=where,
    )
