"""Who else has a pipe of ours open, and for what."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mtetool.vmm.descriptors import pipe_holders

_WAIT = "import sys; sys.stderr.write('.'); sys.stderr.close(); sys.stdin.read()"


def test_the_other_end_of_a_pipe() -> None:
    there, ours = os.pipe()
    ours2, theirs = os.pipe()
    command = [sys.executable, "-c", _WAIT]
    with subprocess.Popen(command, stdin=there, stdout=theirs, stderr=-1) as process:
        assert process.stderr
        process.stderr.read(1)  # it no longer has what Popen itself opened
        os.close(there)
        os.close(theirs)
        assert pipe_holders(ours, writers=False) == [process.pid]
        assert pipe_holders(ours2, writers=True) == [process.pid]
        # It does not write to what it reads from, and the other way round.
        assert pipe_holders(ours, writers=True) == []
        assert pipe_holders(ours2, writers=False) == []
        os.close(ours)
    assert pipe_holders(ours2, writers=True) == []
    os.close(ours2)


def test_no_pipe(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        assert pipe_holders(file.fileno(), writers=True) == []
