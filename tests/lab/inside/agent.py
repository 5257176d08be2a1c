"""Run commands in a lab machine for the host, over a virtio-serial port of its own.

Frames both ways: a type byte, a 32-bit big-endian length, the payload. From the host: R, a
command as JSON, then I, its standard input; for a command with "talk", more I frames as they
come, with an empty one at the end. To the host: H once, O and E as output comes, X with the end
as JSON. Nothing else writes to the port, so no output can look like an end.

Python programs of the checkout are forks of this one; see `tests.lab.forked`.
"""

import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, "/opt/mtetool")

from tests.lab.forked import Fork, program

_CHUNK = 1 << 16

End = dict[str, Any]


def open_port() -> int:
    """Open the port, once the driver has created it."""
    while True:
        for path in Path("/dev").glob("vport*p1"):
            return os.open(path, os.O_RDWR)
        time.sleep(0.01)


def receive(port: int) -> tuple[bytes, bytes]:
    """Read the next frame; return its type and payload."""
    kind, length = struct.unpack(">cI", read_exactly(port, 5))
    return kind, read_exactly(port, length)


def read_exactly(port: int, length: int) -> bytes:
    """Read `length` bytes; wait for the host as long as it takes."""
    data = bytearray()
    while len(data) < length:
        piece = os.read(port, min(length - len(data), _CHUNK))
        if not piece:
            # The host has not connected yet, or is gone for good.
            time.sleep(0.01)
        data += piece
    return bytes(data)


def send(port: int, kind: bytes, payload: bytes) -> None:
    """Write a frame."""
    view = memoryview(struct.pack(">cI", kind, len(payload)) + payload)
    while view:
        view = view[os.write(port, view[:_CHUNK]) :]


def run(port: int, request: dict[str, Any], stdin: bytes) -> End:
    """Run one command to its end; return how it ended."""
    argv, cwd, env = request["argv"], request["cwd"], request["env"]
    fork = program(argv, env) if request["fork"] else None
    if fork is not None:
        with Fork(fork, argv, cwd, env) as forked:
            deadline = time.monotonic() + request["timeout"]
            return follow(port, forked, stdin, deadline, talk=request["talk"])
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env=os.environ | env,
            start_new_session=True,
            # VMMs and other programs that are never idle get the CPU time that mtetool leaves.
            preexec_fn=lambda: os.nice(19),
        )
    except OSError as error:
        send(port, b"E", f"{argv[0]}: {error.strerror}\n".encode())
        return {"status": 127, "timeout": False}
    with process:
        deadline = time.monotonic() + request["timeout"]
        return follow(port, process, stdin, deadline, talk=request["talk"])


def follow(
    port: int, process: subprocess.Popen[bytes] | Fork, stdin: bytes, deadline: float, *, talk: bool
) -> End:
    """Pass input and output on until the command itself has ended."""
    assert process.stdin
    assert process.stdout
    assert process.stderr
    outputs = {process.stdout.fileno(): b"O", process.stderr.fileno(): b"E"}
    selector = selectors.DefaultSelector()
    ended = os.pidfd_open(process.pid)
    selector.register(ended, selectors.EVENT_READ, b"")
    for fd, kind in outputs.items():
        os.set_blocking(fd, False)
        selector.register(fd, selectors.EVENT_READ, kind)
    if talk:
        selector.register(port, selectors.EVENT_READ, b"T")
    else:
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE, b"I")
    view, timeout = memoryview(stdin), False
    while process.poll() is None:
        left = deadline - time.monotonic()
        if left <= 0 and not timeout:
            timeout = True
            os.killpg(process.pid, signal.SIGKILL)
        for key, _ in selector.select(max(left, 0.01)):
            if key.data in (b"O", b"E"):
                if not pass_on(port, key.fd, key.data):
                    selector.unregister(key.fd)
            elif key.data == b"T":
                hear(port, process.stdin)
            elif key.data == b"I":
                view = feed(selector, process.stdin, view)
    # Pass on what the command left in its pipes; its children may hold them open for ever.
    for fd, kind in outputs.items():
        while pass_on(port, fd, kind):
            pass
    selector.close()
    os.close(ended)
    return {"status": process.returncode, "timeout": timeout}


def hear(port: int, stdin: IO[bytes]) -> None:
    """Pass on one piece of input from the host; the command reads it all before it answers."""
    _, data = receive(port)
    try:
        if data:
            stdin.write(data)
            stdin.flush()
        else:
            stdin.close()
    except BrokenPipeError:
        pass


def feed(selector: selectors.BaseSelector, stdin: IO[bytes], view: memoryview) -> memoryview:
    """Write some of what is left of standard input, and close it at the end."""
    try:
        view = view[os.write(stdin.fileno(), view[:_CHUNK]) :] if view else view
    except BrokenPipeError:
        view = memoryview(b"")
    if not view:
        selector.unregister(stdin)
        stdin.close()
    return view


def pass_on(port: int, fd: int, kind: bytes) -> bool:
    """Pass on what is in a pipe; return whether there was anything."""
    try:
        data = os.read(fd, _CHUNK)
    except BlockingIOError:
        return False
    if data:
        send(port, kind, data)
    return bool(data)


def main() -> None:
    """Serve until the host sends Q."""
    port = open_port()
    send(port, b"H", b"")
    while True:
        kind, payload = receive(port)
        if kind == b"Q":
            return
        if kind != b"R":
            continue  # input for a command that had already ended
        _, stdin = receive(port)
        send(port, b"X", json.dumps(run(port, json.loads(payload), stdin)).encode())


if __name__ == "__main__":
    main()
