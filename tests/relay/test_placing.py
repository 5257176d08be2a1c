"""Blocks of QEMU's stream are found in the guest's memory, or the migration is refused."""

from __future__ import annotations

import pytest

from mtetool.errors import LayoutError
from mtetool.guest import Extent, Region
from mtetool.relay.placing import Placed, place
from mtetool.relay.stream import Block

MIB = 1 << 20
RAM = 0x4000_0000
_FLASH = [Block("virt.flash0", 64 * MIB), Block("virt.flash1", 64 * MIB)]
_ROMS = [Block("/rom@etc/acpi/tables", 128 << 10), Block("/rom@etc/acpi/rsdp", 4096)]


def test_by_the_monitor() -> None:
    blocks = [Block("mem1", 512 * MIB), *_FLASH, Block("/objects/mem0", 256 * MIB), *_ROMS]
    regions = [
        Region("virt.flash0", 0, 0, 64 * MIB),
        Region("mem0", 0, RAM, 256 * MIB),
        Region("mem1", 0, RAM + 256 * MIB, 384 * MIB),
        Region("mem1", 384 * MIB, 1 << 40, 128 * MIB),
    ]
    memory = [Extent(RAM, 640 * MIB), Extent(1 << 40, 128 * MIB)]
    assert place(blocks, memory, regions, "virt-11.1") == [
        Placed(3, 0, RAM, 256 * MIB),
        Placed(0, 0, RAM + 256 * MIB, 384 * MIB),
        Placed(0, 384 * MIB, 1 << 40, 128 * MIB),
    ]


@pytest.mark.parametrize("names", [["mach-virt.ram"], ["ram-node0", "ram-node1"], ["mem0"]])
def test_by_the_memory_map(names: list[str]) -> None:
    """The kernel has merged both flashes, and knows nothing of read-only memory."""
    size = 256 * MIB // len(names)
    blocks = [*(Block(name, size) for name in names), *_FLASH, *_ROMS, Block("pvtime", 4096)]
    memory = [Extent(0, 128 * MIB), Extent(0x090A_0000, 4096), Extent(RAM, 256 * MIB)]
    placed = [part for part in place(blocks, memory, [], "virt-10.0") if part.ipa >= RAM]
    assert placed == [Placed(n, 0, RAM + n * size, size) for n in range(len(names))]


def test_memory_that_is_in_no_block_is_refused() -> None:
    blocks = [Block("mach-virt.ram", 256 * MIB)]
    memory = [Extent(RAM, 256 * MIB), Extent(1 << 40, MIB)]
    regions = [Region("mach-virt.ram", 0, RAM, 256 * MIB)]
    for known in (regions, []):
        with pytest.raises(LayoutError, match="0x10000000000:0x100000"):
            place(blocks, memory, known, "virt-10.0")


def test_another_machine_needs_the_monitor() -> None:
    with pytest.raises(LayoutError, match="machine sbsa-ref"):
        place([Block("ram", MIB)], [Extent(RAM, MIB)], [], "sbsa-ref")


def test_two_blocks_for_one_place_are_refused() -> None:
    blocks = [Block("a/ram", MIB), Block("b/ram", MIB)]
    with pytest.raises(LayoutError):
        place(blocks, [Extent(RAM, MIB)], [Region("ram", 0, RAM, MIB)], "virt-10.0")
