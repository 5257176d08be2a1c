"""QEMU's own words about its memory, and its command line."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest

from mtetool.errors import LayoutUnknownError
from mtetool.guest import Memslot
from mtetool.vmm import proc, qemu

# What QEMU 11.1.3 printed in the lab for -M virt -m 256M, shortened.
MTREE = """\
FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-000000000000ffff (prio 0, i/o): io

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-0000000003ffffff (prio 0, romd): virt.flash0 KVM
  0000000004000000-0000000007ffffff (prio 0, romd): virt.flash1 KVM
  0000000009000000-0000000009000fff (prio 0, i/o): pl011
  00000000090a0000-00000000090a0fff (prio 0, ram): pvtime KVM
  0000000040000000-000000004fffffff (prio 0, ram): mach-virt.ram KVM
  0000000050000000-000000005fffffff (prio 0, ram): hotplugged @0000000000001000 KVM
  0000008000000000-0000008000003fff (prio 1, ramd): vfio bar 0 KVM
  0000008000010000-0000008000013fff (prio 1, ram): not given to kvm

FlatView #2
 AS "virtio-net-pci", root: bus master container
  0000000040000000-000000004fffffff (prio 0, ram): mach-virt.ram KVM
"""


def test_memslots_are_what_kvm_was_given() -> None:
    assert qemu.parse_mtree(MTREE) == (
        Memslot(0, 0, 64 << 20, True, "rom"),
        Memslot(1, 64 << 20, 64 << 20, True, "rom"),
        Memslot(2, 0x90A0000, 4096, False, "ram"),
        Memslot(3, 0x40000000, 256 << 20, False, "ram"),
        Memslot(4, 0x50000000, 256 << 20, False, "ram"),
        Memslot(5, 0x8000000000, 0x4000, False, "device"),
    )


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ("-qmp unix:/run/q.sock,server=on,wait=off", "/run/q.sock"),
        ("--qmp unix:/run/q.sock,server", "/run/q.sock"),
        (
            "-chardev socket,id=m,path=/run/m.sock,server=on -mon chardev=m,mode=control",
            "/run/m.sock",
        ),
        ("-chardev socket,id=m,path=/run/m.sock -mon m,mode=control", "/run/m.sock"),
        ("-qmp unix:relative.sock,server=on", "/proc/77/cwd/relative.sock"),
        ("-chardev socket,id=m,path=/run/m.sock -mon chardev=m,mode=readline", None),
        ("-qmp tcp:localhost:4444,server=on", None),
        ("-m 256M", None),
    ],
)
def test_monitor_is_found_on_the_command_line(
    words: str, path: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proc, "command_line", lambda pid: ["qemu", *words.split(" ")])
    assert qemu.find_monitor(77) == (Path(path) if path else None)


def _serve(path: Path, answers: list[object]) -> threading.Thread:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen(1)

    def talk() -> None:
        connection, _ = server.accept()
        with connection, server, connection.makefile("rwb") as stream:
            stream.write(b'{"QMP": {}}\n')
            stream.flush()
            for answer in answers:
                stream.readline()
                stream.write(b'{"event": "RESUME"}\n' + json.dumps(answer).encode() + b"\n")
                stream.flush()

    thread = threading.Thread(target=talk)
    thread.start()
    return thread


def test_monitor_passes_over_events(tmp_path: Path) -> None:
    answers = [{"return": {}}, {"return": {"running": True}}, {"return": {"name": "vm [1]"}}]
    thread = _serve(tmp_path / "s", answers)
    with qemu.Monitor(tmp_path / "s") as monitor:
        assert monitor.paused() is False
        assert monitor.name() == "vm [1]"
    thread.join()


def test_monitor_that_refuses_is_reported_with_its_words(tmp_path: Path) -> None:
    thread = _serve(tmp_path / "s", [{"return": {}}, {"error": {"desc": "not in preconfig"}}])
    refused = pytest.raises(LayoutUnknownError, match="not in preconfig")
    with qemu.Monitor(tmp_path / "s") as monitor, refused:
        monitor.paused()
    thread.join()


def test_monitor_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LayoutUnknownError, match="No such file") as caught:
        qemu.Monitor(tmp_path / "none")
    assert "--memslot" in str(caught.value.hint)


def test_monitor_held_by_somebody_else_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu, "_TIMEOUT_SECONDS", 0.1)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen(1)  # it accepts, and says nothing
        with pytest.raises(LayoutUnknownError, match="another client"):
            qemu.Monitor(tmp_path / "s")


def test_path_too_long_for_a_socket_is_said(tmp_path: Path) -> None:
    with pytest.raises(LayoutUnknownError, match="too long"):
        qemu.Monitor(tmp_path / ("x" * 120))
