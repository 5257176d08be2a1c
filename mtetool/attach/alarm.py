"""A signal after every ioctl that returned: a stop after the call, which only a tracer sees.

PTRACE_SYSCALL stops a thread twice at each of the hundreds of calls that a starting program makes.
A perf event on the tracepoint syscalls:sys_exit_ioctl counts in the kernel instead, and sends the
thread a signal through the event file's O_ASYNC (fcntl(2), F_SETSIG, F_SETOWN_EX). The tracer sees
the signal before it is delivered, and suppresses it. It is SIGWINCH, which does nothing by default,
and next to nothing in a handler: a tracer that dies with one in flight has done no harm. (SIGTRAP,
which attr.sigtrap sends, would end the process then; fanotify does not report device files. A
signal that threads send each other, as Go's do with SIGURG, is lost where it meets one of ours: the
kernel keeps one of each number.) The alarm needs the right to use perf and to read tracefs, in
practice root.

The signal is sent from an interrupt. In the emulator that comes before the thread's next
instruction; on hardware it may come later.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from pathlib import Path

SIGNAL = 28  # SIGWINCH
FILTER = b"ret > 0"

_NR_PERF_EVENT_OPEN = 241
# include/uapi/linux/perf_event.h: struct perf_event_attr in its first form (64 bytes): type,
# size, config, sample_period, sample_type, read_format, flags, wakeup_events, bp_type, bp_addr.
_ATTR = struct.Struct("<IIQQQQQIIQ")
_TYPE_TRACEPOINT, _FLAG_DISABLED, _FD_CLOEXEC = 2, 1, 8
_IOC_ENABLE = 0x2400
_IOC_SET_FILTER = 0x40082406
# include/uapi/asm-generic/fcntl.h
_F_SETSIG, _F_SETOWN_EX, _F_OWNER_TID = 10, 15, 0

_TRACEFS = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
# siginfo_t of the alarm's signal: si_signo, si_errno, si_code; si_band at 16, si_fd at 24.
_POLL_IN = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class IoctlAlarm:
    """While open, sends the thread SIGNAL whenever one of its ioctls has returned more than 0.

    It survives exec; threads and processes that the thread makes have no alarm. Raises OSError
    where perf or tracefs cannot be used.
    """

    def __init__(self, tid: int) -> None:
        attr = _ATTR.pack(
            *(_TYPE_TRACEPOINT, _ATTR.size, _tracepoint(), 1, 0, 0, _FLAG_DISABLED, 1, 0, 0)
        )
        fd = _libc.syscall(_NR_PERF_EVENT_OPEN, attr, tid, -1, -1, _FD_CLOEXEC)
        if fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._fd = int(fd)
        try:
            fcntl.ioctl(self._fd, _IOC_SET_FILTER, FILTER + b"\0")
            fcntl.fcntl(self._fd, _F_SETOWN_EX, struct.pack("<ii", _F_OWNER_TID, tid))
            fcntl.fcntl(self._fd, _F_SETSIG, SIGNAL)
            fcntl.fcntl(self._fd, fcntl.F_SETFL, os.O_ASYNC)
            fcntl.ioctl(self._fd, _IOC_ENABLE, 0)
        except OSError:
            self.close()
            raise

    def sent(self, signal_info: bytes) -> bool:
        """Whether a signal with that siginfo_t came from this alarm."""
        signal, _, code = struct.unpack_from("<iii", signal_info)
        (fd,) = struct.unpack_from("<i", signal_info, 24)
        return (signal, code, fd) == (SIGNAL, _POLL_IN, self._fd)

    def close(self) -> None:
        """Stop sending signals."""
        os.close(self._fd)


def _tracepoint() -> int:
    for root in _TRACEFS:
        path = root / "events/syscalls/sys_exit_ioctl/id"
        if path.exists():
            return int(path.read_text())
    raise FileNotFoundError("tracefs is not mounted")
