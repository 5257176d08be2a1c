"""What mtetool cannot follow in a migration stream, and how to switch it off."""

from __future__ import annotations

from mtetool.errors import StreamDamagedError, StreamUnsupportedError
from mtetool.words import printable, quoted

# Capabilities that leave the stream as `mtetool.relay.stream` describes it. QEMU lists only those
# that both ends must agree on, so none of these is in the lists of today's versions.
HARMLESS = frozenset(
    {
        *("auto-converge", "dirty-limit", "events", "late-block-activate"),
        *("pause-before-switchover", "return-path", "switchover-ack", "validate-uuid", "xbzrle"),
    }
)

# What the first four bytes can be in place of QEMU's own.
MULTIFD_MAGIC = 0x11223344
_TLS_HANDSHAKE = b"\x16\x03"

# From POSTCOPY_ADVISE to RECV_BITMAP, and ENABLE_COLO. The first is empty if it is not about RAM.
_POSTCOPY_ADVISE = 3
_COMMANDS = {**dict.fromkeys(range(3, 10), "postcopy-ram"), 10: "x-colo"}
_RAM_FLAGS = {0x100: "compress", 0x200: "multifd"}
_SECTIONS = {"dirty-bitmap": "dirty-bitmaps", "block": "block"}
_DAMAGED_HINT = "start the migration again; if that fails too, report both ends' versions of QEMU"


def damaged(offset: int, what: str) -> StreamDamagedError:
    """The error for something that QEMU does not write."""
    message = f"the migration stream is damaged at byte {offset:,}: {what}"
    return StreamDamagedError(message, hint=_DAMAGED_HINT, offset=offset)


def unsupported(offset: int, what: str, hint: str) -> StreamUnsupportedError:
    """The error for something that QEMU writes and mtetool does not understand."""
    message = f"mtetool cannot follow this migration stream: {what} (at byte {offset:,})"
    return StreamUnsupportedError(message, hint=hint, offset=offset)


def capability(offset: int, name: str) -> StreamUnsupportedError:
    """The error for a capability of QEMU's migrations."""
    name = printable(name)
    hint = f"switch it off at both ends: migrate_set_capability {name} off"
    return unsupported(offset, f"QEMU uses the capability {name}", hint)


def wrong_magic(found: bytes) -> StreamDamagedError | StreamUnsupportedError:
    """The error for a stream that does not begin with QEMU's magic bytes."""
    if found.startswith(_TLS_HANDSHAKE):
        return unsupported(
            0,
            "QEMU encrypts it (TLS)",
            "switch it off at both ends: migrate_set_parameter tls-creds ''",
        )
    if int.from_bytes(found, "big") == MULTIFD_MAGIC:
        return capability(0, "multifd")
    return damaged(0, f"it begins with {found.hex(' ')}, not with QEVM")


def command(offset: int, number: int, length: int) -> StreamDamagedError | StreamUnsupportedError:
    """The error for a command to the destination."""
    if number == _POSTCOPY_ADVISE and not length:
        return capability(offset, "dirty-bitmaps")
    if number in _COMMANDS:
        return capability(offset, _COMMANDS[number])
    if not number:
        return damaged(offset, "command 0, which QEMU does not have")
    hint = "update mtetool, or use an older QEMU at the source"
    return unsupported(offset, f"it has command {number}, which this mtetool does not know", hint)


def ram_flags(offset: int, word: int, flags: int) -> StreamDamagedError | StreamUnsupportedError:
    """The error for flags of a word of RAM's section that are no page, list or end."""
    for flag, name in _RAM_FLAGS.items():
        if flags & flag:
            return capability(offset, name)
    if flags & 0x80:
        what, hint = "it was made for RDMA", "migrate by tcp: or unix: instead of rdma:"
        return unsupported(offset, what, hint)
    return damaged(offset, f"{word:#x}, whose flags {flags:#x} are none of a page")


def section(offset: int, name: str) -> StreamUnsupportedError:
    """The error for a section other than RAM's that is sent while the guest runs."""
    if name in _SECTIONS:
        return capability(offset, _SECTIONS[name])
    what = f"{quoted(name)} sends state while the guest runs, whose length is unknown"
    return unsupported(offset, what, "unplug that device (VFIO?) for the migration: device_del")


def no_footer(offset: int) -> StreamUnsupportedError:
    """The error for the stream of a machine type whose sections end without a footer."""
    hint = "use a machine type of QEMU 2.4 or later"
    return unsupported(offset, "its sections have no footers", hint)


def early_device(offset: int, name: str) -> StreamUnsupportedError:
    """The error for the state of a device before the end of RAM."""
    what = f"{quoted(name)} sends its state before the end of RAM, and its length is unknown"
    hint = (
        "switch background-snapshot off (migrate_set_capability background-snapshot off),"
        " or use a guest without virtio-mem"
    )
    return unsupported(offset, what, hint)
