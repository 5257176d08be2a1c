"""Every error of mtetool: a class, a stable id, an exit status, a message.

The id and the status are part of the interface (scripts rely on them); the
message says what was asked, what happened, and `hint` what to try next.
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
"""The keys that the `details` of errors may have, as mtetool(1) explains them."""


def errno_name(number: int) -> str:
    """The name of an errno, `EFAULT` for 14; the number itself where it has none."""
    return errno_module.errorcode.get(number, str(number))


class MtetoolError(Exception):
    """The base of all errors that mtetool reports on purpose.

    `details` holds what a program may want besides the text: some of DETAIL_KEYS, which are
    all in the JSON form of the error, null where it has none.
    """

    id: ClassVar[str] = "error"
    status: ClassVar[int] = STATUS_HOST

    def __init__(self, message: str, *, hint: str | None = None, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details
        self.exit_status = self.status


# --- a signal -------------------------------------------------------------------------------


class InterruptedWorkError(MtetoolError):
    """A signal ended work that was half done; the status is 128 and the signal's number."""

    id = "interrupted"
    status = 128 + signal.SIGINT

    def __init__(self, message: str, number: int, *, hint: str, **details: object) -> None:
        name = signal.Signals(number).name
        super().__init__(f"interrupted by {name}: {message}", hint=hint, **details)
        self.exit_status = 128 + number


class SignalError(BaseException):
    """A signal asks this process to end; raised so that `with` blocks are unwound first.

    Whoever leaves something half done by that says so in `word`.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.word: InterruptedWorkError | None = None


# --- status 2: what was asked cannot be asked -------------------------------------------


class UsageError(MtetoolError):
    """The request itself is wrong; nothing was looked at or touched."""

    id = "usage"
    status = STATUS_USAGE


class BaseNeededError(UsageError):
    """A delta without the snapshot that it is a delta to."""

    id = "base-needed"


class MisalignedError(UsageError):
    """An address or a size is not a multiple of the page size."""

    id = "misaligned"


class RangeError(UsageError):
    """A range that is empty, overflows, or lies outside every memslot."""

    id = "out-of-range"


class SourceError(UsageError):
    """A source that is of no known kind, or of a kind the command cannot take."""

    id = "bad-source"


class NoSuchFileError(UsageError):
    """A file that was named does not exist."""

    id = "no-such-file"


class FileExistsAlreadyError(UsageError):
    """The output exists and --force was not given."""

    id = "file-exists"


class OutputIsInputError(UsageError):
    """The output is, under whatever name, one of the files that the command reads."""

    id = "output-is-input"


class BadNameError(UsageError):
    """A name that no file can have: empty, too long, a loop of symbolic links."""

    id = "bad-name"


# --- status 3: some of it ------------------------------------------------------------------


class PartialError(MtetoolError):
    """Some tags cannot be copied, and the user wanted all or nothing."""

    id = "partial"
    status = STATUS_PARTIAL


# --- status 4: the guest, its VMM or this host refuse ------------------------------------


class GuestError(MtetoolError):
    """The guest cannot be worked on as asked; it is as it was."""

    id = "guest"
    status = STATUS_GUEST


class NoSuchProcessError(GuestError):
    """No process has that PID, or it went away."""

    id = "no-such-process"


class NotAProcessError(GuestError):
    """The PID is that of a thread, or of the kernel's own."""

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
    """The VM has vCPUs already: the kernel enables MTE only before the first."""

    id = "vcpus-exist"


class PermissionRefusedError(GuestError):
    """The kernel does not let this user work on that process, or open that file."""

    id = "permission"


class BusyError(GuestError):
    """The guest is in a state that excludes the request for now."""

    id = "busy"


class LayoutError(GuestError):
    """The snapshot's layout does not fit the guest's."""

    id = "layout"


class LayoutUnknownError(GuestError):
    """The guest's memslots could not be learnt."""

    id = "layout-unknown"


class WouldAllocateError(GuestError):
    """Reading the guest's tags would allocate memory that it does not have yet."""

    id = "would-allocate"


class ForeignMonitorError(GuestError):
    """The monitor given with --qmp is not proven to be that of the VM."""

    id = "foreign-monitor"


class WrongHostError(GuestError):
    """The host's architecture has no MTE (not arm64)."""

    id = "not-arm64"


class AttachRefusedError(GuestError):
    """The process cannot be borrowed from safely; nothing was touched."""

    id = "attach-refused"


class GuestLostError(GuestError):
    """The VMM or its VM ended while it was worked on."""

    id = "guest-lost"


class EmulatorFileError(GuestError):
    """The file behind an emulated guest is not one, or is damaged."""

    id = "bad-emulator"


