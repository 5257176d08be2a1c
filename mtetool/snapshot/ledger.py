"""The account of a log of records, the same for the writer and for every reader."""

from __future__ import annotations

from mtetool.guest import Missing
from mtetool.snapshot.coverage import Coverage, MissingMap, ScatteredError
from mtetool.snapshot.heads import TagsHead
from mtetool.snapshot.model import ADDRESS_LIMIT, Footer, Header
from mtetool.uapi import GRANULE_BYTES
from mtetool.words import counted


class LedgerError(Exception):
    """A record that cannot be in this snapshot; the text says why."""


class Ledger:
    """Totals, coverage and what is missing, record by record.

    Raises LedgerError for a range that is not aligned, not in the scope, or one range too many.
    """

    def __init__(self, header: Header) -> None:
        self._page = header.page_size_bytes
        self._coverage = Coverage(header.scope)
        self.missing = MissingMap()
        self._granules = 0
        self._tagged_granules = 0
        self._tagged_pages = 0
        # How much of a delta has changed, at least and at most: only the base says exactly.
        self._changed_bounds = (0, 0)

    def check(self, ipa: int, size_bytes: int) -> None:
        """Check that a record may cover this range at all."""
        where = f"the range {ipa:#x}:{size_bytes:#x}"
        if ipa % self._page or size_bytes % self._page or size_bytes <= 0:
            raise LedgerError(f"{where} is not made of whole pages of {self._page} bytes")
        if not self._coverage.holds(ipa, ipa + size_bytes):
            raise LedgerError(f"{where} is not inside the snapshot's scope")

    def holds(self, start: int, end: int) -> bool:
        """Whether a range is inside the scope, as one piece."""
        return self._coverage.holds(start, end)

    def tags(self, head: TagsHead) -> None:
        """Enter a record of tags."""
        self.seen(head.ipa, head.granules)
        self._tagged_granules += head.tagged_granules
        self._tagged_pages += head.tagged_pages
        least, most = self._changed_bounds
        if head.over_base:
            self._changed_bounds = (least + head.tagged_granules, most + head.tagged_granules)
        else:
            self._changed_bounds = (least, most + head.granules)

    def seen(self, ipa: int, granules: int) -> None:
        """As `tags`, for a record known only from the index: its tags are not counted."""
        size_bytes = granules * GRANULE_BYTES
        self.check(ipa, size_bytes)
        try:
            self.missing.remove(ipa, ipa + size_bytes)
            self._coverage.add(ipa, ipa + size_bytes)
        except ScatteredError as error:
            raise LedgerError(str(error)) from error
        self._granules += granules
        if self._granules >= ADDRESS_LIMIT:
            raise LedgerError("more granules than can be counted")

    def miss(self, missing: Missing) -> None:
        """Enter a record of missing tags."""
        self.check(missing.ipa, missing.size_bytes)
        try:
            self.missing.add(missing)
            self._coverage.add(missing.ipa, missing.end)
        except ScatteredError as error:
            raise LedgerError(str(error)) from error

    def check_changed(self, changed: int | None) -> None:
        """Check, after all records of tags, that this many granules can have changed."""
        least, most = self._changed_bounds
        if changed is not None and not least <= changed <= most:
            raise LedgerError(f"{counted(changed, 'granule')} changed, not {least} to {most}")

    def footer(
        self, records: int, consistent: bool | None, changed_granules: int | None = None
    ) -> Footer:
        """The totals in the end; the records must cover all pages of the scope."""
        gap = self._coverage.first_gap()
        if gap is not None:
            start, end = gap
            raise LedgerError(f"no record covers {start:#x}:{end - start:#x}")
        return Footer(
            records=records,
            granules=self._granules,
            tagged_granules=self._tagged_granules,
            tagged_pages=self._tagged_pages,
            missing_bytes=self.missing.size_bytes,
            consistent=consistent,
            changed_granules=changed_granules,
        )
