"""The selftest against VMs that answer wrongly: each row must be able to fail."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtetool import uapi
from mtetool.errors import SignalError
from mtetool.flows.selftest import CHECK_IDS, Report, selftest
from mtetool.flows.selftest_patterns import (
    CHANGED,
    NOT_KEPT,
    OVERWRITE,
    OVERWRITE_IN_PAGE,
    Defect,
    compare,
    diagnose,
    patterns,
)
from mtetool.tags import Tags
from mtetool.vmm.host import HostFacts

PAGE = 4096
GRANULES = PAGE // 16
HOST = HostFacts("aarch64", "6.12.107", PAGE, 0, True, True, 0, 0)
WRITE, READ = uapi.KVM_ARM_TAGS_TO_GUEST, uapi.KVM_ARM_TAGS_FROM_GUEST


@dataclass
class Slot:
    ipa: int
    flags: int
    tags: Tags


@dataclass
class FakeVm:
    """A VM as the kernel implements it; the fields change its answers.

    `errors` replaces an errno, by the place that returns it; 0 lets the request through there.
    `keep` turns the tags that are written into those that memory keeps.
    """

    errors: dict[str, int] = field(default_factory=dict)
    capability: int = 1
    fresh: int = 0
    mask: int = 15
    keep: Callable[[NDArray[Any]], NDArray[Any]] = lambda tags: tags
    spoil_next_page: bool = False
    report_whole: bool = False
    page_size_bytes: int = PAGE
    mte: bool = False
    vcpus: int = 0
    slots: dict[int, Slot] = field(default_factory=dict)
    open: bool = True

    def check_extension(self, capability: int) -> int:
        return self.capability if capability == uapi.KVM_CAP_ARM_MTE else 0

    def enable(self, capability: int) -> int:
        if "enable" in self.errors:
            return -self.errors["enable"]
        if self.vcpus and (number := self.errors.get("late", errno.EINVAL)):
            return -number
        self.mte = True
        return 0

    def set_memslot(self, slot: int, ipa: int, size_bytes: int, flags: int) -> int:
        if "memslot" in self.errors:
            return -self.errors["memslot"]
        tags = self.slots[slot].tags if slot in self.slots else None
        if tags is None:
            tags = np.full(size_bytes // 16, self.fresh, dtype=np.uint8)
        self.slots[slot] = Slot(ipa, flags, tags)
        return 0

    def create_vcpu(self) -> int:
        self.vcpus += 1
        return -self.errors.get("vcpu", 0)

    def copy_tags(
        self, ipa: int, length_bytes: int, tags: Tags, flags: int, reserved: int = 0
    ) -> int:
        page = self.page_size_bytes
        for place, wrong, number in (
            ("off", not self.mte, errno.EINVAL),
            ("reserved", reserved != 0, errno.EINVAL),
            ("flags", flags not in (WRITE, READ), errno.EINVAL),
            ("ipa", ipa % page != 0, errno.EINVAL),
            ("length", length_bytes % page != 0, errno.EINVAL),
            ("long", length_bytes >= 1 << 31, errno.EINVAL),
            ("nothing", length_bytes == 0, 0),
            ("busy", flags == WRITE and self._logging(), errno.EBUSY),
        ):
            if wrong and (answer := self.errors.get(place, number)):
                return -answer
        done = 0
        while done < length_bytes // page * page:
            part = tags[done // 16 : (done + page) // 16]
            if number := self._copy_page(ipa // page * page + done, part, flags & 1):
                return (length_bytes if done and self.report_whole else done) or -number
            done += page
        return done

    def _logging(self) -> bool:
        return any(slot.flags & uapi.KVM_MEM_LOG_DIRTY_PAGES for slot in self.slots.values())

    def _copy_page(self, ipa: int, part: Tags, direction: int) -> int:
        for slot in self.slots.values():
            at = (ipa - slot.ipa) // 16
            if not 0 <= at < slot.tags.size:
                continue
            if direction == READ:
                part[:] = slot.tags[at : at + part.size]
                return 0
            if slot.flags & uapi.KVM_MEM_READONLY and "read-only" not in self.errors:
                return errno.EFAULT
            slot.tags[at : at + part.size] = self.keep(part & self.mask)
            if self.spoil_next_page:
                slot.tags[at + part.size : at + part.size + 1] = 3
            return 0
        return self.errors.get("hole", errno.EFAULT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.open = False


def tried(**wrong: Any) -> Report:
    return selftest(HOST, lambda: FakeVm(**wrong))


def failed(report: Report, state: str = "no") -> set[str]:
    return {row.id for row in report.rows if row.state == state}


def of_parity(tags: NDArray[Any]) -> NDArray[Any]:
    """What QEMU 7.2 keeps: one place for all even granules of 4 KiB, one for the odd ones."""
    kept = tags.reshape(-1, GRANULES).copy()
    kept[:, 0::2], kept[:, 1::2] = kept[:, -2:-1], kept[:, -1:]
    return kept.reshape(-1)


def stuck(tags: NDArray[Any]) -> NDArray[Any]:
    kept = tags.copy()
    kept[77] |= 8
    return kept


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_a_kernel_as_it_should_be(page: int) -> None:
    report = tried(page_size_bytes=page)
    assert [row.id for row in report.rows] == list(CHECK_IDS)
    assert {row.state for row in report.rows} == {"ok"}
    assert report.passed
    assert report.defects == ()


@pytest.mark.parametrize(
    ("wrong", "rows"),
    [
        ({"errors": {"late": 0}}, {"enable-late"}),
        ({"errors": {"off": errno.EPERM}}, {"mte-off"}),
        ({"errors": {"off": 0}}, {"mte-off"}),
        ({"fresh": 1}, {"untagged-zero"}),
        ({"keep": of_parity}, {"round-trip", "round-trip-pages"}),
        ({"keep": stuck}, {"round-trip", "round-trip-pages", "neighbours", "top-bits", "partial"}),
        ({"mask": 0xFF}, {"top-bits"}),
        ({"report_whole": True}, {"partial"}),
        ({"errors": {"hole": errno.EINVAL}}, {"hole", "partial"}),
        ({"errors": {"read-only": 0}}, {"read-only"}),
        ({"errors": {"busy": errno.EAGAIN}}, {"dirty-logging"}),
        ({"errors": {"nothing": errno.EINVAL}}, {"length-zero"}),
        ({"errors": {"ipa": 0}}, {"misaligned-ipa"}),
        ({"errors": {"length": errno.EFAULT}}, {"misaligned-length"}),
        ({"errors": {"flags": 0}}, {"bad-flags"}),
        ({"errors": {"reserved": 0}}, {"bad-reserved"}),
        ({"errors": {"long": errno.ENOMEM}}, {"too-long"}),
    ],
    ids=lambda value: "-".join(sorted(value)) if isinstance(value, set) else "",
)
def test_each_wrong_answer_fails_its_row(wrong: dict[str, Any], rows: set[str]) -> None:
    report = tried(**wrong)
    assert failed(report) == rows
    assert not report.passed
    for row in report.rows:
        assert (row.expected == row.answered) is (row.state == "ok" and "round" not in row.id)


def test_a_page_that_spoils_the_next_is_seen() -> None:
    report = tried(spoil_next_page=True)
    # A single copy of everything repairs what it spoils; the others do not.
    assert failed(report) == {"round-trip-pages", "neighbours"}


@pytest.mark.parametrize(
    ("wrong", "row"), [({"capability": 0}, "capability"), ({"errors": {"enable": 22}}, "enable")]
)
def test_without_mte_the_rest_is_not_tried(wrong: dict[str, Any], row: str) -> None:
    report = tried(**wrong)
    assert failed(report) == {row}
    rest = CHECK_IDS[CHECK_IDS.index(row) + 1 :]
    assert failed(report, "unknown") == set(rest)
    assert not report.passed


@pytest.mark.parametrize(
    ("errors", "row", "word"),
    [({"busy": 0}, "dirty-logging", "migration"), ({"long": 0}, "too-long", "before 6.4")],
)
def test_what_older_kernels_do_is_a_fact(errors: dict[str, int], row: str, word: str) -> None:
    report = tried(errors=errors)
    assert failed(report, "fact") == {row}
    assert word in next(r.note or "" for r in report.rows if r.id == row)
    assert report.passed


def test_a_vm_that_takes_no_memory_is_told() -> None:
    report = tried(errors={"memslot": errno.EINVAL})
    assert {"round-trip", "hole"} < failed(report)
    assert "a memslot: EINVAL" in {row.answered for row in report.rows}


def test_no_more_vms_is_no_verdict_on_tags() -> None:
    given_out = Counter[str]()

    def open_vm() -> FakeVm:
        given_out["vms"] += 1
        if given_out["vms"] > 6:
            raise OSError(errno.ENOMEM, "no")
        return FakeVm()

    report = selftest(HOST, open_vm)
    assert failed(report) == set()
    assert failed(report, "unknown") == set(CHECK_IDS[6:])
    assert "ENOMEM" in report.rows[-1].answered
    assert not report.passed


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        (replace(HOST, machine="x86_64"), "x86_64"),
        (replace(HOST, kvm_errno=errno.EACCES), "EACCES"),
    ],
)
def test_where_it_cannot_run_no_vm_is_made(facts: HostFacts, word: str) -> None:
    def open_vm() -> FakeVm:
        raise AssertionError("a VM was opened")

    report = selftest(facts, open_vm)
    assert word in (report.not_run or "")
    assert [row.id for row in report.rows] == list(CHECK_IDS)
    assert failed(report, "unknown") == set(CHECK_IDS)
    assert not report.passed


@settings(deadline=None)
@given(st.integers(0, 400))
def test_a_signal_at_any_call_leaves_no_vm(at: int) -> None:
    vms: list[FakeVm] = []
    calls = Counter[str]()

    class Interrupted(FakeVm):
        def copy_tags(self, *args: Any, **more: Any) -> int:
            calls["copy"] += 1
            if calls["copy"] == at:
                raise SignalError(2)
            return super().copy_tags(*args, **more)

    def open_vm() -> FakeVm:
        vms.append(Interrupted())
        return vms[-1]

    with suppress(SignalError):
        selftest(HOST, open_vm)
    assert vms
    assert not any(vm.open for vm in vms)
    assert sum(vm.open for vm in vms[:-1]) == 0


# --- patterns -----------------------------------------------------------------------------


def read_through(source: NDArray[Any], pages: int = 16) -> list[Tags]:
    """What comes back when granule i has the tags of granule source[i]."""
    return [tags[source] for tags in patterns(pages * GRANULES)]


@pytest.mark.parametrize("n_granules", [1, 16, 17, 256, 257, 4096, 16384, 65536])
def test_patterns_tell_all_granules_apart_and_try_all_tags(n_granules: int) -> None:
    everything = np.stack(list(patterns(n_granules)))
    assert np.unique(everything, axis=1).shape[1] == n_granules
    assert (np.sort(everything[:16], axis=0) == np.arange(16)[:, None]).all()


@given(st.integers(0, 4095), st.integers(0, 4095))
def test_any_two_granules_that_share_a_place_are_found(one: int, other: int) -> None:
    source = np.arange(4096)
    source[one] = other
    reads = read_through(source)
    said = compare(reads, GRANULES, 0x4000_0000)
    assert (said is None) is (one == other)
    if said is not None:
        assert f"at {0x4000_0000 + one * 16:#x} " in said
        assert diagnose(reads) == OVERWRITE


@given(st.integers(0, 4095), st.integers(0, 18), st.integers(1, 15))
def test_any_one_changed_tag_is_found(at: int, pattern: int, change: int) -> None:
    reads = [tags.copy() for tags in patterns(4096)]
    pattern %= len(reads)
    reads[pattern][at] ^= change
    assert f"wrong: 1 granule in 1 page; at {at * 16:#x} " in (compare(reads, GRANULES, 0) or "")
    # A change in a higher digit looks like the tags of another granule.
    assert diagnose(reads) == (CHANGED if pattern < 16 else OVERWRITE)


@pytest.mark.parametrize(
    ("change", "defect"),
    [
        (
            lambda tags: np.concatenate([of_parity(p) for p in np.split(tags, 16)]),
            OVERWRITE_IN_PAGE,
        ),
        (lambda tags: np.tile(tags[:GRANULES], 16), OVERWRITE),
        (lambda tags: np.zeros_like(tags), NOT_KEPT),
        (lambda tags: np.full_like(tags, 0xFF), NOT_KEPT),
        (lambda tags: tags & 7, CHANGED),
        (lambda tags: tags | 0xF0, CHANGED),
    ],
)
def test_defects_are_told_apart(change: Callable[[Tags], Tags], defect: Defect) -> None:
    reads = [change(tags) for tags in patterns(16 * GRANULES)]
    assert compare(reads, GRANULES, 0) is not None
    assert diagnose(reads) == defect


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_qemu_7_2_is_named_whatever_the_page_size(page: int) -> None:
    report = tried(keep=of_parity, page_size_bytes=page)
    assert report.defects == (OVERWRITE_IN_PAGE,)
    assert "QEMU 7.2" in OVERWRITE_IN_PAGE.text
