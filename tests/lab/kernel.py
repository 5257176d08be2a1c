"""The kernels of the lab's machine, and the small initramfs that finds its root for them."""

from __future__ import annotations

import lzma
import re
from dataclasses import dataclass
from pathlib import Path

from tests.lab import apt, cache, cpio
from tests.lab.errors import LabError

RECIPE = 1
INIT = Path(__file__).parent / "inside" / "initramfs-init"
# What the machine's root lies on; all else that it needs is built in.
MODULES = ("virtio_blk",)
APPLETS = ("sh", "cat", "cp", "insmod", "mount", "switch_root")


@dataclass(frozen=True)
class Source:
    """Where Debian has a kernel: a suite and the package that depends on the newest build."""

    suite: str
    package: str


# 6.12-16k (trixie, linux-image-arm64-16k) and 7.3 (trixie-backports, linux-image-cloud-arm64) go
# here once something is tested on them; `_build` knows both ways that Debian packs an image.
KERNELS = {"6.12": Source("trixie", "linux-image-cloud-arm64")}
DEFAULT = "6.12"


@dataclass(frozen=True)
class Kernel:
    """A bootable Image and the archive of its initramfs."""

    image: Path
    initramfs: Path


def ensure(name: str = DEFAULT) -> Kernel:
    """A kernel of KERNELS, downloaded if it is not in the cache."""
    if name not in KERNELS:
        raise LabError(f"no kernel {name!r} in the lab; there are: {', '.join(KERNELS)}")
    source = KERNELS[name]
    ingredients = cache.key(RECIPE, source, MODULES, APPLETS, INIT)
    folder = cache.built(f"kernel-{name}", ingredients, lambda draft: _build(draft, name))
    return Kernel(folder / "Image", folder / "initramfs.cpio")


def _build(draft: Path, name: str) -> None:
    source = KERNELS[name]
    cache.progress(f"downloading the kernel {name}")
    tree = draft / "tree"
    with cache.locked("apt-arm64"):
        state = apt.state_of("arm64")
        packages = [
            one
            for one in state.depends(source.suite, source.package)
            if one.startswith(("linux-image-", "linux-binary-", "linux-modules-"))
        ]
        archives = state.fetch_alone(source.suite, [*packages, "busybox-static"])
        apt.unpack(archives, tree)
    (draft / "packages").write_text("".join(f"{path.name}\n" for path in archives))
    images = [*tree.glob("boot/vmlinuz-*"), *tree.glob("usr/lib/modules/*/vmlinuz")]
    if not images:
        raise LabError(f"no kernel image in {', '.join(path.name for path in archives)}")
    images[0].rename(draft / "Image")
    (draft / "initramfs.cpio").write_bytes(_initramfs(tree))
    cache.remove(tree)


def _initramfs(tree: Path) -> bytes:
    archive = cpio.Archive()
    archive.device("dev/console", 5, 1)
    archive.file("bin/busybox", (tree / "usr/bin/busybox").read_bytes(), 0o755)
    for applet in APPLETS:
        archive.link(f"bin/{applet}", "busybox")
    archive.file("init", INIT.read_bytes(), 0o755)
    names: list[str] = []
    for module in MODULES:
        for path in _module_order(tree, module):
            names.append(path.name.split(".")[0])
            archive.file(f"modules/{names[-1]}.ko", _module_bytes(path))
    archive.file("modules/order", "".join(f"{name}\n" for name in names).encode())
    return archive.finish()


def _module_order(tree: Path, name: str) -> list[Path]:
    """A module's file behind those that it needs.

    Read from the modules' own "depends=" field: modules.dep is made when Debian installs a kernel,
    the package has none. What is not a file is built in.
    """
    pattern = re.sub("[-_]", "[-_]", name)
    found = sorted(tree.glob(f"usr/lib/modules/*/kernel/**/{pattern}.ko*"))
    if not found:
        return []
    field = re.search(rb"\0depends=([^\0]*)\0", _module_bytes(found[0]))
    needed = field[1].decode().split(",") if field and field[1] else []
    order = [path for one in needed for path in _module_order(tree, one)]
    return [*dict.fromkeys(order), found[0]]


def _module_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data
