#!/bin/sh
# Move a running QEMU guest to another host, live, with its MTE tags.
#
#   live-migrate.sh SOURCE_QMP HOST TARGET_QMP
#
# SOURCE_QMP is the monitor socket of the QEMU that runs the guest. On HOST, a QEMU with the same
# command line waits, started with "-incoming defer" and the monitor socket TARGET_QMP. Both were
# started by "mtetool exec -- qemu-system-aarch64 ...", without mte=on. HOST lets root in by ssh.
# These variables replace what the script derives from HOST:
#
#   REMOTE  the command that runs a command there    ssh root@HOST
#   SOCKET  where the target's QEMU is to listen     /run/mtetool-incoming-PID.sock
#
# The guest runs all the while. If anything fails, it goes on at the source, and the target ends.
set -eu

if [ $# -ne 3 ]; then
    sed -n '2,/^set -eu/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
source_qmp=$1 host=$2 target_qmp=$3
remote=${REMOTE-ssh root@$host} mtetool=${MTETOOL:-mtetool}
socket=${SOCKET:-/run/mtetool-incoming-$$.sock}
work=$(mktemp -d)

# qmp WHERE SOCKET COMMAND [JSON_ARGUMENTS]: run a command here or there, print its return value.
cat >"$work/qmp.py" <<'PYTHON'
import json, socket, sys

path, command, *arguments = (bytes.fromhex(word).decode() for word in sys.argv[1:])
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
qmp() {
    where=$1
    shift
    # In hex, no shell on the way changes them.
    words=$(for word; do printf '%s ' "$(printf %s "$word" | od -An -v -tx1 | tr -d ' \n')"; done)
    # shellcheck disable=SC2086 # a command with its arguments, and words of hex
    $where python3 - $words <"$work/qmp.py"
}

moved=no relay=''
finish() {
    status=$?
    trap - EXIT
    if [ $moved = no ]; then
        [ -z "$relay" ] || kill "$relay" 2>/dev/null || true
        qmp "$remote" "$target_qmp" quit >/dev/null 2>&1 || true
        echo "live-migrate: failed; the guest goes on at the source" >&2
    fi
    rm -rf "$work"
    exit "$status"
}
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# Without a return path, QEMU at the source would not wait for the tags.
on='{"capabilities": [{"capability": "return-path", "state": true}]}'
qmp "" "$source_qmp" migrate-set-capabilities "$on" >/dev/null
qmp "$remote" "$target_qmp" migrate-set-capabilities "$on" >/dev/null
qmp "$remote" "$target_qmp" migrate-incoming "{\"uri\": \"unix:$socket\"}" >/dev/null

"$mtetool" relay source --from "listen:unix:$work/out" \
    --to "exec:$remote $mtetool relay destination --from - --to unix:$socket" &
relay=$!
until [ -S "$work/out" ]; do
    kill -0 $relay 2>/dev/null || wait $relay
    sleep 0.2
done

qmp "" "$source_qmp" migrate "{\"uri\": \"unix:$work/out\"}" >/dev/null
wait $relay
relay=''
status=$(qmp "" "$source_qmp" query-migrate | sed -n 's/.*"status": "\([a-z-]*\)".*/\1/p')
if [ "$status" != completed ]; then
    echo "live-migrate: QEMU says that the migration is \"$status\"" >&2
    exit 4
fi
moved=yes
echo "live-migrate: the guest is at $host, with its tags; end QEMU at the source"
