"""ptrace(2) through ctypes: the requests, the stops, and the one structure that the kernel fills in."""

import ctypes
import os
import struct

PTRACE_CONT, PTRACE_DETACH, PTRACE_SYSCALL = 7, 17, 24
PTRACE_GETEVENTMSG, PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_LISTEN = 0x4201, 0x4206, 0x4207, 0x4208
PTRACE_GET_SYSCALL_INFO = 0x420E
# Mark syscall stops, follow fork, vfork and clone, report exec. PTRACE_O_EXITKILL is left out on purpose: a program
# must outlive a tracer that is killed.
OPTIONS = 0x1 | 0x2 | 0x4 | 0x8 | 0x10
EVENT_FORK, EVENT_VFORK, EVENT_CLONE, EVENT_EXEC, EVENT_STOP = 1, 2, 3, 4, 128
SYSCALL_STOP = 0x85  # SIGTRAP | 0x80
ANY_THREAD = 0x40000000  # __WALL

_libc = ctypes.CDLL(None, use_errno=True)
_ptrace = _libc.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

_info = ctypes.create_string_buffer(88)
_info_address = ctypes.addressof(_info)
_message = ctypes.c_ulong()
_message_address = ctypes.addressof(_message)
_entry = struct.Struct("<Q6Q").unpack_from
_exit = struct.Struct("<qB").unpack_from
_head = struct.Struct("<B3xI").unpack_from

ENTRY, EXIT = 1, 2


def seize(tid: int) -> None:
    """Become the tracer of a thread without stopping it.

    Raises: OSError (EPERM where that is not permitted, ESRCH for no such thread).
    """
    if _ptrace(PTRACE_SEIZE, tid, None, OPTIONS) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def resume(tid: int, request: int = PTRACE_SYSCALL, signal: int = 0) -> None:
    """Let a stopped thread go on. One that was killed meanwhile is no error: its end will be reported."""
    _ptrace(request, tid, None, signal or None)


def interrupt(tid: int) -> None:
    """Ask a running thread to stop."""
    _ptrace(PTRACE_INTERRUPT, tid, None, None)


def event_message(tid: int) -> int:
    """Return what an event is about: the new thread, or the old id of the thread that called exec."""
    _ptrace(PTRACE_GETEVENTMSG, tid, None, _message_address)
    return _message.value


def syscall_stop(tid: int) -> tuple[int, int, tuple[int, ...]]:
    """Return (ENTRY, architecture, (number, *arguments)) or (EXIT, architecture, (result, is_error)); 0 for neither."""
    if _ptrace(PTRACE_GET_SYSCALL_INFO, tid, 88, _info_address) < 0:
        return 0, 0, ()
    operation, architecture = _head(_info)
    if operation == ENTRY:
        return ENTRY, architecture, _entry(_info, 24)
    if operation == EXIT:
        return EXIT, architecture, _exit(_info, 24)
    return 0, architecture, ()
