"""Where the RAM blocks of QEMU's stream are in the guest's memory.

The stream names memory by block and offset, KVM by guest physical address. QEMU's monitor knows
both; without it, the memory map of QEMU's `virt` machine does, whose addresses have never changed
(hw/arm/virt.c). Either way the memslots decide: memory that takes tags and is in no block is
refused, because nobody would move its tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mtetool.errors import LayoutError
from mtetool.guest import Extent, Region
from mtetool.relay.stream import Block
from mtetool.sources.layout import common, hex_range, without

_VIRT_RAM, _VIRT_RAM_NAME = 0x4000_0000, "mach-virt.ram"
# Memory of the machine's that is not RAM for the guest's programs. Flash and ROMs are read-only.
_VIRT_OTHERS = {"virt.flash0": 0, "virt.flash1": 64 << 20, "pvtime": 0x090A_0000}
_HINT = "let mtetool ask QEMU's monitor: --qmp SOCKET, without --no-monitor"


@dataclass(frozen=True, slots=True)
class Placed:
    """A part of a RAM block, and where it is in the guest's memory."""

    block: int
    offset: int
    ipa: int
    size_bytes: int

    @property
    def extent(self) -> Extent:
        """The guest's memory."""
        return Extent(self.ipa, self.size_bytes)


def place(
    blocks: Sequence[Block],
    memory: Sequence[Extent],
    regions: Sequence[Region],
    machine: str,
) -> list[Placed]:
    """Where the blocks are, as far as they are in `memory`, which takes tags; in order of address.

    `regions` come from QEMU's monitor, and are empty without one. Raises LayoutError if memory that
    takes tags is in no block.
    """
    found = _by_regions(blocks, regions) if regions else _by_map(blocks, machine)
    placed = [part for whole in found for part in _cut(whole, memory)]
    placed.sort(key=lambda part: part.ipa)
    _check(blocks, placed, memory, known=bool(regions))
    return placed


def _by_regions(blocks: Sequence[Block], regions: Sequence[Region]) -> list[Placed]:
    placed = []
    for number, block in enumerate(blocks):
        for region in regions:
            # A block's name may begin with the path of the device that it belongs to.
            if block.name != region.name and not block.name.endswith(f"/{region.name}"):
                continue
            if region.offset + region.size_bytes <= block.size_bytes:
                placed.append(Placed(number, region.offset, region.ipa, region.size_bytes))
    return placed


def _by_map(blocks: Sequence[Block], machine: str) -> list[Placed]:
    if not machine.startswith("virt"):
        raise LayoutError(
            f"nobody says where the memory of QEMU's machine {machine} is", hint=_HINT
        )
    at, placed = _VIRT_RAM, []
    for number, block in enumerate(blocks):
        if block.name in _VIRT_OTHERS:
            placed.append(Placed(number, 0, _VIRT_OTHERS[block.name], block.size_bytes))
        elif block.name == _VIRT_RAM_NAME or _is_backend(block.name):
            # NUMA nodes follow each other in their order, which is the stream's.
            placed.append(Placed(number, 0, at, block.size_bytes))
            at += block.size_bytes
    return placed


def _is_backend(name: str) -> bool:
    """Whether a block's name can be that of a memory backend, and not of a device or a ROM."""
    return not name.startswith("/rom@") and "/" not in name.removeprefix("/objects/")


def _cut(whole: Placed, wanted: Sequence[Extent]) -> list[Placed]:
    return [
        Placed(whole.block, whole.offset + part.ipa - whole.ipa, part.ipa, part.size_bytes)
        for part in common([whole.extent], wanted)
    ]


def _check(
    blocks: Sequence[Block], placed: Sequence[Placed], wanted: Sequence[Extent], *, known: bool
) -> None:
    doubled = next((b for a, b in pairwise(placed) if b.ipa < a.extent.end), None)
    left = without(wanted, [part.extent for part in placed])
    # Without the monitor, read-only memory may be unknown: flash is skipped by its place.
    flash = [Extent(0, 128 << 20)] if not known else []
    left = without(left, flash)
    if doubled is None and not left:
        return
    at = left[0] if left else doubled.extent if doubled else Extent(0, 0)
    names = ", ".join(f"{block.name} ({block.size_bytes:#x})" for block in blocks[:8])
    raise LayoutError(
        f"no one block of QEMU's stream is known to be the memory at {hex_range(at)}; its blocks:"
        f" {names}",
        hint=_HINT,
        ipa=at.ipa,
    )
