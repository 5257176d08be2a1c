"""An emulated KVM, as far as memory tags go: VMs, memslots, vCPUs and the copying of tags.

It answers each call as the kernel does, bad ones included: `tests/differential` makes the same
calls to both. `behaviours` names what some kernels do differently from others. Nothing here is ever
run: a vCPU merely exists. `examples/emulated-kernel.py` shows its use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtetool.emulator.behaviours import Behaviour, Host
    from mtetool.emulator.ioctl import CopyRequest
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

# A guest in a file needs little of this, and is often opened only for a moment.
_HOMES = {
    "AddressSpace": "memory",
    "Behaviour": "behaviours",
    "CopyRequest": "ioctl",
    "EmulatedKvm": "machine",
    "EmulatedVm": "machine",
    "Host": "behaviours",
    "MemoryFile": "memory",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
