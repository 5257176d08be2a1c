"""What a QEMU process tells over its monitor (QMP): memory layout, and whether it runs.

The protocol is QEMU's docs/interop/qmp-spec.rst; the layout comes from the human monitor's
`info mtree -f`, the only place that says which regions KVM was given.
"""

from __future__ import annotations

import itertools
import json
import re
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mtetool.errors import LayoutUnknownError
from mtetool.guest import Memslot, SlotKind
from mtetool.vmm import proc

# A monitor that somebody else holds accepts the connection and says nothing.
_GREETING_SECONDS = 4.0
_TIMEOUT_SECONDS = 20.0

# "  0000000040000000-000000007fffffff (prio 0, ram): mach-virt.ram KVM", offsets as "@0000…".
_REGION = re.compile(
    r"^\s*(?P<first>[0-9a-f]{16})-(?P<last>[0-9a-f]{16}) \(prio -?\d+, (?P<type>[^)]+)\):"
    r" .*\bKVM\s*$"
)
# "Host virtual address for 0x40000000 (mach-virt.ram) is 0xffff…"
_HOST_ADDRESS = re.compile(r"Host virtual address for 0x[0-9a-f]+ .* is (?:0x)?([0-9a-f]+)\s*$")
# RAM is written through the slot; ROM (and flash in its reading mode) is a read-only slot;
# "ramd" is memory of a device that QEMU has mapped.
_KINDS: dict[str, tuple[SlotKind, bool]] = {
    "ram": ("ram", False),
    "nv-ram": ("ram", False),
    "rom": ("rom", True),
    "romd": ("rom", True),
    "nv-rom": ("rom", True),
    "ramd": ("device", False),
}


class Monitor:
    """A QMP connection; a context manager. Raises LayoutUnknownError when QEMU does not talk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_GREETING_SECONDS)
        try:
            self._socket.connect(_short_path(path))
            self._file = self._socket.makefile("rb")
            if "QMP" not in self._receive():
                raise self._silent("it is not a QMP monitor")
            self._socket.settimeout(_TIMEOUT_SECONDS)
            self.execute("qmp_capabilities")
        except OSError as error:
            self._socket.close()
            raise self._silent(error.strerror or "no answer; is another client on it?") from error
        except BaseException:
            self._socket.close()
            raise

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command; its `return`. Events that come between are passed over."""
        message: dict[str, object] = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
            while True:
                answer = self._receive()
                if "return" in answer:
                    return answer["return"]
                if "error" in answer:
                    raise self._silent(str(answer["error"].get("desc", command)))
        except OSError as error:
            raise self._silent(error.strerror or "no answer") from error

    def memslots(self) -> tuple[Memslot, ...]:
        """The regions that QEMU has given to KVM."""
        text = self.execute("human-monitor-command", **{"command-line": "info mtree -f"})
        return parse_mtree(str(text))

    def host_addresses(self) -> list[tuple[int, int, int]]:
        """(ipa, size, address) of the slots of RAM that lie in one piece in QEMU's own memory."""
        found = []
        for slot in self.memslots():
            if slot.kind != "ram":
                continue
            first = self._host_address(slot.ipa)
            last = self._host_address(slot.end - 1)
            if first is not None and last == first + slot.size_bytes - 1:
                found.append((slot.ipa, slot.size_bytes, first))
        return found

    def _host_address(self, ipa: int) -> int | None:
        line = f"gpa2hva {ipa:#x}"
        text = self.execute("human-monitor-command", **{"command-line": line})
        match = _HOST_ADDRESS.search(str(text))
        return int(match[1], 16) if match else None

    def paused(self) -> bool:
        """Whether the vCPUs stand still."""
        return not self.execute("query-status")["running"]

    def name(self) -> str | None:
        """The guest's name, `-name`."""
        name = self.execute("query-name").get("name")
        return str(name) if name else None

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _receive(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise self._silent("it hung up")
        try:
            answer = json.loads(line)
        except ValueError:
            raise self._silent("it does not speak QMP") from None
        return answer if isinstance(answer, dict) else {}

    def _silent(self, why: str) -> LayoutUnknownError:
        return LayoutUnknownError(
            f"QEMU's monitor at {self.path} does not tell: {why}",
            hint="free the monitor or give a second one with --qmp SOCKET,"
            " or name the memory by hand: --memslot IPA:SIZE",
        )


def parse_mtree(text: str) -> tuple[Memslot, ...]:
    """The memslots in the output of `info mtree -f`, in order of address.

    QEMU prints every address space; the same region comes several times, and pieces of one
    region that touch are one slot.
    """
    regions: dict[int, tuple[int, SlotKind, bool]] = {}
    for line in text.splitlines():
        if (match := _REGION.match(line)) and match["type"] in _KINDS:
            kind, readonly = _KINDS[match["type"]]
            regions[int(match["first"], 16)] = (int(match["last"], 16) + 1, kind, readonly)
    slots: list[Memslot] = []
    for ipa, (end, kind, readonly) in sorted(regions.items()):
        slots.append(Memslot(len(slots), ipa, end - ipa, readonly, kind))
    return tuple(slots)


def find_monitor(pid: int) -> Path | None:
    """The unix socket of the QMP monitor on a QEMU's command line, or None.

    A relative path is taken from QEMU's own working directory.
    """
    words = proc.command_line(pid)
    chardevs: dict[str, str] = {}
    monitors: list[str] = []
    for option, value in itertools.pairwise(words):
        option = option.removeprefix("-").removeprefix("-")
        fields = dict(field.partition("=")[::2] for field in value.split(","))
        if option == "qmp" and value.startswith("unix:"):
            monitors.append(value.removeprefix("unix:").split(",")[0])
        elif option == "chardev" and value.startswith("socket,") and "path" in fields:
            chardevs[fields.get("id", "")] = fields["path"]
        elif option == "mon" and fields.get("mode") == "control":
            reference = fields.get("chardev") or value.split(",")[0]
            monitors += [chardevs[reference]] if reference in chardevs else []
    if not monitors:
        return None
    return Path(f"/proc/{pid}/cwd") / monitors[0] if monitors[0][:1] != "/" else Path(monitors[0])


def name_of(pid: int) -> str | None:
    """The guest's name on a QEMU's command line, `-name NAME` or `-name guest=NAME`, or None."""
    for option, value in itertools.pairwise(proc.command_line(pid)):
        if option in ("-name", "--name"):
            fields = [field.partition("=") for field in value.split(",")]
            named = [after for key, equals, after in fields if key == "guest" and equals]
            bare = [key for key, equals, _ in fields[:1] if not equals]
            return next(iter(named + bare), None) or None
    return None


def _short_path(path: Path) -> str:
    # sun_path holds 108 bytes; a longer path is reached through its directory's descriptor
    # only where one is open, so say what is wrong instead of EINVAL's riddle.
    text = str(path)
    if len(text.encode()) > 107:
        raise LayoutUnknownError(
            f"the path of the monitor socket is too long for a unix socket: {text}",
            hint="give a shorter one with --qmp, for instance through a symbolic link",
        )
    return text
