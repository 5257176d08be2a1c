"""QEMU's own words about its memory."""

from __future__ import annotations

from mtetool.guest import Memslot
from mtetool.vmm import qemu

# What QEMU 11.1.3 printed in the lab for -M virt -m 256M, shortened.
MTREE = """\
FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-000000000000ffff (prio 0, i/o): io

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-0000000003ffffff (prio 0, romd): virt.flash0 KVM
  0000000004000000-0000000007ffffff (prio 0, romd): virt.flash1 KVM
  0000000009000000-0000000009000fff (prio 0, i/o): pl011
  00000000090a0000-00000000090a0fff (prio 0, ram): pvtime KVM
  0000000040000000-000000004fffffff (prio 0, ram): mach-virt.ram KVM
  0000000050000000-000000005fffffff (prio 0, ram): hotplugged @0000000000001000 KVM
  0000008000000000-0000008000003fff (prio 1, ramd): vfio bar 0 KVM
  0000008000010000-0000008000013fff (prio 1, ram): not given to kvm

FlatView #2
 AS "virtio-net-pci", root: bus master container
  0000000040000000-000000004fffffff (prio 0, ram): mach-virt.ram KVM
"""


def test_memslots_are_what_kvm_was_given() -> None:
    assert qemu.parse_mtree(MTREE) == (
        Memslot(0, 0, 64 << 20, True, "rom"),
        Memslot(1, 64 << 20, 64 << 20, True, "rom"),
        Memslot(2, 0x90A0000, 4096, False, "ram"),
        Memslot(3, 0x40000000, 256 << 20, False, "ram"),
        Memslot(4, 0x50000000, 256 << 20, False, "ram"),
        Memslot(5, 0x8000000000, 0x4000, False, "device"),
    )
