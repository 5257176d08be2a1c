"""What `--from` and `--to` take, and what they say about the rest."""

from __future__ import annotations

import pytest

from mtetool.errors import BadNameError, SourceError
from mtetool.relay.address import (
    MAX_PATH_BYTES,
    Address,
    Command,
    Inherited,
    Side,
    StandardStreams,
    Tcp,
    Tls,
    Unix,
    parse,
)


@pytest.mark.parametrize(
    ("text", "side", "address"),
    [
        ("unix:/run/x", Side.QEMU, Unix("/run/x")),
        ("unix:a:b,c", Side.RELAY, Unix("a:b,c")),
        ("listen:unix:/run/x", Side.QEMU, Unix("/run/x", True)),
        ("tcp:host:4444", Side.QEMU, Tcp("host", 4444)),
        ("tcp:[::1]:4444", Side.QEMU, Tcp("::1", 4444)),
        ("listen:tcp::0", Side.QEMU, Tcp("", 0, True)),
        ("listen:tcp:127.0.0.1:9", Side.QEMU, Tcp("127.0.0.1", 9, True)),
        ("tcp-plaintext:host:1", Side.RELAY, Tcp("host", 1, False, "tcp-plaintext")),
        ("listen:tcp-plaintext::65535", Side.RELAY, Tcp("", 65535, True, "tcp-plaintext")),
        ("tls:host:4444", Side.RELAY, Tls("host", 4444)),
        ("listen:tls:[fe80::1%eth0]:1", Side.RELAY, Tls("fe80::1%eth0", 1, True)),
        ("fd:3", Side.QEMU, Inherited(3)),
        ("fd:3", Side.RELAY, Inherited(3, Side.RELAY)),
        ("exec:ssh h 'a b'", Side.RELAY, Command(("ssh", "h", "a b"))),
        ("-", Side.RELAY, StandardStreams()),
    ],
)
def test_addresses(text: str, side: Side, address: Address) -> None:
    assert parse(text, side) == address
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "side", "message", "hint"),
    [
        ("tcp:host:1", Side.RELAY, "would carry tags in clear text", "tcp-plaintext:"),
        ("listen:tcp::1", Side.RELAY, "would carry tags in clear text", "exec:ssh"),
        ("tcp-plaintext:host:1", Side.QEMU, "is for the way between relays", "write tcp:"),
        ("tls:host:1", Side.QEMU, "cannot read a stream that QEMU encrypts", "tls-creds"),
        ("exec:cat", Side.QEMU, "QEMU needs a socket", "unix:PATH"),
        ("-", Side.QEMU, "QEMU needs a socket", "unix:PATH"),
        ("/run/x", Side.QEMU, "is not an address of QEMU", "write unix:/run/x"),
        ("UNIX-LISTEN:/run/x", Side.QEMU, "is not an address", "write listen:unix:PATH"),
        ("rdma:host:1", Side.QEMU, "is not an address", "use unix:PATH"),
        ("", Side.RELAY, "'' is not an address of the other relay", "tls:HOST:PORT"),
        ("listen:fd:3", Side.QEMU, "is not an address", "without listen:"),
        ("listen:exec:cat", Side.RELAY, "is not an address", "without listen:"),
        ("unix:", Side.QEMU, "has no path", "unix:PATH"),
        ("unix:a\0b", Side.QEMU, "has no path", "unix:PATH"),
        ("tcp:host", Side.QEMU, "is not a host and a port", "HOST:PORT"),
        ("tcp:::1:4444", Side.QEMU, "is not a host and a port", "in brackets"),
        ("tcp:host:x", Side.QEMU, "is not a host and a port", "HOST:PORT"),
        ("tcp::1", Side.QEMU, "names no host", "HOST:PORT"),
        ("tcp:host:0", Side.QEMU, "no port that exists", "1 to 65535"),
        ("tcp:host:65536", Side.QEMU, "no port that exists", "1 to 65535"),
        ("listen:tcp::" + "9" * 5000, Side.QEMU, "no port that exists", "1 to 65535"),
        ("fd:x", Side.QEMU, "does not name a descriptor", "fd:3"),
        ("fd:-1", Side.QEMU, "does not name a descriptor", "fd:3"),
        ("fd:9999999", Side.QEMU, "does not name a descriptor", "fd:3"),
        ("exec:", Side.RELAY, "has no command", "exec:ssh"),
        ("exec:''", Side.RELAY, "has no command", "exec:ssh"),
        ("exec:a 'b", Side.RELAY, "cannot be split into words", "quote it"),
    ],
)
def test_what_is_no_address(text: str, side: Side, message: str, hint: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse(text, side)
    assert message in caught.value.message
    assert caught.value.hint is not None
    assert hint in caught.value.hint


def test_the_longest_path() -> None:
    assert parse("unix:" + "ä" * 53, Side.QEMU) == Unix("ä" * 53)
    with pytest.raises(BadNameError, match=f"can have {MAX_PATH_BYTES} bytes"):
        parse("unix:" + "ä" * 54, Side.QEMU)
