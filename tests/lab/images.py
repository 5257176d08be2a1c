"""The lab's images, built once from Debian packages and cached outside the repository.

Each part is cached under a hash of its recipe, so a changed recipe is rebuilt and an unchanged
one is reused. `$XDG_CACHE_HOME/mtetool` can be removed at any time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path

from tests.lab import cpio
from tests.lab.disk import make_ext4
from tests.lab.furnish import OWNERS, furnish
from tests.lab.modules import Modules
from tests.lab.packages import Archive, LabUnavailableError, need_tools, unpack

_HERE = Path(__file__).parent
_RELEASE = "trixie"
_BACKPORTS = "trixie-backports"


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel of the lab: its meta package, and the suite that has it and its emulator."""

    package: str
    suite: str


KERNELS = {
    "6.12": Kernel("linux-image-cloud-arm64", _RELEASE),
    # Pages of 16 KiB; Debian's kernel with them is for any machine, with more of it in modules.
    "6.12-16k": Kernel("linux-image-arm64-16k", _RELEASE),
    # The newest that Debian has for this release. It supports SME and guarded control stacks,
    # unlike 6.12, and so does its emulator (ZT0, FPMR and GCS need QEMU 11).
    "7.3": Kernel("linux-image-cloud-arm64", _BACKPORTS),
}
DEFAULT_KERNEL = "6.12"

# The emulator must not be QEMU 7.2, Debian 12's, which lets tags of a page overwrite each
# other. It comes from Debian 13 with its whole C library, so it runs on any Debian. mtetool must
# detect a host that Debian 12's emulates; only the test of that fetches it.
QEMU_7_2 = "bookworm"
_EMULATOR_PACKAGES = ("qemu-system-arm",)
_ROOT_PACKAGES = (
    "apparmor",
    "busybox-static",
    "openssh-client",
    "openssh-server",
    "python3",
    "python3-click",
    "python3-hypothesis",
    "python3-msgpack",
    "python3-numpy",
    "python3-pytest",
    "python3-rich",
    "python3-xxhash",
    "python3-zstandard",
    "socat",
)
_ROOT_BACKPORTS = ("qemu-system-arm",)  # the VMM inside: QEMU 11
_LIBVIRT_PACKAGES = (
    "libvirt-clients",
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "python3-libvirt",
)
LIBVIRTS = (_RELEASE, _BACKPORTS)
"""The suites whose libvirt the lab can have."""
DEFAULT_LIBVIRT = _RELEASE
# What the packages above depend on and nothing in the lab uses: package scripts, a service
# manager, logins. QEMU comes from elsewhere.
_NOT_NEEDED = (
    *("adduser", "debconf", "init-system-helpers", "lsb-base", "passwd", "runit-helper", "ucf"),
    *("logrotate", "polkitd", "systemd-container", "systemd-standalone-sysusers"),
    *("libpam-modules", "libpam-runtime", "procps", "sensible-utils", "qemu-kvm"),
    *("dmidecode", "gettext-base", "iproute2"),
)
_CFLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-static", "-march=armv8.5-a+memtag")
_EXTENSION_CFLAGS = ("-O3", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
_SUFFIXES = (".c", ".h", ".s")
# The 32-bit program is in assembly language: it needs an assembler and a linker, no compiler.
_ARM = "arm-linux-gnueabihf"
# Modules that a machine needs before it has its root, and those that the kernel would load by
# itself, unless they are built in.
_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "ext4", "virtio_net", "unix_diag")
# What runs in the lab.
_COMPILED = ("mtetool", "tests/conformance", "tests/differential", "tests/interrupted", "tests/lab")
_COMPILE = """
import compileall, os, pathlib, py_compile, re, sys, tarfile
os.chdir("/opt/mtetool")
unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
for name in sys.argv[1:]:
    how = {"rx": re.compile("/test_"), "quiet": 2, "invalidation_mode": unchecked}
    assert compileall.compile_dir(name, **how), name
with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as archive:
    for path in pathlib.Path().rglob("*.pyc"):
        archive.add(path)
"""
_KEPT = 8
_KERNEL_PARTS = ("linux-base-", "linux-binary-", "linux-modules-")


