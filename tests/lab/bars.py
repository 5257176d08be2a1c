"""Run in the lab: offer the memory of this machine's PCI devices to a VM with MTE and one without.

    python3 -m tests.lab.bars

It prints KVM's two answers for each register file that can be mapped, as vfio maps it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mtetool import uapi
from mtetool.vmm.scratch import scratch_vm


def _mapped() -> Iterator[mmap.mmap]:
    for path in sorted(Path("/sys/bus/pci/devices").glob("*/resource[0-5]")):
        # Ports and what is smaller than a page cannot be mapped, nor what a driver has claimed.
        with suppress(OSError, ValueError):
            fd = os.open(path, os.O_RDWR | os.O_SYNC)
            yield mmap.mmap(fd, mmap.PAGESIZE)


def _answer(memory: mmap.mmap, *, mte: bool) -> int:
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with scratch_vm() as vm:
        if mte:
            assert vm.enable(uapi.KVM_CAP_ARM_MTE) == 0
        return vm.offer_memory(0, 0, mmap.PAGESIZE, address)


def main() -> None:
    """Print both answers for each device."""
    for memory in _mapped():
        print(_answer(memory, mte=True), _answer(memory, mte=False))


if __name__ == "__main__":
    main()
