"""A domain of libvirt as a guest, up to the first call that would attach."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtetool.backends import open_files, open_guest
from mtetool.backends.kvm import domain, listing
from mtetool.backends.kvm.guest import KvmGuest
from mtetool.errors import (
    DomainOffError,
    DomainProcessError,
    GuestError,
    LayoutUnknownError,
    LibvirtUnavailableError,
    MisalignedError,
    NoSuchDomainError,
    SeveralVmsError,
    SourceError,
    WrongHostError,
)
from mtetool.guest import GuestOptions, Memslot
from mtetool.vmm import monitors, proc
from mtetool.vmm.proc import VmmProcess
from mtetool.vmm.qemu import Monitor
from tests.vmm import fake_libvirt
from tests.vmm.domains import as_if_with_vm, pretender
from tests.vmm.fake_libvirt import NO_DOMAIN, OTHER_UUID, UUID, Fake, FakeError
from tests.vmm.test_qemu import MTREE

NO_MONITOR = GuestOptions(use_monitor=False)
OWN_LABEL = f"<domain><seclabel model='dac'><label>+{os.geteuid()}:+0</label></seclabel></domain>"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A host with MTE whose libvirt has a domain; every process has a VM."""
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu:///system")
    as_if_with_vm(monkeypatch, 9)
    made = fake_libvirt.install(monkeypatch)
    made.answers["xml"] = OWN_LABEL
    made.monitor["human-monitor-command"] = MTREE
    return made


@pytest.fixture
def running(fake: Fake) -> Iterator[subprocess.Popen[bytes]]:
    with pretender() as process:
        fake.monitor["query-cpus-fast"] = [{"thread-id": process.pid}]
        yield process


def _open(options: GuestOptions | None = None, name: str = "web") -> KvmGuest:
    guest = open_guest(f"libvirt:{name}", options)
    assert isinstance(guest, KvmGuest)
    return guest


def test_monitor_is_asked_by_way_of_libvirt(fake: Fake, running: subprocess.Popen[bytes]) -> None:
    fake.answers["state"] = [3, 1]
    with _open() as guest:
        assert (guest.vm.process.pid, guest.vm.fd) == (running.pid, 9)
        assert guest.monitor.source(9) == "libvirt:web"
        assert guest.monitor.name() == "web"
        assert len(guest.monitor.ask().memslots()) == 6
        assert guest.paused() is True
        fake.answers["state"] = [1, 1]
        assert guest.paused() is False
    assert fake.opened == [("open", "qemu:///system")]
    assert fake.freed_in == ["libvirt"]


def test_without_the_monitor_no_domain_is_tainted(
    fake: Fake, running: subprocess.Popen[bytes]
) -> None:
    with _open(GuestOptions(use_monitor=False, connect="qemu:///session")) as guest:
        assert guest.vm.process.pid == running.pid
        with pytest.raises(LayoutUnknownError):
            guest.monitor.ask()
        assert guest.monitor.name() == "web"
        assert guest.paused() is False
    assert fake.opened == [("openReadOnly", "qemu:///session")]
    assert not {"query-cpus-fast", "human-monitor-command"} & set(fake.asked)


def test_without_the_monitor_none_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(pid: int) -> Monitor:
        raise AssertionError("it was looked for")

    monkeypatch.setattr(monitors, "open_found", found)
    with KvmGuest(VmmProcess(1, 1, "vmm", (3,), 1), 3, NO_MONITOR) as guest:
        assert guest.monitor.may_exist is False
        with pytest.raises(LayoutUnknownError):
            guest.monitor.ask()
        assert guest.monitor.paused() is None


def test_session_without_a_label_is_our_own(fake: Fake, running: subprocess.Popen[bytes]) -> None:
    fake.answers["xml"] = "<domain/>"
    with _open(GuestOptions(use_monitor=False, connect="qemu:///session")):
        pass
    with pytest.raises(DomainProcessError, match="not known to libvirt"):
        _open(NO_MONITOR)
    with _open():  # its threads prove it
        pass


def test_monitor_that_is_silent_is_done_without(
    fake: Fake, running: subprocess.Popen[bytes]
) -> None:
    fake.answers["query-cpus-fast"] = FakeError(68, "cannot acquire state change lock")
    with _open() as guest:
        for _ in range(2):
            with pytest.raises(LayoutUnknownError, match="state change lock"):
                guest.monitor.ask()
    assert fake.asked.count("query-cpus-fast") == 1
    fake.answers["xml"] = "<domain/>"
    with pytest.raises(DomainProcessError):
        _open()


def test_threads_of_another_process_are_refused(
    fake: Fake, running: subprocess.Popen[bytes]
) -> None:
    fake.monitor["query-cpus-fast"] = [{"thread-id": os.getpid()}]
    with pytest.raises(DomainProcessError, match="vCPU threads"):
        _open()
    assert fake.freed_in == ["libvirt"]


@pytest.mark.parametrize("options", [GuestOptions(), NO_MONITOR])
@pytest.mark.parametrize(
    ("call", "answer", "kind"),
    [
        ("lookup", FakeError(NO_DOMAIN), NoSuchDomainError),
        ("active", 0, DomainOffError),
        ("active", FakeError(NO_DOMAIN), NoSuchDomainError),
        ("xml", FakeError(NO_DOMAIN), NoSuchDomainError),
        ("xml", "nonsense", DomainProcessError),
        ("xml", OWN_LABEL.replace("+", "+9"), DomainProcessError),
        ("xml", 7, LibvirtUnavailableError),
        ("open", FakeError(38, "Failed to connect socket", 111), LibvirtUnavailableError),
    ],
)
def test_refusals(
    fake: Fake,
    running: subprocess.Popen[bytes],
    options: GuestOptions,
    call: str,
    answer: object,
    kind: type[GuestError],
) -> None:
    fake.answers[call] = answer
    with pytest.raises(kind) as caught:
        _open(options)
    assert caught.value.hint
    assert caught.value.exit_status == 4


