"""The user that a domain's QEMU runs as, in the XML by which libvirt describes a running domain.

Its parts come from whoever defined the domain. libvirt is asked for nothing but
/domain/seclabel[@model='dac']/label (docs/formatdomain.rst, "Security label").
"""

from __future__ import annotations

import pwd
import re
from xml.parsers import expat

_UID_END = 1 << 32
# "+64055:+64055", "libvirt-qemu:kvm": src/util/virutil.c, virParseOwnershipIds. Digits without a
# plus are a name if there is a user of that name.
_LABEL = re.compile(r"(?P<user>\+?[^\s:+]{1,64})(?::\+?[^\s:+]{1,64})?")


def user_id(xml: str) -> int | None:
    """The id of the user that QEMU runs as; None if the XML does not say. Raises ValueError."""
    labels = _labels(xml)
    if len(labels) > 1:
        raise ValueError("it names several users")
    return _uid(labels[0]) if labels else None


def _uid(label: str) -> int:
    match = _LABEL.fullmatch(label)
    if match is None:
        raise ValueError("its security label is not USER:GROUP")
    user = match["user"]
    if not user.startswith("+"):
        try:
            return pwd.getpwnam(user).pw_uid
        except KeyError:
            pass
    digits = user.removeprefix("+")
    if not (digits.isascii() and digits.isdecimal() and int(digits) < _UID_END):
        raise ValueError("its security label names a user whom this host does not know")
    return int(digits)


def _labels(xml: str) -> list[str]:
    """The labels of the domain itself; those of its disks are deeper in the tree."""
    found: list[list[str]] = []
    path: list[str] = []
    is_dac = False

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal is_dac
        path.append(tag)
        if path == ["domain", "seclabel"]:
            is_dac = attributes.get("model") == "dac"
        elif path == ["domain", "seclabel", "label"] and is_dac:
            found.append([])

    def text(piece: str) -> None:
        if path == ["domain", "seclabel", "label"] and is_dac:
            found[-1].append(piece)

    def end(tag: str) -> None:
        path.pop()

    def refuse(*_: object) -> None:
        raise ValueError("it has a DOCTYPE")  # libvirt writes none, and entities can be bombs

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.CharacterDataHandler = text
    parser.EndElementHandler = end
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(xml, True)
    except (expat.ExpatError, UnicodeError) as error:
        raise ValueError(f"it is not XML: {error}") from error
    return ["".join(pieces).strip() for pieces in found]
