"""An emulated KVM, as far as memory tags go: VMs, memslots, vCPUs and the copying of tags.

It answers each call as the kernel does, bad ones included: `tests/differential` runs the same
calls on both. What a kernel does differently from another is named in `behaviours`. Nothing
here is ever run: a vCPU is only a thing that is there.
"""

from mtetool.emulator.behaviours import Behaviour, Host
from mtetool.emulator.machine import EmulatedKvm, EmulatedVm
from mtetool.emulator.memory import AddressSpace, MemoryFile

__all__ = ["AddressSpace", "Behaviour", "EmulatedKvm", "EmulatedVm", "Host", "MemoryFile"]
