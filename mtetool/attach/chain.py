"""A chain: many ioctls of the helper thread, without a stop between them.

A single call costs two stops and several requests to the kernel, which is nothing beside a copy of
64 MiB, and a hundred times the work for a page. But the helper's road home (`svc; ret`, then
rt_sigreturn with a signal frame) can be laid many times: frame k restores the registers for call k,
with rt_sigreturn as the return address and frame k + 1 as the stack. Let go once, the helper makes
call after call, and nobody writes an instruction.

rt_sigreturn replaces x0, so the results of the calls are lost; who builds a chain must see from the
data which calls were completed. The last call is a tgkill to the helper itself, of a signal that is
ignored by default and for which the process has no handler. To a tracer it is a stop, so the end is
noticed without polling. Without a tracer the kernel drops it: if we die, the helper makes the
remaining calls and goes on to its crash road, as after any other call.

Frames stay where they are: a chain of n calls enters at the n-th frame from the end. So each needs
only its arguments.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from mtetool import procfs
from mtetool.attach import memory, seccomp, signal_frame, steps
from mtetool.attach.borrow import pass_on
from mtetool.attach.chain_room import ARGUMENT_BYTES, MOST_CALLS, STRIDE_BYTES
from mtetool.errors import AttachRefusedError

if TYPE_CHECKING:
    from mtetool.attach.helper import Helper

# System call numbers: include/uapi/asm-generic/unistd.h
_NR_IOCTL, _NR_TGKILL = 29, 131
# Ignored by default (signal(7)), and hardly ever handled.
_SIGNALS = (signal.SIGURG, signal.SIGWINCH)
_X2, _SP = 2, 31
_STATUS_BYTES = 16384  # all of /proc/PID/status, however long its lists of groups and CPUs are
_ARGUMENT = 2
"""The argument of ioctl(2) that differs from call to call."""


class Chain:
    """Chains of one ioctl on one file descriptor, made by a helper."""

    def __init__(self, helper: Helper, fd: int, request: int) -> None:
        self._helper = helper
        self._call = (fd, request)
        self._laid_for: int | None = None
        self._tgid, self._tid = _ids(helper.pid, helper.tracee.tid)
        self._status = f"/proc/{helper.pid}/status"

    @property
    def _arguments_at(self) -> int:
        return self._helper.chain_at + (MOST_CALLS + 1) * STRIDE_BYTES

    def is_allowed(self, filters: Iterable[seccomp.Program]) -> bool:
        """Whether the process's seccomp filters allow all calls of any chain."""
        filters = tuple(filters)
        calls = [
            seccomp.Call("ioctl", _NR_IOCTL, (*self._call, self._arguments_at)),
            *(
                seccomp.Call("tgkill", _NR_TGKILL, (self._tgid, self._tid, number))
                for number in _SIGNALS
            ),
        ]
        if seccomp.looks_at(filters, _ARGUMENT):
            return False  # then one address's answer says nothing about the others'
        try:
            for call in calls:
                seccomp.allow(filters, self._helper.pid, call)
        except AttachRefusedError:
            return False
        return True

    def run(self, arguments: bytes) -> bool:
        """Make a call for each ARGUMENT_BYTES of `arguments`, at most MOST_CALLS, in order.

        Returns when all are made; False if the process has a handler for every signal that could
        report the end: then no call was made. Raises GuestLostError, OSError.
        """
        steps.enter("chain")
        helper, tracee = self._helper, self._helper.tracee
        number = _free_signal(self._status)
        if number is None:
            return False
        if self._laid_for != number:
            memory.write(helper.pid, helper.chain_at, self._frames(number))
            self._laid_for = number
        skipped = MOST_CALLS - len(arguments) // ARGUMENT_BYTES
        memory.write(helper.pid, self._arguments_at + skipped * ARGUMENT_BYTES, arguments)
        helper.aim_at_frame(helper.chain_at + skipped * STRIDE_BYTES)
        tracee.cont()
        steps.reach("running")
        while (stop := tracee.wait()).event or stop.signal != number:
            tracee.cont(pass_on(tracee, stop))
        # Before the helper runs on: the last frame left that one signal unblocked.
        tracee.set_signal_mask(signal_frame.ALL_SIGNALS)
        return True

    def _frames(self, number: int) -> bytes:
        """All frames: MOST_CALLS ioctls, and the tgkill."""
        helper = self._helper
        arguments_at = self._arguments_at
        call = helper.frame(_NR_IOCTL, (*self._call, 0))
        frames = np.tile(np.frombuffer(_cut(call), np.uint8), (MOST_CALLS, 1))
        index = np.arange(MOST_CALLS, dtype=np.uint64)
        _set(frames, _X2, arguments_at + index * np.uint64(ARGUMENT_BYTES))
        _set(frames, _SP, helper.chain_at + (index + np.uint64(1)) * np.uint64(STRIDE_BYTES))
        last = helper.frame(
            _NR_TGKILL,
            (self._tgid, self._tid, number),
            blocked=signal_frame.ALL_SIGNALS & ~(1 << (number - 1)),
        )
        return frames.tobytes() + _cut(last)


def _cut(frame: bytes) -> bytes:
    if any(frame[STRIDE_BYTES:]):
        raise AssertionError("a frame without vectors is longer than it was")
    return frame[:STRIDE_BYTES]


def _set(
    frames: np.ndarray[tuple[int, int], np.dtype[np.uint8]], register: int, values: object
) -> None:
    at = signal_frame.register_at(register)
    column = np.asarray(values, np.uint64).reshape(-1, 1)
    frames[:, at : at + 8] = column.view(np.uint8)


def _ids(pid: int, tid: int) -> tuple[int, int]:
    """The ids of a process and its thread as the process itself knows them."""
    process, thread = (
        procfs.status_of(of).get("NSpid", "0") for of in (str(pid), f"{pid}/task/{tid}")
    )
    return int(process.split()[-1]), int(thread.split()[-1])


def _free_signal(status: str) -> int | None:
    """A signal that does nothing in the process: ignored by default, and not handled."""
    # Asked before every chain, since a handler may be installed at any time; so without Python's
    # layers of files.
    fd = os.open(status, os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(fd, _STATUS_BYTES)
    finally:
        os.close(fd)
    handled = int(text.partition(b"\nSigCgt:")[2][:18] or b"f" * 16, 16)
    return next((int(number) for number in _SIGNALS if not handled >> (number - 1) & 1), None)
