"""The files that an administrator installs for the service: printed, not installed, by us."""

from __future__ import annotations

import shlex
import shutil
import sys
from importlib import resources
from pathlib import Path

_SHEBANG = "#!/usr/bin/python3 -IS\n"
_UNITS = {"socket": "mtetool-companion.socket", "service": "mtetool-companion.service"}
NAMES = ("wrapper", *_UNITS, "apparmor")
"""What `text_of` knows."""


def text_of(name: str, command: str | None = None) -> str:
    """Return the content of one of NAMES; a unit starts `command`, or else this mtetool.

    Raises OSError.
    """
    package = resources.files("mtetool.companion")
    if name == "wrapper":
        return _SHEBANG + (package / "client.py").read_text()
    text = (package / "installed" / _UNITS.get(name, name)).read_text()
    return text.replace("@MTETOOL@", command or _command())


def _command() -> str:
    """The command line that starts this mtetool, as ExecStart= wants it."""
    called = shutil.which(sys.argv[0])
    if called is None or Path(called).name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m mtetool"
    return shlex.quote(str(Path(called).resolve().absolute()))
