"""What the owner of an emulated guest may do with it, beyond what the kernel allows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from mtetool.backends.emu.file import refused
from mtetool.buffers import as_bytes
from mtetool.errors import MisalignedError, RangeError, UsageError
from mtetool.guest import Extent, Memslot
from mtetool.uapi import GRANULE_BYTES, TAG_MAX

if TYPE_CHECKING:
    from mtetool.backends.emu.fault_block import FaultsInFile
    from mtetool.backends.emu.tag_file import TagFile
    from mtetool.faults.model import Fault, Faults

# A long range with one tag is written this many granules at a time.
_CHUNK_GRANULES = 1 << 20

Advance = Callable[[int], None]
"""Called with the bytes of guest memory done since the last call."""


class Owner:
    """Sets tags in any memory of a guest, and its faults."""

    def __init__(self, file: TagFile) -> None:
        self._file = file

    @property
    def memslots(self) -> tuple[Memslot, ...]:
        """All memslots, whatever the user specified for the guest."""
        return self._file.described.memslots

    def set_tag(
        self, ipa: int, size_bytes: int, tag: int, *, advance: Advance | None = None
    ) -> None:
        """Give the granules of a range one tag, in read-only memory too.

        Raises MisalignedError if it is not whole granules, RangeError if not all of it is memory,
        MteOffError, BusyError; nothing is changed then.
        """
        if not 0 <= tag <= TAG_MAX:
            raise UsageError(f"{tag} is not a tag: tags are 0 to {TAG_MAX}")
        self._check_owned(ipa, size_bytes)
        n_granules = size_bytes // GRANULE_BYTES
        constant = memoryview(bytes([tag]) * min(n_granules, _CHUNK_GRANULES))
        for first in range(0, n_granules, _CHUNK_GRANULES):
            part = constant[: min(_CHUNK_GRANULES, n_granules - first)]
            self._poke(ipa + first * GRANULE_BYTES, part)
            if advance is not None:
                advance(len(part) * GRANULE_BYTES)

    def fill(
        self,
        pattern: str,
        seed: int,
        slots: Sequence[int] | None = None,
        *,
        ranges: Sequence[Extent] = (),
        advance: Advance | None = None,
    ) -> None:
        """Give memslots (by id; None: all) the tags of a pattern, see `patterns`.

        Device memory is left out. `ranges` are filled instead of memslots, each with a pattern of
        its own. Raises UsageError for unknown slots and patterns, MisalignedError for a range that
        is not whole pages, RangeError if not all of it is memory, MteOffError, BusyError; nothing
        is changed then.
        """
        from mtetool.backends.emu.patterns import pattern_tags

        for extent in ranges:
            self._check_pages(extent.ipa, extent.size_bytes)
        chosen = ranges or [Extent(slot.ipa, slot.size_bytes) for slot in self._chosen(slots)]
        self._file.check_mte()
        self._file.take_for_writing()
        per_page = self._file.described.page_size_bytes // GRANULE_BYTES
        for extent in chosen:
            ipa, n_granules = extent.ipa, extent.size_bytes // GRANULE_BYTES
            for tags in pattern_tags(pattern, seed, ipa, n_granules, per_page):
                self._poke(ipa, as_bytes(tags))
                ipa += tags.size * GRANULE_BYTES
                if advance is not None:
                    advance(tags.size * GRANULE_BYTES)

    def faults(self) -> Faults:
        """The guest's faults, and what they have seen; none fires for the owner."""
        from mtetool.faults.model import Faults

        kept = self.kept_faults()
        if kept is None:
            return Faults()
        with closing(kept):
            return kept.read()

    def set_faults(self, faults: Iterable[Fault]) -> None:
        """Replace its faults with these, or none; a guest that vanished is back.

        Raises UsageError for too many faults, BusyError, PermissionRefusedError, DiskFullError.
        """
        ordered = tuple(faults)
        self._file.take_for_writing()
        at = self._file.tags_end
        try:
            if not ordered:
                os.ftruncate(self._file.fd, at)
                return
            from mtetool.backends.emu.fault_block import FaultsInFile

            with closing(FaultsInFile(self._file.fd, self._file.path, at, writable=True)) as kept:
                kept.replace(ordered)
        except OSError as error:
            raise refused(error, self._file.path) from error

    def kept_faults(self) -> FaultsInFile | None:
        """Where its faults are kept, if it has any; the caller closes it."""
        self._file.check_open()
        at = self._file.tags_end
        try:
            if os.fstat(self._file.fd).st_size == at:
                return None
            from mtetool.backends.emu.fault_block import FaultsInFile

            return FaultsInFile(self._file.fd, self._file.path, at, writable=self._file.writable)
        except OSError as error:
            raise refused(error, self._file.path) from error

    def _chosen(self, slots: Sequence[int] | None) -> list[Memslot]:
        known = {slot.id: slot for slot in self._file.described.memslots if slot.kind != "device"}
        if slots is None:
            return list(known.values())
        for slot_id in slots:
            if slot_id not in known:
                ids = ", ".join(str(known_id) for known_id in sorted(known))
                raise UsageError(f"{self._file.path} has no memslot {slot_id}; it has {ids}")
        return [known[slot_id] for slot_id in dict.fromkeys(slots)]

    def _check_pages(self, ipa: int, size_bytes: int) -> None:
        page = self._file.described.page_size_bytes
        if ipa % page or size_bytes % page:
            raise MisalignedError(
                f"{ipa:#x}:{size_bytes:#x} is not made of whole pages of {page} bytes", ipa=ipa
            )
        self._check_owned(ipa, size_bytes)

    def _check_owned(self, ipa: int, size_bytes: int) -> None:
        if ipa % GRANULE_BYTES or size_bytes % GRANULE_BYTES or size_bytes <= 0:
            raise MisalignedError(
                f"{ipa:#x}:{size_bytes:#x} is not made of whole granules of 16 bytes", ipa=ipa
            )
        at, end = ipa, ipa + size_bytes
        while at < end:
            slot = self._file.slot_at(at)
            if slot is None or slot.kind == "device":
                raise RangeError(
                    f"{ipa:#x}:{size_bytes:#x} is not all memory: there is none at {at:#x}",
                    hint=f"list the memslots: mtetool emu show {self._file.path}",
                    ipa=at,
                )
            at = slot.end
        self._file.check_mte()
        self._file.take_for_writing()

    def _poke(self, ipa: int, tags: memoryview) -> None:
        """Write to memory that is known to exist; it may span several slots."""
        done = 0
        while done < len(tags):
            at = ipa + done * GRANULE_BYTES
            slot = self._file.slot_at(at)
            if slot is None:
                raise RangeError(f"no memory at {at:#x}", ipa=at)
            part = tags[done : done + (slot.end - at) // GRANULE_BYTES]
            done += self._file.write(at, part)
