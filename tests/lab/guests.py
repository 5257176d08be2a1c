"""VMMs that run in the lab: QEMU with the tagger guest, and the VMM that does nothing."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from tests.lab.machine import Machine

QEMU = "qemu-system-aarch64"
_START_SECONDS = 300.0  # after that it must be hung, however busy the machine is
_CHECK = re.compile(rb"check=(\d+) granules=(\d+) wrong=(\d+) data_wrong=(\d+)\n")
_BECOME = """
import os, sys
uid = int(sys.argv[1])
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
os.execvp(sys.argv[2], sys.argv[2:])
"""
_IPA = re.compile(rb"TAGGER ipa (\d+) (0x[0-9a-f]+)\n")


@dataclass(frozen=True, slots=True)
class Check:
    """The tagger's findings in one round over its memory."""

    number: int
    granules: int
    wrong: int
    data_wrong: int


class Tagger(ABC):
    """A VM whose guest reports on its serial console; see `programs/tagger.c`."""

    lab: Machine
    name: str

    @property
    @abstractmethod
    def console(self) -> str:
        """The file that the guest's serial console goes to."""

    def output(self) -> bytes:
        """Return all that the guest has printed so far."""
        return self.lab.run(["cat", self.console]).stdout.replace(b"\r", b"")

    def checks(self) -> list[Check]:
        """Return the rounds that the guest has reported so far."""
        return [Check(*map(int, match)) for match in _CHECK.findall(self.output())]

    def wait_for_checks(self, count: int = 2) -> list[Check]:
        """Wait until the guest has reported that many more rounds; return them."""
        seen = len(self.checks())
        deadline = time.monotonic() + _START_SECONDS
        while len(checks := self.checks()) < seen + count:
            assert time.monotonic() < deadline, f"{self.name} is silent: {self.output()!r}"
            time.sleep(0.2)
        return checks[seen:]

    def ipas(self) -> dict[int, int]:
        """Guest physical addresses of tagged pages, by the page's number."""
        return {int(page): int(ipa, 16) for page, ipa in _IPA.findall(self.output())}

    def wait_for(self, text: bytes) -> None:
        """Wait until the guest has printed that."""
        deadline = time.monotonic() + _START_SECONDS
        while text not in self.output():
            assert time.monotonic() < deadline, f"{self.name} printed only {self.output()!r}"
            time.sleep(0.2)


@dataclass
class Qemu(Tagger):
    """A named QEMU in a lab machine, with the tagger or another guest.

    `mte` gives it mte=on; without it, QEMU waits in -preconfig for `mtetool enable`, or is
    started by `wrapper`, or `program` is not QEMU itself. It runs as the user `uid`, who may use
    /dev/kvm.
    """

    lab: Machine
    name: str
    mte: bool = True
    memory: str = "256M"
    extra: str = ""
    guest_options: str = ""
    initrd: str = "/lab/guest.cpio"
    cpu: str = "host"
    uid: int = 0
    wrapper: str = ""
    program: str = QEMU
    pid: int = field(init=False)

    @property
    def qmp_path(self) -> str:
        """The monitor's socket."""
        return f"/tmp/{self.name}.qmp"

    @property
    def console(self) -> str:
        """The file that the guest's serial console goes to."""
        return f"/tmp/{self.name}.log"

    def command(self) -> str:
        """The command line that starts it."""
        machine = "virt,gic-version=3" + (",mte=on" if self.mte else "")
        become = " ".join(as_user(self.lab, self.uid))
        waits = not (self.mte or self.wrapper) and self.program == QEMU
        return (
            f"{become} {self.wrapper} {self.program}"
            f" -M {machine} -accel kvm -cpu {self.cpu} -m {self.memory} -nodefaults -display none"
            f" -kernel /lab/Image -initrd {self.initrd}"
            # The guest's kernel protects nothing here; that would only take time.
            f" -append 'console=ttyAMA0 quiet rodata=off lsm= {self.guest_options}'"
            f" -serial file:{self.console} -qmp unix:{self.qmp_path},server=on,wait=off"
            f" {'-preconfig' if waits else ''} {self.extra}"
        )

    def start(self) -> Qemu:
        """Start it, and wait for its monitor."""
        result = self.lab.sh(
            f"{self.command()} >/tmp/{self.name}.out 2>&1 & echo $!;"
            f" until [ -S {self.qmp_path} ] || ! kill -0 $!; do sleep 0.1; done; kill -0 $!"
        )
        self.pid = int(result.stdout)
        return self

    def wait_for_machine(self) -> Qemu:
        """Wait until it has created its vCPUs and memory: only then does it answer this."""
        self.qmp("query-cpus-fast")
        return self

    def qmp(self, *words: str) -> bytes:
        """Run a QMP command with the example script's own client."""
        script = 'set -e; eval "$(sed -n \'/^qmp() {/,/^}/p\' $0)"; qmp "$@"'
        example = "/opt/mtetool/examples/migrate-qemu.sh"
        command = ["sh", "-c", script, example, self.qmp_path, *words]
        return self.lab.run(command, check=True).stdout


def page_bytes(lab: Machine) -> int:
    """Return the page size of a lab machine."""
    script = "import mmap; print(mmap.PAGESIZE)"
    return int(lab.run(["python3", "-c", script], check=True).stdout)


def as_user(lab: Machine, uid: int, *words: str) -> list[str]:
    """Return the command line that runs `words` as that user, who may use /dev/kvm."""
    if not uid:
        return list(words)
    lab.sh("chmod 666 /dev/kvm; chmod 1777 /tmp")
    lab.put("/tmp/become.py", _BECOME.encode())
    return ["python3", "/tmp/become.py", str(uid), *words]


# Kill all but init, the agent ($PPID), this shell, and kernel threads, which have no program. No
# process is started for it: with one for each process examined, this took 1.5 s after each test.
_KILL_ALL = """
for round in kill check; do
    for process in /proc/[0-9]*; do
        pid=${process#/proc/}
        case $pid in 1 | $$ | $PPID) continue ;; esac
        [ -e $process/exe ] || continue
        [ $round = kill ] || exit 1
        kill -KILL $pid
    done
done
"""


def kill_vmms(lab: Machine) -> None:
    """End all VMMs and everything else that runs and would take the CPU from the next test."""
    deadline = time.monotonic() + _START_SECONDS
    while lab.sh(_KILL_ALL, check=False).returncode:
        assert time.monotonic() < deadline, "a process cannot be killed"


def start_test_vmm(lab: Machine, *words: str, wrapper: str = "") -> int:
    """Start the VMM that does nothing, by `wrapper`; return its PID. `kill_vmms` ends it."""
    result = lab.sh(
        "rm -f /tmp/vmm.in; mkfifo /tmp/vmm.in; : >/tmp/vmm.out;"
        " sleep 100000 >/tmp/vmm.in 2>/dev/null &"
        f" {wrapper} /lab/testvmm {' '.join(words)} </tmp/vmm.in >/tmp/vmm.out 2>&1 & echo $!;"
        " until grep -q ready /tmp/vmm.out || ! kill -0 $!; do sleep 0.1; done;"
        " cat /tmp/vmm.out >&2"
    )
    assert b"ready" in result.stderr, result.stderr
    return int(result.stdout)


def fill_with_random_tags(lab: Machine, pid: int, size: str) -> None:
    """Give a test VMM's memory, `size` from 0x40000000 on, tags that do not compress."""
    lab.mtetool(
        f"emu create /tmp/e --memory {size} --fill random",
        "save emu:/tmp/e -o /tmp/r",
        f"restore /tmp/r kvm:{pid} --memslot 0x40000000:{size}",
    )
