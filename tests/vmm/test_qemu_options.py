"""Where a QEMU's command line lets a monitor listen; command lines as managers write them."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtetool.vmm import qemu_options
from mtetool.vmm.qemu_options import SocketAddress

PROXMOX = """
/usr/bin/kvm -id 104 -name files01,debug-threads=on -no-shutdown
-chardev socket,id=qmp,path=/var/run/qemu-server/104.qmp,server=on,wait=off
-mon chardev=qmp,mode=control
-chardev socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect=5
-mon chardev=qmp-event,mode=control
-pidfile /var/run/qemu-server/104.pid -daemonize -smp 2,sockets=1,cores=2,maxcpus=2 -nodefaults
-vnc unix:/var/run/qemu-server/104.vnc,password=on -m 2048 -machine type=virt+pve0
"""
LIBVIRT = """
/usr/bin/qemu-system-aarch64 -name guest=web,debug-threads=on -S
-object {"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/key"}
-machine virt,usb=off,gic-version=3 -accel kvm -cpu host -m size=1048576k
-uuid 0a5b7c3e-2d11-4c0e-9d6f-3f1f2b9a7c55 -display none -no-user-config -nodefaults
-chardev socket,id=charmonitor,fd=31,server=on,wait=off
-mon chardev=charmonitor,id=monitor,mode=control -rtc base=utc -no-shutdown
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
"""
LIBVIRT_WITH_A_SECOND_ONE = LIBVIRT + "-qmp unix:/run/second.sock,server=on,wait=off"
KUBEVIRT = """
/usr/libexec/qemu-kvm -name guest=default_testvm,debug-threads=on -S
-smbios type=1,manufacturer=KubeVirt,product=None -no-user-config -nodefaults
-chardev socket,id=charmonitor,fd=19,server=on,wait=off
-mon chardev=charmonitor,id=monitor,mode=control
-chardev socket,id=charserial0,fd=17,server=on,wait=off
-chardev socket,id=charchannel0,path=/run/kubevirt-private/agent.sock,server=on,wait=off
"""
KATA = """
/opt/kata/bin/qemu-system-aarch64 -name sandbox-7e4a,debug-threads=on -uuid 90a1 -cpu host,pmu=off
-qmp unix:fd=3,server=on,wait=off
-monitor unix:path=/run/vc/vm/7e4a/hmp.sock,server=on,wait=off -m 2048M,slots=10,maxmem=9000M
-chardev socket,id=charconsole0,path=/run/vc/vm/7e4a/console.sock,server=on,wait=off
-chardev socket,id=char-1b2c,path=/run/vc/vm/7e4a/vhost-fs.sock -daemonize -no-reboot -nographic
"""
LIMA = """
qemu-system-aarch64 -m 4096 -nographic -chardev null,id=char-null -monitor none
-chardev socket,id=char-serial,path=/home/u/.lima/x/serial.sock,server=on,wait=off,logfile=/s.log
-serial chardev:char-serial
-chardev socket,id=char-qmp,path=/home/u/.lima/x/qmp.sock,server=on,wait=off -qmp chardev:char-qmp
"""
INCUS = """
/opt/incus/bin/qemu-system-aarch64 -S -name c1 -uuid 33d1 -daemonize -cpu host -nographic
-serial chardev:console -nodefaults -no-user-config -sandbox on,obsolete=deny,spawn=allow
-readconfig /run/incus/c1/qemu.conf -pidfile /run/incus/c1/qemu.pid -D /var/log/incus/c1/qemu.log
"""
INCUS_CONFIG = """\
# Machine
[machine]
graphics = "off"
type = "virt"

# Qemu control
[chardev "monitor"]
backend = "socket"
path = "/run/incus/c1/qemu.monitor"
server = "on"
wait = "off"

[mon]
chardev = "monitor"
mode = "control"