@dataclass(frozen=True, slots=True)
class Images:
    """Paths of everything that a lab machine is started from."""

    emulator: Path
    root: Path
    kernel: Path
    initramfs: Path
    programs: Path
    extension: Path
    bytecode: Path | None = None
    """The modules of the checkout, compiled by the lab's Python."""


def images(
    kernel: str = DEFAULT_KERNEL, *, emulator: str | None = None, libvirt: str = DEFAULT_LIBVIRT
) -> Images:
    """Return all parts, and build the missing ones. Raises LabUnavailableError.

    `emulator` is the suite of an emulator other than the kernel's own, `libvirt` that of libvirt.
    """
    if kernel not in KERNELS:
        raise LabUnavailableError(f"no kernel {kernel!r}; there are {', '.join(KERNELS)}")
    with _locked():
        kernel_dir = _kernel(kernel)
        guest_kernel = _kernel(DEFAULT_KERNEL)
        root = _root(guest_kernel, libvirt)
        initramfs = _initramfs(kernel_dir, root)
        programs = _programs()
        extension = _extension()
        own = _emulator(KERNELS[kernel].suite)
    image = kernel_dir / "Image"
    found = Images(own, root / "root.img", image, initramfs, programs, extension)
    _warm(found)
    with _locked():
        found = replace(found, bytecode=_bytecode(found))
    if emulator is None:
        return found
    with _locked():
        return replace(found, emulator=_emulator(emulator))


def emulator(suite: str = _RELEASE) -> list[str]:
    """Return the words that start the QEMU of a Debian suite on this machine, and fetch it first.

    Raises LabUnavailableError.
    """
    with _locked():
        return emulator_words(_emulator(suite))


def emulator_words(tree: Path) -> list[str]:
    """The words that start the QEMU of a tree, with its own loader and libraries.

    This machine's may be older.
    """
    usr = tree / "usr"
    libraries = next(path.parent for path in usr.glob("lib/*-linux-gnu/libc.so.6"))
    loader = next(libraries.glob("ld-linux-*.so.*"))
    qemu = usr / "bin" / "qemu-system-aarch64"
    words = [loader, "--library-path", libraries, qemu, "-L", usr / "share" / "qemu"]
    return [str(word) for word in words]


def cache() -> Path:
    """The cache directory, `$XDG_CACHE_HOME/mtetool`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mtetool"


@contextmanager
def _locked() -> Iterator[None]:
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _cached(name: str, recipe: object, build: Callable[[Path], None]) -> Path:
    """The directory that `build` filled for this recipe; it appears only when complete."""
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    final = cache() / f"{name}-{key}"
    if final.is_dir():
        return final
    started = time.monotonic()
    print(f"lab: building {name} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=cache(), prefix=f".{name}-") as scratch:
        work = Path(scratch) / "work"
        work.mkdir()
        build(work)
        work.rename(final)
    took = time.monotonic() - started
    print(f"lab: built {name} in {took:.0f} s", file=sys.stderr, flush=True)
    return final


def _archive(architecture: str, *others: str) -> Archive:
    """The packages of the lab's release, or of the given suites."""
    state = cache() / "-".join(("apt", architecture, *others))
    archive = Archive(state, architecture, others or (_RELEASE, _BACKPORTS))
    archive.update()
    return archive


def _emulator(suite: str) -> Path:
    recipe = {"suite": suite, "packages": _EMULATOR_PACKAGES, "recipe": 1}
    return _cached("emulator", recipe, lambda into: _build_emulator(into, suite))


def _build_emulator(into: Path, suite: str) -> None:
    own = subprocess.run(
        ["dpkg", "--print-architecture"], capture_output=True, text=True, check=True
    ).stdout.strip()
    archive = _archive(own) if suite in (_RELEASE, _BACKPORTS) else _archive(own, suite)
    unpack(archive.download(_EMULATOR_PACKAGES, suite=suite), into)
    for unused in ("usr/share/doc", "usr/share/locale", "usr/share/man"):
        shutil.rmtree(into / unused, ignore_errors=True)


