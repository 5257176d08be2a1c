"""The service's socket: made at a path, or handed over."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mtetool.companion.listening import listener
from mtetool.errors import BusyError, FileExistsAlreadyError, HostError

_ROOT = Path(__file__).parent.parent.parent
# Becomes a listener the way a service manager starts one: the socket is descriptor 3.
_HANDED = """
import os, socket, sys
from pathlib import Path
from mtetool.companion.listening import listener
from mtetool.errors import UsageError
os.environ["LISTEN_PID"] = str(os.getpid())
kind, count = sys.argv[1:]
if kind == "file":
    made = open(os.devnull)
else:
    made = socket.socket(socket.AF_UNIX, getattr(socket, "SOCK_" + kind.partition("-")[0]))
    made.bind("handed")
    if "-silent" not in kind:
        made.listen()
if made.fileno() != 3:
    os.dup2(made.fileno(), 3)
os.environ["LISTEN_FDS"] = count
try:
    found = listener(Path("unused"))
    made_one, inherits = os.path.exists("unused"), "LISTEN_FDS" in os.environ
    print(found.fileno(), os.get_inheritable(3), made_one, inherits)
except UsageError as error:
    print(error.message)
"""


def test_everyone_may_connect_and_nobody_else_listens(tmp_path: Path) -> None:
    path = tmp_path / "run" / "companion.sock"
    with listener(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
        with pytest.raises(BusyError, match="another process serves"):
            listener(path)
    with listener(path):  # what the first one left is replaced
        pass


def test_a_path_that_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(FileExistsAlreadyError):
        listener(path)
    assert path.read_text() == "precious"


@pytest.mark.parametrize("path", ["no/such/dir/sock", "x" * 200])
def test_a_path_where_no_socket_can_be(tmp_path: Path, path: str) -> None:
    with pytest.raises(HostError):
        listener(tmp_path / path)


@pytest.mark.parametrize(
    ("kind", "count", "said"),
    [
        ("SEQPACKET", "1", "3 False False False"),
        ("SEQPACKET", "2", "the service manager handed over 2 descriptors instead of one"),
        ("SEQPACKET-silent", "1", "the service manager handed over another kind of socket"),
        ("STREAM", "1", "the service manager handed over another kind of socket"),
        ("file", "1", "the service manager handed over a descriptor that is not a socket"),
    ],
)
def test_a_socket_that_is_handed_over(tmp_path: Path, kind: str, count: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HANDED, kind, count],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(said)


def test_descriptors_for_another_process_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    with listener(tmp_path / "sock") as made:
        assert made.family == socket.AF_UNIX
        assert (tmp_path / "sock").exists()
