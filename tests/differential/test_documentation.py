"""The kernel's documentation as a checklist: see `tests.differential.documentation`."""

from __future__ import annotations

import ast
import errno
from pathlib import Path

import pytest

from mtetool import uapi
from mtetool.emulator import Behaviour, Host
from tests.differential.documentation import NOT_PROVED, STATEMENTS
from tests.differential.making import FROM_GUEST, IPA, TO_GUEST, buffer_of, guest, read, write
from tests.differential.sides import ARENA, Kind, Side, pattern

MTE = uapi.KVM_CAP_ARM_MTE
NO_MEMORY = 1 << 38
LENGTH_MAX = 1 << 31


def copy(side: Side, ipa: int, length: int, direction: int, reserved: int = 0) -> int:
    return side.copy_tags(0, ipa, length, buffer_of(side), direction, [reserved, reserved])


def untouched(side: Side, at: int, n_bytes: int) -> bool:
    """Return whether a part of the buffer has the bytes that `guest` gave it."""
    return side.contents(buffer_of(side) + at, n_bytes) == pattern(n_bytes, 0)


def test_every_statement_has_its_test() -> None:
    tests = Path(__file__).parents[1]
    ids = [(statement.id, statement.only) for statement in STATEMENTS]
    assert len(ids) == len(set(ids))
    assert not {name for name, _ in ids} & set(NOT_PROVED)
    for statement in STATEMENTS:
        file, _, name = statement.test.partition("::")
        found = ast.parse((tests / file).read_text()).body
        assert name in [node.name for node in found if isinstance(node, ast.FunctionDef)]


# --- 4.130 --------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", [TO_GUEST, FROM_GUEST])
def test_copy_needs_the_capability(side: Side, direction: int) -> None:
    page = side.page_size_bytes
    side.create_vm(0, 0)
    side.map(ARENA, page, "private", "rw", -1, 0)
    side.map(buffer_of(side), page, "private", "rw", -1, 0)
    assert side.set_memslot(0, 0, 0, IPA, page, ARENA) == 0
    assert copy(side, IPA, page, direction) == -errno.EINVAL


def test_copy_both_ways(side: Side) -> None:
    guest(side)
    tags = write(side, IPA, 1)
    assert len(set(tags)) == 8
    side.fill(buffer_of(side), side.page_size_bytes, 0)
    assert read(side, IPA) == tags


@pytest.mark.parametrize("direction", [TO_GUEST, FROM_GUEST])
@pytest.mark.parametrize("off", [1, 16, 2048])
def test_copy_ipa_aligned(side: Side, direction: int, off: int) -> None:
    guest(side)
    page = side.page_size_bytes
    assert copy(side, IPA + off, page, direction) == -errno.EINVAL
    assert copy(side, IPA + page - off, page, direction) == -errno.EINVAL
    assert copy(side, IPA + page, page, direction) == page


@pytest.mark.parametrize("direction", [TO_GUEST, FROM_GUEST])
@pytest.mark.parametrize("off", [1, 16, 2048])
def test_copy_length_aligned(side: Side, direction: int, off: int) -> None:
    guest(side)
    page = side.page_size_bytes
    assert copy(side, IPA, off, direction) == -errno.EINVAL
    assert copy(side, IPA, page + off, direction) == -errno.EINVAL


@pytest.mark.parametrize("direction", [TO_GUEST, FROM_GUEST])
def test_copy_length_limit(side: Side, direction: int) -> None:
    guest(side)
    page = side.page_size_bytes
    assert copy(side, IPA, LENGTH_MAX, direction) == -errno.EINVAL
    assert copy(side, IPA, (1 << 32) + page, direction) == -errno.EINVAL
    # The longest is a valid argument: the copy goes as far as memory and buffer do.
    assert copy(side, IPA, LENGTH_MAX - page, direction) == 4 * page


