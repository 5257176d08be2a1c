#!/bin/sh
# Save a QEMU guest to one file, with its MTE tags, and bring it back; without libvirt.
#
#   save-vm.sh save QMP FILE
#   save-vm.sh load QMP FILE
#
# QMP is the monitor socket of a QEMU that was started by "mtetool exec -- qemu-system-aarch64 ...",
# without mte=on; to load, by the same command line with "-incoming defer". After a save the guest
# stands still: end its QEMU. If the save fails, the guest goes on, and there is no file. If the
# load fails, the guest does not start, and the file is as it was.
#
# A QEMU with "-sandbox on,spawn=deny" cannot start a command: let it migrate to "fd:", one end of a
# pipe, with mtetool relay at the other.
set -eu

if [ $# -ne 3 ] || { [ "$1" != save ] && [ "$1" != load ]; }; then
    sed -n '2,/^set -eu/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
task=$1 monitor=$2 file=$(realpath "$3")
mtetool=$(command -v "${MTETOOL:-mtetool}")

# qmp COMMAND [JSON_ARGUMENTS]: run a command, print its return value.
qmp() {
    python3 - "$monitor" "$@" <<'PYTHON'
import json, socket, sys

path, command, *arguments = sys.argv[1:]
connection = socket.socket(socket.AF_UNIX)
connection.settimeout(600)  # QEMU answers nobody while it waits for the relay's end
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

# What QEMU says of the migration, once it has ended.
migrated() {
    while :; do
        state=$(qmp query-migrate | sed -n 's/.*"status": "\([a-z-]*\)".*/\1/p')
        case $state in
        completed | failed | cancelled) break ;;
        esac
        sleep 0.2
    done
    echo "$state"
}

# QEMU starts a shell with this; the files are ours, whatever the name of the guest's is.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM HUP
ln -s "$mtetool" "$work/mtetool"
if [ "$task" = save ]; then
    if [ -e "$file" ]; then
        echo "save-vm: $file exists" >&2
        exit 2
    fi
    part=$file.part
    (umask 077 && : >"$part")
    ln -s "$part" "$work/file"
    command="$work/mtetool relay save >$work/file"
else
    ln -s "$file" "$work/file"
    command="$work/mtetool relay load <$work/file"
fi
command="$command 2>$work/log; echo \$? >$work/part; mv $work/part $work/status"

if [ "$task" = load ]; then
    qmp migrate-incoming "{\"uri\": \"exec:$command\", \"exit-on-error\": false}" >/dev/null
else
    qmp migrate "{\"uri\": \"exec:$command\"}" >/dev/null
fi
state=$(migrated) || state=gone
# The relay ends after QEMU's part of it; it cannot outlive QEMU.
until [ -e "$work/status" ]; do sleep 0.1; done
cat "$work/log" >&2
status=$(cat "$work/status")
if [ "$state $status" = "completed 0" ]; then
    [ "$task" = load ] || mv "$part" "$file"
    exit 0
fi
echo "save-vm: failed; QEMU says \"$state\", and the relay ended with status $status" >&2
if [ "$task" = save ]; then
    rm -f "$part"
    # Where QEMU had written everything before the failure, the guest stands still.
    qmp query-status | grep -q postmigrate && qmp cont >/dev/null
    echo "save-vm: the guest goes on" >&2
fi
[ "$status" != 0 ] || status=4
exit "$status"
