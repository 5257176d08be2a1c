"""Faults on the command line, and how every command handles each kind."""

from __future__ import annotations

import errno
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtetool.cli.faults import parse_fault
from mtetool.faults.model import Delay, Direction, Fail, Fault, Rate, Vanish
from tests.cli.running import BASE, KIB, ROM, Outcome, make_guest, run, same_tags, set_tag

PAGE = 4096


# --- how they are written -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("EFAULT", Fault(Fail(errno.EFAULT))),
        ("EWOULDBLOCK", Fault(Fail(errno.EAGAIN))),
        ("vanish,after=1000", Fault(Vanish(), after=1000)),
        ("slow=1ms", Fault(Delay(1_000_000))),
        ("slow=2.5us,on=read", Fault(Delay(2500), on="read")),
        ("slow=64M/s", Fault(Rate(64 << 20))),
        ("EIO,on=write,at=0x40010000", Fault(Fail(errno.EIO), on="write", at=(0x4001_0000, 1))),
        ("EIO,at=1G:64K,times=2", Fault(Fail(errno.EIO), at=(1 << 30, 1 << 16), times=2)),
        ("EINTR,every=100", Fault(Fail(errno.EINTR), every=100)),
        ("EBUSY,seed=3,chance=0.25", Fault(Fail(errno.EBUSY), chance=0.25, seed=3)),
    ],
)
def test_written(text: str, fault: Fault) -> None:
    assert parse_fault(text) == fault


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' is not an effect"),
        ("efault", "'efault' is not an effect"),
        ("EBOO", "such as EFAULT,on=read"),
        ("errorcode", "is not an effect"),
        ("14", "is not an effect"),
        ("slow=", "such as 1ms"),
        ("slow=1", "such as 1ms"),
        ("slow=-1ms", "such as 1ms"),
        ("slow=0ms", "a delay is 0"),
        ("slow=0/s", "a rate is 0"),
        ("slow=fast/s", "'fast' is not a number"),
        ("vanish,times=1", "vanishes once"),
        ("EFAULT,", "'' is not a condition"),
        ("EFAULT,on", "'on' is not a condition"),
        ("EFAULT,until=3", "'until=3' is not a condition"),
        ("EFAULT,on=both", "neither read nor write"),
        ("EFAULT,on=read,on=write", "on= is given twice"),
        ("EFAULT,at=x", "at=: 'x' is not a number"),
        ("EFAULT,at=0:0", "the size is 0"),
        ("EFAULT,at=0xffffffffffffffff:2", "beyond 64 bits"),
        ("EFAULT,every=0", "'every' is 0"),
        ("EFAULT,chance=2", "not a probability"),
        ("EFAULT,chance=1.5", "chance=1.5"),
        ("EFAULT,chance=0", "above 0"),
        ("EFAULT,chance=0.5,seed=18446744073709551616", "64 bits"),
        ("EFAULT,seed=1", "without a chance"),
        ("EFAULT,times=0", "'times' is 0"),
        ("E" + "X" * 10_000, "…"),
    ],
)
def test_badly_written_changes_nothing(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "guest"
    outcome = run("emu", "create", path, "--fault", text, "--json")
    assert (outcome.status, outcome.error["error"]) == (2, "usage")
    assert says in outcome.error["message"]
    assert len(outcome.error["message"]) < 400
    assert not path.exists()
    run("emu", "create", path, "--memory", "64K")
    before = path.read_bytes()
    assert run("emu", "fault", path, "--fault", text).status == 2
    assert path.read_bytes() == before


numbers = st.integers(0, 2**64 - 1)
effects = st.one_of(
    st.sampled_from(sorted(errno.errorcode)).map(Fail),
    st.just(Vanish()),
    st.integers(1, 10**18).map(Delay),
    st.integers(1, 2**64 - 1).map(Rate),
)


@st.composite
def any_faults(draw: st.DrawFn) -> Fault:
    effect = draw(effects)
    ipa = draw(numbers)
    chance = draw(st.just(1.0) | st.integers(1, 10**9 - 1).map(lambda n: n / 10**9))
    directions: list[Direction | None] = [None, "read", "write"]
    return Fault(
        effect,
        on=draw(st.sampled_from(directions)),
        at=draw(st.none() | st.tuples(st.just(ipa), st.integers(1, 2**64 - ipa))),
        after=draw(numbers),
        every=draw(st.integers(1, 2**64 - 1)),
        chance=chance,
        seed=draw(numbers) if chance < 1 else 0,
        times=None if isinstance(effect, Vanish) else draw(st.none() | numbers.filter(bool)),
    )


@settings(deadline=None)
@given(any_faults())
def test_shown_as_they_are_written(fault: Fault) -> None:
    assert parse_fault(str(fault)) == fault


@settings(deadline=None)
@given(st.text("EFAULTvanishslow=,atonrdwe0123x:K/ms.", max_size=40))
def test_any_text_is_a_fault_or_a_usage_error(text: str) -> None:
    with suppress(ValueError):
        parse_fault(text)


# --- made, shown, changed -----------------------------------------------------------------


def test_created_shown_changed_and_cleared(tmp_path: Path) -> None:
    path = tmp_path / "guest"
    words = ["--fault", "EFAULT,on=read,at=0x40001000,times=1", "--fault", "vanish,after=40"]
    made = run("emu", "create", path, "--memory", "64K", *words, "--json").json
    rows = [
        {"fault": "EFAULT,on=read,at=0x40001000:0x1,times=1", "fired": 0, "spent": False},
        {"fault": "vanish,after=40", "fired": 0, "spent": False},
    ]
    assert (made["faults"], made["vanished"]) == (rows, False)
    assert run("dump", f"emu:{path}").status == 3
    assert run("dump", f"emu:{path}").status == 0
    assert run("dump", f"emu:{path}").status == 4
    for what in ("show", "fault"):
        shown = run("emu", what, path, "--json").json
        assert shown["schema"] == f"mtetool.emu-{what}/1"
        assert [row["fired"] for row in shown["faults"]] == [1, 1]
        assert [row["spent"] for row in shown["faults"]] == [True, False]
        assert shown["vanished"] is True
        assert run("emu", what, path).out.splitlines()[-4:] == [
            "vanished (an injected fault)",
            "fault                                     fired",
            "EFAULT,on=read,at=0x40001000:0x1,times=1      1  spent",
            "vanish,after=40                               1",
        ]
    gone = run("dump", f"emu:{path}", "--json")
    assert (gone.status, gone.error["error"]) == (4, "no-such-process")
    assert "emu fault" in gone.error["hint"]
    changed = run("emu", "fault", path, "--fault", "slow=1ns", "--json").json
    assert changed["faults"] == [{"fault": "slow=1ns", "fired": 0, "spent": False}]
    assert changed["vanished"] is False
    assert run("dump", f"emu:{path}").status == 0
    assert run("emu", "fault", path, "--clear").out == "no faults\n"
    assert run("emu", "show", path, "--json").json["faults"] == []


def test_bad_usage(tmp_path: Path) -> None:
    path = tmp_path / "guest"
    run("emu", "create", path, "--memory", "64K")
    assert run("emu", "fault", path, "--clear", "--fault", "EIO").status == 2
    assert run("emu", "fault", tmp_path / "no").status == 2
    assert run("emu", "fault", path, *["--fault", "EIO"] * 17).status == 2
    assert run("emu", "fault", path).out == "no faults\n"


# --- how the commands handle each kind ----------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A fault's effect, and what a command that meets it half-way reports.

    If `error` is None, it reports pages with the errno; otherwise it ends with that error.
    """

    effect: str
    error: str | None


KINDS = [
    Kind("EFAULT", None),
    Kind("EINTR", None),
    Kind("EAGAIN", None),
    Kind("ENOMEM", None),
    Kind("ENOSPC", None),
    Kind("EOVERFLOW", None),
    Kind("EBUSY", "busy"),
    Kind("EIO", "guest-lost"),
    Kind("vanish", "guest-lost"),
    Kind("EINVAL", "guest"),
    Kind("EPERM", "guest"),
    Kind("EACCES", "guest"),
    Kind("EBADF", "guest"),
    Kind("ENOTTY", "guest"),
]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.effect)
# In the slot of 128 pages at BASE, after the 16 pages of read-only memory.
STOP = BASE + 84 * PAGE


@pytest.fixture
def guest(tmp_path: Path) -> str:
    return make_guest(tmp_path / "g", seed=3)


@pytest.fixture
def truth(tmp_path: Path) -> str:
    return make_guest(tmp_path / "truth", seed=3)


def order(guest: str, *faults: str) -> None:
    words = [word for fault in faults for word in ("--fault", fault)]
    assert run("emu", "fault", guest, *words or ["--clear"]).status == 0


def checked(outcome: Outcome, kind: Kind, *, partial: int = 3) -> Outcome:
    """Check what holds for every command that has met a fault."""
    assert "Traceback" not in outcome.err
    if kind.error is None:
        assert outcome.status == partial
    else:
        assert outcome.status == 4
        assert outcome.error["error"] == kind.error
        assert outcome.error["schema"] == "mtetool.error/1"
    return outcome


@each_kind
def test_save(guest: str, truth: str, tmp_path: Path, kind: Kind) -> None:
    order(guest, f"{kind.effect},on=read,after=100")
    out = tmp_path / "s"
    done = checked(run("save", guest, "-o", out, "--json"), kind)
    if kind.error is not None:
        assert not out.exists()
        assert done.error["saved_up_to"] <= STOP
        assert [path.name for path in tmp_path.iterdir() if path.name not in ("g", "truth")] == []
        return
    missing = done.json["missing"]
    assert [row["ipa"] for row in missing] == [STOP, BASE + 1024 * KIB]
    assert {row["errno"] for row in missing} == {kind.effect}
    compared = run("diff", out, truth, "--json")
    assert (compared.status, compared.json["same"]) == (3, True)
    assert compared.json["missing"] == missing
    assert run("save", guest, "-o", tmp_path / "all", "--partial", "fail").status == 3
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize("effect", ["vanish", "EIO"])
def test_save_of_a_guest_that_is_lost_keeps_what_was_read(
    guest: str, truth: str, tmp_path: Path, effect: str
) -> None:
    order(guest, f"{effect},on=read,after=100")
    done = run("save", guest, "-o", tmp_path / "s", "--partial", "keep", "--json")
    assert done.status == 4
    assert done.json["lost"]
    assert run("verify", tmp_path / "s").status == 3
    compared = run("diff", tmp_path / "s", truth, "--json")
    assert (compared.status, compared.json["same"]) == (3, True)
    assert compared.json["missing_bytes"] == done.json["missing_bytes"]


@each_kind
def test_restore_and_again(truth: str, tmp_path: Path, kind: Kind) -> None:
    assert run("save", truth, "-o", tmp_path / "s").status == 0
    target = make_guest(tmp_path / "t", seed=9)
    set_tag(tmp_path / "t", ROM, 64 * KIB, 3)
    order(target, f"{kind.effect},on=write,after=84")
    done = run("restore", tmp_path / "s", target, "--json")
    if kind.effect == "EBUSY":
        assert done.status == 3
        assert "EBUSY" in done.json["stopped"]
        assert done.json["restored_up_to"] == STOP
    else:
        checked(done, kind)
        if kind.error is None:
            refused = done.json["refused"]
            assert [row["ipa"] for row in refused] == [STOP, BASE + 1024 * KIB]
            assert {row["errno"] for row in refused} == {kind.effect}
    differing = run("diff", tmp_path / "s", target, "--json")
    if kind.effect == "vanish":
        assert differing.error["error"] == "no-such-process"
    else:
        assert differing.status == 1
        assert min(row["ipa"] for row in differing.json["ranges"]) >= STOP
    order(target)
    again = run("restore", tmp_path / "s", target, "--json")
    assert (again.status, again.json["refused"], again.json["stopped"]) == (0, [], None)
    assert same_tags(tmp_path / "truth", tmp_path / "t")


@each_kind
def test_restore_whose_reading_back_fails(truth: str, tmp_path: Path, kind: Kind) -> None:
    assert run("save", truth, "-o", tmp_path / "s").status == 0
    target = make_guest(tmp_path / "t", seed=9)
    set_tag(tmp_path / "t", ROM, 64 * KIB, 3)
    order(target, f"{kind.effect},on=read,after=100")
    done = run("restore", tmp_path / "s", target, "--json")
    if kind.effect == "EBUSY":
        assert done.status == 3
        assert done.json["stopped"]
    else:
        checked(done, kind)
    order(target, f"{kind.effect},on=read")
    assert run("restore", tmp_path / "s", target, "--no-verify").status in (3, 4)
    order(target)
    assert run("restore", tmp_path / "s", target).status == 0
    assert same_tags(tmp_path / "truth", tmp_path / "t")


@each_kind
def test_what_only_reads(guest: str, truth: str, tmp_path: Path, kind: Kind) -> None:
    assert run("save", truth, "-o", tmp_path / "s").status == 0
    words: dict[str, list[str | Path]] = {
        "verify": ["verify", tmp_path / "s", "--against", guest],
        "diff": ["diff", truth, guest],
        "dump": ["dump", guest],
        "restore": ["restore", "--dry-run", tmp_path / "s", guest],
    }
    for command, arguments in words.items():
        order(guest, f"{kind.effect},on=read,after=100")
        done = run(*arguments, "--json")
        if command == "restore" and kind.effect == "EBUSY":
            assert (done.status, done.error["error"]) == (4, "busy")
            continue
        checked(done, kind)
        if kind.error is None:
            name = {"verify": "unreadable", "restore": "refused"}.get(command, "missing")
            assert done.json[f"{name}_bytes"] == (44 + 64) * PAGE
    order(guest, f"{kind.effect},on=read,after=100")
    raw = run("dump", guest, "--output", "raw")
    assert raw.status == (3 if kind.error is None else 4)
    assert "Traceback" not in raw.err


def test_a_fault_of_a_moment_costs_one_page(guest: str, truth: str, tmp_path: Path) -> None:
    order(guest, "EINTR,on=read,after=100,times=1")
    done = run("save", guest, "-o", tmp_path / "s", "--json")
    assert done.status == 3
    assert [(row["ipa"], row["size_bytes"]) for row in done.json["missing"]] == [(STOP, PAGE)]
    assert run("save", guest, "-o", tmp_path / "s", "--force").status == 0
    assert run("diff", tmp_path / "s", truth).status == 0


def test_slow_is_only_slow(guest: str, truth: str, tmp_path: Path) -> None:
    order(guest, "slow=10us", "slow=1G/s,on=read")
    assert run("save", guest, "-o", tmp_path / "s").status == 0
    assert run("diff", tmp_path / "s", truth).status == 0
    assert run("emu", "show", guest, "--json").json["faults"][0]["fired"] == 208


def test_a_guest_compared_with_itself(guest: str) -> None:
    order(guest, "EFAULT,every=2")
    assert run("diff", guest, guest).status == 3


def test_enable_meets_a_guest_that_vanished(tmp_path: Path) -> None:
    path = tmp_path / "g"
    words = ["--memory", "64K", "--vcpus", "0", "--no-mte", "--fault", "vanish"]
    assert run("emu", "create", path, *words).status == 0
    assert run("dump", f"emu:{path}").status == 4
    assert run("enable", f"emu:{path}").status == 0
    assert run("dump", f"emu:{path}").status == 4
    outcome = run("enable", f"emu:{path}", "--json")
    assert (outcome.status, outcome.error["error"]) == (4, "no-such-process")
