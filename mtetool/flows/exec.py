"""Starting a VMM whose VM has MTE: all checks that are possible before, then the VMM."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from mtetool.attach import companion
from mtetool.backends.kvm.starting import Wish, attach
from mtetool.errors import (
    GuestError,
    MtetoolError,
    MteUnsupportedError,
    NoSuchFileError,
    PermissionRefusedError,
    UsageError,
    WrongHostError,
    errno_name,
)
from mtetool.vmm.host import HostFacts, host_facts
from mtetool.words import counted, quoted

# A command line can have thousands of options, and configuration files of any length.
_MOST_WARNINGS = 4
_QUOTED_MAX = 80
_MOST_CONFIGS = 4
_CONFIG_BYTES = 1 << 18


def exec_vmm(command: list[str], wish: Wish) -> NoReturn:
    """Become the program `command`, watched by a companion that does what `wish` says.

    Raises NoSuchFileError and UsageError for a program that cannot be executed and, where MTE is
    required, a GuestError for a host that cannot provide it (otherwise that error is printed on
    standard error, and the program is started all the same).
    """
    environment = companion.initial_environment()
    path = find_program(command[0], environment)
    try:
        facts = host_facts()
        check_host(facts)
        check_file(path, facts)
        _report(wish, *limits_of(command))
        _start_companion(wish)
    except GuestError as error:
        if wish.required:
            raise
        _report(wish, error)
    try:
        companion.become(path, command, environment)
    except OSError as error:
        raise UsageError(
            f"{command[0]} cannot be executed: {error.strerror}",
            hint="run it without mtetool",
            errno=errno_name(error.errno or 0),
        ) from error


def _start_companion(wish: Wish) -> None:
    try:
        companion.accompany(lambda pid: attach(pid, wish))
    except OSError as error:
        # Loaded only here: a start that succeeds does not need it.
        from mtetool.permission import refusal

        raise refusal(os.getpid(), error) from error


def _report(wish: Wish, *errors: MtetoolError) -> None:
    with suppress(OSError, AttributeError):
        sys.stderr.write("".join(map(wish.text, errors)))
        sys.stderr.flush()


def limits_of(command: Sequence[str]) -> list[MtetoolError]:
    """Return what MTE may break of a QEMU's command line: a few warnings; the rest is counted."""
    # Loaded only here: other VMMs do not need it.
    from mtetool.vmm import mte_limits

    if not mte_limits.qemu(command):
        return []
    from mtetool.vmm.taggable import ThisHost

    found = mte_limits.limits(command, _Configs().read, ThisHost())
    texts = [f"{quoted(each.what, _QUOTED_MAX)}: {each.why}" for each in found[:_MOST_WARNINGS]]
    if more := found[_MOST_WARNINGS:]:
        texts[-1] += f"; {counted(len(more), 'other option')} may end it too"
    hint = "find out what MTE does not go with: man mtetool-exec"
    return [MteUnsupportedError(text, hint=hint if text is texts[-1] else None) for text in texts]


class _Configs:
    """Reads `-readconfig` files, as QEMU will: this process becomes QEMU."""

    def __init__(self) -> None:
        self._left = _MOST_CONFIGS

    def read(self, path: str) -> str:
        self._left -= 1
        if self._left < 0:
            return ""
        try:
            file = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (OSError, ValueError):
            return ""
        # Loaded only here, as above.
        from mtetool.vmm import unix_sockets

        try:
            return os.fsdecode(unix_sockets.read_regular(file, _CONFIG_BYTES))
        except OSError:
            return ""
        finally:
            os.close(file)


def find_program(name: str, environment: dict[bytes, bytes]) -> str:
    """Find the program's path as a shell does. Raises NoSuchFileError, UsageError."""
    search = os.fsdecode(environment[b"PATH"]) if b"PATH" in environment else os.defpath
    if found := shutil.which(name, path=search):
        return found
    if "/" in name and Path(name).exists():
        raise UsageError(f"{name} is not an executable file", hint="make it executable: chmod +x")
    raise NoSuchFileError(
        f"there is no program {name}" + ("" if "/" in name else " in PATH"),
        hint="put the VMM's command line after --: mtetool exec -- qemu-system-aarch64 ...",
    )


def check_host(facts: HostFacts) -> None:
    """Check that this host can give a VM MTE, as far as that is known.

    Raises WrongHostError, PermissionRefusedError, MteUnsupportedError.
    """
    if facts.machine != "aarch64":
        raise WrongHostError(
            f"MTE is a feature of arm64 hosts; this one is {facts.machine}",
            hint="run it on an arm64 host",
        )
    if facts.kvm_errno in (errno.EACCES, errno.EPERM):
        raise PermissionRefusedError(
            f"/dev/kvm cannot be opened: {errno_name(facts.kvm_errno)}",
            hint="join the group that owns it (often kvm), or run as root",
            errno=errno_name(facts.kvm_errno),
        )
    if facts.kvm_errno:
        raise MteUnsupportedError(
            f"/dev/kvm cannot be opened: {errno_name(facts.kvm_errno)}",
            hint="look at what this host can do: mtetool probe",
            errno=errno_name(facts.kvm_errno),
        )
    if facts.mte is False:
        raise MteUnsupportedError(
            "this host's KVM does not offer MTE", hint="see why: mtetool probe"
        )


def check_file(path: str, facts: HostFacts) -> None:
    """Check that tracing does not take away the privileges that the program's file gives.

    The kernel ignores them when the tracer lacks CAP_SYS_PTRACE (fs/exec.c, bprm_creds). Raises
    PermissionRefusedError.
    """
    if facts.cap_sys_ptrace:
        return
    try:
        special = bool(os.stat(path).st_mode & (stat.S_ISUID | stat.S_ISGID))  # noqa: PTH116
        special = special or bool(os.getxattr(path, "security.capability"))
    except OSError:
        special = False
    if special:
        raise PermissionRefusedError(
            f"{path} gets privileges from its file (setuid or capabilities), which the kernel"
            " withholds while an unprivileged process traces it",
            hint="run mtetool as root, or start the VMM without the privileged wrapper",
        )
