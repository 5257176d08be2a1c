"""The examples that need no kernel; tests of the lab run the others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_EXAMPLES = Path(__file__).parents[1] / "examples"


def test_demo_shows_a_round_trip(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        [_EXAMPLES / "demo.sh", tmp_path / "demo"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": path},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "mtetool diff" in result.stdout
    assert (tmp_path / "demo" / "guest.mtesnap").stat().st_size > 100_000


def test_rehearsal_recovers_from_each_failure(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        [_EXAMPLES / "rehearse.sh", tmp_path / "rehearsal"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": path},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    told = [line for line in result.stdout.splitlines() if line.startswith(("-- ", "same"))]
    assert [line for line in told if "attempt" in line] == [
        "-- attempt 1: status 3",
        "-- attempt 2: status 0",
        "-- attempt 1: status 4, error guest-lost",
        "-- attempt 2: status 0",
        "-- attempt 1: status 3",
        "-- attempt 2: status 4, error busy",
        "-- attempt 3: status 4, error busy",
    ]
    assert told.count("same") == 3
    assert "rolled back" in told[-2]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("migrate-qemu.sh", "SOURCE_PID SOURCE_QMP TARGET_PID TARGET_QMP"),
        ("live-migrate.sh", "SOURCE_QMP HOST TARGET_QMP"),
        ("virsh-migrate.sh", "DOMAIN HOST [OPTION OF virsh migrate]..."),
        ("save-vm.sh", "save QMP FILE"),
    ],
)
def test_migration_script_explains_itself(script: str, words: str) -> None:
    result = subprocess.run([_EXAMPLES / script], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert words in result.stderr


def test_emulated_kernel_meets_a_hole() -> None:
    result = subprocess.run(
        [sys.executable, _EXAMPLES / "emulated-kernel.py"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "no memory at 0x40003000:0x1000" in result.stdout
    assert "00 01 02" in result.stdout


def test_every_example_is_run_by_a_test() -> None:
    tests = Path(__file__).parent
    texts = "".join(path.read_text() for path in tests.rglob("test_*.py"))
    assert [path.name for path in _EXAMPLES.iterdir() if path.name not in texts] == []


@pytest.mark.long
def test_readme_says_how_to_install(tmp_path: Path) -> None:
    """Run its commands as written, except for the paths, with Debian's Python."""
    root = Path(__file__).parents[1]
    block = (root / "README.md").read_text().partition("# apt install python3-venv\n")[2]
    lines = block.partition("\n\n")[0].replace("    # ", "")
    script = lines.replace("/opt/", f"{tmp_path}/opt/").replace("/usr/local/", f"{tmp_path}/")
    (tmp_path / "bin").mkdir()
    (tmp_path / "share/man/man1").mkdir(parents=True)
    # Not in the tree itself, as pip would build there.
    shutil.copytree(root, tmp_path / "tree", ignore=shutil.ignore_patterns(".*", "build", "*.so"))
    path = f"/usr/bin:{os.environ['PATH']}"
    subprocess.run(
        ["sh", "-ec", script], cwd=tmp_path / "tree", check=True, env=os.environ | {"PATH": path}
    )
    version = subprocess.run(
        [tmp_path / "bin/mtetool", "--version"], capture_output=True, check=True
    )
    assert version.stdout.startswith(b"mtetool ")
    page = subprocess.run(
        ["man", "-M", tmp_path / "share/man", "-w", "mtetool-dump"], capture_output=True, check=True
    )
    assert page.stdout.strip().endswith(b"mtetool-dump.1")
