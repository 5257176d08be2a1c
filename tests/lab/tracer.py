"""A program that starts another one, and traces it to its end, as a debugger does."""

from __future__ import annotations

TRACER = (
    "import ctypes, os, sys\n"
    "pid = os.fork()\n"
    "if not pid:\n"
    "    ctypes.CDLL(None).ptrace(0, 0, None, None)\n"  # PTRACE_TRACEME
    "    os.execvp(sys.argv[1], sys.argv[1:])\n"
    "while os.WIFSTOPPED(status := os.waitpid(pid, 0)[1]):\n"
    "    ctypes.CDLL(None).ptrace(7, pid, None, None)\n"  # PTRACE_CONT
    "sys.exit(os.waitstatus_to_exitcode(status))\n"
)
