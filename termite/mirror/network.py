"""A network namespace with nothing in it but loopback, for all boxes of one mirror.

Made once, because a fresh one per task costs more than everything else of a box together.  The only
import of pyroute2, which takes a while: `load_early` does it beforehand.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import threading
from typing import Any

from termite.errors import BoxError

_CLONE_NEWNET = 0x40000000
_LIMIT_S = 10.0


def load_early() -> Any:
    """pyroute2; on a thread, while nobody waits for it."""
    return importlib.import_module("pyroute2")


def make_network() -> int:
    """A descriptor that keeps the namespace alive; BoxError if it cannot be made."""
    made: list[int] = []
    trouble: list[Exception] = []

    def make() -> None:
        """In a thread of its own, which alone enters the namespace and ends in it."""
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            if libc.unshare(_CLONE_NEWNET):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
            with load_early().IPRoute() as route:
                route.link("set", index=1, state="up")
            made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        except Exception as e:
            trouble.append(e)

    thread = threading.Thread(target=make, name="network")
    thread.start()
    thread.join(_LIMIT_S)
    if not made:
        reason = trouble[0] if trouble else f"no answer within {_LIMIT_S:g} s"
        raise BoxError(f"cannot make a network namespace for the boxes: {reason}; run the worker as root")
    return made[0]
