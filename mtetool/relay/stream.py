"""Follow QEMU's migration stream as it passes: which pages it carries, and where RAM ends.

The parser only looks at the bytes, which others forward. It understands QEMU's pre-copy stream over
one connection (migration/savevm.c and ram.c; tested with 10.0 and 11.1), and refuses all others.
All numbers are big-endian:

    stream         "QEVM", u32 version 3, then records that begin with a byte for their type
    configuration  0x07, u32 length, name of the machine type; then subsections, each 0x05,
                   u8 length, name, u32 version 1, and a body that depends on the name
    command        0x08, u16 number, u16 length, data
    section        0x01 (start: u32 id, u8 length, name, u32 instance, u32 version), 0x02 (part:
                   u32 id) or 0x03 (end: u32 id); data; the footer 0x7e, u32 id
    RAM's data     words of 64 bits, each a multiple of the page size plus flags, up to 0x10:
                   0x04 the list of blocks: the word has the sum of their sizes; for each block
                   u8 length, name, u64 size
                   0x08 a page, 0x02 a zero page (u8 0), 0x40 a page by XBZRLE (u8 1, u16 length,
                   data); in the block of the page before if 0x20 is set, otherwise the word is
                   followed by u8 length, name of the block

Sections of devices carry no length, so nothing after them can be found. That is why the parser
stops after RAM's end, and why a device that sends its state earlier is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mtetool.errors import MtetoolError, NoMemoryError
from mtetool.loops import ram_records
from mtetool.relay import refusing
from mtetool.relay.pieces import Pieces, Steps
from mtetool.relay.refusing import damaged, unsupported
from mtetool.words import counted, quoted

MOST_MEMORY_BYTES = 16 << 40
"""The most memory of a guest that is accepted; there is a byte of marks for each page of it."""

BEGINNING = b"QEVM"
"""What every stream begins with.

