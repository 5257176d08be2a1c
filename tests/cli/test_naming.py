"""Wrong names: empty, too long, swapped, of another kind of file, not ours to open."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.running import make_guest, run

LONG = "n" * 300
DEEP = "d/" * 2500 + "x"


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, open to all users: a guest `p` and a snapshot `h` of it."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)
    monkeypatch.chdir(directory)
    make_guest(directory / "p", seed=3)
    assert run("save", "emu:p", "-o", "h").status == 0
    yield directory
    shutil.rmtree(directory)


# --- names that no file can have ----------------------------------------------------------

_NAMED = [
    "info X",
    "verify X",
    "verify h --against X",
    "verify h --against emu:X",
    "verify h --base X",
    "dump X",
    "dump emu:X",
    "diff X h",
    "diff h emu:X",
    "merge X h -o out",
    "merge h -o X --force",
    "restore X emu:p",
    "restore h emu:X",
    "restore h emu:p --base X",
    "save emu:X -o out",
    "save emu:p -o X",
    "save emu:p -o X --force",
    "save emu:p --base X -o out",
    "enable emu:X",
    "emu create X",
    "emu create emu:X --force",
    "emu show X",
    "emu set X 0x40000000:64=1",
    "emu fill X heap",
    "emu fault X",
]


@pytest.mark.parametrize("name", ["", LONG, DEEP], ids=["empty", "long", "deep"])
@pytest.mark.parametrize("words", _NAMED)
def test_names_that_no_file_has(files: Path, words: str, name: str) -> None:
    done = run(*(word.replace("X", name) for word in words.split()), "--json")
    assert done.status == 2
    if name:
        expected = "bad-source" if "--against X" in words else "bad-name"
        assert done.error["error"] == expected
        assert len(done.error["message"]) < 400
        assert done.error["hint"]
    else:
        assert done.error["error"] in ("usage", "bad-source", "bad-name")
        assert "empty" in done.error["message"] or "path" in done.error["message"]
    assert sorted(path.name for path in files.iterdir()) == ["h", "p"]


def test_an_empty_monitor(files: Path) -> None:
    done = run("save", "emu:p", "--qmp", "", "-o", "out", "--json")
    assert (done.status, done.error["error"]) == (2, "usage")
    assert "--qmp" in done.error["message"]


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("save emu:p -o", "-o"),
        ("save emu:p --out", "--out"),
        ("save emu:p -o --force", "--force"),
        ("save emu:p -o --json", "--json"),
        ("save emu:p --out=--json", "--json"),
        ("save emu:p -o -q", "-q"),
        ("merge h -o --force", "--force"),
        ("save emu:p -o out --base --json", "--json"),
        ("restore h emu:p --base --dry-run", "--dry-run"),
        ("verify h --against --json", "--json"),
    ],
)
def test_an_option_is_not_taken_for_a_file(files: Path, words: str, wrong: str) -> None:
    before = (files / "p").read_bytes()
    done = run(*words.split())
    assert done.status == 2
    assert wrong in done.err
    assert sorted(path.name for path in files.iterdir()) == ["h", "p"]
    assert (files / "p").read_bytes() == before


def test_a_file_with_the_name_of_an_option(files: Path) -> None:
    assert run("save", "emu:p", "-o", "./--json").status == 0
    assert run("info", "--", "--json").status == 0


@pytest.mark.parametrize(
    "words",
    [
        "merge - -",
        "merge h - - -o out",
        "diff - -",
        "restore - emu:p --base -",
        "verify - --base -",
        "save emu:p -o out --base - --base -",
    ],
)
def test_standard_input_twice(files: Path, words: str) -> None:
    done = run(*words.split(), "--json")
    assert (done.status, done.error["error"]) == (2, "usage")
    assert "standard input" in done.error["message"]


# --- the wrong kind of thing --------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "try_"),
    [
        ("restore emu:p h", "mtetool restore h emu:p"),
        ("restore emu:p emu:p", "mtetool save emu:p -o FILE"),
        ("restore h emu:p --base emu:p", "mtetool save emu:p -o FILE"),
        ("info emu:p", "mtetool emu show p"),
        ("info kvm:4711", "mtetool list"),
        ("verify emu:p", "mtetool verify FILE --against emu:p"),
        ("merge emu:p h", "mtetool save emu:p -o FILE"),
        ("save emu:p --base emu:p -o out", "mtetool save emu:p -o FILE"),
        ("info p", "emu:p"),
        ("verify p", "emu:p"),
        ("dump p", "emu:p"),
        ("diff h p", "emu:p"),
        ("restore p emu:p", "emu:p"),
        ("merge p h", "emu:p"),
        ("restore h p", "emu:p"),
        ("verify h --against p", "emu:p"),
        ("save p -o out", "emu:p"),
        ("enable p", "emu:p"),
        ("save h -o out", "mtetool info h"),
        ("restore h h", "mtetool info h"),
        ("save emu:h -o out", "mtetool info h"),
        ("emu show h", "mtetool info h"),
        ("dump emu:h", "mtetool info h"),
        ("restore h emu:h", "mtetool info h"),
        ("save 4711 -o out", "kvm:4711"),
        ("save nix -o out", "emu:"),
    ],
)
def test_the_hint_says_what_to_write(files: Path, words: str, try_: str) -> None:
    before = {path.name: path.read_bytes() for path in files.iterdir()}
    done = run(*words.split(), "--json")
    assert done.status in (2, 4, 5)
    assert try_ in done.error["hint"], done.error
    assert {path.name: path.read_bytes() for path in files.iterdir()} == before


def test_a_guests_file_from_standard_input(files: Path) -> None:
    done = run("info", "-", "--json", stdin=(files / "p").read_bytes())
    assert (done.status, done.error["error"]) == (5, "not-a-snapshot")
    assert done.error["hint"].endswith("emu:PATH")


def test_a_snapshot_with_the_name_of_a_guest(files: Path) -> None:
    (files / "h").rename("emu:x")
    assert run("info", "emu:x").status == 0
    assert run("restore", "./emu:x", "emu:p").status == 0


# --- files that are not ours to open ------------------------------------------------------


@contextmanager
def unprivileged() -> Iterator[None]:
    """If this is root, which is refused nothing, run as a user who owns nothing here."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ("info h", "h"),
        ("verify h", "h"),
        ("dump h", "h"),
        ("restore h emu:p", "h"),
        ("merge h -o own/out", "h"),
        ("save emu:p -o own/out --base h", "h"),
        ("save emu:p -o own/out", "p"),
        ("emu show p", "p"),
        ("dump emu:p", "p"),
        ("restore own/h emu:q", "q"),
        ("emu set q 0x40000000:64=1", "q"),
        ("save emu:q -o out", "out"),
        ("save emu:q -o h --force", "h"),
        ("save emu:q -o closed/out", "closed/out"),
        ("emu create out", "out"),
        ("emu create closed/out", "closed/out"),
    ],
)
def test_no_permission_is_one_answer(files: Path, words: str, path: str) -> None:
    """A guest, a snapshot, an output; every user can read `q` and `own/h`."""
    for name, mode in (("own", 0o777), ("closed", 0o700)):
        (files / name).mkdir()
        (files / name).chmod(mode)
    shutil.copy("h", "own/h")
    shutil.copy("p", "q")
    for name, mode in (("own/h", 0o444), ("q", 0o444), ("p", 0), ("h", 0)):
        (files / name).chmod(mode)
    if os.geteuid():
        (files / "closed").chmod(0)
        files.chmod(0o555)
    before = sorted(one.name for one in files.rglob("*"))
    with unprivileged():
        done = run(*words.split(), "--json")
    files.chmod(0o755)
    (files / "closed").chmod(0o700)
    assert (done.status, done.error["error"]) == (4, "permission")
    assert (done.error["path"], done.error["errno"]) == (path, "EACCES")
    assert "ls -ld" in done.error["hint"]
    assert sorted(one.name for one in files.rglob("*")) == before
