"""The statements of the kernel's documentation about memory tags and KVM.

The texts are those of Linux 6.12 and 7.3; they differ where `only` says so. `test` names the
test of each statement. Tests of `tests/differential` run on the emulator and on each real kernel
of the lab.
"""

from __future__ import annotations

from dataclasses import dataclass

COPY = "virt/kvm/api.rst, 4.130 KVM_ARM_MTE_COPY_TAGS"
CAPABILITY = "virt/kvm/api.rst, 7.28 KVM_CAP_ARM_MTE"
PTRACE = "arch/arm64/memory-tagging-extension.rst, The ptrace() interface"
_HERE = "differential/test_documentation.py::test_"
_LAB = "lab/"


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement: its id, its section, a paraphrase, and the test that proves it.

    `only` is set if only that kernel's text has it; `test` is a file and a name under tests/.
    """

    id: str
    section: str
    text: str
    test: str
    only: str = ""


def _stated(section: str, *rows: tuple[str, str, str], only: str = "") -> tuple[Statement, ...]:
    """Return statements of a section: id, text, and the test if it is not the one of that name."""
    return tuple(
        Statement(name, section, text, test or _HERE + name.replace("-", "_"), only)
        for name, text, test in rows
    )


STATEMENTS = (
    *_stated(
        COPY,
        ("copy-needs-the-capability", "The ioctl comes with KVM_CAP_ARM_MTE.", ""),
        ("copy-both-ways", "Tags are copied out of guest memory and into it.", ""),
        ("copy-ipa-aligned", "guest_ipa is a multiple of the page size.", ""),
        ("copy-length-aligned", "length is a multiple of the page size.", ""),
        ("copy-length-limit", "length is at most 2^31 minus a page.", ""),
        ("copy-buffer", "addr is the buffer that tags are copied to or from.", ""),
        ("copy-direction", "flags is the direction, one of two values.", ""),
        ("copy-buffer-size", "The buffer has length / 16 bytes, one per granule.", ""),
        ("copy-byte-is-a-tag", "Each byte holds one tag.", ""),
        ("copy-format-of-ptrace", "The format is that of ptrace's requests for tags.", ""),
        ("copy-einval", "Invalid arguments give EINVAL.", ""),
        ("copy-efault", "Memory that cannot be accessed gives EFAULT.", ""),
        ("copy-error-before-data", "An error before any data: a negative errno.", ""),
        ("copy-error-after-data", "An error after some data: the bytes that were copied.", ""),
        ("copy-complete", "All copied: length.", ""),
    ),
    *_stated(
        CAPABILITY,
        ("mte-capability", "The capability says that KVM and the CPU support it.", ""),
        ("mte-must-be-enabled", "Unless it is enabled, the guest has no tags.", ""),
        ("mte-before-vcpus", "It is enabled before the first vCPU is created.", ""),
        (
            "mte-aarch64-only",
            "A guest that runs in AArch32 has no MTE.",
            f"{_LAB}test_aarch32.py::test_32_bit_process_in_a_guest_with_mte",
        ),
        ("mte-refuses-aarch32-vcpus", "Once it is enabled, AArch32 vCPUs fail.", ""),
        (
            "mte-guest-has-the-tags",
            "The guest can access the tags of all memory that it was given.",
            f"{_LAB}test_kvm.py::test_tags_are_the_guests_own_and_the_vmm_is_as_before",
        ),
        ("mte-any-memory-has-tags", "All memory given to the guest has tags.", ""),
        ("mte-swap", "Tags are kept while the host swaps.", ""),
        ("mte-migration", "Saving and restoring tags in a migration is the VMM's task.", ""),
        ("mte-anonymous-memory", "Memslots can have anonymous memory.", ""),
        ("mte-memory-of-files-in-ram", "Memslots can have files in RAM (tmpfs, memfd).", ""),
        ("mte-other-memory", "A memslot with other memory gives EINVAL.", ""),
        ("mte-allows-the-copy", "Once it is enabled, the ioctl can copy tags.", ""),
    ),
    *_stated(
        CAPABILITY,
        ("guest-memfd-after-mte", "A slot with a guest_memfd gives EINVAL.", ""),
        ("guest-memfd-before-mte", "With such a slot, enabling it gives EINVAL.", ""),
        only="7.3",
    ),
    *_stated(
        PTRACE,
        ("ptrace-peek-and-poke", "Two requests read a process's tags and set them.", ""),
        ("ptrace-format", "The buffer has one four-bit tag per byte, one per granule.", ""),
        ("ptrace-unaligned", "An address in the middle of a granule means that granule.", ""),
        ("ptrace-count", "iov_len becomes the number of tags, fewer if memory ends.", ""),
        ("ptrace-eio", "EIO: the process has no memory there; iov_len stays.", ""),
        ("ptrace-efault", "EFAULT: the tracer has no memory at the buffer; iov_len stays.", ""),
    ),
    *_stated(
        PTRACE,
        ("ptrace-untagged", "EOPNOTSUPP: that memory was never mapped with PROT_MTE.", ""),
        only="6.12",
    ),
    *_stated(
        PTRACE,
        ("ptrace-untagged", "EIO: that memory was never mapped with PROT_MTE.", ""),
        only="7.3",
    ),
)

NOT_PROVED = {
    "hibernation": (
        CAPABILITY,
        "Tags are kept while the host hibernates: the lab's machines cannot hibernate.",
    ),
    "ptrace-eperm": (
        PTRACE,
        "EPERM: a process that cannot be traced. It takes a tracer that has lost its right to it"
        " in between; a process that was never attached to gives ESRCH.",
    ),
}
