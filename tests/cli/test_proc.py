"""`proc:PID` where it cannot work: on a host that is not arm64."""

from __future__ import annotations

import os
import platform

import pytest

from tests.cli.running import run


def test_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    outcome = run("dump", f"proc:{os.getpid()}", "--json")
    assert outcome.status == 4
    assert outcome.error["error"] == "not-arm64"


@pytest.mark.parametrize(
    ("words", "status", "error"),
    [
        (["proc:"], 2, "bad-source"),
        (["proc:12x"], 2, "bad-source"),
        ([f"proc:{os.getpid()}"], 4, "attach-refused"),
        (["proc:4194303"], 4, "no-such-process"),
        ([f"proc:{os.getppid()}", "--memslot", "0:4096"], 2, "usage"),
        ([f"proc:{os.getppid()}"], 4, "mte-off"),
    ],
)
def test_what_is_refused_before_anything_is_touched(
    monkeypatch: pytest.MonkeyPatch, words: list[str], status: int, error: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    outcome = run("dump", *words, "--json")
    assert (outcome.status, outcome.error["error"]) == (status, error), outcome
