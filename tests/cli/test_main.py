"""The program as a whole: how it starts, how it ends, and what it prints then."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import click
import pytest

from mtetool import __version__, errors
from mtetool.__main__ import wants_json
from mtetool.cli import COMMANDS
from tests.cli.running import Outcome, command, run, spawn

# --- errors as text and status ------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Return a function that runs a command, which raises the error that it is given."""

    def fail(error: BaseException, *arguments: str) -> Outcome:
        @click.command()
        @click.option("--json", is_flag=True)
        @click.option("--output")
        def failing_command(json: bool, output: str) -> NoReturn:
            raise error

        module = types.ModuleType("tests.failing")
        module.command = failing_command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "tests.failing", module)
        monkeypatch.setitem(COMMANDS, "fail", ("tests.failing", ""))
        return run("fail", *arguments)

    return fail


def test_an_error_is_a_line_and_a_hint(failing: Callable[..., Outcome]) -> None:
    outcome = failing(errors.BusyError("in use", hint="wait", ipa=3))
    assert outcome == Outcome(4, b"", "mtetool: error: in use\n  try: wait\n")
    outcome = failing(errors.DamagedError("broken"))
    assert outcome == Outcome(5, b"", "mtetool: error: broken\n")


@pytest.mark.parametrize("form", [["--json"], ["--output", "json"], ["--output=json"]])
def test_an_error_is_a_line_of_json(failing: Callable[..., Outcome], form: list[str]) -> None:
    outcome = failing(errors.BusyError("in\nuse", hint="wait", ipa=3, status=9), *form)
    assert outcome.status == 4
    assert outcome.raw == b""
    assert outcome.err.count("\n") == 1
    assert outcome.error == {
        **dict.fromkeys(errors.DETAIL_KEYS),
        "schema": "mtetool.error/1",
        "error": "busy",
        "message": "in\nuse",
        "hint": "wait",
        "status": 4,
        "ipa": 3,
    }


def test_details_of_any_type_can_be_json(failing: Callable[..., Outcome]) -> None:
    outcome = failing(errors.GuestError("no", path=Path("/x")), "--json")
    assert outcome.error["path"] == "/x"


@pytest.mark.parametrize(
    ("error", "status", "error_id", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 6, "disk-full", "/x: No space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 6, "disk-full", "(EDQUOT)"),
        (OSError(errno.EIO, "Input/output error"), 6, "io", "(EIO)"),
        (OSError("odd"), 6, "io", "odd"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 6, "no-memory", "(ENOMEM)"),
        (MemoryError(), 6, "no-memory", "no memory"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", b"/y"), 6, "io", "/y: "),
        (ValueError("what"), 6, "internal", "ValueError: what"),
        (KeyError(), 6, "internal", "KeyError"),
        (ModuleNotFoundError("No module named 'x'"), 6, "io", "could not be loaded: No module"),
        (RecursionError("deep"), 6, "internal", "RecursionError: deep"),
        (click.UsageError("bad"), 2, "usage", "bad"),
        (click.FileError("f", "gone"), 2, "usage", "gone"),
    ],
)
def test_what_nobody_made_sense_of(
    failing: Callable[..., Outcome], error: Exception, status: int, error_id: str, message: str
) -> None:
    outcome = failing(error, "--json")
    assert outcome.status == status
    assert outcome.error["error"] == error_id
    assert message in outcome.error["message"]
    assert "Traceback" not in outcome.err


def test_a_closed_pipe_is_quiet(failing: Callable[..., Outcome]) -> None:
    assert failing(BrokenPipeError(errno.EPIPE, "Broken pipe")) == Outcome(141, b"", "")


def test_a_traceback_where_it_is_wanted(
    failing: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTETOOL_DEBUG", "1")
    outcome = failing(ValueError("what"))
    assert outcome.err.startswith("Traceback")
    assert "mtetool: error: " in outcome.err
    monkeypatch.setenv("MTETOOL_DEBUG", "")
    assert "Traceback" not in failing(ValueError("what")).err


def test_escape_sequences_do_not_reach_the_terminal(failing: Callable[..., Outcome]) -> None:
    outcome = failing(errors.NoSuchFileError("a\x1b[31m[red]\x07: no", hint="\x9b1m"))
    assert outcome.err == "mtetool: error: a\\x1b[31m[red]\\x07: no\n  try: \\x9b1m\n"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ([], "mtetool --help"),
        (["nix"], "mtetool --help"),
        (["--nix"], "mtetool --help"),
        (["emu"], "mtetool emu --help"),
        (["emu", "nix"], "mtetool emu --help"),
        (["emu", "show"], "mtetool emu show --help"),
        (["emu", "show", "--output", "nix", "x"], "mtetool emu show --help"),
        (["emu", "show", "a", "b"], "mtetool emu show --help"),
    ],
)
def test_usage(arguments: list[str], hint: str) -> None:
    outcome = run(*arguments)
    assert outcome.status == 2
    assert outcome.raw == b""
    first, second = outcome.err.splitlines()
    assert first.startswith("mtetool: error: ")
    assert second == f"  try: {hint}"
    outcome = run(*arguments, "--json")
    assert outcome.status == 2
    assert (outcome.error["error"], outcome.error["status"]) == ("usage", 2)


