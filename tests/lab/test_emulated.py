"""Tags of guests that QEMU emulates, and of a process that crashed: files of QEMU and Linux."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import run
from tests.formats.test_debuggers import gdb, lldb
from tests.lab import cpio
from tests.lab.images import emulator, emulator_words, images

_PROGRAMS = Path(__file__).parent / "programs"
_BASE, _TAGGED, _LAST = 0x4000_0000, 0x4020_0000, 0x44FF_F000
_SIZE = 80 << 20


class Emulated:
    """A running QEMU, asked through its monitor."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        guest = directory / "guest.elf"
        flags = ["-nostdlib", "-static", "-Wl,-Ttext=0x40080000", "-Wl,--build-id=none"]
        compiler = ["aarch64-linux-gnu-gcc", *flags, "-o", str(guest)]
        subprocess.run([*compiler, str(_PROGRAMS / "emulated.S")], check=True)
        words = f"-M virt,mte=on -cpu max -accel tcg -m {_SIZE >> 20}M -display none -nodefaults"
        for name in ("qmp", "gdb"):
            words += f" -{name} unix:{directory}/{name},server=on,wait=off"
        words += f" -kernel {guest}"
        self.process = subprocess.Popen([*emulator(), *words.split()])
        self._monitor = socket.socket(socket.AF_UNIX)
        self._monitor.settimeout(60)
        self._until(self._connects)
        self._lines = self._monitor.makefile("rw")
        self._lines.readline()
        self.ask("qmp_capabilities")
        self._until(lambda: "0x0000600d" in self.say("xp /1wx 0x40180000"))

    def _connects(self) -> bool:
        assert self.process.poll() is None
        with suppress(OSError):
            self._monitor.connect(f"{self.directory}/qmp")
            return True
        return False

    def _until(self, done: Any) -> None:
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def ask(self, command: str, **arguments: Any) -> Any:
        """Give a command to the monitor and return its answer."""
        request = {"execute": command, "arguments": arguments}
        self._lines.write(json.dumps(request) + "\n")
        self._lines.flush()
        while True:
            answer = json.loads(self._lines.readline())
            if "event" not in answer:
                return answer["return"]

    def say(self, line: str) -> str:
        """Give a command to the monitor for people."""
        return str(self.ask("human-monitor-command", **{"command-line": line}))

    def migrate(self, path: Path) -> None:
        """Write a migration to a file."""
        self.ask("migrate", uri=f"exec:cat > {path}")
        self._until(lambda: self.ask("query-migrate").get("status") == "completed")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._monitor.close()


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulated]:
    guest = Emulated(tmp_path_factory.mktemp("emulated"))
    yield guest
    guest.end()


def test_a_gdb_stub_tells_tags_and_the_guest_goes_on(emulated: Emulated, tmp_path: Path) -> None:
    assert emulated.ask("query-status")["running"]
    words = ("--from", "gdb", "--range", f"{_TAGGED:#x}:64K", "--range", f"{_LAST:#x}:4K")
    stub = emulated.directory / "gdb"
    assert run("convert", stub, *words, "-o", tmp_path / "s").status == 0
    raw = run("dump", tmp_path / "s", "--output", "raw").raw
    assert raw == bytes(n % 16 for n in range(4096)) + b"\x07" * 256
    assert emulated.ask("query-status")["running"]
    # This is not mapped: addresses are virtual.
    far = ("--from", "gdb", "--range", "0x90000000:4K")
    done = run("convert", stub, *far, "-o", tmp_path / "m", "--json")
    assert (done.status, done.json["missing_bytes"]) == (3, 4096)


