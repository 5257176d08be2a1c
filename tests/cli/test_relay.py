"""`mtetool relay` with what cannot work: a status and a sentence, before anybody is connected."""

from __future__ import annotations

import json

import pytest

from mtetool.cli import relay
from mtetool.cli.progress import shown
from mtetool.relay.report import Report
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


def test_progress_says_what_is_held_back(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("source", stream_bytes=9, rounds=4, tag_pages=2, tag_bytes=70, stage="held")
    with shown("relaying", "json", lambda: relay._details([report])) as update:
        update(4096, 8192)
    line = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert line["schema"] == "mtetool.progress/1"
    assert (line["done_bytes"], line["stage"]) == (4096, "held")
    assert (line["stream_bytes"], line["rounds"], line["tag_pages"]) == (9, 4, 2)
