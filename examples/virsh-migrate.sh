#!/bin/sh
# Move a running domain of libvirt to another host, live, with its MTE tags.
#
#   virsh-migrate.sh DOMAIN HOST [OPTION OF virsh migrate]...
#
# Both hosts are set up as mtetool-libvirt(7) describes, and HOST lets root in by ssh. These
# variables replace what the script derives from HOST:
#
#   FROM    libvirt at the source, as seen here            qemu:///system
#   TO      libvirt at the destination, as seen here       qemu+ssh://root@HOST/system
#   REMOTE  the command that runs a command there          ssh root@HOST, with time limits
#   SOCKET  the migration socket, the same on both hosts   /run/mtetool/relay/UUID.sock
#   TUNNEL  ssh, to forward a socket there for the disks   ssh root@HOST, with time limits
#
# With --copy-storage-all, HOST needs an image for each disk at the same path, of the same size.
#
# The guest runs all the while. If anything fails, it goes on at the source.
set -eu

if [ $# -lt 2 ]; then
    sed -n '2,/^set -eu/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
domain=$1 host=$2
shift 2
disks=no
for option; do
    case $option in
    --postcopy*) instead="leave it out: tags cannot follow a guest that has started" ;;
    --parallel*) instead="leave it out: tags go beside one connection, which the relays compress" ;;
    --tls*) instead="leave it out: the relays encrypt, by ssh or with certificates" ;;
    --tunnelled) instead="leave it out, or use --p2p without it: the relays are the tunnel" ;;
    --migrateuri* | --disks-uri*) instead="set SOCKET" ;;
    --copy-storage-*) disks=yes && continue ;;
    *) continue ;;
    esac
    echo "virsh-migrate: $option does not go with tags: $instead" >&2
    exit 2
done
# A host that is lost is noticed within seconds, not after minutes of TCP's patience.
ssh="ssh -o ConnectTimeout=10 -o ServerAliveInterval=5 root@$host"
from=${FROM:-qemu:///system} to=${TO:-qemu+ssh://root@$host/system}
remote=${REMOTE-$ssh} mtetool=${MTETOOL:-mtetool}
uuid=$(virsh -c "$from" domuuid "$domain" | sed -n 1p)
socket=${SOCKET:-/run/mtetool/relay/$uuid.sock}
disk_socket=${socket%.sock}-disks.sock
relay='' tunnel='' moved=no

# A second run for the same domain would take this one's sockets away.
lock=${socket%.sock}.lock
exec 9>"$lock"
if ! python3 -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null; then
    echo "virsh-migrate: $domain is being moved already; wait for that, or end it" >&2
    exit 2
fi

finish() {
    status=$?
    trap - EXIT
    if [ $moved = no ]; then
        [ -z "$relay" ] || kill "$relay" 2>/dev/null || true
        echo "virsh-migrate: failed; $domain is at the source, as before" >&2
    fi
    [ -z "$tunnel" ] || kill "$tunnel" 2>/dev/null || true
    rm -f "$socket" "$disk_socket" "$lock"
    $remote rm -f "$socket" "$disk_socket" || true # a QEMU that was ended leaves its sockets
    exit "$status"
}
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# Nothing of an earlier attempt may be taken for the QEMU that libvirt is about to start there.
$remote rm -f "$socket" "$disk_socket"
if [ $disks = yes ]; then
    # Disks have no tags: QEMU writes them to its peer by NBD, beside the relays.
    ${TUNNEL:-$ssh} -N -o ExitOnForwardFailure=yes -o StreamLocalBindUnlink=yes \
        -L "$disk_socket:$disk_socket" &
    tunnel=$!
    until [ -S "$disk_socket" ]; do
        kill -0 $tunnel 2>/dev/null || wait $tunnel
        sleep 0.2
    done
    set -- "$@" --disks-uri "unix://$disk_socket"
fi
"$mtetool" relay source --from "listen:unix:$socket" --listen-first \
    --to "exec:$remote $mtetool relay destination --from - --to unix:$socket" &
relay=$!
until [ -S "$socket" ]; do
    kill -0 $relay 2>/dev/null || wait $relay
    sleep 0.2
done

virsh -c "$from" migrate --live "$@" --migrateuri "unix://$socket" "$uuid" "$to"
moved=yes
wait $relay
echo "virsh-migrate: $domain is at $host, with its tags"
