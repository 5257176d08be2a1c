"""A lab machine: boot it, run commands in it, shut it down.

The emulated host has EL2 and MTE, so KVM inside it offers MTE to its guests. A command's output
and status come over a separate port (`inside/agent.py`); the console is only shown if the machine
is lost.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.lab.disk import make_ext4
from tests.lab.images import (
    DEFAULT_KERNEL,
    DEFAULT_LIBVIRT,
    Images,
    emulator_words,
    images,
)

_CHECKOUT = Path(__file__).parents[2]
_BOOT_SECONDS = 120.0
_GRACE_SECONDS = 120.0  # the agent may have modules to load
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", ".*_cache", ".hypothesis")

Sink = Callable[[bytes], object]


class MachineLostError(Exception):
    """The machine ended or stopped answering; that is not a verdict on what ran in it."""


class CommandTimeoutError(Exception):
    """A command exceeded its timeout; it was killed, and the machine goes on."""


@dataclass(frozen=True, slots=True)
class Cable:
    """One of the two ends, 1 and 2, of a network between two machines.

    `directory` is for both; it holds the sockets that their Ethernet frames go through.
    """

    directory: Path
    end: int

    @property
    def address(self) -> str:
        """The address of the machine at this end, on its eth0."""
        return f"10.0.0.{self.end}"

    def words(self) -> list[str]:
        """The emulator's options."""
        ways = [
            f"{side}.type=unix,{side}.path={self.directory / f'end{end}'}"
            for side, end in (("local", self.end), ("remote", 3 - self.end))
        ]
        device = f"virtio-net-pci,netdev=cable,mac=52:54:00:00:00:0{self.end},romfile="
        return ["-netdev", f"dgram,id=cable,{','.join(ways)}", "-device", device]


