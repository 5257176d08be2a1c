"""`proc:PID`: the tags of a process's own memory, on the real kernel."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.lab.guests import as_user, start_test_vmm
from tests.lab.machine import Machine
from tests.lab.processes import SET, SIZE, Outcome, Tagged, commands, pattern
from tests.lab.stride import ENVIRONMENT, enough

# The states of a process's threads while they are frozen, and after the thaw.
_FREEZE = """
import json, os, sys
from mtetool.backends import open_guest
from mtetool.vmm import proc

def states(pid):
    found = []
    for tid in proc.activities(pid):
        with open(f"/proc/{pid}/task/{tid}/stat") as stat:
            found.append(stat.read().rpartition(")")[2].split()[0])
    return found

pid = int(sys.argv[1])
with open_guest(f"proc:{pid}") as guest:
    guest.info()
    guest.freeze()
    held = states(pid)
    guest.thaw()
os.sched_yield()
print(json.dumps([held, states(pid)]))
"""

# Copy again and again, and now and then stop all threads, until all signals have been sent.
_VISITS = """
import os, sys
import numpy as np
from mtetool.backends import open_guest

out = np.zeros(256, dtype=np.uint8)
with open_guest(f"proc:{sys.argv[1]}") as guest:
    while not os.path.exists("/tmp/sent"):
        for _ in range(50):
            assert guest.read_tags(int(sys.argv[2], 0), out) == 4096
        guest.freeze()
        guest.thaw()
"""

# mtetool, with a signal to the process between two of its copies.
_MEANWHILE = """
import os, signal, sys, time
from mtetool.__main__ import main
from mtetool.backends.proc.guest import ProcessGuest

read, calls = ProcessGuest.read_tags, []

def is_there(maps):
    try:
        return os.pread(maps, 1, 0)
    except ProcessLookupError:
        return False

def reading(self, ipa, out, **more):
    calls.extend([ipa] * (len(out) > 0))  # a copy of nothing asks whether MTE is on
    if len(calls) == 3:
        os.kill(self.pid, signal.Signals[WHAT])
        while is_there(self._space._maps):
            time.sleep(0.01)
    return read(self, ipa, out, **more)

