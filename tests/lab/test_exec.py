"""`mtetool exec`: the VM has MTE, and otherwise the VMM is as if it had been started plainly."""

from __future__ import annotations

import json

import pytest

from tests.lab.guests import Qemu
from tests.lab.machine import Machine
from tests.lab.stride import ENVIRONMENT, enough
from tests.lab.tracer import TRACER

# Run as another user, who may not use perf events: mtetool then watches every call.
_AS_USER = """
import os, sys
os.setgroups([])
os.setgid(1000)
os.setuid(1000)
os.execvp(sys.argv[1], sys.argv[1:])
"""

# Everything that a process is started with, except what differs between any two processes.
_STATE = """
cd /proc/$1
grep -vE '^(Pid|Tgid|Ngid|NS[a-z]*|PPid|Vm|Huge|.*ctxt_|Rss|SigQ)' status
for fd in $(ls fd | sort -n); do echo $fd $(readlink fd/$fd) $(grep flags fdinfo/$fd); done
tr '\\0' '\\n' <environ
tr '\\0' '\\n' <cmdline
readlink cwd root exe
cat limits oom_score_adj personality cgroup
echo children $(cat task/$1/children)
set -- $(cut -d')' -f2- stat) $1
echo parent $2 group $3 session $4 terminal $5 nice ${17} ${18}
"""

# Start a program from a shell with unusual settings, and show its state.
_START = """
trap '' HUP USR2
umask 027
cd /tmp
exec 9</dev/null
export ODD='a b' LC_ALL=C
ulimit -n 777
rm -f in out; mkfifo in
sleep 1000 >in 2>/dev/null &
holder=$!
exec 8<in
"$@" /lab/newvms 1 <&8 >out 2>&1 &
vmm=$!
until grep -q ready out; do kill -0 $vmm || break; sleep 0.1; done
while grep -qsx mtetool /proc/[0-9]*/comm; do sleep 0.1; done
sed "s/\\b$$\\b/SHELL/g; s/\\b$vmm\\b/VMM/g" <<END
$(sh -c "$state" state $vmm)
END
kill $holder
wait $vmm
echo status $?
"""

# A parent that acts like a shell: it sees its child stop, and continues it.
_STOPPED = """
import os, signal, subprocess, sys, time
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
_, status = os.waitpid(child.pid, os.WUNTRACED)
print("stopped" if os.WIFSTOPPED(status) else status, flush=True)
time.sleep(0.3)
open("/tmp/allowed", "w").close()
child.send_signal(signal.SIGCONT)
print("status", child.wait(), flush=True)
"""

# A VMM whose standard error is not a pipe, or is a pipe that nobody reads.
_STDERR = """
import os, socket, subprocess, sys, time
kind = sys.argv[1]
if kind == "file":
    # Not opened for appending, as by `2>FILE`.
    theirs = os.open("/tmp/err", os.O_WRONLY | os.O_CREAT)
    ours = os.open("/tmp/err", os.O_RDONLY)
elif kind == "socket":
    ours, theirs = (end.detach() for end in socket.socketpair())
else:
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    try:
        while True:
            os.write(theirs, bytes(4096))
    except BlockingIOError:
        os.set_blocking(theirs, True)
if kind != "full":
    os.write(theirs, b"before\\n")
command = ["mtetool", "exec", "--wait", "0.5", "--", "sleep", "1000"]
vmm = subprocess.Popen(command, stderr=theirs)
os.close(theirs)

def traced():
    with open(f"/proc/{vmm.pid}/status") as status:
        return "TracerPid:\\t0" not in status.read()

def name():
    with open(f"/proc/{vmm.pid}/comm") as comm:
        return comm.read()

while name() != "sleep\\n" or traced():
    time.sleep(0.01)
if kind == "full":
    print("let go")
else:
    print(os.read(ours, 1000).decode())
vmm.kill()
"""


def _run(lab: Machine, *words: str) -> tuple[str, int, str]:
    """Run `mtetool exec` with those words: standard output, status, standard error."""
    result = lab.run(["mtetool", "exec", *words])
    return result.stdout.decode(), result.returncode, result.stderr.decode()


@pytest.mark.parametrize(
    "words",
    [
        "-- /lab/newvms 2",
        pytest.param("/lab/newvms 2", marks=pytest.mark.long),
        pytest.param("--every-call -- /lab/newvms 2", marks=pytest.mark.long),
        "-- /lab/newvms --thread 2",
        "-- /lab/newvms --fork 2",
        "-- /lab/newvms --late 2",
        "--every-call -- /lab/newvms --fork --thread 2",
        "-- sh /tmp/script 2",
        "-- sh /tmp/exec-script 2",
    ],
)
def test_the_first_vm_has_mte_whoever_makes_it(lab: Machine, words: str) -> None:
    lab.put("/tmp/script", b'date >/dev/null; (cat </dev/null); /lab/newvms "$@"\n')
    lab.put("/tmp/exec-script", b'date | cat >/dev/null; exec /lab/newvms "$@"\n')
    expected = "vm 1 mte=1\nvm 2 mte=0\nready\n"
    assert _run(lab, *words.split()) == (expected, 7, "")


