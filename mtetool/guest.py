"""What a guest is, in words: its memslots and what is known of it. No tags, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SlotKind = Literal["ram", "rom", "device"]


@dataclass(frozen=True, slots=True)
class Memslot:
    """A range of guest physical memory that the VMM has given to KVM.

    `readonly` is None where nobody may know (a slot found by asking the kernel). `kind`
    is "device" for memory that cannot carry tags; such slots are never copied. `host_address` is
    where the slot begins in the VMM's own memory, if the user said so.
    """

    id: int
    ipa: int
    size_bytes: int
    readonly: bool | None = False
    kind: SlotKind = "ram"
    host_address: int | None = None

    @property
    def end(self) -> int:
        """The first address behind the slot."""
        return self.ipa + self.size_bytes


@dataclass(frozen=True, slots=True)
class GuestInfo:
    """A guest's description, as `emu show`, `info` and `list` print it."""

    source: str
    mte: bool | None
    page_size_bytes: int
    memslots: tuple[Memslot, ...]
    vmm: str | None = None
    name: str | None = None
    pid: int | None = None
    vcpus: int | None = None
