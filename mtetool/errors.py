"""Every error of mtetool: a class, a stable id, an exit status, a message.

The id and the status are part of the interface (scripts rely on them). The
message says what was asked and what happened; `hint` says what to try next.
Only `mtetool.cli` turns these into text; everything below raises them.
"""

from __future__ import annotations

import errno as errno_module
import signal
from typing import ClassVar

STATUS_OK = 0
STATUS_NO = 1
STATUS_USAGE = 2
STATUS_PARTIAL = 3
STATUS_GUEST = 4
STATUS_SNAPSHOT = 5
STATUS_HOST = 6


DETAIL_KEYS = (
    "path",
    "input",
    "kept",
    "result_status",
    "pid",
    "vcpu",
    "ipa",
    "size_bytes",
    "errno",
    "reason",
    "tracer",
    "peer",
    "fds",
    "page_size_bytes",
    "slot",
    "would_allocate_bytes",
    "base_id",
    "offset",
    "version",
    "saved_bytes",
    "saved_up_to",
    "written_bytes",
    "tried_pages",
    "untried_pages",
    "restored_bytes",
    "restored_up_to",
    "not_restored",
)
"""The keys that `details` of an error can have; mtetool(1) explains them."""


def errno_name(number: int) -> str:
    """Return the name of an errno, such as `EFAULT` for 14, or the number if it has none."""
    return errno_module.errorcode.get(number, str(number))


