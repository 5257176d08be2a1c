"""What MTE breaks of a QEMU's command line: memory that KVM refuses in a VM with MTE.

KVM refuses a memslot if any mapping in it cannot carry tags (arch/arm64/kvm/mmu.c,
kvm_arch_prepare_memory_region): it must be anonymous or of shmem (a memfd, tmpfs), or, on newer
kernels, of huge pages. QEMU takes the refusal for a bug of its own and aborts (accel/kvm/kvm-all.c,
kvm_set_phys_mem), at the start and whenever memory or a device is added later.

Nothing here raises, whatever the words are. `Host` answers what depends on the host.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import Literal, Protocol

from mtetool.vmm.qemu_options import Group, ReadConfig, groups, is_on

Memory = Literal["device", "file", "huge", "shmem"]
"""What a VMM can map: memory of a device, a file that is neither of the next two, a file of huge
pages, a file of shmem. Anonymous memory can always carry tags."""

_NAMES: dict[Memory, str] = {
    "device": "device memory",
    "file": "memory of a file outside tmpfs",
    "huge": "huge pages",
    "shmem": "shared memory",
}
_AS_MEMORY = "as soon as the guest gets this memory"
_AS_DEVICE = "when the guest enables this device"
_IF_MAPPED = "if this device maps such memory into the guest"

_QEMU = re.compile(r"qemu-(?:system-|kvm)")
# So Debian and Proxmox call it. Among the later words it would mean anything.
_KVM = "kvm"
_VHOST = ("vhost-user", "vhost-vdpa")
# Looking at a path can be slow: each may be on a file system of its own.
_PATHS_MAX = 32


@dataclass(frozen=True, slots=True)
class Limit:
    """A part of a command line that may break: `what` are its words, `why` is one sentence."""

    what: str
    why: str


class Host(Protocol):
    """Answers about this host; None is for what is unknown, and nothing raises."""

    def accepts(self, memory: Memory) -> bool | None:
        """Return whether KVM accepts that memory, mapped shared, in a VM with MTE."""

    def memory_at(self, path: str) -> Memory | None:
        """Return what memory the file at that path is, or the file that QEMU will create there."""


def qemu(words: Sequence[str]) -> Sequence[str]:
    """Return the words from the QEMU on that a command line starts, itself or by wrappers."""
    if words and PurePath(words[0]).name == _KVM:
        return words
    found = (at for at, word in enumerate(words) if _QEMU.search(PurePath(word).name))
    return words[next(found, len(words)) :]


def limits(words: Sequence[str], read_config: ReadConfig, host: Host) -> list[Limit]:
    """Return what MTE may break, in the order of the command line; nothing if it has no QEMU."""
    command = list(groups(qemu(words), read_config))
    vhost = {
        group.fields.get("id", "")
        for group in command
        if group.name == "netdev" and group.fields.get("type") in _VHOST
    }
    looks = _Looks(host)
    found = (limit for group in command if (limit := _limit(group, vhost, looks)) is not None)
    return list(found)


class _Looks:
    """The host, asked everything once, and about a bounded number of paths."""

    def __init__(self, host: Host) -> None:
        self.accepts = cache(host.accepts)
        self._host = host
        self._known: dict[str, Memory | None] = {}

    def memory_at(self, path: str) -> Memory | None:
        if path not in self._known and len(self._known) < _PATHS_MAX:
            self._known[path] = self._host.memory_at(path)
        return self._known.get(path)


@dataclass(frozen=True, slots=True)
class _Use:
    """Memory that a group of options maps, and when; `sure` says that it does so."""

    memory: Memory
    when: str
    sure: bool = True


def _limit(group: Group, vhost: set[str], looks: _Looks) -> Limit | None:
    use = _use(group, vhost, looks)
    if use is None or (accepted := looks.accepts(use.memory)):
        return None
    sure = use.sure and accepted is False
    verb, then = ("refuses", "will") if sure else ("may refuse", "would")
    return Limit(
        " ".join(group.words),
        f"KVM {verb} {_NAMES[use.memory]} in a VM with MTE, and QEMU {then} abort {use.when}",
    )


def _use(group: Group, vhost: set[str], looks: _Looks) -> _Use | None:
    fields = group.fields
    if group.name == "mem-path":
        return _file(fields.get("path", ""), looks, shared=False)
    if group.name == "object":
        return _backend(fields.get("qom-type", ""), fields, looks)
    if group.name == "device":
        return _device(fields.get("driver", ""), fields, vhost)
    return None


def _file(path: str, looks: _Looks, *, shared: bool) -> _Use | None:
    memory = looks.memory_at(path)
    if memory == "shmem" and not shared:
        return None
    return _Use(memory or "file", _AS_MEMORY, sure=memory is not None)


def _backend(kind: str, fields: dict[str, str], looks: _Looks) -> _Use | None:
    """The memory of an object that guest memory, NVDIMMs and other devices refer to."""
    if kind == "memory-backend-file":
        return _file(fields.get("mem-path", ""), looks, shared=is_on(fields, "share"))
    if kind == "memory-backend-memfd" and is_on(fields, "hugetlb"):
        return _Use("huge", _AS_MEMORY)
    shared = {"memory-backend-memfd": "on", "memory-backend-shm": "on", "memory-backend-ram": "off"}
    if kind in shared and is_on(fields, "share", default=shared[kind]):
        return _Use("shmem", _AS_MEMORY)
    return None


def _device(driver: str, fields: dict[str, str], vhost: set[str]) -> _Use | None:
    if driver.startswith("vfio-"):
        # Without mappings, QEMU makes every access of the guest itself.
        return None if is_on(fields, "x-no-mmap") else _Use("device", _AS_DEVICE)
    if driver.startswith(("virtio-gpu", "virtio-vga")) and _has_size(fields, "hostmem"):
        return _Use("device", _IF_MAPPED, sure=False)
    if driver.startswith("vhost-user-fs") and _has_size(fields, "cache-size"):
        return _Use("file", _IF_MAPPED, sure=False)
    if driver == "ivshmem-doorbell":
        return _Use("file", _IF_MAPPED, sure=False)  # its server says what memory
    if is_on(fields, "page-per-vq") and (
        driver.startswith(_VHOST) or fields.get("netdev", "") in vhost
    ):
        return _Use("device", _IF_MAPPED, sure=False)  # pages to notify the queues by
    return None


def _has_size(fields: dict[str, str], key: str) -> bool:
    return fields.get(key, "").strip("0") != ""
