"""A QEMU on this machine, without KVM, whose migration stream goes to the test."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.lab.images import KERNELS, emulator

# 10.0 and 11.1.
SUITES = sorted({kernel.suite for kernel in KERNELS.values()})
_SECONDS = 30.0
_PLAIN = ("-M", "virt", "-cpu", "max", "-m", "64M")
# What a destination says on the return path when all is well: type 1 (SHUT), 4 bytes, 0.
_ALL_IS_WELL = bytes((0, 1, 0, 4, 0, 0, 0, 0))


class Qemu:
    """A QEMU whose vCPUs do not run until it is asked for that."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes]) -> None:
        self._directory = directory
        self._process = process
        ours, self._listener = directory / "qmp", socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory / "stream"))
        self._listener.listen()
        self._listener.settimeout(_SECONDS)
        self._monitor = _connected(ours, process)
        self._lines = self._monitor.makefile("rb")
        self._lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: object) -> Any:
        """Ask the monitor; return its answer."""
        self.request(command, **arguments)
        while True:
            answer = json.loads(self._lines.readline())
            if "error" in answer:
                raise RuntimeError(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]

    def request(self, command: str, **arguments: object) -> None:
        """Ask the monitor, and do not wait for its answer."""
        request = {"execute": command, "arguments": arguments}
        self._monitor.sendall(json.dumps(request).encode())

    def wait_until_written(self, ipa: int) -> None:
        """Wait until a word of the guest's memory is not 0."""
        deadline = time.monotonic() + _SECONDS
        while (
            self.ask("human-monitor-command", **{"command-line": f"xp /1wd {ipa}"}).split()[1]
            == "0"
        ):
            assert time.monotonic() < deadline, "the guest does not run"
            time.sleep(0.01)

    def switch_on(self, *capabilities: str) -> None:
        """Switch on capabilities of migrations."""
        states = [{"capability": name, "state": True} for name in capabilities]
        self.ask("migrate-set-capabilities", capabilities=states)

    @contextmanager
    def migrating(self) -> Iterator[socket.socket]:
        """Begin to migrate; give the connection that its stream comes from."""
        self.ask("migrate", uri=f"unix:{self._directory / 'stream'}")
        with self.accepted() as connection:
            yield connection

    @contextmanager
    def accepted(self) -> Iterator[socket.socket]:
        """Give the next connection that its migration makes."""
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(_SECONDS)
            yield connection

    def stream(self, *capabilities: str) -> bytes:
        """Migrate; return the whole stream. A return path gets what a destination says at last."""
        self.switch_on(*capabilities)
        with self.migrating() as connection:
            if "return-path" in capabilities:
                connection.sendall(_ALL_IS_WELL)
            received = bytearray()
            while piece := connection.recv(1 << 20):
                received += piece
        return bytes(received)

    def close(self) -> None:
        """End it."""
        self._lines.close()
        self._monitor.close()
        self._listener.close()
        self._process.kill()
        self._process.wait()


@contextmanager
def qemu(directory: Path, suite: str, *options: str) -> Iterator[Qemu]:
    """Start the QEMU of a Debian suite; `options` come in place of a plain guest of 64 MiB."""
    command = [
        *emulator(suite),
        *(options or _PLAIN),
        *("-accel", "tcg", "-S", "-nodefaults", "-display", "none"),
        *("-qmp", f"unix:{directory / 'qmp'},server=on,wait=off"),
    ]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        found = Qemu(directory, process)
    except BaseException:
        process.kill()
        process.wait()
        raise
    try:
        yield found
    finally:
        found.close()


def _connected(path: Path, process: subprocess.Popen[bytes]) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_SECONDS)
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            connection.connect(str(path))
        except OSError:
            log = (path.parent / "log").read_text(errors="replace")
            assert process.poll() is None, f"QEMU did not start: {log}"
            assert time.monotonic() < deadline, f"QEMU has no monitor: {log}"
            time.sleep(0.01)
        else:
            return connection
