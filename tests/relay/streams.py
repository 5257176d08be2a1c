"""Migration streams as QEMU writes them, and with every mistake that a test wants."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PAGE = 4096
ZERO, LIST, FULL, EOS, SAME, XBZRLE = 0x02, 0x04, 0x08, 0x10, 0x20, 0x40
RAM = "mach-virt.ram"
HEADER = b"QEVM" + (3).to_bytes(4, "big")
END_OF_DATA = EOS.to_bytes(8, "big")
RAM_ID = 2


def number(value: int, n: int) -> bytes:
    return value.to_bytes(n, "big")


def name(text: str) -> bytes:
    encoded = text.encode()
    return number(len(encoded), 1) + encoded


def configuration(*subsections: bytes, machine: str = "virt-10.0") -> bytes:
    return b"\x07" + number(len(machine), 4) + machine.encode() + b"".join(subsections)


def subsection(kind: str, body: bytes, version: int = 1) -> bytes:
    return b"\x05" + name(f"configuration/{kind}") + number(version, 4) + body


def page_bits(bits: int = 12) -> bytes:
    return subsection("target-page-bits", number(bits, 4))


def capabilities(*names: str) -> bytes:
    return subsection("capabilities", number(len(names), 4) + b"".join(map(name, names)))


def command(which: int, data: bytes = b"") -> bytes:
    return b"\x08" + number(which, 2) + number(len(data), 2) + data


def start(data: bytes, kind: int = 1, of: str = "ram", version: int = 4) -> bytes:
    head = number(kind, 1) + number(RAM_ID, 4) + name(of) + number(0, 4) + number(version, 4)
    return head + data + footer()


def part(data: bytes = END_OF_DATA, kind: int = 2, section_id: int = RAM_ID) -> bytes:
    return number(kind, 1) + number(section_id, 4) + data + footer()


def end(data: bytes = END_OF_DATA) -> bytes:
    return part(data, 3)


def footer(section_id: int = RAM_ID) -> bytes:
    return b"\x7e" + number(section_id, 4)


def block_list(blocks: Iterable[tuple[str, int]], total: int | None = None) -> bytes:
    blocks = list(blocks)
    total = sum(size for _, size in blocks) if total is None else total
    words = b"".join(name(block) + number(size, 8) for block, size in blocks)
    return number(total | LIST, 8) + words


@dataclass(frozen=True)
class Record:
    """A page of a block, in one of the forms; the contents look like heads of records."""

    block: str
    page: int
    form: int = FULL
    length: int = 0

    def write(self, last: str | None, page_bytes: int = PAGE) -> bytes:
        same = self.block == last
        head = number(self.page * page_bytes | self.form | (SAME if same else 0), 8)
        where = b"" if same else name(self.block)
        if self.form == ZERO:
            return head + where + b"\0"
        filler = number(self.page * page_bytes | SAME | FULL, 8) * (page_bytes // 8)
        if self.form == FULL:
            return head + where + filler
        return head + where + b"\1" + number(self.length, 2) + filler[: self.length]


def records(rounds: Sequence[Sequence[Record]], page_bytes: int = PAGE) -> list[bytes]:
    """Write the data of one section for each round."""
    last = None
    sections = []
    for these in rounds:
        data = b""
        for record in these:
            data += record.write(last, page_bytes)
            last = record.block
        sections.append(data + END_OF_DATA)
    return sections


def stream(
    blocks: Sequence[tuple[str, int]],
    rounds: Sequence[Sequence[Record]],
    *,
    return_path: bool = True,
    switchover: bool = True,
    bits: int | None = 12,
) -> bytes:
    """A whole stream up to the end of RAM; the last round is that of the stopped guest."""
    *running, stopped = records(rounds, 1 << (bits or 12))
    out = HEADER + configuration(*([] if bits is None else [page_bits(bits)]))
    out += (command(1) + command(2, number(1, 4))) if return_path else b""
    out += start(block_list(blocks) + END_OF_DATA)
    out += b"".join(map(part, running))
    out += command(11) if switchover else b""
    return out + end(stopped)


def random_stream(rng: random.Random) -> bytes:
    """A sound stream of a small guest."""
    blocks = [(RAM, 16 * PAGE), ("virt.flash0", 4 * PAGE), ("/rom@etc/table-loader", PAGE)]
    rounds: list[list[Record]] = []
    for _ in range(rng.randint(1, 4)):
        rounds.append([])
        for _ in range(rng.randint(0, 12)):
            block, size = rng.choice(blocks)
            page, form = rng.randrange(size // PAGE), rng.choice((FULL, ZERO, XBZRLE))
            rounds[-1].append(Record(block, page, form, rng.choice((0, 1, 20, PAGE))))
    return stream(blocks, rounds, return_path=rng.random() < 0.5, switchover=rng.random() < 0.5)


def changed(data: bytes, rng: random.Random) -> bytes:
    """Change a stream in up to four places, most of them in heads of records."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(out), rng.choice((400, 1 << 20))))
        some = (b"\xff", b"\0", b"\x10", bytes(8), bytes([rng.randrange(256)]), rng.randbytes(3))
        out[at : at + rng.choice((0, 1, 1, 8))] = rng.choice(some)
    return bytes(out)