def test_wants_json() -> None:
    assert wants_json(["save", "--json"])
    assert wants_json(["--output", "json", "save"])
    assert wants_json(["save", "--output=json"])
    assert not wants_json(["save"])
    assert not wants_json(["save", "--output", "text", "json"])
    assert not wants_json(["exec", "--", "qemu", "--json"])
    assert not wants_json(["save", "--output"])


# --- starting -----------------------------------------------------------------------------


def test_version_and_help() -> None:
    assert run("--version") == Outcome(0, f"mtetool {__version__}\n".encode(), "")
    outcome = run("--help")
    assert (outcome.status, outcome.err) == (0, "")
    assert all(f"\n  {name} " in outcome.out for name in COMMANDS)
    assert len(outcome.out.splitlines()) <= 24
    assert run("-h").out == outcome.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_that_fits_on_a_screen(name: str) -> None:
    outcome = run(name, "--help")
    assert (outcome.status, outcome.err) == (0, "")
    assert len(outcome.out.splitlines()) <= 40


@pytest.mark.parametrize(
    ("arguments", "banned"),
    [
        (["--help"], {"numpy", "rich", "zstandard", "msgpack", "mtetool.cli.options"}),
        (["--version"], {"numpy", "rich", "zstandard", "msgpack", "mtetool.cli.options"}),
        (["nix"], {"numpy", "rich", "zstandard", "msgpack", "mtetool.cli.options"}),
        (["emu", "create", "--help"], {"numpy", "rich", "zstandard", "msgpack"}),
        (["probe"], {"numpy", "rich", "zstandard"}),
    ],
)
def test_what_is_not_needed_is_not_loaded(arguments: list[str], banned: set[str]) -> None:
    script = (
        f"import json, sys; sys.argv[1:] = {arguments!r};"
        "from mtetool.__main__ import main; main();"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    loaded = set(json.loads(done.stderr.splitlines()[-1]))
    assert not loaded & banned
    if arguments[0] != "emu":
        others = {module for name, (module, _) in COMMANDS.items() if name not in arguments}
        assert not loaded & others


# --- ending -------------------------------------------------------------------------------


def waiting_create(directory: Path, **options: object) -> subprocess.Popen[bytes]:
    """Start a command; it is in the middle of writing, and would go on for minutes."""
    path = directory / "guest"
    words = ("emu", "create", path, "--memory", "1T", "--fill", "sparse", "--progress", "json")
    process = spawn(*words, stderr=subprocess.PIPE, **options)
    assert process.stderr is not None
    # The first line comes after a second; it must not be among the last output.
    assert b"mtetool.progress" in process.stderr.readline()
    return process


def said(err: bytes) -> list[bytes]:
    """The lines on standard error, except the progress."""
    return [line for line in err.splitlines() if b"mtetool.progress" not in line]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_ends_it_quietly_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    with waiting_create(tmp_path) as process:
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    # Death by the signal itself, which a shell shows as 128 + number.
    assert process.returncode == -number
    assert said(err) == []
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_does_not_tear_the_unwinding(tmp_path: Path) -> None:
    with waiting_create(tmp_path) as process:
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGHUP, -signal.SIGTERM, -signal.SIGINT)
    assert said(err) == []
    assert list(tmp_path.iterdir()) == []


