"""The modules `libvirt` and `libvirt_qemu`, which answer what a test wants them to."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

# Processes are found by these: tests that run beside these ones must not be found.
_OURS = f"{os.getpid():012x}"
UUID = f"abcdef11-2222-3333-4444-{_OURS}"
OTHER_UUID = f"99999999-2222-3333-4444-{_OURS}"

NO_DOMAIN, OPERATION_INVALID, SYSTEM_ERROR = 42, 55, 38


class FakeError(Exception):
    """libvirt.libvirtError."""

    def __init__(self, code: int, text: str = "it says no", number: int = 0) -> None:
        super().__init__(text)
        self._parts = code, text, number

    def get_error_code(self) -> int:
        return self._parts[0]

    def get_error_message(self) -> str:
        return self._parts[1]

    def get_int1(self) -> int:
        return self._parts[2]


class FakeDomain:
    def __init__(self, fake: Fake, name: str, uuid: str) -> None:
        self.fake = fake
        self._name = name
        self._uuid = uuid

    def name(self) -> Any:
        return self.fake.answer("name", self._name)

    def UUIDString(self) -> Any:
        return self.fake.answer("uuid", self._uuid)

    def isActive(self) -> Any:
        return self.fake.answer("active", 1)

    def state(self, flags: int = 0) -> Any:
        return self.fake.answer("state", [1, 1])

    def XMLDesc(self, flags: int = 0) -> Any:
        return self.fake.answer("xml", "<domain/>")


class FakeConnection:
    def __init__(self, fake: Fake) -> None:
        self.fake = fake

    def __del__(self) -> None:
        self.fake.freed_in.append(threading.current_thread().name)

    def getType(self) -> Any:
        return self.fake.answer("type", "QEMU")

    def lookupByName(self, name: str) -> FakeDomain:
        if len(name.encode()) > 1 << 22:  # VIR_NET_MESSAGE_STRING_MAX
            raise FakeError(39, "Unable to encode message payload")
        return self._found([each for each in self.fake.domains if each[0] == name])

    def lookupByUUIDString(self, uuid: str) -> FakeDomain:
        return self._found([each for each in self.fake.domains if each[1] == uuid.lower()])

    def _found(self, found: list[tuple[str, str]]) -> FakeDomain:
        self.fake.answer("lookup", None)
        if not found:
            raise FakeError(NO_DOMAIN)
        return FakeDomain(self.fake, *found[0])


class Fake:
    """`answers` replaces what a call returns; a function is called, an exception raised.

    `monitor` has what QEMU returns for its commands.
    """

    def __init__(self) -> None:
        self.domains = [("web", UUID)]
        self.answers: dict[str, Any] = {}
        self.monitor: dict[str, Any] = {}
        self.asked: list[str] = []
        self.opened: list[tuple[str, str]] = []
        self.freed_in: list[str] = []

    def answer(self, call: str, usual: Any) -> Any:
        self.asked.append(call)
        given = self.answers.get(call, usual)
        if isinstance(given, Exception):
            raise given
        return given() if callable(given) else given

    def open(self, uri: str) -> FakeConnection:
        return self._connected("open", uri)

    def open_read_only(self, uri: str) -> FakeConnection:
        return self._connected("openReadOnly", uri)

    def _connected(self, how: str, uri: str) -> FakeConnection:
        self.opened.append((how, uri))
        self.answer("open", None)
        return FakeConnection(self)

    def monitor_command(self, domain: FakeDomain, message: str, flags: int) -> Any:
        command = json.loads(message)["execute"]
        returned = {"return": self.monitor.get(command, {}), "id": "libvirt-9"}
        return self.answer(command, json.dumps(returned))


def install(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put both modules where they are imported from."""
    fake = Fake()
    handlers: list[Callable[..., None]] = []
    module = SimpleNamespace(
        libvirtError=FakeError,
        open=fake.open,
        openReadOnly=fake.open_read_only,
        registerErrorHandler=lambda handler, context: handlers.append(handler),
    )
    monkeypatch.setitem(sys.modules, "libvirt", module)
    monkeypatch.setitem(
        sys.modules, "libvirt_qemu", SimpleNamespace(qemuMonitorCommand=fake.monitor_command)
    )
    return fake
