"""The VM behind one file descriptor of a VMM: what KVM answers to calls made in that process.

KVM answers only to the process that created the VM (EIO otherwise), so every call is made there, by
a helper thread (`mtetool.attach.session`).
"""

from __future__ import annotations

import errno
from functools import cached_property
from typing import TYPE_CHECKING

from mtetool import uapi
from mtetool.attach.session import Session, Target
from mtetool.backends.kvm.transfer import BUFFER_BYTES, Transfer
from mtetool.errors import (
    GuestLostError,
    MteOffError,
    MteUnsupportedError,
    TooLateError,
    errno_name,
)
from mtetool.vmm import proc

if TYPE_CHECKING:
    from mtetool.backends.kvm.transfer import Copy


class Vm:
    """A VM of a VMM. mtetool attaches only at the first call that needs it."""

    def __init__(self, process: proc.VmmProcess, fd: int) -> None:
        self.process = process
        self.fd = fd
        self._requests = [uapi.KVM_ARM_MTE_COPY_TAGS]

    @cached_property
    def session(self) -> Session:
        """The helper thread in the VMM. Raises GuestError, HostError."""
        process, fd = self.process, self.fd
        target = Target(
            pid=process.pid,
            ioctls=tuple((fd, request) for request in self._requests),
            candidates=lambda: proc.threads_to_borrow(process.pid),
            # Between the look-up and the attach the PID may have changed hands.
            check=lambda: proc.check_same(process, fd),
        )
        return Session(target, buffer_bytes=BUFFER_BYTES)

    @cached_property
    def transfer(self) -> Transfer:
        """Copies of its tags. Raises like `session`."""
        return Transfer(self.session, self.fd)

    @cached_property
    def has_mte(self) -> bool:
        """Whether MTE is on. Raises GuestLostError if it does not answer like a VM."""
        # A copy of nothing goes through every check, including that MTE is on.
        result = self.transfer.nothing()
        if result not in (0, -errno.EINVAL):
            raise GuestLostError(
                f"fd {self.fd} of process {self.process.pid} does not answer like a VM:"
                f" {errno_name(-result)}"
            )
        return result == 0

    @property
    def borrowed_seconds(self) -> float:
        """How long a thread of the VMM itself was borrowed."""
        return self.session.borrowed_seconds if self.is_attached else 0.0

    def need_mte(self) -> None:
        """Raise MteOffError for a VM that has no tags."""
        if not self.has_mte:
            raise MteOffError(
                f"MTE is off for the VM of process {self.process.pid}: it has no tags",
                hint="enable MTE before the first vCPU: mtetool enable, or QEMU's -M virt,mte=on",
                pid=self.process.pid,
            )

    def enable_mte(self) -> bool:
        """See `Guest.enable_mte`: KVM_ENABLE_CAP in the VMM."""
        self._requests.append(uapi.KVM_ENABLE_CAP)
        if self.has_mte:
            return False
        request = uapi.enable_cap(uapi.KVM_CAP_ARM_MTE)
        result = self.session.ioctl(self.fd, uapi.KVM_ENABLE_CAP, request)
        pid = self.process.pid
        if result < 0 and proc.find(pid).vcpus:
            raise TooLateError(
                f"the VM of process {pid} has vCPUs already: enable MTE before the first one",
                hint="start QEMU with -preconfig, run mtetool enable, then x-exit-preconfig",
                pid=pid,
                errno=errno_name(-result),
            )
        if result < 0:
            raise MteUnsupportedError(
                f"the kernel refused to enable MTE for the VM of process {pid}:"
                f" {errno_name(-result)}",
                hint="check what this host can do: mtetool probe",
                pid=pid,
                errno=errno_name(-result),
            )
        del self.has_mte  # asked again, the kernel says that it is on
        return True

    def nothing(self, flags: int) -> int:
        """Copy nothing: return 0, or raise what `answer` raises."""
        return self._answered(self.transfer.nothing(flags), 0)

    def answer(self, copy: Copy, ipa: int) -> int:
        """The bytes that a copy from `ipa` copied. Raises OSError, GuestLostError, GuestError."""
        return self._answered(self.transfer.finish(copy), ipa)

    def _answered(self, result: int, ipa: int) -> int:
        if result >= 0:
            return result
        if result == -errno.EIO:
            raise GuestLostError(f"the VM of process {self.process.pid} is dead (EIO)")
        raise OSError(-result, f"copying tags at {ipa:#x}: {errno_name(-result)}")

    @property
    def is_attached(self) -> bool:
        """Whether there is a session already."""
        return "session" in self.__dict__

    def send(self) -> None:
        """Let the kernel begin with all copies that were begun."""
        if "transfer" in self.__dict__:
            self.transfer.send()

    def drain(self) -> None:
        """Wait for all copies in flight."""
        if "transfer" in self.__dict__:
            self.transfer.drain()

    def close(self) -> None:
        """Detach; nothing of ours stays in the VMM. Idempotent."""
        if self.is_attached:
            self.session.close()
