"""An emulated KVM, as far as memory tags go: VMs, memslots, vCPUs and the copying of tags.

It answers each call as the kernel does, bad ones included: `tests/differential` makes the same
calls of both. What a kernel does unlike others is named in `behaviours`. Nothing here is ever
run: a vCPU is only a thing that is there. `examples/emulated-kernel.py` shows its use.
"""

from mtetool.emulator.behaviours import Behaviour, Host
from mtetool.emulator.copying import CopyRequest
from mtetool.emulator.machine import EmulatedKvm, EmulatedVm
from mtetool.emulator.memory import AddressSpace, MemoryFile

__all__ = [
    "AddressSpace",
    "Behaviour",
    "CopyRequest",
    "EmulatedKvm",
    "EmulatedVm",
    "Host",
    "MemoryFile",
]
