"""What MTE breaks of a QEMU's command line; command lines as managers write them."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtetool.vmm.mte_limits import Limit, Memory, limits, qemu

LIBVIRT = """
/usr/bin/qemu-system-aarch64 -name guest=web,debug-threads=on -S
-object '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/key"}'
-machine virt,usb=off,gic-version=3,memory-backend=mach-virt.ram -accel kvm -cpu host
-m size=1048576k %s -uuid 0a5b7c3e-2d11-4c0e-9d6f-3f1f2b9a7c55 -no-user-config -nodefaults
-device '{"driver":"pcie-root-port","port":8,"chassis":1,"id":"pci.1","multifunction":true}'
-netdev '{"type":"tap","fd":"33","vhost":true,"vhostfd":"35","id":"hostnet0"}'
-device '{"driver":"virtio-net-pci","netdev":"hostnet0","id":"net0","mac":"52:54:00:1:2:3"}'
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
"""
RAM = '{"qom-type":"memory-backend-ram","id":"mach-virt.ram","size":1073741824}'
SHARED_FILE = (
    '{"qom-type":"memory-backend-file","id":"mach-virt.ram","share":true,"prealloc":true,'
    '"mem-path":"%s","size":1073741824}'
)
MEMFD = '{"qom-type":"memory-backend-memfd","id":"mach-virt.ram","share":true,"size":1073741824}'
HUGE_MEMFD = MEMFD.replace('"share"', '"hugetlb":true,"hugetlbsize":2097152,"share"')
HOSTDEV = '{"driver":"vfio-pci","host":"0000:06:12.5","id":"hostdev0","bus":"pci.2","addr":"0x0"}'
PROXMOX = """
/usr/bin/kvm -id 104 -name files01,debug-threads=on -no-shutdown -daemonize -smp 2,maxcpus=2
-chardev socket,id=qmp,path=/var/run/qemu-server/104.qmp,server=on,wait=off
-mon chardev=qmp,mode=control -nodefaults -m 2048
-object memory-backend-file,id=ram-node0,size=2048M,mem-path=/run/hugepages/kvm/2048kB,share=on
-numa node,nodeid=0,cpus=0-1,memdev=ram-node0
-device vfio-pci,host=0000:01:00.0,id=hostpci0,bus=ich9-pcie-port-1,addr=0x0,rombar=0
-device virtio-net-pci,mac=BC:24:11:00:00:01,netdev=net0,bus=pci.0,addr=0x12,id=net0
-machine type=virt+pve0
"""
INCUS = "/opt/incus/bin/qemu-system-aarch64 -S -name c1 -readconfig /run/incus/c1/qemu.conf"
INCUS_CONFIG = """\
# Memory
[object "mem0"]
qom-type = "memory-backend-file"
mem-path = "/dev/hugepages/incus"
size = "1024M"
share = "on"

[numa]
type = "node"
memdev = "mem0"

