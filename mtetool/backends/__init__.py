"""The backends by the prefix that names them: a new backend is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import cast

from mtetool.backends.base import Guest
from mtetool.errors import SourceError
from mtetool.guest import GuestInfo, Memslot
from mtetool.words import quoted

__all__ = ["Guest", "GuestInfo", "GuestOptions", "Memslot", "is_guest", "open_guest"]


@dataclass(frozen=True, slots=True)
class GuestOptions:
    """What the user told about a guest besides its name.

    `memslots` replaces whatever could be learnt; `qmp` is the VMM's monitor socket.
    """

    memslots: tuple[Memslot, ...] = ()
    qmp: Path | None = None


Opener = Callable[[str, GuestOptions], Guest]

# Modules are named, not imported: `--help` and `info` load neither numpy nor ptrace.
_OPENERS = {
    "emu": ("mtetool.backends.rehearsal", "open_with_faults"),
    "kvm": ("mtetool.backends.kvm", "open_kvm"),
    "proc": ("mtetool.backends.process", "open_process"),
}


def is_guest(source: str) -> bool:
    """Whether `source` names a guest (by a prefix), not a snapshot file."""
    return source.partition(":")[0] in _OPENERS and ":" in source


def open_guest(source: str, options: GuestOptions | None = None) -> Guest:
    """Open the guest that `source` names, `emu:PATH`, `kvm:PID[:FD]` or `proc:PID`.

    Raises SourceError for a name of no known kind, and what the backend raises.
    """
    prefix, colon, rest = source.partition(":")
    if not colon or prefix not in _OPENERS:
        kinds = ", ".join(f"{known}:" for known in _OPENERS)
        raise SourceError(
            f"{quoted(source)} does not name a guest",
            hint=f"a guest's name starts with one of {kinds}; see mtetool(1), SOURCES",
        )
    module, function = _OPENERS[prefix]
    opener = cast(Opener, getattr(import_module(module), function))
    return opener(rest, options or GuestOptions())
