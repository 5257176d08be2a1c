"""The files that an administrator installs: printed, not installed, by us."""

from __future__ import annotations

import shlex
import shutil
import sys
from importlib import resources
from pathlib import Path


def installed(package: str, name: str, command: str | None = None) -> str:
    """The text of a file in the directory `installed` of a package. Raises OSError.

    @MTETOOL@ in it is replaced by `command`, or else by the one that starts this mtetool.
    """
    text = (resources.files(package) / "installed" / name).read_text()
    return text.replace("@MTETOOL@", command or _command())


def _command() -> str:
    """The command line that starts this mtetool, as ExecStart= and a shell want it."""
    called = shutil.which(sys.argv[0])
    if called is None or Path(called).name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m mtetool"
    return shlex.quote(str(Path(called).resolve().absolute()))
