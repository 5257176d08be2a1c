"""Debian packages of any architecture, fetched with an apt state that is the lab's own.

The machine's sources, lists, caches and dpkg database are neither read (but for the mirror's address
and how to reach it) nor written, and none of this needs root.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab import cache, tools
from tests.lab.errors import LabError

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SUITES = ("trixie", "trixie-backports")

CONFIGURATION = """\
Dir::State "{state}";
Dir::State::Lists "{state}/lists";
Dir::State::status "{state}/status";
Dir::Cache "{state}/cache";
Dir::Etc::sourcelist "{state}/sources.list";
Dir::Etc::sourceparts "{state}/none";
Dir::Etc::preferences "{state}/preferences";
Dir::Etc::preferencesparts "{state}/none";
Dir::Etc::main "{state}/none/main";
Dir::Etc::parts "{state}/none";
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "";
Acquire::Languages "none";
"""

# With a suite asked for by -t its pin is 990: Python stays the release's own all the same, as a
# distribution's user has it.
PREFERENCES = """\
Package: python3-*
Pin: release n=trixie
Pin-Priority: 995
"""


def mirror() -> str:
    """The Debian archive's URI: from the environment, else what the machine's apt uses."""
    chosen = os.environ.get("MTETOOL_DEBIAN_MIRROR")
    if chosen:
        return chosen
    listing = tools.call(
        ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)"]
    )
    for line in listing.splitlines():
        origin, label, component, uri = line.split("|", 3)
        if (origin, label, component) == ("Debian", "Debian", "main"):
            return uri
    raise LabError(
        "this machine's apt knows no Debian mirror; set MTETOOL_DEBIAN_MIRROR to one's URI"
    )


def native_architecture() -> str:
    """The machine's own architecture, in Debian's words."""
    return tools.call(["dpkg", "--print-architecture"]).strip()


@dataclass(frozen=True)
class Apt:
    """An apt state of one architecture with up-to-date lists; use it under `state_of`."""

    state: Path

    def fetch(self, suite: str, packages: Sequence[str]) -> list[Path]:
        """Download PACKAGES and all that they need into the state's archive; returns the files."""
        self._call("apt-get", "install", "--download-only", "--yes", "-t", suite, *packages)
        plan = self._call("apt-get", "install", "--simulate", "--yes", "-t", suite, *packages)
        wanted = re.findall(r"^Inst (\S+) \((\S+)", plan, re.MULTILINE)
        return [self._archive(name, version) for name, version in wanted]

    def fetch_alone(self, suite: str, packages: Iterable[str]) -> list[Path]:
        """Download just these packages, without what they depend on."""
        folder = self.state / "cache" / "alone"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self._call("apt-get", "download", "-t", suite, *packages, cwd=folder)
        return sorted(folder.glob("*.deb"))

    def depends(self, suite: str, package: str) -> list[str]:
        """The names in a package's Depends field."""
        shown = self._call("apt-cache", "show", "--no-all-versions", "-t", suite, package)
        match = re.search(r"^Depends: (.*)$", shown, re.MULTILINE)
        return re.findall(r"(?:^|, )([a-z0-9][a-z0-9+.-]+)", match[1]) if match else []

    def _archive(self, name: str, version: str) -> Path:
        # apt quotes what a file name should not hold: an epoch's colon.
        quoted = version.replace(":", "%3a")
        found = sorted((self.state / "cache/archives").glob(f"{name}_{quoted}_*.deb"))
        if not found:
            raise LabError(f"apt planned {name} {version} but did not download it")
        return found[0]

    def _call(self, *argv: str, cwd: Path | None = None) -> str:
        # Without what the user's own APT_CONFIG may say: the state's file replaces it.
        return tools.call(argv, cwd=cwd, env={"APT_CONFIG": str(self.state / "apt.conf")})


def unpack(archives: Iterable[Path], tree: Path) -> None:
    """Unpack packages into one tree whose /bin, /lib and so on are links into /usr."""
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (tree / name).is_symlink():
            (tree / name).symlink_to(f"usr/{name}")
    for archive in archives:
        tools.call(["dpkg-deb", "-x", archive, tree])


def state_of(architecture: str) -> Apt:
    """An up-to-date state; the caller holds `cache.locked("apt-ARCHITECTURE")` while it uses it."""
    if not KEYRING.exists():
        raise LabError(
            f"the lab needs {KEYRING}; install the Debian package debian-archive-keyring"
        )
    state = cache.home() / f"apt-{architecture}"
    for folder in ("lists/partial", "cache/archives/partial", "none"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    # How the machine reaches its mirror (proxies, certificates) holds for the lab, too; its hooks
    # and its list of index files to fetch do not.
    transport = [
        line
        for line in tools.call(["apt-config", "dump", "Acquire"]).splitlines()
        if not line.startswith(("Acquire::IndexTargets", "Acquire::Languages", "Acquire "))
    ]
    settings = CONFIGURATION.format(state=state, architecture=architecture)
    (state / "apt.conf").write_text(settings + "\n".join(transport) + "\n")
    (state / "preferences").write_text(PREFERENCES)
    (state / "status").write_text("")
    uri = mirror()
    (state / "sources.list").write_text(
        "".join(f"deb [signed-by={KEYRING}] {uri} {suite} main\n" for suite in SUITES)
    )
    apt = Apt(state)
    apt._call("apt-get", "update")
    return apt
