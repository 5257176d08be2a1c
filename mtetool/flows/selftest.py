"""Proof on scratch VMs that this host keeps tags, and refuses what it must refuse.

Each check has its own VMs and gives one row: what the kernel must answer, and what it
answered. The checks cover what mtetool relies on, and nothing else.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mtetool import uapi
from mtetool.errors import errno_name
from mtetool.flows.selftest_patterns import Defect, compare, diagnose, patterns
from mtetool.tags import Tags
from mtetool.vmm.host import HostFacts

State = Literal["ok", "no", "fact", "unknown"]
Access = Literal["read", "write"]

# Small enough for any host (1 MiB with pages of 64 KiB), but several pages.
_RAM, _RAM_PAGES = 0x4000_0000, 16
_ROM = 0x5000_0000
_HOLE = 0x6000_0000
_FLAGS = {"read": uapi.KVM_ARM_TAGS_FROM_GUEST, "write": uapi.KVM_ARM_TAGS_TO_GUEST}


class Vm(Protocol):
    """What a check needs from a scratch VM; see `mtetool.vmm.scratch.ScratchVm`."""

    @property
    def page_size_bytes(self) -> int: ...

    def check_extension(self, capability: int) -> int: ...

    def enable(self, capability: int) -> int: ...

    def set_memslot(self, slot: int, ipa: int, size_bytes: int, flags: int) -> int: ...

    def create_vcpu(self) -> int: ...

    def copy_tags(
        self, ipa: int, length_bytes: int, tags: Tags, flags: int, reserved: int = 0
    ) -> int: ...


OpenVm = Callable[[], AbstractContextManager[Vm]]


@dataclass(frozen=True, slots=True)
class Row:
    """One check; `id` is stable. `note` says more: for a "fact", what differs and since when."""

    id: str
    title: str
    state: State
    expected: str
    answered: str
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """All rows, always the same; `not_run` says why no check was tried."""

    rows: tuple[Row, ...]
    defects: tuple[Defect, ...] = ()
    not_run: str | None = None

    @property
    def passed(self) -> bool:
        """Whether everything was tried and holds."""
        return all(row.state in ("ok", "fact") for row in self.rows)


def selftest(facts: HostFacts, open_vm: OpenVm) -> Report:
    """Try every check on VMs from `open_vm`, which raises OSError if it can make none."""
    reason = _cannot(facts)
    if reason is not None:
        return Report(tuple(_untried(check, reason) for check in _CHECKS), not_run=reason)
    rows: list[Row] = []
    defects: list[Defect] = []
    for check in _CHECKS:
        # Without MTE no VM has tags, and all later checks would say the same.
        if any(row.state != "ok" for row in rows[:2]):
            rows.append(_untried(check, "MTE cannot be enabled"))
            continue
        result = _try(check, open_vm)
        rows.append(
            Row(check.id, check.title, result.state, result.expected, result.answered, result.note)
        )
        if result.defect is not None and result.defect not in defects:
            defects.append(result.defect)
    return Report(tuple(rows), tuple(defects))


def _cannot(facts: HostFacts) -> str | None:
    if facts.machine != "aarch64":
        return f"this host is {facts.machine}, and MTE is a feature of arm64"
    if facts.kvm_errno:
        return f"/dev/kvm cannot be opened: {errno_name(facts.kvm_errno)}"
    return None


# --- the result of a check ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Result:
    state: State
    expected: str
    answered: str
    note: str | None = None
    defect: Defect | None = None


@dataclass(frozen=True, slots=True)
class _Step:
    """One call of a check, or one count. `older` is what kernels answered before a change."""

    what: str
    expected: int
    answered: int
    older: int | None = None


@dataclass(frozen=True, slots=True)
class _Check:
    id: str
    title: str
    run: Callable[[OpenVm], _Result | list[_Step]]
    older: str | None = None


class _RefusedError(Exception):
    """A scratch VM refused something that every VM must do."""


def _try(check: _Check, open_vm: OpenVm) -> _Result:
    try:
        found = check.run(open_vm)
    except _RefusedError as error:
        return _Result("no", "a VM with MTE and memory", str(error))
    except OSError as error:
        reason = errno_name(error.errno or 0)
        return _Result("unknown", "a VM with MTE and memory", f"no scratch VM: {reason}")
    return found if isinstance(found, _Result) else _judge(found, check.older)


def _judge(steps: list[_Step], older: str | None) -> _Result:
    expected = ", ".join(f"{step.what} {_named(step.expected)}" for step in steps)
    answered = ", ".join(f"{step.what} {_named(step.answered)}" for step in steps)
    if all(step.answered == step.expected for step in steps):
        return _Result("ok", expected, answered)
    if all(step.answered in (step.expected, step.older) for step in steps):
        return _Result("fact", expected, answered, older)
    return _Result("no", expected, answered)


def _named(answer: int) -> str:
    return errno_name(-answer) if answer < 0 else str(answer)


def _untried(check: _Check, reason: str) -> Row:
    return Row(check.id, check.title, "unknown", "", f"not tried: {reason}")


# --- scratch VMs --------------------------------------------------------------------------


@contextmanager
def _ready(open_vm: OpenVm, *, mte: bool = True) -> Iterator[Vm]:
    """A VM with memory at `_RAM` and one read-only page at `_ROM`."""
    with open_vm() as vm:
        if mte:
            _done("KVM_ENABLE_CAP", vm.enable(uapi.KVM_CAP_ARM_MTE))
        _set_ram(vm, flags=0)
        page = vm.page_size_bytes
        _done("a read-only memslot", vm.set_memslot(1, _ROM, page, uapi.KVM_MEM_READONLY))
        yield vm


def _set_ram(vm: Vm, *, flags: int) -> None:
    _done("a memslot", vm.set_memslot(0, _RAM, _RAM_PAGES * vm.page_size_bytes, flags))


def _done(what: str, answer: int) -> None:
    if answer < 0:
        raise _RefusedError(f"{what}: {errno_name(-answer)}")


def _copy(vm: Vm, access: Access, ipa: int, tags: Tags) -> int:
    return vm.copy_tags(ipa, tags.size * uapi.GRANULE_BYTES, tags, _FLAGS[access])


def _blank(vm: Vm, n_pages: int) -> Tags:
    # Not a tag, so that bytes which the kernel does not write show up.
    return np.full(n_pages * vm.page_size_bytes // uapi.GRANULE_BYTES, 0xFF, dtype=np.uint8)


def _zeros(vm: Vm, n_pages: int) -> Tags:
    return np.zeros(_blank(vm, n_pages).size, dtype=np.uint8)


def _refused(
    vm: Vm, number: int, ipa: int, length_bytes: int, *, flags: int = 0, older: int | None = None
) -> list[_Step]:
    """Try a copy that must be refused, both ways; the kernel must not get beyond two pages."""
    tags = _zeros(vm, 2)
    return [
        _Step(
            access,
            -number,
            vm.copy_tags(ipa, length_bytes, tags, _FLAGS[access] | flags),
            older,
        )
        for access in _FLAGS
    ]


# --- the checks ---------------------------------------------------------------------------


def _capability(open_vm: OpenVm) -> list[_Step]:
    with open_vm() as vm:
        return [_Step("KVM_CHECK_EXTENSION", 1, vm.check_extension(uapi.KVM_CAP_ARM_MTE))]


def _enable(open_vm: OpenVm) -> list[_Step]:
    with open_vm() as vm:
        return [_Step("KVM_ENABLE_CAP", 0, vm.enable(uapi.KVM_CAP_ARM_MTE))]


def _enable_late(open_vm: OpenVm) -> list[_Step]:
    with open_vm() as vm:
        _done("KVM_CREATE_VCPU", vm.create_vcpu())
        return [_Step("KVM_ENABLE_CAP", -errno.EINVAL, vm.enable(uapi.KVM_CAP_ARM_MTE))]


def _untagged(open_vm: OpenVm) -> list[_Step]:
    with _ready(open_vm) as vm:
        tags = _blank(vm, _RAM_PAGES)
        answered = _copy(vm, "read", _RAM, tags)
        return [
            _Step("read", tags.size * uapi.GRANULE_BYTES, answered),
            _Step("granules not 0:", 0, int(np.count_nonzero(tags))),
        ]


def _round_trip(open_vm: OpenVm) -> _Result:
    """Copy all pages at once, each way."""
    with _ready(open_vm) as vm:
        return _prove(vm, lambda access, tags: _copy(vm, access, _RAM, tags))


def _round_trip_pages(open_vm: OpenVm) -> _Result:
    """Copy page by page, from the last to the first: what the first spoils is not repaired."""
    with _ready(open_vm) as vm:
        page = vm.page_size_bytes
        granules = page // uapi.GRANULE_BYTES

        def copy(access: Access, tags: Tags) -> int:
            done = 0
            for n in reversed(range(_RAM_PAGES)):
                part = tags[n * granules : (n + 1) * granules]
                done += max(_copy(vm, access, _RAM + n * page, part), 0)
            return done

        return _prove(vm, copy)


def _prove(vm: Vm, copy: Callable[[Access, Tags], int]) -> _Result:
    """Write and read every pattern; together they distinguish each granule from all others."""
    n_granules = _blank(vm, _RAM_PAGES).size
    expected = f"{n_granules} granules in {_RAM_PAGES} pages keep each of the 16 tags"
    reads = []
    for written in patterns(n_granules):
        read = _blank(vm, _RAM_PAGES)
        for access, tags in (("write", written), ("read", read)):
            done = copy(access, tags)  # type: ignore[arg-type]
            if done != tags.size * uapi.GRANULE_BYTES:
                return _Result("no", expected, f"{access} {_named(done)}")
        reads.append(read)
    wrong = compare(reads, n_granules // _RAM_PAGES, _RAM)
    if wrong is None:
        return _Result("ok", expected, f"{n_granules} granules in {_RAM_PAGES} pages do")
    return _Result("no", expected, wrong, defect=diagnose(reads))


def _neighbours(open_vm: OpenVm) -> list[_Step]:
    """A write to one page must leave all others as they are."""
    with _ready(open_vm) as vm:
        page, at = vm.page_size_bytes, _RAM_PAGES // 2
        expected = _by_page(vm, np.arange(_RAM_PAGES))
        size = expected.size * uapi.GRANULE_BYTES
        steps = [_Step("write", size, _copy(vm, "write", _RAM, expected))]
        part = slice(at * page // uapi.GRANULE_BYTES, (at + 1) * page // uapi.GRANULE_BYTES)
        expected[part] ^= uapi.TAG_MAX
        steps.append(
            _Step("then a page", page, _copy(vm, "write", _RAM + at * page, expected[part]))
        )
        read = _blank(vm, _RAM_PAGES)
        steps.append(_Step("read", size, _copy(vm, "read", _RAM, read)))
        return [*steps, _Step("granules wrong:", 0, int((read != expected).sum()))]


def _top_bits(open_vm: OpenVm) -> list[_Step]:
    with _ready(open_vm) as vm:
        low = uapi.TAG_MAX - np.arange(_RAM_PAGES)
        written, read = _by_page(vm, np.arange(_RAM_PAGES) << 4 | low), _blank(vm, _RAM_PAGES)
        size = read.size * uapi.GRANULE_BYTES
        return [
            _Step("write", size, _copy(vm, "write", _RAM, written)),
            _Step("read", size, _copy(vm, "read", _RAM, read)),
            _Step("granules wrong:", 0, int((read != written & uapi.TAG_MAX).sum())),
        ]


def _by_page(vm: Vm, bytes_by_page: NDArray[np.intp]) -> Tags:
    """A page of each byte: no page has two tags, so only effects between pages show."""
    return np.repeat(bytes_by_page, vm.page_size_bytes // uapi.GRANULE_BYTES).astype(np.uint8)


def _partial(open_vm: OpenVm) -> list[_Step]:
    """Copy two pages, only the first of which is in the slot."""
    with _ready(open_vm) as vm:
        page = vm.page_size_bytes
        end = _RAM + _RAM_PAGES * page
        written, read, rest = _by_page(vm, np.array([5, 10])), _blank(vm, 2), _blank(vm, 1)
        return [
            _Step("write", page, _copy(vm, "write", end - page, written)),
            _Step("then", -errno.EFAULT, _copy(vm, "write", end, rest)),
            _Step("read", page, _copy(vm, "read", end - page, read)),
            _Step("then", -errno.EFAULT, _copy(vm, "read", end, rest)),
            _Step("granules wrong:", 0, int((read != written)[: rest.size].sum())),
            _Step("granules read beyond:", 0, int((read[rest.size :] != 0xFF).sum())),
        ]


def _misaligned_ipa(open_vm: OpenVm) -> list[_Step]:
    with _ready(open_vm) as vm:
        return _refused(vm, errno.EINVAL, _RAM + vm.page_size_bytes // 2, vm.page_size_bytes)


def _misaligned_length(open_vm: OpenVm) -> list[_Step]:
    with _ready(open_vm) as vm:
        return _refused(vm, errno.EINVAL, _RAM, vm.page_size_bytes // 2)


def _hole(open_vm: OpenVm) -> list[_Step]:
    with _ready(open_vm) as vm:
        return _refused(vm, errno.EFAULT, _HOLE, vm.page_size_bytes)


def _read_only(open_vm: OpenVm) -> list[_Step]:
    with _ready(open_vm) as vm:
        return [
            _Step("write", -errno.EFAULT, _copy(vm, "write", _ROM, _zeros(vm, 1))),
            _Step("read", vm.page_size_bytes, _copy(vm, "read", _ROM, _zeros(vm, 1))),
        ]


def _dirty_logging(open_vm: OpenVm) -> list[_Step]:
    with _ready(open_vm) as vm:
        page, tags = vm.page_size_bytes, _zeros(vm, 1)
        _set_ram(vm, flags=uapi.KVM_MEM_LOG_DIRTY_PAGES)
        steps = [
            _Step("write", -errno.EBUSY, _copy(vm, "write", _RAM, tags), older=page),
            _Step("read", page, _copy(vm, "read", _RAM, tags)),
        ]
        _set_ram(vm, flags=0)
        return [*steps, _Step("write afterwards", page, _copy(vm, "write", _RAM, tags))]


def _nothing(open_vm: OpenVm) -> list[_Step]:
    """Copy nothing, even where no memory is: mtetool finds out in this way whether MTE is on."""
    with _ready(open_vm) as vm:
        tags = _zeros(vm, 1)
        return [
            _Step(f"{access} {where}", 0, vm.copy_tags(ipa, 0, tags, flags))
            for access, flags in _FLAGS.items()
            for where, ipa in (("in memory", _RAM), ("in a hole", 0))
        ]


def _bad_flags(open_vm: OpenVm) -> list[_Step]:
    with _ready(open_vm) as vm:
        return _refused(vm, errno.EINVAL, _RAM, vm.page_size_bytes, flags=2)


def _bad_reserved(open_vm: OpenVm) -> list[_Step]:
    with _ready(open_vm) as vm:
        tags = _zeros(vm, 1)
        return [
            _Step(access, -errno.EINVAL, vm.copy_tags(_RAM, vm.page_size_bytes, tags, flags, 1))
            for access, flags in _FLAGS.items()
        ]


def _too_long(open_vm: OpenVm) -> list[_Step]:
    # In a hole: a kernel that does not check the length stops there at once.
    with _ready(open_vm) as vm:
        length = uapi.COPY_LENGTH_MAX + 1
        return _refused(vm, errno.EINVAL, _HOLE, length, older=-errno.EFAULT)


def _mte_off(open_vm: OpenVm) -> list[_Step]:
    with _ready(open_vm, mte=False) as vm:
        nothing = vm.copy_tags(0, 0, _zeros(vm, 1), uapi.KVM_ARM_TAGS_FROM_GUEST)
        return [
            *_refused(vm, errno.EINVAL, _RAM, vm.page_size_bytes),
            _Step("of nothing", -errno.EINVAL, nothing),
        ]


_CHECKS = (
    _Check("capability", "KVM offers MTE to a VM", _capability),
    _Check("enable", "MTE is enabled before the first vCPU", _enable),
    _Check("enable-late", "MTE is refused after the first vCPU", _enable_late),
    _Check("mte-off", "a VM without MTE has no tags", _mte_off),
    _Check("untagged-zero", "pages that were never tagged read as 0", _untagged),
    _Check("round-trip", "tags come back, all in one copy", _round_trip),
    _Check("round-trip-pages", "tags come back, one page per copy", _round_trip_pages),
    _Check("neighbours", "a copy changes no other page", _neighbours),
    _Check("top-bits", "bits 7:4 of a byte are dropped", _top_bits),
    _Check("partial", "a copy across a slot's end says how far it got", _partial),
    _Check("hole", "no copy where there is no memory", _hole),
    _Check("read-only", "no write to read-only memory", _read_only),
    _Check(
        "dirty-logging",
        "no write during dirty logging",
        _dirty_logging,
        older="this kernel accepts the write, but does not log it: do not restore during migration",
    ),
    _Check("length-zero", "a copy of nothing succeeds", _nothing),
    _Check("misaligned-ipa", "no copy that starts inside a page", _misaligned_ipa),
    _Check("misaligned-length", "no copy of part of a page", _misaligned_length),
    _Check("bad-flags", "unknown flags are refused", _bad_flags),
    _Check("bad-reserved", "reserved words must be 0", _bad_reserved),
    _Check(
        "too-long",
        "no copy of 2 GiB or more",
        _too_long,
        older="this kernel does not check the length (Linux before 6.4); mtetool itself does",
    ),
)
CHECK_IDS = tuple(check.id for check in _CHECKS)
"""The ids of all rows, in their order."""
