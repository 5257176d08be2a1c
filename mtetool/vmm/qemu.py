"""What a QEMU process says over its monitor: memory layout, threads, and whether it runs.

The layout comes from the human monitor's `info mtree -f`, the only place that says which regions
KVM was given. None of it is taken on trust: an impossible answer is a LayoutUnknownError.
"""

from __future__ import annotations

import re

from mtetool.closing import Closing
from mtetool.guest import Memslot, Region, SlotKind
from mtetool.spans import Place
from mtetool.vmm.qmp import Commands

NAME_LENGTH = 1024
"""How many characters of a name are kept."""

# "  0000000040000000-000000007fffffff (prio 0, ram): mach-virt.ram KVM", offsets as "@0000…".
_REGION = re.compile(
    r"\s*(?P<first>[0-9a-f]{16})-(?P<last>[0-9a-f]{16}) \(prio -?\d+, (?P<type>[^)]+)\):"
    r" .*\bKVM"
)
# The same line: "mach-virt.ram KVM", or "mach-virt.ram @0000000010000000 KVM" with an offset.
_NAMED = re.compile(
    r"\s*(?P<first>[0-9a-f]{16})-(?P<last>[0-9a-f]{16}) \(prio -?\d+, [^)]+\):"
    r" (?P<name>.+?)(?: @(?P<offset>[0-9a-f]{16}))? KVM"
)
# "Host virtual address for 0x40000000 (mach-virt.ram) is 0xffff…"
_HOST_ADDRESS = re.compile(r"Host virtual address for 0x[0-9a-f]+ .* is (?:0x)?([0-9a-f]{1,16})\s*")
_HOST_ADDRESS_LENGTH = 1024
# RAM is written through the slot; ROM (and flash in read mode) is a read-only slot; "ramd" is
# device memory that QEMU has mapped.
_KINDS: dict[str, tuple[SlotKind, bool]] = {
    "ram": ("ram", False),
    "nv-ram": ("ram", False),
    "rom": ("rom", True),
    "romd": ("rom", True),
    "nv-rom": ("rom", True),
    "ramd": ("device", False),
}
# The most that KVM can have: arch/arm64/include/asm/kvm_pgtable.h, include/linux/kvm_host.h. Its
# pages have at least 4 KiB.
_IPA_END = 1 << 52
_MOST_SLOTS = 32764
_SMALLEST_PAGE_BYTES = 4096


class Monitor(Closing):
    """QEMU's monitor; a context manager. Every failure is a LayoutUnknownError."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands

    def memslots(self) -> tuple[Memslot, ...]:
        """The regions that QEMU has given to KVM."""
        try:
            return parse_mtree(self._commands.text("info mtree -f"))
        except ValueError as error:
            raise self._commands.error(f"no VM can have the memory it names: {error}") from None

    def regions(self) -> list[Region]:
        """The parts of QEMU's memory, by name, that it has given to KVM; they are unverified."""
        return parse_regions(self._commands.text("info mtree -f"))

    def host_addresses(self) -> list[Place]:
        """The places of the RAM slots that lie in one piece in QEMU's own memory."""
        found = []
        for slot in self.memslots():
            if slot.kind != "ram":
                continue
            first = self._host_address(slot.ipa)
            last = self._host_address(slot.end - 1)
            if first is not None and last == first + slot.size_bytes - 1:
                found.append(Place(slot.ipa, slot.size_bytes, first))
        return found

    def _host_address(self, ipa: int) -> int | None:
        text = self._commands.text(f"gpa2hva {ipa:#x}").strip()
        match = _HOST_ADDRESS.fullmatch(text) if len(text) <= _HOST_ADDRESS_LENGTH else None
        return int(match[1], 16) if match else None

    def paused(self) -> bool:
        """Whether the vCPUs are stopped."""
        status = self._commands.execute("query-status")
        running = status.get("running") if isinstance(status, dict) else None
        if not isinstance(running, bool):
            raise self._commands.error("its answer to query-status makes no sense")
        return not running

    def name(self) -> str | None:
        """The guest's name, `-name`; cut if it is very long."""
        answer = self._commands.execute("query-name")
        name = answer.get("name", "") if isinstance(answer, dict) else None
        if not isinstance(name, str):
            raise self._commands.error("its answer to query-name makes no sense")
        return name[:NAME_LENGTH] or None

    def vcpu_threads(self) -> frozenset[int]:
        """The ids of the vCPUs' threads, as QEMU itself sees them."""
        answer = self._commands.execute("query-cpus-fast")
        cpus = answer if isinstance(answer, list) else [None]
        ids = [cpu.get("thread-id") if isinstance(cpu, dict) else None for cpu in cpus]
        known = frozenset(tid for tid in ids if type(tid) is int)
        if None in ids or len(known) != len(ids):
            raise self._commands.error("its answer to query-cpus-fast makes no sense")
        return known

    def close(self) -> None:
        """Hang up."""
        self._commands.close()


def parse_mtree(text: str) -> tuple[Memslot, ...]:
    """The memslots in the output of `info mtree -f`, in order of address.

    QEMU prints every address space, so the same region comes several times. Raises ValueError for
    slots that no VM can have.
    """
    regions: set[tuple[int, int, SlotKind, bool]] = set()
    for line in text.splitlines():
        match = _REGION.fullmatch(line.rstrip())
        if match and match["type"] in _KINDS:
            first, end = int(match["first"], 16), int(match["last"], 16) + 1
            regions.add((first, end, *_KINDS[match["type"]]))
    if len(regions) > _MOST_SLOTS:
        raise ValueError(f"{len(regions)} memslots")
    slots: list[Memslot] = []
    free = 0
    for first, end, kind, readonly in sorted(regions):
        if not free <= first < end <= _IPA_END or (first | end) % _SMALLEST_PAGE_BYTES:
            raise ValueError(f"{first:#x} to {end:#x}")
        slots.append(Memslot(len(slots), first, end - first, readonly, kind))
        free = end
    return tuple(slots)


def parse_regions(text: str) -> list[Region]:
    """The named regions in the output of `info mtree -f`, each once, in order of address."""
    found: set[tuple[int, int, str, int]] = set()
    for line in text.splitlines():
        if match := _NAMED.fullmatch(line.rstrip()):
            first, end = int(match["first"], 16), int(match["last"], 16) + 1
            if first < end <= _IPA_END and len(found) < _MOST_SLOTS:
                name, offset = match["name"][:NAME_LENGTH], int(match["offset"] or "0", 16)
                found.add((first, end - first, name, offset))
    return [Region(name, offset, ipa, size) for ipa, size, name, offset in sorted(found)]
