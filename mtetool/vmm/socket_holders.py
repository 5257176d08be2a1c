"""The processes that hold the other end of a socket of ours.

SO_PEERCRED names the process that connected or listened, which need not hold the socket any more:
a manager connects, and hands the descriptor to its VMM. So the kernel is asked for the inode of the
other end, and /proc for those who have it open.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import struct
import sys
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from mtetool.vmm.descriptors import who_has

# include/uapi/linux/sock_diag.h, unix_diag.h, netlink.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_UDIAG_SHOW_PEER = 4
_UNIX_DIAG_PEER = 2
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST = struct.Struct("=BBHIIIII")  # struct unix_diag_req
_REPLY = struct.Struct("=BBBBIII")  # struct unix_diag_msg
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_ANY_COOKIE = 0xFFFF_FFFF
_ANSWER_BYTES = 4096
_ANSWER_SECONDS = 1.0

# A table of other people's making: a longer one is not read to its end.
_MOST_ROWS = 1 << 20
_TCP_ROW = re.compile(
    rb"\s*\d+: ([0-9A-F]{8}|[0-9A-F]{32}):([0-9A-F]{4}) ([0-9A-F]{8}|[0-9A-F]{32}):([0-9A-F]{4})"
    rb" [0-9A-F]{2} \S+ \S+ \S+\s+\d+\s+\d+ (\d{1,10}) "
)

_Place = tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]


def holders(connection: socket.socket, proc: Path = Path("/proc")) -> list[int]:
    """Return the PIDs of all processes that have the other end of a connected socket open.

    The other end is a unix socket, or a TCP socket of this host and network namespace. The list is
    ascending; it lacks processes that this user may not look at, and is empty if the other end is
    elsewhere, or gone.
    """
    try:
        if connection.family == socket.AF_UNIX:
            inode = _unix_peer(os.fstat(connection.fileno()).st_ino)
        else:
            inode = _tcp_peer(connection, proc)
    except (OSError, ValueError):
        return []
    return who_has(f"socket:[{inode}]", proc) if inode else []


def _unix_peer(inode: int) -> int:
    """The inode of the unix socket to which that one is connected; 0 if unknown. Raises OSError."""
    body = _REQUEST.pack(socket.AF_UNIX, 0, 0, 0, inode, _UDIAG_SHOW_PEER, _ANY_COOKIE, _ANY_COOKIE)
    size = _HEADER.size + len(body)
    head = _HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(_ANSWER_SECONDS)
        kernel.send(head + body)
        answer = kernel.recv(_ANSWER_BYTES)
    length, kind, _, _, _ = _HEADER.unpack_from(answer)
    if kind != _SOCK_DIAG_BY_FAMILY:  # NLMSG_ERROR: no such socket, or no such diagnosis
        return 0
    return _peer_attribute(answer[_HEADER.size + _REPLY.size : length])


def _peer_attribute(attributes: bytes) -> int:
    while len(attributes) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(attributes)
        if kind == _UNIX_DIAG_PEER and length == _ATTRIBUTE.size + 4:
            return int.from_bytes(attributes[_ATTRIBUTE.size : length], sys.byteorder)
        attributes = attributes[max((length + 3) & ~3, _ATTRIBUTE.size) :]
    return 0


def _tcp_peer(connection: socket.socket, proc: Path) -> int:
    """The inode of the socket whose two addresses are ours swapped; 0 if there is none."""
    theirs, ours = _place(connection.getpeername()), _place(connection.getsockname())
    for name in ("tcp", "tcp6"):
        with suppress(OSError), (proc / "self/net" / name).open("rb") as table:
            for row in islice(table, _MOST_ROWS):
                match = _TCP_ROW.match(row)
                if match is None or int(match[2], 16) != theirs[1]:
                    continue
                if _parsed(match[1], match[2]) == theirs and _parsed(match[3], match[4]) == ours:
                    return int(match[5])
    return 0


def _place(address: Any) -> _Place:
    return _plain(ipaddress.ip_address(address[0].partition("%")[0])), address[1]


def _parsed(address: bytes, port: bytes) -> _Place:
    """Parse an address of /proc/net/tcp: hex words as this machine stores them."""
    words = [int(address[i : i + 8], 16) for i in range(0, len(address), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    return _plain(ipaddress.ip_address(packed)), int(port, 16)


def _plain(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The IPv4 address that an IPv6 socket shows as ::ffff:192.0.2.1."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    return address
