"""Find instructions that the process already has; write none.

Writing code into a live process is how other tools kill it: its text is shared by threads
that keep running. Adding executable memory is no better in a hardened process.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from mtetool import procfs
from mtetool.attach import memory
from mtetool.errors import AttachRefusedError

_SVC_RET = bytes.fromhex("010000d4 c0035fd6")  # svc #0; ret
_SIGRETURN = bytes.fromhex("681180d2 010000d4")  # mov x8, #139; svc #0
# The end of a C library's thread: mov x8, #93 (exit), at most one move into x0, svc #0.
_EXITS = tuple(
    bytes.fromhex(code)
    for code in (
        "a80b80d2 010000d4",
        "a80b80d2 000080d2 010000d4",
        "a80b80d2 00008052 010000d4",
        "000080d2 a80b80d2 010000d4",
        "00008052 a80b80d2 010000d4",
    )
)


# Real sizes: at most 16 KiB for a vDSO, and 1.5 MiB for the C library's text.
_VDSO_BYTES = 1 << 20
_LIBRARY_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Gadgets:
    """Addresses in the process: `svc #0; ret`, rt_sigreturn, and exit where there is one."""

    svc_ret: int
    sigreturn: int
    exit: int | None


def find_aligned(code: bytes, pattern: bytes) -> int | None:
    """The offset of `pattern` at a multiple of 4 in `code`, or None."""
    at = code.find(pattern)
    while at >= 0 and at % 4:
        at = code.find(pattern, at + 1)
    return at if at >= 0 else None


def find(pid: int) -> Gadgets:
    """Find the gadgets; the process must be stopped, so that its mappings stay as they are.

    Raises AttachRefusedError where the vDSO lacks one of the two that are needed, or is not
    executable.
    """
    maps = procfs.mappings(pid)
    vdso = next((m for m in maps if m.name == "[vdso]" and "x" in m.flags), None)
    code = _code(pid, vdso, _VDSO_BYTES) if vdso else b""
    svc_ret = find_aligned(code, _SVC_RET)
    sigreturn = find_aligned(code, _SIGRETURN)
    if vdso is None or svc_ret is None or sigreturn is None:
        raise AttachRefusedError(
            f"process {pid} has no vDSO with the instructions that mtetool needs",
            hint="check whether the kernel has a vDSO, or the process unmapped or protected it",
        )
    return Gadgets(vdso.start + svc_ret, vdso.start + sigreturn, _find_exit(pid, maps))


def _find_exit(pid: int, maps: list[procfs.Mapping]) -> int | None:
    # The C library ends its threads this way; only file-backed text is searched. A mapping of
    # that name need not be one: a process can map a file of any size, any number of times.
    left = _LIBRARY_BYTES
    for mapping in maps:
        name = mapping.name.rpartition("/")[2]
        if not mapping.flags.startswith("r-x") or not name.startswith(("libc.", "libc-", "ld-")):
            continue
        code = _code(pid, mapping, left)
        left -= len(code)
        for pattern in _EXITS:
            if (at := find_aligned(code, pattern)) is not None:
                return mapping.start + at
    return None


def _code(pid: int, mapping: procfs.Mapping, limit_bytes: int) -> bytes:
    """The mapping's bytes; none where they exceed the limit or lie past a file's end."""
    size = mapping.end - mapping.start
    try:
        return memory.read(pid, mapping.start, size) if size <= limit_bytes else b""
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return b""
