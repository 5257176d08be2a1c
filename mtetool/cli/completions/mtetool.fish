# Completion for mtetool in fish.
function _mtetool_completion
    set -l token (commandline -ct)
    set -l before (string match -r -- '^--[^=]*=' $token; or echo '')
    set -l word (string replace -r -- '^--[^=]*=' '' "$token")
    set -l line (commandline -cp | string collect)
    for answer in (env COMP_LINE=$line _MTETOOL_COMPLETE=fish_complete mtetool 2>/dev/null)
        set -l parts (string split -m 1 , -- $answer)
        switch $parts[1]
            case begin plain
                echo "$before$parts[2]"
            case file
                printf '%s\n' "$before"(__fish_complete_path "$word")
            case emu
                set -l path (string replace emu: '' -- "$word")
                printf '%s\n' "$before"emu:(__fish_complete_path "$path")
        end
    end
end
complete --no-files --command mtetool --arguments '(_mtetool_completion)'
