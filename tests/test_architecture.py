"""The rooms of the house, and which of them may import which; see ARCHITECTURE.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mtetool

_PACKAGE = Path(mtetool.__file__).parent

# From the ground up: a room may import the rooms that it names, all above it in this table.
# Modules at the top of the package are rooms of their own. Imports within functions count.
ROOMS: dict[str, set[str]] = {
    "mtetool": set(),
    "uapi": set(),
    "words": set(),
    "errors": set(),
    "_loops": set(),
    "buffers": set(),
    "tags": {"buffers"},
    "loops_numpy": {"buffers"},
    "loops": {"_loops", "loops_numpy"},
    "provenance": {"loops"},
    "procfs": set(),
    "spans": set(),
    "closing": set(),
    "permission": {"errors", "procfs"},
    "signals": {"errors"},
    "guest": {"buffers", "closing", "uapi"},
    "extents": {"uapi"},
    "streaming": {"guest"},
    "files": {"errors", "words"},
    "emulator": {"uapi"},
    "faults": {"buffers", "errors", "guest", "uapi"},
    "attach": {"errors", "permission", "procfs", "signals"},
    "vmm": {
        "closing",
        "errors",
        "guest",
        "loops",
        "permission",
        "procfs",
        "spans",
        "tags",
        "uapi",
        "words",
    },
    "snapshot": {
        "mtetool",
        "buffers",
        "errors",
        "files",
        "guest",
        "loops",
        "uapi",
        "words",
    },
    "backends.kvm": {
        "attach",
        "buffers",
        "closing",
        "errors",
        "extents",
        "guest",
        "loops",
        "procfs",
        "spans",
        "uapi",
        "vmm",
    },
    "backends.proc": {
        "attach",
        "buffers",
        "errors",
        "guest",
        "permission",
        "procfs",
        "tags",
        "uapi",
        "vmm",
    },
    "backends.emu": {
        "buffers",
        "emulator",
        "errors",
        "faults",
        "files",
        "guest",
        "loops",
        "spans",
        "tags",
        "uapi",
        "words",
    },
    "backends": {"errors", "files", "guest", "vmm", "words"},
    "companion": {"attach", "backends.kvm", "errors", "files", "permission", "procfs", "vmm"},
    "sources": {"backends", "buffers", "errors", "guest", "loops", "snapshot", "uapi"},
    "relay": {
        "mtetool",
        "attach",
        "backends",
        "errors",
        "extents",
        "files",
        "guest",
        "loops",
        "snapshot",
        "sources",
        "tags",
        "uapi",
        "vmm",
        "words",
    },
    "formats": {
        "backends",
        "buffers",
        "errors",
        "files",
        "guest",
        "loops",
        "relay",
        "snapshot",
        "sources",
        "tags",
        "uapi",
        "words",
    },
    "flows": {
        "attach",
        "backends.kvm",
        "buffers",
        "companion",
        "errors",
        "formats",
        "guest",
        "loops",
        "permission",
        "snapshot",
        "sources",
        "streaming",
        "tags",
        "uapi",
        "vmm",
        "words",
    },
    "cli": {
        "mtetool",
        "backends",
        "backends.emu",
        "backends.kvm",
        "companion",
        "emulator",
        "errors",
        "faults",
        "files",
        "flows",
        "formats",
        "guest",
        "provenance",
        "relay",
        "snapshot",
        "sources",
        "streaming",
        "uapi",
        "vmm",
        "words",
    },
    "__main__": {"cli", "errors", "signals", "streaming", "words"},
}


def _name(path: Path) -> str:
    words = ["mtetool", *path.relative_to(_PACKAGE).with_suffix("").parts]
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


_MODULES = {_name(path): path for path in sorted(_PACKAGE.rglob("*.py"))}
_KNOWN = {*_MODULES, "mtetool._loops"}


def _room(module: str) -> str:
    words = module.split(".")[1:]
    if not words:
        return "mtetool"
    inner = ".".join(words[:2])
    return inner if inner in ROOMS else words[0]


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in _KNOWN)
        elif isinstance(node, ast.ImportFrom) and node.module in _KNOWN:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in _KNOWN else node.module


def test_the_table_goes_from_the_ground_up() -> None:
    below: set[str] = set()
    for room, known in ROOMS.items():
        assert known <= below, f"{room} may import {sorted(known - below)}, which are not above it"
        below.add(room)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_knows_those_that_it_may(room: str) -> None:
    """It imports no others, and the table has no arrow that is no longer needed."""
    arrows: dict[str, list[str]] = {}
    for module, path in _MODULES.items():
        if _room(module) == room:
            for imported in _imports(path):
                if _room(imported) != room:
                    arrows.setdefault(_room(imported), []).append(f"{module} -> {imported}")
    new = {other: arrows[other] for other in arrows if other not in ROOMS[room]}
    assert not new, f"the table does not allow {room}: {new}"
    # Another backend is another line in a table of strings: `backends` imports none of them.
    assert set(arrows) == ROOMS[room]


def test_every_module_is_in_a_room_that_says_what_it_is_for() -> None:
    for module, path in _MODULES.items():
        assert _room(module) in ROOMS, f"{module} is in no room of the table"
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert text, f"{module} does not say what it is for"


def test_no_circle_of_modules() -> None:
    graph = {module: set(_imports(path)) - {module} for module, path in _MODULES.items()}
    done: set[str] = set()

    def walk(module: str, on_the_way: tuple[str, ...]) -> None:
        assert module not in on_the_way, " -> ".join((*on_the_way, module))
        if module not in done:
            for imported in sorted(graph.get(module, ())):
                walk(imported, (*on_the_way, module))
            done.add(module)

    for module in graph:
        walk(module, ())
