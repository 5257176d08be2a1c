"""Outputs that are inputs, standard output by other names, reports that cannot be delivered."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pytest

from tests.cli.running import command, make_guest, run, run_onto, set_tag
from tests.snapshot.test_place import needs_root

BASE = 0x4000_0000


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a guest `g`, a snapshot `h` of it, and `d`, a delta to that."""
    monkeypatch.chdir(tmp_path)
    make_guest(tmp_path / "g", seed=3)
    assert run("save", "emu:g", "-o", "h").status == 0
    set_tag(tmp_path / "g", BASE, 64, 7)
    assert run("save", "emu:g", "--base", "h", "-o", "d").status == 0
    return tmp_path


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


# --- an output that is an input -----------------------------------------------------------


@contextmanager
def other_name(form: str, path: str) -> Iterator[str]:
    """Another name for a file in the working directory."""
    if form == "same":
        yield path
    elif form == "dotted":
        yield f"./../{Path.cwd().name}/{path}"
    elif form == "absolute":
        yield str(Path(path).absolute())
    elif form == "symbolic":
        Path("other").symlink_to(path)
        Path("another").symlink_to("other")
        yield "another"
    elif form == "hard":
        Path("other").hardlink_to(path)
        yield "other"
    elif form == "mounted":
        Path("mount").mkdir()
        subprocess.run(["mount", "--bind", ".", "mount"], check=True)
        try:
            yield f"mount/{path}"
        finally:
            subprocess.run(["umount", "mount"], check=True)
    else:
        with Path(path).open("rb") as opened:
            yield form.format(opened.fileno())


FORMS = ["same", "dotted", "absolute", "symbolic", "hard", "/dev/fd/{}", "/proc/self/fd/{}"]


@pytest.mark.parametrize("form", [*FORMS, pytest.param("mounted", marks=needs_root)])
@pytest.mark.parametrize(
    ("words", "read"),
    [
        ("save emu:g", "g"),
        ("save emu:g --base h", "g"),
        ("save emu:g --base h", "h"),
        ("save emu:g --base h --base d", "d"),
    ],
)
def test_an_output_that_is_an_input(files: Path, words: str, read: str, form: str) -> None:
    with other_name(form, read) as name:
        before = contents(files)
        for force in ([], ["--force"]):
            done = run(*words.split(), "-o", name, *force, "--json")
            assert (done.status, done.error["error"]) == (2, "output-is-input")
            assert (done.error["path"], done.error["input"]) == (name, read)
        assert contents(files) == before


@pytest.mark.parametrize("kind", ["kvm", "proc"])
def test_a_file_that_the_guests_process_has_open(files: Path, kind: str) -> None:
    Path("disk").write_bytes(b"precious")
    with (
        Path("disk").open("r+b") as disk,
        subprocess.Popen(["sleep", "60"], stdin=disk, stdout=subprocess.DEVNULL) as vmm,
    ):
        done = run("save", f"{kind}:{vmm.pid}", "-o", "disk", "--force", "--json")
        other = run("save", f"{kind}:{vmm.pid}", "-o", "/dev/null", "--json")
        vmm.kill()
    assert (done.status, done.error["error"]) == (2, "output-is-input")
    assert f"/proc/{vmm.pid}/fd/0" in done.error["message"]
    assert other.status == 4
    assert Path("disk").read_bytes() == b"precious"