class MtetoolError(Exception):
    """The base of all errors that mtetool reports on purpose.

    `details` holds what a program may want besides the text, under some of DETAIL_KEYS. The
    JSON form of the error has all of these keys, with null for the others.
    """

    id: ClassVar[str] = "error"
    status: ClassVar[int] = STATUS_HOST

    def __init__(self, message: str, *, hint: str | None = None, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details
        self.exit_status = self.status

    def lines(self) -> list[str]:
        """The error in its text form; not `printable` yet."""
        hint = [f"  try: {self.hint}"] if self.hint else []
        return [f"mtetool: error: {self.message}", *hint]

    def document(self) -> dict[str, object]:
        """The error in its JSON form, which always has the same keys."""
        fixed = {
            "schema": "mtetool.error/1",
            "error": self.id,
            "message": self.message,
            "hint": self.hint,
            "status": self.exit_status,
        }
        return {**fixed, **dict.fromkeys(DETAIL_KEYS), **self.details, **fixed}


# --- a signal -------------------------------------------------------------------------------


class InterruptedWorkError(MtetoolError):
    """A signal ended work that was half done; the status is 128 plus the signal's number."""

    id = "interrupted"
    status = 128 + signal.SIGINT

    def __init__(self, message: str, number: int, *, hint: str, **details: object) -> None:
        name = signal.Signals(number).name
        super().__init__(f"interrupted by {name}: {message}", hint=hint, **details)
        self.exit_status = 128 + number


class SignalError(BaseException):
    """A signal asks this process to end; raised so that `with` blocks are unwound first.

    Code that leaves something half done says so in `word`.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.word: InterruptedWorkError | None = None


# --- status 2: the request is wrong -----------------------------------------------------


class UsageError(MtetoolError):
    """The request is wrong; nothing was looked at or touched."""

    id = "usage"
    status = STATUS_USAGE


class BaseNeededError(UsageError):
    """A delta was given without its base."""

    id = "base-needed"


class MisalignedError(UsageError):
    """An address or a size is not a multiple of the page size."""

    id = "misaligned"


class RangeError(UsageError):
    """A range that is empty, overflows, or lies outside every memslot."""

    id = "out-of-range"


class SourceError(UsageError):
    """A source of an unknown kind, or of a kind that the command cannot use."""

    id = "bad-source"


class NoSuchFileError(UsageError):
    """A file that was named does not exist."""

    id = "no-such-file"


class FileExistsAlreadyError(UsageError):
    """The output exists and --force was not given."""

    id = "file-exists"


class OutputIsInputError(UsageError):
    """The output is one of the files that the command reads, by this or another name."""

    id = "output-is-input"


class BadNameError(UsageError):
    """A name that no file can have: empty, too long, a loop of symbolic links."""

    id = "bad-name"


# --- status 3: only a part -----------------------------------------------------------------


class PartialError(MtetoolError):
    """Some tags cannot be copied, and the user wanted all or nothing."""

    id = "partial"
    status = STATUS_PARTIAL


# --- status 4: the guest, its VMM or this host refuses -----------------------------------


class GuestError(MtetoolError):
    """The request cannot be carried out on the guest, which is unchanged."""

    id = "guest"
    status = STATUS_GUEST


class NoSuchProcessError(GuestError):
    """No process has that PID, or the process has ended."""

    id = "no-such-process"


class NotAProcessError(GuestError):
    """The PID belongs to a thread, or to a kernel thread."""

    id = "not-a-process"


class NotAVmmError(GuestError):
    """The process has no KVM virtual machine."""

    id = "no-vm"


class SeveralVmsError(GuestError):
    """The process has several VMs and none was chosen."""

    id = "several-vms"


class MteOffError(GuestError):
    """MTE is not enabled for the VM (no memory of the process has PROT_MTE): there are no tags."""

    id = "mte-off"


class MteUnsupportedError(GuestError):
    """The host's KVM does not offer MTE."""

    id = "mte-unsupported"


class TooLateError(GuestError):
    """The VM has vCPUs already: the kernel enables MTE only before the first is created."""

    id = "vcpus-exist"


class PermissionRefusedError(GuestError):
    """The kernel does not let this user work on that process, or open that file."""

    id = "permission"


class BusyError(GuestError):
    """The guest's present state does not allow the request."""

    id = "busy"


class LayoutError(GuestError):
    """The snapshot's layout does not fit the guest's."""

    id = "layout"


class LayoutUnknownError(GuestError):
    """The guest's memslots are unknown: no source of them worked."""

    id = "layout-unknown"


class NoVcpuError(GuestError):
    """The VM has no such vCPU, or the vCPU's registers cannot be read."""

    id = "no-vcpu"


class NotMappedError(GuestError):
    """The guest does not map a virtual address."""

    id = "not-mapped"


class AmbiguousAddressError(GuestError):
    """Several vCPUs map a virtual address, each to other memory, and none was chosen."""

    id = "ambiguous-address"


class PageTableError(GuestError):
    """The guest's page tables cannot be read, or its registers make no sense."""

    id = "page-tables"


class WouldAllocateError(GuestError):
    """Reading the guest's tags would allocate memory that it does not have yet."""

    id = "would-allocate"


class ForeignMonitorError(GuestError):
    """The monitor given with --qmp is not proven to be this VM's."""

    id = "foreign-monitor"


class NoSuchDomainError(GuestError):
    """libvirt has no domain of that name or UUID."""

    id = "no-such-domain"


class DomainOffError(GuestError):
    """The domain is shut off: it has no process, and no tags."""

    id = "domain-off"


class DomainProcessError(GuestError):
    """It is not proven which process runs the domain; nothing was touched."""

    id = "domain-process"


class LibvirtUnavailableError(GuestError):
    """libvirt cannot be asked: not installed, not running, or its answers make no sense."""

    id = "libvirt-unavailable"


class WrongHostError(GuestError):
    """The host's architecture has no MTE (not arm64)."""

    id = "not-arm64"


class AttachRefusedError(GuestError):
    """No thread of the process can be borrowed safely; nothing was touched."""

    id = "attach-refused"


class GuestLostError(GuestError):
    """The VMM or its VM ended while mtetool worked on it."""

    id = "guest-lost"


class StreamUnsupportedError(GuestError):
    """The migration stream uses a feature of QEMU that mtetool cannot follow."""

    id = "stream-unsupported"


class StreamDamagedError(GuestError):
    """The migration stream is not as QEMU writes it; `offset` is where."""

    id = "stream-damaged"


class EmulatorFileError(GuestError):
    """The file is not that of an emulated guest, or it is damaged."""

    id = "bad-emulator"


class RelayPeerError(GuestError):
    """The other end is not a relay, not the one that is needed, or breaks the protocol."""

    id = "relay-peer"


class RelayLostError(GuestError):
    """A connection of the relay cannot be made, or was lost."""

    id = "relay-lost"


class RelayFailedError(GuestError):
    """The relay at the other end failed; the message and `reason`, an error's id, are its own."""

    id = "relay-failed"


class TlsError(GuestError):
    """TLS is refused by either side, or its certificates cannot be used."""

    id = "tls"


# --- status 5: the snapshot --------------------------------------------------------------


class SnapshotError(MtetoolError):
    """The snapshot cannot be trusted."""

    id = "snapshot"
    status = STATUS_SNAPSHOT


class NotASnapshotError(SnapshotError):
    """The input is not a snapshot (a directory, a gzip file, nothing at all)."""

    id = "not-a-snapshot"


class TruncatedError(SnapshotError):
    """The snapshot ends before its end record."""

    id = "truncated"


class DamagedError(SnapshotError):
    """A checksum, a size or an order in the snapshot is wrong."""

    id = "damaged"


class UnknownVersionError(SnapshotError):
    """The snapshot has a version, or uses a feature, that this mtetool does not know."""

    id = "unknown-version"


class BadFormatError(SnapshotError):
    """A file of another program is not what it should be, is damaged, or is of no known form."""

    id = "bad-format"


# --- status 6: this host -----------------------------------------------------------------


class HostError(MtetoolError):
    """This host failed."""

    id = "host"
    status = STATUS_HOST


class DiskFullError(HostError):
    """No space is left for the output."""

    id = "disk-full"


class HostIoError(HostError):
    """Reading or writing a file failed."""

    id = "io"


class OutputStalledError(HostError):
    """The output takes data so slowly that the guest would have stood still for it."""

    id = "output-stalled"


class NoMemoryError(HostError):
    """This host has too little memory left for the request."""

    id = "no-memory"


_HINTS = {
    errno_module.ENOSPC: "free some space, or write elsewhere",
    errno_module.EDQUOT: "free some of the quota, or write elsewhere",
    errno_module.EFBIG: "raise the limit on the size of files: ulimit -f",
    errno_module.EROFS: "write elsewhere: the file system is mounted read-only",
    errno_module.EACCES: "check the permissions of the file and its directory: ls -ld",
    errno_module.EPERM: "check the permissions of the file and its directory: ls -ld, lsattr -d",
    errno_module.EBADF: "check the redirections: it is closed, or open for the other direction",
    errno_module.EMFILE: "raise the limit on open files: ulimit -n",
    errno_module.ENFILE: "close some files: this host has too many open",
    errno_module.ENOLCK: "use a local file system: this one's server may have no lock service",
}


def no_thread(what: str, error: RuntimeError) -> HostError:
    """The error for "can't start new thread", which comes without an errno."""
    return HostError(
        f"{what}: {error} (EAGAIN)",
        hint="raise the limit on processes (ulimit -u, the cgroup's pids.max), or use --jobs 1",
    )


def host_error(error: OSError, what: str, **details: object) -> HostError:
    """Return the error for an OSError of this host; `what` names what it happened to.

    Its class is DiskFullError, NoMemoryError or HostIoError.
    """
    number = error.errno or 0
    name = errno_name(number) if number else None
    reason = error.strerror or str(error)
    message = f"{what}: {reason} ({name})" if name else f"{what}: {reason}"
    hint = _HINTS.get(number, "look in the kernel's log: dmesg")
    kind: type[HostError] = HostIoError
    if number in (errno_module.ENOSPC, errno_module.EDQUOT, errno_module.EFBIG):
        kind = DiskFullError
    elif number == errno_module.ENOMEM:
        kind, hint = NoMemoryError, "use a smaller --range"
    return kind(message, hint=hint, **{"errno": name, **details})


def file_error(error: OSError, path: str, what: str | None = None) -> MtetoolError:
    """Return the error for an OSError from opening, creating or replacing a file.

    The rule is the same for snapshots, outputs and the files of emulated guests: NoSuchFileError,
    BadNameError, PermissionRefusedError (EACCES and EPERM), otherwise what `host_error` returns.
    Each has `path` in its details. `what` names what was tried; by default it is the path.
    """
    number = error.errno or 0
    details: dict[str, object] = {"path": path, "errno": errno_name(number)}
    message = f"{what or path}: {error.strerror or error} ({errno_name(number)})"
    if number in (errno_module.ENOENT, errno_module.ENOTDIR):
        return NoSuchFileError(message, hint="check the name: ls -ld", **details)
    if number == errno_module.ENAMETOOLONG:
        message = f"{shortened(what or path)}: {error.strerror} (ENAMETOOLONG)"
        return BadNameError(
            message, hint="use a shorter name: it can have 255 bytes, and its path 4095", **details
        )
    if number == errno_module.ELOOP:
        return BadNameError(message, hint="follow the links: namei -l", **details)
    if number in (errno_module.EACCES, errno_module.EPERM):
        return PermissionRefusedError(message, hint=_HINTS[number], **details)
    return host_error(error, what or path, path=path)


def shortened(text: str) -> str:
    """Cut a text to fit into a message."""
    return text if len(text) <= 100 else f"{text[:60]}…{text[-30:]}"
