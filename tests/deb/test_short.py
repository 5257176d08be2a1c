"""What CI tries of the packages, in minutes; `make test-deb` tries all."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mtetool import __version__
from tests.deb.test_deb import package
from tests.deb.trees import TOOLS, fresh

pytestmark = pytest.mark.long  # make deb-short


def test_built_installed_used_and_removed(tmp_path: Path) -> None:
    subprocess.run([TOOLS / "deb", "--version", __version__, tmp_path], check=True)
    with fresh("amd64") as tree:
        names = tree.put(
            package("amd64", "mtetool", tmp_path), package("all", "mtetool-libvirt", tmp_path)
        )
        tree.run(f"apt-get install -q -y --no-install-recommends {names}")
        shown = tree.run("mtetool --version -v", user="nobody")
        assert shown.startswith(f"mtetool {__version__}\ndeb in /usr/lib/python3/dist-packages/")
        assert ", C loops, " in shown
        tree.run(
            "/usr/share/doc/mtetool/examples/demo.sh /tmp/demo && rm -r /tmp/demo", user="nobody"
        )
        tree.run("apt-get purge -q -y mtetool mtetool-libvirt")
        assert [name for name in tree.files() if "mtetool" in name] == []
