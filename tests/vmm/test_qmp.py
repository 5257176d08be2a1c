"""Strange answers in a monitor's place end in a clear error, and in time."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtetool.errors import LayoutUnknownError
from mtetool.vmm import monitors, qmp, unix_sockets
from mtetool.vmm.qemu import Monitor
from tests.vmm import strange

MTREE_LINE = "  {:016x}-{:016x} (prio 0, ram): ram KVM\n"

ASKED: dict[str, Callable[[Monitor], object]] = {
    "memslots": Monitor.memslots,
    "host_addresses": Monitor.host_addresses,
    "paused": Monitor.paused,
    "name": Monitor.name,
    "vcpu_threads": Monitor.vcpu_threads,
}


def _region(first: int, last: int) -> str:
    return MTREE_LINE.format(first, last)


def _asked(path: Path, what: str, sent: bytes) -> object:
    commands = ("query_status", "query_name", "query_cpus_fast", "human_monitor_command")
    answer = strange.answers(**dict.fromkeys(commands, sent))
    with (
        strange.monitor(path / "s", answer) as where,
        monitors.open_given(os.getpid(), where) as monitor,
    ):
        return ASKED[what](monitor)


@pytest.mark.parametrize("what", ASKED)
@pytest.mark.parametrize(
    "sent",
    [
        b'{"error": "x"}\n',
        b'{"error": {"desc": 1}}\n',
        b'{"error": {"desc": "no"}}\n',
        b'{"return": []}\n' * 2,
        b'{"return": [[]]}\n',
        b'{"return": null}\n',
        b'{"return": NaN}\n',
        b'{"return": 1e999}\n',
        b'{"return": {"running": "yes", "name": 7}}\n',
        b'{"return": [{"thread-id": true}]}\n',
        b'{"return": [{"thread-id": 1}, {"thread-id": 1}]}\n',
        b'{"return": {"running": 1, "name": ["x"]}}\n',
        b'{"return": ' + b"9" * 5000 + b"}\n",
        b'{"return": ' + b"[" * 5000 + b"]" * 5000 + b"}\n",
        b'{"a":' * 5000,
        b"[" * 5000,
        b"true\n",
        b"QEMU 11.1.3 monitor - type 'help' for more information\n(qemu) ",
        b'{"return": "\xff"}\n',
        b'{"return": {}]\n',
        b"{}}\n",
        b"\0" * 100,
        b'{"\0": 1}',
    ],
)
def test_strange_answers_are_refused_in_words(tmp_path: Path, what: str, sent: bytes) -> None:
    with suppress(LayoutUnknownError):
        # No name and no vCPUs are answers of the right kind.
        assert _asked(tmp_path, what, sent) in (None, frozenset())


@pytest.mark.parametrize(
    "text",
    [
        _region(0, 0xFFF_FFFF) + _region(0xFFF_F000, 0x1FFF_FFFF),
        _region(0, 0xFFF_FFFF) + _region(0, 0x1FFF_FFFF),
        _region(0x2000, 0xFFF),
        _region(0x800, 0x17FF),
        _region(0, 0xFFFF_FFFF_FFFF_FFFF),
        _region(1 << 52, (1 << 52) + 0xFFF),
        "".join(_region(at, at + 0xFFF) for at in range(0, 40_000 << 13, 1 << 13)),
    ],
)
def test_memory_that_no_vm_can_have_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(LayoutUnknownError, match="no VM can have"):
        _asked(tmp_path, "memslots", json.dumps({"return": text}).encode() + b"\n")


@pytest.mark.parametrize(
    "text",
    [
        "Host virtual address for 0x0 (ram) is 0x" + "f" * 17,
        "Host virtual address for 0x1 is " * 100_000,
        "Memory at address 0x0 is not RAM",
    ],
)
def test_addresses_that_cannot_be_are_unknown(tmp_path: Path, text: str) -> None:
    def answer(command: str) -> Iterator[bytes]:
        given = text if next(asked) else _region(0, 0xFFF)
        yield from strange.answers(human_monitor_command=given)(command)

    asked = itertools.chain([0, 0, 0], itertools.repeat(1))  # greeting, capabilities, mtree
    with (
        strange.monitor(tmp_path / "s", answer) as path,
        monitors.open_given(os.getpid(), path) as monitor,
    ):
        assert monitor.host_addresses() == []


@pytest.mark.parametrize(
    ("piece", "why"),
    [
        (b'{"event": "RESUME"}\n', "never stops sending events"),
        (b'{"event": "RESUME"}', "never stops sending events"),
        (b"x", "does not speak QMP"),
        (b'{"return": "' + b"x" * 65536, "does not speak QMP"),
        (b'{"return": ["' + b'\\"' * 65536, "does not speak QMP"),
    ],
)
def test_what_never_ends_is_left(tmp_path: Path, piece: bytes, why: str) -> None:
    def answer(command: str) -> Iterator[bytes]:
        return itertools.repeat(piece) if command == "query-status" else good(command)

    good = strange.answers()
    with (
        strange.monitor(tmp_path / "s", answer) as path,
        monitors.open_given(os.getpid(), path) as monitor,
        pytest.raises(LayoutUnknownError, match=why),
    ):
        monitor.paused()


@pytest.mark.parametrize("piece", [b" ", b"", b'{"event": "RESUME"}\n', b"{"])
def test_one_deadline_holds_for_the_whole_conversation(tmp_path: Path, piece: bytes) -> None:
    """A piece now and then, each of them before a timeout of its own would end."""
    ended = threading.Event()

    def answer(command: str) -> Iterator[bytes]:
        if command != "query-status":
            yield from good(command)
            return
        while not ended.wait(0.01):
            yield piece

    good = strange.answers()
    with (
        strange.monitor(tmp_path / "s", answer) as path,
        unix_sockets.connect(os.open(path, os.O_PATH), 1.0) as connection,
    ):
        conversation = qmp.Conversation(connection, "here", qmp.Patience(0.5))
        conversation.open()
        monitor = Monitor(conversation)
        try:
            with pytest.raises(LayoutUnknownError, match=r"here cannot be used: .* not answer"):
                monitor.paused()
        finally:
            ended.set()


def test_late_answer_is_not_taken_for_that_to_another_question(tmp_path: Path) -> None:
    late = b'{"event": "X"}\n' * 10_001 + b'{"return": {"running": true, "name": "late"}}\n'
    answer = strange.answers(query_status=late, query_name={"name": "good"})
    with (
        strange.monitor(tmp_path / "s", answer) as path,
        monitors.open_given(os.getpid(), path) as monitor,
    ):
        for ask in (monitor.paused, monitor.name, monitor.memslots):
            with pytest.raises(LayoutUnknownError, match="never stops sending events"):
                ask()


def test_pretty_answers_and_many_in_one_piece(tmp_path: Path) -> None:
    pretty = json.dumps({"return": {"running": True}, "id": 'a "quoted" }{'}, indent=4).encode()
    event = json.dumps({"event": "X", "data": {"path": 'C:\\"}]'}}, indent=1).encode()

    def answer(command: str) -> Iterator[bytes]:
        if command != "query-status":
            yield from strange.answers(query_name={"name": "vm [1]"})(command)
            return
        for byte in event + b"\r\n" + event:
            yield bytes([byte])
        yield b"\r\n" + pretty + b"\r\n"

    with (
        strange.monitor(tmp_path / "s", answer) as path,
        monitors.open_given(os.getpid(), path) as monitor,
    ):
        assert monitor.paused() is False
        assert monitor.name() == "vm [1]"


def test_names_are_cut_and_kept_as_they_are(tmp_path: Path) -> None:
    name = "\x1b[2J\n\ud800" + "x" * (1 << 20)
    sent = json.dumps({"return": {"name": name}}).encode() + b"\n"
    assert _asked(tmp_path, "name", sent) == name[:1024]


@given(
    st.lists(st.dictionaries(st.text(), st.text()), max_size=5),
    st.sampled_from([None, 2]),
    st.integers(1, 20),
)
def test_messages_are_cut_wherever_the_pieces_end(
    objects: list[dict[str, str]], indent: int | None, size: int
) -> None:
    stream = "\r\n".join(json.dumps(o, indent=indent, ensure_ascii=False) for o in objects).encode()
    messages, found = qmp.Messages(), []
    while stream:
        messages.feed(stream[:size])
        stream = stream[size:]
        while (message := messages.take()) is not None:
            found.append(json.loads(message))
    assert found == objects


@given(st.binary())
def test_no_stream_does_harm(stream: bytes) -> None:
    messages = qmp.Messages()
    messages.feed(stream)
    with suppress(ValueError):
        while messages.take() is not None:
            pass