A QEMU whose incoming pipe ends before its first byte waits on without end, and so does `virsh
restore` (QEMU 10.0 and 11.1: it waits for input, and an end alone is none). With these bytes it
fails. So who may have to refuse a stream sends them first.
"""

_VERSION = 3
_START, _PART, _END, _FULL, _SUBSECTION = 1, 2, 3, 4, 5
_CONFIGURATION, _COMMAND, _FOOTER = 7, 8, 0x7E
_ENDINGS = {0: "the end of the stream", 6: "the description of the devices"}

_OPEN_RETURN_PATH, _PING, _SWITCHOVER_START = 1, 2, 11

_RAM_VERSION = 4
_ZERO, _LIST, _PAGE, _END_OF_DATA, _SAME_BLOCK, _XBZRLE = 0x02, 0x04, 0x08, 0x10, 0x20, 0x40
_XBZRLE_ENCODING = 1

_DEFAULT_PAGE_BITS = 12
_PAGE_BITS = range(10, 17)
# QEMU has about a hundred capabilities and names of machine types of about 20 bytes; a guest has
# a block for each DIMM, ROM and device with memory of its own.
_MOST_NAME_BYTES = 255
_MOST_CAPABILITIES = 1024
_MOST_BLOCKS = 4096


Keep = Callable[[int, bytes], None]
"""Called with the offset of a page in its block, and with its contents."""


@dataclass(frozen=True, slots=True)
class Block:
    """Memory of the guest under one name, such as `mach-virt.ram`."""

    name: str
    size_bytes: int


class RamStream:
    """The state of one stream: feed it every piece, in order.

    `marks` has an array for each of `blocks`, with a byte for each page of `page_bytes`. The byte
    becomes 1 when a record of that page begins to pass, whether the page comes in full, as zeros or
    by XBZRLE; `take_marks` begins anew. Both are empty until the list of blocks has passed.
    `n_pages` counts pages in full, the other counters those that came in other forms.
    `keep` gets the contents of each page of the block with the name `kept`.
    """

    def __init__(
        self,
        most_memory_bytes: int = MOST_MEMORY_BYTES,
        *,
        kept: str | None = None,
        keep: Keep | None = None,
    ) -> None:
        self.machine = ""
        self.capabilities: frozenset[str] = frozenset()
        self.page_bytes = 1 << _DEFAULT_PAGE_BITS
        self.blocks: tuple[Block, ...] = ()
        self.marks: list[NDArray[np.uint8]] = []
        self.n_pages = self.n_zero_pages = self.n_xbzrle_pages = self.n_parts = 0
        self.return_path = self.switchover_seen = False
        self.in_ram_end = False
        self.done = False
        self._most_memory_bytes = most_memory_bytes
        self._kept, self._keep = kept, keep
        self._page_bits = _DEFAULT_PAGE_BITS
        self._ram_id: int | None = None
        self._listed = False
        self._numbers: dict[str, int] = {}
        self._block: int | None = None
        self._pieces = Pieces()
        self._begin = 0  # of what is being read now
        self._steps = self._stream()
        self._error: BaseException | None = None

    @property
    def n_records(self) -> int:
        """How many records of pages have begun to pass, in any form."""
        return self.n_pages + self.n_zero_pages + self.n_xbzrle_pages

    def take_marks(self) -> list[NDArray[np.uint8]]:
        """Return the marks, which the stream no longer changes; from now on there are new ones."""
        taken = self.marks
        # numpy's zeros take up no memory until they are written to.
        self.marks = [np.zeros(len(marks), np.uint8) for marks in taken]
        return taken

    def feed(self, data: bytes | bytearray | memoryview) -> int | None:
        """Look at the next bytes; return where in them the rest after RAM begins, else None.

        That is after the footer of RAM's last section; from then on the answer is 0. However the
        stream is cut into pieces, the result is the same. Raises StreamUnsupportedError,
        StreamDamagedError, NoMemoryError; then every further call raises the same error.
        """
        if self._error is not None:
            raise self._error
        with memoryview(data) as view:
            self._pieces.put(view)
            try:
                next(self._steps, None)
                return self._pieces.at if self.done else None
            except BaseException as error:
                self._error = error
                raise
            finally:
                self._pieces.put(memoryview(b""))

    # --- the stream's records ---------------------------------------------------------

    def _stream(self) -> Steps[None]:
        take, number = self._pieces.take, self._pieces.number
        magic = yield from take(4)
        if magic != BEGINNING:
            raise refusing.wrong_magic(magic)
        version = yield from number(4)
        if version != _VERSION:
            hint = "use QEMU 8.0 or later at the source"
            raise unsupported(4, f"it has version {version}, not {_VERSION}", hint)
        before = None
        while not self.done:
            self._begin = self._pieces.position
            kind = yield from number(1)
            yield from self._record(kind, before)
            before = kind

    def _record(self, kind: int, before: int | None) -> Steps[None]:
        if kind == _CONFIGURATION and before is None:
            yield from self._configuration()
        elif kind == _SUBSECTION and before in (_CONFIGURATION, _SUBSECTION):
            yield from self._subsection()
        elif kind == _COMMAND:
            yield from self._command()
        elif kind in (_START, _FULL):
            yield from self._start(kind)
        elif kind in (_PART, _END):
            yield from self._continued(kind)
        elif kind in _ENDINGS:
            raise self._damaged(f"{_ENDINGS[kind]} comes before the end of RAM")
        else:
            raise self._damaged(f"a record of type {kind:#04x}, which cannot come here")

    def _configuration(self) -> Steps[None]:
        length = yield from self._pieces.number(4)
        if length > _MOST_NAME_BYTES:
            raise self._damaged(f"a machine type whose name has {length:,} bytes")
        name = yield from self._pieces.take(length)
        self.machine = _decoded(name)

    def _name(self) -> Steps[str]:
        length = yield from self._pieces.number(1)
        name = yield from self._pieces.take(length)
        return _decoded(name)

    def _subsection(self) -> Steps[None]:
        name = yield from self._name()
        version = yield from self._pieces.number(4)
        if version != 1:
            raise self._unknown(f"version {version} of {quoted(name)}")
        if name == "configuration/target-page-bits":
            yield from self._target_page_bits()
        elif name == "configuration/capabilities":
            yield from self._capabilities()
        elif name == "configuration/uuid":
            yield from self._pieces.skip(16)
        else:
            raise self._unknown(quoted(name))

    def _target_page_bits(self) -> Steps[None]:
        bits = yield from self._pieces.number(4)
        if bits not in _PAGE_BITS:
            raise self._damaged(f"pages of 2^{bits} bytes")
        self._page_bits, self.page_bytes = bits, 1 << bits

    def _capabilities(self) -> Steps[None]:
        count = yield from self._pieces.number(4)
        if count > _MOST_CAPABILITIES:
            raise self._damaged(f"a list of {count:,} capabilities")
        names = set()
        for _ in range(count):
            name = yield from self._name()
            names.add(name)
        self.capabilities = frozenset(names)
        refused = sorted(names - refusing.HARMLESS)
        if refused:
            raise refusing.capability(self._begin, refused[0])

    def _command(self) -> Steps[None]:
        number = yield from self._pieces.number(2)
        length = yield from self._pieces.number(2)
        if number not in (_OPEN_RETURN_PATH, _PING, _SWITCHOVER_START):
            raise refusing.command(self._begin, number, length)
        if length != (4 if number == _PING else 0):
            raise self._damaged(f"command {number} with {length:,} bytes of data")
        yield from self._pieces.skip(length)
        self.return_path |= number == _OPEN_RETURN_PATH
        self.switchover_seen |= number == _SWITCHOVER_START

    # --- sections ---------------------------------------------------------------------

    def _start(self, kind: int) -> Steps[None]:
        section_id = yield from self._pieces.number(4)
        name = yield from self._name()
        if kind == _FULL:
            raise refusing.early_device(self._begin, name)
        if name != "ram":
            raise refusing.section(self._begin, name)
        yield from self._pieces.skip(4)
        version = yield from self._pieces.number(4)
        if self._ram_id is not None:
            raise self._damaged("RAM starts a second time")
        if version != _RAM_VERSION:
            raise self._unknown(f"version {version} of RAM's section")
        self._ram_id = section_id
        yield from self._section(section_id)

    def _continued(self, kind: int) -> Steps[None]:
        section_id = yield from self._pieces.number(4)
        if section_id != self._ram_id:
            raise self._damaged(f"section {section_id} goes on, and has not started")
        if not self._listed:
            raise self._damaged("RAM goes on without a list of its blocks")
        self.in_ram_end = kind == _END
        self.n_parts += kind == _PART
        yield from self._section(section_id)
        self.done = kind == _END

    def _section(self, section_id: int) -> Steps[None]:
        yield from self._ram()
        self._begin = self._pieces.position
        mark = yield from self._pieces.number(1)
        if mark in (_START, _PART, _END, _FULL, _COMMAND):
            raise refusing.no_footer(self._begin)
        if mark != _FOOTER:
            raise self._damaged(f"{mark:#04x} in place of a section's footer")
        found = yield from self._pieces.number(4)
        if found != section_id:
            raise self._damaged(f"the footer of section {found} ends section {section_id}")

    # --- RAM --------------------------------------------------------------------------

    def _ram(self) -> Steps[None]:
        while True:
            if self._block is not None and not self._is_kept(self._block):
                yield from self._many_pages(self._block)
            self._begin = self._pieces.position
            word = yield from self._pieces.number(8)
            flags = word & (self.page_bytes - 1)
            if word == _END_OF_DATA:
                return
            if flags == _LIST:
                yield from self._block_list(word - flags)
            elif flags & ~_SAME_BLOCK in (_PAGE, _ZERO, _XBZRLE):
                yield from self._page(word - flags, flags)
            else:
                raise refusing.ram_flags(self._begin, word, flags)

    def _many_pages(self, block: int) -> Steps[None]:
        """Pass over the pages of one block in this piece; `_page` looks at what stopped this."""
        at = self._pieces.at
        end, n_pages, n_zero_pages, n_xbzrle_pages = ram_records(
            self._pieces.piece, at, self.marks[block], self._page_bits
        )
        self.n_pages += n_pages
        self.n_zero_pages += n_zero_pages
        self.n_xbzrle_pages += n_xbzrle_pages
        yield from self._pieces.skip(end - at)

    def _page(self, offset: int, flags: int) -> Steps[None]:
        if not flags & _SAME_BLOCK:
            name = yield from self._name()
            if name not in self._numbers:
                raise self._damaged(f"a page of {quoted(name)}, which is not in the list")
            self._block = self._numbers[name]
        if self._block is None:
            raise self._damaged("a page of the block of the page before, and there was none")
        block = self.blocks[self._block]
        if offset >= block.size_bytes:
            place = f"a page at {offset:#x} of {quoted(block.name)}"
            raise self._damaged(f"{place}, which has {block.size_bytes:#x} bytes")
        self.marks[self._block][offset >> self._page_bits] = 1
        keep = self._keep if self._is_kept(self._block) else None
        yield from self._contents(flags & ~_SAME_BLOCK, offset, keep)

    def _is_kept(self, block: int) -> bool:
        return self.blocks[block].name == self._kept

    def _contents(self, form: int, offset: int, keep: Keep | None) -> Steps[None]:
        if form == _PAGE:
            self.n_pages += 1
            if keep is None:
                yield from self._pieces.skip(self.page_bytes)
            else:
                page = yield from self._pieces.take(self.page_bytes)
                keep(offset, page)
        elif form == _ZERO:
            fill = yield from self._pieces.number(1)
            if fill:
                raise self._damaged(f"a page filled with {fill:#04x}, not with zeros")
            self.n_zero_pages += 1
            if keep is not None:
                keep(offset, bytes(self.page_bytes))
        else:
            if keep is not None:
                raise refusing.capability(self._begin, "xbzrle")
            encoding = yield from self._pieces.number(1)
            length = yield from self._pieces.number(2)
            if encoding != _XBZRLE_ENCODING or length > self.page_bytes:
                raise self._damaged(f"a page of {length:,} bytes in encoding {encoding}")
            self.n_xbzrle_pages += 1
            yield from self._pieces.skip(length)

    def _block_list(self, total_bytes: int) -> Steps[None]:
        if self._listed:
            # QEMU plugs in no memory while it migrates, and cancels if a block changes its size.
            raise self._damaged("a second list of blocks")
        if total_bytes > self._most_memory_bytes:
            most = f"mtetool accepts {self._most_memory_bytes:,}"
            what = f"the guest has {total_bytes:,} bytes of memory, and {most}"
            raise unsupported(self._begin, what, "move a smaller guest")
        blocks: list[Block] = []
        left = total_bytes
        while left:
            block = yield from self._listed_block(left)
            blocks.append(block)
            left -= block.size_bytes
        self._allocate(blocks)

    def _listed_block(self, left: int) -> Steps[Block]:
        name = yield from self._name()
        size_bytes = yield from self._pieces.number(8)
        if name in self._numbers:
            raise self._damaged(f"two blocks are called {quoted(name)}")
        if size_bytes % self.page_bytes or size_bytes > left:
            raise self._damaged(f"{quoted(name)} has {size_bytes:#x} bytes of {left:#x}")
        if len(self._numbers) == _MOST_BLOCKS:
            raise self._damaged(f"more than {_MOST_BLOCKS} blocks of memory")
        self._numbers[name] = len(self._numbers)
        return Block(name, size_bytes)

    def _allocate(self, blocks: list[Block]) -> None:
        # numpy's zeros take up no memory until they are written to.
        try:
            sizes = [block.size_bytes >> self._page_bits for block in blocks]
            self.marks = [np.zeros(size, dtype=np.uint8) for size in sizes]
        except MemoryError as error:
            n_pages = counted(sum(sizes), "page")
            what = f"no memory for the marks of the guest's {n_pages}"
            raise NoMemoryError(what, hint="free some memory on this host") from error
        self.blocks, self._listed = tuple(blocks), True

    # --- errors -----------------------------------------------------------------------

    def _damaged(self, what: str) -> MtetoolError:
        return damaged(self._begin, what)

    def _unknown(self, what: str) -> MtetoolError:
        hint = "update mtetool, or use an older QEMU at the source"
        return unsupported(self._begin, f"it has {what}, which this mtetool does not know", hint)


def _decoded(name: bytes) -> str:
    # Different bytes stay different names.
    return name.decode("utf-8", "surrogateescape")
