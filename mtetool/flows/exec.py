"""Starting a VMM whose VM has MTE: all checks that are possible before, then the VMM."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from mtetool.attach import companion
from mtetool.backends.kvm.starting import Wish, attach
from mtetool.companion import client
from mtetool.errors import (
    AttachRefusedError,
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
from mtetool.vmm.mte_warnings import warnings

# A command line can have many configuration files of any length.
_MOST_CONFIGS = 4
_CONFIG_BYTES = 1 << 18


def exec_vmm(command: list[str], wish: Wish, service: str = client.SOCKET) -> NoReturn:
    """Become the program `command`, watched by a companion that does what `wish` says.

    That is the companion service at the socket `service` if we are not privileged and it agrees,
    otherwise a process that we start.

    Raises NoSuchFileError and UsageError for a program that cannot be executed and, where MTE is
    required, a GuestError for a host that cannot provide it (otherwise that error is printed on
    standard error, and the program is started all the same).
    """
    environment = companion.initial_environment()
    path = find_program(command[0], environment)
    try:
        facts = host_facts()
        check_host(facts)
        if facts.cap_sys_ptrace or not _asked(service, wish):
            check_file(path, facts)
            _report(wish, *warnings(command, Configs().read))
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


def _asked(service: str, wish: Wish) -> bool:
    """Whether the companion service attends our start."""
    if not Path(service).exists():
        return False
    words = client.request(
        wish.vm, wish.seconds, required=wish.required, every_call=wish.every_call
    )
    why = client.ask(service, words)
    if why is not None:
        _report(wish, AttachRefusedError(f"{why}, so mtetool tries without it"))
    return why is None


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


class Configs:
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
        # Loaded only here: few command lines name one.
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
