"""The parts of a QEMU command line that name the monitors' sockets and the guest.

The rules are those of QEMU's own parsers (lookup_opt and monitor_parse in system/vl.c,
util/qemu-option.c, util/qemu-config.c, chardev/char-socket.c). Nothing here raises, whatever the
words are: anything not understood is skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

ReadConfig = Callable[[str], str]
"""The text of a `-readconfig` file, by its path as QEMU sees it; empty if there is none."""

# Options that take no value (qemu-options.hx of QEMU 11 and of older ones). The word after any
# other option is its value, even if it begins with a dash.
_FLAG_NAMES = (
    "S alt-grab async-teardown ctrl-grab curses daemonize enable-fips enable-kvm"
    " enable-sync-profile full-screen h help jitdump mem-prealloc no-acpi no-fd-bootchk no-frame"
    " no-hpet no-kvm no-kvm-irqchip no-kvm-pit no-kvm-pit-reinjection no-quit no-reboot"
    " no-shutdown no-user-config nodefaults nodefconfig nographic nouserconfig old-param"
    " only-migratable perfmap portrait preconfig rtc-td-hack s sdl semihosting singlestep snapshot"
    " tdf usb version win2k-hack xen-attach xen-domid-restrict"
)
_FLAGS = frozenset(_FLAG_NAMES.split())
# The key of a first value that has none: "-mon NAME,mode=control".
_IMPLIED = {"chardev": "backend", "mon": "chardev", "name": "guest", "object": "qom-type"}

_KEY = re.compile(r"[^=,]*+")
_VALUE = re.compile(r"(?:[^,]++|,,)*+")
_SECTION = re.compile(r'\s*\[\s*([^\s"\]]+)(?:\s+"([^"]*)")?\s*\]\s*')
_ENTRY = re.compile(r'\s*([^\s=]+)\s*=\s*"([^"]*)"\s*')


@dataclass(frozen=True, slots=True)
class SocketAddress:
    """A unix socket that a QEMU listens on; `path` is as QEMU resolves it.

    An `abstract` one is not a file but a name in QEMU's network namespace; `padded` with NULs to
    the full length of an address if `tight=off` asks for that.
    """

    path: str
    abstract: bool = False
    padded: bool = False

    def __str__(self) -> str:
        return f"@{self.path}" if self.abstract else self.path


@dataclass(frozen=True, slots=True)
class NamedDomain:
    """A domain of libvirt, as the command line of its QEMU names it."""

    name: str
    uuid: str


def monitors(words: Iterable[str], read_config: ReadConfig) -> list[SocketAddress]:
    """The QMP monitors that listen on a unix socket, in the order of the command line.

    `words` begins with the program.
    """
    chardevs: dict[str, dict[str, str]] = {}
    wanted: list[dict[str, str] | str] = []
    for group, fields in _groups(words, read_config):
        if group == "chardev":
            chardevs.setdefault(fields.get("id", ""), fields)
        elif group == "set":
            chardevs.get(fields["id"], {})[fields["key"]] = fields["value"]
        elif group == "qmp":
            wanted.append(fields.get("chardev") or fields)
        elif _is_control(group, fields) and (name := fields.get("chardev")):
            wanted.append(name)
    sockets = [chardevs.get(item, {}) if isinstance(item, str) else item for item in wanted]
    addresses = (_address(fields) for fields in sockets)
    return [address for address in addresses if address is not None]


def guest_name(words: Iterable[str], read_config: ReadConfig) -> str | None:
    """The guest's name, `-name NAME` or `-name guest=NAME`; None if it has none."""
    name = None
    for group, fields in _groups(words, read_config):
        if group == "name":
            name = fields.get("guest") or name
    return name


def domain(words: Iterable[str]) -> NamedDomain | None:
    """The domain that a QEMU started by libvirt runs; None for any other command line."""
    name = uuid = None
    for option, value in options(list(words)[1:]):
        if option == "name":
            name = parsed(value, "").get("guest")
        elif option == "uuid":
            uuid = value.lower()
    return NamedDomain(name, uuid) if name and uuid else None


