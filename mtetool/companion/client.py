"""Ask the companion service to attend the start of this process's VM.

This file is two things: a module that `mtetool exec` uses, and, printed by `mtetool companion
--show wrapper`, a program of its own: the emulator that libvirt starts instead of QEMU. Python's
start is most of its time, so it imports only what the interpreter has loaded anyway, or is in C.
"""

import _signal  # type: ignore[import-not-found] # signal itself loads more
import _socket
import os
import sys
import time

SOCKET = "/run/mtetool/companion.sock"
QEMU = "/usr/bin/qemu-system-aarch64"
REQUIRE = False  # True: start no VM at all if MTE cannot be enabled

VERSION = b"mtetool-companion/1"
PROVE, HERE, ATTACHED, REFUSED = b"prove ", b"here ", b"attached", b"refused "
MESSAGE_BYTES = 1024
_SECONDS = 10.0
_SHOWN = 300
_STATUS_USAGE, _STATUS_GUEST = 2, 4


def request(vm: int, seconds: float, *, required: bool, every_call: bool) -> bytes:
    """The first message to the service; the words are options of `mtetool exec`."""
    words = f"vm={vm} wait={seconds:.3f} require={required:d} every-call={every_call:d}"
    return VERSION + b" " + words.encode()


def ask(path: str, wish: bytes) -> str | None:
    """Ask the service at `path`; return None once it has attached to us, or why it has not.

    Bounded to ten seconds. The service asks for a second message, which proves that the process
    that connected still has its PID.
    """
    deadline = time.monotonic() + _SECONDS
    end = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)

    def patience() -> None:
        end.settimeout(max(deadline - time.monotonic(), 0.001))

    def answer_to(message: bytes) -> bytes:
        # A service that refuses does not wait for what we say: its answer comes after the error.
        patience()
        try:  # noqa: SIM105 - contextlib would have to be loaded
            end.send(message)
        except BrokenPipeError:
            pass
        patience()
        try:
            return end.recv(MESSAGE_BYTES)
        except ConnectionResetError:
            return end.recv(MESSAGE_BYTES)

    try:
        patience()
        end.connect(path)
        peer = end.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
        uid = int.from_bytes(peer[4:8], sys.byteorder)
        if uid not in (0, os.getuid()):
            return f"the companion service at {path} runs as user {uid}, not as root"
        answer = answer_to(wish)
        if answer.startswith(PROVE):
            answer = answer_to(HERE + answer.removeprefix(PROVE))
    except OSError as error:
        return f"the companion service does not answer at {path}: {error.strerror or error}"
    finally:
        end.close()
    if answer == ATTACHED:
        return None
    if answer.startswith(REFUSED):
        said = answer.removeprefix(REFUSED).decode(errors="replace")[:_SHOWN]
        return "".join(c if c.isprintable() else "?" for c in said)
    return f"the companion service at {path} hung up" if not answer else "it is of another version"


def _environment() -> dict[bytes, bytes]:
    """The environment that we were started with: Python may have set LC_CTYPE since."""
    try:
        file = os.open("/proc/self/environ", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return dict(os.environb)
    data = b""
    while piece := os.read(file, 1 << 20):
        data += piece
    os.close(file)
    pairs = (entry.partition(b"=") for entry in reversed(data.split(b"\0")))
    return {name: value for name, equals, value in pairs if name and equals}


def may_use_kvm(words: list[str]) -> bool:
    """Whether QEMU may create a VM of KVM's with these arguments: where they do not say, it may.

    libvirt probes an emulator without KVM too; watching all of that would slow it for nothing.
    """
    said = []
    for option, value in zip(words, words[1:]):  # noqa: B905, RUF007 - itertools takes time to load
        option = option.lstrip("-")
        if option == "readconfig":
            return True
        if option in ("machine", "M"):
            said += [word for word in value.split(",") if word.startswith("accel=")]
        elif option == "accel":
            said.append(value)
    return not said or any("kvm" in accelerator for accelerator in said)


def main() -> None:
    """Become QEMU with the same arguments, in this process."""
    why = None
    if may_use_kvm(sys.argv[1:]):
        why = ask(SOCKET, request(1, 60.0, required=REQUIRE, every_call=False))
    if why is not None:
        end = "so it is not started" if REQUIRE else "so this VM has no MTE"
        _say(f"{why}, {end}")
        if REQUIRE:
            sys.exit(_STATUS_GUEST)
    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):  # Python ignores them
        _signal.signal(number, _signal.SIG_DFL)
    try:
        os.execve(QEMU, [QEMU, *sys.argv[1:]], _environment())  # noqa: S606 - that is its purpose
    except OSError as error:
        _say(f"{QEMU} cannot be executed: {error.strerror}")
        sys.exit(_STATUS_USAGE)


def _say(line: str) -> None:
    os.write(2, f"mtetool: {line}\n".encode(errors="backslashreplace"))


if __name__ == "__main__":
    main()
