"""The files that an administrator installs for the service: printed, not installed, by us."""

from __future__ import annotations

from importlib import resources

from mtetool.files.installed import installed

_SHEBANG = "#!/usr/bin/python3 -IS\n"
_UNITS = {"socket": "mtetool-companion.socket", "service": "mtetool-companion.service"}
NAMES = ("wrapper", *_UNITS, "apparmor")
"""What `text_of` knows."""


def text_of(name: str, command: str | None = None) -> str:
    """Return the content of one of NAMES; a unit starts `command`, or else this mtetool.

    Raises OSError.
    """
    if name == "wrapper":
        return _SHEBANG + (resources.files("mtetool.companion") / "client.py").read_text()
    return installed("mtetool.companion", _UNITS.get(name, name), command)
