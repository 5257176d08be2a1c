#!/bin/sh
# Move a domain of libvirt, with its MTE tags, to another host. The guest is paused meanwhile.
#
#   migrate-libvirt.sh DOMAIN HOST [OPTION OF virsh migrate]...
#
# Both hosts are set up as mtetool-libvirt(7) describes, and HOST lets root in by ssh. These
# variables replace what the script derives from HOST:
#
#   FROM   libvirt at the source, as seen here             qemu:///system
#   TO     libvirt at the destination, as seen here        qemu+ssh://root@HOST/system
#   THERE  libvirt at the destination, as seen there       qemu:///system
#   REMOTE the command that runs a command there           ssh root@HOST
#   SOCKET the migration socket, the same on both hosts    /run/mtetool-migrate-UUID.sock
#
# How it works: while libvirt has set up the migration, but before any memory has moved, the tags
# are restored at the destination and read back. Only then the stream is let through. If anything
# fails before that, the domain goes on at the source.
set -eu

if [ $# -lt 2 ]; then
    sed -n '2,/^set -eu/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
domain=$1 host=$2
shift 2
from=${FROM:-qemu:///system} to=${TO:-qemu+ssh://root@$host/system} there=${THERE:-qemu:///system}
remote=${REMOTE:-ssh root@$host} mtetool=${MTETOOL:-mtetool}
uuid=$(virsh -c "$from" domuuid "$domain" | sed -n 1p)
socket=${SOCKET:-/run/mtetool-migrate-$uuid.sock}
work=$(mktemp -d)
far=/run/mtetool-migrate-$uuid
state=$(virsh -c "$from" domstate "$domain" | sed -n 1p)
was_running=no on_target=no gate='' migration=''

finish() {
    status=$?
    trap - EXIT
    if [ "$status" -ne 0 ] && [ $on_target = no ]; then
        [ -z "$gate" ] || kill "$gate" 2>/dev/null || true # the stream breaks
        if [ -n "$migration" ]; then
            virsh -c "$from" domjobabort "$uuid" >/dev/null 2>&1 || true
            wait "$migration" 2>/dev/null || true
        fi
        [ $was_running = no ] || virsh -c "$from" resume "$uuid" >/dev/null || true
        echo "migrate: failed; the domain is at the source, as before" >&2
    fi
    $remote rm -rf "$far" "$socket" || true # a QEMU that was ended leaves its socket
    rm -rf "$work" "$socket"
    exit "$status"
}
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

case $state in
running) was_running=yes && virsh -c "$from" suspend "$uuid" >/dev/null ;;
paused) ;;
*)
    echo "migrate: $domain is \"$state\"; it must be running or paused" >&2
    exit 4
    ;;
esac
"$mtetool" save "libvirt:$uuid" --connect "$from" -o "$work/tags"

# What carries the stream at the destination.
cat >"$work/carry.py" <<'PYTHON'
import os, socket, sys, threading

connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])


def back():
    while data := connection.recv(1 << 20):
        while data:
            data = data[os.write(1, data) :]
    os.close(1)


threading.Thread(target=back, daemon=False).start()
while data := os.read(0, 1 << 20):
    connection.sendall(data)
connection.shutdown(socket.SHUT_WR)
PYTHON
$remote rm -rf "$far" "$socket"
$remote mkdir -p -m 700 "$far"
$remote dd "of=$far/tags" status=none <"$work/tags"
$remote dd "of=$far/carry.py" status=none <"$work/carry.py"

# The gate: libvirt's stream waits in this socket until a line says "go".
mkfifo "$work/go"
cat >"$work/gate.py" <<'PYTHON'
import os, socket, subprocess, sys

path, *command = sys.argv[1:]
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen(1)
open(f"{os.path.dirname(sys.argv[0])}/listens", "w").close()
stream, _ = listener.accept()
listener.close()
if sys.stdin.readline() == "go\n":
    sys.exit(subprocess.run(command, stdin=stream, stdout=stream).returncode)
PYTHON
# shellcheck disable=SC2086 # $remote is a command with its arguments
python3 "$work/gate.py" "$socket" $remote python3 "$far/carry.py" "$socket" <"$work/go" &
gate=$!
exec 3>"$work/go"
until [ -e "$work/listens" ]; do
    kill -0 $gate
    sleep 0.1
done

virsh -c "$from" migrate --live "$@" --migrateuri "unix://$socket" "$uuid" "$to" 3>&- &
migration=$!
until $remote test -S "$socket"; do
    kill -0 $migration 2>/dev/null || wait $migration
    sleep 0.2
done
$remote "$mtetool" restore "$far/tags" "libvirt:$uuid" --connect "$there" --no-monitor
echo go >&3
exec 3>&-
wait $migration
on_target=yes

# Nothing should have changed them since; that is checked before the guest runs.
$remote "$mtetool" verify "$far/tags" --against "libvirt:$uuid" --connect "$there" --no-monitor ||
    $remote "$mtetool" restore "$far/tags" "libvirt:$uuid" --connect "$there" --no-monitor || {
    echo "migrate: the domain is at $host, paused, without its tags: $far/tags is kept there" >&2
    trap - EXIT
    rm -rf "$work" "$socket"
    exit 3
}
[ $was_running = no ] || virsh -c "$to" resume "$uuid" >/dev/null
echo "migrate: $domain is at $host, with its tags"