def test_a_migrations_tags_and_a_dumps_memory(emulated: Emulated, tmp_path: Path) -> None:
    emulated.ask("stop")
    for flag in (False, True):
        emulated.ask("dump-guest-memory", paging=flag, protocol=f"file:{tmp_path}/{flag}.elf")
    # QEMU knows only physical addresses of arm64 guests, with paging too.
    assert (tmp_path / "True.elf").read_bytes() == (tmp_path / "False.elf").read_bytes()
    emulated.migrate(tmp_path / "migration")
    done = run("convert", tmp_path / "migration", "-o", tmp_path / "s", "--json")
    assert (done.status, done.json["converted_bytes"]) == (0, _SIZE)
    rows = run("dump", tmp_path / "s", "--json").json["runs"]
    runs = [(row["ipa"], row["size_bytes"], row["tag"]) for row in rows]
    assert runs[0] == (_BASE, _TAGGED - _BASE + 16, 0)
    wanted = [(_TAGGED + 16 * n, 16, n % 16) for n in range(1, 4096)]
    after = _TAGGED + 4096 * 16
    assert runs[1:] == [*wanted, (after, _LAST - after, 0), (_LAST, 4096, 7)]
    core = tmp_path / "x.core"
    words = ("--to", "core", "--merge", tmp_path / "True.elf", "-o", core)
    assert run("convert", tmp_path / "s", *words).status == 0
    text = gdb(
        core,
        "x/1xwm 0x40180000",
        "info registers pc",
        *(f"memory-tag print-allocation-tag {_TAGGED + 16 * n:#x}" for n in range(32)),
        f"memory-tag check {7 << 56 | _LAST:#x}",
    )
    assert "0x40180000:\t0x0000600d" in text
    assert re.search(r"pc +0x400800[0-9a-f]+", text)
    tags = [int(tag, 16) for tag in re.findall(r"\$\d+ = 0x(.)", text)]
    assert tags == [n % 16 for n in range(32)]
    assert "match (0x7)" in text
    text = lldb(core, f"memory tag read {_TAGGED:#x} {_TAGGED + 256:#x}")
    assert re.findall(r"\): 0x(.)", text) == [f"{n:x}" for n in range(16)]


@pytest.mark.long
def test_the_core_of_a_process_that_crashed(tmp_path: Path) -> None:
    """Linux writes it; a mapping that is not dumped has a segment without tags."""
    flags = ["-O2", "-Wall", "-Werror", "-Wno-unused-result", "-static", "-march=armv8.5-a+memtag"]
    program = tmp_path / "crash"
    source = str(_PROGRAMS.parent / "crash.c")
    subprocess.run(["aarch64-linux-gnu-gcc", *flags, "-o", str(program), source], check=True)
    directories = [cpio.Entry.directory(name) for name in ("dev", "proc")]
    init = cpio.Entry.program("init", program.read_bytes())
    (tmp_path / "root.cpio").write_bytes(cpio.archive([*directories, init]))
    parts = images()
    words = "-M virt,mte=on -cpu max,pauth=off -m 256M -display none -nodefaults -no-reboot"
    words += f" -serial file:{tmp_path}/console -kernel {parts.kernel} -initrd {tmp_path}/root.cpio"
    command = [*emulator_words(parts.emulator), *words.split(), "-append", "console=ttyAMA0 quiet"]
    subprocess.run(command, check=True, timeout=300)
    console = (tmp_path / "console").read_bytes()
    core = bytes.fromhex(console.partition(b"BEGIN")[2].partition(b"END")[0].decode())
    (tmp_path / "core").write_bytes(core)
    done = run("convert", tmp_path / "core", "-o", tmp_path / "s", "--json")
    tagged, undumped = 0x5000_0000_0000, 0x5000_0001_0000
    missing = [(item["ipa"], item["size_bytes"]) for item in done.json["missing"]]
    assert (done.status, missing) == (3, [(undumped, 4096)])
    raw = run("dump", tmp_path / "s", "--output", "raw", "--range", f"{tagged:#x}:8K").raw
    assert raw == bytes(n * 3 % 16 for n in range(512))
    # gdb reads the same from the core itself.
    text = gdb(
        tmp_path / "core",
        *(f"memory-tag print-allocation-tag {tagged + 16 * n:#x}" for n in range(16)),
    )
    assert [int(tag, 16) for tag in re.findall(r"\$\d+ = 0x(.)", text)] == list(raw[:16])
