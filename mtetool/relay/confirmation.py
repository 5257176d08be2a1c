"""Whether QEMU at the destination confirmed that it has everything.

Its last message on the return path is MIG_RP_MSG_SHUT with the value 0 (migration/migration.c).
"""

from __future__ import annotations

from mtetool.errors import GuestLostError

_ALL_IS_WELL = bytes.fromhex("0001 0004 00000000")  # type, length, value


class Confirmation:
    """The end of the return path."""

    def __init__(self) -> None:
        self._last = b""

    def take(self, data: bytes | bytearray) -> None:
        """Note what passes, of any length."""
        self._last = (self._last + bytes(data[-len(_ALL_IS_WELL) :]))[-len(_ALL_IS_WELL) :]

    def check(self) -> None:
        """Raise GuestLostError unless the confirmation was the last that passed."""
        if self._last != _ALL_IS_WELL:
            raise GuestLostError(
                "QEMU at the destination did not confirm that it has the whole guest",
                hint="see why in its log; the guest goes on at the source: query-status,"
                " virsh domstate",
            )
