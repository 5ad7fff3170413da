"""How a daemon's event loop runs: uvloop's if it is installed, soon when woken, seldom interrupted for garbage."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib
import os
import platform
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

SLICE_NS = 300_000
"""As mkbox/slice.h has it."""

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274, "ppc64le": 355, "s390x": 345}
_SCHED_ATTR = struct.Struct("=IIQiIQQQ")
"""size, policy, flags, nice, priority, runtime (here: the slice, in ns), deadline, period; see sched_setattr(2)."""


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """For asyncio.Runner; asyncio's own costs three times as much."""
    try:
        uvloop: Any = importlib.import_module("uvloop")
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def settle_memory() -> None:
    """To be called when all is imported: what there is now will stay, so it is not searched for garbage again.

    What comes later is mostly freed by its reference count; the rest can wait a while.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def favour_the_loop() -> None:
    """A thread that computes in Python gives way to the event loop after a millisecond, instead of five."""
    sys.setswitchinterval(0.001)


def be_woken_soon() -> None:
    """Asks the scheduler for a short slice, for this thread and whatever it starts: a daemon that is woken while
    commands compute is then not the one that waits.

    To be called before there are other threads.  No effect before Linux 6.12, or where it is not allowed.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    with suppress(OSError, AttributeError):  # musl has no sched_getscheduler(); a static Python no symbols
        if number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
            return
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        attr = _SCHED_ATTR.pack(_SCHED_ATTR.size, os.SCHED_OTHER, 0, nice, 0, SLICE_NS, 0, 0)
        ctypes.CDLL(None).syscall(number, 0, attr, 0)
