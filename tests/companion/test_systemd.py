"""The service as systemd starts it: the units, and a socket that one of its programs passes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mtetool.companion import client
from mtetool.companion.installing import text_of

_ROOT = Path(__file__).parent.parent.parent


def test_the_units_have_no_mistake(tmp_path: Path) -> None:
    paths = []
    for name in ("socket", "service"):
        path = tmp_path / f"mtetool-companion.{name}"
        path.write_text(text_of(name))
        paths.append(str(path))
    done = subprocess.run(
        ["systemd-analyze", "--man=no", "verify", *paths],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("kind", ["--seqpacket", ""])
def test_a_socket_of_systemd(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "sock"
    words = [sys.executable, "-m", "mtetool", "companion", "--socket", str(tmp_path / "unused")]
    # `-l` is made before the program starts, as by systemd: the first client waits meanwhile.
    command = ["systemd-socket-activate", *filter(None, [kind]), "-l", str(path)]
    started = subprocess.Popen(
        [*command, f"--setenv=PYTHONPATH={_ROOT}", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert started.stdout is not None
    assert "Listening on" in started.stdout.readline()
    try:
        if kind:
            # A request that the service understands and refuses.
            why = client.ask(str(path), b"mtetool-companion/0 hello")
            assert why is not None
            assert "it speaks mtetool-companion/1" in why
        else:
            assert "Protocol wrong type" in str(client.ask(str(path), b""))
        assert not (tmp_path / "unused").exists()
    finally:
        started.terminate()
        started.communicate(timeout=60)
