"""Stand in for a compressor: with tags where a guest has some, otherwise the real program.

libvirt saves a domain through a program of its PATH (`zstd -c`), and restores it through
`zstd -dc`. libvirt's daemon finds a stand-in of that name first, whose arguments say which of the
two is wanted. In doubt whether a guest has tags, it fails: then the save fails, and the domain goes
on.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mtetool.errors import GuestError, UsageError, host_error
from mtetool.relay import guests
from mtetool.relay.saved import MAGIC, read_fully
from mtetool.relay.saving import Source, open_source, wait_for_stream
from mtetool.relay.stream import BEGINNING
from mtetool.vmm.descriptors import pipe_holders
from mtetool.vmm.host import host_facts

Task = Literal["compress", "decompress"]
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class StandIn:
    """A stand-in, by the path under which it was started, and its arguments."""

    path: str
    arguments: Sequence[str]

    @property
    def task(self) -> Task | None:
        """What a compressor does with these arguments; None for anything else (`--help`)."""
        letters = "".join(
            word[1:] for word in self.arguments if word[:1] == "-" and word[1:2] != "-"
        )
        if "d" in letters or {"--decompress", "--uncompress"} & set(self.arguments):
            return "decompress"
        return "compress" if "c" in letters or "--stdout" in self.arguments else None

    def program(self) -> str:
        """The real program: the first of this name in PATH that is not the stand-in itself.

        Raises UsageError.
        """
        name = Path(self.path).name
        for directory in os.get_exec_path():
            found = shutil.which(name, path=directory or os.curdir)
            if found and not _is_same(found, self.path):
                return found
        raise UsageError(
            f"{self.path} stands in for {name}, and there is no other program of that name in PATH",
            hint=f"install {name}",
        )

    def become_program(self) -> None:
        """Become the real program, in this process, with the same arguments. Raises HostError."""
        program = self.program()
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
            signal.signal(number, signal.SIG_DFL)
        sys.stderr.flush()
        try:
            os.execv(program, [program, *self.arguments])  # noqa: S606 - its purpose
        except OSError as error:
            raise host_error(error, f"{program} cannot be executed") from error

    def decompress(self, before: bytes, fd: int, out: int) -> int:
        """Run the real program with `before` and the rest of `fd` as its standard input.

        If it fails, QEMU at the other end of `out` does, too. Returns its exit status. Raises
        UsageError, HostError.
        """
        status = None
        try:
            status = self._run(before, fd)
        finally:
            if status != 0:
                _let_fail(out)
        return status if status >= 0 else 128 - status

    def _run(self, before: bytes, fd: int) -> int:
        program = self.program()
        stdin = subprocess.PIPE if before else fd
        try:
            with subprocess.Popen([program, *self.arguments], stdin=stdin) as process:
                try:
                    if process.stdin:
                        with process.stdin:
                            _pump(before, fd, process.stdin.fileno())
                    return process.wait()
                except BaseException:
                    process.kill()
                    raise
        except OSError as error:
            raise host_error(error, program) from error


def tagged_source(fd: int, wanted: guests.Wanted) -> Source | None:
    """The guest whose stream comes from a pipe, if it has MTE; None if nobody's tags are in it.

    Nothing is read from the pipe. Raises GuestError.
    """
    if not stat.S_ISFIFO(os.fstat(fd).st_mode) or not wait_for_stream(fd):
        return None
    if wanted.name is None:
        if _host_has_no_mte():
            return None
        writers = pipe_holders(fd, writers=True)
        if not writers:
            raise GuestError(
                "nobody is seen at the other end of the pipe on standard input, so it is unknown"
                " whether a guest with tags is",
                hint="run mtetool as root",
            )
        if not guests.vmms(writers):
            return None  # QEMU without KVM moves tags by itself
    source = open_source(fd, wanted)
    if source.ready is None:
        source.guest.close()
        return None
    return source


def _host_has_no_mte() -> bool:
    facts = host_facts()
    return facts.mte is False or facts.machine != "aarch64"


def begins_with_tags(fd: int) -> tuple[bool, bytes]:
    """Whether the input is a file of ours, and what had to be read from it to know that.

    Raises HostError.
    """
    try:
        place = os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:  # a pipe
        place = None
    try:
        if place is None:
            before = read_fully(lambda n: os.read(fd, n), len(MAGIC))
            return before == MAGIC, before
        return os.pread(fd, len(MAGIC), place) == MAGIC, b""
    except OSError as error:
        raise host_error(error, "standard input") from error


def _let_fail(out: int) -> None:
    """Let the QEMU that reads from a pipe fail, whose stream was cut before its end.

    Perhaps before its beginning, without which QEMU would wait. After it, these bytes are nothing
    that completes a stream.
    """
    poll = select.poll()
    poll.register(out, select.POLLOUT)
    # A pipe that is full, or has no reader, needs no more.
    if stat.S_ISFIFO(os.fstat(out).st_mode) and poll.poll(0) == [(out, select.POLLOUT)]:
        with suppress(OSError):
            os.write(out, BEGINNING)


def _pump(before: bytes, fd: int, out: int) -> None:
    piece = before or os.read(fd, _PIECE_BYTES)
    while piece:
        left = memoryview(piece)
        while left:
            try:
                left = left[os.write(out, left) :]
            except BrokenPipeError:
                return  # its status says why
        piece = os.read(fd, _PIECE_BYTES)


def _is_same(found: str, path: str) -> bool:
    try:
        return os.path.samefile(found, path)  # noqa: PTH121
    except OSError:
        return False
