"""Processes that say they run a domain of libvirt, as anybody can."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import pytest

from mtetool.vmm import proc
from tests.vmm.fake_libvirt import UUID


@contextmanager
def pretender(
    uuid: str = UUID, name: str = "web", opens: TextIO | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process with the command line of a QEMU that libvirt has started, and a file open."""
    program = "import sys; print('ready', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", program, "-name", f"guest={name},debug-threads=on", "-S"]
    with subprocess.Popen(
        [*words, "-uuid", uuid], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=opens
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def as_if_with_vm(monkeypatch: pytest.MonkeyPatch, *fds: int) -> None:
    """Show these file descriptors of every process as VMs."""
    find = proc.find

    def found(pid: int) -> proc.VmmProcess:
        process = find(pid)
        return proc.VmmProcess(pid, process.start_time, process.program, fds, 1)

    monkeypatch.setattr(proc, "find", found)
