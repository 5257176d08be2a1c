"""Domains of libvirt on the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mtetool.vmm import proc
from tests.cli.running import make_guest, run
from tests.vmm import fake_libvirt
from tests.vmm.domains import as_if_with_vm, pretender
from tests.vmm.fake_libvirt import Fake, FakeError


@pytest.mark.parametrize(
    "words",
    [
        ("save", "GUEST", "-o", "new"),
        ("dump", "GUEST"),
        ("diff", "GUEST", "GUEST"),
        ("verify", "file", "--against", "GUEST"),
        ("restore", "file", "GUEST"),
        ("enable", "GUEST"),
    ],
)
def test_options_are_in_every_command(tmp_path: Path, words: tuple[str, ...]) -> None:
    guest = make_guest(tmp_path / "g", 1)
    assert run("save", guest, "-o", tmp_path / "file").status == 0
    places = {"GUEST": guest, "file": str(tmp_path / "file"), "new": str(tmp_path / "new")}
    line = [places.get(word, word) for word in words]
    # They do not matter to an emulated guest.
    assert run(*line, "--no-monitor", "--connect", "qemu:///system").status == 0
    for wrong in (["--no-monitor", "--qmp", "x"], ["--connect", ""], ["--connect"]):
        assert run(*line, *wrong).status == 2


@pytest.mark.parametrize("words", [("dump", "libvirt:"), ("list", "--connect", "xen:///")])
def test_what_names_nothing(words: tuple[str, ...]) -> None:
    outcome = run(*words)
    assert (outcome.status, outcome.out) == (2, "")
    assert "try:" in outcome.err


def test_output_is_none_of_the_domains_files(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_text("precious")
    with disk.open() as file, pretender(opens=file):
        outcome = run("save", "libvirt:web", "-o", disk, "--force", "--json")
    assert (outcome.status, outcome.error["error"]) == (2, "output-is-input")
    assert disk.read_text() == "precious"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu:///session")
    return fake_libvirt.install(monkeypatch)


def test_list_without_libvirt_says_why_once(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pretender() as one, pretender(fake_libvirt.OTHER_UUID) as other:
        as_if_with_vm(monkeypatch, 9)
        processes = [proc.find(one.pid), proc.find(other.pid)]
        monkeypatch.setattr(proc, "find_all", lambda: (processes, []))
        shown = run("list", "--json")
        assert [vm["source"] for vm in shown.json["vms"]] == ["libvirt:web", f"kvm:{other.pid}:9"]
        assert shown.err == ""
        fake.answers["open"] = FakeError(38, "no socket", 2)
        shown = run("list", "--json")
        assert [vm["source"] for vm in shown.json["vms"]] == [
            f"kvm:{one.pid}:9",
            f"kvm:{other.pid}:9",
        ]
        assert shown.err.count("warning") == shown.err.count("no socket") == 1
        assert run("list", "--quiet").err == ""
        monkeypatch.setitem(sys.modules, "libvirt", None)
        assert "module libvirt" in run("list").err
    monkeypatch.setattr(proc, "find_all", lambda: ([], []))
    assert run("list").err == ""
