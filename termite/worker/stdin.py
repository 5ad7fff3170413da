"""Tells whether a running command waits for its stdin.

The caller's stdin may belong to others as well (`while read x; do make $x; done < list`), so not one
byte of it is read before the command asks for it, as if it ran at home.  The kernel does not report a
reader that waits on a pipe; but it shows every process's current system call.
"""

from __future__ import annotations

import os
import platform

_READS, _POLLS = {
    "x86_64": ({0, 19, 40, 275}, {7, 23, 232, 270, 271, 281}),
    "aarch64": ({63, 65, 71, 76}, {22, 72, 73}),
}.get(platform.machine(), (set(), set()))
"""System calls whose first argument (for sendfile the second) is the descriptor; and those that wait for several."""

_SENDFILE = {40, 71}


def waits_for(pid: int, pipe: os.stat_result) -> bool:
    """True if the process or one below it waits for input from this pipe; False if it is gone."""
    todo = [pid]
    while todo:
        process = todo.pop()
        try:
            with open(f"/proc/{process}/task/{process}/children", "rb") as children:
                todo += map(int, children.read().split())
            if _waits(process, pipe):
                return True
        except OSError:
            continue  # ended meanwhile
    return False


def _waits(process: int, pipe: os.stat_result) -> bool:
    with open(f"/proc/{process}/syscall", "rb") as current:
        fields = current.read().split()
    if not fields or not fields[0].isdigit():
        return False  # running
    number = int(fields[0])
    if number in _READS:
        descriptor = int(fields[2 if number in _SENDFILE else 1], 16)
        return _is_pipe(process, descriptor & 0xFFFFFFFF, pipe)
    return number in _POLLS and _is_pipe(process, 0, pipe)


def _is_pipe(process: int, descriptor: int, pipe: os.stat_result) -> bool:
    try:
        st = os.stat(f"/proc/{process}/fd/{descriptor}")
    except OSError:
        return False
    return (st.st_dev, st.st_ino) == (pipe.st_dev, pipe.st_ino)
