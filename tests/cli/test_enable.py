"""`mtetool enable` as a user meets it."""

from __future__ import annotations

import os
from pathlib import Path

from tests.cli.running import make_guest, run


def test_before_the_first_vcpu(tmp_path: Path) -> None:
    guest = make_guest(tmp_path / "g", mte=False, vcpus=0)
    assert run("dump", guest).status == 4
    done = run("enable", guest)
    assert (done.status, done.out) == (0, f"{guest}: MTE enabled\n")
    assert run("dump", guest).status == 0
    again = run("enable", guest, "--json")
    assert again.status == 0
    assert again.json == {
        "schema": "mtetool.enable/1",
        "source": guest,
        "mte": True,
        "changed": False,
    }
    assert "was already on" in run("enable", guest).out


def test_after_the_first_vcpu(tmp_path: Path) -> None:
    guest = make_guest(tmp_path / "g", mte=False, vcpus=1)
    done = run("enable", guest, "--json")
    assert (done.status, done.error["error"]) == (4, "vcpus-exist")
    assert run("dump", guest).status == 4


def test_what_is_no_guest(tmp_path: Path) -> None:
    assert run("enable", tmp_path / "x").status == 2
    assert run("enable", f"emu:{tmp_path / 'x'}").status == 2


def test_no_such_process_and_a_host_that_is_not_arm64() -> None:
    done = run("enable", "kvm:999999", "--json")
    expected = "no-such-process" if os.uname().machine == "aarch64" else "not-arm64"
    assert (done.status, done.error["error"]) == (4, expected)