def _kernel(name: str) -> Path:
    recipe = {**asdict(KERNELS[name]), "modules": _MODULES, "recipe": 2}
    return _cached(f"kernel-{name}", recipe, lambda into: _build_kernel(into, KERNELS[name]))


def _build_kernel(into: Path, kernel: Kernel) -> None:
    archive = _archive("arm64")
    depends = archive.depends(kernel.package, suite=kernel.suite)
    package = next(name for name in depends if name.startswith("linux-image-"))
    # Up to 6.x, one package holds everything; later, the image and the modules have one each.
    parts = [name for name in archive.depends(package) if name.startswith(_KERNEL_PARTS)]
    with tempfile.TemporaryDirectory(dir=into) as scratch:
        tree = Path(scratch)
        for name in parts or [package]:
            unpack([archive.fetch_only(name)], tree)
        (version,) = (tree / "usr" / "lib" / "modules").iterdir()
        vmlinuz = [*(tree / "boot").glob("vmlinuz-*"), *version.glob("vmlinuz")]
        shutil.copy(vmlinuz[0], into / "Image")
        modules = Modules(version)
        for number, name in enumerate(modules.in_order(*_MODULES)):
            (into / f"{number:02}-{name}.ko").write_bytes(modules.content(name))


def _root(guest_kernel: Path, libvirt: str) -> Path:
    packages = {_RELEASE: _ROOT_PACKAGES, _BACKPORTS: _ROOT_BACKPORTS}
    packages[libvirt] += _LIBVIRT_PACKAGES
    recipe = {
        "packages": packages,
        "without": _NOT_NEEDED,
        "guest kernel": asdict(KERNELS[DEFAULT_KERNEL]),
        "recipe": 6,
    }
    return _cached("root", recipe, lambda into: _build_root(into, guest_kernel, packages))


def _build_root(into: Path, guest_kernel: Path, packages: dict[str, tuple[str, ...]]) -> None:
    archive = _archive("arm64")
    with tempfile.TemporaryDirectory(dir=into) as scratch:
        tree = Path(scratch)
        for suite, names in packages.items():
            unpack(archive.download(names, suite=suite, without=_NOT_NEEDED), tree)
        furnish(tree)
        shutil.copy(tree / "usr" / "bin" / "busybox", into / "busybox")
        shutil.copy(guest_kernel / "Image", tree / "lab" / "Image")
        make_ext4(tree, into / "root.img", spare_bytes=256 << 20)


def _initramfs(kernel: Path, root: Path) -> Path:
    """The first root: busybox and the modules that the second one's disk needs."""
    target = kernel / "initramfs.cpio"
    entries = [
        *(cpio.Entry.directory(name) for name in ("bin", "dev", "proc", "root")),
        cpio.Entry.program("bin/busybox", (root / "busybox").read_bytes()),
        cpio.Entry.program("init", (_HERE / "inside" / "init").read_bytes()),
        *(cpio.Entry.file(m.name, m.read_bytes()) for m in sorted(kernel.glob("*.ko"))),
    ]
    content = cpio.archive(entries)
    if not target.exists() or target.read_bytes() != content:
        target.write_bytes(content)
    return target


def _programs() -> Path:
    """The C programs of the lab, and the guests' roots, each with one of them as init."""
    sources = sorted(path for path in (_HERE / "programs").iterdir() if path.suffix in _SUFFIXES)
    recipe = {"flags": _CFLAGS, **{source.name: source.read_text() for source in sources}}

    def build(into: Path) -> None:
        need_tools("aarch64-linux-gnu-gcc", f"{_ARM}-as", f"{_ARM}-ld")
        for source in sources:
            target = into / source.stem
            if source.suffix == ".c":
                words = ["aarch64-linux-gnu-gcc", *_CFLAGS, "-o", f"{target}", f"{source}"]
                subprocess.run(words, check=True)
            elif source.suffix == ".s":
                subprocess.run([f"{_ARM}-as", "-o", f"{target}.o", source], check=True)
                subprocess.run([f"{_ARM}-ld", "-o", target, f"{target}.o"], check=True)
        aarch32 = cpio.Entry.program("aarch32", (into / "aarch32").read_bytes())
        for guest, init, others in (
            ("guest", "tagger", []),
            ("mixed", "mixed", [aarch32]),
            ("hammer", "hammer", []),
        ):
            program = cpio.Entry.program("init", (into / init).read_bytes())
            directories = [cpio.Entry.directory(name) for name in ("dev", "proc")]
            root = cpio.archive([*directories, program, *others])
            (into / f"{guest}.cpio").write_bytes(root)

    return _cached("programs", recipe, build)


