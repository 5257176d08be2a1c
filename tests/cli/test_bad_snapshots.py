"""Every kind of bad snapshot, given to every command that reads one: status 5, no traceback."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.running import make_guest, run

Spoil = Callable[[bytes], bytes]


def flipped(data: bytes) -> bytes:
    """Flip one bit in the middle of the file, where the tags are."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


def of_the_future(data: bytes) -> bytes:
    """Change the version, the four bytes (little-endian) after the magic number."""
    at = data.index(b"\n\x1a\n") + 3 if b"\n\x1a\n" in data[:16] else 8
    found = bytearray(data)
    for place in range(at, 17):
        if found[place] == 1:
            found[place] = 9
            return bytes(found)
    raise AssertionError("no version found")


BAD: dict[str, tuple[Spoil, str]] = {
    "empty": (lambda data: b"", "not-a-snapshot"),
    "cut": (lambda data: data[: len(data) * 2 // 3], "truncated"),
    "cut-at-the-end": (lambda data: data[:-1], "truncated"),
    "flipped": (flipped, "damaged"),
    "longer": (lambda data: data + b"\0", "damaged"),
    "future": (of_the_future, "unknown-version"),
    "gzip": (gzip.compress, "not-a-snapshot"),
    "text": (lambda data: b"hello, world\n" * 100, "not-a-snapshot"),
}

COMMANDS: dict[str, Callable[[str, str], list[str]]] = {
    "info": lambda file, guest: ["info", file],
    "verify": lambda file, guest: ["verify", file],
    "verify-against": lambda file, guest: ["verify", file, "--against", guest],
    "restore": lambda file, guest: ["restore", file, guest],
    "dump": lambda file, guest: ["dump", file],
    "diff": lambda file, guest: ["diff", guest, file],
}

# The index is sound there: only records that the command does not read are bad.
BLIND = {("info", "flipped")}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    directory = tmp_path_factory.mktemp("good")
    guest = make_guest(directory / "g", seed=3)
    assert run("save", guest, "-o", directory / "s").status == 0
    return (directory / "s").read_bytes(), guest


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", COMMANDS)
def test_from_a_file(snapshot: tuple[bytes, str], tmp_path: Path, name: str, kind: str) -> None:
    data, guest = snapshot
    spoil, error = BAD[kind]
    file = tmp_path / "bad"
    file.write_bytes(spoil(data))
    done = run(*COMMANDS[name](str(file), guest), "--json")
    if (name, kind) in BLIND:
        assert done.status == 0
        return
    assert done.status == 5
    if kind not in ("cut", "cut-at-the-end", "flipped", "longer"):
        assert done.error["error"] == error
    assert str(file) in done.error["message"]


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", COMMANDS)
def test_from_a_pipe(snapshot: tuple[bytes, str], name: str, kind: str) -> None:
    data, guest = snapshot
    spoil, error = BAD[kind]
    done = run(*COMMANDS[name]("-", guest), "--json", stdin=spoil(data))
    assert (done.status, done.error["error"]) == (5, error)
    assert "standard input" in done.error["message"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_directory(snapshot: tuple[bytes, str], tmp_path: Path, name: str) -> None:
    done = run(*COMMANDS[name](str(tmp_path), snapshot[1]), "--json")
    assert (done.status, done.error["error"]) == (5, "not-a-snapshot")


@pytest.mark.parametrize("name", COMMANDS)
def test_no_such_file(snapshot: tuple[bytes, str], tmp_path: Path, name: str) -> None:
    done = run(*COMMANDS[name](str(tmp_path / "none"), snapshot[1]), "--json")
    assert (done.status, done.error["error"]) == (2, "no-such-file")


@pytest.mark.parametrize("name", COMMANDS)
def test_good_ones_are_good(snapshot: tuple[bytes, str], tmp_path: Path, name: str) -> None:
    file = tmp_path / "good"
    file.write_bytes(snapshot[0])
    assert run(*COMMANDS[name](str(file), snapshot[1])).status == 0
    assert run(*COMMANDS[name]("-", snapshot[1]), stdin=snapshot[0]).status == 0
