"""What the libvirt of this host knows of its domains, and QEMU's monitor through it.

The module `libvirt` (Debian's python3-libvirt) is optional, and imported when it is needed. Its
calls wait for a daemon, which may be stopped or busy with another job of the domain, and its
answers are taken on trust no more than a monitor's: time and size are bounded, kinds are checked.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

from mtetool.closing import Closing
from mtetool.errors import (
    DomainOffError,
    GuestError,
    LayoutUnknownError,
    LibvirtUnavailableError,
    NoSuchDomainError,
    PermissionRefusedError,
    UsageError,
    shortened,
)
from mtetool.vmm.qmp import (
    CONVERSATION_SECONDS,
    MESSAGE_BYTES,
    Commands,
    Patience,
    description,
    request,
)
from mtetool.vmm.worker import Worker

_Result = TypeVar("_Result")

# include/libvirt/virterror.h: virErrorNumber, which never changes.
_SYSTEM_ERROR, _NO_DOMAIN, _OPERATION_INVALID = 38, 42, 55
_REFUSALS = frozenset({29, 45, 79, 80, 88})  # operation denied; authentication; access denied
# include/libvirt/libvirt-domain.h: virDomainState.
_PAUSED = {
    1: False,  # running
    2: False,  # blocked: its vCPUs wait for something
    3: True,  # paused
    6: True,  # crashed, and kept as it was
    7: True,  # suspended by its own power management
}

# Another host is named before the path (qemu://host/system) or by the transport (qemu+ssh).
# qemu:///embed runs the driver in the client itself.
_LOCAL = re.compile(r"qemu(?:\+unix)?:///(system|session)(?:\?[!-~]*)?")
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
# libvirt has no limit, but the name becomes part of file names when the domain is started.
_NAME_LENGTH = 1024
_TEXT_LENGTH = 500
_WITHOUT = "do without libvirt: mtetool list --no-attach shows the PID for kvm:PID"


def checked_uri(given: str | None) -> str:
    """The URI to connect to: as given, or $LIBVIRT_DEFAULT_URI, or libvirt's default for the user.

    Raises UsageError for one that is not QEMU's driver on this host.
    """
    uri = given if given is not None else os.environ.get("LIBVIRT_DEFAULT_URI")
    if not uri and given is None:
        return "qemu:///session" if os.geteuid() else "qemu:///system"
    if uri is None or _LOCAL.fullmatch(uri) is None:
        named = "--connect" if given is not None else "LIBVIRT_DEFAULT_URI"
        raise UsageError(
            f"{named} {shortened(uri or '') or '(empty)'} is not the URI of QEMU domains of this"
            " host: a VM's tags can be copied only on its own host",
            hint="use qemu:///system or qemu:///session; for another host, run mtetool there",
        )
    return uri


def source_of(name: str, uuid: str) -> str:
    """How to name a domain to mtetool: by its UUID if its name can be mistaken or not be typed."""
    is_plain = name.isprintable() and " " not in name and not _UUID.fullmatch(name)
    return f"libvirt:{name if name and is_plain else uuid}"


class Libvirt(Closing):
    """A connection to the libvirt of this host.

    `readonly` needs no rights, and allows no monitor. `seconds` is the time for all waiting.
    Raises UsageError, LibvirtUnavailableError, PermissionRefusedError, HostError.
    """

    def __init__(
        self, uri: str | None, *, readonly: bool, seconds: float = CONVERSATION_SECONDS
    ) -> None:
        self.uri = checked_uri(uri)
        self._seconds = seconds
        modules = _module("libvirt"), None if readonly else _module("libvirt_qemu")
        self._worker = Worker("libvirt", lambda: _Native(*modules), Patience(seconds))
        try:
            driver = self._ask(lambda native: native.connect(self.uri))
            if driver != "QEMU":
                raise self._nonsense("driver")
        except BaseException:
            self.close()
            raise

    @property
    def is_session(self) -> bool:
        """Whether its domains run as the user's own."""
        return ":///session" in self.uri

    def domain(self, name: str) -> Domain:
        """The domain of a UUID or else a name.

        Raises NoSuchDomainError, LibvirtUnavailableError, PermissionRefusedError.
        """
        found = None
        if len(name) <= _NAME_LENGTH and _is_encodable(name):
            if _UUID.fullmatch(name):
                with suppress(NoSuchDomainError):
                    found = self.ask(name, lambda native: native.by_uuid(name))
            found = found or self.ask(name, lambda native: native.by_name(name))
        if found is None:
            raise _no_domain(name, self.uri)
        its_name, uuid = found
        is_right = isinstance(its_name, str) and isinstance(uuid, str) and _UUID.fullmatch(uuid)
        if not is_right:
            raise self._nonsense("name")
        return Domain(self, its_name if len(its_name) <= _NAME_LENGTH else uuid, uuid.lower())

    def ask(self, name: str, call: Callable[[_Native], Any]) -> Any:
        """Make a call that is about the domain of that name or UUID.

        Raises NoSuchDomainError, DomainOffError, LibvirtUnavailableError, PermissionRefusedError.
        """
        return self._ask(call, name)

    def _ask(self, call: Callable[[_Native], Any], name: str = "") -> Any:
        try:
            return self._worker.ask(call)
        except TimeoutError:
            raise LibvirtUnavailableError(
                f"libvirt ({self.uri}) has not answered within {self._seconds:g} seconds",
                hint=f"check its daemon, and the domain's jobs: virsh domjobinfo; or {_WITHOUT}",
            ) from None
        except _RefusedError as refusal:
            raise self._refused(refusal, name) from None
        except (TypeError, ValueError, AttributeError):
            raise self._nonsense("reply") from None

    def _refused(self, refusal: _RefusedError, name: str) -> GuestError:
        if refusal.code == _NO_DOMAIN:
            return _no_domain(name, self.uri)
        if refusal.code == _OPERATION_INVALID:
            return off(name)
        denied = refusal.code == _SYSTEM_ERROR and refusal.number in (errno.EACCES, errno.EPERM)
        if denied or refusal.code in _REFUSALS:
            return PermissionRefusedError(
                f"libvirt ({self.uri}) refuses this user: {refusal.text}",
                hint="run mtetool as root; the domains of a user are at --connect qemu:///session",
            )
        return LibvirtUnavailableError(
            f"libvirt ({self.uri}) cannot be asked: {refusal.text}",
            hint=f"check its daemon: systemctl status libvirtd virtqemud; or {_WITHOUT}",
        )

    def _nonsense(self, what: str) -> LibvirtUnavailableError:
        return LibvirtUnavailableError(
            f"libvirt ({self.uri}) answers nonsense: its {what} is not what it should be",
            hint=f"check its version: virsh version; or {_WITHOUT}",
        )

    def checked(self, value: object, kind: type[_Result], what: str) -> _Result:
        """Return an answer of the right kind and size. Raises LibvirtUnavailableError."""
        if type(value) is not kind or (isinstance(value, str) and len(value) > MESSAGE_BYTES):
            raise self._nonsense(what)
        return value

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._worker.close()


