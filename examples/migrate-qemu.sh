#!/bin/sh
# Move a running QEMU guest, with its MTE tags, into a second QEMU.
#
#   migrate-qemu.sh SOURCE_PID SOURCE_QMP TARGET_PID TARGET_QMP MIGRATION_SOCKET
#
# The source QEMU runs the guest. Start it without mte=on (QEMU refuses to migrate a
# guest with it), and enable MTE from outside before its first vCPU:
#
#   qemu-system-aarch64 ... -preconfig -qmp unix:SOURCE_QMP,server=on,wait=off &
#   mtetool enable kvm:SOURCE_PID
#   qmp SOURCE_QMP x-exit-preconfig
#
# Start the target with the same command and "-incoming defer", and leave it in preconfig.
# No other client may be connected to the QMP sockets.
#
# Set TAGS=pipe to move the tags without a file. Between two hosts that line becomes
#   mtetool save kvm:PID -o - | ssh TARGET mtetool restore - kvm:PID
#
# If anything fails before the target runs, the script ends the target, and the guest goes on
# running at the source.
set -eu

if [ $# -ne 5 ]; then
    sed -n '2,/^set -eu/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
source_pid=$1 source_qmp=$2 target_pid=$3 target_qmp=$4 socket=$5
mtetool=${MTETOOL:-mtetool}
work=$(mktemp -d)

# qmp SOCKET COMMAND [JSON_ARGUMENTS]: run a command, print its return value.
qmp() {
    python3 - "$@" <<'PYTHON'
import json, socket, sys

path, command, *arguments = sys.argv[1:]
connection = socket.socket(socket.AF_UNIX)
connection.settimeout(60)
connection.connect(path)
stream = connection.makefile("rw")
stream.readline()
request = {"execute": command}
if arguments:
    request["arguments"] = json.loads(arguments[0])
for message in ({"execute": "qmp_capabilities"}, request):
    stream.write(json.dumps(message) + "\n")
    stream.flush()
    answer = json.loads(stream.readline())
    while "event" in answer:
        answer = json.loads(stream.readline())
if "error" in answer:
    sys.exit(f"{command}: {answer['error']['desc']}")
print(json.dumps(answer["return"]))
PYTHON
}

# Print the migration's state from the answer to query-migrate.
migration_state() {
    qmp "$1" query-migrate | sed -n 's/.*"status": "\([a-z-]*\)".*/\1/p'
}

on_target=no
finish() {
    status=$?
    trap - EXIT
    rm -rf "$work"
    if [ "$status" -ne 0 ] && [ $on_target = no ]; then
        echo "migrate: failed; the guest goes on at the source" >&2
        qmp "$target_qmp" quit >/dev/null 2>&1 || true
        qmp "$source_qmp" migrate_cancel >/dev/null 2>&1 || true
        qmp "$source_qmp" cont >/dev/null 2>&1 || true
    fi
    exit "$status"
}
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# The target: enable MTE before its first vCPU; "stop" keeps it from running when the whole
# stream has arrived, because the tags are not there yet.
"$mtetool" enable "kvm:$target_pid"
qmp "$target_qmp" x-exit-preconfig >/dev/null
qmp "$target_qmp" stop >/dev/null
qmp "$target_qmp" migrate-incoming "{\"uri\": \"unix:$socket\"}" >/dev/null

# QEMU's own migration; after it the guest stands still on both sides.
qmp "$source_qmp" migrate "{\"uri\": \"unix:$socket\"}" >/dev/null
state=setup
while [ "$state" != completed ]; do
    case $state in
    failed | cancelled)
        echo "migrate: QEMU's migration ended as \"$state\"" >&2
        exit 1
        ;;
    esac
    sleep 0.2
    state=$(migration_state "$source_qmp")
done

# The tags. Every failure, including a partial copy, exits through finish().
if [ "${TAGS:-file}" = pipe ]; then
    # A pipeline returns only the last command's status: keep the first one's in a file.
    { "$mtetool" save "kvm:$source_pid" --qmp "$source_qmp" -o - || echo $? >"$work/failed"; } |
        "$mtetool" restore - "kvm:$target_pid" --qmp "$target_qmp"
    [ ! -e "$work/failed" ] || exit "$(cat "$work/failed")"
else
    "$mtetool" save "kvm:$source_pid" --qmp "$source_qmp" -o "$work/guest.mtesnap"
    "$mtetool" restore "$work/guest.mtesnap" "kvm:$target_pid" --qmp "$target_qmp"
fi

on_target=yes
qmp "$target_qmp" cont >/dev/null
qmp "$source_qmp" quit >/dev/null
echo "migrate: the guest runs in process $target_pid"