# --- status 5: the snapshot --------------------------------------------------------------


class SnapshotError(MtetoolError):
    """The snapshot cannot be believed."""

    id = "snapshot"
    status = STATUS_SNAPSHOT


class NotASnapshotError(SnapshotError):
    """The input is something else (a directory, a gzip file, nothing at all)."""

    id = "not-a-snapshot"


class TruncatedError(SnapshotError):
    """The snapshot ends before its end record."""

    id = "truncated"


class DamagedError(SnapshotError):
    """A checksum, a size or an order in the snapshot is wrong."""

    id = "damaged"


class UnknownVersionError(SnapshotError):
    """The snapshot is of a version (or uses a feature) that this mtetool does not know."""

    id = "unknown-version"


# --- status 6: this host -----------------------------------------------------------------


class HostError(MtetoolError):
    """This host failed."""

    id = "host"
    status = STATUS_HOST


class DiskFullError(HostError):
    """No space is left where the output goes."""

    id = "disk-full"


class HostIoError(HostError):
    """Reading or writing a file failed."""

    id = "io"


class OutputStalledError(HostError):
    """The output takes so little that a guest would have stood still for it."""

    id = "output-stalled"


class NoMemoryError(HostError):
    """This host has no memory left for what was asked."""

    id = "no-memory"


_HINTS = {
    errno_module.ENOSPC: "make room, or write elsewhere",
    errno_module.EDQUOT: "make room within the quota, or write elsewhere",
    errno_module.EFBIG: "a limit on the size of files is in force: ulimit -f",
    errno_module.EROFS: "the file system is mounted read-only: write elsewhere",
    errno_module.EACCES: "check the permissions of the file and its directory: ls -ld",
    errno_module.EPERM: "check the permissions of the file and its directory: ls -ld, lsattr -d",
    errno_module.EBADF: "it is closed, or open the other way round: check the redirections",
    errno_module.EMFILE: "a higher limit on open files: ulimit -n",
    errno_module.ENFILE: "this host has too many files open",
    errno_module.ENOLCK: "the server of the file system may have no lock service: a local one has",
}


def no_thread(what: str, error: RuntimeError) -> HostError:
    """The error for "can't start new thread", which comes without an errno."""
    return HostError(
        f"{what}: {error} (EAGAIN)",
        hint="a higher limit on processes (ulimit -u, pids.max of the cgroup), or --jobs 1",
    )


def host_error(error: OSError, what: str, **details: object) -> HostError:
    """What an OSError of this host means; `what` names what was worked on.

    The class is DiskFullError where there is no room, NoMemoryError, or HostIoError.
    """
    number = error.errno or 0
    name = errno_name(number) if number else None
    reason = error.strerror or str(error)
    message = f"{what}: {reason} ({name})" if name else f"{what}: {reason}"
    hint = _HINTS.get(number, "the kernel's log may say more: dmesg")
    kind: type[HostError] = HostIoError
    if number in (errno_module.ENOSPC, errno_module.EDQUOT, errno_module.EFBIG):
        kind = DiskFullError
    elif number == errno_module.ENOMEM:
        kind, hint = NoMemoryError, "a smaller --range"
    return kind(message, hint=hint, **{"errno": name, **details})


def file_error(error: OSError, path: str, what: str | None = None) -> MtetoolError:
    """What an OSError means that the opening, making or replacing of a file met.

    One rule for snapshots, outputs and the files of emulated guests: NoSuchFileError,
    BadNameError, PermissionRefusedError (EACCES and EPERM), else what `host_error` says. `path` is
    in the details of each. `what` names what was tried; the path itself, if left out.
    """
    number = error.errno or 0
    details: dict[str, object] = {"path": path, "errno": errno_name(number)}
    message = f"{what or path}: {error.strerror or error} ({errno_name(number)})"
    if number in (errno_module.ENOENT, errno_module.ENOTDIR):
        return NoSuchFileError(message, hint="check the name: ls -ld", **details)
    if number == errno_module.ENAMETOOLONG:
        message = f"{shortened(what or path)}: {error.strerror} (ENAMETOOLONG)"
        return BadNameError(message, hint="a name has at most 255 bytes, a path 4095", **details)
    if number == errno_module.ELOOP:
        return BadNameError(message, hint="follow the links: namei -l", **details)
    if number in (errno_module.EACCES, errno_module.EPERM):
        return PermissionRefusedError(message, hint=_HINTS[number], **details)
    return host_error(error, what or path, path=path)


def shortened(text: str) -> str:
    """A text cut to what fits into a message."""
    return text if len(text) <= 100 else f"{text[:60]}…{text[-30:]}"
