"""The modules that a machine loads, and their order, found in a kernel package."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from tests.lab.modules import Modules


@pytest.fixture
def modules(tmp_path: Path) -> Modules:
    """A kernel whose disk drivers are modules, as Debian packages it."""
    (tmp_path / "modules.builtin").write_text("kernel/drivers/virtio/virtio-pci.ko\n")
    (tmp_path / "modules.builtin.modinfo").write_bytes(b"crc32.alias=crypto-crc32\0x.parm=y\0")
    for name, about in {
        "ext4": b"softdep=pre: crypto-crc32c crypto-crc32 post: nothing\0depends=jbd2,crc-16\0",
        "jbd2": b"softdep=pre: crypto-crc32c\0depends=\0",
        "crc-16": b"depends=virtio_pci\0",
        "crc32c_generic": b"alias=crc32c\0alias=crypto-crc32c\0depends=\0",
        "other": b"alias=crypto-crc32c-other\0depends=ext4\0",
    }.items():
        path = tmp_path / f"kernel/{name}.ko.xz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(lzma.compress(b"\x7fELF\0" + about))
    return Modules(tmp_path)


def test_each_is_behind_what_it_needs_and_none_that_is_built_in(modules: Modules) -> None:
    ordered = modules.in_order("virtio_pci", "ext4", "jbd2")
    assert ordered == ["crc32c_generic", "jbd2", "crc_16", "ext4"]
    assert modules.content("jbd2").startswith(b"\x7fELF")


def test_one_that_the_kernel_does_not_have(modules: Modules) -> None:
    with pytest.raises(KeyError, match="virtio_blk"):
        modules.in_order("virtio_blk")