@pytest.mark.parametrize("every_call", [[], ["--every-call"]])
def test_another_vm_can_be_chosen(lab: Machine, every_call: list[str]) -> None:
    words = ["--vm", "2", *every_call, "--", "/lab/newvms", "3"]
    assert _run(lab, *words) == ("vm 1 mte=0\nvm 2 mte=1\nvm 3 mte=0\nready\n", 7, "")


def test_a_number_that_an_earlier_vm_had(lab: Machine) -> None:
    words = ["--vm", "2", "--", "/lab/newvms", "--again", "1"]
    assert _run(lab, *words) == ("vm 1 mte=1\nready\n", 7, "")


@pytest.mark.parametrize("scope", [0, 1])
def test_another_user_with_access_to_kvm(lab: Machine, scope: int) -> None:
    lab.put("/tmp/as_user.py", _AS_USER.encode())
    yama = "/proc/sys/kernel/yama/ptrace_scope"
    before = "mode=$(stat -c %a /dev/kvm); chmod 666 /dev/kvm"
    after = f"status=$?; chmod $mode /dev/kvm; echo 0 >{yama}; exit $status"
    command = "python3 /tmp/as_user.py mtetool exec -- /lab/newvms 1 </dev/null"
    result = lab.sh(f"{before}; echo {scope} >{yama}; {command}; {after}", check=False)
    assert (result.stdout, result.returncode) == (b"vm 1 mte=1\nready\n", 7), result.stderr


def test_the_vmm_is_as_if_started_plainly(lab: Machine) -> None:
    found = {}
    for name, words in (
        ("plain", []),
        ("exec", ["mtetool", "exec", "--"]),
        ("every call", ["mtetool", "exec", "--every-call", "--"]),
    ):
        result = lab.run(["sh", "-c", _START, "start", *words], env={"state": _STATE})
        assert b"status 7\n" in result.stdout, result
        found[name] = result.stdout.decode().splitlines()
    assert any(line.startswith("SigIgn:\t0000000000000807") for line in found["plain"])
    assert "TracerPid:\t0" in found["plain"]
    assert found["exec"] == found["plain"]
    assert found["every call"] == found["plain"]


@pytest.mark.parametrize("every_call", [[], ["--every-call"]])
def test_signals_of_the_start_arrive_once(lab: Machine, every_call: list[str]) -> None:
    words = [*every_call, "--", "/lab/newvms", "--handler", "1"]
    assert _run(lab, *words) == ("vm 1 mte=1\nusr1=3 urg=1 winch=1\nready\n", 7, "")


def test_signals_that_threads_send_each_other_all_the_time(lab: Machine) -> None:
    words = ["--", "/lab/newvms", "--urgent", "1"]
    assert _run(lab, *words) == ("urgent lost=0\nvm 1 mte=1\nready\n", 7, "")


@pytest.mark.parametrize(
    ("number", "every_call"),
    [
        (9, ""),
        (15, "--every-call"),
        pytest.param(9, "--every-call", marks=pytest.mark.long),
        pytest.param(15, "", marks=pytest.mark.long),
    ],
)
def test_a_signal_ends_a_vmm_that_starts(lab: Machine, number: int, every_call: str) -> None:
    words = f"{every_call} -- sh".split()
    result = lab.run(["mtetool", "exec", *words, "-c", f"kill -{number} $$; echo alive"])
    assert (result.returncode, result.stdout) == (-number, b"")


def test_a_vmm_that_is_stopped_while_it_starts(lab: Machine) -> None:
    script = "kill -STOP $$; ls /tmp/allowed; exec /lab/newvms 1"
    words = ["mtetool", "exec", "--", "sh", "-c", script]
    result = lab.run(["python3", "-c", _STOPPED, *words], timeout=60)
    assert result.stdout == b"stopped\n/tmp/allowed\nvm 1 mte=1\nready\nstatus 7\n"


def test_stdio_passes_through(lab: Machine) -> None:
    words = ["mtetool", "exec", "--", "sh", "-c", "cat; echo error >&2; exit 3"]
    result = lab.run(words, stdin=b"in\0put")
    assert (result.returncode, result.stdout, result.stderr) == (3, b"in\0put", b"error\n")


