"""`mtetool relay` with what cannot work: a status and a sentence, before anybody is connected."""

from __future__ import annotations

import pytest

from tests.cli.running import run

_FROM = ("relay", "source", "--from", "listen:unix:/nonexistent/out")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("relay",), 2, "Missing command"),
        (("relay", "source", "--from", "nix", "--to", "-"), 2, "not an address of QEMU"),
        ((*_FROM, "--to", "tcp:host:1"), 2, "clear text"),
        ((*_FROM, "--to", "unix:/x", "--guest", "proc:1"), 2, "not a guest that QEMU migrates"),
        ((*_FROM, "--to", "exec:/no/such"), 2, "no command"),
        ((*_FROM, "--to", "exec:false"), 4, "ended with status 1"),
        ((*_FROM, "--to", "exec:echo hello"), 4, "is not a relay of mtetool"),
    ],
)
def test_what_cannot_work(words: tuple[str, ...], status: int, said: str) -> None:
    outcome = run(*words)
    assert (outcome.status, outcome.out) == (status, "")
    assert said in outcome.err
