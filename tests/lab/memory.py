"""The memory of a guest in a lab machine: which of its pages exist.

The VMM's other memory comes and goes by itself, so only the guest's pages count: a save must not
allocate any of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from tests.lab.existing import Extents
from tests.lab.guests import Qemu
from tests.lab.machine import Machine


@dataclass(frozen=True)
class Existing:
    """What exists, in extents: (start, end) from the beginning of the memory, or of its file."""

    own: Extents
    in_file: Extents
    file_blocks: int

    @property
    def own_bytes(self) -> int:
        """Bytes that only the process has."""
        return sum(end - start for start, end in self.own)

    @property
    def file_bytes(self) -> int:
        """Bytes of the file that have data."""
        return sum(end - start for start, end in self.in_file)


@dataclass(frozen=True)
class GuestMemory:
    """The main memory of a QEMU; its monitor is queried once, for the address."""

    lab: Machine
    pid: int
    address: int
    size_bytes: int

    @classmethod
    def of(cls, guest: Qemu, ipa: int, size_bytes: int) -> GuestMemory:
        """Ask QEMU itself, not mtetool."""
        ask = f'{{"command-line": "gpa2hva {ipa:#x}"}}'
        said = guest.qmp("human-monitor-command", ask).decode()
        address = int(said.rpartition(" is ")[2].split("\\")[0].strip('"} \r\n'), 16)
        return cls(guest.lab, guest.pid, address, size_bytes)

    def existing(self) -> Existing:
        """Return what exists of it now."""
        words = [str(self.pid), str(self.address), str(self.size_bytes)]
        command = ["python3", "-m", "tests.lab.existing", *words]
        result = self.lab.run(command, env={"PYTHONPATH": "/opt/mtetool"}, check=True)
        own, in_file, file_blocks = json.loads(result.stdout)
        return Existing(
            [(start, end) for start, end in own],
            [(start, end) for start, end in in_file],
            file_blocks,
        )