class Domain:
    """A domain of libvirt, running or not. Every method raises what `Libvirt.ask` does."""

    def __init__(self, libvirt: Libvirt, name: str, uuid: str) -> None:
        self.libvirt = libvirt
        self.name = name
        self.uuid = uuid

    @property
    def source(self) -> str:
        """Its name for mtetool."""
        return source_of(self.name, self.uuid)

    def is_active(self) -> bool:
        """Whether it has a process."""
        answer = self.libvirt.ask(self.name, lambda native: native.is_active(self.uuid))
        return self.libvirt.checked(answer, int, "answer to isActive") == 1

    def paused(self) -> bool | None:
        """Whether its vCPUs are stopped; None if it is starting, ending, or in an unknown state."""
        answer = self.libvirt.ask(self.name, lambda native: native.state(self.uuid))
        return _PAUSED.get(self.libvirt.checked(answer, int, "answer to state"))

    def xml(self) -> str:
        """Its description: what it is now, if it runs."""
        answer = self.libvirt.ask(self.name, lambda native: native.xml(self.uuid))
        return self.libvirt.checked(answer, str, "XML")


class PassThrough(Commands):
    """QEMU's monitor, which libvirt holds and passes commands on to: that taints the domain."""

    def __init__(self, domain: Domain) -> None:
        super().__init__(domain.source)
        self._domain = domain

    def execute(self, command: str, **arguments: object) -> object:
        """See `Commands.execute`."""
        libvirt, domain = self._domain.libvirt, self._domain
        message = request(command, arguments)
        try:
            said = libvirt.ask(domain.name, lambda native: native.qmp(domain.uuid, message))
            answer = json.loads(libvirt.checked(said, str, "monitor's answer"))
        except GuestError as error:
            raise self.error(error.message) from error
        except (ValueError, RecursionError) as error:
            raise self.error("what libvirt passes on is not QMP") from error
        if isinstance(answer, dict) and "return" in answer:
            return answer["return"]
        failure = answer.get("error") if isinstance(answer, dict) else None
        raise self.error(description(failure, command))

    def error(self, why: str) -> LayoutUnknownError:
        """See `Commands.error`."""
        return LayoutUnknownError(
            f"QEMU's monitor of {self.where} cannot be used: {why}",
            hint="leave it out with --no-monitor, or name the memory by hand: --memslot IPA:SIZE",
        )


