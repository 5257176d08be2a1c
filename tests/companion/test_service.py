"""Who is served, and what strangers can do to the service; attaching itself is the lab's."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtetool.backends.kvm.starting import Wish
from mtetool.companion import client, service, serving
from mtetool.companion.listening import listener
from mtetool.errors import AttachRefusedError

_WISH = client.request(2, 1.5, required=True, every_call=False)


@contextmanager
def _running(path: Path, attach: Callable[[int, Wish], Callable[[], bool]]) -> Iterator[int]:
    """A service that attaches so, in a child; its output is ours."""
    made = listener(path)
    pid = os.fork()
    if pid == 0:
        try:
            service.Service(made, lambda end: serving.serve(end, str, attach)).run()
        finally:
            os._exit(1)
    made.close()
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "companion.sock"


def _recorded(record: Path) -> Callable[[int, Wish], Callable[[], bool]]:
    def attach(pid: int, wish: Wish) -> Callable[[], bool]:
        record.write_text(f"{pid} {wish.vm} {wish.seconds} {wish.required} {wish.user}")
        return lambda: True

    return attach


def test_the_process_that_asks_is_served_and_no_other(path: Path, tmp_path: Path) -> None:
    record = tmp_path / "record"
    with _running(path, _recorded(record)):
        assert client.ask(str(path), _WISH) is None
    assert record.read_text() == f"{os.getpid()} 2 1.5 True {os.getuid()}"


def test_a_client_that_left_its_connection_to_another_process(path: Path, tmp_path: Path) -> None:
    record = tmp_path / "record"
    with _running(path, _recorded(record)), _connected(path) as end:
        end.send(_WISH)
        nonce = end.recv(client.MESSAGE_BYTES).removeprefix(client.PROVE)
        pid = os.fork()
        if pid == 0:
            end.send(client.HERE + nonce)
            os._exit(0)
        os.waitpid(pid, 0)
        assert end.recv(client.MESSAGE_BYTES) == (
            client.REFUSED + b"the client is not the process that connected"
        )
    assert not record.exists()


def test_an_answer_that_was_written_before_the_question(path: Path, tmp_path: Path) -> None:
    record = tmp_path / "record"
    with _running(path, _recorded(record)), _connected(path) as end:
        end.send(_WISH)
        end.send(client.HERE)
        assert end.recv(client.MESSAGE_BYTES).startswith(client.PROVE)
        assert end.recv(client.MESSAGE_BYTES).startswith(client.REFUSED)
    assert not record.exists()


def test_a_client_that_ends_before_it_proves_itself(path: Path, tmp_path: Path) -> None:
    record = tmp_path / "record"
    with _running(path, _recorded(record)):
        pid = os.fork()
        if pid == 0:
            with _connected(path) as end:
                end.send(_WISH)
                os._exit(0)
        os.waitpid(pid, 0)
        assert client.ask(str(path), _WISH) is None  # the next one is served
    assert record.read_text().startswith(f"{os.getpid()} ")


@pytest.mark.parametrize(
    "words",
    [
        b"",
        b"mtetool-companion/2 vm=1 wait=1.000 require=0 every-call=0",
        b"mtetool-companion/1 vm=0 wait=1.000 require=0 every-call=0",
        b"mtetool-companion/1 vm=1 wait=nan require=0 every-call=0",
        _WISH + b" more=1",
        b"x" * 5000,
    ],
)
def test_a_request_of_another_kind_is_refused(path: Path, tmp_path: Path, words: bytes) -> None:
    record = tmp_path / "record"
    with _running(path, _recorded(record)):
        assert client.ask(str(path), words)
    assert not record.exists()


@given(st.binary(max_size=200))
def test_no_request_does_more_than_fail(words: bytes) -> None:
    asker = serving.Client(1, 2, 3, 4)
    try:
        wish = serving._wish(words, asker, str)
    except AttachRefusedError:
        return
    assert wish.user == asker.uid
    assert 0 <= wish.seconds <= 600


def test_the_answer_of_the_kernel_reaches_the_client(path: Path) -> None:
    def attach(pid: int, wish: Wish) -> Callable[[], bool]:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with _running(path, attach):
        why = client.ask(str(path), _WISH)
    assert why is not None
    assert why.startswith(f"attaching to process {os.getpid()} ")


def test_too_many_clients(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_MOST_OF_A_USER", 3)
    with _running(path, lambda pid, wish: lambda: True), ExitStack() as stack:
        silent = [stack.enter_context(_connected(path)) for _ in range(3)]
        assert client.ask(str(path), _WISH) == "the companion service has too many clients"
        silent[0].close()
        while client.ask(str(path), _WISH) is not None:
            pass  # until it has seen that one hung up


def test_an_error_that_nobody_expected(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def attach(pid: int, wish: Wish) -> Callable[[], bool]:
        raise RuntimeError("surprise")

    with _running(path, attach):
        why = client.ask(str(path), _WISH)
    assert why == f"the companion service at {path} hung up"
    said, deadline = "", time.monotonic() + 60
    while "this should not happen: RuntimeError('surprise')" not in said:
        assert time.monotonic() < deadline, said
        said += capfd.readouterr().err


def test_nobody_answers(path: Path) -> None:
    path.parent.mkdir()
    assert "No such file or directory" in str(client.ask(str(path), _WISH))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(path))
    assert "Connection refused" in str(client.ask(str(path), _WISH))
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        other.listen()
        assert "Protocol wrong type" in str(client.ask(str(path), _WISH))


def test_a_service_that_says_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_SECONDS", 0.2)
    with listener(path):
        assert "does not answer" in str(client.ask(str(path), _WISH))


def test_a_service_of_another_user(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() != 0:
        pytest.fail("this test changes its user: run it as root")
    with _running(path, lambda pid, wish: lambda: True):
        pass
    path.unlink()
    path.parent.chmod(0o777)
    for directory in path.parents:
        if directory.stat().st_uid == 0 and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o111)
    pid = os.fork()
    if pid == 0:
        os.setresuid(4711, 4711, 4711)
        with listener(path):
            signal.pause()
        os._exit(0)
    while not path.exists():
        pass
    try:
        while "runs as user 4711, not as root" not in (why := str(client.ask(str(path), _WISH))):
            assert "Connection refused" in why  # not yet
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextmanager
def _connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
        end.settimeout(60)
        end.connect(str(path))
        yield end


def test_the_wrapper_becomes_its_program_as_if_it_had_not_been(path: Path, tmp_path: Path) -> None:
    text = Path(client.__file__).read_text()
    program = "import os,sys;print(sys.argv[1:]);print(sorted(os.environ.items()), flush=True)"
    script = tmp_path / "program"
    script.write_text(f"#!{sys.executable} -IS\n{program}\n")
    script.chmod(0o755)
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(text.replace('"/usr/bin/qemu-system-aarch64"', repr(str(script))))
    words = ["-machine", "none,accel=kvm:tcg", "a b", "--", ""]
    environment = {"LANG": "C", "LC_ALL": "C", "PATH": "/usr/bin", "EMPTY": ""}
    plain = _output([str(script), *words], environment)
    wrapped = _output([sys.executable, "-IS", str(wrapper), *words], environment)
    assert wrapped[0] == plain[0]
    assert wrapped[1].startswith("mtetool: the companion service does not answer at ")
    assert wrapped[1].endswith(", so this VM has no MTE\n")
    assert wrapped[1].count("\n") == 1


@pytest.mark.parametrize(
    ("line", "asks"),
    [
        ("-S -machine none,accel=kvm:tcg -daemonize", True),
        ("-S -machine none,accel=tcg -daemonize", False),
        ("-M virt -accel tcg,thread=multi", False),
        ("-M virt,accel=tcg -accel kvm", True),
        ("-machine virt -name accel=tcg", True),
        ("-readconfig /etc/vm.cfg -accel tcg", True),
        ("--accel tcg -accel", False),
        ("", True),
    ],
)
def test_the_wrapper_asks_for_vms_of_kvm_only(line: str, asks: bool) -> None:
    assert client.may_use_kvm(line.split()) is asks


def test_a_wrapper_without_its_program(tmp_path: Path) -> None:
    wrapper = tmp_path / "wrapper"
    text = Path(client.__file__).read_text()
    wrapper.write_text(text.replace("/usr/bin/qemu-system-aarch64", "/no/such"))
    done = subprocess.run(
        [sys.executable, "-IS", str(wrapper)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.endswith("mtetool: /no/such cannot be executed: No such file or directory\n")


def _output(words: list[str], environment: dict[str, str]) -> tuple[str, str]:
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, check=True, errors="replace"
    )
    return done.stdout, done.stderr
