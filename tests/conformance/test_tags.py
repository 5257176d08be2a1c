"""Every backend answers as the kernel does: see `mtetool.guest.Guest`."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from mtetool.errors import MteOffError, TooLateError
from mtetool.guest import Extent, Guest, Pending
from mtetool.tags import Tags
from mtetool.uapi import COPY_LENGTH_MAX, GRANULE_BYTES
from tests.conformance.guests import Factory

BASE = 0x4000_0000
# Fills read buffers: bytes that a copy leaves alone keep it, bytes that it writes lack bit 7.
UNTOUCHED = 0xEE


def buffer(size_bytes: int) -> Tags:
    return np.full(size_bytes // GRANULE_BYTES, UNTOUCHED, dtype=np.uint8)


def tags_of(guest: Guest, ipa: int, size_bytes: int) -> Tags:
    out = buffer(size_bytes)
    assert guest.read_tags(ipa, out) == size_bytes
    return out


def random_tags(size_bytes: int, seed: int = 1) -> Tags:
    random = np.random.default_rng(seed)
    # Without zeros: a copy that does not happen shows in every granule.
    return random.integers(1, 16, size_bytes // GRANULE_BYTES, dtype=np.uint8)


def errno_of_read(guest: Guest, ipa: int, size_bytes: int) -> int | None:
    out = buffer(size_bytes)
    found = errno_of(lambda: guest.read_tags(ipa, out))
    assert (out == UNTOUCHED).all()
    return found


def errno_of_write(guest: Guest, ipa: int, size_bytes: int) -> int | None:
    return errno_of(lambda: guest.write_tags(ipa, random_tags(size_bytes)))


def errno_of(call: Callable[[], int]) -> int | None:
    try:
        completed = call()
    except OSError as error:
        return error.errno
    pytest.fail(f"{completed} bytes were completed where nothing should be")


# --- copying ------------------------------------------------------------------------------


def test_fresh_memory_reads_zeros(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, 8 * page, False)])
    assert not tags_of(guest, BASE, 8 * page).any()


def test_what_was_written_is_read(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, 8 * page, False)])
    tags = random_tags(8 * page)
    assert guest.write_tags(BASE, tags) == 8 * page
    assert np.array_equal(tags_of(guest, BASE, 8 * page), tags)
    assert np.array_equal(tags_of(guest, BASE + 3 * page, page), tags.reshape(8, -1)[3])


def test_what_is_tagged_may_be_tagged(make_guest: Factory, page: int) -> None:
    """The parts are whole pages, in order, inside the requested extent."""
    guest = make_guest([(BASE, 64 * page, False)])
    tagged = [BASE + n * page for n in (0, 3, 4, 40, 63)]
    for ipa in tagged:
        guest.write_tags(ipa, random_tags(page))
    for first, n_pages in ((0, 64), (3, 2), (4, 30), (5, 35), (41, 23)):
        start, end = BASE + first * page, BASE + (first + n_pages) * page
        parts = list(guest.may_be_tagged(Extent.between(start, end)))
        edges = [edge for part in parts for edge in (part.ipa, part.end)]
        assert edges == sorted(edges)
        assert all(edge % page == 0 and start <= edge <= end for edge in edges)
        assert all(part.size_bytes > 0 for part in parts)
        for ipa in tagged:
            told = any(part.ipa <= ipa < part.end for part in parts)
            assert told is (start <= ipa < end)


def test_memory_that_is_not_there_may_be_tagged(make_guest: Factory, page: int) -> None:
    """It must be read, to find out why it cannot be."""
    guest = make_guest([(BASE, 4 * page, False), (BASE + 8 * page, 4 * page, False)])
    parts = list(guest.may_be_tagged(Extent(BASE, 12 * page)))
    for ipa in range(BASE + 4 * page, BASE + 8 * page, page):
        assert any(part.ipa <= ipa < part.end for part in parts)


def test_what_was_written_can_be_overwritten(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, 4 * page, False)])
    guest.write_tags(BASE, random_tags(4 * page))
    zeros = np.zeros(4 * page // GRANULE_BYTES, dtype=np.uint8)
    assert guest.write_tags(BASE, zeros) == 4 * page
    assert not tags_of(guest, BASE, 4 * page).any()


def test_all_sixteen_values(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, page, False)])
    tags = (np.arange(page // GRANULE_BYTES) % 16).astype(np.uint8)
    guest.write_tags(BASE, tags)
    assert np.array_equal(tags_of(guest, BASE, page), tags)


def test_high_bits_are_dropped_and_what_was_given_stays(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, page, False)])
    given = np.random.default_rng(2).integers(0, 256, page // GRANULE_BYTES, dtype=np.uint8)
    before = given.copy()
    assert guest.write_tags(BASE, given) == page
    assert np.array_equal(tags_of(guest, BASE, page), before & 0xF)
    assert np.array_equal(given, before)


def test_last_page(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, 8 * page, False)])
    tags = random_tags(page)
    assert guest.write_tags(BASE + 7 * page, tags) == page
    assert np.array_equal(tags_of(guest, BASE + 7 * page, page), tags)


def test_neighbours_are_untouched(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, 5 * page, False)])
    tags = random_tags(5 * page)
    guest.write_tags(BASE, tags)
    new = random_tags(page, seed=7)
    guest.write_tags(BASE + 2 * page, new)
    expected = tags.reshape(5, -1).copy()
    expected[2] = new
    assert np.array_equal(tags_of(guest, BASE, 5 * page), expected.reshape(-1))


def test_length_zero(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, page, False)])
    nothing = np.empty(0, dtype=np.uint8)
    assert guest.read_tags(BASE, nothing) == 0
    assert guest.write_tags(BASE, nothing) == 0
    # It passes the check of the memslots, too: there is no page to check.
    assert guest.read_tags(BASE + 64 * page, nothing) == 0


# --- refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize("off", [1, GRANULE_BYTES, -GRANULE_BYTES])
def test_misaligned_address(make_guest: Factory, page: int, off: int) -> None:
    guest = make_guest([(BASE, 4 * page, False)])
    assert errno_of_read(guest, BASE + page + off, page) == errno.EINVAL
    assert errno_of_write(guest, BASE + page + off, page) == errno.EINVAL
    assert not tags_of(guest, BASE, 4 * page).any()


@pytest.mark.parametrize("off", [GRANULE_BYTES, -GRANULE_BYTES])
def test_misaligned_length(make_guest: Factory, page: int, off: int) -> None:
    guest = make_guest([(BASE, 4 * page, False)])
    assert errno_of_read(guest, BASE, page + off) == errno.EINVAL
    assert errno_of_write(guest, BASE, page + off) == errno.EINVAL
    assert not tags_of(guest, BASE, 4 * page).any()


def test_misaligned_before_hole(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, page, False)])
    assert errno_of_read(guest, BASE + 64 * page + GRANULE_BYTES, page) == errno.EINVAL


def test_hole(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, 2 * page, False), (BASE + 4 * page, page, False)])
    for ipa in (0, BASE - page, BASE + 2 * page, BASE + 3 * page, BASE + 5 * page):
        assert errno_of_read(guest, ipa, page) == errno.EFAULT
        assert errno_of_write(guest, ipa, page) == errno.EFAULT


def test_a_hole_before_memory_is_not_skipped(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, 2 * page, False)])
    assert errno_of_read(guest, BASE - page, 2 * page) == errno.EFAULT
    assert errno_of_write(guest, BASE - page, 2 * page) == errno.EFAULT
    assert not tags_of(guest, BASE, 2 * page).any()


def test_the_end_of_the_addresses(make_guest: Factory, page: int) -> None:
    guest = make_guest([(0, 2 * page, False)])
    assert errno_of_read(guest, (1 << 64) - page, 2 * page) == errno.EFAULT
    assert errno_of_write(guest, (1 << 64) - page, 2 * page) == errno.EFAULT
    assert not tags_of(guest, 0, 2 * page).any()


@pytest.mark.parametrize("bit", [56, 59, 63])
def test_the_top_byte_is_part_of_the_address(make_guest: Factory, page: int, bit: int) -> None:
    # A CPU ignores it in a pointer, where it holds the tag.
    guest = make_guest([(BASE, page, False)])
    assert errno_of_read(guest, BASE | 1 << bit, page) == errno.EFAULT
    assert errno_of_write(guest, BASE | 1 << bit, page) == errno.EFAULT
    assert not tags_of(guest, BASE, page).any()


# --- partial copies -----------------------------------------------------------------------


def test_crossing_the_end_of_a_slot(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, 2 * page, False)])
    tags = random_tags(4 * page)
    assert guest.write_tags(BASE, tags) == 2 * page
    assert errno_of_write(guest, BASE + 2 * page, 2 * page) == errno.EFAULT
    out = buffer(4 * page)
    assert guest.read_tags(BASE, out) == 2 * page
    half = out.size // 2
    assert np.array_equal(out[:half], tags[:half])
    assert (out[half:] == UNTOUCHED).all()
    assert errno_of_read(guest, BASE + 2 * page, 2 * page) == errno.EFAULT


def test_adjacent_slots_are_one(make_guest: Factory, page: int) -> None:
    slots = [(BASE, 2 * page, False), (BASE + 2 * page, page, False)]
    guest = make_guest([*slots, (BASE + 3 * page, 3 * page, False)])
    tags = random_tags(6 * page)
    assert guest.write_tags(BASE, tags) == 6 * page
    assert np.array_equal(tags_of(guest, BASE, 6 * page), tags)
    assert np.array_equal(tags_of(guest, BASE + page, 4 * page), tags.reshape(6, -1)[1:5].ravel())


def test_read_only_memory(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, 2 * page, True)])
    assert not tags_of(guest, BASE, 2 * page).any()
    assert errno_of_write(guest, BASE, page) == errno.EFAULT
    assert not tags_of(guest, BASE, 2 * page).any()


def test_writing_stops_at_read_only_memory(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, 2 * page, False), (BASE + 2 * page, 2 * page, True)])
    tags = random_tags(3 * page)
    assert guest.write_tags(BASE, tags) == 2 * page
    expected = np.zeros(4 * page // GRANULE_BYTES, dtype=np.uint8)
    expected[: expected.size // 2] = tags[: expected.size // 2]
    assert np.array_equal(tags_of(guest, BASE, 4 * page), expected)


def test_several_megabytes(make_guest: Factory, page: int) -> None:
    """More than any backend copies at once, and an odd number of pages."""
    size_bytes = (68 << 20) + page
    guest = make_guest([(BASE, size_bytes, False)])
    tags = random_tags(size_bytes)
    assert guest.write_tags(BASE, tags) == size_bytes
    assert np.array_equal(tags_of(guest, BASE, size_bytes), tags)
    out = buffer(size_bytes)
    assert guest.read_tags(BASE + page, out) == size_bytes - page
    # Tags that are the same in one place and differ in another do not count as the same.
    halves = np.repeat(np.array([3, 5], dtype=np.uint8), tags.size // 2)
    assert guest.write_tags(BASE, halves) == size_bytes
    assert guest.write_tags(BASE, np.full_like(halves, 3)) == size_bytes
    assert (tags_of(guest, BASE, size_bytes) == 3).all()


# --- copies that are begun ------------------------------------------------------------------


def test_begun_copies_take_effect_in_their_order(make_guest: Factory, page: int) -> None:
    """Each write has its read-back; as many are in flight as the guest allows."""
    guest = make_guest([(BASE, 16 * page, False)])
    tags = random_tags(16 * page).reshape(8, -1)
    under_way: list[tuple[Pending, Pending, Tags, Tags]] = []
    for n, part in enumerate(tags):
        ipa, found = BASE + 2 * n * page, buffer(2 * page)
        write = guest.begin_write(ipa, part)
        under_way.append((write, guest.begin_read(ipa, found), part, found))
        if len(under_way) == guest.depth:
            write, read, wanted, found = under_way.pop(0)
            assert write() == read() == 2 * page
            assert np.array_equal(found, wanted)
    for write, read, _, _ in under_way:
        assert write() == read() == 2 * page
    assert np.array_equal(tags_of(guest, BASE, 16 * page), tags.ravel())


def test_begun_copies_answer_as_others_do(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, 2 * page, False), (BASE + 8 * page, page, True)])
    short = buffer(4 * page)
    assert guest.begin_read(BASE, short)() == 2 * page
    assert (short[len(short) // 2 :] == UNTOUCHED).all()
    assert guest.begin_write(BASE, random_tags(4 * page))() == 2 * page
    assert errno_of(guest.begin_read(BASE + 4 * page, buffer(page))) == errno.EFAULT
    assert errno_of(guest.begin_write(BASE + 4 * page, random_tags(page))) == errno.EFAULT


def test_a_begun_copy_that_nobody_takes(make_guest: Factory, page: int) -> None:
    """It may have happened or not; the next call is answered as if it were alone."""
    guest = make_guest([(BASE, 8 * page, False)])
    tags = random_tags(page)
    guest.write_tags(BASE, tags)
    guest.begin_read(BASE, buffer(page))
    guest.begin_read(BASE + 4 * page, buffer(page))
    assert np.array_equal(tags_of(guest, BASE, page), tags)
    found = buffer(page)
    guest.begin_write(BASE + page, random_tags(page, seed=2))
    assert guest.begin_read(BASE, found)() == page
    assert np.array_equal(found, tags)
    guest.begin_read(BASE + 2 * page, buffer(page))
    guest.freeze()
    assert np.array_equal(tags_of(guest, BASE, page), tags)
    guest.thaw()


def test_many_small_copies_in_flight(make_guest: Factory, page: int) -> None:
    """As many as are worth it, each write with its read-back, the second half to the same pages."""
    n_pages, under_way = 32, []
    guest = make_guest([(BASE, 2 * n_pages * page, False)])
    for n in range(2 * n_pages):
        ipa = BASE + 2 * (n % n_pages) * page
        part, found = random_tags(page, seed=n), buffer(page)
        write = guest.begin_write(ipa, part)
        under_way.append((write, guest.begin_read(ipa, found), part, found))
        if guest.burst == 1:
            assert write() == under_way[-1][1]() == page
    for write, read, part, found in under_way if guest.burst > 1 else ():
        assert write() == read() == page
        assert np.array_equal(found, part)
    for n in range(n_pages):
        wanted = under_way[n_pages + n][2]
        assert np.array_equal(tags_of(guest, BASE + 2 * n * page, page), wanted)


# --- scattered copies -----------------------------------------------------------------------


def extents(*pairs: tuple[int, int]) -> NDArray[np.uint64]:
    return np.array(pairs, np.uint64).reshape(-1, 2)


def test_scattered_copies(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, 64 * page, False)])
    where = extents(*((BASE + n * page, page * (1 + n % 2)) for n in (40, 2, 9, 60, 31)))
    tags = random_tags(int(where[:, 1].sum()))
    assert guest.write_scattered(where, tags) == tags.size * GRANULE_BYTES
    out = buffer(tags.size * GRANULE_BYTES)
    assert guest.read_scattered(where, out) == tags.size * GRANULE_BYTES
    assert np.array_equal(out, tags)
    assert np.array_equal(tags_of(guest, BASE + 2 * page, page), tags[page // 16 :][: page // 16])
    assert not tags_of(guest, BASE, 2 * page).any()
    assert guest.read_scattered(extents(), buffer(0)) == 0
    assert guest.write_scattered(extents(), buffer(0)) == 0


def test_scattered_copies_stop_where_one_page_cannot_be_copied(
    make_guest: Factory, page: int
) -> None:
    guest = make_guest([(BASE, 4 * page, False), (BASE + 8 * page, page, True)])
    where = extents((BASE, page), (BASE + 2 * page, 4 * page), (BASE + page, page))
    out = buffer(6 * page)
    assert guest.read_scattered(where, out) == 3 * page
    assert not out[: 3 * page // GRANULE_BYTES].any()
    assert guest.write_scattered(where, random_tags(6 * page)) == 3 * page
    nowhere = extents((BASE + 5 * page, page), (BASE, page))
    assert errno_of(lambda: guest.read_scattered(nowhere, buffer(2 * page))) == errno.EFAULT
    readonly = extents((BASE, page), (BASE + 8 * page, page))
    assert guest.write_scattered(readonly, random_tags(2 * page)) == page
    assert errno_of(lambda: guest.write_scattered(readonly[1:], random_tags(page))) == errno.EFAULT


# --- MTE on and off -----------------------------------------------------------------------


def test_mte_off(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, page, False)], mte=False)
    with pytest.raises(MteOffError):
        guest.read_tags(BASE, buffer(page))
    with pytest.raises(MteOffError):
        guest.write_tags(BASE, random_tags(page))
    assert guest.info().mte is False


def test_mte_off_comes_before_every_other_check(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, page, False)], mte=False)
    with pytest.raises(MteOffError):
        guest.read_tags(BASE + GRANULE_BYTES, buffer(page))
    with pytest.raises(MteOffError):
        guest.read_tags(0, buffer(page))


@pytest.mark.vm
def test_enable_before_the_first_vcpu(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, page, False)], mte=False, vcpus=0)
    assert guest.enable_mte() is True
    assert guest.info().mte is True
    assert guest.enable_mte() is False
    tags = random_tags(page)
    assert guest.write_tags(BASE, tags) == page
    assert np.array_equal(tags_of(guest, BASE, page), tags)


@pytest.mark.vm
def test_enable_after_the_first_vcpu(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, page, False)], mte=False, vcpus=1)
    with pytest.raises(TooLateError):
        guest.enable_mte()
    with pytest.raises(MteOffError):
        guest.read_tags(BASE, buffer(page))


def test_enable_where_it_is_on(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, page, False)], vcpus=1)
    guest.write_tags(BASE, random_tags(page))
    assert guest.enable_mte() is False
    assert np.array_equal(tags_of(guest, BASE, page), random_tags(page))


# --- the guest ----------------------------------------------------------------------------


def test_description(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, 2 * page, False), (BASE + 4 * page, page, True)])
    info = guest.info()
    assert info.mte is True
    assert info.page_size_bytes == guest.page_size_bytes == page
    found = [(slot.ipa, slot.size_bytes, slot.readonly) for slot in info.memslots]
    assert found == [(BASE, 2 * page, False), (BASE + 4 * page, page, True)]


def test_closing_twice(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, page, False)])
    guest.write_tags(BASE, random_tags(page))
    guest.close()
    guest.close()


def test_two_guests_in_turn(make_guest: Factory, page: int) -> None:
    a = make_guest([(BASE, 4 * page, False)])
    b = make_guest([(BASE, 4 * page, False)], vcpus=1)
    tags = random_tags(4 * page).reshape(4, -1)
    for number in range(4):
        a.write_tags(BASE + number * page, tags[number])
        b.write_tags(BASE + number * page, tags[3 - number])
    for number in range(4):
        assert np.array_equal(tags_of(a, BASE + number * page, page), tags[number])
        assert np.array_equal(tags_of(b, BASE + number * page, page), tags[3 - number])


def test_too_long(make_guest: Factory, page: int) -> None:
    guest = make_guest([(BASE, page, False)])
    too_long = np.zeros((COPY_LENGTH_MAX + 1) // GRANULE_BYTES, dtype=np.uint8)
    assert errno_of_write(guest, BASE, COPY_LENGTH_MAX + 1) == errno.EINVAL
    assert errno_of(lambda: guest.read_tags(BASE, too_long)) == errno.EINVAL
    longest = too_long[: -(page // GRANULE_BYTES)]
    assert guest.read_tags(BASE, longest) == page
