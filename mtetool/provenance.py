"""Where this mtetool comes from, in the line of `mtetool --version -v`."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

from mtetool import loops

LIBRARIES = ("click", "msgpack", "numpy", "rich", "xxhash", "zstandard")
_HERE = Path(__file__).parent


def line() -> str:
    """Return how mtetool was installed, where, which loops it has, and on what it runs."""
    in_c = "C loops" if loops.scan.__module__.endswith("_loops") else "numpy loops"
    libraries = (f"{name} {_version(name)}" for name in LIBRARIES)
    python = f"Python {platform.python_version()}"
    return ", ".join([f"{_kind()} in {_HERE}", in_c, python, *libraries])


def _version(name: str) -> str:
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"
    # What setuptools writes where nobody says it, as for xxhash in Debian 13.
    return "of unknown version" if found == "0.0.0" else found


def _kind() -> str:
    """Return `deb`, `wheel` (built for others), `built` (by pip, on this host) or `source`."""
    try:
        found = metadata.distribution("mtetool")
    except metadata.PackageNotFoundError:
        return "source"
    if Path(str(found.locate_file("mtetool"))).resolve() != _HERE.resolve():
        return "source"  # a checkout, perhaps beside an mtetool that is installed
    if (found.read_text("INSTALLER") or "").strip() == "debian":  # dh_python3's word
        return "deb"
    made = found.read_text("WHEEL")
    if made is None:
        return "source"
    return "wheel" if "manylinux" in made else "built"
