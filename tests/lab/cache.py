"""Built things outside the repository: one directory each, keyed by what goes into it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def home() -> Path:
    """The cache's directory, made if needed."""
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    path = Path(base) / "mtetool"
    path.mkdir(parents=True, exist_ok=True)
    return path


def key(*ingredients: object) -> str:
    """A short name for exactly these ingredients (by repr; bytes and files' contents included)."""
    digest = hashlib.sha256()
    for one in ingredients:
        data = one.read_bytes() if isinstance(one, Path) else repr(one).encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:16]


def progress(text: str) -> None:
    """One line about work that takes a while; stderr, so that stdout stays the command's."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold a lock of this name against other processes; waits, and says that it does."""
    with (home() / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that works on {name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def built(name: str, ingredients_key: str, build: Callable[[Path], None]) -> Path:
    """The directory NAME-KEY, filled by BUILD if it is not there yet.

    BUILD gets an empty directory that becomes the result only when BUILD returns, so an interrupted
    build leaves nothing that looks finished. Older results of the same name stay: another checkout
    may use them.
    """
    final = home() / f"{name}-{ingredients_key}"
    if final.is_dir():
        return final
    with locked(name):
        if final.is_dir():
            return final
        for stale in home().glob(f".{name}-*"):
            # Left by a build that was killed; the lock says that none is running.
            remove(stale)
        draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=home()))
        try:
            build(draft)
            draft.rename(final)
        finally:
            remove(draft)
    return final


def remove(tree: Path) -> None:
    """Delete a tree that may be half gone already."""
    shutil.rmtree(tree, ignore_errors=True)
