"""Fresh trees of Debian 13, in which the packages are installed; see tools/tree and tools/enter."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab.images import cache

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
# What a package leaves behind elsewhere is found; these are Debian's own, and change by themselves.
_CHANGING = (
    "dev",
    "proc",
    "run",
    "srv",
    "sys",
    "tmp",
    "root",
    "home",
    "var/cache",
    "var/lib/apt",
    "var/lib/dpkg",
    "var/lib/systemd/catalog",
    "var/log",
    "var/tmp",
)


@dataclass
class Tree:
    """One tree; `boot` gives it a systemd, and then commands run beside that."""

    path: Path
    architecture: str
    before: list[str] = field(default_factory=list)
    _systemd: subprocess.Popen[bytes] | None = None
    _pid: int = 0

    def run(self, script: str, *, user: str = "root", status: int = 0) -> str:
        """Run a script of sh; return what it wrote, on both channels."""
        words = ["sh", "-ec", script]
        if user != "root":
            words = ["runuser", "-u", user, "--", *words]
        if self._pid:
            environment = ["env", "-i", "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive"]
            path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
            words = ["nsenter", f"--target={self._pid}", "--all", *environment, path, *words]
        else:
            words = [str(TOOLS / "enter"), str(self.path), *words]
            if self.architecture == "arm64":
                words.insert(0, str(TOOLS / "arm64"))
        done = subprocess.run(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        print(f"$ {script}\n{done.stdout}")
        assert done.returncode == status, (script, done.stdout)
        return done.stdout

    def put(self, *packages: Path) -> str:
        """Copy packages into the tree; return their names there, for apt."""
        for package in packages:
            shutil.copy(package, self.path / "srv")
        return " ".join(f"/srv/{package.name}" for package in packages)

    def files(self) -> list[str]:
        """Every file, link and directory that is there to stay."""
        found = []
        for top, directories, names in os.walk(self.path):
            here = Path(top).relative_to(self.path)
            directories[:] = [d for d in directories if str(here / d) not in _CHANGING]
            found += [str(here / name) for name in (*directories, *names)]
        return sorted(name for name in found if "__pycache__" not in name)

    @contextmanager
    def booted(self) -> Iterator[None]:
        """Start the tree's systemd, in namespaces of its own."""
        words = [str(TOOLS / "enter"), "--boot", str(self.path)]
        with subprocess.Popen(words, stdin=subprocess.DEVNULL) as self._systemd:
            try:
                self._pid = self._wait_for_systemd(self._systemd.pid)
                # It is up when no job is left; "degraded" is no wonder without devices.
                self.run("systemctl is-system-running --wait || true")
                yield
            finally:
                self._pid = 0
                self._systemd.kill()

    def _wait_for_systemd(self, parent: int) -> int:
        for _ in range(600):
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
            # Until it has become systemd, the child is a shell.
            if children and Path(f"/proc/{children[0]}/comm").read_text() == "systemd\n":
                ready = Path(f"/proc/{children[0]}/root/run/systemd/private").exists()
                if ready:
                    return int(children[0])
            time.sleep(0.1)
        raise AssertionError("systemd did not start")


@contextmanager
def fresh(architecture: str, *packages: str) -> Iterator[Tree]:
    """A tree with these packages, which ends with the context."""
    base = cache() / "debian"
    base.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="tree-", dir=base))
    path.chmod(0o755)
    try:
        subprocess.run([TOOLS / "tree", path, architecture, *packages], check=True)
        tree = Tree(path, architecture)
        tree.run("apt-get update -q")
        yield tree
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", str(path)], check=False)