def test_a_shell_sees_130(tmp_path: Path) -> None:
    words = command("emu", "create", tmp_path / "guest", "--memory", "1T", "--fill", "sparse")
    script = 'timeout -s INT 2 "$@"; echo $?'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *words], capture_output=True, text=True, check=True
    )
    # `timeout` itself exits with 124, and passes 128 + N on with --preserve-status.
    assert done.stdout == "124\n"
    script = 'timeout --preserve-status -s INT 2 "$@"; echo $?'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *words], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("130\n", "")
    assert list(tmp_path.iterdir()) == []


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    """As nohup(1) sets it."""

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with waiting_create(tmp_path, preexec_fn=ignore) as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert process.poll() is None
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["probe"], ["emu", "show", "--json"]]
)
def test_a_pipe_that_nobody_reads(arguments: list[str], tmp_path: Path) -> None:
    if "show" in arguments:
        run("emu", "create", tmp_path / "guest")
        arguments = [*arguments, str(tmp_path / "guest")]
    reader, writer = os.pipe()
    os.close(reader)
    with spawn(*arguments, stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (141, b"")


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["emu", "show", "--json"]])
def test_an_output_that_is_full(arguments: list[str], tmp_path: Path) -> None:
    if "show" in arguments:
        run("emu", "create", tmp_path / "guest")
        arguments = [*arguments, str(tmp_path / "guest")]
    with Path("/dev/full").open("wb") as full:
        process = spawn(*arguments, stdout=full, stderr=subprocess.PIPE)
        with process:
            _, err = process.communicate(timeout=30)
    assert process.returncode == 6
    assert b"No space left on device (ENOSPC)" in err
    assert b"Exception" not in err


@pytest.mark.parametrize(
    ("redirection", "arguments", "status"),
    [
        # A result that cannot be delivered is not a success, as with a full disk.
        (">&-", ["--version"], 6),
        (">&-", ["emu", "show", "guest"], 6),
        (">&-", ["emu", "show", "guest", "--json"], 6),
        (">&-", ["dump", "emu:guest"], 6),
        (">&-", ["nix"], 2),
        (">&-", ["emu", "fill", "guest", "random"], 0),
        ("2>&-", ["emu", "fill", "guest", "random", "--progress", "json"], 0),
        ("2>&-", ["emu", "show", "guest"], 0),
        ("2>&-", ["nix"], 2),
        ("<&- >&- 2>&-", ["emu", "show", "guest"], 6),
        ("<&-", ["emu", "show", "guest"], 0),
        ("<&-", ["info", "-"], 6),
    ],
)
def test_closed_streams(
    tmp_path: Path, redirection: str, arguments: list[str], status: int
) -> None:
    guest = tmp_path / "guest"
    run("emu", "create", guest, "--memory", "1M")
    words = command(*(word.replace("guest", str(guest)) for word in arguments))
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert done.returncode == status
    for unwanted in (b"should not happen", b"Traceback", b"Exception"):
        assert unwanted not in done.stderr
    # No output went to a file that would have got the closed descriptor's number.
    assert run("emu", "show", guest).status == 0


def test_a_signal_with_a_closed_output(tmp_path: Path) -> None:
    def close() -> None:
        os.close(1)

    with waiting_create(tmp_path, preexec_fn=close) as process:
        process.terminate()
        _, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
    assert said(err) == []


def test_odd_names_are_shown_somehow(tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/\xff\x1b[1m\xe2\x82\xac"
    for locale in ("C", "C.UTF-8", "POSIX"):
        done = subprocess.run(
            [*map(os.fsencode, command("emu", "show")), odd],
            env={**os.environ, "LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 2
        assert b"\x1b" not in done.stderr
        assert b"no such file" in done.stderr
