"""Kill a relay in a lab machine after so many bytes that it has read or written."""

from __future__ import annotations

from shlex import quote
from typing import Literal

from tests.lab.machine import Machine

_WATCHER = """
import os, signal, sys, time
count, most, *wanted = sys.argv[1:]
wanted = {word.encode() for word in wanted}
while True:
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = open(f"/proc/{pid}/cmdline", "rb").read().split(b"\\0")
            if int(pid) == os.getpid() or not wanted <= set(words):
                continue
            done = dict(line.split(": ") for line in open(f"/proc/{pid}/io"))
            if int(done[count]) >= int(most):
                os.kill(int(pid), signal.SIGKILL)
                print("killed", pid, done[count].strip())
                raise SystemExit
        except OSError:
            pass
    time.sleep(0.05)
"""


def kill_later(
    lab: Machine, *words: str, read: int | None = None, written: int | None = None
) -> None:
    """Kill the first process with all these words in its command line, in the background.

    It is killed when it has read, or written, so many bytes; 0 is as soon as it is seen. (Loading
    Python's modules is reading, too: a few MiB.)
    """
    count: Literal["rchar", "wchar"] = "wchar" if read is None else "rchar"
    most = written if read is None else read
    lab.put("/tmp/kill.py", _WATCHER.encode())
    named = " ".join(quote(word) for word in words)
    lab.sh(f"rm -f /tmp/killed; python3 /tmp/kill.py {count} {most} {named} >/tmp/killed 2>&1 &")


def killed(lab: Machine) -> str:
    """What it was that was killed, and when."""
    said = lab.get("/tmp/killed").decode().strip()
    assert said.startswith("killed"), said
    return said