ProcessGuest.read_tags = reading
sys.exit(main())
"""


def _statuses(outcomes: list[Outcome]) -> list[int]:
    return [outcome.status for outcome in outcomes]


def _refused(lab: Machine, *words: str) -> Any:
    (outcome,) = commands(lab, ["mtetool", *words, "--json"])
    assert outcome.status == 4, outcome
    return outcome.error


def _no_kernel_warnings(lab: Machine) -> None:
    """Check for kernel warnings, which would bring down a host with panic_on_warn."""
    assert lab.sh("dmesg | grep WARNING; true").stdout == b""


def test_save_has_the_tags_that_the_program_set(lab: Machine) -> None:
    # The kernel warns once per boot.
    lab.sh("mount -t debugfs debugfs /sys/kernel/debug; echo 1 >/sys/kernel/debug/clear_warn_once")
    program = Tagged(lab)
    resident = ["sh", f"grep -A4 {program.maps['untouched'][0]:x}- /proc/{program.pid}/smaps"]
    names = (*SET, "untouched")
    before, saved, after, info, *dumps = commands(
        lab,
        resident,
        ["mtetool", "save", program.source, "-o", "/tmp/s", "--json"],
        resident,
        ["mtetool", "info", "/tmp/s", "--json"],
        *(program.dump("/tmp/s", name) for name in names),
    )
    program.unharmed()
    assert saved.status == 0, saved
    assert (saved.json["consistent"], saved.json["missing"]) == (False, [])
    for name, outcome in zip(names, dumps, strict=True):
        expected = pattern() if name in SET else np.zeros_like(pattern())
        assert np.array_equal(outcome.tags, expected), name
    # Pages that were never touched are still not allocated.
    assert b"Rss:                   0 kB" in before.raw
    assert after.raw == before.raw
    left_out = [slot["ipa"] for slot in saved.json["skipped_memslots"]]
    assert left_out == [program.maps["hidden"][0], program.maps["reserved"][0]]
    assert (info.json["source"], info.json["name"]) == (program.source, "tagged")
    readonly = [slot["ipa"] for slot in info.json["memslots"] if slot["readonly"]]
    assert readonly == [program.maps["mirror"][0]]
    assert len(info.json["memslots"]) == len(program.maps) - 1  # all but `plain`
    _no_kernel_warnings(lab)


def test_restore_is_exact_and_diff_tells(lab: Machine) -> None:
    program = Tagged(lab)
    resident = f"awk '/^Rss/ {{ s += $2 }} END {{ print s }}' /proc/{program.pid}/smaps"
    restore = ["mtetool", "restore", "/tmp/s", program.source, "--json"]
    verify = ["mtetool", "verify", "/tmp/s", "--against", program.source]
    diff = ["mtetool", "diff", "/tmp/s", program.source, "--json"]
    outcomes = commands(
        lab,
        ["mtetool", "save", program.source, "-o", "/tmp/s"],
        diff,
        ["sh", resident],
        restore,
        ["sh", resident],
        program.paint("scratch", 9),
        program.paint("untouched", 4),
        verify,
        diff,
        [*restore, "--dry-run"],
        restore,
        verify,
        program.dump(program.source, "scratch"),
        program.dump(program.source, "untouched"),
    )
    program.unharmed()
    assert _statuses(outcomes) == [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0], outcomes
    _, same, before, _, after, _, _, _, differs, dry, told, _, scratch, untouched = outcomes
    assert same.json["ranges"] == []
    # Where the tags were right, nothing was written, so no memory was allocated.
    assert after.raw == before.raw
    differing = 16 * int((pattern() != 9).sum()) + SIZE
    assert sum(row["size_bytes"] for row in differs.json["ranges"]) == differing
    assert sum(row["size_bytes"] for row in dry.json["changes"]) == differing
    assert (told.json["readonly_bytes"], told.json["readonly_differing"]) == (SIZE, [])
    assert np.array_equal(scratch.tags, pattern())
    assert not untouched.tags.any()
    _no_kernel_warnings(lab)


def test_dump_and_diff_show_what_the_program_changes(lab: Machine) -> None:
    program = Tagged(lab)
    at, _ = program.maps["scratch"]
    _, _, dump, diff = commands(
        lab,
        ["mtetool", "save", program.source, "-o", "/tmp/s"],
        ["sh", f"kill -USR2 {program.pid}; sleep 0.3"],
        ["mtetool", "dump", program.source, "--range", f"{at + 48:#x}:96"],
        ["mtetool", "diff", "/tmp/s", program.source],
    )
    rows = [row.split()[1:] for row in dump.raw.decode().splitlines()]
    assert rows == [["0x10", "8"], ["0x40", "f"], ["0x10", "b"]]
    before = [[f"{tag:x}", "f"] for tag in pattern()[4:8] if tag != 15]
    assert [row.split()[2:] for row in diff.raw.decode().splitlines()] == before
    program.unharmed()


def test_freeze_stops_all_threads_and_lets_them_go(lab: Machine) -> None:
    program = Tagged(lab, "--threads 3 --churn")
    save = ["mtetool", "save", program.source, "--freeze", "-o", "/tmp/s", "--json"]
    watch = ["python3", "-c", _FREEZE, str(program.pid)]
    saved, *dumps = commands(lab, save, *(program.dump("/tmp/s", name) for name in SET))
    held, let_go = json.loads(lab.run(watch, env=ENVIRONMENT, check=True).stdout)
    assert saved.status == 0, saved
    assert saved.json["consistent"] is True
    assert saved.json["frozen_seconds"] > 0
    for name, outcome in zip(SET, dumps, strict=True):
        assert np.array_equal(outcome.tags, pattern()), name
    assert len(held) >= 4
    assert set(held) == {"t"}
    assert "t" not in let_go
    program.unharmed()


@pytest.mark.parametrize(
    "step", ["thaw/detach", pytest.param("visit/detach", marks=pytest.mark.long)]
)
def test_nobody_waits_for_one_that_is_stopped(lab: Machine, step: str) -> None:
    """mtetool is killed if it gets SIGSTOP while it holds all threads or the one that copies."""
    program = Tagged(lab, "--threads 3")
    freeze = ["--freeze"] if step.startswith("thaw") else []
    result = lab.run(
        ["mtetool", "save", program.source, *freeze, "-o", "/tmp/s"],
        env={"MTETOOL_FAULT": f"STOP@{step}"},
        fork=False,  # the variable is read at the start
    )
    assert result.returncode == -9, result
    program.unharmed()
    lab.mtetool(f"save {program.source} -o /tmp/s --force")


def test_a_stopped_process_stays_stopped(lab: Machine) -> None:
    program = Tagged(lab)
    stop = (
        f"kill -STOP {program.pid}; until grep -q 'State:.T' /proc/{program.pid}/status; do :; done"
    )
    lab.sh(stop)
    stopped = program.status().count("State:\tT (stopped)")
    assert stopped == 3
    save = ["mtetool", "save", program.source, "-o", "/tmp/s", "--json"]
    restore = ["mtetool", "restore", "/tmp/s", program.source]
    outcomes = commands(
        lab, save, [*save, "--freeze", "--force"], program.paint("scratch", 7), restore
    )
    assert _statuses(outcomes) == [0, 0, 0, 0], outcomes
    assert [outcome.json["consistent"] for outcome in outcomes[:2]] == [True, True]
    assert program.status().count("State:\tT (stopped)") == stopped
    lab.sh(f"kill -CONT {program.pid}")
    program.unharmed()


@pytest.mark.long
def test_another_process_takes_the_tags_at_its_own_addresses(lab: Machine) -> None:
    old, new = Tagged(lab, name="old"), Tagged(lab, name="new")
    vm = start_test_vmm(lab, "0x40000000:0x100000")
    moved = f"{old.maps['scratch'][0]:#x}={new.maps['scratch'][0]:#x}"
    save = ["mtetool", "save", old.source, "-o", "/tmp/s", "--range", old.range_of("scratch")]
    restore = ["mtetool", "restore", "/tmp/s", new.source, "--json"]
    to_vm = ["mtetool", "restore", "/tmp/s", f"kvm:{vm}", "--memslot", "0x40000000:1M", "--json"]
    _, _, elsewhere, there, dump, refused = commands(
        lab,
        old.paint("scratch", 6),
        save,
        restore,
        [*restore, "--map", moved],
        new.dump(new.source, "scratch"),
        to_vm,
    )
    assert (elsewhere.status, elsewhere.error["error"]) == (4, "layout")
    assert there.status == 0, there
    assert (dump.tags == 6).all()
    assert (refused.status, refused.error["error"]) == (4, "layout")
    new.unharmed()


@pytest.mark.parametrize(
    ("signal", "words"),
    [
        ("SIGKILL", b"ended while mtetool was working on it"),
        ("SIGUSR1", b"executed another program (execve)"),
    ],
)
def test_a_process_that_is_gone_in_the_middle(lab: Machine, signal: str, words: bytes) -> None:
    program = Tagged(lab)
    script = f"WHAT = {signal!r}\n{_MEANWHILE}"
    command = ["python3", "-c", script, "save", program.source, "-o", "/tmp/s"]
    result = lab.run(command, env=ENVIRONMENT)
    said = result.stdout + result.stderr
    assert result.returncode == 4, said
    assert words in said
    assert f"the tags of {2 * SIZE} bytes had been read".encode() in said
    assert lab.sh("ls -A /tmp | grep '^[.]*s$'; true").stdout == b""


def test_signals_come_once_and_in_order(lab: Machine) -> None:
    program = Tagged(lab)
    send = (
        "import ctypes, time\nlibc = ctypes.CDLL(None)\nfor n in range(1000):\n"
        f"    libc.sigqueue({program.pid}, 34, ctypes.c_void_p(n))\n    time.sleep(0.002)\n"
        "open('/tmp/sent', 'w')\n"
    )
    lab.put("/tmp/send.py", send.encode())
    lab.sh("python3 /tmp/send.py >/dev/null 2>&1 &")
    words = [str(program.pid), hex(program.maps["private"][0])]
    lab.run(["python3", "-c", _VISITS, *words], env=ENVIRONMENT, check=True)
    program.unharmed()
    assert program.signals() == 1000


@pytest.mark.long
def test_four_runs_at_the_same_time(lab: Machine) -> None:
    program = Tagged(lab)
    lab.sh(
        "for i in 1 2 3 4; do"
        f" {{ mtetool save {program.source} -o /tmp/s$i; echo $? >>/tmp/ends; }} & done; wait"
    )
    assert lab.get("/tmp/ends").split() == [b"0"] * 4
    program.unharmed()


def test_death_before_every_step_is_harmless(lab: Machine) -> None:
    program = Tagged(lab)
    command = ["python3", "-m", "tests.lab.process_deaths", str(program.pid)]
    result = lab.run(
        [*command, hex(program.maps["scratch"][0])], timeout=400, env=ENVIRONMENT, check=True
    )
    found = json.loads(result.stdout)
    print({key: found[key] for key in found if key != "wanted"})
    assert found["harmed"] == {}, found["wanted"]
    assert found["last_status"] == 0
    assert found["deaths"] >= enough(15)
    seen = set(found["steps"])
    assert seen > {"visit/seize", "visit/peekmtetags", "visit/pokemtetags", "thaw/detach"}
    program.unharmed()


def test_a_process_that_dies_at_any_step_is_let_go_and_told_of(lab: Machine) -> None:
    command = ["python3", "-m", "tests.lab.process_deaths", "--process"]
    result = lab.run(command, timeout=400, env=ENVIRONMENT, check=True)
    found = json.loads(result.stdout)
    print(found)
    assert found["stuck"] == []
    assert found["statuses"] == {"4": found["deaths"]}
    assert found["deaths"] >= enough(10)


# --- refusals -----------------------------------------------------------------------------


def test_no_memory_with_tags(lab: Machine) -> None:
    program = Tagged(lab)
    asked = [
        ["save", "proc:1", "-o", "/tmp/t"],
        ["save", "proc:1", "-o", "/tmp/t", "--range", "0x400000:4096"],
        ["dump", "proc:1"],
        ["diff", "/tmp/s", "proc:1"],
        ["verify", "/tmp/s", "--against", "proc:1"],
        ["restore", "/tmp/s", "proc:1"],
    ]
    _, enabled, refused, told, *outcomes = commands(
        lab,
        ["mtetool", "save", program.source, "-o", "/tmp/s"],
        ["mtetool", "enable", program.source],
        ["mtetool", "enable", "proc:1", "--json"],
        ["mtetool", "save", program.source, "--memslot", "0:4096", "-o", "/tmp/t", "--json"],
        *(["mtetool", *words, "--json"] for words in asked),
    )
    for words, outcome in zip(asked, outcomes, strict=True):
        assert (outcome.status, outcome.error["error"]) == (4, "mte-off"), words
        assert "no memory with tags (PROT_MTE)" in outcome.error["message"]
    assert enabled.raw.endswith(b"MTE was already on\n")
    assert (refused.status, refused.error["error"]) == (4, "mte-unsupported")
    assert (told.status, told.error["error"]) == (2, "usage")


def test_a_32_bit_program(lab: Machine) -> None:
    # An ELF file of one segment: mov r7, #29; svc #0; b . (it pauses)
    code = bytes.fromhex("1d70a0e3 000000ef feffffea")
    size = 52 + 32 + len(code)
    halves = (2, 40), (1, 0x10054, 52, 0, 0x5000400), (52, 32, 1, 0, 0, 0)
    header = b"\x7fELF\x01\x01\x01".ljust(16, b"\0")
    for width, numbers in zip((2, 4, 2), halves, strict=True):
        header += b"".join(number.to_bytes(width, "little") for number in numbers)
    segment = (1, 0, 0x10000, 0x10000, size, size, 5, 0x1000)
    lab.put("/tmp/arm", header + np.array(segment, dtype="<u4").tobytes() + code, 0o755)
    pid = int(lab.sh("/tmp/arm >/dev/null 2>&1 & echo $!; sleep 0.2; kill -0 $!").stdout)
    told = _refused(lab, "dump", f"proc:{pid}")
    lab.sh(f"kill {pid}")
    assert told["error"] == "mte-off"
    assert f"process {pid} (arm)" in told["message"]


def test_what_is_no_process(lab: Machine) -> None:
    program = Tagged(lab)
    tid = int(lab.sh(f"ls /proc/{program.pid}/task | tail -1").stdout)
    names = ("proc:2", f"proc:{tid}", "proc:4194303", "proc:self")
    kernel, thread, nobody, word, itself = commands(
        lab,
        *(["mtetool", "dump", name, "--json"] for name in names),
        ["sh", 'exec sh -c "exec mtetool dump proc:\\$\\$ --json"'],
    )
    assert kernel.error["error"] == "not-a-process"
    assert (thread.error["error"], thread.error["hint"]) == ("not-a-process", program.source)
    assert nobody.error["error"] == "no-such-process"
    assert "is mtetool itself" in itself.error["message"]
    assert _statuses([kernel, thread, nobody, itself, word]) == [4, 4, 4, 4, 2]


@pytest.mark.parametrize(
    ("program", "error", "words"),
    [
        (
            "pid = os.fork() or os._exit(0)\n"
            "os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)\n"
            "print(pid, flush=True)\ntime.sleep(1000)\n",
            "no-such-process",
            "has ended",
        ),
        (
            "threading.Thread(target=lambda: time.sleep(1000)).start()\n"
            "print(os.getpid(), flush=True)\nctypes.CDLL(None).syscall(93, 0)\n",
            "attach-refused",
            "main thread has ended",
        ),
    ],
    ids=["process", "main-thread"],
)
def test_what_has_ended(lab: Machine, program: str, error: str, words: str) -> None:
    lab.put("/tmp/p.py", f"import ctypes, os, threading, time\n{program}".encode())
    started = lab.sh(
        "python3 /tmp/p.py >/tmp/pid & echo $!; until [ -s /tmp/pid ]; do sleep 0.1; done;"
        " until grep -q 'State:.Z' /proc/$(cat /tmp/pid)/status; do sleep 0.1; done"
    )
    told = _refused(lab, "dump", f"proc:{int(lab.get('/tmp/pid'))}")
    lab.sh(f"kill -KILL {int(started.stdout)}")
    assert told["error"] == error
    assert words in told["message"]


@pytest.mark.long
def test_who_may_not(lab: Machine) -> None:
    program = Tagged(lab)
    refused = lab.run(as_user(lab, 1000, "mtetool", "dump", program.source, "--json"))
    told = json.loads(refused.stderr)
    assert (refused.returncode, told["error"], told["reason"]) == (4, "permission", "other-user")
    tracer = (
        "import ctypes, time\n"
        f"assert ctypes.CDLL(None).ptrace(0x4206, {program.pid}, None, None) == 0\n"
        "print('on', flush=True)\ntime.sleep(1000)\n"
    )
    lab.put("/tmp/tracer.py", tracer.encode())
    started = lab.sh(
        "python3 /tmp/tracer.py >/tmp/on & echo $!; until grep -q on /tmp/on; do sleep 0.1; done"
    )
    outcomes = commands(
        lab,
        ["mtetool", "save", program.source, "-o", "/tmp/s", "--json"],
        ["mtetool", "save", "--freeze", program.source, "-o", "/tmp/s", "--json"],
    )
    lab.sh(f"kill -KILL {int(started.stdout)}")
    for outcome in outcomes:
        assert outcome.status == 4, outcome
        assert (outcome.error["error"], outcome.error["tracer"]) == ("busy", int(started.stdout))
    program.unharmed()
