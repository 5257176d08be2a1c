"""The wheels and the source distribution, each installed and run on its own."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mtetool import __version__
from tests.deb.trees import ROOT, TOOLS, fresh

pytestmark = pytest.mark.long  # make test-deb, make test-wheels

_DIST = ROOT / "dist"
# What is not of the fast tests.
_SLOW = ("tests/lab", "tests/deb", "tests/fuzz", "tests/bench", "tests/interrupted")


def wheel(machine: str) -> Path:
    (found,) = _DIST.glob(f"mtetool-{__version__}-cp311-abi3-*_{machine}.whl")
    return found


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of pipx and uv."""
    home = tmp_path_factory.mktemp("tools")
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    subprocess.run([home / "bin/pip", "install", "--quiet", "pipx>=1.5", "uv"], check=True)
    return home / "bin"


def _environment(home: Path, tools: Path) -> dict[str, str]:
    """A user's, without a Python of ours."""
    path = f"{home}/.local/bin:{tools}:/usr/local/bin:/usr/bin:/bin"
    kept = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "UV_", "SSL_"))}
    return {**kept, "HOME": str(home), "PATH": path, "LC_ALL": "C.UTF-8"}


def test_pipx_as_in_the_readme(tools: Path, tmp_path: Path) -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    (command,) = [line.strip(" $") for line in lines if line.strip(" $").startswith("pipx install")]
    environment = _environment(tmp_path, tools) | {"PIPX_DEFAULT_PYTHON": sys.executable}
    subprocess.run(["sh", "-ec", command], cwd=_DIST, env=environment, check=True)
    _runs(tmp_path / ".local/bin/mtetool")
    page = tmp_path / ".local/share/man/man1/mtetool-save.1"
    assert page.read_text().startswith(".TH MTETOOL")


def test_uv_tool(tools: Path, tmp_path: Path) -> None:
    words = [str(tools / "uv"), "tool", "install", "--quiet", "--python", sys.executable]
    subprocess.run(
        [*words, str(wheel(platform.machine()))], env=_environment(tmp_path, tools), check=True
    )
    _runs(tmp_path / ".local/bin/mtetool")


def _runs(command: Path) -> None:
    done = subprocess.run([command, "--version", "-v"], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == f"mtetool {__version__}"
    assert second.startswith("wheel in ")
    assert ", C loops, " in second
    # The completions are in the environment that the command belongs to.
    home = command.resolve().parents[1]
    for name in ("bash-completion/completions/mtetool.bash", "fish/vendor_completions.d"):
        assert (home / "share" / name).exists()


def test_the_wheel_of_aarch64_runs() -> None:
    """By qemu-user, on Debian's libraries, where pip is not needed: a wheel is an archive."""
    libraries = ("click", "msgpack", "numpy", "rich", "xxhash", "zstandard")
    with fresh("arm64", "python3", *(f"python3-{name}" for name in libraries)) as tree:
        target = tree.path / "opt/mtetool"
        target.mkdir(parents=True)
        subprocess.run(
            [sys.executable, "-m", "zipfile", "-e", wheel("aarch64"), target], check=True
        )
        run = "cd /tmp; export PYTHONPATH=/opt/mtetool; m='python3 -m mtetool'"
        shown = tree.run(f"{run}; $m --version -v")
        assert shown.splitlines()[1].startswith("wheel in /opt/mtetool/mtetool, C loops, ")
        made = "$m emu create a --memory 64M --fill heap; $m emu create b --memory 64M"
        moved = "$m save emu:a -o s; $m restore s emu:b; $m diff emu:a emu:b && echo same"
        assert tree.run(f"{run}; {made}; {moved}").splitlines()[-1] == "same"


def test_the_source_distribution_passes_the_fast_tests_alone(tmp_path: Path) -> None:
    with tarfile.open(_DIST / f"mtetool-{__version__}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / f"mtetool-{__version__}"
    words = ["make", f"PYTHON={sys.executable}", "venv"]
    subprocess.run(words, cwd=source, check=True)
    ignored = [f"--ignore={name}" for name in _SLOW]
    tests = [".venv/bin/python", "-m", "pytest", "-q", "-n", "2", "-m", "not long", *ignored]
    subprocess.run(tests, cwd=source, check=True)


def test_wheels_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    subprocess.run([TOOLS / "wheels", tmp_path], check=True, env=os.environ | {"TZ": "Asia/Tokyo"})
    made = {path.name: _sum(path) for path in tmp_path.iterdir()}
    names = [*_DIST.glob("*.whl"), *_DIST.glob("*.tar.gz")]
    assert made == {path.name: _sum(path) for path in names}


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
