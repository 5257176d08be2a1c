"""The host's own programs that the lab calls, and the packages they come from."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.lab.errors import LabError, MissingToolError

PACKAGES = {
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
    "apt-cache": "apt",
    "apt-config": "apt",
    "apt-get": "apt",
    "dpkg": "dpkg",
    "dpkg-deb": "dpkg",
    "mke2fs": "e2fsprogs",
}


def find(tool: str) -> str:
    """The path of one of PACKAGES' programs; MissingToolError names the package otherwise."""
    # An ordinary user's PATH on Debian has no /sbin, where mke2fs lives.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    found = shutil.which(tool, path=path)
    if found is None:
        raise MissingToolError(tool, PACKAGES[tool])
    return found


def call(
    argv: Sequence[str | Path], *, cwd: Path | None = None, env: dict[str, str] | None = None
) -> str:
    """Run a program of PACKAGES, return its stdout; LabError with the end of its stderr."""
    done = subprocess.run(
        [find(str(argv[0])), *map(str, argv[1:])],
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        tail = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-8:])
        raise LabError(f"{argv[0]} failed with status {done.returncode}: {tail}")
    return done.stdout
