"""The QEMU that emulates the lab's machine: new enough on any Debian, independent of what it has.

Never the machine's own: Debian 12's QEMU 7.2 mixes up the tags of a page.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.lab import apt, cache
from tests.lab.errors import LabError

SUITE = "trixie"
PACKAGES = ("qemu-system-arm",)
# Raised when the steps below change, so that what older steps built is not used.
RECIPE = 1


@dataclass(frozen=True)
class Emulator:
    """QEMU in a tree with all of its libraries, the C library and the loader included."""

    tree: Path

    def command(self) -> list[str]:
        """How to start it, up to where its options begin."""
        libraries = self.tree / "usr/lib"
        loaders = sorted(libraries.glob("*-linux-gnu*/ld-linux-*.so.*"))
        if not loaders:
            raise LabError(f"no dynamic loader in {self.tree}; remove that directory")
        folder = loaders[0].parent
        search = ":".join(str(path) for path in (folder, folder / "pulseaudio"))
        program = self.tree / "usr/bin/qemu-system-aarch64"
        data = self.tree / "usr/share/qemu"
        return [str(loaders[0]), "--library-path", search, str(program), "-L", str(data)]


def ensure() -> Emulator:
    """The emulator for this machine's architecture, downloaded if it is not in the cache."""
    architecture = apt.native_architecture()
    ingredients = cache.key(RECIPE, SUITE, PACKAGES, architecture)
    return Emulator(cache.built("emulator", ingredients, lambda draft: _build(draft, architecture)))


def _build(draft: Path, architecture: str) -> None:
    cache.progress("downloading the emulator")
    with cache.locked(f"apt-{architecture}"):
        archives = apt.state_of(architecture).fetch(SUITE, PACKAGES)
        cache.progress(f"unpacking the emulator's {len(archives)} packages")
        apt.unpack(archives, draft)
    (draft / "packages").write_text("".join(f"{path.name}\n" for path in sorted(archives)))
