"""Shell completion of guests, snapshots and files; see mtetool(1), COMPLETION.

On each Tab the shell's script calls mtetool with the line so far, and gets one line per answer:
`file,` and `emu,` (the shell itself completes the name of a file, after `emu:`), `begin,kvm:` (more
must follow) or `plain,WORD`. Errors are silent: nobody wants a message in the middle of a command
line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import click
from click.shell_completion import CompletionItem, ShellComplete, add_completion_class

_KINDS = ("emu:", "kvm:", "libvirt:", "proc:")
# Bounds for hosts with very many processes.
_MOST_PIDS = 20_000
_MOST_FDS = 1_000
_MOST_ANSWERS = 200
_VM_LINK = "anon_inode:kvm-vm"
# A shell would split other names, or run parts of them.
_PLAIN_NAME = re.compile(r"[\w.+@-]+", re.ASCII)


def files(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """File names, which the shell itself completes."""
    return [CompletionItem(incomplete, type="file")]


def emulated(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The file of an emulated guest, with or without `emu:`."""
    return [CompletionItem("", type="emu" if incomplete.startswith("emu:") else "file")]


def guests(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Guests: the kinds, then their files or processes."""
    kind, colon, _ = incomplete.partition(":")
    if not colon:
        return [
            CompletionItem(name, type="begin") for name in _KINDS if name.startswith(incomplete)
        ]
    if kind == "emu":
        return [CompletionItem("", type="emu")]
    if kind in ("kvm", "libvirt", "proc"):
        names = _domains() if kind == "libvirt" else _processes(kind)
        found = (name for name in names if name.startswith(incomplete))
        return [CompletionItem(name) for name in islice(found, _MOST_ANSWERS)]
    return []


def sources(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Guests and snapshots."""
    found = guests(context, parameter, incomplete)
    return found if ":" in incomplete else [*found, CompletionItem("", type="file")]


def _pids() -> list[int]:
    names = (entry.name for entry in Path("/proc").iterdir())
    return sorted(islice((int(name) for name in names if name.isdecimal()), _MOST_PIDS))


def _domains() -> Iterator[str]:
    """Yield `libvirt:NAME` of running domains, by their command lines: libvirt is not asked."""
    from mtetool.vmm import proc, qemu_options

    for pid in _pids():
        domain = qemu_options.domain(proc.command_line(pid))
        if domain and _PLAIN_NAME.fullmatch(domain.name):
            yield f"libvirt:{domain.name}"


def _processes(kind: str) -> Iterator[str]:
    """Yield `kvm:PID` of processes with a VM, or `proc:PID` of this user's, as /proc shows them."""
    for pid in _pids():
        try:
            owned = Path(f"/proc/{pid}").stat().st_uid == os.getuid()
            if _has_vm(pid) if kind == "kvm" else owned:
                yield f"{kind}:{pid}"
        except OSError:
            continue


def _has_vm(pid: int) -> bool:
    fds = islice(Path(f"/proc/{pid}/fd").iterdir(), _MOST_FDS)
    return any(str(fd.readlink()).startswith(_VM_LINK) for fd in fds)


class _Shell(ShellComplete):
    """Any shell: it passes the line up to the cursor, and takes `type,value` lines."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the one to complete, and what is typed of that one."""
        line = os.environ.get("COMP_LINE", "")
        words = click.shell_completion.split_arg_string(line)
        complete = not words or (line[-1:].isspace() and not line.endswith("\\ "))
        incomplete = "" if complete else words.pop()
        return words[1:], incomplete

    def format_completion(self, item: CompletionItem) -> str:
        """Return an answer as a line."""
        return f"{item.type},{item.value}"


# Bash completes what follows the last character of COMP_WORDBREAKS, which contains ":" and "=": an
# answer must not repeat what comes before it.
_BASH = r"""
%(complete_func)s() {
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
    done < <(COMP_LINE=${COMP_LINE:0:COMP_POINT} %(complete_var)s=bash_complete \
        command %(prog_name)s 2>/dev/null)
}
complete -F %(complete_func)s %(prog_name)s
"""

_ZSH = r"""#compdef %(prog_name)s
%(complete_func)s() {
    local answer type value
    local -a plain begin answers
    answers=("${(@f)$(COMP_LINE="${words[1,CURRENT-1]} $PREFIX" %(complete_var)s=zsh_complete \
        command %(prog_name)s 2>/dev/null)}")
    [[ $PREFIX == --*=* ]] && compset -P '*='
    for answer in $answers; do
        type=${answer%%%%,*} value=${answer#*,}
        case $type in
            begin) begin+=("$value") ;;
            plain) plain+=("$value") ;;
            file) _path_files ;;
            emu) compset -P 'emu:'; _path_files ;;
        esac
    done
    (( $#begin )) && compadd -S '' -a begin
    (( $#plain )) && compadd -a plain
    return 0
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""

_FISH = r"""
function %(complete_func)s
    set -l token (commandline -ct)
    set -l before (string match -r -- '^--[^=]*=' $token; or echo '')
    set -l word (string replace -r -- '^--[^=]*=' '' "$token")
    set -l line (commandline -cp | string collect)
    for answer in (env COMP_LINE=$line %(complete_var)s=fish_complete %(prog_name)s 2>/dev/null)
        set -l parts (string split -m 1 , -- $answer)
        switch $parts[1]
            case begin plain
                echo "$before$parts[2]"
            case file
                printf '%%s\n' "$before"(__fish_complete_path "$word")
            case emu
                set -l path (string replace emu: '' -- "$word")
                printf '%%s\n' "$before"emu:(__fish_complete_path "$path")
        end
    end
end
complete --no-files --command %(prog_name)s --arguments '(%(complete_func)s)'
"""


def register() -> None:
    """Make click use these scripts."""
    for name, script in (("bash", _BASH), ("zsh", _ZSH), ("fish", _FISH)):
        attributes = {"name": name, "source_template": script}
        add_completion_class(type(f"_{name}", (_Shell,), attributes), name)
