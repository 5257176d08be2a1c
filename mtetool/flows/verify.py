"""Whether a snapshot is sound, and whether a guest has its tags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mtetool.errors import STATUS_NO, STATUS_OK, STATUS_PARTIAL
from mtetool.flows.comparing import Comparer
from mtetool.flows.relocation import Relocation, moved_slots
from mtetool.guest import Extent, Guest, Missing
from mtetool.snapshot.reader import SnapshotReader
from mtetool.sources.allocating import check_allocates_nothing
from mtetool.sources.checking import Checked, check
from mtetool.sources.copying import Copied, Fill, TagReader, tagged_layout
from mtetool.sources.layers import Layers
from mtetool.sources.layout import merged, slots_of, total_bytes
from mtetool.sources.pieces import Progress, no_progress
from mtetool.sources.stored import stored
from mtetool.sources.tally import Tally
from mtetool.uapi import GRANULE_BYTES


@dataclass
class VerifyResult:
    """A sound snapshot; `paused` and the tallies describe the guest, if there was one."""

    checked: Checked
    against: str | None = None
    paused: bool | None = None
    compared_bytes: int = 0
    differing: Tally[Extent] = field(default_factory=Tally)
    unreadable: Tally[Missing] = field(default_factory=Tally)

    @property
    def status(self) -> int:
        """The exit status: 1 if the guest has other tags, 3 if some cannot be compared, or 0."""
        if self.differing:
            return STATUS_NO
        return STATUS_PARTIAL if self.checked.missing or self.unreadable else STATUS_OK


def verify(reader: SnapshotReader | Layers, *, progress: Progress = no_progress) -> VerifyResult:
    """Check every byte of a snapshot. Raises SnapshotError where it is not sound."""
    if isinstance(reader, Layers):
        return VerifyResult(reader.check(progress=progress))
    return VerifyResult(check(reader, progress=progress))


def verify_against(
    reader: SnapshotReader | Layers,
    guest: Guest,
    name: str,
    *,
    every_page: bool = False,
    moves: Sequence[tuple[int, int]] = (),
    listed: int | None = None,
    progress: Progress = no_progress,
) -> VerifyResult:
    """Check a snapshot and compare each of its tags with the guest's.

    `moves` are as for `Relocation`: addresses in the result are the guest's. The result lists only
    the first `listed` ranges of a kind (None: all).

    Raises SnapshotError, BaseNeededError, UsageError, LayoutError and MisalignedError for the
    moves, and GuestError where the guest refuses as a whole; WouldAllocateError where memory would
    be allocated and `every_page` is false.
    """
    whole = stored(reader)
    relocation = Relocation(moves, whole.header.memslots)
    layout = tagged_layout(guest, name, moved_slots(slots_of(whole.header), relocation))
    relocation.check_targets(layout.page_size_bytes)
    scope = relocation.moved(merged(whole.header.scope)) if moves else whole.header.scope
    check_allocates_nothing(guest, scope, name, every_page=every_page)
    comparer = Comparer(TagReader(guest, layout, insist=every_page))
    differing: Tally[Extent] = Tally(listed)
    unreadable: Tally[Missing] = Tally(listed)
    result = VerifyResult(
        Checked(whole.header), name, guest.paused(), differing=differing, unreadable=unreadable
    )

    def compare(ipa: int, tags: memoryview) -> None:
        for offset, target in relocation(Extent(ipa, len(tags) * GRANULE_BYTES)):
            first = offset // GRANULE_BYTES
            part = tags[first : first + target.size_bytes // GRANULE_BYTES]
            comparer.compare(target.ipa, part, differing, unreadable, every_page=every_page)

    def compare_fill(fill: Fill) -> None:
        for _, target in relocation(Extent(fill.ipa, fill.size_bytes)):
            part = Fill(target.ipa, target.size_bytes, fill.tag)
            comparer.compare_fill(part, differing, unreadable, every_page=every_page)

    if isinstance(reader, Layers):
        result.checked = reader.check()
        total, done = total_bytes(whole.header.scope), 0
        for step in reader.steps():
            if isinstance(step, Copied):
                compare(step.ipa, step.tags)
            elif isinstance(step, Fill):
                compare_fill(step)
            done += step.size_bytes
            progress(done, total)
    else:
        result.checked = check(reader, use=compare, use_fill=compare_fill, progress=progress)
    result.compared_bytes = comparer.compared_bytes
    return result
