#!/bin/sh
# The whole job on an emulated guest: create one, save its tags, look at them, restore them into
# a second guest, and check that nothing differs.
#
#   demo.sh [DIRECTORY]        for the guests and the snapshot (default: demo)
set -eu

dir=${1:-demo}
rm -rf "$dir"
mkdir -p "$dir"

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

run mtetool emu create "$dir/source.emu" --memory 1G --fill heap --seed 1
run mtetool save "emu:$dir/source.emu" -o "$dir/guest.mtesnap"
run mtetool info "$dir/guest.mtesnap"
run mtetool dump "$dir/guest.mtesnap" --range 0x4001d000:1K
run mtetool emu create "$dir/target.emu" --memory 1G
run mtetool restore "$dir/guest.mtesnap" "emu:$dir/target.emu"
run mtetool diff "emu:$dir/source.emu" "emu:$dir/target.emu"
