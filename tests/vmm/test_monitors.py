"""A monitor is found where its VMM sees it, and trusted when it is proven to be the VMM's."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from mtetool.errors import ForeignMonitorError, LayoutUnknownError
from mtetool.vmm import monitors, proc, unix_sockets
from mtetool.vmm.qemu import Monitor
from tests.vmm import strange

# A monitor in another process, which names the threads that it is told to.
_OTHER = """
import json, sys
from pathlib import Path
from tests.vmm import strange
path, tids = sys.argv[1], json.loads(sys.argv[2])
cpus = [{"thread-id": tid} for tid in tids]
with strange.monitor(Path(path), strange.answers(query_cpus_fast=cpus, query_name={"name": "x"})):
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextmanager
def _other(path: Path, tids: list[int]) -> Iterator[int]:
    """Start a process that serves a monitor at `path`; yield its PID."""
    words = [sys.executable, "-c", _OTHER, str(path), json.dumps(tids)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


def _found(monkeypatch: pytest.MonkeyPatch, *addresses: object) -> list[str]:
    """Give this process the command line of a QEMU with monitors at these addresses."""
    options = [word for address in addresses for word in ("-qmp", f"unix:{address},server=on")]
    monkeypatch.setattr(proc, "command_line", lambda pid: ["qemu", *options])
    return options


def _open_found() -> Monitor:
    found = monitors.open_found(os.getpid())
    assert found is not None
    return found


def test_own_socket_proves_it(tmp_path: Path) -> None:
    with strange.monitor(tmp_path / "s", strange.answers(query_cpus_fast=b"never asked")) as path:
        monitors.open_given(os.getpid(), path).close()


def test_threads_of_the_process_prove_it(tmp_path: Path) -> None:
    with (
        _other(tmp_path / "s", [os.getpid()]),
        monitors.open_given(os.getpid(), tmp_path / "s") as monitor,
    ):
        assert monitor.name() == "x"


@pytest.mark.parametrize("tids", [[], [1], [os.getpid(), 1], [-1], [2**70]])
def test_other_threads_do_not(tmp_path: Path, tids: list[int]) -> None:
    with (
        _other(tmp_path / "s", tids) as other,
        pytest.raises(ForeignMonitorError, match=f"process {other} "),
    ):
        monitors.open_given(os.getpid(), tmp_path / "s")


@pytest.mark.parametrize("answer", [b'{"error": {"desc": "not in preconfig"}}', b"nonsense"])
def test_one_that_does_not_name_its_threads_does_not_either(tmp_path: Path, answer: bytes) -> None:
    """A manager's socket; here, this process is the manager."""
    with (
        subprocess.Popen([sys.executable], stdin=subprocess.PIPE) as managed,
        strange.monitor(tmp_path / "s", strange.answers(query_cpus_fast=answer)) as path,
        pytest.raises(ForeignMonitorError, match=r"preconfig|QMP"),
    ):
        monitors.open_given(managed.pid, path)


def test_foreign_one_is_not_used_and_the_next_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those before it: another VM's, a missing one, not a socket, and one with another client."""
    with ExitStack() as stack:
        stack.enter_context(_other(tmp_path / "foreign", [1]))
        taken = stack.enter_context(socket.socket(socket.AF_UNIX))
        taken.bind(str(tmp_path / "taken"))
        taken.listen(0)
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
        waiting.connect(str(tmp_path / "taken"))
        (tmp_path / "file").touch()
        own = strange.answers(query_name={"name": "own"})
        stack.enter_context(strange.monitor(tmp_path / "own", own))
        names = ("foreign", "none", "file", "taken", "own")
        _found(monkeypatch, *(tmp_path / name for name in names))
        assert stack.enter_context(_open_found()).name() == "own"


def test_all_that_was_tried_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _other(tmp_path / "foreign", [1]) as other:
        _found(monkeypatch, tmp_path / "foreign", tmp_path / "none")
        with pytest.raises(LayoutUnknownError) as caught:
            monitors.open_found(os.getpid())
    for words in (f"process {other}", "No such file", "none of the monitors"):
        assert words in caught.value.message


def test_no_monitor_at_all() -> None:
    assert monitors.open_found(os.getpid()) is None


def test_monitor_that_somebody_else_holds_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtetool.vmm.qmp.GREETING_SECONDS", 0.1)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen(1)  # it accepts, and says nothing
        with pytest.raises(LayoutUnknownError, match="another client"):
            monitors.open_given(os.getpid(), tmp_path / "s")


def test_paths_of_any_length_and_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 200) / ("y" * 200)
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    with strange.monitor(Path("s"), strange.answers(), clients=3):
        monitors.open_given(os.getpid(), deep / "s").close()
        for address in ("s", "../" + "y" * 200 + "/./s"):
            _found(monkeypatch, address)
            _open_found().close()


@pytest.mark.parametrize("padding", ["", ",tight=off"])
def test_abstract_sockets(monkeypatch: pytest.MonkeyPatch, padding: str) -> None:
    name = f"mtetool-{os.getpid()}"
    address = "\0" + name
    with strange.monitor(Path(address.ljust(108, "\0") if padding else address), strange.answers()):
        _found(monkeypatch, f"{name},abstract=on{padding}")
        _open_found().close()


def test_links_stay_within_the_root(tmp_path: Path) -> None:
    """As in the root directory of a container, seen from outside."""
    root = tmp_path / "root"
    (root / "run").mkdir(parents=True)
    (root / "run/real").write_text("inside")
    (tmp_path / "outside").write_text("outside")
    (root / "absolute").symlink_to("/run/real")
    (root / "up").symlink_to("../../../run/real")
    (root / "out").symlink_to(tmp_path / "outside")
    (root / "magic").symlink_to("/proc/self/root/etc/passwd")
    for name in ("/run/real", "/absolute", "/up", "/../run/../run/real", "absolute"):
        file = unix_sockets.open_in(root, name)
        assert unix_sockets.read_regular(file, 100) == b"inside"
        os.close(file)
    for name in ("/out", "/../outside", "/magic", "/none", "/run/real/x"):
        with pytest.raises(OSError, match=name):
            unix_sockets.open_in(root, name)


def test_config_files_are_read_as_far_as_they_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = (
        f'[chardev "m"]\n backend = "socket"\n path = "{tmp_path}/s"\n server = "on"\n'
        '[mon]\n chardev = "m"\n mode = "control"\n[name]\n guest = "configured"\n'
    )
    (tmp_path / "config").write_text(config)
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("w") as huge:
        huge.truncate(1 << 40)
    names = ("none", "pipe", "huge", "", "config")
    words = [word for name in names for word in ("-readconfig", str(tmp_path / name))]
    monkeypatch.setattr(proc, "command_line", lambda pid: ["qemu", *words])
    with strange.monitor(tmp_path / "s", strange.answers()):
        _open_found().close()
    assert monitors.name_of(os.getpid()) == "configured"


def test_thousands_of_monitors_are_not_all_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _found(monkeypatch, *(tmp_path / str(number) for number in range(1000)))
    with pytest.raises(LayoutUnknownError) as caught:
        monitors.open_found(os.getpid())
    assert caught.value.message.count("No such file") == 8


def test_names_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "command_line", lambda pid: ["qemu", "-name", "x" * 5000])
    assert monitors.name_of(os.getpid()) == "x" * 1024