def options(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The options and their values ("" for a flag) of a command line without its program."""
    remaining = iter(words)
    for word in remaining:
        if not word.startswith("-"):
            continue  # a disk image
        option = word.removeprefix("-").removeprefix("-")
        yield option, "" if option in _FLAGS else next(remaining, "")


def parsed(text: str, implied: str) -> dict[str, str]:
    """The fields of `key=value,flag,…`; a doubled comma is a comma in the value.

    A first value without a key belongs to `implied`. A later one is a flag, which is on, or off if
    it begins with "no". Of equal keys the last counts.
    """
    fields: dict[str, str] = {}
    at = 0
    while at < len(text):
        key, end = _match(_KEY, text, at)
        if text[end : end + 1] == "=":
            value, at = _match(_VALUE, text, end + 1)
        elif at == 0:
            key = implied
            value, at = _match(_VALUE, text, at)
        else:
            negated = key.startswith("no")
            key, value, at = (key[2:], "off", end) if negated else (key, "on", end)
        fields[key] = value.replace(",,", ",")
        at += 1  # the comma
    return fields


def sections(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The sections of a `-readconfig` file: `[group "id"]`, and lines of `key = "value"`."""
    group, fields = "", dict[str, str]()
    for line in text.split("\n"):
        if section := _SECTION.fullmatch(line):
            yield group, fields
            group, fields = section[1], {"id": section[2]} if section[2] else {}
        elif entry := _ENTRY.fullmatch(line):
            fields[entry[1]] = entry[2]
    yield group, fields


def _groups(words: Iterable[str], read_config: ReadConfig) -> Iterator[tuple[str, dict[str, str]]]:
    for option, value in options(list(words)[1:]):
        if option in ("qmp", "qmp-pretty"):
            yield "qmp", _backend(value)
        elif option == "object" and value.startswith("{"):
            yield option, _json_fields(value)
        elif option in _IMPLIED:
            yield option, parsed(value, _IMPLIED[option])
        elif option == "set" and value.startswith("chardev."):
            name, _, assignment = value.removeprefix("chardev.").partition(".")
            key, _, after = assignment.partition("=")
            yield option, {"id": name, "key": key, "value": after}
        elif option == "readconfig":
            yield from sections(read_config(value))


def _backend(value: str) -> dict[str, str]:
    """A device as `-qmp` takes it: `unix:PATH,…`, `chardev:ID`; others have no unix socket."""
    kind, _, rest = value.partition(":")
    if kind == "unix":
        return {"backend": "socket", **parsed(rest, "path")}
    return {"chardev": rest} if kind == "chardev" else {}


def _json_fields(text: str) -> dict[str, str]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _is_control(group: str, fields: dict[str, str]) -> bool:
    if group == "mon":
        return fields.get("mode") == "control"
    return group == "object" and fields.get("qom-type") == "monitor-qmp"


def _address(fields: dict[str, str]) -> SocketAddress | None:
    """Where others can connect to a chardev; None if they cannot.

    A socket that QEMU was given as a descriptor (`fd`) has no name here, and without `server` it is
    QEMU that connects.
    """
    path = fields.get("path")
    if fields.get("backend") != "socket" or not path or "fd" in fields:
        return None
    if not _is_on(fields, "server") or _is_on(fields, "websocket") or _is_on(fields, "telnet"):
        return None
    abstract = _is_on(fields, "abstract")
    return SocketAddress(path, abstract, abstract and not _is_on(fields, "tight", default="on"))


def _is_on(fields: dict[str, str], key: str, default: str = "off") -> bool:
    return fields.get(key, default) in ("on", "yes", "true", "y")


def _match(pattern: re.Pattern[str], text: str, at: int) -> tuple[str, int]:
    found = pattern.match(text, at)
    assert found is not None  # both patterns also match the empty string
    return found[0], found.end()
