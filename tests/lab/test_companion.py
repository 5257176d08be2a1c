"""The companion service and the emulator wrapper on the real kernel, without libvirt."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.lab.guests import Qemu, as_user
from tests.lab.machine import Machine
from tests.lab.stride import ENVIRONMENT, enough
from tests.lab.tracer import TRACER

_WRAPPER = "/usr/bin/qemu-system-aarch64-mte"
_SANDBOX = "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_USER = 64055  # libvirt-qemu's on Debian


@pytest.fixture
def wrapper(lab: Machine) -> str:
    """The emulator wrapper, installed as the manual page says."""
    lab.sh(f"mtetool companion --show wrapper >{_WRAPPER}; chmod 755 {_WRAPPER}")
    return _WRAPPER


@pytest.fixture
def service(lab: Machine) -> Iterator[int]:
    """The running service's PID; each takes over the socket that the one before left."""
    result = lab.sh(
        "mtetool companion >/tmp/companion.log 2>&1 & echo $!;"
        " until grep -q '00010000 .*/run/mtetool/companion.sock' /proc/net/unix;"  # it listens
        " do sleep 0.1; done"
    )
    yield int(result.stdout)
    print(_log(lab))


def _log(lab: Machine) -> str:
    return lab.get("/tmp/companion.log").decode()


def _wait_for_log(lab: Machine, text: str) -> None:
    lab.sh(f"until grep -q '{text}' /tmp/companion.log; do sleep 0.1; done", timeout=60)


def _user(lab: Machine, uid: int, script: str) -> tuple[int, str, str]:
    result = lab.run(as_user(lab, uid, "sh", "-c", script))
    return result.returncode, result.stdout.decode(), result.stderr.decode()


@pytest.mark.long
def test_a_sandboxed_vmm_of_another_user_gets_mte(lab: Machine, service: int, wrapper: str) -> None:
    guest = Qemu(lab, "g", mte=False, uid=_USER, program=wrapper, extra=_SANDBOX).start()
    assert [check.wrong for check in guest.wait_for_checks()] == [0, 0]
    _wait_for_log(lab, f"process {guest.pid} of user {_USER}: MTE is on")
    assert lab.get(f"/tmp/{guest.name}.out") == b""
    # Nothing is attached any more, nothing of the service is left but itself.
    status = lab.get(f"/proc/{guest.pid}/status").decode()
    assert "TracerPid:\t0\n" in status
    assert f"Uid:\t{_USER}\t{_USER}\t{_USER}\t{_USER}\n" in status
    assert lab.sh(f"cat /proc/{service}/task/*/children").stdout == b""


@pytest.mark.long
def test_exec_asks_the_service(lab: Machine, service: int) -> None:
    guest = Qemu(lab, "g", mte=False, uid=_USER, wrapper="mtetool exec --", extra=_SANDBOX)
    assert [check.wrong for check in guest.start().wait_for_checks()] == [0, 0]
    _wait_for_log(lab, f"process {guest.pid} of user {_USER}: MTE is on")


def test_without_the_service_the_vm_starts_and_its_log_says_why(lab: Machine, wrapper: str) -> None:
    lab.sh("rm -f /run/mtetool/companion.sock")
    guest = Qemu(lab, "g", mte=False, uid=_USER, program=wrapper, extra=_SANDBOX).start()
    assert lab.get(f"/tmp/{guest.name}.out") == (
        b"mtetool: the companion service does not answer at /run/mtetool/companion.sock:"
        b" No such file or directory, so this VM has no MTE\n"
    )
    listed = json.loads(lab.run(["mtetool", "list", "--json"], check=True).stdout)
    assert [(vm["pid"], vm["mte"]) for vm in listed["vms"]] == [(guest.pid, False)]


@pytest.mark.long
def test_a_service_that_hangs_delays_a_start_and_no_more(
    lab: Machine, service: int, wrapper: str
) -> None:
    lab.sh(f"kill -STOP {service}")
    guest = Qemu(lab, "g", mte=False, uid=_USER, program=wrapper, extra=_SANDBOX).start()
    assert b"does not answer" in lab.get(f"/tmp/{guest.name}.out")
    # It finds out that nobody waits for it.
    lab.sh(f"kill -CONT {service}")
    _wait_for_log(lab, "a client was refused")
    assert b"TracerPid:\t0\n" in lab.get(f"/proc/{guest.pid}/status")


@pytest.mark.long
def test_a_client_that_is_no_vmm(lab: Machine, service: int, wrapper: str) -> None:
    lab.sh(f"sed 's#^QEMU = .*#QEMU = \"/bin/sh\"#' {wrapper} >/tmp/w; chmod 755 /tmp/w")
    assert _user(lab, _USER, "/tmp/w -c 'echo started'") == (0, "started\n", "")
    _wait_for_log(lab, "it made no VM")


def test_a_vm_without_mte_is_not_made_where_it_is_required(
    lab: Machine, service: int, wrapper: str
) -> None:
    lab.sh(
        f"sed 's#^QEMU = .*#QEMU = \"/lab/newvms\"#; s/^REQUIRE = .*/REQUIRE = True/' {wrapper}"
        " >/tmp/w; chmod 755 /tmp/w"
    )
    assert _user(lab, _USER, "/tmp/w 1 | cat") == (0, "vm 1 mte=1\nready\n", "")
    lab.sh(f"kill {service}; rm /run/mtetool/companion.sock")
    status, out, err = _user(lab, _USER, "/tmp/w 1")
    assert (status, out) == (4, "")
    assert "so it is not started" in err


def test_a_setuid_program_is_let_go(lab: Machine, service: int, wrapper: str) -> None:
    lab.sh(
        "cp /lab/newvms /tmp/privileged; chmod 4755 /tmp/privileged;"
        f" sed 's#^QEMU = .*#QEMU = \"/tmp/privileged\"#' {wrapper} >/tmp/w; chmod 755 /tmp/w"
    )
    # /tmp is on the root's file system here, which lets setuid programs be.
    assert _user(lab, _USER, "/tmp/w 1 | cat") == (0, "vm 1 mte=0\nready\n", "")
    _wait_for_log(lab, "it made no VM")


@pytest.mark.long
def test_a_client_that_is_traced_already(lab: Machine, service: int, wrapper: str) -> None:
    lab.sh(f"sed 's#^QEMU = .*#QEMU = \"/bin/sh\"#' {wrapper} >/tmp/w; chmod 755 /tmp/w")
    result = lab.run(["python3", "-c", TRACER, "/tmp/w", "-c", "echo started"])
    assert (result.returncode, result.stdout) == (0, b"started\n")
    assert b"is already traced by process" in result.stderr
    assert b"so this VM has no MTE" in result.stderr


def test_a_second_service_is_refused(lab: Machine, service: int) -> None:
    result = lab.run(["mtetool", "companion"])
    assert result.returncode == 4
    assert b"another process serves /run/mtetool/companion.sock" in result.stderr


@pytest.mark.parametrize("how", ["", pytest.param("stop", marks=pytest.mark.long)])
def test_death_before_every_step_is_harmless(lab: Machine, how: str) -> None:
    lab.sh("chmod 666 /dev/kvm")
    command = ["python3", "-m", "tests.lab.start_deaths", "service", how]
    result = lab.run(command, timeout=300, env=ENVIRONMENT, check=True)
    found = json.loads(result.stdout)
    print(found["deaths"], "deaths")
    assert found["harmed"] == {}, found["plain"]
    assert found["deaths"] > enough(20)
