"""The differences between hosts and kernels, by name.

Each behaviour can be probed on a running kernel; it is never inferred from the kernel's version.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Behaviour(enum.Enum):
    """A way in which some kernels answer and others do not; the value is its name."""

    HUGETLB_TAGS = "hugetlb-tags"
    """Memory of hugetlbfs can have tags (Linux 6.13 and later): memslots of a VM with MTE may use
    it, and one mark says that a whole huge page has tags. Without it, such a memslot is refused
    with EINVAL."""

    CLEAR_USER_EXACT = "clear-user-exact"
    """If the buffer ends in the middle of a page's tags, zeros for a page without tags fill it to
    its last byte (newer kernels clear with the FEAT_MOPS instructions, if the CPU has them; seen on
    7.3); without it, to the last whole word of eight bytes."""

    GUEST_MEMFD = "guest-memfd"
    """KVM_CREATE_GUEST_MEMFD makes memory that a memslot may use. It excludes MTE, whichever comes
    first: EINVAL for the other (commit 32e200bd6e44, Linux 6.18). Without it, there is no such
    ioctl, and the answer is EINVAL, too."""

    VCPU_EL2_FEATURES = "vcpu-el2-features"
    """KVM_ARM_VCPU_INIT knows the features for nested virtualization, and refuses them with EINVAL
    if the host has none; without it, they are unknown: ENOENT."""


@dataclass(frozen=True, slots=True)
class Host:
    """The emulated host: numbers of its hardware and build, and its behaviours.

    `ipa_bits` is the largest size of guest addresses, `va_bits` that of a process's own;
    `hugepage_bytes` the size of the pages of MAP_HUGETLB memory; `aarch32` whether vCPUs may
    start in AArch32.
    """

    page_size_bytes: int = 4096
    ipa_bits: int = 52
    va_bits: int = 52
    max_vcpus: int = 512
    hugepage_bytes: int = 64 << 10
    aarch32: bool = True
    behaviours: frozenset[Behaviour] = frozenset()

    def has(self, behaviour: Behaviour) -> bool:
        """Whether its kernel has this behaviour."""
        return behaviour in self.behaviours

    @property
    def page_granules(self) -> int:
        """The number of tags of one page."""
        return self.page_size_bytes // 16
