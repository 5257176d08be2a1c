"""The backends by their prefix: a new backend is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import cast

from mtetool.errors import SourceError
from mtetool.files.kinds import FileKind, kind_of
from mtetool.guest import Guest, GuestOptions
from mtetool.words import quoted

Opener = Callable[[str, GuestOptions], Guest]

# Modules are named, not imported: `--help` and `info` load neither numpy nor ptrace.
_OPENERS = {
    "emu": ("mtetool.backends.emu.guest", "open_with_faults"),
    "kvm": ("mtetool.backends.kvm.guest", "open_kvm"),
    "libvirt": ("mtetool.backends.kvm.domain", "open_domain"),
    "proc": ("mtetool.backends.proc.guest", "open_process"),
}


def is_guest(source: str) -> bool:
    """Whether `source` names a guest (by a prefix), not a snapshot file."""
    return source.partition(":")[0] in _OPENERS and ":" in source


def guest_files(*sources: str) -> list[str]:
    """The files of those `sources` that name guests kept in files (`emu:PATH`)."""
    named = (source.partition(":") for source in sources)
    return [path for prefix, colon, path in named if prefix == "emu" and colon and path]


def open_files(source: str) -> list[str]:
    """The files that a live guest's process has open, as /proc/PID/fd/N; none if unreadable.

    A VM's disks and memory are among them: no output may replace those.
    """
    return [str(path) for pid in _pids(source) for path in _descriptors(pid)]


def _pids(source: str) -> list[int]:
    """The processes that a source names; for a domain, all that say they run it."""
    prefix, _, rest = source.partition(":")
    if prefix == "libvirt":
        from mtetool.vmm import domain_process

        return domain_process.pids_of(rest)
    try:
        return [int(rest.partition(":")[0])] if prefix in ("kvm", "proc") else []
    except ValueError:
        return []


def _descriptors(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return []


def open_guest(source: str, options: GuestOptions | None = None) -> Guest:
    """Open the guest that `source` names: `emu:PATH`, `kvm:PID[:FD]`, `libvirt:DOMAIN`, `proc:PID`.

    Raises SourceError for a name of no known kind, and what the backend raises.
    """
    prefix, colon, rest = source.partition(":")
    if not colon or prefix not in _OPENERS:
        raise _not_a_guest(source)
    module, function = _OPENERS[prefix]
    opener = cast(Opener, getattr(import_module(module), function))
    return opener(rest, options or GuestOptions())


def _not_a_guest(source: str) -> SourceError:
    """The error for a name without a prefix, with a guess at what was meant."""
    kinds = ", ".join(f"{known}:" for known in _OPENERS)
    hint = f"a guest's name starts with one of {kinds}; see mtetool(1), SOURCES"
    message = f"{quoted(source)} does not name a guest"
    if source.isdecimal():
        hint = f"write kvm:{source} for its VM, or proc:{source} for its own memory"
    elif (kind := kind_of(source)) is FileKind.EMULATED:
        message = f"{source} is the file of an emulated guest, not its name"
        hint = f"write emu:{source}"
    elif kind is FileKind.SNAPSHOT:
        message = f"{source} is a snapshot file, not a guest"
        hint = f"describe it: mtetool info {source}; restore it: mtetool restore {source} GUEST"
    return SourceError(message, hint=hint)
