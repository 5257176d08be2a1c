"""Tags of a stopped thread's memory by PTRACE_PEEKMTETAGS and PTRACE_POKEMTETAGS.

(arch/arm64/kernel/mte.c, __access_remote_tags; Documentation/arch/arm64/
memory-tagging-extension.rst.) One request copies tags, one per byte, until something stops it, and
returns how many; it fails only if that is none. The error is EIO whatever was wrong at the address:
no mapping, one without PROT_MTE (EOPNOTSUPP was documented until commit fdb9ebc7fb77, and never
returned), or on a write a shared, read-only one.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from mtetool.attach.helper import PAGE_BYTES
from mtetool.attach.ptrace import PEEKMTETAGS, POKEMTETAGS, Tracee
from mtetool.tags import runs
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    from mtetool.tags import Tags

# One request copies 4 MiB of memory: meanwhile the kernel does not check for signals, and holds the
# process's mmap_lock, so every thread that maps memory waits.
_PART_GRANULES = 1 << 18
_PAGE_GRANULES = PAGE_BYTES // GRANULE_BYTES


def peek(tracee: Tracee, address: int, out: Tags) -> int:
    """Copy tags from `address` on into `out`; return how many granules, in whole pages.

    `address` and `out` are whole pages. Raises OSError (EIO) if not even one page was copied.
    """
    return _copy(tracee, PEEKMTETAGS, address, out)


def poke(tracee: Tracee, address: int, tags: Tags) -> int:
    """Give memory from `address` on these tags; otherwise like `peek`.

    Memory that has them already is not written to: an untouched page stays unallocated, and a
    copy-on-write page stays shared.
    """
    present = np.empty(min(tags.size, _PART_GRANULES), dtype=np.uint8)
    done = 0
    while done < tags.size:
        part = tags[done : done + _PART_GRANULES]
        try:
            count = _poke_part(tracee, address + done * GRANULE_BYTES, part, present[: part.size])
        except OSError as error:
            return _so_far(error, done)
        done += count
        if count < part.size:
            break
    return done


def _poke_part(tracee: Tracee, address: int, tags: Tags, present: Tags) -> int:
    found = _copy(tracee, PEEKMTETAGS, address, present)
    # The kernel drops the high bits of the tags it is given.
    changes = ((present[:found] ^ tags[:found]) & 0xF).reshape(-1, _PAGE_GRANULES)
    differs: Tags = np.zeros(len(changes), dtype=np.uint8)
    differs[changes.any(axis=1)] = 1
    starts, lengths, values = runs(differs)
    written = values == 1
    for start, length in zip(starts[written].tolist(), lengths[written].tolist(), strict=True):
        first, last = start * _PAGE_GRANULES, (start + length) * _PAGE_GRANULES
        try:
            done = _copy(tracee, POKEMTETAGS, address + first * GRANULE_BYTES, tags[first:last])
        except OSError as error:
            return _so_far(error, first)
        if done < last - first:
            return int(first + done)
    return found


def _copy(tracee: Tracee, request: int, address: int, tags: Tags) -> int:
    done = 0
    while done < tags.size:
        part = tags[done : done + _PART_GRANULES]
        at = address + done * GRANULE_BYTES
        try:
            count = tracee.copy_tags(request, at, part.ctypes.data, part.size)
        except OSError as error:
            return _so_far(error, done)
        done += count
        if count < part.size:
            break
    return done // _PAGE_GRANULES * _PAGE_GRANULES


def _so_far(error: OSError, done: int) -> int:
    """What was done before an address failed; the next request, from there, says why."""
    if done and error.errno == errno.EIO:
        return done
    raise error