def test_names_that_name_no_domain(fake: Fake) -> None:
    with pytest.raises(SourceError, match="names no domain"):
        _open(name="")
    assert fake.opened == []
    with pytest.raises(NoSuchDomainError):
        _open(name="x" * 100_000)


def test_host_without_mte(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(WrongHostError, match="libvirt:web"):
        _open()
    assert fake.opened == []


def test_process_with_several_vms_and_layouts_by_hand(
    fake: Fake, running: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MisalignedError):
        _open(GuestOptions((Memslot(0, 1, 4096),)))
    as_if_with_vm(monkeypatch, 9, 11)
    with pytest.raises(SeveralVmsError):
        _open()
    assert fake.freed_in == ["libvirt", "libvirt"]


def test_monitor_of_ones_own(fake: Fake, running: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """A second one: libvirt passes nothing on."""
    with _open(GuestOptions(qmp=tmp_path / "none")) as guest:
        with pytest.raises(LayoutUnknownError, match="No such file"):
            guest.monitor.ask()
        assert guest.paused() is False
    assert fake.opened == [("openReadOnly", "qemu:///system")]


def test_state_of_one_that_disappears(fake: Fake, running: subprocess.Popen[bytes]) -> None:
    with _open() as guest:
        fake.answers["state"] = FakeError(NO_DOMAIN)
        assert guest.paused() is None
        guest._frozen_since = 1.0
        assert guest.paused() is True
        guest._frozen_since = None


def test_files_of_the_process_are_no_outputs(fake: Fake, running: subprocess.Popen[bytes]) -> None:
    for source in ("libvirt:web", f"libvirt:{UUID}"):
        assert f"/proc/{running.pid}/fd/0" in open_files(source)
    assert open_files("libvirt:nix") == open_files("libvirt:") == []
    assert fake.opened == []  # whatever libvirt says: it takes no part


# --- the list ---------------------------------------------------------------------------------


def _known(uri: str | None = None) -> domain.KnownDomains:
    return domain.KnownDomains([proc.find(pid) for pid in _pretenders()], uri)


def _pretenders() -> list[int]:
    from mtetool.vmm import domain_process

    return [*domain_process.pids_of(UUID), *domain_process.pids_of(OTHER_UUID)]


def test_one_connection_for_all(fake: Fake, running: subprocess.Popen[bytes]) -> None:
    fake.domains.append(("mail", OTHER_UUID))
    with pretender(OTHER_UUID, "forged") as other, _known() as known:
        names = {pid: found.name for pid in _pretenders() if (found := known.of(pid))}
        assert names == {running.pid: "web", other.pid: "mail"}
        assert known.error is None
    assert fake.opened == [("openReadOnly", "qemu:///system")]
    assert fake.freed_in == ["libvirt"]


def test_nobody_is_asked_without_domains(fake: Fake) -> None:
    with domain.KnownDomains([proc.find(os.getpid())], None) as known:
        assert (known.error, known.of(os.getpid())) == (None, None)
    assert fake.opened == []


def test_forged_ones_have_no_name(fake: Fake, running: subprocess.Popen[bytes]) -> None:
    with pretender() as other, _known() as known:
        assert known.of(running.pid) is known.of(other.pid) is None
    fake.answers["xml"] = OWN_LABEL.replace("+", "+9")
    with _known() as known:
        assert (known.of(running.pid), known.error) == (None, None)
    fake.domains.clear()
    with _known() as known:
        assert (known.of(running.pid), known.error) == (None, None)


def test_libvirt_that_cannot_be_asked_is_one_reason(
    fake: Fake, running: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = threading.Event()
    monkeypatch.setattr(domain, "_LIST_SECONDS", 0.2)
    since = time.monotonic()
    for call, answer in (("open", FakeError(38, "no socket", 2)), ("xml", hang.wait)):
        fake.answers[call] = answer
        with _known() as known:
            assert isinstance(known.error, LibvirtUnavailableError)
            assert known.of(running.pid) is None
        del fake.answers[call]
    assert time.monotonic() - since < 5
    hang.set()
    # Some may be named before it fails.
    answers = iter([OWN_LABEL])
    fake.answers["xml"] = lambda: next(answers, None)
    fake.domains.append(("mail", OTHER_UUID))
    with pretender(OTHER_UUID), _known() as known:
        assert isinstance(known.error, LibvirtUnavailableError)
        assert known.of(running.pid) is None
    monkeypatch.setitem(sys.modules, "libvirt", None)
    with _known() as known:
        assert isinstance(known.error, LibvirtUnavailableError)


def test_list_shows_names_and_states(
    fake: Fake, running: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(proc, "find_all", lambda: ([proc.find(running.pid)], []))
    fake.answers["state"] = [3, 1]
    (vm,) = listing.list_vms(attach=True).vms
    assert (vm.info.source, vm.info.name, vm.state) == ("libvirt:web", "web", "paused")
    assert (vm.info.pid, vm.fd) == (running.pid, 9)
    fake.answers["open"] = FakeError(38, "no socket", 2)
    found = listing.list_vms(attach=True)
    assert (found.vms[0].info.source, found.vms[0].state) == (f"kvm:{running.pid}:9", None)
    assert found.unnamed is not None
