"""End a function at its k-th system call, or let that call fail: what a power cut and a disk do.

A forked process lets itself be traced (ptrace) by the test, which stops at every system call of
the function, Python's own and those of libraries alike. Linux on x86-64 only.
"""

import ctypes
import errno
import os
import platform
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

from tests.forked import fork

_TRACEME, _GETREGS, _SETREGS, _SYSCALL = 0, 12, 13, 24
_RAX, _ORIG_RAX = 10, 15  # among the 27 registers of user_regs_struct
# The calls that a disk can refuse; others fail for reasons that are not a disk's.
_OF_THE_DISK = {
    1: "write",
    2: "open",
    18: "pwrite64",
    74: "fsync",
    75: "fdatasync",
    77: "ftruncate",
    82: "rename",
    83: "mkdir",
    87: "unlink",
    257: "openat",
    264: "renameat",
    285: "fallocate",
    316: "renameat2",
}

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Fate:
    """How a traced function ended.

    Attributes:
        calls: Its system calls, up to its end.
        reached: Whether the call that was asked for was reached.
        status: Exit status; negative for the signal that ended it.
    """

    calls: int
    reached: bool
    status: int


def killed_at(
    call: int, work: Callable[[], object], prepare: Callable[[], object] = lambda: None
) -> Fate:
    """Do ``work`` in a forked process, killed when it enters its ``call``-th system call.

    ``prepare`` is done before, in the same process, and not counted.
    """
    return _traced(work, lambda number, name: "kill" if number == call else "", prepare=prepare)


def failing_at(call: int, work: Callable[[], object], error: int = errno.EIO) -> Fate:
    """Do ``work``, where the ``call``-th of the calls that a disk answers fails with ``error``."""
    of_disk = iter(range(1, 10**9))
    return _traced(work, lambda _, name: "fail" if name and next(of_disk) == call else "", error)


def why_not() -> str:
    """Why calls cannot be traced here; empty where they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "system calls are traced on Linux with x86-64 only"
    fate = _traced(lambda: None, lambda *_: "")
    return "" if fate.calls and fate.status == 0 else "ptrace is not permitted here"


def _traced(
    work: Callable[[], object],
    judge: Callable[[int, str], str],
    error: int = 0,
    prepare: Callable[[], object] = lambda: None,
) -> Fate:
    def child() -> None:
        prepare()
        if _ptrace(_TRACEME, 0):
            os._exit(77)
        os.kill(os.getpid(), signal.SIGSTOP)
        work()
        os._exit(0)

    pid = fork(child)
    calls, entering, reached, failing = 0, True, False, False
    _, status = os.waitpid(pid, 0)
    while os.WIFSTOPPED(status):
        stopped = os.WSTOPSIG(status)
        if stopped == signal.SIGTRAP:
            if entering:
                calls += 1
                registers = _registers(pid)
                what = judge(calls, _OF_THE_DISK.get(registers[_ORIG_RAX], ""))
                reached |= bool(what)
                if what == "kill":
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    return Fate(calls, True, -signal.SIGKILL)
                if what == "fail":
                    registers[_ORIG_RAX] = ctypes.c_ulong(-1).value  # no such call: not done
                    _set(pid, registers)
                    failing = True
            elif failing:
                registers = _registers(pid)
                registers[_RAX] = ctypes.c_ulong(-error).value
                _set(pid, registers)
                failing = False
            entering = not entering
            stopped = 0
        _ptrace(_SYSCALL, pid, data=0 if stopped == signal.SIGSTOP else stopped)
        _, status = os.waitpid(pid, 0)
    return Fate(calls, reached, os.waitstatus_to_exitcode(status))


def _ptrace(request: int, pid: int, data: int = 0) -> int:
    call = _libc.ptrace
    call.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    call.restype = ctypes.c_long
    return int(call(request, pid, None, data))


def _registers(pid: int) -> "ctypes.Array[ctypes.c_ulong]":
    registers = (ctypes.c_ulong * 27)()
    _ptrace(_GETREGS, pid, ctypes.addressof(registers))
    return registers


def _set(pid: int, registers: "ctypes.Array[ctypes.c_ulong]") -> None:
    _ptrace(_SETREGS, pid, ctypes.addressof(registers))
