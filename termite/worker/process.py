"""What a mirror process does to itself: its mounts, the signals it does not take, the memory it has."""

from __future__ import annotations

import ctypes
import os
import signal

from termite.errors import BoxError

_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_PR_SET_PDEATHSIG = 1
_SIGKILL = 9


def own_namespace() -> None:
    """Puts this process into a mount namespace of its own and ties its life to its parent's."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None):
        code = ctypes.get_errno()
        raise BoxError(f"cannot make a mount namespace: {os.strerror(code)}; run the worker as root")
    libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)


def leave_signals_to_the_daemon() -> None:
    """A signal to the whole service must not end tasks that the daemon wants to see finished.

    Handlers that do nothing, because what is ignored would be ignored by the commands in the boxes as well.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)


def memory_used() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