def test_copy_buffer(side: Side) -> None:
    guest(side)
    page, buffer = side.page_size_bytes, buffer_of(side)
    # It can begin anywhere.
    side.fill(buffer + 13, page // 16, 7)
    assert side.copy_tags(0, IPA, page, buffer + 13, TO_GUEST, [0, 0]) == page
    tags = bytes(tag & 0xF for tag in pattern(page // 16, 7))
    side.fill(buffer, page, 0)
    assert side.copy_tags(0, IPA, page, buffer + 101, FROM_GUEST, [0, 0]) == page
    assert untouched(side, 0, 101)
    assert side.contents(buffer + 101, page // 16) == tags
    # A copy to the guest only reads it.
    side.fill(buffer, page // 16, 3)
    copy(side, IPA, page, TO_GUEST)
    assert side.contents(buffer, page // 16) == pattern(page // 16, 3)


def test_copy_direction(side: Side) -> None:
    guest(side)
    page = side.page_size_bytes
    assert (TO_GUEST, FROM_GUEST) == (0, 1)
    tags = write(side, IPA, 1)
    for flags in (2, 3, 1 << 31, 1 << 32, (1 << 64) - 1):
        assert copy(side, IPA, page, flags) == -errno.EINVAL
    assert read(side, IPA) == tags


def test_copy_buffer_size(side: Side) -> None:
    guest(side)
    page = side.page_size_bytes
    for n_pages in (1, 3):
        tags = n_pages * page // 16
        side.fill(buffer_of(side), page, 0)
        assert copy(side, IPA, n_pages * page, FROM_GUEST) == n_pages * page
        assert side.contents(buffer_of(side), tags) == bytes(tags)
        assert untouched(side, tags, page - tags)
    # That many bytes are enough, even at the very end of the mapped memory.
    end = buffer_of(side) + 2 * page
    for direction in (TO_GUEST, FROM_GUEST):
        assert side.copy_tags(0, IPA, page, end - page // 16, direction, [0, 0]) == page


def test_copy_byte_is_a_tag(side: Side) -> None:
    guest(side)
    page = side.page_size_bytes
    given = pattern(page // 16, 1)
    assert max(given) > 15
    write(side, IPA, 1)
    assert read(side, IPA) == bytes(byte & 0xF for byte in given)


def test_copy_format_of_ptrace(side: Side) -> None:
    page, buffer = side.page_size_bytes, buffer_of(side)
    guest(side, "file")
    assert side.map(ARENA, 4 * page, "file", "rw-mte", 0, 0) == 0
    tags = write(side, IPA + page, 5)
    assert side.trace_tags("peek", ARENA + page, buffer, page // 16) == page // 16
    assert side.contents(buffer, page // 16) == tags
    side.fill(buffer, page // 16, 8)
    assert side.trace_tags("poke", ARENA + page, buffer, page // 16) == page // 16
    assert read(side, IPA + page) == bytes(tag & 0xF for tag in pattern(page // 16, 8))


@pytest.mark.parametrize("direction", [TO_GUEST, FROM_GUEST])
def test_copy_einval(side: Side, direction: int) -> None:
    guest(side)
    page = side.page_size_bytes
    # This is checked before the memory, whatever the length.
    assert copy(side, NO_MEMORY + 1, page, direction) == -errno.EINVAL
    assert copy(side, NO_MEMORY, page + 1, direction) == -errno.EINVAL
    assert copy(side, NO_MEMORY, page, direction | 2) == -errno.EINVAL
    assert copy(side, IPA, page, direction, reserved=1) == -errno.EINVAL
    assert copy(side, IPA, 0, direction, reserved=1 << 63) == -errno.EINVAL


@pytest.mark.parametrize("direction", [TO_GUEST, FROM_GUEST])
def test_copy_efault(side: Side, direction: int) -> None:
    guest(side)
    page, end = side.page_size_bytes, buffer_of(side) + 2 * side.page_size_bytes
    assert copy(side, NO_MEMORY, page, direction) == -errno.EFAULT
    assert side.copy_tags(0, IPA, page, end, direction, [0, 0]) == -errno.EFAULT
    assert side.copy_tags_at(0, end) == -errno.EFAULT
    # Guest memory that its VMM no longer has.
    side.unmap(ARENA, page)
    assert copy(side, IPA, page, direction) == -errno.EFAULT


@pytest.mark.parametrize("direction", [TO_GUEST, FROM_GUEST])
def test_copy_error_before_data(side: Side, direction: int) -> None:
    guest(side)
    page = side.page_size_bytes
    assert copy(side, IPA - page, 2 * page, direction) == -errno.EFAULT
    assert untouched(side, 0, page)
    assert not any(read(side, IPA))


@pytest.mark.parametrize("direction", [TO_GUEST, FROM_GUEST])
def test_copy_error_after_data(side: Side, direction: int) -> None:
    guest(side, n_pages=3)
    page = side.page_size_bytes
    # First the memory ends, then the buffer.
    assert copy(side, IPA + page, 4 * page, direction) == 2 * page
    middle = buffer_of(side) + 2 * page - page // 16
    assert side.copy_tags(0, IPA, 2 * page, middle, direction, [0, 0]) == page


@pytest.mark.parametrize("direction", [TO_GUEST, FROM_GUEST])
def test_copy_complete(side: Side, direction: int) -> None:
    guest(side)
    for n_pages in (1, 2, 4):
        length = n_pages * side.page_size_bytes
        assert copy(side, IPA, length, direction) == length


# --- 7.28 ---------------------------------------------------------------------------------


def test_mte_capability(side: Side) -> None:
    side.create_vm(0, 0)
    assert side.check_extension(0, MTE) == 1
    assert side.enable_cap(0, MTE, 0, 0) == 0
    # The capability has no parameters.
    assert side.enable_cap(0, MTE, 1, 0) == -errno.EINVAL


def test_mte_must_be_enabled(side: Side) -> None:
    page = side.page_size_bytes
    side.create_vm(0, 0)
    side.map(ARENA, page, "private", "rw", -1, 0)
    side.map(buffer_of(side), page, "private", "rw", -1, 0)
    side.set_memslot(0, 0, 0, IPA, page, ARENA)
    assert side.check_extension(0, MTE) == 1
    assert copy(side, IPA, page, FROM_GUEST) == -errno.EINVAL
    assert side.enable_cap(0, MTE, 0, 0) == 0
    assert copy(side, IPA, page, FROM_GUEST) == page


def test_mte_before_vcpus(side: Side) -> None:
    page = side.page_size_bytes
    side.create_vm(0, 0)
    side.map(ARENA, page, "private", "rw", -1, 0)
    side.map(buffer_of(side), page, "private", "rw", -1, 0)
    side.set_memslot(0, 0, 0, IPA, page, ARENA)
    assert side.create_vcpu(0, 0) == 0
    assert side.enable_cap(0, MTE, 0, 0) == -errno.EINVAL
    assert copy(side, IPA, page, FROM_GUEST) == -errno.EINVAL


@pytest.mark.parametrize("psci", [0, uapi.KVM_ARM_VCPU_PSCI_0_2])
def test_mte_refuses_aarch32_vcpus(side: Side, host: Host, psci: int) -> None:
    target, aarch32 = uapi.KVM_ARM_TARGET_GENERIC_V8, uapi.KVM_ARM_VCPU_EL1_32BIT | psci
    assert host.aarch32, "this host has no AArch32 vCPUs to try"
    for vm in (0, 1):
        side.create_vm(vm, 0)
    assert side.enable_cap(0, MTE, 0, 0) == 0
    # The vCPU can be created, but not be made an AArch32 one; it can still become another kind.
    assert side.create_vcpu(0, 0) == 0
    assert side.init_vcpu(0, 0, target, aarch32) == -errno.EINVAL
    assert side.init_vcpu(0, 0, target, psci) == 0
    # In the other order, AArch32 is possible and MTE is not.
    assert side.create_vcpu(1, 0) == 0
    assert side.init_vcpu(1, 0, target, aarch32) == 0
    assert side.enable_cap(1, MTE, 0, 0) == -errno.EINVAL


def test_mte_any_memory_has_tags(side: Side) -> None:
    page = side.page_size_bytes
    guest(side)
    assert side.map(ARENA + 16 * page, page, "shared", "rw", -1, 0) == 0
    assert side.set_memslot(0, 7, 0, 1 << 33, page, ARENA + 16 * page) == 0
    expected = {}
    for seed, ipa in enumerate((*range(IPA, IPA + 4 * page, page), 1 << 33), start=1):
        expected[ipa] = write(side, ipa, seed)
    assert {ipa: read(side, ipa) for ipa in expected} == expected


def test_mte_swap(side: Side) -> None:
    page = side.page_size_bytes
    guest(side)
    side.fill(ARENA, 4 * page, 9)
    data = side.contents(ARENA, 4 * page)
    expected = {IPA + n * page: write(side, IPA + n * page, n + 1) for n in range(4)}
    assert side.page_out(ARENA, 4 * page) == 4
    assert {ipa: read(side, ipa) for ipa in expected} == expected
    # Tags that are written to memory on swap are kept when it is swapped out again.
    assert side.page_out(ARENA, 4 * page) == 4
    expected[IPA + page] = write(side, IPA + page, 11)
    assert side.page_out(ARENA, 4 * page) == 4
    assert {ipa: read(side, ipa) for ipa in expected} == expected
    assert side.contents(ARENA, 4 * page) == data


def test_mte_migration(side: Side) -> None:
    page = side.page_size_bytes
    guest(side)
    side.fill(ARENA, page, 9)
    tags = write(side, IPA, 1)
    # Another VM with the same data in its memory does not have the tags until they are written.
    other = ARENA + 16 * page
    side.create_vm(1, 0)
    assert side.enable_cap(1, MTE, 0, 0) == 0
    side.map(other, page, "private", "rw", -1, 0)
    assert side.set_memslot(1, 0, 0, IPA, page, other) == 0
    side.fill(other, page, 9)
    assert side.contents(other, page) == side.contents(ARENA, page)
    buffer = buffer_of(side)
    assert side.copy_tags(1, IPA, page, buffer, FROM_GUEST, [0, 0]) == page
    assert not any(side.contents(buffer, page // 16))
    assert read(side, IPA) == tags
    assert side.copy_tags(1, IPA, page, buffer, TO_GUEST, [0, 0]) == page
    side.fill(buffer, page, 0)
    assert side.copy_tags(1, IPA, page, buffer, FROM_GUEST, [0, 0]) == page
    assert side.contents(buffer, page // 16) == tags


@pytest.mark.parametrize("kind", ["private", "shared"])
def test_mte_anonymous_memory(side: Side, kind: Kind) -> None:
    """Except for huge pages: before 6.13 they are refused, anonymous or not (test_found)."""
    guest(side, kind)
    tags = write(side, IPA, 1)
    assert read(side, IPA) == tags


@pytest.mark.parametrize("kind", ["file", "file-private"])
def test_mte_memory_of_files_in_ram(side: Side, kind: Kind) -> None:
    guest(side, kind)
    tags = write(side, IPA, 1)
    assert read(side, IPA) == tags


@pytest.mark.parametrize("kind", ["disk", "disk-private"])
def test_mte_other_memory(side: Side, kind: Kind) -> None:
    page = side.page_size_bytes
    guest(side)
    side.create_file(1, "disk", 4 * page)
    side.map(ARENA + 16 * page, 4 * page, kind, "rw", 1, 0)
    assert side.set_memslot(0, 1, 0, 1 << 33, 4 * page, ARENA + 16 * page) == -errno.EINVAL
    # A part of such memory is enough.
    side.map(ARENA + 15 * page, page, "private", "rw", -1, 0)
    assert side.set_memslot(0, 1, 0, 1 << 33, 2 * page, ARENA + 15 * page) == -errno.EINVAL
    assert side.set_memslot(0, 1, 0, 1 << 33, page, ARENA + 15 * page) == 0


def test_mte_allows_the_copy(side: Side) -> None:
    guest(side)
    assert copy(side, IPA, side.page_size_bytes, FROM_GUEST) == side.page_size_bytes


def test_guest_memfd_after_mte(side: Side, host: Host) -> None:
    page = side.page_size_bytes
    guest(side)
    made = side.create_guest_memfd(0, 1, page)
    if not host.has(Behaviour.GUEST_MEMFD):
        assert made == -errno.EINVAL
        return
    assert made == 0
    address = ARENA + 16 * page
    assert side.set_guest_memfd_slot(0, 1, 1 << 33, page, address, 1) == -errno.EINVAL


def test_guest_memfd_before_mte(side: Side, host: Host) -> None:
    page = side.page_size_bytes
    side.create_vm(0, 0)
    made = side.create_guest_memfd(0, 1, page)
    if not host.has(Behaviour.GUEST_MEMFD):
        assert made == -errno.EINVAL
        return
    assert made == 0
    assert side.set_guest_memfd_slot(0, 1, 1 << 33, page, ARENA + 16 * page, 1) == 0
    assert side.enable_cap(0, MTE, 0, 0) == -errno.EINVAL
    # Without that slot, MTE can be enabled.
    assert side.set_memslot(0, 1, 0, 1 << 33, 0, 0) == 0
    assert side.enable_cap(0, MTE, 0, 0) == 0


# --- the ptrace() interface ---------------------------------------------------------------


def traced(side: Side) -> int:
    """Map a shared page that can have tags at the arena's start; return the buffer."""
    page = side.page_size_bytes
    assert side.create_file(0, "memory", page) == 0
    assert side.map(ARENA, page, "file", "rw-mte", 0, 0) == 0
    assert side.unmap(ARENA + page, page) == 0
    assert side.map(buffer_of(side), page, "private", "rw", -1, 0) == 0
    assert side.unmap(buffer_of(side) + page, page) == 0
    return buffer_of(side)


def test_ptrace_peek_and_poke(side: Side) -> None:
    buffer = traced(side)
    assert side.trace_tags("peek", ARENA, buffer, 16) == 16
    assert side.contents(buffer, 16) == bytes(16)
    side.fill(buffer, 16, 1)
    assert side.trace_tags("poke", ARENA, buffer, 16) == 16
    side.fill(buffer, 16, 0)
    assert side.trace_tags("peek", ARENA, buffer, 16) == 16
    assert side.contents(buffer, 16) == bytes(tag & 0xF for tag in pattern(16, 1))


def test_ptrace_format(side: Side) -> None:
    buffer = traced(side)
    n = side.page_size_bytes // 16
    side.fill(buffer, n, 1)
    assert side.trace_tags("poke", ARENA, buffer, n) == n
    # A granule's tag is the byte with its number, without the high bits.
    for granule in (0, 1, n // 2, n - 1):
        assert side.trace_tags("peek", ARENA + 16 * granule, buffer, 1) == 1
        assert side.contents(buffer, 1)[0] == pattern(n, 1)[granule] & 0xF


@pytest.mark.parametrize("off", [1, 15])
def test_ptrace_unaligned(side: Side, off: int) -> None:
    buffer = traced(side)
    side.fill(buffer, 3, 1)
    assert side.trace_tags("poke", ARENA + 32 + off, buffer, 3) == 3
    assert side.trace_tags("peek", ARENA + 16, buffer, 5) == 5
    tags = bytes(tag & 0xF for tag in pattern(3, 1))
    assert side.contents(buffer, 5) == b"\0" + tags + b"\0"


@pytest.mark.parametrize("request_", ["peek", "poke"])
def test_ptrace_count(side: Side, request_: str) -> None:
    buffer = traced(side)
    page = side.page_size_bytes
    n = page // 16
    assert _trace(side, request_, ARENA, buffer, n) == n
    # First the process's memory ends, then the buffer.
    assert _trace(side, request_, ARENA, buffer, n + 8) == n
    assert _trace(side, request_, ARENA + page - 32, buffer, 8) == 2
    assert _trace(side, request_, ARENA, buffer + page - 24, 64) == 24


@pytest.mark.parametrize("request_", ["peek", "poke"])
def test_ptrace_eio(side: Side, request_: str) -> None:
    buffer = traced(side)
    assert _trace(side, request_, ARENA + side.page_size_bytes, buffer, 4) == -errno.EIO


@pytest.mark.parametrize("request_", ["peek", "poke"])
def test_ptrace_efault(side: Side, request_: str) -> None:
    buffer = traced(side)
    answer = _trace(side, request_, ARENA, buffer + side.page_size_bytes, 4)
    assert answer == -errno.EFAULT


@pytest.mark.parametrize("request_", ["peek", "poke"])
def test_ptrace_untagged(side: Side, request_: str) -> None:
    """Even where the text promises EOPNOTSUPP, on Linux 6.12, the answer is EIO."""
    buffer = traced(side)
    side.map(ARENA + side.page_size_bytes, side.page_size_bytes, "private", "rw", -1, 0)
    side.fill(ARENA + side.page_size_bytes, 16, 1)
    assert _trace(side, request_, ARENA + side.page_size_bytes, buffer, 4) == -errno.EIO


def _trace(side: Side, request: str, address: int, buffer: int, n_tags: int) -> int:
    return side.trace_tags("peek" if request == "peek" else "poke", address, buffer, n_tags)