class _RefusedError(Exception):
    """An error of libvirt: its code, its text and, for a system error, the errno."""

    def __init__(self, code: object, text: object, number: object) -> None:
        super().__init__(text)
        self.code = code
        self.text = text[:_TEXT_LENGTH] if isinstance(text, str) else "for an unknown reason"
        self.number = number


class _Native:
    """libvirt's own objects. They live in the thread that waits for libvirt, and end there."""

    def __init__(self, libvirt: ModuleType, libvirt_qemu: ModuleType | None) -> None:
        self._libvirt: Any = libvirt
        self._qemu: Any = libvirt_qemu
        self._connection: Any = None
        self._domains: dict[object, Any] = {}

    def connect(self, uri: str) -> object:
        """Connect, and return the driver's name."""
        # Otherwise libvirt also prints each error to standard error.
        self._libvirt.registerErrorHandler(_ignore, None)
        connect = self._libvirt.open if self._qemu else self._libvirt.openReadOnly
        self._connection = self._call(connect, uri)
        return self._call(self._connection.getType)

    def by_name(self, name: str) -> tuple[object, object]:
        """The domain's name and UUID."""
        return self._found(self._call(self._connection.lookupByName, name))

    def by_uuid(self, uuid: str) -> tuple[object, object]:
        """The domain's name and UUID."""
        return self._found(self._call(self._connection.lookupByUUIDString, uuid))

    def _found(self, domain: Any) -> tuple[object, object]:
        uuid = self._call(domain.UUIDString)
        self._domains[uuid.lower()] = domain
        return self._call(domain.name), uuid

    def is_active(self, uuid: str) -> object:
        return self._call(self._domains[uuid].isActive)

    def state(self, uuid: str) -> object:
        state, _reason = self._call(self._domains[uuid].state)
        return state

    def xml(self, uuid: str) -> object:
        return self._call(self._domains[uuid].XMLDesc, 0)

    def qmp(self, uuid: str, message: str) -> object:
        """What QEMU answers to a command in QMP, an error too."""
        return self._call(self._qemu.qemuMonitorCommand, self._domains[uuid], message, 0)

    def _call(self, function: Callable[..., Any], *arguments: object) -> Any:
        try:
            return function(*arguments)
        except self._libvirt.libvirtError as error:
            refusal = _RefusedError(
                error.get_error_code(), error.get_error_message(), error.get_int1()
            )
        raise refusal


def off(name: str) -> DomainOffError:
    """The error for a domain that is shut off."""
    return DomainOffError(
        f"the domain {shortened(name)} is shut off: it has no memory, and so no tags",
        hint="start it: virsh start DOMAIN",
    )


def _no_domain(name: str, uri: str) -> NoSuchDomainError:
    return NoSuchDomainError(
        f"libvirt ({uri}) has no domain {shortened(name)}",
        hint="list the domains: virsh list --all; another libvirt: --connect URI",
    )


def _module(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise LibvirtUnavailableError(
            f"asking libvirt needs the Python module {name}, which cannot be loaded: {error}",
            hint="install it: apt install python3-libvirt, or pip install libvirt-python;"
            f" or {_WITHOUT}",
        ) from error


def _is_encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _ignore(context: object, error: object) -> None:
    """Print nothing: every error is raised, too."""