class Machine:
    """A booted lab machine; a context manager. `boot_seconds` is until it took commands.

    `with_dir` appears as /with; `cable` connects it to another machine; `keep_writes` makes changes
    of the root disk permanent.
    Raises LabUnavailableError, MachineLostError.
    """

    def __init__(
        self,
        *,
        kernel: str = DEFAULT_KERNEL,
        libvirt: str = DEFAULT_LIBVIRT,
        memory: str = "4G",
        cpus: int = 2,
        with_dir: Path | None = None,
        cable: Cable | None = None,
        images: Images | None = None,
        keep_writes: bool = False,
    ) -> None:
        self._images = images or _default_images(kernel, libvirt)
        self._memory = memory
        self._cpus = cpus
        self._with_dir = with_dir
        self.cable = cable
        self._keep_writes = keep_writes
        self.boot_seconds = 0.0

    def __enter__(self) -> Self:
        self._scratch = tempfile.TemporaryDirectory(prefix="mtetool-lab-")
        try:
            self._start()
            if self.cable is not None:
                self.sh(f"ifconfig eth0 {self.cable.address} netmask 255.255.255.0 up")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if value is None:
            self._say_goodbye()
        self._stop()

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float = 120.0,
        stdin: bytes = b"",
        check: bool = False,
        env: dict[str, str] | None = None,
        fork: bool = True,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command and collect its output and its status, -N if signal N ended it.

        mtetool, and Python programs of the checkout, are forked from a process that has loaded
        their modules (see `tests.lab.forked`), unless `fork` is false.
        Raises CommandTimeoutError, MachineLostError; CalledProcessError with `check`.
        """
        out, err = bytearray(), bytearray()
        self._request(argv, timeout, env, fork=fork)
        status = self._follow(argv, out.extend, err.extend, timeout, stdin)
        result = subprocess.CompletedProcess(list(argv), status, bytes(out), bytes(err))
        if check and status:
            text = err.decode(errors="replace") or out.decode(errors="replace")
            raise AssertionError(f"{' '.join(argv)} ended with {status}:\n{text}")
        return result

    def mtetool(self, *lines: str, timeout: float = 120.0) -> None:
        """Run command lines of mtetool one after the other; each must succeed."""
        for line in lines:
            self.run(["mtetool", *line.split()], timeout=timeout, check=True)

    def sh(
        self, script: str, *, timeout: float = 120.0, check: bool = True
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a shell script."""
        return self.run(["sh", "-c", script], timeout=timeout, check=check)

    def stream(
        self,
        argv: Sequence[str],
        stdout: Sink,
        stderr: Sink,
        *,
        timeout: float,
        stdin: bytes = b"",
        env: dict[str, str] | None = None,
    ) -> int:
        """Run a command, passing on its output as it comes; return its status as `run` does."""
        self._request(argv, timeout, env)
        return self._follow(argv, stdout, stderr, timeout, stdin)

    def _follow(
        self, argv: Sequence[str], stdout: Sink, stderr: Sink, timeout: float, stdin: bytes
    ) -> int:
        self._send(b"I", stdin)
        deadline = time.monotonic() + timeout + _GRACE_SECONDS
        sinks = {b"O": stdout, b"E": stderr}
        while True:
            kind, payload = self._receive(deadline)
            if kind == b"X":
                break
            sinks[kind](payload)
        end = json.loads(payload)
        if end["timeout"]:
            raise CommandTimeoutError(f"{' '.join(argv)} ran longer than {timeout:.0f} s")
        return int(end["status"])

    @contextmanager
    def talk(
        self, argv: Sequence[str], *, timeout: float = 3600.0, answer_seconds: float = 120.0
    ) -> Iterator[Talk]:
        """Start a command that answers each line of its input with a line, and end it afterwards.

        `timeout` is for all of it, `answer_seconds` for one answer. Raises MachineLostError, and
        AssertionError with its standard error if it ends too early or fails.
        """
        self._request(argv, timeout, None, talk=True)
        self._send(b"I", b"")
        talk = Talk(self, answer_seconds)
        try:
            yield talk
        finally:
            talk.end()

    def _request(
        self,
        argv: Sequence[str],
        timeout: float,
        env: dict[str, str] | None,
        *,
        talk: bool = False,
        fork: bool = True,
    ) -> None:
        request = {"argv": list(argv), "timeout": timeout, "cwd": "/root", "env": env or {}}
        self._send(b"R", json.dumps({**request, "talk": talk, "fork": fork}).encode())

    def put(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a file in the machine."""
        script = 'mkdir -p "${1%/*}" && cat > "$1" && chmod "$2" "$1"'
        self.run(["sh", "-c", script, "put", path, f"{mode:o}"], stdin=data, check=True)

    def get(self, path: str) -> bytes:
        """Read a file of the machine."""
        return self.run(["cat", path], check=True).stdout

    # --- the emulator -----------------------------------------------------------------

    def _start(self) -> None:
        started = time.monotonic()
        directory = Path(self._scratch.name)
        self._console = directory / "console.log"
        run_image = self._run_image(directory)
        port = directory / "agent.sock"
        command = [
            *emulator_words(self._images.emulator),
            *_hardware(self._memory, self._cpus),
            *_disk("root", self._images.root, snapshot=not self._keep_writes),
            *_disk("run", run_image, snapshot=True),
            *("-kernel", str(self._images.kernel), "-initrd", str(self._images.initramfs)),
            *("-append", "console=ttyAMA0 quiet panic=-1"),
            *("-serial", f"file:{self._console}"),
            *("-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=agent,path={port},server=on,wait=off"),
            *("-device", "virtserialport,chardev=agent,name=agent"),
            *(self.cable.words() if self.cable is not None else ()),
        ]
        log = (directory / "emulator.log").open("wb")
        with log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,
            )
        deadline = started + _BOOT_SECONDS
        self._socket = self._connect(port, deadline)
        kind, _ = self._receive(deadline)
        if kind != b"H":
            raise self._lost(f"the agent began with {kind!r}")
        self.boot_seconds = time.monotonic() - started

    def _run_image(self, directory: Path) -> Path:
        """Make the second disk: this checkout, the lab's own files, and the user's files."""
        tree = directory / "run"
        for name in ("mtetool", "tests", "examples"):
            if (_CHECKOUT / name).is_dir():
                shutil.copytree(_CHECKOUT / name, tree / "checkout" / name, ignore=_IGNORED)
        shutil.copy(_CHECKOUT / "pyproject.toml", tree / "checkout")
        shutil.copy(self._images.extension, tree / "checkout" / "mtetool")
        if self._images.bytecode is not None:
            shutil.copytree(self._images.bytecode, tree / "checkout", dirs_exist_ok=True)
        shutil.copytree(Path(__file__).parent / "inside", tree / "inside", ignore=_IGNORED)
        for program in (tree / "inside").iterdir():
            program.chmod(0o755)
        shutil.copytree(self._images.programs, tree / "programs")
        if self._with_dir is None:
            (tree / "with").mkdir()
        else:
            shutil.copytree(self._with_dir, tree / "with", symlinks=True)
        return make_ext4(tree, directory / "run.img", spare_bytes=16 << 20)

    def _connect(self, path: Path, deadline: float) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        while True:
            try:
                connection.connect(str(path))
            except OSError:
                # The emulator creates the socket before it boots, unless it does not even start.
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise self._lost("the emulator did not start") from None
                time.sleep(0.005)
            else:
                return connection

    def _say_goodbye(self) -> None:
        try:
            self._send(b"Q", b"")
            self._process.wait(_GRACE_SECONDS)
        except (MachineLostError, subprocess.TimeoutExpired):
            if self._keep_writes:
                raise

    def _stop(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None:
            process.kill()
            process.wait()
        if hasattr(self, "_socket"):
            self._socket.close()
        self._scratch.cleanup()

    # --- the port ---------------------------------------------------------------------

    def _send(self, kind: bytes, payload: bytes) -> None:
        try:
            self._socket.settimeout(_GRACE_SECONDS)
            self._socket.sendall(struct.pack(">cI", kind, len(payload)) + payload)
        except OSError as error:
            raise self._lost(f"it accepts no commands: {error}") from error

    def _receive(self, deadline: float) -> tuple[bytes, bytes]:
        kind, length = struct.unpack(">cI", self._read_exactly(5, deadline))
        return kind, self._read_exactly(length, deadline)

    def _read_exactly(self, length: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < length:
            left = deadline - time.monotonic()
            try:
                self._socket.settimeout(max(left, 0.001))
                piece = self._socket.recv(length - len(data))
            except TimeoutError:
                raise self._lost("it does not answer") from None
            except OSError as error:
                raise self._lost(str(error)) from error
            if not piece:
                raise self._lost("it ended")
            data += piece
        return bytes(data)

    def _lost(self, why: str) -> MachineLostError:
        console = ""
        for name in ("console.log", "emulator.log"):
            path = Path(self._scratch.name) / name
            if path.exists():
                console += "\n".join(path.read_text(errors="replace").splitlines()[-25:])
        return MachineLostError(f"the lab machine is lost: {why}\n{console}")


class Talk:
    """A command that runs in a machine and is queried line by line; see `Machine.talk`."""

    def __init__(self, machine: Machine, answer_seconds: float) -> None:
        self._machine = machine
        self._answer_seconds = answer_seconds
        self._out = bytearray()
        self._err = bytearray()
        self._end: dict[str, object] | None = None

    def ask(self, line: bytes) -> bytes:
        """Send a line and wait for the answer."""
        self._machine._send(b"I", line + b"\n")
        return self.line()

    def line(self) -> bytes:
        """Return the next line that it prints."""
        deadline = time.monotonic() + self._answer_seconds
        while b"\n" not in self._out and self._end is None:
            self._hear(deadline)
        line, newline, rest = self._out.partition(b"\n")
        assert newline, f"it ended with {self._end}: {self._err.decode(errors='replace')}"
        self._out = bytearray(rest)
        return bytes(line)

    def end(self) -> None:
        """Close its input, and wait for its end."""
        if self._end is None:
            self._machine._send(b"I", b"")
        deadline = time.monotonic() + self._answer_seconds
        while self._end is None:
            self._hear(deadline)
        text = self._err.decode(errors="replace")
        assert self._end["status"] == 0, f"it ended with {self._end}: {text}"

    def _hear(self, deadline: float) -> None:
        kind, payload = self._machine._receive(deadline)
        if kind == b"X":
            self._end = json.loads(payload)
        else:
            (self._out if kind == b"O" else self._err).extend(payload)


def shell(
    kernel: str = DEFAULT_KERNEL,
    libvirt: str = DEFAULT_LIBVIRT,
    memory: str = "4G",
    with_dir: Path | None = None,
) -> int:
    """Run a machine with a prompt on this terminal, until its shell ends."""
    machine = Machine(kernel=kernel, libvirt=libvirt, memory=memory, with_dir=with_dir)
    found = machine._images
    with tempfile.TemporaryDirectory(prefix="mtetool-lab-") as scratch:
        command = [
            *emulator_words(found.emulator),
            *_hardware(memory, machine._cpus),
            *_disk("root", found.root, snapshot=True),
            *_disk("run", machine._run_image(Path(scratch)), snapshot=True),
            *("-kernel", str(found.kernel), "-initrd", str(found.initramfs)),
            *("-append", "console=ttyAMA0 quiet panic=-1 lab.shell"),
            *("-chardev", "stdio,id=tty,signal=off", "-serial", "chardev:tty"),
        ]
        return subprocess.run(command, check=False).returncode


def _default_images(kernel: str, libvirt: str) -> Images:
    return images(kernel, libvirt=libvirt)


def _hardware(memory: str, cpus: int) -> list[str]:
    machine = "virt,virtualization=on,mte=on,gic-version=3"
    words = f"-M {machine} -cpu max -accel tcg,thread=multi -smp {cpus} -m {memory}"
    return [*words.split(), "-nodefaults", "-no-reboot", "-display", "none"]


def _disk(name: str, path: Path, *, snapshot: bool) -> list[str]:
    kept = "on" if snapshot else "off"
    drive = f"if=none,id={name},file={path},format=raw,snapshot={kept}"
    return ["-drive", drive, "-device", f"virtio-blk-pci,drive={name}"]


def _die_with_parent() -> None:
    # A killed test run must not leave emulators behind.
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def report(text: str) -> None:
    """Print a line for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)