def _extension() -> Path:
    """mtetool's C extension, for the lab's Python."""
    source = _HERE.parents[1] / "mtetool" / "_loops.c"
    recipe = {"release": _RELEASE, "flags": _EXTENSION_CFLAGS, "source": source.read_text()}

    def build(into: Path) -> None:
        need_tools("aarch64-linux-gnu-gcc")
        headers = _headers() / "usr" / "include"
        (python,) = headers.glob("python3.*")
        includes = (f"-I{python}", f"-I{headers}")  # pyconfig.h includes the architecture's own
        words = ["aarch64-linux-gnu-gcc", *_EXTENSION_CFLAGS, *includes, "-o"]
        subprocess.run([*words, into / "_loops.abi3.so", source], check=True)

    return _cached("extension", recipe, build) / "_loops.abi3.so"


def _headers() -> Path:
    """Python's headers for arm64."""

    def build(into: Path) -> None:
        archive = _archive("arm64")
        names = archive.depends("libpython3-dev")
        unpack([archive.fetch_only(next(n for n in names if n.startswith("libpython3.")))], into)
        shutil.rmtree(into / "usr" / "lib")

    return _cached("headers", {"release": _RELEASE}, build)


def _bytecode(found: Images) -> Path:
    """The compiled modules of the checkout, so that not every machine has to compile them.

    Under emulation that takes half a minute. They are used unchecked: this is their sources' own.
    """
    from tests.lab.machine import Machine

    checkout = _HERE.parents[1]
    every = (path for part in _COMPILED for path in (checkout / part).rglob("*.py"))
    # Most tests run outside of the lab.
    sources = sorted(path for path in every if not path.name.startswith("test_"))
    recipe = {
        "release": _RELEASE,
        **{str(path.relative_to(checkout)): path.read_text() for path in sources},
    }

    def build(into: Path) -> None:
        with Machine(images=found) as machine:
            compiler = ["python3", "-c", _COMPILE, *_COMPILED]
            made = machine.run(compiler, timeout=600, check=True).stdout
        with tarfile.open(fileobj=BytesIO(made)) as archive:
            archive.extractall(into, filter="data")
        _forget_old("bytecode")

    return _cached("bytecode", recipe, build)


def _forget_old(name: str) -> None:
    """Remove all but the newest directories of that name: each change of the sources makes one."""
    made = sorted(cache().glob(f"{name}-*"), key=lambda path: path.stat().st_mtime)
    for old in made[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _warm(found: Images) -> None:
    """Boot the new root once for real, and leave in it what is computed only once.

    Python compiles its modules, AppArmor its profiles, and libvirt asks QEMU what it can do.
    """
    from tests.lab import libvirt  # they import this module
    from tests.lab.machine import Machine

    with _locked():
        mark = found.root.with_suffix(".warm")
        if mark.exists():
            return
        print("lab: filling caches in the lab ...", file=sys.stderr, flush=True)
        with Machine(images=found, keep_writes=True) as machine:
            modules = (
                "click, concurrent.futures, ctypes, fcntl, hypothesis, hypothesis.extra.numpy,"
                " json, logging, mmap, msgpack, numpy, platform, pytest, queue, rich.console,"
                " rich.progress, rich.table, socket, tempfile, xxhash, zstandard"
            )
            machine.run(["python3", "-c", f"import {modules}"], timeout=300, check=True)
            machine.run(["python3", "-m", "pytest", "--version"], timeout=300, check=True)
            machine.sh(OWNERS)
            libvirt.warm(machine)
        mark.touch()
