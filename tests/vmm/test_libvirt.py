"""libvirt's answers, whatever it answers."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtetool.errors import (
    DomainOffError,
    GuestError,
    LayoutUnknownError,
    LibvirtUnavailableError,
    NoSuchDomainError,
    PermissionRefusedError,
    UsageError,
)
from mtetool.vmm import libvirt
from mtetool.vmm.libvirt import Domain, Libvirt, PassThrough
from mtetool.vmm.qemu import Monitor
from tests.vmm import fake_libvirt
from tests.vmm.fake_libvirt import OTHER_UUID, UUID, Fake, FakeError
from tests.vmm.test_qemu import MTREE

URI = "qemu:///system"
HUGE = "x" * (5 << 20)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)
    return fake_libvirt.install(monkeypatch)


def _domain(name: str = "web", *, readonly: bool = False, seconds: float = 20.0) -> Domain:
    return Libvirt(URI, readonly=readonly, seconds=seconds).domain(name)


# --- which libvirt ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "qemu:///system",
        "qemu:///session",
        "qemu+unix:///system?socket=/proc/1/root/run/libvirt/libvirt-sock",
    ],
)
def test_connections_to_this_host(fake: Fake, uri: str) -> None:
    for readonly, how in ((True, "openReadOnly"), (False, "open")):
        with Libvirt(uri, readonly=readonly) as found:
            assert fake.opened[-1] == (how, uri)
            assert found.is_session is ("session" in uri)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "web",
        "test:///default",
        "qemu://other/system",
        "qemu+ssh:///system",
        "qemu+ssh://root@other/system",
        "qemu+ext:///system?command=/bin/sh",
        "qemu+libssh2:///system",
        "qemu:///embed?root=/tmp",
        "qemu:///system\n",
        "qemu:///system?socket=/a b",
        "xen:///system",
        "lxc:///",
        "qemu:///system/x",
        HUGE,
        "\udcff",
    ],
)
def test_others_are_refused_before_anybody_is_asked(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    with pytest.raises(UsageError, match="--connect") as caught:
        Libvirt(uri, readonly=True)
    assert len(caught.value.message) < 400
    if uri and "\udcff" not in uri and len(uri) < 1000:
        monkeypatch.setenv("LIBVIRT_DEFAULT_URI", uri)
        with pytest.raises(UsageError, match="LIBVIRT_DEFAULT_URI"):
            Libvirt(None, readonly=True)
    assert fake.opened == []


def test_default_is_libvirts(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert libvirt.checked_uri(None) == "qemu:///system"
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "")
    assert libvirt.checked_uri(None) == "qemu:///system"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert libvirt.checked_uri(None) == "qemu:///session"
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu:///system")
    assert libvirt.checked_uri(None) == "qemu:///system"
    assert libvirt.checked_uri("qemu:///session") == "qemu:///session"


def test_driver_that_is_not_qemus(fake: Fake) -> None:
    fake.answers["type"] = "Test"
    with pytest.raises(LibvirtUnavailableError, match="driver"):
        Libvirt(URI, readonly=True)
    assert fake.freed_in == ["libvirt"]


@pytest.mark.parametrize("missing", ["libvirt", "libvirt_qemu"])
def test_module_that_is_not_installed(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(LibvirtUnavailableError, match=f"module {missing}") as caught:
        Libvirt(URI, readonly=False)
    assert "apt install python3-libvirt" in (caught.value.hint or "")
    if missing == "libvirt_qemu":  # it is for the monitor only
        Libvirt(URI, readonly=True).close()


# --- domains ----------------------------------------------------------------------------------


def test_domains_by_name_and_uuid(fake: Fake) -> None:
    for name in ("web", UUID, UUID.upper()):
        found = _domain(name)
        assert (found.name, found.uuid, found.source) == ("web", UUID, "libvirt:web")
        assert found.is_active()
        found.libvirt.close()
    assert fake.freed_in == ["libvirt"] * 3


def test_uuid_comes_before_a_name_that_looks_like_one(fake: Fake) -> None:
    fake.domains = [(UUID, OTHER_UUID), ("web", UUID)]
    assert _domain(UUID).name == "web"
    fake.domains.pop()
    named = _domain(UUID)
    assert (named.uuid, named.source) == (OTHER_UUID, f"libvirt:{OTHER_UUID}")


@pytest.mark.parametrize(
    "name",
    ["nix", "", HUGE, "\udcff", pytest.param(OTHER_UUID, id="uuid"), "a\nb", "\x1b[2J"],
)
def test_domain_that_does_not_exist(fake: Fake, name: str) -> None:
    with pytest.raises(NoSuchDomainError, match="has no domain") as caught:
        _domain(name)
    assert len(caught.value.message) < 400


@given(st.text())
def test_name_for_mtetool_finds_the_domain_again(name: str) -> None:
    source = libvirt.source_of(name, UUID)
    assert source in (f"libvirt:{name}", f"libvirt:{UUID}")
    assert source.isprintable()
    assert " " not in source
    rest = source.removeprefix("libvirt:")
    assert rest
    # A name is never taken for a UUID.
    assert (rest == UUID) == (source != f"libvirt:{name}" or name == UUID)


def test_plain_names_are_kept() -> None:
    for name in ("web", "vm-1.example", "käse", "a:b", "$(x)", "[1]"):
        assert libvirt.source_of(name, UUID) == f"libvirt:{name}"
    for name in ("", "a b", "a\tb", "\x1b", "\ud800", "\u200b", OTHER_UUID.upper()):
        assert libvirt.source_of(name, UUID) == f"libvirt:{UUID}"


@pytest.mark.parametrize(
    ("number", "paused"),
    [(0, None), (1, False), (2, False), (3, True), (4, None), (5, None), (6, True), (7, True)],
)
def test_states(fake: Fake, number: int, paused: bool | None) -> None:
    fake.answers["state"] = [number, 1]
    assert _domain().paused() is paused
    fake.answers["state"] = [4711, 1]
    assert _domain().paused() is None


# --- errors -----------------------------------------------------------------------------------

ERRORS = [
    (FakeError(fake_libvirt.NO_DOMAIN), NoSuchDomainError, "no domain"),
    (FakeError(fake_libvirt.OPERATION_INVALID), DomainOffError, "shut off"),
    (FakeError(fake_libvirt.SYSTEM_ERROR, "sock: no", 13), PermissionRefusedError, "sock: no"),
    (FakeError(fake_libvirt.SYSTEM_ERROR, "sock: gone", 2), LibvirtUnavailableError, "sock: gone"),
    (FakeError(80, "no polkit agent"), PermissionRefusedError, "no polkit agent"),
    (FakeError(29, "read only"), PermissionRefusedError, "read only"),
    (FakeError(88, "denied"), PermissionRefusedError, "denied"),
    (FakeError(38, HUGE), LibvirtUnavailableError, "xxx"),
    (FakeError(None, None, None), LibvirtUnavailableError, "unknown reason"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("call", ["open", "type", "lookup", "name", "active", "state", "xml"])
@pytest.mark.parametrize(("error", "kind", "words"), ERRORS)
def test_errors_of_libvirt(
    fake: Fake, call: str, error: FakeError, kind: type[GuestError], words: str
) -> None:
    fake.answers[call] = error
    with pytest.raises(kind, match=words) as caught:
        _ask_all()
    assert len(caught.value.message) < 1000
    assert caught.value.__cause__ is None


def _ask_all(seconds: float = 20.0) -> None:
    domain = _domain(seconds=seconds)
    for ask in (domain.is_active, domain.paused, domain.xml):
        ask()


STRANGE = [None, True, -1, 2.5, b"web", [], [1], [1, 2, 3], ["1", 1], {}, object(), HUGE, ()]


@pytest.mark.parametrize("call", ["type", "name", "uuid", "active", "state", "xml"])
@pytest.mark.parametrize("answer", STRANGE, ids=lambda value: repr(value)[:20])
def test_nonsense_is_refused(fake: Fake, call: str, answer: object) -> None:
    fake.answers[call] = answer
    if (call, answer) in (("name", HUGE), ("active", -1)):
        _ask_all()  # such a name is not used, and the number is one that means "not active"
        return
    with pytest.raises(LibvirtUnavailableError, match="nonsense") as caught:
        _ask_all()
    assert len(caught.value.message) < 400


def test_module_that_is_another_one(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", object())
    with pytest.raises(LibvirtUnavailableError, match="nonsense"):
        Libvirt(URI, readonly=True)


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("call", ["open", "type", "lookup", "active", "state", "xml"])
def test_daemon_that_hangs(fake: Fake, hang: threading.Event, call: str) -> None:
    fake.answers[call] = hang.wait
    since = time.monotonic()
    with pytest.raises(LibvirtUnavailableError, match="not answered within"):
        _ask_all(seconds=0.3)
    assert time.monotonic() - since < 5
    assert fake.freed_in == []  # nobody else waits for its objects to go


# --- the monitor ------------------------------------------------------------------------------


def test_monitor_by_way_of_libvirt(fake: Fake) -> None:
    fake.monitor = {
        "human-monitor-command": MTREE,
        "query-cpus-fast": [{"thread-id": 7}, {"thread-id": 8}],
    }
    monitor = Monitor(PassThrough(_domain()))
    assert len(monitor.memslots()) == 6
    assert monitor.vcpu_threads() == {7, 8}
    monitor.close()


@pytest.mark.parametrize(
    "answer",
    [
        None,
        b"{}",
        "",
        "nonsense",
        "[]",
        "null",
        "{}",
        '{"error": "x"}',
        '{"error": {"desc": 7}}',
        '{"error": {"desc": "no"}}',
        '{"return": null}',
        '{"return": [{"thread-id": true}]}',
        '{"return": ' + "[" * 100_000,
        '{"return": ' + "9" * 5000 + "}",
        HUGE,
        FakeError(fake_libvirt.OPERATION_INVALID),
        FakeError(68, "cannot acquire state change lock"),
        FakeError(29),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_every_failure_of_the_monitor_is_that_of_a_monitor(fake: Fake, answer: object) -> None:
    calls = ("query-cpus-fast", "human-monitor-command")
    fake.answers.update(dict.fromkeys(calls, answer))
    monitor = Monitor(PassThrough(_domain()))
    for ask in (monitor.vcpu_threads, monitor.memslots):
        with pytest.raises(LayoutUnknownError, match="monitor of libvirt:web") as caught:
            ask()
        assert "--no-monitor" in (caught.value.hint or "")
        assert len(caught.value.message) < 1000


def test_monitor_that_hangs(fake: Fake, hang: threading.Event) -> None:
    fake.answers["query-cpus-fast"] = hang.wait
    domain = _domain(seconds=0.3)
    monitor = Monitor(PassThrough(domain))
    for ask in (monitor.vcpu_threads, monitor.memslots):
        with pytest.raises(LayoutUnknownError, match="not answered within"):
            ask()
    with pytest.raises(LibvirtUnavailableError):
        domain.paused()
