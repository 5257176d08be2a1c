#!/bin/sh
# Rehearse a migration whose destination fails, on emulated guests: look at mtetool's status,
# retry, start another destination, or roll back. In the end each guest has exactly its tags.
#
#   rehearse.sh [DIRECTORY [FAULT]...]     a migration for each FAULT (see mtetool-emu(1))
set -eu

dir=${1:-rehearsal}
[ $# -eq 0 ] || shift
if [ $# -eq 0 ]; then
    set -- EFAULT,on=write,after=1000,times=1 vanish,on=write,after=2000 EBUSY,on=write,after=3000
fi

rm -rf "$dir"
mkdir -p "$dir"
source=emu:$dir/source.emu
target=emu:$dir/target.emu
snapshot=$dir/guest.mtesnap

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

say() {
    printf -- '-- %s\n' "$*"
}

# Print the value of a key of a JSON object on one line; enough for ids, which have no quotes.
value_of() {
    sed -n "s/.*\"$1\": \"\([^\"]*\)\".*/\1/p"
}

new_target() {
    run mtetool emu create "$target" --memory 16M --fill random --seed 7 --force "$@"
}

# Restore into the target until its tags are exact; give up after three attempts.
migrate() {
    for attempt in 1 2 3; do
        status=0
        printf '\n$ mtetool restore %s %s --json\n' "$snapshot" "$target"
        mtetool restore "$snapshot" "$target" --json >"$dir/report" 2>"$dir/error" || status=$?
        error=$(value_of error <"$dir/error")
        say "attempt $attempt: status $status${error:+, error $error}"
        case $status,$error in
            0,) return 0 ;;
            3,) say "some pages are not restored yet: retry" ;;
            4,busy) say "the destination logs dirty pages: retry" ;;
            4,guest-lost | 4,no-such-process)
                say "the destination is gone: start another one"
                new_target || return 1
                ;;
            *)
                cat "$dir/error" >&2
                return 1
                ;;
        esac
    done
    return 1
}

run mtetool emu create "$source" --memory 16M --fill heap --seed 1
run mtetool save "$source" -o "$snapshot"

for fault; do
    printf '\n'
    say "a destination with the fault $fault"
    new_target --fault "$fault"
    if migrate; then
        say "migrated; the tags of the source and of the target:"
        run mtetool emu fault "$target" --clear
        run mtetool diff "$source" "$target"
        echo same
    else
        say "rolled back; the source goes on, with its old tags:"
        run mtetool diff "$snapshot" "$source"
        echo same
    fi
done
