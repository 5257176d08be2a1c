"""Make a disk image from a directory, without root."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.lab.packages import need_tools

_MKE2FS = ["mke2fs", "-q", "-t", "ext4", "-E", "root_owner=0:0", "-O", "^has_journal", "-d"]


def make_ext4(tree: Path, image: Path, *, spare_bytes: int) -> Path:
    """Make an ext4 image with the content of `tree` and some room; return its path."""
    need_tools("mke2fs")
    used = sum(path.lstat().st_size + 4096 for path in tree.rglob("*"))
    with image.open("wb") as file:
        file.truncate((used * 9 // 8 + spare_bytes) & ~0xFFFFF)
    subprocess.run([*_MKE2FS, tree, image], check=True, stdout=subprocess.DEVNULL)
    return image