# Console
[chardev "console"]
backend = "socket"
path = "/run/incus/c1/qemu.console"
server = "on"
wait = "off"
"""


def _found(words: str, config: str = "") -> list[str]:
    read = {"/run/incus/c1/qemu.conf": config}
    found = qemu_options.monitors(shlex.split(words), lambda path: read.get(path, ""))
    return [str(address) for address in found]


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        (PROXMOX, ["/var/run/qemu-server/104.qmp"]),
        (LIBVIRT.replace("{", "'{").replace("}", "}'"), []),
        (LIBVIRT_WITH_A_SECOND_ONE.replace("{", "'{").replace("}", "}'"), ["/run/second.sock"]),
        (KUBEVIRT, []),
        (KATA, []),
        (LIMA, ["/home/u/.lima/x/qmp.sock"]),
        (INCUS, ["/run/incus/c1/qemu.monitor"]),
        # The ways to write a monitor.
        ("q -qmp unix:/q,server=on,wait=off", ["/q"]),
        ("q --qmp unix:/q,server,nowait", ["/q"]),
        ("q -qmp unix:path=/q,server=yes", ["/q"]),
        ("q -qmp-pretty unix:/q,server=true", ["/q"]),
        ("q -qmp unix:relative/q,server=y", ["relative/q"]),
        ("q -qmp unix:/with,,comma,,,server=on", ["/with,comma,"]),
        ("q -chardev socket,id=m,path=/m,server=on -mon chardev=m,mode=control", ["/m"]),
        ("q -mon m,mode=control -chardev socket,id=m,path=/m,server=on", ["/m"]),
        ("q -mon m,mode=control,pretty=on -chardev backend=socket,path=/m,id=m,server", ["/m"]),
        ("q -chardev socket,path=/m,id=m,server -object monitor-qmp,id=o,chardev=m", ["/m"]),
        (
            "q -chardev socket,path=/m,id=m,server"
            """ -object '{"qom-type":"monitor-qmp","id":"o","chardev":"m"}'""",
            ["/m"],
        ),
        ("q -qmp unix:name,server=on,abstract=on", ["@name"]),
        ("q -qmp unix:/1,server -qmp unix:/2,server", ["/1", "/2"]),
        ("q -qmp unix:/1,path=/2,server=off,server=on", ["/2"]),
        (
            "q -chardev socket,id=m,path=/1,server -mon m,mode=control -set chardev.m.path=/2",
            ["/2"],
        ),
        # Monitors that are passed over.
        ("q -qmp unix:/q", []),
        ("q -qmp unix:/q,server=off", []),
        ("q -qmp unix:/q,noserver", []),
        ("q -qmp unix:/q,server=on,fd=3", []),
        ("q -qmp unix:/q,server=on,websocket=on", []),
        ("q -qmp unix:/q,server=on,telnet=on", []),
        ('q -object \'{"qom-type":' + "[" * 200_000 + "'", []),
        ("q -qmp unix:,server=on", []),
        ("q -qmp tcp:localhost:4444,server=on", []),
        ("q -qmp tcp:unix:/q,server=on", []),
        ("q -qmp none -qmp stdio -qmp chardev:unknown -qmp mon:unix:/q,server", []),
        ("q -monitor unix:/q,server=on", []),
        ("q -chardev socket,id=m,path=/m,server=on -mon chardev=m", []),
        ("q -chardev socket,id=m,path=/m,server=on -mon chardev=m,mode=readline", []),
        ("q -chardev file,id=m,path=/m,server=on -mon chardev=m,mode=control", []),
        ("q -chardev pipe,id=m,path=/m -mon chardev=m,mode=control", []),
        ("q -chardev socket,id=m,host=::,port=1,server=on -mon chardev=m,mode=control", []),
        ("q -object monitor-hmp,id=o,chardev=m -chardev socket,id=m,path=/m,server=on", []),
        # A word that looks like an option can be a value; a word after a flag is not its value.
        ("q -name -qmp unix:/q,server=on", []),
        ("q -append -qmp -qmp unix:/q,server=on", ["/q"]),
        ("q -append '-qmp unix:/no,server=on'", []),
        ("q -nodefaults -qmp unix:/q,server=on", ["/q"]),
        ("q disk.img -qmp unix:/q,server=on", ["/q"]),
        ("-qmp unix:/q,server=on", []),
        ("q -qmp", []),
        ("q", []),
        ("", []),
    ],
)
def test_monitors_of_a_command_line(words: str, paths: list[str]) -> None:
    assert _found(words, INCUS_CONFIG) == paths


@pytest.mark.parametrize(
    "config",
    [
        "",
        "[chardev",
        '[chardev "monitor"]\nbackend = socket\n',
        INCUS_CONFIG.replace('server = "on"', 'server = "off"'),
        INCUS_CONFIG.replace("control", "readline"),
        INCUS_CONFIG.replace('"monitor"', '"other"', 1),
    ],
)
def test_config_without_a_monitor(config: str) -> None:
    assert _found(INCUS, config) == []


def test_abstract_names_are_padded_when_that_is_asked() -> None:
    for more, padded in (("", False), (",tight=on", False), (",tight=off", True)):
        words = ["q", "-qmp", f"unix:n,server,abstract=on{more}"]
        assert qemu_options.monitors(words, lambda path: "") == [SocketAddress("n", True, padded)]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (PROXMOX, "files01"),
        (KUBEVIRT, "default_testvm"),
        (INCUS, "c1"),
        ("q -name guest=a,,b", "a,b"),
        ("q --name debug-threads=on,guest=x", "x"),
        ("q -name process=x", None),
        ("q -name one -name two", "two"),
        ("q -append -name -m 1", None),
        ("q -readconfig /run/incus/c1/qemu.conf", "configured"),
    ],
)
def test_name_of_a_guest(words: str, name: str | None) -> None:
    config = '[name]\nguest = "configured"\n'
    read = {"/run/incus/c1/qemu.conf": config} if "-S" not in words else {}
    assert qemu_options.guest_name(words.split(), lambda path: read.get(path, "")) == name


_PARTS = (
    '-qmp -mon -chardev -object -readconfig -name -set - -- { } [ ] " = , ,, : unix: socket path'
    " server on id chardev mode control fd abstract no qom-type monitor-qmp \n \\ chardev.a.b=c"
)
_WORDS = st.lists(
    st.one_of(
        st.text(),
        st.lists(st.sampled_from(_PARTS.split(" ")), max_size=12).map("".join),
        st.sampled_from(_PARTS.split(" ")),
    )
)


@given(_WORDS, st.lists(st.sampled_from(_PARTS.split(" "))).map("".join))
def test_no_command_line_raises(words: list[str], config: str) -> None:
    for address in qemu_options.monitors(words, lambda path: config):
        assert address.path
    qemu_options.guest_name(words, lambda path: config)


@given(st.text(st.characters(exclude_characters="\0"), min_size=1))
def test_any_path_is_found_as_it_was_written(path: str) -> None:
    words = ["q", "-chardev", f"socket,id=m,path={path.replace(',', ',,')},server=on"]
    found = qemu_options.monitors([*words, "-mon", "m,mode=control"], lambda path: "")
    assert found == [SocketAddress(path)]


@pytest.mark.parametrize("value", ["," * 10**6, "a=b," * 10**5, ",," * 10**6, "{" * 10**6])
def test_a_long_value_takes_no_time(value: str) -> None:
    words = ["q", *("-chardev", value), *("-object", value), *("-qmp", f"unix:{value}")]
    assert all(a.path for a in qemu_options.monitors(words, lambda path: value))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("-name guest=web,debug-threads=on -S -uuid ABCD-1", ("web", "abcd-1")),
        ("-uuid 1 -name guest=a,,b", ("a,b", "1")),
        ("-name web -uuid 1", None),
        ("-name guest=web", None),
        ("-uuid 1", None),
        ("-name guest= -uuid 1", None),
        ("-append -uuid -name guest=web", None),
        ("", None),
    ],
)
def test_domain_of_libvirt(line: str, named: tuple[str, str] | None) -> None:
    found = qemu_options.domain(["qemu", *line.split()])
    assert (found and (found.name, found.uuid)) == named