def test_vm_that_cannot_have_mte(lab: Machine) -> None:
    out, status, error = _run(lab, "--", "/lab/newvms", "--deny", "1")
    assert (out, status) == ("vm 1 errno=95 open=0\nready\n", 7)
    assert "seccomp filter" in error
    assert "so the VMM gets no VM" in error
    out, status, error = _run(lab, "--no-require", "--", "/lab/newvms", "--deny", "1")
    assert (out, status) == ("vm 1 mte=0\nready\n", 7)
    assert "continues without MTE" in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/lab/newvms", "--keep"], "does not allow ioctl"),
        (["/lab/newvms", "--deny", "--late"], "does not allow ioctl"),
        (["--user", "/lab/newvms", "--deny"], "cannot be read"),
    ],
)
def test_vm_that_can_neither_have_mte_nor_be_closed(
    lab: Machine, words: list[str], said: str
) -> None:
    lab.put("/tmp/as_user.py", _AS_USER.encode())
    lab.sh("chmod 666 /dev/kvm")
    become = ["python3", "/tmp/as_user.py"] if words[0] == "--user" else []
    program = [word for word in words if word != "--user"]
    result = lab.run([*become, "mtetool", "exec", "--", *program, "1"])
    assert (result.returncode, result.stdout) == (-9, b"")
    assert said in result.stderr.decode()
    assert b"so mtetool killed the VMM" in result.stderr


def test_whatever_goes_wrong_there_is_no_vm_without_mte(lab: Machine) -> None:
    command = ["python3", "-m", "tests.lab.start_errors"]
    result = lab.run(command, timeout=300, env=ENVIRONMENT, check=True)
    found = json.loads(result.stdout)
    print(found)
    assert found["wrong"] == {}
    assert found["errors"] > enough(10)


def test_no_vm_in_time(lab: Machine) -> None:
    result = lab.sh(
        "mtetool exec --wait 0.5 -- sleep 1000 2>/tmp/err & until grep -q try /tmp/err; do"
        " sleep 0.1; done; while grep -qsx mtetool /proc/[0-9]*/comm; do sleep 0.1; done;"
        " grep TracerPid /proc/$!/status; kill $!; wait $!; cat /tmp/err"
    )
    assert result.stdout.startswith(b"TracerPid:\t0\nmtetool: no VM was made within 0.5 seconds")


def test_nobody_waits_for_the_companion(lab: Machine) -> None:
    show = (
        "for p in $(grep -lx mtetool /proc/[0-9]*/comm | cut -d/ -f3); do"
        " readlink /proc/$p/cwd; for f in /proc/$p/fd/*; do readlink $f; done;"
        " cut -d')' -f2- /proc/$p/stat | cut -d' ' -f6; done"
    )
    lab.put("/tmp/background", b"sleep 1000 <&- >/dev/null 2>&1 & echo in the background\n")
    out = lab.sh(
        "exec 7</tmp/background; cd /tmp;"
        f" mtetool exec --wait 1000 --no-require -- sh /tmp/background 2>&1 | cat; {show}"
    ).stdout.decode()
    started, cwd, *held, terminal = out.splitlines()
    assert (started, cwd, terminal) == ("in the background", "/", "0")
    assert set(held) - {"anon_inode:[perf_event]"} == {"/dev/null"}


def test_the_probe_of_a_manager_ends_at_once(lab: Machine) -> None:
    """As libvirt asks a new QEMU for its capabilities: that QEMU never creates a VM."""
    qemu = (
        "qemu-system-aarch64 -S -no-user-config -nodefaults -nographic -machine none,accel=tcg"
        " -qmp unix:/tmp/probe.qmp,server=on,wait=off -pidfile /tmp/pid -daemonize"
    )
    command = f"mtetool exec --wait 1000 --no-require -- {qemu} 2>&1 | cat"
    result = lab.sh(f"{command}; grep TracerPid /proc/$(cat /tmp/pid)/status")
    assert result.stdout.startswith(b"TracerPid:\t")
    assert result.stdout != b"TracerPid:\t0\n"  # it is still watched
    ended = "until ! kill -0 $(cat /tmp/pid) && ! grep -qsx mtetool /proc/[0-9]*/comm; do :; done"
    lab.sh(f"kill $(cat /tmp/pid); {ended} 2>/dev/null")


@pytest.mark.parametrize("kind", ["file", "socket", "full"])
def test_what_is_reported_goes_where_the_vmm_writes(lab: Machine, kind: str) -> None:
    result = lab.run(["python3", "-c", _STDERR, kind], check=True)
    if kind == "full":
        assert result.stdout == b"let go\n"
    else:
        assert result.stdout.startswith(b"before\nmtetool: no VM was made within 0.5 seconds")


