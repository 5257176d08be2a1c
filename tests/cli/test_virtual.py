"""`dump --virtual` where there is no vCPU to ask, and options that mean nothing together."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import run


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "e"
    assert run("emu", "create", path, "--memory", "64K").status == 0
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--virtual",), "--virtual goes with --at"),
        (("--at", "0x40000000", "--vcpu", "0"), "--vcpu goes with --virtual"),
        (("--at", "0x40000000", "--virtual", "--range", "0:4K"), "--range does not go with --at"),
        (("--at", "0x40000000", "--virtual"), "it has no vCPU to ask"),
    ],
)
def test_usage(small: Path, words: tuple[str, ...], message: str) -> None:
    outcome = run("dump", f"emu:{small}", *words)
    assert outcome.status == 2
    assert message in outcome.err


def test_a_snapshot_has_no_vcpu(small: Path, tmp_path: Path) -> None:
    assert run("save", f"emu:{small}", "-o", tmp_path / "s").status == 0
    outcome = run("dump", tmp_path / "s", "--virtual", "--at", "0x40000000", "--json")
    assert outcome.status == 2
    assert outcome.error["error"] == "usage"


def test_a_kernels_address_without_the_option_gets_a_hint(small: Path) -> None:
    outcome = run("dump", f"emu:{small}", "--at", "0xf3ff000003e08010")
    assert "--virtual translates those" in outcome.out