# GPU card
[device "dev-incus_gpu"]
driver = "vfio-pci"
host = "0000:01:00.0"
"""

REFUSES = "KVM refuses {} in a VM with MTE, and QEMU will abort {}"
MAY_REFUSE = "KVM may refuse {} in a VM with MTE, and QEMU would abort {}"
AS_MEMORY = "as soon as the guest gets this memory"
AS_DEVICE = "when the guest enables this device"
IF_MAPPED = "if this device maps such memory into the guest"
FILE = REFUSES.format("memory of a file outside tmpfs", AS_MEMORY)
MAYBE_FILE = MAY_REFUSE.format("memory of a file outside tmpfs", AS_MEMORY)
HUGE = REFUSES.format("huge pages", AS_MEMORY)
SHARED = REFUSES.format("shared memory", AS_MEMORY)
DEVICE = REFUSES.format("device memory", AS_DEVICE)
MAPS_DEVICE = MAY_REFUSE.format("device memory", IF_MAPPED)
MAPS_FILE = MAY_REFUSE.format("memory of a file outside tmpfs", IF_MAPPED)


@dataclass
class Host:
    """A host with some file systems, on a kernel that accepts what `accepted` says."""

    accepted: dict[Memory, bool | None] = field(
        default_factory=lambda: {"device": False, "huge": False, "shmem": True, "file": False}
    )
    asked: list[str] = field(default_factory=list)

    def accepts(self, memory: Memory) -> bool | None:
        self.asked.append(memory)
        return self.accepted.get(memory)

    def memory_at(self, path: str) -> Memory | None:
        self.asked.append(path)
        known: dict[str, Memory] = {"/var": "file", "/dev/shm": "shmem", "/tmp": "shmem"}
        if "hugepages" in path:
            return "huge"
        return next((known[each] for each in known if path.startswith(each)), None)


def _limits(line: str, host: Host | None = None, config: str = "") -> list[Limit]:
    return limits(shlex.split(line), lambda path: config, host or Host())


def _found(line: str, host: Host | None = None, config: str = "") -> list[str]:
    return [limit.why for limit in _limits(line, host, config)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (f"-object '{RAM}'", []),
        (f"-object '{MEMFD}'", []),
        (f"-object '{HUGE_MEMFD}'", [HUGE]),
        (f"-object '{SHARED_FILE % '/var/lib/libvirt/qemu/ram/1-web/mach-virt.ram'}'", [FILE]),
        (f"-object '{SHARED_FILE % '/dev/hugepages/libvirt/qemu/1-web'}'", [HUGE]),
        (f"-object '{SHARED_FILE % '/dev/shm/web'}'", []),
        (f"-object '{SHARED_FILE % '/new/file/system'}'", [MAYBE_FILE]),
        (f"-device '{HOSTDEV}'", [DEVICE]),
        (f"-object '{RAM}' -device '{HOSTDEV}' -device '{HOSTDEV}'", [DEVICE, DEVICE]),
    ],
)
def test_libvirt(options: str, expected: list[str]) -> None:
    assert _found(LIBVIRT % options) == expected


def test_the_words_concerned_are_those_of_the_command_line() -> None:
    assert [limit.what for limit in _limits(PROXMOX)] == [
        "-object memory-backend-file,id=ram-node0,size=2048M,mem-path=/run/hugepages/kvm/2048kB,"
        "share=on",
        "-device vfio-pci,host=0000:01:00.0,id=hostpci0,bus=ich9-pcie-port-1,addr=0x0,rombar=0",
    ]
    assert [limit.what for limit in _limits(LIBVIRT % f"-device '{HOSTDEV}'")] == [
        f"-device {HOSTDEV}"
    ]
    assert [limit.what for limit in _limits(INCUS, config=INCUS_CONFIG)] == [
        '-readconfig /run/incus/c1/qemu.conf [object "mem0"]',
        '-readconfig /run/incus/c1/qemu.conf [device "dev-incus_gpu"]',
    ]


def test_proxmox_and_incus() -> None:
    assert _found(PROXMOX) == [HUGE, DEVICE]
    assert _found(INCUS, config=INCUS_CONFIG) == [HUGE, DEVICE]
    assert _found(INCUS) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("-m 1G", []),
        ("-mem-path /var/ram", [FILE]),
        ("--mem-path /var", [FILE]),
        ("-mem-path /tmp", []),
        ("-mem-path /dev/hugepages", [HUGE]),
        ("-mem-path relative", [MAYBE_FILE]),
        ("-object memory-backend-file,id=m,size=1G,mem-path=/var/with,,comma", [FILE]),
        ("-object qom-type=memory-backend-file,id=m,size=1G,mem-path=/var/ram", [FILE]),
        ("-object memory-backend-file,id=m,size=1G,mem-path=/tmp/ram,share=on", []),
        ("-object memory-backend-memfd,id=m,size=1G,hugetlb=on", [HUGE]),
        ("-object memory-backend-memfd,id=m,size=1G,hugetlb", [HUGE]),
        ("-object memory-backend-memfd,id=m,size=1G,hugetlb=off", []),
        ("-object memory-backend-shm,id=m,size=1G", []),
        ("-object iothread,id=io", []),
        # The object names the file of an NVDIMM and of the like.
        (
            "-object memory-backend-file,id=n,size=1G,mem-path=/var/nvdimm,share=on"
            " -device nvdimm,id=nvdimm1,memdev=n -device virtio-pmem-pci,memdev=n"
            " -device ivshmem-plain,memdev=n",
            [FILE],
        ),
        ("-device vfio-pci,host=01:00.0", [DEVICE]),
        ("-device driver=vfio-pci,host=01:00.0", [DEVICE]),
        ("-device vfio-pci,host=01:00.0,x-no-mmap=on", []),
        ("-device vfio-pci,host=01:00.0,x-no-mmap=off", [DEVICE]),
        ('-device \'{"driver":"vfio-pci","x-no-mmap":true}\'', []),
        ("-device vfio-platform,host=fff51000.ethernet", [DEVICE]),
        ("-device vfio-pci-nohotplug,sysfsdev=/sys/bus/mdev/devices/x", [DEVICE]),
        ("-device virtio-gpu-gl-pci,hostmem=8G,blob=on", [MAPS_DEVICE]),
        ("-device virtio-vga-gl,hostmem=8G", [MAPS_DEVICE]),
        ("-device virtio-gpu-pci", []),
        ("-device virtio-gpu-pci,hostmem=0", []),
        ("-device vhost-user-fs-pci,chardev=c,tag=t,cache-size=2G", [MAPS_FILE]),
        ("-device vhost-user-fs-pci,chardev=c,tag=t", []),
        ("-device ivshmem-doorbell,chardev=c,vectors=2", [MAPS_FILE]),
        ("-netdev vhost-vdpa,id=n,vhostdev=/d -device virtio-net-pci,netdev=n", []),
        (
            "-device virtio-net-pci,netdev=n,page-per-vq=on -netdev type=vhost-vdpa,id=n",
            [MAPS_DEVICE],
        ),
        (
            """-netdev '{"type":"vhost-user","id":"n","chardev":"c"}'"""
            """ -device '{"driver":"virtio-net-pci","netdev":"n","page-per-vq":true}'""",
            [MAPS_DEVICE],
        ),
        ("-netdev tap,id=n -device virtio-net-pci,netdev=n,page-per-vq=on", []),
        ("-device vhost-vdpa-device-pci,vhostdev=/d,page-per-vq=on", [MAPS_DEVICE]),
        # Values that look like options.
        ("-append -mem-path -name /var", []),
        ("-append '-device vfio-pci'", []),
        ("-device", []),
        ("-mem-path", [MAYBE_FILE]),
        ("-device '{\"driver\":'", []),
        ('-device \'{"driver":["vfio-pci"]}\'', []),
    ],
)
def test_each_option(options: str, expected: list[str]) -> None:
    assert _found(f"qemu-system-aarch64 {options}") == expected


@pytest.mark.parametrize(
    ("memory", "options"),
    [
        ("device", "-device vfio-pci,host=01:00.0"),
        ("huge", "-mem-path /dev/hugepages"),
        ("huge", "-object memory-backend-memfd,id=m,size=1G,hugetlb=on"),
        ("shmem", "-object memory-backend-memfd,id=m,size=1G"),
        ("shmem", "-object memory-backend-shm,id=m,size=1G"),
        ("shmem", "-object memory-backend-ram,id=m,size=1G,share=on"),
        ("shmem", "-object memory-backend-file,id=m,size=1G,mem-path=/tmp,share=on"),
    ],
)
def test_what_the_kernel_decides(memory: Memory, options: str) -> None:
    line = f"qemu-system-aarch64 {options}"
    assert _found(line, Host({memory: True})) == []
    (refused,) = _found(line, Host({memory: False}))
    assert "refuses" in refused
    (unknown,) = _found(line, Host({}))
    assert "may refuse" in unknown


@pytest.mark.parametrize(
    "options", ["memfd,id=m,size=1G,share=off", "ram,id=m,size=1G", "file,id=m,mem-path=/tmp/x"]
)
def test_memory_that_is_not_shared(options: str) -> None:
    line = f"qemu-system-aarch64 -object memory-backend-{options}"
    assert _found(line, Host({"shmem": False})) == []


@pytest.mark.parametrize(
    ("line", "is_qemu"),
    [
        ("kvm", True),
        ("/usr/libexec/qemu-kvm", True),
        ("/nix/store/x/.qemu-system-aarch64-wrapped", True),
        ("nice -n 5 numactl --membind=0 qemu-system-aarch64", True),
        ("crosvm run --hypervisor kvm", False),
        ("qemu-img create", False),
        ("/opt/qemu-system/bin/lkvm run", False),
        ("sh -c exec", False),
        ("", False),
    ],
)
def test_other_vmms_have_no_limits(line: str, is_qemu: bool) -> None:
    assert _found(f"{line} -device vfio-pci,host=01:00.0") == ([DEVICE] if is_qemu else [])


def test_the_wrappers_words_are_not_qemus() -> None:
    words = ["taskset", "-mem-path", "0", "qemu-system-aarch64", "-m", "1G"]
    assert qemu(words) == words[3:]
    assert _found(" ".join(words)) == []


def test_a_host_is_asked_only_what_matters_and_once() -> None:
    host = Host()
    assert _found("qemu-system-aarch64 -m 1G -device virtio-net-pci", host) == []
    assert host.asked == []
    assert len(_found("qemu-system-aarch64 " + "-mem-path /var " * 5, host)) == 5
    assert host.asked == ["/var", "file"]
    paths = " ".join(f"-mem-path /var/{number}" for number in range(1000))
    assert len(_found(f"qemu-system-aarch64 {paths}", host)) == 1000
    assert len(host.asked) < 50


_PARTS = (
    '-mem-path -object -device -netdev -readconfig -append - { } [ ] " = , ,, : driver qom-type'
    " vfio-pci memory-backend-file memory-backend-memfd hugetlb on share mem-path /var /tmp id n"
    ' x-no-mmap page-per-vq netdev vhost-vdpa type hostmem virtio-gpu-pci {"driver":"vfio-pci"}'
    ' {"qom-type":"memory-backend-file","mem-path":"\\u0000"} [device [object \n kvm qemu-kvm'
)
_VALUES = st.one_of(
    st.text(),
    st.lists(st.sampled_from(_PARTS.split(" ")), max_size=12).map("".join),
    st.sampled_from(_PARTS.split(" ")),
)
_OPTIONS = st.sampled_from(["-mem-path", "-object", "-device", "-netdev", "-readconfig", "-append"])
_WORDS = st.lists(st.one_of(_VALUES.map(lambda value: (value,)), st.tuples(_OPTIONS, _VALUES))).map(
    lambda pairs: [word for pair in pairs for word in pair]
)


@given(_WORDS, st.lists(st.sampled_from(_PARTS.split(" "))).map("".join))
def test_no_command_line_raises(words: list[str], config: str) -> None:
    for limit in limits(["kvm", *words], lambda path: config, Host()):
        assert limit.what.startswith("-")
        assert limit.why.startswith("KVM ")
    limits(words, lambda path: config, Host({}))


@pytest.mark.parametrize(
    "value",
    [
        "," * 10**6,
        "a=b," * 10**5,
        "{" * 10**6,
        "[" * 10**6,
        '{"driver":"vfio-' + "x" * 10**6 + '"}',
    ],
)
def test_a_long_command_line_takes_no_time(value: str) -> None:
    words = ["kvm", *("-device", value), *("-object", value), *("-mem-path", value)]
    many = ["-device", "vfio-pci", "-mem-path", "x", "-readconfig", "y" * 4000] * 5000
    config = '[device]\ndriver="vfio-pci"\n' * 2
    started = time.process_time()
    assert len(limits([*words, *many], lambda path: config, Host())) >= 20_000
    assert time.process_time() - started < 20