def test_standard_streams_that_are_closed(lab: Machine) -> None:
    script = "mtetool exec -- sh -c 'ls -l /proc/self/fd/ >/tmp/fds; /lab/newvms 1 >/tmp/out'"
    lab.sh(f"({script}) 0<&- 1>&- 2>&-", check=False)
    assert lab.get("/tmp/out") == b"vm 1 mte=1\nready\n"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("-- /no/such", 2, "no program /no/such"),
        ("-- no-such", 2, "in PATH"),
        ("-- /etc/passwd", 2, "not an executable"),
        ("-- /tmp/no-format", 2, "cannot be executed"),
        ("--vm 0 -- true", 2, "--vm"),
        ("--", 2, "Missing argument"),
    ],
)
def test_what_cannot_be_started(lab: Machine, words: str, status: int, said: str) -> None:
    lab.put("/tmp/no-format", b"\x7fELF but no more", 0o755)
    out, found, error = _run(lab, *words.split())
    assert (out, found) == ("", status)
    assert said in error


def test_a_start_that_is_traced_already(lab: Machine) -> None:
    result = lab.run(["python3", "-c", TRACER, "mtetool", "exec", "--", "echo", "started"])
    assert (result.returncode, result.stdout) == (4, b""), result.stderr
    assert b"traced by process" in result.stderr


def test_blocked_signals_stay_blocked_and_stop_no_timer(lab: Machine) -> None:
    script = (
        "import os, signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGTERM])\n"
        "os.execvp(sys.argv[1], sys.argv[1:])\n"
    )
    show = "grep SigBlk /proc/self/status; read line; true"
    lab.sh("mkfifo /tmp/in; sleep 1000 >/tmp/in 2>/dev/null & echo $! >/tmp/holder")
    lab.put("/tmp/blocking.py", script.encode())
    result = lab.sh(
        f"python3 /tmp/blocking.py mtetool exec --wait 0.5 -- sh -c '{show}' </tmp/in 2>/tmp/err &"
        " until grep -q try /tmp/err; do sleep 0.1; done; kill $(cat /tmp/holder); wait $!"
    )
    assert result.stdout == b"SigBlk:\t0000000000006000\n"


def test_vmm_that_is_started_with_all_signals_blocked(lab: Machine) -> None:
    script = (
        "import os, signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n"
        "os.execvp(sys.argv[1], sys.argv[1:])\n"
    )
    command = ["python3", "-c", script, "mtetool", "exec", "--", "/lab/newvms", "1"]
    result = lab.run(command)
    assert (result.stdout, result.stderr) == (b"vm 1 mte=1\nready\n", b"")


def test_host_without_kvm(lab: Machine) -> None:
    hidden = "mv /dev/kvm /dev/no; {}; status=$?; mv /dev/no /dev/kvm; exit $status"
    result = lab.sh(hidden.format("mtetool exec -- echo started"), check=False)
    assert (result.returncode, result.stdout) == (4, b"")
    assert b"/dev/kvm cannot be opened: ENOENT" in result.stderr
    result = lab.sh(hidden.format("mtetool exec --no-require -- echo started"), check=False)
    assert (result.returncode, result.stdout) == (0, b"started\n")
    assert b"/dev/kvm cannot be opened" in result.stderr


def test_qemu_without_mte_has_a_guest_with_mte(lab: Machine) -> None:
    guest = Qemu(lab, "guest", mte=False, wrapper="mtetool exec --").start()
    assert [check.wrong for check in guest.wait_for_checks()] == [0, 0]
    assert b"no-mte" not in guest.output()


@pytest.mark.parametrize(
    "extra",
    [
        "-daemonize -pidfile /tmp/pid",
        pytest.param(
            "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
            marks=pytest.mark.long,  # so is the QEMU of test_torture
        ),
    ],
)
def test_qemu_in_its_other_ways(lab: Machine, extra: str) -> None:
    guest = Qemu(lab, "guest", mte=False, wrapper="mtetool exec --", extra=extra)
    if "daemonize" in extra:
        lab.sh(guest.command())
        pid = int(lab.get("/tmp/pid"))
    else:
        pid = guest.start().pid
    asked = lab.run(["mtetool", "enable", f"kvm:{pid}", "--json"], check=True)
    assert json.loads(asked.stdout)["changed"] is False


@pytest.mark.parametrize(
    "how",
    [
        "",
        pytest.param("every-call", marks=pytest.mark.long),
        pytest.param("term", marks=pytest.mark.long),
        "stop",
    ],
)
def test_death_before_every_step_is_harmless(lab: Machine, how: str) -> None:
    command = ["python3", "-m", "tests.lab.start_deaths", how]
    result = lab.run(command, timeout=300, env=ENVIRONMENT, check=True)
    found = json.loads(result.stdout)
    assert found["harmed"] == {}, found["plain"]
    assert found["deaths"] > enough(20)
