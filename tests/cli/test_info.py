"""`mtetool info` as a user meets it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.running import BASE, KIB, ROM, make_guest, run
from tests.snapshot.forge import small_forge


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    guest = make_guest(tmp_path / "g", seed=3)
    assert run("save", guest, "-o", tmp_path / "s", "--range", f"{BASE:#x}:1M").status == 3
    return tmp_path / "s"


def test_for_people(snapshot: Path) -> None:
    done = run("info", snapshot)
    assert done.status == 0
    for words in (str(snapshot), f"{ROM:#x}", "read-only", "EFAULT: no memslot there", "4 KiB"):
        assert words in done.out


def test_for_programs(snapshot: Path) -> None:
    report = run("info", snapshot, "--json").json
    assert report["schema"] == "mtetool.info/1"
    assert report["mte"] is True
    assert report["page_size_bytes"] == 4096
    assert report["memslots"][0] == {
        "id": 1,
        "ipa": ROM,
        "size_bytes": 64 * KIB,
        "readonly": True,
        "kind": "rom",
    }
    assert report["scope"] == [{"ipa": BASE, "size_bytes": 1024 * KIB}]
    assert report["held_bytes"] == 512 * KIB
    assert report["missing_bytes"] == 512 * KIB
    assert report["missing"][0]["errno"] == "EFAULT"
    assert report["consistent"] is True
    assert report["file_bytes"] == snapshot.stat().st_size
    assert report["source"].startswith("emu:")


def test_from_a_pipe(snapshot: Path) -> None:
    report = run("info", "-", "--json", stdin=snapshot.read_bytes()).json
    assert report["file_bytes"] is None
    assert report["missing_bytes"] == 512 * KIB


@pytest.mark.parametrize("words", [["info", "FILE"], ["--help"], ["save", "--help"]])
def test_neither_numpy_nor_rich_is_loaded(snapshot: Path, words: list[str]) -> None:
    words = [str(snapshot) if word == "FILE" else word for word in words]
    code = (
        "import sys; sys.argv[1:] = sys.argv[1:]\n"
        "from mtetool.__main__ import main\n"
        "status = main()\n"
        "sys.stderr.write(','.join({'numpy', 'rich', 'zstandard'} & set(sys.modules)))\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["info", "verify", "dump"])
def test_text_of_a_snapshot_makes_no_lines_of_its_own(tmp_path: Path, command: str) -> None:
    lie = "x\nconsistent  yes\x1b[2K"
    texts = ("source", "created", "tool", "kernel", "machine", "vmm", "name")
    forge = small_forge(4, **dict.fromkeys(texts, lie))
    forge.fill(BASE, 3).miss(BASE + 3 * 4096, 1, reason=lie)
    path = tmp_path / "s"
    path.write_bytes(forge.end())
    done = run(command, path)
    assert done.status in (0, 3)
    assert "x\\nconsistent  yes\\x1b[2K" in done.out + done.err
    assert not any(
        line.startswith("consistent  yes") for line in (done.out + done.err).splitlines()
    )
    assert "\x1b" not in done.out + done.err


def test_several_files(tmp_path: Path) -> None:
    guest = make_guest(tmp_path / "several", seed=3)
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        assert run("save", guest, "-o", path).status == 0
    done = run("info", first, tmp_path / "none", second)
    assert (done.status, done.out.count("memslots:")) == (2, 2)
    assert "no such file" in done.err
    report = run("info", first, second, "--json")
    assert [row["file"] for row in report.json["files"]] == [str(first), str(second)]
