"""The process of a domain is believed only with proof."""

from __future__ import annotations

import os

import pytest

from mtetool.errors import DomainProcessError, NoSuchProcessError, PermissionRefusedError
from mtetool.vmm import domain_process, proc
from mtetool.vmm.domain_process import Proof
from tests.vmm.domains import as_if_with_vm, pretender
from tests.vmm.fake_libvirt import OTHER_UUID, UUID

OURS = Proof(os.geteuid(), None)


def test_proof_by_user_threads_or_both(monkeypatch: pytest.MonkeyPatch) -> None:
    as_if_with_vm(monkeypatch, 9)
    with pretender() as process, pretender(OTHER_UUID):
        threads = frozenset({process.pid})
        for proof in (OURS, Proof(None, threads), Proof(OURS.uid, threads)):
            found = domain_process.find(UUID, proof)
            assert (found.pid, found.vm_fds) == (process.pid, (9,))
            assert found.start_time == proc.start_time(process.pid)


@pytest.mark.parametrize(
    ("proof", "words"),
    [
        (Proof(None, None), "not known to libvirt"),
        (Proof(None, frozenset()), "not known to libvirt"),
        (Proof(4711, None), "runs as user .* as 4711"),
        (Proof(OURS.uid, frozenset({1})), "does not have the vCPU threads"),
        (Proof(None, frozenset({1})), "does not have the vCPU threads"),
    ],
)
def test_process_without_proof_is_refused(
    monkeypatch: pytest.MonkeyPatch, proof: Proof, words: str
) -> None:
    as_if_with_vm(monkeypatch, 9)
    with pretender() as process, pytest.raises(DomainProcessError, match=words) as caught:
        domain_process.find(UUID, proof)
    assert str(process.pid) in caught.value.message


def test_no_process_at_all() -> None:
    with pytest.raises(DomainProcessError, match=f"no process of this host has .*{UUID}"):
        domain_process.find(UUID, OURS)


def test_process_without_a_vm() -> None:
    with pretender(), pytest.raises(DomainProcessError, match="has no KVM virtual machine"):
        domain_process.find(UUID, OURS)


def test_several_that_fit_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    as_if_with_vm(monkeypatch, 9)
    with pretender() as one, pretender() as other:
        with pytest.raises(DomainProcessError, match="several processes fit") as caught:
            domain_process.find(UUID, OURS)
        for process in (one, other):
            assert str(process.pid) in caught.value.message
        # The threads tell them apart.
        found = domain_process.find(UUID, Proof(OURS.uid, frozenset({other.pid})))
        assert found.pid == other.pid


def test_stranger_that_may_not_be_examined_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretender() as own, pretender() as stranger:
        as_if_with_vm(monkeypatch, 9)
        find, uid_of = proc.find, proc.uid_of

        def refuse(pid: int) -> proc.VmmProcess:
            if pid == stranger.pid:
                raise PermissionRefusedError("no")
            return find(pid)

        monkeypatch.setattr(proc, "find", refuse)
        # It may be the one, or one more.
        with pytest.raises(PermissionRefusedError):
            domain_process.find(UUID, OURS)
        monkeypatch.setattr(
            proc, "uid_of", lambda pid: 4711 if pid == stranger.pid else uid_of(pid)
        )
        assert domain_process.find(UUID, OURS).pid == own.pid


def test_process_that_ends_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(pid: int) -> proc.VmmProcess:
        raise NoSuchProcessError("gone")

    monkeypatch.setattr(proc, "find", gone)
    with pretender(), pytest.raises(DomainProcessError, match="no process of this host"):
        domain_process.find(UUID, OURS)


def test_pid_that_changes_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretender() as process:
        as_if_with_vm(monkeypatch, 9)
        find = proc.find

        def reused(pid: int) -> proc.VmmProcess:
            found = find(pid)
            return proc.VmmProcess(pid, found.start_time - 1, found.program, (9,), 1)

        monkeypatch.setattr(proc, "find", reused)
        with pytest.raises(DomainProcessError, match=f"{process.pid} is another one by now"):
            domain_process.find(UUID, OURS)
        # It was another domain's before.
        monkeypatch.setattr(proc, "find", find)
        lines = iter([proc.command_line(process.pid)])
        monkeypatch.setattr(proc, "command_line", lambda pid: next(lines, []))
        monkeypatch.setattr(domain_process, "_pids", lambda: iter([process.pid]))
        with pytest.raises(DomainProcessError, match="another one by now"):
            domain_process.find(UUID, OURS)


def test_all_that_name_a_domain() -> None:
    ours = os.getpid()
    with pretender(name=f"a,,{ours}") as one, pretender(OTHER_UUID, f"web-{ours}") as other:
        assert domain_process.pids_of(UUID.upper()) == [one.pid]
        assert domain_process.pids_of(f"a,{ours}") == [one.pid]
        assert domain_process.pids_of(f"web-{ours}") == [other.pid]
        assert domain_process.pids_of("nix") == domain_process.pids_of("") == []
