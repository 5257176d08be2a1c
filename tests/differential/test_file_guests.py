"""Guests in files answer like the emulated kernel, which answers like real ones."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtetool import uapi
from mtetool.backends.emu.guest import EmulatedGuest, create_emulated, open_emulated
from mtetool.emulator import Host
from mtetool.guest import GuestOptions, Memslot
from mtetool.tags import Tags
from tests.differential.emulated import EmulatedSide
from tests.differential.sides import ARENA, pattern

_BASE = 1 << 30
_ALL_PAGES = 24
_layouts = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5), st.booleans()), max_size=4)
_copies = st.lists(
    st.tuples(
        st.booleans(),
        st.integers(-1, _ALL_PAGES),
        st.integers(0, 9),
        st.integers(0, 255),
        st.sampled_from([0, 0, 0, 0, 0, 16, 2048]),
    ),
    max_size=12,
)


def _slots(layout: list[tuple[int, int, bool]], page: int) -> list[Memslot]:
    """Return memslots, each some pages after the last: (gap, size, read-only); at least one."""
    at, slots = _BASE, []
    for number, (gap, n_pages, readonly) in enumerate(layout or [(0, 1, False)]):
        at += gap * page
        slots.append(Memslot(number, at, n_pages * page, readonly, "rom" if readonly else "ram"))
        at += n_pages * page
    return slots


def _side(slots: list[Memslot], page: int) -> EmulatedSide:
    side = EmulatedSide(Host(page_size_bytes=page))
    side.create_vm(0, 0)
    side.enable_cap(0, uapi.KVM_CAP_ARM_MTE, 0, 0)
    address = ARENA
    for slot in slots:
        flags = uapi.KVM_MEM_READONLY if slot.readonly else 0
        side.map(address, slot.size_bytes, "private", "rw", -1, 0)
        assert side.set_memslot(0, slot.id, flags, slot.ipa, slot.size_bytes, address) == 0
        address += slot.size_bytes
    side.map(ARENA + 64 * page, 4 * page, "private", "rw", -1, 0)
    return side


def _of_file(guest: EmulatedGuest, write: bool, ipa: int, tags: Tags) -> int:
    try:
        return guest.write_tags(ipa, tags) if write else guest.read_tags(ipa, tags)
    except OSError as error:
        return -(error.errno or errno.EIO)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=_layouts, copies=_copies, page=st.sampled_from([4096, 16384]))
def test_copies_are_those_of_the_emulated_kernel(
    tmp_path: Path,
    layout: list[tuple[int, int, bool]],
    copies: list[tuple[bool, int, int, int, int]],
    page: int,
) -> None:
    slots = _slots(layout, page)
    side, path = _side(slots, page), str(tmp_path / "guest")
    create_emulated(path, page_size_bytes=page, memslots=slots, force=True)
    with open_emulated(path, GuestOptions()) as guest:
        for write, first, n_pages, seed, off in copies:
            ipa, granules = _BASE + first * page + off, n_pages * page // 16
            buffer = ARENA + 64 * page
            side.fill(buffer, granules or 1, seed)
            flags = uapi.KVM_ARM_TAGS_TO_GUEST if write else uapi.KVM_ARM_TAGS_FROM_GUEST
            wanted = side.copy_tags(0, ipa, granules * 16, buffer, flags, [0, 0])
            tags = np.frombuffer(bytearray(pattern(granules, seed)), dtype=np.uint8)
            assert _of_file(guest, write, ipa, tags) == wanted
            assert tags.tobytes() == side.contents(buffer, granules)
