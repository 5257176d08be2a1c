"""Debian packages of another release or architecture, without touching the machine's apt.

apt keeps all its state in a directory of ours, and nothing is installed: packages are downloaded
with their dependencies and unpacked into a tree. This needs no root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_TOOLS = {
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "mke2fs": "e2fsprogs",
    "xz": "xz-utils",
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu and libc6-dev-arm64-cross",
    "arm-linux-gnueabihf-as": "binutils-arm-linux-gnueabihf",
    "arm-linux-gnueabihf-ld": "binutils-arm-linux-gnueabihf",
}


class LabUnavailableError(Exception):
    """The lab cannot be built or started here; the message says what is missing."""


def need_tools(*names: str) -> None:
    """Raise LabUnavailableError, which names the Debian packages, if tools are missing."""
    # mke2fs is in /sbin, which a plain user's PATH lacks.
    os.environ["PATH"] = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        wanted = ", ".join(f"{name} (Debian package {_TOOLS[name]})" for name in missing)
        raise LabUnavailableError(f"the lab needs {wanted}; `make deps` installs everything")


def mirror() -> str:
    """Return where this machine gets its Debian packages from, or $MTETOOL_DEBIAN_MIRROR."""
    if configured := os.environ.get("MTETOOL_DEBIAN_MIRROR"):
        return configured
    form = "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)"
    listing = subprocess.run(
        ["apt-get", "indextargets", "--format", form], capture_output=True, text=True, check=False
    ).stdout
    for line in listing.splitlines():
        origin, label, component, uri = line.split("|", 3)
        # Before the machine's first update, apt knows neither origin nor label.
        if component == "main" and (origin, label) in (("Debian", "Debian"), ("", "")):
            return uri
    raise LabUnavailableError(
        "apt on this machine has no Debian archive configured;"
        " set MTETOOL_DEBIAN_MIRROR to the URI of one"
    )


class Archive:
    """A separate apt for one architecture, with its state under `state`."""

    def __init__(self, state: Path, architecture: str, suites: Iterable[str]) -> None:
        need_tools("apt-get", "dpkg-deb")
        self._state = state
        for directory in ("lists/partial", "cache/archives/partial"):
            (state / directory).mkdir(parents=True, exist_ok=True)
        (state / "status").touch()
        signed = f"[signed-by={_KEYRING}] " if _KEYRING.exists() else ""
        lines = [f"deb {signed}{mirror()} {suite} main\n" for suite in suites]
        (state / "sources.list").write_text("".join(lines))
        options = {
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Debug::NoLocking": "1",
            "Dir::State::Lists": f"{state}/lists",
            "Dir::State::status": f"{state}/status",
            "Dir::Cache": f"{state}/cache",
            "Dir::Etc::sourcelist": f"{state}/sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::Etc::preferencesparts": "-",
        }
        # Hooks of this machine (container images have some) are for its own packages.
        hooks = ("APT::Update::Post-Invoke", "APT::Update::Post-Invoke-Success")
        config = state / "apt.conf"
        config.write_text("".join(f"#clear {hook};\n" for hook in (*hooks, "DPkg::Post-Invoke")))
        self._environment = os.environ | {"APT_CONFIG": str(config)}
        self._options = [word for item in options.items() for word in ("-o", "=".join(item))]

    def update(self) -> None:
        """Fetch the package lists."""
        self._apt("update")

    def depends(self, package: str, *, suite: str | None = None) -> list[str]:
        """Return the names a package depends on, to find what a meta package stands for."""
        target = ["-t", suite] if suite else []
        words = ["apt-cache", *self._options, *target, "depends", "--important", package]
        listing = subprocess.run(
            words, capture_output=True, text=True, check=True, env=self._environment
        ).stdout
        lines = (line.strip().partition(": ") for line in listing.splitlines())
        return [name for relation, _, name in lines if relation == "Depends"]

    def download(
        self, packages: Iterable[str], *, suite: str | None = None, without: Iterable[str] = ()
    ) -> list[Path]:
        """Fetch packages with everything they need but `without`; return the .deb files."""
        archives = self._state / "cache" / "archives"
        for old in archives.glob("*.deb"):
            old.unlink()
        # apt leaves out what it believes to be installed, and what only that needs.
        status = self._state / "status-without"
        status.write_text("".join(map(_installed, without)))
        words = [*(["-t", suite] if suite else []), "-o", f"Dir::State::status={status}"]
        self._apt("-y", "--download-only", *words, "install", *packages)
        return sorted(archives.glob("*.deb"))

    def fetch_only(self, package: str) -> Path:
        """Fetch one package without its dependencies; return the .deb file."""
        where = self._state / "cache"
        for old in where.glob("*.deb"):
            old.unlink()
        self._apt("download", package, cwd=where)
        return next(where.glob("*.deb"))

    def _apt(self, *words: str, cwd: Path | None = None) -> None:
        command = ["apt-get", "-q", *self._options, *words]
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd,
            env=self._environment,
        )
        if result.returncode:
            tail = "\n".join((result.stdout + result.stderr).splitlines()[-8:])
            raise LabUnavailableError(f"apt-get {' '.join(words[:4])} failed:\n{tail}")


def _installed(package: str) -> str:
    """Return dpkg's record of an installed package, of a version that satisfies all others."""
    fields = {
        "Package": package,
        "Status": "install ok installed",
        "Architecture": "all",
        "Multi-Arch": "foreign",
        "Version": "9999:1",
        "Maintainer": "nobody",
        "Description": "not needed in the lab",
    }
    return "".join(f"{name}: {value}\n" for name, value in fields.items()) + "\n"


def unpack(debs: Iterable[Path], tree: Path) -> None:
    """Unpack packages into `tree`, whose /bin, /sbin and /lib are links into usr."""
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (tree / name).is_symlink():
            (tree / name).symlink_to(f"usr/{name}")
    # Two at a time: decompression takes most of the time.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda deb: _unpack_one(deb, tree), debs))
    # Releases before Debian 13 have files outside usr: a directory took the link's place.
    for name in ("bin", "sbin", "lib", "lib64"):
        if not (tree / name).is_symlink():
            shutil.copytree(tree / name, tree / "usr" / name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(tree / name)
            (tree / name).symlink_to(f"usr/{name}")


def _unpack_one(deb: Path, tree: Path) -> None:
    result = subprocess.run(["dpkg-deb", "-x", deb, tree], capture_output=True, check=False)
    if result.returncode:
        raise LabUnavailableError(f"{deb.name}: {result.stderr.decode(errors='replace').strip()}")
