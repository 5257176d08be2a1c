# Completion for mtetool in bash.
#
# Bash completes what follows the last character of COMP_WORDBREAKS, which contains ":" and "=": an
# answer must not repeat what comes before it.
_mtetool_completion() {
    local IFS=$'\n' type value word=$2
    COMPREPLY=()
    while IFS=, read -r type value; do
        case $type in
            begin) COMPREPLY+=("$value"); compopt -o nospace ;;
            plain)
                if [[ $value == *:?* && $COMP_WORDBREAKS == *:* ]]; then value=${value#*:}; fi
                COMPREPLY+=("$value") ;;
            file) compopt -o filenames; COMPREPLY+=($(compgen -f -- "$word")) ;;
            emu)
                compopt -o filenames
                if [[ $word == emu:* ]]; then
                    COMPREPLY+=($(compgen -P emu: -f -- "${word#emu:}"))
                else
                    COMPREPLY+=($(compgen -f -- "${word#:}"))
                fi ;;
        esac
    done < <(COMP_LINE=${COMP_LINE:0:COMP_POINT} _MTETOOL_COMPLETE=bash_complete \
        command mtetool 2>/dev/null)
}
complete -F _mtetool_completion mtetool