def test_an_input_that_is_standard_input(files: Path) -> None:
    with Path("h").open("rb") as stdin:
        words = command("save", "emu:g", "--base", "-", "-o", "h", "--force")
        done = subprocess.run(words, stdin=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "standard input" in done.stderr
    assert run("verify", "h").status == 0


@pytest.mark.parametrize("form", ["same", "hard", "symbolic"])
def test_a_merge_may_replace_what_it_merges(files: Path, form: str) -> None:
    with other_name(form, "h") as name:
        assert run("merge", "h", "d", "-o", name).status == 2
        assert run("verify", "h").status == 0
        assert run("merge", "h", "d", "-o", name, "--force").status == 0
        assert run("diff", name, "emu:g").status == 0


@pytest.mark.parametrize(
    "words",
    [
        "save emu:g >>g",
        "save emu:g -o new >>g",
        "save emu:g --base h 1<>h",
        "merge h d >>h",
        "merge h d -o - 1<>d",
        "merge - d >>h",
        "dump h --output raw 1<>h",
        "dump emu:g >>g",
        "diff h emu:g >>h",
        "diff h emu:g >>g",
        "info h >>h",
        "info - >>h",
        "verify h >>h",
        "restore h emu:g >>g",
        "restore d --base h emu:g >>h",
        "emu show g >>g",
        "emu fill g random --json >>g",
    ],
)
def test_standard_output_that_is_an_input(files: Path, words: str) -> None:
    before = contents(files)
    *arguments, onto = words.split()
    stdin = Path("h").open() if "-" in arguments else None  # noqa: SIM115
    stdout = Path(onto.lstrip("1<>")).open("r+" if onto.startswith("1<>") else "a")  # noqa: SIM115
    done = run_onto(stdout, *arguments, stdin=stdin)
    assert done.status == 2
    assert "is an input" in done.err
    assert contents(files) == before


# --- standard output by another name ------------------------------------------------------


def shell(script: str) -> subprocess.CompletedProcess[bytes]:
    """Run a script in which `mtetool` is the program."""
    words = command()
    return subprocess.run(
        ["bash", "-c", f'mtetool() {{ {" ".join(words)} "$@"; }}; set -o pipefail; {script}'],
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize(
    "name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link", "/dev/fd/3", "fifo"]
)
def test_standard_output_by_another_name(files: Path, name: str) -> None:
    Path("link").symlink_to("/dev/stdout")
    os.mkfifo("fifo")
    to = "cat fifo >out & mtetool save emu:g --json -o fifo >fifo; s=$?; wait; exit $s"
    if name != "fifo":
        to = f"mtetool save emu:g --json -o {name} 3>&1 | cat >out"
    done = shell(to)
    assert done.returncode == 0, done.stderr
    assert b"mtetool.save/1" in done.stderr
    assert b'"file": null' in done.stderr
    assert run("diff", "out", "emu:g").status == 0
    for redirection in (">file", ">>file") if name == "/dev/stdout" else (">file",):
        if name != "fifo":
            assert shell(f"mtetool save emu:g -o {name} {redirection} 3>&1").returncode == 0
            assert run("diff", "file", "emu:g").status == 0
            Path("file").unlink()


def test_the_file_that_standard_output_goes_to(files: Path) -> None:
    done = shell("mtetool save emu:g -o file >file")
    assert done.returncode == 0
    assert b"saved the tags" in done.stderr
    assert run("diff", "file", "emu:g").status == 0
    before = contents(files)
    for force in ("", "--force"):
        done = shell(f"mtetool save emu:g -o file {force} >>file")
        assert done.returncode == 2
        assert b"standard output" in done.stderr
        done = shell(f"mtetool emu create file {force} --json >>file")
        assert done.returncode == 2
        done = shell(f"mtetool save emu:g -o file {force} 2>>file")
        assert done.returncode == 2
        assert b"standard error" in Path("file").read_bytes()
        Path("file").write_bytes(before["file"])
    assert contents(files) == before


def test_a_process_substitution(files: Path) -> None:
    done = shell("mtetool save emu:g --json -o >(cat >out); wait $!")
    assert done.returncode == 0, done.stderr
    assert b"mtetool.save/1" in done.stdout
    assert run("diff", "out", "emu:g").status == 0


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/dev/stderr", "/dev/tty", "{}"])
@pytest.mark.parametrize("words", ["save emu:g", "merge h d"])
def test_nothing_binary_to_a_terminal(files: Path, words: str, name: str) -> None:
    leader, follower = pty.openpty()
    arguments = [*words.split(), "--force", "-o", name.format(os.ttyname(follower))]
    with subprocess.Popen(
        ["setsid", "--ctty", "--wait", *command(*arguments)],
        stdin=follower,
        stdout=follower,
        stderr=subprocess.PIPE if name != "/dev/stderr" else follower,
    ) as process:
        os.close(follower)
        said = b""
        # A read of the leader fails once no process has the terminal open any more.
        while chunk := _read(leader):
            said += chunk
        err = process.stderr.read() if process.stderr else said
    assert process.returncode == 2
    assert b"terminal" in err
    assert b"MTESNP" not in said
    os.close(leader)


def _read(leader: int) -> bytes:
    try:
        return os.read(leader, 4096)
    except OSError:
        return b""


# --- reports that cannot be delivered -----------------------------------------------------


@pytest.mark.parametrize("json", [False, True])
@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ("save emu:g -o new", "new is complete and kept"),
        ("save emu:g -o old --force", "old is complete and kept"),
        ("merge h d -o new", "new is complete and kept"),
        ("emu create made --memory 1M --json", "emu:made was created and is kept"),
        ("restore h emu:g", "the tags were written to emu:g"),
        ("restore h emu:g --dry-run", "nothing was written to emu:g"),
        ("emu set g 0x40000000:64=3 --json", "emu:g has the tags"),
        ("enable emu:g", "MTE is on in emu:g"),
    ],
)
def test_a_report_that_cannot_be_printed(files: Path, words: str, kept: str, json: bool) -> None:
    shutil.copy("h", "old")
    arguments = [*words.split(), *(["--json"] if json and "--json" not in words else [])]
    for stdout, why in ((_full(), "ENOSPC"), (_closed(), "EBADF")):
        done = run_onto(stdout, *arguments)
        assert done.status == 6
        assert "standard output" in done.err
        assert why in done.err
        assert kept in done.err
        for made in (Path("new"), Path("made")):
            assert made.exists() == (made.name in words)
            if made.exists():
                assert _is_sound(made)
                made.unlink()
    assert run("verify", "old").status == 0


def _full() -> TextIO:
    return Path("/dev/full").open("w")


def _closed() -> TextIO:
    """The stream that `main` makes for a descriptor that was closed at the start."""
    return os.fdopen(os.open("/dev/null", os.O_RDONLY), "w")


def _is_sound(path: Path) -> bool:
    done = run("emu", "show", path) if path.name == "made" else run("verify", path)
    return done.status == 0


def test_a_report_on_standard_error_that_cannot_be_printed(files: Path) -> None:
    done = shell("mtetool save emu:g 2>/dev/full >new")
    assert done.returncode == 6
    assert run("verify", "new").status == 0


@pytest.mark.parametrize(
    "words",
    [
        "list",
        "dump emu:g",
        "dump emu:g --granules",
        "diff h emu:g",
        "info h",
        "dump h --output raw",
    ],
)
def test_a_full_standard_output_is_named(files: Path, words: str) -> None:
    done = run_onto(_full(), *words.split())
    assert done.status == 6
    assert "standard output" in done.err
    assert "ENOSPC" in done.err
