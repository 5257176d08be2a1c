"""`mtetool exec` as far as it goes without KVM: what it refuses, and becoming a program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_MTETOOL = [sys.executable, "-m", "mtetool", "exec"]
_ROOT = Path(__file__).parents[2]


def _exec(
    *words: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    environment = {"PYTHONPATH": str(_ROOT), "PATH": os.environ["PATH"], **(env or {})}
    command = [*_MTETOOL, *words]
    return subprocess.run(command, capture_output=True, check=False, env=environment, cwd=cwd)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--", "/no/such"], b"no program /no/such"),
        (["--", "no-such-program"], b"in PATH"),
        (["--", "/etc/passwd"], b"not an executable file"),
        (["--", "/etc"], b"not an executable file"),
        (["--vm", "0", "--", "true"], b"--vm"),
        (["--wait", "0", "--", "true"], b"--wait"),
        ([], b"Missing argument"),
        (["--"], b"Missing argument"),
    ],
)
def test_what_cannot_be_started(words: list[str], said: bytes) -> None:
    done = _exec(*words)
    assert (done.returncode, done.stdout) == (2, b"")
    assert said in done.stderr


def test_everything_behind_the_dashes_is_the_programs(tmp_path: Path) -> None:
    words = ["--vm", "2", "--help", "-M", "virt", "--", "", "\udcff"]
    for dashes in (["--"], []):
        done = _exec("--no-require", *dashes, "printf", r"<%s>", *words, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, b"<--vm><2><--help><-M><virt><--><><\xff>")


@pytest.mark.skipif(os.uname().machine == "aarch64", reason="of hosts that are not arm64")
def test_a_host_that_is_not_arm64() -> None:
    done = _exec("--", "echo", "started")
    assert (done.returncode, done.stdout) == (4, b"")
    assert b"MTE is a feature of arm64 hosts" in done.stderr
    done = _exec("--no-require", "--", "echo", "started")
    assert (done.returncode, done.stdout) == (0, b"started\n")
    assert b"MTE is a feature of arm64 hosts" in done.stderr


def test_it_is_the_program_itself_in_the_same_process() -> None:
    child = subprocess.Popen(
        [*_MTETOOL, "--no-require", "--", "sh", "-c", "echo $$; cat; exit 5"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    out, _ = child.communicate(b"in\0put")
    assert out == f"{child.pid}\n".encode() + b"in\0put"
    assert child.returncode == 5


@pytest.mark.parametrize("env", [{"LC_CTYPE": "C"}, {}, {"LC_ALL": "C", "ODD": "a=b\nc"}])
def test_the_environment_is_the_one_that_it_was_given(env: dict[str, str]) -> None:
    words = [sys.executable, "-c", "print(open('/proc/self/environ').read())"]
    environment = {"PYTHONPATH": str(_ROOT), "PATH": os.environ["PATH"], **env}
    plain = subprocess.run(words, capture_output=True, check=True, env=environment)
    assert _exec("--no-require", "--", *words, env=env).stdout == plain.stdout


@pytest.mark.parametrize("ignored", ["", "PIPE", "HUP INT USR1", "XFSZ PIPE TERM"])
def test_signals_are_ignored_as_they_were(ignored: str) -> None:
    show = "grep Sig[BI] /proc/self/status"
    traps = f"trap '' {ignored};" if ignored else ""
    plain, ours = (
        subprocess.run(
            ["sh", "-c", f"{traps} {before} sh -c '{show}; true'; true"],
            capture_output=True,
            check=True,
            cwd=_ROOT,
        ).stdout
        for before in ("", f"{' '.join(_MTETOOL)} --no-require --")
    )
    assert b"SigIgn" in plain
    assert ours == plain


def test_closed_descriptors_stay_closed_and_no_other_is_open() -> None:
    script = "exec 0<&- 7</dev/null; {} ls /proc/self/fd; true"
    plain, ours = (
        subprocess.run(
            ["sh", "-c", script.format(before)], capture_output=True, check=True, cwd=_ROOT
        ).stdout
        for before in ("", f"{' '.join(_MTETOOL)} --no-require --")
    )
    assert ours == plain
