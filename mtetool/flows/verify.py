"""Whether a snapshot is sound, and whether a guest has its tags."""

from __future__ import annotations

from dataclasses import dataclass, field

from mtetool.backends.base import Guest
from mtetool.errors import STATUS_NO, STATUS_OK, STATUS_PARTIAL
from mtetool.flows.checking import Checked, check
from mtetool.flows.comparing import Comparer
from mtetool.flows.copying import TagReader, check_has_tags
from mtetool.flows.layout import layout_of, slots_of
from mtetool.flows.pieces import Progress, no_progress
from mtetool.flows.tally import Tally
from mtetool.snapshot.model import Extent, Missing
from mtetool.snapshot.reader import SnapshotReader


@dataclass
class VerifyResult:
    """A snapshot that is sound; `paused` and the tallies speak of the guest, if there was one."""

    checked: Checked
    against: str | None = None
    paused: bool | None = None
    compared_bytes: int = 0
    differing: Tally[Extent] = field(default_factory=Tally)
    unreadable: Tally[Missing] = field(default_factory=Tally)

    @property
    def status(self) -> int:
        """1: other tags in the guest; 3: not everything is there to be compared; else 0."""
        if self.differing:
            return STATUS_NO
        return STATUS_PARTIAL if self.checked.missing or self.unreadable else STATUS_OK


def verify(reader: SnapshotReader, *, progress: Progress = no_progress) -> VerifyResult:
    """Check every byte of a snapshot. Raises SnapshotError where it is not sound."""
    return VerifyResult(check(reader, progress=progress))


def verify_against(
    reader: SnapshotReader, guest: Guest, name: str, *, progress: Progress = no_progress
) -> VerifyResult:
    """Check a snapshot and compare each of its tags with the guest's.

    Raises SnapshotError, and GuestError where the guest refuses as a whole.
    """
    layout = layout_of(guest, slots_of(reader.header))
    check_has_tags(guest, layout, name)
    comparer = Comparer(TagReader(guest, layout))
    differing: Tally[Extent] = Tally()
    unreadable: Tally[Missing] = Tally()
    paused = guest.paused()
    checked = check(
        reader,
        use=lambda ipa, tags: comparer.compare(ipa, tags, differing, unreadable),
        use_fill=lambda fill: comparer.compare_fill(fill, differing, unreadable),
        progress=progress,
    )
    return VerifyResult(checked, name, paused, comparer.compared_bytes, differing, unreadable)
